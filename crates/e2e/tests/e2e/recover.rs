//! Answers for disks that outlive their servers: killed under load, upgraded, suspended, changed.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use devsplice_e2e::{
    Disk, Group, Kind, MIB, Mode, Outcome, PATHS, Process, Room, call, engines, kernel_is, mode,
    need, verify, wait_until,
};
use rustix::process::Signal;

/// Bytes that fio uses.
const SPAN: u64 = 16 * MIB;
/// Kills of each data path; with four of them, a hundred.
const KILLS: u32 = 25;
/// Upgrades of a disk under load.
const UPGRADES: u32 = 20;

pub fn add(group: &mut Group, kind: Kind, is_home: bool) {
    if is_home || !kind.is_ublk() {
        group.alone("kept_gc_removes_what_nobody_misses_and_keeps_the_rest", move || gc(kind));
    }
    if matches!(kind, Kind::FuseUring(_)) {
        group.add("kept_a_disk_over_io_uring_says_that_it_cannot_be_kept", move || not_kept(kind));
        return;
    }
    if kind == Kind::Fuse {
        group.add("kept_fio_verify_does_not_notice_that_servers_are_killed", move || {
            asks_again().and_then(|()| kills(kind))
        });
        group.add("kept_fio_verify_does_not_notice_upgrades", move || {
            asks_again().and_then(|()| upgrades(kind))
        });
        group.add("kept_a_program_that_does_not_start_upgrades_nothing", move || {
            asks_again().and_then(|()| bad_upgrade(kind))
        });
        group.add("kept_a_server_that_keeps_dying_is_let_be", move || {
            asks_again().and_then(|()| dying(kind))
        });
        group.add("kept_quiesce_holds_requests_and_resume_lets_them_go", move || {
            asks_again().and_then(|()| quiesce(kind))
        });
        group.add("kept_by_its_guard_alone_over_fuse", move || {
            asks_again().and_then(|()| by_guard(kind))
        });
        group.add("kept_a_server_without_a_guard_is_taken_over_by_one_with", move || {
            asks_again().and_then(|()| guarded_again(kind))
        });
        group.add("kept_a_disk_without_a_guard_is_not_let_go_of", move || {
            asks_again().and_then(|()| not_let_go(kind))
        });
        group.add("kept_a_disk_over_fuse_keeps_its_size", move || {
            asks_again().and_then(|()| keeps_size(kind))
        });
        group.add("kept_a_guard_that_comes_late_leaves_the_disk_to_the_next", move || {
            asks_again().and_then(|()| late_guard(kind))
        });
        group.add("kept_an_upgrade_that_fails_at_last_loses_nothing", move || {
            asks_again().and_then(|()| failed_at_last(kind))
        });
        group.add(
            "kept_a_successor_that_is_killed_before_it_has_the_disk_loses_nothing",
            move || asks_again().and_then(|()| killed_at_hand_over(kind)),
        );
        return;
    }
    group.add("kept_fio_verify_does_not_notice_that_servers_are_killed", move || kills(kind));
    if !is_home {
        return;
    }
    group.add("kept_fio_verify_does_not_notice_upgrades", move || upgrades(kind));
    group.add("kept_a_program_that_does_not_start_upgrades_nothing", move || bad_upgrade(kind));
    group.add("kept_recover_takes_over_when_the_guard_is_gone_too", move || by_hand(kind));
    group.add("kept_add_takes_back_what_waits_where_that_is_asked_for", move || taken_back(kind));
    group.add("kept_a_server_without_a_guard_is_taken_over_by_one_with", move || {
        guarded_again(kind)
    });
    group.add("kept_recover_with_another_stack_below_is_refused", move || wrong_stack(kind));
    group.add("kept_what_was_in_flight_fails_where_that_was_asked_for", move || policies(kind));
    group.add("kept_a_server_that_keeps_dying_is_let_be", move || dying(kind));
    group.add("kept_del_of_a_kept_disk_needs_force_while_it_is_mounted", move || del_kept(kind));
    group.add("kept_quiesce_holds_requests_and_resume_lets_them_go", move || quiesce(kind));
    group.add("kept_quiesce_waits_for_what_takes_longer_than_a_command_may", move || {
        quiesce_slowly(kind)
    });
    group.add("kept_fio_verify_does_not_notice_swaps", move || swaps(kind));
    group.add("kept_resize_tells_users_and_asks_before_it_cuts", move || resize(kind));
    group.add("kept_a_disk_in_memory_goes_with_its_server", move || in_memory(kind));
    group.add("kept_a_mirror_is_recovered_and_equal", move || mirror(kind));
}

