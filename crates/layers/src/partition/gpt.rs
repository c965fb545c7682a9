//! Answers for the GUID partition table (UEFI 2.10, chapter 5), from its first or its backup copy.
//!
//! A header lies in block 1, its backup in the last block. Little-endian: +0 "EFI PART", +8
//! revision, +12 header size, +16 CRC of the header with this field 0, +24 own block, +40 first and
//! +48 last usable block, +72 first block of the entries, +80 their count, +84 the size of one, +88
//! CRC of all of them. An entry: +0 type (0: unused), +16 GUID, +32 first and +40 last block, +56
//! name in UTF-16. A copy counts only if both CRCs are right and every number fits the device.

use devsplice_core::prelude::*;

use super::{Part, number, read};

/// Most bytes of entries: 128 entries of 128 bytes are usual, this is 64 times that.
const MAX_ENTRIES: u64 = 1 << 20;

/// The partitions of a device whose first block says that it has such a table, which counts in
/// `disk.block`.
pub(super) fn read_parts(below: &mut dyn Lower, disk: &Limits) -> Result<Vec<Part>> {
    let Some(last) = (disk.size / u64::from(disk.block)).checked_sub(1) else {
        let reason = format!("the disk is smaller than a sector of {} bytes", disk.block);
        return Err(Error::invalid("GPT", reason));
    };
    let first = match read_copy(below, disk, 1) {
        Ok(parts) => return Ok(parts),
        Err(error) => error,
    };
    read_copy(below, disk, last).map_err(|backup| {
        let reason = format!("both copies are damaged: {first}; {backup}");
        Error::invalid("GPT", reason).next("`gdisk` can repair it")
    })
}

/// One copy of the table, whose header lies in block `own`.
fn read_copy(below: &mut dyn Lower, disk: &Limits, own: u64) -> Result<Vec<Part>> {
    let damaged = |reason: &str| Error::invalid(format!("header in block {own}"), reason);
    let block = u64::from(disk.block);
    let last = disk.size / block - 1;
    if own > last {
        return Err(damaged("lies behind the end of the device"));
    }
    let mut header = vec![0; disk.block as usize];
    read(below, own * block, &mut header)?;
    if !header.starts_with(b"EFI PART") {
        return Err(damaged("does not begin with EFI PART"));
    }
    let size = number::<4>(&header, 12);
    if !(92..=block).contains(&size) {
        return Err(damaged("its size is wrong"));
    }
    header.truncate(size as usize);
    let crc = number::<4>(&header, 16);
    header[16..20].fill(0);
    if crc != u64::from(crc32fast::hash(&header)) {
        return Err(damaged("its CRC is wrong"));
    }
    let (low, high) = (number::<8>(&header, 40), number::<8>(&header, 48));
    if number::<8>(&header, 24) != own || low > high || high > last {
        return Err(damaged("its block numbers do not fit the device"));
    }
    let (count, entry) = (number::<4>(&header, 80), number::<4>(&header, 84));
    let total = count * entry;
    if entry < 128 || !entry.is_power_of_two() || count == 0 || total > MAX_ENTRIES {
        return Err(damaged("the count or the size of its entries is wrong"));
    }
    let blocks = total.div_ceil(block);
    let table = Part::new(disk, 0, number::<8>(&header, 72), blocks);
    let Some(table) = table.filter(|table| table.at > 0) else {
        return Err(damaged("its entries lie outside the device"));
    };
    let mut entries = vec![0; (blocks * block) as usize];
    read(below, table.at, &mut entries)?;
    entries.truncate(total as usize);
    if number::<4>(&header, 88) != u64::from(crc32fast::hash(&entries)) {
        return Err(damaged("the CRC of its entries is wrong"));
    }
    let parts = (1..).zip(entries.chunks(entry as usize));
    Ok(parts.filter_map(|(place, bytes)| part(disk, low..=high, place, bytes)).collect())
}

/// A partition, unless the entry is unused or leaves the usable blocks.
fn part(
    disk: &Limits,
    usable: std::ops::RangeInclusive<u64>,
    place: u64,
    bytes: &[u8],
) -> Option<Part> {
    let (first, last) = (number::<8>(bytes, 32), number::<8>(bytes, 40));
    let is_unused = bytes[..16].iter().all(|byte| *byte == 0);
    if is_unused || first > last || !usable.contains(&first) || !usable.contains(&last) {
        return None;
    }
    let part = Part::new(disk, place, first, last - first + 1)?;
    let units = bytes[56..128].chunks(2).map(|unit| number::<2>(unit, 0) as u16);
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    Some(Part { label: String::from_utf16_lossy(&units), uuid: guid(bytes), ..part })
}

