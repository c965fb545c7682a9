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
    /// Bytes that layers moved for themselves: metadata, rebuilds.
    pub bytes_meta: u64,
}

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What one I/O thread did since its start.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counts { $($(#[$doc])* pub $name: u64,)* }

        /// The same, as another thread may read it.
        #[derive(Debug, Default)]
        pub struct Shared { $($name: AtomicU64,)* }

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
            /// Makes `counts` visible. Only the owning thread calls this.
            pub fn publish(&self, counts: &Counts) {
                $(self.$name.store(counts.$name, Ordering::Relaxed);)*
            }

            /// The values last published; each is exact, together they may be of two moments.
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
    /// Times that a request waited for a layer to learn something.
    misses,
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
    /// Bytes that layers moved for themselves: metadata, rebuilds. Not a client's payload.
    bytes_meta,
}

impl Counts {
    /// Counts a client's request that has ended.
    #[inline]
    pub(crate) fn finished(&mut self, op: Op, ok: bool) {
        self.requests += 1;
        self.errors += u64::from(!ok);
        match op {
            Op::Read => self.reads += 1,
            Op::Write => self.writes += 1,
            Op::Flush => self.flushes += 1,
            Op::Discard | Op::WriteZeroes { .. } => self.discards += 1,
        }
    }

    /// Takes over what the ring counted.
    pub fn set_ring(&mut self, ring: RingCounts) {
        self.sqes = ring.sqes;
        self.enters = ring.enters;
        self.bytes_spliced = ring.bytes_spliced;
        self.bytes_copied = ring.bytes_copied;
        self.bytes_meta = ring.bytes_meta;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_read() {
        let shared = Shared::default();
        let mut counts = Counts { requests: 3, ..Counts::default() };
        counts.set_ring(RingCounts { sqes: 7, ..RingCounts::default() });
        shared.publish(&counts);
        assert_eq!(shared.read(), counts);
        assert_eq!(counts.plus(&counts).sqes, 14);
        assert!(counts.list().contains(&("requests", 3)));
    }
}
