//! Answers for a device that is held to a rate: `throttle(disk, bps=10M, read-iops=500)`.
//!
//! Each rate has a credit, in nanoseconds of it. A request goes down while there is credit and may
//! overdraw it, so what goes down by any time t is at most the rate times (t + burst) and one
//! request. Without credit it takes a place in time and waits: first come, first served. Flushes
//! pass. Equal requests may get different answers.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use devsplice_core::prelude::*;

use crate::passes::Passes;

mod live;

const DEFAULT_BURST_NS: u64 = 100_000_000;

const KEYS: &[Key] = &[
    Key::optional("bps", Kind::Size, "bytes a second, reads and writes together"),
    Key::optional("read-bps", Kind::Size, "bytes a second of reads"),
    Key::optional("write-bps", Kind::Size, "bytes a second of writes"),
    Key::optional("iops", Kind::Count, "requests a second, flushes not counted"),
    Key::optional("read-iops", Kind::Count, "reads a second"),
    Key::optional("write-iops", Kind::Count, "writes, discards and write-zeroes a second"),
    Key::optional("burst", Kind::Duration, "how long unused allowance is kept, default 100ms"),
];

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "throttle",
    about: "holds requests to bytes or requests a second",
    below: Arity::One,
    keys: KEYS,
    make: |args| {
        let throttle = Throttle::default();
        throttle.set(args)?;
        Ok(Box::new(Throttled(Arc::new(throttle))))
    },
};

/// A rate: what it holds back, how much of it is unused.
#[derive(Default)]
struct Rate {
    /// A second; 0 for none.
    rate: AtomicU64,
    /// Nanoseconds of it that may still be used; negative when they are taken in advance.
    credit_ns: AtomicI64,
}

impl Rate {
    /// What a request costs: rounded up, so that the rate is never exceeded.
    fn cost_ns(&self, index: usize, io: &Io) -> i64 {
        let meant = match index % 3 {
            0 => true,
            1 => io.op == Op::Read,
            _ => io.op.changes(),
        };
        let amount = if index >= 3 {
            1
        } else if io.op.has_pages() {
            io.extent.len
        } else {
            0
        };
        match self.rate.load(SeqCst) {
            rate if rate == 0 || !meant => 0,
            rate => i64::try_from(amount.saturating_mul(1_000_000_000).div_ceil(rate))
                .unwrap_or(i64::MAX),
        }
    }
}

#[derive(Default)]
struct Throttle {
    /// In the order of [`KEYS`].
    rates: [Rate; 6],
    burst_ns: AtomicU64,
    /// Of requests that have waited, and paid.
    passes: Passes,
    pace: Mutex<Pace>,
    waiting: AtomicU64,
    waited: AtomicU64,
}

/// When credit was given out last, and how often the rates were changed.
#[derive(Default)]
struct Pace {
    last_ns: Option<u64>,
    changes: u64,
}

impl Throttle {
    fn set(&self, args: &Args) -> Result<()> {
        let mut new = [0; 6];
        for (new, key) in new.iter_mut().zip(KEYS) {
            let is_size = key.kind == Kind::Size;
            let rate = if is_size { args.size(key.name)? } else { args.count(key.name)? };
            if rate == Some(0) {
                return Err(Error::invalid(format!("throttle: {}", key.name), "0 would never end"));
            }
            *new = rate.unwrap_or(0);
        }
        if new == [0; 6] {
            return Err(Error::invalid("throttle", "no rate is given").next("bps=10M, or iops=500"));
        }
        // At least 1, or nothing would ever go down; far from what does not fit.
        let burst_ns = args.duration_ns("burst")?.unwrap_or(DEFAULT_BURST_NS).clamp(1, 1 << 60);
        self.burst_ns.store(burst_ns, SeqCst);
        for (rate, new) in self.rates.iter().zip(new) {
            rate.rate.store(new, SeqCst);
            rate.credit_ns.store(burst_ns.cast_signed(), SeqCst);
        }
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).changes += 1;
        Ok(())
    }

    fn costs<'a>(&'a self, io: &'a Io) -> impl Iterator<Item = (&'a Rate, i64)> {
        let costs = self.rates.iter().enumerate();
        costs.map(|(index, rate)| (rate, rate.cost_ns(index, io))).filter(|(_, cost)| *cost > 0)
    }

    fn take(&self, io: &Io) {
        for (rate, cost) in self.costs(io) {
            rate.credit_ns.fetch_sub(cost, SeqCst);
        }
    }

    /// Whether a request may go down at once; then it has paid.
    fn passes(&self, io: &Io) -> bool {
        if self.passes.take(io) {
            return true;
        }
        if self.costs(io).any(|(rate, _)| rate.credit_ns.load(SeqCst) <= 0) {
            return false;
        }
        self.take(io);
        true
    }

    /// Gives out the credit of the time that has passed and takes what a request costs: how long it
    /// has to wait, and how often the rates had been changed.
    fn reserve(&self, io: &Io, now_ns: u64) -> (u64, u64) {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let passed_ns = now_ns.saturating_sub(pace.last_ns.unwrap_or(now_ns));
        pace.last_ns = Some(now_ns);
        let passed_ns = i64::try_from(passed_ns).unwrap_or(i64::MAX);
        let most = self.burst_ns.load(SeqCst).cast_signed();
        for rate in &self.rates {
            let more = |credit: i64| Some(credit.saturating_add(passed_ns).min(most));
            let _ = rate.credit_ns.fetch_update(SeqCst, SeqCst, more);
        }
        let lacks = self.costs(io).map(|(rate, _)| 1 - rate.credit_ns.load(SeqCst).min(1)).max();
        self.take(io);
        (lacks.unwrap_or(0).unsigned_abs(), pace.changes)
    }
}

