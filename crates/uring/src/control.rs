//! Answers for commands that may block: a small ring of 128-byte entries, used one at a time, with
//! a bounded wait. Not for I/O threads.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::submit::unavailable;

/// Bytes that a command can take in or give back.
const DATA_LEN: usize = 4096;

/// Commands that may be out, of which nobody waits for the end any more.
const MOST_LATE: usize = 8;

/// A ring for control commands.
pub struct ControlRing {
    /// What takes the next command; `None` after one that did not come back in time.
    inner: Option<Inner>,
    /// Those whose command did not: the kernel may still write to their data, so they are left
    /// alone until it is through with it.
    late: Vec<Inner>,
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
        Ok(ControlRing { inner: Some(Inner::new()?), late: Vec::new() })
    }

    /// What takes a command beside those that are late.
    fn beside(&mut self, name: &str) -> Result<Inner> {
        self.late.retain_mut(|late| !late.is_back());
        if self.late.len() >= MOST_LATE {
            let reason = format!("{MOST_LATE} earlier commands have not come back");
            return Err(Error::new(ErrorKind::Busy, name, reason)
                .next("look for hung tasks in dmesg; another tool may hold the device"));
        }
        Inner::new()
    }

    /// Sends a command and waits for its result, which may be negative. `data` goes with it and
    /// comes back as the device left it.
    ///
    /// # Errors
    /// If the command did not come back within `limit` (it goes on without us, and the next one
    /// does not wait for it), if the ring failed, or too many before this one did not come back.
    pub fn command(
        &mut self,
        file: BorrowedFd<'_>,
        (name, op): (&str, u32),
        mut payload: [u8; 80],
        data: Option<(&mut [u8], DataAt)>,
        limit: Duration,
    ) -> Result<i32> {
        let mut inner = match self.inner.take() {
            Some(inner) => inner,
            None => self.beside(name)?,
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
        // completion is out, or for good when that does not come: `late` sees to it.
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
                self.late.push(inner);
                let reason = format!("no answer from the kernel in {} s", limit.as_secs());
                Err(Error::new(ErrorKind::Busy, name, reason)
                    .next("look for hung tasks in dmesg; another tool may hold the device"))
            }
            Err(error) => {
                self.late.push(inner);
                Err(Error::os(name, &error))
            }
        }
    }
}

impl Drop for ControlRing {
    fn drop(&mut self) {
        for mut late in self.late.drain(..) {
            if !late.is_back() {
                std::mem::forget(late);
            }
        }
    }
}

impl Inner {
    fn new() -> Result<Inner> {
        let ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder()
            .dontfork()
            .build(4)
            .map_err(|error| unavailable(&error))?;
        Ok(Inner { ring, data: Box::new([0; DATA_LEN]) })
    }

    /// Whether its command, which was late, has come back.
    fn is_back(&mut self) -> bool {
        self.ring.completion().next().is_some()
    }
}

fn wait(
    ring: &mut IoUring<squeue::Entry128, cqueue::Entry>,
    limit: Duration,
) -> std::io::Result<Option<i32>> {
    let end = std::time::Instant::now() + limit;
    let mut is_sent = false;
    loop {
        if let Some(cqe) = ring.completion().next() {
            return Ok(Some(cqe.result()));
        }
        let left = end.saturating_duration_since(std::time::Instant::now());
        // However short the limit is, the command is sent.
        if left.is_zero() && is_sent {
            return Ok(None);
        }
        is_sent = true;
        let left = types::Timespec::from(left);
        let args = types::SubmitArgs::new().timespec(&left);
        match ring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use io_uring::squeue::Entry128;

    use super::*;

    /// /dev/null takes any command, and does nothing (since 6.0).
    fn command(ring: &mut ControlRing) -> Result<i32> {
        let null = std::fs::File::open("/dev/null").unwrap();
        ring.command(null.as_fd(), ("NULL", 0), [0; 80], None, Duration::from_secs(5))
    }

    fn lose_one(ring: &mut ControlRing) {
        let inner = ring.inner.take().map_or_else(Inner::new, Ok).unwrap();
        ring.late.push(inner);
    }

    #[test]
    fn a_command_that_is_late_keeps_no_other_back() {
        let mut ring = ControlRing::new().unwrap();
        lose_one(&mut ring);
        assert_eq!(command(&mut ring).unwrap(), 0);
        assert_eq!((command(&mut ring).unwrap(), ring.late.len()), (0, 1));
    }

    #[test]
    fn so_many_may_be_late_and_one_that_comes_back_makes_room() {
        let mut ring = ControlRing::new().unwrap();
        (0..MOST_LATE).for_each(|_| lose_one(&mut ring));
        let refused = command(&mut ring).unwrap_err();
        assert!(refused.to_string().contains("8 earlier commands"), "{refused}");
        let late = &mut ring.late[3];
        let nothing = Entry128::from(opcode::Nop::new().build());
        // SAFETY: names no memory.
        unsafe { late.ring.submission().push(&nothing) }.unwrap();
        late.ring.submit().unwrap();
        assert_eq!((command(&mut ring).unwrap(), ring.late.len()), (0, MOST_LATE - 1));
    }
}
