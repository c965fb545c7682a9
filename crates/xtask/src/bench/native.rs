//! Answers for the native part: FUSE + loop against other FUSE exports, on files in memory.
//!
//! Wall-clock time on a machine that others use: samples alternate, and only ratios are told.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::cells::Cell;
use super::data::{Results, Sample};
use super::run::{bounded, fio, fio_arguments, run_detached};
use crate::proc::{self, Guard, run_quiet, tied};
use crate::{Fallible, deps};

/// Files in memory.
const MEMORY: &str = "/dev/shm";
/// MiB of each file.
const SIZE: u64 = 256;
/// Seconds of one sample.
const RUNTIME: &str = "--runtime=1";
/// How long a server may take to show its file.
const APPEARS: Duration = Duration::from_secs(10);

/// The loads.
pub const CELLS: &[Cell] = &[
    Cell { name: "4k-qd32-read", rw: "randread", block: "4k", depth: 32, ios: 0 },
    Cell { name: "4k-qd32-write", rw: "randwrite", block: "4k", depth: 32, ios: 0 },
];
/// A load whose data is checked.
const VERIFY: Cell = Cell { name: "verify", rw: "randwrite", block: "4k", depth: 16, ios: 0 };

/// Who serves the file below the loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    /// Nobody.
    None,
    /// devsplice, which makes the loop device as well.
    Own,
    /// A server in the foreground that shows a file.
    Shows(&'static [&'static str]),
}

/// The device that is ours.
pub const OWN: &str = "devsplice";
/// The devices; `{file}` is the file in memory, `{seen}` the one that the server is to show.
pub const DEVICES: &[(&str, &str)] = &[
    ("loop", "losetup --direct-io=on over the file itself"),
    (OWN, "devsplice add --export fuse {file}"),
    ("qsd", "qemu-storage-daemon, FUSE export, default aio; losetup over it"),
    ("qsd-uring", "qemu-storage-daemon, FUSE export, aio=io_uring; losetup over it"),
    ("nbdfuse", "nbdfuse over nbdkit file; losetup over it"),
];

fn server(name: &str) -> Server {
    match name {
        OWN => Server::Own,
        "qsd" => Server::Shows(&[
            "qemu-storage-daemon",
            "--blockdev",
            "driver=file,node-name=disk,filename={file}",
            "--export",
            "type=fuse,id=e,node-name=disk,mountpoint={seen},writable=on",
        ]),
        "qsd-uring" => Server::Shows(&[
            "qemu-storage-daemon",
            "--blockdev",
            "driver=file,node-name=disk,filename={file},aio=io_uring",
            "--export",
            "type=fuse,id=e,node-name=disk,mountpoint={seen},writable=on",
        ]),
        "nbdfuse" => Server::Shows(&["nbdfuse", "{seen}", "[", "nbdkit", "file", "{file}", "]"]),
        _ => Server::None,
    }
}

/// Everything that was made; taken away again, last first.
struct Site {
    directory: PathBuf,
    undo: Vec<Vec<String>>,
    guards: Vec<Guard>,
}

impl Site {
    fn make() -> Fallible<Self> {
        let directory = Path::new(MEMORY).join(format!("devsplice-bench.{}", std::process::id()));
        fs::create_dir(&directory)
            .map_err(|e| format!("cannot create {}: {e}", directory.display()))?;
        Ok(Self { directory, undo: Vec::new(), guards: Vec::new() })
    }

