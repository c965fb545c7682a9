//! Answers for TLS from socket to socket: what goes in comes out, each end is carried over, and
//! what is wrong with whom is said.
#![allow(clippy::unwrap_used)]

mod authority;

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use authority::Authority;
use devsplice_core::Result;
use devsplice_tls::{Certificates, Client, Handshake, Keys, Secured, Server, Side};

/// A directory with all that a server and a client need.
struct Room {
    dir: PathBuf,
    /// Whether they have keys instead of certificates.
    is_keyed: bool,
}

impl Room {
    fn new(name: &str) -> Room {
        Room::with(name, |dir| {
            let authority = Authority::new(name);
            authority.server(dir, "localhost", (-1, 10));
            authority.client(dir, "somebody", (-1, 10));
        })
    }

    fn with(name: &str, fill: impl FnOnce(&Path)) -> Room {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (id, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(format!("devsplice-tls-{name}-{id}-{number}"));
        std::fs::create_dir_all(&dir).unwrap();
        fill(&dir);
        Room { dir, is_keyed: false }
    }

    /// With keys for `alice` and `bob`.
    #[cfg(feature = "psk")]
    fn keyed(name: &str) -> Room {
        let mut room = Room::with(name, |_| ());
        room.is_keyed = true;
        room.write_keys(&[("bob", 'b'), ("alice", 'a')]);
        room
    }

    /// One of each kind.
    fn both(name: &str) -> Vec<Room> {
        vec![
            Room::new(name),
            #[cfg(feature = "psk")]
            Room::keyed(name),
        ]
    }

    fn keys(&self) -> Keys {
        Keys(self.dir.join("keys.psk"))
    }

    /// Users, and of what digit their keys are.
    fn write_keys(&self, users: &[(&str, char)]) {
        let line =
            |(user, digit): &(&str, char)| format!("{user}:{}\n", digit.to_string().repeat(64));
        std::fs::write(&self.keys().0, users.iter().map(line).collect::<String>()).unwrap();
        std::fs::set_permissions(&self.keys().0, Permissions::from_mode(0o600)).unwrap();
    }

    fn server(&self, verify: bool) -> Server {
        if self.is_keyed {
            return Server::by_keys(self.keys()).unwrap();
        }
        Server::new(Certificates(self.dir.clone()), verify).unwrap()
    }

    fn client(&self) -> Client {
        Client {
            certificates: Some(Certificates(self.dir.clone())),
            verify: true,
            name: "localhost".to_owned(),
            user: self.is_keyed.then(|| ("alice".to_owned(), self.keys())),
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

const PATIENCE: Duration = Duration::from_secs(20);

fn end() -> Instant {
    Instant::now() + PATIENCE
}

/// One side that has agreed: its socket, what is said of it, and the word that it is over.
struct End {
    socket: UnixStream,
    said: Receiver<String>,
    over: Receiver<()>,
}

fn finish<S: Side>(mut handshake: Handshake<S>) -> Result<End> {
    handshake.wait(end())?;
    let (say, said) = channel();
    let (ended, over) = channel();
    let Secured { socket, .. } = handshake.finish(
        true,
        move |text| drop(say.send(text.to_owned())),
        move || {
            let _ = ended.send(());
        },
    )?;
    let socket = UnixStream::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    Ok(End { socket, said, over })
}

/// What both sides come to, the server's result first.
fn meet(server: &Server, client: &Client) -> (Result<End>, Result<End>) {
    let (a, b) = UnixStream::pair().unwrap();
    let begun = server.accept(OwnedFd::from(a)).unwrap();
    let serving = std::thread::spawn(move || finish(begun));
    let client = client.connect(OwnedFd::from(b)).and_then(finish);
    (serving.join().unwrap(), client)
}

fn both(room: &Room) -> (End, End) {
    let (server, client) = meet(&room.server(false), &room.client());
    (server.unwrap(), client.unwrap())
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
fn what_goes_in_comes_out_both_ways_at_once() {
    Room::both("data").iter().for_each(data_in);
}

fn data_in(room: &Room) {
    let (mut server, mut client) = both(room);
    let data = noise(5 << 20);
    std::thread::scope(|scope| {
        for end in [&server, &client] {
            let (mut to, mut from) =
                (end.socket.try_clone().unwrap(), end.socket.try_clone().unwrap());
            let data = &data;
            scope.spawn(move || {
                // Pieces of any size.
                let mut rest = &data[..];
                for size in [1, 17, 16_384, 16_385, 65_536, 100_000, usize::MAX] {
                    let (now, then) = rest.split_at(rest.len().min(size));
                    to.write_all(now).unwrap();
                    rest = then;
                }
            });
            scope.spawn(move || {
                let mut all = vec![0; data.len()];
                from.read_exact(&mut all).unwrap();
                assert!(all == *data);
            });
        }
    });
    // Half an end is an end of that half.
    client.socket.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(server.socket.read(&mut [0]).unwrap(), 0);
    server.socket.write_all(b"still").unwrap();
    let mut rest = [0; 5];
    client.socket.read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b"still");
    drop(server.socket);
    assert_eq!(client.socket.read(&mut [0]).unwrap(), 0);
    for over in [server.over, client.over] {
        over.recv_timeout(PATIENCE).unwrap();
    }
    assert!(server.said.try_recv().is_err() && client.said.try_recv().is_err());
}

#[test]
fn nothing_grows_when_nobody_takes() {
    Room::both("full").iter().for_each(full_in);
}

fn full_in(room: &Room) {
    let (server, mut client) = both(room);
    client.socket.set_nonblocking(true).unwrap();
    let (data, mut sent, end) = (noise(64 << 10), 0, end());
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_millis(500) {
        assert!(Instant::now() < end && sent < 16 << 20, "{sent} bytes were taken by nobody");
        match client.socket.write(&data) {
            Ok(count) => (sent, last) = (sent + count, Instant::now()),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    drop(server);
    // Whose end is gone takes what comes, for a while, until the peer goes.
    drop(client.socket);
    client.over.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn what_is_changed_on_the_way_ends_it_and_is_told() {
    Room::both("changed").iter().for_each(changed_in);
}

fn changed_in(room: &Room) {
    let (a, outer) = UnixStream::pair().unwrap();
    let (inner, b) = UnixStream::pair().unwrap();
    let begun = room.server(false).accept(OwnedFd::from(a)).unwrap();
    let serving = std::thread::spawn(move || finish(begun).unwrap());
    let (mut from, mut to) = (inner.try_clone().unwrap(), outer.try_clone().unwrap());
    let back = std::thread::spawn(move || {
        let (mut from, mut to) = (outer, inner);
        let _ = std::io::copy(&mut from, &mut to);
    });
    let (tell, told) = channel::<()>();
    let forth = std::thread::spawn(move || {
        let mut room = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut room) {
            if told.try_recv().is_ok() {
                room[count - 1] ^= 1;
            }
            if to.write_all(&room[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    let mut client = room.client().connect(OwnedFd::from(b)).and_then(finish).unwrap();
    let mut server = serving.join().unwrap();
    client.socket.write_all(b"good").unwrap();
    let mut four = [0; 4];
    server.socket.read_exact(&mut four).unwrap();
    tell.send(()).unwrap();
    client.socket.write_all(b"evil").unwrap();
    assert_eq!(server.socket.read(&mut four).unwrap(), 0, "not a byte of it comes through");
    let said = server.said.recv_timeout(PATIENCE).unwrap();
    assert!(said.starts_with("the client"), "{said}");
    server.over.recv_timeout(PATIENCE).unwrap();
    drop(client.socket);
    client.over.recv_timeout(PATIENCE).unwrap();
    forth.join().unwrap();
    back.join().unwrap();
}

/// Each side's words, where both sides fail.
fn words(server: &Server, client: &Client) -> (String, String) {
    let (server, client) = meet(server, client);
    let words = |result: Result<End>| match result {
        Err(error) => error.to_string(),
        // With TLS 1.3 a client is done before the server has looked at its certificate.
        Ok(mut end) => {
            assert_eq!(end.socket.read(&mut [0]).unwrap(), 0);
            end.said.recv_timeout(PATIENCE).unwrap()
        }
    };
    (words(server), words(client))
}

fn assert_words((server, client): &(String, String), theirs: &str, ours: &str) {
    assert!(server.contains(theirs), "the server says `{server}`, not `{theirs}`");
    assert!(client.contains(ours), "the client says `{client}`, not `{ours}`");
}

#[test]
fn a_server_that_is_not_who_it_should_be_is_refused_by_reason() {
    let room = Room::new("server");
    let mut client = room.client();
    let plain = room.server(false);
    client.name = "elsewhere.example".to_owned();
    let said = words(&plain, &client);
    assert_words(&said, "certificate", "is not for elsewhere.example, but for");
    let other = Room::new("other");
    let said = words(&other.server(false), &room.client());
    assert_words(&said, "no authority", "the server's certificate is by no authority");
    client.verify = false;
    assert!(meet(&other.server(false), &client).1.is_ok(), "asked not to look");
    let old = Room::with("old", |dir| Authority::new("a").server(dir, "localhost", (-20, -10)));
    let said = words(&old.server(false), &old.client());
    assert_words(&said, "has expired", "the server's certificate has expired");
    let soon = Room::with("soon", |dir| Authority::new("a").server(dir, "localhost", (10, 20)));
    let said = words(&soon.server(false), &soon.client());
    assert_words(&said, "certificate", "the server's certificate is not valid yet");
}

#[test]
fn a_client_that_may_not_come_in_is_told_why() {
    let room = Room::new("client");
    let server = room.server(true);
    let (ours, theirs) = meet(&server, &room.client());
    assert!(ours.is_ok() && theirs.is_ok());
    let mut nobody = room.client();
    std::fs::remove_file(room.dir.join("client-cert.pem")).unwrap();
    let said = words(&server, &nobody);
    assert_words(&said, "the client has shown no certificate", "you have to show a certificate");
    // By another authority, but believing this server.
    let other = Room::new("stranger");
    std::fs::copy(room.dir.join("ca-cert.pem"), other.dir.join("ca-cert.pem")).unwrap();
    nobody.certificates = Some(Certificates(other.dir.clone()));
    let said = words(&server, &nobody);
    assert_words(&said, "the client's certificate is by no authority", "the server says");
}

#[test]
fn what_is_revoked_is_refused_on_either_side_and_nothing_else_is() {
    for (serial, theirs, ours) in [
        (8, "the client's certificate has been revoked", "the server says"),
        (7, "the client says", "the server's certificate has been revoked"),
    ] {
        let authority = Authority::new("revoked");
        let room = Room::with("revoked", |dir| {
            authority.server(dir, "localhost", (-1, 10));
            authority.client(dir, "somebody", (-1, 10));
            authority.revoke(dir, 99);
        });
        let (server, client) = meet(&room.server(true), &room.client());
        assert!(server.is_ok() && client.is_ok(), "{:?} {:?}", server.err(), client.err());
        authority.revoke(&room.dir, serial);
        let said = words(&room.server(true), &room.client());
        assert_words(&said, theirs, ours);
    }
}

#[test]
fn who_speaks_no_tls_is_told_so_at_once() {
    Room::both("plain").iter().for_each(plain_in);
}

fn plain_in(room: &Room) {
    for garbage in [&b"IHAVEOPT"[..], &[0x16, 3, 1, 0xff, 0xff, 0], &[0x17, 3, 3, 0, 1, 0]] {
        let (a, mut b) = UnixStream::pair().unwrap();
        b.write_all(garbage).unwrap();
        let mut handshake = room.server(false).accept(OwnedFd::from(a)).unwrap();
        let error = handshake.wait(Instant::now() + Duration::from_secs(2)).unwrap_err();
        assert!(error.to_string().starts_with("TLS: the client"), "{error}");
        assert!(!error.to_string().contains("in time"), "{error}");
    }
    let (a, b) = UnixStream::pair().unwrap();
    let mut handshake = room.server(false).accept(OwnedFd::from(a)).unwrap();
    let error = handshake.wait(Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(error.to_string().contains("in time"), "{error}");
    drop(b);
    let error = handshake.wait(end()).unwrap_err();
    assert!(error.to_string().contains("has gone"), "{error}");
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    for (name, text, reason) in [
        ("server-key.pem", None, "server-key.pem"),
        ("server-key.pem", Some("no key"), "no private key"),
        ("server-cert.pem", Some("nothing"), "has no certificate"),
        ("ca-cert.pem", Some("nothing"), "has no certificate"),
        ("ca-crl.pem", Some("nothing"), "ca-crl.pem"),
    ] {
        let room = Room::new("files");
        let path = room.dir.join(name);
        match text {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let error = Server::new(Certificates(room.dir.clone()), true).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(reason), "{error}");
    }
    let (room, other) = (Room::new("key"), Room::new("other-key"));
    std::fs::copy(other.dir.join("server-key.pem"), room.dir.join("server-key.pem")).unwrap();
    let error = Server::new(Certificates(room.dir.clone()), false).unwrap_err().to_string();
    assert!(error.contains("server-cert.pem"), "{error}");
}

#[test]
fn a_directory_that_was_named_and_has_nothing_is_not_replaced_by_the_systems_authorities() {
    let refused = |room: &Room, dir: &str| {
        let (a, _b) = UnixStream::pair().unwrap();
        let certificates = Some(Certificates(room.dir.join(dir)));
        let client = Client { certificates, ..room.client() };
        client.connect(OwnedFd::from(a)).map(drop).unwrap_err().to_string()
    };
    let room = Room::new("named");
    let said = refused(&room, "typo");
    assert!(said.contains("typo") && said.contains("neither ca-cert.pem"), "{said}");
    // One that cannot be looked at.
    let said = refused(&room, "server-cert.pem");
    assert!(said.contains("server-cert.pem/ca-cert.pem"), "{said}");
}

#[test]
fn a_client_that_is_gone_leaves_nothing_on_its_way() {
    Room::both("rest").iter().for_each(rest_in);
}

fn rest_in(room: &Room) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut theirs = listener.accept().unwrap().0;
    let mut begun = room.server(false).accept(theirs.try_clone().unwrap().into()).unwrap();
    let serving = std::thread::spawn(move || begun.wait(end()).map(|()| begun));
    let mut client = room.client().connect(ours.into()).and_then(finish).unwrap();
    // It takes nothing any more.
    let _served = serving.join().unwrap().unwrap();
    client.socket.set_nonblocking(true).unwrap();
    let (data, mut sent, mut last) = (noise(64 << 10), 0, Instant::now());
    while last.elapsed() < Duration::from_millis(300) {
        match client.socket.write(&data) {
            Ok(count) => (sent, last) = (sent + count, Instant::now()),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    client.socket.shutdown(std::net::Shutdown::Both).unwrap();
    client.over.recv_timeout(Duration::from_secs(3)).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    let error = theirs.read_to_end(&mut rest).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(rest.len() < sent, "{} of {sent} bytes have come", rest.len());
}

/// What both say, where one of them has keys, of each kind of fault.
#[test]
#[cfg(feature = "psk")]
fn who_has_no_key_or_another_is_refused_by_reason() {
    let (room, other) = (Room::keyed("keys"), Room::keyed("other"));
    let (server, client) = (room.server(false), |user: &str, room: &Room| Client {
        user: Some((user.to_owned(), room.keys())),
        ..room.client()
    });
    assert!(meet(&server, &client("bob", &room)).1.is_ok());
    other.write_keys(&[("alice", 'c'), ("mallory", 'a'), ("Alice", 'a'), ("alic", 'a')]);
    let (theirs, ours) = ("and has another key than", "no such user, or another key");
    assert_words(&words(&server, &client("alice", &other)), theirs, ours);
    for stranger in ["mallory", "Alice", "alic"] {
        let theirs = format!("says that it is `{stranger}`, of whom");
        assert_words(&words(&server, &client(stranger, &other)), &theirs, ours);
    }
    // Names are compared whole, and cut where they are shown.
    let long = "l".repeat(128);
    other.write_keys(&[(&long, 'c')]);
    room.write_keys(&[(&long, 'a'), ("alice", 'a')]);
    let theirs = format!("says that it is `{}`..., and has another key than", &long[..64]);
    assert_words(&words(&server, &client(&long, &other)), &theirs, ours);
    other.write_keys(&[("mallory", 'c')]);
    let file = room.keys().0.display().to_string();
    assert!(words(&server, &client("mallory", &other)).0.contains(&file));
    // Nobody by that name in the client's own file.
    let (a, _b) = UnixStream::pair().unwrap();
    let error = client("carol", &room).connect(OwnedFd::from(a)).map(drop).unwrap_err();
    assert!(error.to_string().contains("has no key of the user `carol`"), "{error}");
}

#[test]
#[cfg(feature = "psk")]
fn certificates_and_keys_do_not_meet() {
    let (keyed, certified) = (Room::keyed("keyed"), Room::new("certified"));
    let said = words(&keyed.server(false), &certified.client());
    assert_words(&said, "has no key of a user in", "without certificates, by PSK?");
    // A server that anybody believes by its certificate is not one that has the key.
    for verify in [false, true] {
        let said = words(&certified.server(verify), &keyed.client());
        assert_words(&said, "the client", "the server");
        println!("{said:?}");
    }
}

#[test]
#[cfg(feature = "psk")]
fn keys_are_read_again_for_each_client() {
    let room = Room::keyed("again");
    let server = room.server(false);
    room.write_keys(&[("alice", 'e')]);
    assert!(meet(&server, &room.client()).1.is_ok());
    std::fs::set_permissions(&room.keys().0, Permissions::from_mode(0o604)).unwrap();
    let (a, _b) = UnixStream::pair().unwrap();
    let error = server.accept(OwnedFd::from(a)).map(drop).unwrap_err().to_string();
    assert!(error.contains("keys.psk") && error.contains("604"), "{error}");
}

#[test]
#[cfg(feature = "psk")]
fn a_thousand_users_are_each_let_in() {
    let room = Room::keyed("many");
    let names: Vec<_> = (0..999).map(|number| format!("user-{number}")).collect();
    let users: Vec<(&str, char)> =
        names.iter().map(|name| (name.as_str(), 'f')).chain([("alice", 'd')]).collect();
    room.write_keys(&users);
    let server = room.server(false);
    for user in ["user-0", "user-998", "alice"] {
        let client = Client { user: Some((user.to_owned(), room.keys())), ..room.client() };
        assert!(meet(&server, &client).1.is_ok(), "{user}");
    }
}

/// A ClientHello in one record that names as many users, none of them known.
#[cfg(feature = "psk")]
fn naming(users: usize) -> Vec<u8> {
    let long = |body: &[u8]| [&u16::try_from(body.len()).unwrap().to_be_bytes(), body].concat();
    let extension = |kind: u8, body: &[u8]| [&[0, kind][..], &long(body)].concat();
    let names = [0, 1, b'x', 0, 0, 0, 0].repeat(users);
    let binders = long(&[&[32][..], &[9; 32]].concat());
    let extensions = [
        extension(43, &[2, 3, 4]),
        extension(10, &long(&[0, 0x1d])),
        extension(13, &long(&[4, 3, 8, 4])),
        extension(51, &long(&[&[0, 0x1d][..], &long(&[9; 32])].concat())),
        extension(45, &[1, 1]),
        extension(41, &[long(&names), binders].concat()),
    ];
    let head = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 0x01, 1, 0]].concat();
    let message = [head, long(&extensions.concat())].concat();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let message = [&[1][..], &length[1..], &message].concat();
    [&[22, 3, 1][..], &long(&message)].concat()
}

#[test]
#[cfg(feature = "psk")]
fn who_names_many_users_does_not_keep_others_waiting() {
    let room = Room::keyed("crowd");
    let names: Vec<_> = (0..1000).map(|number| format!("{number}")).collect();
    room.write_keys(&names.iter().map(|name| (name.as_str(), 'f')).collect::<Vec<_>>());
    let server = room.server(false);
    let refused = |users| {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(&naming(users)).unwrap();
        let begun = Instant::now();
        let error = server.accept(OwnedFd::from(near)).unwrap().wait(end()).unwrap_err();
        (begun.elapsed(), error.to_string())
    };
    for (users, why) in [(1, "`x`, of whom"), (1100, "`x`, of whom"), (2000, "longer than any")] {
        // The machine may be busy with something else.
        let all: Vec<_> = (0..5).map(|_| refused(users)).collect();
        let (least, said) = all.iter().min().unwrap();
        println!("{users} users: {least:?}, {said}");
        assert!(said.contains(why), "{said}");
        assert!(*least < Duration::from_millis(50), "{users} users: {least:?}");
    }
}

#[test]
#[cfg(not(feature = "psk"))]
fn keys_are_refused_where_they_were_not_built_in() {
    let room = Room::with("none", |_| ());
    room.write_keys(&[("alice", 'a')]);
    let error = Server::by_keys(room.keys()).unwrap_err().to_string();
    assert!(error.contains("keys.psk") && error.contains("without TLS with keys"), "{error}");
    let (a, _b) = UnixStream::pair().unwrap();
    let client = Client { user: Some(("alice".to_owned(), room.keys())), ..room.client() };
    let error = client.connect(OwnedFd::from(a)).map(drop).unwrap_err().to_string();
    assert!(error.contains("built without"), "{error}");
}
