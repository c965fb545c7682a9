//! Answers for what `null` and `zero` share: a size and a block that come from keys alone.

use devsplice_core::prelude::*;

/// The keys of a device that has nothing below.
pub const KEYS: &[Key] = &[
    Key::required("size", Kind::Size, "bytes"),
    Key::optional("block", Kind::Size, "logical block, 512 to 4096, default 512"),
];

/// The limits that [`KEYS`] ask for.
///
/// # Errors
/// If the block is none that a device can have, or the size is no multiple of it.
pub fn limits(args: &Args) -> Result<Limits> {
    let size = args.size("size")?.unwrap_or(0);
    let block = u32::try_from(args.size("block")?.unwrap_or(512)).unwrap_or(u32::MAX);
    // What has no data has no zeros to write.
    let fast_zeroes = true;
    Limits { block, physical: block, discard: block, fast_zeroes, ..Limits::ideal(size) }.checked()
}

#[cfg(test)]
mod tests {
    use crate::testing::{open, refusal};
    use crate::{null, zero};

    #[test]
    fn the_size_is_needed_and_is_a_multiple_of_the_block() {
        for driver in [null::DRIVER, zero::DRIVER] {
            let limits = open(&driver, "size=1M block=4k", &[]).unwrap().1;
            assert_eq!((limits.size, limits.block, limits.physical), (1 << 20, 4096, 4096));
            assert!(refusal(&driver, "", &[]).contains("key `size` is missing"));
            assert!(refusal(&driver, "size=0", &[]).contains("0 bytes"));
            assert!(refusal(&driver, "size=512 block=4k", &[]).contains("no multiple"));
            assert!(refusal(&driver, "size=1M block=1000", &[]).contains("is not 512"));
            assert!(refusal(&driver, "size=1M block=8G", &[]).contains("is not 512"));
        }
    }
}
