//! Answers for latencies: counts of them by operation, size and time, which any thread adds to.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::io::Op;
use crate::live::Value;

/// Most probes in a stack: a bit each.
pub const MAX_PROBES: usize = 8;

/// Each power of two has this many buckets, so a latency is known to one part in eight.
const STEPS: u32 = 8;
/// Bits of the longest latency that is told apart: 2^40 ns are 18 minutes.
const MOST_BITS: u32 = 40;
const BUCKETS: usize = ((MOST_BITS - 2) * STEPS) as usize;
/// Reads and writes are counted apart up to these sizes, and beyond the last.
const SIZES: [(u64, &str); 5] = [
    (4 << 10, "4k"),
    (16 << 10, "16k"),
    (64 << 10, "64k"),
    (256 << 10, "256k"),
    (u64::MAX, "more"),
];
/// What is counted: reads and writes by size, the others as they are.
const KINDS: usize = 2 * SIZES.len() + 3;

struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    max_ns: AtomicU64,
}

/// Latencies of what passed a layer.
pub struct Probe {
    kinds: Box<[Histogram]>,
}

/// How long a piece waits before it is sent, and which probes it has passed on its way, in one
/// word: a request that neither waits nor is watched has nothing in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wait(u64);

const NS_BITS: u32 = 56;
const MOST_NS: u64 = (1 << NS_BITS) - 1;

impl Wait {
    /// Neither waits nor is watched.
    pub const NONE: Wait = Wait(0);

    /// Nanoseconds; at most two years.
    #[must_use]
    pub const fn ns(self) -> u64 {
        self.0 & MOST_NS
    }

    /// A bit for each probe.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // Eight bits are left.
    pub const fn probes(self) -> u8 {
        (self.0 >> NS_BITS) as u8
    }

    /// Whether it is sent at once, unwatched.
    #[must_use]
    #[inline]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// That much longer.
    #[must_use]
    #[inline]
    pub const fn plus_ns(self, ns: u64) -> Wait {
        if ns == 0 {
            return self;
        }
        let sum = self.ns().saturating_add(ns);
        Wait(self.0 & !MOST_NS | if sum > MOST_NS { MOST_NS } else { sum })
    }

    /// Watched by these as well.
    #[must_use]
    pub const fn watched(self, probes: u8) -> Wait {
        Wait(self.0 | (probes as u64) << NS_BITS)
    }
}

fn bucket(ns: u64) -> usize {
    if ns < u64::from(STEPS) {
        return usize::try_from(ns).unwrap_or(0);
    }
    let top = ns.ilog2().min(MOST_BITS - 1);
    let ns = ns.min((1 << MOST_BITS) - 1);
    // The three bits behind the highest one.
    let step = (ns >> (top - 3)) & u64::from(STEPS - 1);
    usize::try_from(u64::from((top - 2) * STEPS) + step).unwrap_or(0)
}

/// The longest latency that a bucket counts.
fn longest(bucket: usize) -> u64 {
    let steps = STEPS as usize;
    if bucket < steps {
        return bucket as u64;
    }
    let (power, step) = (bucket / steps - 1, bucket % steps);
    ((steps + step + 1) as u64) << power
}

fn kind(op: Op, len: u64) -> usize {
    let size = || SIZES.iter().position(|(most, _)| len <= *most).unwrap_or(0);
    match op {
        Op::Read => size(),
        Op::Write => SIZES.len() + size(),
        Op::Flush => 2 * SIZES.len(),
        Op::Discard => 2 * SIZES.len() + 1,
        Op::WriteZeroes { .. } => 2 * SIZES.len() + 2,
        Op::Reset | Op::Finish => 2 * SIZES.len() + 3,
    }
}

fn name(kind: usize) -> (&'static str, &'static str) {
    let others = ["flush", "discard", "write-zeroes", "zones"];
    match kind.checked_sub(2 * SIZES.len()) {
        Some(other) => (others[other], "any"),
        None => (["read", "write"][kind / SIZES.len()], SIZES[kind % SIZES.len()].1),
    }
}

impl Default for Probe {
    fn default() -> Probe {
        let none = || Histogram {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            max_ns: AtomicU64::new(0),
        };
        Probe { kinds: (0..KINDS).map(|_| none()).collect() }
    }
}

impl Probe {
    /// Counts a latency.
    pub fn record(&self, op: Op, len: u64, ns: u64) {
        let histogram = &self.kinds[kind(op, len)];
        histogram.buckets[bucket(ns)].fetch_add(1, Relaxed);
        histogram.max_ns.fetch_max(ns, Relaxed);
    }

