//! Answers for what a mirror keeps on its legs: docs/formats/mirror.md, byte for byte.
//!
//! All of it lies in the last 64 KiB of a leg: two places for the superblock, of which the one that
//! does not hold the newest is written, and the log of regions that may differ between legs. Each
//! 512 bytes carry a checksum of their own, so a torn write is seen, whatever the disk's block is.

use devsplice_core::prelude::*;

/// Bytes at the end of each leg that are the mirror's.
pub(crate) const META_LEN: u64 = 64 << 10;
/// Alignment of these within the leg.
const META_ALIGN: u64 = 4096;
/// The unit in which metadata is read and written.
pub(crate) const BLOCK: usize = 4096;
/// Where the log is in the metadata.
pub(crate) const LOG_AT: u64 = 2 * BLOCK as u64;
/// Most blocks of the log.
pub(crate) const MOST_LOG_BLOCKS: u64 = 8;
/// Most legs.
pub(crate) const MOST_LEGS: usize = 8;
/// Smallest region.
pub(crate) const LEAST_REGION: u64 = 4096;

const SECTOR: usize = 512;
/// Bits of a sector of the log; behind them its checksum.
const SECTOR_BITS: u64 = (SECTOR as u64 - 8) * 8;
/// Regions of a block of the log.
pub(crate) const BLOCK_REGIONS: u64 = SECTOR_BITS * (BLOCK / SECTOR) as u64;
const MAGIC: [u8; 8] = *b"dsplMIR1";
const VERSION: u32 = 1;
/// Where the legs are in a superblock, and how long each of them is.
const LEGS_AT: usize = 64;
const LEG_LEN: usize = 24;
/// Where the generation before is.
const BEFORE_AT: usize = LEGS_AT + MOST_LEGS * LEG_LEN;

/// What a leg is, as of a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LegState {
    /// There is no such leg.
    #[default]
    None,
    /// Holds everything that was acknowledged.
    InSync,
    /// Gets every write and is being filled with what it lacks.
    Rebuilding,
    /// Lacks writes.
    Failed,
}

impl LegState {
    fn number(self) -> u8 {
        match self {
            LegState::None => 0,
            LegState::InSync => 1,
            LegState::Rebuilding => 2,
            LegState::Failed => 3,
        }
    }

    fn from_number(number: u8) -> Option<LegState> {
        [LegState::None, LegState::InSync, LegState::Rebuilding, LegState::Failed]
            .into_iter()
            .find(|state| state.number() == number)
    }

    /// As users see it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            LegState::None => "none",
            LegState::InSync => "in-sync",
            LegState::Rebuilding => "rebuilding",
            LegState::Failed => "failed",
        }
    }
}

/// A leg in a superblock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leg {
    pub(crate) state: LegState,
    /// The generation that brought it into that state.
    pub(crate) since: u64,
    /// The last one before that every leg in sync had.
    pub(crate) before: u64,
}

/// What a superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Super {
    /// Which mirror.
    pub(crate) set: [u8; 16],
    /// Counts the changes of any leg's state.
    pub(crate) generation: u64,
    /// The last generation before this one that every leg in sync had; those between may be on
    /// some disks, from attempts that failed.
    pub(crate) before: u64,
    /// Bytes that the mirror offers.
    pub(crate) size: u64,
    /// Bytes for which there is one bit in the log.
    pub(crate) region: u64,
    /// Which leg this copy lies on.
    pub(crate) own: u8,
    pub(crate) legs: [Leg; MOST_LEGS],
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
}

fn short(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default())
}

/// The checksum of `bytes`, of which those at `at` count as zeros.
fn sum(bytes: &[u8], at: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..at]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[at + 4..]);
    hasher.finalize()
}

impl Super {
    /// A leg that comes into a state with this generation.
    pub(crate) fn leg(&self, state: LegState) -> Leg {
        Leg { state, since: self.generation, before: self.before }
    }

    /// The legs that the set has.
    pub(crate) fn leg_count(&self) -> usize {
        self.legs.iter().take_while(|leg| leg.state != LegState::None).count()
    }

    /// The blocks of the log.
    pub(crate) fn log_blocks(&self) -> u64 {
        self.size.div_ceil(self.region).div_ceil(BLOCK_REGIONS)
    }

