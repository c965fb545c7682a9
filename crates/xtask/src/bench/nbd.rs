//! Answers for the NBD part: servers of one machine under fio's own client, on files in memory;
//! and copies of files.
//!
//! Everything runs with real-time priority, so that other work on the machine does not decide;
//! samples alternate, and only ratios are told.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::data::{Results, Sample};
use super::run::{bounded, fio};
use crate::proc::{self, Guard, run_quiet, tied};
use crate::{Fallible, deps};

/// Files in memory.
const MEMORY: &str = "/dev/shm";
/// MiB of each disk.
const SIZE: u64 = 256;
/// MiB of a file that is copied.
const COPIED: u64 = 4096;
/// Times that each is copied.
const COPIES: u32 = 3;
/// How long a server may take to listen.
const APPEARS: Duration = Duration::from_secs(10);

/// A load: fio's `--rw`, `--bs`, `--iodepth`, `--numjobs`, and whether its buffers lie on pages.
pub struct Cell {
    /// Its name in tables.
    pub name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    jobs: u32,
    on_pages: bool,
}

const fn cell(
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    jobs: u32,
) -> Cell {
    Cell { name, rw, block, depth, jobs, on_pages: false }
}

/// The loads.
pub const CELLS: &[Cell] = &[
    cell("4k-qd1-read", "randread", "4k", 1, 1),
    cell("4k-qd1-write", "randwrite", "4k", 1, 1),
    cell("4k-qd32-read", "randread", "4k", 32, 1),
    cell("4k-qd32-write", "randwrite", "4k", 32, 1),
    cell("128k-qd8-read", "randread", "128k", 8, 1),
    cell("128k-qd8-write", "randwrite", "128k", 8, 1),
    Cell { on_pages: true, ..cell("128k-qd8-read-page", "randread", "128k", 8, 1) },
    cell("4k-qd32-read-4", "randread", "4k", 32, 4),
    cell("4k-qd32-write-4", "randwrite", "4k", 32, 4),
    cell("128k-qd8-read-4", "randread", "128k", 8, 4),
    cell("128k-qd8-write-4", "randwrite", "128k", 8, 4),
];

/// A server: its name, and its command; `{file}` is a file in memory, `{socket}` where it listens.
pub const SERVERS: &[(&str, &[&str])] = &[
    ("devsplice", &["devsplice", "add", "-f", "--name", "{name}", "--listen", SOCKET, "{file}"]),
    ("nbdkit-file", &["nbdkit", "-f", "-U", "{socket}", "file", "{file}"]),
    (
        "qemu-nbd",
        &[
            "qemu-nbd",
            "-t",
            "-f",
            "raw",
            "--cache=writeback",
            "-e",
            "8",
            "-k",
            "{socket}",
            "{file}",
        ],
    ),
    (
        "devsplice-mem",
        &["devsplice", "add", "-f", "--name", "{name}", "--listen", SOCKET, "mem(256M)"],
    ),
    ("nbdkit-memory", &["nbdkit", "-f", "-U", "{socket}", "memory", "256M"]),
];
const SOCKET: &str = "unix:{socket}";

/// Who copies, and what the copies are called in the figures.
pub const COPIERS: &[(&str, &[&str])] = &[
    ("devsplice copy", &["devsplice", "copy", "{from}", "{to}"]),
    ("nbdcopy", &["nbdcopy", "{from}", "{to}"]),
];
/// The files that are copied.
pub const FILES: &[&str] = &["copy-dense", "copy-sparse"];

/// The servers' files and sockets; goes with all that is in it.
struct Site {
    directory: PathBuf,
    guards: Vec<Guard>,
}

