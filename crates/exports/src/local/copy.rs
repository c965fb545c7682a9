//! Answers for a copy of one stack to another: each slot reads a range, looks for zeros in it, and
//! writes it from the same memory.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devsplice_core::{Errno, Io, Op, Result};
use devsplice_uring::Uring;

use super::course::{Chunk, Course, Failure};
use super::{Ask, Step, Work};

const SOURCE: u16 = 0;
const TARGET: u16 = 1;
/// The only lane with memory.
const MEMORY: u16 = SOURCE;

/// How zeros are dealt with.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Ranges of this many bytes that hold zeros are not written but zeroed; 0 for never.
    pub sparse: u64,
    /// The target is known to be zeros: they are skipped.
    pub target_is_zero: bool,
    /// The target can zero a range.
    pub can_zero: bool,
    /// How often the target is flushed, so that it is known how far it is safe.
    pub flush_every: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
enum Doing {
    Nothing,
    /// The chunk's data comes.
    Reading(Chunk),
    /// The chunk is written up to this byte of it; the rest is in memory.
    Writing(Chunk, u64),
    /// All of the chunk is being written or zeroed.
    Zeroing(Chunk),
    /// What was done up to here becomes durable.
    Flushing(u64),
    /// Everything becomes durable.
    Ending,
}

/// The flushes of the target that a copy has on its way, shared by all of its threads. There is one
/// at a time: what an earlier write came to is told to one of them only, and another that began
/// before and ends well would make durable, by its mark, what was lost.
#[derive(Debug)]
pub struct Flushes(Mutex<Turn>);

#[derive(Debug)]
struct Turn {
    /// When the last one began.
    last: Instant,
    is_out: bool,
}

impl Default for Flushes {
    fn default() -> Flushes {
        Flushes(Mutex::new(Turn { last: Instant::now(), is_out: false }))
    }
}

impl Flushes {
    /// Whether one is due, and none is out; then this one is.
    fn begin(&self, every: Duration) -> bool {
        let mut turn = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = !turn.is_out && turn.last.elapsed() >= every;
        if is_due {
            *turn = Turn { last: Instant::now(), is_out: true };
        }
        is_due
    }

    /// It has come back.
    fn end(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_out = false;
    }
}

/// The slots of one thread.
pub struct Copy {
    course: Arc<Course>,
    how: How,
    slots: Box<[Doing]>,
    flushes: Arc<Flushes>,
}

impl Copy {
    /// So many slots on this course.
    #[must_use]
    pub fn new(course: Arc<Course>, how: How, depth: u16, flushes: Arc<Flushes>) -> Copy {
        Copy { course, how, slots: vec![Doing::Nothing; usize::from(depth)].into(), flushes }
    }

    /// Begins something new.
    fn begin(&mut self, slot: u16, ring: &mut Uring) -> Step {
        let doing = &mut self.slots[usize::from(slot)];
        *doing = Doing::Nothing;
        if self.course.is_stopped() {
            self.course.leave();
            return Step::End;
        }
        if self.how.flush_every.is_some_and(|every| self.flushes.begin(every)) {
            let mark = self.course.mark();
            self.slots[usize::from(slot)] = Doing::Flushing(mark);
            return one(TARGET, Io::new(Op::Flush, 0, 0));
        }
        let Some(chunk) = self.take() else {
            if self.course.leave() && !self.course.is_stopped() {
                self.slots[usize::from(slot)] = Doing::Ending;
                return one(TARGET, Io::new(Op::Flush, 0, 0));
            }
            return Step::End;
        };
        if !chunk.reads_zero {
            self.slots[usize::from(slot)] = Doing::Reading(chunk);
            return one(SOURCE, Io::new(Op::Read, chunk.at, chunk.len));
        }
        self.slots[usize::from(slot)] = Doing::Zeroing(chunk);
        if self.how.can_zero {
            return one(TARGET, zero(chunk.at, chunk.len));
        }
        data(ring, slot, chunk.len).fill(0);
        one(TARGET, Io::new(Op::Write, chunk.at, chunk.len))
    }

    /// The next chunk of which something has to be done.
    fn take(&self) -> Option<Chunk> {
        loop {
            let chunk = self.course.take()?;
            if !(chunk.reads_zero && self.how.target_is_zero) {
                return Some(chunk);
            }
            self.course.finished(&chunk);
        }
    }

    /// Goes on with a chunk whose data is in memory.
    fn write(&mut self, slot: u16, ring: &mut Uring, chunk: Chunk, mut from: u64) -> Step {
        let room = data(ring, slot, chunk.len);
        while from < chunk.len {
            let (len, is_zero) = run_of(&room[index(from)..], self.how.sparse);
            let (at, next) = (chunk.at + from, from + len);
            if is_zero && self.how.target_is_zero {
                from = next;
                continue;
            }
            self.slots[usize::from(slot)] = Doing::Writing(chunk, next);
            if is_zero && self.how.can_zero {
                return one(TARGET, zero(at, len));
            }
            if from > 0 {
                // A write drains a slot from its start.
                room.copy_within(index(from)..index(next), 0);
            }
            return one(TARGET, Io::new(Op::Write, at, len));
        }
        self.course.finished(&chunk);
        self.begin(slot, ring)
    }
}