    /// The block that holds it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        put(&mut block, 0, &MAGIC);
        put(&mut block, 8, &VERSION.to_le_bytes());
        put(&mut block, 16, &self.set);
        put(&mut block, 32, &self.generation.to_le_bytes());
        put(&mut block, 40, &self.size.to_le_bytes());
        put(&mut block, 48, &self.region.to_le_bytes());
        block[56] = self.own;
        for (index, leg) in self.legs.iter().enumerate() {
            let at = LEGS_AT + index * LEG_LEN;
            block[at] = leg.state.number();
            put(&mut block, at + 8, &leg.since.to_le_bytes());
            put(&mut block, at + 16, &leg.before.to_le_bytes());
        }
        put(&mut block, BEFORE_AT, &self.before.to_le_bytes());
        let crc = sum(&block[..SECTOR], 12);
        put(&mut block, 12, &crc.to_le_bytes());
        block
    }

    /// What a block says, if it is a superblock that can be believed.
    pub(crate) fn decode(block: &[u8]) -> Option<Super> {
        let sector = block.get(..SECTOR)?;
        let known = sector[..8] == MAGIC && short(sector, 8) == VERSION;
        if !known || short(sector, 12) != sum(sector, 12) {
            return None;
        }
        let mut legs = [Leg::default(); MOST_LEGS];
        for (index, leg) in legs.iter_mut().enumerate() {
            let at = LEGS_AT + index * LEG_LEN;
            leg.state = LegState::from_number(sector[at])?;
            leg.since = number(sector, at + 8);
            leg.before = number(sector, at + 16);
        }
        let found = Super {
            set: sector[16..32].try_into().unwrap_or_default(),
            generation: number(sector, 32),
            before: number(sector, BEFORE_AT),
            size: number(sector, 40),
            region: number(sector, 48),
            own: sector[56],
            legs,
        };
        found.makes_sense().then_some(found)
    }

    /// A checksum says that nothing changed on the way, not that it was sane when it was written.
    fn makes_sense(&self) -> bool {
        self.region.is_power_of_two()
            && self.region >= LEAST_REGION
            && self.size > 0
            && self.log_blocks() <= MOST_LOG_BLOCKS
            && usize::from(self.own) < self.leg_count()
            && self.legs.iter().skip(self.leg_count()).all(|leg| leg.state == LegState::None)
            && self.before < self.generation
            && self.legs.iter().all(|leg| leg.since <= self.generation && leg.before <= leg.since)
    }
}

/// Where the metadata of a leg of `size` bytes begins, if it is large enough to have any.
pub(crate) fn meta_at(size: u64) -> Option<u64> {
    let at = size.checked_sub(META_LEN)?;
    Some(at - at % META_ALIGN).filter(|at| *at > 0)
}

/// The newest superblock of a leg and in which of its two places it is; `None` if there is none,
/// which is not an error.
pub(crate) fn read_super(
    below: &mut dyn Lower,
    port: Port,
    at: u64,
) -> Result<Option<(Super, u8)>, Errno> {
    let mut best: Option<(Super, u8)> = None;
    for place in 0..2 {
        let mut block = vec![0; BLOCK];
        below.read(port, at + super_at(place), &mut block)?;
        if let Some(found) = Super::decode(&block)
            && best.is_none_or(|(best, _)| found.generation > best.generation)
        {
            best = Some((found, place));
        }
    }
    Ok(best)
}

/// Where a superblock's first or second place is in the metadata.
pub(crate) fn super_at(place: u8) -> u64 {
    u64::from(place) * BLOCK as u64
}

/// The log: a bit for each region whose legs may differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bits {
    blocks: Vec<Vec<u8>>,
}

impl Bits {
    pub(crate) fn new(blocks: u64) -> Bits {
        Bits { blocks: (0..blocks).map(|_| vec![0; BLOCK]).collect() }
    }

    fn place(region: u64) -> (usize, usize, u8) {
        // Blocks are few; regions that are beyond them are never asked for.
        let block = usize::try_from(region / BLOCK_REGIONS).unwrap_or(usize::MAX);
        let rest = region % BLOCK_REGIONS;
        let (sector, bit) = (rest / SECTOR_BITS, rest % SECTOR_BITS);
        let byte = usize::try_from(sector * SECTOR as u64 + bit / 8).unwrap_or(0);
        (block, byte, 1 << (bit % 8))
    }

    /// The block of the log that has the bit of a region.
    pub(crate) fn block_of(region: u64) -> usize {
        Bits::place(region).0
    }

    pub(crate) fn get(&self, region: u64) -> bool {
        let (block, byte, mask) = Bits::place(region);
        self.blocks[block][byte] & mask != 0
    }

    pub(crate) fn set(&mut self, region: u64, value: bool) {
        let (block, byte, mask) = Bits::place(region);
        let byte = &mut self.blocks[block][byte];
        *byte = if value { *byte | mask } else { *byte & !mask };
    }

    /// The bytes of a block as they are written.
    pub(crate) fn encode(&self, block: usize) -> Vec<u8> {
        let mut bytes = self.blocks[block].clone();
        for sector in bytes.chunks_exact_mut(SECTOR) {
            // An empty sector is all zeros, checksum and all, so that fresh metadata is cheap.
            if sector[..SECTOR - 8].iter().any(|byte| *byte != 0) {
                sector[SECTOR - 4..].fill(0);
                let crc = sum(sector, SECTOR - 4);
                put(sector, SECTOR - 4, &crc.to_le_bytes());
            }
        }
        bytes
    }

