//! Answers for bugs put in on purpose: the simulator is tested by finding each of them.

use std::sync::Arc;

use devsplice_core::prelude::*;
use devsplice_core::twist::Twisted;

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A disk's flush returns and nothing was made durable.
    FlushEarly,
    /// A write with force unit access is treated like any other.
    FuaIgnored,
    /// A flush makes durable only what was written some time ago.
    FlushTooOld,
    /// Some writes are acknowledged and never done.
    WriteDropped,
    /// A short read is reported as a full one.
    ShortRead,
    /// A short write is reported as a full one.
    ShortWrite,
    /// A splice completes before all its parts have moved.
    AckEarly,
    /// A failed splice is reported as done.
    ErrorSwallowed,
    /// Some reads bring the sector behind the one that was asked for.
    ReadOff,
    /// A finished write hits the disk again, over whatever came after it.
    Echo,
    /// A discard takes one sector too many.
    DiscardNeighbour,
    /// A write-zeroes does nothing.
    ZeroesIgnored,
    /// Some completions never come.
    CompletionLost,
    /// A stripe's first two legs change places in every second row.
    StripeSwapped,
    /// A linear's window begins one block too late.
    LinearOff,
    /// A flush goes to the first lower device only.
    FlushOneLeg,
    /// A mirror writes to its first leg only.
    MirrorOneLeg,
    /// A layer drops write-zeroes instead of sending them down.
    ZeroesDropped,
    /// A layer sends the second half of large writes to the place of the first.
    HalfTwice,
    /// A layer answers reads with zeros now and then.
    ReadsZero,
    /// A layer does not tell that completed writes below may be lost.
    CacheHidden,
    /// A layer offers a write-zeroes that what lies below does not.
    ZeroesOffered,
    /// The watchdog never reports.
    WatchdogSilent,
    /// A live layer's log never reaches the disks.
    LogLost,
    /// A mirror's changes of its legs' states never reach the disks.
    StateLost,
    /// What a live layer writes is not durable when it says so.
    MetaNotDurable,
    /// A live layer's flushes do nothing.
    MetaFlushSkipped,
    /// A live layer copies nothing.
    CopySkipped,
    /// A live layer does not wait for what is under way.
    GraceSkipped,
    /// What a lost connection left unanswered is taken for done.
    FarHeldLost,
    /// A flush that a lost connection left unanswered is taken for done.
    FarFlushLost,
    /// An answer to what was asked before is taken for one to what is asked now.
    FarCookie,
    /// Data of a read that was cut is taken for all of it.
    FarReplyCut,
    /// A write over an old connection is done after what came over the new one.
    FarOldWrites,
    /// A server that cannot force a write is not asked to flush behind it.
    FarForced,
    /// A request ends when it is answered, though it is not sent to its end.
    FarEarly,
    /// A server that says nothing is waited for for ever.
    FarSilence,
}

impl Mutant {
    /// All of them.
    pub const ALL: &'static [Mutant] = &[
        Mutant::FlushEarly,
        Mutant::FuaIgnored,
        Mutant::FlushTooOld,
        Mutant::WriteDropped,
        Mutant::ShortRead,
        Mutant::ShortWrite,
        Mutant::AckEarly,
        Mutant::ErrorSwallowed,
        Mutant::ReadOff,
        Mutant::Echo,
        Mutant::DiscardNeighbour,
        Mutant::ZeroesIgnored,
        Mutant::CompletionLost,
        Mutant::StripeSwapped,
        Mutant::LinearOff,
        Mutant::FlushOneLeg,
        Mutant::MirrorOneLeg,
        Mutant::ZeroesDropped,
        Mutant::HalfTwice,
        Mutant::ReadsZero,
        Mutant::CacheHidden,
        Mutant::ZeroesOffered,
        Mutant::WatchdogSilent,
        Mutant::LogLost,
        Mutant::StateLost,
        Mutant::MetaNotDurable,
        Mutant::MetaFlushSkipped,
        Mutant::CopySkipped,
        Mutant::GraceSkipped,
        Mutant::FarHeldLost,
        Mutant::FarFlushLost,
        Mutant::FarCookie,
        Mutant::FarReplyCut,
        Mutant::FarOldWrites,
        Mutant::FarForced,
        Mutant::FarEarly,
        Mutant::FarSilence,
    ];

    /// The layer that has the bug; empty for all layers, `None` for a bug that is in no layer.
    fn layer(self) -> Option<&'static str> {
        match self {
            Mutant::StripeSwapped => Some("stripe"),
            Mutant::LinearOff | Mutant::HalfTwice | Mutant::ReadsZero => Some("linear"),
            Mutant::MirrorOneLeg => Some("fan"),
            Mutant::LogLost
            | Mutant::StateLost
            | Mutant::MetaNotDurable
            | Mutant::MetaFlushSkipped
            | Mutant::CopySkipped
            | Mutant::GraceSkipped => Some("mirror"),
            Mutant::FlushOneLeg
            | Mutant::ZeroesDropped
            | Mutant::CacheHidden
            | Mutant::ZeroesOffered => Some(""),
            _ => None,
        }
    }
}

