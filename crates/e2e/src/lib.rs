//! Answers for what the end-to-end tests share: commands with a time limit, rooms that tidy up
//! after a test, disks, fio, and what this machine can do.
//!
//! All of it is test code: whatever goes wrong is a panic that says what, and so a failed test.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::unwrap_used)] // A failed expectation is a failed test.

mod command;
mod disk;
mod fio;
mod host;
mod left;
mod replay;
mod room;
mod server;
mod suite;

pub use command::{Call, Ran, Running, call, wait_until};
pub use disk::{Disk, Process};
pub use fio::{Moved, deep, engines, load, verify};
pub use host::{
    FUSE_PATHS, Kind, Mode, PATHS, Setting, had, is_root, kernel_has_file_system, kernel_is, mode,
    need, need_tool, program,
};
pub use left::leftovers;
pub use replay::{Entry, Log};
pub use room::Room;
pub use server::{Server, Talk};
pub use suite::{Group, Outcome, Skip, skip, trials};

/// Bytes.
pub const MIB: u64 = 1 << 20;
