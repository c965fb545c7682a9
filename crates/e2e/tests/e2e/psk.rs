//! Answers for NBD over TLS by keys of users (PSK), with the tools that people use, which do TLS by
//! GnuTLS: whose key is right comes in, nobody else does, and each is told why.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use devsplice_e2e::{Call, Group, MIB, Mode, Outcome, Room, Skip, call, mode, need, need_tool};

use crate::tls::{Kit, Secret, certificates, goes_there_and_back, tool};

pub fn add(group: &mut Group) {
    group.add("tools_copy_by_keys_over_either_kind_of_socket", copies);
    group.add("who_has_no_key_or_another_is_told_so_and_so_is_the_log", refused);
    group.add("an_older_tls_is_refused_by_reason_on_either_side", older);
    group.add("a_server_by_keys_is_read_and_written_and_others_are_refused_by_reason", client);
    group.add("keys_are_read_again_for_each_client", renewed);
    group.add("files_of_keys_that_are_none_are_refused_by_line", files);
}

/// A directory of the room with a key for `alice`, as GnuTLS makes it.
pub fn keys(room: &Room, name: &str) -> Result<String, Skip> {
    need_tool("psktool")?;
    built_in(room)?;
    let dir = room.path(name);
    std::fs::create_dir_all(&dir).unwrap();
    let _ = call("psktool", ["-u", "alice", "-p", &format!("{dir}/keys.psk")]).limit(20).ok();
    Ok(dir)
}

/// Whether the program that is tested was built with the feature.
fn built_in(room: &Room) -> Result<(), Skip> {
    let (name, none) = (room.name(), room.path("none.psk"));
    let all = ["add", "mem:1M", "-n", &name, "--listen", "unix:s", "--tls-psk", &none];
    need(!room.refusal(all).contains("built without"), "it was built without the feature psk")
}

/// A file of keys that only its owner can read.
fn write(path: &str, text: impl AsRef<[u8]>) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// Where a disk is reached over TCP, as a user with a file.
fn tcp(secret: &Secret<'_>, user: &str, file: &str) -> String {
    let (name, port) = (&secret.name, &secret.port);
    format!("nbds://{user}@127.0.0.1:{port}/{name}?tls-psk-file={file}")
}

fn unix(room: &Room, secret: &Secret<'_>, user: &str, file: &str) -> String {
    let name = &secret.name;
    let socket = room.path(&format!("{name}.sock"));
    format!("nbds+unix://{user}@/{name}?socket={socket}&tls-psk-file={file}")
}

fn copies() -> Outcome {
    need_tool("nbdcopy")?;
    need_tool("nbdinfo")?;
    let room = Room::new();
    let file = format!("{}/keys.psk", keys(&room, "keys")?);
    let a = room.file("a.img", 32 * MIB);
    let secret = Secret::new(&room, &a, &["--tls-psk", &file, "--threads", "2"]);
    for uri in [unix(&room, &secret, "alice", &file), tcp(&secret, "alice", &file)] {
        goes_there_and_back(&room, &uri, &a);
    }
    assert_eq!(secret.info()["features"], serde_json::json!(["tls-require", "tls-psk"]));
    secret.remove();
    // Where it is only offered, others come in without.
    let secret = Secret::new(&room, "mem:8M", &["--tls", "on", "--tls-psk", &file]);
    let told = tool(&room, "nbdinfo", &[&secret.plain()]).ok();
    assert!(told.contains("without TLS"), "{told}");
    let told = tool(&room, "nbdinfo", &[&tcp(&secret, "alice", &file)]).ok();
    assert!(told.contains("with TLS"), "{told}");
    secret.remove();
    Ok(())
}

