//! Answers for crash replay of real file systems: what a flush has promised is there, whatever
//! moment the power goes.
//!
//! A workload runs on a file system over `log`, and says with a mark when each of its steps was
//! synced. Then the log is played back, and at every flush and every forced write a copy of what
//! the disk would be is mounted, read and checked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use devsplice_e2e::{
    Disk, Group, Kind, Log, MIB, Mode, Outcome, Room, call, kernel_has_file_system, mode, need,
    need_tool,
};

pub fn add(group: &mut Group, kind: Kind) {
    // Linux 7.3 crashes where XFS sends slab memory without a copy (`fuse::CAUTION`).
    let is_safe = |system: &&str| !(matches!(kind, Kind::FuseUring(_)) && **system == *"xfs");
    for system in ["ext4", "xfs", "btrfs"].into_iter().filter(is_safe) {
        let name = format!("{system}_survives_a_crash_at_every_flush");
        group.add(&name, move || crashes(kind, system));
    }
}

/// Steps of the workload: `DEVSPLICE_REPLAY_STEPS`, for long runs.
fn steps() -> usize {
    let set = std::env::var("DEVSPLICE_REPLAY_STEPS").ok().and_then(|text| text.parse().ok());
    set.unwrap_or(if mode() == Mode::Vm { 6 } else { 16 })
}

/// What files there are, with their contents.
type Files = BTreeMap<String, Vec<u8>>;

/// Bytes that tell which step wrote them.
fn contents(step: usize) -> Vec<u8> {
    let len = 1 + step * 7919 % 50_000;
    (0..len).map(|at| (step * 31 + at / 7 % 251) as u8).collect()
}

/// One step: makes a file; now and then renames or removes an older one, or writes over one. All
/// of it is synced on return.
fn step(number: usize, dir: &Path, files: &mut Files) {
    let put = |name: &str, files: &mut Files| {
        let bytes = contents(number);
        let mut file = File::create(dir.join(name)).unwrap();
        file.write_all(&bytes).unwrap();
        file.sync_all().unwrap();
        files.insert(name.to_owned(), bytes);
    };
    let oldest = files.keys().next().cloned();
    match (number % 4, oldest) {
        (1, Some(old)) => {
            let new = format!("renamed-{number}");
            std::fs::rename(dir.join(&old), dir.join(&new)).unwrap();
            let bytes = files.remove(&old).unwrap();
            files.insert(new, bytes);
        }
        (2, Some(old)) if files.len() > 2 => {
            std::fs::remove_file(dir.join(&old)).unwrap();
            files.remove(&old);
        }
        _ => put(&format!("file-{number}"), files),
    }
    File::open(dir).unwrap().sync_all().unwrap();
}

fn mkfs(system: &str, node: &Path) {
    let program = format!("mkfs.{system}");
    let quiet: &[&str] = if system == "ext4" { &["-q", "-F"] } else { &["-q", "-f"] };
    let node = node.to_string_lossy().into_owned();
    call(program, quiet.iter().copied().chain([node.as_str()])).limit(60).ok();
}

/// Checks a file system that is not mounted and whose journal is empty.
fn check(system: &str, image: &str, what: &str) {
    let ran = match system {
        "ext4" => call("e2fsck", ["-f", "-n", image]),
        "xfs" => call("xfs_repair", ["-n", "-f", image]),
        _ => call("btrfs", ["check", "--readonly", image]),
    };
    let ran = ran.limit(60).run();
    assert_eq!(ran.code, Some(0), "{what}: {}\n{}{}", ran.line, ran.out, ran.err);
}

fn mark(room: &Room, disk: &Disk<'_>, name: &str) {
    room.devsplice(["tell", &disk.name, "log", "mark", name]).ok();
}

