//! Answers for what a server's process is kept from: waiting for its own disk, being killed or
//! dumped, holding mounts that nobody sees, and doing what it has no need to do.

use std::path::Path;

use devsplice_e2e::{
    Group, Kind, MIB, Mode, Outcome, Process, Room, Server, Setting, call, engines, mode, need,
    need_tool, program, verify, wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("server_and_guard_are_protected_from_a_lack_of_memory", move || memory(kind));
    group.add("a_limit_on_locked_memory_is_respected_and_said", move || limited(kind));
    group.alone("a_server_that_crashes_is_not_dumped", move || no_dump(kind));
    group.add("a_server_has_mounts_of_its_own_that_follow_the_machines", move || mounts(kind));
    group.add("every_thread_of_a_server_is_shut_in_and_no_guard", move || sandbox(kind));
    group.add("every_thread_of_a_server_of_many_is_shut_in", move || sandbox_of_many(kind));
    group.add("a_server_can_be_made_without_a_sandbox", move || no_sandbox(kind));
    group.add("a_server_shares_mounts_that_could_not_follow", move || shared_mounts(kind));
}

fn read(process: Process, file: &str) -> String {
    std::fs::read_to_string(format!("/proc/{}/{file}", process.0)).unwrap_or_default()
}

/// Files of all threads of a process. One that has just ended has none.
fn of_threads(process: Process, file: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.0)).unwrap();
    let read = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join(file)).ok();
    tasks.flatten().filter_map(read).collect()
}

/// Whether root has CAP_SYS_RESOURCE here: in some containers it has not.
fn has_resource_rights() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let rights = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    rights >> 24 & 1 == 1
}

fn memory(kind: Kind) -> Outcome {
    /// What PR_SET_IO_FLUSHER sets: PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE (include/linux/sched.h).
    const FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;
    let has_rights = has_resource_rights();
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 1 << 20), &[]);
    let threads = of_threads(disk.server(), "stat");
    assert!(threads.len() > 2, "{threads:?}");
    for stat in threads {
        let flags = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(6)).unwrap();
        let is_flusher = flags.parse::<u64>().unwrap() & FLUSHER == FLUSHER;
        assert_eq!(is_flusher, has_rights, "{stat}");
    }
    for process in [disk.server(), disk.guard()] {
        let is_spared = read(process, "oom_score_adj").trim() == "-1000";
        assert_eq!(is_spared, has_rights, "{process:?}");
        // All of what it has mapped is locked, not just what was there at the start.
        assert!(process.status_kib("VmLck") >= process.status_kib("VmRSS"), "{process:?}");
        let limits = read(process, "limits");
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
    }
    let info = disk.info();
    let word = |what: &str| info["protection"][what].as_str().unwrap().to_owned();
    assert_eq!([word("memory_locked"), word("no_core_dump")], ["on", "on"]);
    for what in ["io_flusher", "spared_when_out_of_memory"] {
        assert_eq!(word(what) == "on", has_rights, "{info}");
    }
    let is_warned = info["warnings"].to_string().contains("may be killed when memory runs out");
    assert_eq!(is_warned, !has_rights, "{info}");
    disk.remove();
    Ok(())
}

fn limited(kind: Kind) -> Outcome {
    need_tool("setpriv")?;
    need_tool("prlimit")?;
    let room = Room::new();
    let name = room.name();
    let add = room.add_arguments(kind, &room.file("a", 1 << 20), &["-n", &name]);
    let program = program().expect("a program");
    let mut line = vec!["--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock", "prlimit"];
    line.extend(["--memlock=8388608:8388608", program.to_str().unwrap()]);
    line.extend(add.iter().map(String::as_str));
    let ran = call("setpriv", line).env("DEVSPLICE_RUN", &room.run).run().ok();
    assert!(ran.err.contains("only 8192 KiB may be locked"), "{}", ran.err);
    let info = room.devsplice(["info", "--json", &name]).ok();
    let info: Value = serde_json::from_str(&info).unwrap();
    let word = info["protection"]["memory_locked"].as_str().unwrap();
    assert!(word.starts_with("off: only 8192 KiB"), "{word}");
    let server = Process(u32::try_from(info["pid"].as_u64().unwrap()).unwrap());
    assert_eq!(server.status_kib("VmLck"), 0);
    room.devsplice(["del", &name]).ok();
    Ok(())
}

