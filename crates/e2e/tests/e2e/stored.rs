//! Answers for a disk over FUSE whose server and guard are both killed: systemd has kept what keeps
//! it, and starts its unit again with that. Here this test is systemd. The real one is not tested
//! with this: `ops` has it for ublk only, where nothing is to be stored.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use devsplice_e2e::{
    Group, Kind, MIB, Outcome, Process, Room, call, engines, kernel_is, need, program, wait_until,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;

use crate::recover::{kill, server, state, under_verify};

/// What systemd does to a unit's process: descriptors from 3 on, and how many they are.
const START: &str = "exec 3<&0 0</dev/null; [ -z \"$LISTEN_FDS\" ] || export LISTEN_PID=$$; \
                     exec \"$@\"";

pub fn add(group: &mut Group, kind: Kind) {
    group.add("kept_by_systemd_when_server_and_guard_are_killed", move || {
        need(kernel_is(6, 9), "FUSE sends no request again before Linux 6.9")?;
        both_killed(kind)
    });
    group.add("kept_by_systemd_when_the_guard_is_killed_and_later_the_server", move || {
        need(kernel_is(6, 9), "FUSE sends no request again before Linux 6.9")?;
        guard_first(kind)
    });
    group.add("kept_by_systemd_alone_it_is_not_taken_for_gone", move || {
        need(kernel_is(6, 9), "FUSE sends no request again before Linux 6.9")?;
        kept_alone(kind)
    });
    group.add("kept_by_systemd_swapped_or_quiesced_as_it_was_when_both_are_killed", move || {
        need(kernel_is(6, 9), "FUSE sends no request again before Linux 6.9")?;
        as_it_was(kind)
    });
}

struct Systemd {
    socket: UnixDatagram,
    path: String,
    stored: Vec<OwnedFd>,
    name: String,
}

impl Systemd {
    fn new(room: &Room) -> Systemd {
        let path = room.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Systemd { socket, path, stored: Vec::new(), name: String::new() }
    }

