//! Answers for bad luck: bottoms that shrink, fill up or fail, signals, kills, removal in use.

use std::path::Path;
use std::time::Duration;

use devsplice_e2e::{
    Disk, Group, Kind, MIB, Outcome, Process, Ran, Room, Running, call, engines,
    kernel_has_file_system, load, need, need_tool, wait_until,
};
use rustix::process::Signal;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("reads_behind_the_end_of_a_truncated_file_fail", move || truncated(kind));
    group.add("a_full_file_system_below_is_an_error_and_no_loss", move || full_below(kind));
    group.add("errors_below_surface_only_in_their_range", move || errors(kind));
    group.add("sigterm_under_load_ends_it_without_a_trace", move || signal(kind, Signal::TERM));
    group.add("sigint_under_load_ends_it_without_a_trace", move || signal(kind, Signal::INT));
    group.add("kill_9_under_load_is_cleaned_up_and_the_name_is_free", move || killed(kind));
    group.add("kill_9_while_it_starts_leaks_nothing", move || killed_at_start(kind));
    group.add("kill_9_while_mounted_leaks_nothing", move || killed_mounted(kind));
    group.add("kill_9_of_guard_and_server_is_cleaned_up_by_del", move || both_killed(kind, true));
    group.add("kill_9_of_guard_and_server_is_cleaned_up_by_add", move || both_killed(kind, false));
    group.add("del_while_mounted_is_refused_unless_forced", move || del_mounted(kind));
    group.add("del_under_load_is_refused_or_ends_the_clients", move || del_under_load(kind));
    group.add("a_request_stuck_below_is_reported_and_still_succeeds", move || stuck(kind));
}

/// A read or write of `len` bytes at `at` past the page cache.
fn dd(disk: &Disk<'_>, is_read: bool, at: u64, len: u64) -> Ran {
    let node = disk.node.display();
    let (at, len) = (at / 4096, len / 4096);
    let arguments = if is_read {
        [format!("if={node}"), "of=/dev/null".into(), format!("skip={at}"), "iflag=direct".into()]
    } else {
        [format!("of={node}"), "if=/dev/zero".into(), format!("seek={at}"), "oflag=direct".into()]
    };
    let rest = ["bs=4096".to_owned(), format!("count={len}"), "conv=notrunc".into()];
    call("dd", arguments.into_iter().chain(rest)).env("LC_ALL", "C").run()
}

/// The same, which must fail with that message of the system.
fn dd_fails(disk: &Disk<'_>, is_read: bool, at: u64, message: &str) {
    let ran = dd(disk, is_read, at, 4096);
    assert_ne!(ran.code, Some(0), "{} at {at} went well", if is_read { "read" } else { "write" });
    assert!(ran.err.contains(message), "no `{message}`: {}", ran.err);
}

fn truncated(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 8 * MIB, 0x42);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let _ = dd(&disk, true, 6 * MIB, 4096).ok();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(4 * MIB).unwrap();
    for at in [4 * MIB, 6 * MIB, 8 * MIB - 4096] {
        dd_fails(&disk, true, at, "Input/output error");
    }
    let into = room.path("copy");
    let arguments = [
        format!("if={}", disk.node.display()),
        format!("of={into}"),
        "bs=256k".into(),
        "iflag=direct".into(),
    ];
    let ran = call("dd", arguments).run();
    assert_ne!(ran.code, Some(0), "reading it all went well");
    let bytes = std::fs::read(into).unwrap();
    assert_eq!(bytes.len() as u64, 4 * MIB, "what lies in front of the end can be read");
    assert!(bytes.iter().all(|byte| *byte == 0x42), "bytes that nobody wrote");
    assert!(disk.count("errors") >= 3);
    disk.remove();
    Ok(())
}

