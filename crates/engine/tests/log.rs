//! Answers for log: played back, it is what was written; up to a flush, it is at least what was
//! written before; full and broken logs end where they can be trusted.
#![allow(clippy::unwrap_used)]

mod common;

use common::product::{DISK, Product, product, product_with, stack};
use common::*;
use devsplice_core::{Errno, Io, Op, Stack};
use std::sync::Arc;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

fn log(keys: &str, log_size: u64) -> Arc<Stack> {
    stack("log", keys, &[MIB, log_size])
}

struct Entry {
    at: usize,
    len: usize,
    flags: u64,
    name: String,
    data: Vec<u8>,
}

/// Reads a log as docs/formats/log-writes.md says, by nothing but that page.
fn entries(log: &[u8]) -> Vec<Entry> {
    let word = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
    assert_eq!(word(0), 0x6a_7366_7773_6872, "the magic");
    assert_eq!(word(8), 1, "the version");
    let sector = u32::from_le_bytes(log[24..28].try_into().unwrap()) as usize;
    let mut place = sector;
    let small = |number: u64| usize::try_from(number).unwrap();
    (0..word(16))
        .map(|_| {
            let [at, len, flags, name] = [0, 8, 16, 24].map(|field| word(place + field));
            let (at, len) = (small(at) * sector, small(len) * sector);
            let name = String::from_utf8(log[place + 32..place + 32 + small(name)].to_vec());
            place += sector;
            let held = if flags & DISCARD == 0 { len } else { 0 };
            let data = log[place..place + held].to_vec();
            place += held;
            Entry { at, len, flags, name: name.unwrap(), data }
        })
        .collect()
}

fn play(entries: &[Entry]) -> Vec<u8> {
    let mut disk = vec![0; usize::try_from(MIB).unwrap()];
    for entry in entries {
        if entry.flags & DISCARD != 0 {
            disk[entry.at..entry.at + entry.len].fill(0);
        }
        disk[entry.at..entry.at + entry.data.len()].copy_from_slice(&entry.data);
    }
    disk
}

fn logged(product: &Product) -> Vec<Entry> {
    entries(&product.bytes(1, DISK))
}

#[test]
fn a_log_played_back_is_the_disk() {
    for seed in 0..30 {
        let mut plan = mix(&mut Rng::new(seed), MIB, 300);
        plan.retain(|ask| matches!(ask.io.op, Op::Read | Op::Write | Op::Flush));
        plan.push(Ask { at: 1_000_000_000, io: Io::new(Op::Flush, 0, 0) });
        let count = plan.len();
        let forced = plan.iter().filter(|ask| ask.io.fua).count();
        let faults = Faults { short: 10, eagain: 10, eintr: 5, bad: vec![] };
        let stack = log("", DISK);
        let mut product = product_with(stack, plan, |setup| Setup { seed, faults, ..setup });
        product.rest();
        product.all_succeed(count);
        let entries = logged(&product);
        assert!(play(&entries) == product.bytes(0, MIB), "seed {seed}");
        assert_eq!(entries.iter().filter(|entry| entry.flags == FUA).count(), forced);
    }
}

