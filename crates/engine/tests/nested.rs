//! Answers for live layers over live layers: a failed flush is believed, a request that waits below
//! is still under way for the layers above it, nobody's flush passes for another one's, and no
//! layer waits for memory that a layer above it has.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::product::Real::{Disk, Over};
use common::product::{DISK, Fresh, Product, Real, product_with, real};
use common::*;
use devsplice_core::{Args, Errno, Io, Op, Stack, StackBuilder};

const MS: u64 = 1_000_000;
/// Bytes of a leg that are the mirror's own.
const META: u64 = 64 << 10;
/// Where a leg's log lies among them; without a bit it is all zeros.
const LOG_AT: usize = 8192;
/// Bytes of a mirror over disks of the test world.
const SIZE: u64 = DISK - META;

/// What two disks hold that were just made a mirror.
fn formatted() -> Vec<Vec<u8>> {
    let mut builder = StackBuilder::new();
    let ports: Vec<_> = (0..2).map(|_| builder.backend("disk", ideal(DISK)).unwrap().0).collect();
    let mut disks = Fresh(vec![vec![0; usize::try_from(DISK).unwrap()]; 2]);
    let driver = devsplice_layers::find("mirror").unwrap();
    let args = Args::new("mirror", driver.keys, &[]).unwrap();
    let format = devsplice_layers::format_of("mirror").unwrap();
    builder.format("mirror", &ports, &mut disks, |lower| format(&args, lower, false)).unwrap();
    disks.0
}

/// A mirror whose legs are in sync and clean when what is asked begins, which is after a minute.
/// Its first leg's disk is number 0, its second's number 1.
fn mirror(keys: &'static str, second: Real, plan: Vec<Ask>) -> Product {
    let mut disks = formatted();
    let over = |keys, second| Over("mirror", keys, vec![Disk, second]);
    let mut plain = served(real(&over("clean=1ms", Disk), &disks), &disks, vec![]);
    plain.turn_until(|plain| plain.number("regions_dirty") == 0);
    for (index, disk) in disks.iter_mut().enumerate() {
        *disk = plain.bytes(index, DISK);
    }
    assert!(!differ(&disks) && !is_logged(&disks));
    served(real(&over(keys, second), &disks), &disks, plan)
}

fn served(stack: Arc<Stack>, disks: &[Vec<u8>], plan: Vec<Ask>) -> Product {
    let product = product_with(stack, plan, |setup| setup);
    for (disk, bytes) in product.bench.world.lock().unwrap().disks.iter_mut().zip(disks) {
        disk.bytes.clone_from(bytes);
    }
    product
}

fn differ(legs: &[Vec<u8>]) -> bool {
    let size = usize::try_from(SIZE).unwrap();
    legs[0][..size] != legs[1][..size]
}

/// Whether the mirror's log, as a fresh start would find it, has any region that may differ.
fn is_logged(legs: &[Vec<u8>]) -> bool {
    let stack = real(&Over("mirror", "", vec![Disk, Disk]), legs);
    let (_, _, live) = stack.lives().next().unwrap();
    let status = live.status();
    let dirty = status.iter().find(|(name, _)| *name == "regions_dirty").unwrap();
    dirty.1 != devsplice_core::Value::Number(0)
}

fn at(ms: u64, io: Io) -> Ask {
    Ask { at: ms * MS, io }
}

fn write(place: u64, len: u64) -> Io {
    Io::new(Op::Write, place, len)
}

fn forced(place: u64, len: u64) -> Io {
    Io { fua: true, ..write(place, len) }
}

const FLUSH: Io = Io::new(Op::Flush, 0, 0);

fn is_dropped(product: &Product, port: u16) -> bool {
    let text = format!("leg at port {port} dropped");
    product.events().iter().any(|event| event.contains(&text))
}

fn fails_once(product: &Product, disk: usize) {
    product.bench.world.lock().unwrap().disks[disk].bad_flush = Some((Errno::EIO, 1));
}

/// A write, and after so long a flush, of which one has failed in between, cost the leg.
fn costs_the_leg(keys: &'static str, after: u64) {
    for disk in 0..2 {
        let mut product = mirror(keys, Disk, vec![now(write(0, 4096)), at(after, FLUSH)]);
        product.turn_until(|product| product.done().len() == 1);
        fails_once(&product, disk);
        product.turn_until(|product| product.done().len() == 2);
        product.all_succeed(2);
        assert!(is_dropped(&product, u16::try_from(disk).unwrap()), "{:?}", product.events());
    }
}

