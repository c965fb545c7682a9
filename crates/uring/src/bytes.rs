//! Answers for backends that are not the kernel's: bytes in this process or behind a library, read
//! and written by blocking calls on a few helper threads.
//!
//! A request's memory is lent to a helper as it is lent to the kernel: the arena counts it, nobody
//! else touches it, and it stays mapped until it is given back, whatever happens to the ring. What
//! is done comes back through a bell that the ring polls.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use devsplice_core::{Errno, Error, Limits, Op, Result};
use devsplice_engine::Splice;
use devsplice_engine::ring::MAX_PARTS;

use crate::bell::Bell;
use crate::thread::start;

/// Threads that serve the byte backends of one ring.
const HELPERS: usize = 4;
/// Bytes of zeros written at a time.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A backend of bytes: the ten-line tier. Calls come from several threads at once, each for ranges
/// that no other call changes unless a client asks for that; they may block.
///
/// Each call does all that it was asked or is an error: there is no short success.
pub trait Bytes: Send + Sync {
    /// Bytes of the device, a multiple of 512; it does not change.
    fn size(&self) -> u64;

    /// Fills all of `into` from byte `at` on.
    ///
    /// # Errors
    /// The request fails with the error's number, `EIO` for one without.
    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Puts all of `from` to byte `at` and behind.
    ///
    /// # Errors
    /// As [`Bytes::read_at`].
    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Makes every write that has returned durable.
    ///
    /// # Errors
    /// As [`Bytes::read_at`].
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// The bytes are no longer needed. Asked only if [`Bytes::limits`] offer it.
    ///
    /// # Errors
    /// As [`Bytes::read_at`].
    fn discard(&self, _at: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Afterwards the bytes read as zeros: by default they are written.
    ///
    /// # Errors
    /// As [`Bytes::read_at`].
    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let count = usize::try_from(len - done).unwrap_or(ZEROS.len()).min(ZEROS.len());
            self.write_at(at + done, &ZEROS[..count])?;
            done += count as u64;
        }
        Ok(())
    }

    /// What the device offers: by default blocks of 512 bytes, no discard, and flushes, since
    /// nothing is known of how long a write lasts.
    fn limits(&self) -> Limits {
        Limits { discard: 0, volatile_cache: true, ..Limits::ideal(self.size()) }
    }
}

/// A range of a request's memory.
#[derive(Clone, Copy, Default)]
struct Range {
    address: u64,
    len: usize,
}

/// A splice on its way through a helper.
struct Job {
    key: u32,
    op: Op,
    fua: bool,
    at: u64,
    len: u64,
    bytes: Arc<dyn Bytes>,
    ranges: [Range; MAX_PARTS],
    count: usize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    done: VecDeque<Landed>,
    /// Jobs that were handed over and whose results were not.
    out: usize,
    /// The ring was told and has not looked yet.
    rang: bool,
    ended: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    bell: Bell,
}

/// A splice's key, and what came of it.
pub(crate) type Landed = (u32, Result<u64, Errno>);

/// The helper threads of a ring.
pub(crate) struct Helpers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A helper that panicked held no half-done state: it calls the backend unlocked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Helpers {
    /// Helpers for at most `flights` splices at a time.
    pub(crate) fn new(flights: usize) -> Result<Helpers> {
        let os = |error: io::Error| Error::os("helpers of a byte backend", &error);
        let bell = Bell::new()?;
        // Nothing grows while requests are served.
        let state = State {
            jobs: VecDeque::with_capacity(flights),
            done: VecDeque::with_capacity(flights),
            ..State::default()
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new(), bell });
        let mut helpers = Helpers { shared, threads: Vec::new() };
        for number in 0..HELPERS {
            let shared = Arc::clone(&helpers.shared);
            let started = start(format!("bytes/{number}"), move || serve(&shared));
            helpers.threads.push(started.map_err(os)?);
        }
        Ok(helpers)
    }

    /// What is readable when there are results; open as long as this value is there.
    pub(crate) fn bell(&self) -> RawFd {
        self.shared.bell.ear().as_raw_fd()
    }

    /// Hands a splice over. `addresses` has that of each part, of memory that is lent until the
    /// splice has landed.
    pub(crate) fn hand_over(
        &self,
        key: u32,
        splice: &Splice<'_>,
        bytes: &Arc<dyn Bytes>,
        addresses: &[u64],
    ) {
        let mut ranges = [Range::default(); MAX_PARTS];
        for (range, (address, part)) in ranges.iter_mut().zip(addresses.iter().zip(splice.parts)) {
            *range = Range { address: *address, len: part.len as usize };
        }
        let Splice { op, fua, at, len, .. } = *splice;
        let (bytes, count) = (Arc::clone(bytes), splice.parts.len());
        let mut state = self.shared.lock();
        state.jobs.push_back(Job { key, op, fua, at, len, bytes, ranges, count });
        state.out += 1;
        drop(state);
        self.shared.work.notify_one();
    }

    /// The bell rang: what comes from now on rings again.
    pub(crate) fn heard(&self) {
        self.shared.bell.heard();
        self.shared.lock().rang = false;
    }

    /// The next splice that has landed.
    pub(crate) fn next(&self) -> Option<Landed> {
        let mut state = self.shared.lock();
        let landed = state.done.pop_front()?;
        state.out -= 1;
        Some(landed)
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        let is_idle = state.out == 0;
        drop(state);
        self.shared.work.notify_all();
        // With a call still out, the ring has failed; waiting for it could take for ever.
        for thread in self.threads.drain(..).filter(|_| is_idle) {
            let _ = thread.join();
        }
    }
}

