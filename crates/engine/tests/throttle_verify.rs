//! Answers for throttle and verify under load, with a clock of the test's own: rates are held and
//! used up, differences are found, a write on its way is none.
#![allow(clippy::unwrap_used)]

mod common;

use common::product::{DISK, Product, product, product_with, stack};
use common::*;
use devsplice_core::{Errno, Io, Op};
use devsplice_engine::To;

/// What went down by each moment, as the disk saw it.
fn sent(product: &Product, is_meant: impl Fn(Op) -> bool) -> Vec<(u64, u64)> {
    let world = product.bench.world.lock().unwrap();
    let meant = world.log.iter().filter(|one| is_meant(one.op));
    let mut sum = 0;
    meant
        .map(|one| {
            sum += one.len;
            (one.sent, sum)
        })
        .collect()
}

#[test]
fn bytes_a_second_are_never_exceeded_and_used_up() {
    const RATE: u64 = 8 << 20;
    for seed in 0..10 {
        let mut plan = mix(&mut Rng::new(seed), 4 * MIB, 400);
        plan.retain(|ask| ask.io.op.has_pages());
        let (count, longest) =
            (plan.len(), plan.iter().map(|ask| ask.io.extent.len).max().unwrap());
        let keys = format!("bps={RATE} burst=5ms");
        let mut product = product(stack("throttle", &keys, &[4 * MIB]), plan, seed);
        product.rest();
        product.all_succeed(count);
        let sent = sent(&product, Op::has_pages);
        let allowed = |at_ns: u64| (at_ns + 5_000_000) * RATE / 1_000_000_000 + longest + 1;
        for (at, sum) in &sent {
            assert!(*sum <= allowed(*at), "{sum} bytes by {at} ns, seed {seed}");
        }
        let (end, sum) = *sent.last().unwrap();
        let least = (end * RATE / 1_000_000_000).saturating_sub(longest) / 100 * 97;
        assert!(sum >= least, "only {sum} bytes by {end} ns, at least {least}, seed {seed}");
    }
}

#[test]
fn a_pause_saves_up_no_more_than_the_burst() {
    const SECOND: u64 = 1_000_000_000;
    let plan: Vec<_> = [0, 5 * SECOND]
        .into_iter()
        .flat_map(|at| (0..50).map(move |i| Ask { at, io: Io::new(Op::Write, i * 4096, 4096) }))
        .collect();
    let mut product = product(stack("throttle", "iops=1000 burst=10ms", &[MIB]), plan, 1);
    product.rest();
    product.all_succeed(100);
    let world = product.bench.world.lock().unwrap();
    let sent: Vec<_> = world.log.iter().map(|one| one.sent).collect();
    for start in [0, 50] {
        let took = sent[start + 49] - sent[start];
        // The credit of the pause, and the request that overdraws it, go at once.
        assert!(took >= 38_000_000, "50 writes at 1000 a second took {took} ns");
    }
}

#[test]
fn requests_a_second_are_held_in_order_and_reads_do_not_wait_for_writes() {
    let write = |index: u64| now(Io::new(Op::Write, index * 4096, 4096));
    let plan: Vec<_> = (0..100).map(write).collect();
    let stack = stack("throttle", "write-iops=1000 burst=1ns", &[DISK]);
    let mut held = product(stack.clone(), plan.clone(), 5);
    held.rest();
    held.all_succeed(100);
    let took = sent(&held, |op| op == Op::Write).last().unwrap().0;
    assert!((99_000_000..104_000_000).contains(&took), "100 writes at 1000 a second: {took} ns");
    for (place, done) in held.done().iter().enumerate() {
        assert!(done.seq.abs_diff(place) <= 2, "request {} was the {place}th", done.seq);
    }
    let mixed: Vec<_> = plan
        .into_iter()
        .flat_map(|write| [write, now(Io::new(Op::Read, write.io.extent.at + 8 * MIB, 4096))])
        .collect();
    let stack = common::product::stack("throttle", "write-iops=1000 read-iops=1000000", &[DISK]);
    let mut free = product_with(stack, mixed, |setup| Setup { depth: 200, ..setup });
    free.rest();
    free.all_succeed(200);
    let reads = sent(&free, |op| op == Op::Read);
    assert!(reads.last().unwrap().0 < 1_000_000, "reads wait for writes");
}

