//! Answers for what a write puts into each sector: bytes that say who wrote them and for where.

use std::fmt::Write;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// What a read's memory holds before it is filled.
pub const POISON: u8 = 0xa5;

/// Who wrote a sector: the number of a write, from 1; 0 for zeros.
pub type Stamp = u64;

/// The stamp of zeros.
pub const ZERO: Stamp = 0;

/// Marks a sector of ours, so that a message can tell what it found.
const MARK: u64 = 0x6465_7673_706c_6963;

/// The bytes that write `stamp` puts into the sector at byte `at` of the device. Sixteen of them
/// say both; the others follow from them, so that each byte tells a wrong one.
#[must_use]
pub fn sector(stamp: Stamp, at: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if stamp == ZERO {
        return bytes;
    }
    let words = [MARK, stamp, at];
    for (index, eight) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
        let word = match words.get(usize::try_from(index).unwrap_or(usize::MAX)) {
            Some(word) => *word,
            None => mix(stamp.rotate_left(40) ^ at ^ index << 56),
        };
        eight.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn mix(mut word: u64) -> u64 {
    word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// The bytes of a whole write.
#[must_use]
pub fn fill(stamp: Stamp, at: u64, len: u64) -> Vec<u8> {
    let sectors = (0..len).step_by(SECTOR);
    let mut bytes: Vec<_> = sectors.flat_map(|n| sector(stamp, at.wrapping_add(n))).collect();
    bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    bytes
}

/// What a sector seems to hold, for messages.
#[must_use]
pub fn describe(bytes: &[u8]) -> String {
    let word = |index: usize| {
        let eight = bytes.get(index * 8..index * 8 + 8)?;
        Some(u64::from_le_bytes(eight.try_into().ok()?))
    };
    if bytes.iter().all(|byte| *byte == 0) {
        return "zeros".into();
    }
    if bytes.iter().all(|byte| *byte == POISON) {
        return "memory that nobody filled".into();
    }
    match (word(0), word(1), word(2)) {
        (Some(MARK), Some(stamp), Some(at)) => {
            let whole = sector(stamp, at);
            match whole.iter().zip(bytes).position(|(a, b)| a != b) {
                None => format!("what write {stamp} put at {at}"),
                Some(byte) => format!("what write {stamp} put at {at}, wrong from byte {byte} on"),
            }
        }
        _ => bytes.iter().take(16).fold("bytes".into(), |mut text, byte| {
            let _ = write!(text, " {byte:02x}");
            text
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_writes_and_two_places_differ_in_their_second_half_too() {
        let base = sector(1, 512);
        for other in [sector(2, 512), sector(1, 1024), sector(3, 0)] {
            assert_ne!(base[256..], other[256..]);
            assert_ne!(base[504..], other[504..]);
        }
        assert_eq!(sector(ZERO, 512), [0; SECTOR]);
    }

    #[test]
    fn a_message_tells_what_a_sector_holds() {
        let mut bytes = sector(7, 4096);
        assert_eq!(describe(&bytes), "what write 7 put at 4096");
        bytes[100] ^= 1;
        assert_eq!(describe(&bytes), "what write 7 put at 4096, wrong from byte 100 on");
        assert_eq!(describe(&[0; SECTOR]), "zeros");
        assert_eq!(describe(&[POISON; SECTOR]), "memory that nobody filled");
        assert!(describe(&[1; SECTOR]).starts_with("bytes 01 01"));
    }
}
