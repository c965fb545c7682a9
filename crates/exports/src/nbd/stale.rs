//! Answers for changes that are still under way below when their connection has ended. A client
//! that has lost a connection asks for them again over the next one; an old one that lands after
//! the new ones were answered would take them back. So what changes the same bytes waits.
//!
//! Only that waits: a device below that never gives one request back keeps nobody from the rest of
//! the disk. Reads and flushes need not: what waits has no answer, so nobody relies on it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use devsplice_core::Extent;

/// One of them: whose it was, and what it changes.
#[derive(Clone, Copy, Debug)]
struct Change {
    desk: usize,
    tag: u16,
    extent: Extent,
}

#[derive(Default)]
struct State {
    /// At most as many as there are tags.
    changes: Vec<Change>,
    /// Desks where something waits for one of them.
    waiting: Vec<usize>,
}

/// Those of an export.
#[derive(Default)]
pub(super) struct Stale {
    /// How many there are; read for each change, where the lock would cost too much.
    count: AtomicUsize,
    state: Mutex<State>,
}

impl Stale {
    /// A change is under way whose connection has ended.
    pub(super) fn add(&self, desk: usize, tag: u16, extent: Extent) {
        let mut state = self.lock();
        state.changes.push(Change { desk, tag, extent });
        self.count.store(state.changes.len(), Ordering::Release);
    }

    /// It is over. Those desks are told to `wake` that may go on.
    pub(super) fn remove(&self, desk: usize, tag: u16, wake: impl FnMut(usize)) {
        let mut state = self.lock();
        state.changes.retain(|change| (change.desk, change.tag) != (desk, tag));
        self.count.store(state.changes.len(), Ordering::Release);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(wake);
    }

    /// Whether a change of `extent` has to wait; then `desk` is woken when that may be over.
    #[inline]
    pub(super) fn keeps(&self, desk: usize, extent: Extent) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.meets(desk, extent)
    }

    #[cold]
    fn meets(&self, desk: usize, extent: Extent) -> bool {
        let mut state = self.lock();
        // The end of the disk fits 64 bits, and nobody asks for what is beyond.
        let end = |extent: Extent| extent.end().unwrap_or(u64::MAX);
        let meets = state
            .changes
            .iter()
            .any(|Change { extent: old, .. }| old.at < end(extent) && extent.at < end(*old));
        if meets && !state.waiting.contains(&desk) {
            state.waiting.push(desk);
        }
        meets
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the process.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_the_same_bytes_waits_and_until_the_last_is_over() {
        let stale = Stale::default();
        let extent = |at, len| Extent { at, len };
        assert!(!stale.keeps(1, extent(0, u64::MAX)));
        stale.add(0, 7, extent(4096, 4096));
        stale.add(0, 8, extent(6144, 512));
        let keeps = |at, len| stale.keeps(1, extent(at, len));
        assert!(!keeps(0, 4096) && !keeps(8192, 512));
        assert!(keeps(0, 4608) && keeps(7680, 4096) && keeps(4096, 512) && keeps(0, 1 << 20));
        assert!(stale.keeps(3, extent(6144, 512)));
        let mut woken = Vec::new();
        stale.remove(0, 7, |desk| woken.push(desk));
        assert_eq!(woken, [1, 3]);
        assert!(!stale.keeps(1, extent(4096, 512)) && stale.keeps(3, extent(6144, 512)));
        stale.remove(0, 8, |desk| woken.push(desk));
        assert_eq!(woken, [1, 3, 3]);
        assert!(!stale.keeps(3, extent(6144, 512)));
    }
}