/// Who serves it now.
pub(crate) fn server(disk: &Disk<'_>) -> Process {
    Process(disk.info()["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0))
}

/// What `list` says of its state.
pub(crate) fn state(room: &Room, disk: &Disk<'_>) -> String {
    let list = room.devsplice(["list", "--json"]).ok();
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let all = list.as_array().into_iter().flatten();
    let ours = all.into_iter().find(|one| one["name"] == *disk.name);
    ours.map_or_else(String::new, |one| one["state"].as_str().unwrap_or_default().to_owned())
}

/// Kills who serves the disk now, and waits for the next.
pub(crate) fn kill(room: &Room, disk: &Disk<'_>) {
    let old = server(disk);
    old.signal(Signal::KILL);
    old.ends_within(20);
    wait_until(30, "another server", || {
        let log = disk.log();
        assert!(!log.contains("tries again") && !log.contains("times soon after"), "{log}");
        let info = room.devsplice(["info", "--json", &disk.name]).run();
        let info: serde_json::Value = serde_json::from_str(&info.out).unwrap_or_default();
        info["state"] == "live" && info["pid"].as_u64() != Some(u64::from(old.0))
    });
}

/// Does something `count` times while fio writes and verifies, over and over.
pub(crate) fn under_verify(disk: &Disk<'_>, count: u32, mut each: impl FnMut(u32)) {
    let done = AtomicBool::new(false);
    let node = disk.node.clone();
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| {
            let mut moved = 0;
            while !done.load(Ordering::Relaxed) {
                moved += verify(&Room::new(), &node, SPAN, "512-128k").written;
            }
            moved
        });
        // Odd times, so that it does not keep hitting the same moment.
        for number in 0..count {
            // Ten deaths in a row within a second of the start would be taken for a bad server.
            let settle = if number % 6 == 5 { 1100 } else { 0 };
            std::thread::sleep(Duration::from_millis(u64::from(number * 37 % 160) + settle));
            each(number);
            if fio.is_finished() {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
        let moved = fio.join().expect("fio");
        assert!(moved >= SPAN / 2, "fio wrote {moved} bytes");
    });
}

fn kills(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let (a, b) = (room.file("a", SPAN), room.file("b", SPAN));
    let disk = room.add(kind, &format!("stripe({a}, {b})"), &["--no-part-scan"]);
    assert_eq!(disk.told["recovery"], "reissue");
    let mut killed = 0;
    under_verify(&disk, KILLS, |_| {
        kill(&room, &disk);
        killed += 1;
    });
    assert_eq!(killed, KILLS);
    verify(&room, &disk.node, SPAN, "512-1M");
    if !kind.copies() {
        assert_eq!(disk.count("bytes_copied"), 0);
    }
    let last = server(&disk);
    let _ = disk.del(&[]).ok();
    last.ends_within(5);
    disk.is_gone_within(5);
    Ok(())
}

fn upgrades(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", SPAN), &["--no-part-scan"]);
    let mut pauses = Vec::new();
    under_verify(&disk, UPGRADES, |_| {
        let old = server(&disk);
        let said = room.devsplice(["upgrade", "--json", &disk.name]).ok();
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["from"], old.0, "{said}");
        assert_eq!(said["to"], server(&disk).0, "{said}");
        old.ends_within(5);
        pauses.push(said["pause_ms"].as_f64().unwrap());
    });
    assert_eq!(pauses.len(), UPGRADES as usize);
    pauses.sort_by(f64::total_cmp);
    let (middle, worst) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    println!("pause of an upgrade under load: median {middle:.1} ms, worst {worst:.1} ms");
    assert!(worst <= 1000.0, "an upgrade paused for {worst} ms");
    if mode() == Mode::Native {
        assert!(middle <= 100.0, "upgrades paused for {middle} ms");
    }
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

fn bad_upgrade(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 4 * MIB), &[]);
    let old = server(&disk);
    for (program, reason) in [("/bin/false", "does not say"), ("/nonexistent", "No such file")] {
        let refused = room.refusal(["upgrade", &disk.name, "--binary", program]);
        assert!(refused.contains(reason) && refused.contains("goes on serving"), "{refused}");
    }
    // One that starts, and cannot open what is below: nothing has been touched by then.
    let (file, hidden) = (room.path("a"), room.path("hidden"));
    std::fs::rename(&file, &hidden).unwrap();
    let refused = room.refusal(["upgrade", &disk.name]);
    assert!(refused.contains(&file), "{refused}");
    std::fs::rename(&hidden, &file).unwrap();
    assert_eq!(server(&disk), old);
    call("dd", [&format!("if={}", disk.node.display()), "of=/dev/null", "count=8"]).ok();
    disk.remove();
    Ok(())
}

