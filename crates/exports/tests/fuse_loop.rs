//! Answers for the FUSE front end on the running kernel: real loop devices, file systems, fio.
//!
//! Needs root, /dev/fuse and loop devices; without them each test says so and does nothing. Nothing
//! here waits without a bound: whatever touches a device runs under `timeout`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use devsplice_core::{Args, Error, ErrorKind, Limits, Stack, StackBuilder};
use devsplice_engine::{Counts, Stuck};
use devsplice_exports::fuse::{self, Device, Options};
use devsplice_exports::threads::Bottom;
use devsplice_uring::FileKind;

const MIB: u64 = 1 << 20;
const O_DIRECT: i32 = 0o40000;

/// One at a time: some of them look at what the whole machine has.
static ALONE: Mutex<()> = Mutex::new(());
static COUNT: AtomicU32 = AtomicU32::new(0);

fn ready() -> Option<MutexGuard<'static, ()>> {
    match fuse::available() {
        Ok(()) => Some(ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// A directory that goes with the test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("devsplice-fuse-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Dir(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A device over one file.
struct Disk {
    device: Device,
    file: PathBuf,
    _dir: Dir,
}

fn on_stuck(stuck: &Stuck) {
    println!("stuck: {stuck:?}");
}

fn on_death(error: Error) {
    panic!("an I/O thread died: {error}");
}

fn options(name: &str) -> Options {
    let name = format!("{name}-{}", std::process::id());
    Options {
        name,
        queues: 1,
        threads: 1,
        depth: 64,
        read_only: false,
        part_scan: false,
        stuck_seconds: 20,
    }
}

fn limits(size: u64) -> Limits {
    Limits { discard: 4096, volatile_cache: true, ..Limits::ideal(size) }
}

fn layer(driver: &str, keys: &str) -> Box<dyn devsplice_core::Layer> {
    let driver = devsplice_layers::find(driver).unwrap();
    let pairs = keys.split_whitespace().filter_map(|word| word.split_once('='));
    let given: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    (driver.make)(&Args::new(driver.name, driver.keys, &given).unwrap()).unwrap()
}

/// The stack of one file, with a layer over it where one is named.
fn stack(limits: Limits, above: Option<(&str, &str)>) -> Arc<Stack> {
    let mut builder = StackBuilder::new();
    let (mut root, _) = builder.backend("file", limits).unwrap();
    if let Some((driver, keys)) = above {
        let made = layer(driver, keys);
        root = builder.layer(driver, made, &[root], &mut |_, _, _| Ok(())).unwrap();
    }
    Arc::new(builder.finish(root))
}

fn bottom(path: &Path) -> Bottom {
    let file = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path).unwrap();
    Bottom { fd: file.into(), kind: FileKind::Regular }
}

fn disk_of(options: &Options, limits: Limits, above: Option<(&str, &str)>) -> Disk {
    let dir = Dir::new();
    let file = dir.at("disk");
    File::create(&file).unwrap().set_len(limits.size).unwrap();
    let stack = stack(limits, above);
    let device = Device::attach(options, stack, vec![bottom(&file)], on_stuck, on_death).unwrap();
    Disk { device, file, _dir: dir }
}

fn disk(name: &str, size: u64) -> Disk {
    disk_of(&options(name), limits(size), None)
}

impl Disk {
    fn path(&self) -> &str {
        self.device.path()
    }

    fn counts(&self) -> Counts {
        self.device.crew().counts()
    }

    fn open(&self) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(O_DIRECT).open(self.path()).unwrap()
    }

    fn end(self) -> Counts {
        self.device.detach(false).unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // After a failed test; otherwise it is gone already, and this does nothing.
        let _ = self.device.detach(true);
    }
}

/// Memory for direct I/O: `len` bytes on a page.
struct Pages {
    bytes: Vec<u8>,
    at: usize,
    len: usize,
}

impl Pages {
    fn new(len: usize, fill: impl Fn(usize) -> u8) -> Pages {
        let bytes = vec![0_u8; len + 4096];
        let at = bytes.as_ptr().align_offset(4096);
        let mut pages = Pages { bytes, at, len };
        pages.all().iter_mut().enumerate().for_each(|(index, byte)| *byte = fill(index));
        pages
    }

    fn all(&mut self) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + self.len]
    }
}

fn output(seconds: u32, words: &[&str]) -> Output {
    Command::new("timeout").args(["-k", "5", &seconds.to_string()]).args(words).output().unwrap()
}

fn run(words: &[&str]) -> String {
    let output = output(60, words);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {}\n{text}\n{errors}", output.status);
    text
}

fn pattern(seed: usize) -> impl Fn(usize) -> u8 {
    move |index| (index.wrapping_mul(31) ^ (index >> 8) ^ seed).to_le_bytes()[0]
}

