//! Answers for random stacks, and for where each sector of one must lie: a second, slow mapping
//! that shares nothing with the layers' own.

use devsplice_core::{
    Args, BackendId, Bottoms, Errno, Error, Layer, Limits, NodeId, Result, StackBuilder,
};

use crate::mirror::Mirror;
use crate::mutants::{Bent, Mutant};
use crate::rng::{Rng, index};

/// Most sectors of a device, so that a run stays short.
const MOST_SECTORS: u64 = 6144;
/// Most layers above one another.
const MOST_LAYERS: u64 = 4;

/// A stack as data; it is built again after each crash.
#[derive(Debug)]
pub(crate) enum Tree {
    Disk(Limits),
    /// One of the drivers of `devsplice-layers`, with its keys, over others.
    Driver {
        name: &'static str,
        keys: Vec<(String, String)>,
        below: Vec<Tree>,
    },
    Mirror(Vec<Tree>),
}

/// Where a sector lies: a disk and a sector of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(u32);

impl Place {
    /// Nothing is kept there.
    const SINK: Place = Place(u32::MAX);

    fn new(disk: usize, sector: u64) -> Place {
        // At most 255 disks of at most 2^24 sectors are made.
        Place((disk as u32) << 24 | sector as u32)
    }

    /// The disk and the sector, unless nothing is kept there.
    pub(crate) fn get(self) -> Option<(usize, usize)> {
        (self != Place::SINK).then_some(((self.0 >> 24) as usize, (self.0 & 0xff_ffff) as usize))
    }
}

/// For each copy that a stack keeps of a device, where each sector lies.
pub(crate) type Planes = Vec<Vec<Place>>;

/// A random stack and what is known of it.
#[derive(Debug)]
pub(crate) struct Grown {
    pub(crate) tree: Tree,
    pub(crate) planes: Planes,
    /// The disks' limits, in the order of the backends.
    pub(crate) disks: Vec<Limits>,
    /// What layers answer by themselves.
    pub(crate) errors: Vec<Errno>,
}

struct Grower<'a> {
    rng: &'a mut Rng,
    /// Sectors that all sizes and offsets are multiples of.
    grain: u64,
    disks: Vec<Limits>,
    errors: Vec<Errno>,
    /// Mirrors that are being grown: a leg of one that keeps nothing would be no copy.
    mirrors: u32,
}

/// Makes a stack.
pub(crate) fn grow(rng: &mut Rng) -> Grown {
    let grain = if rng.percent(30) { 8 } else { 1 };
    let depth = rng.below(MOST_LAYERS + 1);
    let mut grower = Grower { rng, grain, disks: Vec::new(), errors: Vec::new(), mirrors: 0 };
    let (tree, planes) = grower.tree(depth);
    let Grower { disks, errors, .. } = grower;
    Grown { tree, planes, disks, errors }
}

fn size(planes: &Planes) -> u64 {
    planes.first().map_or(0, Vec::len) as u64
}

fn driver(name: &'static str, keys: &[(&str, String)], below: Vec<Tree>) -> Tree {
    let keys = keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    Tree::Driver { name, keys, below }
}

