//! Answers for a front end that asks what it was told to and knows what should come back.

use std::collections::VecDeque;

use devsplice_core::{Errno, Io, Limits, Op, Result};
use devsplice_engine::{Completion, Export, Inbox, Pages, Request, Rest};

use super::{Dones, FakeRing};

/// A request that is sent no earlier than `at`.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    pub at: u64,
    pub io: Io,
}

/// A request that was finished.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    pub lane: u16,
    pub tag: u16,
    /// Its place in the plan.
    pub seq: usize,
    pub io: Io,
    pub result: Result<(), Errno>,
    pub at: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Known,
    /// Discarded: what was there, or zeros.
    OrZero,
    /// A change of it failed.
    Unknown,
}

const BLOCK: usize = 512;
const POISON: u8 = 0xa5;
/// Devices above this size are not modelled; their reads must fill the pages with zeros.
const MODELLED: u64 = 64 << 20;

/// What the device should hold.
struct Model {
    bytes: Vec<u8>,
    states: Vec<State>,
    zeros: (u64, u64),
}

impl Model {
    fn new(size: u64, zeros: (u64, u64)) -> Model {
        let held = usize::try_from(if size <= MODELLED { size } else { 0 }).unwrap();
        Model { bytes: vec![0; held], states: vec![State::Known; held / BLOCK], zeros }
    }

    fn finished(&mut self, io: &Io, result: Result<(), Errno>, pages: &[u8]) {
        if self.bytes.is_empty() {
            let len = usize::try_from(io.extent.len).unwrap_or(0);
            let zero = |byte: &u8| *byte == 0;
            assert!(io.op != Op::Read || result.is_err() || pages[..len].iter().all(zero));
            return;
        }
        let size = self.bytes.len() as u64;
        let end = io.extent.at.saturating_add(io.extent.len).min(size);
        for at in (io.extent.at.min(end)..end).step_by(BLOCK) {
            if io.op == Op::Read && result.is_err() {
                return;
            }
            let part = usize::try_from(at - io.extent.at).unwrap();
            let block = if io.op.has_pages() { &pages[part..part + BLOCK] } else { &[] };
            let at = usize::try_from(at).unwrap();
            match io.op {
                Op::Read => self.compare(at, block, io),
                _ => self.change(at, block, io.op, result.is_ok()),
            }
        }
    }

    fn change(&mut self, at: usize, block: &[u8], op: Op, succeeded: bool) {
        if (self.zeros.0..self.zeros.1).contains(&(at as u64)) {
            return;
        }
        let state = &mut self.states[at / BLOCK];
        let bytes = &mut self.bytes[at..at + BLOCK];
        match op {
            _ if !succeeded => *state = State::Unknown,
            Op::Discard if *state == State::Unknown => (),
            Op::Discard => *state = State::OrZero,
            Op::Write => {
                bytes.copy_from_slice(block);
                *state = State::Known;
            }
            _ => {
                bytes.fill(0);
                *state = State::Known;
            }
        }
    }

    fn compare(&self, at: usize, got: &[u8], io: &Io) {
        let right = match self.states[at / BLOCK] {
            State::Known => got == &self.bytes[at..at + BLOCK],
            State::OrZero => {
                got == &self.bytes[at..at + BLOCK] || got.iter().all(|byte| *byte == 0)
            }
            State::Unknown => got.iter().any(|byte| *byte != POISON),
        };
        assert!(right, "{io:?} brought wrong bytes for {at}, first {:x?}", &got[..8]);
    }
}

pub struct FakeExport {
    pub stays_open: bool,
    /// Requests may overlap others that are under way; what reads bring is not looked at then.
    pub overlaps: bool,
    /// Ends are sent ahead where the engine wants it.
    pub ahead: bool,
    /// Tags whose end is ahead, and tags whose end will come back cancelled.
    out: Vec<u16>,
    broken: Vec<u16>,
    ring: Option<FakeRing>,
    lane: u16,
    plan: VecDeque<Ask>,
    slots: Vec<Option<(usize, Io)>>,
    /// Tags that found nothing to ask that would not overlap.
    idle: Vec<u16>,
    seq: usize,
    first_pages: u32,
    model: Model,
    done: Dones,
}

impl FakeExport {
    pub fn new(
        depth: u16,
        plan: Vec<Ask>,
        first_pages: u32,
        limits: &Limits,
        zeros: (u64, u64),
        done: Dones,
    ) -> FakeExport {
        FakeExport {
            stays_open: false,
            overlaps: false,
            ahead: false,
            out: Vec::with_capacity(usize::from(depth)),
            broken: Vec::with_capacity(usize::from(depth)),
            ring: None,
            lane: u16::MAX,
            plan: plan.into(),
            slots: vec![None; usize::from(depth)],
            idle: Vec::with_capacity(usize::from(depth)),
            seq: 0,
            first_pages,
            model: Model::new(limits.size, zeros),
            done,
        }
    }

