//! Answers for the watchdog: it ticks while requests are in flight, names those that are stuck, and
//! tells when there have been none for a while.

use devsplice_core::Io;

/// Nanoseconds between ticks.
pub(crate) const TICK_NS: u64 = 1_000_000_000;
/// The timer key that is never a flight's.
pub(crate) const TICK_KEY: u32 = u32::MAX;

/// A request that has been below for too long.
#[derive(Clone, Copy, Debug)]
pub struct Stuck {
    /// The export's lane on its I/O thread.
    pub lane: u16,
    /// The request's tag.
    pub tag: u16,
    /// What it asks for.
    pub io: Io,
    /// Splices that have not come back.
    pub flying: u32,
    /// Seconds since it was fetched, to within one.
    pub seconds: u32,
}

/// Who is told about a stuck request. Called on the I/O thread, so it must not block on the device.
pub type OnStuck = Box<dyn Fn(&Stuck) + Send>;

/// The state of the watchdog of one I/O thread.
pub(crate) struct Watch {
    pub(crate) tick: u32,
    pub(crate) armed: bool,
    /// A tick has come in this turn.
    pub(crate) ticked: bool,
    /// Requests that had been finished at the last tick.
    pub(crate) finished: u64,
    /// Seconds after which a request is reported; again each time as many have passed.
    pub(crate) limit: u32,
    pub(crate) on_stuck: OnStuck,
}

impl Watch {
    /// Whether a request that started at tick `since` is to be reported now.
    pub(crate) fn is_due(&self, since: u32) -> bool {
        let age = self.tick.wrapping_sub(since);
        self.limit != 0 && age != 0 && age.is_multiple_of(self.limit)
    }
}
