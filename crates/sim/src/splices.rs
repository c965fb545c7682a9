//! Answers for what becomes of a splice: its faults, its times, what it moves, what it reports.

use devsplice_core::{Errno, Op, Result};
use devsplice_engine::Event;
use devsplice_engine::flights::MAX_ATTEMPTS;

use crate::cells::{SECTOR, ZERO, sectors};
use crate::disk::Disk;
use crate::failure::Kind;
use crate::mutants::Mutant;
use crate::plan::Crash;
use crate::rng::{Rng, index};
use crate::world::{Echo, End, Ended, Flying, Ready, What, World};

/// Most pieces in which a splice moves its bytes, each in its own time.
const MOST_MOVES: u64 = 4;
/// Most nanoseconds that a late splice takes more than others.
const LATE_NS: u64 = 800_000_000;

/// What a broken place says. Clients are told of some of these as `EIO`.
const LASTING: [Errno; 6] =
    [Errno::EIO, Errno::EIO, Errno::ENODATA, Errno::ETIMEDOUT, Errno::ECANCELED, Errno::EILSEQ];

impl World {
    /// Starts what was handed over.
    pub(crate) fn submit(&mut self) {
        for place in 0..self.queue.len() {
            self.begin(self.queue[place]);
        }
        self.queue.clear();
    }

    fn begin(&mut self, splice: u32) {
        let mut flying = self.flying[splice as usize];
        if let Some(far) = self.far_of(flying.disk) {
            return self.ask_far(far, splice);
        }
        (flying.result, flying.moves) = self.fault(&flying);
        flying.error = self.lasting(&flying);
        self.bend(&mut flying);
        if let Some(disk) = flying.disk {
            self.disks[usize::from(disk)].busy += 1;
        }
        let mut latency = 1 + self.rng.below(self.plan.latency_ns);
        if self.rng.permille(self.plan.faults.late) {
            latency += self.rng.below(LATE_NS);
        }
        let early = self.mutant == Some(Mutant::AckEarly) && flying.op == Op::Write;
        let lasts = if early { latency * 3 } else { latency };
        flying.due = self.begin_moves(splice, &flying, lasts);
        let is_inner = flying.slot as usize >= self.first_inner;
        if u64::from(flying.serial) + 1 == self.plan.faults.lost_at && !is_inner {
            let slot = &self.slots[flying.slot as usize];
            self.lost = Some((slot.lane, slot.tag));
        } else if !(self.mutant == Some(Mutant::CompletionLost) && self.rng.permille(5)) {
            flying.due += 1;
            self.later(latency, What::Complete { splice });
        }
        self.flying[splice as usize] = flying;
    }

    /// What a splice reports, and how many of its bytes move.
    fn fault(&mut self, flying: &Flying) -> (Result<u64, Errno>, u64) {
        let faults = self.plan.faults;
        let full = flying.disk.is_some_and(|disk| {
            faults.disk_queue != 0 && self.disks[usize::from(disk)].busy >= faults.disk_queue
        });
        let rng = &mut self.rng;
        if full || rng.permille(faults.again) {
            return (Err(Errno::EAGAIN), 0);
        }
        if rng.permille(faults.interrupted) {
            return (Err(Errno::EINTR), 0);
        }
        if rng.permille(faults.io_error) {
            return (Err(rng.pick(&LASTING)), flying.len);
        }
        let grows = matches!(flying.op, Op::Write | Op::WriteZeroes { .. });
        if grows && rng.permille(faults.no_space) {
            let full = rng.pick(&[Errno::ENOSPC, Errno::ENOSPC, Errno::EDQUOT, Errno::EFBIG]);
            return (Err(full), flying.len);
        }
        if flying.op.has_pages() && rng.permille(faults.nothing) {
            return (Ok(0), 0);
        }
        if flying.op.has_pages() && flying.len > 1 && rng.permille(faults.short) {
            let mut done = rng.between(1, flying.len - 1);
            if rng.percent(50) && done > SECTOR as u64 {
                done -= done % SECTOR as u64;
            }
            return (Ok(done), done);
        }
        (Ok(flying.len), flying.len)
    }

    /// The error with which the request must fail after this result, if it must.
    fn lasting(&mut self, flying: &Flying) -> Option<Errno> {
        let streak = &mut self.streaks[flying.key as usize];
        match flying.result {
            Err(errno) if errno.is_transient() => {
                *streak += 1;
                if *streak <= MAX_ATTEMPTS {
                    return None;
                }
                *streak = 0;
                Some(Errno::EIO)
            }
            other => {
                *streak = 0;
                match other {
                    Ok(0) if flying.len > 0 => Some(Errno::EIO),
                    other => other.err(),
                }
            }
        }
    }

