//! Answers for comparing: reads both devices, looks again when nothing is on its way, tells what
//! differs.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use devsplice_core::live::MOST_BYTES;
use devsplice_core::prelude::*;
use devsplice_core::wait::Bell;

use crate::passes::Passes;

/// The two devices.
#[derive(Default)]
pub(super) struct Twins {
    /// Whether a read of what differs fails.
    fails: bool,
    pub(super) size: AtomicU64,
    pub(super) block: AtomicU64,
    pub(super) passes: Passes,
    /// Comparisons for which everything that changes data waits.
    pub(super) still: AtomicU64,
    moves: Bell,
    compared: AtomicU64,
    mismatches: AtomicU64,
}

/// Counted as long as it lives.
struct Still<'a>(&'a Twins);

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.0.still.fetch_sub(1, SeqCst);
        self.0.moves.ring();
    }
}

impl Twins {
    pub(super) fn new(fails: bool) -> Twins {
        Twins { fails, ..Twins::default() }
    }

    /// The first byte at which the two differ.
    async fn first_difference(
        &self,
        extent: Extent,
        meta: &dyn Meta,
    ) -> Result<Option<u64>, Errno> {
        let end = extent.at + extent.len;
        let mut at = extent.at;
        while at < end {
            let len = (end - at).min(MOST_BYTES as u64);
            let bytes = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
            let one = meta.read(Port(0), at, bytes).await?;
            let twin = meta.read(Port(1), at, bytes).await?;
            if let Some(place) = one.iter().zip(&twin).position(|(a, b)| a != b) {
                return Ok(Some(at + place as u64));
            }
            at += len;
        }
        Ok(None)
    }

    /// Compares. What differs is looked at again when all writes that were under way have landed
    /// and no other is let down: a write that is on one device and not yet on the other is none.
    async fn compare(&self, extent: Extent, meta: &dyn Meta) -> Result<Option<u64>, Errno> {
        self.compared.fetch_add(extent.len, SeqCst);
        if self.first_difference(extent, meta).await?.is_none() {
            return Ok(None);
        }
        self.still.fetch_add(1, SeqCst);
        let _still = Still(self);
        meta.grace().await?;
        let found = self.first_difference(extent, meta).await?;
        if let Some(at) = found {
            self.mismatches.fetch_add(1, SeqCst);
            meta.event(format!("the devices differ at byte {at}"));
        }
        Ok(found)
    }

    /// Compares everything.
    async fn check(&self, meta: &dyn Meta) -> Result<String, Errno> {
        let (size, block) = (self.size.load(SeqCst), self.block.load(SeqCst));
        let (mut at, mut bad) = (0, 0_u64);
        while at < size {
            let len = (size - at).min(MOST_BYTES as u64);
            at = match self.compare(Extent { at, len }, meta).await? {
                None => at + len,
                Some(place) => {
                    bad += 1;
                    // Blocks are powers of two.
                    (place & !(block - 1)) + block
                }
            };
        }
        Ok(match bad {
            0 => format!("{size} bytes compared, all equal"),
            _ => format!("{bad} blocks differ, see the events"),
        })
    }
}

impl Live for Twins {
    fn resolve(self: Arc<Self>, io: Io, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            if io.op != Op::Read {
                loop {
                    let moves = self.moves.wait();
                    if self.still.load(SeqCst) == 0 {
                        return Ok(());
                    }
                    moves.await;
                }
            }
            if self.compare(io.extent, &*meta).await?.is_some() && self.fails {
                return Err(Errno::EIO);
            }
            self.passes.give(io);
            Ok(())
        })
    }

    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        meta: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        Box::pin(async move {
            if words != ["check"] {
                return Ok(Err("commands: check (compares everything)".to_owned()));
            }
            self.check(&*meta).await.map(Ok)
        })
    }

    fn status(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("compared", Value::Number(self.compared.load(SeqCst))),
            ("mismatches", Value::Number(self.mismatches.load(SeqCst))),
        ]
    }
}
