//! Answers for bells: rung by any thread, heard by a ring that polls them.
//!
//! A bell is a pipe, not an eventfd. A ring of a pool tells its thread of work through an eventfd
//! that is registered with it ([`Brief`](crate::Brief)), and one eventfd must not be rung from
//! within another: the kernel puts that off, and since it marks the eventfd for that and never
//! unmarks it, does so once and never again (`io_eventfd_do_signal`, io_uring/eventfd.c; seen on
//! 6.18). Whoever was rung for the second time slept on.

use std::os::fd::OwnedFd;

use devsplice_core::{Error, Result};
use rustix::pipe::{PipeFlags, pipe_with};

/// Such a bell.
#[derive(Debug)]
pub struct Bell {
    ear: OwnedFd,
    hand: OwnedFd,
}

impl Bell {
    /// One that nobody has rung.
    ///
    /// # Errors
    /// If there is no further descriptor.
    pub fn new() -> Result<Bell> {
        let made = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK);
        let (ear, hand) = made.map_err(|errno| Error::os("a bell", &errno.into()))?;
        Ok(Bell { ear, hand })
    }

    /// Does not block: one that is full has been rung often enough.
    pub fn ring(&self) {
        let _ = rustix::io::write(&self.hand, &[1]);
    }

    /// Does not block. What was rung is heard, most often all of it; what is left is heard next.
    pub fn heard(&self) {
        let _ = rustix::io::read(&self.ear, &mut [0_u8; 64]);
    }

    /// Readable when it was rung.
    #[must_use]
    pub fn ear(&self) -> &OwnedFd {
        &self.ear
    }
}
