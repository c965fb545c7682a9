//! A connection whose TLS the kernel would do, with a stand-in for it, as plain bytes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use devsplice_core::{Limits, StackBuilder};
use devsplice_nbd::server::Session;
use devsplice_nbd::wire::{can, command};
use devsplice_nbd::{Mode, Request};
use devsplice_uring::FileKind;
use devsplice_uring::ktls::Records;

use super::super::post::Letter;
use super::super::{Device, Options, Uri};
use super::*;
use crate::threads::{Bottom, Service};

const SIZE: u64 = 1 << 20;
const LAST_WORD: &[u8] = b"close_notify";

/// Records of which the last finds no room so many times.
#[derive(Debug)]
struct StandIn {
    refusals: u32,
    is_closed: bool,
}

impl Records for StandIn {
    fn hear(&mut self, _: BorrowedFd<'_>) -> Result<bool, String> {
        Ok(false)
    }
    fn sent(&mut self, _: u64) {}
    fn is_due(&self) -> bool {
        false
    }
    fn renew(&mut self, _: BorrowedFd<'_>) -> Result<(), String> {
        Ok(())
    }
    fn close(&mut self, socket: BorrowedFd<'_>) -> bool {
        if self.is_closed {
            return true;
        }
        if self.refusals > 0 {
            self.refusals -= 1;
            return false;
        }
        self.is_closed = true;
        let flags = rustix::net::SendFlags::DONTWAIT;
        assert_eq!(rustix::net::send(socket, LAST_WORD, flags), Ok(LAST_WORD.len()));
        true
    }
}

/// A server over a file, and its directory.
fn serve(name: &str) -> (Device, std::path::PathBuf) {
    let dir = std::env::temp_dir().join(format!("devsplice-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let mut open = std::fs::File::options();
    open.create(true).truncate(true).read(true).write(true);
    let file = open.open(dir.join("image")).unwrap();
    file.set_len(SIZE).unwrap();
    let mut builder = StackBuilder::new();
    let (root, _) = builder.backend("image", Limits::ideal(SIZE)).unwrap();
    let service = Service {
        pool: None,
        stack: Arc::new(builder.finish(root)),
        bottoms: vec![Bottom::File { fd: file.into(), kind: FileKind::Regular }],
        on_stuck: Arc::new(|stuck| panic!("{stuck:?}")),
        on_event: Arc::new(|text| eprintln!("{text}")),
        on_death: |error| panic!("{error}"),
    };
    let options = Options {
        name: "disk".to_owned(),
        listen: vec![Uri::parse(&format!("unix:{}", dir.join("s").display())).unwrap()],
        passed: Vec::new(),
        allow: Vec::new(),
        writable: true,
        read_only: false,
        connections: 1,
        threads: 1,
        depth: 8,
        stuck_seconds: 0,
        secure: None,
    };
    (Device::attach(&options, service).unwrap(), dir)
}

/// A client that has chosen, over TCP.
fn client(device: &Device, refusals: u32) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let flags = can::HAS_FLAGS | can::FLUSH;
    let session =
        Session { mode: Mode::Structured, flags, size: SIZE, block: 512, allocation: false };
    let client = Client {
        socket: listener.accept().unwrap().0.into(),
        records: Some(Box::new(StandIn { refusals, is_closed: false })),
        session,
        early: Vec::new(),
        peer: "a test".to_owned(),
    };
    device.post.take_desk().unwrap().send(Letter::Client(Box::new(client)));
    ours
}

fn request(command: u16, length: u64) -> Vec<u8> {
    let request = Request { flags: 0, command, cookie: 1, offset: 0, length };
    request.head(Mode::Structured).bytes().to_vec()
}

/// Bytes of a reply to a read: a head, the offset, the data.
const REPLY: usize = 20 + 8 + 4096;

fn hears_the_end(client: &mut TcpStream, replies: usize) {
    let mut bytes = vec![0; replies * REPLY + LAST_WORD.len()];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes[replies * REPLY..], LAST_WORD);
}

#[test]
fn a_client_that_leaves_hears_the_end_when_there_is_room_for_it() {
    let (device, dir) = serve("last-word");
    for refusals in [0, 1, 3] {
        let mut client = client(&device, refusals);
        let reads = request(command::READ, 4096).repeat(20);
        client.write_all(&[reads, request(command::DISCONNECT, 0)].concat()).unwrap();
        hears_the_end(&mut client, 20);
        while device.clients() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    device.detach().unwrap();
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_client_that_is_sent_away_hears_the_end_when_there_is_room_for_it() {
    for refusals in [0, 1, 3] {
        let (device, dir) = serve("sent-away");
        let mut client = client(&device, refusals);
        client.write_all(&request(command::READ, 4096)).unwrap();
        client.read_exact(&mut [0; REPLY]).unwrap();
        let ending = std::thread::spawn(move || device.suspend().map_err(|(_, error)| error));
        hears_the_end(&mut client, 0);
        drop(client);
        assert!(ending.join().unwrap().is_ok());
        std::fs::remove_dir_all(dir).unwrap();
    }
}

/// Nobody waits for ever for who takes nothing.
#[test]
fn a_client_for_whose_last_word_there_is_never_room_is_cut_off_at_an_end() {
    let (device, dir) = serve("no-room");
    let mut client = client(&device, u32::MAX);
    client.write_all(&request(command::DISCONNECT, 0)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(device.clients(), 1);
    device.detach().unwrap();
    assert!(!matches!(client.read(&mut [0; 16]), Ok(1..)), "nothing was said");
    std::fs::remove_dir_all(dir).unwrap();
}
