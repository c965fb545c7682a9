//! Answers for a disk of bytes that holds to its limits and may lose what was not flushed.

use devsplice_core::{Errno, Limits, Op};
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{Splice, To};

use super::{Bad, Fault, World};
use crate::rng::Rng;

/// A change of a disk that may be lost with power.
pub(super) struct Change {
    pub(super) at: usize,
    pub(super) bytes: Vec<u8>,
    pub(super) durable: bool,
}

/// A disk of bytes. With limits of its own it refuses what it does not offer; with a cache that can
/// lose power, what was written lasts only once it was flushed.
pub struct Disk {
    /// Bytes.
    pub size: u64,
    /// What a read sees; empty for a disk too large to be held.
    pub bytes: Vec<u8>,
    /// What it offers, where that is to be held to.
    pub(super) limits: Option<Limits>,
    /// What survives a power cut, and what was done since; only of a disk with limits.
    pub(super) durable: Vec<u8>,
    pub(super) changes: Vec<Change>,
    /// What flushes of it fail with, and how many do.
    pub bad_flush: Option<(Errno, u32)>,
}

impl Disk {
    /// From now on it may not be written.
    pub fn lock(&mut self) {
        if let Some(limits) = &mut self.limits {
            limits.read_only = true;
        }
    }

    /// Whether a flush that begins now succeeds.
    pub(super) fn may_flush(&mut self) -> Result<(), Errno> {
        match &mut self.bad_flush {
            Some((errno, times)) if *times > 0 => {
                *times -= 1;
                Err(*errno)
            }
            _ => Ok(()),
        }
    }

    /// What was done on `at..at + len`; bytes that are lost with power until a flush.
    pub(super) fn changed(&mut self, at: usize, len: usize, fua: bool) {
        let Some(limits) = &self.limits else { return };
        let durable = fua || !limits.volatile_cache;
        self.changes.push(Change { at, bytes: self.bytes[at..at + len].to_vec(), durable });
    }

    /// The power goes: what had to last is left, and of the rest what chance has it.
    pub(super) fn cut(&mut self, rng: &mut Rng) {
        let survives = rng.below(2) * 50;
        for change in self.changes.drain(..) {
            if change.durable || rng.percent(survives) {
                let end = change.at + change.bytes.len();
                self.durable[change.at..end].copy_from_slice(&change.bytes);
            }
        }
        self.bytes.clone_from(&self.durable);
    }
}

/// What a disk has against a splice.
fn against(disk: &Disk, splice: &Splice<'_>, whole: bool) -> Option<&'static str> {
    let limits = disk.limits.as_ref()?;
    let block = u64::from(limits.block) - 1;
    match splice.op {
        // What follows a short transfer begins where that one ended.
        _ if whole && (splice.at | splice.len) & block != 0 => Some("off the blocks of"),
        _ if splice.op.changes() && limits.read_only => Some("a change of read-only"),
        Op::Discard if limits.discard == 0 => Some("a discard, which is not offered by"),
        Op::WriteZeroes { .. } if !limits.write_zeroes => {
            Some("a write-zeroes, which is not offered by")
        }
        Op::Write if splice.fua && !limits.fua => Some("force unit access, not offered by"),
        _ => None,
    }
}

/// What every splice must hold to.
pub(super) fn check(splice: &Splice<'_>, world: &World) {
    match splice.to {
        To::File(file) => {
            let disk = &world.disks[usize::from(file.0)];
            let fits = splice.at.checked_add(splice.len).is_some_and(|end| end <= disk.size);
            assert!(fits, "behind the end: {splice:?}");
            let is_short = |bad: &Bad| matches!(bad.fault, Fault::Short(_));
            let whole = world.faults.short == 0 && !world.faults.bad.iter().any(is_short);
            if let Some(what) = against(disk, splice, whole) {
                panic!("{what} the device below with {:?}: {splice:?}", disk.limits);
            }
        }
        To::Zero => assert_eq!(splice.op, Op::Read, "only reads need zeros"),
    }
    if !splice.op.has_pages() {
        assert!(splice.parts.is_empty(), "{splice:?}");
        assert_eq!(splice.len == 0, splice.op == Op::Flush, "{splice:?}");
        return;
    }
    assert!((1..=MAX_PARTS).contains(&splice.parts.len()), "{splice:?}");
    assert!(splice.parts.iter().all(|part| part.len > 0), "{splice:?}");
    let sum: u64 = splice.parts.iter().map(|part| u64::from(part.len)).sum();
    assert_eq!(sum, splice.len, "{splice:?}");
}
