//! Answers for a ring that stays awake for a moment before it sleeps, where what comes next has
//! mostly come within that.
//!
//! To sleep and to be woken costs this thread and whoever wakes it several microseconds each, more
//! on a virtual machine, where an idle CPU is left to others. A client that sends a request when it
//! has the reply to the last one pays that every time. While the thread is awake nobody has to wake
//! it.
//!
//! Who waits awake keeps others from the CPU, perhaps those that it waits for. So it is only done
//! while there is a CPU for each (which is not known here), and where it was in vain it is not
//! tried again for twice as many waits as the time before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devsplice_core::Result;

use super::Uring;

/// How long it stays awake. What sleeping and waking costs both sides is of the same order.
const AWAKE: Duration = Duration::from_micros(50);
/// Waits that are slept through after one that was awake in vain: this power of two at most.
const MOST_DOUBLED: u8 = 8;

/// What is known of the last waits.
#[derive(Debug)]
pub(super) struct Linger {
    /// There are CPUs to spare.
    allowed: Arc<AtomicBool>,
    /// How often in a row it was in vain.
    failures: u8,
    /// Waits to sleep through.
    asleep: u16,
}

impl Linger {
    /// Whether there is a CPU for each who would run.
    pub(super) fn is_allowed(&self) -> bool {
        self.allowed.load(Ordering::Relaxed)
    }

    /// Whether to stay awake this time.
    fn begins(&mut self) -> bool {
        if !self.is_allowed() {
            return false;
        }
        let begins = self.asleep == 0;
        self.asleep = self.asleep.saturating_sub(1);
        begins
    }

    /// What came of it. Who was kept from the CPU finds something when it runs again: that it has
    /// taken too long says that CPUs are short, whatever is there by then.
    fn ends(&mut self, took: Duration) {
        let in_vain = took >= AWAKE;
        self.failures = if in_vain { (self.failures + 1).min(MOST_DOUBLED) } else { 0 };
        self.asleep = if in_vain { 1 << self.failures } else { 0 };
    }
}

impl Uring {
    /// From now on the thread stays awake for a moment before it sleeps, while that is `allowed`.
    /// Nothing changes for a ring that shares its thread.
    pub fn linger(&mut self, allowed: Arc<AtomicBool>) {
        if self.brief.is_none() {
            self.linger = Some(Linger { allowed, failures: 0, asleep: 0 });
        }
    }

    /// As `enter_once`, staying awake first until there is something or that takes long.
    #[inline(never)]
    pub(super) fn enter_awake(&mut self, want: u32) -> Result<()> {
        if want == 0 || !self.linger.as_mut().is_some_and(Linger::begins) {
            return self.enter_once(want);
        }
        self.enter_once(0)?;
        let begin = Instant::now();
        while !self.queues.has_completions() && begin.elapsed() < AWAKE {
            // Completions are put together in there.
            self.enter_once(0)?;
        }
        let took = begin.elapsed();
        let has_some = self.queues.has_completions();
        if let Some(linger) = &mut self.linger {
            linger.ends(took);
        }
        if has_some { Ok(()) } else { self.enter_once(want) }
    }
}

#[cfg(test)]
mod tests {
    use devsplice_engine::{Event, Ring};

    use super::*;
    use crate::ring::{Config, LaneMemory};

    fn ring(allowed: bool) -> Uring {
        let lane = LaneMemory { depth: 1, bytes: 4096, slots: false, locked: false };
        let config = Config { flights: 2, files: 0, lanes: vec![lane], inner: 0 };
        let mut ring = Uring::new(&config).unwrap();
        ring.linger(Arc::new(AtomicBool::new(allowed)));
        ring
    }

    /// Calls into the kernel until a timer of so many nanoseconds has been heard of.
    fn waits(ring: &mut Uring, ns: u64) -> u64 {
        let before = ring.counts().enters;
        ring.after(0, ns);
        for _ in 0..1000 {
            ring.enter(true).unwrap();
            if let Some(Event::Timer { key: 0 }) = ring.next() {
                return ring.counts().enters - before;
            }
        }
        panic!("a timer is not heard of");
    }

    #[test]
    fn who_waited_awake_in_vain_sleeps_through_the_next_waits() {
        let mut ring = ring(true);
        for failures in 1..=3 {
            assert!(waits(&mut ring, 5_000_000) > 1, "it stays awake first");
            for wait in 0..1 << failures {
                assert_eq!(waits(&mut ring, 1_000_000), 1, "wait {wait} after {failures}");
            }
        }
    }

    #[test]
    fn nobody_stays_awake_who_may_not() {
        let mut ring = ring(false);
        assert_eq!(waits(&mut ring, 1_000_000), 1);
    }

    #[test]
    fn what_comes_soon_is_waited_for_awake_again() {
        let mut linger =
            Linger { allowed: Arc::new(AtomicBool::new(true)), failures: 0, asleep: 0 };
        for _ in 0..20 {
            while !linger.begins() {}
            // As one that was preempted: there may be something by now.
            linger.ends(AWAKE);
        }
        let slept = (0..1000).take_while(|_| !linger.begins()).count();
        assert_eq!(slept, 1 << MOST_DOUBLED);
        linger.ends(AWAKE / 2);
        assert!(linger.begins() && linger.begins());
    }
}