fn refused() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let (file, pki) = (format!("{}/keys.psk", keys(&room, "keys")?), certificates(&room, "pki"));
    let other = room.path("other.psk");
    write(&other, format!("alice:{0}\nmallory:{0}\n", "5a".repeat(32)));
    let secret = Secret::new(&room, "mem:8M", &["--tls-psk", &file]);
    let info = |uri: &str| tool(&room, "nbdinfo", &[uri]).run();
    let of_pki = format!("nbds://127.0.0.1:{}/?tls-certificates={pki}", secret.port);
    for (uri, words, ours) in [
        (tcp(&secret, "alice", &other), "`alice`, and has another key", "another key"),
        (tcp(&secret, "mallory", &other), "`mallory`, of whom", "no such user"),
        (of_pki, "the client has no key of a user in", "by PSK?"),
        (secret.plain(), "wants no TLS, which is required", "the server wants TLS"),
    ] {
        let _ = secret.refuses(info(&uri), words);
        let said = room.devsplice(["map", &uri]).run().ended_with(1).err;
        assert!(said.contains(ours), "{uri}: {said}");
    }
    assert!(info(&tcp(&secret, "alice", &file)).ok().out.contains("with TLS"), "no others are");
    assert!(!secret.log().contains("5a5a"), "keys are told to nobody");
    secret.remove();
    // A server with certificates, and clients with keys.
    let secret = Secret::new(&room, "mem:8M", &["--tls-certificates", &pki]);
    let _ = secret.refuses(info(&tcp(&secret, "alice", &file)), "TLS: the client");
    let said = room.devsplice(["map", &tcp(&secret, "alice", &file)]).run().ended_with(1).err;
    assert!(said.contains("certificates only"), "{said}");
    secret.remove();
    Ok(())
}

/// GnuTLS with nothing newer than TLS 1.2.
fn old(room: &Room, name: &str, arguments: &[&str]) -> Call {
    let path = room.path("gnutls.conf");
    std::fs::write(&path, "[overrides]\ndisabled-version = tls1.3\n").unwrap();
    tool(room, name, arguments).env("GNUTLS_SYSTEM_PRIORITY_FILE", path)
}

fn older() -> Outcome {
    need_tool("nbdinfo")?;
    need_tool("nbdkit")?;
    let room = Room::new();
    let file = format!("{}/keys.psk", keys(&room, "keys")?);
    let secret = Secret::new(&room, "mem:8M", &["--tls-psk", &file]);
    let ran = old(&room, "nbdinfo", &[&tcp(&secret, "alice", &file)]).run();
    let _ = secret.refuses(ran, "the client speaks no TLS 1.3");
    secret.remove();
    let (socket, psk) = (room.path("kit.sock"), format!("--tls-psk={file}"));
    let kit = ["-f", "-U", &socket, "--tls=require", &psk, "memory", "1M"];
    let _kit = old(&room, "nbdkit", &kit).limit(300).start();
    devsplice_e2e::wait_until(20, "nbdkit listens", || Path::new(&socket).exists());
    let uri = format!("nbds+unix://alice@/?socket={socket}&tls-psk-file={file}");
    let said = room.devsplice(["map", &uri]).run().ended_with(1).err;
    assert!(said.contains("or no TLS 1.3"), "{said}");
    Ok(())
}

fn client() -> Outcome {
    need_tool("nbdkit")?;
    let room = Room::new();
    let file = format!("{}/keys.psk", keys(&room, "keys")?);
    let image = room.path("image");
    let words = (0..4 * MIB as u32).flat_map(u32::to_le_bytes);
    std::fs::write(&image, words.collect::<Vec<_>>()).unwrap();
    let psk = format!("--tls-psk={file}");
    let kit = Kit::new(&room, &["--tls=require", &psk, "memory", "16M"]);
    let uri = |user: &str, file: &str| {
        let socket = room.path("kit.sock");
        format!("nbds+unix://{user}@/?socket={socket}&tls-psk-file={file}")
    };
    let copy = |from: &str, to: &str| room.devsplice(["copy", from, to, "--verify"]).ok();
    // A path from where the command is started.
    let _ = copy(&image, &uri("alice", "keys/keys.psk"));
    let _ = copy(&uri("alice", &file), &room.path("back"));
    assert!(std::fs::read(room.path("back")).unwrap() == std::fs::read(&image).unwrap());
    let other = room.path("other.psk");
    write(&other, format!("alice:{0}\nmallory:{0}\n", "5a".repeat(32)));
    let open = room.path("open.psk");
    std::fs::copy(&file, &open).unwrap();
    std::fs::set_permissions(&open, Permissions::from_mode(0o644)).unwrap();
    let gone = room.path("gone.psk");
    for (uri, words) in [
        (uri("alice", &other), "it may not know `alice`, or have another key"),
        (uri("mallory", &other), "it may not know `mallory`, or have another key"),
        (uri("mallory", &file), "has no key of the user `mallory`"),
        (uri("alice", &open), "chmod 600"),
        (uri("alice", &gone), "gone.psk"),
        (uri("", &file), "says whose keys, but not who"),
    ] {
        let said = room.devsplice(["map", &uri]).run().ended_with(1).err;
        assert!(said.contains(words), "{uri}: {said}");
    }
    drop(kit);
    let pki = certificates(&room, "pki");
    let tls = format!("--tls-certificates={pki}");
    let _kit = Kit::new(&room, &["--tls=require", &tls, "memory", "1M"]);
    let said = room.devsplice(["map", &uri("alice", &file)]).run().ended_with(1).err;
    assert!(said.contains("certificates only"), "{said}");
    Ok(())
}

