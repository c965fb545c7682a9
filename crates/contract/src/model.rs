//! Answers for what each sector may hold: now, and after the power was cut.

use std::collections::HashMap;

use devsplice_core::Op;

use crate::content::{POISON, SECTOR, Stamp, ZERO, describe, sector};
use crate::target::{Ask, Done};

/// What one sector may hold.
#[derive(Clone, Debug)]
struct Cell {
    /// One of these.
    now: Vec<Stamp>,
    /// One of these after a power cut.
    later: Vec<Stamp>,
    /// A change of it failed, or it was never written: anything.
    unknown: bool,
}

/// A change of one sector in a batch.
#[derive(Clone, Copy)]
struct Change {
    value: Stamp,
    /// What was there may stay.
    may_not: bool,
    durable: bool,
    failed: bool,
}

/// What a device should hold.
#[derive(Clone, Debug)]
pub struct Model {
    cells: Vec<Cell>,
    /// Ranges in which nothing is kept and all reads are zeros.
    voids: Vec<(u64, u64)>,
}

type Changes = HashMap<usize, Vec<Change>>;

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// The sectors that a request touches.
fn sectors(ask: &Ask) -> std::ops::Range<usize> {
    let extent = ask.io.extent;
    let end = extent.at.saturating_add(extent.len);
    index(extent.at / SECTOR as u64)..index(end.div_ceil(SECTOR as u64))
}

/// Whether each byte is one that a sector of `may` has in that place.
fn is_mix(got: &[u8], may: &[Stamp], at: u64) -> bool {
    let may: Vec<_> = may.iter().map(|stamp| sector(*stamp, at)).collect();
    (0..got.len()).all(|byte| may.iter().any(|sector| sector[byte] == got[byte]))
}

impl Model {
    /// A device of `size` bytes that holds anything.
    #[must_use]
    pub fn new(size: u64, voids: &[(u64, u64)]) -> Model {
        let cell = Cell { now: vec![ZERO], later: vec![ZERO], unknown: true };
        Model { cells: vec![cell; index(size / SECTOR as u64)], voids: voids.into() }
    }

    fn is_void(&self, sector: usize) -> bool {
        let at = sector as u64 * SECTOR as u64;
        self.voids.iter().any(|(from, to)| (*from..*to).contains(&at))
    }

    /// Takes in what came of requests that were in flight together, and judges what reads brought.
    ///
    /// # Errors
    /// If a read brought what its place cannot hold: which, where, and what it was instead.
    pub fn batch(&mut self, asks: &[Ask], dones: &[Done]) -> Result<(), String> {
        let mut changes = Changes::new();
        for (ask, done) in asks.iter().zip(dones).filter(|(ask, _)| ask.io.op.changes()) {
            let is_write = ask.io.op == Op::Write;
            let change = Change {
                value: if is_write { ask.stamp } else { ZERO },
                may_not: ask.io.op == Op::Discard,
                durable: ask.io.fua,
                failed: done.result.is_err(),
            };
            let touched = sectors(ask);
            for sector in touched.start..touched.end.min(self.cells.len()) {
                changes.entry(sector).or_default().push(change);
            }
        }
        for (ask, done) in asks.iter().zip(dones) {
            if ask.io.op == Op::Read && done.result.is_ok() {
                self.read(ask, &done.bytes, &changes)?;
            }
        }
        let flushed = |(ask, done): (&Ask, &Done)| ask.io.op == Op::Flush && done.result.is_ok();
        if asks.iter().zip(dones).any(flushed) {
            // What was done before the batch began; its own changes may have come too late.
            self.cells.iter_mut().for_each(|cell| cell.later.clone_from(&cell.now));
        }
        for (sector, changes) in changes {
            if !self.is_void(sector) {
                self.cells[sector].change(&changes);
            }
        }
        Ok(())
    }

    fn read(&self, ask: &Ask, bytes: &[u8], changes: &Changes) -> Result<(), String> {
        if bytes.len() as u64 != ask.io.extent.len {
            return Err(format!("asked: {ask}; came: {} bytes", bytes.len()));
        }
        for (number, got) in sectors(ask).zip(bytes.chunks(SECTOR)) {
            let at = number as u64 * SECTOR as u64;
            let Some(cell) = self.cells.get(number) else { continue };
            let concurrent = changes.get(&number).map_or(&[][..], Vec::as_slice);
            let mut may = if self.is_void(number) { vec![ZERO] } else { cell.now.clone() };
            let unknown = cell.unknown || concurrent.iter().any(|change| change.failed);
            if unknown && !self.is_void(number) && got.iter().any(|byte| *byte != POISON) {
                continue;
            }
            if !self.is_void(number) {
                may.extend(concurrent.iter().map(|change| change.value));
            }
            if may.iter().any(|stamp| got == sector(*stamp, at)) {
                continue;
            }
            // While it is being written, a read may see a part of each.
            if !concurrent.is_empty() && is_mix(got, &may, at) {
                continue;
            }
            let may: Vec<_> = may.iter().map(|stamp| describe(&sector(*stamp, at))).collect();
            return Err(format!(
                "asked: {ask}; came, for the sector at {at}: {}; it may hold: {}",
                describe(got),
                if unknown { "anything".into() } else { may.join(", or ") }
            ));
        }
        Ok(())
    }

