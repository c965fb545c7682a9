//! Answers for a disk over FUSE whose server and guard are both killed: systemd has kept what keeps
//! it, and starts its unit again with that. Here this test is systemd; `ops` has the real one.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use devsplice_e2e::{
    Group, Kind, MIB, Outcome, Process, Room, call, engines, kernel_is, need, program,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;

use crate::recover::{server, under_verify};

/// What systemd does to a unit's process: descriptors from 3 on, and how many they are.
const START: &str = "exec 3<&0 0</dev/null; [ -z \"$LISTEN_FDS\" ] || export LISTEN_PID=$$; \
                     exec \"$@\"";

pub fn add(group: &mut Group, kind: Kind) {
    group.add("kept_by_systemd_when_server_and_guard_are_killed", move || {
        need(kernel_is(6, 9), "FUSE sends no request again before Linux 6.9")?;
        both_killed(kind)
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
