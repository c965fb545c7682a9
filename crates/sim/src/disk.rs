//! Answers for a disk that lies and dies: a volatile cache over an image that survives.

use devsplice_core::Limits;

use crate::cells::{Cell, ZERO};
use crate::rng::{Rng, index};

/// A sector that was written and may be lost.
#[derive(Clone, Copy)]
struct Version {
    sector: u32,
    /// Which splice wrote it.
    splice: u32,
    value: Cell,
}

/// A disk of cells. What was written is visible at once; what survives is decided by a flush, by a
/// write with force unit access, or by chance when the power goes.
pub(crate) struct Disk {
    pub(crate) limits: Limits,
    /// What a read sees.
    visible: Vec<Cell>,
    /// What survives for certain, unless something newer does.
    durable: Vec<Cell>,
    /// What may survive, oldest first.
    unflushed: Vec<Version>,
    /// For each sector the last pass of `settle` that found its durable version.
    marks: Vec<u32>,
    pass: u32,
    /// Splices that are being worked on.
    pub(crate) busy: u32,
}

impl Disk {
    pub(crate) fn new(limits: Limits) -> Disk {
        let sectors = index(limits.size / 512);
        Disk {
            limits,
            visible: vec![ZERO; sectors],
            durable: vec![ZERO; sectors],
            unflushed: Vec::new(),
            marks: vec![0; sectors],
            pass: 0,
            busy: 0,
        }
    }

    pub(crate) fn visible(&self) -> &[Cell] {
        &self.visible
    }

    pub(crate) fn durable(&self) -> &[Cell] {
        &self.durable
    }

    /// Writes a sector into the cache.
    pub(crate) fn put(&mut self, sector: usize, value: Cell, splice: u32) {
        self.visible[sector] = value;
        // A disk of more than 2 TiB does not fit memory.
        self.unflushed.push(Version { sector: sector as u32, splice, value });
    }

    /// Makes durable what the splices wrote that `settled` names. Of a sector's versions the newest
    /// such one survives; those before it are gone, those behind it may still survive or not.
    pub(crate) fn settle(&mut self, settled: impl Fn(u32) -> bool) {
        self.pass += 1;
        let mut kept = self.unflushed.len();
        for place in (0..self.unflushed.len()).rev() {
            let version = self.unflushed[place];
            let mark = &mut self.marks[version.sector as usize];
            if *mark == self.pass {
                continue;
            }
            if settled(version.splice) {
                *mark = self.pass;
                self.durable[version.sector as usize] = version.value;
                continue;
            }
            kept -= 1;
            self.unflushed[kept] = version;
        }
        self.unflushed.drain(..kept);
    }

    /// The power goes: any subset of what was not made durable survives.
    pub(crate) fn crash(&mut self, rng: &mut Rng) {
        let chance = rng.pick(&[0, 10, 50, 90, 100]);
        for version in self.unflushed.drain(..) {
            if rng.percent(chance) {
                self.durable[version.sector as usize] = version.value;
            }
        }
        self.visible.copy_from_slice(&self.durable);
        self.busy = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_keeps_the_newest_settled_version_and_leaves_newer_ones_to_chance() {
        let mut disk = Disk::new(Limits::ideal(1024));
        for (splice, value) in [(1, 10), (2, 20), (3, 30)] {
            disk.put(0, value, splice);
        }
        disk.put(1, 40, 3);
        disk.settle(|splice| splice == 2);
        assert_eq!((disk.durable()[0], disk.durable()[1], disk.visible()[0]), (20, 0, 30));
        assert_eq!(disk.unflushed.len(), 2);
        disk.settle(|_| true);
        assert_eq!((disk.durable()[0], disk.durable()[1], disk.unflushed.len()), (30, 40, 0));
    }

    #[test]
    fn a_crash_never_brings_back_what_was_overwritten_durably() {
        for seed in 0..100 {
            let mut disk = Disk::new(Limits::ideal(512));
            disk.put(0, 10, 1);
            disk.put(0, 20, 2);
            disk.settle(|splice| splice == 2);
            disk.put(0, 30, 3);
            disk.crash(&mut Rng::new(seed, 0));
            assert!([20, 30].contains(&disk.visible()[0]));
        }
    }
}
