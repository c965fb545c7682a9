//! Answers for what becomes of requests: right bytes, right errors, whatever happens below.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use devsplice_core::{Errno, Io, Limits, Op, Place, Stack};
use devsplice_engine::flights::{FIRST_BACKOFF_NS, MAX_ATTEMPTS};
use devsplice_engine::{FileId, To};
use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};

/// Stacks of every kind of answer; and the range that holds only zeros.
fn stacks() -> Vec<(Tree, (u64, u64))> {
    let stripe = || over(Kind::Stripe(64 << 10), &[disk(), disk()]);
    let narrow = over(Kind::Stripe(4096), &[disk(), disk(), disk()]);
    let mirror = || over(Kind::Mirror, &[disk(), disk()]);
    let hole = (200 << 10, 328 << 10);
    vec![
        (disk(), (0, 0)),
        (over(Kind::Split(1024), &[disk()]), (0, 0)),
        (stripe(), (0, 0)),
        (over(Kind::Split(12 << 10), std::slice::from_ref(&narrow)), (0, 0)),
        (mirror(), (0, 0)),
        (over(Kind::Stripe(8192), &[mirror(), mirror()]), (0, 0)),
        (over(Kind::Mirror, &[stripe(), stripe()]), (0, 0)),
        (over(Kind::Reverse(4096), &[narrow]), (0, 0)),
        (over(Kind::Zero(hole.0, hole.1), &[stripe()]), hole),
        (over(Kind::LateIn(32 << 10, 96 << 10, 250_000), &[mirror()]), (0, 0)),
    ]
}

fn random(seed: u64, faults: Faults) -> Outcome {
    let mut rng = Rng::new(seed);
    let mut all = stacks();
    let (tree, zeros) = all.swap_remove(usize::try_from(rng.below(all.len() as u64)).unwrap());
    let limits = ideal(384 << 10);
    let base = setup(tree, limits, Vec::new());
    let size = base.stack.limits().size;
    let lanes = 1 + rng.below(2);
    let mut plan = || [fill(size), mix(&mut rng, size, 60)].concat();
    let plans = (0..lanes).map(|_| plan()).collect();
    let depth = u16::try_from(1 + rng.below(15)).unwrap();
    let ahead = rng.percent(50);
    let flights = u32::try_from(1 + rng.below(64)).unwrap();
    Setup { seed, depth, flights, faults, plans, zeros, ahead, ..base }.run()
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(80))]

    #[test]
    fn requests_of_all_kinds_over_every_stack_agree_with_a_model(seed in any::<u64>()) {
        let outcome = random(seed, Faults::default());
        outcome.all_succeed();
        prop_assert_eq!(outcome.counts.retries, 0);
        prop_assert_eq!(outcome.counts.splices >= outcome.log.len() as u64, true);
    }

    #[test]
    fn short_results_and_transient_errors_everywhere_go_unnoticed(seed in any::<u64>()) {
        // Few enough transient errors that no splice meets MAX_ATTEMPTS of them in a row.
        let faults = Faults { short: 40, eagain: 5, eintr: 5, bad: Vec::new() };
        let outcome = random(seed, faults);
        outcome.all_succeed();
        prop_assert!(outcome.counts.retries > 0);
    }

    #[test]
    fn a_place_that_fails_fails_exactly_the_requests_that_touch_it(seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let errno = [Errno::EIO, Errno::ENOSPC][usize::try_from(rng.below(2)).unwrap()];
        let fault = match rng.below(3) {
            0 => Fault::Nothing,
            _ => Fault::Fail(errno),
        };
        let expected = if fault == Fault::Nothing { Errno::EIO } else { errno };
        let from = rng.below(32) * 4096;
        let bad = Bad { file: 1, from, to: from + 4096, fault, times: u32::MAX };
        let tree = over(Kind::Mirror, &[over(Kind::Stripe(16 << 10), &[disk(), disk()]), disk()]);
        let base = setup(tree, ideal(256 << 10), Vec::new());
        let plan = [fill(256 << 10), mix(&mut rng, 256 << 10, 60)].concat();
        let plan: Vec<_> = plan.into_iter().filter(|ask| can_fail(&ask.io, fault)).collect();
        let want: Vec<_> = plan
            .iter()
            .map(|ask| if touches(&base.stack, ask.io, &bad) { Err(expected) } else { Ok(()) })
            .collect();
        let faults = Faults { short: 20, eagain: 5, eintr: 5, bad: vec![bad] };
        let errors = want.iter().filter(|result| result.is_err()).count();
        let ahead = rng.percent(50);
        let depth = if ahead { 1 } else { base.depth };
        let outcome = Setup { seed, faults, plans: vec![plan], ahead, depth, ..base }.run();
        prop_assert_eq!(outcome.results(), want);
        prop_assert_eq!(outcome.counts.errors, errors as u64);
    }
}

