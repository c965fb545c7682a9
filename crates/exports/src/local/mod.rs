//! Answers for requests that this process makes itself, to read, copy, compare and measure stacks:
//! an export without a device, whose slots each go from request to request as their work says.
//!
//! A thread has a ring and a lane for each stack (side) that it asks. A slot is the same tag of all
//! lanes: what was read from one side into its memory can be written to the other from there.

mod compare;
mod copy;
mod course;
mod load;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devsplice_core::{Errno, Error, ErrorKind, Io, Result, Stack};
use devsplice_engine::{
    Completion, Counts, Export, Inbox, Lane, Request, Rest, Served, Shared, Worker,
};
use devsplice_uring::{Config, LaneMemory, Uring};

use crate::threads::Bottom;

pub use compare::{Compare, Differ, Sides};
pub use copy::{Copy, Flushes, How};
pub use course::{Course, Failure, Plan};
pub use load::{Load, Pattern};

/// A request to a side.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Which side.
    pub side: u16,
    /// The lane whose memory of this slot it fills or drains.
    pub memory: u16,
    /// What and where. At most the lane's memory for reads and writes.
    pub io: Io,
}

/// What a slot does next.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// This.
    One(Ask),
    /// Both at a time, of different sides.
    Two(Ask, Ask),
    /// Nothing any more.
    End,
}

/// What the slots of one thread do.
pub trait Work: Send {
    /// Nothing of the slot is out: what follows. Its memory may be looked at.
    fn next(&mut self, slot: u16, ring: &mut Uring) -> Step;

    /// What became of a request of the slot.
    fn done(&mut self, slot: u16, side: u16, io: &Io, result: Result<(), Errno>);
}

/// A stack that is asked.
pub struct Side {
    /// The stack.
    pub served: Arc<Served>,
    /// Its bottoms, in their order.
    pub bottoms: Vec<Bottom>,
}

impl Side {
    /// A stack of which nobody wants to hear events.
    #[must_use]
    pub fn new(stack: Arc<Stack>, bottoms: Vec<Bottom>) -> Side {
        Side { served: Served::quietly(stack), bottoms }
    }
}

/// How many requests, of what size.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Slots of each thread.
    pub depth: u16,
    /// Bytes of a slot's memory on each side that has any.
    pub bytes: u32,
}

/// Does each work on a thread of its own, until every slot of it has ended. What was counted.
/// `memory` says which sides' lanes have memory.
///
/// # Errors
/// If a ring or a thread cannot be made, or a ring fails. That a request failed is the work's.
pub fn run(
    sides: &[Side],
    (size, memory): (Size, &[bool]),
    works: Vec<Box<dyn Work>>,
) -> Result<Counts> {
    let shared: Vec<_> = works.iter().map(|_| Arc::new(Shared::default())).collect();
    let ended = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, (work, shared)) in works.into_iter().zip(&shared).enumerate() {
            let shared = Arc::clone(shared);
            let thread = std::thread::Builder::new()
                .name(format!("io/{index}"))
                .spawn_scoped(scope, move || serve(sides, (size, memory), work, shared))
                .map_err(|error| Error::os("I/O thread", &error))?;
            threads.push(thread);
        }
        for thread in threads {
            thread.join().map_err(|_| Error::new(ErrorKind::Os, "I/O thread", "panicked"))??;
        }
        Ok(())
    });
    ended.map(|()| shared.iter().fold(Counts::default(), |sum, one| sum.plus(&one.read())))
}

