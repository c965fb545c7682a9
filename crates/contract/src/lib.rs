//! Answers for what every layer, backend and front end promises, as tests that anyone can run over
//! their own.
//!
//! One vocabulary ([`cases`]) and three entries: [`layer`] (over model disks, without a kernel),
//! [`backend`] (over a real ring) and [`device`] (any disk or file, from outside). Each gives a
//! [`Suite`] of named cases: run them as tests of a harness, or all in one with [`Suite::assert`].
//!
//! ```
//! use devsplice_contract::layer::{self, Subject};
//! use devsplice_core::Limits;
//!
//! let disk = Limits::ideal(64 << 10);
//! let stripe = &devsplice_layers::stripe::DRIVER;
//! layer::suite(&Subject::driver(stripe, "chunk=4k", &[disk, disk])).assert();
//! ```
#![forbid(unsafe_code)]

pub mod backend;
pub mod bench;
pub mod cases;
pub mod content;
pub mod device;
pub mod fake;
mod front;
pub mod layer;
pub mod model;
pub mod rng;
pub mod suite;
pub mod target;

pub use bench::Bench;
pub use suite::{Case, Outcome, Report, Suite, Verdict};
pub use target::{Ask, Done, Target};
