//! Answers for flushes of a disk that loses what was not flushed, and for its power.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};

use devsplice_core::live::MOST_BYTES;
use devsplice_core::prelude::*;
use devsplice_core::wait::{Bell, Turn};

use super::blocks::Blocks;
use super::cut::{self, Cut};
use crate::passes::Passes;

/// What becomes of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Power {
    /// They are served.
    #[default]
    On,
    /// They fail.
    Off,
    /// Those that change data fail.
    WritesFail,
    /// Those that change data are done without effect.
    WritesVanish,
}

#[derive(Default)]
pub(super) struct Flaky {
    /// How long it is up and down in turn, and what down means.
    turns: Option<(u64, u64, Power)>,
    pub(super) blocks: Blocks,
    pub(super) passes: Passes,
    /// As the rhythm has it; a cut goes before it.
    power: AtomicU8,
    is_cut: AtomicBool,
    /// One flush or cut at a time; while it works, what changes data waits.
    work: Turn,
    still: AtomicU64,
    moves: Bell,
    flushes: AtomicU64,
    cuts: AtomicU64,
}

/// As long as it lives, what changes data waits.
struct Still<'a>(&'a Flaky);

impl<'a> Still<'a> {
    fn new(flaky: &'a Flaky) -> Still<'a> {
        flaky.still.fetch_add(1, SeqCst);
        Still(flaky)
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.0.still.fetch_sub(1, SeqCst);
        self.0.moves.ring();
    }
}

impl Flaky {
    pub(super) fn new(turns: Option<(u64, u64, Power)>) -> Flaky {
        Flaky { turns, ..Flaky::default() }
    }

    pub(super) fn power(&self) -> Power {
        match self.power.load(SeqCst) {
            _ if self.is_cut.load(SeqCst) => Power::Off,
            0 => Power::On,
            1 => Power::Off,
            2 => Power::WritesFail,
            _ => Power::WritesVanish,
        }
    }

    fn set_power(&self, power: Power) {
        self.power.store(power as u8, SeqCst);
    }

    pub(super) fn is_still(&self) -> bool {
        self.still.load(SeqCst) > 0
    }

    /// Copies what lies on the scratch device in a range to the disk. Nothing changes meanwhile.
    /// The bits go last: until the disk has it durably, the scratch device is where it lies.
    async fn settle(&self, extent: Extent, meta: &dyn Meta) -> Result<(), Errno> {
        let end = extent.at + extent.len;
        let mut at = extent.at;
        while let Some((start, len)) = self.blocks.next_set(at, end) {
            let len = len.min(MOST_BYTES as u64);
            let bytes = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
            meta.copy(Port(1), vec![Port(0)], start, bytes).await?;
            at = start + len;
        }
        meta.flush(Port(0)).await?;
        self.blocks.clear(extent.at, extent.len);
        Ok(())
    }

    fn all(&self) -> Extent {
        Extent { at: 0, len: self.blocks.geometry().0 }
    }

    /// Makes a range durable. Writes that are under way have landed before it is copied; those that
    /// come meanwhile wait, or they would be lost with the bits.
    async fn flush(&self, extent: Extent, meta: &dyn Meta) -> Result<(), Errno> {
        let _work = self.work.take().await;
        let _still = Still::new(self);
        meta.grace().await?;
        if self.power() == Power::Off {
            return Err(Errno::EIO);
        }
        self.settle(extent, meta).await
    }

    /// Cuts the power: what was not flushed is lost, all, in part or not at all.
    async fn cut(&self, cut: Cut, meta: &dyn Meta) -> Result<String, Errno> {
        // From here on nothing new is let down.
        let before = self.is_cut.swap(true, SeqCst);
        let result = self.lose(cut, meta).await;
        if result.is_err() {
            self.is_cut.store(before, SeqCst);
        }
        result
    }

    async fn lose(&self, cut: Cut, meta: &dyn Meta) -> Result<String, Errno> {
        let _work = self.work.take().await;
        let _still = Still::new(self);
        meta.grace().await?;
        let (size, block) = self.blocks.geometry();
        let unflushed = self.blocks.count() * block;
        let mut dice = cut.dice();
        let (mut at, mut kept) = (0, 0);
        while let Some((start, len)) = self.blocks.next_set(at, size) {
            let len = len.min(MOST_BYTES as u64);
            kept += cut::keep(cut, &mut dice, Extent { at: start, len }, block, meta).await?;
            at = start + len;
        }
        meta.flush(Port(0)).await?;
        self.blocks.clear(0, size);
        self.cuts.fetch_add(1, SeqCst);
        let text = format!("cut: {unflushed} bytes were not flushed, {kept} of them survived");
        meta.event(text.clone());
        Ok(text)
    }
}

impl Live for Flaky {
    fn resolve(self: Arc<Self>, io: Io, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            if io.op == Op::Flush {
                self.flushes.fetch_add(1, SeqCst);
                self.flush(self.all(), &*meta).await?;
                self.passes.give(io);
                return Ok(());
            }
            // A write that waits for a flush, or one with FUA on top of what was not flushed.
            loop {
                let moves = self.moves.wait();
                if !self.is_still() {
                    break;
                }
                moves.await;
            }
            if io.fua { self.flush(io.extent, &*meta).await } else { Ok(()) }
        })
    }

    fn run(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            let Some((up_ns, down_ns, down)) = self.turns else { return Ok(()) };
            loop {
                meta.sleep(up_ns).await?;
                self.set_power(down);
                meta.sleep(down_ns).await?;
                self.set_power(Power::On);
            }
        })
    }

    /// A clean end is no power cut: nothing is lost.
    fn stop(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move { self.settle(self.all(), &*meta).await })
    }

    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        meta: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        Box::pin(async move {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            match words[..] {
                ["on"] => {
                    self.is_cut.store(false, SeqCst);
                    Ok(Ok("on".to_owned()))
                }
                ["cut", ref how @ ..] => match Cut::parse(how) {
                    Some(cut) => self.cut(cut, &*meta).await.map(Ok),
                    None => Ok(Err(cut::USAGE.to_owned())),
                },
                _ => Ok(Err(cut::USAGE.to_owned())),
            }
        })
    }

    fn status(&self) -> Vec<(&'static str, Value)> {
        let power = match self.power() {
            Power::On => "on",
            Power::Off => "off",
            Power::WritesFail => "writes fail",
            Power::WritesVanish => "writes vanish",
        };
        let unflushed = self.blocks.count() * self.blocks.geometry().1;
        vec![
            ("power", Value::Text(power.to_owned())),
            ("unflushed", Value::Number(unflushed)),
            ("flushes", Value::Number(self.flushes.load(SeqCst))),
            ("cuts", Value::Number(self.cuts.load(SeqCst))),
        ]
    }
}