    /// Adds the bits of a block as it was read. Sectors that cannot be believed count as all set;
    /// how many there were.
    pub(crate) fn add(&mut self, block: usize, bytes: &[u8]) -> u64 {
        let mut broken = 0;
        let both = self.blocks[block].chunks_exact_mut(SECTOR).zip(bytes.chunks_exact(SECTOR));
        for (own, read) in both {
            let is_zero = read.iter().all(|byte| *byte == 0);
            let good = is_zero || short(read, SECTOR - 4) == sum(read, SECTOR - 4);
            broken += u64::from(!good);
            for (own, read) in own[..SECTOR - 8].iter_mut().zip(read) {
                *own |= if good { *read } else { 0xff };
            }
        }
        broken
    }
}

/// A region for a mirror of `size` bytes: one block of log if it can be, at least 64 KiB.
pub(crate) fn default_region(size: u64) -> u64 {
    size.div_ceil(BLOCK_REGIONS).next_power_of_two().max(64 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Super {
        let mut legs = [Leg::default(); MOST_LEGS];
        legs[0] = Leg { state: LegState::InSync, since: 1, before: 0 };
        legs[1] = Leg { state: LegState::Failed, since: 7, before: 6 };
        Super { set: [3; 16], generation: 7, before: 6, size: 1 << 30, region: 65536, own: 0, legs }
    }

    #[test]
    fn a_superblock_comes_back_and_any_flipped_bit_of_it_does_not() {
        let block = sample().encode();
        assert_eq!(block.len(), BLOCK);
        assert_eq!(Super::decode(&block), Some(sample()));
        for bit in 0..SECTOR * 8 {
            let mut bent = block.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Super::decode(&bent), None, "bit {bit}");
        }
        assert_eq!(Super::decode(&[0; BLOCK]), None);
        assert_eq!(Super::decode(&[]), None);
    }

    #[test]
    fn a_superblock_that_makes_no_sense_is_none() {
        let bend: [fn(&mut Super); 9] = [
            |s| s.region = 12345,
            |s| s.region = 512,
            |s| s.size = 0,
            |s| s.size = u64::MAX,
            |s| s.own = 2,
            |s| s.legs[5].state = LegState::InSync,
            |s| s.legs[0].since = 8,
            |s| s.legs[0].before = 2,
            |s| s.before = 7,
        ];
        for bend in bend {
            let mut bent = sample();
            bend(&mut bent);
            assert_eq!(Super::decode(&bent.encode()), None, "{bent:?}");
        }
    }

    #[test]
    fn bits_come_back_and_a_torn_sector_counts_as_all_dirty() {
        let mut bits = Bits::new(2);
        for region in [0, 4031, 4032, BLOCK_REGIONS - 1, BLOCK_REGIONS] {
            assert!(!bits.get(region));
            bits.set(region, true);
        }
        assert_eq!(Bits::block_of(BLOCK_REGIONS), 1);
        let mut read = Bits::new(2);
        assert_eq!(read.add(0, &bits.encode(0)) + read.add(1, &bits.encode(1)), 0);
        assert!(read.get(0) && read.get(4031) && read.get(4032) && read.get(BLOCK_REGIONS));
        assert!(!read.get(1) && !read.get(BLOCK_REGIONS + 1));
        let mut torn = bits.encode(0);
        torn[100] ^= 1;
        let mut read = Bits::new(2);
        assert_eq!(read.add(0, &torn), 1);
        assert!(read.get(1) && read.get(4031) && !read.get(4033));
        bits.set(0, false);
        assert!(!bits.get(0));
    }

    #[test]
    fn metadata_lies_at_the_end_on_pages_and_never_at_the_start() {
        assert_eq!(meta_at((1 << 20) + 512), Some((1 << 20) - (64 << 10)));
        assert_eq!(meta_at(META_LEN), None);
        assert_eq!(meta_at(META_LEN + 512), None);
        assert_eq!(meta_at(META_LEN + 4096), Some(4096));
        assert_eq!(meta_at(0), None);
        // The largest log fits.
        const { assert!(LOG_AT + MOST_LOG_BLOCKS * BLOCK as u64 <= META_LEN) };
    }

    #[test]
    fn the_default_region_needs_one_block_of_log() {
        for size in [1 << 20, 1 << 30, 1 << 40, (1 << 50) + 512] {
            let region = default_region(size);
            assert!(size.div_ceil(region) <= BLOCK_REGIONS && region >= 65536);
        }
    }
}
