//! Answers for devices used in turn, chunk by chunk (RAID 0): `stripe(chunk=64k, a, b)`.
//!
//! Each device gives as much as the smallest has in whole chunks; what is left over stays unused.

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "stripe",
    about: "devices in turn, chunk by chunk (RAID 0)",
    below: Arity::Many,
    keys: &[Key::optional(
        "chunk",
        Kind::Size,
        "bytes in a row on one device, a power of two, default 64k",
    )],
    make: |args| {
        let chunk = args.size("chunk")?.unwrap_or(64 << 10);
        let fits = chunk.is_power_of_two() && chunk <= MAX_CHUNK;
        if !fits {
            let reason = format!("{chunk} is no power of two up to 1G");
            return Err(Error::invalid("stripe: chunk", reason).next("try 64k"));
        }
        Ok(Box::new(Stripe { chunk, shift: chunk.trailing_zeros(), legs: 1 }))
    },
};

/// So that a chunk fits the 32 bits in which limits count.
const MAX_CHUNK: u64 = 1 << 30;

struct Stripe {
    chunk: u64,
    shift: u32,
    legs: u64,
}

impl Layer for Stripe {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let legs = below.limits();
        self.legs = legs.len() as u64;
        let smallest = legs.iter().map(|leg| leg.size).min().unwrap_or(0);
        let whole = smallest & !(self.chunk - 1);
        if whole == 0 {
            let reason = format!("the smallest device has {smallest} bytes, not one whole chunk");
            return Err(Error::invalid("chunk", reason).next("take a smaller chunk"));
        }
        let size = whole
            .checked_mul(self.legs)
            .ok_or_else(|| Error::invalid("size", "all devices together do not fit 64 bits"))?;
        let mut limits = Limits::stack(legs, size)?;
        limits.aligned("chunk", self.chunk)?;
        if self.legs > 1 {
            limits.chunk = u32::try_from(self.chunk).unwrap_or(0);
            limits.io_min = limits.chunk;
            limits.io_opt = u32::try_from(self.chunk * self.legs).unwrap_or(0);
        }
        Ok(limits)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        if self.legs <= 1 {
            return Ok(Map::To { len, port: Port(0), at });
        }
        let inside = at & (self.chunk - 1);
        let (row, leg) = ((at >> self.shift) / self.legs, (at >> self.shift) % self.legs);
        // A layer has fewer lower devices than that.
        let port = Port(leg as u16);
        Ok(Map::To { len: len.min(self.chunk - inside), port, at: (row << self.shift) | inside })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{answers, disk, disk_4k, open, refusal, to};

    #[test]
    fn chunks_take_turns() {
        let (stripe, limits) = open(&DRIVER, "chunk=4k", &[disk(8192), disk(12_800)]).unwrap();
        assert_eq!(limits.size, 16_384);
        let all = answers(&*stripe, Io::new(Op::Write, 2048, 12_288));
        assert_eq!(all, [to(0, 2048, 2048), to(1, 0, 4096), to(0, 4096, 4096), to(1, 4096, 2048)]);
    }

    #[test]
    fn the_chunk_is_offered_as_the_preferred_size() {
        let limits = open(&DRIVER, "", &[disk(1 << 20); 3]).unwrap().1;
        assert_eq!((limits.chunk, limits.io_min, limits.io_opt), (65_536, 65_536, 196_608));
        let large = open(&DRIVER, "chunk=1G", &[disk(1 << 40); 5]).unwrap().1;
        assert_eq!((large.chunk, large.io_opt), (1 << 30, 0));
    }

    #[test]
    fn one_device_is_not_split() {
        let (stripe, limits) = open(&DRIVER, "chunk=4k", &[disk(10_240)]).unwrap();
        assert_eq!((limits.size, limits.chunk), (8192, 0));
        assert_eq!(answers(&*stripe, Io::new(Op::Read, 512, 7680)), [to(0, 512, 7680)]);
    }

    #[test]
    fn a_chunk_that_cannot_work_is_refused() {
        for chunk in ["chunk=3k", "chunk=0", "chunk=2G"] {
            assert!(refusal(&DRIVER, chunk, &[disk(1 << 20)]).contains("no power of two"));
        }
        assert!(refusal(&DRIVER, "chunk=2k", &[disk_4k(1 << 20)]).contains("no multiple"));
        assert!(refusal(&DRIVER, "", &[disk(4096); 2]).contains("not one whole chunk"));
        assert!(refusal(&DRIVER, "", &[]).contains("not one whole chunk"));
        let huge = [disk(1 << 63); 2];
        assert!(refusal(&DRIVER, "", &huge).contains("do not fit 64 bits"));
    }
}