/// No progress says nothing about operations without pages: they are done or failed.
fn can_fail(io: &Io, fault: Fault) -> bool {
    io.op.has_pages() || fault != Fault::Nothing
}

fn touches(stack: &Stack, io: Io, bad: &Bad) -> bool {
    let mut route = stack.route(io);
    std::iter::from_fn(|| route.next(stack)).any(|piece| {
        let piece = piece.unwrap();
        let Place::Backend(id) = piece.place else { return false };
        id.0 == bad.file && piece.at < bad.to && piece.at + piece.len > bad.from
    })
}

#[test]
fn a_transient_error_that_stays_is_eio_after_bounded_tries() {
    for errno in [Errno::EAGAIN, Errno::EINTR] {
        let bad = Bad { file: 0, from: 0, to: 512, fault: Fault::Fail(errno), times: u32::MAX };
        let faults = Faults { bad: vec![bad], ..Faults::default() };
        let plan = vec![now(Io::new(Op::Read, 0, 512)), now(Io::new(Op::Read, 4096, 512))];
        let outcome = Setup { faults, ..setup(disk(), ideal(MIB), plan) }.run();
        assert_eq!(outcome.results(), [Err(Errno::EIO), Ok(())]);
        assert_eq!(outcome.log.len(), usize::from(MAX_ATTEMPTS) + 2);
        assert_eq!(outcome.counts.retries, u64::from(MAX_ATTEMPTS));
        let sent = outcome.log.iter().filter(|one| one.at == 0).map(|one| one.sent);
        let waits: Vec<_> = sent.collect();
        let waits: Vec<_> = waits.windows(2).map(|pair| pair[1] - pair[0]).collect();
        for (index, wait) in waits.into_iter().enumerate() {
            let least = if errno == Errno::EAGAIN { FIRST_BACKOFF_NS << index } else { 0 };
            assert!((least..least + 250_000).contains(&wait), "wait {index} is {wait}");
        }
    }
}

#[test]
fn a_transient_error_that_goes_away_costs_nothing_but_time() {
    let fault = Fault::Fail(Errno::EAGAIN);
    let bad = Bad { file: 0, from: 0, to: 512, fault, times: u32::from(MAX_ATTEMPTS) };
    let faults = Faults { bad: vec![bad], ..Faults::default() };
    let plan = vec![now(Io::new(Op::Write, 0, 4096)), now(Io::new(Op::Read, 0, 4096))];
    Setup { faults, ..setup(disk(), ideal(MIB), plan) }.run().all_succeed();
}

#[test]
fn progress_starts_the_count_of_tries_afresh() {
    let bad = |fault, times| Bad { file: 0, from: 0, to: 4096, fault, times };
    let again = bad(Fault::Fail(Errno::EAGAIN), u32::from(MAX_ATTEMPTS));
    let faults =
        Faults { bad: vec![again, bad(Fault::Short(1000), 1), again], ..Faults::default() };
    let plan = vec![now(Io::new(Op::Write, 0, 4096)), now(Io::new(Op::Read, 0, 4096))];
    let outcome = Setup { faults, ..setup(disk(), ideal(MIB), plan) }.run();
    outcome.all_succeed();
    assert_eq!(outcome.counts.retries, 2 * u64::from(MAX_ATTEMPTS) + 1);
}

#[test]
fn a_result_of_nothing_or_of_more_than_asked_is_eio_and_never_a_short_success() {
    for fault in [Fault::Nothing, Fault::TooMuch] {
        for op in [Op::Read, Op::Write, Op::Discard] {
            let bad = Bad { file: 0, from: 8192, to: MIB, fault, times: u32::MAX };
            let faults = Faults { bad: vec![bad], ..Faults::default() };
            let plan = vec![now(Io::new(op, 4096, 8192)), now(Io::new(op, 0, 4096))];
            let tree = over(Kind::Reverse(4096), &[over(Kind::Reverse(4096), &[disk()])]);
            let outcome = Setup { faults, ..setup(tree, ideal(MIB), plan) }.run();
            assert_eq!(outcome.results(), [Err(Errno::EIO), Ok(())], "{fault:?} {op:?}");
            assert_eq!(outcome.counts.retries, 0);
        }
    }
}

#[test]
fn a_flush_reaches_every_bottom_once() {
    let mirror = over(Kind::Mirror, &[disk(), disk(), disk()]);
    let tree = over(Kind::Stripe(4096), &[mirror, over(Kind::Split(512), &[disk()])]);
    for flights in [1, 2, 3, 64] {
        let plan = vec![now(Io::new(Op::Flush, 0, 0))];
        let outcome = Setup { flights, ..setup(tree.clone(), ideal(MIB), plan) }.run();
        outcome.all_succeed();
        let mut files: Vec<_> = outcome
            .log
            .iter()
            .map(|one| match one.to {
                To::File(FileId(file)) if one.op == Op::Flush && one.len == 0 => file,
                _ => panic!("{one:?}"),
            })
            .collect();
        files.sort_unstable();
        assert_eq!(files, [0, 1, 2, 3]);
        assert_eq!(outcome.counts.flushes, 1);
    }
}

