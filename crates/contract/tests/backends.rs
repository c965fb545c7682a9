//! Answers for the contract over every backend of ours: files with and without the page cache,
//! memory, loop devices where root may make them.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, RwLock};

use common::{Trials, caught};
use devsplice_backends::{Access, Body};
use devsplice_contract::backend::{self, Bottom, Subject};
use devsplice_contract::bench::expect;
use devsplice_contract::{Ask, Outcome, Suite, Verdict};
use devsplice_core::{Args, Errno, Error, ErrorKind, Limits, Op, Result};
use devsplice_uring::{Bytes, FileKind, loopctl};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

const SIZE: u64 = 4 << 20;

/// A file that goes with the last who knows it.
struct Temp(PathBuf);

impl Temp {
    fn new(dir: &Path, name: &str) -> Arc<Temp> {
        let path = dir.join(format!("devsplice-contract-{name}-{}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        Arc::new(Temp(path))
    }

    fn text(&self) -> String {
        self.0.to_str().unwrap().to_owned()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn opened(kind: &str, keys: &[(&str, String)]) -> Result<Bottom> {
    let source = devsplice_backends::SOURCES.iter().find(|source| source.name == kind).unwrap();
    let given: Vec<_> = keys.iter().map(|(key, value)| ((*key).into(), value.clone())).collect();
    let args = Args::new(kind, source.keys, &given)?;
    let opened = devsplice_backends::open(kind, &args, Access::Serve)?;
    let Body::File { fd, kind, .. } = opened.body else { panic!("{kind} is no file") };
    Ok(Bottom::File { fd: Arc::new(fd), kind, limits: opened.limits })
}

fn file(dir: &Path, name: &str, key: Option<(&'static str, &'static str)>) -> Suite {
    let temp = Temp::new(dir, name);
    let path = temp.text();
    let subject = Subject::new(move || {
        let mut keys = vec![("path", temp.text())];
        keys.extend(key.map(|(key, value)| (key, value.to_owned())));
        opened("file", &keys)
    });
    backend::suite(&subject.seen_at(path))
}

/// A loop device over a file, for as long as this lives.
struct Loop {
    node: PathBuf,
    _file: Arc<Temp>,
}

impl Loop {
    fn new() -> Result<Loop> {
        let os = |error: std::io::Error| Error::os("loop device", &error);
        let temp = Temp::new(&std::env::temp_dir(), "loop");
        let control = std::fs::File::open("/dev/loop-control").map_err(os)?;
        let file = std::fs::File::options().read(true).write(true).open(&temp.0).map_err(os)?;
        for _ in 0..20 {
            let number = loopctl::free(control.as_fd()).map_err(os)?;
            let node = PathBuf::from(format!("/dev/loop{number}"));
            let device = std::fs::File::options().read(true).write(true).open(&node).map_err(os)?;
            if loopctl::configure(device.as_fd(), file.as_fd(), 512, 0, "contract").is_ok() {
                return Ok(Loop { node, _file: temp });
            }
        }
        Err(Error::new(ErrorKind::Busy, "loop device", "none is free"))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Ok(device) = std::fs::File::open(&self.node) {
            let _ = loopctl::clear(device.as_fd());
        }
    }
}

fn loop_device(trials: &mut Trials) {
    match Loop::new() {
        Ok(made) => {
            let made = Arc::new(made);
            let subject = Subject::new(move || {
                opened("file", &[("path", made.node.to_str().unwrap().to_owned())])
            });
            trials.suite("loop_device", backend::suite(&subject));
        }
        Err(error) => trials.test("loop_device::everything", move || {
            Ok(Verdict::Skipped(format!("no loop device: {error}")))
        }),
    }
}

/// A backend that says it is larger than it is.
fn too_large() -> Suite {
    backend::suite(&Subject::new(|| {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create("half", flags).unwrap();
        ftruncate(&fd, SIZE / 2).unwrap();
        fcntl_add_seals(&fd, SealFlags::GROW).unwrap();
        Ok(Bottom::File { fd: Arc::new(fd), kind: FileKind::Other, limits: Limits::ideal(SIZE) })
    }))
}

/// A backend whose bytes are dropped: what is written never comes back.
fn forgetful() -> Suite {
    backend::suite(&Subject::new(|| {
        let file = std::fs::File::options().read(true).write(true).open("/dev/zero").unwrap();
        Ok(Bottom::File {
            fd: Arc::new(file.into()),
            kind: FileKind::Other,
            limits: Limits::ideal(SIZE),
        })
    }))
}

/// Bytes in memory, with or without a lie.
struct Ram {
    bytes: RwLock<Vec<u8>>,
    lie: Lie,
}

#[derive(Clone, Copy, PartialEq)]
enum Lie {
    None,
    /// Half of a long write is not written, and it says that all was.
    ShortWrite,
    /// The last byte of a long read is not filled.
    ShortRead,
    /// A panic where others answer.
    Panic,
}

impl Bytes for Ram {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> std::io::Result<()> {
        let at = usize::try_from(at).unwrap();
        let mut len = into.len();
        if self.lie == Lie::ShortRead && len > 8192 {
            len -= 1;
        }
        into[..len].copy_from_slice(&self.bytes.read().unwrap()[at..at + len]);
        Ok(())
    }

    fn write_at(&self, at: u64, from: &[u8]) -> std::io::Result<()> {
        if self.lie == Lie::Panic {
            // Without a message for each of thousands.
            std::panic::resume_unwind(Box::new("on purpose"));
        }
        let at = usize::try_from(at).unwrap();
        let short = self.lie == Lie::ShortWrite && from.len() > 8192;
        let len = if short { from.len() / 2 } else { from.len() };
        self.bytes.write().unwrap()[at..at + len].copy_from_slice(&from[..len]);
        Ok(())
    }
}

fn ram(lie: Lie) -> Suite {
    backend::suite(&Subject::bytes(move || {
        Arc::new(Ram { bytes: RwLock::new(vec![0; SIZE as usize]), lie })
    }))
}

/// A file, by plain calls: what the examples do.
struct Plain(std::fs::File);

impl Bytes for Plain {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(into, at)
    }

    fn write_at(&self, at: u64, from: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(from, at)
    }

    fn flush(&self) -> std::io::Result<()> {
        self.0.sync_data()
    }
}

/// A backend with a bad place: a block that can be neither read nor written, and no room for
/// flushes.
struct Bad(Ram);

const BAD: u64 = 64 << 10;

impl Bad {
    fn meets(at: u64, len: usize) -> std::io::Result<()> {
        let hit = at < BAD + 512 && at + len as u64 > BAD;
        if hit { Err(std::io::Error::from_raw_os_error(61)) } else { Ok(()) }
    }
}

impl Bytes for Bad {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> std::io::Result<()> {
        Bad::meets(at, into.len())?;
        self.0.read_at(at, into)
    }

    fn write_at(&self, at: u64, from: &[u8]) -> std::io::Result<()> {
        Bad::meets(at, from.len())?;
        self.0.write_at(at, from)
    }

    fn flush(&self) -> std::io::Result<()> {
        Err(std::io::Error::from_raw_os_error(28))
    }
}

/// An error of a call is the error of its request, by number, and of no other.
fn bad_bytes() -> Outcome {
    let subject = Subject::bytes(|| {
        Arc::new(Bad(Ram { bytes: RwLock::new(vec![0; SIZE as usize]), lie: Lie::None }))
    });
    let mut bench = subject.bench(1)?;
    let zeroes = Op::WriteZeroes { unmap: true };
    let mut asks = Vec::new();
    for at in (0..SIZE).step_by(64 << 10) {
        for (part, op) in [(0, Op::Write), (16 << 10, Op::Read), (32 << 10, zeroes)] {
            asks.push(bench.ask(op, at + part, 16 << 10));
        }
    }
    asks.push(bench.ask(Op::Flush, 0, 0));
    asks.push(bench.fua(48 << 10, 512));
    let want = |ask: &Ask| match (ask.io.op, ask.io.extent.at) {
        (Op::Flush, _) => Err(Errno::ENOSPC),
        _ if ask.io.fua => Err(Errno::ENOSPC),
        (_, BAD) => Err(Errno::ENODATA),
        _ => Ok(()),
    };
    let dones = bench.run(&asks)?;
    expect(&asks, &dones, |place| want(&asks[place]))?;
    for op in [Op::Read, zeroes] {
        let bad = [bench.ask(op, BAD - 512, 4096), bench.ask(op, BAD + 8192, 4096)];
        let dones = bench.run(&bad)?;
        let want = |place| if place == 0 { Err(Errno::ENODATA) } else { Ok(()) };
        expect(&bad, &dones, want)?;
    }
    Ok(Verdict::Kept)
}

fn bytes(trials: &mut Trials) {
    trials.test("bytes::an_error_fails_the_request_that_met_it_and_no_other", bad_bytes);
    trials.suite("bytes_in_memory", ram(Lie::None));
    let temp = Temp::new(&std::env::temp_dir(), "plain");
    let path = temp.text();
    let subject = Subject::bytes(move || {
        let file = std::fs::File::options().read(true).write(true).open(&temp.0).unwrap();
        Arc::new(Plain(file))
    });
    trials.suite("bytes_of_a_file", backend::suite(&subject.seen_at(path)));
    for (name, lie) in [
        ("a_short_write_that_claims_all", Lie::ShortWrite),
        ("a_short_read_that_claims_all", Lie::ShortRead),
        ("a_panic_of_a_backend", Lie::Panic),
    ] {
        trials.test(&format!("suite::{name}_is_caught"), move || {
            caught(ram(lie), "the_largest_request_is_done_whole")
        });
    }
}

fn main() -> ExitCode {
    let mut trials = Trials::default();
    let tmp = std::env::temp_dir();
    trials.suite("file", file(&tmp, "file", None));
    trials.suite("file_of_4k_blocks", file(&tmp, "file4k", Some(("block", "4096"))));
    trials.suite("file_through_the_page_cache", file(&tmp, "cached", Some(("direct", "off"))));
    trials.suite("file_read_only", file(&tmp, "readonly", Some(("readonly", "on"))));
    trials.suite("file_on_tmpfs", file(Path::new("/dev/shm"), "tmpfs", None));
    let memory = Subject::new(|| opened("mem", &[("size", SIZE.to_string())]));
    trials.suite("memory", backend::suite(&memory));
    bytes(&mut trials);
    loop_device(&mut trials);
    trials.test("suite::a_backend_that_drops_what_is_written_is_caught", || {
        caught(forgetful(), "reads_bring_what_was_written")
    });
    trials.test("suite::a_backend_larger_than_it_is_is_caught", || {
        caught(too_large(), "reads_bring_what_was_written")
    });
    trials.run()
}
