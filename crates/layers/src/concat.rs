//! Answers for devices laid one after another: `concat(a, b, c)`. Their sizes may differ.

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "concat",
    about: "devices one after another",
    below: Arity::Many,
    keys: &[],
    make: |_| Ok(Box::new(Concat { starts: Vec::new() })),
};

/// Where each device begins, and behind the last one the end of all.
struct Concat {
    starts: Vec<u64>,
}

impl Layer for Concat {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let legs = below.limits();
        let strictest = legs.iter().map(|leg| leg.block).max().unwrap_or(512);
        let strictest = Limits { block: strictest, ..Limits::ideal(0) };
        let (mut end, mut starts) = (0_u64, vec![0]);
        for (number, leg) in (1..).zip(legs) {
            strictest.aligned(&format!("size of lower device {number}"), leg.size)?;
            end = end
                .checked_add(leg.size)
                .ok_or_else(|| Error::invalid("size", "all devices together do not fit 64 bits"))?;
            starts.push(end);
        }
        let mut limits = Limits::stack(legs, end)?;
        let chunk = u64::from(limits.chunk);
        if chunk != 0 && starts.iter().take(legs.len()).any(|start| start % chunk != 0) {
            limits.chunk = 0;
        }
        self.starts = starts;
        Ok(limits)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        // `starts[0]` is 0, so there is at least one that lies not behind `at`.
        let leg = self.starts.partition_point(|start| *start <= at) - 1;
        let len = len.min(self.starts[leg + 1] - at);
        // A layer has fewer lower devices than that.
        Ok(Map::To { len, port: Port(leg as u16), at: at - self.starts[leg] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{answers, disk, disk_4k, open, refusal, to};

    #[test]
    fn a_request_over_a_seam_is_answered_device_by_device() {
        let legs = [disk(4096), disk(512), disk(8192)];
        let (concat, limits) = open(&DRIVER, "", &legs).unwrap();
        assert_eq!(limits.size, 12_800);
        let all = answers(&*concat, Io::new(Op::Write, 3584, 2048));
        assert_eq!(all, [to(0, 3584, 512), to(1, 0, 512), to(2, 0, 1024)]);
    }

    #[test]
    fn each_byte_of_many_devices_is_found() {
        let legs: Vec<_> = (1..=255).map(|blocks| disk(blocks * 512)).collect();
        let (concat, limits) = open(&DRIVER, "", &legs).unwrap();
        let all = answers(&*concat, Io::new(Op::Read, 0, limits.size));
        let want = (0..255).map(|leg| to(leg, 0, (u64::from(leg) + 1) * 512));
        assert_eq!(all, want.collect::<Vec<_>>());
        assert_eq!(concat.map(Io::new(Op::Read, limits.size - 512, 512)), to(254, 254 * 512, 512));
    }

    #[test]
    fn a_size_off_the_strictest_block_names_the_device() {
        let text = refusal(&DRIVER, "", &[disk_4k(8192), disk(512), disk(4096)]);
        assert!(text.contains("size of lower device 2: 512 is no multiple"), "{text}");
        assert!(refusal(&DRIVER, "", &[]).contains("0 bytes are no device"));
        let huge = disk(u64::MAX - 511);
        assert!(refusal(&DRIVER, "", &[huge, huge]).contains("do not fit 64 bits"));
    }

    #[test]
    fn split_advice_survives_only_where_it_stays_true() {
        let chunked = Limits { chunk: 8192, ..disk(16_384) };
        assert_eq!(open(&DRIVER, "", &[chunked, disk(512)]).unwrap().1.chunk, 8192);
        assert_eq!(open(&DRIVER, "", &[disk(512), chunked]).unwrap().1.chunk, 0);
    }
}