#[test]
fn a_change_of_the_rate_reaches_those_that_wait() {
    let plan: Vec<_> = (0..20).map(|i| now(Io::new(Op::Write, i * 4096, 4096))).collect();
    let mut product = product(stack("throttle", "bps=4096 burst=1ns", &[DISK]), plan, 1);
    product.turn_until(|product| product.number("waiting") >= 7);
    assert!(product.tell("set bps=1G").is_ok());
    product.rest();
    product.all_succeed(20);
    let last = product.done().iter().map(|done| done.at).max().unwrap();
    assert!(last < 400_000_000, "they slept until {last}");
    assert_eq!(product.number("waiting"), 0);
}

fn fault(file: u16) -> Bad {
    Bad { file, from: 0, to: DISK, fault: Fault::Fail(Errno::EIO), times: 1 }
}

#[test]
fn equal_devices_stay_equal_and_no_difference_is_reported() {
    for seed in 0..20 {
        let mut plan = mix(&mut Rng::new(seed), MIB, 300);
        plan.retain(|ask| ask.io.op != Op::Discard);
        let count = plan.len();
        let mut product = product(stack("verify", "", &[MIB, MIB]), plan, seed);
        product.rest();
        product.all_succeed(count);
        assert_eq!(product.bytes(0, MIB), product.bytes(1, MIB));
        assert_eq!(product.events(), [""; 0]);
        assert!(product.number("compared") > 0);
    }
}

#[test]
fn a_write_on_its_way_is_no_difference() {
    for seed in 0..10 {
        // Each block is written once, so that the two are equal in the end; everybody reads all.
        let plan: Vec<_> = (0..64)
            .flat_map(|block| {
                let write = now(Io::new(Op::Write, block * 4096, 4096));
                let read = now(Io::new(Op::Read, 0, 262_144));
                [write, read, read]
            })
            .collect();
        let twins = stack("verify", "", &[MIB, MIB]);
        let mut product =
            product_with(twins, plan, |setup| Setup { seed, overlaps: true, ..setup });
        product.rest();
        product.all_succeed(192);
        assert_eq!(product.events(), [""; 0]);
    }
}

#[test]
fn a_difference_is_reported_with_its_place_and_fails_the_read() {
    for (keys, fails) in [("", true), ("on-mismatch=report", false)] {
        let plan = vec![
            now(Io::new(Op::Read, 0, 65_536)),
            now(Io::new(Op::Read, 65_536, 131_072)),
            now(Io::new(Op::Read, 196_608, 65_536)),
        ];
        let mut product = product(stack("verify", keys, &[MIB, MIB]), plan, 3);
        product.bench.world.lock().unwrap().disks[1].bytes[150_001] ^= 4;
        product.rest();
        let mut results: Vec<_> =
            product.done().into_iter().map(|done| (done.seq, done.result)).collect();
        results.sort_by_key(|(seq, _)| *seq);
        let bad = if fails { Err(Errno::EIO) } else { Ok(()) };
        assert_eq!(results, [(0, Ok(())), (1, bad), (2, Ok(()))]);
        assert_eq!(product.events(), ["verify: the devices differ at byte 150001"]);
        assert_eq!(product.tell("check"), Ok("1 blocks differ, see the events".to_owned()));
        product.bench.world.lock().unwrap().disks[1].bytes[150_001] ^= 4;
        assert_eq!(product.tell("check"), Ok(format!("{MIB} bytes compared, all equal")));
    }
}

#[test]
fn a_write_that_reached_one_device_only_is_found() {
    let plan = vec![
        now(Io::new(Op::Write, 4096, 4096)),
        Ask { at: 10_000_000, io: Io::new(Op::Read, 4096, 4096) },
    ];
    let faults = Faults { bad: vec![fault(1)], ..Faults::default() };
    let twins = stack("verify", "", &[MIB, MIB]);
    let mut product = product_with(twins, plan, |setup| Setup { faults, ..setup });
    product.rest();
    assert_eq!(product.done().iter().filter(|done| done.result.is_err()).count(), 2);
    assert_eq!(product.events(), ["verify: the devices differ at byte 4096"]);
}

/// No other request overlaps here, so the one that is half done must be seen to be only that.
#[test]
fn a_check_beside_writes_finds_nothing() {
    for seed in 0..20 {
        let mut plan = mix(&mut Rng::new(seed), MIB, 400);
        plan.retain(|ask| ask.io.op.changes() && ask.io.op != Op::Discard);
        let count = plan.len();
        let mut product = product(stack("verify", "", &[MIB, MIB]), plan, seed);
        for _ in 0..3 {
            assert_eq!(product.tell("check"), Ok(format!("{MIB} bytes compared, all equal")));
        }
        product.rest();
        product.all_succeed(count);
        let world = product.bench.world.lock().unwrap();
        assert!(world.log.iter().any(|one| matches!(one.to, To::File(_)) && one.op == Op::Write));
    }
}
