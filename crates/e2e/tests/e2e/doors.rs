//! Answers for the less common ways into a disk over NBD: sockets that systemd has passed, and
//! vsock.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;

use devsplice_e2e::{Call, Group, MIB, Outcome, Process, Room, call, need, need_tool, wait_until};
use serde_json::Value;

pub fn add(group: &mut Group) {
    group.add("who_starts_it_with_a_socket_is_served_there", started_with_a_socket);
    group.add("systemd_starts_it_when_the_first_client_comes", activated);
    group.add("a_socket_that_nobody_has_passed_is_refused_by_name", not_passed);
    group.add("a_passed_socket_is_one_disks_at_a_time", one_disks);
    group.add("clients_of_this_machine_come_in_over_vsock", vsock);
    group.add("a_disk_that_has_grown_is_seen_so_by_clients_that_come_anew", grown);
    group.add("clients_of_a_quiesced_disk_wait_until_it_goes_on", quiesced);
}

/// A call of a client, which starts the server itself where its arguments say so.
fn client(room: &Room, name: &str, arguments: &[&str]) -> Call {
    call(name, arguments).env("DEVSPLICE_RUN", &room.run).dir(&room.dir).limit(60)
}

fn export(text: &str) -> Value {
    // A server that its client has started writes to the same place, where it is reached.
    let start = text.find('{').unwrap_or(0);
    let told: Value =
        serde_json::from_str(&text[start..]).unwrap_or_else(|e| panic!("{e}: {text}"));
    told["exports"][0].clone()
}

/// libnbd starts a server as systemd would: the judge of what such a server has to do.
fn started_with_a_socket() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let (name, program) = (room.name(), room.program.to_string_lossy().into_owned());
    for listen in ["systemd:", "systemd:disk"] {
        let words = [
            "--json",
            "--",
            "[",
            "env",
            "LISTEN_FDNAMES=disk",
            &program,
            "add",
            "-f",
            "-n",
            &name,
            "--listen",
            listen,
            "mem:8M",
            "]",
        ];
        let found = export(&client(&room, "nbdinfo", &words).ok());
        assert_eq!(found["export-size"], 8 << 20, "{listen}: {found}");
        // Who comes over a socket of this machine may write.
        assert_eq!(
            (&found["is_read_only"], &found["can_fast_zero"]),
            (&false.into(), &true.into())
        );
        wait_until(20, "the server has gone with its client", || {
            room.devsplice(["list", "--json"]).ok().trim() == "[]"
        });
    }
    Ok(())
}

fn activated() -> Outcome {
    need_tool("nbdinfo")?;
    need_tool("systemd-socket-activate")?;
    let room = Room::new();
    let (name, program) = (room.name(), room.program.to_string_lossy().into_owned());
    let (socket, run) = (room.path("door"), format!("DEVSPLICE_RUN={}", room.run.display()));
    let words = [
        "-l",
        &socket,
        "-E",
        &run,
        "--fdname=door",
        &program,
        "add",
        "-f",
        "-n",
        &name,
        "--listen",
        "systemd:door",
        "mem:8M",
    ];
    let systemd = client(&room, "systemd-socket-activate", &words).start();
    wait_until(10, "systemd listens", || std::path::Path::new(&socket).exists());
    assert_eq!(room.devsplice(["list", "--json"]).ok().trim(), "[]", "nobody has come");
    let uri = format!("nbd+unix:///{name}?socket={socket}");
    let found = export(&client(&room, "nbdinfo", &["--json", &uri]).ok());
    assert_eq!(found["export-size"], 8 << 20);
    let told = room.devsplice(["info", "--json", &name]).ok();
    let told: Value = serde_json::from_str(&told).unwrap_or_else(|e| panic!("{e}: {told}"));
    assert_eq!(told["device"], uri.as_str());
    wait_until(10, "the client has gone", || room.devsplice(["del", &name]).run().code == Some(0));
    let _ = systemd.finish();
    assert!(std::path::Path::new(&socket).exists(), "the socket is systemd's");
    Ok(())
}

fn not_passed() -> Outcome {
    let room = Room::new();
    let name = room.name();
    let said = room.refusal(["add", "mem:1M", "-n", &name, "--listen", "systemd:web"]);
    assert!(said.contains("systemd:web") && said.contains("LISTEN_FDS"), "{said}");
    // What was passed to somebody else is not ours.
    let call = room.devsplice(["add", "mem:1M", "-n", &name, "--listen", "systemd:"]);
    let ran = call.env("LISTEN_PID", "1").env("LISTEN_FDS", "1").run();
    assert!(ran.code == Some(1) && ran.err.contains("LISTEN_PID"), "{}", ran.err);
    Ok(())
}

/// Has the sockets that its first two words number passed to what follows. For bash: other shells
/// know no numbers above 9.
const PASS: &str = "exec 3<&$1 4<&$2; shift 2; export LISTEN_PID=$$ LISTEN_FDS=2; exec \"$@\"";

