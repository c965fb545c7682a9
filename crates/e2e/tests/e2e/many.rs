//! Answers for servers of many disks: no thread for each, what a disk costs, that all of them
//! outlive the server together.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use devsplice_e2e::{
    Group, Kind, MIB, Mode, Outcome, Process, Room, Server, Talk, call, engines, mode, need,
    need_tool, verify, wait_until,
};
use devsplice_uring::loopctl;
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::{Value, json};

/// I/O threads of the server.
const THREADS: usize = 2;
/// What other threads there may be: the main one, signals, control socket, and some clients.
const OTHERS: usize = 6;
/// Milliseconds that making a disk may take.
const ATTACH_MS: f64 = 10.0;
/// KiB of memory that an idle disk may keep.
const RESIDENT_KIB: u64 = 256;
/// How many times what the kernel takes for a loop device, where that is more: the machine has
/// other things to do then.
const ATTACH_LOOPS: f64 = 4.0;
/// How many times as long it takes in an emulated machine, where all of it is instructions.
const EMULATED: f64 = 10.0;

pub fn add(group: &mut Group, kind: Kind) {
    let count = if kind.is_ublk() { 64 } else { 20 };
    group.alone(&format!("many_{count}_disks_of_one_server"), move || many(kind, count));
    group.alone("many_others_make_a_disk_no_dearer", move || as_dear_as_the_first(kind));
    group.alone("many_a_busy_disk_keeps_no_other_waiting", move || fair(kind));
    group.add("many_a_mirror_among_other_disks", move || mirror(kind));
    group.add("many_one_is_served_by_nbd_time_and_again", move || by_nbd(kind));
    group.alone("many_what_a_dead_server_has_left_is_removed_by_gc", move || left(kind));
    group.add("many_a_server_waits_for_who_only_looks_at_its_seat", move || seat(kind));
    group.add("many_configurations_are_saved_and_loaded_whole", move || configuration(kind));
    if kind.is_ublk() {
        group.alone("many_a_server_that_is_shut_in_has_its_driver", move || driver(kind));
        group.add("many_disks_survive_their_server_and_its_upgrade", move || survive(kind));
        group.add("many_what_is_in_use_below_keeps_no_other_waiting", move || in_use_below(kind));
    }
}

/// A thousand: each front end, in the machine that can be thrown away afterwards, as loop devices
/// stay when they are free.
pub fn add_thousand(group: &mut Group, kind: Kind) {
    if mode() == Mode::Vm && std::env::var_os("DEVSPLICE_E2E_FULL").is_some() {
        group.alone("many_1000_disks_of_one_server", move || many(kind, 1000));
    }
}

