//! Answers for what the ring without a kernel links behind splices, as io_uring does.

use devsplice_core::{Errno, Result};
use devsplice_engine::{Completion, Event, Ring, Splice};

use super::{Due, FakeRing, What, World};

/// What is linked behind splices.
#[derive(Default)]
pub struct Linked {
    /// Whether it can be done at all.
    pub can: bool,
    /// How often it was done.
    pub count: u64,
    /// A splice that was started and has nothing behind it yet.
    first: Option<u32>,
    /// What is behind splices that are out: their keys, a lane, an index.
    behind: Vec<(u32, u16, u32)>,
}

impl Linked {
    /// The kernel would link whatever comes next.
    pub(super) fn is_nothing_between(&self) {
        assert!(self.first.is_none(), "something else is linked behind splice {:?}", self.first);
    }
}

impl World {
    /// A splice is over: what is linked behind it follows, or never will.
    pub(super) fn follow(&mut self, key: u32, is_whole: bool) {
        let of_key = |(first, ..): &(u32, u16, u32)| *first == key;
        let Some(place) = self.ahead.behind.iter().position(of_key) else { return };
        let (_, lane, index) = self.ahead.behind.swap_remove(place);
        if is_whole {
            let at = self.now + self.rng.below(50_000);
            return self.due.push(Due { at, what: What::Fetch(lane, index) });
        }
        let completion = Completion { index, result: -Errno::ECANCELED.raw(), flags: 0 };
        self.ready.push_back(Event::Export { lane, completion });
    }
}

impl FakeRing {
    /// As `splice`, with what is given to [`FakeRing::behind`] next linked to it.
    pub(super) fn link(&mut self, key: u32, splice: &Splice<'_>) -> bool {
        if !self.lock().ahead.can {
            return false;
        }
        self.splice(key, splice);
        let ahead = &mut self.lock().ahead;
        ahead.first = Some(key);
        ahead.count += 1;
        true
    }

    /// As [`FakeRing::fetch`], behind the splice that was started last.
    ///
    /// # Panics
    /// If that was not started to have something behind it.
    pub fn behind(&self, lane: u16, index: u32) {
        let ahead = &mut self.lock().ahead;
        let Some(key) = ahead.first.take() else { panic!("no splice waits for what is behind it") };
        ahead.behind.push((key, lane, index));
    }

    /// Waits until two events are there, unless one is there already.
    pub(super) fn wait_for_two(&mut self) -> Result<()> {
        if !self.lock().ready.is_empty() {
            return self.enter(false);
        }
        self.enter(true)?;
        let world = &mut *self.lock();
        while world.ready.len() < 2 && !world.asleep {
            match world.due.iter().map(|due| due.at).min() {
                Some(first) if first < u64::MAX => {
                    world.now = world.now.max(first);
                    world.collect();
                }
                _ => {
                    assert!(world.may_sleep, "the worker waits for two and there will be one");
                    world.asleep = true;
                }
            }
        }
        Ok(())
    }
}
