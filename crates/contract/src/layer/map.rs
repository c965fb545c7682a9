//! Answers for what a layer's `map` promises: where data goes, what is offered, what fails.

use devsplice_core::{Dma, Errno, Io, Limits, Op, Place, Stack, Stop};

use super::{SEEDS, Subject, none, through};
use crate::bench::{BATCH, Bench, LARGEST, expect};
use crate::fake::{Bad, Fault, Faults};
use crate::front::laxer;
use crate::suite::{Outcome, Verdict};
use crate::target::Ask;

/// A piece of a request: which disk, where there, where in the request, bytes.
type Piece = (Option<u16>, u64, u64, u64);

fn pieces(stack: &Stack, io: Io) -> Result<Vec<Piece>, Stop> {
    let mut route = stack.route(io);
    let mut all = Vec::new();
    while let Some(piece) = route.next(stack) {
        let piece = piece?;
        let disk = match piece.place {
            Place::Backend(id) => Some(id.0),
            Place::Zero => None,
        };
        all.push((disk, piece.at, piece.part, piece.len));
    }
    Ok(all)
}

/// Routing alone, without data: the pieces of a read tile it, those of a change cover it, and equal
/// requests get equal answers.
pub(super) fn answers(subject: &Subject) -> Outcome {
    if subject.resolves {
        return through::answers(subject);
    }
    let stack = subject.stack(&subject.below).map_err(|error| error.to_string())?;
    let mut bench = subject.over(&subject.below, 0)?;
    let ops = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }];
    let ops: Vec<_> = ops.into_iter().filter(|op| bench.offers(*op)).collect();
    for round in 0..2000 {
        let op = ops[round % ops.len()];
        let extent = bench.extent(if round % 10 == 0 { LARGEST } else { 64 << 10 });
        let io = Io::new(op, extent.at, extent.len);
        let fails = |stop| format!("asked: {io:?}; answered: {stop:?}; must: somewhere");
        let first = pieces(&stack, io).map_err(fails)?;
        // Reads may take turns between copies.
        let repeats = subject.masks_errors || pieces(&stack, io).as_ref() == Ok(&first);
        if op == Op::Read && !subject.masks_errors {
            located(&stack, io, &first)?;
        }
        let mut parts: Vec<_> = first.iter().map(|(.., part, len)| (*part, *len)).collect();
        parts.sort_unstable();
        let mut end = 0;
        for (part, len) in parts {
            let gap = part > end || (op == Op::Read && part != end);
            if gap {
                return Err(format!("asked: {io:?}; answered: {first:?}; wrong from {end} on"));
            }
            end = end.max(part + len);
        }
        if end != extent.len || !repeats {
            return Err(format!("asked: {io:?}; answered: {first:?}; incomplete, or not twice"));
        }
    }
    Ok(Verdict::Kept)
}

/// Who asks where bytes lie is told what a read of them comes to, or that reading tells.
fn located(stack: &Stack, io: Io, read: &[Piece]) -> Result<(), String> {
    let Some(piece) = stack.locate(io.extent) else { return Ok(()) };
    let disk = match piece.place {
        Place::Backend(id) => Some(id.0),
        Place::Zero => None,
    };
    let told = (disk, piece.at, piece.part, piece.len);
    if read.first() == Some(&told) {
        return Ok(());
    }
    Err(format!("asked where it lies: {io:?}; answered: {told:?}; must: {:?}", read.first()))
}

/// What devices below may lack, one thing at a time.
fn strictness() -> Vec<fn(&mut Limits)> {
    vec![
        |limits| (limits.block, limits.physical) = (4096, 4096),
        |limits| limits.physical = 4096,
        |limits| limits.read_only = true,
        |limits| limits.volatile_cache = true,
        |limits| limits.fua = false,
        |limits| limits.discard = 0,
        |limits| limits.write_zeroes = false,
        |limits| limits.dma = Dma { align: 512, virt_boundary: 4096 },
    ]
}

