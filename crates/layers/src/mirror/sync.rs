//! Answers for making legs equal: after a crash, for a leg that is added, where a read failed, and
//! on command. Always in a window to which no client writes.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use devsplice_core::live::MOST_BYTES;
use devsplice_core::prelude::*;

use super::state::{State, WINDOW, lock, ports, region};

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;
/// The unit in which a copy goes on around a place that cannot be read. No block is larger.
const GRAIN: u64 = 4096;

impl State {
    /// Makes every unsynced region equal on all legs, then takes legs that were being filled as in
    /// sync.
    pub(crate) async fn sync_all(&self, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        let todo = self.unsynced.load(Ordering::SeqCst);
        if todo > 0 {
            self.tally.to_sync.store(todo * self.region, Ordering::SeqCst);
            self.tally.synced.store(0, Ordering::SeqCst);
            meta.event(format!("copying {todo} regions of {} bytes", self.region));
        }
        for index in 0..self.region_count() {
            if self.state_of(index) == region::UNSYNCED {
                self.sync_region(index, meta).await?;
            }
        }
        if todo > 0 && self.unsynced.load(Ordering::SeqCst) == 0 {
            meta.event("all legs are equal".to_owned());
        }
        if self.sets().rebuilding != 0 && self.unsynced.load(Ordering::SeqCst) == 0 {
            let _sync = self.sync.take().await;
            if self.unsynced.load(Ordering::SeqCst) == 0 {
                self.promote(meta).await?;
            }
        }
        Ok(())
    }

    async fn sync_region(&self, index: u64, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        let (start, end) = (index * self.region, self.size.min((index + 1) * self.region));
        let added = self.added.load(Ordering::SeqCst);
        let mut at = start;
        while at < end {
            let len = WINDOW.min(end - at);
            let begun = meta.now_ns();
            {
                let _sync = self.sync.take().await;
                if self.added.load(Ordering::SeqCst) != added {
                    // A leg came in between; the region's turn comes again.
                    return Ok(());
                }
                self.open_window(at);
                let done = self.in_window(at, len, meta).await;
                at += len;
                if done.is_ok()
                    && at == end
                    && self.turn_region(index, region::UNSYNCED, region::HOT)
                {
                    self.unsynced.fetch_sub(1, Ordering::SeqCst);
                }
                self.shut_window();
                done?;
            }
            self.tally.synced.fetch_add(len, Ordering::SeqCst);
            if let Some(ns) = self.pause(len, meta.now_ns() - begun) {
                meta.sleep(ns).await?;
            }
        }
        Ok(())
    }

    /// How long to wait after `len` bytes that took `ns`, so that the rate is kept.
    fn pause(&self, len: u64, ns: u64) -> Option<u64> {
        let rate = self.rate.load(Ordering::SeqCst);
        let due = len.checked_mul(SECOND)?.checked_div(rate)?;
        due.checked_sub(ns).filter(|ns| *ns > 0)
    }

    async fn in_window(&self, at: u64, len: u64, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        meta.grace().await?;
        let mut done = 0;
        while done < len {
            let step = (MOST_BYTES as u64).min(len - done);
            self.copy_step(Extent { at: at + done, len: step }, meta).await?;
            done += step;
        }
        Ok(())
    }

    /// Copies from the first leg to all others. If anything fails, in small steps, each from the
    /// first leg that can be read.
    async fn copy_step(&self, extent: Extent, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        let sets = self.sets();
        let len = usize::try_from(extent.len).unwrap_or(0);
        let from = sets.primary();
        let to = ports(sets.without(from).written()).collect();
        if meta.copy(from, to, extent.at, len).await.is_ok() {
            return Ok(());
        }
        let mut done = 0;
        while done < extent.len {
            let len = GRAIN.min(extent.len - done);
            let grain = Extent { at: extent.at + done, len };
            self.copy_from_any(grain, meta).await.inspect_err(|errno| {
                meta.event(format!("{len} bytes at {} cannot be read: {errno}", grain.at));
            })?;
            done += len;
        }
        Ok(())
    }

    async fn copy_from_any(&self, extent: Extent, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        let mut last = Errno::EIO;
        let len = usize::try_from(extent.len).unwrap_or(0);
        for from in ports(self.sets().in_sync) {
            let bytes = match meta.read(from, extent.at, len).await {
                Ok(bytes) => bytes,
                Err(errno) => {
                    last = errno;
                    continue;
                }
            };
            for to in ports(self.sets().without(from).written()) {
                if let Err(errno) = meta.write(to, extent.at, bytes.clone(), false).await {
                    self.drop_leg(to, errno, meta).await?;
                }
            }
            return Ok(());
        }
        Err(last)
    }

    /// A read failed on one leg: what another one holds is written over it.
    pub(crate) async fn mend(
        &self,
        extent: Extent,
        port: Port,
        errno: Errno,
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        let sets = self.sets();
        if sets.in_sync >> port.0 & 1 == 0 {
            return Ok(());
        }
        if sets.without(port).in_sync == 0 {
            return Err(errno);
        }
        let again = lock(&self.last_repair).replace((port, extent)) == Some((port, extent));
        if again {
            // It was written anew and still cannot be read.
            return self.drop_leg(port, errno, meta).await;
        }
        let _sync = self.sync.take().await;
        let mut at = extent.at;
        let end = extent.at + extent.len;
        while at < end {
            let len = WINDOW.min(end - at);
            self.open_window(at);
            let mended = self.mend_window(Extent { at, len }, port, errno, meta).await;
            self.shut_window();
            mended?;
            at += len;
        }
        self.tally.repaired.fetch_add(1, Ordering::SeqCst);
        meta.event(format!(
            "{} bytes at {} of port {} were unreadable ({errno}) and are written anew",
            extent.len, extent.at, port.0
        ));
        Ok(())
    }

