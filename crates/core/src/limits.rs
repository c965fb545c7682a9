//! Answers for what a device can do, folded upward through a stack as device-mapper folds io hints.

use crate::error::{Error, Result};

/// The smallest logical block, and the unit of all sizes and offsets: a sector.
pub const SECTOR: u32 = 512;
/// The largest logical block that every supported kernel takes: one page.
pub const MAX_BLOCK: u32 = 4096;

/// What memory a device can transfer to and from without a bounce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dma {
    /// Alignment of each segment's address, bytes, a power of two.
    pub align: u32,
    /// Gaps are allowed only where the address is a multiple of this; 0 for anywhere.
    pub virt_boundary: u32,
}

impl Dma {
    /// Any memory will do.
    pub const ANY: Dma = Dma { align: 1, virt_boundary: 0 };

    /// What satisfies both.
    #[must_use]
    pub fn and(self, other: Dma) -> Dma {
        Dma {
            align: self.align.max(other.align),
            virt_boundary: self.virt_boundary.max(other.virt_boundary),
        }
    }
}

/// What a device is and can do. All sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size; a multiple of `block`.
    pub size: u64,
    /// Logical block: every request is aligned to it. 512 to 4096, a power of two.
    pub block: u32,
    /// Physical block: smallest write that needs no read. A power of two, at least `block`.
    pub physical: u32,
    /// Preferred smallest request; 0 for no preference.
    pub io_min: u32,
    /// Preferred request; 0 for no preference.
    pub io_opt: u32,
    /// Requests that cross a multiple of this are better split; 0 for none. A power of two.
    pub chunk: u32,
    /// What memory can be transferred.
    pub dma: Dma,
    /// Granularity of discard; 0 where discard is not supported.
    pub discard: u32,
    /// Whether write-zeroes is supported (natively, or by writing zeros).
    pub write_zeroes: bool,
    /// Whether write-zeroes that may give room back writes nothing, and takes next to no time.
    pub fast_zeroes: bool,
    /// Whether anything that changes data is refused.
    pub read_only: bool,
    /// Whether completed writes may be lost with power until a flush.
    pub volatile_cache: bool,
    /// Whether a single write can be made durable (force unit access).
    pub fua: bool,
    /// Whether seeks cost.
    pub rotational: bool,
    /// Whether the pages of a write must not change while it is under way: it goes to several
    /// places that have to be the same.
    pub stable_writes: bool,
}

impl Limits {
    /// A device of `size` bytes with 512-byte blocks that can do everything (but zeroing at once,
    /// which it has to promise by itself) and loses nothing:
    /// what a device without anything below starts from.
    #[must_use]
    pub const fn ideal(size: u64) -> Limits {
        Limits {
            size,
            block: SECTOR,
            physical: SECTOR,
            io_min: 0,
            io_opt: 0,
            chunk: 0,
            dma: Dma::ANY,
            discard: SECTOR,
            write_zeroes: true,
            fast_zeroes: false,
            read_only: false,
            volatile_cache: false,
            fua: true,
            rotational: false,
            stable_writes: false,
        }
    }

    /// What devices used together can do: the stricter of each limit, of `size` bytes.
    ///
    /// # Errors
    /// If `size` is no multiple of the strictest block.
    pub fn stack(below: &[Limits], size: u64) -> Result<Limits> {
        let mut all = Limits { fast_zeroes: !below.is_empty(), ..Limits::ideal(size) };
        for one in below {
            all.block = all.block.max(one.block);
            all.physical = all.physical.max(one.physical);
            all.io_min = all.io_min.max(one.io_min);
            all.io_opt = all.io_opt.max(one.io_opt);
            // A device that wants no split and one that does: the split still helps the latter.
            all.chunk = if all.chunk == 0 || one.chunk == 0 {
                all.chunk.max(one.chunk)
            } else {
                all.chunk.min(one.chunk)
            };
            all.dma = all.dma.and(one.dma);
            all.discard =
                if all.discard == 0 || one.discard == 0 { 0 } else { all.discard.max(one.discard) };
            all.write_zeroes &= one.write_zeroes;
            all.fast_zeroes &= one.fast_zeroes;
            all.read_only |= one.read_only;
            all.volatile_cache |= one.volatile_cache;
            all.fua &= one.fua;
            all.rotational |= one.rotational;
            all.stable_writes |= one.stable_writes;
        }
        all.physical = all.physical.max(all.block);
        if all.discard != 0 {
            all.discard = all.discard.max(all.block);
        }
        all.checked()
    }