#[test]
fn a_flush_that_fails_once_costs_the_leg() {
    costs_the_leg("clean=3600s", 10);
}

#[test]
fn a_flush_of_the_layers_own_that_fails_once_costs_the_leg() {
    costs_the_leg("clean=1s", 30_000);
}

#[test]
fn a_forced_write_that_fails_once_costs_the_leg_and_another_write_does_not() {
    for is_forced in [true, false] {
        let io = if is_forced { forced(0, 65_536) } else { write(0, 65_536) };
        let mut product = mirror("clean=3600s", Disk, vec![now(write(0, 4096)), at(10, io)]);
        product.turn_until(|product| product.done().len() == 1);
        let fault = Fault::Fail(Errno::EIO);
        let bad = Bad { file: 1, from: 8192, to: 8193, fault, times: 1 };
        product.bench.world.lock().unwrap().faults.bad = vec![bad];
        product.turn_until(|product| product.done().len() == 2);
        product.all_succeed(2);
        assert_eq!(is_dropped(&product, 1), is_forced);
    }
}

#[test]
fn a_flush_that_fails_on_the_only_leg_is_the_clients() {
    let mut product = mirror("clean=3600s", Disk, vec![now(write(0, 4096)), at(10, FLUSH)]);
    product.turn_until(|product| product.done().len() == 1);
    assert!(product.tell("fail 1").is_ok());
    fails_once(&product, 0);
    product.turn_until(|product| product.done().len() == 2);
    assert_eq!(product.done()[1].result, Err(Errno::EIO));
}

/// A write is on one leg and waits at the other for much longer than regions stay dirty.
#[test]
fn a_region_stays_in_the_log_while_a_write_waits_at_one_of_its_legs() {
    let slow = Over("throttle", "write-bps=64k burst=1ms", vec![Disk]);
    let plan = (0..4).map(|index| at(20 * index, write(index * 65_536, 32_768))).collect();
    let mut product = mirror("clean=1ms", slow, plan);
    let mut waited = 0;
    loop {
        let before = product.bench.world.lock().unwrap().now;
        product.turn_until(|product| {
            product.bench.world.lock().unwrap().now > before + MS || product.done().len() == 4
        });
        let legs = [product.bytes(0, DISK), product.bytes(1, DISK)];
        if differ(&legs) {
            waited += 1;
            // The log of the leg that is ahead: the other one's is held back as the write is.
            let log = &legs[0][usize::try_from(SIZE).unwrap() + LOG_AT..];
            assert!(log.iter().any(|byte| *byte != 0), "it is forgotten that the legs differ");
        }
        if product.done().len() == 4 {
            break;
        }
    }
    assert!(waited > 5, "no write waited");
    product.all_succeed(4);
    product.turn_until(|product| product.number("regions_dirty") == 0);
}

/// The mirror hears that what waits below could not be done.
#[test]
fn what_a_layer_below_cannot_resolve_costs_the_leg() {
    let flaky = Over("flaky", "", vec![Disk, Disk]);
    // The second one has to have the first one on the disk before it, which fails.
    let plan = vec![now(write(0, 4096)), at(10, forced(0, 4096))];
    let mut product = mirror("clean=3600s", flaky, plan);
    product.turn_until(|product| product.done().len() == 1);
    fails_once(&product, 1);
    product.turn_until(|product| product.done().len() == 2);
    product.all_succeed(2);
    assert!(is_dropped(&product, 1), "{:?}", product.events());
}

fn word(log: &[u8], place: usize) -> usize {
    usize::try_from(u64::from_le_bytes(log[place..place + 8].try_into().unwrap())).unwrap()
}

/// The data of each write in a log: docs/formats/log-writes.md.
fn recorded(log: &[u8]) -> Vec<Vec<u8>> {
    let mut place = 512;
    let mut all = Vec::new();
    for _ in 0..word(log, 16) {
        let len = word(log, place + 8) * 512;
        place += 512 + len;
        all.push(log[place - len..place].to_vec());
    }
    all
}

