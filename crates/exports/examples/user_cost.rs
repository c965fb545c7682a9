//! Answers for what this process costs: N requests over a kernel that does nothing.
//!
//! `user_cost DEPTH LAYERS N` under `valgrind --tool=callgrind`, with two different N, gives
//! instructions per request in user mode: the difference of the totals over the difference of the
//! counts. DEPTH is how many are in flight; LAYERS is `file` or `three`.

use std::sync::Arc;

use devsplice_core::{Args, Error, ErrorKind, Limits, NodeId, Result, Stack, StackBuilder};
use devsplice_engine::{Counts, Lane, Served, Shared, Stuck, Worker};
use devsplice_exports::ublk::imitation;
use devsplice_uring::{Config, FileKind, LaneMemory, RingFile, Uring};
use rustix::fs::MemfdFlags;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().collect();
    let usage = || Error::new(ErrorKind::Invalid, "user_cost", "DEPTH file|three REQUESTS");
    let [_, depth, layers, count] = &words[..] else { return Err(usage()) };
    let depth: u16 = depth.parse().map_err(|_| usage())?;
    let count: u64 = count.parse().map_err(|_| usage())?;
    let stack = match &layers[..] {
        "file" => file()?,
        "three" => three_layers()?,
        _ => return Err(usage()),
    };
    let counts = serve(depth, Arc::new(stack), count)?;
    println!("{} requests, {} enters, {} sqes", counts.requests, counts.enters, counts.sqes);
    let is_right = counts.requests == count && counts.splices == count && counts.errors == 0;
    let wrong = || Error::new(ErrorKind::Os, "user_cost", format!("{counts:?}"));
    is_right.then_some(()).ok_or_else(wrong)
}

fn serve(depth: u16, stack: Arc<Stack>, count: u64) -> Result<Counts> {
    let memory = LaneMemory { depth, bytes: 1 << 20, slots: true, locked: false };
    let flights = (u32::from(depth) * 2).clamp(64, 4096);
    let files = stack.backend_count() + 1;
    let mut ring = Uring::new(&Config { flights, files, lanes: vec![memory], inner: 0 })?;
    let mut bottoms = Vec::new();
    for _ in 0..stack.backend_count() {
        let fd = rustix::fs::memfd_create("bottom", MemfdFlags::CLOEXEC)
            .map_err(|errno| Error::os("a memory file", &errno.into()))?;
        bottoms.push(ring.add_file(RingFile { fd, kind: FileKind::Regular })?);
    }
    let at = |tag| ((u64::from(tag) * 0x9e37_79b1) & 0x3_ffff) << 12;
    let export = imitation::queue(&mut ring, depth, at)?;
    ring.imitate(count);
    let lane = Lane::new(export, Served::quietly(stack), bottoms.into());
    let shared = Arc::new(Shared::default());
    let never = Box::new(|_: &Stuck| {});
    let mut worker = Worker::new(ring, vec![lane], flights, Arc::clone(&shared), (0, never));
    worker.arm()?;
    worker.run()?;
    drop(worker);
    Ok(shared.read())
}

fn file() -> Result<Stack> {
    let mut builder = StackBuilder::new();
    let (top, _) = builder.backend("a", Limits::ideal(1 << 30))?;
    Ok(builder.finish(top))
}

/// A window of a window of two disks in turn.
fn three_layers() -> Result<Stack> {
    let mut builder = StackBuilder::new();
    let (a, _) = builder.backend("a", Limits::ideal(1 << 30))?;
    let (b, _) = builder.backend("b", Limits::ideal(1 << 30))?;
    let stripe = add(&mut builder, "stripe", &[("chunk", "64k")], &[a, b])?;
    let inner = add(&mut builder, "linear", &[("offset", "1M")], &[stripe])?;
    let outer = add(&mut builder, "linear", &[("offset", "4M"), ("size", "1G")], &[inner])?;
    Ok(builder.finish(outer))
}

fn add(
    builder: &mut StackBuilder,
    name: &str,
    keys: &[(&str, &str)],
    below: &[NodeId],
) -> Result<NodeId> {
    let missing = || Error::new(ErrorKind::NotFound, name, "no such driver");
    let driver = devsplice_layers::find(name).ok_or_else(missing)?;
    let given: Vec<_> = keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let layer = (driver.make)(&Args::new(name, driver.keys, &given)?)?;
    builder.layer(name, layer, below, &mut |_, _, _| Ok(()))
}
