//! Answers for stacks of mapping layers: pieces tile the request, stay inside, and together behave
//! like one flat disk.
#![allow(clippy::unwrap_used)]

use devsplice_core::{Args, Io, Limits, NodeId, Op, Place, Result, Stack, StackBuilder};
use proptest::prelude::*;

/// A stack as the generator draws it; numbers become arguments that fit once sizes are known.
#[derive(Clone, Debug)]
enum Shape {
    Disk { blocks: u64, large: bool },
    Linear { below: Box<Shape>, skip: u64, keep: u64 },
    Concat(Vec<Shape>),
    Stripe { below: Vec<Shape>, shift: u32 },
    Delay(Box<Shape>),
}

fn shapes() -> impl Strategy<Value = Shape> {
    let disk = (8..40_u64, prop::bool::weighted(0.2));
    let disk = disk.prop_map(|(blocks, large)| Shape::Disk { blocks, large });
    disk.prop_recursive(5, 16, 3, |inner| {
        let legs = || prop::collection::vec(inner.clone(), 1..4);
        prop_oneof![
            (inner.clone(), 0..100_u64, 0..100_u64).prop_map(|(below, skip, keep)| {
                Shape::Linear { below: Box::new(below), skip, keep }
            }),
            legs().prop_map(Shape::Concat),
            (legs(), 0..3_u32).prop_map(|(below, shift)| Shape::Stripe { below, shift }),
            inner.clone().prop_map(|below| Shape::Delay(Box::new(below))),
        ]
    })
}

/// Builds the shape; errors are refusals that the layer is right about, such as an odd size.
fn build(shape: &Shape, builder: &mut StackBuilder, disks: &mut Vec<Limits>) -> Result<NodeId> {
    let mut legs = |shapes: &[Shape], builder: &mut StackBuilder| {
        shapes.iter().map(|one| build(one, builder, disks)).collect::<Result<Vec<_>>>()
    };
    let one = std::slice::from_ref;
    match shape {
        Shape::Disk { blocks, large } => {
            let block: u32 = if *large { 4096 } else { 512 };
            let size = blocks * 4096 + if *large { 0 } else { blocks % 3 * 512 };
            let limits = Limits { block, physical: block, ..Limits::ideal(size) };
            disks.push(limits);
            Ok(builder.backend("disk", limits)?.0)
        }
        Shape::Linear { below, skip, keep } => {
            let below = legs(one(below), builder)?;
            let limits = *builder.limits(below[0]);
            let block = u64::from(limits.block);
            let blocks = limits.size / block;
            let offset = skip % blocks;
            let size = 1 + keep % (blocks - offset);
            let keys = [("offset", offset * block), ("size", size * block)];
            layer("linear", &keys, &below, builder)
        }
        Shape::Concat(below) => {
            let below = legs(below, builder)?;
            layer("concat", &[], &below, builder)
        }
        Shape::Stripe { below, shift } => {
            let below = legs(below, builder)?;
            let block = below.iter().map(|leg| builder.limits(*leg).block).max().unwrap();
            layer("stripe", &[("chunk", u64::from(block) << shift)], &below, builder)
        }
        Shape::Delay(below) => {
            let below = legs(one(below), builder)?;
            layer("delay", &[], &below, builder)
        }
    }
}

/// Where each sector of the shape lies, as (disk, sector), said once more in plain lists.
fn sectors(
    shape: &Shape,
    builder: &mut StackBuilder,
    disks: &mut Vec<Limits>,
) -> Vec<(usize, u64)> {
    let mut parts = |shapes: &[Shape]| -> Vec<Vec<(usize, u64)>> {
        shapes.iter().map(|one| sectors(one, builder, disks)).collect()
    };
    match shape {
        Shape::Disk { .. } => {
            build(shape, builder, disks).unwrap();
            let disk = disks.len() - 1;
            (0..disks[disk].size / 512).map(|sector| (disk, sector)).collect()
        }
        Shape::Concat(below) => parts(below).concat(),
        Shape::Delay(below) => parts(std::slice::from_ref(below)).concat(),
        Shape::Linear { below, skip, keep } => {
            let all = parts(std::slice::from_ref(below)).concat();
            let block = block(below) as usize / 512;
            let blocks = all.len() / block;
            let offset = *skip as usize % blocks;
            let size = 1 + *keep as usize % (blocks - offset);
            all[offset * block..][..size * block].to_vec()
        }
        Shape::Stripe { below, shift } => {
            let chunk = (below.iter().map(block).max().unwrap() as usize / 512) << shift;
            let legs = parts(below);
            let rows = legs.iter().map(|leg| leg.len() / chunk).min().unwrap();
            let row = |row: usize| legs.iter().flat_map(move |leg| &leg[row * chunk..][..chunk]);
            (0..rows).flat_map(row).copied().collect()
        }
    }
}

