//! Answers for the mirror at work under the engine, with a clock of the test's own: a check waits
//! for what is being copied, rates are kept, people are told once, a read-only mirror writes
//! nothing.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::product::{Fresh, Product, make, product_with};
use common::*;
use devsplice_core::{Args, Bottoms, Errno, Io, Limits, Op, Stack, StackBuilder};
use devsplice_engine::To;

/// Bytes of a leg that are the mirror's own.
const META: u64 = 64 << 10;
/// Bytes of the window in which legs are made equal.
const WINDOW: u64 = 256 << 10;
const SECOND: u64 = 1_000_000_000;

/// A mirror of `size` bytes over two disks that was just formatted: the second is to be filled.
fn fresh(keys: &str, size: u64, leg: Limits) -> (Arc<Stack>, Vec<Vec<u8>>) {
    let leg = Limits { size: size + META, ..leg };
    let mut builder = StackBuilder::new();
    let ports: Vec<_> = (0..2).map(|_| builder.backend("disk", leg).unwrap().0).collect();
    let mut disks = Fresh(vec![vec![0; usize::try_from(leg.size).unwrap()]; 2]);
    let given = [("region".to_owned(), (size / 4).to_string())];
    let driver = devsplice_layers::find("mirror").unwrap();
    let args = Args::new("mirror", driver.keys, &given).unwrap();
    let format = devsplice_layers::format_of("mirror").unwrap();
    builder.format("mirror", &ports, &mut disks, |lower| format(&args, lower, false)).unwrap();
    let mut read = |id, at: u64, into: &mut [u8]| disks.read(id, at, into);
    let top = builder.layer("mirror", make("mirror", keys), &ports, &mut read).unwrap();
    (Arc::new(builder.finish(top)), disks.0)
}

fn served(
    (stack, disks): (Arc<Stack>, Vec<Vec<u8>>),
    plan: Vec<Ask>,
    change: impl FnOnce(Setup) -> Setup,
) -> Product {
    let size = disks[0].len() as u64;
    let product =
        product_with(stack, plan, |setup| change(Setup { disk: Limits::ideal(size), ..setup }));
    for (disk, bytes) in product.bench.world.lock().unwrap().disks.iter_mut().zip(disks) {
        disk.bytes = bytes;
    }
    product
}

fn mirror(keys: &str, size: u64, plan: Vec<Ask>) -> Product {
    served(fresh(keys, size, Limits::ideal(0)), plan, |setup| setup)
}

/// What was sent to the second leg's data so far, with when.
fn copied(product: &Product, size: u64) -> Vec<(u64, u64)> {
    let world = product.bench.world.lock().unwrap();
    let is_copy = |one: &&Logged| {
        matches!(one.to, To::File(file) if file.0 == 1) && one.op == Op::Write && one.at < size
    };
    world.log.iter().filter(is_copy).map(|one| (one.sent, one.len)).collect()
}

fn is_told(product: &Product, text: &str) -> usize {
    product.events().iter().filter(|event| event.contains(text)).count()
}

#[test]
fn a_check_right_after_a_leg_has_come_waits_until_it_is_filled() {
    let mut product = mirror("rate=1M clean=1ms", 2 * MIB, fill(2 * MIB));
    // The leg has nothing yet.
    let equal = Ok("2097152 bytes checked, 0 differing blocks found".to_owned());
    assert_eq!(product.tell("check"), equal);
    assert_eq!(product.number("bytes_synced"), 2 * MIB);
    assert_eq!(is_told(&product, "leg at port 1 is in sync"), 1);
    for _ in 0..3 {
        assert!(product.tell("fail 1").is_ok());
        let refused = Err("fewer than two legs are in sync: nothing to compare".to_owned());
        assert_eq!(product.tell("check"), refused);
        assert!(product.tell("add 1").is_ok());
        assert_eq!(product.tell("check"), equal);
    }
    product.rest();
    product.all_succeed(32);
    let len = 2 * MIB;
    assert!(product.bytes(0, len) == product.bytes(1, len), "the legs differ");
}

