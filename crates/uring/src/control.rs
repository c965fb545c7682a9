//! Answers for commands that may block: a small ring of 128-byte entries, used one at a time, with
//! a bounded wait. Not for I/O threads.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::submit::unavailable;

/// Bytes that a command can take in or give back.
const DATA_LEN: usize = 4096;

/// A ring for control commands.
pub struct ControlRing {
    /// `None` after a command that did not come back in time: the kernel may still write to `data`,
    /// so both are left alone for good.
    inner: Option<Inner>,
}

struct Inner {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    data: Box<[u8; DATA_LEN]>,
}

/// Byte positions in a command's 80-byte payload where the data's length (16 bits) and address (64
/// bits) go.
#[derive(Clone, Copy, Debug)]
pub struct DataAt {
    /// Of the length.
    pub len: usize,
    /// Of the address.
    pub addr: usize,
}

impl ControlRing {
    /// A ring for control commands.
    ///
    /// # Errors
    /// If the kernel has no io_uring to give.
    pub fn new() -> Result<ControlRing> {
        let ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder()
            .dontfork()
            .build(4)
            .map_err(|error| unavailable(&error))?;
        Ok(ControlRing { inner: Some(Inner { ring, data: Box::new([0; DATA_LEN]) }) })
    }

    /// Sends a command and waits for its result, which may be negative. `data` goes with it and
    /// comes back as the device left it.
    ///
    /// # Errors
    /// If the command did not come back within `limit` (it goes on without us), if the ring failed,
    /// or a command before this one did not come back.
    pub fn command(
        &mut self,
        file: BorrowedFd<'_>,
        (name, op): (&str, u32),
        mut payload: [u8; 80],
        data: Option<(&mut [u8], DataAt)>,
        limit: Duration,
    ) -> Result<i32> {
        let Some(mut inner) = self.inner.take() else {
            let reason = "an earlier command has not come back";
            return Err(Error::new(ErrorKind::Busy, name, reason));
        };
        if let Some((data, at)) = &data {
            assert!(data.len() <= DATA_LEN, "{} bytes of data for {name}", data.len());
            inner.data[..data.len()].copy_from_slice(data);
            let len = u16::try_from(data.len()).unwrap_or(u16::MAX);
            payload[at.len..at.len + 2].copy_from_slice(&len.to_ne_bytes());
            let addr = inner.data.as_ptr() as u64;
            payload[at.addr..at.addr + 8].copy_from_slice(&addr.to_ne_bytes());
        }
        let entry = opcode::UringCmd80::new(types::Fd(file.as_raw_fd()), op).cmd(payload).build();
        // SAFETY: the one address in the entry is that of `inner.data`, which lives until the
        // completion is out, or for good when that does not come in time.
        if unsafe { inner.ring.submission().push(&entry) }.is_err() {
            return Err(Error::new(ErrorKind::Os, name, "io_uring takes no entries"));
        }
        match wait(&mut inner.ring, limit) {
            Ok(Some(result)) => {
                if let Some((data, _)) = data {
                    data.copy_from_slice(&inner.data[..data.len()]);
                }
                self.inner = Some(inner);
                Ok(result)
            }
            Ok(None) => {
                std::mem::forget(inner);
                let reason = format!("no answer from the kernel in {} s", limit.as_secs());
                Err(Error::new(ErrorKind::Busy, name, reason)
                    .next("look for hung tasks in dmesg; another tool may hold the device"))
            }
            Err(error) => {
                std::mem::forget(inner);
                Err(Error::os(name, &error))
            }
        }
    }
}

fn wait(
    ring: &mut IoUring<squeue::Entry128, cqueue::Entry>,
    limit: Duration,
) -> std::io::Result<Option<i32>> {
    let end = std::time::Instant::now() + limit;
    loop {
        if let Some(cqe) = ring.completion().next() {
            return Ok(Some(cqe.result()));
        }
        let left = end.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let left = types::Timespec::from(left);
        let args = types::SubmitArgs::new().timespec(&left);
        match ring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
    }
}
