//! Answers for the FUSE front end on the running kernel: real loop devices, file systems, fio.
//!
//! Needs root, /dev/fuse and loop devices; without them each test says so and does nothing. Nothing
//! here waits without a bound: whatever touches a device runs under `timeout`.
#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use devsplice_core::{Args, Error, ErrorKind, Limits, Stack, StackBuilder};
use devsplice_engine::{Counts, Stuck};
use devsplice_exports::fuse::{self, DataPath, Device, Options};
use devsplice_exports::host;
use devsplice_exports::threads::{Bottom, Service};
use devsplice_uring::FileKind;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

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

#[allow(clippy::needless_pass_by_value)]
fn on_death(error: Error) {
    panic!("an I/O thread died: {error}");
}

fn on_event(text: &str) {
    println!("event: {text}");
}

fn options_of(name: &str, path: DataPath) -> Options {
    Options { data_path: Some(path), ..options(name) }
}

fn options(name: &str) -> Options {
    let name = format!("{name}-{}", std::process::id());
    Options {
        name,
        data_path: Some(DataPath::Copy),
        queues: 1,
        threads: 1,
        depth: 64,
        read_only: false,
        part_scan: false,
        stuck_seconds: 20,
        keep: None,
        must_keep: false,
    }
}

fn limits(size: u64) -> Limits {
    Limits { discard: 4096, fast_zeroes: true, volatile_cache: true, ..Limits::ideal(size) }
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
    Bottom::File { fd: file.into(), kind: FileKind::Regular }
}

