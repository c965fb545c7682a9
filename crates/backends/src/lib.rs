//! Answers for the bottoms of stacks: where bytes finally live.
#![forbid(unsafe_code)]

pub mod file;
pub mod mem;
mod sysfs;

use std::os::fd::{AsFd, OwnedFd};

use devsplice_core::{Args, Errno, Error, Limits, Result, Source};
use devsplice_uring::FileKind;

/// A bottom that is open.
#[derive(Debug)]
pub struct Opened {
    /// The file or device.
    pub fd: OwnedFd,
    /// What it is, for the ring.
    pub kind: FileKind,
    /// What it can do.
    pub limits: Limits,
    /// Whether data bypasses the page cache.
    pub direct: bool,
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
pub const SOURCES: &[Source] = &[file::SOURCE, mem::SOURCE];

/// Whether what is in a bottom of the kind `name` is still there when its process is not.
#[must_use]
pub fn outlives_process(name: &str) -> bool {
    name != mem::SOURCE.name
}

/// Opens a bottom of the kind `name`.
///
/// # Errors
/// If there is no such kind, or as that kind says.
pub fn open(name: &str, args: &Args, access: Access) -> Result<Opened> {
    match name {
        "file" => file::open(args, access),
        "mem" => mem::open(args),
        _ => Err(Error::invalid(name, "no such kind of bottom")),
    }
}

impl Opened {
    /// Reads metadata, blocking: all of `into` or an error.
    ///
    /// # Errors
    /// As the file reports them; `EIO` where it ends early.
    pub fn read_at(&self, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        // Direct I/O wants aligned memory; a page satisfies every device.
        const PAGE: usize = 4096;
        let mut room = vec![0_u8; into.len() + PAGE];
        let start = room.as_ptr().align_offset(PAGE);
        let aligned = &mut room[start..start + into.len()];
        let mut done = 0;
        while done < aligned.len() {
            match rustix::io::pread(self.fd.as_fd(), &mut aligned[done..], at + done as u64) {
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
        // As for reading.
        const PAGE: usize = 4096;
        let mut room = vec![0_u8; bytes.len() + PAGE];
        let start = room.as_ptr().align_offset(PAGE);
        let aligned = &mut room[start..start + bytes.len()];
        aligned.copy_from_slice(bytes);
        let mut done = 0;
        while done < aligned.len() {
            match rustix::io::pwrite(self.fd.as_fd(), &aligned[done..], at + done as u64) {
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Errno::from_result(-errno.raw_os_error())),
            }
        }
        rustix::fs::fdatasync(self.fd.as_fd())
            .map_err(|errno| Errno::from_result(-errno.raw_os_error()))
    }
}
