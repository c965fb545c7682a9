//! Answers for whether a stack can go on with a disk that another tool has made: its users must see
//! no difference, but what the disk was told need not be what we would have told it.

use devsplice_core::size::show_size;

use super::uapi::{
    ATTR_FUA, ATTR_READ_ONLY, ATTR_VOLATILE_CACHE, PARAM_DISCARD, PARAM_DMA_ALIGN, PARAM_INTEGRITY,
    PARAM_ZONED, Params,
};

/// What a disk's memory is aligned to unless it was told (`block/blk-settings.c`, 3 is a mask).
const DEFAULT_ALIGN: u32 = 3;

/// Why a stack of which we would say `is` cannot go on with a disk of which `was` was said.
pub(super) fn misfit(was: &Params, is: &Params) -> Option<String> {
    size(was, is)
        .or_else(|| changes(was, is))
        .or_else(|| memory(was, is))
        .or_else(|| kinds(was, is))
}

fn size(was: &Params, is: &Params) -> Option<String> {
    if was.dev_sectors != is.dev_sectors {
        let bytes = |params: &Params| show_size(params.dev_sectors.saturating_mul(512));
        return Some(format!("it has {}, the stack {}", bytes(was), bytes(is)));
    }
    if was.logical_bs_shift < is.logical_bs_shift {
        let block = |params: &Params| show_size(1 << params.logical_bs_shift.min(28));
        return Some(format!("its blocks are {}, the stack's {}", block(was), block(is)));
    }
    if was.max_sectors > is.max_sectors {
        let most = |params: &Params| show_size(u64::from(params.max_sectors) * 512);
        return Some(format!("its requests have up to {}, here {}", most(was), most(is)));
    }
    None
}

/// What its users may do to it, and are promised.
fn changes(was: &Params, is: &Params) -> Option<String> {
    let has = |params: &Params, attr: u32| params.attrs & attr != 0;
    if has(is, ATTR_READ_ONLY) && !has(was, ATTR_READ_ONLY) {
        return Some("it can be written, the stack cannot".to_owned());
    }
    if has(is, ATTR_VOLATILE_CACHE) && !has(was, ATTR_VOLATILE_CACHE) {
        let reason = "it sends no flushes, and what is below has a cache that needs them";
        return Some(reason.to_owned());
    }
    let is_durable = has(is, ATTR_FUA) || !has(is, ATTR_VOLATILE_CACHE);
    if has(was, ATTR_FUA) && !is_durable {
        return Some("it sends writes that must be durable, the stack has none".to_owned());
    }
    let discard = |params: &Params| params.types & PARAM_DISCARD != 0;
    let drops = |params: &Params| discard(params) && params.max_discard_sectors != 0;
    if drops(was) {
        let is_coarser = !was.discard_granularity.is_multiple_of(is.discard_granularity.max(1));
        if !drops(is) || is_coarser {
            return Some("it discards what the stack cannot".to_owned());
        }
    }
    let zeroes = |params: &Params| discard(params) && params.max_write_zeroes_sectors != 0;
    if zeroes(was) && !zeroes(is) {
        return Some("it zeroes what the stack cannot".to_owned());
    }
    None
}

/// What memory its users' data comes in.
fn memory(was: &Params, is: &Params) -> Option<String> {
    let align = |params: &Params| match params.types & PARAM_DMA_ALIGN {
        0 => DEFAULT_ALIGN,
        _ => params.dma_alignment,
    };
    let needs = if is.types & PARAM_DMA_ALIGN == 0 { 0 } else { is.dma_alignment };
    if align(was) < needs {
        let (was, is) = (align(was) + 1, needs + 1);
        return Some(format!("its memory is aligned to {was} bytes, below {is} are needed"));
    }
    if is.virt_boundary_mask & !was.virt_boundary_mask != 0 {
        return Some("its memory may have gaps that what is below does not take".to_owned());
    }
    None
}