#[test]
fn up_to_a_flush_it_holds_all_that_was_written_before() {
    const PAUSE: u64 = 100_000_000;
    for seed in 0..10 {
        let mut plan = Vec::new();
        for round in 0..5 {
            for index in 0..20 {
                let place = (round * 7 + index * 3) % 60 * 16_384;
                let io = Io::new(Op::Write, place + index * 512, 4096 + index * 512);
                plan.push(Ask { at: round * PAUSE, io });
            }
            let flush = Io::new(Op::Flush, 0, 0);
            plan.push(Ask { at: round * PAUSE + PAUSE / 2, io: flush });
            // Beside the flush, so it may or may not be in front of it.
            let beside = Io::new(Op::Write, MIB - 4096 * (round + 1), 4096);
            plan.push(Ask { at: round * PAUSE + PAUSE / 2, io: beside });
        }
        let mut product = product(log("", DISK), plan, seed);
        let mut disks = Vec::new();
        for round in 0..5 {
            let is_quiet = |product: &Product| {
                let now = product.bench.world.lock().unwrap().now;
                now >= round * PAUSE + PAUSE / 2 - 1_000_000
            };
            product.turn_until(is_quiet);
            disks.push(product.bytes(0, MIB));
        }
        product.rest();
        let entries = logged(&product);
        let flushes: Vec<_> =
            (0..entries.len()).filter(|i| entries[*i].flags & FLUSH != 0).collect();
        assert_eq!(flushes.len(), 5);
        for (round, (disk, flush)) in disks.iter().zip(flushes).enumerate() {
            let played = play(&entries[..=flush]);
            let beside = 4096 * (round + 1)..;
            let known = usize::try_from(MIB).unwrap() - beside.start;
            assert!(played[..known] == disk[..known], "seed {seed}, round {round}");
        }
    }
}

#[test]
fn what_is_written_out_has_its_data_at_that_moment() {
    for seed in 0..20 {
        let mut plan = mix(&mut Rng::new(seed), MIB, 400);
        plan.retain(|ask| ask.io.op == Op::Write);
        for ask in plan.iter_mut().step_by(4) {
            ask.io = Io::new(Op::Flush, 0, 0);
        }
        let flushes = plan.iter().filter(|ask| ask.io.op == Op::Flush).count();
        // Some data takes much longer than what is written about it.
        let faults = Faults { eagain: 30, ..Faults::default() };
        let stack = log("", DISK);
        let mut product = product_with(stack, plan, |setup| Setup { seed, faults, ..setup });
        for count in 1..=flushes {
            product.turn_until(|product| {
                let done = product.done();
                done.iter().filter(|done| done.io.op == Op::Flush).count() >= count
            });
            for entry in logged(&product) {
                // Every eight bytes that the test writes end like this.
                let is_written = |eight: &[u8]| eight[4..] == [1, 2, 3, 4];
                assert!(entry.data.chunks(8).all(is_written), "seed {seed}, flush {count}");
            }
        }
    }
}

#[test]
fn an_old_log_ends_before_the_first_write_of_a_new_one() {
    let plan = vec![now(Io::new(Op::Write, 0, 65_536))];
    let mut product = product(log("", DISK), plan, 1);
    {
        let mut world = product.bench.world.lock().unwrap();
        let old = &mut world.disks[1].bytes;
        old[..8].copy_from_slice(&0x6a_7366_7773_6872_u64.to_le_bytes());
        (old[8], old[16], old[25]) = (1, 7, 2);
    }
    product.rest();
    product.all_succeed(1);
    assert_eq!(logged(&product).len(), 0, "the old log's entries count no longer");
}

#[test]
fn discards_and_marks_are_on_record() {
    let plan = vec![
        now(Io::new(Op::Write, 0, 65_536)),
        Ask { at: 50_000_000, io: Io::new(Op::Discard, 16_384, 8192) },
        Ask { at: 100_000_000, io: Io::new(Op::Write, 131_072, 512) },
    ];
    let mut product = product(log("", DISK), plan, 1);
    product.rest();
    assert_eq!(product.number("written_out"), 0, "nothing asked for it");
    assert_eq!(product.tell("mark all-done"), Ok("mark all-done is entry 3".to_owned()));
    let entries = logged(&product);
    let seen: Vec<_> =
        entries.iter().map(|one| (one.at, one.len, one.flags, one.name.as_str())).collect();
    assert_eq!(
        seen,
        [
            (0, 65_536, 0, ""),
            (16_384, 8192, DISCARD, ""),
            (131_072, 512, 0, ""),
            (0, 0, MARK, "all-done"),
        ]
    );
    assert!(product.tell(&format!("mark {}", "x".repeat(480))).is_err());
    assert!(product.tell("mark").is_err() && product.tell("note x").is_err());
}