    fn is_free(&self, io: &Io) -> bool {
        let end = |io: &Io| io.extent.at.saturating_add(io.extent.len);
        let apart = |other: &Io| io.extent.at >= end(other) || other.extent.at >= end(io);
        self.slots.iter().flatten().all(|(_, other)| apart(other))
    }

    fn pages(&self, tag: u16) -> Pages {
        Pages(self.first_pages + u32::from(tag))
    }
}

/// Bytes that tell which request wrote which block.
fn pattern(pages: &mut [u8], seq: usize) {
    for (index, block) in pages.chunks_mut(BLOCK).enumerate() {
        let [a, b, ..] = seq.to_le_bytes();
        let [c, d, ..] = index.to_le_bytes();
        for eight in block.chunks_mut(8) {
            eight.copy_from_slice(&[a, b, c, d, 1, 2, 3, 4][..eight.len()]);
        }
    }
}

impl Export<FakeRing> for FakeExport {
    fn depth(&self) -> u16 {
        u16::try_from(self.slots.len()).unwrap()
    }

    fn arm(&mut self, ring: &mut FakeRing, lane: u16) -> Result<()> {
        self.lane = lane;
        self.ring = Some(ring.clone());
        for tag in 0..self.depth() {
            ring.fetch(lane, u32::from(tag), 0);
        }
        Ok(())
    }

    fn event(&mut self, ring: &mut FakeRing, got: Completion, inbox: &mut Inbox) -> Result<()> {
        let tag = u16::try_from(got.index).unwrap();
        if got.result != 0 {
            assert_eq!(got.result, -Errno::ECANCELED.raw());
            let place = self.broken.iter().position(|broken| *broken == tag);
            self.broken.swap_remove(place.expect("only what was taken back is cancelled"));
            return Ok(());
        }
        assert!(!self.out.contains(&tag), "a request comes before the last one is over");
        let Some(ask) = self.plan.front().copied() else { return Ok(()) };
        let mut world = ring.world.lock().unwrap();
        if ask.at > world.now {
            drop(world);
            ring.fetch(self.lane, got.index, ask.at);
            return Ok(());
        }
        if !self.overlaps && !self.is_free(&ask.io) {
            self.idle.push(tag);
            return Ok(());
        }
        self.plan.pop_front();
        let pages = self.pages(tag);
        let memory = &mut world.pages[pages.0 as usize];
        match ask.io.op {
            Op::Write => pattern(memory, self.seq + 1),
            _ => memory.fill(POISON),
        }
        let slot = &mut self.slots[usize::from(tag)];
        assert!(slot.replace((self.seq, ask.io)).is_none(), "tag {tag} is taken");
        self.seq += 1;
        inbox.push(self.lane, Request { tag, io: ask.io, pages });
        Ok(())
    }

    fn finish(&mut self, ring: &mut FakeRing, tag: u16, io: &Io, result: Result<(), Errno>) {
        assert!(!self.out.contains(&tag), "tag {tag} has its end ahead");
        self.ended(ring, tag, io, result);
        ring.fetch(self.lane, u32::from(tag), 0);
    }

    fn goes_ahead(&self) -> bool {
        self.ahead
    }

    fn may_finish_ahead(&self, _tag: u16) -> bool {
        self.ahead
    }

    fn finish_ahead(&mut self, ring: &mut FakeRing, tag: u16, io: &Io) {
        assert_eq!(self.slots[usize::from(tag)].map(|(_, io)| io), Some(*io));
        self.out.push(tag);
        ring.behind(self.lane, u32::from(tag));
    }

    fn went_ahead(&mut self, tag: u16) {
        self.came_back(tag);
        let (ring, (_, io)) = (self.ring.clone().unwrap(), self.slots[usize::from(tag)].unwrap());
        self.ended(&ring, tag, &io, Ok(()));
    }

    fn take_back(&mut self, tag: u16) {
        self.came_back(tag);
        self.broken.push(tag);
    }

    fn is_closed(&self) -> bool {
        !self.stays_open && self.plan.is_empty()
    }

    fn flush(&mut self, _: &mut FakeRing) {}

    fn rest(&mut self, _: &mut FakeRing) -> Rest {
        Rest::Now
    }
}

impl FakeExport {
    fn came_back(&mut self, tag: u16) {
        let place = self.out.iter().position(|out| *out == tag);
        self.out.swap_remove(place.expect("its end is ahead"));
    }

    fn ended(&mut self, ring: &FakeRing, tag: u16, io: &Io, result: Result<(), Errno>) {
        let slot = self.slots[usize::from(tag)].take();
        let (seq, asked) = slot.expect("a tag is finished once");
        assert_eq!(asked, *io);
        let world = ring.world.lock().unwrap();
        let pages = self.pages(tag);
        if !self.overlaps {
            self.model.finished(io, result, &world.pages[pages.0 as usize]);
        }
        let done = Done { lane: self.lane, tag, seq, io: *io, result, at: world.now };
        self.done.lock().unwrap().push(done);
        drop(world);
        for tag in self.idle.drain(..) {
            ring.fetch(self.lane, u32::from(tag), 0);
        }
    }
}
