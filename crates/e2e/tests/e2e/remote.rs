//! Answers for disks of NBD servers: every byte of them, whatever becomes of the server, and what
//! commands do with their addresses.

use std::os::fd::AsRawFd;

use devsplice_e2e::{
    Group, Kind, MIB, Mode, Outcome, Process, Room, Running, Server, call, engines, mode,
    need_tool, verify, wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

use crate::nbd::{Served, verify_32_deep};
use crate::verify::counts_fit;

/// Bytes of a server's disk.
const SIZE: u64 = 32 * MIB;

pub fn add(group: &mut Group, kind: Kind) {
    if kind == Kind::FuseUring("fuse-uring") {
        return;
    }
    group.add("a_servers_disk_keeps_every_byte_under_fio_verify", move || every_byte(kind));
    // Over FUSE the rest is tested natively.
    if matches!(kind, Kind::FuseUring(_)) || (mode() == Mode::Vm && kind == Kind::Fuse) {
        return;
    }
    group.add("a_server_that_is_killed_and_comes_back_loses_no_write", move || killed(kind, false));
    group.add("a_disk_of_a_server_of_many_finds_its_own_again", move || killed(kind, true));
    group.add("a_server_that_is_frozen_is_left_and_found_again", move || frozen(kind));
    group.add("a_server_that_stays_away_fails_what_waits_for_it", move || away(kind));
    group.add("a_servers_errors_are_the_disks", move || errors(kind));
}

pub fn add_copies(group: &mut Group) {
    group.add("copy_compare_and_map_take_addresses", copies);
    group.add("a_server_in_brackets_ends_with_us", captive);
    group.add("a_server_that_is_slow_to_tell_is_let_go_of_by_quiesce", slow_to_tell);
    group.add("a_server_in_brackets_learns_nothing_of_our_sockets", kept_to_ourselves);
    group.add("a_socket_that_was_given_is_a_server_until_it_is_lost", given);
    group.add("a_disk_is_swapped_away_from_a_dead_server_and_others_live", swapped);
    group.add("addresses_that_lead_nowhere_are_refused_by_name", nowhere);
}

/// A server at a socket of the room.
pub struct Kit<'r> {
    room: &'r Room,
    arguments: Vec<String>,
    running: Option<Running>,
}

impl<'r> Kit<'r> {
    pub fn new(room: &'r Room, arguments: &[&str]) -> Kit<'r> {
        let arguments = arguments.iter().map(|&one| one.to_owned()).collect();
        let mut kit = Kit { room, arguments, running: None };
        kit.start();
        kit
    }

    fn socket(&self) -> String {
        self.room.path("kit.sock")
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket())
    }

    /// In an expression, with more keys.
    pub fn with(&self, keys: &str) -> String {
        format!("nbd(\"{}\", {keys})", self.uri())
    }

    pub fn start(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let socket = self.socket();
        let fixed = ["-f", "-U", socket.as_str()];
        let all = fixed.into_iter().chain(self.arguments.iter().map(String::as_str));
        self.running = Some(call("nbdkit", all).dir(&self.room.dir).limit(600).start());
        wait_until(20, "nbdkit listens", || std::path::Path::new(&self.socket()).exists());
    }

    fn process(&self) -> Process {
        Process(self.running.as_ref().map_or(0, Running::pid))
    }

    /// Starts it again if it has ended by itself: nbdkit 1.32 now and then aborts over a failed
    /// assertion when a client leaves amid its requests.
    fn revive(&mut self) {
        if self.running.as_mut().is_some_and(|running| running.is_over()) {
            self.start();
        }
    }

    pub fn kill(&mut self) {
        self.process().signal(Signal::KILL);
        drop(self.running.take());
    }
}

fn server(info: &Value) -> (u64, u64) {
    let server = &info["servers"][0];
    let number = |key: &str| server[key].as_u64().unwrap_or_else(|| panic!("{key}: {info:#}"));
    (number("connections"), number("reconnects"))
}

