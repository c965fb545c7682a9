//! Answers for what each sector of a device may be: now, and after the power has gone.
//!
//! A sector is a register. Each change (write, write-zeroes, discard) adds a candidate when it is
//! asked for. One that succeeds rules out those that had ended before it began: for reads that
//! begin later at once, for crashes when it is durable. Nothing else ever rules anything out, so a
//! failed or unfinished change leaves old and new possible.

use devsplice_core::{Io, Op};

use crate::cells::{Cell, Mixes, ZERO, is_mixed, show};
use crate::rng::index;

const NONE: u32 = u32::MAX;
const NEVER: u64 = u64::MAX;

/// Something that a sector may hold.
#[derive(Clone, Copy)]
struct Candidate {
    value: Cell,
    change: u32,
    /// Reads that begin at this moment or later do not see it.
    unseen_from: u64,
    /// Cannot survive a crash any more.
    gone: bool,
    next: u32,
}

/// A request that changes data.
struct Change {
    first: usize,
    count: usize,
    start: u64,
    end: u64,
    /// It is durable when it ends.
    forced: bool,
}

/// What is known of one device.
#[derive(Default)]
pub(crate) struct Oracle {
    /// For each sector its first candidate; `NONE` where nothing is kept and all reads are zeros.
    heads: Vec<u32>,
    candidates: Vec<Candidate>,
    free: u32,
    changes: Vec<Change>,
    /// Changes that succeeded and are not known to be durable.
    volatile: Vec<u32>,
    /// Whether completed writes may be lost.
    cached: bool,
    /// Whether a sector at rest reads the same each time. Not over a mirror whose legs differ.
    stable: bool,
    restarted: u64,
    /// For each sector when what lies below it last forgot what was not flushed.
    forgotten: Vec<u64>,
}

impl Oracle {
    /// `kept` tells which sectors keep what is written to them.
    pub(crate) fn new(kept: impl Iterator<Item = bool>, cached: bool, stable: bool) -> Oracle {
        let start = Change { first: 0, count: 0, start: 0, end: 0, forced: true };
        let mut oracle =
            Oracle { changes: vec![start], free: NONE, cached, stable, ..Oracle::default() };
        for kept in kept {
            oracle.heads.push(NONE);
            oracle.forgotten.push(0);
            if kept {
                let sector = oracle.heads.len() - 1;
                oracle.add(sector, ZERO, 0);
            }
        }
        oracle
    }

    fn add(&mut self, sector: usize, value: Cell, change: u32) {
        let next = self.heads[sector];
        let new = Candidate { value, change, unseen_from: NEVER, gone: false, next };
        let place = self.free;
        if place == NONE {
            // Far fewer than 2^32 sectors are written in a run.
            self.heads[sector] = self.candidates.len() as u32;
            self.candidates.push(new);
        } else {
            self.free = self.candidates[place as usize].next;
            self.candidates[place as usize] = new;
            self.heads[sector] = place;
        }
    }

    fn of(&self, sector: usize) -> impl Iterator<Item = &Candidate> {
        let mut next = self.heads[sector];
        std::iter::from_fn(move || {
            let candidate = self.candidates.get(next as usize)?;
            next = candidate.next;
            Some(candidate)
        })
    }

    /// Removes the candidates of a sector for which `useless` is true.
    fn prune(&mut self, sector: usize, useless: impl Fn(&Candidate) -> bool) {
        let mut before = NONE;
        let mut place = self.heads[sector];
        while let Some(candidate) = self.candidates.get(place as usize).copied() {
            if useless(&candidate) {
                match self.candidates.get_mut(before as usize) {
                    Some(before) => before.next = candidate.next,
                    None => self.heads[sector] = candidate.next,
                }
                self.candidates[place as usize].next = self.free;
                self.free = place;
            } else {
                before = place;
            }
            place = candidate.next;
        }
    }

    /// A change was asked for; `value` gives what it puts into a sector of the device.
    pub(crate) fn begin(&mut self, io: &Io, now: u64, value: impl Fn(u64) -> Cell) -> u32 {
        let first = index(io.extent.at / 512);
        let count = index(io.extent.len / 512);
        let change = self.changes.len() as u32;
        let forced = io.fua || !self.cached;
        self.changes.push(Change { first, count, start: now, end: NEVER, forced });
        for sector in first..first + count {
            if self.heads[sector] != NONE {
                self.add(sector, value(sector as u64), change);
            }
        }
        change
    }

    /// A change came to its end. Every request that is still in flight began at `oldest` or later.
    pub(crate) fn end(&mut self, change: u32, io: &Io, ok: bool, now: u64, oldest: u64) {
        self.changes[change as usize].end = now;
        // After a discard the old data may still be there, so it rules nothing out.
        if !ok || io.op == Op::Discard {
            return;
        }
        let durable = io.fua || !self.cached;
        self.rule_out(change, now, durable, oldest);
        if !durable {
            self.volatile.push(change);
        }
    }