/// The limit on core dumps does not keep the kernel from handing one to a program.
fn no_dump(kind: Kind) -> Outcome {
    need(mode() == Mode::Vm, "changes where this machine's core dumps go")?;
    let dumped = Path::new("/run/devsplice-was-dumped");
    let touch = format!("|/usr/bin/touch {}", dumped.display());
    let _pattern = Setting::change("/proc/sys/kernel/core_pattern", &touch);
    let crash = || call("sh", ["-c", "kill -ABRT $$"]).run();
    assert_eq!(crash().code, None);
    wait_until(10, "a dump of what may be dumped", || dumped.exists());
    std::fs::remove_file(dumped).unwrap();
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 1 << 20), &["--recovery", "off"]);
    disk.server().signal(Signal::ABORT);
    disk.is_gone_within(20);
    assert!(!dumped.exists(), "the server was dumped");
    Ok(())
}

/// Adds a disk from a shell that has mounts of its own, with this propagation; the server, and the
/// number of the shell's mounts. What is below the disk cannot be unmounted, what is mounted later
/// comes to the server and goes from it.
fn add_among(room: &Room, kind: Kind, propagation: &str, name: &str) -> (Process, String) {
    let (below, later) = (room.mount_point("below"), room.mount_point("later"));
    let (below, later) = (below.display(), later.display());
    let add = room.add_arguments(kind, &format!("{below}/a"), &["-n", name]).join(" ");
    let script = format!(
        "set -e; readlink /proc/self/ns/mnt; mount -t tmpfs below {below}; truncate -s 1M {below}/a
        {program} {add} >&2
        pid=$({program} info {name} --json | sed -n 's/^  \"pid\": \\([0-9]*\\).*/\\1/p')
        mount -t tmpfs later {later}; grep -c ' {later} ' /proc/$pid/mountinfo || true
        umount {later}; grep -c ' {later} ' /proc/$pid/mountinfo || true
        umount {below} 2>/dev/null && echo unmounted || echo busy; echo $pid",
        program = program().expect("a program").display(),
    );
    let call = call("unshare", ["-m", "--propagation", propagation, "sh", "-c", &script]);
    let out = call.env("DEVSPLICE_RUN", &room.run).limit(60).ok();
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[1..4], ["1", "0", "busy"], "{out}");
    (Process(lines[4].parse().unwrap()), lines[0].to_owned())
}

fn mounts(kind: Kind) -> Outcome {
    need_tool("unshare")?;
    let room = Room::new();
    let name = room.name();
    let (server, others) = add_among(&room, kind, "shared", &name);
    let own = std::fs::read_link(format!("/proc/{}/ns/mnt", server.0)).unwrap();
    assert_ne!(own.to_string_lossy(), others, "the server shares its maker's mounts");
    let info = room.devsplice(["info", "--json", &name]).ok();
    assert!(info.contains("\"own_mounts\": \"on\""), "{info}");
    room.devsplice(["del", &name]).ok();
    assert!(room.state().is_empty());
    Ok(())
}

/// Where the unmount of something would not reach the server's mounts, it would hold that for ever.
fn shared_mounts(kind: Kind) -> Outcome {
    need_tool("unshare")?;
    let room = Room::new();
    let name = room.name();
    let (server, others) = add_among(&room, kind, "private", &name);
    let own = std::fs::read_link(format!("/proc/{}/ns/mnt", server.0)).unwrap();
    assert_eq!(own.to_string_lossy(), others);
    let info = room.devsplice(["info", "--json", &name]).ok();
    assert!(info.contains("is no shared mount"), "{info}");
    room.devsplice(["del", &name]).ok();
    assert!(room.state().is_empty());
    Ok(())
}

