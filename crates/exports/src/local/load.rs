//! Answers for a load on a stack, to measure it: requests of one size at random or in order, until
//! a time is over.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devsplice_core::{Errno, Io, Op, Probe};
use devsplice_uring::Uring;

use super::{Ask, Step, Work};

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// Reads or writes.
    pub op: Op,
    /// Bytes of a request.
    pub len: u64,
    /// Bytes of the disk that are used, from its start; at least one request.
    pub span: u64,
    /// Anywhere, or one behind the other.
    pub random: bool,
    /// How long.
    pub time: Duration,
}

/// What all threads of a load share.
pub struct Load {
    pattern: Pattern,
    end: Instant,
    next: AtomicU64,
    /// Requests that were done.
    requests: AtomicU64,
    /// How long they took.
    pub latencies: Probe,
    stopped: AtomicBool,
    failure: Mutex<Option<Errno>>,
}

impl Load {
    /// Begins now.
    #[must_use]
    pub fn new(pattern: Pattern) -> Load {
        Load {
            pattern,
            end: Instant::now() + pattern.time,
            next: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            latencies: Probe::default(),
            stopped: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    /// Requests that were done.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(SeqCst)
    }

    /// Has it end early.
    pub fn stop(&self) {
        self.stopped.store(true, SeqCst);
    }

    /// Why a request failed, the first that did.
    #[must_use]
    pub fn failure(&self) -> Option<Errno> {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The work of one thread of so many slots; `seed` is another for each.
    #[must_use]
    pub fn thread(self: &Arc<Load>, depth: u16, seed: u64) -> Box<dyn Work> {
        let sent = vec![Instant::now(); usize::from(depth)].into();
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Box::new(Slots { load: Arc::clone(self), sent, random, filled: 0 })
    }
}

struct Slots {
    load: Arc<Load>,
    sent: Box<[Instant]>,
    random: u64,
    /// Slots below this have data to write.
    filled: u16,
}

impl Slots {
    /// Marsaglia's xorshift, shifts 13, 7, 17.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Bytes that no layer can shorten, once for each slot.
    fn fill(&mut self, slot: u16, ring: &mut Uring) {
        let len = usize::try_from(self.load.pattern.len).unwrap_or(usize::MAX);
        let room = &mut ring.memory(0, slot)[Uring::DATA_AT..Uring::DATA_AT + len];
        for word in room.chunks_mut(8) {
            let bytes = self.draw().to_ne_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
        self.filled = self.filled.max(slot + 1);
    }
}

impl Work for Slots {
    fn next(&mut self, slot: u16, ring: &mut Uring) -> Step {
        let now = Instant::now();
        let Pattern { op, len, span, random, .. } = self.load.pattern;
        if now >= self.load.end || self.load.stopped.load(SeqCst) {
            return Step::End;
        }
        if op == Op::Write && slot >= self.filled {
            self.fill(slot, ring);
        }
        let places = (span / len).max(1);
        let place = if random { self.draw() } else { self.load.next.fetch_add(1, SeqCst) } % places;
        self.sent[usize::from(slot)] = now;
        Step::One(Ask { side: 0, memory: 0, io: Io::new(op, place * len, len) })
    }

    fn done(&mut self, slot: u16, _: u16, io: &Io, result: Result<(), Errno>) {
        let ns = self.sent[usize::from(slot)].elapsed().as_nanos();
        match result {
            Ok(()) => {
                self.load.requests.fetch_add(1, SeqCst);
                self.load.latencies.record(io.op, io.extent.len, ns.try_into().unwrap_or(u64::MAX));
            }
            Err(errno) => {
                let mut failure = self.load.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(errno);
                self.load.stop();
            }
        }
    }
}