fn every_byte(kind: Kind) -> Outcome {
    engines()?;
    need_tool("nbdkit")?;
    let stacks =
        [("memory", "NBD"), ("memory", "SIMPLE"), ("file", "stripe(chunk=16k, NBD, FILE)")];
    for (plugin, stack) in stacks {
        let room = Room::new();
        let image = room.file("served.img", SIZE);
        let size = SIZE.to_string();
        let what = if plugin == "file" { image.as_str() } else { size.as_str() };
        let kit = Kit::new(&room, &[plugin, what]);
        let stack = stack.replace("SIMPLE", &kit.with("replies=simple"));
        let stack = stack.replace("NBD", &kit.uri()).replace("FILE", &room.file("b", SIZE));
        let disk = room.add(kind, &stack, &[]);
        let moved = verify(&room, &disk.node, 16 * MIB, "4k-256k");
        counts_fit(&disk, moved);
        assert_eq!(server(&disk.info()).1, 0);
        disk.remove();
    }
    Ok(())
}

/// fio writes and verifies, a round for each second or two.
fn fio(room: &Room, node: &std::path::Path, loops: u32) -> Running {
    let arguments = [
        "--name=verify".to_owned(),
        format!("--filename={}", node.display()),
        format!("--loops={loops}"),
        "--size=16m".to_owned(),
        "--rate=16m".to_owned(),
    ];
    let fixed = [
        "--direct=1",
        "--ioengine=io_uring",
        "--rw=randwrite",
        "--bsrange=4k-128k",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--fsync=50",
    ];
    let all = arguments.iter().map(String::as_str).chain(fixed);
    call("fio", all).dir(&room.dir).limit(120).start()
}

fn killed(kind: Kind, of_many: bool) -> Outcome {
    engines()?;
    need_tool("nbdkit")?;
    let room = Room::new();
    let image = room.file("served.img", SIZE);
    let mut kit = Kit::new(&room, &["file", &image]);
    let server_of_many = of_many.then(|| Server::start(&room, &["--threads", "1"]));
    let name = room.name();
    let more = server_of_many.iter().flat_map(|one| ["--server", &one.name, "-n", &name]);
    let disk = room.add(kind, &kit.uri(), &more.collect::<Vec<_>>());
    let mut running = fio(&room, &disk.node, 3);
    let mut kills = 0;
    while !running.is_over() {
        std::thread::sleep(std::time::Duration::from_millis(700));
        // Not while it is still looked for, however slow this machine is.
        if kills < 4 && server(&disk.info()).1 >= kills {
            kit.kill();
            std::thread::sleep(std::time::Duration::from_millis(100 << kills));
            kit.start();
            kills += 1;
        }
    }
    let said = running.finish().ok();
    assert!(said.out.contains("err= 0"), "{}", said.out);
    let info = disk.info();
    assert!(kills >= 2 && server(&info).1 >= 2, "{kills} kills: {info:#}");
    assert_eq!(info["counts"]["errors"], 0, "{info:#}");
    let events = info["events"].to_string();
    assert!(events.contains("connection lost") && events.contains("connected again"), "{events}");
    disk.remove();
    server_of_many.into_iter().for_each(Server::end);
    Ok(())
}

fn frozen(kind: Kind) -> Outcome {
    engines()?;
    need_tool("nbdkit")?;
    let room = Room::new();
    let image = room.file("served.img", SIZE);
    let mut kit = Kit::new(&room, &["file", &image]);
    let disk = room.add(kind, &kit.with("timeout=3s, on-loss=hold"), &[]);
    let mut running = fio(&room, &disk.node, 2);
    std::thread::sleep(std::time::Duration::from_millis(500));
    kit.process().signal(Signal::STOP);
    let lost = || disk.info()["events"].to_string().contains("has not answered");
    wait_until(20, "the server is left", lost);
    assert!(!running.is_over(), "{}", running.said());
    kit.process().signal(Signal::CONT);
    wait_until(120, "fio is done", || {
        kit.revive();
        running.is_over()
    });
    let said = running.finish().ok();
    assert!(said.out.contains("err= 0"), "{}", said.out);
    let info = disk.info();
    assert!(server(&info).1 >= 1, "{info:#}");
    assert_eq!(info["counts"]["errors"], 0, "{info:#}");
    disk.remove();
    Ok(())
}

