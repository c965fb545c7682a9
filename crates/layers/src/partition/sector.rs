//! Answers for how many bytes the sectors have that a partition table counts in: those of the disk
//! that it was made for, not always the blocks of what it lies on now. An image of a disk with
//! sectors of 512 bytes may be a file that direct I/O reads in 4096.
//!
//! A GPT tells: its header lies in the second sector, and has a check sum. An MBR does not. Where
//! blocks have 512 bytes it counts them, as the kernel would; where they are larger, a table that
//! leaves the device by these, and does not by 512, counts in 512; else it has to be said.

use devsplice_core::limits::{MAX_BLOCK, SECTOR};
use devsplice_core::prelude::*;

use super::mbr::Entry;
use super::{Part, gpt, mbr, read};

/// What a user has said.
///
/// # Errors
/// If no disk has such sectors.
pub(super) fn asked(sector: Option<u64>) -> Result<Option<u32>> {
    match sector {
        None => Ok(None),
        Some(512) => Ok(Some(SECTOR)),
        Some(4096) => Ok(Some(MAX_BLOCK)),
        Some(other) => {
            let reason = format!("{other} is not 512 or 4096");
            Err(Error::invalid("partition: sector", reason))
        }
    }
}

/// The partitions of a disk, whatever its table counts in, if that is not said.
///
/// # Errors
/// If there is no table, it is damaged or leaves open what it counts in, or cannot be read.
pub(super) fn read_parts(
    below: &mut dyn Lower,
    disk: &Limits,
    asked: Option<u32>,
) -> Result<Vec<Part>> {
    let by = |sector: u32| Limits { block: sector, ..*disk };
    let mut first = vec![0; SECTOR as usize];
    read(below, 0, &mut first)?;
    let entries = mbr::entries(&first)?;
    if !mbr::protects_gpt(&entries) {
        let sector = match asked {
            Some(sector) => sector,
            None => of_mbr(disk, &entries)?,
        };
        return mbr::read_parts(below, &by(sector), &first, &entries);
    }
    if let Some(sector) = asked {
        return gpt::read_parts(below, &by(sector));
    }
    let others = [SECTOR, MAX_BLOCK].into_iter().filter(|sector| *sector != disk.block);
    let all = std::iter::once(disk.block).chain(others);
    let tables = all.map(|sector| gpt::read_parts(below, &by(sector)).map(|parts| (sector, parts)));
    let (found, failed): (Vec<_>, Vec<_>) = tables.partition(Result::is_ok);
    let mut found = found.into_iter().flatten();
    match (found.next(), found.next()) {
        (Some((_, parts)), None) => Ok(parts),
        // What the kernel would take; another one may be left of what the disk was before.
        (Some((SECTOR, parts)), _) if disk.block == SECTOR => Ok(parts),
        (Some((one, _)), Some((other, _))) => {
            let reason = format!("there is one in sectors of {one} bytes, and one in {other}");
            Err(Error::invalid("GPT", reason).next(format!("say sector={one}, or sector={other}")))
        }
        // By the device's own blocks.
        (None, _) => Err(failed
            .into_iter()
            .find_map(Result::err)
            .unwrap_or_else(|| Error::invalid("GPT", "there is none"))),
    }
}

fn of_mbr(disk: &Limits, entries: &[Entry]) -> Result<u32> {
    if disk.block == SECTOR {
        return Ok(SECTOR);
    }
    let reach = mbr::reach(entries);
    if reach == 0 {
        // An empty table says nothing by any count.
        return Ok(SECTOR);
    }
    // At most 2^33 sectors of 4096 bytes.
    let fits = |sector: u32| reach * u64::from(sector) <= disk.size;
    if !fits(disk.block) && fits(SECTOR) {
        return Ok(SECTOR);
    }
    let reason = format!("does not tell whether it counts in 512 bytes or in {}", disk.block);
    Err(Error::invalid("MBR", reason)
        .next("say sector=512 for an image of most disks, sector=4096 for one of a 4Kn disk"))
}

#[cfg(test)]
mod tests {
    use super::super::DRIVER;
    use super::*;
    use crate::testing::{disk_4k, open_over, refusal};

    /// A table of one entry in the first sector.
    fn mbr(kind: u8, first: u32, count: u32) -> Vec<u8> {
        let mut image = vec![0; 512];
        image[450] = kind;
        image[454..458].copy_from_slice(&first.to_le_bytes());
        image[458..462].copy_from_slice(&count.to_le_bytes());
        image[510..].copy_from_slice(&[0x55, 0xaa]);
        image
    }

    fn find(image: &[u8], disk: Limits, keys: &str) -> Result<(u64, u64), String> {
        let opened = open_over(&DRIVER, keys, &[disk], image).map_err(|error| error.to_string());
        let (layer, limits) = opened?;
        match layer.map(Io::new(Op::Read, 0, 4096)) {
            Ok(Map::To { at, .. }) => Ok((at, limits.size)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_mbr_over_larger_blocks_counts_in_512_if_that_is_evident_or_said() {
        // The last MiB of 8.
        let (image, disk) = (mbr(0x83, 14_336, 2048), disk_4k(8 << 20));
        let want = Ok((7 << 20, 1 << 20));
        assert_eq!(find(&image, disk, "number=1"), want);
        assert_eq!(find(&image, disk, "number=1 sector=512"), want);
        // The same on a disk that has room for it either way.
        let disk = disk_4k(64 << 20);
        let text = find(&image, disk, "number=1").unwrap_err();
        assert!(text.contains("512 bytes or in 4096") && text.contains("sector="), "{text}");
        assert_eq!(find(&image, disk, "number=1 sector=512"), want);
        assert_eq!(find(&image, disk, "number=1 sector=4096"), Ok((56 << 20, 8 << 20)));
        // One that fits neither way tells nothing.
        assert!(find(&mbr(0x83, 1 << 20, 8), disk, "number=1").unwrap_err().contains("sector="));
    }

    #[test]
    fn a_partition_off_the_blocks_below_is_refused_with_what_to_do() {
        let text = find(&mbr(0x83, 63, 1024), disk_4k(1 << 20), "number=1 sector=512").unwrap_err();
        assert!(text.contains("partition 1: 524288 bytes at 32256 are off the 4096"), "{text}");
        assert!(text.contains("direct=off"), "{text}");
    }

    #[test]
    fn sectors_that_no_disk_has_are_refused() {
        for keys in ["number=1 sector=1k", "number=1 sector=0", "number=1 sector=8k"] {
            let text = refusal(&DRIVER, keys, &[disk_4k(1 << 20)]);
            assert!(text.contains("is not 512 or 4096"), "{text}");
        }
        // More than there is of the disk.
        let disk = crate::testing::disk(2048);
        for kind in [0x83, 0xee] {
            find(&mbr(kind, 1, 1), disk, "number=1 sector=4096").unwrap_err();
        }
    }
}