/// Runs the workload: the log, and what there was after each step.
fn record(room: &Room, kind: Kind, system: &str, size: u64) -> (Log, Vec<Files>) {
    let (data, log) = (room.file("data", size), room.file("log", 1024 * MIB));
    let disk = room.add(kind, &format!("log({data}, {log})"), &["--no-part-scan"]);
    mkfs(system, &disk.node);
    call("blockdev", ["--flushbufs", &disk.node.to_string_lossy()]).ok();
    mark(room, &disk, "made");
    let dir = room.mount_point("mounted");
    room.mount(&["-t", system, &disk.node.to_string_lossy()], &dir);
    let mut files = Files::new();
    let mut states = vec![files.clone()];
    for number in 0..steps() {
        step(number, &dir, &mut files);
        mark(room, &disk, &format!("step-{number}"));
        states.push(files.clone());
    }
    room.unmount(&dir);
    disk.remove();
    let log = Log::open(&log);
    // All of it played back is the disk.
    let image = room.file("whole", size);
    let file = File::options().write(true).open(&image).unwrap();
    log.entries.iter().for_each(|entry| log.play(entry, &file));
    call("cmp", [&data, &image]).limit(120).ok();
    std::fs::remove_file(image).unwrap();
    (log, states)
}

/// What is in the directory of a mounted file system.
fn found(dir: &Path) -> Files {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
    files
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// What may be there when `now` was synced, and the step that leads to `next` was under way: what
/// both agree on must be there; each other file is as one of them has it, or half written.
fn judge(found: &Files, now: &Files, next: &Files, what: &str) {
    for (name, bytes) in now.iter().filter(|(name, bytes)| next.get(*name) == Some(bytes)) {
        let got = found.get(name);
        assert!(got.is_some(), "{what}: {name} was synced and is gone");
        assert!(got == Some(bytes), "{what}: {name} was synced and differs");
    }
    for (name, bytes) in found {
        assert!(
            now.contains_key(name) || next.contains_key(name),
            "{what}: {name} is from nowhere"
        );
        let whole = now.get(name).or(next.get(name));
        let is_new = !now.contains_key(name) && !now.values().any(|one| one == bytes);
        assert!(is_new || whole == Some(bytes), "{what}: {name} differs");
    }
    // A rename has one of the two names, and never loses what it names.
    for (name, bytes) in next.iter().filter(|(name, _)| !now.contains_key(*name)) {
        let old = now.iter().find(|(old, same)| !next.contains_key(*old) && *same == bytes);
        if let Some((old, _)) = old {
            let names = [found.get(name), found.get(old)];
            assert!(names.contains(&Some(bytes)), "{what}: {old} was lost on its way to {name}");
        }
    }
}

fn crashes(kind: Kind, system: &'static str) -> Outcome {
    need_tool(&format!("mkfs.{system}"))?;
    need_tool(match system {
        "ext4" => "e2fsck",
        "xfs" => "xfs_repair",
        _ => "btrfs",
    })?;
    need(kernel_has_file_system(system), &format!("this kernel has no {system}"))?;
    let room = Room::new();
    let size = if system == "ext4" { 48 } else { 320 } * MIB;
    let (log, states) = record(&room, kind, system, size);
    let image = room.file("image", size);
    let played = File::options().write(true).open(&image).unwrap();
    let (mut marks, mut points) = (0, 0);
    for (number, entry) in log.entries.iter().enumerate() {
        log.play(entry, &played);
        if entry.is_mark() {
            let name = if marks == 0 { "made".to_owned() } else { format!("step-{}", marks - 1) };
            assert_eq!(entry.name, name, "marks are in their order");
            marks += 1;
        }
        if entry.is_point() && marks > 0 {
            points += 1;
            let state = marks - 1;
            let next = &states[(state + 1).min(states.len() - 1)];
            let what = format!("{system}, entry {number} of {}, step {state}", log.entries.len());
            crash(&room, system, &image, (&states[state], next), &what);
        }
    }
    assert_eq!(marks, states.len(), "every mark is in the log");
    // At least one flush a step, or the file system promised without one.
    assert!(points >= steps(), "only {points} points in {} steps", steps());
    println!("{system}: {points} crash points, {} entries, all clean", log.entries.len());
    Ok(())
}

/// The power goes when the disk is as `image`: mounts a copy, reads it, checks it.
fn crash(room: &Room, system: &str, image: &str, (now, next): (&Files, &Files), what: &str) {
    let copy = room.path("copy");
    call("cp", ["--sparse=always", image, &copy]).limit(60).ok();
    let dir = room.mount_point("crashed");
    let options = if system == "xfs" { "loop,nouuid" } else { "loop" };
    room.mount(&["-t", system, "-o", options, &copy], &dir);
    judge(&found(&dir), now, next, what);
    room.unmount(&dir);
    check(system, &copy, what);
    std::fs::remove_file(copy).unwrap();
}
