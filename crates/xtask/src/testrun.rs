//! The whole test run: every check and every test of the workspace, one table, one last line.

mod kernels;
mod pace;
mod parse;
mod steps;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::Args;

use crate::{Fallible, deps, proc};
use kernels::Kernel;
use pace::Pace;
use parse::Counts;

/// Programs that end-to-end tests start; without one of them its tests skip themselves.
const TOOLS: &[&str] = &[
    "fio",
    "mkfs.btrfs",
    "mkfs.ext4",
    "mkfs.xfs",
    "nbd-client",
    "nbd-server",
    "nbdcopy",
    "nbdkit",
    "qemu-img",
    "sfdisk",
    "sgdisk",
    "losetup",
    "valgrind",
];

/// Seeds of the simulator: some 20 s on two cores, and a tenth of that.
const SEEDS: &str = "100000";
const QUICK_SEEDS: &str = "10000";

/// Run every check and test: format, lints, style, unit and property tests, documentation, the
/// price of a request, FUSE on this machine, and everything in a virtual machine.
///
/// The last line of the output is `N passed, N failed, N skipped`.
#[derive(Args)]
pub struct Options {
    /// Leave the virtual machine out
    #[arg(long, conflicts_with = "full")]
    pub quick: bool,
    /// Repeat the virtual machine's tests with older kernels (6.18, 6.12, 6.1), and write
    /// docs/kernels.md
    #[arg(long)]
    pub full: bool,
    /// Only tests whose name contains this, and no checks
    pub filter: Option<String>,
}

/// A step that is over.
struct Done {
    name: String,
    time: Duration,
    counts: Counts,
}

/// Runs the steps one after another.
struct Run {
    done: Vec<Done>,
}

impl Run {
    /// Runs one step; a step that cannot be carried out has failed.
    fn step(&mut self, name: &str, work: impl FnOnce() -> Fallible<Counts>) -> Fallible<()> {
        proc::check_interrupt()?;
        println!("\n=== {name}");
        let start = Instant::now();
        let counts = work().unwrap_or_else(|message| {
            eprintln!("xtask: {name}: {message}");
            Counts::check(false)
        });
        self.done.push(Done { name: name.into(), time: start.elapsed(), counts });
        Ok(())
    }
}

/// Runs the tests and returns the exit code: 1 when anything failed.
pub fn run(options: &Options) -> Fallible<u8> {
    let start = Instant::now();
    std::env::set_current_dir(crate::tidy::workspace()?)
        .map_err(|e| format!("cannot enter the workspace: {e}"))?;
    prepare_tools();
    let mut run = Run { done: Vec::new() };
    let filter = options.filter.as_deref();
    if filter.is_none() {
        run.step("format", steps::format)?;
        run.step("lints", steps::lints)?;
        run.step("style", steps::style)?;
    }
    run.step("unit and property tests", || steps::unit_tests(filter))?;
    if filter.is_none() {
        run.step("documentation", steps::documentation)?;
        run.step("price of a request", steps::price_of_a_request)?;
        run.step("user mode of a request", steps::user_mode_of_a_request)?;
        let seeds = if options.quick { QUICK_SEEDS } else { SEEDS };
        run.step("simulator", || steps::simulator(seeds))?;
    }
    let mut programs = None;
    run.step("build for end-to-end tests", || {
        programs = Some(steps::build_end_to_end()?);
        Ok(Counts::default())
    })?;
    if let Some(programs) = programs {
        let mut had = Vec::new();
        run.step("end to end, this machine", || {
            steps::end_to_end_here(&programs, filter, &mut had)
        })?;
        if options.full {
            had.clear();
        }
        let kernels: &[&str] = match options {
            Options { quick: true, .. } => &[],
            Options { full: true, .. } => &["7.3", "6.18", "6.12", "6.1"],
            _ => &["7.3"],
        };
        let mut table = Vec::new();
        for series in kernels.iter().copied() {
            let name = format!("end to end, VM with Linux {series}");
            let (mut kernel, mut pace) = (Kernel::default(), Pace::new());
            let about = (&mut kernel, &mut pace);
            run.step(&name, || steps::end_to_end_vm(&programs, series, (filter, &had), about))?;
            pace.show(series);
            table.push((series, kernel));
        }
        if options.full && run.done.iter().all(|done| done.counts.failed == 0) {
            kernels::write(&table)?;
        }
    }
    // A run that was cut short has no result.
    proc::check_interrupt()?;
    Ok(report(&run.done, start.elapsed()))
}

/// Gets what the tests use. A tool that cannot be had makes tests skip, and they say so.
fn prepare_tools() {
    if !proc::is_root() {
        let missing = deps::missing(TOOLS);
        if !missing.is_empty() {
            eprintln!("xtask: not installed, some tests will skip: {}", missing.join(", "));
        }
    } else if let Err(message) = deps::ensure(TOOLS) {
        eprintln!("xtask: {message}");
    }
}

/// Prints the tests left out by reason, the table, what failed, and the last line: what matters
/// most comes last, where whoever keeps only the end of an output has it.
fn report(done: &[Done], time: Duration) -> u8 {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    println!();
    for Counts { skipped, .. } in done.iter().map(|done| &done.counts) {
        for (test, reason) in skipped {
            reasons.entry(reason).or_default().push(test);
        }
    }
    for (reason, tests) in reasons {
        println!("skipped: {reason}");
        for test in tests {
            println!("    {test}");
        }
    }
    println!("\n{:34} {:>8} {:>7} {:>7} {:>8}", "step", "time", "passed", "failed", "skipped");
    for Done { name, time, counts } in done {
        let (seconds, skips) = (time.as_secs_f64(), counts.skipped.len());
        let (held, broken) = (counts.passed, counts.failed);
        println!("{name:34} {seconds:>6.1} s {held:>7} {broken:>7} {skips:>8}");
        passed += held;
        failed += broken;
        skipped += skips;
    }
    println!("{:34} {:>6.1} s", "all", time.as_secs_f64());
    for Done { name, counts, .. } in done.iter().filter(|done| done.counts.failed > 0) {
        println!("failed in {name}:");
        for test in &counts.broken {
            println!("    {test}");
        }
        if counts.broken.is_empty() {
            println!("    no test by name: the step itself did not end well");
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    u8::from(failed > 0)
}
