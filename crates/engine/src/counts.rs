//! Answers for counters: what one I/O thread did, readable from others while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

use devsplice_core::Op;

/// What a ring counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounts {
    /// Submission queue entries.
    pub sqes: u64,
    /// Calls into the kernel.
    pub enters: u64,
    /// Payload bytes that went between a request's pages and their place without being in this
    /// process.
    pub bytes_spliced: u64,
    /// Payload bytes that were copied into or out of this process.
    pub bytes_copied: u64,
}

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What one I/O thread did since its start.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counts { $($(#[$doc])* pub $name: u64,)* }

        /// The same, as another thread may read it while the one that owns it counts.
        #[derive(Debug, Default)]
        pub struct Shared { $(pub(crate) $name: AtomicU64,)* }

        impl Counts {
            /// Names and values, in the order in which they are shown.
            #[must_use]
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),*]
            }

            /// The sum of both.
            #[must_use]
            pub fn plus(&self, other: &Counts) -> Counts {
                Counts { $($name: self.$name + other.$name,)* }
            }
        }

        impl Shared {
            /// The values now; each is exact, together they may be of two moments.
            #[must_use]
            pub fn read(&self) -> Counts {
                Counts { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counts! {
    /// Requests finished.
    requests,
    /// Of these, reads.
    reads,
    /// Writes.
    writes,
    /// Flushes.
    flushes,
    /// Discards and write-zeroes.
    discards,
    /// Requests that ended with an error.
    errors,
    /// Pieces that requests were routed into.
    pieces,
    /// Splices that pieces were gathered into, retries not counted.
    splices,
    /// Splices sent again after short results or transient errors.
    retries,
    /// Requests that the watchdog reported.
    stuck,
    /// Submission queue entries.
    sqes,
    /// Calls into the kernel.
    enters,
    /// Payload bytes moved without being in this process.
    bytes_spliced,
    /// Payload bytes copied into or out of this process.
    bytes_copied,
}

/// Counts one more. Only the owning thread counts, so nothing is lost between load and store; that
/// is one plain instruction, where an atomic addition would lock the bus.
#[inline]
pub(crate) fn one_more(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl Shared {
    /// Counts a request that is over.
    #[inline]
    pub(crate) fn finished(&self, op: Op, has_failed: bool) {
        one_more(&self.requests);
        // Asked one by one: the most frequent first.
        if matches!(op, Op::Read) {
            one_more(&self.reads);
        } else if matches!(op, Op::Write) {
            one_more(&self.writes);
        } else if matches!(op, Op::Flush) {
            one_more(&self.flushes);
        } else {
            one_more(&self.discards);
        }
        if has_failed {
            one_more(&self.errors);
        }
    }

    /// Takes over what the ring counted. Only the owning thread calls this.
    #[inline]
    pub(crate) fn set_ring(&self, ring: RingCounts) {
        self.sqes.store(ring.sqes, Ordering::Relaxed);
        self.enters.store(ring.enters, Ordering::Relaxed);
        self.bytes_spliced.store(ring.bytes_spliced, Ordering::Relaxed);
        self.bytes_copied.store(ring.bytes_copied, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_read() {
        let shared = Shared::default();
        for _ in 0..3 {
            one_more(&shared.requests);
        }
        shared.set_ring(RingCounts { sqes: 7, enters: 5, bytes_spliced: 6, bytes_copied: 8 });
        let (sqes, enters, bytes_spliced, bytes_copied) = (7, 5, 6, 8);
        let none = Counts::default();
        let asked = Counts { requests: 3, sqes, enters, bytes_spliced, bytes_copied, ..none };
        let counts = shared.read();
        assert_eq!(counts, asked);
        assert_eq!(counts.plus(&counts).sqes, 14);
        assert!(counts.list().contains(&("requests", 3)));
    }
}
