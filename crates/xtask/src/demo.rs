//! Answers for `cargo xtask demo`: what is needed to tell the story here or in a VM, and its end.

mod counters;
mod files;
mod fio;
mod screen;
mod site;
mod story;
mod tool;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, Parser, ValueEnum};
use serde_json::Value;

use crate::{Fallible, deps, proc, vm};
use screen::{Failure, Screen};
use site::Site;
use story::Story;
use tool::{QUICK, Tool};

const MIB: u64 = 1 << 20;
/// The outside programs of the story, beyond those that every Debian has.
const PROGRAMS: &[&str] = &["fio", "mkfs.ext4", "mount"];
/// And those of the VM.
const VM_PROGRAMS: &[&str] = &["qemu-system-x86_64", "busybox", "modprobe"];
/// A first build takes some minutes on a small machine.
const BUILD: Duration = Duration::from_secs(1800);
/// Steps whose failure is nobody's but devsplice's.
const PROOFS: &[&str] = &["verify", "fsck", "fio", "zero copy"];

/// See devsplice at work: files on a striped disk, verified, explained, counted.
///
/// Builds devsplice, makes two images, serves a stripe over them, puts a file system and real
/// files on it, stops it, starts it again, checks every file, runs fio, and takes everything away
/// again. Needs root.
#[derive(Args)]
pub struct Options {
    /// In a virtual machine with Linux 7.3, where no byte is copied
    #[arg(long)]
    vm: bool,
    /// Which front end makes the disk
    #[arg(long, value_enum, default_value_t = Export::Auto)]
    export: Export,
    /// Only tell the story, with this command `devsplice`
    #[arg(long, value_name = "PATH", hide = true)]
    inside: Option<PathBuf>,
    /// Where the images go
    #[arg(long, value_name = "DIR", hide = true)]
    dir: Option<PathBuf>,
}

/// `--export` of `devsplice add`.
#[derive(Clone, Copy, ValueEnum)]
enum Export {
    /// ublk where the kernel has it, else FUSE + loop
    Auto,
    /// /dev/ublkbN, from Linux 6.0
    Ublk,
    /// /dev/loopN over a file served through FUSE
    Fuse,
}

impl Export {
    fn name(self) -> &'static str {
        match self {
            Export::Auto => "auto",
            Export::Ublk => "ublk",
            Export::Fuse => "fuse",
        }
    }
}

/// The options of a VM, as its own command line would give them.
#[derive(Parser)]
struct Machine {
    #[command(flatten)]
    options: vm::Options,
}

/// Runs the demo; the exit code is 0 if all of it was shown.
pub fn run(options: &Options) -> Fallible<u8> {
    let screen = Screen::new();
    if let Some(bin) = &options.inside {
        return Ok(tell(&screen, options, bin));
    }
    let place = if options.vm { "in a VM with Linux 7.3" } else { "on this machine" };
    screen.paragraph(
        "Demo",
        &[format!("of devsplice, {place}: real files on a stripe of two images")],
    );
    if !proc::is_root() {
        return Ok(refuse(&screen));
    }
    let bin = match prepare(&screen, options) {
        Ok(bin) => bin,
        Err(failure) => return Ok(failed(&screen, &failure, None)),
    };
    if options.vm { in_vm(&screen, options, &bin) } else { Ok(tell(&screen, options, &bin)) }
}

/// Without root: at once, and with what can be done all the same.
fn refuse(screen: &Screen) -> u8 {
    screen.paragraph(
        "Needs",
        &["root: to make block devices, mount, and install what is missing.".to_owned()],
    );
    screen.paragraph("Run", &["sudo -E env \"PATH=$PATH\" cargo xtask demo".to_owned()]);
    screen.paragraph(
        "Works",
        &[
            "without root: cargo xtask test --quick, and of the command (cargo run --release --)"
                .to_owned(),
            "explain 'stripe(/a.img, /b.img)', features, doctor, --help.".to_owned(),
        ],
    );
    1
}

/// Packages and build; the command `devsplice`.
fn prepare(screen: &Screen, options: &Options) -> Result<PathBuf, Failure> {
    let mut programs = PROGRAMS.to_vec();
    programs.extend(options.vm.then_some(VM_PROGRAMS).into_iter().flatten());
    let lacking = deps::missing(&programs);
    if !lacking.is_empty() {
        screen.announce("packages", &format!("installing with apt: {}", lacking.join(" ")));
    }
    screen.step("packages", "looking for programs", || {
        deps::ensure(&programs)?;
        Ok(match lacking.is_empty() {
            true => format!("all there: {}", programs.join(", ")),
            false => format!("installed what was missing: {}", lacking.join(", ")),
        })
    })?;
    screen.announce("build", "cargo build --release; the first time takes a minute or more");
    let mut bin = PathBuf::new();
    screen.step("build", "", || {
        bin = build()?;
        Ok(bin.display().to_string())
    })?;
    Ok(bin)
}

/// This repository.
fn sources() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here)
}

