//! Answers for what systemd is told of a disk's processes, where it has started them
//! (`NOTIFY_SOCKET`, see sd_notify(3)): one datagram for each message, and nothing else.
//!
//! The main process is the guard: it outlives its server and takes its place, so for systemd the
//! unit's main process never dies while the disk is served. A server that has lost its guard is the
//! main process itself: when it dies, the unit is started again.

use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// How many the kernel takes in one message (`SCM_MAX_FD`).
const AT_ONCE: usize = 253;

/// The disk at `device` is served, by this process; `guard` waits for its end.
pub fn ready(device: &str, guard: i32) {
    // A guard that has just become a server was the main process until now.
    send(&format!("READY=1\nMAINPID={guard}\nSTATUS=serving {device}"));
}

/// This process has lost its guard, and is the main one now.
pub fn unguarded() {
    send(&format!("MAINPID={}", std::process::id()));
}

/// The disk is going.
pub fn stopping() {
    send("STOPPING=1\nSTATUS=removing the disk");
}

/// Has systemd keep these descriptors as `name`, and give them to the unit's next start; nothing
/// else as `name` any more. It does not poll them: it would be woken for each request.
pub fn store(name: &str, fds: &[OwnedFd]) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    unstore(name);
    for fds in fds.chunks(AT_ONCE) {
        // Where it cannot, the disk is kept by its guard alone.
        let _ = send_with(&socket, &format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), fds);
    }
}

/// Has systemd close what it keeps as `name`.
pub fn unstore(name: &str) {
    send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
}

/// Takes the next message, as `recv` does. Where systemd wants a sign of life every now and then
/// (`WATCHDOG_USEC`), it gets it meanwhile: from the thread that commands go through.
///
/// # Errors
/// As `recv`.
pub fn recv<T>(news: &Receiver<T>) -> Result<T, RecvError> {
    let Some(every) = watchdog(std::env::var("WATCHDOG_USEC").ok().as_deref()) else {
        return news.recv();
    };
    loop {
        send("WATCHDOG=1");
        match news.recv_timeout(every) {
            Ok(one) => return Ok(one),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(RecvError),
        }
    }
}

/// How often to give a sign of life: twice as often as it is asked for, as sd_watchdog_enabled(3)
/// recommends.
fn watchdog(microseconds: Option<&str>) -> Option<Duration> {
    let asked: u64 = microseconds?.parse().ok()?;
    (asked > 1).then(|| Duration::from_micros(asked / 2))
}

fn send(message: &str) {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET") {
        // Who is not there to be told is not our affair.
        let _ = send_to(&socket, message);
    }
}

fn send_to(socket: &OsStr, message: &str) -> std::io::Result<()> {
    send_with(socket, message, &[])
}

fn send_with(socket: &OsStr, message: &str, fds: &[OwnedFd]) -> std::io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    let to = UnixDatagram::unbound()?;
    to.connect_addr(&address)?;
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let rights = SendAncillaryMessage::ScmRights(&fds);
    let mut room = vec![MaybeUninit::uninit(); rights.size()];
    let mut along = SendAncillaryBuffer::new(&mut room);
    if !fds.is_empty() {
        along.push(rights);
    }
    sendmsg(&to, &[IoSlice::new(message.as_bytes())], &mut along, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{IoSliceMut, Read};

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    #[test]
    fn a_message_is_one_datagram_by_path_and_by_abstract_name() {
        let path = std::env::temp_dir().join(format!("devsplice-notify-{}", std::process::id()));
        let name = format!("devsplice-notify-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, address) in [
            (path.clone().into_os_string(), SocketAddr::from_pathname(&path).unwrap()),
            (format!("@{name}").into(), by_name),
        ] {
            let systemd = UnixDatagram::bind_addr(&address).unwrap();
            systemd.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            send_to(&socket, "READY=1\nMAINPID=7").unwrap();
            let mut room = [0; 100];
            let count = systemd.recv(&mut room).unwrap();
            assert_eq!(&room[..count], b"READY=1\nMAINPID=7");
        }
        std::fs::remove_file(path).unwrap();
        assert!(send_to(OsStr::new("/no/such/socket"), "").is_err());
    }

    #[test]
    fn descriptors_are_handed_over() {
        let name = format!("devsplice-store-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let systemd = UnixDatagram::bind_addr(&address).unwrap();
        systemd.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let fds = [OwnedFd::from(writer)];
        send_with(OsStr::new(&format!("@{name}")), "FDSTORE=1\nFDNAME=fuse-7", &fds).unwrap();
        drop(fds);
        let (mut text, mut room) = ([0; 100], vec![MaybeUninit::uninit(); 100]);
        let mut along = RecvAncillaryBuffer::new(&mut room);
        let mut parts = [IoSliceMut::new(&mut text)];
        let got = recvmsg(&systemd, &mut parts, &mut along, RecvFlags::empty()).unwrap();
        let fds: Vec<OwnedFd> = along
            .drain()
            .flat_map(|one| match one {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                _ => Vec::new(),
            })
            .collect();
        assert_eq!((&text[..got.bytes], fds.len()), (&b"FDSTORE=1\nFDNAME=fuse-7"[..], 1));
        rustix::io::write(&fds[0], b"x").unwrap();
        drop(fds);
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "x");
    }

    #[test]
    fn signs_of_life_come_twice_as_often_as_asked_for() {
        assert_eq!(watchdog(Some("3000000")), Some(Duration::from_millis(1500)));
        for none in [None, Some(""), Some("0"), Some("-1"), Some("soon")] {
            assert_eq!(watchdog(none), None);
        }
    }
}