/// What else it is.
fn kinds(was: &Params, is: &Params) -> Option<String> {
    if was.types & PARAM_INTEGRITY != 0 {
        return Some("it has integrity data, which a stack does not keep".to_owned());
    }
    let zones = |params: &Params| match params.types & PARAM_ZONED {
        0 => None,
        _ => Some((params.chunk_sectors, params.zoned)),
    };
    (zones(was) != zones(is)).then(|| "its zones are not the stack's".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::uapi::PARAM_BASIC;
    use super::*;

    fn disk() -> Params {
        Params {
            types: PARAM_BASIC | PARAM_DISCARD | PARAM_DMA_ALIGN,
            attrs: ATTR_VOLATILE_CACHE | ATTR_FUA,
            logical_bs_shift: 12,
            physical_bs_shift: 12,
            max_sectors: 2048,
            dev_sectors: 1 << 16,
            discard_granularity: 4096,
            max_discard_sectors: 1 << 20,
            max_discard_segments: 1,
            max_write_zeroes_sectors: 1 << 20,
            dma_alignment: 511,
            ..Params::default()
        }
    }

    #[test]
    fn a_stack_that_can_do_more_than_was_said_fits() {
        let more = Params { logical_bs_shift: 9, discard_granularity: 512, ..disk() };
        assert_eq!(misfit(&disk(), &disk()), None);
        assert_eq!(misfit(&disk(), &more), None);
        let plain = Params { types: PARAM_BASIC, attrs: 0, dma_alignment: 0, ..disk() };
        let narrow = Params { max_sectors: 256, dma_alignment: 4095, chunk_sectors: 8, ..disk() };
        assert_eq!(misfit(&narrow, &disk()), None);
        // No cache below: flushes are welcome and do nothing.
        assert_eq!(misfit(&disk(), &Params { attrs: 0, ..disk() }), None);
        assert_eq!(misfit(&plain, &Params { attrs: 0, dma_alignment: 3, ..disk() }), None);
    }

    #[test]
    fn what_the_disk_relies_on_and_the_stack_does_not_have_is_named() {
        let cases: [(Params, &str); 9] = [
            (Params { dev_sectors: 1 << 15, ..disk() }, "it has 32M, the stack 16M"),
            (Params { logical_bs_shift: 13, ..disk() }, "its blocks are 4k"),
            (Params { max_sectors: 64, ..disk() }, "requests have up to 1M, here 32k"),
            (Params { attrs: ATTR_READ_ONLY | disk().attrs, ..disk() }, "it can be written"),
            (Params { attrs: ATTR_VOLATILE_CACHE, ..disk() }, "must be durable"),
            (Params { discard_granularity: 8192, ..disk() }, "it discards"),
            (Params { max_write_zeroes_sectors: 0, ..disk() }, "it zeroes"),
            (Params { dma_alignment: 4095, ..disk() }, "aligned to 512 bytes, below 4096"),
            (Params { virt_boundary_mask: 4095, ..disk() }, "gaps"),
        ];
        for (is, words) in cases {
            let said = misfit(&disk(), &is).unwrap_or_default();
            assert!(said.contains(words), "{words}: {said}");
        }
        let no_cache = Params { attrs: 0, ..disk() };
        assert!(misfit(&no_cache, &disk()).unwrap().contains("sends no flushes"));
        let loose = Params { types: PARAM_BASIC, ..disk() };
        assert!(misfit(&loose, &disk()).unwrap().contains("aligned to 4 bytes"));
        let zoned = Params { types: disk().types | PARAM_ZONED, ..disk() };
        assert!(misfit(&zoned, &disk()).unwrap().contains("zones"));
        assert!(misfit(&disk(), &zoned).unwrap().contains("zones"));
        let kept = Params { types: disk().types | PARAM_INTEGRITY, ..disk() };
        assert!(misfit(&kept, &disk()).unwrap().contains("integrity"));
    }
}
