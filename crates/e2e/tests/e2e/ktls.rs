//! Answers for NBD over TLS by the kernel: every byte of it, and that it is the kernel where it
//! can. Where it cannot, the same goes through threads, which is looked at, too.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;

use devsplice_e2e::{
    Disk, Group, Kind, MIB, Mode, Outcome, Room, call, mode, need_tool, verify, wait_until,
};

use crate::tls::{Secret, certificates, fio_with};

pub fn add(group: &mut Group, kind: Kind) {
    group.add("nbdcopy_copies_again_and_again_inside_tls_by_the_kernel", again);
    group.add("fio_verifies_inside_tls_by_the_kernel_32_deep", || fio_with(&["--tls-kernel"]));
    group.add("our_disk_keeps_every_byte_inside_tls_by_the_kernel", move || ours(kind));
    group.add("nbdkits_disk_keeps_every_byte_inside_tls_by_the_kernel", move || nbdkits(kind));
    group.add("who_breaks_tls_by_the_kernel_is_cut_off_and_no_other", broken);
}

/// Whether the kernel does TLS, and renews keys (Linux 6.14).
fn has_kernel() -> bool {
    if mode() == Mode::Vm && need_tool("modprobe").is_ok() {
        let _ = call("modprobe", ["-q", "tls"]).run();
    }
    let list = "/proc/sys/net/ipv4/tcp_available_ulp";
    let has_tls = std::fs::read_to_string(list).unwrap_or_default().contains("tls");
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    has_tls && (numbers.next(), numbers.next()) >= (Some(6), Some(14))
}

fn words(len: u64) -> Vec<u8> {
    (0..u32::try_from(len / 4).unwrap()).flat_map(u32::to_le_bytes).collect()
}

fn again() -> Outcome {
    need_tool("nbdcopy")?;
    let room = Room::new();
    let files = certificates(&room, "pki");
    let (image, back) = (room.path("image"), room.path("back"));
    std::fs::write(&image, words(16 * MIB)).unwrap();
    let options = ["--tls-certificates", &files, "--tls-kernel", "--tls-verify-peer"];
    let secret = Secret::new(&room, "mem:16M", &options);
    let uri = secret.tcp(&files);
    // An emulated processor takes seconds for each.
    for _ in 0..if mode() == Mode::Vm { 6 } else { 10 } {
        let _ = call("nbdcopy", [&image, &uri]).limit(60).ok();
    }
    let _ = call("nbdcopy", [&uri, &back]).limit(60).ok();
    assert!(std::fs::read(&back).unwrap() == words(16 * MIB));
    assert_eq!(
        secret.info()["features"],
        serde_json::json!(["tls-require", "tls-verify-peer", "tls-kernel"])
    );
    secret.remove();
    Ok(())
}

/// All of a disk behind a server, verified; how its TLS is done is as it should be.
fn every_byte(room: &Room, kind: Kind, uri: &str) {
    let disk: Disk<'_> = room.add(kind, uri, &[]);
    assert_eq!(disk.info()["servers"][0]["tls_kernel"], has_kernel());
    let _ = verify(room, &disk.node, 4 * MIB, "4k-256k");
    let info = disk.info();
    assert_eq!(info["servers"][0]["reconnects"], 0, "{info:#}");
    if kind.is_ublk() {
        assert_eq!(info["counts"]["bytes_copied"], 0, "{info:#}");
    }
    disk.remove();
}

fn ours(kind: Kind) -> Outcome {
    let room = Room::new();
    let files = certificates(&room, "pki");
    let secret = Secret::new(&room, "mem:32M", &["--tls-certificates", &files, "--tls-kernel"]);
    every_byte(&room, kind, &format!("{}&tls-kernel=on", secret.tcp(&files)));
    // One of both ends is the kernel's, the other is not.
    every_byte_by_halves(&room, &secret, &files);
    secret.remove();
    Ok(())
}

fn every_byte_by_halves(room: &Room, secret: &Secret<'_>, files: &str) {
    let image = room.path("image");
    std::fs::write(&image, words(32 * MIB)).unwrap();
    let _ = room.devsplice(["copy", &image, &secret.tcp(files), "--verify"]).ok();
    let plain = Secret::new(room, "mem:32M", &["--tls-certificates", files]);
    let uri = format!("{}&tls-kernel=on", plain.tcp(files));
    let _ = room.devsplice(["copy", &image, &uri, "--verify"]).ok();
    plain.remove();
}

/// nbdkit, which does TLS by GnuTLS, and gives tickets.
fn nbdkits(kind: Kind) -> Outcome {
    need_tool("nbdkit")?;
    let room = Room::new();
    let files = certificates(&room, "pki");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let tls = format!("--tls-certificates={files}");
    let arguments = ["-f", "-i", "127.0.0.1", "-p", &port, "--tls=require", &tls, "memory", "32M"];
    let running = call("nbdkit", arguments).dir(&room.dir).limit(300).start();
    let address = format!("127.0.0.1:{port}");
    wait_until(20, "nbdkit listens", || TcpStream::connect(&address).is_ok());
    let uri = format!("nbds://{address}/?tls-certificates={files}&tls-kernel=on");
    every_byte(&room, kind, &uri);
    drop(running);
    Ok(())
}

/// Between a client and a server: after so many bytes of the client's, one is changed, or nothing
/// more comes.
fn between(port: &str, after: usize, changes: bool) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = format!("127.0.0.1:{port}");
    let carry = move |mut from: TcpStream, mut to: TcpStream, after: usize| {
        let (mut room, mut done) = (vec![0; 16 << 10], 0);
        while let Ok(count @ 1..) = from.read(&mut room) {
            let bad = (done..done + count).contains(&after);
            if bad && changes {
                room[after - done] ^= 1;
            }
            let whole = if bad && !changes { after - done } else { count };
            if to.write_all(&room[..whole]).is_err() || whole < count {
                break;
            }
            done += count;
        }
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    };
    let between = std::thread::spawn(move || {
        let client = listener.accept().unwrap().0;
        let server = TcpStream::connect(server).unwrap();
        let (theirs, ours) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        let back = std::thread::spawn(move || carry(theirs, ours, usize::MAX));
        carry(client, server, after);
        back.join().unwrap();
    });
    (address, between)
}

fn broken() -> Outcome {
    need_tool("nbdcopy")?;
    let room = Room::new();
    let files = certificates(&room, "pki");
    let image = room.path("image");
    std::fs::write(&image, words(16 * MIB)).unwrap();
    let secret = Secret::new(&room, "mem:16M", &["--tls-certificates", &files, "--tls-kernel"]);
    let good = secret.tcp(&files);
    for (after, changes) in [(3_000_000, true), (3_000_000, false), (5_000_001, true)] {
        let (address, between) = between(&secret.port, after, changes);
        let bad = good.replace(&format!("127.0.0.1:{}", secret.port), &address);
        let other = call("nbdcopy", [&image, &good]).limit(60).start();
        let ran = call("nbdcopy", ["--connections=1", &image, &bad]).limit(60).run();
        assert_ne!(ran.code, Some(0), "{}", ran.out);
        between.join().unwrap();
        assert_eq!(other.finish().code, Some(0), "another client is disturbed");
        let _ = call("nbdcopy", [&image, &good]).limit(60).ok();
        if changes {
            wait_until(20, "a reason", || secret.log().contains("TLS: "));
        }
    }
    assert!(Path::new(&image).exists());
    secret.remove();
    Ok(())
}
