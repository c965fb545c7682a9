//! Answers for a front end that asks what a case wants asked, over any ring that lends it memory.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devsplice_core::{Errno, Io, Limits, Op, Result, Stack};
use devsplice_engine::{Completion, Export, FileId, Inbox, Lane, Pages, Request, Ring};
use devsplice_engine::{Served, Shared, Worker};

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
}

/// What became of each request, in the order of the asks.
#[derive(Clone)]
pub(crate) struct Dones(Arc<Mutex<Vec<Option<Done>>>>);

impl Dones {
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Done>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One lane.
struct Front {
    lane: u16,
    depth: u16,
    asks: VecDeque<(usize, Ask)>,
    /// Events that were asked for and have not come.
    woken: usize,
    slots: Vec<Option<(usize, Ask)>>,
    dones: Dones,
    /// Things that must not happen; the first is kept.
    wrong: Arc<Mutex<Option<String>>>,
}

impl Front {
    fn wrong(&self, text: String) {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
    }
}

impl<R: Room> Export<R> for Front {
    fn depth(&self) -> u16 {
        self.depth
    }

    fn arm(&mut self, ring: &mut R, lane: u16) -> Result<()> {
        self.lane = lane;
        self.woken = self.asks.len().min(usize::from(self.depth));
        for tag in (0..self.depth).take(self.woken) {
            ring.summon(lane, tag);
        }
        Ok(())
    }

    fn event(&mut self, ring: &mut R, got: Completion, inbox: &mut Inbox) -> Result<()> {
        self.woken -= 1;
        let Some((place, ask)) = self.asks.pop_front() else { return Ok(()) };
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
        self.dones.lock()[place] = Some(Done { result, bytes });
        if self.asks.len() > self.woken {
            self.woken += 1;
            ring.summon(self.lane, tag);
        }
    }

    fn is_closed(&self) -> bool {
        // As soon as the last one was asked: what is in flight then must still be finished.
        self.asks.is_empty()
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

/// An engine's whole life: serves the asks, and ends.
pub(crate) fn serve<R: Room + 'static>(
    setup: Setup<'_, R>,
    asks: &[Ask],
) -> Result<Vec<Done>, String> {
    let Setup { ring, stack, files, depth, flights } = setup;
    let dones = Dones(Arc::new(Mutex::new(vec![None; asks.len()])));
    let wrong = Arc::new(Mutex::new(None));
    let front = Front {
        lane: 0,
        depth,
        asks: asks.iter().copied().enumerate().collect(),
        woken: 0,
        slots: vec![None; usize::from(depth)],
        dones: dones.clone(),
        wrong: wrong.clone(),
    };
    let lane = Lane::new(Box::new(front), Served::quietly(Arc::clone(stack)), files.into());
    let shared = Arc::new(Shared::default());
    let never = (0, Box::new(|_: &_| ()) as _);
    let mut worker = Worker::new(ring, vec![lane], flights, shared, never);
    worker
        .arm()
        .and_then(|()| worker.run())
        .map_err(|error| format!("the ring failed: {error}"))?;
    drop(worker);
    if let Some(text) = wrong.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(text);
    }
    let mut all = Vec::with_capacity(asks.len());
    for (ask, done) in asks.iter().zip(dones.lock().drain(..)) {
        all.push(done.ok_or_else(|| format!("asked: {ask}; it was never finished"))?);
    }
    Ok(all)
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