fn disk_of(options: &Options, limits: Limits, above: Option<(&str, &str)>) -> Disk {
    let dir = Dir::new();
    let file = dir.at("disk");
    File::create(&file).unwrap().set_len(limits.size).unwrap();
    let stack = stack(limits, above);
    let service = Service {
        stack,
        bottoms: vec![bottom(&file)],
        pool: None,
        on_stuck: Arc::new(on_stuck),
        on_event: Arc::new(on_event),
        on_death,
    };
    let device = Device::attach(options, service, &mut |_| {}).unwrap();
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

/// FUSE ends a request at its commit: its pages are somebody else's then. So none may be committed
/// while a part of it is still to go below. Here one part of each write goes at once and the other
/// waits, and what was written is changed as soon as the write is done.
#[test]
fn no_write_ends_before_all_of_it_is_below() {
    let Some(_alone) = ready() else { return };
    let _switch = Switch::on();
    for path in [DataPath::Copy].into_iter().chain(by_uring()) {
        let (dir, mut builder) = (Dir::new(), StackBuilder::new());
        let files = [dir.at("now"), dir.at("later")];
        let legs = files.each_ref().map(|file| {
            File::create(file).unwrap().set_len(2 * MIB).unwrap();
            builder.backend("file", limits(2 * MIB)).unwrap().0
        });
        let mut over = |driver, keys, below: &[_]| {
            let made = layer(driver, keys);
            builder.layer(driver, made, below, &mut |_, _, _| Ok(())).unwrap()
        };
        let later = over("delay", "write=30ms", &legs[1..]);
        let both = over("concat", "", &[legs[0], later]);
        let stack = Arc::new(builder.finish(both));
        let bottoms = files.iter().map(|file| bottom(file)).collect();
        let service = Service {
            stack,
            bottoms,
            pool: None,
            on_stuck: Arc::new(on_stuck),
            on_event: Arc::new(on_event),
            on_death,
        };
        let device = Device::attach(&options_of("late", path), service, &mut |_| {}).unwrap();
        let disk = Disk { device, file: files[1].clone(), _dir: dir };
        let file = disk.open();
        let mut data = Pages::new(128 << 10, |_| 0);
        for round in 0..16_u8 {
            let at = 2 * MIB - (64 << 10);
            data.all().fill(round + 1);
            file.write_all_at(data.all(), at).unwrap();
            data.all().fill(0xee);
            // Another request, which gets the place of the one that has ended.
            file.write_all_at(&data.all()[..4096], 3 * MIB).unwrap();
            let mut below = vec![0; 64 << 10];
            File::open(&disk.file).unwrap().read_exact_at(&mut below, 0).unwrap();
            assert!(below.iter().all(|byte| *byte == round + 1), "{path:?}, round {round}");
        }
        drop(file);
        assert_eq!(disk.end().errors, 0);
    }
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

/// FUSE over io_uring is switched on for the while of a test, where it can be.
struct Switch(Option<String>);

const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

impl Switch {
    fn on() -> Switch {
        let before = std::fs::read_to_string(SWITCH).ok();
        let _ = std::fs::write(SWITCH, "1");
        Switch(before)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = std::fs::write(SWITCH, before.trim());
        }
    }
}

/// The data paths by io_uring that there are here. Says which are not.
fn by_uring() -> Vec<DataPath> {
    let offered = fuse::offered();
    let (there, not): (Vec<_>, Vec<_>) =
        DataPath::ALL.into_iter().partition(|path| offered.contains(path));
    println!("skipped: this kernel's FUSE has not {not:?}");
    there.into_iter().filter(|path| *path != DataPath::Copy).collect()
}

#[test]
fn fio_verifies_what_it_wrote() {
    let Some(_alone) = ready() else { return };
    let _switch = Switch::on();
    let mut kinds = vec![(DataPath::Copy, 1, 1), (DataPath::Copy, 2, 2), (DataPath::Copy, 2, 1)];
    kinds.extend(by_uring().into_iter().flat_map(|path| [(path, 1, 1), (path, 1, 0)]));
    for (path, queues, threads) in kinds {
        let options = Options { queues, threads, ..options_of("fio", path) };
        let disk = disk_of(&options, limits(64 * MIB), None);
        assert_eq!(disk.device.data_path(), path);
        fio(
            &disk,
            &[
                "--rw=randrw",
                "--bsrange=4k-256k",
                "--iodepth=32",
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
        assert_eq!(counts.bytes_copied == 0, path.copies() == 0, "{counts:?}");
        report(&format!("fio, {path:?}, {queues} queues on {threads} threads"), &counts);
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

/// KiB that are resident of mappings as large as the memory of a device's requests. The heap, and
/// malloc's arenas of up to 64 MiB, keep what the tests themselves have used; so may neighbours
/// that the kernel shows as one mapping with it, which is why as much as they can hold is taken
/// off.
fn request_memory() -> u64 {
    // 64 tags with 1 MiB and a page each.
    const OWN: u64 = 64 * ((1 << 10) + 4);
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let number = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    let (mut size, mut sum, mut is_heap) = (0, 0, false);
    for line in maps.lines() {
        if line.starts_with("Size:") {
            size = number(line).unwrap_or(0);
        } else if line.starts_with("Rss:") && size >= OWN && !is_heap {
            sum += number(line).unwrap_or(0_u64).saturating_sub(size - OWN);
        } else if line.split_whitespace().next().is_some_and(|word| word.contains('-')) {
            is_heap = line.ends_with("[heap]");
        }
    }
    sum
}

#[test]
fn memory_is_given_back_after_a_burst_although_reads_stay_parked() {
    let Some(_alone) = ready() else { return };
    // A device of another test that was torn down with reads out has left its memory to the end of
    // the process (uring/arena).
    let others = request_memory();
    let request_memory = || request_memory().saturating_sub(others);
    // Slow, so that all of them are there at once and end at once.
    let disk = disk_of(&options("burst"), limits(64 * MIB), Some(("delay", "read=300ms")));
    let burst = || {
        std::thread::scope(|scope| {
            for index in 0..64 {
                let disk = &disk;
                scope.spawn(move || {
                    let mut data = Pages::new(1 << 20, |_| 1);
                    disk.open().read_exact_at(data.all(), index * MIB).unwrap();
                    assert!(data.all().iter().all(|byte| *byte == 0));
                });
            }
        });
    };
    burst();
    let most = request_memory();
    let end = Instant::now() + Duration::from_secs(8);
    // One read is parked, and may keep the memory that its tag has had.
    while request_memory() > 2 << 10 {
        assert!(Instant::now() < end, "{} of {most} KiB are kept", request_memory());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(most > 20 << 10, "{most} KiB: that was no burst");
    burst();
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

    assert!(host::is_held(disk.path()));
    let refused = disk.device.detach(false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    println!("refused as it should be: {refused}");
    run(&["cmp", source, &copy]);
    run(&["umount", mount]);
    assert!(!host::is_held(disk.path()));
    println!("{:?}", disk.end());
}

fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    File::open(path).unwrap().sync_all().unwrap();
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn reads_as_zeros(disk: &Disk, at: u64, len: usize) -> bool {
    let mut pages = Pages::new(len, |_| 0xee);
    disk.open().read_exact_at(pages.all(), at).unwrap();
    pages.all().iter().all(|byte| *byte == 0)
}

#[test]
fn discards_give_room_back_and_zeroing_zeroes() {
    let Some(_alone) = ready() else { return };
    let disk = disk("discard", 16 * MIB);
    let mut data = Pages::new(16 << 20, pattern(3));
    disk.open().write_all_at(data.all(), 0).unwrap();
    let full = blocks(&disk.file);
    run(&["blkdiscard", "-o", "0", "-l", "4194304", disk.path()]);
    assert!(blocks(&disk.file) <= full - 4 * MIB, "{} of {full}", blocks(&disk.file));
    assert!(reads_as_zeros(&disk, 0, 4 << 20) && !reads_as_zeros(&disk, 4 * MIB, 4096));
    run(&["blkdiscard", "-z", "-o", "8388608", "-l", "2097152", disk.path()]);
    assert!(reads_as_zeros(&disk, 8 * MIB, 2 << 20) && !reads_as_zeros(&disk, 10 * MIB, 4096));
    let counts = disk.end();
    assert!(counts.discards >= 2 && counts.errors == 0, "{counts:?}");
}

#[test]
fn without_cheap_discards_below_nothing_is_discarded_and_zeroing_still_works() {
    let Some(_alone) = ready() else { return };
    for (discard, fast_zeroes) in [(0, true), (4096, false)] {
        nothing_is_discarded(Limits { discard, fast_zeroes, ..limits(16 * MIB) });
    }
}

fn nothing_is_discarded(limits: Limits) {
    let disk = disk_of(&options("nodiscard"), limits, None);
    let mut data = Pages::new(4 << 20, pattern(3));
    disk.open().write_all_at(data.all(), 0).unwrap();
    // The kernel tries once and remembers; that it was refused is nothing it tells, as discards are
    // advice.
    for _ in 0..2 {
        output(20, &["blkdiscard", "-o", "0", "-l", "1048576", disk.path()]);
    }
    assert_eq!(disk.counts().discards, 0);
    assert!(!reads_as_zeros(&disk, 0, 4096));
    run(&["blkdiscard", "-z", "-o", "0", "-l", "1048576", disk.path()]);
    assert!(reads_as_zeros(&disk, 0, 1 << 20) && !reads_as_zeros(&disk, MIB, 4096));
    disk.end();
}

#[test]
fn a_loop_device_that_was_said_to_have_no_cache_flushes_again() {
    let Some(_alone) = ready() else { return };
    let disk = disk("through", 4 * MIB);
    let path = disk.path().to_owned();
    let switch = format!("{}/queue/write_cache", path.replace("/dev/", "/sys/block/"));
    let said = || std::fs::read_to_string(&switch).unwrap();
    std::fs::write(&switch, "write through").unwrap();
    assert_eq!(said().trim(), "write through");
    disk.end();
    let next = self::disk("back", 4 * MIB);
    if next.path() == path {
        assert_eq!(said().trim(), "write back");
    } else {
        // Somebody else was given that number: it is to be as it was.
        std::fs::write(&switch, "write back").unwrap();
    }
    next.end();
}

#[test]
fn a_flush_reaches_the_file_below_and_its_error_the_client() {
    let Some(_alone) = ready() else { return };
    let disk = disk("flush", 4 * MIB);
    let mut data = Pages::new(4096, pattern(1));
    let before = disk.counts().flushes;
    disk.open().write_all_at(data.all(), 0).unwrap();
    disk.open().sync_all().unwrap();
    assert!(disk.counts().flushes > before);
    disk.end();

    let options = options("badflush");
    let disk = disk_of(&options, limits(4 * MIB), Some(("error", "flush=EIO")));
    disk.open().write_all_at(data.all(), 0).unwrap();
    assert_eq!(disk.open().sync_all().unwrap_err().raw_os_error(), Some(5));
    let unflushed = disk.device.detach(false).unwrap_err();
    assert!(unflushed.to_string().contains("flush"), "{unflushed}");
    disk.device.detach(true).unwrap();

    // A detach flushes once, a forced one leaves that to whoever wants it.
    for (force, more) in [(false, 1), (true, 0)] {
        let disk = disk_of(&options, limits(4 * MIB), None);
        disk.open().write_all_at(data.all(), 0).unwrap();
        assert!(devsplice_exports::host::sync(disk.path(), std::time::Duration::from_secs(20)));
        let before = disk.counts().flushes;
        assert!(before > 0);
        assert_eq!(disk.device.detach(force).unwrap().flushes, before + more, "force: {force}");
    }

    // Nothing below loses anything: no flush is sent at all.
    let durable = Limits { volatile_cache: false, ..limits(4 * MIB) };
    let disk = disk_of(&options, durable, Some(("error", "flush=EIO")));
    disk.open().write_all_at(data.all(), 0).unwrap();
    disk.open().sync_all().unwrap();
    assert_eq!(disk.end().flushes, 0);
}

#[test]
fn only_what_touches_a_bad_place_fails() {
    let Some(_alone) = ready() else { return };
    let bad = Some(("error", "read=EIO write=ENOSPC at=1M len=64k"));
    let disk = disk_of(&options("bad"), limits(8 * MIB), bad);
    let file = disk.open();
    let mut data = Pages::new(4096, pattern(1));
    for (at, good) in [(MIB - 4096, true), (MIB, false), (MIB + 61440, false), (MIB + 65536, true)]
    {
        let written = file.write_all_at(data.all(), at);
        let read = file.read_exact_at(Pages::new(4096, |_| 0).all(), at);
        assert_eq!((written.is_ok(), read.is_ok()), (good, good), "{at}: {written:?} {read:?}");
        if !good {
            assert_eq!(written.unwrap_err().raw_os_error(), Some(28));
            assert_eq!(read.unwrap_err().raw_os_error(), Some(5));
        }
    }
    // Across its beginning, too: no half of a read counts.
    assert!(file.read_exact_at(Pages::new(8192, |_| 0).all(), MIB - 4096).is_err());
    drop(file);
    assert_eq!(disk.end().errors, 5);
}

#[test]
fn a_read_only_device_stays_as_it_is() {
    let Some(_alone) = ready() else { return };
    let stacks = Limits { read_only: true, ..limits(4 * MIB) };
    for (asked, limits) in [(true, limits(4 * MIB)), (false, stacks)] {
        let options = Options { read_only: asked, ..options("ro") };
        let disk = disk_of(&options, limits, None);
        assert_eq!(run(&["blockdev", "--getro", disk.path()]).trim(), "1");
        run(&["dd", "bs=64k", "iflag=direct", "of=/dev/null", &format!("if={}", disk.path())]);
        let to = format!("of={}", disk.path());
        let write = ["dd", "bs=4k", "count=1", "if=/dev/zero", "oflag=direct", &to];
        assert!(!output(20, &write).status.success());
        assert!(!output(20, &["blkdiscard", disk.path()]).status.success());
        let counts = disk.end();
        assert_eq!((counts.writes, counts.discards, counts.errors), (0, 0, 0));
    }
}

#[test]
fn a_loop_device_that_somebody_has_set_read_only_can_be_written_to() {
    let Some(_alone) = ready() else { return };
    let node = run(&["losetup", "-f"]).trim().to_owned();
    run(&["blockdev", "--setro", &node]);
    let disk = disk("setro", 4 * MIB);
    let is_the_one = disk.path() == node;
    let read_only = run(&["blockdev", "--getro", disk.path()]).trim().to_owned();
    let written = disk.open().write_all_at(Pages::new(4096, pattern(2)).all(), 0);
    disk.end();
    run(&["blockdev", "--setrw", &node]);
    if !is_the_one {
        println!("skipped: another program has taken {node}");
        return;
    }
    assert_eq!(read_only, "0");
    written.unwrap();
}

#[test]
fn the_disk_is_as_asked() {
    let Some(_alone) = ready() else { return };
    for (part_scan, block, rotational) in [(true, 4096, true), (false, 512, false)] {
        let limits = Limits { block, physical: block, rotational, ..limits(32 * MIB) };
        let disk = disk_of(&Options { part_scan, ..options("shape") }, limits, None);
        assert_eq!(run(&["blockdev", "--getss", disk.path()]).trim(), block.to_string());
        let base = disk.path().replace("/dev/", "/sys/block/");
        let read = |name: &str| std::fs::read_to_string(format!("{base}/{name}")).unwrap();
        assert_eq!(read("loop/dio").trim(), "1");
        assert_eq!(read("loop/partscan").trim(), if part_scan { "1" } else { "0" });
        // Nobody waits for that.
        let end = Instant::now() + Duration::from_secs(5);
        while read("queue/rotational").trim() != if rotational { "1" } else { "0" } {
            assert!(Instant::now() < end, "not told that seeks cost");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(read("queue/discard_granularity").trim(), "4096");
        disk.end();
    }
}

#[test]
fn force_ends_a_mounted_device_and_the_loop_goes_with_the_mount() {
    let Some(_alone) = ready() else { return };
    let disk = disk("force", 32 * MIB);
    let dir = Dir::new();
    let mount = dir.at("mnt");
    std::fs::create_dir(&mount).unwrap();
    let mount = mount.to_str().unwrap();
    run(&["mkfs.ext4", "-q", "-O", "^has_journal", disk.path()]);
    run(&["mount", disk.path(), mount]);
    run(&["sh", "-c", &format!("head -c 4M /dev/urandom > {mount}/data && sync -f {mount}")]);
    let name = format!("force-{}", std::process::id());
    assert!(fuse::is_served(disk.path(), &name));
    let start = Instant::now();
    disk.device.detach(true).unwrap();
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert!(disk.device.crew().is_over() && !fuse::is_served(disk.path(), &name));
    let direct = ["dd", "bs=64k", "iflag=direct", "of=/dev/null", &format!("if={mount}/data")];
    assert!(!output(20, &direct).status.success(), "reads after the end");
    run(&["umount", mount]);
    assert!(soon(|| !loops().contains(&format!("/force-{}", std::process::id()))), "{}", loops());
}

#[test]
fn an_open_device_goes_when_it_is_closed() {
    let Some(_alone) = ready() else { return };
    let disk = disk("open", 4 * MIB);
    let file = disk.open();
    let held = disk.device.detach(false).unwrap_err();
    println!("refused as it should be: {held}");
    let me = format!("({})", std::process::id());
    assert!(held.kind() == ErrorKind::Busy && held.to_string().contains(&me), "{held}");
    // It works until then.
    file.read_exact_at(Pages::new(4096, |_| 0).all(), 0).unwrap();
    drop(file);
    assert!(soon(|| disk.device.crew().is_over()));
    disk.end();
}

fn loops() -> String {
    run(&["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"])
}

fn soon(is_so: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(5);
    while !is_so() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// What would pile up: loop devices, FUSE connections, mounts, threads, descriptors.
fn what_there_is() -> [usize; 5] {
    let count = |path: &str| std::fs::read_dir(path).map_or(0, Iterator::count);
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_create(&context).unwrap();
    let none = MountAttrFlags::empty();
    let connections = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, none).unwrap();
    [
        loops().lines().count(),
        count(&format!("/proc/self/fd/{}", connections.as_raw_fd())),
        std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count(),
        count("/proc/self/task"),
        count("/proc/self/fd"),
    ]
}

#[test]
fn coming_and_going_leaves_nothing_behind() {
    let Some(_alone) = ready() else { return };
    let warm = disk("warm", MIB);
    let there = what_there_is();
    assert!(there[0] > 0 && there[1] > 0, "{there:?}");
    warm.end();
    let before = what_there_is();
    for _ in 0..20 {
        let disk = disk("again", MIB);
        reads_as_zeros(&disk, 0, 4096);
        disk.end();
    }
    assert!(soon(|| what_there_is() == before), "{before:?} then {:?}", what_there_is());
}

#[test]
fn several_at_once_get_devices_of_their_own() {
    let Some(_alone) = ready() else { return };
    let before = loops();
    let threads: Vec<_> = (0..6)
        .map(|index| std::thread::spawn(move || disk(&format!("many{index}"), MIB)))
        .collect();
    let disks: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let mut paths: Vec<_> = disks.iter().map(Disk::path).collect();
    paths.sort_unstable();
    paths.dedup();
    assert_eq!(paths.len(), 6);
    for disk in disks {
        disk.end();
    }
    assert_eq!(loops(), before);
}

#[test]
fn names_that_a_loop_device_cannot_have_are_refused() {
    let Some(_alone) = ready() else { return };
    for name in ["", ".", "..", "a/b", "a b", "\u{e9}", "x".repeat(60).as_str()] {
        let options = Options { name: name.to_owned(), ..options("x") };
        let stack = stack(limits(MIB), None);
        let service = Service {
            stack,
            bottoms: vec![],
            pool: None,
            on_stuck: Arc::new(on_stuck),
            on_event: Arc::new(on_event),
            on_death,
        };
        let made = Device::attach(&options, service, &mut |_| {});
        assert_eq!(made.map(|_| ()).unwrap_err().kind(), ErrorKind::Invalid, "{name:?}");
    }
}

/// The other half of the tests of an abrupt end: a process that serves a device until it is killed.
#[test]
#[ignore = "is run by other tests"]
fn serves_until_killed() {
    let Ok(keys) = std::env::var("DEVSPLICE_TEST_LAYER") else { return };
    let name = std::env::var("DEVSPLICE_TEST_NAME").unwrap();
    let options = Options { name, ..options("") };
    let disk = disk_of(&options, limits(16 * MIB), Some(("delay", &keys)));
    println!("serving {}", disk.path());
    std::io::stdin().read_line(&mut String::new()).unwrap();
    println!("detaching");
    let _ = disk.device.detach(false);
    std::thread::sleep(Duration::from_secs(60));
}

/// Another process with a device: itself, the device's path, and where its files are.
fn server(name: &str, keys: &str) -> (std::process::Child, String, Dir) {
    use std::io::{BufRead, BufReader};
    let dir = Dir::new();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "serves_until_killed", "--nocapture"])
        .env("DEVSPLICE_TEST_NAME", name)
        .env("TMPDIR", &dir.0)
        .env("DEVSPLICE_TEST_LAYER", keys)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let path = lines.find_map(|line| Some(line.ok()?.split_once("serving ")?.1.to_owned()));
    std::thread::spawn(move || lines.for_each(drop));
    (child, path.unwrap(), dir)
}

/// Kills it; panics if it does not go.
fn kill(child: &mut std::process::Child) {
    child.kill().unwrap();
    let end = Instant::now() + Duration::from_secs(8);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "process {} cannot be killed", child.id());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_killed_server_leaves_errors_and_a_loop_that_a_guard_clears() {
    let Some(_alone) = ready() else { return };
    let name = format!("killed-{}", std::process::id());
    let (mut child, path, _dir) = server(&name, "");
    let from = format!("if={path}");
    let read = ["dd", "bs=64k", "count=1", "iflag=direct", "of=/dev/null", &from];
    run(&read);
    kill(&mut child);
    assert!(!output(20, &read).status.success(), "reads after the end");
    assert!(!fuse::clear_loop(&path, "another").unwrap());
    assert!(loops().contains(&name));
    assert!(fuse::clear_loop(&path, &name).unwrap());
    assert!(soon(|| !loops().contains(&name)), "{}", loops());
    assert!(!fuse::clear_loop(&path, &name).unwrap());
}

#[test]
fn a_server_killed_while_its_detach_waits_for_itself_dies() {
    use std::io::Write;
    let Some(_alone) = ready() else { return };
    let name = format!("flushing-{}", std::process::id());
    let (mut child, path, _dir) = server(&name, "write=4s");
    // Dirty pages of the loop device, which the detach flushes through the server.
    let holder = OpenOptions::new().write(true).open(&path).unwrap();
    holder.write_all_at(&[7; 65536], 0).unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    std::thread::sleep(Duration::from_millis(800));
    // It cannot end: it waits for itself. A guard cuts the knot.
    child.kill().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(fuse::clear_loop(&path, &name).unwrap());
    kill(&mut child);
    drop(holder);
    assert!(soon(|| !loops().contains(&name)), "{}", loops());
}
