//! Answers for the data path's memory: from the first request on, nothing is allocated.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use devsplice_core::{Io, Op};

fn plan(size: u64, count: usize) -> Vec<Ask> {
    let mut rng = Rng::new(11);
    let one = |rng: &mut Rng| {
        let op = if rng.percent(50) { Op::Read } else { Op::Write };
        let blocks = 1 + rng.below(64);
        let at = rng.below(size / 512 - blocks);
        now(Io::new(op, at * 512, blocks * 512))
    };
    (0..count).map(|_| one(&mut rng)).collect()
}

fn measured(flights: u32, faults: Faults) {
    let mirror = || over(Kind::Mirror, &[disk(), disk()]);
    let stripe = over(Kind::Stripe(4096), &[mirror(), mirror()]);
    let tree = over(Kind::LateIn(0, 4096, 10_000), &[stripe]);
    let base = setup(tree, ideal(MIB / 2), plan(MIB, 10_000));
    let mut bench = Setup { flights, faults, ..base }.bench();
    bench.world.lock().unwrap().logs = false;
    let info = allocation_counter::measure(|| {
        bench.worker.arm().unwrap();
        bench.worker.run().unwrap();
    });
    assert_eq!(info.count_total, 0, "allocations on the data path");
    let outcome = bench.end();
    outcome.all_succeed();
    assert_eq!(outcome.counts.requests, 10_000);
}

#[test]
fn ten_thousand_requests_through_three_layers_allocate_nothing() {
    measured(64, Faults::default());
}

#[test]
fn nor_do_short_results_retries_and_a_full_table() {
    measured(4, Faults { short: 20, eagain: 5, eintr: 5, bad: Vec::new() });
}

#[test]
fn an_allocation_would_be_counted() {
    let info = allocation_counter::measure(|| drop(std::hint::black_box(vec![0_u8; 64])));
    assert_eq!(info.count_total, 1);
}