/// Kills the guard, then the server.
fn kill_both(room: &Room, disk: &Disk<'_>) {
    let (guard, server) = (disk.guard(), disk.server());
    guard.signal(Signal::KILL);
    wait_until(5, "the end of the guard", || !guard.lives());
    server.signal(Signal::KILL);
    server.ends_within(10);
    // Its threads may hold its lock a little longer.
    wait_until(10, "the end of its lock", || state(room, disk) != "live");
}

fn by_hand(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 8 * MIB, 0x5a);
    // It was called by a name that means something in one directory only.
    let disk = room.add(kind, "./a", &[]);
    kill_both(&room, &disk);
    wait_until(10, "the kernel holds it", || state(&room, &disk) == "waiting");
    let doctor = room.devsplice(["doctor"]).run();
    assert!(doctor.out.contains(&format!("devsplice recover {}", disk.name)), "{}", doctor.out);
    let taken = room.refusal(room.add_arguments(kind, &file, &["-n", &disk.name]));
    assert!(taken.contains("devsplice recover"), "{taken}");
    let into = room.path("copy");
    let dd = [format!("if={}", disk.node.display()), format!("of={into}"), "bs=64k".into()];
    let mut reader = call("dd", dd).start();
    std::thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_over(), "a read has ended without a server");
    room.devsplice(["recover", &disk.name]).dir(Path::new("/")).ok();
    assert_eq!(reader.finish().code, Some(0));
    assert!(std::fs::read(into).unwrap() == std::fs::read(&file).unwrap());
    let refused = room.refusal(["recover", &disk.name]);
    assert!(refused.contains("another process serves it"), "{refused}");
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// Guards are killed alone. A unit that has lost its guard is started again; a person may know.
fn guarded_again(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let file = room.file("a", SPAN);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let plain = room.refusal(room.add_arguments(kind, &file, &["-n", &disk.name]));
    assert!(plain.contains("is the name of a running disk"), "{plain}");
    let again = room.add_arguments(kind, &file, &["-n", &disk.name, "--or-recover"]);
    // What is not what was asked for is not taken for it.
    let export = if kind.is_ublk() { "fuse" } else { "ublk" };
    let another: [(&str, &[&str]); 3] = [
        ("--read-only", &["--read-only"]),
        ("--recovery", &["--recovery", "off"]),
        ("--export", &["--export", export]),
    ];
    for (what, more) in another {
        let mut words = match what {
            "--export" => {
                ["add", "-n", &disk.name, "--or-recover", &file].map(str::to_owned).into()
            }
            _ => again.clone(),
        };
        words.extend(more.iter().map(|&word| word.to_owned()));
        let old = server(&disk);
        let refused = room.refusal(words);
        assert!(refused.contains(&format!("a running disk with another {what}")), "{refused}");
        assert_eq!(server(&disk), old);
    }
    let guard = |server: Process| Process(server.children().first().copied().unwrap_or(0));
    let mut taken = 0;
    under_verify(&disk, 4, |number| {
        let old = server(&disk);
        guard(old).signal(Signal::KILL);
        wait_until(5, "the end of the guard", || !guard(old).lives());
        let said = match number % 2 {
            0 => room.devsplice(&again).ok(),
            _ => room.devsplice(["upgrade", &disk.name]).ok(),
        };
        let next = server(&disk);
        assert!(next != old, "{said}");
        assert!(guard(next).lives(), "nobody guards {next:?}: {said}");
        // And that one does what a guard is for.
        kill(&room, &disk);
        taken += 1;
    });
    assert_eq!(taken, 4);
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// Guards are killed alone. What may fail half-way is not begun then; and what is over all the same
/// leaves the disk such that another server, with a guard, can take it over.
fn not_let_go(kind: Kind) -> Outcome {
    let room = Room::new();
    let [a, b] = [("a", 0x5a), ("b", 0x77)].map(|(name, byte)| room.full_file(name, 4 * MIB, byte));
    let disk = room.add(kind, &a, &["--no-part-scan"]);
    let kill_guard = || {
        let guard = Process(server(&disk).children().first().copied().unwrap_or(0));
        guard.signal(Signal::KILL);
        wait_until(5, "the end of the guard", || !guard.lives());
    };
    let is_as = |file: &String| {
        drop(call("cmp", ["-n", "4194304", file, &disk.node.to_string_lossy()]).ok());
    };
    kill_guard();
    let old = server(&disk);
    for words in [vec!["swap", &disk.name, &b], vec!["quiesce", &disk.name]] {
        let refused = room.refusal(words);
        let says = |what: &str| refused.contains(what);
        let next = format!("devsplice upgrade {}", disk.name);
        assert!(says("its guard has died") && says(&next), "{refused}");
    }
    assert_eq!((server(&disk), state(&room, &disk)), (old, "live".to_owned()));
    assert_eq!(disk.info()["recovery"], "reissue");
    is_as(&a);
    room.devsplice(["upgrade", &disk.name]).ok();
    room.devsplice(["swap", &disk.name, &b]).ok();
    is_as(&b);
    kill(&room, &disk);
    is_as(&b);
    // It dies when the disk is held already.
    room.devsplice(["quiesce", &disk.name]).ok();
    kill_guard();
    assert!(room.devsplice(["resume", &disk.name]).ok().contains("served again"));
    let info = disk.info();
    assert!(info["warnings"].to_string().contains("nobody keeps the disk but"), "{info}");
    assert_eq!(info["recovery"], "reissue");
    is_as(&b);
    room.devsplice(["upgrade", &disk.name]).ok();
    kill(&room, &disk);
    is_as(&b);
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// What the disk cannot be is refused while it is served: there would be no way back from a stack
/// that has another size by now.
fn keeps_size(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 4 * MIB, 0x5a);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let resize = |size| std::fs::File::options().write(true).open(&file).unwrap().set_len(size);
    let other = room.file("b", 8 * MIB);
    resize(8 * MIB).unwrap();
    for words in [vec!["resize", &disk.name], vec!["swap", &disk.name, &other]] {
        let refused = room.refusal(words);
        assert!(refused.contains("keeps its size of 4M, the stack has 8M"), "{refused}");
        assert_eq!((disk.info()["state"].clone(), state(&room, &disk)), {
            (serde_json::json!("live"), "live".to_owned())
        });
        call("cmp", ["-n", "4194304", &file, &disk.node.to_string_lossy()]).limit(20).ok();
    }
    // As it was, and made to be that of the same size.
    room.devsplice(["swap", &disk.name, &format!("linear({file}, size=4M)")]).ok();
    call("cmp", ["-n", "4194304", &file, &disk.node.to_string_lossy()]).limit(20).ok();
    disk.remove();
    Ok(())
}

/// As a unit does that is started again after its server and its guard were killed.
fn taken_back(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 8 * MIB, 0x5a);
    let disk = room.add(kind, &file, &["--or-recover"]);
    let add = |stack: &str| room.add_arguments(kind, stack, &["-n", &disk.name, "--or-recover"]);
    let refused = room.refusal(add(&format!("linear({file}, size=4M)")));
    assert!(refused.contains("is the name of a running disk"), "{refused}");
    // Not held, as a mount would: merely open.
    let open = std::fs::File::open(&disk.node).unwrap();
    let is_told = disk.info()["features"].to_string().contains("safe-stop");
    kill_both(&room, &disk);
    wait_until(10, "the kernel holds it", || state(&room, &disk) == "waiting");
    if is_told {
        let refused = room.refusal(["del", &disk.name]);
        let says = |what: &str| refused.contains(what);
        assert!(says("is in use") && says("holds its requests"), "{refused}");
        assert_eq!(state(&room, &disk), "waiting", "a refusal changes nothing");
    }
    drop(open);
    let reader = call("cmp", ["-n", "8388608", &file, &disk.node.to_string_lossy()]).start();
    let said = room.devsplice(add(&file)).ok();
    assert!(said.contains(&*disk.node.to_string_lossy()), "{said}");
    assert_eq!(reader.finish().code, Some(0));
    // What it is made of by now counts, not what the unit says: it has users.
    let old = server(&disk);
    for one in [Process(old.children().first().copied().unwrap_or(0)), old] {
        one.signal(Signal::KILL);
        one.ends_within(10);
    }
    wait_until(10, "the kernel holds it", || state(&room, &disk) == "waiting");
    let served = room.devsplice(add(&format!("linear({file}, size=4M)"))).run();
    assert!(served.code == Some(0) && served.err.contains("as it was"), "{}", served.err);
    assert_eq!(disk.info()["size"], 8 * MIB);
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

fn wrong_stack(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 8 * MIB);
    let disk = room.add(kind, &file, &[]);
    kill_both(&room, &disk);
    let resize = |size| std::fs::File::options().write(true).open(&file).unwrap().set_len(size);
    resize(4 * MIB).unwrap();
    let refused = room.refusal(["recover", &disk.name]);
    assert!(refused.contains("a size of 8M, the stack 4M"), "{refused}");
    assert_eq!(state(&room, &disk), "waiting", "a refusal changes nothing");
    resize(8 * MIB).unwrap();
    room.devsplice(["recover", "--all"]).ok();
    assert_eq!(state(&room, &disk), "live");
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

fn policies(kind: Kind) -> Outcome {
    engines()?;
    for (policy, in_flight_fails, new_fail) in
        [("reissue", false, false), ("fail", true, false), ("fail-fast", true, true)]
    {
        let room = Room::new();
        let stack = format!("delay({}, read=1500ms)", room.file("a", 4 * MIB));
        let disk = room.add(kind, &stack, &["--no-part-scan", "--recovery", policy]);
        let read = |skip: &str| {
            let from = format!("if={}", disk.node.display());
            call("dd", [&from, "of=/dev/null", "bs=4k", "count=1", "iflag=direct", skip]).limit(30)
        };
        let first = read("skip=0").start();
        std::thread::sleep(Duration::from_millis(500));
        kill_both(&room, &disk);
        wait_until(10, "the kernel has it", || state(&room, &disk) == "waiting");
        let mut second = read("skip=8").start();
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(second.is_over(), new_fail, "{policy}: a new request without a server");
        room.devsplice(["recover", &disk.name]).ok();
        let (first, second) = (first.finish(), second.finish());
        assert_eq!(first.code != Some(0), in_flight_fails, "{policy}: {}", first.err);
        assert_eq!(second.code != Some(0), new_fail, "{policy}: {}", second.err);
        assert_eq!(read("skip=16").run().code, Some(0), "{policy}: after recovery");
        let _ = disk.del(&[]).ok();
        disk.is_gone_within(10);
    }
    Ok(())
}

fn dying(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 4 * MIB), &["--no-part-scan"]);
    // Each dies as soon as it is there, as one would that a request is too much for.
    let end = std::time::Instant::now() + Duration::from_secs(60);
    let file = room.run.join(format!("{}.json", disk.name));
    let mut killed = 0;
    while !disk.log().contains("has died 10 times soon after its start") {
        assert!(std::time::Instant::now() < end, "{killed} kills: {}", disk.log());
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let known: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let pid = known["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        if pid != 0 && Process(pid).lives() {
            // It may be gone by now.
            let _ = call("kill", ["-9", &pid.to_string()]).run();
            killed += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(killed >= 10);
    assert_eq!(state(&room, &disk), "waiting");
    room.devsplice(["recover", &disk.name]).ok();
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

fn del_kept(kind: Kind) -> Outcome {
    devsplice_e2e::need_tool("mkfs.ext4")?;
    need(devsplice_e2e::kernel_has_file_system("ext4"), "this kernel mounts no ext4")?;
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 32 * MIB), &[]);
    let node = disk.node.to_string_lossy().into_owned();
    call("mkfs.ext4", ["-q", "-F", &node]).ok();
    let at = room.mount_point("mnt");
    room.mount(&[&node], &at);
    std::fs::write(at.join("first"), b"first").unwrap();
    kill_both(&room, &disk);
    wait_until(10, "the kernel holds it", || state(&room, &disk) == "waiting");
    let refused = disk.del(&[]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("devsplice recover"), "{}", refused.err);
    room.devsplice(["recover", &disk.name]).ok();
    call("sync", ["-f", &at.to_string_lossy()]).ok();
    assert_eq!(std::fs::read(at.join("first")).unwrap(), b"first");
    room.unmount(&at);
    call("e2fsck", ["-f", "-n", &node]).ok();
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// The driver is asked again and again while the only tag is in flight: a command that is given up
/// after 20 seconds would be the last.
fn quiesce_slowly(kind: Kind) -> Outcome {
    let room = Room::new();
    let stack = format!("delay({}, write=23s)", room.file("a", 4 * MIB));
    let disk = room.add(kind, &stack, &["--no-part-scan", "--queues", "1", "--depth", "1"]);
    let to = format!("of={}", disk.node.display());
    let dd = ["if=/dev/zero", &to, "bs=4k", "count=1", "oflag=direct"];
    let writer = call("dd", dd).limit(60).start();
    std::thread::sleep(Duration::from_millis(500));
    let said = room.devsplice(["quiesce", &disk.name]).limit(60).ok();
    assert!(said.contains("is quiesced"), "{said}");
    assert_eq!(writer.finish().code, Some(0), "what was in flight was not finished");
    room.devsplice(["resume", &disk.name]).ok();
    assert_eq!(disk.count("errors"), 0);
    disk.remove();
    Ok(())
}

fn quiesce(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 4 * MIB), &["--no-part-scan"]);
    let tell = |word: &str| room.devsplice([word, &disk.name]).ok();
    assert!(tell("quiesce").contains("is quiesced"));
    assert_eq!(disk.info()["state"], "quiesced");
    assert_eq!(state(&room, &disk), "quiesced");
    // What is below is free for others meanwhile.
    call("flock", ["-n", &room.path("a"), "true"]).ok();
    let to = format!("of={}", disk.node.display());
    let mut writer = call("dd", ["if=/dev/zero", &to, "bs=64k", "count=4", "oflag=direct"]).start();
    std::thread::sleep(Duration::from_millis(400));
    assert!(!writer.is_over(), "a write has ended while the disk was quiesced");
    let refused = disk.del(&[]);
    assert!(refused.code == Some(1) && refused.err.contains("resume"), "{}", refused.err);
    assert!(room.refusal(["quiesce", &disk.name]).contains("already"));
    assert!(room.refusal(["upgrade", &disk.name]).contains("devsplice resume"));
    assert!(tell("resume").contains("served again"));
    assert_eq!(writer.finish().code, Some(0));
    assert!(room.refusal(["resume", &disk.name]).contains("not quiesced"));
    assert_eq!(disk.count("errors"), 0);
    // A person's wish outlives the server, too.
    let _ = tell("quiesce");
    let (old, guard) = (disk.server(), disk.guard());
    old.signal(Signal::KILL);
    if kind.is_ublk() {
        guard.ends_within(20);
    } else {
        // Nobody else keeps it.
        old.ends_within(20);
        wait_until(10, "it waits", || state(&room, &disk) == "waiting");
        assert!(guard.lives());
    }
    assert_eq!(state(&room, &disk), "waiting");
    let unit = room.add_arguments(kind, &room.path("a"), &["-n", &disk.name, "--or-recover"]);
    let refused = room.refusal(unit);
    assert!(refused.contains("is quiesced") && refused.contains("devsplice recover"), "{refused}");
    assert_eq!(state(&room, &disk), "waiting");
    call("flock", ["-n", &room.path("a"), "true"]).ok();
    room.devsplice(["recover", &disk.name]).ok();
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

