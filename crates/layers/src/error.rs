//! Answers for a device with bad places: `error(disk, read=EIO, at=1M, len=4k)`.
//!
//! A request that touches the range fails with its operation's error number; what lies before the
//! range goes down first. Without any error number, reads and writes fail with `EIO`. With `every`
//! only each n-th such request fails, over all operations: that count is the one thing in this
//! crate which makes two equal requests get two answers. A flush has no place, so it always counts.

use std::sync::atomic::{AtomicU64, Ordering};

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "error",
    about: "fails requests that touch a range",
    below: Arity::One,
    keys: &[
        Key::optional("read", Kind::Errno, "what reads fail with"),
        Key::optional("write", Kind::Errno, "what writes fail with"),
        Key::optional("flush", Kind::Errno, "what flushes fail with"),
        Key::optional("discard", Kind::Errno, "what discards fail with"),
        Key::optional("zeroes", Kind::Errno, "what write-zeroes fail with"),
        Key::optional("at", Kind::Size, "where the bad range begins, default 0"),
        Key::optional("len", Kind::Size, "bytes in the bad range, default all from at on"),
        Key::optional("every", Kind::Count, "only each N-th request fails, default 1"),
    ],
    make,
};

fn make(args: &Args) -> Result<Box<dyn Layer>> {
    let mut with = [None; 5];
    for (with, key) in with.iter_mut().zip(["read", "write", "flush", "discard", "zeroes"]) {
        *with = args.errno(key)?;
    }
    if with.iter().all(Option::is_none) {
        (with[0], with[1]) = (Some(Errno::EIO), Some(Errno::EIO));
    }
    let every = args.count("every")?.unwrap_or(1);
    if every == 0 {
        return Err(Error::invalid("error: every", "0 would fail nothing").next("1 fails all"));
    }
    let (at, len) = (args.size("at")?.unwrap_or(0), args.size("len")?);
    Ok(Box::new(Bad { with, at, len, end: 0, every, seen: AtomicU64::new(0) }))
}

struct Bad {
    /// By operation, in the order of [`Bad::errno`].
    with: [Option<Errno>; 5],
    at: u64,
    len: Option<u64>,
    end: u64,
    every: u64,
    seen: AtomicU64,
}

impl Bad {
    fn errno(&self, op: Op) -> Option<Errno> {
        self.with[match op {
            Op::Read => 0,
            Op::Write => 1,
            Op::Flush => 2,
            Op::Discard => 3,
            Op::WriteZeroes { .. } | Op::Reset | Op::Finish => 4,
        }]
    }

    /// Where a request goes, if it does not fail; whether it does is asked if it touches the range.
    fn answer(&self, io: Io, fails: impl FnOnce() -> bool) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        let pass = |len| Ok(Map::To { len, port: Port(0), at });
        match self.errno(io.op) {
            Some(_) if at < self.at => pass(len.min(self.at - at)),
            Some(errno) if at < self.end && fails() => Err(errno),
            _ => pass(len),
        }
    }

    fn is_due(&self) -> bool {
        // Only the count matters, nothing is published with it.
        (self.seen.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(self.every)
    }
}

impl Layer for Bad {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let limits = below.only()?;
        self.end = self.at + limits.window(self.at, self.len)?.size;
        Ok(limits)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        self.answer(io, || self.is_due())
    }

    /// Who asks where bytes lie is not counted: within the range, reading tells.
    fn locate(&self, extent: Extent) -> Result<Map, Errno> {
        self.answer(Io::new(Op::Read, extent.at, extent.len), || true)
    }

    fn flush(&self) -> Result<Map, Errno> {
        match self.errno(Op::Flush) {
            Some(errno) if self.is_due() => Err(errno),
            _ => Ok(Map::All { len: 0, at: 0 }),
        }
    }
}

#[cfg(test)]
mod tests;
