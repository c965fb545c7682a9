//! Answers for what the kernel is told about a disk: limits as `struct ublk_params`.

use devsplice_core::Limits;
use devsplice_core::zones::Shape;

use super::Device;
use super::uapi::{
    ATTR_FUA, ATTR_READ_ONLY, ATTR_ROTATIONAL, ATTR_VOLATILE_CACHE, PARAM_BASIC, PARAM_DISCARD,
    PARAM_DMA_ALIGN, PARAM_ZONED, Params,
};

/// Most bytes of one discard or write-zeroes. Bounds how long routing one can take.
const MAX_ZERO_BYTES: u64 = 1 << 30;
const PAGE: u32 = 4096;
/// What users of a disk have to know that was not of several places before.
const MOUNTED: &str = "a file system that was mounted before may change pages while they are \
                       written, and legs come to differ: mount it anew";

/// The parameters of a disk whose requests are at most `max_io` bytes. `sees_memory` is whether the
/// client's own memory reaches the backend, so that its alignment matters.
pub(crate) fn params(limits: &Limits, read_only: bool, max_io: u32, sees_memory: bool) -> Params {
    let mut params = Params {
        types: PARAM_BASIC,
        attrs: attrs(limits, read_only),
        logical_bs_shift: shift(limits.block),
        physical_bs_shift: shift(limits.physical),
        io_min_shift: shift(limits.io_min.max(limits.physical)),
        io_opt_shift: shift(limits.io_opt.max(limits.physical)),
        max_sectors: max_io / 512,
        dev_sectors: limits.size / 512,
        ..Params::default()
    };
    if limits.discard != 0 && !read_only {
        let most = u32::try_from(MAX_ZERO_BYTES / 512).unwrap_or(u32::MAX);
        params.types |= PARAM_DISCARD;
        params.discard_granularity = limits.discard;
        params.max_discard_sectors = most;
        params.max_discard_segments = 1;
        params.max_write_zeroes_sectors = if limits.write_zeroes { most } else { 0 };
    }
    if sees_memory {
        params.virt_boundary_mask = u64::from(limits.dma.virt_boundary.saturating_sub(1));
        if limits.dma.align > 1 {
            params.types |= PARAM_DMA_ALIGN;
            params.dma_alignment = limits.dma.align.min(PAGE) - 1;
        }
        // How many segments a request may have, and how large, is not passed on. With it the kernel
        // cuts what does not fit before it gets here, and each piece costs a whole request (1 MiB
        // over a device that takes 128 segments: 11 % more instructions). Without it the device
        // below cuts for itself, which io_uring leaves to a worker.
    }
    params
}

fn attrs(limits: &Limits, read_only: bool) -> u32 {
    let mut attrs = 0;
    if read_only {
        attrs |= ATTR_READ_ONLY;
    }
    if limits.rotational {
        attrs |= ATTR_ROTATIONAL;
    }
    // Without a cache below no flush is needed, and with the flag databases would wait for them;
    // with a cache and without the flag none would ever arrive.
    if limits.volatile_cache {
        attrs |= ATTR_VOLATILE_CACHE;
        if limits.fua {
            attrs |= ATTR_FUA;
        }
    }
    attrs
}

/// Tells of zones.
pub(crate) fn zoned(params: &mut Params, shape: &Shape) {
    params.types |= PARAM_ZONED;
    params.chunk_sectors = sectors(shape.zone);
    let most = shape.max_append.min(u64::from(params.max_sectors) * 512);
    params.zoned[..3].copy_from_slice(&[shape.max_open, shape.max_active, sectors(most)]);
}

impl Device {
    /// Has the page cache leave pages alone while they are written, if several places get them one
    /// by one and have to be the same. There is no parameter for it (`BLK_FEAT_STABLE_WRITES`,
    /// include/linux/blkdev.h). `was_used` says that there may be users from before, who looked at
    /// it when they came: a file system when it is mounted (fs/super.c, `setup_bdev_super`).
    ///
    /// The kernel waits for what is in flight first, so the disk has to be served.
    pub(super) fn keep_pages_stable(&mut self, was_used: bool) {
        let wanted = self.crew.served.stack.limits().stable_writes;
        if !wanted || self.made.data_path.copies() > 0 {
            return;
        }
        let file = format!("/sys/block/ublkb{}/queue/stable_writes", self.id());
        if std::fs::read_to_string(&file).is_ok_and(|set| set.trim() == "1") {
            return;
        }
        let warnings = &mut self.crew.warnings;
        match std::fs::write(&file, "1") {
            Err(error) => warnings.push(format!("{file}: {error}; legs may come to differ")),
            Ok(()) if was_used => warnings.push(MOUNTED.to_owned()),
            Ok(()) => (),
        }
    }
}

fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / 512).unwrap_or(u32::MAX)
}

/// The power of two; a size that is none is rounded down, for these are hints.
fn shift(bytes: u32) -> u8 {
    let shift = bytes.max(512).ilog2().min(28);
    u8::try_from(shift).unwrap_or(9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_below_is_advertised_if_and_only_if_it_is_there() {
        let cached = Limits { volatile_cache: true, ..Limits::ideal(1 << 20) };
        assert_eq!(params(&cached, false, 1 << 20, true).attrs, ATTR_VOLATILE_CACHE | ATTR_FUA);
        assert_eq!(params(&Limits::ideal(1 << 20), false, 1 << 20, true).attrs, 0);
    }

    #[test]
    fn memory_alignment_is_passed_on_where_the_clients_memory_goes_below() {
        let mut limits = Limits::ideal(1 << 20);
        limits.dma.align = 512;
        let seen = params(&limits, false, 1 << 20, true);
        assert_eq!((seen.types & PARAM_DMA_ALIGN, seen.dma_alignment), (PARAM_DMA_ALIGN, 511));
        assert_eq!(params(&limits, false, 1 << 20, false).types & PARAM_DMA_ALIGN, 0);
    }

    #[test]
    fn segment_limits_of_a_device_below_cut_no_request_before_it_arrives() {
        let mut limits = Limits::ideal(1 << 20);
        (limits.dma.align, limits.dma.virt_boundary) = (512, 4096);
        let disk = params(&limits, false, 1 << 20, true);
        assert_eq!(disk.types & !(PARAM_BASIC | PARAM_DISCARD | PARAM_DMA_ALIGN), 0);
        assert_eq!((disk.max_segments, disk.max_segment_size), (0, 0));
    }

    #[test]
    fn zones_are_told_in_sectors_and_an_append_is_no_longer_than_a_request() {
        let shape =
            Shape { zone: 4 << 20, count: 3, max_open: 2, max_active: 1, max_append: 1 << 30 };
        let mut disk = params(&Limits::ideal(12 << 20), false, 1 << 20, true);
        zoned(&mut disk, &shape);
        assert_eq!((disk.types & PARAM_ZONED, disk.chunk_sectors), (PARAM_ZONED, 8192));
        assert_eq!(disk.zoned, [2, 1, 2048, 0, 0, 0, 0, 0]);
        zoned(&mut disk, &Shape { max_append: 64 << 10, ..shape });
        assert_eq!(disk.zoned[2], 128);
    }

    #[test]
    fn a_read_only_disk_offers_no_discard() {
        let disk = params(&Limits::ideal(1 << 20), true, 1 << 20, true);
        assert_eq!((disk.types & PARAM_DISCARD, disk.attrs), (0, ATTR_READ_ONLY));
        assert_eq!(disk.dev_sectors, 2048);
    }
}
