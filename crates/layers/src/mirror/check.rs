//! Answers for comparing the legs on command, and for waiting until there is something to compare.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use devsplice_core::live::MOST_BYTES;
use devsplice_core::prelude::*;

use super::state::{State, WINDOW, ports};
use super::sync::{GRAIN, steps};

/// How often whoever waits for a copy looks how far it is.
const LOOK_NS: u64 = 20_000_000;
/// How long a copy may stand still beyond what its rate asks for.
const PATIENCE_NS: u64 = 60_000_000_000;
/// Rounds that fail one after another while somebody waits before they wait no longer.
const MOST_ROUNDS: u64 = 3;

impl State {
    /// Waits until nothing is left to copy: what is known to differ needs no check. Ends with a
    /// reason when the copy gets no further.
    async fn copied(&self, meta: &Rc<dyn Meta>) -> Result<Result<(), String>, Errno> {
        let progress = || {
            let numbers = [&self.unsynced, &self.tally.synced, &self.failed_rounds, &self.added];
            (numbers.map(|number| number.load(Ordering::SeqCst)), self.sets())
        };
        let (mut seen, mut since) = (progress(), meta.now_ns());
        let mut before = self.failed_rounds.load(Ordering::SeqCst);
        loop {
            let unsynced = self.unsynced.load(Ordering::SeqCst);
            if self.is_read_only() || (unsynced == 0 && self.sets().rebuilding == 0) {
                return Ok(Ok(()));
            }
            let failed = self.failed_rounds.load(Ordering::SeqCst);
            before = before.min(failed);
            if failed >= before + MOST_ROUNDS {
                return Ok(Err("the legs cannot be made equal, see the events".to_owned()));
            }
            if progress() != seen {
                (seen, since) = (progress(), meta.now_ns());
            }
            let patience = PATIENCE_NS.saturating_add(self.due(WINDOW));
            if meta.now_ns() - since > patience {
                let reason = "making the legs equal has come to a halt, see the events";
                return Ok(Err(reason.to_owned()));
            }
            meta.sleep(LOOK_NS).await?;
        }
    }

    /// Compares the legs everywhere, when all of them have everything; with `repair`, what differs
    /// is written anew from the first.
    pub(crate) async fn check(
        &self,
        repair: bool,
        meta: &Rc<dyn Meta>,
    ) -> Result<Result<String, String>, Errno> {
        if let Err(reason) = self.copied(meta).await? {
            return Ok(Err(reason));
        }
        if self.sets().in_sync.count_ones() < 2 {
            return Ok(Err("fewer than two legs are in sync: nothing to compare".to_owned()));
        }
        self.tally.checked.store(0, Ordering::SeqCst);
        self.tally.mismatched.store(0, Ordering::SeqCst);
        for step in steps(Extent { at: 0, len: self.size }, WINDOW) {
            let begun = meta.now_ns();
            {
                let _sync = self.sync.take().await;
                self.open_window(step.at);
                let checked = self.check_window(step, repair, meta).await;
                self.shut_window();
                checked?;
            }
            self.tally.checked.fetch_add(step.len, Ordering::SeqCst);
            self.keep_rate(step.len, begun, meta).await?;
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
        for step in steps(extent, MOST_BYTES as u64) {
            let at = step.at;
            let len = usize::try_from(step.len).unwrap_or(0);
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
                    self.copy_step(step, meta).await?;
                    self.tally.repaired.fetch_add(differs, Ordering::SeqCst);
                }
            }
        }
        Ok(())
    }
}