#[test]
fn a_log_has_no_entry_whose_data_waits_at_the_disk() {
    let slow = Over("throttle", "write-bps=64k burst=1ms", vec![Disk]);
    let stack = real(&Over("log", "", vec![slow, Disk]), &[]);
    let mut plan: Vec<_> = (0..3).map(|index| at(5 * index, write(index * 65_536, 4096))).collect();
    plan.insert(2, at(8, FLUSH));
    plan.push(at(20, FLUSH));
    let mut product = product_with(stack, plan, |setup| setup);
    let flushes =
        |product: &Product| product.done().iter().filter(|done| done.io.op == Op::Flush).count();
    for count in 1..=2 {
        product.turn_until(|product| flushes(product) == count);
        for data in recorded(&product.bytes(1, DISK)).iter().filter(|data| !data.is_empty()) {
            let is_known = data[0] != 0 && data[4..8] == [1, 2, 3, 4];
            assert!(is_known, "an entry's data is not there");
        }
    }
    product.rest();
    product.all_succeed(5);
}

#[test]
fn a_flush_does_not_copy_what_has_not_reached_the_scratch_device() {
    let slow = Over("throttle", "write-bps=64k burst=1ms", vec![Disk]);
    let stack = real(&Over("flaky", "", vec![Disk, slow]), &[]);
    // The second write goes to the disk at once; the scratch device has the first one's bytes.
    let plan = vec![
        now(write(0, 4096)),
        at(1000, FLUSH),
        at(2000, forced(0, 4096)),
        at(3000, write(65_536, 32_768)),
        at(3005, write(0, 4096)),
        at(3010, FLUSH),
    ];
    let mut product = product_with(stack, plan, |setup| setup);
    product.turn_until(|product| product.done().len() == 3);
    while product.done().len() < 6 {
        let before = product.done().len();
        let now = product.bench.world.lock().unwrap().now;
        product.turn_until(|product| {
            product.done().len() > before || product.bench.world.lock().unwrap().now > now + 10 * MS
        });
        let from = product.bytes(0, 4096)[0];
        assert!(from == 3 || from == 5, "old bytes went over good ones: those of write {from}");
    }
    product.rest();
    product.all_succeed(6);
}

#[test]
fn layers_above_one_another_do_not_wait_for_each_others_memory() {
    let verify = |below| Over("verify", "", below);
    let two = verify(vec![verify(vec![Disk, Disk]), Disk]);
    let three = verify(vec![Disk, verify(vec![Disk, verify(vec![Disk, Disk])])]);
    for tree in [two, three] {
        let plan = (0..64).map(|index| now(Io::new(Op::Read, index * 4096, 4096))).collect();
        let deep = |setup| Setup { depth: 16, ..setup };
        let mut product = product_with(real(&tree, &[]), plan, deep);
        product.rest();
        product.all_succeed(64);
    }
}

/// Each write is to a block of its own; when a flush ends, those that ended before it was asked are
/// on the disks that keep them.
#[test]
fn no_flush_passes_for_another_one() {
    let flaky = || Over("flaky", "", vec![Disk, Disk]);
    let trees: [(Real, &[usize]); 4] = [
        (flaky(), &[0]),
        (Over("log", "", vec![flaky(), Disk]), &[0]),
        (Over("verify", "", vec![flaky(), flaky()]), &[0, 2]),
        (Over("log", "", vec![Over("verify", "", vec![flaky(), flaky()]), Disk]), &[0, 2]),
    ];
    for (tree, kept) in trees {
        for seed in 0..10 {
            let mut rng = Rng::new(seed);
            let mut time = 0;
            let plan: Vec<_> = (0..200)
                .map(|index| {
                    time += rng.below(150_000);
                    let io = if rng.percent(40) { FLUSH } else { write(index * 4096, 4096) };
                    Ask { at: time, io }
                })
                .collect();
            let asked = plan.clone();
            let with = |setup| Setup { seed, depth: 16, overlaps: true, ..setup };
            let mut product = product_with(real(&tree, &[]), plan, with);
            for count in 1..=asked.len() {
                product.turn_until(|product| product.done().len() >= count);
                let done = product.done();
                let last = done[count - 1];
                if last.io.op == Op::Flush {
                    let before = |done: &&Done| done.at < asked[last.seq].at;
                    for other in done.iter().filter(before).filter(|done| done.io.op == Op::Write) {
                        for disk in kept {
                            let place = usize::try_from(other.io.extent.at).unwrap();
                            let world = product.bench.world.lock().unwrap();
                            let is_there = world.disks[*disk].bytes[place + 4] == 1;
                            assert!(is_there, "seed {seed}: {:?} is not on {disk}", other.io);
                        }
                    }
                }
            }
            product.rest();
            product.all_succeed(200);
        }
    }
}
