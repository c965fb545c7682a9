//! Answers for who talks to whom over NBD: our client to every server that people use, every client
//! that they use to our server, with TLS and without, verified 32 deep.

use std::os::unix::fs::FileExt;
use std::path::Path;

use devsplice_e2e::{
    Call, Group, MIB, Mode, Outcome, Process, Room, Running, call, mode, need, need_tool, verify,
    wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

use crate::nbd::{Served, verify_32_deep};
use crate::psk::keys;
use crate::tls::certificates;

/// Bytes of each disk.
const SIZE: u64 = 16 * MIB;

pub fn add(group: &mut Group) {
    for which in [Which::Ours, Which::Nbdkit, Which::Qemu, Which::NbdServer] {
        let name = which.name();
        for by in [By::Nothing, By::Certificates, By::Keys] {
            if (which, by) != (Which::NbdServer, By::Keys) {
                let end = by.name();
                let name = format!("our_client_keeps_every_byte_over_{name}{end}");
                group.add(&name, move || below(which, by));
            }
        }
    }
    group.add("holes_below_a_server_below_us_are_told_as_they_are_now", holes);
    for by in [By::Nothing, By::Certificates, By::Keys] {
        let name = format!("qemu_writes_32_deep_to_our_server{}", by.name());
        group.add(&name, move || qemu(by));
    }
    group.alone("the_kernels_client_keeps_every_byte_over_our_server", || kernel(false));
    group.alone("the_kernels_client_keeps_every_byte_over_our_server_with_tls", || kernel(true));
}

/// By what the two are known to each other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Nothing,
    Certificates,
    Keys,
}

impl By {
    fn name(self) -> &'static str {
        match self {
            By::Nothing => "",
            By::Certificates => "_with_tls",
            By::Keys => "_with_tls_by_keys",
        }
    }
}

/// The same, with the directory in which it is.
struct Trust {
    by: By,
    dir: String,
}

impl Trust {
    fn new(room: &Room, by: By) -> Result<Trust, devsplice_e2e::Skip> {
        let dir = match by {
            By::Nothing => String::new(),
            By::Certificates => certificates(room, "pki"),
            By::Keys => keys(room, "keys")?,
        };
        Ok(Trust { by, dir })
    }

    /// What our server is told.
    fn ours(&self) -> Vec<String> {
        match self.by {
            By::Nothing => Vec::new(),
            By::Certificates => vec!["--tls-certificates".to_owned(), self.dir.clone()],
            By::Keys => vec!["--tls-psk".to_owned(), format!("{}/keys.psk", self.dir)],
        }
    }

    /// What nbdkit is told.
    fn nbdkit(&self) -> Vec<String> {
        let dir = &self.dir;
        let option = match self.by {
            By::Nothing => return Vec::new(),
            By::Certificates => format!("--tls-certificates={dir}"),
            By::Keys => format!("--tls-psk={dir}/keys.psk"),
        };
        vec!["--tls=require".to_owned(), option]
    }

    /// What QEMU's tools are told, at one end.
    fn qemu(&self, end: &str) -> Option<String> {
        let dir = &self.dir;
        let verify = if end == "server" { ",verify-peer=no" } else { "" };
        let user = if end == "client" { ",username=alice" } else { "" };
        match self.by {
            By::Nothing => None,
            By::Certificates => {
                Some(format!("tls-creds-x509,id=t,endpoint={end},dir={dir}{verify}"))
            }
            By::Keys => Some(format!("tls-creds-psk,id=t,endpoint={end},dir={dir}{user}")),
        }
    }

    /// An export behind a socket, as an address.
    fn uri(&self, name: &str, socket: &str) -> String {
        let dir = &self.dir;
        match self.by {
            By::Nothing => format!("nbd+unix:///{name}?socket={socket}"),
            By::Certificates => {
                format!("nbds+unix:///{name}?socket={socket}&tls-certificates={dir}")
            }
            By::Keys => {
                format!("nbds+unix://alice@/{name}?socket={socket}&tls-psk-file={dir}/keys.psk")
            }
        }
    }
}

/// A program that serves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Ours,
    Nbdkit,
    Qemu,
    NbdServer,
}

impl Which {
    fn name(self) -> &'static str {
        match self {
            Which::Ours => "our_server",
            Which::Nbdkit => "nbdkit",
            Which::Qemu => "qemu_nbd",
            Which::NbdServer => "nbd_server",
        }
    }
}

/// One that runs, and serves a file of the room.
struct Server<'r> {
    socket: String,
    name: String,
    /// How it ends: with this, by its number, or as one of ours.
    _running: Option<Running>,
    process: Option<Process>,
    _ours: Option<Served<'r>>,
}

