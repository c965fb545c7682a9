//! Answers for a device that is slower than it is: `delay(disk, read=1ms, flush=20ms)`.

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "delay",
    about: "makes requests wait before they go down",
    below: Arity::One,
    keys: &[
        Key::optional("read", Kind::Duration, "wait of a read, default none"),
        Key::optional("write", Kind::Duration, "wait of a write, default none"),
        Key::optional("flush", Kind::Duration, "wait of a flush, default none"),
        Key::optional("discard", Kind::Duration, "wait of a discard or write-zeroes, default none"),
    ],
    make: |args| {
        let wait = |key| Ok(args.duration_ns(key)?.unwrap_or(0));
        let (read_ns, write_ns) = (wait("read")?, wait("write")?);
        let (flush_ns, discard_ns) = (wait("flush")?, wait("discard")?);
        Ok(Box::new(Delay { read_ns, write_ns, flush_ns, discard_ns }))
    },
};

struct Delay {
    read_ns: u64,
    write_ns: u64,
    flush_ns: u64,
    discard_ns: u64,
}

impl Layer for Delay {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        below.only()
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let wait_ns = match io.op {
            Op::Read => self.read_ns,
            Op::Write => self.write_ns,
            Op::Flush => self.flush_ns,
            Op::Discard | Op::WriteZeroes { .. } | Op::Reset | Op::Finish => self.discard_ns,
        };
        Ok(Map::After { len: io.extent.len, port: Port(0), at: io.extent.at, wait_ns })
    }

    fn flush(&self) -> Result<Map, Errno> {
        self.map(Io::new(Op::Flush, 0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{disk, open, refusal};

    #[test]
    fn each_operation_waits_its_own_time() {
        let keys = "read=1ms write=2us flush=3ns discard=4s";
        let (delay, limits) = open(&DRIVER, keys, &[disk(1 << 20)]).unwrap();
        assert_eq!(limits, disk(1 << 20));
        for (op, wait_ns) in [
            (Op::Read, 1_000_000),
            (Op::Write, 2_000),
            (Op::Discard, 4_000_000_000),
            (Op::WriteZeroes { unmap: false }, 4_000_000_000),
        ] {
            let want = Map::After { len: 512, port: Port(0), at: 4096, wait_ns };
            assert_eq!(delay.map(Io::new(op, 4096, 512)), Ok(want));
        }
        assert_eq!(delay.flush(), Ok(Map::After { len: 0, port: Port(0), at: 0, wait_ns: 3 }));
    }

    #[test]
    fn a_time_without_a_unit_is_refused() {
        assert!(refusal(&DRIVER, "read=5", &[disk(512)]).contains("`5` is no duration"));
    }
}
