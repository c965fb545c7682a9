//! A ring and servers that speak the protocol well, badly or not to the end.
#![allow(clippy::cast_possible_truncation)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devsplice_engine::{Event, Ring};
use devsplice_nbd::wire::{Head, ask as flag, can, chunk, command, error};
use devsplice_nbd::{Mode, Request};

use super::*;
use crate::ring::LaneMemory;
use crate::setup;

const SIZE: usize = 4 << 20;
const DEPTH: u16 = 8;
/// Bytes of a tag's memory.
const ROOM: usize = 1 << 20;
const ALL: u16 = can::HAS_FLAGS | can::FLUSH | can::FUA | can::TRIM | can::WRITE_ZEROES;
const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// Memory at addresses that fit a part: a slot of a user's memory is named by its address. One
/// test at a time has it.
static PAGES: [AtomicU8; ROOM * DEPTH as usize] =
    [const { AtomicU8::new(0) }; ROOM * DEPTH as usize];
static USED: Mutex<()> = Mutex::new(());

type Serve = dyn Fn(&mut Peer, u32) -> Option<()> + Send + Sync;

/// A server in this process: what it does with its n-th connection.
struct Fake {
    agreed: Agreed,
    patience: Patience,
    forsaken: AtomicBool,
    told: Mutex<Vec<String>>,
    dials: AtomicU32,
    disk: Arc<Mutex<Vec<u8>>>,
    serve: Arc<Serve>,
    over_tcp: AtomicBool,
}

/// Its side of a connection.
struct Peer {
    stream: UnixStream,
    mode: Mode,
    disk: Arc<Mutex<Vec<u8>>>,
}

impl Remote for Fake {
    fn name(&self) -> &str {
        "fake"
    }
    fn agreed(&self) -> &Agreed {
        &self.agreed
    }
    fn patience(&self) -> Patience {
        self.patience
    }
    fn forsake(&self) {
        self.forsaken.store(true, Relaxed);
    }
    fn is_forsaken(&self) -> bool {
        self.forsaken.load(Relaxed)
    }
    fn dial(&self, line: &Arc<Line>, lost: Option<&str>) {
        self.told.lock().unwrap().extend(lost.map(str::to_owned));
        let number = self.dials.fetch_add(1, Relaxed);
        let (ours, theirs) = match self.over_tcp.load(Relaxed) {
            false => UnixStream::pair().unwrap(),
            true => tcp_pair(),
        };
        let (serve, line) = (Arc::clone(&self.serve), Arc::clone(line));
        let mut peer = Peer { stream: theirs, mode: self.agreed.mode, disk: self.disk.clone() };
        let agreed = self.agreed.clone();
        std::thread::spawn(move || {
            if number > 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
            line.deliver(Link { socket: ours.into(), agreed, beyond: None, records: None });
            serve(&mut peer, number);
        });
    }
    fn part(&self) {}
    fn most_lines(&self) -> u16 {
        1
    }
    fn tell(&self, text: &str) {
        self.told.lock().unwrap().push(text.to_owned());
    }
    fn listen(&self, _: Box<dyn Fn(&str) + Send>) {}
    fn standing(&self) -> Standing {
        Standing::default()
    }
    fn look_ahead(&self) {}
    fn tells_now(&self) -> bool {
        false
    }
    fn look_now(&self, _: u64, _: u64, _: Instant) -> Option<Vec<Extent>> {
        None
    }
    fn look(&self, _: u64, _: u64) -> Option<Extent> {
        None
    }
}

/// Two ends of a connection over TCP that holds little on its way.
fn tcp_pair() -> (UnixStream, UnixStream) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    set_socket_recv_buffer_size(&listener, 64 << 10).unwrap();
    // Packets as large as this machine's way to itself takes would each fill the window: then
    // bytes move when a timer probes it, and rarely.
    let (fd, most) = (listener.as_raw_fd(), 1400_i32);
    let (name, len) = (libc::TCP_MAXSEG, size_of_val(&most) as u32);
    // SAFETY: the kernel reads `most`, which lives here, before the call returns.
    let set =
        unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, name, (&raw const most).cast(), len) };
    assert_eq!(set, 0);
    let ours = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    for end in [&ours, &theirs] {
        set_socket_send_buffer_size(end, 64 << 10).unwrap();
        set_socket_recv_buffer_size(end, 64 << 10).unwrap();
    }
    // A descriptor is read and written in the same way, whatever its kind.
    (UnixStream::from(OwnedFd::from(ours)), UnixStream::from(OwnedFd::from(theirs)))
}

/// So many bytes at a time, at so many a second.
const SIP: usize = 16 << 10;
const SLOWLY: u64 = 200 << 10;

fn sip() {
    std::thread::sleep(Duration::from_nanos(SIP as u64 * 1_000_000_000 / SLOWLY));
}

