//! Answers for a front end that asks what a case wants asked, over any ring that lends it memory.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devsplice_core::{Errno, Error, Io, Limits, Op, Result, Stack};
use devsplice_engine::{Completion, Export, FileId, Inbox, Lane, Pages, Request, Ring};
use devsplice_engine::{Rest, Served, Worker};

use crate::content::POISON;
use crate::target::{Ask, Done};

/// A ring that lends memory to a front end.
pub(crate) trait Room: Ring + Send {
    /// Brings about an event of the lane with the tag as its index.
    fn summon(&mut self, lane: u16, tag: u16);
    /// The memory of a tag.
    fn memory_of(&self, lane: u16, tag: u16) -> Pages;
    /// Puts bytes into it.
    fn load(&mut self, lane: u16, tag: u16, bytes: &[u8]);
    /// Takes `len` bytes out of it.
    fn unload(&mut self, lane: u16, tag: u16, len: usize) -> Vec<u8>;
    /// Whether a splice with a tag's memory was failed on purpose since the last time it was asked.
    fn was_hit(&mut self, _: u16, _: u16) -> bool {
        false
    }
    /// Whether nothing will ever come.
    fn is_asleep(&self) -> bool {
        false
    }
}

/// Requests that are asked together, and what became of each, in the order of the asks.
#[derive(Default)]
struct Batch {
    asks: VecDeque<(usize, Ask)>,
    /// Events that were asked for and have not come.
    woken: usize,
    dones: Vec<Option<Done>>,
    /// Of which some splice was failed on purpose.
    hits: Vec<bool>,
    /// Those that are not finished.
    left: usize,
    /// No other batch follows.
    closing: bool,
    /// Things that must not happen; the first is kept.
    wrong: Option<String>,
}

impl Batch {
    fn fill(&mut self, asks: &[Ask]) {
        self.asks = asks.iter().copied().enumerate().collect();
        self.dones = vec![None; asks.len()];
        self.hits = vec![false; asks.len()];
        self.left = asks.len();
    }

    /// How many events a front with so many tags asks for at first.
    fn first(&mut self, depth: u16) -> u16 {
        self.woken = self.asks.len().min(usize::from(depth));
        u16::try_from(self.woken).unwrap_or(depth)
    }

    fn collect(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String> {
        if let Some(text) = self.wrong.take() {
            return Err(text);
        }
        let mut all = Vec::with_capacity(asks.len());
        for (ask, done) in asks.iter().zip(self.dones.drain(..)) {
            all.push(done.ok_or_else(|| format!("asked: {ask}; it was never finished"))?);
        }
        Ok(all)
    }
}

fn lock(batch: &Mutex<Batch>) -> MutexGuard<'_, Batch> {
    batch.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One lane.
struct Front {
    lane: u16,
    depth: u16,
    slots: Vec<Option<(usize, Ask)>>,
    batch: Arc<Mutex<Batch>>,
}

impl Front {
    fn wrong(&self, text: String) {
        lock(&self.batch).wrong.get_or_insert(text);
    }
}

impl<R: Room> Export<R> for Front {
    fn depth(&self) -> u16 {
        self.depth
    }

    fn arm(&mut self, ring: &mut R, lane: u16) -> Result<()> {
        self.lane = lane;
        for tag in 0..lock(&self.batch).first(self.depth) {
            ring.summon(lane, tag);
        }
        Ok(())
    }

    fn event(&mut self, ring: &mut R, got: Completion, inbox: &mut Inbox) -> Result<()> {
        let next = {
            let mut batch = lock(&self.batch);
            batch.woken -= 1;
            batch.asks.pop_front()
        };
        let Some((place, ask)) = next else { return Ok(()) };
        // Tags are what this export asked to be woken with.
        let tag = u16::try_from(got.index).unwrap_or(u16::MAX);
        match ask.io.op {
            Op::Write => ring.load(self.lane, tag, &ask.bytes()),
            Op::Read => {
                let len = usize::try_from(ask.io.extent.len).unwrap_or(0);
                ring.load(self.lane, tag, &vec![POISON; len]);
            }
            _ => {}
        }
        if self.slots[usize::from(tag)].replace((place, ask)).is_some() {
            self.wrong(format!("tag {tag} was given out twice"));
        }
        let pages = ring.memory_of(self.lane, tag);
        inbox.push(self.lane, Request { tag, io: ask.io, pages });
        Ok(())
    }

    fn finish(&mut self, ring: &mut R, tag: u16, io: &Io, result: Result<(), Errno>) {
        let Some((place, ask)) = self.slots[usize::from(tag)].take() else {
            return self.wrong(format!("{io:?} was finished twice"));
        };
        if ask.io != *io {
            return self.wrong(format!("asked: {ask}; finished: {io:?}"));
        }
        let len = if io.op == Op::Read { usize::try_from(io.extent.len).unwrap_or(0) } else { 0 };
        let bytes = if len > 0 { ring.unload(self.lane, tag, len) } else { Vec::new() };
        let hit = ring.was_hit(self.lane, tag);
        let mut batch = lock(&self.batch);
        batch.dones[place] = Some(Done { result, bytes });
        batch.hits[place] = hit;
        batch.left -= 1;
        if batch.asks.len() > batch.woken {
            batch.woken += 1;
            ring.summon(self.lane, tag);
        }
    }

