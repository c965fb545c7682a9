//! Answers for NBD over TLS as the tools see it that people use, which do TLS by GnuTLS: what is
//! spoken, who is let in, and what is said to whom is not.

#[path = "../../../tls/tests/authority/mod.rs"]
mod authority;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use authority::Authority;
use devsplice_e2e::{Call, Group, MIB, Outcome, Ran, Room, Running, call, need_tool, wait_until};
use serde_json::Value;

pub fn add(group: &mut Group) {
    group.add("tools_copy_inside_tls_over_either_kind_of_socket", copies);
    group.add("fio_verifies_inside_tls_32_deep", fio);
    group.add("qemu_writes_and_compares_inside_tls", qemu);
    group.add("who_may_not_come_in_is_told_why_and_so_is_the_log", refused);
    group.add("what_is_sent_behind_starttls_ends_the_connection", injected);
    group.add("clients_without_tls_are_served_where_it_is_offered", offered);
    group.add("renewed_certificates_need_no_restart", renewed);
    group.add("a_servers_disk_is_read_and_written_inside_tls", client);
    group.add("a_server_that_is_not_who_it_should_be_is_refused_by_reason", strangers);
    group.add("options_of_tls_that_make_no_sense_are_refused_by_name", options);
}

/// A disk that goes with the test, reached over both kinds of socket.
pub struct Secret<'a> {
    room: &'a Room,
    /// What it is called.
    pub name: String,
    /// Where it listens, of TCP.
    pub port: String,
}

/// A directory of the room with all that a server and a client need.
pub fn certificates(room: &Room, name: &str) -> String {
    let dir = room.path(name);
    std::fs::create_dir_all(&dir).unwrap();
    let authority = Authority::new(name);
    authority.server(Path::new(&dir), "localhost", (-1, 10));
    authority.client(Path::new(&dir), "somebody", (-1, 10));
    dir
}

impl<'a> Secret<'a> {
    pub fn new(room: &'a Room, stack: &str, more: &[&str]) -> Secret<'a> {
        let name = room.name();
        let listen = format!("unix:{}", room.path(&format!("{name}.sock")));
        let mut arguments = vec!["add", stack, "-n", &name, "--json", "--writable"];
        arguments.extend(["--listen", "tcp:127.0.0.1:0", "--listen", &listen]);
        arguments.extend(more);
        let made = room.devsplice(arguments).ok();
        let made: Value = serde_json::from_str(&made).unwrap_or_else(|e| panic!("{e}: {made}"));
        let device = made["device"].as_str().unwrap();
        let port = device.rsplit_once(':').and_then(|(_, rest)| rest.split_once('/')).unwrap().0;
        Secret { room, name: name.clone(), port: port.to_owned() }
    }

    fn unix(&self, certificates: &str) -> String {
        let name = &self.name;
        let socket = self.room.path(&format!("{name}.sock"));
        format!("nbds+unix:///{name}?socket={socket}&tls-certificates={certificates}")
    }

    pub fn tcp(&self, certificates: &str) -> String {
        let (name, port) = (&self.name, &self.port);
        format!("nbds://127.0.0.1:{port}/{name}?tls-certificates={certificates}")
    }

    pub fn plain(&self) -> String {
        format!("nbd://127.0.0.1:{}/{}", self.port, self.name)
    }

    pub fn info(&self) -> Value {
        let text = self.room.devsplice(["info", "--json", &self.name]).ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("info: {error}: {text}"))
    }

    pub fn log(&self) -> String {
        let path = self.room.run.join(format!("{}.log", self.name)).display().to_string();
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// A call that must fail; afterwards the log says `words`.
    pub fn refuses(&self, ran: Ran, words: &str) -> Ran {
        assert_ne!(ran.code, Some(0), "{}", ran.out);
        wait_until(20, words, || self.log().contains(words));
        ran
    }

    pub fn remove(self) {
        wait_until(20, "clients have gone", || self.info()["clients"] == 0);
        let info = self.info();
        assert_eq!((&info["counts"]["errors"], &info["counts"]["stuck"]), (&0.into(), &0.into()));
        let _ = self.room.devsplice(["del", &self.name]).ok();
    }
}

impl Drop for Secret<'_> {
    fn drop(&mut self) {
        let _ = self.room.devsplice(["del", "--force", &self.name]).run();
    }
}

pub fn tool(room: &Room, name: &str, arguments: &[&str]) -> Call {
    call(name, arguments).dir(&room.dir).limit(60)
}