/// The strictest block of the disks of a shape.
fn block(shape: &Shape) -> u64 {
    match shape {
        Shape::Disk { large, .. } => {
            if *large {
                4096
            } else {
                512
            }
        }
        Shape::Linear { below, .. } | Shape::Delay(below) => block(below),
        Shape::Concat(below) | Shape::Stripe { below, .. } => {
            below.iter().map(block).max().unwrap()
        }
    }
}

fn layer(
    name: &str,
    keys: &[(&str, u64)],
    below: &[NodeId],
    builder: &mut StackBuilder,
) -> Result<NodeId> {
    let driver = devsplice_layers::find(name).unwrap();
    let given: Vec<_> = keys.iter().map(|(k, v)| ((*k).to_owned(), v.to_string())).collect();
    let layer = (driver.make)(&Args::new(name, driver.keys, &given)?)?;
    builder.layer(name, layer, below, &mut |_, _, _| Ok(()))
}

/// A stack over disks that are byte vectors.
struct Machine {
    stack: Stack,
    limits: Vec<Limits>,
    disks: Vec<Vec<u8>>,
}

impl Machine {
    fn new(shape: &Shape) -> Option<Machine> {
        let (mut builder, mut limits) = (StackBuilder::new(), Vec::new());
        let top = build(shape, &mut builder, &mut limits).ok()?;
        let disks = limits.iter().map(|one| vec![0; one.size as usize]).collect();
        Some(Machine { stack: builder.finish(top), limits, disks })
    }

    /// Routes a request, checks its pieces, and calls `each` with (disk bytes, part of request).
    fn each_piece(&mut self, io: Io, mut each: impl FnMut(&mut [u8], std::ops::Range<usize>)) {
        let mut route = self.stack.route(io);
        let mut done = 0;
        while let Some(piece) = route.next(&self.stack) {
            let piece = piece.unwrap();
            let Place::Backend(id) = piece.place else { panic!("{piece:?}") };
            let limits = self.limits[usize::from(id.0)];
            assert_eq!(piece.part, done, "a gap or an overlap in the request");
            assert!(piece.len > 0 && piece.at + piece.len <= limits.size, "{piece:?}");
            assert_eq!((piece.at | piece.len) % u64::from(limits.block), 0, "{piece:?}");
            done += piece.len;
            let (at, len) = (piece.at as usize, piece.len as usize);
            let bytes = &mut self.disks[usize::from(id.0)][at..at + len];
            each(bytes, piece.part as usize..done as usize);
        }
        assert_eq!(done, io.extent.len, "the pieces end early");
    }

    fn read(&mut self, at: u64, len: u64) -> Vec<u8> {
        let mut into = vec![0xee; len as usize];
        self.each_piece(Io::new(Op::Read, at, len), |bytes, part| {
            into[part].copy_from_slice(bytes);
        });
        into
    }

    fn change(&mut self, op: Op, at: u64, from: &[u8]) {
        self.each_piece(Io::new(op, at, from.len() as u64), |bytes, part| {
            bytes.copy_from_slice(&from[part]);
        });
    }
}

/// What to do, with numbers that are cut to fit the device.
type Step = (u8, u64, u64, u8);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0..4_u8, 0..10_000_u64, 0..40_u64, 1..255_u8), 1..40)
}

/// An extent of the device from two arbitrary numbers.
fn fit(limits: &Limits, at: u64, len: u64) -> (u64, u64) {
    let block = u64::from(limits.block);
    let blocks = limits.size / block;
    let at = at % blocks;
    (at * block, (1 + len % (blocks - at)) * block)
}