impl Grower<'_> {
    fn tree(&mut self, depth: u64) -> (Tree, Planes) {
        if depth == 0 {
            return self.leaf();
        }
        match self.rng.below(12) {
            0..3 => self.linear(depth),
            3..5 => self.concat(depth),
            5..8 => self.stripe(depth),
            8 => self.delay(depth),
            9 => self.error(depth),
            10 => self.mirror(depth),
            _ => self.tree(depth - 1),
        }
    }

    fn leaf(&mut self) -> (Tree, Planes) {
        let most = *[16, 64, 256, 1024, 2048].get(index(self.rng.below(5))).unwrap_or(&64);
        let sectors = (4 + self.rng.below(most)) * self.grain;
        let sectors = sectors.min(MOST_SECTORS - MOST_SECTORS % self.grain);
        let block = if self.grain == 8 && self.rng.percent(60) { 4096 } else { 512 };
        let kind = self.rng.below(40);
        if kind < 3 && self.mirrors == 0 && !self.disks.is_empty() {
            let name = if kind == 0 { "zero" } else { "null" };
            let keys = [("size", (sectors * 512).to_string()), ("block", block.to_string())];
            let planes = vec![vec![Place::SINK; index(sectors)]];
            return (driver(name, &keys, Vec::new()), planes);
        }
        let limits = Limits {
            block,
            physical: block,
            discard: if self.rng.percent(8) { 0 } else { block },
            write_zeroes: !self.rng.percent(8),
            volatile_cache: self.rng.percent(85),
            fua: self.rng.percent(90),
            ..Limits::ideal(sectors * 512)
        };
        let disk = self.disks.len();
        self.disks.push(limits);
        let plane = (0..sectors).map(|sector| Place::new(disk, sector)).collect();
        (Tree::Disk(limits), vec![plane])
    }

    fn several(&mut self, depth: u64) -> Vec<(Tree, Planes)> {
        let count = self.rng.between(2, 4);
        (0..count).map(|_| self.tree(depth - 1)).collect()
    }

    fn linear(&mut self, depth: u64) -> (Tree, Planes) {
        let (below, planes) = self.tree(depth - 1);
        let grains = size(&planes) / self.grain;
        let offset = self.rng.below(grains) * self.grain;
        let count = self.rng.between(1, grains - offset / self.grain) * self.grain;
        let whole = self.rng.percent(20);
        let end = if whole { size(&planes) } else { offset + count };
        let mut keys = vec![("offset", (offset * 512).to_string())];
        if !whole {
            keys.push(("size", (count * 512).to_string()));
        }
        let range = index(offset)..index(end);
        let planes = planes.iter().map(|plane| plane[range.clone()].to_vec()).collect();
        (driver("linear", &keys, vec![below]), planes)
    }

    fn concat(&mut self, depth: u64) -> (Tree, Planes) {
        let mut trees = Vec::new();
        let mut parts: Vec<Planes> = Vec::new();
        for (tree, planes) in self.several(depth) {
            let have: u64 = parts.iter().map(size).sum();
            if !parts.is_empty() && have + size(&planes) > MOST_SECTORS {
                // A part that was made has disks; it stays, under a window of one grain.
                let end = index(self.grain);
                let keys = [("size", (self.grain * 512).to_string())];
                trees.push(driver("linear", &keys, vec![tree]));
                parts.push(planes.iter().map(|plane| plane[..end].to_vec()).collect());
                continue;
            }
            trees.push(tree);
            parts.push(planes);
        }
        let copies = parts.iter().map(Vec::len).max().unwrap_or(0);
        let plane = |copy: usize| {
            parts.iter().flat_map(|part| part[copy.min(part.len() - 1)].iter().copied()).collect()
        };
        (driver("concat", &[], trees), (0..copies).map(plane).collect())
    }

    fn stripe(&mut self, depth: u64) -> (Tree, Planes) {
        let (trees, parts): (Vec<_>, Vec<_>) = self.several(depth).into_iter().unzip();
        let smallest = parts.iter().map(size).min().unwrap_or(0);
        let most = (smallest / self.grain).max(1).ilog2().min(7);
        let chunk = self.grain << self.rng.below(u64::from(most) + 1);
        let rows = (smallest / chunk).min((MOST_SECTORS / chunk / parts.len() as u64).max(1));
        let copies = parts.iter().map(Vec::len).max().unwrap_or(0);
        let plane = |copy: usize| {
            let mut plane = Vec::new();
            for row in 0..rows {
                let range = index(row * chunk)..index((row + 1) * chunk);
                for part in &parts {
                    plane.extend_from_slice(&part[copy.min(part.len() - 1)][range.clone()]);
                }
            }
            plane
        };
        let planes: Planes = (0..copies).map(plane).collect();
        let keys = [("chunk", (chunk * 512).to_string())];
        let striped = driver("stripe", &keys, trees);
        if rows == smallest / chunk {
            return (striped, planes);
        }
        let keys = [("size", (size(&planes) * 512).to_string())];
        (driver("linear", &keys, vec![striped]), planes)
    }

    fn delay(&mut self, depth: u64) -> (Tree, Planes) {
        let (below, planes) = self.tree(depth - 1);
        let mut keys = Vec::new();
        for key in ["read", "write", "flush", "discard"] {
            if self.rng.percent(50) {
                keys.push((key, format!("{}us", self.rng.between(1, 3000))));
            }
        }
        (driver("delay", &keys, vec![below]), planes)
    }

    fn error(&mut self, depth: u64) -> (Tree, Planes) {
        let (below, planes) = self.tree(depth - 1);
        let grains = size(&planes) / self.grain;
        let at = self.rng.below(grains);
        let len = self.rng.between(1, (grains - at).min(16));
        let mut keys = vec![
            ("at", (at * self.grain * 512).to_string()),
            ("len", (len * self.grain * 512).to_string()),
            ("every", self.rng.between(1, 6).to_string()),
        ];
        for key in ["read", "write", "flush", "discard", "zeroes"] {
            if self.rng.percent(35) {
                let errno = self.rng.pick(&[Errno::EIO, Errno::ENOSPC, Errno::ENODATA]);
                keys.push((key, errno.name().to_owned()));
                self.errors.push(errno);
            }
        }
        // Without any number given, reads and writes fail with this one.
        self.errors.push(Errno::EIO);
        (driver("error", &keys, vec![below]), planes)
    }

    fn mirror(&mut self, depth: u64) -> (Tree, Planes) {
        self.mirrors += 1;
        let (trees, parts): (Vec<_>, Vec<_>) = self.several(depth).into_iter().unzip();
        self.mirrors -= 1;
        let end = index(parts.iter().map(size).min().unwrap_or(0));
        let planes = parts.iter().flatten().map(|plane| plane[..end].to_vec()).collect();
        (Tree::Mirror(trees), planes)
    }
}