/// 16 MiB go through `uri` to the file `a` of 32 MiB that is served there, and all comes back.
pub fn goes_there_and_back(room: &Room, uri: &str, a: &str) {
    let (image, back) = (room.path("image"), room.path("back"));
    // Bytes that do not repeat: a record out of place would be seen.
    let words = (0..4 * MIB as u32).flat_map(u32::to_le_bytes);
    std::fs::write(&image, words.collect::<Vec<_>>()).unwrap();
    let told = tool(room, "nbdinfo", &[uri]).ok();
    assert!(told.contains("with TLS"), "{told}");
    std::fs::File::options().write(true).open(a).unwrap().set_len(0).unwrap();
    std::fs::File::options().write(true).open(a).unwrap().set_len(32 * MIB).unwrap();
    let _ = tool(room, "nbdcopy", &[&image, uri]).ok();
    let _ = tool(room, "nbdcopy", &[uri, &back]).ok();
    let found = std::fs::read(&back).unwrap();
    assert!(found[..16 << 20] == std::fs::read(&image).unwrap(), "{uri}");
    assert!(found[16 << 20..].iter().all(|byte| *byte == 0), "{uri}");
    std::fs::remove_file(&back).unwrap();
}

fn copies() -> Outcome {
    need_tool("nbdcopy")?;
    need_tool("nbdinfo")?;
    let room = Room::new();
    let (files, a) = (certificates(&room, "pki"), room.file("a.img", 32 * MIB));
    let options = ["--tls-certificates", &files, "--tls-verify-peer", "--threads", "2"];
    let secret = Secret::new(&room, &a, &options);
    for uri in [secret.unix(&files), secret.tcp(&files)] {
        goes_there_and_back(&room, &uri, &a);
    }
    assert_eq!(secret.info()["features"], serde_json::json!(["tls-require", "tls-verify-peer"]));
    secret.remove();
    Ok(())
}

fn fio() -> Outcome {
    fio_with(&[])
}

