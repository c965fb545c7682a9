//! Answers for the bytes of a dm-log-writes log: docs/formats/log-writes.md. All little-endian.

/// First bytes of the device.
const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;

/// Bits of an entry's flags.
pub(super) const FLUSH: u64 = 1;
pub(super) const FUA: u64 = 2;
pub(super) const DISCARD: u64 = 4;
pub(super) const MARK: u64 = 8;
/// Bytes of an entry before what belongs to a mark.
const ENTRY: usize = 32;

/// What one entry says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where in the log it stands.
    pub(super) place: u64,
    /// First byte on the disk, and how many.
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) flags: u64,
    /// Of a mark.
    pub(super) name: String,
}

/// Most bytes of a mark's name: it ends with a zero inside its sector.
pub(super) fn longest_name(sector: u64) -> usize {
    usize::try_from(sector).unwrap_or(512).saturating_sub(ENTRY + 1)
}

/// Whether a device begins as a log does.
pub(super) fn is_log(first: &[u8]) -> bool {
    first.starts_with(&MAGIC.to_le_bytes())
}

/// The first sector of a log of so many entries.
pub(super) fn super_block(entries: u64, sector: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(sector).unwrap_or(512)];
    bytes[0..8].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[8..16].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&entries.to_le_bytes());
    bytes[24..28].copy_from_slice(&u32::try_from(sector).unwrap_or(512).to_le_bytes());
    bytes
}

impl Entry {
    /// Its sector.
    pub(super) fn to_bytes(&self, sector: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(sector).unwrap_or(512)];
        let name = self.name.as_bytes();
        let fields = [self.at / sector, self.len / sector, self.flags, name.len() as u64];
        for (place, field) in bytes.chunks_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        let name = &name[..name.len().min(longest_name(sector))];
        bytes[ENTRY..ENTRY + name.len()].copy_from_slice(name);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_counts_in_sectors_of_the_log() {
        let entry = Entry { at: 8192, len: 12_288, flags: FUA, ..Entry::default() };
        let bytes = entry.to_bytes(4096);
        assert_eq!(bytes.len(), 4096);
        let word = |place: usize| u64::from_le_bytes(bytes[place..place + 8].try_into().unwrap());
        assert_eq!([word(0), word(8), word(16), word(24)], [2, 3, 2, 0]);
        assert!(bytes[32..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_marks_name_stands_behind_its_entry_and_ends_with_a_zero() {
        let mark = Entry { flags: MARK, name: "m".repeat(longest_name(512)), ..Entry::default() };
        let bytes = mark.to_bytes(512);
        assert_eq!(bytes[24..32], 479_u64.to_le_bytes());
        assert!(bytes[32..511].iter().all(|byte| *byte == b'm') && bytes[511] == 0);
    }

    #[test]
    fn the_super_block_has_the_fields_of_the_kernels() {
        let bytes = super_block(7, 512);
        assert!(is_log(&bytes) && !is_log(&[0; 512]));
        assert_eq!(bytes[..8], [0x72, 0x68, 0x73, 0x77, 0x66, 0x73, 0x6a, 0]);
        assert_eq!((bytes[8], bytes[16], bytes[24..28].to_vec()), (1, 7, vec![0, 2, 0, 0]));
    }
}
