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

/// What is counted of requests that are over: reads, writes, flushes, discards and write-zeroes.
type ByOp = [AtomicU64; 4];

macro_rules! counts {
    (
        $($(#[$op_doc:meta])* $op_name:ident: [$($index:literal),*],)*
        --
        $($(#[$doc:meta])* $name:ident),* $(,)?
    ) => {
        /// What one I/O thread did since its start.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$op_doc])* pub $op_name: u64,)*
            $($(#[$doc])* pub $name: u64,)*
        }

        /// The same, as another thread may read it while the one that owns it counts.
        #[derive(Debug, Default)]
        pub struct Shared {
            finished: ByOp,
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Counts {
            /// Names and values, in the order in which they are shown.
            #[must_use]
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![
                    $((stringify!($op_name), self.$op_name),)*
                    $((stringify!($name), self.$name),)*
                ]
            }

            /// The sum of both.
            #[must_use]
            pub fn plus(&self, other: &Counts) -> Counts {
                Counts {
                    $($op_name: self.$op_name + other.$op_name,)*
                    $($name: self.$name + other.$name,)*
                }
            }
        }

        impl Shared {
            /// The values now; each is exact, together they may be of two moments.
            #[must_use]
            pub fn read(&self) -> Counts {
                let by_op = self.finished.each_ref().map(|count| count.load(Ordering::Relaxed));
                Counts {
                    $($op_name: [$(by_op[$index]),*].iter().sum(),)*
                    $($name: self.$name.load(Ordering::Relaxed),)*
                }
            }
        }
    };
}

counts! {
    /// Requests finished.
    requests: [0, 1, 2, 3],
    /// Of these, reads.
    reads: [0],
    /// Writes.
    writes: [1],
    /// Flushes.
    flushes: [2],
    /// Discards and write-zeroes.
    discards: [3],
    --
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

/// Counts one more. Only the owning thread counts, so nothing is lost between load and store; that
/// is one plain instruction, where an atomic addition would lock the bus.
#[inline]
pub(crate) fn one_more(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl Shared {
    /// Counts a request that is over.
    #[inline(always)]
    pub(crate) fn finished(&self, op: Op) {
        match op {
            Op::Read => one_more(&self.finished[0]),
            Op::Write => one_more(&self.finished[1]),
            _ => self.finished_other(op),
        }
    }

    #[inline(never)]
    fn finished_other(&self, op: Op) {
        one_more(&self.finished[if matches!(op, Op::Flush) { 2 } else { 3 }]);
    }

    /// Takes over what the ring counted. Only the owning thread calls this.
    #[inline]
    pub(crate) fn set_ring(&self, ring: RingCounts) {
        self.sqes.store(ring.sqes, Ordering::Relaxed);
        self.enters.store(ring.enters, Ordering::Relaxed);
        self.bytes_spliced.store(ring.bytes_spliced, Ordering::Relaxed);
        self.bytes_copied.store(ring.bytes_copied, Ordering::Relaxed);
        self.bytes_meta.store(ring.bytes_meta, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_read() {
        let shared = Shared::default();
        let ops = [Op::Read, Op::Read, Op::Read, Op::Write, Op::Write, Op::Flush, Op::Discard];
        for op in ops.into_iter().chain([true, false].map(|unmap| Op::WriteZeroes { unmap })) {
            shared.finished(op);
        }
        shared.set_ring(RingCounts {
            sqes: 7,
            enters: 5,
            bytes_spliced: 6,
            bytes_copied: 8,
            bytes_meta: 9,
        });
        let (sqes, enters, bytes_spliced, bytes_copied, bytes_meta) = (7, 5, 6, 8, 9);
        let none = Counts::default();
        let (requests, reads, writes, flushes, discards) = (9, 3, 2, 1, 3);
        let by_op = Counts { requests, reads, writes, flushes, discards, ..none };
        let asked = Counts { sqes, enters, bytes_spliced, bytes_copied, bytes_meta, ..by_op };
        let counts = shared.read();
        assert_eq!(counts, asked);
        assert_eq!(counts.plus(&counts).sqes, 14);
        assert!(counts.list().contains(&("requests", 9)));
    }
}