/// One disk's file is somebody else's when the next server comes: after a death, and in an upgrade.
/// The others are served meanwhile, and that one when it can be.
fn in_use_below(kind: Kind) -> Outcome {
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let prefix = room.name();
    let mut talk = server.talk();
    let disks = [0, 2, 4].map(|number| talk.result("add", &wish(&room, kind, &prefix, number)));
    let is_kept = disks[0]["recovery"] == "reissue" || disks[0]["recovery"] == "fail";
    need(is_kept, "this kernel keeps no disk of a dead server")?;
    let (stuck, path) = (format!("{prefix}2"), room.dir.join(format!("{prefix}2")));
    let live = |pid: Process| {
        let list = room.devsplice(["list", "--json"]).ok();
        let list: Vec<Value> = serde_json::from_str(&list).unwrap();
        let is_live = |disk: &&Value| disk["state"] == "live" && disk["pid"] == json!(pid.0);
        let names = list.iter().filter(is_live).filter_map(|disk| disk["name"].as_str());
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    let others_then_it = |file: File, old: Process| {
        let mut now = old;
        wait_until(10, "the others are served", || {
            now = server.process();
            now != old && live(now).len() >= 2
        });
        assert!(!live(now).contains(&stuck), "it is served, and its file is somebody else's");
        drop(file);
        wait_until(15, "it is served, too", || live(now).len() == 3);
    };
    // Its guard would be quicker than anybody.
    let (old, file) = (server.process(), File::open(&path).unwrap());
    let guard = Process(old.children().first().copied().unwrap_or(0));
    guard.signal(Signal::STOP);
    old.signal(Signal::KILL);
    old.ends_within(10);
    wait_until(5, "the file is free", || {
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
    });
    guard.signal(Signal::CONT);
    others_then_it(file, old);
    // Who waits for it has it as soon as the server that lets go of its disks has not.
    let (old, file) = (server.process(), File::open(&path).unwrap());
    let waiter = std::thread::spawn(move || {
        flock(&file, FlockOperation::LockExclusive).unwrap();
        file
    });
    std::thread::sleep(Duration::from_millis(100));
    let said = room.devsplice(["upgrade", &format!("{prefix}0")]).limit(60).run().ended_with(0);
    assert!(said.err.contains(&format!("{stuck}: not taken over")), "{}", said.err);
    assert_eq!(said.out.lines().count(), 2, "{}", said.out);
    others_then_it(waiter.join().unwrap(), old);
    server.end();
    Ok(())
}

/// Nothing is looked through that grows with the number of disks: loop devices, say.
fn as_dear_as_the_first(kind: Kind) -> Outcome {
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let (process, prefix, mut talk) = (server.process(), room.name(), server.talk());
    let mut reads = Vec::new();
    for number in 0..20 {
        let wish = wish(&room, kind, &prefix, 2 * number);
        let before = process.reads();
        talk.result("add", &wish);
        reads.push(process.reads() - before);
    }
    println!("{}: calls to read, for each of 20 disks of a file: {reads:?}", kind.name());
    let [first, last] = [&reads[1..6], &reads[15..]].map(median_of);
    assert!(last <= first + 4, "{last} calls to read after {first}: {reads:?}");
    drop(talk);
    server.end();
    Ok(())
}

fn median_of(some: &[u64]) -> u64 {
    let mut some = some.to_vec();
    some.sort_unstable();
    some[some.len() / 2]
}

/// A disk of a server of many that a person has quiesced, when that server dies.
fn quiesced_across_a_death(
    room: &Room,
    server: &Server<'_>,
    quiet: &str,
    others_live: impl Fn() -> bool,
) {
    let _ = room.devsplice(["quiesce", quiet]).ok();
    let old = server.process();
    old.signal(Signal::KILL);
    old.ends_within(20);
    wait_until(60, "another server with the other disks", || {
        server.process() != old && others_live()
    });
    let info = || {
        let text = room.devsplice(["info", "--json", quiet]).run().out;
        serde_json::from_str::<Value>(&text).unwrap_or_default()
    };
    wait_until(20, "the next server has it", || info()["pid"] == json!(server.process().0));
    let info = info();
    assert_eq!(info["state"], "quiesced", "{info}");
    let stack = info["stack"].as_str().unwrap_or_default();
    let file = stack.trim_start_matches("file(").trim_end_matches(')');
    call("flock", ["-n", file, "true"]).ok();
    let _ = room.devsplice(["resume", quiet]).ok();
}

/// The same where server and guard are killed, and a person starts it again.
fn said_as_it_is(room: &Room, server: &Server<'_>, quiet: &str) {
    let _ = room.devsplice(["quiesce", quiet]).ok();
    let old = server.process();
    let guard = Process(old.children().first().copied().unwrap_or(0));
    for one in [guard, old] {
        one.signal(Signal::KILL);
        one.ends_within(20);
    }
    let said = room.devsplice(["serve", &server.name]).limit(120).ok();
    let of_quiet = format!("{quiet}: quiesced, as it was; devsplice resume {quiet} serves it");
    let is_of = |line: &str| line.starts_with(&format!("{quiet}: "));
    assert!(said.lines().filter(|line| is_of(line)).eq([of_quiet.as_str()]), "{said}");
    assert!(said.contains(": served again"), "{said}");
    let _ = room.devsplice(["resume", quiet]).ok();
}

/// Whoever looks whether a server runs takes its seat for a moment: one that starts then waits.
fn seat(kind: Kind) -> Outcome {
    need_tool("flock")?;
    let room = Room::new();
    let name = room.name();
    // The directory is there afterwards.
    Server::named(&room, name.clone(), &[]).end();
    let seat = room.run.join(format!("@{name}.server"));
    let taken_for = |seconds: &str| {
        let running = call("flock", [seat.to_str().unwrap(), "sleep", seconds]).start();
        let is_taken = |file: File| flock(file, FlockOperation::NonBlockingLockShared).is_err();
        wait_until(10, "a lock", || File::open(&seat).is_ok_and(is_taken));
        running
    };
    let looking = taken_for("1");
    let server = Server::named(&room, name.clone(), &[]);
    let _ = looking.finish().ok();
    server.talk().result("add", &wish(&room, kind, &room.name(), 1));
    server.end();
    let staying = taken_for("30");
    let said = room.devsplice(["serve", &name]).limit(20).run().ended_with(1).err;
    assert!(said.contains("runs already"), "{said}");
    drop(staying);
    let _ = std::fs::remove_file(&seat);
    Ok(())
}

/// A server that is shut in can load no module: the driver is there before that.
fn driver(kind: Kind) -> Outcome {
    need(mode() == Mode::Vm, "takes the driver away")?;
    need_tool("modprobe")?;
    let is_gone = call("modprobe", ["-r", "ublk_drv"]).run().code == Some(0);
    need(is_gone, "the driver is in use, or no module")?;
    let room = Room::new();
    let server = Server::start(&room, &["--sandbox", "on"]);
    let disk = server.talk().result("add", &wish(&room, kind, &room.name(), 1));
    assert!(disk["device"].as_str().is_some_and(|node| node.starts_with("/dev/ublkb")), "{disk}");
    server.end();
    Ok(())
}

/// What `add` is told for disk `number`: every other one of a file.
fn wish(room: &Room, kind: Kind, prefix: &str, number: usize) -> Value {
    let is_file = number.is_multiple_of(2);
    let stack = match is_file {
        true => room.file(&format!("{prefix}{number}"), 64 * MIB),
        false => "null(size=64M)".to_owned(),
    };
    let mut wish = json!({
        "stack": stack, "name": format!("{prefix}{number}"), "no_part_scan": true, "depth": 32,
    });
    let words = kind.arguments();
    for pair in words.chunks(2) {
        wish[pair[0].trim_start_matches("--").replace('-', "_")] = json!(pair[1]);
    }
    wish
}

fn io_threads(process: Process) -> (usize, usize) {
    let all = process.threads();
    (all.iter().filter(|(name, _)| name.starts_with("io/")).count(), all.len())
}

/// The middle one.
fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// How long the kernel takes to make a loop device over a file, in milliseconds.
fn bare_loop(file: &File) -> f64 {
    let open = |path: &str| File::options().read(true).write(true).open(path).unwrap();
    let start = Instant::now();
    let control = open("/dev/loop-control");
    let device = loop {
        let number = loopctl::free(control.as_fd()).unwrap();
        let device = open(&format!("/dev/loop{number}"));
        match loopctl::configure(device.as_fd(), file.as_fd(), 512, loopctl::DIRECT_IO, "e2e") {
            Ok(()) => break device,
            // Somebody else was faster.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{error}"),
        }
    };
    let took = start.elapsed();
    loopctl::clear(device.as_fd()).unwrap();
    took.as_secs_f64() * 1000.0
}

/// Makes disks; also how long it took for the one in the middle, in milliseconds, and what it may.
fn make(
    room: &Room,
    kind: Kind,
    (talk, prefix): (&mut Talk, &str),
    count: usize,
) -> (Vec<Value>, (f64, f64)) {
    let (mut took, mut disks, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    let file = File::options().read(true).write(true).open(room.file("bare", 64 * MIB)).unwrap();
    for number in 0..count {
        if number % 4 == 0 {
            bare.push(bare_loop(&file));
        }
        let wish = wish(room, kind, prefix, number);
        let start = Instant::now();
        disks.push(talk.result("add", &wish));
        took.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    let most = took.iter().copied().fold(0.0, f64::max);
    let some = (count / 10).max(1);
    let [first, last] = [&took[..some], &took[count - some..]].map(|some| median(some.to_vec()));
    let (middle, bare) = (median(took), median(bare));
    println!(
        "{}: {count} disks: attach {middle:.1} ms (median; of the first {first:.1} ms, of the last \
         {last:.1} ms), {most:.1} ms (most); the kernel's loop device {bare:.1} ms",
        kind.name()
    );
    let slow = if mode() == Mode::Vm { EMULATED } else { 1.0 };
    (disks, (middle, (ATTACH_MS * slow).max(bare * ATTACH_LOOPS)))
}

fn many(kind: Kind, count: usize) -> Outcome {
    engines()?;
    let room = Room::new();
    let server = Server::start(&room, &["--threads", &THREADS.to_string()]);
    let process = server.process();
    let empty = process.status_kib("VmRSS");
    let prefix = room.name();
    let (disks, (took, may)) = make(&room, kind, (&mut server.talk(), &prefix), count);
    assert!(took <= may, "a disk takes {took:.1} ms, more than {may:.1} ms");

    // What is put together before a first request is not put together again for the next.
    std::thread::sleep(Duration::from_secs(4));
    let (before, full) = (process.ticks(), process.status_kib("VmRSS"));
    std::thread::sleep(Duration::from_secs(3));
    let idle = process.ticks() - before;
    let (io, all) = io_threads(process);
    println!(
        "{}: {count} disks: {io} I/O threads of {all}, {idle} ticks in 3 s idle, {full} KiB \
         resident, {} KiB for each disk",
        kind.name(),
        full.saturating_sub(empty) / count as u64,
    );
    let each = full.saturating_sub(empty) / count as u64;
    assert!(each <= RESIDENT_KIB, "{each} KiB resident for each disk");
    assert_eq!(io, THREADS, "{:?}", process.threads());
    assert!(all <= THREADS + OTHERS, "{:?}", process.threads());
    assert!(idle <= 1, "{idle} ticks of an idle server");

    let files: Vec<_> = disks.iter().step_by(2).step_by((count / 8).max(1)).collect();
    std::thread::scope(|scope| {
        for disk in files.iter().take(4) {
            let node = disk["device"].as_str().unwrap_or_default();
            scope.spawn(|| verify(&Room::new(), node.as_ref(), 8 * MIB, "512-64k"));
        }
    });
    let list = room.devsplice(["list", "--json"]).ok();
    let list: Vec<Value> = serde_json::from_str(&list).unwrap();
    assert_eq!(list.len(), count);
    assert!(list.iter().all(|disk| disk["state"] == "live"), "{list:?}");

    let start = Instant::now();
    room.devsplice(["del", &format!("{prefix}0")]).ok();
    assert!(process.lives(), "the others' server has gone with one disk");
    server.end();
    println!("{}: {count} disks: gone in {:.1} s", kind.name(), start.elapsed().as_secs_f64());
    for disk in &disks {
        let node = disk["device"].as_str().unwrap_or_default();
        let name = disk["name"].as_str().unwrap_or_default();
        assert!(!std::path::Path::new("/dev/devsplice").join(name).is_symlink(), "{name}");
        if kind.is_ublk() {
            assert!(!std::path::Path::new(node).exists(), "{node}");
        }
    }
    Ok(())
}

/// Requests that come one at a time, while another disk of the same thread has all that it can do.
fn fair(kind: Kind) -> Outcome {
    engines()?;
    need(mode() == Mode::Native, "an emulated machine has no turns to spare for such a load")?;
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let add = |name: &str| {
        let more = ["--server", &server.name, "-n", name, "--no-part-scan"];
        room.add(kind, "null(size=64M)", &more)
    };
    let [busy, other] = [format!("{}busy", room.name()), format!("{}other", room.name())];
    let (busy, other) = (add(&busy), add(&other));
    let node = |node: &std::path::Path| format!("--filename={}", node.display());
    let common = ["--direct=1", "--rw=randread", "--bs=4k", "--ioengine=io_uring"];
    let deep =
        ["--name=deep", "--iodepth=32", "--numjobs=2", "--thread", "--time_based", "--runtime=30"];
    let load: Vec<_> = common.iter().chain(&deep).map(|word| (*word).to_owned()).collect();
    let load = call("fio", load.into_iter().chain([node(&busy.node)])).limit(60).start();
    wait_until(20, "load", || busy.count("requests") > 1000);
    let before = busy.count("requests");
    let few = ["--name=few", "--iodepth=1", "--number_ios=500", "--output-format=json"];
    let few: Vec<_> = common.iter().chain(&few).map(|word| (*word).to_owned()).collect();
    let said = call("fio", few.into_iter().chain([node(&other.node)])).limit(60).ok();
    let behind = busy.count("requests") - before;
    drop(load);
    let said: Value = serde_json::from_str(&said[said.find('{').unwrap()..]).unwrap();
    let read = &said["jobs"][0]["read"];
    assert_eq!(read["total_ios"], 500, "{said}");
    let (mean, most) = (read["clat_ns"]["mean"].as_f64(), read["clat_ns"]["max"].as_f64());
    let [mean, most] = [mean, most].map(|ns| ns.unwrap() / 1e6);
    println!(
        "{}: one request at a time takes {mean:.2} ms, {most:.1} ms at most, beside a disk that \
         was served {behind} requests meanwhile",
        kind.name()
    );
    // A turn of the other one is 64 requests: so many, and as many that came meanwhile, for each.
    assert!(behind / 500 <= 4 * 64, "{behind} requests of the busy disk for 500 of the other");
    busy.remove();
    other.remove();
    server.end();
    Ok(())
}

fn mirror(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let server = Server::start(&room, &["--threads", &THREADS.to_string()]);
    let prefix = room.name();
    let (_disks, _) = make(&room, kind, (&mut server.talk(), &prefix), 2);
    let (a, b) = (room.file("leg-a", 17 * MIB), room.file("leg-b", 17 * MIB));
    let stack = format!("mirror({a}, {b}, clean=200ms)");
    room.devsplice(["format", &stack]).ok();
    let name = format!("{prefix}mirror");
    let disk = room.add(kind, &stack, &["--server", &server.name, "-n", &name, "--no-part-scan"]);
    let tell = |words: &[&str]| room.devsplice(["tell", &name, "mirror"].iter().chain(words)).ok();
    let node = disk.node.clone();
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| verify(&Room::new(), &node, 16 * MIB, "4k-128k"));
        assert!(tell(&["check"]).contains(" 0 differing blocks"), "a mirror that is filled");
        tell(&["fail", "1"]);
        std::thread::sleep(Duration::from_millis(200));
        assert!(tell(&["add", "1"]).contains("by the log"));
        fio.join().expect("fio");
    });
    assert!(tell(&["check"]).contains(" 0 differing blocks"));
    // The server's log is for all of its disks, so each line says whose it is.
    let log = std::fs::read_to_string(room.run.join(format!("@{}.log", server.name))).unwrap();
    let dropped = log.lines().find(|line| line.contains("leg at port 1 dropped"));
    assert!(dropped.is_some_and(|line| line.contains(&format!(" {name}: "))), "{log}");
    disk.remove();
    server.end();
    Ok(())
}

