//! Answers for `cargo xtask conformance`: others' tests of ublk, unmodified, on devsplice.

mod guest;
mod results;
mod suites;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use clap::{Args, Parser};
use serde_json::{Value, json};

use crate::bench::run::bounded;
use crate::bench::{self, peers};
use crate::proc::run_quiet;
use crate::{Fallible, deps, proc, tidy, vm};
use results::{Outcome, Results, Section};
use suites::Suite;

/// What the tests start in the machine.
const PROGRAMS: &[&str] =
    &["fio", "sfdisk", "mkfs.ext4", "lsblk", "blockdev", "taskset", "wipefs", "findmnt"];
/// Seconds of tests after which a machine starts no further one, so that others get a turn.
const TURN: u64 = 300;
/// Suites that have to be brought along.
const BROUGHT: [(&str, &str); 2] = [("suite", "blktests"), ("suite", "ublksrv")];
/// Where a remark for the page is kept.
const NOTE: &str = "note.txt";
/// Seconds for booting and clearing up.
const OVERHEAD: u64 = 150;

/// Run the kernel's own ublk tests, or those of blktests or ublksrv, with devsplice in the place of
/// their server.
///
/// The kernel's tests come from Debian's package of its source, the others from a checkout of
/// yours. They run unmodified in the VM, each with a time limit. Results are kept in
/// target/conformance, and the page docs/conformance.md is written from all that are kept. Needs
/// root.
#[derive(Args)]
pub struct Options {
    /// Tests, by the start of their names without test_, such as loop or generic_03 [default: all]
    tests: Vec<String>,
    /// Tests to leave out, by the start of their names
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    without: Vec<String>,
    /// Whose tests
    #[arg(long, value_enum, default_value = "kernel")]
    suite: Suite,
    /// Where the suite is: a checkout of blktests or ublksrv
    #[arg(long, value_name = "DIR", required_if_eq_any(BROUGHT))]
    path: Option<PathBuf>,
    /// What the page says of this run of such a checkout: its commit, or how it was run
    #[arg(long, value_name = "TEXT", requires = "path")]
    note: Option<String>,
    /// Run them with the kernel's own server, for comparison
    #[arg(long, conflicts_with = "path")]
    kublk: bool,
    /// Seconds that a test may take
    #[arg(long, value_name = "S", default_value_t = 300)]
    limit: u64,
    /// The devsplice to test, instead of building it
    #[arg(long, value_name = "PATH")]
    bin: Option<PathBuf>,
    /// Run nothing: print what is kept, and write the page
    #[arg(long)]
    render: bool,
    /// Only carry out the plan in this directory, in the machine
    #[arg(long, value_name = "DIR", hide = true)]
    inside: Option<PathBuf>,
}

/// The options of a VM, as its own command line would give them.
#[derive(Parser)]
struct Machine {
    #[command(flatten)]
    options: vm::Options,
}

/// Runs what the options ask for; 1 if a test failed.
pub fn run(options: &Options) -> Fallible<u8> {
    if let Some(directory) = &options.inside {
        return guest::run(directory);
    }
    let home = tidy::workspace()?.join("target/conformance");
    if options.render {
        return render(&home);
    }
    if !proc::is_root() {
        return Err("the tests make block devices and need root".into());
    }
    deps::ensure(PROGRAMS)?;
    if proc::find_program("udevadm").is_none()
        && let Err(reason) = deps::install(&["udev"])
    {
        eprintln!("xtask: going on without udevadm: {reason}");
    }
    let (whose, server) = match (&options.bin, options.kublk) {
        (_, true) => ("kublk", peers::find("kublk")?),
        (Some(bin), _) => (options.suite.home(), bin.canonicalize().map_err(|e| e.to_string())?),
        (None, _) => (options.suite.home(), bench::build()?),
    };
    let directory = home.join(whose);
    let suite = set_up(&directory, &server, options)?;
    if let Some(note) = &options.note {
        let file = directory.join(NOTE);
        fs::write(&file, note).map_err(|e| format!("cannot write {}: {e}", file.display()))?;
    }
    let wanted = names(&suite, options)?;
    if wanted.is_empty() {
        return Err("no test of that name".into());
    }
    let commit = match (options.kublk, &options.bin) {
        (true, _) => "Linux 7.3".to_owned(),
        (false, None) => commit()?,
        (false, Some(_)) => format!("{} (a binary that was given)", commit()?),
    };
    let tracer = peers::tracer().inspect_err(|reason| {
        eprintln!("xtask: going on without bpftrace, so some tests will skip: {reason}");
    });
    let suite = options.suite.name();
    let setting = json!({ "limit": options.limit, "turn": TURN, "suite": suite,
        "tracer": tracer.unwrap_or_default() });
    let done = run_all(&directory, &wanted, setting, &commit)?;
    println!("\n{}", done.table());
    render(&home)?;
    Ok(u8::from(done.failures() > 0 || done.len() < wanted.len()))
}

