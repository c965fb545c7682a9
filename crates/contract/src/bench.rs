//! Answers for a case at work: a target, what it should hold, and requests by the batch.

use devsplice_core::{Errno, Extent, Io, Limits, Op};

use crate::content::Stamp;
use crate::model::Model;
use crate::rng::Rng;
use crate::target::{Ask, Done, Target};

/// Bytes of the largest request: what the kernel's block layer sends by default at most.
pub const LARGEST: u64 = 1 << 20;
/// Requests of a batch: more than any target takes at a time.
pub const BATCH: usize = 48;

/// A target under test.
pub struct Bench {
    target: Box<dyn Target>,
    /// What it should hold.
    pub model: Model,
    /// Chance.
    pub rng: Rng,
    /// What it offers.
    pub limits: Limits,
    /// Bytes from its start that the cases use.
    pub span: u64,
    stamp: Stamp,
}

/// Which operations a mix of requests has, in hundredths: reads, writes, flushes, discards; the
/// rest are write-zeroes.
pub type Mix = [u64; 4];

/// Whether each request ended as it had to.
///
/// # Errors
/// The first that did not.
pub fn expect(
    asks: &[Ask],
    dones: &[Done],
    want: impl Fn(usize) -> Result<(), Errno>,
) -> Result<(), String> {
    let word = |result: Result<(), Errno>| {
        result.map_or_else(|errno| errno.to_string(), |()| "success".into())
    };
    for (place, (ask, done)) in asks.iter().zip(dones).enumerate() {
        let want = want(place);
        if done.result != want {
            return Err(format!("asked: {ask}; came: {}; must: {}", word(done.result), word(want)));
        }
    }
    Ok(())
}

impl Bench {
    /// Over a target of which the first `span` bytes may be used. Nothing in `voids` is kept.
    #[must_use]
    pub fn new(target: Box<dyn Target>, span: u64, voids: &[(u64, u64)], seed: u64) -> Bench {
        let limits = target.limits();
        let span = span.min(limits.size) / u64::from(limits.block) * u64::from(limits.block);
        let model = Model::new(span, voids);
        Bench { target, model, rng: Rng::new(seed), limits, span, stamp: 0 }
    }

    /// The block, in bytes.
    #[must_use]
    pub fn block(&self) -> u64 {
        u64::from(self.limits.block)
    }

    /// A request; each write carries bytes of its own.
    pub fn ask(&mut self, op: Op, at: u64, len: u64) -> Ask {
        self.stamp += 1;
        Ask { io: Io::new(op, at, len), stamp: self.stamp }
    }

    /// A write with force unit access.
    pub fn fua(&mut self, at: u64, len: u64) -> Ask {
        let mut ask = self.ask(Op::Write, at, len);
        ask.io.fua = true;
        ask
    }

    /// Carries out requests together and judges what reads bring; what became of each is the
    /// caller's to judge.
    ///
    /// # Errors
    /// If a read brought wrong bytes, or a request was not finished.
    pub fn run(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String> {
        let dones = self.target.run(asks)?;
        if dones.len() != asks.len() {
            return Err(format!("{} requests asked, {} finished", asks.len(), dones.len()));
        }
        self.model.batch(asks, &dones)?;
        Ok(dones)
    }

    /// As [`Bench::run`], and each must succeed.
    ///
    /// # Errors
    /// Also if one failed.
    pub fn must(&mut self, asks: &[Ask]) -> Result<(), String> {
        let dones = self.run(asks)?;
        expect(asks, &dones, |_| Ok(()))
    }

    /// Carries out requests of which each must fail with the number beside it, at the door: it
    /// changes nothing.
    ///
    /// # Errors
    /// If one did not.
    pub fn must_refuse(&mut self, asks: &[(Ask, Errno)]) -> Result<(), String> {
        let only: Vec<_> = asks.iter().map(|(ask, _)| *ask).collect();
        let dones = self.target.run(&only)?;
        expect(&only, &dones, |place| Err(asks[place].1))
    }

    /// Writes all that the cases use, in requests of up to `step` bytes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn fill(&mut self, step: u64) -> Result<(), String> {
        self.sweep(Op::Write, step)
    }

    /// Reads all of it.
    ///
    /// # Errors
    /// If something is not as it should be.
    pub fn check(&mut self, step: u64) -> Result<(), String> {
        self.sweep(Op::Read, step)
    }

    fn sweep(&mut self, op: Op, step: u64) -> Result<(), String> {
        let step = (step / self.block()).max(1) * self.block();
        let mut at = 0;
        while at < self.span {
            let mut asks = Vec::with_capacity(BATCH);
            while at < self.span && asks.len() < BATCH {
                let len = step.min(self.span - at);
                asks.push(self.ask(op, at, len));
                at += len;
            }
            self.must(&asks)?;
        }
        Ok(())
    }

    /// An extent of up to `most` bytes, anywhere, on blocks.
    pub fn extent(&mut self, most: u64) -> Extent {
        let blocks = self.span / self.block();
        let most = (most / self.block()).clamp(1, blocks);
        let top = 1 + self.rng.below(most);
        let len = 1 + self.rng.below(top);
        let at = self.rng.below(blocks - len + 1);
        Extent { at: at * self.block(), len: len * self.block() }
    }

    /// Requests none of which touches what another one changes; those that the target does not
    /// offer are left out.
    pub fn mix(&mut self, mix: Mix, most: u64) -> Vec<Ask> {
        let mut asks: Vec<Ask> = Vec::with_capacity(BATCH);
        for _ in 0..BATCH {
            let op = self.op(mix);
            let extent = self.extent(most);
            let end = extent.at + extent.len;
            let apart = |other: &Ask| {
                let other = other.io.extent;
                extent.at >= other.at + other.len || other.at >= end
            };
            if !self.offers(op) || (op != Op::Flush && !asks.iter().all(apart)) {
                continue;
            }
            let ask = match op {
                Op::Flush => self.ask(op, 0, 0),
                Op::Write if self.limits.fua && self.rng.percent(10) => {
                    self.fua(extent.at, extent.len)
                }
                _ => self.ask(op, extent.at, extent.len),
            };
            asks.push(ask);
        }
        asks
    }

    fn op(&mut self, mix: Mix) -> Op {
        let mut left = self.rng.below(100);
        for (op, share) in [Op::Read, Op::Write, Op::Flush, Op::Discard].into_iter().zip(mix) {
            if left < share {
                return op;
            }
            left -= share;
        }
        Op::WriteZeroes { unmap: self.rng.percent(50) }
    }

    /// Whether the target takes such a request.
    #[must_use]
    pub fn offers(&self, op: Op) -> bool {
        match op {
            Op::Read | Op::Flush => true,
            _ if self.limits.read_only => false,
            Op::Write => true,
            Op::Discard => self.limits.discard != 0,
            Op::WriteZeroes { .. } => self.limits.write_zeroes,
            // Zones have cases of their own.
            Op::Reset | Op::Finish => false,
        }
    }

    /// Cuts the power, if the target can do that; the model follows.
    pub fn cut(&mut self) -> bool {
        let cut = self.target.cut();
        if cut {
            self.model.cut();
        }
        cut
    }
}