    async fn mend_window(
        &self,
        extent: Extent,
        port: Port,
        errno: Errno,
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        meta.grace().await?;
        let mut done = 0;
        while done < extent.len {
            let len = (MOST_BYTES as u64).min(extent.len - done);
            let at = extent.at + done;
            let bytes = self.read_other(port, at, len, errno, meta).await?;
            if let Err(errno) = meta.write(port, at, bytes, false).await {
                return self.drop_leg(port, errno, meta).await;
            }
            done += len;
        }
        Ok(())
    }

    async fn read_other(
        &self,
        port: Port,
        at: u64,
        len: u64,
        errno: Errno,
        meta: &Rc<dyn Meta>,
    ) -> Result<Vec<u8>, Errno> {
        for other in ports(self.sets().without(port).in_sync) {
            if let Ok(bytes) = meta.read(other, at, usize::try_from(len).unwrap_or(0)).await {
                return Ok(bytes);
            }
        }
        Err(errno)
    }

    /// Compares the legs everywhere; with `repair`, what differs is written anew from the first.
    pub(crate) async fn check(
        &self,
        repair: bool,
        meta: &Rc<dyn Meta>,
    ) -> Result<Result<String, String>, Errno> {
        if self.sets().in_sync.count_ones() < 2 {
            return Ok(Err("fewer than two legs are in sync: nothing to compare".to_owned()));
        }
        // What is known to differ needs no check.
        loop {
            let moved = self.moved.wait();
            if self.unsynced.load(Ordering::SeqCst) == 0 {
                break;
            }
            moved.await;
        }
        self.tally.checked.store(0, Ordering::SeqCst);
        self.tally.mismatched.store(0, Ordering::SeqCst);
        let mut at = 0;
        while at < self.size {
            let len = WINDOW.min(self.size - at);
            let begun = meta.now_ns();
            {
                let _sync = self.sync.take().await;
                self.open_window(at);
                let checked = self.check_window(Extent { at, len }, repair, meta).await;
                self.shut_window();
                checked?;
            }
            self.tally.checked.fetch_add(len, Ordering::SeqCst);
            at += len;
            if let Some(ns) = self.pause(len, meta.now_ns() - begun) {
                meta.sleep(ns).await?;
            }
        }
        let differ = self.tally.mismatched.load(Ordering::SeqCst);
        let what = if repair { "repaired" } else { "found" };
        Ok(Ok(format!("{} bytes checked, {differ} differing blocks {what}", self.size)))
    }

    async fn check_window(
        &self,
        extent: Extent,
        repair: bool,
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        meta.grace().await?;
        let mut done = 0;
        while done < extent.len {
            let step = (MOST_BYTES as u64).min(extent.len - done);
            let at = extent.at + done;
            let len = usize::try_from(step).unwrap_or(0);
            let mut legs = ports(self.sets().in_sync);
            let Some(first) = legs.next() else { return Err(Errno::EIO) };
            let truth = meta.read(first, at, len).await?;
            let mut differs = 0;
            for port in legs {
                let other = meta.read(port, at, len).await?;
                let grain = GRAIN as usize;
                let pairs = truth.chunks(grain).zip(other.chunks(grain));
                differs += pairs.filter(|(a, b)| a != b).count() as u64;
            }
            if differs > 0 {
                self.tally.mismatched.fetch_add(differs, Ordering::SeqCst);
                meta.event(format!("legs differ in {differs} blocks from {at} on"));
                if repair {
                    self.copy_step(Extent { at, len: step }, meta).await?;
                    self.tally.repaired.fetch_add(differs, Ordering::SeqCst);
                }
            }
            done += step;
        }
        Ok(())
    }

    /// A change of this extent has failed for good, on some legs or on all: they are made equal
    /// again.
    pub(crate) async fn doubt(&self, extent: Extent, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        if self.sets().written().count_ones() < 2 {
            return Ok(());
        }
        self.mark(self.regions_of(extent), meta).await?;
        for index in self.regions_of(extent) {
            loop {
                let moved = self.moved.wait();
                let state = self.state_of(index);
                if state == region::BUSY {
                    moved.await;
                    continue;
                }
                if state == region::UNSYNCED {
                    break;
                }
                if self.turn_region(index, state, region::UNSYNCED) {
                    self.unsynced.fetch_add(1, Ordering::SeqCst);
                    break;
                }
            }
        }
        self.work.ring();
        Ok(())
    }

    /// Every dirty region counts as unsynced: a leg comes that lacks them.
    pub(crate) fn unsync(&self) {
        for index in 0..self.region_count() {
            let is_marked = lock(&self.log).is_marked(index);
            let state = self.state_of(index);
            if is_marked
                && state != region::UNSYNCED
                && self.turn_region(index, state, region::UNSYNCED)
            {
                self.unsynced.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}