impl<'r> Server<'r> {
    fn start(
        room: &'r Room,
        which: Which,
        trust: &Trust,
    ) -> Result<Server<'r>, devsplice_e2e::Skip> {
        let (socket, image) = (room.path("below.sock"), room.file("below.img", SIZE));
        let mut server = Server {
            socket: socket.clone(),
            name: "disk".to_owned(),
            _running: None,
            process: None,
            _ours: None,
        };
        let start = |name: &str, arguments: &[&str]| {
            Some(call(name, arguments).dir(&room.dir).limit(300).start())
        };
        match which {
            Which::Ours => {
                let tls = trust.ours();
                let tls: Vec<_> = tls.iter().map(String::as_str).collect();
                let served = Served::new(room, &image, &tls);
                (server.socket, server.name) = (served.socket.clone(), served.name.clone());
                server._ours = Some(served);
            }
            Which::Nbdkit => {
                need_tool("nbdkit")?;
                let tls = trust.nbdkit();
                let mut all = vec!["-f", "-U", &socket];
                all.extend(tls.iter().map(String::as_str));
                all.extend(["file", &image]);
                server._running = start("nbdkit", &all);
            }
            Which::Qemu => {
                need_tool("qemu-nbd")?;
                let mut all = vec!["-f", "raw", "-k", &socket, "-x", "disk", "-e", "8", "-t"];
                let object = trust.qemu("server");
                if let Some(object) = &object {
                    all.extend(["--object", object, "--tls-creds", "t"]);
                }
                all.push(&image);
                server._running = start("qemu-nbd", &all);
            }
            Which::NbdServer => {
                need_tool("nbd-server")?;
                let (config, pid) = (room.path("below.conf"), room.path("below.pid"));
                let mut text = format!("[generic]\nunixsock = {socket}\n");
                if trust.by == By::Certificates {
                    let dir = &trust.dir;
                    text += &format!("certfile = {dir}/server-cert.pem\n");
                    text += &format!("keyfile = {dir}/server-key.pem\n");
                    text += &format!("cacertfile = {dir}/ca-cert.pem\nforce_tls = true\n");
                }
                text += &format!("[disk]\nexportname = {image}\nflush = true\nfua = true\n");
                std::fs::write(&config, text).unwrap();
                let _ = call("nbd-server", ["-C", &config, "-p", &pid]).limit(20).ok();
                let number = || std::fs::read_to_string(&pid).ok()?.trim().parse().ok();
                wait_until(20, "nbd-server's number", || number().is_some());
                server.process = number().map(Process);
            }
        }
        let socket = server.socket.clone();
        wait_until(20, "a server listens", || Path::new(&socket).exists());
        Ok(server)
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        if let Some(process) = self.process {
            process.signal(Signal::TERM);
        }
    }
}

/// fio, our server, our client, and the server in question.
fn below(which: Which, by: By) -> Outcome {
    need(mode() == Mode::Native, "it needs nothing of the machine's kernel")?;
    let room = Room::new();
    let trust = Trust::new(&room, by)?;
    let server = Server::start(&room, which, &trust)?;
    let stack = format!("nbd(\"{}\")", trust.uri(&server.name, &server.socket));
    let served = Served::at(&room, "above.sock", &stack, &["--threads", "2"]);
    verify_32_deep(&room, &served.uri, SIZE)?;
    let info = served.info();
    assert_eq!(info["servers"][0]["reconnects"], 0, "{info:#}");
    assert!(info["counts"]["writes"].as_u64() > Some(50), "{info:#}");
    served.remove();
    Ok(())
}

/// What nbdinfo says is data, in KiB: from where, how much.
fn data_of(room: &Room, uri: &str) -> Vec<(u64, u64)> {
    let text = tool(room, "nbdinfo", &["--map", "--json", uri]).ok();
    let all: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let all = all.as_array().unwrap_or_else(|| panic!("no list: {text}")).iter();
    let number = |one: &Value, key: &str| one[key].as_u64().unwrap_or_else(|| panic!("{text}"));
    let data = all.filter(|one| number(one, "type") == 0);
    data.map(|one| (number(one, "offset") >> 10, number(one, "length") >> 10)).collect()
}

fn holes() -> Outcome {
    need(mode() == Mode::Native, "it needs nothing of the machine's kernel")?;
    for tool in ["nbdkit", "nbdinfo", "qemu-io"] {
        need_tool(tool)?;
    }
    let room = Room::new();
    let (socket, image) = (room.path("below.sock"), room.file("below.img", SIZE));
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[7; 1 << 20], 4 << 20).unwrap();
    for (is_shared, before, after) in [
        (true, vec![(4096, 1024)], vec![(4096, 1024), (8192, 64)]),
        // Whoever takes one connection cannot be asked beside it.
        (false, vec![(0, SIZE >> 10)], vec![(0, SIZE >> 10)]),
    ] {
        let mut all = vec!["-f", "-U", &socket];
        if !is_shared {
            all.push("--filter=multi-conn");
        }
        all.extend(["file", &image]);
        if !is_shared {
            all.push("multi-conn-mode=disable");
        }
        let kit = call("nbdkit", all).dir(&room.dir).limit(60).start();
        wait_until(20, "nbdkit listens", || Path::new(&socket).exists());
        let served = Served::new(&room, &format!("nbd+unix:///?socket={socket}"), &[]);
        assert_eq!(data_of(&room, &served.uri), before);
        let write = ["-f", "raw", "-c", "write -P 9 8M 64k", &served.uri];
        let _ = tool(&room, "qemu-io", &write).ok();
        assert_eq!(data_of(&room, &served.uri), after, "it is asked anew each time");
        served.remove();
        let halves = format!("nbd+unix:///?socket={socket}");
        let two =
            format!("concat(linear({halves}, size=5M), linear({halves}, offset=7M, size=2M))");
        let served = Served::new(&room, &two, &[]);
        let expected = if is_shared { vec![(4096, 1024), (6144, 64)] } else { vec![(0, 7168)] };
        // What cannot be asked in time is called data.
        wait_until(20, "both halves are asked", || data_of(&room, &served.uri) == expected);
        served.remove();
        drop(kit);
        let _ = std::fs::remove_file(&socket);
    }
    Ok(())
}