fn full_below(kind: Kind) -> Outcome {
    let room = Room::new();
    let below = room.mount_point("below");
    let image = room.file("image", 12 * MIB);
    need_tool("mkfs.ext4")?;
    call("mkfs.ext4", ["-q", "-F", "-m", "0", &image]).ok();
    room.mount(&["-o", "loop", &image], &below);
    let file = below.join("a");
    std::fs::File::create(&file).unwrap().set_len(32 * MIB).unwrap();
    let disk = room.add(kind, &file.to_string_lossy(), &["--no-part-scan"]);
    let bytes = room.full_file("bytes", 4 * MIB, 0x99);
    let node = format!("of={}", disk.node.display());
    let first = [&format!("if={bytes}"), &node, "bs=64k", "conv=notrunc", "oflag=direct"];
    call("dd", first).ok();
    let rest = ["if=/dev/zero", &node, "bs=64k", "seek=64", "conv=notrunc", "oflag=direct"];
    let ran = call("dd", rest).env("LC_ALL", "C").run();
    assert_ne!(ran.code, Some(0), "32 MiB fitted into 12");
    let said = ["No space left on device", "Input/output error"];
    assert!(said.iter().any(|text| ran.err.contains(text)), "{}", ran.err);
    let copy = room.path("copy");
    let back = [
        format!("if={}", disk.node.display()),
        format!("of={copy}"),
        "bs=64k".into(),
        "count=64".into(),
        "iflag=direct".into(),
    ];
    call("dd", back).ok();
    assert!(std::fs::read(copy).unwrap() == std::fs::read(bytes).unwrap(), "data were lost");
    assert!(disk.count("errors") > 0);
    // What was refused is lost knowingly: a plain del is free to say so.
    let _ = disk.del(&["--force"]).ok();
    disk.is_gone_within(3);
    room.unmount(&below);
    Ok(())
}