    /// What a bug makes of a splice.
    fn bend(&mut self, flying: &mut Flying) {
        let done = flying.result.unwrap_or(0);
        let short = done > 0 && done < flying.len;
        match (self.mutant, flying.op) {
            (Some(Mutant::WriteDropped), Op::Write) if self.rng.percent(3) => {
                (flying.moves, flying.result, flying.error) = (0, Ok(flying.len), None);
            }
            (Some(Mutant::ShortRead), Op::Read) | (Some(Mutant::ShortWrite), Op::Write)
                if short =>
            {
                flying.result = Ok(flying.len);
            }
            (Some(Mutant::ErrorSwallowed), _) if flying.error.is_some() => {
                flying.result = Ok(flying.len);
            }
            (Some(Mutant::ReadOff), Op::Read) if self.rng.percent(3) => {
                let size = flying.disk.map_or(0, |disk| self.disks[usize::from(disk)].limits.size);
                if flying.at + flying.len + SECTOR as u64 <= size {
                    flying.at += SECTOR as u64;
                }
            }
            (Some(Mutant::ZeroesIgnored), Op::WriteZeroes { .. }) => flying.moves = 0,
            (Some(Mutant::FlushTooOld), Op::Flush) => {
                flying.ended_before = flying.ended_before.saturating_sub(3);
            }
            _ => {}
        }
    }

    /// Lets the bytes move, in up to four pieces at different times; how many there are. Of a
    /// splice that fails any of them may be missing.
    fn begin_moves(&mut self, splice: u32, flying: &Flying, lasts: u64) -> u8 {
        if flying.moves == 0 {
            return 0;
        }
        let pieces = if self.rng.percent(60) { 1 } else { self.rng.between(2, MOST_MOVES) };
        let mut from = 0;
        let mut count = 0;
        for left in (1..=pieces).rev() {
            let rest = flying.moves - from;
            // Whole sectors of the disk: only a short result ends inside of one.
            let inside = (flying.at + from) % SECTOR as u64;
            let step = (rest / left).next_multiple_of(SECTOR as u64).saturating_sub(inside);
            let len = if left == 1 { rest } else { step.min(rest) };
            if len == 0 {
                continue;
            }
            let missing = flying.result.is_err() && self.rng.percent(50);
            if !missing {
                let at = self.rng.below(lasts);
                // A request is far below 4 GiB.
                let (from, to) = (from as u32, (from + len) as u32);
                self.later(at, What::Move { splice, from, to });
                count += 1;
            }
            from += len;
        }
        count
    }

    /// Moves bytes `from..to` of a splice.
    pub(crate) fn carry(&mut self, splice: u32, from: u64, to: u64) {
        let flying = self.flying[splice as usize];
        self.landed(splice);
        if self.slots[flying.slot as usize].generation != flying.generation {
            let text = format!("{} at {}: its request has ended", flying.op.name(), flying.at);
            return self.fail(Kind::StalePages, text);
        }
        if !flying.op.has_pages() {
            let (at, len) = (index(flying.at + from), index(to - from));
            if let Some(disk) = flying.disk {
                let beyond = self.mutant == Some(Mutant::DiscardNeighbour);
                let beyond = beyond && flying.op == Op::Discard;
                let disk = &mut self.disks[usize::from(disk)];
                zero(disk, &mut self.rng, (flying.op, flying.serial), (at, len), beyond);
            }
            return;
        }
        let mut start = 0;
        for part in &flying.parts[..usize::from(flying.part_count)] {
            let len = u64::from(part.len);
            let (low, high) = (from.max(start), to.min(start + len));
            if low < high {
                let memory = index(u64::from(part.at) + low - start);
                self.carry_part(&flying, memory, index(flying.at + low), index(high - low));
            }
            start += len;
        }
    }

    /// Moves `len` bytes between `memory` of the pages and `at` of the disk.
    fn carry_part(&mut self, flying: &Flying, memory: usize, at: usize, len: usize) {
        let cells = &mut self.slots[flying.slot as usize].cells;
        let mixes = &mut self.mixes;
        match (flying.op, flying.disk) {
            (Op::Read, None) => sectors(memory, len, |sector, range, _| {
                cells[sector] = mixes.replace(cells[sector], range, &[ZERO, ZERO], range.0);
            }),
            (Op::Read, Some(disk)) => {
                let visible = self.disks[usize::from(disk)].visible();
                sectors(memory, len, |sector, range, done| {
                    cells[sector] = mixes.replace(cells[sector], range, visible, at + done);
                });
            }
            (_, Some(disk)) => {
                let disk = &mut self.disks[usize::from(disk)];
                sectors(at, len, |sector, range, done| {
                    let old = disk.visible()[sector];
                    let new = mixes.replace(old, range, cells, memory + done);
                    disk.put(sector, new, flying.serial);
                });
            }
            (_, None) => {}
        }
    }

