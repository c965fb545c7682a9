//! Answers for the contract between the router and a layer: each answer is checked, also in release.
//!
//! A broken contract would put data in the wrong place, so it is a panic that names the layer, and
//! the process, built with `panic = "abort"`, takes the device down rather than guess.

use crate::io::Extent;
use crate::limits::Limits;

/// Checks that an answer is for a prefix of what was asked: 1 to `asked` bytes.
///
/// # Panics
/// If it is not; names the layer.
#[inline]
pub fn prefix(layer: &str, asked: u64, answered: u64) {
    assert!(
        (answered != 0) & (answered <= asked),
        "layer {layer} broke its contract: answered {answered} bytes of {asked}"
    );
}

/// Checks that a destination lies within the lower device and on its blocks.
///
/// # Panics
/// If it does not; names the layer.
#[inline]
pub fn destination(layer: &str, extent: Extent, below: &Limits) {
    let block = u64::from(below.block) - 1;
    assert!(
        extent.within(below.size) & ((extent.at | extent.len) & block == 0),
        "layer {layer} broke its contract: sent {extent:?} to a device of {} bytes in {}-byte blocks",
        below.size,
        below.block
    );
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
        destination("x", Extent { at: 512, len: 512 }, &disk);
        assert!(breaks(|| prefix("x", 512, 0)));
        assert!(breaks(|| prefix("x", 512, 513)));
        assert!(breaks(move || destination("x", Extent { at: 4096, len: 512 }, &disk)));
        assert!(breaks(move || destination("x", Extent { at: 1, len: 512 }, &disk)));
        assert!(breaks(move || destination("x", Extent { at: u64::MAX, len: 1 }, &disk)));
    }
}