/// Each client is a letter to an I/O thread, and so is each question for what is where.
fn by_nbd(kind: Kind) -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let prefix = room.name();
    let (_disks, _) = make(&room, kind, (&mut server.talk(), &prefix), 1);
    let (name, file, socket) = (format!("{prefix}nbd"), room.file("a", 4 * MIB), room.path("sock"));
    let listen = format!("unix:{socket}");
    let add = ["add", &file, "--server", &server.name, "-n", &name, "--listen", &listen];
    room.devsplice(add).ok();
    let export = format!("nbd+unix:///{name}?socket={socket}");
    for _ in 0..3 {
        let size = call("nbdinfo", ["--size", &export]).limit(20).ok();
        assert_eq!(size.trim(), (4 * MIB).to_string());
        let map = call("nbdinfo", ["--map", &export]).limit(20).ok();
        assert!(map.contains("hole"), "{map}");
    }
    room.devsplice(["del", &name]).ok();
    server.end();
    Ok(())
}

fn left(kind: Kind) -> Outcome {
    let room = Room::new();
    let server = Server::start(&room, &[]);
    let prefix = room.name();
    let (disks, _) = make(&room, kind, (&mut server.talk(), &prefix), 1);
    let thing = format!("@{}", server.name);
    let gc = |more: &[&str]| {
        let said = room.devsplice(["gc", "--json"].iter().chain(more)).ok();
        let said: Vec<Value> = serde_json::from_str(&said).unwrap();
        let of = |thing: &str| {
            said.iter().find(|one| one["thing"] == thing).map(|one| one["done"].clone())
        };
        (of(&thing), of(&format!("{prefix}0")))
    };
    assert_eq!(gc(&[]), (None, None), "a server that lives is none of its business");
    let process = server.process();
    let guards = process.children();
    for guard in &guards {
        Process(*guard).signal(Signal::KILL);
    }
    process.signal(Signal::KILL);
    process.ends_within(20);
    // They hold the server's state, too, until they have ended.
    guards.into_iter().for_each(|guard| Process(guard).ends_within(20));
    let (kept, would, removed) =
        (Some(json!("kept")), Some(json!("would be removed")), Some(json!("removed")));
    if disks[0]["recovery"] == "reissue" {
        wait_until(20, "a disk that waits", || gc(&["--dry-run"]) == (kept.clone(), kept.clone()));
        assert_eq!(gc(&["--waiting"]), (removed.clone(), removed));
    } else {
        assert_eq!(gc(&["--dry-run"]), (would.clone(), would));
        assert_eq!(gc(&[]), (removed.clone(), removed));
    }
    wait_until(5, "no state", || room.state().is_empty());
    Ok(())
}

