//! Answers for the promises of a layer that resolves what `map` cannot say: its requests go through
//! the engine, and where they went is looked at below.

use devsplice_core::{Errno, Io, Op};
use devsplice_engine::{FileId, To};

use super::life::Handle;
use super::map::apart;
use super::{Subject, none};
use crate::bench::{BATCH, Bench, expect};
use crate::fake::{Bad, Fault, Faults};
use crate::suite::{Outcome, Verdict};
use crate::target::{Ask, Done};

/// Requests of which it is looked at where they went.
const ROUNDS: usize = 300;
/// Places of the layer at which something below is made to fail.
const PLACES: usize = 6;

/// The pieces of a read tile it, and those of a write cover it.
pub(super) fn answers(subject: &Subject) -> Outcome {
    let (mut bench, handle) = subject.target(&subject.below, 0)?;
    if !bench.offers(Op::Write) {
        return none("it is read-only");
    }
    bench.fill(64 << 10)?;
    for round in 0..ROUNDS {
        let op = if round % 2 == 0 { Op::Read } else { Op::Write };
        let extent = bench.extent(64 << 10);
        let ask = bench.ask(op, extent.at, extent.len);
        handle.trace();
        bench.must(&[ask])?;
        let sent = handle.trace();
        let parts = sent.iter().flat_map(|splice| &splice.parts);
        let mut parts: Vec<_> =
            parts.map(|part| (u64::from(part.at), u64::from(part.len))).collect();
        parts.sort_unstable();
        let mut end = 0;
        for (part, len) in parts {
            if part > end || (op == Op::Read && part != end) {
                return Err(format!("asked: {ask}; sent: {sent:?}; wrong from {end} on"));
            }
            end = end.max(part + len);
        }
        if end != extent.len {
            return Err(format!("asked: {ask}; sent: {sent:?}; incomplete"));
        }
    }
    Ok(Verdict::Kept)
}

/// What fails, and a byte of the layer that lies there.
#[derive(Clone, Copy)]
struct Place {
    file: u16,
    from: u64,
    to: u64,
    above: u64,
}

/// Where the layer writes its first block, its last one, and some in between; and, where all that
/// lies below may fail, whole devices.
fn places(subject: &Subject) -> Result<Vec<Place>, String> {
    let (mut bench, handle) = subject.target(&subject.below, 0)?;
    bench.fill(64 << 10)?;
    let block = bench.block();
    let mut blocks = vec![0, bench.span / block - 1];
    (2..PLACES).for_each(|_| blocks.push(bench.rng.below(bench.span / block)));
    let mut all: Vec<Place> = Vec::new();
    for above in blocks.into_iter().map(|number| number * block) {
        let mut asks = vec![bench.ask(Op::Write, above, block)];
        if bench.limits.fua {
            asks.push(bench.fua(above, block));
        }
        for ask in asks {
            handle.trace();
            bench.must(&[ask])?;
            for splice in handle.trace() {
                let To::File(FileId(file)) = splice.to else { continue };
                let goes_on = subject.appends == Some(file);
                let to = if goes_on { u64::MAX } else { splice.at + splice.len };
                let known = |other: &Place| (other.file, other.from) == (file, splice.at);
                if !all.iter().any(known) {
                    all.push(Place { file, from: splice.at, to, above });
                }
            }
        }
    }
    if subject.masks_errors {
        let whole = |file| Place { file, from: 0, to: u64::MAX, above: 0 };
        all.extend((0..).take(subject.below.len()).map(whole));
    }
    Ok(all)
}

/// Requests over a byte of the layer that lies where it fails, each alone among others elsewhere.
fn kinds(bench: &mut Bench, above: u64) -> Vec<Ask> {
    let start = above.saturating_sub(bench.rng.below(9) * bench.block());
    let blocks = 1 + bench.rng.below(16) + (above - start) / bench.block();
    let len = (blocks * bench.block()).min(bench.span - start);
    let ops = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }];
    let offered: Vec<_> = ops.into_iter().filter(|op| bench.offers(*op)).collect();
    let mut asks: Vec<_> = offered.into_iter().map(|op| bench.ask(op, start, len)).collect();
    if bench.limits.fua {
        asks.push(bench.fua(start, len));
    }
    asks
}

/// Whatever fails, a request of which a part failed fails, nothing that succeeded is lost, and no
/// other request fails; where there are copies none fails.
pub(super) fn errors(subject: &Subject) -> Outcome {
    if !subject.over(&subject.below, 0)?.offers(Op::Write) {
        return none("it is read-only");
    }
    let mut met = 0;
    let places = places(subject)?;
    for (turn, place) in places.iter().enumerate() {
        let errno = [Errno::EIO, Errno::ENOSPC, Errno::EILSEQ][turn % 3];
        let kind_count = kinds(&mut subject.over(&subject.below, 0)?, place.above).len();
        for kind in 0..kind_count {
            let hits = fails_at(subject, *place, errno, kind).map_err(|how| {
                format!("disk {} fails {errno} from {} on: {how}", place.file, place.from)
            })?;
            met += hits;
        }
    }
    // Or nothing was tested.
    if met < places.len() {
        return Err(format!("{} places, and errors were met {met} times", places.len()));
    }
    Ok(Verdict::Kept)
}