fn away(kind: Kind) -> Outcome {
    need_tool("nbdkit")?;
    let room = Room::new();
    let image = room.full_file("served.img", SIZE, 7);
    let mut kit = Kit::new(&room, &["file", &image]);
    let disk = room.add(kind, &kit.with("reconnect-delay=1s"), &[]);
    let node = disk.node.display().to_string();
    let read = || {
        let from = format!("if={node}");
        let fixed = ["of=/dev/null", "bs=4k", "count=16", "skip=300", "iflag=direct"];
        call("dd", [from.as_str()].into_iter().chain(fixed)).limit(30).run().code
    };
    assert_eq!(read(), Some(0));
    kit.kill();
    assert_eq!(read(), Some(1), "what waits fails after a second");
    let info = disk.info();
    assert_eq!(server(&info).0, 0, "{info:#}");
    assert!(info["servers"][0]["last_error"].is_string(), "{info:#}");
    assert!(info["events"].to_string().contains("has been away"), "{info:#}");
    // Another disk at the same place is none of ours.
    std::fs::File::options().write(true).open(&image).unwrap().set_len(SIZE / 2).unwrap();
    kit.start();
    let refused = || disk.info()["events"].to_string().contains("another one by now");
    wait_until(20, "a disk of another size is refused", refused);
    assert_eq!(read(), Some(1));
    kit.kill();
    std::fs::File::options().write(true).open(&image).unwrap().set_len(SIZE).unwrap();
    kit.start();
    wait_until(20, "the server is found again", || server(&disk.info()).0 > 0);
    assert_eq!(read(), Some(0));
    disk.remove();
    Ok(())
}

fn errors(kind: Kind) -> Outcome {
    need_tool("nbdkit")?;
    let room = Room::new();
    let trigger = room.path("trigger");
    let file = format!("error-file={trigger}");
    let arguments = ["--filter=error", "memory", "32M", "error=ENOSPC", "error-rate=1", &file];
    let kit = Kit::new(&room, &arguments);
    let disk = room.add(kind, &kit.uri(), &[]);
    let to = format!("of={}", disk.node.display());
    let write = || {
        let fixed = ["if=/dev/zero", "bs=64k", "count=4", "oflag=direct"];
        call("dd", [to.as_str()].into_iter().chain(fixed)).limit(30).run()
    };
    let _ = write().ok();
    std::fs::write(&trigger, "").unwrap();
    let failed = write().ended_with(1);
    assert!(failed.err.contains("No space left"), "{}", failed.err);
    std::fs::remove_file(&trigger).unwrap();
    let _ = write().ok();
    assert_eq!(server(&disk.info()).1, 0, "an error is no loss of the server");
    disk.remove();
    Ok(())
}

fn copies() -> Outcome {
    need_tool("nbdkit")?;
    let room = Room::new();
    let image = room.full_file("image", 8 * MIB, 0x5a);
    let target = room.file("target.img", SIZE);
    let kit = Kit::new(&room, &["file", &target]);
    let uri = kit.uri();
    let _ = room.devsplice(["copy", "--verify", &image, &uri]).ok();
    let back = room.path("back");
    let _ = room.devsplice(["copy", &uri, &back]).ok();
    let found = std::fs::read(&back).unwrap();
    assert_eq!(found.len() as u64, SIZE);
    let (data, rest) = found.split_at(8 << 20);
    assert!(data.iter().all(|byte| *byte == 0x5a) && rest.iter().all(|byte| *byte == 0));
    let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&back).unwrap());
    assert!(allocated * 512 < 10 * MIB, "{allocated} sectors: the hole was filled");
    let _ = room.devsplice(["compare", &uri, &back]).ok();
    let map = room.devsplice(["map", "--json", &uri]).ok();
    let map: Value = serde_json::from_str(&map).unwrap();
    assert_eq!((&map[0]["start"], &map[0]["data"]), (&0.into(), &true.into()), "{map}");
    assert_eq!((&map[1]["start"], &map[1]["data"]), (&(8 * MIB).into(), &false.into()), "{map}");
    std::fs::write(&back, b"other").unwrap();
    let differs = room.devsplice(["compare", &uri, &image]).run();
    assert_eq!(differs.code, Some(0), "{}", differs.err);
    Ok(())
}

