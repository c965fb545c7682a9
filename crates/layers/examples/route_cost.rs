//! Answers for what routing costs: N requests through three layers, nothing else.
//!
//! `route_cost N` under `valgrind --tool=callgrind`, with two different N, gives instructions per
//! request: the difference of the totals over the difference of the counts.

use devsplice_core::{
    Args, ErrorKind, Io, Limits, NodeId, Op, Piece, Place, Result, Stack, StackBuilder,
    error::Error,
};

fn main() -> Result<()> {
    let usage = || Error::new(ErrorKind::Invalid, "route_cost", "give a number of requests");
    let count: u64 = std::env::args().nth(1).and_then(|n| n.parse().ok()).ok_or_else(usage)?;
    let stack = three_layers()?;
    println!("{:016x}", route(&stack, count));
    Ok(())
}

/// A window of a window of two disks in turn.
fn three_layers() -> Result<Stack> {
    let mut builder = StackBuilder::new();
    let (a, _) = builder.backend("a", Limits::ideal(1 << 30))?;
    let (b, _) = builder.backend("b", Limits::ideal(1 << 30))?;
    let stripe = add(&mut builder, "stripe", &[("chunk", "64k")], &[a, b])?;
    let inner = add(&mut builder, "linear", &[("offset", "1M")], &[stripe])?;
    let outer = add(&mut builder, "linear", &[("offset", "4M"), ("size", "1G")], &[inner])?;
    Ok(builder.finish(outer))
}

fn add(
    builder: &mut StackBuilder,
    name: &str,
    keys: &[(&str, &str)],
    below: &[NodeId],
) -> Result<NodeId> {
    let missing = || Error::new(ErrorKind::NotFound, name, "no such driver");
    let driver = devsplice_layers::find(name).ok_or_else(missing)?;
    let given: Vec<_> = keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let layer = (driver.make)(&Args::new(name, driver.keys, &given)?)?;
    builder.layer(name, layer, below, &mut |_, _, _| Ok(()))
}

/// Routes `count` reads of 4 KiB at places that vary; the sum keeps the pieces from being unused.
#[inline(never)]
fn route(stack: &Stack, count: u64) -> u64 {
    let mut route = stack.route(Io::new(Op::Read, 0, 4096));
    let mut sum = 0_u64;
    for number in 0..count {
        // An odd factor visits each 4 KiB of the 1 GiB before it repeats one.
        let at = (number.wrapping_mul(0x9e37_79b1) & 0x3_ffff) << 12;
        // As the engine does it: nothing more is asked of a request of one piece.
        let mut first = match stack.straight(Io::new(Op::Read, at, 4096)) {
            Ok(piece) => {
                sum = add_up(sum, &piece);
                continue;
            }
            Err(bend) => route.follow(stack, &bend),
        };
        while let Some(piece) = first.take().or_else(|| route.next(stack)) {
            sum = piece.map_or(sum, |piece| add_up(sum, &piece));
        }
    }
    sum
}

#[inline]
fn add_up(sum: u64, piece: &Piece) -> u64 {
    match piece.place {
        Place::Backend(id) => sum.rotate_left(9).wrapping_add(piece.at ^ u64::from(id.0)),
        Place::Zero => sum,
    }
}