/// The GUID at byte 16: its first three groups are little-endian numbers, the rest is bytes.
fn guid(bytes: &[u8]) -> String {
    let tail: String = bytes[26..32].iter().map(|byte| format!("{byte:02x}")).collect();
    let (a, b, c) = (number::<4>(bytes, 16), number::<2>(bytes, 20), number::<2>(bytes, 22));
    format!("{a:08x}-{b:04x}-{c:04x}-{:02x}{:02x}-{tail}", bytes[24], bytes[25])
}

#[cfg(test)]
mod tests {
    use super::super::DRIVER;
    use super::*;
    use crate::testing::{disk, disk_4k, open_over};
    use proptest::prelude::*;

    /// Fields of a header that a test may set; the rest follows from the copy's place.
    #[derive(Clone, Copy, Debug)]
    struct Fields {
        size: u32,
        low: u64,
        high: u64,
        entries: u64,
        count: u32,
        entry: u32,
    }

    /// Writes a header with right CRCs over whatever entries are in the image.
    fn seal(image: &mut [u8], block: usize, own: u64, f: Fields) {
        let start = usize::try_from(f.entries).unwrap().saturating_mul(block).min(image.len());
        let len = (f.count as usize).saturating_mul(f.entry as usize).min(1 << 20);
        let entries = &image[start..image.len().min(start.saturating_add(len))];
        let mut header = b"EFI PART\0\0\x01\0".to_vec();
        header.extend(f.size.to_le_bytes());
        header.resize(24, 0);
        header.extend([own, 0, f.low, f.high, 0, 0, f.entries].map(u64::to_le_bytes).concat());
        header.extend([f.count, f.entry, crc32fast::hash(entries)].map(u32::to_le_bytes).concat());
        header.resize(block, 0);
        let crc = crc32fast::hash(&header[..block.min(f.size as usize)]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        let own = own as usize * block;
        image[own..own + block].copy_from_slice(&header);
    }

    const USUAL: Fields = Fields { size: 92, low: 6, high: 90, entries: 2, count: 4, entry: 128 };

    /// 100 blocks: protective MBR, header, entries in block 2; backups in blocks 98 and 99.
    fn image(block: usize) -> Vec<u8> {
        let mut image = vec![0; 100 * block];
        image[450] = 0xee;
        image[510..512].copy_from_slice(&[0x55, 0xaa]);
        for (slot, first, last) in [(0_usize, 10_u64, 19_u64), (2, 20, 20), (3, 80, 91)] {
            let entry = 2 * block + slot * 128;
            image[entry..entry + 32]
                .copy_from_slice(&std::array::from_fn::<u8, 32, _>(|i| i as u8));
            image[entry + 32..entry + 40].copy_from_slice(&first.to_le_bytes());
            image[entry + 40..entry + 48].copy_from_slice(&last.to_le_bytes());
            image[entry + 56] = b'a' + slot as u8;
        }
        image.copy_within(2 * block..3 * block, 98 * block);
        seal(&mut image, block, 1, USUAL);
        seal(&mut image, block, 99, Fields { entries: 98, ..USUAL });
        image
    }

    fn find(image: &[u8], disk: Limits, keys: &str) -> Result<(u64, u64), String> {
        let (layer, limits) =
            open_over(&DRIVER, keys, &[disk], image).map_err(|error| error.to_string())?;
        match layer.map(Io::new(Op::Read, 0, 512)) {
            Ok(Map::To { at, .. }) => Ok((at, limits.size)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_check_sum_is_the_usual_one() {
        assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn partitions_are_found_by_number_label_and_uuid_in_both_block_sizes() {
        for (block, disk) in [(512, disk(51_200)), (4096, disk_4k(409_600))] {
            let image = image(block);
            let block = block as u64;
            assert_eq!(find(&image, disk, "number=1"), Ok((10 * block, 10 * block)));
            assert_eq!(find(&image, disk, "label=c"), Ok((20 * block, block)));
            let uuid = find(&image, disk, "uuid=13121110-1514-1716-1819-1A1B1C1D1E1F");
            assert!(uuid.unwrap_err().contains("2 partitions have it"));
            // The last of them leaves the usable blocks.
            let text = find(&image, disk, "number=4").unwrap_err();
            assert!(text.contains("there are: 1 \"a\" ("), "{text}");
        }
    }

    #[test]
    fn a_table_is_read_in_the_sectors_that_it_was_made_for() {
        // Blocks of the device, then of the table, which is whole, or has one of its copies.
        for (disk, block) in [(disk_4k(409_600), 512), (disk(409_600), 4096)] {
            let at = (10 * block as u64, 10 * block as u64);
            let room = Limits { size: 100 * block as u64, ..disk };
            // Eight sectors of 512 at its start make a partition that lies on blocks of 4096.
            let mut image = image(block);
            let (first, last) = if block == 512 { (16_u64, 31_u64) } else { (10, 19) };
            image[2 * block + 32..2 * block + 40].copy_from_slice(&first.to_le_bytes());
            image[2 * block + 40..2 * block + 48].copy_from_slice(&last.to_le_bytes());
            image.copy_within(2 * block..3 * block, 98 * block);
            seal(&mut image, block, 1, USUAL);
            seal(&mut image, block, 99, Fields { entries: 98, ..USUAL });
            let want = if block == 512 { (8192, 8192) } else { at };
            // 100 sectors of 512 are no whole number of blocks of 4096: 96 of them hold no backup.
            let room =
                if block == 512 { Limits { size: 51_200 / 4096 * 4096, ..room } } else { room };
            assert_eq!(find(&image, room, "number=1"), Ok(want));
            assert_eq!(find(&image, room, &format!("number=1 sector={block}")), Ok(want));
            let other = if block == 512 { 4096 } else { 512 };
            let text = find(&image, room, &format!("number=1 sector={other}")).unwrap_err();
            assert!(text.contains("both copies are damaged"), "{text}");
            image[block + 88] ^= 1;
            let backup = find(&image, room, "number=1");
            assert_eq!(backup.is_ok(), block == 4096, "{backup:?}");
        }
    }

    #[test]
    fn two_tables_in_different_sectors_are_not_chosen_between() {
        let mut both = vec![0; 409_600];
        let fields = Fields { entries: 20, ..USUAL };
        both[..512].copy_from_slice(&image(512)[..512]);
        seal(&mut both, 512, 1, fields);
        seal(&mut both, 4096, 1, fields);
        let text = find(&both, disk_4k(409_600), "number=1").unwrap_err();
        assert!(text.contains("say sector=4096, or sector=512"), "{text}");
        // Over blocks of 512, as the kernel counts.
        let text = find(&both, disk(409_600), "number=1").unwrap_err();
        assert!(text.contains("the table is empty"), "{text}");
        let text = find(&both, disk_4k(409_600), "number=1 sector=512").unwrap_err();
        assert!(text.contains("the table is empty"), "{text}");
    }

    #[test]
    fn a_damaged_first_copy_is_replaced_by_the_backup_and_two_are_an_error() {
        for damaged in [512, 512 + 16, 512 + 88, 1024 + 40] {
            let mut image = image(512);
            image[damaged] ^= 1;
            assert_eq!(find(&image, disk(51_200), "number=1"), Ok((5120, 5120)));
            image[99 * 512 + 40] ^= 1;
            let text = find(&image, disk(51_200), "number=1").unwrap_err();
            assert!(text.contains("both copies are damaged: header in block 1: "), "{text}");
            assert!(text.contains("header in block 99: its CRC is wrong; `gdisk`"), "{text}");
        }
    }

    #[test]
    fn numbers_that_do_not_fit_the_device_are_refused() {
        for (fields, part) in [
            (Fields { size: 91, ..USUAL }, "its size is wrong"),
            (Fields { size: 513, ..USUAL }, "its size is wrong"),
            (Fields { high: 100, ..USUAL }, "block numbers"),
            (Fields { low: 91, ..USUAL }, "block numbers"),
            (Fields { count: u32::MAX, entry: 1 << 31, ..USUAL }, "the count or the size"),
            (Fields { entry: 64, ..USUAL }, "the count or the size"),
            (Fields { count: 0, ..USUAL }, "the count or the size"),
            (Fields { entries: 100, ..USUAL }, "its entries lie outside"),
            (Fields { entries: u64::MAX, ..USUAL }, "its entries lie outside"),
            (Fields { entries: 0, ..USUAL }, "its entries lie outside"),
        ] {
            let mut image = image(512);
            image[99 * 512] = 0;
            seal(&mut image, 512, 1, fields);
            let text = find(&image, disk(51_200), "number=1").unwrap_err();
            assert!(text.contains(part), "{fields:?}: {text}");
        }
        assert!(find(&image(512), disk(512), "number=1").unwrap_err().contains("behind the end"));
    }

    proptest! {
        #[test]
        fn any_header_with_a_right_sum_is_a_table_or_an_error(
            size in prop_oneof![Just(92_u32), any::<u32>()],
            low in prop_oneof![0..100_u64, any::<u64>()],
            high in prop_oneof![0..100_u64, any::<u64>()],
            entries in prop_oneof![0..100_u64, any::<u64>()],
            count in prop_oneof![0..10_u32, any::<u32>()],
            entry in prop_oneof![Just(128_u32), any::<u32>()],
            noise in proptest::collection::vec(any::<u8>(), 512),
        ) {
            let mut image = image(512);
            image[1024..1536].copy_from_slice(&noise);
            seal(&mut image, 512, 1, Fields { size, low, high, entries, count, entry });
            for number in 1..5 {
                if let Ok((at, len)) = find(&image, disk(51_200), &format!("number={number}")) {
                    prop_assert!(len > 0 && at + len <= 51_200);
                }
            }
        }
    }
}