/// fio with libnbd, verifying, to a server with these options, too.
pub fn fio_with(more: &[&str]) -> Outcome {
    need_tool("fio")?;
    need_tool("setpriv")?;
    let room = Room::new();
    // fio lets no URI name a file; libnbd looks into the home of who is not root.
    let home = room.path("home");
    std::fs::create_dir_all(format!("{home}/.pki")).unwrap();
    let files = certificates(&room, "home/.pki/libnbd");
    for path in [&home, &files] {
        let _ = call("chmod", ["-R", "a+rX", path]).ok();
    }
    let _ = call("chmod", ["a+x", &room.dir.to_string_lossy()]).ok();
    let secret = Secret::new(&room, "mem:32M", &[&["--tls-certificates", &files], more].concat());
    let uri = format!("--uri={}", secret.plain().replace("nbd://", "nbds://"));
    let mut arguments = vec!["--reuid=65534", "--regid=65534", "--clear-groups"];
    arguments.extend(["fio", "--name=verify", "--ioengine=nbd", &uri, "--rw=randrw"]);
    arguments.extend(["--bsrange=512-128k", "--blockalign=512", "--size=12m", "--numjobs=2"]);
    arguments.extend(["--offset_increment=16m", "--iodepth=32", "--verify=crc32c"]);
    arguments.extend(["--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]);
    arguments.push("--randrepeat=0");
    let said = call("setpriv", arguments).env("HOME", &home).dir(Path::new("/tmp")).limit(180).ok();
    assert_eq!(said.matches("err= 0").count(), 2, "{said}");
    assert!(secret.info()["counts"]["writes"].as_u64() > Some(50));
    secret.remove();
    Ok(())
}

fn qemu() -> Outcome {
    need_tool("qemu-io")?;
    let room = Room::new();
    let files = certificates(&room, "pki");
    let a = room.file("a.img", 16 * MIB);
    let secret = Secret::new(&room, &a, &["--tls-certificates", &files, "--tls-verify-peer"]);
    let object = format!("tls-creds-x509,id=t,endpoint=client,dir={files}");
    let image = format!(
        "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={},export={},tls-creds=t",
        secret.port, secret.name
    );
    let commands = [
        "write -P 7 1M 3M",
        "write -f -P 9 8M 512",
        "write -z 2M 1M",
        "flush",
        "read -P 7 1M 1M",
        "read -P 0 2M 1M",
        "read -P 9 8M 512",
    ];
    let mut arguments = vec!["--object", &object, "--image-opts"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", *command]));
    arguments.push(&image);
    let said = tool(&room, "qemu-io", &arguments).ok();
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    let same = ["compare", "--object", &object, "--image-opts", "driver=file,filename=a.img"];
    let same = [&same[..], &[&image]].concat();
    let _ = tool(&room, "qemu-img", &same).ok();
    secret.remove();
    Ok(())
}

fn refused() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let (files, other) = (certificates(&room, "pki"), certificates(&room, "other"));
    let secret = Secret::new(&room, "mem:8M", &["--tls-certificates", &files, "--tls-verify-peer"]);
    let info = |uri: &str| tool(&room, "nbdinfo", &[uri]).run();
    let _ = secret.refuses(info(&secret.plain()), "wants no TLS, which is required");
    // It does not believe us.
    let ran = info(&secret.tcp(&other));
    let _ = secret.refuses(ran, "has gone in the middle of a handshake (it may not trust");
    // We do not believe it: a certificate by one who only calls himself the authority (GnuTLS shows
    // none by another name), and none.
    let stranger = room.path("stranger");
    std::fs::create_dir_all(&stranger).unwrap();
    Authority::new("pki").client(Path::new(&stranger), "somebody", (-1, 10));
    std::fs::copy(format!("{files}/ca-cert.pem"), format!("{stranger}/ca-cert.pem")).unwrap();
    let ran = info(&secret.unix(&stranger));
    let _ = secret.refuses(ran, "TLS: the client's certificate is");
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::remove_file(format!("{stranger}/{file}")).unwrap();
    }
    let ran = info(&secret.tcp(&stranger));
    let _ = secret.refuses(ran, "TLS: the client has shown no certificate");
    let old = room.path("old");
    std::fs::create_dir_all(&old).unwrap();
    let authority = Authority::new("old");
    authority.server(Path::new(&old), "localhost", (-1, 10));
    authority.client(Path::new(&old), "somebody", (-20, -10));
    let late = Secret::new(&room, "mem:8M", &["--tls-certificates", &old, "--tls-verify-peer"]);
    let ran = info(&late.tcp(&old));
    let _ = late.refuses(ran, "TLS: the client's certificate has expired");
    drop(late);
    assert!(info(&secret.tcp(&files)).ok().out.contains("with TLS"), "others are not disturbed");
    secret.remove();
    // And who wants TLS of a server without.
    let plain = Secret::new(&room, "mem:8M", &[]);
    let _ = plain.refuses(info(&plain.tcp(&files)), "wants TLS, which is not spoken here");
    plain.remove();
    Ok(())
}

fn injected() -> Outcome {
    let room = Room::new();
    let files = certificates(&room, "pki");
    let secret = Secret::new(&room, "mem:8M", &["--tls-certificates", &files]);
    let option = |number: u32| {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend(0_u32.to_be_bytes());
        bytes
    };
    let (start_tls, list) = (5, 3);
    for (behind, words) in [
        (option(list), "behind STARTTLS"),
        // Later, it is taken for what it should be.
        (Vec::new(), "TLS: the client speaks no TLS"),
    ] {
        let mut socket = TcpStream::connect(format!("127.0.0.1:{}", secret.port)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let begin = [&3_u32.to_be_bytes()[..], &option(start_tls), &behind].concat();
        socket.write_all(&begin).unwrap();
        // The greeting, and the answer to STARTTLS.
        let mut answer = [0; 18 + 20];
        let _ = socket.read_exact(&mut answer);
        let _ = socket.write_all(&option(list));
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
        assert!(rest.len() < 16, "more than an alert: {rest:?}");
        wait_until(20, words, || secret.log().contains(words));
    }
    secret.remove();
    Ok(())
}

fn offered() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let files = certificates(&room, "pki");
    let secret = Secret::new(&room, "mem:8M", &["--tls", "on", "--tls-certificates", &files]);
    let told = tool(&room, "nbdinfo", &[&secret.plain()]).ok();
    assert!(told.contains("without TLS"), "{told}");
    let told = tool(&room, "nbdinfo", &[&secret.tcp(&files)]).ok();
    assert!(told.contains("with TLS"), "{told}");
    secret.remove();
    Ok(())
}

fn renewed() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let files = certificates(&room, "pki");
    let secret = Secret::new(&room, "mem:8M", &["--tls-certificates", &files]);
    let _ = tool(&room, "nbdinfo", &[&secret.tcp(&files)]).ok();
    let _ = certificates(&room, "pki");
    let _ = tool(&room, "nbdinfo", &[&secret.tcp(&files)]).ok();
    secret.remove();
    Ok(())
}

/// nbdkit, which does TLS by GnuTLS.
pub struct Kit<'a> {
    room: &'a Room,
    running: Option<Running>,
}

