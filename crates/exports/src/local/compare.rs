//! Answers for a comparison of two stacks, or of one with zeros: each slot reads a range and looks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use devsplice_core::{Errno, Io, Op};
use devsplice_uring::Uring;

use super::copy::is_zero;
use super::course::{Chunk, Course, Failure};
use super::{Ask, Step, Work};

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sides {
    /// Both with each other.
    Both,
    /// This one with zeros.
    Zeroes(u16),
}

/// Where the first difference is, as far as is known.
#[derive(Debug)]
pub struct Differ(AtomicU64);

impl Default for Differ {
    fn default() -> Differ {
        Differ(AtomicU64::new(u64::MAX))
    }
}

impl Differ {
    /// The first byte that differs, if one does.
    #[must_use]
    pub fn at(&self) -> Option<u64> {
        Some(self.0.load(SeqCst)).filter(|at| *at != u64::MAX)
    }
}

/// The slots of one thread.
pub struct Compare {
    course: Arc<Course>,
    differ: Arc<Differ>,
    sides: Sides,
    slots: Box<[Option<Chunk>]>,
}

impl Compare {
    /// So many slots on this course.
    #[must_use]
    pub fn new(course: Arc<Course>, differ: Arc<Differ>, sides: Sides, depth: u16) -> Compare {
        Compare { course, differ, sides, slots: vec![None; usize::from(depth)].into() }
    }

    /// Looks at what was read. Chunks are given out in order, so the first difference is in one
    /// that is out when a later one is found.
    fn look(&self, slot: u16, ring: &mut Uring, chunk: &Chunk) {
        let len = usize::try_from(chunk.len).unwrap_or(usize::MAX);
        let found = match self.sides {
            Sides::Both => match ring.both([0, 1], slot, len) {
                Ok([one, two]) if one == two => None,
                Ok([one, two]) => one.iter().zip(two).position(|(one, two)| one != two),
                Err(errno) => {
                    let io = Io::new(Op::Read, chunk.at, chunk.len);
                    return self.course.fail(Failure { side: 0, io, errno });
                }
            },
            Sides::Zeroes(side) => {
                let data = &ring.memory(side, slot)[Uring::DATA_AT..Uring::DATA_AT + len];
                if is_zero(data) { None } else { data.iter().position(|byte| *byte != 0) }
            }
        };
        match found {
            Some(place) => {
                self.differ.0.fetch_min(chunk.at + place as u64, SeqCst);
                self.course.stop();
            }
            None => self.course.finished(chunk),
        }
    }

    /// The next chunk that has to be read.
    fn take(&self) -> Option<Chunk> {
        loop {
            let chunk = self.course.take()?;
            if !chunk.reads_zero {
                return Some(chunk);
            }
            self.course.finished(&chunk);
        }
    }
}

impl Work for Compare {
    fn next(&mut self, slot: u16, ring: &mut Uring) -> Step {
        if let Some(chunk) = self.slots[usize::from(slot)].take()
            && !self.course.has_failed()
        {
            self.look(slot, ring, &chunk);
        }
        let Some(chunk) = self.take() else { return Step::End };
        self.slots[usize::from(slot)] = Some(chunk);
        let ask = |side| Ask { side, memory: side, io: Io::new(Op::Read, chunk.at, chunk.len) };
        match self.sides {
            Sides::Both => Step::Two(ask(0), ask(1)),
            Sides::Zeroes(side) => Step::One(ask(side)),
        }
    }

    fn done(&mut self, _: u16, side: u16, io: &Io, result: Result<(), Errno>) {
        if let Err(errno) = result {
            self.course.fail(Failure { side, io: *io, errno });
        }
    }
}