fn errors(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let disk_with = |keys: &str| {
        room.add(kind, &format!("error({file}, at=1M, len=1M, {keys})"), &["--no-part-scan"])
    };
    // Whatever the error below, a loop device says EIO for most.
    let (space, time) =
        if kind.is_ublk() { ("No space left on device", "Connection timed out") } else { ("", "") };
    for (keys, is_read, message) in [
        ("read=EIO", true, "Input/output error"),
        ("write=EIO", false, "Input/output error"),
        ("write=ENOSPC", false, space),
        ("read=ETIMEDOUT", true, time),
    ] {
        let disk = disk_with(keys);
        for at in [0, MIB - 4096, 2 * MIB, 4 * MIB - 4096] {
            let _ = dd(&disk, is_read, at, 4096).ok();
        }
        for at in [MIB, 2 * MIB - 4096] {
            dd_fails(&disk, is_read, at, message);
            let _ = dd(&disk, !is_read, at, 4096).ok();
        }
        assert_eq!(disk.count("errors"), 2, "{keys}");
        let _ = disk.del(&["--force"]).ok();
    }
    need_tool("blkdiscard")?;
    // Over FUSE a discard is a promise of zeros.
    let discard = if kind.is_ublk() { "discard=EIO" } else { "zeroes=EIO" };
    for (keys, option) in [(discard, None), ("zeroes=EIO", Some("-z"))] {
        let disk = disk_with(keys);
        let node = disk.node.to_string_lossy().into_owned();
        let at = |at: &'static str| {
            let options = option.into_iter().chain(["-o", at, "-l", "64k", &node]);
            call("blkdiscard", options).run().code
        };
        assert_eq!(at("0"), Some(0), "{keys} in front of the range");
        assert_eq!(at("2M"), Some(0), "{keys} behind the range");
        if option.is_none() {
            assert_ne!(at("1M"), Some(0), "{keys} in the range");
        }
        // Zeroing falls back to writing zeros, which works.
        assert!(option.is_none() || at("1M").is_some());
        assert!(disk.count("errors") > 0, "{keys}");
        disk.remove();
    }
    let disk = room.add(kind, &format!("error({file}, flush=EIO)"), &["--no-part-scan"]);
    let _ = dd(&disk, false, 0, 4096).ok();
    let of = format!("of={}", disk.node.display());
    let synced = ["if=/dev/zero", &of, "bs=4096", "count=1", "conv=notrunc,fsync", "oflag=direct"];
    assert_ne!(call("dd", synced).run().code, Some(0), "fsync hides that the flush failed");
    let _ = disk.del(&["--force"]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// A disk over two files with fio at work on it.
fn disk_under_load(room: &Room, kind: Kind, seconds: u64) -> (Disk<'_>, Running) {
    let [a, b] = ["a", "b"].map(|name| room.file(name, 8 * MIB));
    let stack = format!("stripe({a}, {b})");
    let disk = room.add(kind, &stack, &["--recovery", "off"]);
    let before = disk.count("requests");
    let fio = load(room, &disk.node, seconds);
    wait_until(30, "requests", || disk.count("requests") > before + 200);
    (disk, fio)
}

fn signal(kind: Kind, signal: Signal) -> Outcome {
    engines()?;
    let room = Room::new();
    let (disk, fio) = disk_under_load(&room, kind, 40);
    let server = disk.server();
    let guard = disk.guard();
    server.signal(signal);
    server.ends_within(10);
    disk.is_gone_within(5);
    guard.ends_within(5);
    let ran = fio.finish();
    assert_ne!(ran.code, Some(0), "fio has noticed nothing: {}", ran.out);
    assert!(ran.took < Duration::from_secs(35), "fio went on for {:?}", ran.took);
    Ok(())
}

fn killed(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let (disk, fio) = disk_under_load(&room, kind, 40);
    let guard = disk.guard();
    disk.server().signal(Signal::KILL);
    disk.is_gone_within(10);
    guard.ends_within(5);
    let ran = fio.finish();
    assert_ne!(ran.code, Some(0), "fio has noticed nothing: {}", ran.out);
    assert!(ran.took < Duration::from_secs(35), "fio went on for {:?}", ran.took);
    let name = disk.name.clone();
    drop(disk);
    let stack = format!("stripe({}, {})", room.path("a"), room.path("b"));
    let again = room.add(kind, &stack, &["-n", &name]);
    let _ = dd(&again, true, 0, 4096).ok();
    again.remove();
    Ok(())
}

/// The kernel looks for partitions while a disk is added, and waits for what is slow below.
fn killed_at_start(kind: Kind) -> Outcome {
    let room = Room::new();
    let name = room.name();
    let arguments = room.add_arguments(kind, "delay(mem(64M), read=20s)", &["-n", &name]);
    let add = room.devsplice(arguments).start();
    let state = room.run.join(format!("{name}.json"));
    let known = || -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(&state).unwrap_or_default())
            .unwrap_or_default()
    };
    let number = |key: &str| known()[key].as_u64();
    let made = || number("ublk_id").or(number("fuse_connection"));
    wait_until(20, "a state of the disk that is being made", || made().is_some());
    let pid = u32::try_from(number("pid").unwrap_or(0)).unwrap();
    let over = || {
        let blocks = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let files = blocks.map(|entry| entry.path().join("loop/backing_file"));
        let mut texts = files.filter_map(|path| std::fs::read_to_string(path).ok());
        texts.any(|text| text.trim_end() == format!("/{name}"))
    };
    let id = number("ublk_id");
    if !kind.is_ublk() {
        wait_until(20, "a loop device", over);
        std::thread::sleep(Duration::from_millis(300));
    }
    let was_scanned = kind.is_ublk() || known()["device"] == "";
    Process(pid).signal(Signal::KILL);
    let node = |id: u64| [format!("/dev/ublkc{id}"), format!("/dev/ublkb{id}")];
    let is_there = |id: u64| node(id).iter().any(|path| Path::new(path).exists());
    wait_until(15, "the end of all of it", || {
        !Process(pid).lives() && !over() && !state.exists() && !id.is_some_and(is_there)
    });
    let ran = add.finish();
    need(was_scanned, "this kernel knows no partitions, so it does not look for them")?;
    assert!(kind.is_ublk() || ran.code == Some(1), "{:?}: {}", ran.code, ran.err);
    // Name and machine are as before.
    room.add(kind, "mem:64M", &["-n", &name]).remove();
    Ok(())
}

/// A disk with a mounted ext4 on it, and where that is.
fn mounted_disk(
    room: &Room,
    kind: Kind,
) -> Result<(Disk<'_>, std::path::PathBuf), devsplice_e2e::Skip> {
    need_tool("mkfs.ext4")?;
    need(kernel_has_file_system("ext4"), "this kernel mounts no ext4")?;
    let disk = room.add(kind, &room.file("a", 32 * MIB), &["--recovery", "off"]);
    let node = disk.node.to_string_lossy().into_owned();
    call("mkfs.ext4", ["-q", "-F", &node]).ok();
    let at = room.mount_point("mnt");
    room.mount(&[&node], &at);
    std::fs::write(at.join("first"), b"first").unwrap();
    call("sync", ["-f", &at.to_string_lossy()]).ok();
    Ok((disk, at))
}

/// Writes to a file and wants it on the disk; whether that went well.
fn writes(at: &Path) -> bool {
    let of = format!("of={}", at.join("second").display());
    let arguments = ["if=/dev/zero", &of, "bs=64k", "count=16", "conv=fsync"];
    call("dd", arguments).limit(40).run().code == Some(0)
}