    /// Forgets everything.
    pub fn reset(&self) {
        for histogram in &self.kinds {
            histogram.buckets.iter().for_each(|bucket| bucket.store(0, Relaxed));
            histogram.max_ns.store(0, Relaxed);
        }
    }

    /// A row for each operation and size that was seen: how many, and the latencies below which
    /// half, nine tenths, 99 and 99.9 in a hundred of them stayed.
    #[must_use]
    pub fn rows(&self) -> Vec<Vec<(&'static str, Value)>> {
        let rows = self.kinds.iter().enumerate().map(|(kind, histogram)| histogram.row(kind));
        rows.flatten().collect()
    }
}

impl Histogram {
    fn row(&self, kind: usize) -> Option<Vec<(&'static str, Value)>> {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        let (total, max) = (counts.iter().sum::<u64>(), self.max_ns.load(Relaxed));
        if total == 0 {
            return None;
        }
        let below = |permille: u64| {
            let due = (total * permille).div_ceil(1000);
            let mut sum = 0;
            let reaches = |count: &u64| {
                sum += count;
                sum >= due
            };
            let place = counts.iter().position(reaches).unwrap_or(0);
            Value::Number(longest(place).min(max))
        };
        let (op, size) = name(kind);
        Some(vec![
            ("op", Value::Text(op.to_owned())),
            ("size", Value::Text(size.to_owned())),
            ("count", Value::Number(total)),
            ("p50_ns", below(500)),
            ("p90_ns", below(900)),
            ("p99_ns", below(990)),
            ("p99.9_ns", below(999)),
            ("max_ns", Value::Number(max)),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(row: &[(&'static str, Value)]) -> Vec<u64> {
        let number = |(_, value): &(_, Value)| match value {
            Value::Number(number) => Some(*number),
            _ => None,
        };
        row.iter().filter_map(number).collect()
    }

    #[test]
    fn each_latency_is_in_a_bucket_that_is_at_most_an_eighth_too_long() {
        let mut last = 0;
        for ns in (0..5000).chain((13..40).flat_map(|bit| (1 << bit) - 3..(1 << bit) + 3)) {
            let bucket = bucket(ns);
            assert!(bucket >= last && longest(bucket) >= ns, "{ns}");
            assert!(longest(bucket) - ns <= ns / 8 + 1, "{ns} {}", longest(bucket));
            last = bucket;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_those_of_a_sorted_list() {
        let probe = Probe::default();
        let mut all: Vec<u64> = (0..1000_u64).map(|i| 1000 + i * i * 7).collect();
        for ns in &all {
            probe.record(Op::Write, 4096, *ns);
        }
        all.sort_unstable();
        let rows = probe.rows();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0][0], ("op", Value::Text("write".into())));
        assert_eq!(rows[0][1], ("size", Value::Text("4k".into())));
        let got = numbers(&rows[0]);
        assert_eq!((got[0], got[5]), (1000, all[999]));
        for (got, place) in got[1..5].iter().zip([499, 899, 989, 998]) {
            let want = all[place];
            assert!((want..=want + want / 8 + 1).contains(got), "{got} for {want}");
        }
    }

    #[test]
    fn operations_and_sizes_are_counted_apart_and_forgotten_together() {
        let probe = Probe::default();
        for (op, len) in [
            (Op::Read, 512),
            (Op::Read, 4096),
            (Op::Read, 4608),
            (Op::Write, 1 << 20),
            (Op::Flush, 0),
            (Op::Discard, 512),
            (Op::WriteZeroes { unmap: true }, 512),
        ] {
            probe.record(op, len, 5);
        }
        let counts: Vec<_> = probe.rows().iter().map(|row| numbers(row)[0]).collect();
        assert_eq!(counts, [2, 1, 1, 1, 1, 1]);
        probe.reset();
        assert!(probe.rows().is_empty());
    }

    #[test]
    fn a_wait_and_its_watchers_do_not_touch_each_other() {
        let wait = Wait::NONE.watched(0b1000_0001).plus_ns(5).plus_ns(u64::MAX).watched(2);
        assert_eq!((wait.probes(), wait.ns()), (0b1000_0011, MOST_NS));
        assert!(Wait::NONE.plus_ns(0).is_none() && !Wait::NONE.watched(1).is_none());
    }
}
