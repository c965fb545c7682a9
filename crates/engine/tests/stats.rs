//! Answers for stats: what is timed is what passed the layer, whole and once, waits included.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::product::{make, product_with};
use common::*;
use devsplice_core::{Errno, Io, Limits, NodeId, Op, Stack, StackBuilder, Value};
use devsplice_engine::{FileId, To};

fn over(builder: &mut StackBuilder, name: &str, keys: &str, ports: &[NodeId]) -> NodeId {
    builder.layer(name, make(name, keys), ports, &mut |_, _, _| Ok::<(), Errno>(())).unwrap()
}

/// The rows of the stats layer with this name: operation, size, count, median, longest.
fn rows(stack: &Stack, name: &str) -> Vec<(String, String, u64, u64, u64)> {
    let (_, _, live) = stack.lives().find(|(_, one, _)| *one == name).unwrap();
    let Some((_, Value::List(rows))) = live.status().into_iter().next() else { panic!() };
    let text = |value: &Value| match value {
        Value::Text(text) => text.clone(),
        other => panic!("{other:?}"),
    };
    let number = |value: &Value| match value {
        Value::Number(number) => *number,
        other => panic!("{other:?}"),
    };
    let row = |row: Vec<(_, Value)>| {
        let [op, size, count, median, longest] = [0, 1, 2, 3, 7].map(|at: usize| row[at].1.clone());
        (text(&op), text(&size), number(&count), number(&median), number(&longest))
    };
    rows.into_iter().map(row).collect()
}

#[test]
fn what_passed_the_layer_is_counted_once_whatever_was_retried() {
    for seed in 0..20 {
        let mut builder = StackBuilder::new();
        let (a, _) = builder.backend("a", Limits::ideal(MIB)).unwrap();
        let (b, _) = builder.backend("b", Limits::ideal(MIB)).unwrap();
        let stats = over(&mut builder, "stats", "", &[a]);
        let top = over(&mut builder, "stripe", "chunk=16k", &[stats, b]);
        let stack = Arc::new(builder.finish(top));
        let plan = mix(&mut Rng::new(seed), 2 * MIB, 300);
        let count = plan.len();
        let faults = Faults { short: 20, eagain: 10, ..Faults::default() };
        let setup = |setup| Setup { seed, faults, disk: ideal(MIB), ..setup };
        let mut product = product_with(stack.clone(), plan, setup);
        product.rest();
        product.all_succeed(count);
        let retries = product.bench.shared.read().retries;
        assert!(retries > 0);
        let world = product.bench.world.lock().unwrap();
        let sent =
            |file| world.log.iter().filter(|one| one.to == To::File(FileId(file))).count() as u64;
        let counted: u64 = rows(&stack, "stats").iter().map(|row| row.2).sum();
        // Everything that was sent to either disk, less what was sent again to either.
        let all = product.bench.shared.read().splices;
        assert_eq!(sent(0) + sent(1), all + retries);
        assert!(counted <= sent(0) && counted + retries >= sent(0), "seed {seed}");
        assert!(counted > 0 && counted < all);
    }
}

#[test]
fn without_retries_the_counts_are_exact_by_operation_and_size() {
    let mut builder = StackBuilder::new();
    let (a, _) = builder.backend("a", Limits::ideal(MIB)).unwrap();
    let top = over(&mut builder, "stats", "", &[a]);
    let stack = Arc::new(builder.finish(top));
    let plan = mix(&mut Rng::new(7), MIB, 300);
    let count =
        |is_meant: &dyn Fn(&Io) -> bool| plan.iter().filter(|ask| is_meant(&ask.io)).count() as u64;
    let small_reads = count(&|io| io.op == Op::Read && io.extent.len <= 4096);
    let flushes = count(&|io| io.op == Op::Flush);
    let mut product =
        product_with(stack.clone(), plan.clone(), |setup| Setup { disk: ideal(MIB), ..setup });
    product.rest();
    let rows = rows(&stack, "stats");
    let of = |op: &str, size: &str| rows.iter().find(|row| row.0 == op && row.1 == size).unwrap().2;
    assert_eq!(of("read", "4k"), small_reads);
    assert_eq!(of("flush", "any"), flushes);
    assert_eq!(rows.iter().map(|row| row.2).sum::<u64>(), 300);
    assert!(product.tell("reset").is_ok());
    assert_eq!(self::rows(&stack, "stats").len(), 0);
    assert!(product.tell("forget").is_err());
}

#[test]
fn a_wait_that_a_layer_asks_for_counts() {
    let mut builder = StackBuilder::new();
    let (a, _) = builder.backend("a", Limits::ideal(MIB)).unwrap();
    let slow = over(&mut builder, "delay", "write=5ms", &[a]);
    let top = over(&mut builder, "stats", "", &[slow]);
    let stack = Arc::new(builder.finish(top));
    let plan: Vec<_> = (0..50)
        .flat_map(|i| [Op::Write, Op::Read].map(|op| now(Io::new(op, i * 4096, 4096))))
        .collect();
    let mut product =
        product_with(stack.clone(), plan, |setup| Setup { disk: ideal(MIB), ..setup });
    product.rest();
    product.all_succeed(100);
    for (op, size, count, median, longest) in rows(&stack, "stats") {
        assert_eq!((size.as_str(), count), ("4k", 50));
        let range = if op == "write" { 5_000_000..5_800_000 } else { 1000..600_000 };
        assert!(range.contains(&median) && longest >= median, "{op}: {median} ns");
    }
}