fn captive() -> Outcome {
    need_tool("nbdkit")?;
    let room = Room::new();
    let image = room.full_file("image", 4 * MIB, 0x33);
    let (pid, back) = (room.path("pid"), room.path("back"));
    let server = format!("[ nbdkit -P {pid} file {image} ]");
    let _ = room.devsplice(["copy", &server, &back]).ok();
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&image).unwrap());
    let ran = std::fs::read_to_string(&pid).unwrap();
    let ran = Process(ran.trim().parse().unwrap());
    wait_until(10, "the server has ended", || !ran.lives());
    let said = room.refusal(["copy", "[ ]", &back]);
    assert!(said.contains("names no program"), "{said}");
    let many = Server::start(&room, &[]);
    let listen = format!("unix:{}", room.path("nbd.sock"));
    let said = room
        .refusal(["add", &server, "--server", &many.name, "--listen", &listen, "-n", "captive"]);
    assert!(said.contains("starts no programs") && said.contains("without --server"), "{said}");
    many.end();
    Ok(())
}

/// A program that is started learns nothing of what was passed to us.
fn kept_to_ourselves() -> Outcome {
    let room = Room::new();
    let (script, seen) = (room.path("script"), room.path("seen"));
    let text = "#!/bin/sh\nenv > $1; ls -l /proc/$$/fd >> $1; echo end >> $1\n";
    std::fs::write(&script, text).unwrap();
    let secret = room.file("secret", MIB);
    let program = room.program.to_string_lossy().into_owned();
    let begin = "exec 3<$1 4<$1 5<$1 6<$1; shift; export LISTEN_PID=$$ LISTEN_FDS=4; exec \"$@\"";
    let stack = format!("[ sh {script} {seen} ]");
    let words = ["-c", begin, "sh", &secret, &program, "map", &stack];
    let call = call("sh", words).env("DEVSPLICE_RUN", &room.run).limit(60);
    let call = call.env("LISTEN_FDNAMES", "ours:ours").env("LISTEN_PIDFDID", "1");
    assert_eq!(call.run().code, Some(1), "it is no server");
    let text = || std::fs::read_to_string(&seen).unwrap_or_default();
    wait_until(10, "the program has run", || text().ends_with("end\n"));
    let seen = text();
    assert!(seen.contains("LISTEN_FDS=1\n"), "{seen}");
    for word in ["LISTEN_FDNAMES", "LISTEN_PIDFDID", "secret"] {
        assert!(!seen.contains(word), "{word}: {seen}");
    }
    Ok(())
}

/// Whoever asks the server for a client is waited for, but not for as long as the server likes.
fn slow_to_tell() -> Outcome {
    need_tool("nbdkit")?;
    need_tool("nbdinfo")?;
    let room = Room::new();
    let kit = Kit::new(&room, &["--filter=delay", "memory", "8M", "delay-extents=30"]);
    let (name, socket) = (room.name(), room.path("told.sock"));
    let listen = format!("unix:{socket}");
    let words = ["add", "-f", &kit.uri(), "-n", &name, "--listen", &listen];
    let served = room.devsplice(words).start();
    wait_until(20, "it is served", || std::path::Path::new(&socket).exists());
    let uri = format!("nbd+unix:///{name}?socket={socket}");
    let asks_server = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", served.pid())).unwrap();
        let of = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
        tasks.flatten().any(|task| of(task).is_ok_and(|name| name.trim() == "nbd/tell"))
    };
    wait_until(5, "it asks", asks_server);
    let asks = call("nbdinfo", ["--map", &uri]).limit(60).start();
    std::thread::sleep(std::time::Duration::from_millis(500));
    let begin = std::time::Instant::now();
    let _ = room.devsplice(["quiesce", &name]).ok();
    let took = begin.elapsed().as_secs_f32();
    assert!((3.0..12.0).contains(&took), "{took} s");
    wait_until(1, "what is below is let go of", || !asks_server());
    let _ = room.devsplice(["del", "--force", &name]).ok();
    let _ = served.finish();
    let _ = asks.finish();
    Ok(())
}

