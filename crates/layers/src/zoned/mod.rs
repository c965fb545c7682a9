//! Answers for a device of zones, one lower device for each: `zoned(zones:/var/local/zloop/0)`.
//!
//! A lower device that grows as it is written is a zone that is written from its start on; how far
//! it has grown is the zone's write pointer, and nothing else is kept of it: docs/formats/zoned.md.
//! One that has a size is a conventional zone. What zones are open lives in memory (`book`).

mod book;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use devsplice_core::Zones;
use devsplice_core::prelude::*;

use book::{Book, Rules};

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "zoned",
    about: "a zoned device, one lower device for each zone",
    below: Arity::Many,
    keys: &[
        Key::optional("capacity", Kind::Size, "bytes that a zone takes, up to its size"),
        Key::optional("open", Kind::Count, "most zones open at a time, 0 for any number (0)"),
        Key::optional("active", Kind::Count, "most zones neither empty nor full (0: any)"),
        Key::optional("append", Kind::Size, "most bytes of an append (1M)"),
    ],
    make: |args| {
        let count = |key: &str| -> Result<u32> {
            let count = args.count(key)?.unwrap_or(0);
            u32::try_from(count).map_err(|_| Error::invalid(key, format!("{count} zones")))
        };
        Ok(Box::new(Zoned {
            capacity: args.size("capacity")?,
            max_open: count("open")?,
            max_active: count("active")?,
            append: args.size("append")?.unwrap_or(1 << 20),
            shift: 0,
            book: Arc::default(),
        }))
    },
};

/// The size of a zone: so that it fits the 32 bits in which limits count.
const ZONES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 31;

struct Zoned {
    capacity: Option<u64>,
    max_open: u32,
    max_active: u32,
    append: u64,
    shift: u32,
    book: Arc<Book>,
}

impl Zoned {
    /// The rules that hold over these lower devices.
    fn rules(&self, below: &[Limits], block: u32) -> Result<Rules> {
        let zone = below.first().map_or(0, |first| first.size);
        if !zone.is_power_of_two() || !ZONES.contains(&zone) {
            let reason = format!("{zone} bytes are no power of two from 64K to 2G");
            return Err(Error::invalid("zone", reason));
        }
        if let Some(other) = below.iter().find(|other| other.size != zone) {
            let reason = format!("one has {} bytes, the first {zone}", other.size);
            return Err(Error::invalid("zone", reason).next("all are of one size"));
        }
        let capacity = self.capacity.unwrap_or(zone);
        let append = self.append.min(capacity);
        for (key, bytes) in [("capacity", capacity), ("append", append)] {
            if bytes == 0 || bytes > zone || !bytes.is_multiple_of(u64::from(block)) {
                let reason = format!("{bytes} bytes are not 1 to {zone}, in {block}-byte blocks");
                return Err(Error::invalid(key, reason));
            }
        }
        let count = u32::try_from(below.len()).unwrap_or(u32::MAX);
        for (key, most) in [("open", self.max_open), ("active", self.max_active)] {
            if most > count {
                return Err(Error::invalid(key, format!("{most} of {count} zones")));
            }
        }
        let (max_open, max_active) = (self.max_open, self.max_active);
        Ok(Rules { zone, capacity, count, max_open, max_active, append })
    }
}

impl Layer for Zoned {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let limits = below.limits().to_vec();
        let block = limits.iter().map(|one| one.block).max().unwrap_or(512);
        let rules = self.rules(&limits, block)?;
        let mut filled = Vec::new();
        for (number, _) in (0_u16..).zip(&limits) {
            let has = below.filled(Port(number));
            if let Some(bytes) = has
                && (bytes > rules.capacity || !bytes.is_multiple_of(u64::from(block)))
            {
                let reason = format!(
                    "holds {bytes} bytes, which are more than its capacity of {} or no whole \
                     {block}-byte blocks",
                    rules.capacity
                );
                return Err(Error::invalid(format!("zone {number}"), reason));
            }
            filled.push(has);
        }
        self.shift = rules.zone.trailing_zeros();
        self.book = Arc::new(Book::new(rules, &filled));
        let size = rules.zone * u64::from(rules.count);
        let all = Limits::stack(&limits, size)?;
        let chunk = u32::try_from(rules.zone).unwrap_or(0);
        // What is dropped or zeroed in the middle of a zone would have to be written there.
        Ok(Limits { chunk, discard: 0, write_zeroes: false, ..all })
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        let (number, inside) = (at >> self.shift, at & ((1 << self.shift) - 1));
        let len = len.min((1 << self.shift) - inside);
        // A layer has fewer lower devices than that.
        let port = Port(number as u16);
        let here = |len| Ok(Map::To { len, port, at: inside });
        match io.op {
            Op::Read => match self.book.readable(number, inside) {
                0 => Ok(Map::Zero { len }),
                there => here(len.min(there)),
            },
            Op::Write if self.book.may_write(number, inside + len) => here(len),
            Op::Reset | Op::Finish if self.book.is_changing(number) => here(len),
            // Of all zones, those that are empty already.
            Op::Reset | Op::Finish => Ok(Map::Zero { len }),
            _ => Err(Errno::EIO),
        }
    }

    fn needs_flush(&self, port: Port) -> bool {
        self.book.needs_flush(u64::from(port.0))
    }

    fn zones(&self) -> Option<Arc<dyn Zones>> {
        Some(self.book.clone())
    }
}
