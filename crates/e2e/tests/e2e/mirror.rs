//! Answers for mirrors from outside: made, degraded and rebuilt under load, killed, checked.

use devsplice_e2e::{
    Disk, Group, Kind, MIB, Outcome, PATHS, Room, call, engines, load, need_tool, verify,
    wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

use crate::nbd::Served;
use crate::remote::Kit;

/// Bytes of a leg.
const LEG: u64 = 33 * MIB;
/// Bytes that fio uses.
const SPAN: u64 = 32 * MIB;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("format_makes_a_mirror_and_asks_before_it_takes_one", move || format(kind));
    group.add("a_leg_goes_and_comes_back_under_fio_verify", move || leg_goes_and_comes(kind));
    group.add("a_failing_leg_is_dropped_and_no_byte_is_lost", move || failing_leg(kind));
    group.add("a_mirror_is_equal_again_after_kill_9_under_load", move || killed(kind));
    group.add("a_missing_leg_needs_a_word_and_a_new_one_is_filled", move || missing(kind));
    group.add("what_cannot_be_read_on_a_leg_is_written_anew_from_the_other", move || mended(kind));
    if kind == crate::home() {
        group.add("a_leg_whose_server_dies_is_dropped_and_comes_back", move || server_dies(kind));
        group.add("a_leg_whose_server_is_dead_does_not_keep_a_disk_over_nbd", quiesced);
    }
    group.add("check_and_repair_find_what_was_changed_behind_its_back", move || repair(kind));
    if PATHS[..2].iter().any(|path| kind == Kind::Ublk(path)) {
        group.add("kept_a_disk_that_becomes_a_mirror_has_its_pages_left_alone", move || {
            swapped_to(kind)
        });
    }
}

/// Two fresh legs and the mirror over them, formatted.
fn formatted(room: &Room) -> [String; 3] {
    let (a, b) = (room.file("leg-a", LEG), room.file("leg-b", LEG));
    let mirror = format!("mirror({a}, {b}, clean=200ms)");
    room.devsplice(["format", &mirror]).ok();
    [a, b, mirror]
}

fn status(disk: &Disk<'_>) -> Value {
    let info = disk.info();
    let layers = info["layers"].as_array().cloned().unwrap_or_default();
    let mirror = layers.into_iter().find(|one| one["layer"] == "mirror");
    mirror.unwrap_or_else(|| panic!("no mirror in {info:#}"))["status"].clone()
}

fn is(disk: &Disk<'_>, state: &str) -> bool {
    status(disk)["state"] == state
}

fn in_sync(disk: &Disk<'_>) {
    wait_until(60, "the mirror is in sync", || is(disk, "in-sync"));
}

fn tell(room: &Room, disk: &Disk<'_>, words: &[&str]) -> String {
    room.devsplice(["tell", &disk.name, "mirror"].iter().chain(words)).ok()
}

fn all_equal(room: &Room, disk: &Disk<'_>) {
    let said = tell(room, disk, &["check"]);
    assert!(said.contains(" 0 differing blocks found"), "{said}");
}

fn format(kind: Kind) -> Outcome {
    let room = Room::new();
    let (a, b) = (room.full_file("leg-a", LEG, 0x41), room.file("leg-b", LEG));
    let mirror = format!("mirror({a}, {b})");
    room.add_refused(kind, &mirror, &[], &["none of the devices has a mirror's metadata"]);
    let said = room.devsplice(["format", &mirror]).ok();
    assert!(said.contains("mirror of 2 devices"), "{said}");
    let refused = room.refusal(["format", &mirror]);
    assert!(refused.contains("already") && refused.contains("--force"), "{refused}");
    room.devsplice(["format", "--force", &mirror]).ok();
    let refused = room.refusal(["format", &format!("stripe({a}, {b})")]);
    assert!(refused.contains("nothing to format"), "{refused}");
    let disk = room.add(kind, &mirror, &["--no-part-scan"]);
    in_sync(&disk);
    if disk.info()["data_path"].as_str().is_some_and(|path| path.ends_with("register")) {
        assert_eq!(disk.queue("stable_writes"), "1", "legs get the same pages one by one");
    }
    disk.remove();
    let data = usize::try_from(LEG - (64 << 10)).unwrap();
    let [a, b] = [a, b].map(|path| std::fs::read(path).unwrap());
    assert!(a[..data].iter().all(|byte| *byte == 0x41), "the first leg's data is kept");
    assert!(a[..data] == b[..data], "and the second leg has it");
    Ok(())
}

