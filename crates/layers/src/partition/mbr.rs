//! Answers for the partition table of a PC's first block, with its chain of logical partitions.
//!
//! Block 0 ends with 55 aa and holds four entries of 16 bytes from byte 446 on: +0 boot flag (0 or
//! 80), +4 type, +8 first block, +12 count, both 32-bit little-endian. An entry of type 5, f or 85
//! is a container: at its first block begins a chain of tables, each with one partition, relative
//! to that table, and one link, relative to the container. Those partitions are 5, 6 and so on.
//!
//! What counts as a partition, and so has a number, is as in Linux (block/partitions/msdos.c, 7.3):
//! every entry with a count that is no container, whatever its type, 0 among them; in a chained
//! table the third and fourth entry only if they lie in what the table was given and in the
//! container, as there may be garbage; of several links the first; containers one after another.

use std::collections::HashSet;

use devsplice_core::prelude::*;

use super::{Part, number, read};

/// Most tables in the chain of logical partitions.
const MAX_CHAIN: usize = 128;

/// One of the four entries of a table.
pub(super) struct Entry {
    kind: u8,
    first: u64,
    count: u64,
}

impl Entry {
    fn is_container(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85) && self.count > 0
    }

    fn is_partition(&self) -> bool {
        !matches!(self.kind, 0x05 | 0x0f | 0x85) && self.count > 0
    }

    /// The first block behind it, counted as its first one is. Two 32-bit numbers.
    fn end(&self) -> u64 {
        self.first + self.count
    }
}

/// The entries of a device's first table.
pub(super) fn entries(block: &[u8]) -> Result<Vec<Entry>> {
    // A boot sector of a file system ends with 55 aa too, but has code where the flags are.
    let flags = block.get(446..510).unwrap_or(&[]).chunks(16).map(|entry| entry[0]);
    let none = || {
        Error::invalid("partition", "no partition table below")
            .next("`blkid -p` or `file -s` say what is there")
    };
    if flags.into_iter().any(|flag| flag & 0x7f != 0) {
        return Err(none());
    }
    table(block).ok_or_else(none)
}

/// The entries of a table, if this is one.
fn table(block: &[u8]) -> Option<Vec<Entry>> {
    let entry = |bytes: &[u8]| Entry {
        kind: bytes[4],
        first: number::<4>(bytes, 8),
        count: number::<4>(bytes, 12),
    };
    let is_table = number::<2>(block, 510) == 0xaa55;
    is_table.then(|| block.get(446..510).unwrap_or(&[]).chunks(16).map(entry).collect())
}

/// Whether the table is there only to keep old tools off a GPT.
pub(super) fn protects_gpt(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| entry.kind == 0xee)
}

/// How many sectors a disk needs for what its first table says.
pub(super) fn reach(entries: &[Entry]) -> u64 {
    entries.iter().filter(|entry| entry.count > 0).map(Entry::end).max().unwrap_or(0)
}

/// The partitions of a device whose first sector is `first`.
pub(super) fn read_parts(
    below: &mut dyn Lower,
    disk: &Limits,
    first: &[u8],
    entries: &[Entry],
) -> Result<Vec<Part>> {
    let signature = number::<4>(first, 440);
    let part = |place: u64, at: u64, count: u64| {
        let part = Part::new(disk, place, at, count)?;
        Some(Part { uuid: format!("{signature:08x}-{place:02x}"), ..part })
    };
    let mut parts = Vec::new();
    for (place, entry) in (1..).zip(entries).filter(|(_, entry)| entry.is_partition()) {
        parts.extend(part(place, entry.first, entry.count));
    }
    let mut places = 5..;
    for container in entries.iter().filter(|entry| entry.is_container()) {
        let logical = logical(below, disk, container)?;
        let numbered = places.by_ref().take(logical.len()).zip(logical);
        parts.extend(numbered.filter_map(|(place, (at, count))| part(place, at, count)));
    }
    Ok(parts)
}

