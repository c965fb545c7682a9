//! Answers for devices whose layers have a live side: mirrors over random legs, commands that come
//! in the middle, and bugs in what a layer does to the devices below it.

use std::sync::Arc;

use devsplice_core::prelude::*;
use devsplice_core::twist::{Twist, nothing};
use devsplice_core::{BackendId, Bottoms, NodeId, Stack};
use devsplice_engine::Served;

use crate::cells::{Mixes, SECTOR};
use crate::disk::Disk;
use crate::mutants::Mutant;
use crate::rng::{Rng, index};
use crate::tree::{Grown, Tree};

/// The splice that formats: no other has this number.
const FORMATTER: u32 = u32::MAX;
/// Sectors of a leg that are the mirror's own.
const META_SECTORS: u64 = 128;

/// What is done to a live device beside requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    /// How often a request comes with a command, of a thousand.
    pub(crate) commands: u64,
    legs: u64,
}

/// Random mirrors: two or three legs, disks of all kinds or stripes of two.
pub(crate) fn grow(rng: &mut Rng) -> (Grown, Habits) {
    let mut disks = Vec::new();
    let legs = rng.pick(&[2, 2, 2, 3]);
    let grain = rng.pick(&[1, 8]);
    let sectors = rng.between(2, 40) * 8;
    let discards = rng.percent(30);
    let mut below = Vec::new();
    for _ in 0..legs {
        let mut disk = |sectors: u64| {
            let block = if grain == 8 && rng.percent(50) { 4096 } else { 512 };
            let limits = Limits {
                block,
                physical: block,
                discard: if discards { block } else { 0 },
                write_zeroes: true,
                volatile_cache: rng.percent(80),
                fua: rng.percent(60),
                ..Limits::ideal(sectors * 512)
            };
            disks.push(limits);
            Tree::Disk(limits)
        };
        let room = META_SECTORS + sectors;
        // Legs need not be of one size.
        let more = room + [0, 16, 48][below.len() % 3];
        below.push(if below.len() == 1 && sectors.is_multiple_of(16) {
            let keys = vec![("chunk".to_owned(), "4k".to_owned())];
            Tree::Driver { name: "stripe", keys, below: vec![disk(more / 2), disk(more / 2)] }
        } else {
            disk(more)
        });
    }
    let key = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let clean = rng.pick(&["1ms", "10ms", "5s"]);
    let region = rng.pick(&["4k", "8k", "64k"]);
    let keys = vec![key("clean", clean), key("region", region)];
    let tree = Tree::Driver { name: "mirror", keys, below };
    let habits = Habits { commands: rng.pick(&[0, 0, 20, 60]), legs };
    (Grown { tree, planes: Vec::new(), disks, errors: Vec::new() }, habits)
}

impl Habits {
    /// A command, now and then.
    pub(crate) fn command(&self, rng: &mut Rng) -> Option<Vec<String>> {
        if !rng.permille(self.commands) {
            return None;
        }
        let port = rng.below(self.legs).to_string();
        let words = match rng.below(6) {
            0 => vec!["fail".to_owned(), port],
            1 => vec!["check".to_owned()],
            2 => vec!["repair".to_owned()],
            _ => vec!["add".to_owned(), port],
        };
        Some(words)
    }
}

/// The mirror of a stack that has one.
pub(crate) fn mirror_of(stack: &Stack) -> Option<NodeId> {
    stack.lives().find(|(_, name, _)| *name == "mirror").map(|(node, _, _)| node)
}

/// A stack as it is served, and its mirror.
pub(crate) type Told = Option<(Arc<Served>, NodeId)>;

/// The disks of a device, as whoever builds its stack reads and writes them.
pub(crate) struct Direct<'a> {
    pub(crate) disks: &'a mut [Disk],
    pub(crate) mixes: &'a mut Mixes,
}

impl Bottoms for Direct<'_> {
    fn read(&mut self, id: BackendId, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let disk = self.disks.get(usize::from(id.0)).ok_or(Errno::ENODEV)?;
        let cells = &disk.visible()[index(at) / SECTOR..];
        for (cell, sector) in cells.iter().zip(into.chunks_exact_mut(SECTOR)) {
            sector.copy_from_slice(&self.mixes.render(*cell));
        }
        Ok(())
    }

    fn write(&mut self, id: BackendId, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let disk = self.disks.get_mut(usize::from(id.0)).ok_or(Errno::ENODEV)?;
        for (sector, bytes) in (index(at) / SECTOR..).zip(bytes.chunks_exact(SECTOR)) {
            let cell = self.mixes.keep(bytes.try_into().unwrap_or([0; SECTOR]));
            disk.put(sector, cell, FORMATTER);
        }
        disk.settle(|splice| splice == FORMATTER);
        Ok(())
    }
}

impl Twist for Mutant {
    fn write(&self, meta: &dyn Meta, port: Port, at: u64, bytes: Vec<u8>, durable: bool) -> Slow {
        // A mirror's superblock begins so.
        let is_super = bytes.starts_with(b"dspl");
        match self {
            Mutant::LogLost if durable && !is_super => nothing(),
            Mutant::StateLost if is_super => nothing(),
            Mutant::MetaNotDurable => meta.write(port, at, bytes, false),
            _ => meta.write(port, at, bytes, durable),
        }
    }

    fn flush(&self, meta: &dyn Meta, port: Port) -> Slow {
        if *self == Mutant::MetaFlushSkipped { nothing() } else { meta.flush(port) }
    }

    fn copy(&self, meta: &dyn Meta, from: Port, to: Vec<Port>, at: u64, len: usize) -> Slow {
        if *self == Mutant::CopySkipped { nothing() } else { meta.copy(from, to, at, len) }
    }

    fn grace(&self, meta: &dyn Meta) -> Slow {
        if *self == Mutant::GraceSkipped { nothing() } else { meta.grace() }
    }
}
