//! Answers for what a client asks: sizes, places and operations with a seed's own habits.

use devsplice_core::{Io, Limits, Op};

use crate::rng::Rng;

/// Most sectors of one request: 1 MiB.
const MOST: u64 = 2048;
/// Bytes of one read of a sweep.
const SWEEP: u64 = 32 << 10;

/// The habits of one device's clients.
#[derive(Clone)]
pub(crate) struct Workload {
    rng: Rng,
    limits: Limits,
    /// How likely each operation is: read, write, flush, discard, write-zeroes.
    weights: [u64; 5],
    /// First sectors of places that are hit again and again.
    hot: [u64; 3],
    hot_percent: u64,
    fua_percent: u64,
    /// Sectors that all requests are multiples of.
    grain: u64,
    /// Below 100 of a hundred requests are larger than 64 KiB.
    large_percent: u64,
    /// Most nanoseconds between a request's end and the next on its tag.
    think_ns: u64,
    /// Where a sweep of reads over the whole device goes on.
    sweep: Option<u64>,
}

impl Workload {
    pub(crate) fn new(mut rng: Rng, limits: Limits) -> Workload {
        let sectors = limits.size / 512;
        let block = u64::from(limits.block) / 512;
        let page = sectors >= 64 && rng.percent(40);
        let grain = if page { 8 } else { block };
        let weights = rng.pick(&[
            [40, 40, 5, 5, 5],
            [20, 70, 10, 0, 0],
            [30, 30, 30, 5, 5],
            [30, 40, 2, 14, 14],
            [70, 25, 2, 2, 1],
        ]);
        let hot = [0; 3].map(|_: u64| rng.below(sectors));
        Workload {
            limits,
            weights,
            hot,
            hot_percent: rng.pick(&[0, 30, 60, 90]),
            fua_percent: rng.pick(&[0, 10, 40]),
            grain,
            large_percent: rng.pick(&[0, 2, 4, 12]),
            think_ns: rng.pick(&[0, 1_000, 100_000, 2_000_000]),
            sweep: None,
            rng,
        }
    }

    /// From now on everything is read, from the start; how many requests that takes.
    pub(crate) fn sweep(&mut self) -> u64 {
        self.sweep = Some(0);
        self.limits.size.div_ceil(SWEEP)
    }

    /// How long a tag stays free.
    pub(crate) fn think(&mut self) -> u64 {
        if self.rng.percent(50) { 0 } else { self.rng.below(self.think_ns + 1) }
    }

    /// The next request. One in a hundred is none that the device can do.
    pub(crate) fn next(&mut self) -> Io {
        if let Some(at) = self.sweep {
            let len = SWEEP.min(self.limits.size - at);
            let next = at + len;
            self.sweep = Some(if next < self.limits.size { next } else { 0 });
            return Io::new(Op::Read, at, len);
        }
        let op = self.op();
        if op == Op::Flush {
            return Io::new(op, 0, 0);
        }
        let (sector, count) = self.extent();
        let fua = op == Op::Write && self.limits.fua && self.rng.percent(self.fua_percent);
        let at = if self.rng.percent(1) { self.limits.size } else { sector * 512 };
        Io { fua, ..Io::new(op, at, count * 512) }
    }

    fn op(&mut self) -> Op {
        let mut left = self.rng.below(self.weights.iter().sum());
        for (kind, weight) in self.weights.iter().enumerate() {
            if left < *weight {
                return match kind {
                    0 => Op::Read,
                    1 => Op::Write,
                    2 => Op::Flush,
                    3 => Op::Discard,
                    _ => Op::WriteZeroes { unmap: self.rng.percent(50) },
                };
            }
            left -= weight;
        }
        Op::Read
    }

    /// First sector and count: both multiples of the grain, inside the device.
    fn extent(&mut self) -> (u64, u64) {
        let device = self.limits.size / 512 / self.grain;
        let most = if self.rng.percent(self.large_percent) {
            MOST
        } else {
            self.rng.pick(&[1, 8, 8, 16, 64, 128])
        };
        let count = self.rng.between(1, (most / self.grain).clamp(1, device));
        let last = device - count;
        let first = if self.rng.percent(self.hot_percent) {
            let hot = self.rng.pick(&self.hot) / self.grain;
            hot.saturating_sub(self.rng.below(4)) + self.rng.below(4)
        } else {
            self.rng.below(last + 1)
        };
        (first.min(last) * self.grain, count * self.grain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_lie_on_blocks_and_nearly_all_inside_the_device() {
        let limits = Limits { block: 4096, physical: 4096, ..Limits::ideal(80 * 4096) };
        for seed in 0..50 {
            let mut workload = Workload::new(Rng::new(seed, 0), limits);
            for _ in 0..100 {
                let io = workload.next();
                assert_eq!((io.extent.at | io.extent.len) % 4096, 0);
                assert!(io.extent.within(limits.size) || io.extent.at == limits.size);
                assert_eq!(io.extent.len == 0, io.op == Op::Flush);
            }
        }
    }
}
