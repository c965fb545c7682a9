//! Answers for time and for the end: delays, the watchdog, idleness, the worker's return.
#![allow(clippy::unwrap_used)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use common::*;
use devsplice_core::{Io, Op};

const SECOND: u64 = 1_000_000_000;

#[test]
fn a_late_layer_delays_by_its_time_and_layers_add_up() {
    let late = over(Kind::Late(3_000_000), &[over(Kind::Late(2_000_000), &[disk()])]);
    for op in [Op::Read, Op::Write, Op::Discard] {
        let plan = vec![now(Io::new(op, 0, 64 << 10))];
        let outcome = setup(late.clone(), ideal(MIB), plan).run();
        outcome.all_succeed();
        assert!((5_000_000..6_000_000).contains(&outcome.done_at(0)), "{:?}", outcome.done);
    }
}

#[test]
fn a_delayed_request_holds_up_no_other() {
    let late = over(Kind::LateIn(0, 4096, SECOND), &[disk()]);
    let plan = (0..8).map(|index| now(Io::new(Op::Read, index * 4096, 4096))).collect();
    let outcome = setup(late, ideal(MIB), plan).run();
    outcome.all_succeed();
    for seq in 1..8 {
        assert!(outcome.done_at(seq) < SECOND / 100);
    }
    assert!(outcome.done_at(0) >= SECOND);
}

#[test]
fn a_splice_that_never_completes_is_reported_each_time_the_limit_has_passed() {
    let bad = Bad { file: 0, from: 0, to: 512, fault: Fault::Hang, times: 1 };
    let faults = Faults { bad: vec![bad], ..Faults::default() };
    let hung = Io::new(Op::Write, 0, 4096);
    let later = Ask { at: 20 * SECOND, io: Io::new(Op::Read, 8192, 4096) };
    let plan = vec![now(hung), now(Io::new(Op::Read, 4096, 4096)), later];
    let reports = Arc::new(Mutex::new(Vec::new()));
    let told = reports.clone();
    let on_stuck = Box::new(move |stuck: &_| told.lock().unwrap().push(*stuck));
    let base = setup(disk(), ideal(MIB), plan);
    let mut bench = Setup { faults, stuck: (5, on_stuck), ..base }.bench();
    bench.worker.arm().unwrap();
    while bench.world.lock().unwrap().now < 16 * SECOND {
        assert!(bench.worker.turn().unwrap());
    }
    let reports: Vec<devsplice_engine::Stuck> = std::mem::take(&mut reports.lock().unwrap());
    let seconds: Vec<_> = reports.iter().map(|stuck| stuck.seconds).collect();
    assert_eq!(seconds, [5, 10, 15]);
    assert!(reports.iter().all(|stuck| stuck.io == hung && stuck.flying == 1 && stuck.lane == 0));
    assert_eq!(bench.shared.read().stuck, 3);
    assert_eq!(bench.done.lock().unwrap().len(), 1, "the other request was served");
}

#[test]
fn a_watchdog_without_a_limit_reports_nothing() {
    let late = over(Kind::Late(10 * SECOND), &[disk()]);
    let plan = vec![now(Io::new(Op::Read, 0, 4096))];
    let on_stuck = Box::new(|_: &_| panic!("reported"));
    let outcome = Setup { stuck: (0, on_stuck), ..setup(late, ideal(MIB), plan) }.run();
    outcome.all_succeed();
    assert_eq!(outcome.counts.stuck, 0);
}

#[test]
fn an_idle_worker_sleeps_after_two_ticks_and_wakes_for_the_next_request() {
    let (outcome, rests) = until_asleep(fill(MIB), (1, 0));
    assert_eq!((outcome.done.len(), outcome.left), (16, 0));
    assert!(outcome.now < 3 * SECOND, "more than two ticks: {}", outcome.now);
    assert_eq!(rests.len(), 1, "memory is given back once");
    let mut plan = fill(MIB);
    plan.push(Ask { at: 20 * SECOND, io: Io::new(Op::Read, 0, 4096) });
    let (outcome, rests) = until_asleep(plan, (1, 0));
    assert_eq!((outcome.done.len(), outcome.left, rests.len()), (17, 0, 2));
}

/// Runs until nothing is left to happen; what came of it, and when memory was given back.
fn until_asleep(plan: Vec<Ask>, how: (u64, u32)) -> (Outcome, Vec<u64>) {
    let (outcome, rests) = lanes_until_asleep(vec![plan], how);
    (outcome, rests.into_iter().map(|(_, at)| at).collect())
}