    fn rule_out(&mut self, change: u32, now: u64, durable: bool, oldest: u64) {
        let Change { first, count, start, .. } = self.changes[change as usize];
        let forced = self.changes[change as usize].forced;
        for sector in first..first + count {
            if start < self.forgotten[sector] && !forced {
                // It may have been done before that, in part.
                continue;
            }
            let mut place = self.heads[sector];
            let mut useless = false;
            while let Some(candidate) = self.candidates.get_mut(place as usize) {
                if self.changes[candidate.change as usize].end < start {
                    candidate.unseen_from = candidate.unseen_from.min(now);
                    candidate.gone |= durable;
                }
                useless |= candidate.gone && candidate.unseen_from <= oldest;
                place = candidate.next;
            }
            if useless {
                self.prune(sector, |other| other.gone && other.unseen_from <= oldest);
            }
        }
    }

    /// A flush that was asked for at `start` succeeded.
    pub(crate) fn flushed(&mut self, start: u64, now: u64, oldest: u64) {
        let volatile = std::mem::take(&mut self.volatile);
        for change in volatile {
            if self.changes[change as usize].end < start {
                self.rule_out(change, now, true, oldest);
            } else {
                self.volatile.push(change);
            }
        }
    }

    /// Checks what a read that began at `start` saw in a sector.
    pub(crate) fn read(
        &mut self,
        sector: usize,
        got: Cell,
        start: u64,
        mixes: &Mixes,
    ) -> Result<(), String> {
        self.allowed(sector, got, mixes, |candidate| candidate.unseen_from > start)?;
        let quiet = |candidate: &Candidate| self.changes[candidate.change as usize].end <= start;
        let single = self.of(sector).take(2).count() < 2;
        let restarted = self.restarted.max(self.forgotten[sector]);
        let before = start < self.forgotten[sector];
        if single || !self.stable || before || is_mixed(got) || !self.of(sector).all(quiet) {
            return Ok(());
        }
        // Nothing was changing it, so from now on it is what was read.
        let since_restart =
            |candidate: &Candidate| self.changes[candidate.change as usize].end > restarted;
        let settled = !self.of(sector).any(since_restart);
        let mut place = self.heads[sector];
        while let Some(candidate) = self.candidates.get_mut(place as usize) {
            if candidate.value != got {
                candidate.unseen_from = candidate.unseen_from.min(start);
                candidate.gone |= settled;
            }
            place = candidate.next;
        }
        Ok(())
    }

    /// Checks what a sector holds while nothing is in flight.
    pub(crate) fn at_rest(&self, sector: usize, got: Cell, mixes: &Mixes) -> Result<(), String> {
        self.allowed(sector, got, mixes, |candidate| candidate.unseen_from == NEVER)
    }

    /// Checks what of a sector survived.
    pub(crate) fn survived(&self, sector: usize, got: Cell, mixes: &Mixes) -> Result<(), String> {
        self.allowed(sector, got, mixes, |candidate| !candidate.gone)
    }

    fn allowed(
        &self,
        sector: usize,
        got: Cell,
        mixes: &Mixes,
        possible: impl Fn(&Candidate) -> bool,
    ) -> Result<(), String> {
        if self.heads[sector] == NONE && got == ZERO {
            return Ok(());
        }
        if self.of(sector).any(|candidate| candidate.value == got && possible(candidate)) {
            return Ok(());
        }
        let values = || self.of(sector).filter(|one| possible(one)).map(|one| one.value);
        if is_mixed(got) && values().nth(1).is_some() && mixes.is_mix_of(got, values()) {
            return Ok(());
        }
        let may: Vec<_> = values().map(show).collect();
        Err(format!("sector {sector} holds {}, may be: {}", show(got), may.join(", ")))
    }

    /// What lies below the sectors that are `there` has forgotten what was not flushed, while
    /// clients and all else live on: what was durable is certain, all newer may be or not. No flush
    /// that comes later says anything of changes from before.
    pub(crate) fn forgot(&mut self, now: u64, there: impl Fn(usize) -> bool) {
        for sector in (0..self.heads.len()).filter(|sector| there(*sector)) {
            self.forgotten[sector] = now;
            let mut place = self.heads[sector];
            while let Some(candidate) = self.candidates.get_mut(place as usize) {
                if !candidate.gone {
                    candidate.unseen_from = NEVER;
                }
                place = candidate.next;
            }
        }
    }