#[test]
fn what_is_written_is_read_at_every_size_and_place() {
    let Some(_alone) = ready() else { return };
    let disk = disk("rw", 16 * MIB);
    let file = disk.open();
    let places = [
        (0, 512),
        (512, 4096),
        (8192, 65536),
        (MIB, 1 << 20),
        (3 * MIB + 512, (2 << 20) + 512),
        (16 * MIB - 512, 512),
    ];
    for (seed, (at, len)) in places.into_iter().enumerate() {
        let mut data = Pages::new(len, pattern(seed));
        file.write_all_at(data.all(), at).unwrap();
    }
    let backing = File::open(&disk.file).unwrap();
    for (seed, (at, len)) in places.into_iter().enumerate() {
        let mut want = Pages::new(len, pattern(seed));
        let mut got = Pages::new(len, |_| 0xee);
        file.read_exact_at(got.all(), at).unwrap();
        assert!(got.all() == want.all(), "{at}+{len} through the device");
        let mut below = vec![0; len];
        backing.read_exact_at(&mut below, at).unwrap();
        assert!(below == want.all(), "{at}+{len} below");
    }
    let size = run(&["blockdev", "--getsize64", disk.path()]);
    assert_eq!(size.trim(), (16 * MIB).to_string());
    drop(file);
    let counts = disk.end();
    assert!(counts.errors == 0 && counts.reads > 0 && counts.writes > 0, "{counts:?}");
}

fn fio(disk: &Disk, words: &[&str]) -> String {
    let path = format!("--filename={}", disk.path());
    let mut all = vec!["fio", "--name=job", &path, "--direct=1", "--ioengine=io_uring"];
    all.extend(words);
    run(&all)
}

fn report(what: &str, counts: &Counts) {
    let each = |count: u64| count as f64 / counts.requests.max(1) as f64;
    println!(
        "{what}: {} requests, {:.2} entries and {:.2} calls into the kernel each",
        counts.requests,
        each(counts.sqes),
        each(counts.enters)
    );
}

#[test]
fn fio_verifies_what_it_wrote() {
    let Some(_alone) = ready() else { return };
    for (queues, threads) in [(1, 1), (2, 2), (2, 1)] {
        let options = Options { queues, threads, ..options("fio") };
        let disk = disk_of(&options, limits(64 * MIB), None);
        fio(
            &disk,
            &[
                "--rw=randrw",
                "--bsrange=4k-256k",
                "--iodepth=16",
                "--numjobs=2",
                "--size=24m",
                "--offset_increment=32m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--group_reporting",
            ],
        );
        let counts = disk.end();
        assert_eq!(counts.errors, 0);
        report(&format!("fio, {queues} queues on {threads} threads"), &counts);
    }
}

#[test]
fn a_deep_queue_costs_few_calls() {
    let Some(_alone) = ready() else { return };
    let disk = disk("deep", 64 * MIB);
    for depth in [1, 4, 32] {
        let before = disk.counts();
        let depth = format!("--iodepth={depth}");
        fio(&disk, &["--rw=randread", "--bs=4k", &depth, "--runtime=1", "--time_based"]);
        let after = disk.counts();
        let part = Counts {
            requests: after.requests - before.requests,
            sqes: after.sqes - before.sqes,
            enters: after.enters - before.enters,
            ..Counts::default()
        };
        report(&depth, &part);
        // Read, splice, reply; and a poll at most where the kernel does not park reads.
        assert!(part.sqes <= part.requests * 4 + 16, "{part:?}");
    }
    disk.end();
}

#[test]
fn a_file_system_lives_on_it() {
    let Some(_alone) = ready() else { return };
    let disk = disk("ext4", 96 * MIB);
    let dir = Dir::new();
    let mount = dir.at("mnt");
    std::fs::create_dir(&mount).unwrap();
    let mount = mount.to_str().unwrap();
    let source = dir.at("source");
    let data = Pages::new(24 << 20, pattern(7));
    std::fs::write(&source, &data.bytes).unwrap();
    let source = source.to_str().unwrap();
    let copy = format!("{mount}/copy");
    run(&["mkfs.ext4", "-q", disk.path()]);
    run(&["mount", disk.path(), mount]);
    run(&["cp", source, &copy]);
    run(&["umount", mount]);
    run(&["e2fsck", "-fn", disk.path()]);
    run(&["mount", disk.path(), mount]);
    let sums = run(&["sha256sum", source, &copy]);
    let sums: Vec<_> = sums.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(sums[0], sums[1]);

    assert!(disk.device.is_busy());
    let refused = disk.device.detach(false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    println!("refused as it should be: {refused}");
    run(&["cmp", source, &copy]);
    run(&["umount", mount]);
    assert!(!disk.device.is_busy());
    println!("{:?}", disk.end());
}
