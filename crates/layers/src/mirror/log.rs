//! Answers for the log on disk: a region's bit is there before the first write to it goes, and is
//! taken back when the legs are known to be equal.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use devsplice_core::prelude::*;

use super::format::{Bits, LOG_AT};
use super::state::{State, lock, ports, region};

/// Regions that are cleaned in one go.
const MOST_CLEANED: usize = 4096;
/// How many times as long as marking took all regions stay dirty after it.
const STAY: u64 = 8;

/// The log as it should be on disk, and how far that is so.
pub(crate) struct Log {
    bits: Bits,
    /// Blocks that differ from what is on disk.
    changed: Vec<usize>,
    /// Regions whose bit is not on disk yet.
    waiting: Vec<u64>,
    /// Counts changes; those up to `written` are on disk.
    asked: u64,
    written: u64,
}

impl Log {
    pub(crate) fn new(bits: Bits) -> Log {
        Log { bits, changed: Vec::new(), waiting: Vec::new(), asked: 0, written: 0 }
    }

    /// Whether the bit of a region is, or is about to be, on disk.
    pub(crate) fn is_marked(&self, index: u64) -> bool {
        self.bits.get(index)
    }

    fn change(&mut self, index: u64, value: bool) {
        self.bits.set(index, value);
        let block = Bits::block_of(index);
        if !self.changed.contains(&block) {
            self.changed.push(block);
        }
    }

    /// The blocks to write for all who wait, the regions whose bits are in them then, and up to
    /// which change that is. Bits of regions that are clean still are set anew. For whoever has the
    /// turn: nobody else takes bits back, so those that are set stay until it is handed on. One of
    /// a region that is not clean yet may have been taken back just now; it is asked for again.
    fn take_waiting(&mut self, is_clean: impl Fn(u64) -> bool) -> (Vec<usize>, Vec<u64>, u64) {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting
            .iter()
            .filter(|index| is_clean(**index))
            .for_each(|index| self.change(*index, true));
        waiting.retain(|index| self.bits.get(*index));
        (std::mem::take(&mut self.changed), waiting, self.asked)
    }
}

/// Somebody marks regions, as long as it is there.
struct Marking<'a>(&'a State);

impl Drop for Marking<'_> {
    fn drop(&mut self) {
        self.0.marking.fetch_sub(1, Ordering::SeqCst);
    }
}

impl State {
    /// Marks what a write that waits needs. It has to find all of that dirty when it asks again, so
    /// nothing is cleaned meanwhile, nor for some time: what one mirror's marking takes, another
    /// one's may take that the same write goes to. A region that stays dirty costs nothing now.
    pub(crate) async fn mark_for(&self, extent: Extent, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        self.marking.fetch_add(1, Ordering::SeqCst);
        let _marking = Marking(self);
        let begin = meta.now_ns();
        self.mark(self.regions_of(extent), meta).await?;
        let now = meta.now_ns();
        let until = now.saturating_add(now.saturating_sub(begin).saturating_mul(STAY));
        self.dirty_until.fetch_max(until, Ordering::SeqCst);
        Ok(())
    }

    /// Whether nothing may be cleaned now, for the sake of writes that wait.
    pub(crate) fn is_held(&self, now: u64) -> bool {
        self.marking.load(Ordering::SeqCst) > 0 || now < self.dirty_until.load(Ordering::SeqCst)
    }

    /// Puts the bits of the clean regions among these on disk; then writes to them may go.
    pub(crate) async fn mark(
        &self,
        indices: impl Iterator<Item = u64>,
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        let mine = {
            let mut log = lock(&self.log);
            for index in indices {
                if self.state_of(index) == region::CLEAN {
                    log.change(index, true);
                    log.waiting.push(index);
                }
            }
            log.asked += 1;
            log.asked
        };
        // Whoever has the turn writes for all that came meanwhile.
        let _turn = self.log_turn.take().await;
        if lock(&self.log).written >= mine {
            return Ok(());
        }
        let (blocks, waiting, asked) = lock(&self.log).take_waiting(|index| {
            // No write relies on its bit, so whoever cleans may have written that and not for good,
            // or taken it back. The bit is written here, whatever became of it.
            self.state_of(index) == region::CLEAN
        });
        if let Err(errno) = self.write_blocks(&blocks, true, meta).await {
            lock(&self.log).waiting.extend(waiting);
            return Err(errno);
        }
        for index in waiting {
            self.turn_region(index, region::CLEAN, region::HOT);
        }
        lock(&self.log).written = asked;
        self.work.ring();
        Ok(())
    }

