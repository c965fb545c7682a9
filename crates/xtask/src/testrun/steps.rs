//! The steps of a test run: which command each is, and how its answer is read.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::kernels::Kernel;
use super::pace::Pace;
use super::parse::{Counts, collected, executable, outcome};
use crate::proc::{self, Guard, run_quiet, tied};
use crate::{Fallible, tidy, vm};

/// How long any step may take.
const STEP_LIMIT: Duration = Duration::from_secs(50 * 60);
/// Instructions that routing a request through three layers may cost.
const ROUTE_BAR: u64 = 250;
/// The requests of the two runs whose difference counts: what start and end cost cancels out.
const ROUTE_REQUESTS: (u64, u64) = (1000, 11_000);
/// Where the example that routes may be: crate, and directory.
const ROUTE_HOMES: [(&str, &str); 2] =
    [("devsplice-layers", "crates/layers"), ("devsplice-core", "crates/core")];

/// Instructions that a 4 KiB request through three layers may cost the server in user mode, 32 in
/// flight.
const USER_BAR: u64 = 600;
/// Its cases: how many in flight, over what. The last is the one with the bar.
const USER_CASES: [(&str, &str); 3] = [("1", "file"), ("32", "file"), ("32", "three")];
/// What only imitates the kernel, in a cost that is the server's otherwise.
const IMITATION: &str = "--toggle-collect=*Queues*imitate*";

