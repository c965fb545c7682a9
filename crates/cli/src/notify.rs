//! Answers for what systemd is told of a disk's processes, where it has started them
//! (`NOTIFY_SOCKET`, see sd_notify(3)): one datagram for each message, and nothing else.
//!
//! The main process is always the guard: it outlives its server and takes its place, so for systemd
//! the unit's main process never dies while the disk is served.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError};
use std::time::Duration;

/// The disk at `device` is served, by this process; `guard` waits for its end.
pub fn ready(device: &str, guard: i32) {
    // A guard that has just become a server was the main process until now.
    send(&format!("READY=1\nMAINPID={guard}\nSTATUS=serving {device}"));
}

/// The disk is going.
pub fn stopping() {
    send("STOPPING=1\nSTATUS=removing the disk");
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
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
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
    fn signs_of_life_come_twice_as_often_as_asked_for() {
        assert_eq!(watchdog(Some("3000000")), Some(Duration::from_millis(1500)));
        for none in [None, Some(""), Some("0"), Some("-1"), Some("soon")] {
            assert_eq!(watchdog(none), None);
        }
    }
}
