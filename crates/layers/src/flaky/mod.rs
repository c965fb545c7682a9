//! Answers for a device that loses what was not flushed: `flaky(disk, scratch)`, then
//! `tell NAME flaky cut random 7`.
//!
//! What is written lies on the scratch device, at the same place, until a flush copies it to the
//! disk; a bitmap in memory says which blocks do. So a cut (or the end of the process) loses what
//! no flush covered, as a disk with a cache does. A write with FUA goes to the disk itself. After a
//! cut every request fails until `on`. Discards are not offered. Reading a block while it is
//! written, or after such a write has failed, may bring what the scratch device held before.

use std::sync::Arc;

use devsplice_core::prelude::*;

mod blocks;
mod cut;
mod live;

use live::{Flaky, Power};

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "flaky",
    about: "loses or tears on command what was not flushed",
    below: Arity::Many,
    keys: &[
        Key::optional("up", Kind::Duration, "how long all is well, then down for a while, ..."),
        Key::optional("down", Kind::Duration, "how long it is down"),
        Key::optional("while-down", Kind::Text, "error (default), error-writes or drop-writes"),
    ],
    make: |args| {
        let up_ns = args.duration_ns("up")?;
        let down_ns = args.duration_ns("down")?;
        if up_ns.is_some() != down_ns.is_some() {
            return Err(Error::invalid("flaky", "up and down go together"));
        }
        let down = match args.text("while-down").unwrap_or("error") {
            "error" => Power::Off,
            "error-writes" => Power::WritesFail,
            "drop-writes" => Power::WritesVanish,
            other => {
                let reason = format!("`{other}` is not error, error-writes or drop-writes");
                return Err(Error::invalid("flaky: while-down", reason));
            }
        };
        let turns = up_ns.zip(down_ns).map(|(up_ns, down_ns)| (up_ns, down_ns, down));
        Ok(Box::new(Layered(Arc::new(Flaky::new(turns)))))
    },
};

struct Layered(Arc<Flaky>);

impl Layer for Layered {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let [disk, scratch] = below.limits() else {
            let reason = format!("{} given, flaky lies over two", below.limits().len());
            return Err(Error::invalid("lower devices", reason));
        };
        if scratch.size < disk.size {
            let reason = format!("{} bytes, the disk has {}", scratch.size, disk.size);
            return Err(Error::invalid("scratch device", reason).next("make it as large"));
        }
        let limits = Limits::stack(&[*disk, *scratch], disk.size)?;
        self.0.blocks.size_up(limits.size, u64::from(limits.block))?;
        Ok(Limits { discard: 0, volatile_cache: true, ..limits })
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        match self.0.power() {
            Power::Off => return Err(Errno::EIO),
            Power::WritesFail if io.op.changes() => return Err(Errno::EIO),
            Power::WritesVanish if io.op.changes() => return Ok(Map::Zero { len }),
            _ => {}
        }
        let (is_dirty, run) = self.0.blocks.run(at, len);
        if io.op == Op::Read {
            return Ok(Map::To { len: run, port: Port(u16::from(is_dirty)), at });
        }
        if self.0.is_still() {
            return Ok(Map::Miss);
        }
        if io.fua {
            return Ok(if is_dirty { Map::Miss } else { Map::To { len: run, port: Port(0), at } });
        }
        self.0.blocks.set(at, len);
        Ok(Map::To { len, port: Port(1), at })
    }

    fn flush(&self) -> Result<Map, Errno> {
        // What resolves a flush has flushed the disk; nothing else holds a promise. A pass is used
        // up even when the power has gone since, or another flush could take it.
        let has_passed = self.0.passes.take(&Io::new(Op::Flush, 0, 0));
        match self.0.power() {
            Power::Off => Err(Errno::EIO),
            _ if has_passed => Ok(Map::Zero { len: 0 }),
            _ => Ok(Map::Miss),
        }
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        Some(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{answers, disk, open, refusal, to};

    #[test]
    fn what_is_written_lies_on_the_scratch_device_and_is_read_from_there() {
        let (flaky, limits) = open(&DRIVER, "", &[disk(1 << 20), disk(2 << 20)]).unwrap();
        assert_eq!(limits, Limits { volatile_cache: true, discard: 0, ..disk(1 << 20) });
        let read = Io::new(Op::Read, 0, 8192);
        assert_eq!(answers(&*flaky, read), [to(0, 0, 8192)]);
        assert_eq!(flaky.map(Io::new(Op::Write, 1024, 2048)), to(1, 1024, 2048));
        assert_eq!(answers(&*flaky, read), [to(0, 0, 1024), to(1, 1024, 2048), to(0, 3072, 5120)]);
        assert_eq!(flaky.flush(), Ok(Map::Miss));
    }

    #[test]
    fn a_forced_write_goes_to_the_disk_but_not_under_what_lies_on_the_scratch_device() {
        let (flaky, _) = open(&DRIVER, "", &[disk(1 << 20), disk(1 << 20)]).unwrap();
        assert!(flaky.map(Io::new(Op::Write, 4096, 512)).is_ok());
        let forced = |at, len| flaky.map(Io { fua: true, ..Io::new(Op::Write, at, len) });
        assert_eq!(forced(0, 8192), to(0, 0, 4096));
        assert_eq!(forced(4096, 4096), Ok(Map::Miss));
    }

    #[test]
    fn a_scratch_device_that_is_too_small_and_half_a_rhythm_are_refused() {
        assert!(refusal(&DRIVER, "", &[disk(1024), disk(512)]).contains("the disk has 1024"));
        assert!(refusal(&DRIVER, "", &[disk(1024)]).contains("lies over two"));
        assert!(refusal(&DRIVER, "up=1s", &[disk(512), disk(512)]).contains("go together"));
        let text = refusal(&DRIVER, "while-down=burn", &[disk(512), disk(512)]);
        assert!(text.contains("is not error"), "{text}");
    }
}