/// Over devices each of which lacks something, the layer offers no more, and sends none what it
/// does not offer: the model disks see to that.
pub(super) fn as_strict(subject: &Subject) -> Outcome {
    if subject.below.is_empty() {
        return none("nothing lies below");
    }
    let mut opened = 0;
    for bend in strictness() {
        for place in 0..subject.below.len() {
            let mut below = subject.below.clone();
            bend(&mut below[place]);
            // What it refuses to lie over, it makes no promise about.
            let Ok(stack) = subject.stack(&below) else { continue };
            opened += 1;
            let wrong: Vec<_> = below.iter().flat_map(|one| laxer(stack.limits(), one)).collect();
            if let Some(text) = wrong.first() {
                return Err(format!("disk {place} of {}: {text}", below.len()));
            }
            let mut bench = subject.over(&below, 0)?;
            if bench.offers(Op::Write) {
                bench.fill(64 << 10)?;
            }
            for _ in 0..4 {
                let asks = bench.mix([40, 30, 5, 10], 64 << 10);
                bench.must(&asks)?;
            }
            bench.check(64 << 10)?;
        }
    }
    for place in 0..subject.below.len() {
        locked(subject, place).map_err(|how| format!("disk {place} may not be written: {how}"))?;
    }
    if opened == 0 { none("it opens over none of them") } else { Ok(Verdict::Kept) }
}

/// A device that was filled may not be written any more: it is not, whatever fails.
fn locked(subject: &Subject, place: usize) -> Result<(), String> {
    let mut below = subject.below.clone();
    below[place].read_only = true;
    let (mut bench, target) = subject.target(&subject.below, 0)?;
    // What it refuses to lie over, it makes no promise about.
    if !bench.offers(Op::Write) || subject.stack(&below).is_err() {
        return Ok(());
    }
    bench.fill(64 << 10)?;
    let flush = bench.ask(Op::Flush, 0, 0);
    bench.must(&[flush])?;
    target.rest();
    bench.check(64 << 10)?;
    target.lock_device(place);
    bench.cut();
    bench.check(64 << 10)?;
    let bad = |file| Bad { file, from: 0, to: u64::MAX, fault: Fault::Fail(Errno::EIO), times: 9 };
    let bad = (0..).take(below.len()).map(bad).collect();
    target.faults(Faults { bad, ..Faults::default() });
    for _ in 0..4 {
        let asks = bench.mix([90, 0, 10, 0], 64 << 10);
        bench.run(&asks)?;
    }
    Ok(())
}

pub(super) fn unnoticed(subject: &Subject) -> Outcome {
    for seed in 0..SEEDS {
        let (mut bench, target) = subject.target(&subject.below, seed)?;
        if !bench.offers(Op::Write) {
            return none("it is read-only");
        }
        // Few enough transient errors that no splice meets too many in a row.
        target.faults(Faults { short: 40, eagain: 5, eintr: 5, bad: Vec::new() });
        bench.fill(64 << 10)?;
        for _ in 0..8 {
            let asks = bench.mix([40, 40, 4, 8], 128 << 10);
            bench.must(&asks).map_err(|how| format!("seed {seed}: {how}"))?;
        }
        bench.check(64 << 10)?;
    }
    Ok(Verdict::Kept)
}

/// Where a layer puts what it keeps: the first and the last block of pieces of all of it.
fn positions(stack: &Stack, bench: &mut Bench) -> Result<Vec<(u16, u64, u64)>, String> {
    let block = bench.block();
    let mut all = Vec::new();
    let mut at = 0;
    while at < bench.span {
        let len = LARGEST.min(bench.span - at);
        let found =
            pieces(stack, Io::new(Op::Write, at, len)).map_err(|stop| format!("{stop:?}"))?;
        for (disk, below, part, len) in found {
            let Some(disk) = disk else { continue };
            all.push((disk, below, at + part));
            all.push((disk, below + len - block, at + part + len - block));
        }
        at += len;
    }
    // The first, the last, and some in between.
    while all.len() > 24 {
        let place = bench.rng.below(all.len() as u64 - 2) + 1;
        all.swap_remove(usize::try_from(place).unwrap_or(0));
    }
    Ok(all)
}