    /// Does what it is told, until a server says that it is ready.
    fn listen(&mut self) {
        loop {
            let (mut text, mut room) = ([0; 1000], vec![MaybeUninit::uninit(); 4000]);
            let mut along = RecvAncillaryBuffer::new(&mut room);
            let mut parts = [IoSliceMut::new(&mut text)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let got = recvmsg(&self.socket, &mut parts, &mut along, flags).expect("a message");
            let fds: Vec<OwnedFd> = along
                .drain()
                .flat_map(|one| match one {
                    RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                    _ => Vec::new(),
                })
                .collect();
            let text = String::from_utf8_lossy(&text[..got.bytes]).into_owned();
            let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
            if value("FDSTOREREMOVE=").is_some() {
                self.stored.clear();
            }
            if value("FDSTORE=").is_some() {
                self.stored.extend(fds);
                self.name = value("FDNAME=").unwrap_or_default().to_owned();
                assert_eq!(value("FDPOLL="), Some("0"), "systemd would wake for each request");
            }
            if value("READY=").is_some() {
                return;
            }
        }
    }

    /// What it has not read yet.
    fn unread(&mut self) -> Vec<String> {
        let (mut text, mut all) = ([0; 1000], Vec::new());
        self.socket.set_nonblocking(true).unwrap();
        while let Ok(len) = self.socket.recv(&mut text) {
            all.push(String::from_utf8_lossy(&text[..len]).into_owned());
        }
        self.socket.set_nonblocking(false).unwrap();
        all
    }

    /// Starts the unit.
    fn start(&mut self, room: &Room, arguments: &[String]) {
        let program = program().expect("a program").display().to_string();
        let words = ["-c", START, "sh", &program];
        let words = words.into_iter().chain(arguments.iter().map(String::as_str));
        let mut unit = call("sh", words).env("DEVSPLICE_RUN", &room.run).dir(&room.dir);
        unit = unit.env("NOTIFY_SOCKET", &self.path);
        if let [one] = &self.stored[..] {
            unit = unit.input(one.try_clone().unwrap());
            unit = unit.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", &self.name);
        }
        unit.ok();
        self.listen();
        assert_eq!(self.stored.len(), 1, "a descriptor for each queue");
    }
}

fn both_killed(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let file = room.file("a", 16 * MIB);
    let disk = room.add(kind, &file, &["--no-part-scan", "--queues", "1"]);
    let unit = room.add_arguments(kind, &file, &["-n", &disk.name, "--or-recover"]);
    let mut systemd = Systemd::new(&room);
    systemd.start(&room, &unit);
    let mut killed = 0;
    under_verify(&disk, 8, |number| {
        let old = server(&disk);
        let guard = Process(old.children().first().copied().unwrap_or(0));
        let both = if number % 2 == 0 { [guard, old] } else { [old, guard] };
        both.iter().for_each(|one| one.signal(Signal::KILL));
        // At once: they may still be dying.
        systemd.start(&room, &unit);
        assert_ne!(server(&disk), old);
        killed += 1;
    });
    assert_eq!(killed, 8);
    let last = server(&disk);
    let _ = disk.del(&[]).ok();
    last.ends_within(5);
    disk.is_gone_within(5);
    // What is stored is of no use then, and nothing but a new disk is made.
    systemd.start(&room, &unit);
    assert_ne!(server(&disk), last);
    room.devsplice(["del", &disk.name]).ok();
    Ok(())
}

/// systemd does not notice the guard's end: the server does, which is the main process from then
/// on.
fn guard_first(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let file = room.file("a", 16 * MIB);
    let disk = room.add(kind, &file, &["--no-part-scan", "--queues", "1"]);
    let unit = room.add_arguments(kind, &file, &["-n", &disk.name, "--or-recover"]);
    let mut systemd = Systemd::new(&room);
    systemd.start(&room, &unit);
    let guard = |server: Process| Process(server.children().first().copied().unwrap_or(0));
    let mut killed = 0;
    under_verify(&disk, 4, |_| {
        let old = server(&disk);
        let first = guard(old);
        first.signal(Signal::KILL);
        let main = format!("MAINPID={}", old.0);
        wait_until(10, "another main process", || systemd.unread().contains(&main));
        let lost = format!("its guard (process {}) has died", first.0);
        assert!(disk.log().contains(&lost), "{}", disk.log());
        let warnings = disk.info()["warnings"].to_string();
        assert!(warnings.contains("devsplice upgrade NAME"), "{warnings}");
        old.signal(Signal::KILL);
        old.ends_within(10);
        systemd.start(&room, &unit);
        assert!(server(&disk) != old && guard(server(&disk)).lives());
        let warnings = disk.info()["warnings"].to_string();
        assert!(!warnings.contains("its guard has died"), "{warnings}");
        killed += 1;
    });
    assert_eq!(killed, 4);
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// Its unit is between two starts, or has failed: nobody may take what is left for a dead disk's.
fn kept_alone(kind: Kind) -> Outcome {
    devsplice_e2e::need_tool("mkfs.ext4")?;
    need(devsplice_e2e::kernel_has_file_system("ext4"), "this kernel mounts no ext4")?;
    let room = Room::new();
    let file = room.file("a", 32 * MIB);
    let disk = room.add(kind, &file, &["--no-part-scan", "--queues", "1"]);
    let unit = room.add_arguments(kind, &file, &["-n", &disk.name, "--or-recover"]);
    let mut systemd = Systemd::new(&room);
    systemd.start(&room, &unit);
    let node = disk.node.to_string_lossy().into_owned();
    call("mkfs.ext4", ["-q", "-F", &node]).ok();
    let at = room.mount_point("mnt");
    room.mount(&[&node], &at);
    std::fs::write(at.join("first"), b"first").unwrap();
    let server = server(&disk);
    for one in [Process(server.children().first().copied().unwrap_or(0)), server] {
        one.signal(Signal::KILL);
        one.ends_within(10);
    }
    // What it had in flight may have its lock a little longer.
    wait_until(10, "a disk that is kept", || state(&room, &disk) == "waiting");
    let gc = room.devsplice(["gc"]).ok();
    assert!(gc.contains(&format!("kept: {}: ", disk.name)), "{gc}");
    assert_eq!(state(&room, &disk), "waiting");
    let plain = room.add_arguments(kind, &file, &["-n", &disk.name]);
    let or_recover = room.add_arguments(kind, &file, &["-n", &disk.name, "--or-recover"]);
    for words in [plain, or_recover, vec!["recover".to_owned(), disk.name.clone()]] {
        let refused = room.refusal(words);
        assert!(refused.contains("unit serves it again"), "{refused}");
    }
    let refused = disk.del(&[]);
    assert!(refused.code == Some(1) && refused.err.contains("is in use"), "{}", refused.err);
    assert!(disk.is_attached());
    systemd.start(&room, &unit);
    call("sync", ["-f", &at.to_string_lossy()]).ok();
    assert_eq!(std::fs::read(at.join("first")).unwrap(), b"first");
    room.unmount(&at);
    call("e2fsck", ["-f", "-n", &node]).ok();
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// The unit's configuration is not what the disk is by then.
fn as_it_was(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 4 * MIB, 0x5a);
    let disk = room.add(kind, &file, &["--no-part-scan", "--queues", "1"]);
    let unit = room.add_arguments(kind, &file, &["-n", &disk.name, "--or-recover"]);
    let mut systemd = Systemd::new(&room);
    systemd.start(&room, &unit);
    let other = room.full_file("b", 4 * MIB, 0x77);
    room.devsplice(["swap", &disk.name, &other]).ok();
    let both_killed = || {
        let server = server(&disk);
        for one in [Process(server.children().first().copied().unwrap_or(0)), server] {
            one.signal(Signal::KILL);
            one.ends_within(10);
        }
    };
    both_killed();
    systemd.start(&room, &unit);
    assert_eq!(disk.info()["stack"], format!("file({other})"));
    call("cmp", ["-n", "4194304", &other, &disk.node.to_string_lossy()]).ok();
    // A person works on what is below.
    room.devsplice(["quiesce", &disk.name]).ok();
    let to = format!("of={}", disk.node.display());
    let mut writer = call("dd", ["if=/dev/zero", &to, "bs=64k", "count=4", "oflag=direct"]).start();
    for _ in 0..2 {
        both_killed();
        systemd.start(&room, &unit);
        assert_eq!(disk.info()["state"], "quiesced");
        call("flock", ["-n", &other, "true"]).ok();
        std::thread::sleep(Duration::from_millis(300));
        assert!(!writer.is_over(), "a write has ended while the disk was quiesced");
    }
    assert!(std::fs::read(&other).unwrap().iter().all(|byte| *byte == 0x77));
    room.devsplice(["resume", &disk.name]).ok();
    assert_eq!(writer.finish().code, Some(0));
    assert!(std::fs::read(&other).unwrap()[..256 << 10].iter().all(|byte| *byte == 0));
    // And its guard takes its place as any's does.
    kill(&room, &disk);
    systemd.unread();
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    // Dead descriptors are not to fill the store.
    let removed = format!("FDSTOREREMOVE=1\nFDNAME={}", systemd.name);
    assert!(systemd.unread().contains(&removed));
    Ok(())
}