/// One kind of request while a place fails; how many met it.
fn fails_at(subject: &Subject, place: Place, errno: Errno, kind: usize) -> Result<usize, String> {
    let (mut bench, handle) = subject.target(&subject.below, 0)?;
    bench.fill(64 << 10)?;
    let Place { file, from, to, above } = place;
    let bad = Bad { file, from, to, fault: Fault::Fail(errno), times: u32::MAX };
    handle.faults(Faults { bad: vec![bad], ..Faults::default() });
    let mut asks: Vec<_> = kinds(&mut bench, above).into_iter().skip(kind).take(1).collect();
    let Io { extent, .. } = asks[0].io;
    asks.extend(apart(bench.mix([50, 50, 0, 0], 32 << 10), extent.at, extent.at + extent.len));
    let inner_before = handle.lock().inner_hits;
    let dones = bench.run(&asks)?;
    let met = Met { hits: handle.hits(), inner: handle.lock().inner_hits > inner_before, errno };
    judge(subject, place, &met, asks.iter().zip(&dones))?;
    recovers(subject, &mut bench, &handle)?;
    Ok(met.hits.iter().filter(|hit| **hit).count() + usize::from(met.inner))
}

/// What was met of what fails.
struct Met {
    /// Which requests did.
    hits: Vec<bool>,
    /// Whether the layer's own did.
    inner: bool,
    errno: Errno,
}

fn judge<'a>(
    subject: &Subject,
    place: Place,
    met: &Met,
    done: impl Iterator<Item = (&'a Ask, &'a Done)>,
) -> Result<(), String> {
    let masks = subject.masks_errors || subject.dispensable == Some(place.file);
    let any = met.inner || met.hits.contains(&true);
    for ((ask, done), hit) in done.zip(&met.hits) {
        let Io { op, extent, .. } = ask.io;
        let covers =
            op == Op::Flush || (extent.at <= place.above && place.above < extent.at + extent.len);
        let right = match done.result {
            Ok(()) => masks || !hit,
            Err(_) if masks => false,
            // Its own part, or what the layer did below for it.
            Err(errno) if errno == met.errno && (*hit || (met.inner && covers)) => true,
            Err(errno) => subject.ends_at_failure && any && op.changes() && errno == Errno::EIO,
        };
        if !right {
            let what = if *hit { "a part of it failed" } else { "no part of it failed" };
            return Err(format!("asked: {ask}; came: {:?}; {what}", done.result));
        }
    }
    Ok(())
}

/// All is well again: what was lost may be written, what was not is there.
fn recovers(subject: &Subject, bench: &mut Bench, handle: &Handle) -> Result<(), String> {
    if subject.masks_errors {
        // Still with what fails; then a device that was dropped comes back with what is old.
        let flush = bench.ask(Op::Flush, 0, 0);
        bench.must(&[flush])?;
        bench.check(64 << 10)?;
        handle.faults(Faults::default());
        bench.cut();
        return bench.check(64 << 10);
    }
    handle.faults(Faults::default());
    if subject.ends_at_failure {
        bench.cut();
    }
    bench.fill(64 << 10)?;
    bench.check(64 << 10)
}

/// Reads all, a batch at a time.
fn image(bench: &mut Bench) -> Result<Vec<u8>, String> {
    let step = 16 << 10;
    let mut bytes = Vec::new();
    let places: Vec<u64> = (0..bench.span).step_by(step).collect();
    for places in places.chunks(BATCH) {
        let mut asks = Vec::with_capacity(places.len());
        for at in places {
            asks.push(bench.ask(Op::Read, *at, (step as u64).min(bench.span - at)));
        }
        let dones = bench.run(&asks)?;
        expect(&asks, &dones, |_| Ok(()))?;
        dones.iter().for_each(|done| bytes.extend(&done.bytes));
    }
    Ok(bytes)
}

/// After a power cut the copies are made equal again: whichever device is lost then, what was read
/// before is read again, also where a write was under way and either would have been right.
pub(super) fn cut_then_fail(subject: &Subject) -> Outcome {
    if !subject.masks_errors {
        return none("it has no copies");
    }
    let mut below = subject.below.clone();
    below.iter_mut().for_each(|limits| limits.volatile_cache = true);
    for seed in [0, 2, 4, 6, 8, 10] {
        for file in (0..).take(below.len()) {
            let (mut bench, handle) = subject.target(&below, seed)?;
            lose(&mut bench, &handle, file)
                .map_err(|how| format!("seed {seed}, disk {file} is lost: {how}"))?;
        }
    }
    Ok(Verdict::Kept)
}

fn lose(bench: &mut Bench, handle: &Handle, file: u16) -> Result<(), String> {
    bench.fill(64 << 10)?;
    // What has become clean since, and is so on the disks, is what a log must name anew.
    handle.rest();
    let flush = bench.ask(Op::Flush, 0, 0);
    bench.must(&[flush])?;
    let asks = bench.mix([0, 100, 0, 0], 16 << 10);
    bench.must(&asks)?;
    bench.cut();
    handle.rest();
    let before = image(bench)?;
    let bad = Bad { file, from: 0, to: u64::MAX, fault: Fault::Fail(Errno::EIO), times: u32::MAX };
    handle.faults(Faults { bad: vec![bad], ..Faults::default() });
    let after = image(bench)?;
    match before.iter().zip(&after).position(|(a, b)| a != b) {
        Some(byte) => Err(format!("byte {byte} is another one than before")),
        None => Ok(()),
    }
}