fn swaps(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let a = room.file("a", SPAN);
    let disk = room.add(kind, &a, &["--no-part-scan"]);
    let stacks = [format!("linear({a})"), format!("stats(linear({a}))"), a.clone()];
    let mut swapped = 0;
    under_verify(&disk, 12, |number| {
        let stack = &stacks[number as usize % stacks.len()];
        let said = room.devsplice(["swap", &disk.name, stack]).ok();
        assert!(said.contains("file("), "{said}");
        let pays = kind == Kind::Ublk(PATHS[0]) && !stack.starts_with("stats");
        assert_eq!(disk.info()["low_depth"], pays, "{stack}");
        let refused = room.refusal(["swap", &disk.name, &room.path("nothing")]);
        assert!(refused.contains("No such file"), "{refused}");
        swapped += 1;
    });
    assert_eq!(swapped, 12);
    // What another holds is found out only when the old stack has been let go of.
    let (b, held) = (room.file("b", SPAN), room.name());
    let other = room.add(kind, &b, &["-n", &held]);
    let refused = room.refusal(["swap", &disk.name, &b]);
    assert!(refused.contains("nothing was changed"), "{refused}");
    other.remove();
    assert_eq!(disk.info()["stack"], format!("file({a})"));
    verify(&room, &disk.node, SPAN, "4k-64k");
    assert!(room.refusal(["swap", &disk.name, "mem:16M"]).contains("outlives"));
    let small = room.file("small", SPAN / 2);
    assert!(room.refusal(["swap", &disk.name, &small]).contains("--shrink"));
    disk.remove();
    Ok(())
}

