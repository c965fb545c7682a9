//! Answers for the time that routing takes: stacks of one, three and twelve layers, requests that
//! a stripe cuts, a mirror. `cargo bench -p devsplice-layers`.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // What the macros make.
#![allow(clippy::unwrap_used, clippy::expect_used)] // It is measured or it is not.

use std::cell::RefCell;
use std::future::{pending, ready};
use std::hint::black_box;
use std::rc::Rc;
use std::task::{Context, Waker};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use devsplice_core::prelude::*;
use devsplice_core::{BackendId, Bottoms, NodeId, Place, Stack, StackBuilder};

/// Bytes of each disk. Only metadata is ever read from one.
const DISK: u64 = 1 << 30;
/// Bytes of a disk that are kept, at its end: enough for a mirror's metadata.
const KEPT: u64 = 1 << 20;
/// Bytes of each device that requests go to.
const SPAN: u64 = DISK / 2;

/// The ends of two disks.
#[derive(Clone)]
struct Disks(Rc<RefCell<[Vec<u8>; 2]>>);

impl Disks {
    fn new() -> Disks {
        Disks(Rc::new(RefCell::new([(); 2].map(|()| vec![0; usize::try_from(KEPT).unwrap()]))))
    }

    fn get(&self, disk: usize, at: u64, into: &mut [u8]) {
        let Some(at) = at.checked_sub(DISK - KEPT) else { return into.fill(0) };
        let at = usize::try_from(at).unwrap();
        into.copy_from_slice(&self.0.borrow()[disk][at..at + into.len()]);
    }