    /// The power was cut.
    pub fn cut(&mut self) {
        for cell in &mut self.cells {
            cell.now.clone_from(&cell.later);
        }
    }
}

impl Cell {
    fn change(&mut self, changes: &[Change]) {
        if changes.iter().any(|change| change.failed) {
            self.unknown = true;
        }
        let values = changes.iter().map(|change| change.value);
        if changes.iter().all(|change| change.may_not) {
            self.now.extend(values.clone());
        } else {
            self.now = values.clone().collect();
            self.unknown &= changes.iter().any(|change| change.failed);
        }
        match changes {
            [one] if one.durable && !one.may_not => self.later = vec![one.value],
            _ => self.later.extend(values),
        }
        for list in [&mut self.now, &mut self.later] {
            list.sort_unstable();
            list.dedup();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devsplice_core::{Errno, Io};

    fn ask(op: Op, at: u64, len: u64, stamp: Stamp) -> Ask {
        Ask { io: Io::new(op, at, len), stamp }
    }

    fn ok() -> Done {
        Done { result: Ok(()), bytes: Vec::new() }
    }

    fn written(model: &mut Model, stamp: Stamp) {
        model.batch(&[ask(Op::Write, 0, 1024, stamp)], &[ok()]).unwrap();
    }

    fn reads(model: &mut Model, bytes: Vec<u8>) -> Result<(), String> {
        let done = Done { result: Ok(()), bytes };
        model.batch(&[ask(Op::Read, 0, 1024, 0)], &[done])
    }

    #[test]
    fn a_read_brings_the_last_write_and_each_byte_of_it() {
        let mut model = Model::new(1024, &[]);
        written(&mut model, 1);
        written(&mut model, 2);
        let mut bytes = ask(Op::Write, 0, 1024, 2).bytes();
        reads(&mut model, bytes.clone()).unwrap();
        let old = reads(&mut model, ask(Op::Write, 0, 1024, 1).bytes()).unwrap_err();
        assert!(old.contains("what write 1 put at 0; it may hold: what write 2 put at 0"), "{old}");
        bytes[1023] ^= 1;
        assert!(reads(&mut model, bytes).unwrap_err().contains("sector at 512"));
        assert!(reads(&mut model, Vec::new()).is_err());
    }

    #[test]
    fn what_overlaps_leaves_one_of_both_and_what_failed_leaves_anything() {
        let mut model = Model::new(1024, &[]);
        let both = [ask(Op::Write, 0, 1024, 1), ask(Op::Write, 0, 1024, 2)];
        model.batch(&both, &[ok(), ok()]).unwrap();
        for stamp in [1, 2] {
            reads(&mut model, both[stamp - 1].bytes()).unwrap();
        }
        assert!(reads(&mut model, vec![0; 1024]).is_err());
        let failed = Done { result: Err(Errno::EIO), bytes: Vec::new() };
        model.batch(&both[..1], &[failed]).unwrap();
        reads(&mut model, vec![7; 1024]).unwrap();
        assert!(reads(&mut model, vec![POISON; 1024]).unwrap_err().contains("nobody filled"));
    }

    #[test]
    fn a_power_cut_leaves_what_was_flushed_or_anything_newer() {
        let mut model = Model::new(1024, &[]);
        written(&mut model, 1);
        model.batch(&[ask(Op::Flush, 0, 0, 0)], &[ok()]).unwrap();
        written(&mut model, 2);
        model.cut();
        for (stamp, right) in [(1, true), (2, true), (0, false)] {
            let bytes = ask(Op::Write, 0, 1024, stamp).bytes();
            assert_eq!(reads(&mut model, bytes).is_ok(), right, "{stamp}");
        }
        let fua = Ask { io: Io { fua: true, ..Io::new(Op::Write, 0, 1024) }, stamp: 3 };
        model.batch(&[fua], &[ok()]).unwrap();
        model.cut();
        assert!(reads(&mut model, ask(Op::Write, 0, 1024, 1).bytes()).is_err());
        reads(&mut model, fua.bytes()).unwrap();
    }

    #[test]
    fn a_discard_leaves_what_was_there_or_zeros_and_a_void_holds_nothing_else() {
        let mut model = Model::new(1024, &[]);
        written(&mut model, 1);
        model.batch(&[ask(Op::Discard, 0, 1024, 0)], &[ok()]).unwrap();
        reads(&mut model, vec![0; 1024]).unwrap();
        reads(&mut model, ask(Op::Write, 0, 1024, 1).bytes()).unwrap();
        let mut model = Model::new(1024, &[(0, 1024)]);
        written(&mut model, 1);
        reads(&mut model, vec![0; 1024]).unwrap();
        assert!(reads(&mut model, ask(Op::Write, 0, 1024, 1).bytes()).is_err());
    }
}