    fn undo_with(&mut self, words: &[&str]) {
        self.undo.push(words.iter().map(|&word| word.to_owned()).collect());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for words in self.undo.drain(..).rev() {
            // A signal must not cut this short, so not `run_quiet`; what cannot be undone has been
            // ended by somebody else.
            let mut command = bounded(20, &words[0]);
            let _ = command.args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        self.guards.clear();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Measures every device in turn.
pub fn run(bin: &Path, samples: u32, file: &Path) -> Fallible<Results> {
    deps::ensure(&["fio", "losetup"])?;
    let mut site = Site::make()?;
    let mut results = Results::default();
    let mut live = Vec::new();
    for (name, command) in DEVICES {
        match make(&mut site, bin, name) {
            Ok(node) => {
                results.commands.push(((*name).into(), (*command).into()));
                let verdict = verify(&node);
                println!("{name:10} verify: {verdict}");
                results.conditions.push((format!("{name}, verified writes"), verdict));
                live.push((*name, node));
            }
            Err(reason) => {
                println!("{name:10} not measured: {reason}");
                results.absent.push(((*name).into(), reason));
            }
        }
    }
    for number in 1..=samples {
        for cell in CELLS {
            for (name, node) in &live {
                proc::check_interrupt()?;
                let load = fio(
                    fio_arguments(node, cell, &format!("{SIZE}M")),
                    &["--time_based", RUNTIME, "--ramp_time=0.3"],
                );
                match load {
                    Ok(load) => {
                        let value = load.ios / load.milliseconds;
                        println!("{number} {:14} {name:10} {value:8.1} k IOPS", cell.name);
                        let (device, cell) = ((*name).into(), cell.name.into());
                        results.samples.push(Sample { device, cell, value, idle: 0.0 });
                    }
                    Err(e) => println!("{number} {:14} {name}: {e}", cell.name),
                }
            }
        }
        results.save(file)?;
    }
    Ok(results)
}

/// Makes a device; its node.
fn make(site: &mut Site, bin: &Path, name: &str) -> Fallible<String> {
    let file = site.directory.join(name);
    let shown = file.to_string_lossy().into_owned();
    let fill = ["if=/dev/zero", "bs=1M", &format!("count={SIZE}")];
    run_quiet(bounded(60, "dd").args(fill).arg(format!("of={shown}")))?;
    match server(name) {
        Server::Own => {
            let log = site.directory.join("log");
            let disk = format!("bench-{}", std::process::id());
            let bin = bin.to_string_lossy().into_owned();
            site.undo_with(&[&bin, "del", "--force", &disk]);
            let words = [&bin, "add", "--export", "fuse", "--name", &disk, &shown];
            run_detached(&words.map(str::to_owned), &log)?;
            let said = fs::read_to_string(&log).unwrap_or_default();
            let node = said.lines().find(|line| line.starts_with("/dev/"));
            node.map(str::to_owned).ok_or_else(|| format!("{words:?} named no device: {said}"))
        }
        Server::None => attach(site, &shown),
        Server::Shows(words) => {
            let program = proc::find_program(words[0])
                .ok_or_else(|| format!("{} is not installed", words[0]))?;
            let seen = site.directory.join(format!("{name}.seen"));
            let seen = seen.to_string_lossy().into_owned();
            // nbdfuse wants a directory and the file's name in it, the other an empty file.
            let (target, watched) = if name == "nbdfuse" {
                fs::create_dir(&seen).map_err(|e| format!("cannot create {seen}: {e}"))?;
                (format!("{seen}/disk"), format!("{seen}/disk"))
            } else {
                fs::write(&seen, "").map_err(|e| format!("cannot create {seen}: {e}"))?;
                (seen.clone(), seen.clone())
            };
            let mut command = tied(program);
            command.args(words[1..].iter().map(|w| filled(w, &shown, &target)));
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            site.guards.push(Guard::spawn(&mut command)?);
            site.undo_with(&["umount", "-l", &seen]);
            await_file(&watched)?;
            attach(site, &watched)
        }
    }
}

fn filled(word: &str, file: &str, seen: &str) -> String {
    word.replace("{file}", file).replace("{seen}", seen)
}

/// Waits until a file has its size.
fn await_file(path: &str) -> Fallible<()> {
    let start = Instant::now();
    while !fs::metadata(path).is_ok_and(|meta| meta.len() == SIZE << 20) {
        if start.elapsed() > APPEARS {
            return Err(format!("{path} did not appear"));
        }
        proc::check_interrupt()?;
        proc::nap();
    }
    Ok(())
}

/// A loop device over a file.
fn attach(site: &mut Site, file: &str) -> Fallible<String> {
    let words = ["--find", "--show", "--direct-io=on", file];
    let output = run_quiet(bounded(20, "losetup").args(words))?;
    let node = String::from_utf8_lossy(&output).trim().to_owned();
    site.undo_with(&["losetup", "--detach", &node]);
    Ok(node)
}

/// Whether what is written can be read again.
fn verify(node: &str) -> String {
    let arguments = fio_arguments(node, &VERIFY, "64M");
    let arguments = arguments.into_iter().filter(|word| word != "--norandommap").collect();
    let more = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"];
    match fio(arguments, &more) {
        Ok(_) => "every block right".to_owned(),
        Err(e) => {
            let bad = e.lines().find(|line| line.contains("verify")).unwrap_or(&e);
            format!("failed: {}", bad.trim().chars().take(120).collect::<String>())
        }
    }
}
