//! Answers for making legs equal: after a crash, for a leg that is added, where a read failed.
//! Always in a window to which no client writes.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use devsplice_core::live::MOST_BYTES;
use devsplice_core::prelude::*;

use super::state::{State, WINDOW, lock, ports, region};

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;
/// The unit in which a copy goes on around a place that cannot be read. No block is larger.
pub(super) const GRAIN: u64 = 4096;

/// An extent from its start to its end, in steps of up to `most` bytes.
pub(super) fn steps(extent: Extent, most: u64) -> impl Iterator<Item = Extent> {
    let end = extent.at + extent.len;
    let starts = (extent.at..end).step_by(usize::try_from(most).unwrap_or(usize::MAX));
    starts.map(move |at| Extent { at, len: most.min(end - at) })
}

impl State {
    /// Makes every unsynced region equal on all legs, then takes legs that were being filled as in
    /// sync.
    pub(crate) async fn sync_all(&self, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        let todo = self.unsynced.load(Ordering::SeqCst);
        if todo > 0 {
            self.tally.to_sync.store(todo * self.region, Ordering::SeqCst);
            self.tally.synced.store(0, Ordering::SeqCst);
            // A round that only tries once more is no news.
            if self.failed_rounds.load(Ordering::SeqCst) == 0 {
                meta.event(format!("copying {todo} regions of {} bytes", self.region));
            }
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
        for step in steps(Extent { at: start, len: end - start }, WINDOW) {
            let begun = meta.now_ns();
            {
                let _sync = self.sync.take().await;
                if self.added.load(Ordering::SeqCst) != added {
                    // A leg came in between; the region's turn comes again.
                    return Ok(());
                }
                self.open_window(step.at);
                let done = self.in_window(step, meta).await;
                if done.is_ok()
                    && step.at + step.len == end
                    && self.turn_region(index, region::UNSYNCED, region::HOT)
                {
                    self.unsynced.fetch_sub(1, Ordering::SeqCst);
                    self.failed_rounds.store(0, Ordering::SeqCst);
                }
                self.shut_window();
                done?;
            }
            self.tally.synced.fetch_add(step.len, Ordering::SeqCst);
            self.keep_rate(step.len, begun, meta).await?;
        }
        Ok(())
    }

    /// How long `len` bytes take at least, at the rate that is set now.
    pub(super) fn due(&self, len: u64) -> u64 {
        let rate = self.rate.load(Ordering::SeqCst);
        len.saturating_mul(SECOND).checked_div(rate).unwrap_or(0)
    }

    /// Waits until `len` bytes may have been moved since `begun`. The rate may change meanwhile, so
    /// it is looked at again and again.
    pub(super) async fn keep_rate(
        &self,
        len: u64,
        begun: u64,
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        while meta.is_ending() {
            meta.sleep(SECOND).await?;
        }
        while let Some(ns) = self.due(len).checked_sub(meta.now_ns() - begun).filter(|ns| *ns > 0) {
            meta.sleep(ns.min(SECOND)).await?;
        }
        Ok(())
    }

    async fn in_window(&self, extent: Extent, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        meta.grace().await?;
        for step in steps(extent, MOST_BYTES as u64) {
            self.copy_step(step, meta).await?;
        }
        Ok(())
    }

    /// Copies from the first leg to all others. If anything fails, in small steps, each from the
    /// first leg that can be read.
    pub(super) async fn copy_step(&self, extent: Extent, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        let sets = self.sets();
        let len = usize::try_from(extent.len).unwrap_or(0);
        let from = sets.primary();
        let to = ports(sets.without(from).written()).collect();
        let copied = match meta.copy(from, to, extent.at, len).await {
            Ok(()) => Ok(()),
            Err(_) => self.copy_grains(extent, meta).await,
        };
        if copied.is_ok() {
            let mut last = lock(&self.unreadable);
            *last = last.filter(|(at, _)| !(extent.at..extent.at + extent.len).contains(at));
        }
        copied
    }

    async fn copy_grains(&self, extent: Extent, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        for grain in steps(extent, GRAIN) {
            let Err(errno) = self.copy_from_any(grain, meta).await else { continue };
            // It is tried again every second; people are told once.
            if lock(&self.unreadable).replace((grain.at, errno)) != Some((grain.at, errno)) {
                let Extent { at, len } = grain;
                meta.event(format!("{len} bytes at {at} cannot be copied: {errno}"));
            }
            return Err(errno);
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
        for step in steps(extent, WINDOW) {
            self.open_window(step.at);
            let mended = self.mend_window(step, port, errno, meta).await;
            self.shut_window();
            mended?;
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
        for Extent { at, len } in steps(extent, MOST_BYTES as u64) {
            let bytes = self.read_other(port, at, len, errno, meta).await?;
            if let Err(errno) = meta.write(port, at, bytes, false).await {
                return self.drop_leg(port, errno, meta).await;
            }
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

    /// Every dirty region counts as unsynced: a leg comes that lacks them. `all` do where all bits
    /// are on disk; else a clean region's may be on its way there, and no write may go yet.
    pub(crate) fn unsync(&self, all: bool) {
        for index in 0..self.region_count() {
            loop {
                let is_marked = lock(&self.log).is_marked(index);
                let state = self.state_of(index);
                let is_dirty = is_marked && (all || state != region::CLEAN);
                if !is_dirty || state == region::UNSYNCED {
                    break;
                }
                if self.turn_region(index, state, region::UNSYNCED) {
                    self.unsynced.fetch_add(1, Ordering::SeqCst);
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_cover_an_extent_once_and_in_order() {
        let extent = |at, len| Extent { at, len };
        let all = |from, most| steps(from, most).collect::<Vec<_>>();
        assert_eq!(all(extent(10, 7), 3), [extent(10, 3), extent(13, 3), extent(16, 1)]);
        assert_eq!(all(extent(10, 6), 3), [extent(10, 3), extent(13, 3)]);
        assert_eq!(all(extent(10, 1), 3), [extent(10, 1)]);
        assert_eq!(all(extent(10, 0), 3), []);
        let end = u64::MAX - 1;
        assert_eq!(all(extent(end - 4096, 4096), 4096), [extent(end - 4096, 4096)]);
    }
}
