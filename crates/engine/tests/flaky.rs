//! Answers for flaky: what a flush has promised is on the disk, what it has not is lost as the cut
//! says, and nothing else is.
#![allow(clippy::unwrap_used)]

mod common;

use common::product::{Product, product, product_with, stack};
use common::*;
use devsplice_core::{Errno, Io, Op};
use devsplice_engine::{FileId, To};

fn flaky() -> std::sync::Arc<devsplice_core::Stack> {
    stack("flaky", "", &[MIB, MIB])
}

#[test]
fn what_is_read_is_what_was_written_flushes_and_forced_writes_included() {
    for seed in 0..40 {
        // On few blocks more of them meet.
        let size = if seed % 2 == 0 { MIB } else { 32 << 10 };
        let mut plan = mix(&mut Rng::new(seed), size, 300);
        plan.retain(|ask| ask.io.op != Op::Discard);
        // More flushes and forced writes than usual, all over the place.
        for (place, ask) in plan.iter_mut().enumerate() {
            if place % 7 == 0 {
                ask.io = Io::new(Op::Flush, 0, 0);
            }
            ask.io.fua = ask.io.op == Op::Write && place % 5 == 0;
        }
        let count = plan.len();
        let faults = Faults { short: 10, eagain: 10, ..Faults::default() };
        let mut product = product_with(flaky(), plan, |setup| Setup { seed, faults, ..setup });
        product.rest();
        product.all_succeed(count);
        assert!(product.number("flushes") > 0);
    }
}

/// Writes with a pause before each flush and before each round: what a flush covers is known.
fn rounds(count: u64) -> Vec<Ask> {
    const PAUSE: u64 = 100_000_000;
    let mut plan = Vec::new();
    for round in 0..count {
        let at = round * PAUSE;
        for index in 0..16 {
            let place = (round * 5 + index * 11) % 60;
            let fua = index == 7;
            let io = Io { fua, ..Io::new(Op::Write, place * 16_384 + index * 512, 8192) };
            plan.push(Ask { at, io });
        }
        plan.push(Ask { at: at + PAUSE / 2, io: Io::new(Op::Flush, 0, 0) });
    }
    // Not flushed.
    for index in 0..20 {
        let at = count * PAUSE;
        plan.push(Ask { at, io: Io::new(Op::Write, index * 32_768 + 4096, 12_288) });
    }
    plan
}

/// What the disk holds when everything was flushed, and what it should hold if all survived.
fn before_and_after(product: &mut Product) -> (Vec<u8>, Vec<u8>) {
    product.rest();
    let mut after = product.bytes(0, MIB);
    let scratch = product.bytes(1, MIB);
    for index in 0..20 {
        let at = index * 32_768 + 4096;
        after[at..at + 12_288].copy_from_slice(&scratch[at..at + 12_288]);
    }
    (product.bytes(0, MIB), after)
}

#[test]
fn a_flush_puts_all_that_was_written_before_on_the_disk() {
    for seed in 0..10 {
        let plan: Vec<_> = rounds(3).into_iter().filter(|ask| ask.at < 300_000_000).collect();
        let count = plan.len();
        let mut product = product(flaky(), plan, seed);
        product.rest();
        product.all_succeed(count);
        assert_eq!(product.number("unflushed"), 0);
        // Read back through the layer: all of it comes from the disk now.
        let scratch = product.bytes(1, MIB);
        let disk = product.bytes(0, MIB);
        for (at, sector) in scratch.chunks(512).enumerate() {
            let forced = disk[at * 512..at * 512 + 512] != *sector;
            // Only what went past the scratch device may differ from it.
            assert!(!forced || is_forced(at as u64 * 512), "sector {at} was lost");
        }
        let world = product.bench.world.lock().unwrap();
        let flushes = |file| {
            let to = To::File(FileId(file));
            world.log.iter().filter(|one| one.op == Op::Flush && one.to == to).count()
        };
        assert!(flushes(0) >= 3, "the disk itself is flushed");
    }
}

fn is_forced(at: u64) -> bool {
    (0..3).any(|round| {
        let start = (round * 5 + 7 * 11) % 60 * 16_384 + 7 * 512;
        (start..start + 8192).contains(&at)
    })
}

#[test]
fn a_cut_loses_exactly_what_was_not_flushed() {
    for (how, loses_all, loses_none) in [("all", true, false), ("none", false, true)] {
        let mut product = product(flaky(), rounds(3), 1);
        let (before, after) = before_and_after(&mut product);
        assert_ne!(before, after);
        let unflushed = 20 * 12_288;
        assert_eq!(product.number("unflushed"), unflushed);
        let kept = if loses_none { unflushed } else { 0 };
        let text = format!("cut: {unflushed} bytes were not flushed, {kept} of them survived");
        assert_eq!(product.tell(&format!("cut {how}")), Ok(text));
        assert_eq!(product.bytes(0, MIB), if loses_all { before } else { after });
        assert_eq!(product.number("unflushed"), 0);
    }
}

