//! Answers for what survives a power cut: all, nothing, some blocks, some sectors of blocks.

use devsplice_core::prelude::*;

/// What is lost or survives as a whole, where nothing tears.
const UNIT: u64 = 4096;
/// What no disk tears.
const SECTOR: usize = 512;

/// The commands.
pub(super) const USAGE: &str = "commands: cut all (is lost), cut none, cut random SEED (some \
                                blocks survive), cut tear SEED (some sectors do), on";

/// What a cut loses of what was not flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    All,
    None,
    /// A block of 4096 bytes survives or does not.
    Random(u64),
    /// It may also be torn between two sectors.
    Tear(u64),
}

impl Cut {
    pub(super) fn parse(words: &[&str]) -> Option<Cut> {
        match *words {
            ["all"] => Some(Cut::All),
            ["none"] => Some(Cut::None),
            ["random", seed] => seed.parse().ok().map(Cut::Random),
            ["tear", seed] => seed.parse().ok().map(Cut::Tear),
            _ => None,
        }
    }

    pub(super) fn dice(self) -> Dice {
        let seed = if let Cut::Random(seed) | Cut::Tear(seed) = self { seed } else { 0 };
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
}

/// The same numbers for the same seed (xorshift64*).
pub(super) struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % bound
    }
}

/// Which sectors of a unit with `count` survive: those before the first number and, for a tear from
/// behind, those from the second on.
fn fate(cut: Cut, dice: &mut Dice, count: u64) -> (u64, u64) {
    match cut {
        Cut::All => (0, count),
        Cut::None => (count, count),
        Cut::Random(_) if dice.below(2) == 0 => (0, count),
        Cut::Random(_) => (count, count),
        Cut::Tear(_) => match dice.below(4) {
            0 => (0, count),
            1 => (count, count),
            2 => (dice.below(count + 1), count),
            _ => (0, dice.below(count + 1)),
        },
    }
}

/// Copies what survives of blocks in a row from the scratch device to the disk: how many bytes.
pub(super) async fn keep(
    cut: Cut,
    dice: &mut Dice,
    extent: Extent,
    block: u64,
    meta: &dyn Meta,
) -> Result<u64, Errno> {
    let len = usize::try_from(extent.len).map_err(|_| Errno::EINVAL)?;
    let new = meta.read(Port(1), extent.at, len).await?;
    let mut disk = meta.read(Port(0), extent.at, len).await?;
    let unit = usize::try_from(UNIT.max(block)).map_err(|_| Errno::EINVAL)?;
    let mut kept = 0;
    for (disk, new) in disk.chunks_mut(unit).zip(new.chunks(unit)) {
        let (head, tail) = fate(cut, dice, (disk.len() / SECTOR) as u64);
        for (number, (disk, new)) in (0..).zip(disk.chunks_mut(SECTOR).zip(new.chunks(SECTOR))) {
            if number < head || number >= tail {
                disk.copy_from_slice(new);
                kept += SECTOR as u64;
            }
        }
    }
    if kept > 0 {
        meta.write(Port(0), extent.at, disk, false).await?;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tear_leaves_part_of_a_block_and_a_seed_is_always_the_same_cut() {
        let fates = |cut: Cut| {
            let mut dice = cut.dice();
            (0..200).map(|_| fate(cut, &mut dice, 8)).collect::<Vec<_>>()
        };
        assert!(fates(Cut::All).iter().all(|fate| *fate == (0, 8)));
        assert!(fates(Cut::None).iter().all(|fate| *fate == (8, 8)));
        let whole = |fate: &(u64, u64)| *fate == (0, 8) || *fate == (8, 8);
        let random = fates(Cut::Random(3));
        assert!(random.iter().all(whole));
        assert!((60..140).contains(&random.iter().filter(|fate| fate.0 == 8).count()));
        assert_eq!(random, fates(Cut::Random(3)));
        assert_ne!(random, fates(Cut::Random(4)));
        assert!(fates(Cut::Tear(3)).iter().any(|fate| !whole(fate)));
    }

    #[test]
    fn commands_are_read_whole_or_not_at_all() {
        assert_eq!(Cut::parse(&["tear", "7"]), Some(Cut::Tear(7)));
        for words in [&["random"][..], &["random", "x"], &["all", "1"], &[]] {
            assert_eq!(Cut::parse(words), None);
        }
    }
}