#[test]
fn where_a_flush_is_said_to_be_does_not_matter() {
    for tree in [disk(), over(Kind::Mirror, &[disk()]), over(Kind::Split(512), &[disk()])] {
        let plan = vec![now(Io::new(Op::Flush, u64::MAX - 511, 4096))];
        let outcome = setup(tree, ideal(MIB), plan).run();
        outcome.all_succeed();
        assert_eq!((outcome.log[0].at, outcome.log[0].len), (0, 0));
    }
}

#[test]
fn a_flush_that_fails_at_one_bottom_fails_and_still_reaches_the_others() {
    let errno = Errno::EIO;
    let tree = over(Kind::Mirror, &[over(Kind::NoFlush(errno), &[disk()]), disk()]);
    let plan = vec![now(Io::new(Op::Flush, 0, 0)), now(Io::new(Op::Read, 0, 512))];
    let outcome = setup(tree, ideal(MIB), plan).run();
    assert_eq!(outcome.results(), [Err(errno), Ok(())]);
}

#[test]
fn force_unit_access_reaches_every_write_below() {
    let io = Io { fua: true, ..Io::new(Op::Write, 0, 64 << 10) };
    let tree = over(Kind::Reverse(4096), &[over(Kind::Mirror, &[disk(), disk()])]);
    let outcome = setup(tree, ideal(MIB), vec![now(io)]).run();
    outcome.all_succeed();
    assert!(outcome.log.len() == 32 && outcome.log.iter().all(|one| one.fua));
}

fn refused(limits: Limits, asks: &[(Io, Errno)]) {
    let plan = asks.iter().map(|(io, _)| now(*io)).collect();
    let outcome = setup(over(Kind::Split(4096), &[disk()]), limits, plan).run();
    let want: Vec<_> = asks.iter().map(|(_, errno)| Err(*errno)).collect();
    assert_eq!(outcome.results(), want);
    assert!(outcome.log.is_empty(), "a refused request touched a disk");
    assert_eq!(outcome.counts.errors, asks.len() as u64);
}

#[test]
fn requests_that_make_no_sense_are_refused_and_touch_no_disk() {
    let zeroes = Op::WriteZeroes { unmap: true };
    let limits = Limits { block: 4096, physical: 4096, ..ideal(MIB) };
    let bad = [
        (Op::Read, MIB, 4096),
        (Op::Read, MIB - 4096, 8192),
        (Op::Write, 512, 4096),
        (Op::Write, 0, 512),
        (Op::Read, 0, 0),
        (Op::Discard, u64::MAX - 4095, 8192),
        (zeroes, 1 << 63, 1 << 63),
        (Op::Discard, 4095, 1),
    ];
    refused(limits, &bad.map(|(op, at, len)| (Io::new(op, at, len), Errno::EINVAL)));
    let changes = [Op::Write, Op::Discard, zeroes];
    let refusal = |errno| move |op| (Io::new(op, 0, 4096), errno);
    refused(Limits { read_only: true, ..limits }, &changes.map(refusal(Errno::EROFS)));
    let less = Limits { discard: 0, write_zeroes: false, ..limits };
    refused(less, &[Op::Discard, zeroes].map(refusal(Errno::EOPNOTSUPP)));
}

#[test]
fn behind_the_first_error_nothing_more_is_sent() {
    let bad = Kind::Bad(8192, 12288, Errno::ENOSPC);
    let tree = over(bad, &[over(Kind::Split(4096), &[disk()])]);
    let plan = vec![now(Io::new(Op::Write, 0, 64 << 10)), now(Io::new(Op::Write, 12288, 4096))];
    let outcome = setup(tree, ideal(MIB), plan).run();
    assert_eq!(outcome.results(), [Err(Errno::ENOSPC), Ok(())]);
    let sent: Vec<_> = outcome.log.iter().map(|one| (one.at, one.len)).collect();
    assert!(sent.iter().all(|(at, len)| at + len <= 8192 || (*at, *len) == (12288, 4096)));

    let fault = Fault::Fail(Errno::EIO);
    let bad = Bad { file: 0, from: MIB - 4096, to: MIB, fault, times: u32::MAX };
    let faults = Faults { bad: vec![bad], ..Faults::default() };
    let plan = vec![now(Io::new(Op::Read, 0, MIB))];
    let base = setup(over(Kind::Reverse(4096), &[disk()]), ideal(MIB), plan);
    let outcome = Setup { faults, flights: 4, ..base }.run();
    assert_eq!(outcome.results(), [Err(Errno::EIO)]);
    assert_eq!(outcome.log.len(), 4, "only what was out when the first failed");
}