    fn is_closed(&self) -> bool {
        // As soon as the last one was asked: what is in flight then must still be finished.
        let batch = lock(&self.batch);
        batch.closing && batch.asks.is_empty()
    }

    fn flush(&mut self, _: &mut R) {}

    fn rest(&mut self, _: &mut R) -> Rest {
        Rest::Now
    }
}

/// How requests are put to an engine.
pub(crate) struct Setup<'a, R> {
    pub(crate) ring: R,
    pub(crate) stack: &'a Arc<Stack>,
    pub(crate) files: Vec<FileId>,
    pub(crate) depth: u16,
    pub(crate) flights: u32,
}

/// An engine at work, from its start to its end or to where it is dropped.
pub(crate) struct Life<R: Ring> {
    worker: Worker<R>,
    batch: Arc<Mutex<Batch>>,
    depth: u16,
}

impl<R: Room + 'static> Life<R> {
    /// Begins with some requests; `closing` if they are all.
    fn with(setup: Setup<'_, R>, asks: &[Ask], closing: bool) -> Result<Life<R>, String> {
        let Setup { ring, stack, files, depth, flights } = setup;
        let mut batch = Batch { closing, ..Batch::default() };
        batch.fill(asks);
        let batch = Arc::new(Mutex::new(batch));
        let slots = vec![None; usize::from(depth)];
        let front = Front { lane: 0, depth, slots, batch: batch.clone() };
        let lane = Lane::new(Box::new(front), Served::quietly(Arc::clone(stack)), files.into());
        let never = (0, Box::new(|_: &_| ()) as _);
        let mut worker = Worker::new(ring, vec![lane], flights, Arc::default(), never);
        worker.arm().map_err(|error| failed(&error))?;
        Ok(Life { worker, batch, depth })
    }

    /// Begins without any.
    pub(crate) fn begin(setup: Setup<'_, R>) -> Result<Life<R>, String> {
        Life::with(setup, &[], false)
    }

    /// Serves requests; `ring` is another handle of its own ring. What became of each, and of which
    /// some splice was failed on purpose.
    pub(crate) fn run(
        &mut self,
        ring: &mut R,
        asks: &[Ask],
    ) -> Result<(Vec<Done>, Vec<bool>), String> {
        lock(&self.batch).fill(asks);
        for tag in 0..lock(&self.batch).first(self.depth) {
            ring.summon(0, tag);
        }
        while lock(&self.batch).left > 0 {
            if ring.is_asleep() {
                return Err("the worker waits for ever".into());
            }
            self.turn()?;
        }
        let mut batch = lock(&self.batch);
        Ok((batch.collect(asks)?, std::mem::take(&mut batch.hits)))
    }

    /// One turn of the engine; whether there is more to come.
    pub(crate) fn turn(&mut self) -> Result<bool, String> {
        self.worker.turn().map_err(|error| failed(&error))
    }

    /// Ends it as a device is removed.
    pub(crate) fn end(mut self) -> Result<(), String> {
        lock(&self.batch).closing = true;
        self.worker.run().map_err(|error| failed(&error))
    }
}

fn failed(error: &Error) -> String {
    format!("the ring failed: {error}")
}

/// An engine's whole life: serves the asks, and ends.
pub(crate) fn serve<R: Room + 'static>(
    setup: Setup<'_, R>,
    asks: &[Ask],
) -> Result<Vec<Done>, String> {
    let Life { mut worker, batch, .. } = Life::with(setup, asks, true)?;
    worker.run().map_err(|error| failed(&error))?;
    drop(worker);
    lock(&batch).collect(asks)
}

/// Most bytes of data that the asks need in one tag's memory.
pub(crate) fn memory_needed(asks: &[Ask]) -> u64 {
    let with_pages = asks.iter().filter(|ask| ask.io.op.has_pages());
    with_pages.map(|ask| ask.io.extent.len).max().unwrap_or(0)
}

/// Whether one limit is at least as strict as what lies below; names those that are not.
pub(crate) fn laxer(above: &Limits, below: &Limits) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut rule = |kept: bool, what: &str| {
        if !kept {
            wrong.push(format!("{what}: above {above:?}, below {below:?}"));
        }
    };
    rule(above.block >= below.block, "its block is smaller");
    rule(above.physical >= below.physical, "its physical block is smaller");
    rule(above.dma == above.dma.and(below.dma), "it takes memory that a device below does not");
    rule(above.read_only || !below.read_only, "it may be written, a device below may not");
    rule(above.volatile_cache || !below.volatile_cache, "it hides a volatile cache");
    rule(!above.fua || below.fua, "it offers force unit access, a device below does not");
    wrong
}