/// An export of ours as QEMU names it, and what has to be said before.
fn for_qemu(served: &Served<'_>, trust: &Trust) -> (Vec<String>, String) {
    let (socket, name) = (served.socket.clone(), served.name.clone());
    let image = format!("driver=nbd,server.type=unix,server.path={socket},export={name}");
    let Some(object) = trust.qemu("client") else {
        return (vec!["--image-opts".to_owned()], image);
    };
    let first = ["--object", &object, "--image-opts"].map(str::to_owned).to_vec();
    let name = if trust.by == By::Certificates { ",tls-hostname=localhost" } else { "" };
    (first, format!("{image},tls-creds=t{name}"))
}

fn tool(room: &Room, name: &str, arguments: &[&str]) -> Call {
    call(name, arguments).dir(&room.dir).limit(60)
}

fn qemu(by: By) -> Outcome {
    need(mode() == Mode::Native, "it needs nothing of the machine's kernel")?;
    need_tool("qemu-img")?;
    need_tool("qemu-io")?;
    let room = Room::new();
    let trust = Trust::new(&room, by)?;
    let tls = trust.ours();
    let tls: Vec<_> = tls.iter().map(String::as_str).collect();
    let image = room.file("a.img", SIZE);
    let served = Served::new(&room, &image, &tls);
    let (first, address) = for_qemu(&served, &trust);
    let first: Vec<_> = first.iter().map(String::as_str).collect();
    // The first half in pieces that touch, every byte by what it says, 32 of them in flight.
    let pattern = |place: u32| 1 + place / 16 % 251;
    let mut commands = Vec::new();
    for batch in 0..16 {
        for place in (0..32).map(|piece| (batch * 32 + piece) * 16) {
            commands.push(format!("aio_write -q -P {} {place}k 16k", pattern(place)));
        }
        commands.push("aio_flush".to_owned());
    }
    commands.push("flush".to_owned());
    for place in (0..8192_u32).step_by(16) {
        commands.push(format!("read -P {} {place}k 16k", pattern(place)));
    }
    commands.push("read -P 0 8M 8M".to_owned());
    let reads = commands.iter().flat_map(|command| ["-c", command.as_str()]);
    let all: Vec<_> = first.iter().copied().chain(reads).chain([address.as_str()]).collect();
    let said = tool(&room, "qemu-io", &all).ok();
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    let same = ["compare", "--image-opts", "driver=file,filename=a.img"];
    let same = [&same[..1], &first, &same[2..], &[address.as_str()]].concat();
    let _ = tool(&room, "qemu-img", &same).ok();
    served.remove();
    Ok(())
}

/// nbd.ko, set up by nbd-client; with TLS a process of nbd-client's is between the two.
fn kernel(is_secure: bool) -> Outcome {
    need(mode() == Mode::Vm, "the machine's own nbd is left alone; the VM tests it")?;
    need_tool("nbd-client")?;
    need_tool("modprobe")?;
    let _ = call("modprobe", ["nbd", "nbds_max=4"]).run();
    let device = if is_secure { "/dev/nbd1" } else { "/dev/nbd0" };
    need(Path::new(device).exists(), "this kernel has no nbd")?;
    let room = Room::new();
    let pki = is_secure.then(|| certificates(&room, "pki"));
    let tls = pki.iter().flat_map(|dir| ["--tls-certificates", dir]).collect::<Vec<_>>();
    let served = Served::new(&room, &room.file("a.img", SIZE), &tls);
    let (socket, name) = (served.socket.clone(), served.name.clone());
    let files = pki.map(|dir| {
        ["ca-cert", "client-cert", "client-key"].map(|file| format!("{dir}/{file}.pem"))
    });
    let mut all = vec!["-unix", &socket, device, "-name", &name];
    if let Some([authority, own, key]) = &files {
        all.extend(["-cacertfile", authority, "-certfile", own, "-keyfile", key]);
        all.extend(["-tlshostname", "localhost"]);
    } else {
        all.extend(["-connections", "2"]);
    }
    let _ = call("nbd-client", all).limit(30).ok();
    let moved = verify(&room, Path::new(device), SIZE, "4k-256k");
    let _ = call("nbd-client", ["-d", device]).limit(30).ok();
    assert!(moved.written > 0);
    wait_until(20, "the kernel has gone", || served.info()["clients"] == 0);
    let info = served.info();
    assert_eq!(info["counts"]["errors"], 0, "{info:#}");
    served.remove();
    Ok(())
}
