//! Answers for what a disk costs: nothing while it idles, little memory, no more time to make than
//! the kernel's own loop device.

use std::time::{Duration, Instant};

use devsplice_e2e::{
    Group, Kind, MIB, Outcome, Room, call, deep, engines, kernel_is, need_tool, skip,
};

/// KiB that the process of a disk may have resident.
const MEMORY_KIB: u64 = 20_000;
/// How often each of two ways is timed. What else runs only adds to a time.
const ROUNDS: usize = 25;

pub fn add(group: &mut Group, kind: Kind) {
    group.alone("an_idle_disk_uses_no_cpu_and_little_memory", move || idle(kind));
}

/// Once is enough, on a machine that has done nothing else yet.
pub fn add_first(group: &mut Group, kind: Kind) {
    if kind.is_ublk() {
        group.alone("add_takes_no_longer_than_losetup", move || add_against_losetup(kind));
    }
}

fn idle(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let [a, b] = ["a", "b"].map(|name| room.file(name, 64 * MIB));
    let disk = room.add(kind, &format!("stripe({a}, {b})"), &["--depth", "128"]);
    deep(&room, &disk.node, 128 * MIB);
    let (server, guard) = (disk.server(), disk.guard());
    let resident = || server.status_kib("VmRSS");
    eprintln!(
        "{}: resident {} KiB (most: {}), its guard {} KiB",
        kind.name(),
        resident(),
        server.status_kib("VmHWM"),
        guard.status_kib("VmRSS")
    );
    // What requests have used is given back after a second or two.
    let start = Instant::now();
    while resident() > MEMORY_KIB && start.elapsed() < Duration::from_secs(8) {
        std::thread::sleep(Duration::from_millis(500));
    }
    let after = resident();
    eprintln!("{}: resident {after} KiB after {:.1?}", kind.name(), start.elapsed());
    // Each entry of FUSE's io_uring has memory lent to the kernel, which may fill it at any time.
    let keeps_memory = matches!(kind, Kind::FuseUring(_)) && after > MEMORY_KIB;
    let line = format!("{after} KiB are resident, the bound is {MEMORY_KIB}");
    assert!(keeps_memory || after <= MEMORY_KIB, "{line}");
    // Ticks are samples; one can hit by chance, and io_uring's own workers live on for 5 s, and run
    // once more to end. What uses CPU while idle does so in each of five windows.
    let ticks = || (server.ticks(), guard.ticks());
    let is_quiet = || {
        let before = ticks();
        std::thread::sleep(Duration::from_secs(3));
        ticks() == before
    };
    assert!((0..5).any(|_| is_quiet()), "CPU was used while idle");
    // The machine of these kinds has nothing else to do. Before 6.15 a thread cannot say so.
    let waits = kind.is_ublk() && kernel_is(6, 15) && !(0..50).any(|_| nobody_waits_for_a_disk());
    assert!(!waits, "an idle server is counted as one that waits for a disk");
    // What was given back is there again when it is needed.
    deep(&room, &disk.node, 64 * MIB);
    assert_eq!(disk.count("errors"), 0);
    disk.remove();
    if keeps_memory { skip(line) } else { Ok(()) }
}

/// Whether no task of the machine is counted as I/O wait, now or in a moment.
fn nobody_waits_for_a_disk() -> bool {
    std::thread::sleep(Duration::from_millis(20));
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines().any(|line| line == "procs_blocked 0")
}

fn add_against_losetup(kind: Kind) -> Outcome {
    need_tool("losetup")?;
    let (ratio, line) = measure(kind);
    eprintln!("{line}");
    assert!(ratio <= 1.0, "{line}");
    Ok(())
}

/// The best of some rounds of each: the ratio, and all of it in words.
fn measure(kind: Kind) -> (f64, String) {
    let room = Room::new();
    let file = room.file("a", 64 * MIB);
    let (mut add, mut losetup) = (Duration::MAX, Duration::MAX);
    for _ in 0..ROUNDS {
        let name = room.name();
        let arguments = room.add_arguments(kind, &file, &["-n", &name]);
        let ran = room.devsplice(arguments).run().ok();
        add = add.min(ran.took);
        room.devsplice(["del", &name]).ok();
        let ran = call("losetup", ["--direct-io=on", "-f", "--show", &file]).run().ok();
        losetup = losetup.min(ran.took);
        call("losetup", ["-d", ran.out.trim()]).ok();
    }
    let ratio = add.as_secs_f64() / losetup.as_secs_f64();
    (ratio, format!("add {add:?}, losetup {losetup:?}, ratio {ratio:.2}"))
}