fn swapped_to(kind: Kind) -> Outcome {
    let room = Room::new();
    let plain = room.file("plain", LEG - (64 << 10));
    let disk = room.add(kind, &plain, &["--no-part-scan"]);
    assert_eq!(disk.queue("stable_writes"), "0", "one place gets the pages");
    let [_, _, mirror] = formatted(&room);
    room.devsplice(["swap", &disk.name, &mirror]).ok();
    assert_eq!(disk.queue("stable_writes"), "1", "legs get the same pages one by one");
    let warnings = disk.info()["warnings"].to_string();
    assert!(warnings.contains("mount it anew"), "{warnings}");
    in_sync(&disk);
    verify(&room, &disk.node, SPAN, "512-64k");
    all_equal(&room, &disk);
    disk.remove();
    Ok(())
}

fn leg_goes_and_comes(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let [_, _, mirror] = formatted(&room);
    let disk = room.add(kind, &mirror, &["--no-part-scan"]);
    in_sync(&disk);
    let node = disk.node.clone();
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| verify(&Room::new(), &node, SPAN, "4k-128k"));
        for _ in 0..2 {
            std::thread::sleep(std::time::Duration::from_millis(300));
            let _ = tell(&room, &disk, &["fail", "1"]);
            assert!(is(&disk, "degraded"), "{}", status(&disk));
            std::thread::sleep(std::time::Duration::from_millis(300));
            let said = tell(&room, &disk, &["add", "1"]);
            assert!(said.contains("by the log"), "{said}");
            in_sync(&disk);
        }
        let moved = fio.join().expect("fio");
        assert!(moved.read > 0 && moved.written > 0);
    });
    all_equal(&room, &disk);
    verify(&room, &disk.node, SPAN, "512-64k");
    disk.remove();
    Ok(())
}

fn failing_leg(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let (a, b) = (room.file("leg-a", LEG), room.file("leg-b", LEG));
    let bad = format!("mirror(error({a}, at=8M, len=4k, write=EIO), {b}, clean=200ms)");
    room.devsplice(["format", &bad]).ok();
    let disk = room.add(kind, &bad, &["--no-part-scan"]);
    in_sync(&disk);
    verify(&room, &disk.node, SPAN, "4k-64k");
    // Whether fio has been there or not.
    let of = format!("of={}", disk.node.display());
    let bad = ["if=/dev/zero", &of, "bs=4k", "count=1", "seek=2048", "oflag=direct"];
    call("dd", bad.into_iter().chain(["conv=notrunc"])).ok();
    assert!(is(&disk, "degraded"), "{}", status(&disk));
    let events = disk.info()["events"].to_string();
    assert!(events.contains("leg at port 0 dropped: EIO"), "{events}");
    assert_eq!(disk.count("errors"), 0, "no client has seen it");
    disk.remove();
    // The leg is stale for good; with a sound disk below it comes back by the log.
    let disk = room.add(kind, &format!("mirror({a}, {b}, clean=200ms)"), &["--no-part-scan"]);
    assert!(is(&disk, "degraded"), "{}", status(&disk));
    assert!(tell(&room, &disk, &["add", "0"]).contains("by the log"));
    // A check waits for the leg that has just come.
    all_equal(&room, &disk);
    assert!(is(&disk, "in-sync"), "{}", status(&disk));
    disk.remove();
    Ok(())
}

/// A mirror of a file and of a server's, formatted: the files of both, and the expression.
fn formatted_with<'r>(room: &'r Room, keys: &str) -> (Kit<'r>, [String; 2], String) {
    let (a, b) = (room.file("leg-a", LEG), room.file("leg-b", LEG));
    let kit = Kit::new(room, &["file", &b]);
    let mirror = format!("mirror({a}, {}, clean=200ms)", kit.with(keys));
    room.devsplice(["format", &mirror]).ok();
    (kit, [a, b], mirror)
}

/// What both legs hold, but for the mirror's own.
fn same_data(legs: &[String; 2]) {
    let data = usize::try_from(LEG - (64 << 10)).unwrap();
    let [a, b] = legs.clone().map(|path| std::fs::read(path).unwrap());
    assert!(a[..data] == b[..data], "the legs differ");
}