#[test]
fn a_seed_says_which_blocks_survive_and_a_tear_parts_them_between_sectors() {
    let cut = |words: &str| {
        let mut product = product(flaky(), rounds(3), 1);
        let (before, after) = before_and_after(&mut product);
        assert!(product.tell(words).is_ok());
        (before, after, product.bytes(0, MIB))
    };
    let mut torn = 0;
    for words in ["cut random 1", "cut random 2", "cut tear 1", "cut tear 2"] {
        let (before, after, left) = cut(words);
        assert_eq!(cut(words).2, left, "{words}: the same seed is the same cut");
        assert!(left != before && left != after, "{words}: some survive, some do not");
        for at in (0..left.len()).step_by(4096) {
            let sectors: Vec<_> = (at..at + 4096)
                .step_by(512)
                .map(|at| at..at + 512)
                .filter(|sector| before[sector.clone()] != after[sector.clone()])
                .map(|sector| {
                    let is_new = left[sector.clone()] == after[sector.clone()];
                    assert!(is_new || left[sector.clone()] == before[sector.clone()], "{words}");
                    is_new
                })
                .collect();
            let is_torn = sectors.windows(2).any(|two| two[0] != two[1]);
            assert!(!is_torn || words.contains("tear"), "{words} tore at {at}");
            torn += usize::from(is_torn);
        }
    }
    assert!(torn > 0, "nothing was torn");
}

#[test]
fn after_a_cut_nothing_is_served_until_it_is_on_again() {
    let late = |op, ms: u64| Ask { at: ms * 1_000_000, io: Io::new(op, 0, 4096) };
    let plan = vec![
        late(Op::Write, 0),
        late(Op::Read, 500),
        late(Op::Write, 500),
        Ask { at: 500_000_000, io: Io::new(Op::Flush, 0, 0) },
        late(Op::Write, 900),
        late(Op::Read, 950),
    ];
    let mut product = product(flaky(), plan, 1);
    product.turn_until(|product| !product.done().is_empty());
    assert!(product.tell("cut all").is_ok());
    product.turn_until(|product| product.done().len() == 4);
    assert_eq!(product.tell("on"), Ok("on".to_owned()));
    product.rest();
    for done in product.done() {
        let want = if (1..4).contains(&done.seq) { Err(Errno::EIO) } else { Ok(()) };
        assert_eq!(done.result, want, "{}", done.seq);
    }
    assert!(product.tell("cut").is_err() && product.tell("cut random x").is_err());
}

#[test]
fn a_cut_lasts_through_the_rhythm_of_up_and_down() {
    let late = |ms: u64| Ask { at: ms * 1_000_000, io: Io::new(Op::Write, 0, 4096) };
    let stack = stack("flaky", "up=100ms down=100ms", &[MIB, MIB]);
    let mut product = product(stack, vec![late(10), late(250), late(270)], 1);
    product.turn_until(|product| !product.done().is_empty());
    assert!(product.tell("cut all").is_ok());
    product.turn_until(|product| product.done().len() == 2);
    assert!(product.tell("on").is_ok());
    product.turn_until(|product| product.done().len() == 3);
    let results: Vec<_> = product.done().iter().map(|done| done.result).collect();
    assert_eq!(results, [Ok(()), Err(Errno::EIO), Ok(())]);
}

#[test]
fn what_cannot_be_flushed_fails_the_flush_and_is_kept() {
    let bad = |file, fault| Bad { file, from: 0, to: MIB, fault, times: 1 };
    let plan = vec![
        now(Io::new(Op::Write, 0, 4096)),
        Ask { at: 50_000_000, io: Io::new(Op::Flush, 0, 0) },
        Ask { at: 100_000_000, io: Io::new(Op::Read, 0, 4096) },
        Ask { at: 150_000_000, io: Io::new(Op::Flush, 0, 0) },
    ];
    let faults = Faults { bad: vec![bad(0, Fault::Fail(Errno::ENOSPC))], ..Faults::default() };
    let mut product = product_with(flaky(), plan, |setup| Setup { faults, ..setup });
    product.rest();
    let results: Vec<_> = product.done().iter().map(|done| done.result).collect();
    assert_eq!(results, [Ok(()), Err(Errno::ENOSPC), Ok(()), Ok(())]);
    assert_eq!(product.bytes(0, 4096), product.bytes(1, 4096));
}

#[test]
fn up_and_down_take_turns() {
    let plan: Vec<_> = (0..40)
        .map(|index| Ask { at: index * 10_000_000, io: Io::new(Op::Write, index * 4096, 4096) })
        .collect();
    for (mode, fails) in [("error", true), ("error-writes", true), ("drop-writes", false)] {
        let keys = format!("up=100ms down=100ms while-down={mode}");
        let mut product = product(stack("flaky", &keys, &[MIB, MIB]), plan.clone(), 2);
        product.turn_until(|product| product.done().len() == 40);
        let scratch = product.bytes(1, MIB);
        for done in product.done() {
            let at_ms = done.at / 1_000_000 % 200;
            if !(5..95).contains(&at_ms) && !(105..195).contains(&at_ms) {
                continue;
            }
            let is_down = at_ms > 100;
            assert_eq!(done.result.is_err(), is_down && fails, "{mode} at {at_ms} ms");
            let at = usize::try_from(done.io.extent.at).unwrap();
            let is_there = scratch[at..at + 4096].iter().any(|byte| *byte != 0);
            assert_eq!(is_there, !is_down, "{mode} at {at_ms} ms");
        }
    }
}