fn resize(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let file = room.file("a", SPAN);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let set = |size| std::fs::File::options().write(true).open(&file).unwrap().set_len(size);
    let size = || {
        let text = call("blockdev", ["--getsize64", &disk.node.to_string_lossy()]).ok();
        text.trim().parse::<u64>().unwrap()
    };
    let tell = |more: &[&str]| room.devsplice(["resize", &disk.name].iter().chain(more)).run();
    assert!(tell(&[]).out.contains("already"));
    set(2 * SPAN).unwrap();
    let mut rounds = 0;
    under_verify(&disk, 1, |_| {
        assert_eq!(tell(&[]).code, Some(0));
        rounds += 1;
    });
    assert_eq!((rounds, size()), (1, 2 * SPAN));
    verify(&room, &disk.node, 2 * SPAN, "4k-64k");
    set(SPAN).unwrap();
    let refused = tell(&[]);
    assert!(refused.code == Some(1) && refused.err.contains("--shrink"), "{}", refused.err);
    assert_eq!(size(), 2 * SPAN);
    assert_eq!(tell(&["--shrink"]).code, Some(0));
    assert_eq!(size(), SPAN);
    assert_eq!(disk.info()["size"], SPAN);
    verify(&room, &disk.node, SPAN, "4k-64k");
    disk.remove();
    Ok(())
}