impl Tree {
    /// Adds this stack to a builder, with the bug that a mutant puts into a layer.
    pub(crate) fn build(
        &self,
        builder: &mut StackBuilder,
        mutant: Option<Mutant>,
        disks: &mut dyn Bottoms,
        is_new: bool,
    ) -> Result<NodeId> {
        let mut args = Args::default();
        let (name, layer, below): (_, Box<dyn Layer>, _) = match self {
            Tree::Disk(limits) => return builder.backend("disk", *limits).map(|(node, _)| node),
            Tree::Mirror(below) => ("fan", Box::new(Mirror::default()), below),
            Tree::Driver { name, keys, below } => {
                let driver = devsplice_layers::find(name)
                    .ok_or_else(|| Error::invalid(*name, "no such driver"))?;
                args = Args::new(name, driver.keys, keys)?;
                (*name, (driver.make)(&args)?, below)
            }
        };
        let mut ports = Vec::new();
        for tree in below {
            ports.push(tree.build(builder, mutant, disks, is_new)?);
        }
        if let Some(format) = devsplice_layers::format_of(name)
            && is_new
        {
            builder.format(name, &ports, disks, |lower| format(&args, lower, false))?;
        }
        let layer = Bent::wrap(layer, name, mutant);
        let mut read = |id: BackendId, at: u64, into: &mut [u8]| disks.read(id, at, into);
        builder.layer(name, layer, &ports, &mut read)
    }

    /// Whether some part keeps copies, which can differ after a failure.
    pub(crate) fn has_mirror(&self) -> bool {
        match self {
            Tree::Disk(_) => false,
            Tree::Mirror(_) => true,
            Tree::Driver { below, .. } => below.iter().any(Tree::has_mirror),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cells::Mixes;
    use crate::disk::Disk;
    use crate::live::Direct;
    use devsplice_core::{Io, Op, Place as Routed};

    /// Where the stack's own routing sends each sector.
    fn routed(grown: &Grown) -> Vec<Option<(usize, usize)>> {
        let mut builder = StackBuilder::new();
        let mut disks: Vec<_> = grown.disks.iter().map(|limits| Disk::new(*limits)).collect();
        let mut direct = Direct { disks: &mut disks, mixes: &mut Mixes::default() };
        let root = grown.tree.build(&mut builder, None, &mut direct, true).unwrap();
        let stack = builder.finish(root);
        assert_eq!(stack.limits().size, size(&grown.planes) * 512);
        assert_eq!(usize::from(stack.backend_count()), grown.disks.len());
        let mut all = Vec::new();
        let mut route = stack.route(Io::new(Op::Read, 0, stack.limits().size));
        while let Some(piece) = route.next(&stack) {
            let piece = piece.unwrap();
            for sector in 0..piece.len / 512 {
                all.push(match piece.place {
                    Routed::Zero => None,
                    Routed::Backend(id) => {
                        Some((usize::from(id.0), index(piece.at / 512 + sector)))
                    }
                });
            }
        }
        all
    }

    #[test]
    fn the_slow_mapping_and_the_layers_agree() {
        for seed in 0..300 {
            let grown = grow(&mut Rng::new(seed, 9));
            if !grown.errors.is_empty() {
                continue;
            }
            assert!(size(&grown.planes) <= MOST_SECTORS + 64);
            for (sector, got) in routed(&grown).into_iter().enumerate() {
                let known = grown.planes.iter().any(|plane| plane[sector].get() == got);
                assert!(known, "seed {seed} sector {sector} {got:?}: {:?}", grown.tree);
            }
        }
    }
}