fn renewed() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let file = format!("{}/keys.psk", keys(&room, "keys")?);
    let secret = Secret::new(&room, "mem:8M", &["--tls-psk", &file]);
    let info = || tool(&room, "nbdinfo", &[&tcp(&secret, "alice", &file)]).run();
    assert_eq!(info().code, Some(0));
    write(&file, format!("alice:{}\n", "7e".repeat(32)));
    assert_eq!(info().code, Some(0), "another key");
    std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    let _ = secret.refuses(info(), "others can get at it");
    write(&file, "alice\n");
    let _ = secret.refuses(info(), "line 1 is not USER:KEY");
    std::fs::remove_file(&file).unwrap();
    let _ = secret.refuses(info(), "keys.psk");
    write(&file, format!("alice:{}\n", "7e".repeat(32)));
    assert_eq!(info().code, Some(0), "the server has not suffered");
    secret.remove();
    Ok(())
}

fn files() -> Outcome {
    need(mode() == Mode::Native, "it needs nothing of the machine's kernel")?;
    let room = Room::new();
    built_in(&room)?;
    let (name, file) = (room.name(), room.path("keys.psk"));
    let good = format!("alice:{}\n", "7e".repeat(32));
    let lines: String = (0..100_000).map(|one| format!("u{one}:{}\n", "1f".repeat(16))).collect();
    for (text, words) in [
        ("\n", "has no key"),
        ("alice 12\n", "line 1 is not USER:KEY"),
        ("alice:12\n", "line 1 has a key of 1 bytes, not 16 to 64"),
        (&format!("{good}bob:{}\n", "xy".repeat(16)), "line 2 has a key that is not in hex"),
        (&format!("{good}{good}"), "line 2 is of a user that"),
        (&format!("bob:{}\n", "1f".repeat(65)), "line 1 has a key of more than 64 bytes"),
        (&format!("{}:{}\n", "b".repeat(129), "1f".repeat(16)), "line 1 has a name of 129 bytes"),
        (&format!("b\0b:{}\n", "1f".repeat(16)), "line 1 has a name with control characters"),
        (&lines, "has more than"),
    ] {
        write(&file, text);
        let said =
            room.refusal(["add", "mem:1M", "-n", &name, "--listen", "unix:s", "--tls-psk", &file]);
        assert!(said.contains(words) && said.contains("keys.psk"), "{said}");
        assert!(!said.contains("1f1f") && !said.contains("7e7e"), "{said}");
    }
    write(&file, &good);
    for (bits, words) in [(0o644, "mode 644"), (0o660, "mode 660"), (0o602, "mode 602")] {
        std::fs::set_permissions(&file, Permissions::from_mode(bits)).unwrap();
        let said =
            room.refusal(["add", "mem:1M", "-n", &name, "--listen", "unix:s", "--tls-psk", &file]);
        assert!(said.contains(words) && said.contains("chmod 600"), "{said}");
    }
    Ok(())
}