fn in_memory(kind: Kind) -> Outcome {
    let room = Room::new();
    room.add_refused(kind, "mem:4M", &["--recovery", "reissue"], &["goes with its server"]);
    let disk = room.add(kind, "mem:4M", &[]);
    assert_eq!(disk.told["recovery"], "off");
    for word in ["quiesce", "resize"] {
        assert_eq!(
            room.devsplice([word, &disk.name]).run().code,
            Some(i32::from(word != "resize"))
        );
    }
    assert!(room.refusal(["upgrade", &disk.name]).contains("goes with its server"));
    disk.server().signal(Signal::KILL);
    disk.is_gone_within(10);
    Ok(())
}

fn mirror(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let (a, b) = (room.file("leg-a", SPAN + MIB), room.file("leg-b", SPAN + MIB));
    let stack = format!("mirror({a}, {b}, clean=200ms)");
    room.devsplice(["format", &stack]).ok();
    let disk = room.add(kind, &stack, &["--no-part-scan"]);
    let in_sync = || {
        wait_until(60, "the mirror is in sync", || {
            disk.info()["layers"][0]["status"]["state"] == "in-sync"
        });
    };
    in_sync();
    let mut killed = 0;
    under_verify(&disk, 8, |_| {
        kill(&room, &disk);
        killed += 1;
    });
    assert_eq!(killed, 8);
    in_sync();
    let said = room.devsplice(["tell", &disk.name, "mirror", "check"]).ok();
    assert!(said.contains(" 0 differing blocks found"), "{said}");
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

fn not_kept(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let refused = ["--recovery", "reissue"];
    room.add_refused(kind, &file, &refused, &["io_uring are not sent again"]);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    for word in ["quiesce", "upgrade"] {
        let said = room.refusal([word, &disk.name]);
        assert!(said.contains("goes with its server") || said.contains("to go with"), "{said}");
    }
    disk.server().signal(Signal::KILL);
    disk.is_gone_within(10);
    Ok(())
}

/// FUSE sends requests again since Linux 6.9.
fn asks_again() -> Outcome {
    need(kernel_is(6, 9), "FUSE sends no request again before Linux 6.9")
}

/// A disk over FUSE, its guard, and what can go wrong.
fn by_guard(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 8 * MIB, 0x5a);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    for policy in ["fail", "fail-fast"] {
        room.add_refused(kind, &room.file("b", MIB), &["--recovery", policy], &["over FUSE"]);
    }
    // The stack is another one when the server dies: nothing is served, and nothing lost.
    let resize = |size| std::fs::File::options().write(true).open(&file).unwrap().set_len(size);
    resize(4 * MIB).unwrap();
    let old = server(&disk);
    old.signal(Signal::KILL);
    old.ends_within(20);
    wait_until(20, "the guard's failure", || disk.log().contains("tries again"));
    assert!(disk.log().contains("the stack size"), "{}", disk.log());
    assert_eq!(state(&room, &disk), "waiting");
    let into = room.path("copy");
    let dd = [format!("if={}", disk.node.display()), format!("of={into}"), "bs=64k".into()];
    let mut reader = call("dd", dd).start();
    std::thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_over(), "a read has ended without a server");
    resize(8 * MIB).unwrap();
    // What was cut off reads as zeros; that is what there is.
    room.devsplice(["recover", &disk.name]).ok();
    assert_eq!(reader.finish().code, Some(0));
    assert!(std::fs::read(into).unwrap() == std::fs::read(&file).unwrap());
    // Without a guard the connection ends with the server: plainly gone, with errors, not wedged.
    let (old, info) = (server(&disk), disk.info());
    let guard = Process(old.children().first().copied().unwrap_or(0));
    guard.signal(Signal::KILL);
    wait_until(5, "the end of the guard", || !guard.lives());
    old.signal(Signal::KILL);
    old.ends_within(10);
    let refused = room.refusal(["recover", &disk.name]);
    assert!(refused.contains("does not have it any more"), "{info}: {refused}");
    let _ = disk.del(&["--force"]);
    disk.is_gone_within(10);
    Ok(())
}

