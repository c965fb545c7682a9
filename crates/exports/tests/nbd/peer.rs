//! Answers for a client that does exactly what a test says, and for a server to do it to.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_core::{Limits, Stack, StackBuilder};
use devsplice_engine::Counts;
use devsplice_exports::nbd::{Certificates, Device, Options, Secure, Server, Tls, Uri};
use devsplice_exports::threads::{Bottom, Service};
use devsplice_nbd::client::{Agreed, Handshake, Outcome, Wish};
use devsplice_nbd::wire::{self, Reply, can, chunk, command};
use devsplice_nbd::{Mode, Request};
use devsplice_tls::Client;
use devsplice_uring::{Bytes, FileKind, Remote};

use crate::authority::Authority;

/// Bytes of the file.
pub const SIZE: u64 = 64 << 20;
const MEMORY: &str = "/dev/shm";
const PATIENCE: Duration = Duration::from_secs(20);

/// Bytes of which each run is like no other.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// What a test may change.
pub struct Wishes {
    pub listen: Vec<String>,
    pub writable: bool,
    pub read_only: bool,
    pub connections: u16,
    pub depth: u16,
    pub threads: u16,
    /// Whether zeroing takes as long as writing.
    pub slow_zeroes: bool,
    /// Whether the file is in memory, where its data goes another way.
    pub in_memory: bool,
    /// Whether TLS is spoken by who likes, over a thread.
    pub by_tls: bool,
    /// A server whose export, as large as the file, is the disk's second half.
    pub server: Option<Arc<dyn Remote>>,
    /// What the disk is instead of the file.
    pub bytes: Option<Arc<dyn Bytes>>,
}

fn service(file: &std::fs::File, limits: Limits) -> Service {
    let mut builder = StackBuilder::new();
    let (root, _) = builder.backend("image", Limits { volatile_cache: true, ..limits }).unwrap();
    serve(vec![of(file)], builder.finish(root))
}

fn of(file: &std::fs::File) -> Bottom {
    Bottom::File { fd: OwnedFd::from(file.try_clone().unwrap()), kind: FileKind::Regular }
}

fn service_of(bytes: Arc<dyn Bytes>) -> Service {
    let mut builder = StackBuilder::new();
    let (root, _) = builder.backend("bytes", bytes.limits()).unwrap();
    serve(vec![Bottom::Bytes(bytes)], builder.finish(root))
}

fn secure(dir: &std::path::Path) -> Secure {
    let authority = Authority::new("authority");
    authority.server(dir, "localhost", (-1, 10));
    let server = Server::new(Certificates(dir.to_owned()), false).unwrap();
    Secure { policy: Tls::Offered, server, by_kernel: false }
}

/// The file, and a server's export behind it.
fn service_with(file: &std::fs::File, server: Arc<dyn Remote>) -> Service {
    let mut builder = StackBuilder::new();
    let mut below = |name| builder.backend(name, Limits::ideal(SIZE)).unwrap().0;
    let below = ["image", "server"].map(&mut below);
    let concat = devsplice_layers::find("concat").unwrap();
    let args = devsplice_core::Args::new("concat", concat.keys, &[]).unwrap();
    let layer = (concat.make)(&args).unwrap();
    let root = builder.layer("concat", layer, &below, &mut |_, _, _| Ok(())).unwrap();
    serve(vec![of(file), Bottom::Remote(server)], builder.finish(root))
}

fn serve(bottoms: Vec<Bottom>, stack: Stack) -> Service {
    Service {
        pool: None,
        stack: Arc::new(stack),
        bottoms,
        on_stuck: Arc::new(|stuck| panic!("{stuck:?}")),
        on_event: Arc::new(|text| eprintln!("{text}")),
        on_death: |error| panic!("{error}"),
    }
}

/// A server over a sparse file.
pub struct Host {
    device: Option<Device>,
    file: std::fs::File,
    dir: PathBuf,
}