/// A helper from start to end.
fn serve(shared: &Shared) {
    // As on I/O threads: memory that is needed here must not wait for the device. Without the right
    // to say so it works all the same.
    let _ = crate::thread::set_io_flusher();
    let mut state = shared.lock();
    loop {
        if state.ended {
            return;
        }
        let Some(job) = state.jobs.pop_front() else {
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        // Where a panic does not end the process, it must not end the request's thread either.
        let done = catch_unwind(AssertUnwindSafe(|| carry_out(&job)));
        let result = done.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        let result = result.map(|()| job.len).map_err(Errno::from);
        let key = job.key;
        drop(job);
        state = shared.lock();
        state.done.push_back((key, result));
        if !std::mem::replace(&mut state.rang, true) {
            shared.bell.ring();
        }
    }
}

fn carry_out(job: &Job) -> io::Result<()> {
    let bytes = &job.bytes;
    let mut at = job.at;
    match job.op {
        Op::Read => {
            for range in &job.ranges[..job.count] {
                let start = std::ptr::with_exposed_provenance_mut::<u8>(range.address as usize);
                // SAFETY: the range is inside a slot of an arena (checked by `Arena::address`),
                // which is lent until this job's result is out and so neither unmapped nor given
                // to others (`Uring`, `Arena`); a read's ranges belong to one splice alone.
                let into = unsafe { std::slice::from_raw_parts_mut(start, range.len) };
                bytes.read_at(at, into)?;
                at += range.len as u64;
            }
            Ok(())
        }
        Op::Write => {
            for range in &job.ranges[..job.count] {
                let start = std::ptr::with_exposed_provenance::<u8>(range.address as usize);
                // SAFETY: as above; while a write is out its memory is only read, by whomever.
                let from = unsafe { std::slice::from_raw_parts(start, range.len) };
                bytes.write_at(at, from)?;
                at += range.len as u64;
            }
            if job.fua { bytes.flush() } else { Ok(()) }
        }
        Op::Flush => bytes.flush(),
        Op::Discard => bytes.discard(job.at, job.len),
        Op::WriteZeroes { .. } => bytes.write_zeroes(job.at, job.len),
        // Bytes have a size; nothing offers zones on them.
        Op::Reset | Op::Finish => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Count(AtomicU64);

    impl Bytes for Count {
        fn size(&self) -> u64 {
            1 << 20
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(28))
        }

        fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
            assert!(from.iter().all(|byte| *byte == 0) && at + from.len() as u64 <= self.size());
            self.0.fetch_add(from.len() as u64, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn zeros_are_written_where_a_backend_knows_no_better_and_discard_is_not_offered() {
        let count = Count(AtomicU64::new(0));
        count.write_zeroes(512, 200_000).unwrap();
        assert_eq!(count.0.load(Ordering::Relaxed), 200_000);
        assert_eq!((count.limits().discard, count.limits().volatile_cache), (0, true));
        assert_eq!(Errno::from(count.discard(0, 512).unwrap_err()), Errno::EIO);
        assert_eq!(Errno::from(count.read_at(0, &mut []).unwrap_err()), Errno::ENOSPC);
    }
}