#[test]
fn more_writes_than_are_kept_in_memory_are_all_on_record_at_a_clean_end() {
    let plan: Vec<_> = (0..5000).map(|i| now(Io::new(Op::Write, i % 2048 * 512, 512))).collect();
    let mut setup = Setup { stack: log("", DISK), ..setup(disk(), ideal(DISK), plan) };
    setup.served();
    let mut bench = setup.bench();
    bench.worker.arm().unwrap();
    bench.worker.run().unwrap();
    let world = bench.world.lock().unwrap();
    let entries = entries(&world.disks[1].bytes);
    assert_eq!(entries.len(), 5000);
    assert!(play(&entries)[..] == world.disks[0].bytes[..usize::try_from(MIB).unwrap()]);
}

#[test]
fn a_full_log_fails_writes_or_only_ends() {
    let plan = |last| {
        let mut plan: Vec<_> =
            (0..40).map(|i| now(Io::new(Op::Write, i * 16_384, 16_384))).collect();
        plan.push(Ask { at: last, io: Io::new(Op::Flush, 0, 0) });
        plan
    };
    for (keys, fails, news) in [
        ("", true, "log: the log is full; writes fail"),
        ("on-full=stop-logging", false, "log: the log is full; logging ends"),
    ] {
        let mut product = product(log(keys, 256 << 10), plan(100_000_000), 1);
        product.rest();
        let bad = product.done().iter().filter(|done| done.result == Err(Errno::ENOSPC)).count();
        let good = product.done().iter().filter(|done| done.result.is_ok()).count();
        assert_eq!(good + bad, 41, "{keys}");
        assert_eq!(bad > 0, fails, "{keys}");
        assert_eq!(product.events(), [news]);
        let entries = entries(&product.bytes(1, 256 << 10));
        let writes = entries.iter().filter(|entry| !entry.data.is_empty()).count();
        assert!((10..16).contains(&writes), "{writes} of 40 are on record");
        let (played, disk) = (play(&entries), product.bytes(0, MIB));
        for entry in entries.iter().filter(|entry| !entry.data.is_empty()) {
            let range = entry.at..entry.at + entry.len;
            assert!(played[range.clone()] == disk[range], "{keys}");
        }
        let has_flush = entries.iter().any(|entry| entry.flags & FLUSH != 0);
        assert_eq!(has_flush, fails, "a log that has ended promises nothing more");
    }
}

#[test]
fn a_log_that_cannot_be_written_ends_and_what_was_written_out_stays_true() {
    let write = |at: u64, place: u64| Ask { at, io: Io::new(Op::Write, place, 4096) };
    let flush = |at: u64| Ask { at, io: Io::new(Op::Flush, 0, 0) };
    let ms = 1_000_000;
    let plan = vec![
        write(0, 0),
        flush(50 * ms),
        write(100 * ms, 8192),
        flush(150 * ms),
        write(200 * ms, 0),
    ];
    for (keys, fails) in [("", true), ("on-full=stop-logging", false)] {
        // From behind the first write and its flush on.
        let fault = Fault::Fail(Errno::EIO);
        let bad = vec![Bad { file: 1, from: 8192, to: DISK, fault, times: u32::MAX }];
        let faults = Faults { bad, ..Faults::default() };
        let mut product =
            product_with(log(keys, DISK), plan.clone(), |setup| Setup { faults, ..setup });
        product.rest();
        let results: Vec<_> = product.done().iter().map(|done| done.result.is_ok()).collect();
        assert_eq!(results, if fails { [true, true, false, false, false] } else { [true; 5] });
        assert_eq!(product.events().len(), 1, "{:?}", product.events());
        assert!(product.events()[0].contains("the log ends after 2 entries"));
        let entries = logged(&product);
        assert_eq!(entries.len(), 2);
        assert!(product.tell("mark late").is_err());
    }
}