/// A server that stays away for longer than it is waited for is a leg that has failed; when it is
/// back, the leg can come back, too.
fn server_dies(kind: Kind) -> Outcome {
    engines()?;
    need_tool("nbdkit")?;
    let room = Room::new();
    let (mut kit, legs, mirror) = formatted_with(&room, "reconnect-delay=1s");
    let disk = room.add(kind, &mirror, &["--no-part-scan"]);
    in_sync(&disk);
    let connections = || disk.info()["servers"][0]["connections"].as_u64();
    // Each I/O thread has one, and fails what goes to the leg until it has one again.
    let all = connections();
    let node = disk.node.clone();
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| verify(&Room::new(), &node, SPAN, "4k-128k"));
        std::thread::sleep(std::time::Duration::from_millis(300));
        kit.kill();
        let moved = fio.join().expect("fio");
        assert!(moved.read > 0 && moved.written > 0);
    });
    assert!(is(&disk, "degraded"), "{}", status(&disk));
    let events = disk.info()["events"].to_string();
    assert!(events.contains("has been away for 1 s"), "{events}");
    assert!(events.contains("leg at port 1 dropped: EIO"), "{events}");
    assert_eq!(disk.count("errors"), 0, "no client has seen it");
    let said = room.devsplice(["tell", &disk.name, "mirror", "add", "1"]).run();
    assert_ne!(said.code, Some(0), "the server is away: {}", said.out);
    verify(&room, &disk.node, SPAN, "4k-64k");
    kit.start();
    wait_until(30, "the server is found again", || connections() >= all);
    assert!(tell(&room, &disk, &["add", "1"]).contains("by the log"));
    verify(&room, &disk.node, SPAN, "4k-64k");
    in_sync(&disk);
    all_equal(&room, &disk);
    disk.remove();
    kit.kill();
    same_data(&legs);
    Ok(())
}

/// What waits for a dead server, if need be for ever, fails when a disk over NBD is quiesced: the
/// mirror has the leg dropped then, and what was answered is on the other.
fn quiesced() -> Outcome {
    need_tool("nbdkit")?;
    need_tool("nbdcopy")?;
    let room = Room::new();
    let (mut kit, legs, mirror) = formatted_with(&room, "on-loss=hold");
    let served = Served::new(&room, &mirror, &[]);
    let state = || {
        let layers = served.info()["layers"].clone();
        layers.as_array().and_then(|all| all.last().cloned()).unwrap_or_default()["status"].clone()
    };
    wait_until(60, "the mirror is in sync", || state()["state"] == "in-sync");
    let [old, new] = [3, 9].map(|byte| {
        let name = format!("image-{byte}");
        room.full_file(&name, 8 * MIB, byte)
    });
    let _ = call("nbdcopy", ["--flush", &old, &served.uri]).limit(60).ok();
    kit.kill();
    let mut copy = call("nbdcopy", ["--flush", &new, &served.uri]).limit(60).start();
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(!copy.is_over(), "it waits for the server: {}", copy.said());
    let _ = room.devsplice(["quiesce", &served.name]).limit(60).ok();
    assert_ne!(copy.finish().code, Some(0), "it was cut off");
    let said = room.refusal(["resume", &served.name]);
    assert!(said.contains("is the server there?"), "{said}");
    kit.start();
    let _ = room.devsplice(["resume", &served.name]).ok();
    assert_eq!(state()["state"], "degraded", "the leg is stale, and known to be");
    let add = ["tell", &served.name, "mirror", "add", "1"];
    assert!(room.devsplice(add).ok().contains("by the log"));
    let _ = call("nbdcopy", ["--flush", &new, &served.uri]).limit(60).ok();
    wait_until(60, "the mirror is in sync", || state()["state"] == "in-sync");
    served.remove();
    kit.kill();
    same_data(&legs);
    let image = std::fs::read(&new).unwrap();
    assert!(std::fs::read(&legs[1]).unwrap()[..image.len()] == image);
    Ok(())
}

fn killed(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let [_, _, mirror] = formatted(&room);
    for round in 0..3 {
        let disk = room.add(kind, &mirror, &["--no-part-scan", "--recovery", "off"]);
        in_sync(&disk);
        all_equal(&room, &disk);
        let fio = load(&room, &disk.node, 30);
        std::thread::sleep(std::time::Duration::from_millis(400 + 150 * round));
        disk.server().signal(Signal::KILL);
        disk.is_gone_within(30);
        let _ = fio.finish();
    }
    let disk = room.add(kind, &mirror, &["--no-part-scan"]);
    in_sync(&disk);
    all_equal(&room, &disk);
    disk.remove();
    Ok(())
}

