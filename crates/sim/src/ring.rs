//! Answers for a ring without a kernel: splices that are late, out of order, short and faulty.

use std::sync::{Arc, Mutex, PoisonError};

use devsplice_core::{Error, ErrorKind, Extent, Io, Limits, Op, Result};
use devsplice_engine::desk::{INNER_BYTES, INNER_DEPTH};
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{Event, Pages, Part, Ring, RingCounts, Splice, To, Wake};

use crate::cells::SECTOR;
use crate::failure::Kind;
use crate::world::{End, Flying, What, World};

/// Where the world is left when the engine is gone.
pub(crate) type Home = Arc<Mutex<World>>;

/// The ring; it has the world while the engine lives.
pub(crate) struct SimRing {
    pub(crate) world: Box<World>,
    home: Home,
}

impl SimRing {
    pub(crate) fn new(world: World, home: Home) -> SimRing {
        SimRing { world: Box::new(world), home }
    }
}

impl Drop for SimRing {
    fn drop(&mut self) {
        // Also while a panic of the engine unwinds.
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        *home = std::mem::take(&mut *self.world);
    }
}

impl Ring for SimRing {
    fn splice(&mut self, key: u32, splice: &Splice<'_>) {
        let world = &mut *self.world;
        if let Err(text) = world.check(key, splice) {
            return world.fail(Kind::Contract, text);
        }
        let Splice { op, fua, to, at, len, pages, parts } = *splice;
        let disk = match to {
            To::File(file) => Some(file.0),
            To::Zero => None,
        };
        let now = world.now;
        let place = disk.map_or(0, |disk| u64::from(disk) + 1);
        world.trace.note(
            [u64::from(key), at, len, place],
            format_args!("{now:>10} send {key} file {disk:?} {splice:?}"),
        );
        let mut held = [Part::default(); MAX_PARTS];
        held[..parts.len()].copy_from_slice(parts);
        world.keys[key as usize] = true;
        let slot = &mut world.slots[pages.0 as usize];
        slot.out += 1;
        let flying = Flying {
            key,
            op,
            fua,
            disk,
            at,
            len,
            moves: len,
            result: Ok(len),
            error: None,
            slot: pages.0,
            generation: slot.generation,
            serial: world.ended.len() as u32,
            ended_before: world.ended_count,
            due: 0,
            part_count: parts.len() as u8,
            parts: held,
        };
        world.ended.push(0);
        world.counts.sqes += 1;
        let place = world.keep(flying);
        if world.queue.len() as u64 >= world.plan.entries {
            world.submit();
        }
        world.queue.push(place);
    }

    fn after(&mut self, key: u32, ns: u64) {
        self.world.later(ns, What::Timer { key });
    }

    fn enter(&mut self, wait: bool) -> Result<()> {
        let world = &mut *self.world;
        world.counts.enters += 1;
        world.submit();
        world.now += world.rng.below(2000);
        world.pass(wait);
        match world.end {
            None => Ok(()),
            Some(End::Crash) => Err(Error::new(ErrorKind::Os, "sim", "the power went")),
            Some(_) => Err(Error::new(ErrorKind::Os, "sim", "the run is over")),
        }
    }

    fn next(&mut self) -> Option<Event> {
        let world = &mut *self.world;
        if world.end.is_some() {
            return None;
        }
        let ready = world.ready.pop_front()?;
        if let (Event::Splice { key, result }, Some(ended)) = (ready.event, ready.splice) {
            world.ended_count += 1;
            world.ended[ended.serial as usize] = world.ended_count;
            world.keys[key as usize] = false;
            let slot = &mut world.slots[ended.slot as usize];
            slot.out -= 1;
            slot.short |= ended.short;
            if let Some(error) = ended.error {
                world.erred = true;
                slot.error.get_or_insert(error);
            }
            let number = match result {
                Ok(done) => done,
                Err(errno) => u64::MAX - errno.raw().unsigned_abs() as u64,
            };
            world.trace.note(
                [u64::from(key), number, world.now, 1],
                format_args!("{:>10} done {key} {result:?}", world.now),
            );
        }
        Some(ready.event)
    }

    fn now_ns(&self) -> u64 {
        self.world.now
    }

    fn wake(&mut self) -> Wake {
        // All is on one thread.
        Arc::new(|| {})
    }