impl Peer {
    /// Does all that is asked, slowly: data comes and goes in small pieces. Stops for good once
    /// `until` bytes of a write are read.
    fn slowly(&mut self, until: usize) -> Option<()> {
        loop {
            let mut head = vec![0; self.mode.request_len()];
            self.stream.read_exact(&mut head).ok()?;
            let request = Request::parse(&head, self.mode).unwrap()?;
            let is_write = request.command == command::WRITE;
            let mut data = vec![0; if is_write { request.length as usize } else { 0 }];
            for (count, piece) in data.chunks_mut(SIP).enumerate() {
                if count * SIP >= until {
                    std::thread::sleep(Duration::from_secs(20));
                    return None;
                }
                self.stream.read_exact(piece).ok()?;
                sip();
            }
            let data = self.carry_out(&request, &data);
            if request.command != command::READ {
                self.done(&request, 0)?;
                continue;
            }
            let head = Head::data(self.mode, (request.cookie, request.offset), data.len() as u32);
            self.say(head.bytes())?;
            for piece in data.chunks(SIP) {
                self.say(piece)?;
                sip();
            }
        }
    }

    /// The next request with its data; none when the client has gone.
    fn next(&mut self) -> Option<(Request, Vec<u8>)> {
        let mut head = vec![0; self.mode.request_len()];
        self.stream.read_exact(&mut head).ok()?;
        let request = Request::parse(&head, self.mode).unwrap().unwrap();
        if request.command == command::DISCONNECT {
            return None;
        }
        let is_write = request.command == command::WRITE;
        let mut data = vec![0; if is_write { request.length as usize } else { 0 }];
        self.stream.read_exact(&mut data).ok()?;
        Some((request, data))
    }

    fn say(&mut self, bytes: &[u8]) -> Option<()> {
        self.stream.write_all(bytes).ok()
    }

    fn done(&mut self, request: &Request, error: u32) -> Option<()> {
        let head = Head::done(self.mode, (request.cookie, request.offset), error);
        self.say(head.bytes())
    }

    /// A chunk of a read's answer.
    fn chunk(&mut self, request: &Request, (at, data): (u64, &[u8]), flags: u16) -> Option<()> {
        let head = Head::data(self.mode, (request.cookie, at), data.len() as u32);
        let mut bytes = head.bytes().to_vec();
        if self.mode != Mode::Simple {
            bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        }
        bytes.extend(data);
        self.say(&bytes)
    }

    /// Does what was asked, on its disk; the answer's data.
    fn carry_out(&self, request: &Request, data: &[u8]) -> Vec<u8> {
        let mut disk = self.disk.lock().unwrap();
        let range = request.offset as usize..(request.offset + request.length) as usize;
        match request.command {
            command::READ => return disk[range].to_vec(),
            command::WRITE => disk[range].copy_from_slice(data),
            command::WRITE_ZEROES => disk[range].fill(0),
            _ => {}
        }
        Vec::new()
    }

    /// Serves as one should, answers turned round by twos, reads in pieces of `cut` bytes.
    fn well(&mut self, cut: usize) -> Option<()> {
        let mut kept: Option<(Request, Vec<u8>)> = None;
        loop {
            if kept.is_some() {
                // There may be no second one.
                let soon = Some(Duration::from_millis(2));
                self.stream.set_read_timeout(soon).unwrap();
                let peek = rustix::net::RecvFlags::PEEK;
                let more = rustix::net::recv(&self.stream, &mut [0_u8; 1], peek).is_ok();
                self.stream.set_read_timeout(None).unwrap();
                if !more {
                    let (request, data) = kept.take()?;
                    self.answer(&request, &data, cut)?;
                }
            }
            let (request, data) = self.next()?;
            let data = self.carry_out(&request, &data);
            match kept.take() {
                None => kept = Some((request, data)),
                Some((first, other)) => {
                    self.answer(&request, &data, cut)?;
                    self.answer(&first, &other, cut)?;
                }
            }
        }
    }

    fn answer(&mut self, request: &Request, data: &[u8], cut: usize) -> Option<()> {
        if request.command != command::READ {
            return self.done(request, 0);
        }
        if self.mode == Mode::Simple {
            return self.chunk(request, (request.offset, data), 0);
        }
        let parts: Vec<_> = (0..).zip(data.chunks(cut.max(data.len() / 5 + 1))).collect();
        for (index, part) in parts.iter().rev() {
            let at = request.offset + index * parts[0].1.len() as u64;
            if part.iter().any(|byte| *byte != 0) {
                self.chunk(request, (at, part), 0)?;
                continue;
            }
            let (wide, len) = (self.mode == Mode::Extended, part.len() as u32);
            let mut bytes = Head::data(self.mode, (request.cookie, at), 4).bytes().to_vec();
            bytes[4..8].copy_from_slice(&[0, 0, 0, chunk::HOLE as u8]);
            assert_eq!(bytes.len(), if wide { 40 } else { 28 });
            bytes.extend(len.to_be_bytes());
            self.say(&bytes)?;
        }
        self.done(request, 0)
    }
}

