//! Answers for requests that come one at a time and whose ends are sent ahead: nothing is lost, no
//! error is missed, nothing waits for long.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use devsplice_core::{Errno, Io, Op};

const SECOND: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;

/// One request at a time of a disk.
fn alone(plan: Vec<Ask>) -> Setup {
    Setup { depth: 1, ahead: true, ..setup(disk(), ideal(MIB), plan) }
}

fn read(at: u64) -> Io {
    Io::new(Op::Read, at, 4096)
}

fn write(at: u64) -> Io {
    Io::new(Op::Write, at, 4096)
}

/// Reads and writes of 4 KiB.
fn transfers(count: u64) -> Vec<Ask> {
    let one = |index: u64| {
        let at = (index * 37 % 256) * 4096;
        now(if index.is_multiple_of(3) { write(at) } else { read(at) })
    };
    (0..count).map(one).collect()
}

#[test]
fn one_request_at_a_time_takes_one_call() {
    let plan = transfers(500);
    let outcome = alone(plan.clone()).run();
    outcome.all_succeed();
    assert_eq!(outcome.ahead, 500);
    // A tick each 5 ms is one more.
    let most = 500 + outcome.now / (5 * MS) + 10;
    assert!(outcome.counts.enters < most, "{} calls", outcome.counts.enters);
    let ordinary = Setup { ahead: false, ..alone(plan) }.run();
    assert!(ordinary.ahead == 0 && ordinary.counts.enters > 2 * 500 - 10);
}

#[test]
fn flushes_discards_and_forced_writes_between_them_keep_their_meaning() {
    let mut rng = Rng::new(7);
    let plan = [fill(MIB), mix(&mut rng, MIB, 2000)].concat();
    let transfer = |ask: &&Ask| ask.io.op.has_pages();
    let transfers = plan.iter().filter(transfer).count() as u64;
    let forced = plan.iter().filter(|ask| ask.io.fua).count();
    let outcome = alone(plan).run();
    outcome.all_succeed();
    // Without pages there is nothing to commit behind: those go the ordinary way.
    assert!(outcome.ahead == transfers && transfers < 1900, "{} of {transfers}", outcome.ahead);
    assert!(forced > 20 && outcome.log.iter().filter(|sent| sent.fua).count() == forced);
}

#[test]
fn a_splice_that_is_short_or_fails_for_a_while_is_done_again_and_its_end_sent_once() {
    for seed in 0..50 {
        let faults = Faults { short: 30, eagain: 10, eintr: 10, bad: Vec::new() };
        let plan = [fill(MIB), mix(&mut Rng::new(seed), MIB, 200)].concat();
        let outcome = Setup { seed, faults, ..alone(plan) }.run();
        outcome.all_succeed();
        assert!(outcome.ahead > 100 && outcome.counts.retries > 50);
    }
}

#[test]
fn a_splice_that_fails_in_a_burst_fails_its_request_and_no_other() {
    let faults = [
        (Fault::Fail(Errno::ENOSPC), Errno::ENOSPC),
        (Fault::Fail(Errno::ECANCELED), Errno::EIO),
        (Fault::Nothing, Errno::EIO),
        (Fault::TooMuch, Errno::EIO),
    ];
    for (fault, errno) in faults {
        let bad = Bad { file: 0, from: 40_960, to: 40_961, fault, times: u32::MAX };
        let faults = Faults { bad: vec![bad], ..Faults::default() };
        let plan = transfers(512);
        let want: Vec<_> = plan
            .iter()
            .map(|ask| if ask.io.extent.at == 40_960 { Err(errno) } else { Ok(()) })
            .collect();
        let outcome = Setup { faults, ..alone(plan) }.run();
        assert_eq!(outcome.results(), want);
        assert_eq!((outcome.counts.errors, outcome.ahead), (2, 512));
    }
}