fn one_disks() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let (name, program) = (room.name(), room.program.to_string_lossy().into_owned());
    let sockets = ["a", "b"].map(|socket| {
        let listener = UnixListener::bind(room.path(socket)).unwrap();
        // A number that the shell does not use, and that goes to it.
        let fd = rustix::io::fcntl_dupfd_cloexec(&listener, 100).unwrap();
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
        fd
    });
    let [a, b] = sockets.each_ref().map(|fd| fd.as_raw_fd().to_string());
    let words = ["-c", PASS, "bash", &a, &b, &program, "serve", "-f", &name];
    let server = client(&room, "bash", &words).env("LISTEN_FDNAMES", "a:b").start();
    drop(sockets);
    let seat = room.run.join(format!("@{name}.sock"));
    wait_until(20, "the server listens", || seat.exists());
    let disks = [room.name(), room.name()];
    let [add_all, add_one] =
        [(&disks[0], "systemd:"), (&disks[1], "systemd:b")].map(|(disk, listen)| {
            ["add", "mem:8M", "--server", &name, "-n", disk, "--listen", listen].map(str::to_owned)
        });
    let _ = room.devsplice(&add_all).ok();
    let said = room.refusal(&add_one);
    assert!(said.contains(&format!("disk {}'s", disks[0])), "{said}");
    let uri = format!("nbd+unix:///?socket={}", room.path("b"));
    assert_eq!(export(&client(&room, "nbdinfo", &["--json", &uri]).ok())["export-size"], 8 * MIB);
    let _ = room.devsplice(["del", "--force", &disks[0]]).ok();
    // Who comes now waits for the next disk there.
    let waits = client(&room, "nbdinfo", &["--json", &uri]).start();
    let _ = room.devsplice(&add_one).ok();
    let found = export(&waits.finish().ok().out);
    assert_eq!(found["export-name"], *disks[1], "{found}");
    let _ = room.devsplice(["del", "--force", &disks[1]]).ok();
    Process(server.pid()).signal(rustix::process::Signal::TERM);
    let _ = server.finish();
    Ok(())
}

fn vsock() -> Outcome {
    need_tool("nbdinfo")?;
    if need_tool("modprobe").is_ok() {
        let _ = call("modprobe", ["-q", "vsock_loopback"]).run();
    }
    let has_loopback = std::path::Path::new("/sys/module/vsock_loopback").exists();
    need(has_loopback, "no vsock within this machine")?;
    let room = Room::new();
    for (more, may_enter, may_write) in [
        (&[][..], true, false),
        (&["--writable"], true, true),
        (&["--allow", "cid:1"], true, false),
        (&["--allow", "cid:77"], false, false),
    ] {
        let (name, listen) = (room.name(), "nbd+vsock://any:20809");
        let mut words = vec!["add", "mem:8M", "-n", &name, "--listen", listen];
        words.extend(more);
        let told = room.devsplice(words).ok();
        assert_eq!(told.trim(), format!("{listen}/{name}"));
        let ran = client(&room, "nbdinfo", &["--json", "nbd+vsock://1:20809/"]).run();
        assert_eq!(ran.code == Some(0), may_enter, "{more:?}: {}", ran.err);
        if may_enter {
            let found = export(&ran.out);
            assert_eq!(found["export-size"], 8 << 20);
            assert_eq!(found["is_read_only"], !may_write, "{more:?}");
        }
        let _ = room.devsplice(["del", "--force", &name]).ok();
    }
    Ok(())
}

fn size_of(room: &Room, uri: &str) -> Value {
    export(&client(room, "nbdinfo", &["--json", uri]).ok())["export-size"].clone()
}

fn grown() -> Outcome {
    need_tool("nbdinfo")?;
    need_tool("qemu-io")?;
    let room = Room::new();
    let (name, file) = (room.name(), room.file("grows.img", 8 * MIB));
    let listen = format!("unix:{}", room.path("nbd.sock"));
    let uri = room.devsplice(["add", &file, "-n", &name, "--listen", &listen]).ok();
    let uri = uri.trim();
    assert_eq!(size_of(&room, uri), 8 * MIB);
    let write = ["-f", "raw", "-c", "write -P 7 7M 1M", uri];
    let _ = client(&room, "qemu-io", &write).ok();
    let grow = std::fs::File::options().write(true).open(&file).unwrap();
    grow.set_len(16 * MIB).unwrap();
    assert_eq!(size_of(&room, uri), 8 * MIB, "nobody was told");
    let said = room.devsplice(["resize", &name]).ok();
    assert!(said.contains("16M"), "{said}");
    assert_eq!(size_of(&room, uri), 16 * MIB);
    let read = ["-f", "raw", "-c", "read -P 7 7M 1M", "-c", "write -P 9 15M 1M", uri];
    let said = client(&room, "qemu-io", &read).ok();
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    grow.set_len(8 * MIB).unwrap();
    let refused = room.refusal(["resize", &name]);
    assert!(refused.contains("--shrink"), "{refused}");
    let _ = room.devsplice(["resize", "--shrink", &name]).ok();
    assert_eq!(size_of(&room, uri), 8 * MIB);
    // Another program cannot take it over.
    let refused = room.refusal(["upgrade", &name]);
    assert!(refused.contains("goes with its server"), "{refused}");
    assert_eq!(size_of(&room, uri), 8 * MIB);
    let _ = room.devsplice(["del", "--force", &name]).ok();
    assert!(!std::path::Path::new(&room.path("nbd.sock")).exists());
    Ok(())
}

fn quiesced() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let (name, file) = (room.name(), room.file("a.img", 8 * MIB));
    let listen = format!("unix:{}", room.path("nbd.sock"));
    let uri = room.devsplice(["add", &file, "-n", &name, "--listen", &listen]).ok();
    let _ = room.devsplice(["quiesce", &name]).ok();
    let mut waits = client(&room, "nbdinfo", &["--json", uri.trim()]).start();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(!waits.is_over(), "nobody serves it");
    let _ = room.devsplice(["resume", &name]).ok();
    assert_eq!(export(&waits.finish().ok().out)["export-size"], 8 * MIB);
    // It may go on with another stack.
    let other = room.file("b.img", 16 * MIB);
    let _ = room.devsplice(["swap", &name, &other]).ok();
    assert_eq!(size_of(&room, uri.trim()), 16 * MIB);
    let _ = room.devsplice(["quiesce", &name]).ok();
    let _ = room.devsplice(["del", "--force", &name]).ok();
    assert!(!std::path::Path::new(&room.path("nbd.sock")).exists());
    Ok(())
}