fn configuration(kind: Kind) -> Outcome {
    let room = Room::new();
    let server = Server::start(&room, &[]);
    let mut talk = server.talk();
    let (prefix, names) = (room.name(), room.path("names.toml"));
    let _ = make(&room, kind, (&mut talk, &prefix), 4);
    // One whose places have names of their own, and options.
    let file = room.file("named", 64 * MIB);
    let text = format!(
        "stack = \"top\"\n[device.top]\ndriver = \"linear\"\noffset = \"1M\"\nbelow = [\"low\"]\n\
         [device.low]\ndriver = \"file\"\npath = \"{file}\"\n"
    );
    std::fs::write(&names, text).unwrap();
    let named = format!("{prefix}named");
    let export = kind.arguments();
    let mut words = vec!["add", &names, "--server", &server.name, "-n", &named, "-r"];
    words.extend(["--serial", "x 1", "--depth", "7"].iter().chain(&export));
    let _ = room.devsplice(words).ok();
    let saved = room.devsplice(["save"]).ok();
    assert!(saved.contains("depth = 7") && saved.contains("read-only = true"), "{saved}");
    assert!(saved.contains("device.low"), "{saved}");
    let config = room.path("all.toml");
    std::fs::write(&config, &saved).unwrap();
    assert_eq!(talk.result("save", &json!({})).as_str().unwrap().trim_end(), saved.trim_end());
    let name = server.name.clone();
    drop(talk);
    server.end();

    let server = Server::named(&room, name, &["--threads", "1", "--config", &config]);
    assert_eq!(room.devsplice(["save", "--server", &server.name]).ok(), saved);
    server.end();
    Ok(())
}

