//! Answers for the bottoms of stacks: where bytes finally live.
#![forbid(unsafe_code)]

pub mod file;
pub mod mem;
pub mod nbd;
pub mod sysfs;
pub mod zones;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use devsplice_core::{Args, Errno, Error, Limits, Result, Source};
use devsplice_uring::FileKind;

/// Where the bytes of a bottom are.
#[derive(Debug)]
pub enum Body {
    /// In a file or on a device.
    File {
        /// It.
        fd: OwnedFd,
        /// What it is, for the ring.
        kind: FileKind,
        /// Whether data bypasses the page cache.
        direct: bool,
    },
    /// Behind an NBD server.
    Server(Arc<nbd::Server>),
}

impl Body {
    /// The file, if it is one.
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Body::File { fd, .. } => Some(fd.as_fd()),
            Body::Server(_) => None,
        }
    }
}

/// A bottom that is open.
#[derive(Debug)]
pub struct Opened {
    /// Where its bytes are.
    pub body: Body,
    /// What it can do.
    pub limits: Limits,
    /// What is not as one would wish.
    pub warnings: Vec<String>,
}

/// What a bottom is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To serve it: exclusively, unless it is read-only.
    Serve,
    /// To serve a file beside others who say so too, never beside one who serves it exclusively: as
    /// tests do that write one file through several devices.
    Share,
    /// To read what is in it: beside other readers, never beside who writes it.
    Read,
    /// To look at what it is, also while somebody serves it. Nothing is written.
    Look,
}

/// Every kind of bottom.
pub const SOURCES: &[Source] = &[file::SOURCE, mem::SOURCE, nbd::SOURCE, zones::SOURCE];

/// Whether what is in a bottom of the kind `name` is still there when its process is not.
#[must_use]
pub fn outlives_process(name: &str, args: &Args) -> bool {
    match name {
        "mem" => false,
        "nbd" => nbd::outlives_process(args),
        _ => true,
    }
}

/// Opens a bottom of the kind `name`.
///
/// # Errors
/// If there is no such kind, or as that kind says.
pub fn open(name: &str, args: &Args, access: Access) -> Result<Opened> {
    match name {
        "file" => file::open(args, access),
        "mem" => mem::open(args),
        "nbd" => nbd::open(args, access),
        _ => Err(Error::invalid(name, "no such kind of bottom, or one of several files")),
    }
}

/// Opens all bottoms that one of the kind `name` stands for, nearly always one; for one that grows
/// as it is written, how many bytes it has by now.
///
/// # Errors
/// As [`open`].
pub fn open_all(name: &str, args: &Args, access: Access) -> Result<Vec<(Opened, Option<u64>)>> {
    match name {
        "zones" => zones::open(args, access),
        _ => Ok(vec![(open(name, args, access)?, None)]),
    }
}

impl Opened {
    /// Reads metadata, blocking: all of `into` or an error.
    ///
    /// # Errors
    /// As the file reports them; `EIO` where it ends early.
    pub fn read_at(&self, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let fd = match &self.body {
            Body::File { fd, .. } => fd.as_fd(),
            Body::Server(server) => return nbd::read_at(server, at, into),
        };
        // Direct I/O wants aligned memory; a page satisfies every device.
        const PAGE: usize = 4096;
        let mut room = vec![0_u8; into.len() + PAGE];
        let start = room.as_ptr().align_offset(PAGE);
        let aligned = &mut room[start..start + into.len()];
        let mut done = 0;
        while done < aligned.len() {
            match rustix::io::pread(fd, &mut aligned[done..], at + done as u64) {
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Errno::from_result(-errno.raw_os_error())),
            }
        }
        into.copy_from_slice(aligned);
        Ok(())
    }

    /// Writes metadata, durably, blocking: all of `bytes` or an error.
    ///
    /// # Errors
    /// As the file reports them; `EIO` where it takes nothing.
    pub fn write_at(&self, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let fd = match &self.body {
            Body::File { fd, .. } => fd.as_fd(),
            Body::Server(server) => return nbd::write_at(server, at, bytes),
        };
        // As for reading.
        const PAGE: usize = 4096;
        let mut room = vec![0_u8; bytes.len() + PAGE];
        let start = room.as_ptr().align_offset(PAGE);
        let aligned = &mut room[start..start + bytes.len()];
        aligned.copy_from_slice(bytes);
        let mut done = 0;
        while done < aligned.len() {
            match rustix::io::pwrite(fd, &aligned[done..], at + done as u64) {
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Errno::from_result(-errno.raw_os_error())),
            }
        }
        rustix::fs::fdatasync(fd).map_err(|errno| Errno::from_result(-errno.raw_os_error()))
    }
}
