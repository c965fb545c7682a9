//! Answers for splices between memory of ours and files in memory (tmpfs, memfd), which the thread
//! carries out itself.
//!
//! io_uring hands each of these to a thread of its own, because such files do not say that they
//! never wait (up to Linux 7.3). Two wake-ups and a trip to another CPU cost several times what
//! there is to do, which is to copy some pages. What is long still goes that way: others of the
//! thread would wait for it.
//!
//! A page may have to be made or to come back from swap, and the thread then waits for that. So it
//! is not for threads that the kernel waits for, nor for those that serve others' disks.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};

use devsplice_core::{Errno, Op};
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{Event, Splice, To};

use super::Uring;
use crate::splice::{DATA_AT, IoVec, PagesKind};

/// Bytes that are moved at most.
pub(super) const MOST: u64 = 256 << 10;
/// How often in a row the kernel is not entered: what follows from what was carried out may be such
/// a thing again, for ever, and others wait for the kernel.
const MOST_PASSED: u8 = 15;
/// `TMPFS_MAGIC` and `RAMFS_MAGIC` (include/uapi/linux/magic.h).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Whether a file has no other place than memory.
pub fn is_in_memory(file: impl AsFd) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|fs| IN_MEMORY.contains(&fs.f_type.cast_unsigned()))
}

/// What was carried out and not reported.
pub(super) type Done = VecDeque<Event>;

impl Uring {
    /// Bytes that are moved in place at most, at a time.
    pub const MOST_IN_PLACE: u64 = MOST;

    /// From now on the thread carries out itself what goes to files in memory and from there.
    /// Nothing changes for a ring that shares its thread.
    pub fn work_in_place(&mut self) {
        if self.brief.is_none() && self.done.is_none() {
            self.done = Some(VecDeque::with_capacity(self.flights.len() + self.outer));
        }
    }

    /// Whether something was carried out that has not been reported.
    #[inline]
    pub(super) fn has_done(&self) -> bool {
        self.done.as_ref().is_some_and(|done| !done.is_empty())
    }

    /// Whether the kernel is not entered now, as something was carried out: that is reported first,
    /// and what follows from it is handed over with the rest.
    #[inline]
    pub(super) fn passes_by(&mut self) -> bool {
        let passes = self.has_done() && self.passed < MOST_PASSED;
        self.passed = if passes { self.passed + 1 } else { 0 };
        passes
    }

    /// Carries a splice out if it is one of those; whether it was.
    pub(super) fn in_place(&mut self, key: u32, splice: &Splice<'_>) -> bool {
        let To::File(file) = splice.to else { return false };
        let file = &self.files[usize::from(file.0)];
        if !file.is_in_memory || splice.len > MOST || !matches!(splice.op, Op::Read | Op::Write) {
            return false;
        }
        let PagesKind::Memory { lane, slot } = PagesKind::unpack(splice.pages) else {
            return false;
        };
        if self.lend(key, (lane, slot), splice) {
            return true;
        }
        let (Some(done), To::File(file)) = (&mut self.done, splice.to) else { return false };
        let file = &self.files[usize::from(file.0)];
        let Some(arena) = &mut self.arenas[usize::from(lane)] else { return false };
        let Ok(at) = i64::try_from(splice.at) else { return false };
        let mut vector = [IoVec::default(); MAX_PARTS];
        for (range, part) in vector.iter_mut().zip(splice.parts) {
            let at = DATA_AT + part.at as usize;
            let base = arena.address(usize::from(slot), at, part.len as usize);
            *range = IoVec { base, len: u64::from(part.len) };
        }
        let count = i32::try_from(splice.parts.len().min(MAX_PARTS)).unwrap_or(0);
        let (fd, ranges) = (file.fd.as_raw_fd(), vector.as_ptr().cast::<libc::iovec>());
        // Nothing in memory is more durable than what was written.
        let call = if splice.op == Op::Read { libc::preadv } else { libc::pwritev };
        // SAFETY: `vector` has at least `count` ranges laid out as `struct iovec`, all within the
        // arena's mapping (`address` has asserted that), which nobody else touches meanwhile:
        // `&mut self` excludes slices of it. The descriptor is open as long as the slot.
        let result = unsafe { call(fd, ranges, count, at) };
        let result = u64::try_from(result).map_err(|_| last_errno());
        let moved = *result.as_ref().unwrap_or(&0);
        if usize::from(lane) < self.outer {
            self.bytes_copied += moved;
        } else {
            self.bytes_meta += moved;
        }
        done.push_back(Event::Splice { key, result });
        true
    }

    /// What was carried out, for the engine.
    #[inline]
    pub(super) fn next_done(&mut self) -> Option<Event> {
        self.done.as_mut()?.pop_front()
    }
}

pub(super) fn last_errno() -> Errno {
    let raw = std::io::Error::last_os_error().raw_os_error();
    raw.map_or(Errno::EIO, |raw| Errno::from_result(-raw))
}

#[cfg(test)]
mod tests {
    use devsplice_engine::{Part, Ring};

    use super::*;
    use crate::files::{FileKind, RingFile};
    use crate::ring::{Config, LaneMemory};

    #[test]
    fn who_has_always_something_done_still_hears_of_the_rest() {
        let lane = LaneMemory { depth: 1, bytes: 4096, slots: false, locked: false };
        let config = Config { flights: 2, files: 1, lanes: vec![lane], inner: 0 };
        let mut ring = Uring::new(&config).unwrap();
        ring.work_in_place();
        let fd = rustix::fs::memfd_create("in-place", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = ring.add_file(RingFile { fd, kind: FileKind::Regular }).unwrap();
        ring.after(1, 0);
        let pages = ring.memory_pages(0, 0);
        let parts = &[Part { at: 0, len: 512 }];
        for _ in 0..100 {
            let to = To::File(file);
            let write = Splice { op: Op::Write, fua: false, to, at: 0, len: 512, pages, parts };
            ring.splice(0, &write);
            assert!(ring.has_done());
            ring.enter(true).unwrap();
            while let Some(event) = ring.next() {
                if matches!(event, Event::Timer { key: 1 }) {
                    return;
                }
            }
        }
        panic!("a timer that is over is not heard of");
    }
}
