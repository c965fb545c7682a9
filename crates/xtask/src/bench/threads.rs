//! Answers for the threads part: what a client with one thread can get from one, two and four
//! threads that serve one queue together.
//!
//! Whether two threads are faster than one shows where there are CPUs for the client and for both.
//! The test machine has one, which counts instructions; so this measures what decides it: the work
//! of the busiest thread for each request. While that thread is what others wait for, requests come
//! as much more often as its work is less.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::cells::Cell;
use super::data::{Results, Sample};
use super::guest::{Plan, appeared};
use super::run::{bounded, fio, fio_arguments, run_detached};
use crate::Fallible;
use crate::proc::{self, run_quiet};

/// The machine.
pub const MACHINE: &[&str] =
    &["--accel", "icount", "--cpus", "1", "--scratch", "1G", "--timeout", "1800"];
/// What the files below the devices begin with. All of them are in the page cache, so that a
/// request costs its thread the copy, and no time is spent on a disk.
const FILE: &str = "/scratch/threads-";
/// MiB of each.
const SIZE: u32 = 32;
/// What is told of a load: the work of one thread, and of all.
const BUSIEST: &str = "busiest";
const ALL: &str = "all";
/// Threads that serve.
const COUNTS: [u32; 3] = [1, 2, 4];
/// How the requests of one queue come to several threads.
const WAYS: [(&str, &str); 2] = [("in batches", "on"), ("by tags", "off")];

/// The loads.
pub const CELLS: &[Cell] = &[
    Cell { name: "4k-qd32-read", rw: "randread", block: "4k", depth: 32, ios: 20_000 },
    Cell { name: "64k-qd32-read", rw: "randread", block: "64k", depth: 32, ios: 6_000 },
];

/// A device: how its requests come, to how many threads.
fn name(way: &str, count: u32) -> String {
    format!("{count} {way}")
}

/// Measures in the machine.
pub fn run(plan: &Plan) -> Fallible<u8> {
    let mut results = Results::default();
    let program = plan.program("devsplice")?.to_string_lossy().into_owned();
    let mut live = Vec::new();
    for (id, (way, count)) in
        WAYS.iter().flat_map(|way| COUNTS.map(|count| (way, count))).enumerate()
    {
        let node = format!("/dev/ublkb{id}");
        let fill =
            [&format!("of={FILE}{id}"), "if=/dev/urandom", "bs=1M", &format!("count={SIZE}")];
        run_quiet(bounded(120, "dd").args(fill))?;
        let stack = format!("file(path={FILE}{id}, direct=off)");
        let fixed = ["--export", "ublk", "--queues", "1", "--depth", "64", "--no-part-scan"];
        let mut words = vec!["devsplice".to_owned(), "add".to_owned(), stack];
        words.extend(fixed.map(str::to_owned));
        words.extend(
            ["-n", &format!("t{id}"), "--batch", way.1, "--threads", &count.to_string()]
                .map(str::to_owned),
        );
        results.commands.push((name(way.0, count), words.join(" ")));
        words[0].clone_from(&program);
        run_detached(&words, Path::new(&format!("/run/bench-{id}.log")))?;
        appeared(&node)?;
        live.push((name(way.0, count), node, format!("t{id}")));
    }
    for number in 1..=plan.samples() {
        for cell in CELLS {
            for (device, node, disk) in &live {
                proc::check_interrupt()?;
                let server = server(&program, disk)?;
                let before = times(&server);
                let count = [format!("--number_ios={}", cell.ios), "--io_size=1T".to_owned()];
                let arguments = fio_arguments(node, cell, &format!("{SIZE}M"));
                let load = fio(arguments, &[&count[0], &count[1]])?;
                let after = times(&server);
                let spent = after.iter().map(|(thread, time)| {
                    (time - before.get(thread).copied().unwrap_or(0.0)) / load.ios / 1000.0
                });
                let spent: Vec<f64> = spent.collect();
                let busiest = spent.iter().copied().fold(0.0, f64::max);
                let all: f64 = spent.iter().sum();
                let cell = cell.name;
                println!("{number} {cell:14} {device:14} busiest {busiest:6.2} k, all {all:6.2} k");
                for (of, value) in [(BUSIEST, busiest), (ALL, all)] {
                    let (device, cell) = (device.clone(), format!("{cell} {of}"));
                    results.samples.push(Sample { device, cell, value, idle: 0.0 });
                }
            }
            results.save(&plan.file("threads.json"))?;
        }
    }
    Ok(0)
}

/// The process that serves a disk.
fn server(program: &str, disk: &str) -> Fallible<String> {
    let told = run_quiet(bounded(20, program).args(["info", "--json", disk]))?;
    let told: Value = serde_json::from_slice(&told).map_err(|e| format!("info {disk}: {e}"))?;
    let number = told["pid"].as_u64().ok_or("info shows no server")?;
    Ok(number.to_string())
}

/// Nanoseconds that each thread of a process has run: one instruction is one here.
fn times(process: &str) -> BTreeMap<OsString, f64> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let time = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        Some((task.file_name(), text.split_whitespace().next()?.parse().ok()?))
    };
    tasks.filter_map(time).collect()
}

/// The table: thousand instructions for each request.
pub fn text(results: &Results) -> String {
    let mut text = String::from(
        "| load | requests come | threads | busiest thread | all threads | one thread / busiest |\n\
         |---|---|---|---|---|---|\n",
    );
    for cell in CELLS {
        for (way, _) in WAYS {
            for count in COUNTS {
                let figure =
                    |count, of| results.figure(&name(way, count), &format!("{} {of}", cell.name));
                let of_all = [figure(1, BUSIEST), figure(count, BUSIEST), figure(count, ALL)];
                let [Some(one), Some(busiest), Some(all)] = of_all else { continue };
                let times = one.median / busiest.median;
                // Writing to a string cannot fail.
                let _ = writeln!(
                    text,
                    "| {} | {way} | {count} | {:.1} | {:.1} | {times:.2} |",
                    cell.name, busiest.median, all.median
                );
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_how_much_less_the_busiest_thread_has_to_do() {
        let mut results = Results::default();
        for (count, busiest, all) in [(1, 10.0, 10.0), (2, 6.25, 12.0)] {
            for (of, value) in [(BUSIEST, busiest), (ALL, all)] {
                let (device, cell) = (name("by tags", count), format!("{} {of}", CELLS[0].name));
                results.samples.push(Sample { device, cell, value, idle: 0.0 });
            }
        }
        let text = text(&results);
        assert!(text.contains("| 4k-qd32-read | by tags | 2 | 6.2 | 12.0 | 1.60 |"), "{text}");
        assert_eq!(text.lines().count(), 4, "{text}");
    }
}