    fn put(&self, disk: usize, at: u64, bytes: &[u8]) {
        let Some(at) = at.checked_sub(DISK - KEPT) else { return };
        let at = usize::try_from(at).unwrap();
        self.0.borrow_mut()[disk][at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl Bottoms for Disks {
    fn read(&mut self, id: BackendId, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.get(usize::from(id.0), at, into);
        Ok(())
    }

    fn write(&mut self, id: BackendId, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.put(usize::from(id.0), at, bytes);
        Ok(())
    }
}

/// Everything but a sleep is done at once.
impl Meta for Disks {
    fn read(&self, port: Port, at: u64, len: usize) -> Slow<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.get(usize::from(port.0), at, &mut bytes);
        Box::pin(ready(Ok(bytes)))
    }

    fn write(&self, port: Port, at: u64, bytes: Vec<u8>, _: bool) -> Slow {
        self.put(usize::from(port.0), at, &bytes);
        Box::pin(ready(Ok(())))
    }

    fn flush(&self, _: Port) -> Slow {
        Box::pin(ready(Ok(())))
    }

    fn copy(&self, _: Port, _: Vec<Port>, _: u64, _: usize) -> Slow {
        Box::pin(ready(Ok(())))
    }

    fn sleep(&self, _: u64) -> Slow {
        Box::pin(pending())
    }

    fn now_ns(&self) -> u64 {
        0
    }

    fn grace(&self) -> Slow {
        Box::pin(ready(Ok(())))
    }

    fn is_unsettled(&self) -> bool {
        false
    }

    fn event(&self, _: String) {}
}

fn args(name: &str, keys: &str) -> Args {
    let pairs = keys.split_whitespace().map(|word| word.split_once('=').unwrap());
    let given: Vec<_> = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    Args::new(name, devsplice_layers::find(name).unwrap().keys, &given).unwrap()
}

struct Builder(StackBuilder, Disks);

impl Builder {
    fn new() -> Builder {
        Builder(StackBuilder::new(), Disks::new())
    }

    fn disk(&mut self) -> NodeId {
        self.0.backend("disk", Limits::ideal(DISK)).unwrap().0
    }

    fn layer(&mut self, name: &str, keys: &str, below: &[NodeId]) -> NodeId {
        let driver = devsplice_layers::find(name).unwrap();
        let layer = (driver.make)(&args(name, keys)).unwrap();
        let Builder(builder, disks) = self;
        let mut read = |id, at, into: &mut [u8]| Bottoms::read(disks, id, at, into);
        builder.layer(name, layer, below, &mut read).unwrap()
    }
}

/// `count` windows over one disk.
fn linear(count: usize) -> Stack {
    let mut builder = Builder::new();
    let mut top = builder.disk();
    for _ in 0..count {
        top = builder.layer("linear", "offset=1M", &[top]);
    }
    builder.0.finish(top)
}

fn stripe(windows: usize) -> Stack {
    let mut builder = Builder::new();
    let disks = [builder.disk(), builder.disk()];
    let mut top = builder.layer("stripe", "chunk=64k", &disks);
    for _ in 0..windows {
        top = builder.layer("linear", "offset=1M", &[top]);
    }
    builder.0.finish(top)
}

/// A mirror in sync, of which all that requests go to is marked in its log.
fn mirror() -> Stack {
    let mut builder = Builder::new();
    let disks = [builder.disk(), builder.disk()];
    let format = devsplice_layers::format_of("mirror").unwrap();
    let args = args("mirror", "");
    let Builder(stack, bottoms) = &mut builder;
    stack.format("mirror", &disks, bottoms, |lower| format(&args, lower, true)).unwrap();
    let top = builder.layer("mirror", "", &disks);
    let Builder(stack, meta) = builder;
    let stack = stack.finish(top);
    let (_, _, live) = stack.lives().next().unwrap();
    let meta: Rc<dyn Meta> = Rc::new(meta);
    let mut context = Context::from_waker(Waker::noop());
    // To where it waits for regions to cool.
    assert!(live.clone().run(meta.clone()).as_mut().poll(&mut context).is_pending());
    for at in (0..SPAN).step_by(1 << 20) {
        let io = Io::new(Op::Write, at, 1 << 20);
        assert!(live.clone().resolve(io, meta.clone()).as_mut().poll(&mut context).is_ready());
    }
    stack
}

/// Routes as the engine does; the sum keeps the pieces from being unused.
fn route(stack: &Stack, io: Io) -> u64 {
    let mut sum = 0;
    let mut add = |place: Place, at: u64| match place {
        Place::Backend(id) => sum += at ^ u64::from(id.0),
        Place::Zero => {}
    };
    let bend = match stack.straight(io) {
        Ok(piece) => {
            add(piece.place, piece.at);
            return sum;
        }
        Err(bend) => bend,
    };
    let mut route = stack.route(io);
    let mut first = route.follow(stack, &bend);
    while let Some(piece) = first.take().or_else(|| route.next(stack)) {
        let piece = piece.expect("nothing is missed, and nothing fails");
        add(piece.place, piece.at);
    }
    sum
}

fn pieces(stack: &Stack, io: Io) -> usize {
    let mut route = stack.route(io);
    std::iter::from_fn(|| route.next(stack)).filter(|piece| piece.as_ref().is_ok()).count()
}

fn routing(criterion: &mut Criterion) {
    let cases = [
        ("linear, 4k", linear(1), Op::Read, 4 << 10, 1),
        ("3 x linear, 4k", linear(3), Op::Read, 4 << 10, 1),
        ("12 x linear, 4k", linear(12), Op::Read, 4 << 10, 1),
        ("linear over linear over stripe, 4k", stripe(2), Op::Read, 4 << 10, 1),
        ("stripe, 1M in 64k chunks", stripe(0), Op::Read, 1 << 20, 16),
        ("linear over stripe, 1M in 64k chunks", stripe(1), Op::Read, 1 << 20, 16),
        ("mirror, read of 4k", mirror(), Op::Read, 4 << 10, 1),
        ("mirror, write of 4k", mirror(), Op::Write, 4 << 10, 2),
        ("mirror, write of 1M", mirror(), Op::Write, 1 << 20, 2),
    ];
    let mut group = criterion.benchmark_group("route");
    for (name, stack, op, len, count) in cases {
        assert_eq!(pieces(&stack, Io::new(op, 0, len)), count, "{name}");
        let mut number = 0_u64;
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                // An odd factor visits each place before it repeats one.
                number = number.wrapping_add(0x9e37_79b1);
                let at = number % (SPAN / len) * len;
                black_box(route(&stack, black_box(Io::new(op, at, len))))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, routing);
criterion_main!(benches);
