//! Answers for which blocks lie on the scratch device: a bit each, readable from every thread.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use devsplice_core::prelude::*;

/// Most blocks: 32 MiB of bits.
const MOST_BLOCKS: u64 = 1 << 28;

/// The bits. None are set at first.
#[derive(Default)]
pub(super) struct Blocks {
    made: OnceLock<Bits>,
}

struct Bits {
    words: Box<[AtomicU64]>,
    size: u64,
    block: u64,
}

impl Blocks {
    /// Makes room for a device.
    pub(super) fn size_up(&self, size: u64, block: u64) -> Result<()> {
        let count = size / block;
        if count > MOST_BLOCKS {
            let reason = format!("{count} blocks, the most is {MOST_BLOCKS}");
            return Err(Error::invalid("size", reason).next("cut the disk with linear"));
        }
        let words = (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let _ = self.made.set(Bits { words, size, block });
        Ok(())
    }

    fn bits(&self) -> Option<&Bits> {
        self.made.get()
    }

    /// The size of the device, and of a block.
    pub(super) fn geometry(&self) -> (u64, u64) {
        self.bits().map_or((0, 1), |bits| (bits.size, bits.block))
    }

    fn change(&self, at: u64, len: u64, change: impl Fn(&AtomicU64, u64)) {
        let Some(bits) = self.bits() else { return };
        let (mut first, end) = (at / bits.block, (at + len) / bits.block);
        while first < end {
            let (word, bit) = (first / 64, first % 64);
            let count = (64 - bit).min(end - first);
            let mask = (u64::MAX >> (64 - count)) << bit;
            if let Some(word) = usize::try_from(word).ok().and_then(|word| bits.words.get(word)) {
                change(word, mask);
            }
            first += count;
        }
    }

    /// These blocks lie on the scratch device from now on.
    pub(super) fn set(&self, at: u64, len: u64) {
        self.change(at, len, |word, mask| {
            word.fetch_or(mask, SeqCst);
        });
    }

    /// These lie on the disk.
    pub(super) fn clear(&self, at: u64, len: u64) {
        self.change(at, len, |word, mask| {
            word.fetch_and(!mask, SeqCst);
        });
    }

    /// Whether the block at `at` lies on the scratch device, and how many of the `len` bytes from
    /// there on lie where it does.
    pub(super) fn run(&self, at: u64, len: u64) -> (bool, u64) {
        let Some(bits) = self.bits() else { return (false, len) };
        let (first, end) = (at / bits.block, (at + len) / bits.block);
        let word = |block: u64| {
            let word = usize::try_from(block / 64).ok().and_then(|word| bits.words.get(word));
            word.map_or(0, |word| word.load(SeqCst)) >> (block % 64)
        };
        let is_set = word(first) & 1 == 1;
        let mut block = first;
        while block < end {
            let same =
                if is_set { word(block).trailing_ones() } else { word(block).trailing_zeros() };
            let left = 64 - block % 64;
            block += u64::from(same).min(left);
            if u64::from(same) < left {
                break;
            }
        }
        (is_set, (block.min(end) - first) * bits.block)
    }

    /// The next blocks in a row on the scratch device from `at` on and before `end`.
    pub(super) fn next_set(&self, at: u64, end: u64) -> Option<(u64, u64)> {
        let mut at = at;
        while at < end {
            let (is_set, len) = self.run(at, end - at);
            if is_set {
                return Some((at, len));
            }
            at += len;
        }
        None
    }

    /// How many lie on the scratch device.
    pub(super) fn count(&self) -> u64 {
        let words = self.bits().map_or(&[][..], |bits| &bits.words);
        words.iter().map(|word| u64::from(word.load(SeqCst).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_where_a_plain_list_of_blocks_has_them() {
        let blocks = Blocks::default();
        blocks.size_up(300 * 512, 512).unwrap();
        let mut plain = [false; 300];
        let mut number = 7_u64;
        for round in 0..400 {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888);
            let first = usize::try_from((number >> 33) % 300).unwrap();
            let len = 1 + usize::try_from((number >> 20) % 130).unwrap().min(299 - first);
            let (at, bytes) = (first as u64 * 512, len as u64 * 512);
            if round % 2 == 0 {
                blocks.set(at, bytes)
            } else {
                blocks.clear(at, bytes)
            }
            plain[first..first + len].fill(round % 2 == 0);
            assert_eq!(blocks.count(), plain.iter().filter(|bit| **bit).count() as u64);
            for start in [0, 1, 63, 64, 65, 127, 128, 200, 299] {
                let same = plain[start..].iter().take_while(|bit| **bit == plain[start]).count();
                let want = (plain[start], same as u64 * 512);
                let start = start as u64 * 512;
                assert_eq!(blocks.run(start, 300 * 512 - start), want);
                assert_eq!(blocks.run(start, 512), (want.0, 512));
            }
        }
    }
}
