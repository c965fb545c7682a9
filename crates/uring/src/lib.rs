//! Answers for io_uring: a [`Ring`](devsplice_engine::Ring) that owns every entry's memory until
//! its completion, and `dev_splice`, the one table of how pages reach a place.
//!
//! All `unsafe` of the data path is in this crate. What the kernel is given an address of lies in a
//! table or an arena that lives as long as the ring.

mod arena;
mod bell;
pub mod blockctl;
mod bytes;
pub mod control;
pub mod fds;
mod files;
#[cfg(feature = "imitation")]
mod imitation;
mod inner;
pub mod lease;
pub mod loopctl;
pub mod probe;
mod ring;
mod setup;
mod splice;
mod submit;
pub mod thread;
pub mod uapi;
pub mod vsock;

pub use bell::Bell;
pub use bytes::Bytes;
pub use files::{FileKind, RingFile, zeroes};
pub use ring::batch::{Buffers, MOST_TAGS};
pub use ring::in_place::is_in_memory;
pub use ring::socket::{MAX_OUTGOING, Outgoing, Wait};
pub use ring::{
    Brief, Command, Config, FUSE_OP_AT, FuseEntry, FusePayload, LaneMemory, Line, Link, Patience,
    Prepared, Remote, Slots, Standing, Uring, open,
};
