//! Answers for files that a ring has been given: registered once, named by index, with what is
//! known of the operations they take.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use devsplice_core::Result;
use rustix::fs::OFlags;

use crate::bytes::Bytes;
use crate::ring::in_place::is_in_memory;

/// What a file is, as far as moving data is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// A character device or anything else: reads, writes and commands only.
    Other,
}

/// A file to register.
#[derive(Debug)]
pub struct RingFile {
    /// Open with the access that its use needs.
    pub fd: OwnedFd,
    /// What it is.
    pub kind: FileKind,
}

/// How a range of a file can be made to read as zeros, best first. A way that the file system does
/// not know is learned at its first refusal and not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ZeroWay {
    Punch,
    Range,
    Write,
}

/// How a range of a block device can be discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiscardWay {
    /// `BLOCK_URING_CMD_DISCARD`, since 6.12.
    Command,
    /// Punching a hole: for files, and for devices of older kernels (where it also zeroes).
    Punch,
}

/// A registered file.
pub(crate) struct Slot {
    /// Keeps the file open; the kernel's table has its own reference.
    pub(crate) fd: OwnedFd,
    /// It lies in memory and nowhere else.
    pub(crate) is_in_memory: bool,
    /// Served by helpers instead; the file is what they ring with.
    pub(crate) bytes: Option<Arc<dyn Bytes>>,
    pub(crate) unmap: ZeroWay,
    pub(crate) keep: ZeroWay,
    pub(crate) discard: DiscardWay,
}

impl Slot {
    pub(crate) fn new(file: RingFile) -> Slot {
        let discard = match file.kind {
            FileKind::Block => DiscardWay::Command,
            FileKind::Regular | FileKind::Other => DiscardWay::Punch,
        };
        Slot {
            is_in_memory: file.kind == FileKind::Regular && is_in_memory(&file.fd),
            fd: file.fd,
            bytes: None,
            unmap: ZeroWay::Punch,
            keep: ZeroWay::Range,
            discard,
        }
    }

    pub(crate) fn zero_way(&self, unmap: bool) -> ZeroWay {
        if unmap { self.unmap } else { self.keep }
    }

    /// Takes note that zeroing was refused; whether there is another way.
    pub(crate) fn refused_zero(&mut self, unmap: bool, way: ZeroWay) -> bool {
        let next = match way {
            ZeroWay::Punch => ZeroWay::Range,
            ZeroWay::Range => ZeroWay::Write,
            ZeroWay::Write => return false,
        };
        let known = if unmap { &mut self.unmap } else { &mut self.keep };
        *known = next.max(*known);
        true
    }

    /// Takes note that a discard was refused; whether there is another way. Others that were sent
    /// the same way may be refused after it.
    pub(crate) fn refused_discard(&mut self, way: DiscardWay) -> bool {
        self.discard = DiscardWay::Punch;
        way == DiscardWay::Command
    }
}

/// What reads as zeros without end. It is opened once for all rings of the process, so that a
/// thread that may open nothing any more can have a ring.
///
/// # Errors
/// If it cannot be opened.
pub fn zeroes() -> Result<&'static OwnedFd> {
    static ZEROES: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(zeroes) = ZEROES.get() {
        return Ok(zeroes);
    }
    let opened = crate::open("/dev/zero", OFlags::RDONLY)?;
    Ok(ZEROES.get_or_init(|| opened))
}