fn one(side: u16, io: Io) -> Step {
    Step::One(Ask { side, memory: MEMORY, io })
}

fn zero(at: u64, len: u64) -> Io {
    Io::new(Op::WriteZeroes { unmap: true }, at, len)
}

/// Lengths are at most a slot's memory, which fits.
fn index(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// The first bytes of a slot's data.
pub(super) fn data(ring: &mut Uring, slot: u16, len: u64) -> &mut [u8] {
    &mut ring.memory(MEMORY, slot)[Uring::DATA_AT..Uring::DATA_AT + index(len)]
}

/// How long the data at the start of `bytes` goes on as it begins, zeros or not, in units of
/// `sparse`; all of it where that is 0.
fn run_of(bytes: &[u8], sparse: u64) -> (u64, bool) {
    if sparse == 0 {
        return (bytes.len() as u64, false);
    }
    let mut units = bytes.chunks(index(sparse)).map(|unit| (unit.len() as u64, is_zero(unit)));
    let Some((mut len, first)) = units.next() else { return (0, false) };
    for (more, next) in units {
        if next != first {
            break;
        }
        len += more;
    }
    (len, first)
}

/// Whether there are only zeros, by words of the machine.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

impl Work for Copy {
    fn next(&mut self, slot: u16, ring: &mut Uring) -> Step {
        let doing = self.slots[usize::from(slot)];
        if self.course.has_failed() && !matches!(doing, Doing::Ending) {
            return self.begin(slot, ring);
        }
        match doing {
            Doing::Nothing => self.begin(slot, ring),
            Doing::Reading(chunk) => self.write(slot, ring, chunk, 0),
            Doing::Writing(chunk, from) => self.write(slot, ring, chunk, from),
            Doing::Zeroing(chunk) => {
                self.course.finished(&chunk);
                self.begin(slot, ring)
            }
            Doing::Flushing(mark) => {
                self.course.set_durable(mark);
                self.begin(slot, ring)
            }
            Doing::Ending => {
                if !self.course.has_failed() {
                    self.course.set_durable(self.course.mark());
                }
                Step::End
            }
        }
    }

    fn done(&mut self, slot: u16, side: u16, io: &Io, result: Result<(), Errno>) {
        if let Err(errno) = result {
            self.course.fail(Failure { side, io: *io, errno });
        }
        // Behind a failure: what begins from here on sees it, and no flush follows one that failed.
        if let Doing::Flushing(_) = self.slots[usize::from(slot)] {
            self.flushes.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Plan;
    use super::*;

    #[test]
    fn runs_end_where_zeros_begin_or_end() {
        let mut bytes = [0; 1000];
        bytes[600] = 1;
        assert_eq!(run_of(&bytes, 512), (512, true));
        assert_eq!(run_of(&bytes[512..], 512), (488, false));
        assert_eq!(run_of(&bytes, 0), (1000, false));
        assert_eq!(run_of(&bytes, 100), (600, true));
        assert_eq!(run_of(&[], 100), (0, false));
        bytes[600] = 0;
        assert_eq!(run_of(&bytes, 512), (1000, true));
    }

    #[test]
    fn one_flush_is_out_at_a_time_whoever_began_it() {
        const PLAN: Plan = Plan { from: 0, to: 1 << 20, align: 512, data: 4096, zeroes: 4096 };
        let how = How {
            sparse: 0,
            target_is_zero: false,
            can_zero: false,
            flush_every: Some(Duration::ZERO),
        };
        let course = Arc::new(Course::new(PLAN, Vec::new(), 4));
        let flushes = Arc::new(Flushes::default());
        let copy = || Copy::new(Arc::clone(&course), how, 2, Arc::clone(&flushes));
        let mut threads = [copy(), copy()];
        let mut ring = Uring::new(&devsplice_uring::Config {
            flights: 64,
            files: 0,
            lanes: Vec::new(),
            inner: 0,
        })
        .unwrap();
        let flush = Io::new(Op::Flush, 0, 0);
        let is_flush = |step| matches!(step, Step::One(Ask { io, .. }) if io == flush);
        let mut begins = |thread: &mut Copy, slot| is_flush(thread.next(slot, &mut ring));
        let [one, other] = &mut threads;
        // However long it takes, and whether of the same thread or of another.
        assert!(begins(one, 0));
        assert!(!begins(one, 1) && !begins(other, 0));
        one.done(0, TARGET, &flush, Ok(()));
        assert!(begins(other, 1), "none is begun any more");
        // One that failed has no other behind it.
        other.done(1, TARGET, &flush, Err(Errno::EIO));
        assert!(!begins(one, 0) && !begins(other, 1));
        assert_eq!(course.durable(), 0);
    }

    #[test]
    fn a_single_bit_anywhere_is_no_zero() {
        for place in [0, 1, 63, 64, 127, 128, 130] {
            let mut bytes = [0; 131];
            assert!(is_zero(&bytes));
            bytes[place] = 0x80;
            assert!(!is_zero(&bytes), "{place}");
        }
    }
}