/// A ring with a place behind such a server.
struct Client {
    ring: Uring,
    file: FileId,
    has_slots: bool,
    fake: Arc<Fake>,
}

fn agreed(mode: Mode, flags: u16) -> Agreed {
    let (size, most) = (SIZE as u64, 1 << 20);
    Agreed { mode, flags, size, block: 512, preferred: 4096, most, allocation: None }
}

const PATIENT: Patience = Patience { answer: 0, outage: None };

impl Client {
    fn new(
        what: (Mode, u16),
        has_slots: bool,
        patience: Patience,
        serve: impl Fn(&mut Peer, u32) -> Option<()> + Send + Sync + 'static,
    ) -> Client {
        Client::over(what, (has_slots, false), patience, serve)
    }

    fn over(
        (mode, flags): (Mode, u16),
        (has_slots, over_tcp): (bool, bool),
        patience: Patience,
        serve: impl Fn(&mut Peer, u32) -> Option<()> + Send + Sync + 'static,
    ) -> Client {
        let fake = Arc::new(Fake {
            agreed: agreed(mode, flags),
            patience,
            forsaken: AtomicBool::new(false),
            told: Mutex::default(),
            dials: AtomicU32::new(0),
            disk: Arc::new(Mutex::new(vec![0; SIZE])),
            serve: Arc::new(serve),
            over_tcp: AtomicBool::new(over_tcp),
        });
        let bytes = if has_slots { 0 } else { ROOM as u32 };
        let lane = LaneMemory { depth: DEPTH, bytes, slots: has_slots, locked: false };
        let config = super::super::Config { flights: 16, files: 1, lanes: vec![lane], inner: 0 };
        let mut ring = Uring::new(&config).unwrap();
        if has_slots {
            for tag in 0..DEPTH {
                let at = &PAGES[usize::from(tag) * ROOM..];
                let memory = (at.as_ptr() as u64, ROOM as u64);
                setup::put_buffer(&ring.queues.fd, u32::from(tag), memory).unwrap();
            }
        }
        let remote: Arc<dyn Remote> = fake.clone();
        let file = ring.add_remote(&remote).unwrap();
        Client { ring, file, has_slots, fake }
    }

    fn put(&mut self, tag: u16, bytes: &[u8]) {
        if self.has_slots {
            let place = &PAGES[usize::from(tag) * ROOM..];
            place.iter().zip(bytes).for_each(|(at, byte)| at.store(*byte, Relaxed));
        } else {
            self.ring.memory(0, tag)[Uring::DATA_AT..][..bytes.len()].copy_from_slice(bytes);
        }
    }

    fn get(&mut self, tag: u16, len: usize) -> Vec<u8> {
        if self.has_slots {
            let place = &PAGES[usize::from(tag) * ROOM..][..len];
            return place.iter().map(|at| at.load(Relaxed)).collect();
        }
        self.ring.memory(0, tag)[Uring::DATA_AT..][..len].to_vec()
    }

    /// Asks for something under the key `tag`, its data in two parts that are turned round.
    fn ask(&mut self, tag: u16, (op, fua): (Op, bool), at: u64, len: u32) {
        let base =
            if self.has_slots { PAGES[usize::from(tag) * ROOM..].as_ptr() as usize } else { 0 };
        let base = u32::try_from(base).unwrap();
        let first = (len / 2) & !511;
        let mut parts =
            vec![Part { at: base, len: first }, Part { at: base + first, len: len - first }];
        parts.retain(|part| part.len > 0);
        let pages = match self.has_slots {
            true => self.ring.slots(0).pages(tag),
            false => self.ring.memory_pages(0, tag),
        };
        let to = To::File(self.file);
        let parts = if op.has_pages() { &parts[..] } else { &[] };
        let splice = Splice { op, fua, to, at, len: len.into(), pages, parts };
        self.ring.splice(tag.into(), &splice);
    }

    /// The next that lands.
    fn land(&mut self) -> (u32, Result<u64, Errno>) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(Event::Splice { key, result }) = self.ring.next() {
                return (key, result);
            }
            assert!(Instant::now() < end, "nothing lands: {:?}", self.told());
            self.ring.enter(true).unwrap();
        }
    }

    /// Asks for one thing and waits for it.
    fn one(&mut self, what: (Op, bool), at: u64, len: u32) -> Result<u64, Errno> {
        self.ask(0, what, at, len);
        let (key, result) = self.land();
        assert_eq!(key, 0);
        result
    }

    /// Waits for the connection.
    fn come_up(&mut self) {
        while !self.ring.remotes.as_ref().unwrap().conns[0].talk.is_up() {
            self.ring.enter(true).unwrap();
            assert!(self.ring.next().is_none());
        }
    }

    fn told(&self) -> String {
        self.fake.told.lock().unwrap().join("; ")
    }
}

