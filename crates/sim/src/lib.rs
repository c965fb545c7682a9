//! Answers for proof by simulation: the engine, unchanged, over a ring, disks, clients and a clock
//! that a seed decides. One seed is one run, to the byte.
//!
//! [`run`] builds a world from a seed (random stacks of the real layers over disks with volatile
//! caches, some of them behind NBD servers, clients with habits, faults), lets the engine serve it,
//! cuts the power, rebuilds the engine over what survived, and judges every result by an oracle
//! that knows what each sector may hold. [`Mutant`]s are bugs put in on purpose, by which the
//! simulator itself is tested.
#![forbid(unsafe_code)]

mod cells;
mod disk;
mod export;
mod failure;
mod far;
mod live;
mod mirror;
mod mutants;
mod oracle;
mod plan;
mod ring;
mod rng;
mod run;
mod server;
mod splices;
mod stream;
mod trace;
mod tree;
mod workload;
mod world;

pub use failure::{Failure, Kind};
pub use mutants::Mutant;
pub use run::{Options, Report, run};
