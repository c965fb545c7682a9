//! Answers for a front end without a kernel: asks, and judges what comes back.

use devsplice_core::{Errno, Extent, Io, Limits, Op, Result};
use devsplice_engine::{Completion, Export, Inbox, Pages, Request, Rest};

use crate::cells::{POISON, ZERO, is_mixed, show, stamp};
use crate::failure::Kind;
use crate::live::Told;
use crate::ring::SimRing;
use crate::rng::index;
use crate::world::{Asked, Front, What, World};

/// A front end's queue. What it knows lies in the world, which outlives it.
pub(crate) struct SimExport {
    pub(crate) depth: u16,
    pub(crate) lane: u16,
    /// Requests that it has still to ask.
    pub(crate) left: u64,
    pub(crate) limits: Limits,
    pub(crate) front: Front,
    /// Where commands go.
    pub(crate) told: Told,
}

/// With what a request must be refused at the door, if it must.
fn refusal(limits: &Limits, io: &Io) -> Option<Errno> {
    if io.op == Op::Flush {
        return None;
    }
    let block = u64::from(limits.block);
    let off = !io.extent.at.is_multiple_of(block) || !io.extent.len.is_multiple_of(block);
    if off || io.extent.len == 0 || io.extent.at + io.extent.len > limits.size {
        return Some(Errno::EINVAL);
    }
    let offered = match io.op {
        Op::Discard => limits.discard != 0,
        Op::WriteZeroes { .. } => limits.write_zeroes,
        _ => true,
    };
    match io.op {
        Op::Write | Op::Discard | Op::WriteZeroes { .. } if limits.read_only => Some(Errno::EROFS),
        _ if !offered => Some(Errno::EOPNOTSUPP),
        _ => None,
    }
}

impl Export<SimRing> for SimExport {
    fn depth(&self) -> u16 {
        self.depth
    }

    fn arm(&mut self, ring: &mut SimRing, lane: u16) -> Result<()> {
        debug_assert_eq!(lane, self.lane);
        for tag in 0..self.depth {
            let ns = ring.world.rng.below(10_000);
            ring.world.later(ns, What::Fetch { lane, tag });
        }
        Ok(())
    }

    fn event(&mut self, ring: &mut SimRing, got: Completion, inbox: &mut Inbox) -> Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        self.left -= 1;
        let world = &mut *ring.world;
        let habits = world.devices[self.front.device].habits;
        if let (Some(habits), Some((served, node))) = (habits, &self.told)
            && let Some(words) = habits.command(&mut world.rng)
        {
            // What comes of it shows in the data.
            drop(served.command(*node, words));
        }
        // Tags are below the depth, which fits 16 bits.
        let tag = got.index as u16;
        let slot = self.front.first_slot + usize::from(tag);
        let io = world.next_request(self.front.device);
        if world.slots[slot].request.is_some() {
            world.fail(Kind::Contract, format!("tag {tag} was free and has a request"));
            return Ok(());
        }
        world.ask(self, slot, io);
        world.trace.note(
            [slot as u64, io.extent.at, io.extent.len, world.now],
            format_args!("{:>10} ask {} {tag} {io:?}", world.now, self.lane),
        );
        inbox.push(self.lane, Request { tag, io, pages: Pages(slot as u32) });
        Ok(())
    }

    fn finish(&mut self, ring: &mut SimRing, tag: u16, io: &Io, result: Result<(), Errno>) {
        let world = &mut *ring.world;
        let number = result.err().map_or(0, |errno| u64::from(errno.raw().unsigned_abs()));
        world.trace.note(
            [u64::from(tag), u64::from(self.lane), number, world.now],
            format_args!("{:>10} end {} {tag} {io:?} {result:?}", world.now, self.lane),
        );
        let slot = self.front.first_slot + usize::from(tag);
        let Some(asked) = world.slots[slot].request.take() else {
            return world.fail(Kind::Contract, format!("{io:?} is finished twice"));
        };
        if asked.io != *io || world.slots[slot].out != 0 {
            let text = format!("{io:?} is finished while its splices are out, or was not asked");
            return world.fail(Kind::StalePages, text);
        }
        world.slots[slot].generation += 1;
        world.judge(self, slot, &asked, result);
        let ns = world.devices[self.front.device].workload.think();
        world.later(ns, What::Fetch { lane: self.lane, tag });
    }

    fn is_closed(&self) -> bool {
        self.left == 0
    }

    fn flush(&mut self, _: &mut SimRing) {}

    fn rest(&mut self, _: &mut SimRing) -> Rest {
        Rest::Now
    }
}

/// Times that a client of a mirror looks for a request that overlaps no change in flight.
const LOOKS: u32 = 8;