/// The others' superblocks say already that it is being filled; nobody fills it.
#[test]
fn an_add_whose_leg_cannot_be_written_keeps_what_the_leg_lacks_in_the_log() {
    for seed in 0..20 {
        let write = |at| Ask { at: 5 * SECOND, io: Io::new(Op::Write, at, 64 << 10) };
        let plan = fill(MIB).into_iter().chain([write(0), write(MIB / 2)]).collect();
        let stack = fresh("clean=1ms", MIB, Limits::ideal(0));
        let mut product = served(stack, plan, |setup| Setup { seed, ..setup });
        let equal = Ok("1048576 bytes checked, 0 differing blocks found".to_owned());
        product.turn_until(|product| product.done().len() == 16);
        assert_eq!(product.tell("check"), equal);
        assert!(product.tell("fail 1").is_ok());
        product.turn_until(|product| product.done().len() == 18);
        // What has to be durable counts as failed at once.
        let (from, to) = (MIB, MIB + 8192);
        let bad = Bad { file: 1, from, to, fault: Fault::Fail(Errno::EIO), times: 1 };
        product.bench.world.lock().unwrap().faults.bad = vec![bad];
        let refused = product.tell("add 1");
        assert!(refused.is_err(), "{refused:?}");
        assert_eq!(product.bench.world.lock().unwrap().faults.bad[0].times, 0);
        // Many times as long as it takes to clean.
        product.rest();
        assert_eq!(product.number("regions_dirty"), 2, "leg 1 lacks them, seed {seed}");
        assert!(product.tell("add 1").unwrap().contains("what it lacks by the log"));
        assert_eq!(product.tell("check"), equal, "seed {seed}");
        product.all_succeed(18);
        assert!(product.bytes(0, MIB) == product.bytes(1, MIB), "the legs differ, seed {seed}");
    }
}

#[test]
fn a_check_that_waits_for_a_copy_that_fails_ends_and_people_are_told_once() {
    let bad = |file| Bad {
        file,
        from: 300_000,
        to: 300_001,
        fault: Fault::Fail(Errno::EIO),
        times: u32::MAX,
    };
    let faults = Faults { bad: vec![bad(0)], ..Faults::default() };
    let mut product =
        served(fresh("", MIB, Limits::ideal(0)), vec![], |setup| Setup { faults, ..setup });
    let refused = Err("the legs cannot be made equal, see the events".to_owned());
    for _ in 0..5 {
        assert_eq!(product.tell("check"), refused);
        product.bench.world.lock().unwrap().begin_wait();
    }
    assert_eq!(is_told(&product, "4096 bytes at 299008 cannot be copied: EIO"), 1);
    assert_eq!(is_told(&product, "copying"), 1);
    let other = Bad { fault: Fault::Fail(Errno::ENODATA), ..bad(0) };
    product.bench.world.lock().unwrap().faults.bad = vec![other];
    assert_eq!(product.tell("check"), refused);
    assert_eq!(is_told(&product, "4096 bytes at 299008 cannot be copied: ENODATA"), 1, "news");
    product.bench.world.lock().unwrap().faults.bad.clear();
    assert_eq!(
        product.tell("check"),
        Ok("1048576 bytes checked, 0 differing blocks found".to_owned())
    );
    assert_eq!(is_told(&product, "leg at port 1 is in sync"), 1);
}

/// With nothing between two copies there is always one under way.
#[test]
fn a_device_that_ends_does_not_wait_for_a_leg_to_be_rebuilt() {
    const SIZE: u64 = 64 * MIB;
    let stack = fresh("", SIZE, Limits::ideal(0));
    let mut product = served(stack, fill(MIB), |setup| Setup { open: false, ..setup });
    while product.bench.worker.turn().unwrap() {}
    product.all_succeed(16);
    let copied = product.number("bytes_synced");
    assert!(copied < SIZE / 2, "it waited for {copied} bytes");
}

#[test]
fn a_check_that_waits_ends_with_the_device() {
    let stack = fresh("rate=1", 2 * MIB, Limits::ideal(0));
    let mut product = served(stack, fill(MIB), |setup| Setup { open: false, ..setup });
    let (node, ..) = product.served.stack.lives().next().unwrap();
    let answer = product.served.command(node, vec!["check".to_owned()]);
    while product.bench.worker.turn().unwrap() {}
    assert!(answer.recv().is_err(), "nobody is there to answer");
    product.all_succeed(16);
    assert!(product.number("bytes_synced") < 2 * MIB, "it did not wait for the copy");
}

