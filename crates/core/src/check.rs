//! Answers for the contract between the router and a layer: each answer is checked, also in
//! release.
//!
//! A broken contract would put data in the wrong place, so it is a panic that names the layer, and
//! the process, built with `panic = "abort"`, takes the device down rather than guess.

use crate::io::Extent;
use crate::limits::Limits;
use crate::map::Port;

/// Checks that an answer is for a prefix of what was asked: 1 to `asked` bytes.
///
/// # Panics
/// If it is not; names the layer.
#[inline]
pub fn prefix(layer: &str, asked: u64, answered: u64) {
    if answered == 0 || answered > asked {
        no_prefix(layer, asked, answered);
    }
}

/// Checks that a destination lies within the lower device and on its blocks, of which `mask` is
/// the length minus one.
///
/// # Panics
/// If it does not; names the layer.
#[inline]
pub fn destination(layer: &str, extent: Extent, below: &Limits, mask: u64) {
    if !lies_in(extent, below.size, mask) {
        no_destination(layer, extent, below);
    }
}

/// Whether it lies within `size` bytes, and on blocks of which `mask` is the length minus one.
#[inline(always)]
pub(crate) fn lies_in(extent: Extent, size: u64, mask: u64) -> bool {
    let (end, overflows) = extent.at.overflowing_add(extent.len);
    !overflows && end <= size && (extent.at | extent.len) & mask == 0
}

/// Checks that a fan-out to some ports names at least one, and none that is not there.
///
/// # Panics
/// If it does; names the layer.
#[inline]
pub(crate) fn ports(layer: &str, ports: u32, count: usize) {
    let there = u32::try_from((1_u64 << count.min(32)) - 1).unwrap_or(u32::MAX);
    assert!(
        ports != 0 && ports & !there == 0,
        "layer {layer} broke its contract: sent to ports {ports:#b} of {count}"
    );
}

/// Checks that a layer that answers a miss can resolve it.
///
/// # Panics
/// If it cannot; names the layer.
pub(crate) fn may_miss(layer: &str, is_live: bool) {
    assert!(is_live, "layer {layer} broke its contract: a miss, but nothing to resolve it");
}

/// Checks that a layer that wants to be told of latencies has a probe.
///
/// # Panics
/// If it has none.
pub(crate) fn may_watch(layer: &str, probes: u8) {
    assert!(probes != 0, "layer {layer} broke its contract: it watches without a probe");
}

/// The panic for a flush that is sent to places.
#[cold]
pub(crate) fn no_flush(layer: &str) -> ! {
    panic!("layer {layer} broke its contract: sent a flush to places, not to devices")
}

// The messages are made far from the checks, so that the path without an error stays short.

#[cold]
#[inline(never)]
fn no_prefix(layer: &str, asked: u64, answered: u64) -> ! {
    panic!("layer {layer} broke its contract: answered {answered} bytes of {asked}")
}

/// The panic for an answer that names a port which the layer does not have.
#[cold]
#[inline(never)]
pub(crate) fn no_port(layer: &str, port: Port) -> ! {
    panic!("layer {layer} broke its contract: it has no port {}", port.0)
}

#[cold]
#[inline(never)]
pub(crate) fn no_destination(layer: &str, extent: Extent, below: &Limits) -> ! {
    panic!(
        "layer {layer} broke its contract: sent {extent:?} to {} bytes in {}-byte blocks",
        below.size, below.block
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaks(f: impl FnOnce() + std::panic::UnwindSafe) -> bool {
        std::panic::catch_unwind(f).is_err()
    }

    #[test]
    fn answers_outside_the_contract_panic() {
        let disk = Limits::ideal(4096);
        prefix("x", 4096, 512);
        destination("x", Extent { at: 512, len: 512 }, &disk, 511);
        assert!(breaks(|| prefix("x", 512, 0)));
        assert!(breaks(|| prefix("x", 512, 513)));
        assert!(breaks(move || destination("x", Extent { at: 4096, len: 512 }, &disk, 511)));
        assert!(breaks(move || destination("x", Extent { at: 1, len: 512 }, &disk, 511)));
        assert!(breaks(move || destination("x", Extent { at: u64::MAX, len: 1 }, &disk, 511)));
    }
}