struct Throttled(Arc<Throttle>);

impl Layer for Throttled {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        below.only()
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        Ok(if self.0.passes(&io) { Map::To { len, port: Port(0), at } } else { Map::Miss })
    }

    /// Who asks where bytes lie moves none.
    fn locate(&self, extent: Extent) -> Result<Map, Errno> {
        Ok(Map::To { len: extent.len, port: Port(0), at: extent.at })
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        Some(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{disk, open, refusal, to};

    #[test]
    fn a_request_that_overdraws_the_credit_goes_and_the_next_one_waits() {
        let (throttle, limits) = open(&DRIVER, "bps=1M burst=1ms", &[disk(1 << 20)]).unwrap();
        assert_eq!(limits, disk(1 << 20));
        let read = Io::new(Op::Read, 4096, 65_536);
        assert_eq!(throttle.map(read), to(0, 4096, 65_536));
        assert_eq!(throttle.map(read), Ok(Map::Miss));
        assert_eq!(throttle.map(Io::new(Op::Discard, 0, 512)), to(0, 0, 512), "it has no bytes");
        assert_eq!(throttle.flush(), Ok(Map::All { len: 0, at: 0 }));
    }

    #[test]
    fn who_asks_where_bytes_lie_neither_waits_nor_pays() {
        let (throttle, _) = open(&DRIVER, "bps=1M burst=1ms", &[disk(1 << 40)]).unwrap();
        let all = Extent { at: 0, len: 1 << 40 };
        let read = Io::new(Op::Read, 0, 65_536);
        assert_eq!([0; 3].map(|_| throttle.locate(all)), [0; 3].map(|_| to(0, 0, 1 << 40)));
        assert_eq!(throttle.map(read), to(0, 0, 65_536), "it has paid for others");
        assert_eq!(throttle.map(read), Ok(Map::Miss));
        assert_eq!(throttle.locate(all), to(0, 0, 1 << 40));
    }

    #[test]
    fn each_rate_holds_back_what_it_is_for() {
        let (throttle, _) =
            open(&DRIVER, "read-bps=1M write-iops=1 burst=1ns", &[disk(1 << 20)]).unwrap();
        let [read, write] = [Op::Read, Op::Write].map(|op| Io::new(op, 0, 512));
        assert_eq!(throttle.map(read), to(0, 0, 512));
        assert_eq!(throttle.map(read), Ok(Map::Miss));
        assert_eq!(throttle.map(write), to(0, 0, 512));
        assert_eq!(throttle.map(write), Ok(Map::Miss));
        assert_eq!(throttle.map(Io::new(Op::Discard, 0, 512)), Ok(Map::Miss));
    }

    #[test]
    fn rates_that_hold_nothing_or_everything_are_refused() {
        assert!(refusal(&DRIVER, "burst=1s", &[disk(512)]).contains("no rate is given"));
        assert!(refusal(&DRIVER, "iops=0", &[disk(512)]).contains("0 would never end"));
    }
}