impl Host {
    pub fn new(name: &str, change: impl FnOnce(&mut Wishes)) -> Host {
        let mut wishes = Wishes {
            listen: Vec::new(),
            writable: false,
            read_only: false,
            connections: 8,
            depth: 64,
            threads: 2,
            slow_zeroes: false,
            in_memory: false,
            by_tls: false,
            server: None,
            bytes: None,
        };
        change(&mut wishes);
        let above = if wishes.in_memory { PathBuf::from(MEMORY) } else { std::env::temp_dir() };
        let dir = above.join(format!("devsplice-nbd-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        wishes.listen.insert(0, format!("unix:{}", dir.join("s").display()));
        let mut open = std::fs::File::options();
        open.create(true).truncate(true).read(true).write(true);
        let file = open.open(dir.join("image")).unwrap();
        file.set_len(SIZE).unwrap();
        let fast_zeroes = !wishes.slow_zeroes;
        let service = match (wishes.server, wishes.bytes) {
            (Some(server), _) => service_with(&file, server),
            (None, Some(bytes)) => service_of(bytes),
            (None, None) => service(&file, Limits { fast_zeroes, ..Limits::ideal(SIZE) }),
        };
        let options = Options {
            name: "disk".to_owned(),
            listen: wishes.listen.iter().map(|text| Uri::parse(text).unwrap()).collect(),
            passed: Vec::new(),
            allow: Vec::new(),
            writable: wishes.writable,
            read_only: wishes.read_only,
            connections: wishes.connections,
            threads: wishes.threads,
            depth: wishes.depth,
            stuck_seconds: 0,
            secure: wishes.by_tls.then(|| secure(&dir)),
        };
        let device = Some(Device::attach(&options, service).unwrap());
        Host { device, file, dir }
    }

    pub fn device(&self) -> &Device {
        self.device.as_ref().unwrap()
    }

    pub fn size(&self) -> u64 {
        SIZE
    }

    /// Nobody serves while `meanwhile` is done; then the file is, with this size.
    pub fn resize(&mut self, size: u64, meanwhile: impl FnOnce(&Host)) {
        let suspended = self.device.take().unwrap().suspend().map_err(|(_, error)| error).unwrap();
        meanwhile(self);
        self.file.set_len(size).unwrap();
        let served = suspended.resume(service(&self.file, Limits::ideal(size)));
        self.device = Some(served.map_err(|(_, error)| error).unwrap());
    }

    pub fn socket(&self) -> String {
        self.dir.join("s").display().to_string()
    }

    pub fn peer(&self, mode: Mode) -> Peer {
        Peer::connect(&self.socket(), mode)
    }

    pub fn peer_by_tcp(&self) -> Peer {
        let uri = self.device().uris().iter().find(|uri| uri.starts_with("nbd://")).unwrap();
        let address = uri.trim_start_matches("nbd://").trim_end_matches("/disk");
        Peer::greet(TcpStream::connect(address).unwrap().into(), Mode::Structured)
    }

    pub fn peer_by_tls(&self) -> Peer {
        let uri = self.device().uris().iter().find(|uri| uri.starts_with("nbd://")).unwrap();
        let address = uri.trim_start_matches("nbd://").trim_end_matches("/disk");
        let certificates = Some(Certificates(self.dir.clone()));
        let name = "localhost".to_owned();
        let client = Client { certificates, verify: true, name, user: None };
        Peer::speak(TcpStream::connect(address).unwrap().into(), Mode::Structured, Some(&client))
    }

    /// What is in the file.
    pub fn file(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub fn cut_file(&self, len: u64) {
        self.file.set_len(len).unwrap();
    }

    pub fn wait_for(&self, is_so: impl Fn(&Counts) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so(&self.device().crew().counts()) {
            assert!(Instant::now() < end, "{:?}", self.device().crew().counts());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn wait_until(&self, clients: usize) {
        let end = Instant::now() + PATIENCE;
        while self.device().clients() != clients {
            assert!(Instant::now() < end, "{} clients are left", self.device().clients());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn wait_until_free(&self) {
        self.wait_until(0);
    }

    pub fn end(&mut self) {
        if let Some(device) = self.device.take() {
            device.detach().unwrap();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A reply without its cookie.
#[derive(Debug, Default)]
pub struct Answer {
    pub error: u32,
    pub data: Vec<u8>,
    pub kind: u16,
}

/// A client.
pub struct Peer {
    socket: std::fs::File,
    agreed: Agreed,
    cookie: u64,
    /// Reads that have no reply yet: a simple reply does not say how much data it has.
    reads: Vec<(u64, usize)>,
}

impl Peer {
    pub fn connect(path: &str, mode: Mode) -> Peer {
        Peer::greet(UnixStream::connect(path).unwrap().into(), mode)
    }

    fn greet(socket: OwnedFd, mode: Mode) -> Peer {
        Peer::speak(socket, mode, None)
    }

    fn speak(socket: OwnedFd, mode: Mode, tls: Option<&Client>) -> Peer {
        let mut socket = std::fs::File::from(socket);
        let (name, is_tls) = ("disk".into(), tls.is_some());
        let mut handshake = Handshake::new(Wish { name, mode, allocation: true, tls: is_tls });
        loop {
            if *handshake.outcome() == Outcome::Secure {
                let mut secure = tls.unwrap().connect(socket.into()).unwrap();
                secure.wait(Instant::now() + PATIENCE).unwrap();
                let say = |text: &str| eprintln!("{text}");
                socket = secure.finish(false, say, || ()).unwrap().socket.into();
                handshake.secured();
            }
            if *handshake.outcome() != Outcome::Open {
                break;
            }
            let count = handshake.output().len();
            socket.write_all(handshake.output()).unwrap();
            handshake.sent(count);
            // One by one: what follows the last is a reply's.
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            handshake.receive(&byte).unwrap();
        }
        let Outcome::Chosen(agreed) = handshake.outcome().clone() else {
            panic!("{:?}", handshake.outcome())
        };
        assert_eq!((agreed.mode, agreed.size % SIZE, agreed.block), (mode, 0, 512));
        Peer { socket, agreed, cookie: 77, reads: Vec::new() }
    }

    pub fn is_read_only(&self) -> bool {
        self.agreed.flags & can::READ_ONLY != 0
    }

    /// The bytes of a request.
    pub fn request(&mut self, command: u16, flags: u16, (offset, length): (u64, u64)) -> Vec<u8> {
        self.cookie += 1;
        let cookie = self.cookie;
        let mut flags = flags;
        if command == command::WRITE && self.agreed.mode == Mode::Extended {
            flags |= wire::ask::PAYLOAD_LEN;
        }
        if command == command::READ {
            self.reads.push((cookie, length as usize));
        }
        let request = Request { flags, command, cookie, offset, length };
        request.head(self.agreed.mode).bytes().to_vec()
    }

    pub fn last_cookie(&self) -> u64 {
        self.cookie
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Sends while replies are read, as a client must that sends more than sockets hold.
    pub fn send_from_thread(&self, bytes: Vec<u8>) {
        let mut socket = self.socket.try_clone().unwrap();
        std::thread::spawn(move || socket.write_all(&bytes).unwrap());
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The next reply, with its cookie.
    pub fn reply(&mut self) -> (u64, Answer) {
        let mut head = self.take(16);
        let (reply, len) = loop {
            if let Some(parsed) = Reply::parse(&head, self.agreed.mode).unwrap() {
                break parsed;
            }
            let byte = self.take(1);
            head.extend(byte);
        };
        assert_eq!(len, head.len());
        let read = |cookie, reads: &mut Vec<(u64, usize)>| {
            let index = reads.iter().position(|(one, _)| *one == cookie);
            index.map(|index| reads.swap_remove(index).1)
        };
        match reply {
            Reply::Simple { cookie, error } => {
                let len = read(cookie, &mut self.reads).filter(|_| error == 0).unwrap_or(0);
                (cookie, Answer { error, data: self.take(len), kind: 0 })
            }
            Reply::Chunk { cookie, flags, kind, length } => {
                assert_eq!(flags, chunk::DONE, "replies are of one chunk");
                let asked = read(cookie, &mut self.reads);
                let mut data = self.take(length as usize);
                let number = |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().unwrap());
                let error = if kind == chunk::ERROR { number(0) } else { 0 };
                if kind == chunk::DATA {
                    assert_eq!(Some(data.len() - 8), asked);
                    data.drain(..8);
                }
                (cookie, Answer { error, data, kind })
            }
        }
    }

    /// Cookies of the good replies without data that come before the connection ends.
    pub fn answered_until_end(&mut self) -> Vec<u64> {
        let mut bytes = Vec::new();
        // Where the server has left something unread that is how the end looks.
        if let Err(error) = self.socket.read_to_end(&mut bytes) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        let mut cookies = Vec::new();
        let mut rest = &bytes[..];
        while let Some((reply, len)) = Reply::parse(rest, self.agreed.mode).unwrap() {
            let Reply::Chunk { cookie, kind: chunk::NONE, length: 0, .. } = reply else {
                panic!("{reply:?}")
            };
            cookies.push(cookie);
            rest = &rest[len..];
        }
        assert!(rest.is_empty(), "a part of a reply");
        cookies
    }

    fn ask(&mut self, bytes: &[u8]) -> Answer {
        let cookie = self.cookie;
        self.send(bytes);
        let (answered, answer) = self.reply();
        assert_eq!(answered, cookie);
        answer
    }

    pub fn read(&mut self, at: u64, len: u32) -> Result<Vec<u8>, u32> {
        let bytes = self.request(command::READ, 0, (at, u64::from(len)));
        let answer = self.ask(&bytes);
        if answer.error == 0 { Ok(answer.data) } else { Err(answer.error) }
    }

    pub fn write(&mut self, at: u64, data: &[u8], flags: u16) -> u32 {
        let mut bytes = self.request(command::WRITE, flags, (at, data.len() as u64));
        bytes.extend(data);
        self.ask(&bytes).error
    }

    pub fn plain(&mut self, command: u16, flags: u16, range: (u64, u64)) -> u32 {
        let bytes = self.request(command, flags, range);
        self.reads.clear();
        self.ask(&bytes).error
    }

    /// Extents: length and state.
    pub fn status(&mut self, flags: u16, range: (u64, u64)) -> Vec<(u64, u64)> {
        let bytes = self.request(command::BLOCK_STATUS, flags, range);
        let answer = self.ask(&bytes);
        let is_wide = answer.kind == chunk::STATUS_EXTENDED;
        assert!(is_wide || answer.kind == chunk::STATUS, "{answer:?}");
        let half = if is_wide { 8 } else { 4 };
        let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, b| sum << 8 | u64::from(*b));
        let extents = &answer.data[half..];
        assert_eq!(number(&answer.data[..4]), 1, "the context's number");
        if is_wide {
            assert_eq!(number(&answer.data[4..8]) as usize, extents.len() / 16);
        }
        extents.chunks(half * 2).map(|one| (number(&one[..half]), number(&one[half..]))).collect()
    }

    pub fn disconnect(mut self) {
        let bytes = self.request(command::DISCONNECT, 0, (0, 0));
        self.send(&bytes);
        let mut rest = Vec::new();
        self.socket.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }

    pub fn socket(&self) -> UnixStream {
        UnixStream::from(self.socket.as_fd().try_clone_to_owned().unwrap())
    }

    /// Goes without a word.
    pub fn cut(self) {
        let _ = self.socket().shutdown(std::net::Shutdown::Both);
    }
}