#[test]
fn a_rebuild_keeps_to_its_rate_and_uses_it_up() {
    const RATE: u64 = 4 * MIB;
    const SIZE: u64 = 16 * MIB;
    for seed in 0..3 {
        let stack = fresh("rate=4M", SIZE, Limits::ideal(0));
        let mut product = served(stack, vec![], |setup| Setup { seed, ..setup });
        product.turn_until(|product| product.number("bytes_synced") == SIZE);
        let mut sum = 0;
        let sent = copied(&product, SIZE);
        for (at, len) in &sent {
            sum += len;
            let may = WINDOW + at * RATE / SECOND;
            assert!(sum <= may, "{sum} bytes by {at} ns, seed {seed}");
        }
        assert_eq!(sum, SIZE);
        let took = sent.last().unwrap().0;
        let ideal = (SIZE - WINDOW) * SECOND / RATE;
        assert!((ideal..ideal / 100 * 103).contains(&took), "{took} ns, at best {ideal}");
        // A check reads as fast as a rebuild may copy.
        product.turn_until(|product| product.number("bytes_to_sync") == 0);
        let begun = product.bench.world.lock().unwrap().now;
        assert!(product.tell("check").unwrap().contains(" 0 differing"));
        let took = product.bench.world.lock().unwrap().now - begun;
        let ideal = SIZE * SECOND / RATE;
        assert!((ideal..ideal / 100 * 103).contains(&took), "{took} ns, at best {ideal}");
    }
}

#[test]
fn without_a_rate_a_rebuild_does_not_wait_and_a_new_rate_reaches_one_that_does() {
    let mut free = mirror("", 8 * MIB, vec![]);
    free.turn_until(|free| free.number("bytes_synced") == 8 * MIB);
    let took = free.bench.world.lock().unwrap().now;
    assert!(took < SECOND, "{took} ns");
    // After its first window this one waits for days.
    let mut slow = mirror("rate=1", 8 * MIB, vec![]);
    slow.turn_until(|slow| slow.number("bytes_synced") == WINDOW);
    let begun = slow.bench.world.lock().unwrap().now;
    assert!(slow.tell("rate 16M").is_ok());
    slow.turn_until(|slow| slow.number("bytes_synced") == 8 * MIB);
    let took = slow.bench.world.lock().unwrap().now - begun;
    assert!((SECOND / 3..2 * SECOND).contains(&took), "{took} ns");
}

#[test]
fn a_read_only_mirror_answers_and_writes_nothing() {
    const REFUSED: &str = "a leg is read-only, so none is written";
    let locked = Limits { read_only: true, ..Limits::ideal(0) };
    let refused = |reason: &str| Err(reason.to_owned());
    // As it was formatted: the second leg is to be filled, and is not.
    let plan = vec![now(Io::new(Op::Read, 0, MIB)), now(Io::new(Op::Write, 0, 4096))];
    let mut product = served(fresh("", MIB, locked), plan, |setup| setup);
    let differ = "a leg is read-only, and the legs are known to differ";
    assert_eq!(product.tell("check"), refused(differ));
    for words in ["repair", "add 0", "add 1", "fail 0", "fail 1", "add 7"] {
        assert_eq!(product.tell(words), refused(REFUSED), "{words}");
    }
    let said = product.tell("rate 1M").unwrap();
    assert!(said.contains("1048576 bytes a second"), "{said}");
    assert_eq!(product.tell("mend"), refused("check, repair, add PORT, fail PORT, rate SIZE"));
    product.rest();
    assert_eq!(product.done().iter().map(|done| done.result).filter(Result::is_err).count(), 1);
    assert_eq!(changes(&product), 0);
    assert_eq!(product.events(), [""; 0]);
}

#[test]
fn a_read_only_mirror_that_is_in_sync_is_checked_and_not_repaired() {
    const SIZE: u64 = MIB;
    let mut product = mirror("clean=1ms", SIZE, vec![]);
    assert!(product.tell("check").is_ok());
    product.rest();
    let mut disks: Vec<Vec<u8>> = {
        let world = product.bench.world.lock().unwrap();
        world.disks.iter().map(|disk| disk.bytes.clone()).collect()
    };
    drop(product);
    disks[1][70_000] ^= 1;
    let locked = Limits { read_only: true, size: SIZE + META, ..Limits::ideal(0) };
    let mut builder = StackBuilder::new();
    let ports: Vec<_> = (0..2).map(|_| builder.backend("disk", locked).unwrap().0).collect();
    let mut bytes = Fresh(disks);
    let mut read = |id, at: u64, into: &mut [u8]| bytes.read(id, at, into);
    let top = builder.layer("mirror", make("mirror", ""), &ports, &mut read).unwrap();
    let stack = Arc::new(builder.finish(top));
    let mut product = served((stack, bytes.0), vec![], |setup| setup);
    assert_eq!(
        product.tell("check"),
        Ok("1048576 bytes checked, 1 differing blocks found".to_owned())
    );
    assert_eq!(product.tell("repair"), Err("a leg is read-only, so none is written".to_owned()));
    assert_eq!(product.number("mismatches"), 1);
    assert_eq!(changes(&product), 0);
}

/// Splices that change a disk.
fn changes(product: &Product) -> usize {
    let world = product.bench.world.lock().unwrap();
    world.log.iter().filter(|one| one.op.changes()).count()
}
