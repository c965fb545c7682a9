//! Answers for `sim`: runs seeds, says how fast, and how to run a failing one again.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use devsplice_sim::{Options, Report, run};

/// Seeds that a thread takes at a time.
const STRIDE: u64 = 256;

/// Run the engine in simulated worlds: one seed is one run, the same each time.
#[derive(Parser)]
#[command(name = "cargo xtask sim", bin_name = "cargo xtask sim")]
struct Cli {
    /// How many seeds to run
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    start: u64,
    /// Run only this one
    #[arg(long, conflicts_with_all = ["seeds", "start"])]
    seed: Option<u64>,
    /// Print everything that happens; for a single seed
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Threads, each with seeds of its own
    #[arg(long, default_value_t = 2, value_name = "N")]
    threads: usize,
}

thread_local! {
    /// The seed that this thread runs, for the message of a panic.
    static SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        if let Some(seed) = SEED.get() {
            eprintln!("seed {seed} failed: it panicked; {}", replay(seed));
        }
    }));
    match cli.seed {
        Some(seed) => single(seed, cli.trace),
        None => many(&cli),
    }
}

fn replay(seed: u64) -> String {
    format!("run it again: cargo xtask sim --seed {seed} --trace")
}

fn one(seed: u64, trace: bool) -> Report {
    SEED.set(Some(seed));
    let report = run(seed, Options { trace, ..Options::default() });
    SEED.set(None);
    report
}

fn single(seed: u64, trace: bool) -> ExitCode {
    let report = one(seed, trace);
    let mut out = std::io::stdout().lock();
    // A reader that has seen enough closes the pipe.
    let written = report.trace.iter().try_for_each(|line| writeln!(out, "{line}"));
    if written.is_err() {
        return ExitCode::FAILURE;
    }
    let Report { digest, requests, splices, crashes, .. } = report;
    print!("seed {seed}: {requests} requests, {splices} splices, {crashes} crashes, ");
    println!("digest {digest:016x}");
    match report.failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            eprintln!("seed {seed} failed: {failure}; {}", replay(seed));
            ExitCode::FAILURE
        }
    }
}

/// What all threads know.
#[derive(Default)]
struct Progress {
    next: AtomicU64,
    done: AtomicU64,
    requests: AtomicU64,
    crashes: AtomicU64,
    mirror_crashes: AtomicU64,
    stop: AtomicBool,
    failed: Mutex<Vec<Report>>,
}

fn many(cli: &Cli) -> ExitCode {
    let start = Instant::now();
    let progress = Progress::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..cli.threads.max(1)).map(|_| scope.spawn(|| work(cli, &progress))).collect();
        let mut told = Instant::now();
        while !workers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(20));
            if told.elapsed() >= Duration::from_secs(5) {
                told = Instant::now();
                tell(&progress, cli.seeds, start, std::io::stdout().is_terminal());
            }
        }
    });
    tell(&progress, cli.seeds, start, false);
    let mut failed = progress.failed.into_inner().unwrap_or_default();
    failed.sort_by_key(|report| report.seed);
    for report in &failed {
        if let Some(failure) = &report.failure {
            eprintln!("seed {} failed: {failure}; {}", report.seed, replay(report.seed));
        }
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs stretches of seeds until all are taken or one has failed.
fn work(cli: &Cli, progress: &Progress) {
    loop {
        let first = progress.next.fetch_add(STRIDE, Ordering::Relaxed);
        if first >= cli.seeds {
            return;
        }
        for seed in first..(first + STRIDE).min(cli.seeds) {
            if progress.stop.load(Ordering::Relaxed) {
                return;
            }
            let report = one(cli.start.wrapping_add(seed), false);
            progress.done.fetch_add(1, Ordering::Relaxed);
            progress.requests.fetch_add(report.requests, Ordering::Relaxed);
            progress.crashes.fetch_add(report.crashes, Ordering::Relaxed);
            progress.mirror_crashes.fetch_add(report.mirror_crashes, Ordering::Relaxed);
            if report.failure.is_some() {
                progress.stop.store(true, Ordering::Relaxed);
                if let Ok(mut failed) = progress.failed.lock() {
                    failed.push(report);
                }
            }
        }
    }
}

fn tell(progress: &Progress, seeds: u64, start: Instant, again: bool) {
    let done = progress.done.load(Ordering::Relaxed);
    let requests = progress.requests.load(Ordering::Relaxed);
    let crashes = progress.crashes.load(Ordering::Relaxed);
    let mirrors = progress.mirror_crashes.load(Ordering::Relaxed);
    let seconds = start.elapsed().as_secs_f64();
    let rate = done as f64 / seconds.max(0.001);
    print!(
        "sim: {done} of {seeds} seeds, {requests} requests, {crashes} crashes \
         ({mirrors} of mirrors), "
    );
    print!("{seconds:.1} s, {rate:.0} seeds/s{}", if again { "\r" } else { "\n" });
    // Progress is not worth an error.
    let _ = std::io::stdout().flush();
}