    /// The power went: what was in flight has ended, what may have survived is all there is.
    pub(crate) fn crashed(&mut self, now: u64) {
        for change in self.changes.iter_mut().filter(|change| change.end == NEVER) {
            change.end = now;
        }
        self.volatile.clear();
        self.restarted = now;
        for sector in 0..self.heads.len() {
            self.prune(sector, |candidate| candidate.gone);
        }
        for candidate in &mut self.candidates {
            candidate.unseen_from = NEVER;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oracle() -> Oracle {
        Oracle::new([true, true, false].into_iter(), true, true)
    }

    fn write(at: u64, fua: bool) -> Io {
        Io { fua, ..Io::new(Op::Write, at * 512, 512) }
    }

    #[test]
    fn a_finished_write_is_seen_by_later_reads_and_survives_from_the_flush_on() {
        let (mut oracle, mixes) = (oracle(), Mixes::default());
        let io = write(0, false);
        let change = oracle.begin(&io, 1, |_| 100);
        assert!(oracle.read(0, 0, 2, &mixes).is_ok() && oracle.read(0, 100, 2, &mixes).is_ok());
        oracle.end(change, &io, true, 3, 2);
        assert!(oracle.read(0, 0, 2, &mixes).is_ok(), "it began before the write ended");
        assert!(oracle.read(0, 0, 4, &mixes).is_err() && oracle.read(0, 100, 4, &mixes).is_ok());
        assert!(oracle.survived(0, 0, &mixes).is_ok());
        oracle.flushed(2, 5, 5);
        assert!(oracle.survived(0, 0, &mixes).is_ok(), "the flush began before the write ended");
        oracle.flushed(4, 6, 6);
        assert!(oracle.survived(0, 0, &mixes).is_err());
        assert!(oracle.survived(0, 100, &mixes).is_ok());
    }

    #[test]
    fn what_is_forgotten_below_comes_back_unless_it_was_flushed_or_written_after() {
        let (mut oracle, mixes) = (oracle(), Mixes::default());
        let ask = |oracle: &mut Oracle, value, fua, start, end| {
            let io = write(0, fua);
            let change = oracle.begin(&io, start, |_| value);
            oracle.end(change, &io, true, end, end);
        };
        ask(&mut oracle, 100, false, 1, 2);
        oracle.flushed(3, 4, 4);
        ask(&mut oracle, 200, false, 5, 6);
        assert!(oracle.read(0, 100, 7, &mixes).is_err());
        oracle.forgot(8, |sector| sector == 1);
        assert!(oracle.read(0, 100, 9, &mixes).is_err(), "another sector");
        oracle.forgot(10, |sector| sector == 0);
        oracle.flushed(11, 12, 12);
        assert!(oracle.read(0, 0, 13, &mixes).is_err(), "it was overwritten durably");
        assert!(oracle.survived(0, 100, &mixes).is_ok() && oracle.survived(0, 200, &mixes).is_ok());
        assert!(oracle.read(0, 100, 13, &mixes).is_ok());
        assert!(oracle.read(0, 200, 14, &mixes).is_err(), "what was read once stays");
        ask(&mut oracle, 300, true, 15, 16);
        oracle.forgot(17, |_| true);
        assert!(
            oracle.read(0, 100, 18, &mixes).is_err() && oracle.read(0, 300, 18, &mixes).is_ok()
        );
    }

    #[test]
    fn overlapping_writes_leave_both_possible_and_a_failed_one_old_and_new() {
        let (mut oracle, mixes) = (oracle(), Mixes::default());
        let io = write(1, true);
        let (a, b) = (oracle.begin(&io, 1, |_| 100), oracle.begin(&io, 2, |_| 200));
        oracle.end(a, &io, true, 3, 4);
        oracle.end(b, &io, true, 4, 5);
        for value in [100, 200] {
            assert!(oracle.at_rest(1, value, &mixes).is_ok());
            assert!(oracle.survived(1, value, &mixes).is_ok());
        }
        assert!(oracle.at_rest(1, 0, &mixes).is_err());
        let c = oracle.begin(&io, 6, |_| 300);
        oracle.end(c, &io, false, 7, 8);
        assert!(oracle.at_rest(1, 100, &mixes).is_ok() && oracle.at_rest(1, 300, &mixes).is_ok());
        assert!(oracle.read(1, 300, 9, &mixes).is_ok());
        assert!(oracle.read(1, 100, 10, &mixes).is_err(), "what was read once stays");
    }

    #[test]
    fn a_crash_brings_unflushed_versions_back_and_a_sink_stays_zero() {
        let (mut oracle, mixes) = (oracle(), Mixes::default());
        let io = write(0, false);
        let change = oracle.begin(&io, 1, |_| 100);
        oracle.end(change, &io, true, 2, 3);
        assert!(oracle.at_rest(0, 0, &mixes).is_err());
        oracle.crashed(4);
        assert!(oracle.at_rest(0, 0, &mixes).is_ok() && oracle.at_rest(0, 100, &mixes).is_ok());
        oracle.flushed(5, 6, 6);
        assert!(oracle.at_rest(0, 0, &mixes).is_ok(), "no flush brings back what was lost");
        let nowhere = write(2, false);
        let change = oracle.begin(&nowhere, 7, |_| 100);
        oracle.end(change, &nowhere, true, 8, 8);
        assert!(oracle.at_rest(2, 0, &mixes).is_ok() && oracle.at_rest(2, 100, &mixes).is_err());
    }
}