impl World {
    /// What a device's client asks next. Legs of a mirror may carry out two changes of one place
    /// that are in flight together in different order (as md's do), so clients of mirrors wait for
    /// the first one, as file systems do.
    fn next_request(&mut self, device: usize) -> Io {
        let World { devices, fronts, slots, .. } = self;
        let is_live = devices[device].habits.is_some();
        let meets = |io: &Io| {
            let end = io.extent.at + io.extent.len;
            slots.iter().filter_map(|slot| Some((slot.lane, slot.request?))).any(|(lane, asked)| {
                let Extent { at, len } = asked.io.extent;
                fronts.get(usize::from(lane)).is_some_and(|front| front.device == device)
                    && asked.io.op.changes()
                    && at < end
                    && io.extent.at < at + len
            })
        };
        for _ in 0..LOOKS {
            let io = devices[device].workload.next();
            if !is_live || !io.op.changes() || !meets(&io) {
                return io;
            }
        }
        Io::new(Op::Flush, 0, 0)
    }

    /// Fills the pages and tells the oracle.
    fn ask(&mut self, export: &SimExport, slot: usize, io: Io) {
        let start = self.tick();
        let device = &mut self.devices[export.front.device];
        let refused = refusal(&export.limits, &io).is_some();
        let sectors = index(io.extent.len / 512);
        let first = io.extent.at / 512;
        let cells = &mut self.slots[slot].cells;
        cells.clear();
        let mut change = None;
        if io.op == Op::Write {
            device.writes += 1;
            let (seed, write) = (self.seed, device.writes);
            cells.extend((first..).take(sectors).map(|sector| stamp(seed, write, sector)));
            if !refused {
                let value = |sector| stamp(seed, write, sector);
                change = Some(device.oracle.begin(&io, start, value));
            }
        } else if io.op == Op::Read {
            cells.resize(sectors, POISON);
        } else if io.op.changes() && !refused {
            change = Some(device.oracle.begin(&io, start, |_| ZERO));
        }
        let slot = &mut self.slots[slot];
        slot.error = None;
        slot.short = false;
        slot.request = Some(Asked { io, start, change });
        self.asked += 1;
    }

    /// Whether a request may have ended as it did.
    fn judge(&mut self, export: &SimExport, slot: usize, asked: &Asked, got: Result<(), Errno>) {
        let Asked { io, start, change } = *asked;
        let now = self.tick();
        let oldest = self.oldest().min(now);
        let error = self.slots[slot].error;
        let device = &mut self.devices[export.front.device];
        if let Some(change) = change {
            device.oracle.end(change, &io, got.is_ok(), now, oldest);
        }
        if io.op == Op::Flush && got.is_ok() {
            device.oracle.flushed(start, now, oldest);
        }
        let refused = refusal(&export.limits, &io);
        if device.habits.is_some() {
            return self.judge_live(export, slot, asked, (got, refused));
        }
        let by_layer = |errno: Errno| refused.is_none() && device.errors.contains(&errno);
        match (got, refused.or(error.map(Errno::for_client))) {
            (Ok(()), None) if io.op == Op::Read => self.judge_read(export, slot, asked),
            (Ok(()), None) => {}
            (Ok(()), Some(must)) => {
                self.fail(Kind::WrongResult, format!("{io:?} succeeded, must fail with {must}"));
            }
            (Err(errno), _) if by_layer(errno) => {}
            (Err(errno), None) => {
                self.fail(Kind::NeedlessError, format!("{io:?} failed with {errno}"));
            }
            (Err(errno), Some(must)) if errno != must => {
                let text = format!("{io:?} failed with {errno}, must with {must}");
                self.fail(Kind::WrongResult, text);
            }
            (Err(_), Some(_)) => {}
        }
    }

    /// Over live layers an error below need not be the client's, and an error for the client may
    /// come from what a layer did for itself.
    fn judge_live(
        &mut self,
        export: &SimExport,
        slot: usize,
        asked: &Asked,
        (got, refused): (Result<(), Errno>, Option<Errno>),
    ) {
        let io = asked.io;
        match (got, refused) {
            (Ok(()), Some(must)) => {
                self.fail(Kind::WrongResult, format!("{io:?} succeeded, must fail with {must}"));
            }
            (Ok(()), None) if io.op == Op::Read => self.judge_read(export, slot, asked),
            (Err(errno), Some(must)) if errno != must => {
                let text = format!("{io:?} failed with {errno}, must with {must}");
                self.fail(Kind::WrongResult, text);
            }
            (Err(errno), None) if !self.erred => {
                self.fail(Kind::NeedlessError, format!("{io:?} failed with {errno}"));
            }
            _ => {}
        }
    }

    fn judge_read(&mut self, export: &SimExport, slot: usize, asked: &Asked) {
        let World { slots, devices, mixes, .. } = self;
        let oracle = &mut devices[export.front.device].oracle;
        let first = index(asked.io.extent.at / 512);
        let mut wrong = None;
        for (sector, cell) in (first..).zip(&slots[slot].cells) {
            let unfilled = *cell == POISON
                || is_mixed(*cell)
                    && mixes.render(*cell).windows(8).any(|eight| eight == [0xa5; 8]);
            if unfilled {
                let text = format!("{:?}: sector {sector} is {}", asked.io, show(*cell));
                wrong.get_or_insert((Kind::Unfilled, text));
            } else if let Err(text) = oracle.read(sector, *cell, asked.start, mixes) {
                let text = format!("{:?}: {text}", asked.io);
                wrong.get_or_insert((Kind::WrongData, text));
            }
        }
        if let Some((kind, text)) = wrong {
            self.fail(kind, text);
        }
    }
}