fn missing(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let [a, b, mirror] = formatted(&room);
    let disk = room.add(kind, &mirror, &["--no-part-scan"]);
    in_sync(&disk);
    disk.remove();
    std::fs::remove_file(&b).unwrap();
    let one = format!("mirror({a}, clean=200ms)");
    room.add_refused(kind, &one, &[], &["leg 1 is in sync and missing", "degraded=on"]);
    let disk = room.add(kind, &format!("mirror({a}, degraded=on)"), &["--no-part-scan"]);
    verify(&room, &disk.node, SPAN, "4k-64k");
    disk.remove();
    let new = room.file("leg-new", LEG + MIB);
    let disk = room.add(kind, &format!("mirror({a}, {new}, clean=200ms)"), &["--no-part-scan"]);
    assert!(is(&disk, "degraded"), "{}", status(&disk));
    assert!(tell(&room, &disk, &["add", "1"]).contains("everything is being copied"));
    verify(&room, &disk.node, SPAN, "4k-64k");
    all_equal(&room, &disk);
    disk.remove();
    Ok(())
}

/// A leg that is a file, and too short, is a disk with bad blocks: it cannot be read there until it
/// is written.
fn mended(kind: Kind) -> Outcome {
    const TURN: usize = 256 << 10;
    let room = Room::new();
    let [a, b, mirror] = formatted(&room);
    let good: Vec<u8> = (0..LEG / 8).flat_map(|word| (word | 1 << 40).to_le_bytes()).collect();
    let data = usize::try_from(LEG - (64 << 10)).unwrap();
    let first = std::fs::File::options().write(true).open(&a).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&first, &good[..data], 0).unwrap();
    let disk = room.add(kind, &mirror, &["--no-part-scan"]);
    // Nothing is left that would be written behind the end.
    wait_until(60, "the mirror is clean", || {
        is(&disk, "in-sync") && status(&disk)["regions_dirty"] == 0
    });
    // The last turn is the second leg's.
    let at = data / TURN * TURN;
    assert_eq!(at / TURN % 2, 1);
    std::fs::File::options().write(true).open(&b).unwrap().set_len(at as u64).unwrap();
    let node = disk.node.display();
    let copy = room.path("copy");
    let words = [format!("if={node}"), format!("of={copy}"), format!("skip={}", at / TURN)];
    let read = || {
        let more = ["bs=256k".to_owned(), "iflag=direct".to_owned()];
        call("dd", words.iter().chain(&more)).ok();
        std::fs::read(&copy).unwrap()
    };
    assert!(read() == good[at..data], "the client has the other leg's bytes");
    let leg = std::fs::read(&b).unwrap();
    assert!(leg.len() >= data && leg[at..data] == good[at..data], "and now the leg has them, too");
    assert!(status(&disk)["blocks_repaired"].as_u64() > Some(0), "{}", status(&disk));
    assert!(is(&disk, "in-sync"), "{}", status(&disk));
    let events = disk.info()["events"].to_string();
    assert!(events.contains("of port 1 were unreadable (EIO) and are written anew"), "{events}");
    assert_eq!(disk.count("errors"), 0, "no client has seen it");
    // From the leg itself.
    assert!(read() == good[at..data]);
    all_equal(&room, &disk);
    disk.remove();
    Ok(())
}

fn repair(kind: Kind) -> Outcome {
    let room = Room::new();
    let [_, b, mirror] = formatted(&room);
    let disk = room.add(kind, &mirror, &["--no-part-scan"]);
    in_sync(&disk);
    disk.remove();
    let file = std::fs::File::options().write(true).open(&b).unwrap();
    for at in [0, 5 * MIB + 4095, LEG - (64 << 10) - 1] {
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", at).unwrap();
    }
    let disk = room.add(kind, &mirror, &["--no-part-scan"]);
    let said = tell(&room, &disk, &["check"]);
    assert!(said.contains(" 3 differing blocks found"), "{said}");
    let said = tell(&room, &disk, &["repair"]);
    assert!(said.contains(" 3 differing blocks repaired"), "{said}");
    all_equal(&room, &disk);
    disk.remove();
    Ok(())
}