/// The programs of the end-to-end tests.
pub struct Programs {
    /// The tests.
    tests: String,
    /// The test that counts allocations, which also runs in the VM for ublk's sake.
    allocations: String,
    /// The front ends' own tests, among them some that need ublk.
    front_ends: String,
    /// The command `devsplice`, built for release.
    command: String,
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = tied(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

/// What is left out of a build unless it is asked for (docs/decisions/036.md), and tested here.
const PSK: &str = "devsplice/psk";

/// Whether every file is formatted.
pub fn format() -> Fallible<Counts> {
    check(&mut cargo(&["fmt", "--all", "--check"]))
}

/// Whether clippy is content.
pub fn lints() -> Fallible<Counts> {
    let command = ["clippy", "--workspace", "--all-targets", "--features", PSK];
    check(cargo(&command).args(["--", "-D", "warnings"]))
}

/// Whether the style rules hold.
pub fn style() -> Fallible<Counts> {
    tidy::run().map(|findings| Counts::check(findings == 0))
}

/// Whether the documentation builds without a warning.
pub fn documentation() -> Fallible<Counts> {
    let mut command = cargo(&["doc", "--no-deps", "--workspace"]);
    check(command.env("RUSTDOCFLAGS", "-D warnings"))
}

/// Every test that needs nothing but a compiler.
pub fn unit_tests(filter: Option<&str>) -> Fallible<Counts> {
    let mut command = cargo(&[
        "test",
        "--workspace",
        "--exclude",
        "devsplice-e2e",
        "--no-fail-fast",
        "--features",
        PSK,
    ]);
    // What a test that passed has printed may say that it could not run here.
    tests(command.args(filter).args(["--", "--show-output"]))
}

/// Counts the instructions of routing a request through three layers.
pub fn price_of_a_request() -> Fallible<Counts> {
    let name = "routing three layers";
    let is_home = |dir: &str| Path::new(dir).join("examples/route_cost.rs").exists();
    let Some((package, _)) = ROUTE_HOMES.into_iter().find(|(_, dir)| is_home(dir)) else {
        return Ok(Counts::skip(name, "there is no example route_cost"));
    };
    let Some(valgrind) = proc::find_program("valgrind") else {
        return Ok(Counts::skip(name, "valgrind is not installed"));
    };
    let build = ["build", "--release", "-p", package, "--example", "route_cost"];
    let program = build_executable(&build, "route_cost")?;
    let each = instructions(&valgrind, &[], &[&program])?;
    println!("{name}: {each} instructions (bar {ROUTE_BAR})");
    Ok(Counts::check(each <= ROUTE_BAR))
}

/// Instructions per request of a program that is told how many to serve: what the second thousands
/// cost more than the first.
fn instructions(valgrind: &Path, options: &[&str], words: &[&str]) -> Fallible<u64> {
    let count = |requests: u64| {
        let mut command = tied(valgrind);
        command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).args(options);
        command.args(words).arg(requests.to_string()).stdin(Stdio::null());
        let output = command.output().map_err(|e| format!("cannot start valgrind: {e}"))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        collected(&stderr).ok_or_else(|| format!("callgrind counted nothing: {stderr}"))
    };
    let (few, many) = ROUTE_REQUESTS;
    Ok(count(many)?.saturating_sub(count(few)?) / (many - few))
}

/// Counts what a request costs the server in user mode: the real ring and the real ublk queue over
/// a kernel that does nothing.
pub fn user_mode_of_a_request() -> Fallible<Counts> {
    let name = "user mode of a request";
    let Some(valgrind) = proc::find_program("valgrind") else {
        return Ok(Counts::skip(name, "valgrind is not installed"));
    };
    let build = ["build", "--release", "-p", "devsplice-exports", "--features", "imitation"];
    let build = [&build[..], &["--example", "user_cost"]].concat();
    let program = build_executable(&build, "user_cost")?;
    if run_quiet(tied(&program).args(["1", "file", "10"])).is_err() {
        return Ok(Counts::skip(name, "needs io_uring of Linux 6.10"));
    }
    let mut each = 0;
    for (depth, stack) in USER_CASES {
        let words = [&program[..], depth, stack];
        let all = instructions(&valgrind, &[], &words)?;
        each = all.saturating_sub(instructions(&valgrind, &[IMITATION], &words)?);
        println!("{name}, {stack}, {depth} in flight: {each} instructions");
    }
    println!("{name}: {each} instructions (bar {USER_BAR})");
    Ok(Counts::check(each <= USER_BAR))
}

/// The engine over simulated disks that fail, lie and lose power: so many seeds of it.
pub fn simulator(seeds: &str) -> Fallible<Counts> {
    let build = ["build", "--release", "-p", "devsplice-sim", "--bin", "sim"];
    let mut command = tied(build_executable(&build, "sim")?);
    check(command.args(["--seeds", seeds]))
}

/// Builds the end-to-end tests and the command they test.
pub fn build_end_to_end() -> Fallible<Programs> {
    let command = build_executable(
        &["build", "--release", "-p", "devsplice", "--bin", "devsplice", "--features", PSK],
        "devsplice",
    )?;
    let tests =
        build_executable(&["test", "-p", "devsplice-e2e", "--test", "e2e", "--no-run"], "e2e")?;
    let allocations = ["test", "-p", "devsplice-exports", "--test", "no_allocation", "--no-run"];
    let allocations = build_executable(&allocations, "no_allocation")?;
    let front_ends = ["test", "-p", "devsplice-exports", "--lib", "--no-run"];
    let front_ends = build_executable(&front_ends, "devsplice_exports")?;
    Ok(Programs { tests, allocations, front_ends, command })
}

/// The groups of end-to-end tests that a machine without ublk can have as a whole.
const GROUPS: [&str; 3] = ["copy", "fuse", "tls"];

/// The end-to-end tests that this machine's own kernel allows. `had` becomes the groups that held.
pub fn end_to_end_here(
    programs: &Programs,
    filter: Option<&str>,
    had: &mut Vec<&str>,
) -> Fallible<Counts> {
    let mut command = tied(&programs.tests);
    command.env("DEVSPLICE_E2E", "native").env("DEVSPLICE_BIN", &programs.command);
    let mut held = [true; GROUPS.len()];
    let mut ran = [false; GROUPS.len()];
    let counts = counted(command.args(filter), &mut |line| {
        let Some((name, outcome)) = outcome(line) else { return };
        let group = name.split_once("::").map_or(name, |(group, _)| group);
        let Some(at) = GROUPS.iter().position(|one| *one == group) else { return };
        ran[at] |= outcome == "ok";
        held[at] &= outcome != "FAILED";
    })?;
    let good = GROUPS.into_iter().enumerate().filter(|(at, _)| ran[*at] && held[*at]);
    had.extend(good.map(|(_, group)| group));
    Ok(counts)
}

/// The end-to-end tests in a virtual machine; of the groups that were `had` only what moves data.
pub fn end_to_end_vm(
    programs: &Programs,
    series: &str,
    (filter, had): (Option<&str>, &[&str]),
    (kernel, pace): (&mut Kernel, &mut Pace),
) -> Fallible<Counts> {
    if let Err(reason) = vm::available() {
        return Ok(Counts::skip("all end-to-end tests in a VM", &reason));
    }
    let this = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let limit = (STEP_LIMIT.as_secs() - 30).to_string();
    let mut command = tied(this);
    command.args(["vm", "--kernel", series, "--timeout", &limit, "--scratch", "4G", "--"]);
    let filter = filter.map(|filter| format!("'{filter}'")).unwrap_or_default();
    let Programs { tests: suite, allocations, front_ends, .. } = programs;
    // One shell for all, so that one boot does; each runs whatever the one before came to.
    let questions = Kernel::questions(&programs.command);
    command.arg(format!(
        "{questions}{suite} --test-threads=1 {filter}; r=$?; \
         {front_ends} --test-threads=1 --show-output fallback {filter} || r=1; \
         {allocations} --nocapture {filter} && exit $r"
    ));
    command.env("DEVSPLICE_E2E", "vm").env("DEVSPLICE_BIN", &programs.command);
    command.env("DEVSPLICE_E2E_HAD", had.join(","));
    counted(&mut command, &mut |line| {
        kernel.line(line);
        pace.line(line);
    })
}

/// A command whose success is one check.
fn check(command: &mut Command) -> Fallible<Counts> {
    stream(command, &mut |_| ()).map(Counts::check)
}

/// A command that runs tests: its output passes through and is counted.
fn tests(command: &mut Command) -> Fallible<Counts> {
    counted(command, &mut |_| ())
}

/// The same; `also` gets each line, too.
fn counted(command: &mut Command, also: &mut dyn FnMut(&str)) -> Fallible<Counts> {
    let mut counts = Counts::default();
    let held = stream(command, &mut |line| {
        also(line);
        counts.line(line);
    })?;
    if !held && counts.failed == 0 {
        // It did not compile, crashed, or ran out of time.
        counts.failed = 1;
    }
    Ok(counts)
}

/// Runs a command, shows its output line by line as it comes, and says whether it succeeded.
fn stream(command: &mut Command, line: &mut dyn FnMut(&str)) -> Fallible<bool> {
    let start = Instant::now();
    let mut child = Guard::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let stdout = child.take_stdout().ok_or("no standard output")?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for bytes in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&bytes).into_owned()).is_err() {
                return;
            }
        }
    });
    let mut ended = None;
    loop {
        match receiver.recv_timeout(proc::POLL) {
            Ok(text) => {
                println!("{text}");
                line(&text);
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(child.wait()?.success()),
            // A process that it left behind may hold the pipe open: the child's end is the end.
            Err(RecvTimeoutError::Timeout) => match ended {
                Some(status) => return Ok(status),
                None => ended = child.try_wait()?.map(|status| status.success()),
            },
        }
        proc::check_interrupt()?;
        if start.elapsed() > STEP_LIMIT {
            return Err(format!("took longer than {} minutes", STEP_LIMIT.as_secs() / 60));
        }
    }
}

/// Builds with cargo and returns the path of the executable of the target called `name`.
fn build_executable(arguments: &[&str], name: &str) -> Fallible<String> {
    println!("building {name}");
    let mut command = cargo(arguments);
    let messages = run_quiet(command.arg("--message-format=json-render-diagnostics"))?;
    executable(&String::from_utf8_lossy(&messages), name)
        .ok_or_else(|| format!("cargo built no executable called {name}"))
}
