//! Answers for the fixed tables: small ones are enough, nobody starves, neighbours are joined.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use devsplice_core::{Io, Limits, Op};
use devsplice_engine::{FileId, To};

const TIB: u64 = 1 << 40;

#[test]
fn any_number_of_flights_is_enough_and_no_request_starves() {
    let reverse = over(Kind::Reverse(512), &[disk()]);
    let mirror = over(Kind::Mirror, &[reverse.clone(), reverse.clone()]);
    for (tree, flights) in [&reverse, &mirror]
        .into_iter()
        .flat_map(|tree| [1, 2, 3].map(|flights| (tree.clone(), flights)))
    {
        let mut plan = fill(MIB);
        plan.push(now(Io::new(Op::Read, 0, 256 << 10)));
        plan.push(now(Io::new(Op::Read, 256 << 10, 256 << 10)));
        plan.push(now(Io::new(Op::Read, 512 << 10, 512)));
        plan.push(now(Io::new(Op::Read, 768 << 10, 4096)));
        let (big, small) = (fill(MIB).len(), fill(MIB).len() + 2);
        let base = setup(tree, ideal(MIB), plan);
        let outcome = Setup { flights, depth: 4, ..base }.run();
        outcome.all_succeed();
        for (small, big) in [(small, big), (small + 1, big), (small, big + 1), (small + 1, big + 1)]
        {
            let (small, big) = (outcome.done_at(small), outcome.done_at(big));
            assert!(small < big, "small at {small}, big at {big}, {flights} flights");
        }
    }
}

#[test]
fn a_stripe_gathers_into_one_splice_a_leg() {
    for op in [Op::Read, Op::Write] {
        let tree = over(Kind::Stripe(64 << 10), &[disk(), disk()]);
        let outcome = setup(tree, ideal(MIB), vec![now(Io::new(op, 0, MIB))]).run();
        outcome.all_succeed();
        let mut sent: Vec<_> =
            outcome.log.iter().map(|one| (one.at, one.len, one.part_count)).collect();
        sent.sort_unstable();
        assert_eq!(sent, [(0, MIB / 2, 8); 2]);
        assert_ne!(outcome.log[0].to, outcome.log[1].to);
        assert_eq!((outcome.counts.pieces, outcome.counts.splices), (16, 2));
    }
}

#[test]
fn pieces_that_lie_together_above_and_below_are_one_part() {
    let tree = over(Kind::Split(512), &[disk()]);
    let outcome = setup(tree, ideal(MIB), vec![now(Io::new(Op::Read, 0, 128 << 10))]).run();
    let sent: Vec<_> = outcome.log.iter().map(|one| (one.len, one.part_count)).collect();
    assert_eq!(sent, [(128 << 10, 1)]);
}

#[test]
fn pieces_that_do_not_lie_together_below_are_not_joined() {
    let tree = over(Kind::Reverse(4096), &[disk()]);
    let plan = vec![now(Io::new(Op::Discard, 0, 64 << 10))];
    let outcome = setup(tree, ideal(MIB), plan).run();
    let mut at: Vec<_> = outcome.log.iter().map(|one| (one.at, one.len)).collect();
    at.sort_unstable();
    let want: Vec<_> = (0..16).map(|index| (MIB - (16 - index) * 4096, 4096)).collect();
    assert_eq!(at, want);
}

#[test]
fn a_splice_has_no_more_parts_than_a_ring_takes() {
    let tree = over(Kind::Stripe(4096), &[disk(), disk()]);
    let plan = vec![now(Io::new(Op::Write, 0, MIB)), now(Io::new(Op::Read, 0, MIB))];
    let outcome = setup(tree, ideal(MIB), plan).run();
    outcome.all_succeed();
    // 256 parts, 16 a splice.
    assert_eq!(outcome.log.len(), 32);
    assert!(outcome.log.iter().all(|one| one.part_count == 16));
}

