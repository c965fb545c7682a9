//! Answers for TLS by the kernel against rustls in this process, over TCP: data while keys are
//! renewed from either side, and what else a peer may say. Where the kernel has no TLS they say so.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::{ClientConnection, StreamOwned};

use super::*;
use crate::{Certificates, Client, Secured, Server, Way};

#[path = "../../tests/authority/mod.rs"]
mod authority;

struct Room(PathBuf);

impl Drop for Room {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn room(name: &str) -> Room {
    let dir = std::env::temp_dir().join(format!("devsplice-ktls-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let authority = authority::Authority::new(name);
    authority.server(&dir, "localhost", (-1, 10));
    Room(dir)
}

fn has_kernel() -> bool {
    let can = crate::rehearsal::can(Cipher::Aes256Gcm);
    if !can {
        println!("skipped: this kernel has no TLS, or renews no keys");
        let must = std::env::var_os("DEVSPLICE_KTLS").is_some();
        assert!(!must, "the kernel was to have TLS");
    }
    can
}

fn end() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (ours, listener.accept().unwrap().0)
}

fn client(dir: &Path) -> Client {
    Client {
        certificates: Some(Certificates(dir.to_owned())),
        verify: true,
        name: "localhost".to_owned(),
        user: None,
    }
}

/// A side whose records the kernel sees to.
struct Sealed {
    socket: TcpStream,
    session: Box<Session>,
}

impl Sealed {
    fn new(secured: Secured) -> Sealed {
        let Way::Kernel(session) = secured.way else { panic!("not by the kernel") };
        let socket = TcpStream::from(secured.socket);
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Sealed { socket, session }
    }

    /// Receives some; nothing at the end.
    fn read(&mut self, into: &mut [u8]) -> std::result::Result<usize, String> {
        loop {
            match self.socket.read(into) {
                Err(error) if error.raw_os_error() == Some(5) => {
                    if !self.session.hear(self.socket.as_fd())? {
                        return Ok(0);
                    }
                }
                other => return other.map_err(|error| error.to_string()),
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(5000) {
            if self.session.is_due() {
                self.session.renew(self.socket.as_fd()).unwrap();
            }
            self.socket.write_all(part).unwrap();
            self.session.sent(part.len() as u64);
        }
    }
}

/// A server of ours by the kernel, and a client that is rustls.
fn server_and_rustls(dir: &Path) -> (Sealed, StreamOwned<ClientConnection, TcpStream>) {
    let (a, b) = pair();
    let mut handshake =
        Server::new(Certificates(dir.to_owned()), false).unwrap().accept(a.into()).unwrap();
    let serving = std::thread::spawn(move || {
        handshake.wait(end()).unwrap();
        handshake.finish(true, |_| (), || ()).unwrap()
    });
    let mut roots = rustls::RootCertStore::empty();
    use rustls::pki_types::pem::PemObject;
    let ca = rustls::pki_types::CertificateDer::from_pem_file(dir.join("ca-cert.pem")).unwrap();
    roots.add(ca).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(crate::files::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "localhost".try_into().unwrap();
    let mut stream = StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), b);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).unwrap();
    }
    stream.sock.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (Sealed::new(serving.join().unwrap()), stream)
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..len).map(next).collect()
}

#[test]
fn data_arrives_whole_while_a_peer_renews_keys_and_wants_ours_renewed() {
    if !has_kernel() {
        return;
    }
    let dir = room("renew");
    let (mut sealed, mut peer) = server_and_rustls(&dir.0);
    let data = noise(3 << 20);
    let echo = std::thread::spawn(move || {
        let mut room = vec![0; 70_000];
        let mut renewed = 0;
        loop {
            let count = sealed.read(&mut room).unwrap();
            if count == 0 {
                return renewed;
            }
            renewed += u32::from(sealed.session.is_due());
            sealed.write(&room[..count]);
        }
    });
    let mut back = vec![0; 64 << 10];
    for part in data.chunks(64 << 10) {
        peer.conn.refresh_traffic_keys().unwrap();
        peer.write_all(part).unwrap();
        peer.flush().unwrap();
        peer.read_exact(&mut back[..part.len()]).unwrap();
        assert!(&back[..part.len()] == part);
    }
    peer.conn.send_close_notify();
    peer.flush().unwrap();
    assert!(echo.join().unwrap() > 20, "keys were renewed");
}