fn serve(
    sides: &[Side],
    (size, memory): (Size, &[bool]),
    work: Box<dyn Work>,
    shared: Arc<Shared>,
) -> Result<()> {
    let memory = |index: usize| LaneMemory {
        depth: size.depth,
        bytes: if memory.get(index) == Some(&true) { size.bytes } else { 0 },
        slots: false,
        locked: false,
    };
    let lanes: Vec<_> = (0..sides.len()).map(memory).collect();
    let tags = u32::from(size.depth) * u32::try_from(sides.len()).unwrap_or(1);
    let files = sides.iter().map(|side| side.bottoms.len()).sum::<usize>();
    let files = u16::try_from(files)
        .map_err(|_| Error::invalid("stack", format!("{files} files in one ring")))?;
    let inner: usize = sides.iter().map(|side| side.served.stack.live_levels()).sum();
    let inner = u16::try_from(inner).unwrap_or(0);
    let flights = (tags * 2).clamp(64, 4096);
    let mut ring = Uring::new(&Config { flights, files, lanes, inner })?;
    ring.work_in_place();
    let desk = Arc::new(Mutex::new(Desk::new(work, size.depth)));
    let mut made = Vec::new();
    for side in sides {
        let mut files = Vec::new();
        for bottom in &side.bottoms {
            files.push(bottom.add_to(&mut ring)?);
        }
        let queue = Queue { lane: 0, depth: size.depth, desk: Arc::clone(&desk) };
        made.push(Lane::new(Box::new(queue), Arc::clone(&side.served), files.into()));
    }
    let mut worker = Worker::new(ring, made, flights, shared, (0, Box::new(|_| {})));
    worker.arm()?;
    worker.run()
}

/// What the lanes of a thread share.
struct Desk {
    work: Box<dyn Work>,
    /// Slots of which nothing is out.
    ready: Vec<u16>,
    /// Requests of each slot that are out.
    out: Box<[u8]>,
    ended: u16,
    is_kicked: bool,
}

impl Desk {
    fn new(work: Box<dyn Work>, depth: u16) -> Desk {
        let out = vec![0; usize::from(depth)].into();
        Desk { work, ready: (0..depth).rev().collect(), out, ended: 0, is_kicked: false }
    }

    /// Has `start` called at the next turn.
    fn kick(&mut self, ring: &mut Uring) {
        if !std::mem::replace(&mut self.is_kicked, true) {
            ring.kick((0, 0));
        }
    }

    /// Sends what the slots that are ready do next.
    fn start(&mut self, ring: &mut Uring, inbox: &mut Inbox) {
        self.is_kicked = false;
        while let Some(slot) = self.ready.pop() {
            let step = self.work.next(slot, ring);
            let mut send = |ask: Ask| {
                self.out[usize::from(slot)] += 1;
                let memory = if ask.io.op.has_pages() { ask.memory } else { 0 };
                let pages = ring.memory_pages(memory, slot);
                inbox.push(ask.side, Request { tag: slot, io: ask.io, pages });
            };
            match step {
                Step::One(ask) => send(ask),
                Step::Two(one, two) => {
                    send(one);
                    send(two);
                }
                Step::End => self.ended += 1,
            }
        }
    }
}

/// One side's lane. The first one's events are the slots'.
struct Queue {
    lane: u16,
    depth: u16,
    desk: Arc<Mutex<Desk>>,
}

impl Queue {
    /// Only this thread's lanes share it: it is never waited for.
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Export<Uring> for Queue {
    fn depth(&self) -> u16 {
        self.depth
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.lane = lane;
        if lane == 0 {
            self.desk().kick(ring);
        }
        Ok(())
    }

    fn event(&mut self, ring: &mut Uring, _: Completion, inbox: &mut Inbox) -> Result<()> {
        self.desk().start(ring, inbox);
        Ok(())
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        let mut desk = self.desk();
        desk.work.done(tag, self.lane, io, result);
        let out = &mut desk.out[usize::from(tag)];
        *out -= 1;
        if *out == 0 {
            desk.ready.push(tag);
            desk.kick(ring);
        }
    }

    fn rest(&mut self, _: &mut Uring) -> Rest {
        // What was read for the next request of a slot is in its memory between the two.
        Rest::Keep
    }

    fn is_closed(&self) -> bool {
        self.desk().ended == self.depth
    }

    fn flush(&mut self, _: &mut Uring) {}
}