#[test]
fn pieces_that_wait_differently_are_not_joined() {
    let tree = over(Kind::LateIn(4096, 8192, 1_000_000), &[disk()]);
    let outcome = setup(tree, ideal(MIB), vec![now(Io::new(Op::Read, 0, 16384))]).run();
    outcome.all_succeed();
    let mut sent: Vec<_> = outcome.log.iter().map(|one| (one.at, one.sent)).collect();
    sent.sort_unstable();
    assert_eq!(sent.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 4096, 8192]);
    assert!(sent[1].1 - sent[0].1 >= 1_000_000 && sent[2].1 == sent[0].1);
}

#[test]
fn a_discard_of_a_huge_device_is_few_splices_and_lets_others_through() {
    for (flights, legs) in [(64, 2), (8, 4), (2, 2), (64, 16)] {
        let tree = over(Kind::Stripe(64 << 10), &vec![disk(); legs]);
        let size = TIB / 4 / legs as u64;
        let mut plan = vec![now(Io::new(Op::Discard, 0, TIB / 4))];
        let read = |index: u64| Ask { at: 500_000 * index, io: Io::new(Op::Read, TIB / 4, 4096) };
        plan.extend((1..5).map(read));
        let limits = Limits::ideal(size + (64 << 10));
        let outcome = Setup { flights, ..setup(tree, limits, plan) }.run();
        outcome.all_succeed();
        for seq in 1..5 {
            let (read, discard) = (outcome.done_at(seq), outcome.done_at(0));
            assert!(read < 500_000 * seq as u64 + 1_000_000 && read < discard, "{read}");
        }
        // 4M pieces; a pass joins 1024 of them into one splice a leg. Each read may leave a pass or
        // two too little room.
        let most = (4096 + 16) * legs;
        assert!(outcome.log.len() <= most, "{flights} flights: {}", outcome.log.len());
        let discards = outcome.log.iter().filter(|one| one.op == Op::Discard);
        assert_eq!(discards.map(|one| one.len).sum::<u64>(), TIB / 4);
    }
}

#[test]
fn a_discard_of_a_terabyte_completes() {
    let tree = over(Kind::Stripe(64 << 10), &[disk(), disk()]);
    let plan = vec![now(Io::new(Op::Discard, 0, TIB))];
    let outcome = setup(tree, ideal(TIB / 2), plan).run();
    outcome.all_succeed();
    assert!(outcome.log.len() <= 2 * 16384 + 2, "{}", outcome.log.len());
}

#[test]
fn a_request_that_ends_nowhere_does_not_wait_for_other_events() {
    let tree = over(Kind::Split(512), &[over(Kind::Zero(0, 4 * MIB), &[disk()])]);
    let plan = vec![now(Io::new(Op::Discard, 0, 4 * MIB))];
    let outcome = Setup { depth: 1, ..setup(tree, ideal(4 * MIB), plan) }.run();
    outcome.all_succeed();
    assert!(outcome.log.is_empty() && outcome.counts.pieces == 8192);
    assert!(outcome.done_at(0) < 1_000_000, "done at {}", outcome.done_at(0));
}

#[test]
fn a_failed_request_leaves_its_tag_and_flights_to_others() {
    let fault = Fault::Fail(devsplice_core::Errno::EIO);
    let bad = Bad { file: 0, from: 0, to: MIB, fault, times: 40 };
    let faults = Faults { bad: vec![bad], ..Faults::default() };
    let mut rng = Rng::new(5);
    let plan = [fill(MIB), mix(&mut rng, MIB, 200)].concat();
    let base = setup(over(Kind::Reverse(4096), &[disk()]), ideal(MIB), plan);
    let outcome = Setup { faults, flights: 3, depth: 4, ..base }.run();
    assert!(outcome.counts.errors > 0 && outcome.counts.errors <= 40);
}

#[test]
fn each_lane_has_its_own_disks() {
    let plan = vec![now(Io::new(Op::Write, 0, 4096)), now(Io::new(Op::Flush, 0, 0))];
    let tree = over(Kind::Mirror, &[disk(), disk()]);
    let base = setup(tree, ideal(MIB), Vec::new());
    let outcome = Setup { plans: vec![plan.clone(), plan], ..base }.run();
    for file in 0..4 {
        let here = outcome.log.iter().filter(|one| one.to == To::File(FileId(file)));
        assert_eq!(here.count(), 2);
    }
    assert_eq!((outcome.counts.writes, outcome.counts.flushes), (2, 2));
}