/// The same with a lane for each plan, and with the lanes whose memory it was.
fn lanes_until_asleep(
    plans: Vec<Vec<Ask>>,
    (seed, holds): (u64, u32),
) -> (Outcome, Vec<(u16, u64)>) {
    let base = setup(disk(), ideal(MIB), Vec::new());
    let mut bench = Setup { open: true, seed, holds, plans, ..base }.bench();
    bench.world.lock().unwrap().may_sleep = true;
    bench.worker.arm().unwrap();
    while !bench.world.lock().unwrap().asleep {
        assert!(bench.worker.turn().unwrap(), "an open export keeps the worker");
    }
    let rests = std::mem::take(&mut bench.world.lock().unwrap().rests);
    let outcome = bench.end();
    outcome.all_succeed();
    (outcome, rests)
}

#[test]
fn who_holds_data_keeps_no_memory_of_others() {
    let plans = (0..3).map(|_| fill(MIB)).collect();
    let (outcome, rests) = lanes_until_asleep(plans, (1, 4));
    assert_eq!(outcome.done.len(), 48);
    let of = |lane| rests.iter().filter(move |(of, _)| *of == lane).map(|(_, at)| *at);
    let first: Vec<_> = (0..3).map(|lane| of(lane).next().unwrap()).collect();
    assert!(first[0] >= first[1] + 4 * SECOND && first[1] == first[2], "{rests:?}");
    assert_eq!(of(0).count(), 1, "{rests:?}");
}

#[test]
fn memory_is_not_given_back_while_a_front_end_holds_data_in_it() {
    let (_, rests) = until_asleep(fill(MIB), (1, 0));
    let (outcome, later) = until_asleep(fill(MIB), (1, 3));
    assert_eq!((outcome.done.len(), later.len()), (16, 1), "once, when nothing is held any more");
    assert!(later[0] >= rests[0] + 3 * SECOND, "at {}, else at {}", later[0], rests[0]);
}

#[test]
fn memory_is_not_given_back_under_a_request_that_comes_with_the_tick() {
    let (write, read) = (Io::new(Op::Write, 0, 65_536), Io::new(Op::Read, 0, 65_536));
    for seed in 0..32 {
        let (_, rests) = until_asleep(vec![now(write)], (seed, 0));
        assert_eq!(rests.len(), 1);
        // In the same turn as the tick, in front of it or behind; what it wrote is read back.
        let again = [Ask { at: rests[0], io: write }, Ask { at: rests[0] + SECOND / 2, io: read }];
        let (outcome, later) = until_asleep([vec![now(write)], again.to_vec()].concat(), (seed, 0));
        assert_eq!(outcome.done.len(), 3);
        assert!(later[0] > rests[0] + SECOND / 2, "at {later:?}, with requests in between");
    }
}

#[test]
fn memory_is_not_given_back_while_requests_come_or_one_is_below() {
    let read = |at| Ask { at, io: Io::new(Op::Read, 0, 4096) };
    let (_, rests) = until_asleep((0..40).map(|index| read(index * SECOND / 2)).collect(), (1, 0));
    assert!(rests.len() == 1 && rests[0] > 20 * SECOND, "{rests:?}");
    let late = over(Kind::Late(10 * SECOND), &[disk()]);
    let outcome = setup(late, ideal(MIB), fill(MIB)).run();
    outcome.all_succeed();
}

#[test]
fn a_worker_ends_when_its_exports_are_closed_and_all_is_finished() {
    let outcome = setup(disk(), ideal(MIB), Vec::new()).run();
    assert_eq!((outcome.done.len(), outcome.log.len()), (0, 0));
    let late = over(Kind::Late(SECOND / 2), &[disk()]);
    let outcome = setup(late, ideal(MIB), fill(MIB)).run();
    outcome.all_succeed();
    assert!(outcome.left <= 1, "only the watchdog's last tick may be left");
    assert_eq!((outcome.counts.requests, outcome.counts.writes), (16, 16));
}

#[test]
fn a_layer_that_breaks_its_contract_panics_with_its_name() {
    for kind in [Kind::TooLong, Kind::Behind] {
        let tree = over(Kind::Split(4096), &[over(kind, &[disk()])]);
        let plan = vec![now(Io::new(Op::Read, 0, 4096))];
        let run = AssertUnwindSafe(|| setup(tree, ideal(MIB), plan).run().done.len());
        let panic = catch_unwind(run).unwrap_err();
        let text = panic.downcast_ref::<String>().unwrap();
        assert!(text.starts_with(&format!("layer {kind:?} broke its contract")), "{text}");
    }
}