    /// One of the things that were due of a splice has happened.
    fn landed(&mut self, splice: u32) {
        let flying = &mut self.flying[splice as usize];
        flying.due -= 1;
        // One whose completion was lost keeps its key and is never told of, so its place is free.
        if flying.due == 0 {
            self.free.push(splice);
        }
    }

    /// A splice comes to its end.
    pub(crate) fn complete(&mut self, splice: u32) {
        let flying = self.flying[splice as usize];
        if flying.op == Op::Flush && flying.result.is_ok() {
            self.flushes += 1;
            let crashes = self.crash == Crash::Flush(self.flushes);
            if crashes {
                self.end = Some(End::Crash);
            }
            if crashes && self.rng.percent(50) {
                return;
            }
        }
        self.landed(splice);
        if let Some(disk) = flying.disk {
            let disk = &mut self.disks[usize::from(disk)];
            disk.busy -= 1;
            if flying.result.is_ok() {
                let Flying { op, fua, serial, ended_before, .. } = flying;
                let change = Change { op, fua, serial, ended_before };
                harden(disk, &change, disk.limits.fua, &self.ended, self.mutant);
            }
            if self.mutant == Some(Mutant::Echo) && flying.op == Op::Write {
                self.keep_echo(&flying);
            }
        }
        let event = Event::Splice { key: flying.key, result: flying.result };
        let Flying { serial, slot, error, len, .. } = flying;
        let short = flying.result.is_ok_and(|done| done < len);
        let splice = Some(Ended { serial, slot, error, short });
        self.ready.push_back(Ready { event, splice });
    }

    fn keep_echo(&mut self, flying: &Flying) {
        let Some(disk) = flying.disk else { return };
        let first = index(flying.at) / SECTOR;
        let end = index(flying.at + flying.len).div_ceil(SECTOR);
        let cells = self.disks[usize::from(disk)].visible()[first..end].to_vec();
        self.echoes.push(Echo { disk, first, cells, serial: flying.serial });
        let echo = self.echoes.len() as u32 - 1;
        let ns = self.rng.below(20 * self.plan.latency_ns);
        self.later(ns, What::Again { echo });
    }

    /// A finished write hits the disk again.
    pub(crate) fn echo(&mut self, echo: u32) {
        let Echo { disk, first, cells, serial } = &self.echoes[echo as usize];
        for (sector, cell) in (*first..).zip(cells) {
            self.disks[usize::from(*disk)].put(sector, *cell, *serial);
        }
    }
}

/// What is done to a disk.
pub(crate) struct Change {
    pub(crate) op: Op,
    pub(crate) fua: bool,
    pub(crate) serial: u32,
    /// What had been seen to end when it was asked for.
    pub(crate) ended_before: u32,
}

/// Makes durable what the end of something promises.
pub(crate) fn harden(
    disk: &mut Disk,
    change: &Change,
    has_fua: bool,
    ended: &[u32],
    mutant: Option<Mutant>,
) {
    let Change { op, fua, serial, ended_before } = *change;
    if op == Op::Flush {
        if mutant != Some(Mutant::FlushEarly) {
            disk.settle(|other| (1..=ended_before).contains(&ended[other as usize]));
        }
        return;
    }
    let forced = fua && has_fua && mutant != Some(Mutant::FuaIgnored);
    if forced || !disk.limits.volatile_cache {
        disk.settle(|other| other == serial);
    }
}

/// Zeros a range, or after a discard any part of it; with the bug one sector more.
pub(crate) fn zero(
    disk: &mut Disk,
    rng: &mut Rng,
    (op, serial): (Op, u32),
    (at, len): (usize, usize),
    beyond: bool,
) {
    let chance = if op == Op::Discard { rng.pick(&[0, 50, 100]) } else { 100 };
    let end = (at + len) / SECTOR;
    for sector in at / SECTOR..end {
        if rng.percent(chance) {
            disk.put(sector, ZERO, serial);
        }
    }
    if beyond && end < disk.visible().len() {
        disk.put(end, ZERO, serial);
    }
}