fn killed_mounted(kind: Kind) -> Outcome {
    let room = Room::new();
    let (disk, at) = mounted_disk(&room, kind)?;
    assert!(writes(&at));
    let guard = disk.guard();
    disk.server().signal(Signal::KILL);
    disk.server().ends_within(5);
    assert!(!writes(&at), "a write went through to a disk without a server");
    room.unmount(&at);
    disk.is_gone_within(10);
    guard.ends_within(10);
    let file = room.path("a");
    drop(disk);
    let disk = room.add(kind, &file, &[]);
    room.mount(&[&disk.node.to_string_lossy()], &at);
    assert_eq!(std::fs::read(at.join("first")).unwrap(), b"first");
    room.unmount(&at);
    disk.remove();
    Ok(())
}

fn both_killed(kind: Kind, by_del: bool) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let disk = room.add(kind, &file, &["--recovery", "off"]);
    let (guard, server) = (disk.guard(), disk.server());
    guard.signal(Signal::KILL);
    wait_until(5, "the end of the guard", || !guard.lives());
    let _ = dd(&disk, true, 0, 4096).ok();
    server.signal(Signal::KILL);
    server.ends_within(5);
    if !by_del {
        // At once. Its lock goes with its last thread, after its process; here a good deal after.
        let state = room.run.join(format!("{}.json", disk.name)).display().to_string();
        let last = call("flock", [&state, "sleep", "0.6"]).start();
        std::thread::sleep(Duration::from_millis(200));
        let again = room.add(kind, &file, &["-n", &disk.name]);
        assert_ne!(again.server(), server);
        let _ = dd(&again, false, 0, 4096).ok();
        again.remove();
        assert!(disk.traces().is_empty(), "{:?}", disk.traces());
        drop(last);
        return Ok(());
    }
    wait_until(5, "a disk that is dead", || {
        let list = room.devsplice(["list"]).ok();
        list.contains(&disk.name) && list.contains("dead")
    });
    let doctor = room.devsplice(["doctor"]).run();
    assert!(doctor.out.contains(&format!("devsplice del {}", disk.name)), "{}", doctor.out);
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

fn del_mounted(kind: Kind) -> Outcome {
    let room = Room::new();
    let (disk, at) = mounted_disk(&room, kind)?;
    let refused = disk.del(&[]).ended_with(1);
    for word in [disk.name.as_str(), &at.to_string_lossy(), "--force"] {
        assert!(refused.err.contains(word), "no {word} in: {}", refused.err);
    }
    assert!(writes(&at), "the refusal has broken the disk");
    let _ = disk.del(&["--force"]).ok();
    assert!(!writes(&at), "a write went through to a disk that was removed");
    room.unmount(&at);
    disk.is_gone_within(10);
    let _ = call("e2fsck", ["-fy", &room.path("a")]).run();
    call("e2fsck", ["-fn", &room.path("a")]).ok();
    Ok(())
}

fn del_under_load(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let (disk, fio) = disk_under_load(&room, kind, 40);
    let ran = disk.del(&[]);
    if ran.code != Some(0) {
        assert_eq!(ran.code, Some(1), "{}", ran.err);
        let _ = disk.del(&["--force"]).ok();
    }
    disk.is_gone_within(5);
    let fio = fio.finish();
    assert!(fio.code != Some(0) && fio.took < Duration::from_secs(35), "{}", fio.out);
    Ok(())
}

fn stuck(kind: Kind) -> Outcome {
    let room = Room::new();
    let more = ["--stuck-after", "1", "--no-part-scan"];
    let disk = room.add(kind, "delay(mem(64M), read=4s)", &more);
    let from = format!("if={}", disk.node.display());
    let arguments = [from.as_str(), "of=/dev/null", "bs=4k", "count=1", "skip=5", "iflag=direct"];
    let reader = call("dd", arguments).limit(40).start();
    wait_until(15, "a report", || disk.count("stuck") > 0);
    // Kernels that look for partitions whatever they are told have been reported before.
    let line = "s: read of 4096 bytes at 20480";
    wait_until(15, "a line in the log", || disk.log().contains(line));
    assert!(disk.log().contains("has been below for"), "{}", disk.log());
    let ran = reader.finish().ok();
    assert!(ran.took >= Duration::from_millis(3500), "the delay was {:?}", ran.took);
    assert_eq!(disk.count("errors"), 0);
    disk.remove();
    Ok(())
}