    /// Writes blocks of the log, which were taken out of the changed ones, to every leg that is
    /// written. A bit that changes meanwhile makes its block changed again.
    async fn write_blocks(
        &self,
        blocks: &[usize],
        durable: bool,
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        for (done, block) in blocks.iter().enumerate() {
            let bytes = lock(&self.log).bits.encode(*block);
            let at = LOG_AT + (*block * bytes.len()) as u64;
            if let Err(errno) = self.write_legs(at, &bytes, durable, meta).await {
                lock(&self.log).changed.extend(&blocks[done..]);
                return Err(errno);
            }
        }
        Ok(())
    }

    /// Writes metadata to every leg that is written; one that fails is dropped.
    async fn write_legs(
        &self,
        at: u64,
        bytes: &[u8],
        durable: bool,
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        for port in ports(self.sets().written()) {
            let place = self.meta_at[usize::from(port.0)] + at;
            if let Err(errno) = meta.write(port, place, bytes.to_vec(), durable).await {
                self.drop_leg(port, errno, meta).await?;
            }
        }
        Ok(())
    }

    /// Makes everything that was written to the legs durable; one that fails is dropped.
    pub(crate) async fn flush_legs(&self, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        for port in ports(self.sets().written()) {
            if let Err(errno) = meta.flush(port).await {
                self.drop_leg(port, errno, meta).await?;
            }
        }
        Ok(())
    }

    /// Takes back the bits of regions that were not written lately; whether any are still dirty.
    pub(crate) async fn clean(&self, all: bool, meta: &Rc<dyn Meta>) -> Result<bool, Errno> {
        let mut left = false;
        let mut busy = Vec::new();
        for index in 0..self.region_count() {
            if all {
                self.turn_region(index, region::HOT, region::DIRTY);
            }
            if busy.len() < MOST_CLEANED && self.turn_region(index, region::DIRTY, region::BUSY) {
                busy.push(index);
                continue;
            }
            left |= self.turn_region(index, region::HOT, region::DIRTY)
                || self.state_of(index) == region::DIRTY;
        }
        if busy.is_empty() {
            return Ok(left);
        }
        let equal = self.are_equal(&busy, meta).await;
        for index in &busy {
            let to = if equal.is_ok() { region::CLEAN } else { region::DIRTY };
            self.turn_region(*index, region::BUSY, to);
        }
        self.moved.ring();
        equal.map(|()| left)
    }

    /// Makes sure that the legs are equal in these regions, also on their media, and takes back
    /// the regions' bits. Once the legs are known to be equal a failure to write the log changes
    /// nothing: a bit too many costs a copy, and the next write asks for the bit again.
    async fn are_equal(&self, busy: &[u64], meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        meta.grace().await?;
        self.flush_legs(meta).await?;
        // A leg tells of what it has lost once: if it told a request, that one has been heard now.
        meta.grace().await?;
        let _turn = self.log_turn.take().await;
        // A leg that is missing, or that this flush has cost, lacks what these regions got; so may
        // one that has failed a write of which we are still to be told.
        if self.is_degraded() || meta.is_unsettled() {
            return Err(Errno::EAGAIN);
        }
        let blocks = {
            let mut log = lock(&self.log);
            // One that is not busy any more was found to differ: a leg came that lacks it.
            let equal = busy.iter().filter(|index| self.state_of(**index) == region::BUSY);
            equal.for_each(|index| log.change(*index, false));
            std::mem::take(&mut log.changed)
        };
        // A leg that fails here is dropped; without any left, the next write finds out.
        let _ = self.write_blocks(&blocks, false, meta).await;
        Ok(())
    }

    /// Writes the whole log to every leg that is written.
    pub(crate) async fn write_all(&self, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        let blocks: Vec<_> = (0..=Bits::block_of(self.region_count() - 1)).collect();
        self.write_blocks(&blocks, true, meta).await
    }

    /// Sets every bit, for a leg that lacks everything.
    pub(crate) async fn mark_all(&self, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        let blocks = {
            let mut log = lock(&self.log);
            (0..self.region_count()).for_each(|index| log.change(index, true));
            std::mem::take(&mut log.changed)
        };
        self.write_blocks(&blocks, true, meta).await
    }

    /// Writes the whole log to a leg that is about to be written, too.
    pub(crate) async fn copy_log(&self, port: Port, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        for block in 0..=Bits::block_of(self.region_count() - 1) {
            let bytes = lock(&self.log).bits.encode(block);
            let at = self.meta_at[usize::from(port.0)] + LOG_AT + (block * bytes.len()) as u64;
            meta.write(port, at, bytes, true).await?;
        }
        Ok(())
    }
}