fn survive(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let server = Server::start(&room, &["--threads", &THREADS.to_string()]);
    let prefix = room.name();
    let (disks, _) = make(&room, kind, (&mut server.talk(), &prefix), 9);
    let is_kept = disks[0]["recovery"] == "reissue" || disks[0]["recovery"] == "fail";
    need(is_kept, "this kernel keeps no disk of a dead server")?;
    let node = disks[0]["device"].as_str().unwrap_or_default().to_owned();
    let all_live = |count: usize, pid: Process| {
        let list = room.devsplice(["list", "--json"]).ok();
        let list: Vec<Value> = serde_json::from_str(&list).unwrap();
        let is_ours = |disk: &&Value| disk["state"] == "live" && disk["pid"] == json!(pid.0);
        list.iter().filter(is_ours).count() == count
    };
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| {
            for _ in 0..3 {
                verify(&Room::new(), node.as_ref(), 16 * MIB, "512-128k");
            }
        });
        let old = server.process();
        old.signal(Signal::KILL);
        old.ends_within(20);
        let mut now = old;
        wait_until(60, "another server with all disks that the kernel has kept", || {
            now = server.process();
            now != old && all_live(9, now)
        });
        let said = room.devsplice(["upgrade", "--json", &format!("{prefix}1")]).limit(120).ok();
        let next = server.process();
        assert!(next != now && all_live(9, next), "{said}");
        assert_eq!(said.lines().count(), 9, "{said}");
        println!("{}: 9 disks upgraded: {}", kind.name(), said.lines().last().unwrap_or_default());
        let (io, all) = io_threads(next);
        assert!(io == THREADS && all <= THREADS + OTHERS, "{:?}", next.threads());
        fio.join().expect("fio notices nothing");
    });
    let quiet = format!("{prefix}2");
    quiesced_across_a_death(&room, &server, &quiet, || all_live(8, server.process()));
    said_as_it_is(&room, &server, &quiet);
    assert!(all_live(9, server.process()));
    verify(&room, disks[2]["device"].as_str().unwrap_or_default().as_ref(), 8 * MIB, "4k-64k");
    server.end();
    Ok(())
}