    fn inner_pages(&self, lane: u16, tag: u16) -> Pages {
        let world = &*self.world;
        let inner = usize::from(lane) - world.fronts.len();
        let slot = world.first_inner + inner * usize::from(INNER_DEPTH) + usize::from(tag);
        // There are few lanes and tags.
        Pages(slot as u32)
    }

    fn put(&mut self, lane: u16, tag: u16, bytes: &[u8]) {
        let slot = self.inner_pages(lane, tag).0 as usize;
        let World { slots, mixes, .. } = &mut *self.world;
        slots[slot].short = false;
        for (cell, sector) in slots[slot].cells.iter_mut().zip(bytes.chunks_exact(SECTOR)) {
            *cell = mixes.keep(sector.try_into().unwrap_or([0; SECTOR]));
        }
    }

    fn get(&mut self, lane: u16, tag: u16, bytes: &mut [u8]) {
        let slot = self.inner_pages(lane, tag).0 as usize;
        let World { slots, mixes, .. } = &mut *self.world;
        for (cell, sector) in slots[slot].cells.iter().zip(bytes.chunks_exact_mut(SECTOR)) {
            sector.copy_from_slice(&mixes.show(*cell));
        }
    }

    fn counts(&self) -> RingCounts {
        self.world.counts
    }
}

/// What a disk of these limits has against a splice. Only what follows a short one may begin
/// inside a block.
fn refusal(limits: &Limits, splice: &Splice<'_>, short: bool) -> Option<&'static str> {
    let block = u64::from(limits.block);
    let whole = splice.at.is_multiple_of(block) && splice.len.is_multiple_of(block);
    match splice.op {
        _ if splice.at + splice.len > limits.size => Some("behind the end of the disk"),
        _ if !whole && !short => Some("off the blocks of the disk"),
        Op::Discard if limits.discard == 0 => Some("a discard that the disk does not offer"),
        Op::WriteZeroes { .. } if !limits.write_zeroes => {
            Some("a write-zeroes that the disk does not offer")
        }
        _ => None,
    }
}

impl World {
    /// What every splice must hold to.
    fn check(&self, key: u32, splice: &Splice<'_>) -> Result<(), String> {
        let say = |what: &str| Err(format!("{what}: key {key}, {splice:?}"));
        let Some(slot) = self.slots.get(splice.pages.0 as usize) else {
            return say("pages that nobody minted");
        };
        // What layers ask for themselves has no client, only memory.
        let inner = Io {
            op: splice.op,
            extent: Extent { at: 0, len: u64::from(INNER_BYTES) },
            fua: splice.fua,
        };
        let is_inner = splice.pages.0 as usize >= self.first_inner;
        let Some(io) = slot.request.map(|asked| asked.io).or(is_inner.then_some(inner)) else {
            return say("a splice of a request that has ended");
        };
        match self.keys.get(key as usize) {
            None => return say("a key beyond the table"),
            Some(true) => return say("a key that is out"),
            Some(false) => {}
        }
        if splice.op != io.op || splice.fua != io.fua {
            return say("another operation than was asked for");
        }
        match splice.to {
            To::Zero if splice.op != Op::Read => return say("a change of nothing"),
            To::Zero => {}
            To::File(file) => {
                let Some(disk) = self.disks.get(usize::from(file.0)) else {
                    return say("a file that was not given");
                };
                if let Some(what) = refusal(&disk.limits, splice, slot.short) {
                    return say(what);
                }
            }
        }
        if !splice.op.has_pages() {
            let empty = splice.len == 0;
            let fits = splice.parts.is_empty() && empty == (splice.op == Op::Flush);
            return if fits { Ok(()) } else { say("parts or a length where none belong") };
        }
        let sum: u64 = splice.parts.iter().map(|part| u64::from(part.len)).sum();
        let inside =
            |part: &Part| part.len > 0 && u64::from(part.at) + u64::from(part.len) <= io.extent.len;
        let count = (1..=MAX_PARTS).contains(&splice.parts.len());
        if !count || sum != splice.len || !splice.parts.iter().all(inside) {
            return say("parts that are not the request's");
        }
        Ok(())
    }

    /// Gives a splice a place of its own.
    fn keep(&mut self, flying: Flying) -> u32 {
        match self.free.pop() {
            Some(place) => {
                self.flying[place as usize] = flying;
                place
            }
            None => {
                self.flying.push(flying);
                // Bounded by the flights of a worker and what a bug leaves behind.
                self.flying.len() as u32 - 1
            }
        }
    }
}