    /// A window of this device: `size` bytes (or all that is left) from `offset`.
    ///
    /// # Errors
    /// If the window leaves the device or is not aligned to its block.
    pub fn window(&self, offset: u64, size: Option<u64>) -> Result<Limits> {
        let beyond = || {
            Error::invalid(
                "window",
                format!(
                    "offset {offset}, size {} leaves the {}-byte device below",
                    size.map_or("rest".to_owned(), |size| size.to_string()),
                    self.size
                ),
            )
        };
        let left = self.size.checked_sub(offset).ok_or_else(beyond)?;
        let size = size.unwrap_or(left);
        if size > left || size == 0 {
            return Err(beyond());
        }
        self.aligned("offset", offset)?;
        let mut limits = Limits::stack(&[*self], size)?;
        if limits.chunk != 0 && !offset.is_multiple_of(u64::from(limits.chunk)) {
            limits.chunk = 0;
        }
        Ok(limits)
    }

    /// Checks that a byte position or length is a multiple of the block.
    ///
    /// # Errors
    /// Names `what`, the value and the block.
    pub fn aligned(&self, what: &str, bytes: u64) -> Result<()> {
        if bytes.is_multiple_of(u64::from(self.block)) {
            return Ok(());
        }
        let near = bytes - bytes % u64::from(self.block);
        Err(Error::invalid(
            what,
            format!("{bytes} is no multiple of the {}-byte block", self.block),
        )
        .next(format!("{near} is")))
    }

    /// Checks the rules that every consumer relies on.
    ///
    /// # Errors
    /// Names the rule that is broken.
    pub fn checked(self) -> Result<Limits> {
        if !self.block.is_power_of_two() || !(SECTOR..=MAX_BLOCK).contains(&self.block) {
            let reason = format!("{} is not 512, 1024, 2048 or 4096", self.block);
            return Err(Error::invalid("block", reason));
        }
        if self.size == 0 {
            return Err(Error::invalid("size", "0 bytes are no device"));
        }
        self.aligned("size", self.size)?;
        // loff_t, in which the kernel counts, is signed.
        if self.size > i64::MAX.cast_unsigned() {
            return Err(Error::invalid("size", format!("{} bytes are beyond 2^63", self.size)));
        }
        if !self.physical.is_power_of_two() || self.physical < self.block {
            let reason = format!("{} is no power of two from the block up", self.physical);
            return Err(Error::invalid("physical block", reason));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacking_takes_the_stricter_of_each() {
        let a = Limits { block: 4096, physical: 4096, fua: false, ..Limits::ideal(1 << 20) };
        let b = Limits { volatile_cache: true, discard: 0, ..Limits::ideal(1 << 20) };
        let both = Limits::stack(&[a, b], 2 << 20).unwrap();
        assert_eq!((both.block, both.physical, both.size), (4096, 4096, 2 << 20));
        assert!(!both.fua && both.volatile_cache && both.discard == 0 && !both.read_only);
    }

    #[test]
    fn a_window_stays_inside_and_aligned() {
        let disk = Limits { block: 4096, physical: 4096, ..Limits::ideal(1 << 20) };
        assert_eq!(disk.window(4096, None).unwrap().size, (1 << 20) - 4096);
        for (offset, size) in [
            (512, None),
            (0, Some(2 << 20)),
            (1 << 20, None),
            (2 << 20, None),
            (0, Some(0)),
            (4096, Some(512)),
            (u64::MAX, Some(u64::MAX)),
        ] {
            assert!(disk.window(offset, size).is_err(), "{offset} {size:?}");
        }
    }

    #[test]
    fn a_discard_is_never_finer_than_a_block() {
        let a = Limits { block: 4096, physical: 4096, ..Limits::ideal(1 << 20) };
        assert_eq!(Limits::stack(&[a, Limits::ideal(1 << 20)], 2 << 20).unwrap().discard, 4096);
    }

    #[test]
    fn a_size_that_the_kernel_cannot_count_is_refused() {
        assert!(Limits::ideal(1 << 63).checked().is_err());
        assert!(Limits::ideal((1 << 63) - 512).checked().is_ok());
    }

    #[test]
    fn a_size_off_the_block_is_refused_with_the_nearest_that_works() {
        let text = Limits::ideal(1000).checked().unwrap_err().to_string();
        assert_eq!(text, "size: 1000 is no multiple of the 512-byte block; 512 is");
    }
}