/// Who serves the disk is another by the time that the dead server's guard gets to it.
fn late_guard(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 8 * MIB, 0x5a);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let (guard, old) = (disk.guard(), server(&disk));
    guard.signal(Signal::STOP);
    old.signal(Signal::KILL);
    old.ends_within(10);
    room.devsplice(["recover", &disk.name]).ok();
    let next = server(&disk);
    guard.signal(Signal::CONT);
    guard.ends_within(5);
    assert_eq!(server(&disk), next);
    room.devsplice(["upgrade", &disk.name]).ok();
    assert!(server(&disk) != next);
    call("cmp", ["-n", "8388608", &file, &disk.node.to_string_lossy()]).ok();
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// The old server has no guard, and lets go of the disk before it is seen that none can serve it.
fn failed_at_last(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 8 * MIB, 0x5a);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let (guard, old) = (disk.guard(), server(&disk));
    guard.signal(Signal::KILL);
    wait_until(5, "the end of the guard", || !guard.lives());
    let resize = |size| std::fs::File::options().write(true).open(&file).unwrap().set_len(size);
    resize(4 * MIB).unwrap();
    let refused = room.refusal(["upgrade", &disk.name]);
    assert!(refused.contains("the stack size"), "{refused}");
    old.ends_within(10);
    wait_until(20, "the new guard's failure", || disk.log().contains("tries again"));
    wait_until(10, "a disk that is kept", || state(&room, &disk) == "waiting");
    let mut reader =
        call("cmp", ["-n", "8388608", &file, &disk.node.to_string_lossy()]).limit(40).start();
    std::thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_over(), "a read has ended without a server");
    // What was cut off reads as zeros.
    resize(8 * MIB).unwrap();
    room.devsplice(["recover", &disk.name]).ok();
    assert_eq!(reader.finish().code, Some(0));
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// The old server has no guard and is still waiting for what is below.
fn killed_at_hand_over(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 8 * MIB, 0x5a);
    let disk = room.add(kind, &format!("delay({file}, read=3s)"), &["--no-part-scan"]);
    let (guard, old) = (disk.guard(), server(&disk));
    guard.signal(Signal::KILL);
    wait_until(5, "the end of the guard", || !guard.lives());
    let from = format!("if={}", disk.node.display());
    let into = format!("of={}", room.path("copy"));
    let dd = [from.as_str(), &into, "bs=64k", "count=1", "iflag=direct"];
    let reader = call("dd", dd).limit(40).start();
    // It is on its way for longer than all of this takes.
    std::thread::sleep(Duration::from_millis(300));
    let upgrade = room.devsplice(["upgrade", &disk.name]).start();
    let next = || Process(upgrade.pid()).children().first().copied().map(Process);
    wait_until(5, "a successor and its guard", || {
        next().is_some_and(|next| !next.children().is_empty())
    });
    std::thread::sleep(Duration::from_millis(500));
    assert!(old.lives(), "it did not wait");
    next().expect("a successor").signal(Signal::KILL);
    assert_ne!(upgrade.finish().code, Some(0));
    old.ends_within(10);
    assert_eq!(reader.finish().code, Some(0));
    wait_until(10, "another server", || state(&room, &disk) == "live");
    assert_ne!(server(&disk), old);
    call("dd", dd).limit(40).ok();
    assert!(std::fs::read(room.path("copy")).unwrap().iter().all(|byte| *byte == 0x5a));
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(10);
    Ok(())
}