impl<'a> Kit<'a> {
    pub fn new(room: &'a Room, options: &[&str]) -> Kit<'a> {
        let mut kit = Kit { room, running: None };
        kit.start(options);
        kit
    }

    fn start(&mut self, options: &[&str]) {
        let socket = self.room.path("kit.sock");
        let _ = std::fs::remove_file(&socket);
        let arguments = [&["-f", "-U", &socket][..], options].concat();
        let kit = call("nbdkit", arguments).dir(&self.room.dir).limit(300);
        self.running = Some(kit.start());
        wait_until(20, "nbdkit listens", || Path::new(&socket).exists());
    }

    fn uri(&self, certificates: &str) -> String {
        let socket = self.room.path("kit.sock");
        format!("nbds+unix:///?socket={socket}&tls-certificates={certificates}")
    }
}

fn client() -> Outcome {
    need_tool("nbdkit")?;
    let room = Room::new();
    let files = certificates(&room, "pki");
    let image = room.path("image");
    let words = (0..4 * MIB as u32).flat_map(u32::to_le_bytes);
    std::fs::write(&image, words.collect::<Vec<_>>()).unwrap();
    let tls = format!("--tls-certificates={files}");
    let kit = Kit::new(&room, &["--tls=require", &tls, "--tls-verify-peer", "memory", "16M"]);
    let copy = |from: &str, to: &str| room.devsplice(["copy", from, to, "--verify"]).ok();
    let _ = copy(&image, &kit.uri(&files));
    let _ = copy(&kit.uri(&files), &room.path("back"));
    assert!(std::fs::read(room.path("back")).unwrap() == std::fs::read(&image).unwrap());
    // Ours against ours, over TCP, through a layer, and at depth.
    let secret = Secret::new(&room, "mem:16M", &["--tls-certificates", &files]);
    let _ = copy(&image, &secret.tcp(&files));
    let _ = room.devsplice(["compare", &image, &secret.tcp(&files)]).ok();
    secret.remove();
    Ok(())
}

fn strangers() -> Outcome {
    need_tool("nbdkit")?;
    let room = Room::new();
    let (files, other) = (certificates(&room, "pki"), certificates(&room, "other"));
    let secret = Secret::new(&room, "mem:1M", &["--tls-certificates", &files, "--tls-verify-peer"]);
    let nobody = room.path("nobody");
    std::fs::create_dir_all(&nobody).unwrap();
    std::fs::copy(format!("{files}/ca-cert.pem"), format!("{nobody}/ca-cert.pem")).unwrap();
    let named = format!("{}&tls-hostname=elsewhere.example", secret.tcp(&files));
    for (uri, words) in [
        (secret.tcp(&other), "the server's certificate is by no authority"),
        (named, "the server's certificate is not for elsewhere.example"),
        (secret.plain(), "the server wants TLS"),
        (secret.tcp(&nobody), ""),
    ] {
        let refused = room.devsplice(["map", &uri]).run().ended_with(1);
        assert!(refused.err.contains(words), "{uri}: {}", refused.err);
    }
    // The client hears of it first.
    let words = "the client has shown no certificate";
    wait_until(20, words, || secret.log().contains(words));
    let any = format!("{}&tls-verify-peer=false", secret.tcp(&files));
    let _ = room.devsplice(["map", &any]).ok();
    secret.remove();
    let kit = Kit::new(&room, &["--tls=off", "memory", "1M"]);
    let refused = room.devsplice(["map", &kit.uri(&files)]).run().ended_with(1);
    assert!(refused.err.contains("speaks no TLS"), "{}", refused.err);
    Ok(())
}

fn options() -> Outcome {
    let room = Room::new();
    let (name, files) = (room.name(), certificates(&room, "pki"));
    let nbd = ["--listen", "unix:s"];
    for (options, words) in [
        (&["--tls", "require"][..], &["--tls", "--tls-certificates"][..]),
        (&["--tls-verify-peer"], &["--tls-verify-peer"]),
        (&["--tls-certificates", "/nonexistent"], &["/nonexistent/"]),
        (&["--tls-psk", "/nonexistent"], &["/nonexistent"]),
        (&["--tls-psk", "/keys", "--tls-certificates", &files], &["--tls-psk", "not by both"]),
        (&["--tls-psk", "/keys", "--tls-verify-peer"], &["--tls-psk", "not by both"]),
    ] {
        let arguments = [&["add", "mem:1M", "-n", &name][..], &nbd, options].concat();
        let said = room.refusal(arguments);
        for word in words {
            assert!(said.contains(word), "{options:?}: {said}");
        }
    }
    let said = room.refusal(["add", "mem:1M", "-n", &name, "--tls-certificates", &files]);
    assert!(said.contains("--tls-certificates") && said.contains("--listen"), "{said}");
    Ok(())
}