const READ: (Op, bool) = (Op::Read, false);
const WRITE: (Op, bool) = (Op::Write, false);

struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// Writes, reads and zeroes at random, eight at a time, each in a range of its own; what is read is
/// what was written. How many came to an end.
fn mix(client: &mut Client, seed: u64, count: u32) {
    const SPAN: u64 = (SIZE / DEPTH as usize) as u64;
    let mut dice = Dice(seed);
    let mut model = vec![0_u8; SIZE];
    let mut out: Vec<Option<(Op, u64, u32)>> = vec![None; DEPTH.into()];
    let (mut left, mut flying) = (count, 0);
    while left > 0 || flying > 0 {
        for tag in 0..DEPTH {
            if left == 0 || out[usize::from(tag)].is_some() {
                continue;
            }
            let len = [512, 4096, 4096, 40 << 10, 200 << 10][dice.below(5) as usize];
            let at = u64::from(tag) * SPAN + dice.below((SPAN - len) / 512) * 512;
            let op = [Op::Read, Op::Write, Op::Write, Op::Read, Op::WriteZeroes { unmap: true }];
            let op = op[dice.below(5) as usize];
            if op == Op::Write {
                let mut bytes: Vec<u8> = (0..len).map(|_| dice.below(256) as u8).collect();
                if dice.below(3) == 0 {
                    bytes.fill(0);
                }
                model[at as usize..][..len as usize].copy_from_slice(&bytes);
                client.put(tag, &bytes);
            } else if op != Op::Read {
                model[at as usize..][..len as usize].fill(0);
            } else {
                client.put(tag, &vec![0xee; len as usize]);
            }
            client.ask(tag, (op, dice.below(4) == 0 && op == Op::Write), at, len as u32);
            out[usize::from(tag)] = Some((op, at, len as u32));
            (left, flying) = (left - 1, flying + 1);
        }
        let (key, result) = client.land();
        let (op, at, len) = out[key as usize].take().unwrap();
        flying -= 1;
        assert_eq!(result, Ok(u64::from(len)), "{op:?} at {at}: {}", client.told());
        if op == Op::Read {
            let found = client.get(key as u16, len as usize);
            assert!(found == model[at as usize..][..len as usize], "{op:?} of {len} at {at}");
        }
    }
    assert!(*client.fake.disk.lock().unwrap() == model, "the server has other bytes");
}

#[test]
fn every_byte_gets_to_its_place_in_every_mode_from_memory_and_slots() {
    let _used = USED.lock().unwrap();
    for mode in MODES {
        for has_slots in [false, true] {
            for cut in [700, 1 << 20] {
                let serve = move |peer: &mut Peer, _| peer.well(cut);
                let mut client = Client::new((mode, ALL), has_slots, PATIENT, serve);
                mix(&mut client, 7 + cut as u64, 300);
                let counts = client.ring.counts();
                assert_eq!(counts.bytes_copied == 0, has_slots, "{counts:?}");
                assert_eq!(counts.bytes_spliced == 0, !has_slots, "{counts:?}");
                assert_eq!(client.told(), "");
            }
        }
    }
}

#[test]
fn connections_that_end_anywhere_lose_and_change_nothing() {
    let _used = USED.lock().unwrap();
    for (round, has_slots) in [false, true].into_iter().cycle().take(6).enumerate() {
        let mode = MODES[round % 3];
        // A connection ends when so many bytes have gone one way or the other.
        let serve = move |peer: &mut Peer, number: u32| {
            let mut dice = Dice(u64::from(number) * 77 + round as u64);
            let (after, stream) = (dice.below(300_000), peer.stream.try_clone().unwrap());
            if number < 25 {
                let (inner, outer) = UnixStream::pair().unwrap();
                peer.stream = inner;
                cut_after(stream, outer, after, dice.below(2) == 0);
            }
            peer.well(5000)
        };
        let mut client = Client::new((mode, ALL), has_slots, PATIENT, serve);
        mix(&mut client, round as u64, 200);
        let dials = client.fake.dials.load(Relaxed);
        assert!(dials > 10, "only {dials} connections");
    }
}