/// Builds the command, cargo's progress in sight; where it is.
fn build() -> Fallible<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = sources().join("Cargo.toml");
    let messages = Tool::new(cargo, BUILD)
        .args(["build", "--release", "--package", "devsplice"])
        .args(["--message-format", "json-render-diagnostics", "--manifest-path"])
        .arg(manifest)
        .loud()
        .run()?;
    let executable = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    };
    messages
        .lines()
        .filter_map(executable)
        .next_back()
        .ok_or_else(|| "cargo built no executable".to_owned())
}

/// Tells the story in a VM, by this same program.
fn in_vm(screen: &Screen, options: &Options, bin: &Path) -> Fallible<u8> {
    let this = std::env::current_exe().map_err(|e| format!("where is this program? {e}"))?;
    screen.announce("vm", "starting QEMU; the kernel is fetched from Debian the first time");
    let words = ["vm", "--scratch", "2G", "--timeout", "900", "--"].map(Into::into);
    let mut words: Vec<std::ffi::OsString> = words.to_vec();
    words.extend([this.into(), "demo".into(), "--inside".into(), bin.into()]);
    words.extend(["--dir", "/scratch", "--export", options.export.name()].map(Into::into));
    let machine = Machine::try_parse_from(words).map_err(|e| format!("the VM's options: {e}"))?;
    let failure = match vm::run(&machine.options) {
        Ok(0) => return Ok(0),
        // The story itself has said what failed.
        Ok(1) => return Ok(1),
        Ok(code) => Failure { step: "vm", message: format!("it ended with {code}; see above") },
        Err(message) => Failure { step: "vm", message },
    };
    Ok(failed(screen, &failure, None))
}

/// Says what failed; the exit code.
fn failed(screen: &Screen, failure: &Failure, bin: Option<&Path>) -> u8 {
    if let Some(signal) = proc::interrupted() {
        screen.announce("", &format!("interrupted during: {}", failure.step));
        return 128 + signal;
    }
    let next = match (failure.step, bin) {
        ("packages", _) => "install what the message names, then run this again".to_owned(),
        ("build", _) => "cargo build --release -p devsplice shows the same alone".to_owned(),
        ("images", _) => "set TMPDIR to a directory with more room, then run this again".to_owned(),
        ("vm", _) => "cargo xtask vm --verbose -- uname -a shows whether a VM works".to_owned(),
        (step, _) if PROOFS.contains(&step) => {
            "this should not happen: please report it with the lines above".to_owned()
        }
        (_, Some(bin)) => format!("{} doctor says what this machine lacks", bin.display()),
        (_, None) => "run this again".to_owned(),
    };
    screen.fail(failure, &next);
    1
}

/// Tells the story on this machine, cleans up, sums up.
fn tell(screen: &Screen, options: &Options, bin: &Path) -> u8 {
    let start = Instant::now();
    let parent = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    if options.inside.is_some() {
        screen.announce("vm", &format!("booted: Linux {}", kernel()));
    }
    for left in Site::abandoned(&parent, bin) {
        screen.announce("clean up", &format!("a killed demo's {}", left.work.display()));
        left.clean();
    }
    let site = match Site::make(&parent, bin) {
        Ok(site) => site,
        Err(message) => {
            return failed(screen, &Failure { step: "images", message }, Some(bin));
        }
    };
    let mut story = Story::new(screen, &site, options.export.name());
    let told = story.tell(sources());
    let code = told.as_ref().err().map(|failure| failed(screen, failure, Some(bin)));
    let left = site.clean();
    if !left.is_empty() {
        let message = format!("left behind: {}", left.join(", "));
        let next = format!("ps -ef | grep {}; kill what is left, then umount", site.name);
        screen.fail(&Failure { step: "clean up", message }, &next);
        return code.unwrap_or(1);
    }
    if let Some(code) = code {
        screen.paragraph("", &["Cleaned up: no mount, device, process or file left.".to_owned()]);
        return code;
    }
    let mut lines = story.summary();
    lines.push(format!(
        "Left behind: no mount, device, process or file.  {:.0} s on Linux {}.",
        start.elapsed().as_secs_f64(),
        kernel()
    ));
    screen.paragraph("Shown:", &lines);
    screen.paragraph("Next:", &next(&story, bin));
    0
}

/// What to try after this.
fn next(story: &Story<'_>, bin: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    if !story.is_without_copy() {
        lines.push(
            "cargo xtask demo --vm  shows the same without any copy: ublk on Linux 7.3".into(),
        );
    }
    let here = std::env::current_dir().unwrap_or_default();
    let bin = bin.strip_prefix(&here).unwrap_or(bin).display();
    lines.push(format!("{bin} add 'stripe(/a.img, /b.img)'  makes a disk of yours"));
    lines
}

/// The running kernel's release.
fn kernel() -> String {
    let release = Tool::new("uname", QUICK).uncut().arg("-r").run();
    release.map_or_else(|_| "(unknown)".to_owned(), |text| text.trim().to_owned())
}