/// First block and count of each logical partition in the chain of a container.
fn logical(below: &mut dyn Lower, disk: &Limits, container: &Entry) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    // Where a table lies, and how many blocks it was given.
    let mut next = Some((container.first, container.count));
    let mut block = vec![0; disk.block as usize];
    while let Some((at, room)) = next {
        let chain = || format!("logical partition table in block {at}");
        if !seen.insert(at) {
            return Err(Error::invalid(chain(), "the chain comes back to it"));
        }
        if seen.len() > MAX_CHAIN {
            return Err(Error::invalid(chain(), format!("more than {MAX_CHAIN} in the chain")));
        }
        let Some(place) = Part::new(disk, 0, at, 1) else {
            return Err(Error::invalid(chain(), "lies behind the end of the device"));
        };
        read(below, place.at, &mut block)?;
        let Some(entries) = table(&block) else {
            return Err(Error::invalid(chain(), "is none: it does not end with 55 aa"));
        };
        let is_meant = |slot: usize, entry: &Entry| {
            let is_inside = entry.end() <= room && at + entry.end() <= container.end();
            entry.is_partition() && (slot < 2 || (is_inside && at >= container.first))
        };
        let inside = entries.iter().enumerate().filter(|(slot, entry)| is_meant(*slot, entry));
        // Two numbers of 32 and 33 bits do not overflow 64.
        found.extend(inside.map(|(_, entry)| (at + entry.first, entry.count)));
        let link = entries.iter().find(|entry| entry.is_container());
        next = link.map(|link| (container.first + link.first, link.count));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::DRIVER;
    use super::*;
    use crate::testing::{disk, disk_4k, open_over};

    /// Writes a table of (slot, type, first, count) into a block of an image.
    fn table(image: &mut Vec<u8>, at: usize, entries: &[(usize, u8, u32, u32)]) {
        image.resize(image.len().max(at + 512), 0);
        for (slot, kind, first, count) in entries {
            let entry = at + 446 + 16 * slot;
            image[entry + 4] = *kind;
            image[entry + 8..entry + 12].copy_from_slice(&first.to_le_bytes());
            image[entry + 12..entry + 16].copy_from_slice(&count.to_le_bytes());
        }
        image[at + 510..at + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    /// Where a partition lies, or the message.
    fn find(image: &[u8], limits: Limits, number: u64) -> Result<(u64, u64), String> {
        let keys = match limits.block {
            512 => format!("number={number}"),
            block => format!("number={number} sector={block}"),
        };
        let (layer, limits) =
            open_over(&DRIVER, &keys, &[limits], image).map_err(|error| error.to_string())?;
        match layer.map(Io::new(Op::Read, 0, 512)) {
            Ok(Map::To { at, .. }) => Ok((at, limits.size)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn primary_and_logical_partitions_are_found() {
        let mut image = Vec::new();
        table(&mut image, 0, &[(0, 0x83, 8, 8), (2, 0x0f, 100, 400), (3, 0x83, 900, 200)]);
        table(&mut image, 100 * 512, &[(0, 0x83, 1, 9), (1, 0x05, 50, 50)]);
        table(&mut image, 150 * 512, &[(0, 0x82, 2, 10)]);
        let at = |number| find(&image, disk(1000 * 512), number);
        assert_eq!(at(1), Ok((8 * 512, 8 * 512)));
        assert_eq!(at(5), Ok((101 * 512, 9 * 512)));
        assert_eq!(at(6), Ok((152 * 512, 10 * 512)));
        // The second slot is empty, the third a container, the fourth leaves the device.
        for missing in [0, 2, 3, 4, 7, u64::MAX] {
            let text = at(missing).unwrap_err();
            assert!(text.contains("there are: 1 (4k, 00000000-01), 5 (4608, 0000"), "{text}");
        }
    }

    #[test]
    fn logical_partitions_have_the_numbers_that_the_kernel_gives_them() {
        let mut image = Vec::new();
        // Two containers; a primary entry of type 0 with a size, which is one, and one without.
        let primary =
            [(0, 0x00, 8, 8), (1, 0x0f, 100, 300), (2, 0x05, 500, 100), (3, 0x83, 900, 0)];
        table(&mut image, 0, &primary);
        // The third entry leaves what the table was given, the fourth lies in it.
        let first = [(0, 0x00, 1, 9), (1, 0x85, 50, 50), (2, 0x83, 90, 300), (3, 0x83, 20, 5)];
        table(&mut image, 100 * 512, &first);
        // Garbage, boot flags among it, beyond what the table was given, though in the container;
        // the second link, which is not followed.
        let second = [(0, 0x05, 200, 20), (1, 0x05, 250, 20), (2, 0x83, 10, 41), (3, 0x83, 10, 40)];
        table(&mut image, 150 * 512, &second);
        image[150 * 512 + 446 + 32] = 0x7c;
        table(&mut image, 300 * 512, &[(0, 0x83, 2, 10), (1, 0x83, 12, 0), (2, 0x83, 1, 21)]);
        table(&mut image, 350 * 512, &[(0, 0x83, 3, 10)]);
        table(&mut image, 500 * 512, &[(0, 0x83, 4, 10), (1, 0x83, 20, 600)]);
        let at = |number| find(&image, disk(1000 * 512), number).ok();
        let place = |first: u64, count: u64| Some((first * 512, count * 512));
        assert_eq!(at(1), place(8, 8));
        assert_eq!([at(2), at(3), at(4)], [None; 3]);
        let logical = [place(101, 9), place(120, 5), place(160, 40), place(302, 10)];
        assert_eq!([at(5), at(6), at(7), at(8)], logical);
        // The one that leaves the device has its number, too.
        assert_eq!([at(9), at(10), at(11)], [place(504, 10), None, None]);
        table(&mut image, 500 * 512, &[(0, 0x83, 4, 600), (1, 0x83, 20, 10)]);
        let at = |number| find(&image, disk(1000 * 512), number).ok();
        assert_eq!([at(9), at(10), at(11)], [None, place(520, 10), None]);
    }

    #[test]
    fn block_numbers_count_logical_blocks() {
        let mut image = Vec::new();
        table(&mut image, 0, &[(0, 0x83, 2, 3)]);
        assert_eq!(find(&image, disk_4k(1 << 20), 1), Ok((8192, 12_288)));
    }

    #[test]
    fn a_chain_that_turns_back_or_leaves_or_breaks_off_is_an_error() {
        let mut image = Vec::new();
        table(&mut image, 0, &[(0, 0x05, 10, 90)]);
        let refused = |image: &[u8]| find(image, disk(100 * 512), 5).unwrap_err();
        assert!(refused(&image).contains("block 10: is none: it does not end with 55 aa"));
        table(&mut image, 10 * 512, &[(0, 0x83, 1, 1), (1, 0x05, 20, 10)]);
        table(&mut image, 30 * 512, &[(0, 0x83, 1, 1), (1, 0x05, 0, 10)]);
        let loops = refused(&image);
        assert!(loops.contains("table in block 10: the chain comes back"), "{loops}");
        table(&mut image, 30 * 512, &[(1, 0x05, u32::MAX, 10)]);
        assert!(refused(&image).contains("lies behind the end of the device"));
    }

    #[test]
    fn a_chain_without_end_is_an_error() {
        let mut image = Vec::new();
        table(&mut image, 0, &[(0, 0x05, 1, 500)]);
        for link in 1..=200 {
            table(&mut image, link * 512, &[(0, 0x83, 1, 1), (1, 0x05, link as u32, 1)]);
        }
        let text = find(&image, disk(500 * 512), 5).unwrap_err();
        assert!(text.contains("more than 128 in the chain"), "{text}");
    }

    #[test]
    fn a_boot_sector_of_a_file_system_is_no_table() {
        let mut image = Vec::new();
        table(&mut image, 0, &[(0, 0x83, 8, 8)]);
        image[446] = 0x12;
        assert!(find(&image, disk(1 << 20), 1).unwrap_err().contains("no partition table"));
    }
}