#[test]
fn keys_are_renewed_before_they_are_worn_out() {
    if !has_kernel() {
        return;
    }
    let dir = room("worn");
    let (mut sealed, mut peer) = server_and_rustls(&dir.0);
    sealed.session.renew_at = 10;
    let data = noise(1 << 20);
    let copy = data.clone();
    let sending = std::thread::spawn(move || {
        sealed.write(&copy);
        assert!(sealed.session.records <= 10, "{:?}", sealed.session);
        sealed.session.close(sealed.socket.as_fd());
        sealed
    });
    let mut back = Vec::new();
    peer.read_to_end(&mut back).unwrap();
    assert!(back == data);
    drop(sending.join().unwrap());
}

#[test]
fn what_else_a_peer_says_is_heard_and_bounded() {
    if !has_kernel() {
        return;
    }
    let dir = room("aside");
    let says = |record: &[(u8, &[u8])]| {
        let (a, b) = pair();
        let server = Server::new(Certificates(dir.0.clone()), false).unwrap();
        let mut handshake = server.accept(a.into()).unwrap();
        let serving = std::thread::spawn(move || {
            handshake.wait(end()).unwrap();
            handshake.finish(true, |_| (), || ()).unwrap()
        });
        let mut handshake = client(&dir.0).connect(b.into()).unwrap();
        handshake.wait(end()).unwrap();
        let mut client = Sealed::new(handshake.finish(true, |_| (), || ()).unwrap());
        let mut server = Sealed::new(serving.join().unwrap());
        client.write(b"data");
        for (kind, bytes) in record {
            ktls::send(&client.socket, *kind, bytes).unwrap();
        }
        let mut room = [0; 4];
        assert_eq!(server.read(&mut room), Ok(4));
        assert_eq!(&room, b"data");
        server.read(&mut room)
    };
    assert_eq!(says(&[(ktls::ALERT, &CLOSE)]), Ok(0));
    for (records, words) in [
        (&[(ktls::ALERT, &[2, 49][..])][..], "the client says"),
        (&[(ktls::ALERT, &[1])], "an alert that is none"),
        // No ticket comes from a client.
        (&[(ktls::HANDSHAKE, &[4, 0, 0, 1, 0])], "may not come, 4"),
        (&[(ktls::HANDSHAKE, &[1, 0, 0, 9, 0])], "in parts"),
        (&[(ktls::HANDSHAKE, &[4, 0])], "in parts"),
        (&[(20, &[1])], "may not come"),
        (&[(ktls::ALERT, &[1, 90][..]); 101], "speaks of nothing but TLS"),
    ] {
        let said = says(records).unwrap_err();
        assert!(said.contains(words), "{said}");
    }
    // A few of those are nothing.
    let few = [&[(ktls::ALERT, &[1, 90][..]); 50][..], &[(ktls::ALERT, &CLOSE)]].concat();
    assert_eq!(says(&few), Ok(0));
}

#[test]
fn garbage_ends_a_connection_by_reason() {
    if !has_kernel() {
        return;
    }
    let dir = room("garbage");
    let (mut sealed, mut peer) = server_and_rustls(&dir.0);
    peer.write_all(b"good").unwrap();
    peer.flush().unwrap();
    peer.sock.write_all(&[23, 3, 3, 0, 32]).unwrap();
    peer.sock.write_all(&[9; 32]).unwrap();
    let mut room = [0; 64];
    assert_eq!(sealed.read(&mut room), Ok(4));
    let error = sealed.socket.read(&mut room).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::BADMSG.raw_os_error()), "{error}");
}

/// A socket that knows no TLS takes a record's bytes as they are.
#[test]
fn an_end_for_which_there_is_no_room_is_said_when_there_is_and_once() {
    struct None;
    impl Secrets for None {
        fn next(
            &mut self,
            _: Direction,
        ) -> std::result::Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
            Err(rustls::Error::HandshakeNotComplete)
        }
    }
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut session = Session::new::<crate::ServerSide>(Box::new(None), "the client");
    let mut sent = 0;
    while let Ok(count) = (&ours).write(&[7; 4096]) {
        sent += count;
    }
    for _ in 0..3 {
        assert!(!session.close(ours.as_fd()), "there is no room");
    }
    theirs.read_exact(&mut vec![0; sent]).unwrap();
    for _ in 0..3 {
        assert!(session.close(ours.as_fd()));
    }
    drop(ours);
    let mut said = Vec::new();
    theirs.read_to_end(&mut said).unwrap();
    assert_eq!(said, CLOSE);
    // Where nobody is any more there is nothing to wait for.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(theirs);
    let mut session = Session::new::<crate::ServerSide>(Box::new(None), "the client");
    assert!(session.close(ours.as_fd()));
}
