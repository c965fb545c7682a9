//! Answers for a device all of whose changes are on record: `log(disk, logdev)`, in the format of
//! Linux's dm-log-writes (docs/formats/log-writes.md), so that others' tools replay it.
//!
//! A request gets its place in the log when it is mapped, and its data goes to both devices with
//! the same pages. The record of what went where is in memory until a flush, a mark or a clean end
//! writes it. Equal requests get different places.

use std::sync::Arc;

use devsplice_core::prelude::*;

mod format;
mod live;

use live::{Log, Taken};

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "log",
    about: "records every change on a second device, as dm-log-writes does",
    below: Arity::Many,
    keys: &[
        Key::optional("on-full", Kind::Text, "error (ENOSPC, default) or stop-logging"),
        Key::optional("overwrite", Kind::Switch, "use a log device that holds other data"),
    ],
    make: |args| {
        let goes_on = match args.text("on-full").unwrap_or("error") {
            "error" => false,
            "stop-logging" => true,
            other => {
                let reason = format!("`{other}` is neither error nor stop-logging");
                return Err(Error::invalid("log: on-full", reason));
            }
        };
        let overwrite = args.switch("overwrite")?.unwrap_or(false);
        Ok(Box::new(Logged { log: Arc::new(Log::new(goes_on)), overwrite }))
    },
};

struct Logged {
    log: Arc<Log>,
    overwrite: bool,
}

impl Layer for Logged {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let &[disk, log] = below.limits() else {
            let reason = format!("{} given, log lies over two", below.limits().len());
            return Err(Error::invalid("lower devices", reason));
        };
        if log.read_only {
            return Err(Error::invalid("log device", "it is read-only, and the record goes there"));
        }
        // A discard is recorded without being carried out on the log.
        let log_limits = Limits { discard: disk.discard, ..log };
        let limits = Limits::stack(&[disk, log_limits], disk.size)?;
        let mut first = vec![0; limits.block as usize];
        below
            .read(Port(1), 0, &mut first)
            .map_err(|errno| Error::invalid("log device", format!("cannot be read: {errno}")))?;
        if !self.overwrite && !format::is_log(&first) && first.iter().any(|byte| *byte != 0) {
            return Err(Error::new(ErrorKind::Busy, "log device", "holds something else")
                .next("overwrite=on if that may be lost"));
        }
        self.log.begin(u64::from(limits.block), log.size);
        // The format knows no write-zeroes; the kernel writes zeros then.
        Ok(Limits { write_zeroes: false, volatile_cache: true, ..limits })
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        let plain = Map::To { len, port: Port(0), at };
        if !io.op.changes() {
            return Ok(plain);
        }
        match self.log.take(&io) {
            Taken::Place(log_at) if io.op == Op::Write => {
                Ok(Map::Both { len, first: (Port(0), at), second: (Port(1), log_at) })
            }
            Taken::Place(_) | Taken::Off => Ok(plain),
            Taken::Wait => Ok(Map::Miss),
            Taken::Never(errno) => Err(errno),
        }
    }

    fn flush(&self) -> Result<Map, Errno> {
        self.log.flush()
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        Some(self.log.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{disk, disk_4k, open, open_over, refusal, to};

    #[test]
    fn nothing_is_written_before_the_log_has_begun_and_reads_pass() {
        let (log, limits) = open(&DRIVER, "", &[disk(1 << 20), disk_4k(1 << 24)]).unwrap();
        assert_eq!((limits.block, limits.size), (4096, 1 << 20));
        assert!(limits.volatile_cache && !limits.write_zeroes && limits.discard > 0);
        assert_eq!(log.map(Io::new(Op::Write, 0, 4096)), Ok(Map::Miss));
        assert_eq!(log.map(Io::new(Op::Read, 0, 4096)), to(0, 0, 4096));
        assert_eq!(log.flush(), Ok(Map::Miss));
    }

    #[test]
    fn a_log_device_with_other_data_is_not_overwritten_unasked() {
        let below = [disk(1 << 20), disk(1 << 20)];
        let other = open_over(&DRIVER, "", &below, b"precious").err().unwrap().to_string();
        assert!(other.contains("holds something else"), "{other}");
        assert!(open_over(&DRIVER, "overwrite=on", &below, b"precious").is_ok());
        assert!(open_over(&DRIVER, "", &below, &format::super_block(0, 512)).is_ok());
    }

    #[test]
    fn what_cannot_be_a_log_is_refused() {
        assert!(refusal(&DRIVER, "", &[disk(512)]).contains("lies over two"));
        let locked = Limits { read_only: true, ..disk(1 << 20) };
        assert!(refusal(&DRIVER, "", &[disk(1 << 20), locked]).contains("it is read-only"));
        let text = refusal(&DRIVER, "on-full=wrap", &[disk(512), disk(512)]);
        assert!(text.contains("neither error nor stop-logging"), "{text}");
    }
}