/// A number of `status`, for each thread: name, number.
fn numbers(process: Process, what: &str) -> Vec<(String, u64)> {
    let statuses = of_threads(process, "status");
    let field = |status: &str, what: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{what}:")));
        line.unwrap_or_else(|| panic!("no {what} in {status}")).trim().to_owned()
    };
    let each = statuses.iter();
    each.map(|status| (field(status, "Name"), field(status, what).parse().unwrap())).collect()
}

fn sandbox(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 1 << 20), &[]);
    // Threads of the kernel that io_uring starts make no system calls.
    let all = |what: &str| {
        let mut all = numbers(disk.server(), what);
        all.retain(|(name, _)| !name.starts_with("iou-"));
        all
    };
    // 2: filters decide (include/uapi/linux/seccomp.h).
    let modes = all("Seccomp");
    assert!(modes.len() > 2 && modes.iter().all(|(_, mode)| *mode == 2), "{modes:?}");
    for (name, count) in all("Seccomp_filters") {
        let wanted = if name.starts_with("io/") { 3 } else { 2 };
        assert_eq!(count, wanted, "{name}");
    }
    // The guard may have to become a server, which opens files and has a guard of its own.
    assert!(numbers(disk.guard(), "Seccomp").iter().all(|(_, mode)| *mode == 0));
    let info = disk.info();
    assert_eq!(info["sandbox"]["process"], "on");
    let word = info["sandbox"]["io_threads"].as_str().unwrap();
    assert!(word.starts_with("on, system calls"), "{word}");
    assert!(room.devsplice(["info", &disk.name]).ok().contains(word));
    disk.remove();
    Ok(())
}

/// Its I/O threads make rings for disks that come later, and have helpers for some.
fn sandbox_of_many(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "2"]);
    let served = ["--server", &server.name, "--no-part-scan"];
    for stack in [room.file("a", 16 * MIB), "mem(size=16M)".to_owned(), "zero(size=1M)".to_owned()]
    {
        let disk = room.add(kind, &stack, &served);
        if disk.size() == 16 * MIB {
            verify(&room, &disk.node, 16 * MIB, "4k-64k");
        }
        let word = disk.info()["sandbox"]["io_threads"].clone();
        assert!(word.as_str().is_some_and(|word| word.starts_with("on, system calls")), "{word}");
        let mut counts = numbers(server.process(), "Seccomp_filters");
        counts.retain(|(name, _)| !name.starts_with("iou-"));
        for (name, count) in &counts {
            let wanted = if name.starts_with("io/") { 3 } else { 2 };
            assert_eq!(*count, wanted, "{name} of {counts:?}");
        }
        let refused = room.add_arguments(kind, "zero(size=2M)", &served);
        let refused = refused.iter().map(String::as_str).chain(["--sandbox", "off"]);
        let refused = room.refusal(refused);
        assert!(refused.contains("devsplice serve --sandbox off"), "{refused}");
        disk.remove();
    }
    server.end();
    let server = Server::start(&room, &["--sandbox", "off"]);
    let served = ["--server", &server.name, "--no-part-scan", "--sandbox", "off"];
    let disk = room.add(kind, "zero(size=1M)", &served);
    assert_eq!(disk.info()["sandbox"]["process"], "off: --sandbox off");
    let modes = numbers(server.process(), "Seccomp");
    assert!(modes.iter().all(|(_, mode)| *mode == 0), "{modes:?}");
    disk.remove();
    server.end();
    Ok(())
}

fn no_sandbox(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 1 << 20), &["--sandbox", "off"]);
    let modes = numbers(disk.server(), "Seccomp");
    assert!(modes.iter().all(|(_, mode)| *mode == 0), "{modes:?}");
    assert_eq!(disk.info()["sandbox"]["process"], "off: --sandbox off");
    assert!(!disk.info()["warnings"].to_string().contains("sandbox"));
    disk.remove();
    Ok(())
}
