//! Answers for what a sector holds: one number each, so that a megabyte is two thousand of them.
//!
//! A short transfer can end in the middle of a sector; only such a sector is kept as bytes.

use std::collections::HashMap;

use crate::rng::mix;

/// Bytes of a sector.
pub(crate) const SECTOR: usize = 512;

/// The content of a sector: zeros, poison, the stamp of a write, or an index of a mixed sector.
pub(crate) type Cell = u64;

/// Reads as zeros.
pub(crate) const ZERO: Cell = 0;
/// What pages hold before a read; nothing on any disk looks like it.
pub(crate) const POISON: Cell = 1;
/// The sector is no single stamp; the other bits say which of the mixed ones it is.
const MIXED: Cell = 1 << 63;

/// What a write puts into a sector: it says who wrote it and where it belongs, so that data in a
/// wrong place is recognised. Write numbers begin at 1.
pub(crate) const fn stamp(seed: u64, write: u32, sector: u64) -> Cell {
    (seed & 0x7fff) << 48 | (write as u64 & 0xff_ffff) << 24 | (sector & 0xff_ffff)
}

/// For messages.
pub(crate) fn show(cell: Cell) -> String {
    match cell {
        ZERO => "zeros".into(),
        POISON => "unfilled".into(),
        _ if is_mixed(cell) => format!("mixed sector {}", cell ^ MIXED),
        _ => format!("write {} of sector {}", cell >> 24 & 0xff_ffff, cell & 0xff_ffff),
    }
}

pub(crate) const fn is_mixed(cell: Cell) -> bool {
    cell & MIXED != 0
}

/// The mixed sectors of a run. They never change, so a cell can be copied like any number.
#[derive(Default)]
pub(crate) struct Mixes {
    sectors: Vec<[u8; SECTOR]>,
    /// Stamps that were shown as bytes, by their first bytes: written back, they are those stamps.
    shown: HashMap<[u8; 16], Cell>,
}

fn start(bytes: &[u8; SECTOR]) -> [u8; 16] {
    bytes[..16].try_into().unwrap_or_default()
}

impl Mixes {
    /// The bytes of a sector.
    pub(crate) fn render(&self, cell: Cell) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        match cell {
            ZERO => {}
            POISON => bytes.fill(0xa5),
            _ if is_mixed(cell) => bytes = self.sectors[(cell ^ MIXED) as usize],
            _ => {
                for (word, eight) in (0..).zip(bytes.chunks_exact_mut(8)) {
                    eight.copy_from_slice(&mix(cell ^ word << 40).to_le_bytes());
                }
            }
        }
        bytes
    }

    /// The bytes of a sector, for somebody who may write them elsewhere.
    pub(crate) fn show(&mut self, cell: Cell) -> [u8; SECTOR] {
        let bytes = self.render(cell);
        self.shown.insert(start(&bytes), cell);
        bytes
    }

    /// The cell of a sector with these bytes.
    pub(crate) fn keep(&mut self, bytes: [u8; SECTOR]) -> Cell {
        if bytes == [0; SECTOR] {
            return ZERO;
        }
        if let Some(known) = self.shown.get(&start(&bytes))
            && self.render(*known) == bytes
        {
            return *known;
        }
        self.sectors.push(bytes);
        MIXED | (self.sectors.len() as u64 - 1)
    }

    /// What a sector that holds `old` holds after its bytes `from..to` were replaced by those that
    /// begin `at` bytes into `source`.
    pub(crate) fn replace(
        &mut self,
        old: Cell,
        (from, to): (usize, usize),
        source: &[Cell],
        at: usize,
    ) -> Cell {
        let first = source[at / SECTOR];
        if to - from == SECTOR && at.is_multiple_of(SECTOR) {
            return first;
        }
        let mut bytes = self.render(old);
        let mut rendered = (at / SECTOR, self.render(first));
        for (offset, byte) in bytes[from..to].iter_mut().enumerate() {
            let place = at + offset;
            if place / SECTOR != rendered.0 {
                rendered = (place / SECTOR, self.render(source[place / SECTOR]));
            }
            *byte = rendered.1[place % SECTOR];
        }
        for whole in [first, old] {
            if bytes == self.render(whole) {
                return whole;
            }
        }
        self.keep(bytes)
    }

    /// Whether each byte of `cell` is one that a sector of `candidates` has in that place.
    pub(crate) fn is_mix_of(&self, cell: Cell, candidates: impl Iterator<Item = Cell>) -> bool {
        let bytes = self.render(cell);
        let mut known = [false; SECTOR];
        for candidate in candidates {
            let other = self.render(candidate);
            for (known, (a, b)) in known.iter_mut().zip(bytes.iter().zip(&other)) {
                *known |= a == b;
            }
        }
        known.iter().all(|known| *known)
    }
}

/// Calls `each` with every sector that `len` bytes at `at` touch: its number, which of its bytes,
/// and how many bytes came before.
pub(crate) fn sectors(at: usize, len: usize, mut each: impl FnMut(usize, (usize, usize), usize)) {
    let mut done = 0;
    while done < len {
        let from = (at + done) % SECTOR;
        let to = SECTOR.min(from + len - done);
        each((at + done) / SECTOR, (from, to), done);
        done += to - from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_written_in_two_parts_is_the_whole_again() {
        let mut mixes = Mixes::default();
        let new = [stamp(1, 2, 3), stamp(1, 2, 4)];
        let half = mixes.replace(ZERO, (0, 200), &new, 0);
        assert!(is_mixed(half) && mixes.is_mix_of(half, [ZERO, new[0]].into_iter()));
        assert!(!mixes.is_mix_of(half, [POISON, new[0]].into_iter()));
        assert_eq!(mixes.replace(half, (200, 512), &new, 200), new[0]);
        assert_eq!(mixes.replace(half, (0, 512), &new, 512), new[1]);
    }

    #[test]
    fn a_transfer_that_is_off_by_some_bytes_is_no_stamp() {
        let mut mixes = Mixes::default();
        let new = [stamp(1, 2, 3), stamp(1, 2, 4)];
        let off = mixes.replace(ZERO, (0, 512), &new, 8);
        assert!(is_mixed(off) && !mixes.is_mix_of(off, new.into_iter()));
    }

    #[test]
    fn the_sectors_of_a_range_tile_it() {
        let mut seen = Vec::new();
        sectors(500, 600, |sector, range, done| seen.push((sector, range, done)));
        assert_eq!(seen, [(0, (500, 512), 0), (1, (0, 512), 12), (2, (0, 76), 524)]);
    }
}