/// Enough cases to find what we know how to break; no files of failures beside the sources.
fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1024) }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_stack_behaves_like_one_flat_disk(shape in shapes(), steps in steps()) {
        let Some(mut machine) = Machine::new(&shape) else { return Ok(()) };
        let limits = *machine.stack.limits();
        let mut model = vec![0; limits.size as usize];
        for (what, at, len, fill) in steps {
            let (at, len) = fit(&limits, at, len);
            let range = at as usize..(at + len) as usize;
            // Bytes that differ from one another, so that a swap shows.
            let data: Vec<u8> = (0..len).map(|n| fill.wrapping_add((n / 512 * 7) as u8)).collect();
            let zeros = vec![0; len as usize];
            match what {
                0 => prop_assert_eq!(&machine.read(at, len), &model[range]),
                1 => {
                    machine.change(Op::Write, at, &data);
                    model[range].copy_from_slice(&data);
                }
                2 => {
                    machine.change(Op::Discard, at, &zeros);
                    model[range].fill(0);
                }
                _ => {
                    machine.change(Op::WriteZeroes { unmap: true }, at, &zeros);
                    model[range].fill(0);
                }
            }
        }
        prop_assert_eq!(machine.read(0, limits.size), model);
    }

    #[test]
    fn each_sector_lies_where_plain_lists_say(shape in shapes()) {
        let Some(mut machine) = Machine::new(&shape) else { return Ok(()) };
        for (disk, limits) in machine.limits.clone().iter().enumerate() {
            for sector in 0..limits.size / 512 {
                let name = [disk as u64, sector].map(u64::to_le_bytes).concat();
                machine.disks[disk][sector as usize * 512..][..16].copy_from_slice(&name);
            }
        }
        let want = sectors(&shape, &mut StackBuilder::new(), &mut Vec::new());
        let got = machine.read(0, machine.stack.limits().size);
        prop_assert_eq!(got.len(), want.len() * 512);
        for (sector, (disk, at)) in got.chunks(512).zip(want) {
            prop_assert_eq!(&sector[..16], &[disk as u64, at].map(u64::to_le_bytes).concat()[..]);
        }
    }

    #[test]
    fn no_byte_of_a_disk_belongs_to_two_bytes_of_the_stack(shape in shapes()) {
        let Some(mut machine) = Machine::new(&shape) else { return Ok(()) };
        let size = machine.stack.limits().size;
        machine.each_piece(Io::new(Op::Write, 0, size), |bytes, _| {
            bytes.iter_mut().for_each(|byte| *byte += 1);
        });
        let used: usize = machine.disks.iter().flatten().map(|byte| usize::from(*byte)).sum();
        prop_assert_eq!(used as u64, size);
        prop_assert!(machine.disks.iter().flatten().all(|byte| *byte <= 1));
    }

    #[test]
    fn a_stack_is_as_strict_as_its_strictest_disk(shape in shapes(), cached: bool, fua: bool) {
        let (mut builder, mut disks) = (StackBuilder::new(), Vec::new());
        let Ok(top) = build(&shape, &mut builder, &mut disks) else { return Ok(()) };
        let mut all = vec![*builder.limits(top)];
        // The same shape again, over one disk more that is stricter in everything.
        let strict = Limits {
            block: 4096,
            physical: 4096,
            discard: 0,
            write_zeroes: false,
            read_only: true,
            volatile_cache: cached,
            fua,
            ..Limits::ideal(1 << 20)
        };
        let (extra, _) = builder.backend("strict", strict).unwrap();
        all.push(strict);
        if let Ok(both) = layer("concat", &[], &[top, extra], &mut builder) {
            let got = *builder.limits(both);
            prop_assert_eq!(got.size, all[0].size + all[1].size);
            prop_assert_eq!((got.block, got.physical, got.discard), (4096, 4096, 0));
            prop_assert!(!got.write_zeroes && got.read_only);
            prop_assert_eq!((got.volatile_cache, got.fua), (cached, fua));
        }
        prop_assert_eq!(all[0].block, disks.iter().map(|disk| disk.block).max().unwrap());
    }
}

#[test]
fn limits_fold_through_every_mapping_layer() {
    let odd = Limits {
        block: 1024,
        physical: 4096,
        volatile_cache: true,
        fua: false,
        rotational: true,
        read_only: true,
        write_zeroes: false,
        discard: 0,
        ..Limits::ideal(1 << 20)
    };
    for (name, keys) in [
        ("linear", &[("offset", 4096)][..]),
        ("concat", &[]),
        ("stripe", &[("chunk", 4096)]),
        ("delay", &[]),
        ("error", &[]),
    ] {
        let mut builder = StackBuilder::new();
        let (disk, _) = builder.backend("disk", odd).unwrap();
        let top = layer(name, keys, &[disk], &mut builder).unwrap();
        let got = Limits { size: odd.size, ..*builder.limits(top) };
        assert_eq!(got, odd, "{name}");
    }
}

#[test]
fn a_flush_reaches_each_disk_once() {
    let disk = || Shape::Disk { blocks: 8, large: false };
    let shape =
        Shape::Stripe { below: vec![Shape::Concat(vec![disk(), disk()]), disk()], shift: 1 };
    let machine = Machine::new(&Shape::Delay(Box::new(shape))).unwrap();
    let mut route = machine.stack.route(Io::new(Op::Flush, 0, 0));
    let mut seen = Vec::new();
    while let Some(piece) = route.next(&machine.stack) {
        let Place::Backend(id) = piece.unwrap().place else { panic!("zero") };
        seen.push(id.0);
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2]);
}