/// Puts the tests into `directory`, with `server` as their server.
fn set_up(directory: &Path, server: &Path, options: &Options) -> Fallible<PathBuf> {
    let suite = directory.join("suite");
    let _ = fs::remove_dir_all(&suite);
    let make = |directory: &Path| {
        fs::create_dir_all(directory)
            .map_err(|e| format!("cannot create {}: {e}", directory.display()))
    };
    make(directory)?;
    make(&directory.join("logs"))?;
    let from = match &options.path {
        Some(path) => path.clone(),
        None => peers::ublk_tests()?,
    };
    run_quiet(bounded(60, "cp").arg("-r").arg(from).arg(&suite))?;
    let place = suite.join(options.suite.server());
    // What was built there stays out of it.
    let _ = fs::remove_file(&place);
    if let Some(parent) = place.parent() {
        make(parent)?;
    }
    symlink(server, &place).map_err(|e| format!("cannot make {}: {e}", place.display()))?;
    Ok(suite)
}

/// The tests that were asked for.
fn names(suite: &Path, options: &Options) -> Fallible<Vec<String>> {
    let mut names = options.suite.names(suite)?;
    let starts = |list: &[String], name: &str| list.iter().any(|start| name.starts_with(start));
    names.retain(|name| options.tests.is_empty() || starts(&options.tests, name));
    names.retain(|name| !starts(&options.without, name));
    Ok(names)
}

fn commit() -> Fallible<String> {
    let root = tidy::workspace()?;
    let mut git = bounded(20, "git");
    git.arg("-C").arg(root).args(["describe", "--always", "--dirty"]);
    Ok(String::from_utf8_lossy(&run_quiet(&mut git)?).trim().to_owned())
}

/// Runs tests in as many machines as it takes: one that a test has left in disorder is not used for
/// the next.
fn run_all(
    directory: &Path,
    wanted: &[String],
    mut plan: Value,
    commit: &str,
) -> Fallible<Results> {
    let limit = plan["limit"].as_u64().unwrap_or_default();
    let file = directory.join("new.json");
    let mut done = Results::default();
    while let Some(next) = wanted.iter().find(|name| done.get(name).is_none()) {
        let left: Vec<&String> = wanted.iter().filter(|name| done.get(name).is_none()).collect();
        eprintln!("xtask: {} of {} tests to go", left.len(), wanted.len());
        plan["tests"] = json!(left);
        let path = directory.join("plan.json");
        fs::write(&path, format!("{plan:#}\n")).map_err(|e| format!("cannot write a plan: {e}"))?;
        let _ = fs::remove_file(&file);
        let code = boot(directory, TURN + limit + OVERHEAD)?;
        proc::check_interrupt()?;
        let news = Results::load(&file);
        if news.get(next).is_none() {
            if !news.is_empty() || code == 0 {
                return Err(format!("the machine did not run {next}"));
            }
            // It was running when the machine died or stood still.
            let reason = "the machine died or stood still".to_owned();
            done.put(next, Outcome { verdict: "hang".into(), seconds: 0.0, reason });
        }
        done.merge(&news);
        let mut kept = Results::load(&directory.join("results.json"));
        kept.merge_from(&done, commit);
        kept.save(&directory.join("results.json"))?;
    }
    Ok(done)
}

/// Runs the plan in a machine.
fn boot(directory: &Path, limit: u64) -> Fallible<u8> {
    let this = std::env::current_exe().map_err(|e| format!("where is this program? {e}"))?;
    let limit = limit.to_string();
    let words = ["vm", "--kernel", "7.3", "--scratch", "4G", "--timeout", &limit, "--rw"];
    let mut words: Vec<std::ffi::OsString> = words.map(Into::into).to_vec();
    words.extend([directory.into(), "--".into(), this.into(), "conformance".into()]);
    words.extend(["--inside".into(), directory.into()]);
    let machine = Machine::try_parse_from(words).map_err(|e| format!("the VM's options: {e}"))?;
    vm::run(&machine.options)
}

/// Writes the page from what is kept.
fn render(home: &Path) -> Fallible<u8> {
    let ours = Results::load(&home.join("devsplice/results.json"));
    let theirs = Results::load(&home.join("kublk/results.json"));
    let brought = [Suite::Blktests, Suite::Ublksrv].map(|suite| {
        let directory = home.join(suite.home());
        let note = fs::read_to_string(directory.join(NOTE)).unwrap_or_default();
        (suite, Results::load(&directory.join("results.json")), note)
    });
    let others =
        brought.each_ref().map(|(suite, results, note)| Section { suite: *suite, results, note });
    let names = Suite::Kernel.names(&home.join("devsplice/suite"))?;
    let page = tidy::workspace()?.join("docs/conformance.md");
    fs::write(&page, results::page(&names, (&ours, &theirs), &others))
        .map_err(|e| format!("cannot write {}: {e}", page.display()))?;
    Ok(0)
}
