//! Answers for `devsplice bench`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Op, Result, Value};
use devsplice_exports::local::{self, Load, Pattern, Size};
use serde_json::{Map, json};

use super::{Open, attend};
use crate::args::{Bench, RwChoice};
use crate::say;

/// The most bytes of a request.
const MOST: u64 = 32 << 20;

/// Measures.
///
/// # Errors
/// If the stack cannot be opened so, or a request failed.
pub fn run(bench: &Bench) -> Result<()> {
    let (op, random) = match bench.rw {
        RwChoice::Read => (Op::Read, false),
        RwChoice::Write => (Op::Write, false),
        RwChoice::Randread => (Op::Read, true),
        RwChoice::Randwrite => (Op::Write, true),
    };
    if op == Op::Write && !bench.destroy {
        return Err(Error::invalid(&bench.stack, "would be overwritten").next("--destroy says so"));
    }
    let access = if op == Op::Write { Access::Serve } else { Access::Read };
    let open = Open::new(&bench.stack, access)?;
    if op == Op::Write {
        open.refuse_zones("bench")?;
    }
    open.warn();
    let limits = *open.limits();
    if bench.bs == 0
        || bench.bs > MOST.min(limits.size)
        || !bench.bs.is_multiple_of(u64::from(limits.block))
    {
        let reason =
            format!("{} is not within the disk, or off its {}-byte blocks", bench.bs, limits.block);
        return Err(Error::invalid("--bs", reason));
    }
    let time = Duration::from_secs(bench.runtime);
    let load = Arc::new(Load::new(Pattern { op, len: bench.bs, span: limits.size, random, time }));
    let threads = bench.threads.min(open.most_threads());
    let works = (0..threads).map(|thread| load.thread(bench.iodepth, u64::from(thread) + 1));
    let works: Vec<_> = works.collect();
    let bytes = u32::try_from(bench.bs).unwrap_or(u32::MAX);
    let size = Size { depth: bench.iodepth, bytes };
    let side = open.into_side();
    let begin = Instant::now();
    attend(
        move || local::run(&[side], (size, &[true]), works),
        |stop| {
            if stop {
                load.stop();
            }
        },
    )?;
    let took = begin.elapsed().as_secs_f64();
    if let Some(errno) = load.failure() {
        let reason = format!("{} failed: {errno}", op.name());
        return Err(Error::new(ErrorKind::Os, &bench.stack, reason));
    }
    report(bench, &load, took);
    Ok(())
}

#[allow(clippy::cast_precision_loss)] // Rates are for people.
fn report(bench: &Bench, load: &Load, took: f64) {
    let requests = load.requests();
    let per_second = requests as f64 / took;
    let bytes = per_second * bench.bs as f64;
    let rows = load.latencies.rows();
    let mut latencies = Map::new();
    for (name, value) in rows.into_iter().flatten() {
        if let Value::Number(number) = value {
            latencies.insert(name.to_owned(), number.into());
        }
    }
    latencies.remove("count");
    if bench.json {
        let value = json!({
            "requests": requests, "seconds": took, "requests_per_second": per_second,
            "bytes_per_second": bytes, "latencies": latencies,
        });
        say!("{value}");
        return;
    }
    say!("{requests} requests in {took:.2} s: {per_second:.0} a second, {:.1} MB/s", bytes / 1e6);
    for (name, value) in &latencies {
        let us = value.as_u64().unwrap_or(0) as f64 / 1000.0;
        say!("  {:<8} {us:>10.1} us", name.trim_end_matches("_ns"));
    }
}