fn given() -> Outcome {
    need_tool("nbdkit")?;
    need_tool("nbdcopy")?;
    let room = Room::new();
    let image = room.full_file("image", 8 * MIB, 0x5a);
    let target = room.file("target.img", SIZE);
    let mut kit = Kit::new(&room, &["file", &target]);
    let give = || {
        let socket = std::os::unix::net::UnixStream::connect(kit.socket()).unwrap();
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty()).unwrap();
        let stack = format!("nbd(fd:{})", socket.as_raw_fd());
        (socket, stack)
    };
    let (socket, stack) = give();
    let _ = room.devsplice(["copy", &image, &stack]).ok();
    assert!(std::fs::read(&target).unwrap()[..8 << 20] == std::fs::read(&image).unwrap());
    drop(socket);
    let (socket, stack) = give();
    let many = Server::start(&room, &[]);
    let listen = format!("unix:{}", room.path("many.sock"));
    let to_many = ["add", &stack, "--server", &many.name, "-n", "given", "--listen", &listen];
    let said = room.refusal(to_many);
    assert!(said.contains("was given no socket"), "{said}");
    many.end();
    let served = Served::new(&room, &stack, &[]);
    drop(socket);
    verify_32_deep(&room, &served.uri, 8 * MIB)?;
    kit.kill();
    let begin = std::time::Instant::now();
    let read = call("nbdcopy", [&served.uri, "null:"]).limit(30).run();
    assert_ne!(read.code, Some(0), "it cannot be connected to again");
    assert!(begin.elapsed().as_secs() < 10, "{:?}", begin.elapsed());
    let info = served.info();
    assert_eq!(server(&info), (0, 0), "{info:#}");
    drop(served);
    for (stack, words) in [
        ("nbd(fd:2)", "from 3 on"),
        ("nbd(fd:999)", "started with a connected socket?"),
        ("nbd(fd:9, on-loss=hold)", "none comes after one that was given"),
    ] {
        let said = room.refusal(["map", stack]);
        assert!(said.contains(words), "{stack}: {said}");
    }
    Ok(())
}

/// What waits for a dead server, if need be for ever, keeps neither its disk from going elsewhere
/// nor its neighbour from being served.
fn swapped() -> Outcome {
    need_tool("nbdkit")?;
    need_tool("nbdcopy")?;
    let room = Room::new();
    let mut kit = Kit::new(&room, &["memory", &SIZE.to_string()]);
    let server = Server::start(&room, &["--threads", "1"]);
    let (pid, prefix) = (server.process().0, room.name());
    let add = |name: &str, stack: &str| {
        let (name, socket) = (format!("{prefix}{name}"), room.path(name));
        let listen = format!("unix:{socket}");
        room.devsplice(["add", stack, "--server", &server.name, "-n", &name, "--listen", &listen])
            .ok();
        (format!("nbd+unix:///{name}?socket={socket}"), name)
    };
    let (uri, name) = add("a", &kit.with("on-loss=hold"));
    let (other, other_name) = add("b", "mem:4M");
    kit.kill();
    let image = room.full_file("image", SIZE, 5);
    let copy = call("nbdcopy", [&image, &uri]).limit(60).start();
    let clients = || -> Value {
        serde_json::from_str(&room.devsplice(["info", "--json", &name]).ok()).unwrap()
    };
    wait_until(20, "a client is there", || clients()["clients"].as_u64() > Some(0));
    std::thread::sleep(std::time::Duration::from_millis(500));
    let next = format!("file(\"{}\", direct=off)", room.file("next.img", SIZE));
    let said = room.devsplice(["swap", &name, &next]).limit(60).ok();
    assert!(said.contains("next.img"), "{said}");
    assert_ne!(copy.finish().code, Some(0), "it was cut off");
    let _ = call("nbdcopy", [&image, &uri]).limit(60).ok();
    let back = room.path("back");
    let _ = call("nbdcopy", [&uri, &back]).limit(60).ok();
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&image).unwrap());
    let _ = call("nbdcopy", [&other, &back]).limit(60).ok();
    assert_eq!(server.process().0, pid);
    for name in [name, other_name] {
        room.devsplice(["del", &name]).ok();
    }
    server.end();
    Ok(())
}

fn nowhere() -> Outcome {
    let room = Room::new();
    let none = room.path("none.sock");
    for (stack, words) in [
        (format!("nbd+unix:///?socket={none}"), ["none.sock", "is the server there?"]),
        ("nbd://127.0.0.1:1/".to_owned(), ["127.0.0.1:1", "refused"]),
        ("nbd://".to_owned(), ["nbd://", "no host"]),
        (format!("nbd(\"unix:{none}\", on-loss=maybe)"), ["on-loss", "fail nor hold"]),
        (format!("nbd(\"unix:{none}\", replies=long)"), ["replies", "simple nor best"]),
    ] {
        let said = room.refusal(["map", &stack]);
        for word in words {
            assert!(said.contains(word), "{stack}: {said}");
        }
    }
    Ok(())
}