#[test]
fn requests_that_meet_switch_it_off_for_a_while() {
    // Each second one comes while the splice of the one before is out.
    let at = |index: u64| index / 2 * SECOND / 1000 + index % 2 * 2000;
    let plan = |count| (0..count).map(|index| Ask { at: at(index), io: read(index * 4096 % MIB) });
    let base = |count| setup(disk(), ideal(MIB), plan(count).collect());
    let outcome = Setup { depth: 2, ahead: true, overlaps: true, ..base(4000) }.run();
    outcome.all_succeed();
    // After pauses of 64, 128, 256, 512, 1024.
    assert!((2..=20).contains(&outcome.ahead), "{} were sent ahead", outcome.ahead);
    // Then they come one by one again.
    let end = at(4000);
    let later = (0..3000).map(|index| Ask { at: end + index * SECOND / 1000, io: read(0) });
    let plan = plan(4000).chain(later).collect();
    let base = setup(disk(), ideal(MIB), plan);
    let outcome = Setup { depth: 2, ahead: true, overlaps: true, ..base }.run();
    assert!(outcome.ahead > 500, "{} were sent ahead", outcome.ahead);
}

#[test]
fn many_at_a_time_are_not_sent_ahead() {
    let outcome = Setup { depth: 8, ..alone(transfers(800)) }.run();
    outcome.all_succeed();
    assert!(outcome.ahead < 20, "{}", outcome.ahead);
}

#[test]
fn a_splice_that_waits_is_not_sent_ahead_and_one_of_several_has_no_end_behind_it() {
    let late = over(Kind::Late(1000), &[disk()]);
    let outcome = Setup { depth: 1, ahead: true, ..setup(late, ideal(MIB), transfers(50)) }.run();
    outcome.all_succeed();
    assert_eq!(outcome.ahead, 0, "a splice that waits is not sent at once");
    let split = over(Kind::Split(1024), &[disk()]);
    let outcome = Setup { depth: 1, ahead: true, ..setup(split, ideal(MIB), fill(MIB)) }.run();
    outcome.all_succeed();
}

/// Runs until nothing is left to happen.
fn until_asleep(plan: Vec<Ask>) -> Outcome {
    let mut bench = Setup { open: true, ..alone(plan) }.bench();
    bench.world.lock().unwrap().may_sleep = true;
    bench.worker.arm().unwrap();
    while !bench.world.lock().unwrap().asleep {
        assert!(bench.worker.turn().unwrap());
    }
    bench.end()
}

#[test]
fn behind_the_last_request_it_is_noticed_in_5_ms() {
    let mut bench = Setup { open: true, ..alone(vec![now(write(0))]) }.bench();
    bench.worker.arm().unwrap();
    while bench.shared.read().requests == 0 {
        assert!(bench.worker.turn().unwrap());
    }
    let world = bench.world.lock().unwrap();
    assert!(world.ahead.count == 1 && world.now < 6 * MS, "{} ns", world.now);
}

#[test]
fn behind_the_last_request_nothing_ticks_for_long() {
    let outcome = until_asleep(transfers(100));
    outcome.all_succeed();
    assert_eq!((outcome.done.len(), outcome.counts.requests, outcome.left), (100, 100, 0));
    assert!(outcome.ahead == 100 && outcome.now < 4 * SECOND, "{}", outcome.now);
}

#[test]
fn the_watchdog_reports_a_splice_whose_end_is_ahead_and_others_are_served() {
    let bad = Bad { file: 0, from: 0, to: 512, fault: Fault::Hang, times: 1 };
    let faults = Faults { bad: vec![bad], ..Faults::default() };
    let later = Ask { at: 8 * SECOND, io: read(8192) };
    let reports = Arc::new(Mutex::new(Vec::new()));
    let told = reports.clone();
    let on_stuck = Box::new(move |stuck: &devsplice_engine::Stuck| {
        told.lock().unwrap().push((stuck.seconds, stuck.io, stuck.flying));
    });
    let base = alone(vec![now(write(0)), later]);
    let mut bench = Setup { faults, depth: 2, stuck: (5, on_stuck), ..base }.bench();
    bench.worker.arm().unwrap();
    while bench.world.lock().unwrap().now < 17 * SECOND {
        assert!(bench.worker.turn().unwrap());
    }
    assert_eq!(bench.world.lock().unwrap().ahead.count, 1);
    let stuck = |seconds| (seconds, write(0), 1);
    assert_eq!(*reports.lock().unwrap(), [stuck(5), stuck(10), stuck(15)]);
    let done = bench.done.lock().unwrap();
    assert!(done.len() == 1 && done[0].at < 10 * SECOND, "the other was served: {done:?}");
}
