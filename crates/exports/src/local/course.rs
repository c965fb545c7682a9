//! Answers for the way through a disk from its start to its end that many slots of many threads
//! share: who does which range, how far all of it is, what went wrong first.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use devsplice_core::{Errno, Io};

use crate::extents::Extents;

/// A range that is done at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Whether it is known to be zeros everywhere.
    pub reads_zero: bool,
}

/// What is to be gone through, and in which steps. Bytes.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Where to begin.
    pub from: u64,
    /// Where to end.
    pub to: u64,
    /// Every chunk begins and, but for the last one, ends at a multiple of it.
    pub align: u64,
    /// The longest chunk of data; a multiple of `align`.
    pub data: u64,
    /// The longest chunk of what is known to be zeros; a multiple of `align`.
    pub zeroes: u64,
}

/// A request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which side.
    pub side: u16,
    /// What was asked.
    pub io: Io,
    /// Why it failed.
    pub errno: Errno,
}

/// A way through a disk.
pub struct Course {
    plan: Plan,
    /// What is asked for holes; what is not zeros in all of them is data.
    extents: Vec<Extents>,
    state: Mutex<State>,
    done: AtomicU64,
    durable: AtomicU64,
    stopped: AtomicBool,
}

struct State {
    next: u64,
    /// Up to where it is known whether everything reads as zeros: asking a file can take as long as
    /// its data is long.
    known: (u64, bool),
    /// Where the chunks that are out begin.
    out: Vec<u64>,
    /// Slots that have not left.
    slots: u32,
    failure: Option<Failure>,
}

impl Course {
    /// A way that so many slots go together.
    #[must_use]
    pub fn new(plan: Plan, extents: Vec<Extents>, slots: u32) -> Course {
        let room = usize::try_from(slots).unwrap_or(0);
        let out = Vec::with_capacity(room);
        Course {
            plan,
            extents,
            state: Mutex::new(State {
                next: plan.from,
                known: (0, false),
                out,
                slots,
                failure: None,
            }),
            done: AtomicU64::new(plan.from),
            durable: AtomicU64::new(plan.from),
            stopped: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next chunk; none at the end, or once it was stopped.
    pub(super) fn take(&self) -> Option<Chunk> {
        if self.is_stopped() {
            return None;
        }
        let mut state = self.state();
        let at = state.next;
        if at >= self.plan.to {
            return None;
        }
        if state.known.0 <= at {
            state.known = self.look(at);
        }
        let chunk = self.chunk(at, state.known);
        state.next = at + chunk.len;
        state.out.push(at);
        Some(chunk)
    }

    /// Up to where it is alike from `at` on: whether all of them say that it reads as zeros.
    fn look(&self, at: u64) -> (u64, bool) {
        let Plan { to, zeroes, .. } = self.plan;
        let (mut len, mut reads_zero) = ((to - at).min(zeroes), !self.extents.is_empty());
        for extents in &self.extents {
            let (its, content) = extents.at(at, len);
            (len, reads_zero) = (its.min(len), reads_zero && content.reads_zero());
        }
        (at + len, reads_zero)
    }

    fn chunk(&self, at: u64, (until, reads_zero): (u64, bool)) -> Chunk {
        let Plan { to, align, data, .. } = self.plan;
        let left = to - at;
        let len = (until - at).min(left);
        let whole = if len == left { len } else { len - len % align };
        if reads_zero && whole > 0 {
            return Chunk { at, len: whole, reads_zero: true };
        }
        // What ends amid a block goes on as data to the end of it.
        let len = len.div_ceil(align).saturating_mul(align).min(data).min(left);
        Chunk { at, len, reads_zero: false }
    }

    /// A chunk is done.
    pub(super) fn finished(&self, chunk: &Chunk) {
        let mut state = self.state();
        if let Some(place) = state.out.iter().position(|at| *at == chunk.at) {
            state.out.swap_remove(place);
        }
        drop(state);
        self.done.fetch_add(chunk.len, SeqCst);
    }

    /// Up to where everything is done.
    pub(super) fn mark(&self) -> u64 {
        let state = self.state();
        state.out.iter().copied().min().unwrap_or(state.next)
    }

    /// Everything up to here is durable.
    pub(super) fn set_durable(&self, mark: u64) {
        self.durable.fetch_max(mark, SeqCst);
    }

    /// A slot has nothing to do any more; whether it was the last.
    pub(super) fn leave(&self) -> bool {
        let mut state = self.state();
        state.slots -= 1;
        state.slots == 0
    }

    /// A request failed: the first one is kept, and everybody comes to an end.
    pub(super) fn fail(&self, failure: Failure) {
        self.state().failure.get_or_insert(failure);
        self.stop();
    }

    /// Has everybody come to an end.
    pub fn stop(&self) {
        self.stopped.store(true, SeqCst);
    }

    /// Whether it was stopped.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Whether it was stopped by a request that failed.
    pub(super) fn has_failed(&self) -> bool {
        self.is_stopped() && self.failure().is_some()
    }

    /// What went wrong first.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        self.state().failure
    }

    /// Bytes that are done, those before its start among them.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(SeqCst)
    }

    /// Up to where everything is done and durable.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.durable.load(SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { from: 0, to: 10_240, align: 4096, data: 8192, zeroes: 1 << 30 };

    #[test]
    fn chunks_tile_the_way_and_the_mark_waits_for_the_slowest() {
        let course = Course::new(PLAN, Vec::new(), 2);
        let [first, second] = [(); 2].map(|()| course.take().unwrap());
        assert_eq!((first.at, first.len, second.at, second.len), (0, 8192, 8192, 2048));
        assert_eq!((course.take(), course.mark()), (None, 0));
        course.finished(&second);
        assert_eq!((course.mark(), course.done()), (0, 2048));
        course.finished(&first);
        assert_eq!((course.mark(), course.done()), (10_240, 10_240));
        assert!(!course.leave() && course.leave());
    }

    #[test]
    fn after_a_failure_nothing_more_is_given_out_and_the_first_one_is_kept() {
        let course = Course::new(PLAN, Vec::new(), 1);
        let io = Io::new(devsplice_core::Op::Read, 0, 512);
        course.fail(Failure { side: 1, io, errno: Errno::EIO });
        course.fail(Failure { side: 0, io, errno: Errno::ENOSPC });
        assert_eq!(course.failure().unwrap().errno, Errno::EIO);
        assert!(course.take().is_none() && course.is_stopped());
    }
}