pub(super) fn errors(subject: &Subject) -> Outcome {
    if subject.resolves {
        return through::errors(subject);
    }
    let (mut bench, target) = subject.target(&subject.below, 0)?;
    if !bench.offers(Op::Write) {
        return none("it is read-only");
    }
    bench.fill(64 << 10)?;
    let places = positions(&target.stack, &mut bench)?;
    if places.is_empty() {
        return none("nothing lies below");
    }
    let ops = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }];
    for (turn, (file, from, above)) in places.into_iter().enumerate() {
        for op in ops.into_iter().filter(|op| bench.offers(*op)).collect::<Vec<_>>() {
            let errno = [Errno::EIO, Errno::ENOSPC, Errno::EILSEQ][turn % 3];
            let to = from + bench.block();
            let bad = Bad { file, from, to, fault: Fault::Fail(errno), times: u32::MAX };
            target.faults(Faults { bad: vec![bad], ..Faults::default() });
            let start = above.saturating_sub(bench.rng.below(9) * bench.block());
            let blocks = 1 + bench.rng.below(16) + (above - start) / bench.block();
            let len = (blocks * bench.block()).min(bench.span - start);
            let mut asks = vec![bench.ask(op, start, len)];
            asks.extend(apart(bench.mix([50, 50, 0, 0], 32 << 10), start, start + len));
            let want = |place: usize| touches(&target.stack, &asks[place], &bad, errno);
            let wants: Vec<_> = (0..asks.len()).map(want).collect();
            let dones = bench.run(&asks)?;
            expect(&asks, &dones, |place| wants[place])
                .map_err(|how| format!("disk {file} fails {errno} at {from}: {how}"))?;
        }
    }
    target.faults(Faults::default());
    bench.fill(64 << 10)?;
    bench.check(64 << 10)?;
    Ok(Verdict::Kept)
}

pub(super) fn apart(asks: Vec<Ask>, from: u64, to: u64) -> impl Iterator<Item = Ask> {
    asks.into_iter().take(BATCH / 2).filter(move |ask| {
        let extent = ask.io.extent;
        extent.at >= to || extent.at + extent.len <= from
    })
}

fn touches(stack: &Stack, ask: &Ask, bad: &Bad, errno: Errno) -> Result<(), Errno> {
    let hit = pieces(stack, ask.io)
        .map_err(Errno::from)?
        .into_iter()
        .any(|(disk, at, _, len)| disk == Some(bad.file) && at < bad.to && at + len > bad.from);
    if hit { Err(errno) } else { Ok(()) }
}

pub(super) fn flush_errors(subject: &Subject) -> Outcome {
    if subject.below.is_empty() {
        return none("nothing lies below");
    }
    for place in 0..subject.below.len() {
        if subject.scratch.is_some_and(|scratch| usize::from(scratch) == place) {
            continue;
        }
        let (mut bench, target) = subject.target(&subject.below, 0)?;
        // The device is there before anything fails.
        let first = bench.ask(Op::Read, 0, bench.block());
        bench.must(&[first])?;
        target.lock().disks[place].bad_flush = Some((Errno::ENOSPC, u32::MAX));
        let asks = [bench.ask(Op::Flush, 0, 0), bench.ask(Op::Read, 0, bench.block())];
        let dones = bench.run(&asks)?;
        let dispensable = subject.dispensable.is_some_and(|other| usize::from(other) == place);
        let masks = subject.masks_errors || dispensable;
        let want = |ask: usize| if ask == 0 && !masks { Err(Errno::ENOSPC) } else { Ok(()) };
        expect(&asks, &dones, want).map_err(|how| format!("disk {place} fails it: {how}"))?;
    }
    Ok(Verdict::Kept)
}

pub(super) fn huge(subject: &Subject) -> Outcome {
    let count = subject.below.len() as u64;
    if count == 0 {
        return none("nothing lies below");
    }
    let size = i64::MAX.cast_unsigned() / count / LARGEST * LARGEST;
    let below: Vec<_> = subject.below.iter().map(|one| Limits { size, ..*one }).collect();
    let stack = match subject.stack(&below) {
        Ok(stack) => stack,
        Err(error) => return none(&format!("it does not lie over such: {error}")),
    };
    let size = subject.span.min(stack.limits().size);
    let len = LARGEST.min(size);
    let mut answered = 0;
    for at in [0, (size - len) / 2 / LARGEST * LARGEST, size - len] {
        for op in [Op::Read, Op::Write, Op::Discard] {
            if stack.limits().read_only && op.changes() {
                continue;
            }
            let io = Io::new(op, at, len);
            let found = match pieces(&stack, io) {
                Ok(found) => found,
                // Routing alone does not resolve.
                Err(Stop::Miss(..)) if subject.resolves => continue,
                Err(stop) => return Err(format!("asked: {io:?}; {stop:?}")),
            };
            answered += 1;
            let sum: u64 = found.iter().map(|(.., len)| len).sum();
            if sum < len {
                return Err(format!("asked: {io:?}; answered for {sum} bytes"));
            }
        }
    }
    if answered == 0 {
        return none("all that it answers there it has to resolve");
    }
    Ok(Verdict::Kept)
}
