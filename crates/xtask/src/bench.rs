//! Answers for `cargo xtask bench`: what is measured where, against whom, and where figures go.

mod cells;
mod data;
mod guest;
mod native;
mod nbd;
pub mod peers;
mod report;
pub mod run;
mod svg;
mod threads;

use std::path::{Path, PathBuf};

use clap::{Args, Parser};
use serde_json::{Map, Value, json};

use crate::proc::run_quiet;
use crate::{Fallible, deps, proc, tidy, vm};
use cells::{Device, GROUPS, Whose};
use data::Results;

/// What the VM part starts in the machine.
const VM_PROGRAMS: &[&str] = &["fio", "dmsetup", "losetup", "modprobe", "nbdkit", "nbd-client"];
/// Peers of the native part, and the packages that have them; without one the others go on.
const NATIVE_PACKAGES: &[(&str, &str)] = &[
    ("qemu-storage-daemon", "qemu-system-common"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
];
/// Fewest samples of the native part: clocks are less steady than counts.
const NATIVE_SAMPLES: u32 = 15;
/// Fewest samples of the NBD part.
const NBD_SAMPLES: u32 = 3;
/// The machine of the VM part, which counts instructions, with a limit for its whole run.
const MACHINE: &[&str] = &["--accel", "icount", "--cpus", "1", "--timeout", "5400"];
/// Seconds for cargo.
const BUILD_LIMIT: u32 = 1800;

/// Measure devsplice against the kernel's own devices and other userspace servers.
///
/// In a VM that counts instructions, natively through FUSE and loop, and with NBD servers; all of
/// it unless some is named.
/// Tables and charts of a whole run go to docs/bench, raw data to target/bench. Needs root.
#[derive(Args)]
pub struct Options {
    /// The part in the VM
    #[arg(long)]
    vm: bool,
    /// The part on this machine, through FUSE and loop
    #[arg(long)]
    native: bool,
    /// The part on this machine with NBD servers and copies
    #[arg(long)]
    nbd: bool,
    /// The part in the VM with several threads for one client; only if it is named
    #[arg(long)]
    threads: bool,
    /// Measure nothing: write the pages anew from the raw data of the last whole run
    #[arg(long)]
    render: bool,
    /// Loads of the VM part, by the start of their names [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    cells: Vec<String>,
    /// Peers, by name; `none` for none [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    peers: Vec<String>,
    /// Our own devices, by name [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    ours: Vec<String>,
    /// Samples of each figure; the median counts
    #[arg(long, value_name = "N", default_value_t = 3)]
    samples: u32,
    /// Nanoseconds that the backing devices of the VM part take for each request
    #[arg(long, value_name = "NS", default_value_t = 0)]
    disk_ns: u32,
    /// Another build of devsplice, measured in turn with this one
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// The devsplice to measure, instead of building it
    #[arg(long, value_name = "PATH")]
    bin: Option<PathBuf>,
    /// A remark for the conditions of the tables
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
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

/// Runs what the options ask for.
pub fn run(options: &Options) -> Fallible<u8> {
    if let Some(directory) = &options.inside {
        let plan = guest::Plan::read(directory)?;
        return if plan.is_of_threads() { threads::run(&plan) } else { guest::run(&plan) };
    }
    if options.render {
        return render(options);
    }
    if !proc::is_root() {
        return Err("the bench makes block devices and needs root".into());
    }
    let bin = match &options.bin {
        Some(bin) => absolute(bin)?,
        None => build()?,
    };
    let directory = tidy::workspace()?.join("target/bench");
    std::fs::create_dir_all(&directory)
        .map_err(|e| format!("cannot create {}: {e}", directory.display()))?;
    let mut code = 0;
    if options.has(options.vm) {
        code = vm_part(options, &bin, &directory)?;
    }
    if options.has(options.native) && code == 0 {
        native_part(options, &bin, &directory)?;
    }
    if options.threads && code == 0 {
        code = threads_part(options, &bin, &directory)?;
    }
    // Last: it changes the priority of all that follows.
    if options.has(options.nbd) && code == 0 {
        nbd_part(options, &bin, &directory)?;
    }
    Ok(code)
}

impl Options {
    /// Whether a part is asked for: it is named, or none is.
    fn has(&self, named: bool) -> bool {
        named || !(self.vm || self.native || self.nbd || self.threads)
    }
}

/// Measures NBD servers and copies on this machine.
fn nbd_part(options: &Options, bin: &Path, directory: &Path) -> Fallible<()> {
    let file = directory.join("nbd.json");
    let samples = options.samples.max(NBD_SAMPLES);
    let mut results = nbd::run(bin, samples, &file)?;
    results.conditions.push(("samples".into(), samples.to_string()));
    results.conditions.extend(conditions(bin));
    results.conditions.extend(options.note.iter().map(|note| ("note".to_owned(), note.clone())));
    results.save(&file)?;
    println!("\n{}", report::nbd_text(&results));
    report::write_nbd(&results, &pages()?)
}

/// Measures on this machine.
fn native_part(options: &Options, bin: &Path, directory: &Path) -> Fallible<()> {
    for (program, package) in NATIVE_PACKAGES {
        if proc::find_program(program).is_none()
            && let Err(reason) = deps::install(&[package])
        {
            eprintln!("xtask: going on without {program}: {reason}");
        }
    }
    let file = directory.join("native.json");
    let samples = options.samples.max(NATIVE_SAMPLES);
    let mut results = native::run(bin, samples, &file)?;
    results.conditions.push(("samples".into(), samples.to_string()));
    results.conditions.extend(conditions(bin));
    results.conditions.extend(options.note.iter().map(|note| ("note".to_owned(), note.clone())));
    results.save(&file)?;
    println!("\n{}", report::native_text(&results));
    report::write_native(&results, &pages()?)
}

/// Writes the pages from raw data.
fn render(options: &Options) -> Fallible<u8> {
    let (raw, pages) = (tidy::workspace()?.join("target/bench"), pages()?);
    if options.has(options.vm) {
        report::write_vm(&Results::load(&raw.join("vm.json"))?, &pages)?;
    }
    if options.has(options.native) {
        report::write_native(&Results::load(&raw.join("native.json"))?, &pages)?;
    }
    if options.has(options.nbd) {
        report::write_nbd(&Results::load(&raw.join("nbd.json"))?, &pages)?;
    }
    Ok(0)
}

/// Where the pages go.
fn pages() -> Fallible<PathBuf> {
    Ok(tidy::workspace()?.join("docs/bench"))
}

fn absolute(path: &Path) -> Fallible<PathBuf> {
    path.canonicalize().map_err(|e| format!("{}: {e}", path.display()))
}

/// Builds the command for release; where it is.
pub fn build() -> Fallible<PathBuf> {
    eprintln!("xtask: building devsplice for release");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = run::bounded(BUILD_LIMIT, cargo);
    command.args(["build", "--release", "--package", "devsplice"]);
    command.args(["--message-format", "json-render-diagnostics", "--manifest-path"]);
    command.arg(tidy::workspace()?.join("Cargo.toml"));
    let messages = run_quiet(&mut command)?;
    let executable = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    };
    let messages = String::from_utf8_lossy(&messages);
    let mut executables = messages.lines().filter_map(executable);
    executables.next_back().ok_or_else(|| "cargo built no executable".into())
}

/// Whether a device is to be measured.
fn is_wanted(options: &Options, device: &Device) -> bool {
    let named = |names: &[String]| names.is_empty() || names.iter().any(|n| n == device.name);
    match device.whose {
        Whose::Peer => named(&options.peers),
        Whose::Ours => named(&options.ours),
        Whose::Against => options.against.is_some(),
    }
}

/// Whether everything that goes into the tables is measured.
fn is_whole(options: &Options) -> bool {
    let named = [&options.cells, &options.peers, &options.ours];
    options.disk_ns == 0 && named.iter().all(|names| names.is_empty())
}

/// Measures in a machine that counts instructions.
fn vm_part(options: &Options, bin: &Path, directory: &Path) -> Fallible<u8> {
    deps::ensure(VM_PROGRAMS)?;
    let wanted: Vec<&Device> = cells::devices().filter(|d| is_wanted(options, d)).collect();
    let named = |name: &str| {
        options.cells.is_empty() || options.cells.iter().any(|start| name.starts_with(start))
    };
    let cells = GROUPS.iter().flat_map(|group| group.cells).map(|cell| cell.name);
    let cells: Vec<&str> = cells.filter(|name| named(name)).collect();
    let (mut programs, mut reasons) = (Map::new(), Map::new());
    programs.insert("devsplice".into(), json!(bin));
    if let Some(other) = &options.against {
        programs.insert("other".into(), json!(absolute(other)?));
    }
    for name in ["bare", "kublk", "rublk"] {
        if !wanted.iter().any(|device| device.make.first() == Some(&name)) {
            continue;
        }
        match peers::find(name) {
            Ok(path) => programs.insert(name.into(), json!(path)),
            Err(reason) => reasons.insert(name.into(), json!(reason)),
        };
    }
    let plan = json!({
        "programs": programs,
        "reasons": reasons,
        "devices": wanted.iter().map(|device| device.name).collect::<Vec<_>>(),
        "cells": cells,
        "samples": options.samples,
        "disk_ns": options.disk_ns,
    });
    // Of an earlier run; this one may end before its first figure.
    let _ = std::fs::remove_file(directory.join("vm.json"));
    let code = boot(directory, &plan, MACHINE)?;
    let mut results = Results::load(&directory.join("vm.json"))?;
    results.conditions.extend(conditions(bin));
    results.conditions.extend(options.note.iter().map(|note| ("note".to_owned(), note.clone())));
    results.save(&directory.join("vm.json"))?;
    println!("\n{}", report::vm_text(&results));
    if code == 0 && is_whole(options) {
        report::write_vm(&results, &pages()?)?;
    }
    Ok(code)
}

/// Measures several threads that serve one client.
fn threads_part(options: &Options, bin: &Path, directory: &Path) -> Fallible<u8> {
    deps::ensure(VM_PROGRAMS)?;
    let plan = json!({
        "part": "threads", "programs": { "devsplice": bin }, "samples": options.samples,
    });
    let file = directory.join("threads.json");
    let _ = std::fs::remove_file(&file);
    let code = boot(directory, &plan, threads::MACHINE)?;
    let mut results = Results::load(&file)?;
    results.conditions.extend(conditions(bin));
    results.save(&file)?;
    println!("\n{}", threads::text(&results));
    Ok(code)
}

/// Runs a plan in a machine of this kind.
fn boot(directory: &Path, plan: &Value, machine: &[&str]) -> Fallible<u8> {
    let path = directory.join("plan.json");
    std::fs::write(&path, format!("{plan:#}\n"))
        .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    let this = std::env::current_exe().map_err(|e| format!("where is this program? {e}"))?;
    let mut words: Vec<std::ffi::OsString> = vec!["vm".into()];
    words.extend(machine.iter().map(Into::into));
    words.extend(["--mods".into(), "nbd".into(), "--rw".into(), directory.into()]);
    words.extend(["--".into(), this.into(), "bench".into()]);
    words.extend(["--inside".into(), directory.into()]);
    let machine = Machine::try_parse_from(words).map_err(|e| format!("the VM's options: {e}"))?;
    vm::run(&machine.options)
}

/// What the figures depend on, of this machine and its programs.
fn conditions(bin: &Path) -> Vec<(String, String)> {
    let first_line = |program: &str, arguments: &[&str]| {
        let output = run_quiet(run::bounded(20, program).args(arguments)).unwrap_or_default();
        String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").trim().to_owned()
    };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let root = tidy::workspace().unwrap_or_default();
    let root = root.to_string_lossy();
    let bin = bin.to_string_lossy();
    let rows = [
        ("date", first_line("date", &["-u", "+%Y-%m-%d"])),
        ("commit", first_line("git", &["-C", &root, "describe", "--always", "--dirty"])),
        ("devsplice", first_line(&bin, &["--version"])),
        ("fio", first_line("fio", &["--version"])),
        ("QEMU", first_line("qemu-system-x86_64", &["--version"])),
        ("load of this machine at the end", first_line("cat", &["/proc/loadavg"])),
        ("kernel of this machine", first_line("uname", &["-r"])),
        ("CPU of this machine", cpu.map_or("unknown", |(_, name)| name).to_owned()),
    ];
    rows.map(|(key, value)| (key.to_owned(), value)).to_vec()
}