/// Passes bytes between two sockets until so many have gone one way, and ends both.
fn cut_after(client: UnixStream, server: UnixStream, after: u64, is_ours: bool) {
    let pass = |mut from: UnixStream, mut to: UnixStream, most: u64| {
        std::thread::spawn(move || {
            let mut left = most;
            let mut room = [0; 1000];
            while left > 0 {
                let count = room.len().min(left as usize);
                match from.read(&mut room[..count]) {
                    Ok(count @ 1..) if to.write_all(&room[..count]).is_ok() => left -= count as u64,
                    _ => break,
                }
            }
            let _ = from.shutdown(std::net::Shutdown::Both);
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    };
    let (up, down) = if is_ours { (after, u64::MAX) } else { (u64::MAX, after) };
    pass(client.try_clone().unwrap(), server.try_clone().unwrap(), up);
    pass(server, client, down);
}

#[test]
fn what_is_no_nbd_fails_after_three_connections_and_says_so() {
    let _used = USED.lock().unwrap();
    type Say = fn(&mut Peer, &Request) -> Option<()>;
    let ways: &[(&str, Say)] = &[
        ("no reply", |peer, _| peer.say(&[7; 64])),
        ("nothing that was asked", |peer, request| {
            peer.done(&Request { cookie: request.cookie ^ 1, ..*request }, 0)
        }),
        ("not asked for", |peer, request| peer.chunk(request, (request.offset + 1, &[1; 4096]), 1)),
        ("not asked for", |peer, request| peer.chunk(request, (request.offset, &[1; 9000]), 1)),
        ("came already", |peer, request| {
            peer.chunk(request, (request.offset, &[1; 512]), 0)?;
            peer.chunk(request, (request.offset, &[1; 512]), 0)
        }),
        ("does not belong", |peer, request| {
            let mut head = Head::done(peer.mode, (request.cookie, 0), 0).bytes().to_vec();
            head[7] = 77;
            peer.say(&head)
        }),
    ];
    for has_slots in [false, true] {
        for (word, say) in ways {
            let serve = |peer: &mut Peer, _| {
                let (request, _) = peer.next()?;
                say(peer, &request)?;
                peer.next().map(drop)
            };
            let mut client = Client::new((Mode::Structured, ALL), has_slots, PATIENT, serve);
            assert_eq!(client.one(READ, 4096, 4096), Err(Errno::EIO), "{word}");
            let (told, dials) = (client.told(), client.fake.dials.load(Relaxed));
            assert!(told.contains(word) && told.contains("no NBD"), "{word}: {told}");
            assert_eq!(dials, 4, "{word}");
        }
    }
}

#[test]
fn a_read_that_comes_short_is_an_error_and_the_connection_goes_on() {
    let _used = USED.lock().unwrap();
    for has_slots in [false, true] {
        let serve = |peer: &mut Peer, _| {
            let (request, _) = peer.next()?;
            peer.chunk(&request, (request.offset, &[1; 4095]), chunk::DONE)?;
            peer.well(4096)
        };
        let mut client = Client::new((Mode::Structured, ALL), has_slots, PATIENT, serve);
        assert_eq!(client.one(READ, 0, 4096), Err(Errno::EIO));
        assert!(client.told().contains("leaves out"), "{}", client.told());
        assert_eq!(client.one(READ, 0, 4096), Ok(4096));
        assert_eq!(client.fake.dials.load(Relaxed), 1);
    }
}

#[test]
fn errors_are_the_requests_and_one_that_goes_away_is_asked_again_elsewhere() {
    let _used = USED.lock().unwrap();
    for (code, errno) in [
        (error::EPERM, Errno::EPERM),
        (error::ENOSPC, Errno::ENOSPC),
        (error::EINVAL, Errno::EINVAL),
        (error::ENOTSUP, Errno::EOPNOTSUPP),
        (4711, Errno::EIO),
    ] {
        let serve = move |peer: &mut Peer, _| {
            let (request, _) = peer.next()?;
            peer.done(&request, code)?;
            let (request, _) = peer.next()?;
            peer.done(&request, error::ESHUTDOWN)?;
            peer.well(4096)
        };
        let mut client = Client::new((Mode::Simple, ALL), false, PATIENT, serve);
        assert_eq!(client.one(WRITE, 0, 4096), Err(errno));
        // Each connection refuses one; the second of the next one is answered with ESHUTDOWN too.
        let second = client.one(WRITE, 0, 4096);
        assert_eq!(second, Err(errno));
        assert!(client.told().contains("shut down"), "{}", client.told());
    }
}

#[test]
fn an_answer_before_all_is_sent_does_not_end_the_request() {
    let _used = USED.lock().unwrap();
    static READ_ALL: AtomicBool = AtomicBool::new(false);
    for has_slots in [false, true] {
        READ_ALL.store(false, Relaxed);
        let serve = |peer: &mut Peer, _| {
            let mut head = vec![0; peer.mode.request_len()];
            peer.stream.read_exact(&mut head).ok()?;
            let request = Request::parse(&head, peer.mode).unwrap()?;
            peer.done(&request, error::ENOSPC)?;
            std::thread::sleep(Duration::from_millis(100));
            READ_ALL.store(true, Relaxed);
            let mut data = vec![0; request.length as usize];
            peer.stream.read_exact(&mut data).ok()?;
            peer.next().map(drop)
        };
        let mut client = Client::new((Mode::Simple, ALL), has_slots, PATIENT, serve);
        // More than a socket holds.
        assert_eq!(client.one(WRITE, 0, ROOM as u32), Err(Errno::ENOSPC));
        assert!(READ_ALL.load(Relaxed), "its pages were still being sent");
    }
}

#[test]
fn a_server_without_fua_is_asked_to_flush_and_one_without_flushes_is_not() {
    let _used = USED.lock().unwrap();
    for (flags, commands) in [
        (ALL, vec![command::WRITE]),
        (ALL & !can::FUA, vec![command::WRITE, command::FLUSH]),
        (ALL & !can::FUA & !can::FLUSH, vec![command::WRITE]),
    ] {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&asked);
        let serve = move |peer: &mut Peer, _| {
            loop {
                let (request, _) = peer.next()?;
                list.lock().unwrap().push((request.command, request.flags));
                peer.done(&request, 0)?;
            }
        };
        let mut client = Client::new((Mode::Simple, flags), false, PATIENT, serve);
        assert_eq!(client.one((Op::Write, true), 0, 4096), Ok(4096));
        let found: Vec<_> = asked.lock().unwrap().iter().map(|one| one.0).collect();
        assert_eq!(found, commands);
        let fua = asked.lock().unwrap()[0].1 & flag::FUA != 0;
        assert_eq!(fua, flags & can::FUA != 0);
        assert_eq!(client.one((Op::Flush, false), 0, 0), Ok(0));
        let flushes = asked.lock().unwrap().len() - commands.len();
        assert_eq!(flushes, usize::from(flags & can::FLUSH != 0));
    }
}

#[test]
fn a_server_that_says_nothing_is_left_and_one_that_stays_so_fails_what_waits() {
    let _used = USED.lock().unwrap();
    let patience = Patience { answer: 1, outage: Some(2) };
    let silent = |peer: &mut Peer, number: u32| {
        if number > 0 {
            return peer.well(4096);
        }
        peer.next()?;
        std::thread::sleep(Duration::from_secs(30));
        None
    };
    let mut client = Client::new((Mode::Simple, ALL), false, patience, silent);
    assert_eq!(client.one(WRITE, 0, 4096), Ok(4096));
    assert!(client.told().contains("not answered for 1 s"), "{}", client.told());
    // It takes connections and closes them: that is no service either.
    let closing = |_: &mut Peer, _| None;
    let mut client = Client::new((Mode::Simple, ALL), false, patience, closing);
    let begin = Instant::now();
    assert_eq!(client.one(WRITE, 0, 4096), Err(Errno::EIO));
    assert!((1..10).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    assert!(client.told().contains("away for 2 s"), "{}", client.told());
    // It takes connections and never says a word over any.
    let mute = |peer: &mut Peer, _| {
        while peer.next().is_some() {}
        None
    };
    let mut client = Client::new((Mode::Simple, ALL), false, patience, mute);
    assert_eq!(client.one(WRITE, 0, 4096), Err(Errno::EIO));
    let (told, dials) = (client.told(), client.fake.dials.load(Relaxed));
    assert!(told.contains("away for 2 s") && (3..5).contains(&dials), "{dials}: {told}");
}

#[test]
fn data_that_goes_on_moving_is_no_silence_however_slowly() {
    let _used = USED.lock().unwrap();
    // Longer than what is in buffers takes to be read, far shorter than the transfers.
    let patience = Patience { answer: 2, outage: Some(1) };
    let kinds = [(false, false), (false, true), (true, false), (true, true)];
    std::thread::scope(|scope| {
        for (tag, kind) in (0..).zip(kinds) {
            scope.spawn(move || {
                let slow = |peer: &mut Peer, _| peer.slowly(usize::MAX);
                let mut client = Client::over((Mode::Simple, ALL), kind, patience, slow);
                let bytes: Vec<u8> = (0..ROOM).map(|at| (at % 251 + at / 4096) as u8).collect();
                client.put(tag, &bytes);
                let begin = Instant::now();
                client.ask(tag, WRITE, 0, ROOM as u32);
                assert_eq!(client.land(), (tag.into(), Ok(ROOM as u64)), "{}", client.told());
                client.put(tag, &vec![0; ROOM]);
                client.ask(tag, READ, 0, ROOM as u32);
                assert_eq!(client.land(), (tag.into(), Ok(ROOM as u64)), "{}", client.told());
                assert!(client.get(tag, ROOM) == bytes, "{kind:?}: other bytes");
                assert!(begin.elapsed() > Duration::from_secs(6), "it was not slow");
                let dials = client.fake.dials.load(Relaxed);
                assert_eq!((client.told(), dials), (String::new(), 1), "{kind:?}");
            });
        }
    });
}

#[test]
fn data_that_moves_no_more_is_silence() {
    let _used = USED.lock().unwrap();
    let patience = Patience { answer: 2, outage: Some(1) };
    let kinds = [(false, false), (false, true), (true, false), (true, true)];
    std::thread::scope(|scope| {
        for (tag, kind) in (0..).zip(kinds) {
            scope.spawn(move || {
                let stuck = |peer: &mut Peer, number| match number {
                    0 => peer.slowly(ROOM / 4),
                    _ => peer.well(4096),
                };
                let mut client = Client::over((Mode::Simple, ALL), kind, patience, stuck);
                client.put(tag, &vec![7; ROOM]);
                let begin = Instant::now();
                client.ask(tag, WRITE, 0, ROOM as u32);
                let landed = client.land();
                // Over a socket of this machine the next one waits for the last one to be read.
                let expected = if kind.1 { Ok(ROOM as u64) } else { Err(Errno::EIO) };
                assert_eq!(landed, (tag.into(), expected), "{}", client.told());
                let told = client.told();
                assert!(told.contains("not answered for 2 s"), "{kind:?}: {told}");
                // What has moved at first is heard of late, by 2 s; an outage comes behind that.
                assert!(begin.elapsed() < Duration::from_secs(12), "{:?}", begin.elapsed());
            });
        }
    });
}

#[test]
fn a_request_that_ends_its_server_fails_and_others_are_answered() {
    let _used = USED.lock().unwrap();
    for has_slots in [false, true] {
        let patience = Patience { answer: 0, outage: Some(1) };
        // Whoever reads is answered, whoever writes there ends the connection.
        let dies = |peer: &mut Peer, _| loop {
            let (request, data) = peer.next()?;
            if request.command == command::WRITE && request.offset == 0 {
                // Others are answered before that.
                std::thread::sleep(Duration::from_millis(10));
                return None;
            }
            let data = peer.carry_out(&request, &data);
            peer.answer(&request, &data, 4096)?;
        };
        let mut client = Client::new((Mode::Simple, ALL), has_slots, patience, dies);
        let begin = Instant::now();
        client.ask(0, WRITE, 0, 4096);
        client.ask(1, READ, 8192, 4096);
        let mut reads = 0;
        loop {
            match client.land() {
                (0, result) => {
                    assert_eq!(result, Err(Errno::EIO));
                    break;
                }
                (key, result) => {
                    assert_eq!((key, result), (1, Ok(4096)), "{}", client.told());
                    reads += 1;
                    client.ask(1, READ, 8192, 4096);
                }
            }
            assert!(begin.elapsed() < Duration::from_secs(15), "{}", client.told());
        }
        let told = client.told();
        assert!(told.contains("lost while write of 4096 bytes at 0"), "{told}");
        assert!(!told.contains("requests fail"), "{told}");
        assert!(reads > 5 && begin.elapsed() > Duration::from_secs(1), "{reads} reads");
        assert_eq!(client.land(), (1, Ok(4096)));
        assert_eq!(client.one(WRITE, 8192, 4096), Ok(4096));
    }
}

#[test]
fn a_server_that_nobody_wants_any_more_is_waited_for_no_longer() {
    let _used = USED.lock().unwrap();
    for is_mute in [false, true] {
        // However patient one is.
        let serve = move |peer: &mut Peer, _| {
            while is_mute && peer.next().is_some() {}
            None
        };
        let mut client = Client::new((Mode::Simple, ALL), false, PATIENT, serve);
        client.fake.forsake();
        let begin = Instant::now();
        assert_eq!(client.one(WRITE, 0, 4096), Err(Errno::EIO));
        assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    }
}

#[test]
fn nothing_is_said_over_the_next_connection_before_the_last_one_is_read() {
    let _used = USED.lock().unwrap();
    for has_slots in [false, true] {
        let (wake, is_over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (woken, over) = (Arc::clone(&wake), Arc::clone(&is_over));
        // Each connection has somebody of its own; the first one sleeps.
        let serve = move |peer: &mut Peer, number: u32| {
            if number > 0 {
                return peer.well(4096);
            }
            let end = Instant::now() + Duration::from_secs(30);
            while !woken.load(Relaxed) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            while let Some((request, data)) = peer.next() {
                peer.carry_out(&request, &data);
            }
            over.store(true, Relaxed);
            None
        };
        let patience = Patience { answer: 1, outage: Some(2) };
        let mut client = Client::new((Mode::Simple, ALL), has_slots, patience, serve);
        client.put(0, &[1; 4096]);
        // There is a connection, but what the last one was asked may still be done.
        assert_eq!(client.one(WRITE, 0, 4096), Err(Errno::EIO), "{}", client.told());
        assert_eq!(client.one(WRITE, 0, 4096), Err(Errno::EIO), "{}", client.told());
        let told = client.told();
        assert!(told.contains("has not read") && told.contains("away for 2 s"), "{told}");
        assert_eq!(client.fake.dials.load(Relaxed), 2, "{told}");
        wake.store(true, Relaxed);
        client.come_up();
        client.put(0, &[2; 4096]);
        assert_eq!(client.one(WRITE, 0, 4096), Ok(4096), "{}", client.told());
        let end = Instant::now() + Duration::from_secs(20);
        while !is_over.load(Relaxed) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(is_over.load(Relaxed));
        assert_eq!(client.one(READ, 0, 4096), Ok(4096));
        assert_eq!(client.get(0, 4096), [2; 4096]);
    }
}

#[test]
fn what_is_not_offered_is_refused_here() {
    let _used = USED.lock().unwrap();
    let flags = can::HAS_FLAGS | can::READ_ONLY;
    let mut client = Client::new((Mode::Simple, flags), false, PATIENT, |peer, _| peer.well(512));
    assert_eq!(client.one(WRITE, 0, 4096), Err(Errno::EROFS));
    assert_eq!(client.one((Op::Discard, false), 0, 4096), Err(Errno::EOPNOTSUPP));
    assert_eq!(
        client.one((Op::WriteZeroes { unmap: false }, false), 0, 4096),
        Err(Errno::EOPNOTSUPP)
    );
    assert_eq!(client.one((Op::Reset, false), 0, 4096), Err(Errno::EOPNOTSUPP));
    assert_eq!(client.one(READ, 0, 4096), Ok(4096));
}

#[test]
fn a_ring_that_goes_says_goodbye() {
    let _used = USED.lock().unwrap();
    let said = Arc::new(Mutex::new(None));
    let heard = Arc::clone(&said);
    let serve = move |peer: &mut Peer, _| {
        let (request, _) = peer.next()?;
        peer.done(&request, 0)?;
        let mut head = vec![0; peer.mode.request_len()];
        peer.stream.read_exact(&mut head).ok()?;
        let last = Request::parse(&head, peer.mode).unwrap()?;
        *heard.lock().unwrap() = Some(last.command);
        Some(())
    };
    let mut client = Client::new((Mode::Extended, ALL), false, PATIENT, serve);
    assert_eq!(client.one((Op::Flush, false), 0, 0), Ok(0));
    client.ring.hang_up();
    let end = Instant::now() + Duration::from_secs(5);
    while said.lock().unwrap().is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(*said.lock().unwrap(), Some(command::DISCONNECT));
}

#[test]
fn a_socket_that_is_full_is_waited_for_and_no_header_is_lost_or_cut() {
    let _used = USED.lock().unwrap();
    for mode in MODES {
        for has_slots in [false, true] {
            // It takes its time, so that headers find the socket full of data and of each other.
            let slow = |peer: &mut Peer, _| {
                std::thread::sleep(Duration::from_millis(50));
                peer.well(700)
            };
            let mut client = Client::new((mode, ALL), has_slots, PATIENT, slow);
            client.come_up();
            let conn = &client.ring.remotes.as_ref().unwrap().conns[0];
            rustix::net::sockopt::set_socket_send_buffer_size(conn.socket(&client.ring), 1)
                .unwrap();
            mix(&mut client, 5, 150);
            assert_eq!((client.told(), client.fake.dials.load(Relaxed)), (String::new(), 1));
        }
    }
}

#[test]
fn a_header_that_comes_alone_is_sent_without_an_entry() {
    let _used = USED.lock().unwrap();
    let mut client = Client::new((Mode::Simple, ALL), true, PATIENT, |peer, _| peer.well(4096));
    for (what, most) in [(READ, 2), (WRITE, 3), ((Op::Flush, false), 1)] {
        // The first of each makes the timer go.
        client.one(what, 0, 512).unwrap();
        let before = client.ring.counts().sqes;
        client.one(what, 0, 512).unwrap();
        let entries = client.ring.counts().sqes - before;
        assert!(entries <= most, "{what:?}: {entries}");
    }
}

#[test]
fn a_ring_that_goes_waits_for_no_server_that_takes_nothing() {
    let _used = USED.lock().unwrap();
    let deaf = |_: &mut Peer, _| {
        std::thread::sleep(Duration::from_secs(10));
        None
    };
    let mut client = Client::new((Mode::Extended, ALL), false, PATIENT, deaf);
    client.come_up();
    // The smallest that there is: a write fills it, and is sent.
    let conn = &client.ring.remotes.as_ref().unwrap().conns[0];
    rustix::net::sockopt::set_socket_send_buffer_size(conn.socket(&client.ring), 1).unwrap();
    client.ask(0, WRITE, 0, 4096);
    client.ring.enter(false).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    while client.ring.remotes.as_ref().unwrap().conns[0].batch.out > 0 && Instant::now() < end {
        assert!(client.ring.next().is_none());
        client.ring.enter(false).unwrap();
    }
    let conn = &client.ring.remotes.as_ref().unwrap().conns[0];
    let mut room = [PollFd::from_borrowed_fd(conn.socket(&client.ring), PollFlags::OUT)];
    let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!((conn.batch.out, poll(&mut room, Some(&at_once))), (0, Ok(0)), "it is full");
    let begin = Instant::now();
    client.ring.hang_up();
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}