impl Site {
    fn make() -> Fallible<Site> {
        let directory = Path::new(MEMORY).join(format!("devsplice-nbd.{}", std::process::id()));
        fs::create_dir(&directory)
            .map_err(|e| format!("cannot create {}: {e}", directory.display()))?;
        Ok(Site { directory, guards: Vec::new() })
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.guards.clear();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Measures all servers in turn, then all copies.
pub fn run(bin: &Path, samples: u32, file: &Path) -> Fallible<Results> {
    deps::ensure(&["fio"])?;
    let mut results = Results::default();
    let own = std::process::id().to_string();
    let priority = match run_quiet(bounded(20, "chrt").args(["--rr", "--pid", "1", &own])) {
        Ok(_) => "real-time, of servers and clients alike".to_owned(),
        Err(e) => format!("ordinary: {e}"),
    };
    results.conditions.push(("priority".into(), priority));
    let mut site = Site::make()?;
    let mut live = Vec::new();
    for (name, words) in SERVERS {
        match serve(&mut site, bin, name, words) {
            Ok(uri) => {
                results.commands.push(((*name).into(), words.join(" ")));
                live.push((*name, uri));
            }
            Err(reason) => results.absent.push(((*name).into(), reason)),
        }
    }
    for number in 1..=samples {
        for cell in CELLS {
            for (name, uri) in &live {
                proc::check_interrupt()?;
                let load = fio(arguments(uri, cell), &[])?;
                let value = load.ios / load.milliseconds;
                println!("{number} {:18} {name:14} {value:8.1} k IOPS", cell.name);
                let (device, cell) = ((*name).into(), cell.name.into());
                results.samples.push(Sample { device, cell, value, idle: 0.0 });
            }
        }
        results.save(file)?;
    }
    site.guards.clear();
    copies(&site, bin, &mut results)?;
    results.save(file)?;
    Ok(results)
}

/// fio's words for a load.
fn arguments(uri: &str, cell: &Cell) -> Vec<String> {
    let Cell { rw, block, depth, jobs, on_pages, .. } = cell;
    [
        "--name=bench",
        "--ioengine=nbd",
        &format!("--uri={uri}"),
        &format!("--rw={rw}"),
        &format!("--bs={block}"),
        &format!("--iodepth={depth}"),
        &format!("--numjobs={jobs}"),
        &format!("--size={SIZE}M"),
        // Else they are where `malloc` has put them, 16 bytes into a page.
        &format!("--iomem_align={}", if *on_pages { 4096 } else { 0 }),
        "--group_reporting",
        "--norandommap",
        "--time_based",
        "--runtime=500ms",
        "--ramp_time=100ms",
        "--output-format=json",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// The program that a command's first word means.
fn program(bin: &Path, word: &str) -> Fallible<PathBuf> {
    if word == "devsplice" {
        return Ok(bin.to_owned());
    }
    proc::find_program(word).ok_or_else(|| format!("{word} is not installed"))
}

/// Starts a server over data; where it is.
fn serve(site: &mut Site, bin: &Path, name: &str, words: &[&str]) -> Fallible<String> {
    let (file, socket) = (site.path(name), site.path(&format!("{name}.socket")));
    fill(Path::new(&file), SIZE, true)?;
    let disk = format!("bench-{name}-{}", std::process::id());
    let mut command = tied(program(bin, words[0])?);
    command.args(words[1..].iter().map(|word| {
        word.replace("{file}", &file).replace("{socket}", &socket).replace("{name}", &disk)
    }));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    site.guards.push(Guard::spawn(&mut command)?);
    let start = Instant::now();
    while !Path::new(&socket).exists() {
        if start.elapsed() > APPEARS {
            return Err("did not listen".into());
        }
        proc::check_interrupt()?;
        proc::nap();
    }
    let uri = format!("nbd+unix:///?socket={socket}");
    // What lies in the servers' own memory is data, too.
    let write = cell("fill", "write", "1M", 4, 1);
    let words = arguments(&uri, &write).into_iter().filter(|word| !word.starts_with("--ramp"));
    let words = words.filter(|word| word != "--time_based" && word != "--runtime=500ms").collect();
    fio(words, &[]).map(|_| uri)
}

/// Makes a file: data everywhere, or 64 KiB of each MiB.
fn fill(path: &Path, mib: u64, is_dense: bool) -> Fallible<()> {
    let os = |e: std::io::Error| format!("{}: {e}", path.display());
    let file = fs::File::create(path).map_err(os)?;
    file.set_len(mib << 20).map_err(os)?;
    let data = vec![0x5a; if is_dense { 1 << 20 } else { 64 << 10 }];
    for place in 0..mib {
        file.write_all_at(&data, place << 20).map_err(os)?;
    }
    Ok(())
}

/// Has each copier copy each file, in turn.
fn copies(site: &Site, bin: &Path, results: &mut Results) -> Fallible<()> {
    let (from, to) = (site.path("from"), site.path("to"));
    // So that the machine has as much memory before the first copy as before the others.
    fill(Path::new(&to), COPIED, true)?;
    for file in FILES {
        fill(Path::new(&from), COPIED, *file == "copy-dense")?;
        for _ in 0..COPIES {
            for (name, words) in COPIERS {
                proc::check_interrupt()?;
                let _ = fs::remove_file(&to);
                fs::File::create(&to)
                    .and_then(|file| file.set_len(COPIED << 20))
                    .map_err(|e| format!("{to}: {e}"))?;
                let Ok(program) = program(bin, words[0]) else { continue };
                let mut command: Command = bounded(120, program);
                let place = |word: &&str| word.replace("{from}", &from).replace("{to}", &to);
                command.args(words[1..].iter().map(place));
                let start = Instant::now();
                run_quiet(&mut command)?;
                let value = (COPIED as f64 / 1024.0) / start.elapsed().as_secs_f64();
                println!("{file:18} {name:14} {value:8.2} GiB/s");
                let (device, cell) = ((*name).into(), (*file).into());
                results.samples.push(Sample { device, cell, value, idle: 0.0 });
            }
        }
    }
    Ok(())
}