fn gc(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let gc = |more: &[&str]| room.devsplice(["gc"].iter().chain(more)).ok();
    let disk = room.add(kind, &file, &["--recovery", "off", "--no-part-scan"]);
    assert!(!gc(&[]).contains(&disk.name), "a disk that is served is none of its business");
    kill_both(&room, &disk);
    let doctor = room.devsplice(["doctor"]).run();
    assert!(doctor.out.contains(&format!("{}: its server is gone", disk.name)), "{}", doctor.out);
    let name = format!("would be removed: {}", disk.name);
    assert!(gc(&["--dry-run"]).contains(&name));
    assert!(disk.traces().len() > 1, "a dry run has removed something");
    assert!(gc(&[]).contains(&format!("removed: {}", disk.name)));
    disk.is_gone_within(10);
    drop(disk);
    // Its state is lost, too.
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    kill_both(&room, &disk);
    if kind.is_ublk() {
        wait_until(10, "the kernel holds it", || state(&room, &disk) == "waiting");
        assert!(gc(&[]).contains(&format!("kept: {}", disk.name)));
        assert_eq!(state(&room, &disk), "waiting");
    }
    std::fs::remove_file(room.run.join(format!("{}.json", disk.name))).unwrap();
    let node = disk.node.to_string_lossy().into_owned();
    if kind.is_ublk() {
        assert!(gc(&[]).contains("kept: /dev/ublkc"));
        assert!(gc(&["--foreign"]).contains("removed: /dev/ublkc"));
    } else {
        assert!(gc(&[]).contains(&format!("removed: {node}")));
    }
    wait_until(10, "the device's end", || !disk.is_attached());
    let _ = std::fs::remove_file(disk.link());
    for ending in ["sock", "log"] {
        let _ = std::fs::remove_file(room.run.join(format!("{}.{ending}", disk.name)));
    }
    if kind.is_ublk() {
        let disk = room.add(kind, &file, &["--no-part-scan"]);
        kill_both(&room, &disk);
        wait_until(10, "the kernel holds it", || state(&room, &disk) == "waiting");
        let said = gc(&["--waiting", "--json"]);
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let all = said.as_array().into_iter().flatten();
        let ours = all.into_iter().find(|one| one["thing"] == *disk.name);
        assert_eq!(ours.map(|one| one["done"].clone()), Some("removed".into()), "{said}");
        disk.is_gone_within(10);
    }
    Ok(())
}