/// A layer with a bug.
pub(crate) struct Bent {
    inner: Box<dyn Layer>,
    bug: Mutant,
    below: Vec<Limits>,
}

impl Bent {
    /// The layer, with the bug if it is the one that has it.
    pub(crate) fn wrap(
        inner: Box<dyn Layer>,
        name: &str,
        mutant: Option<Mutant>,
    ) -> Box<dyn Layer> {
        match mutant.and_then(|bug| bug.layer().map(|layer| (bug, layer))) {
            Some((bug, layer)) if layer.is_empty() || layer == name => {
                Box::new(Bent { inner, bug, below: Vec::new() })
            }
            _ => inner,
        }
    }

    fn bend(&self, io: Io, len: u64, port: Port, at: u64) -> Map {
        let to = Map::To { len, port, at };
        let Some(limits) = self.below.get(usize::from(port.0)).copied() else { return to };
        match self.bug {
            Mutant::StripeSwapped if port.0 < 2 && self.below.len() > 1 => {
                let chunk = u64::from(self.below.iter().map(|one| one.block).max().unwrap_or(512));
                let odd = at / chunk % 2 == 1;
                Map::To { len: len.min(chunk), port: Port(port.0 ^ u16::from(odd)), at }
            }
            Mutant::LinearOff if at + len + u64::from(limits.block) <= limits.size => {
                Map::To { len, port, at: at + u64::from(limits.block) }
            }
            Mutant::HalfTwice if io.op == Op::Write && at.is_multiple_of(8192) && len > 4096 => {
                Map::To { len: 4096, port, at }
            }
            Mutant::HalfTwice if io.op == Op::Write && at % 8192 == 4096 && len > 4096 => {
                Map::To { len: 4096, port, at: at - 4096 }
            }
            Mutant::ReadsZero if io.op == Op::Read && at / 512 % 64 < 8 => {
                Map::Zero { len: len.min(u64::from(limits.block)) }
            }
            _ => to,
        }
    }
}

impl Layer for Bent {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        self.below = below.limits().to_vec();
        let mut limits = self.inner.open(below)?;
        limits.volatile_cache &= self.bug != Mutant::CacheHidden;
        limits.write_zeroes |= self.bug == Mutant::ZeroesOffered;
        Ok(limits)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        match (self.bug, io.op) {
            (Mutant::ZeroesDropped, Op::WriteZeroes { .. }) => return Ok(Map::Zero { len }),
            (Mutant::MirrorOneLeg, op) if op.changes() => {
                return Ok(Map::To { len, port: Port(0), at });
            }
            _ => {}
        }
        match self.inner.map(io)? {
            Map::To { len, port, at } => Ok(self.bend(io, len, port, at)),
            other => Ok(other),
        }
    }

    fn flush(&self) -> Result<Map, Errno> {
        match (self.bug, self.inner.flush()?) {
            (Mutant::FlushOneLeg, Map::All { len, at }) if !self.below.is_empty() => {
                Ok(Map::To { len, port: Port(0), at })
            }
            (_, answer) => Ok(answer),
        }
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        let inner = self.inner.live()?;
        Some(Arc::new(Twisted { live: inner, twist: self.bug }))
    }
}
