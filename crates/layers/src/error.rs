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
        let Extent { at, len } = io.extent;
        let pass = |len| Ok(Map::To { len, port: Port(0), at });
        match self.errno(io.op) {
            Some(_) if at < self.at => pass(len.min(self.at - at)),
            Some(errno) if at < self.end && self.is_due() => Err(errno),
            _ => pass(len),
        }
    }

    fn flush(&self) -> Result<Map, Errno> {
        match self.errno(Op::Flush) {
            Some(errno) if self.is_due() => Err(errno),
            _ => Ok(Map::All { len: 0, at: 0 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{answers, disk, disk_4k, open, refusal, to};

    #[test]
    fn what_touches_the_range_fails_and_what_lies_before_it_goes_down() {
        let (bad, _) = open(&DRIVER, "at=4k len=1k", &[disk(1 << 20)]).unwrap();
        let eio = Err(Errno::EIO);
        for (at, len, want) in [
            (0, 4096, vec![to(0, 0, 4096)]),
            (0, 4608, vec![to(0, 0, 4096), eio]),
            (4608, 8192, vec![eio]),
            (5120, 512, vec![to(0, 5120, 512)]),
            (0, 1 << 20, vec![to(0, 0, 4096), eio]),
        ] {
            assert_eq!(answers(&*bad, Io::new(Op::Read, at, len)), want, "{at} {len}");
            assert_eq!(answers(&*bad, Io::new(Op::Discard, at, len)), [to(0, at, len)]);
        }
        assert_eq!(bad.flush(), Ok(Map::All { len: 0, at: 0 }));
    }

    #[test]
    fn each_operation_fails_with_its_own_number() {
        let keys = "flush=ENOSPC zeroes=EOPNOTSUPP";
        let (bad, _) = open(&DRIVER, keys, &[disk(1 << 20)]).unwrap();
        assert_eq!(bad.flush(), Err(Errno::ENOSPC));
        let zeroes = Op::WriteZeroes { unmap: false };
        assert_eq!(bad.map(Io::new(zeroes, 0, 512)), Err(Errno::EOPNOTSUPP));
        assert_eq!(bad.map(Io::new(Op::Read, 0, 512)), to(0, 0, 512));
    }

    #[test]
    fn every_third_request_fails() {
        let (bad, _) = open(&DRIVER, "every=3 at=512", &[disk(1 << 20)]).unwrap();
        let fails =
            |_| *answers(&*bad, Io::new(Op::Write, 0, 4096)).last().unwrap() != to(0, 512, 3584);
        assert_eq!([0; 6].map(fails), [false, false, true, false, false, true]);
    }

    #[test]
    fn a_range_off_the_device_or_its_blocks_is_refused() {
        assert!(refusal(&DRIVER, "at=1M", &[disk(1 << 20)]).contains("leaves the"));
        assert!(refusal(&DRIVER, "at=512", &[disk_4k(1 << 20)]).contains("no multiple"));
        assert!(refusal(&DRIVER, "every=0", &[disk(512)]).contains("fail nothing"));
        assert!(refusal(&DRIVER, "read=EBAD", &[disk(512)]).contains("no error name"));
    }
}
