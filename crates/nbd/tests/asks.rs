//! Answers for a client and its server after the handshake: however answers are ordered, cut into
//! chunks and the stream into pieces, each read gets its bytes, all of them, and nothing else does.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use devsplice_nbd::client::{Asks, Said};
use devsplice_nbd::wire::{Head, Reply, chunk, command, error};
use devsplice_nbd::{Mode, Request};
use proptest::prelude::*;

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];
const CONTEXT: u32 = 7;

/// What the disk has at a byte; every third KiB is a hole.
fn byte(at: u64) -> u8 {
    if at / 1024 % 3 == 2 { 0 } else { (at % 251) as u8 + 1 }
}

fn data(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(byte).collect()
}

/// A chunk by hand.
fn chunk_of(mode: Mode, (kind, flags): (u16, u16), cookie: u64, content: &[u8]) -> Vec<u8> {
    let is_wide = mode == Mode::Extended;
    let magic: u32 = if is_wide { 0x6e8a_278c } else { 0x668e_33ef };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    if is_wide {
        bytes.extend(0_u64.to_be_bytes());
        bytes.extend((content.len() as u64).to_be_bytes());
    } else {
        bytes.extend((content.len() as u32).to_be_bytes());
    }
    bytes.extend(content);
    bytes
}

/// An answer to a read, as some servers would give it: in chunks of up to `cut` bytes, backwards if
/// `back`, holes as such, the end with the last chunk or in one of its own.
fn answer(mode: Mode, request: &Request, (cut, back, alone): (u64, bool, bool)) -> Vec<u8> {
    let Request { cookie, offset, length, .. } = *request;
    if mode == Mode::Simple {
        let mut bytes = Head::data(mode, (cookie, offset), length as u32).bytes().to_vec();
        bytes.extend(data(offset, length));
        return bytes;
    }
    let mut parts = Vec::new();
    let mut at = offset;
    // No more pieces than a client takes backwards.
    let cut = cut.max(length / 6);
    while at < offset + length {
        let len = cut.min(offset + length - at);
        parts.push((at, len));
        at += len;
    }
    if back {
        parts.reverse();
    }
    let count = parts.len();
    let mut bytes = Vec::new();
    for (index, (at, len)) in parts.into_iter().enumerate() {
        let flags = if index + 1 == count && !alone { chunk::DONE } else { 0 };
        let content = data(at, len);
        if content.iter().all(|byte| *byte == 0) {
            let hole = [&at.to_be_bytes()[..], &(len as u32).to_be_bytes()].concat();
            bytes.extend(chunk_of(mode, (chunk::HOLE, flags), cookie, &hole));
        } else {
            let content = [&at.to_be_bytes()[..], &content].concat();
            bytes.extend(chunk_of(mode, (chunk::DATA, flags), cookie, &content));
        }
    }
    if alone {
        bytes.extend(Head::done(mode, (cookie, offset), 0).bytes());
    }
    bytes
}

/// A client that does as it is told: receives no more than is sure to be no data, and moves data.
struct Client {
    asks: Asks,
    memory: Vec<Vec<u8>>,
    done: Vec<Option<Result<(), u32>>>,
    target: Option<(u32, u32, u32)>,
    buffer: Vec<u8>,
}

impl Client {
    fn new(mode: Mode, reads: &[(u64, u64)]) -> Client {
        let mut asks = Asks::new(reads.len() as u32);
        asks.restart(mode, Some(CONTEXT));
        Client {
            asks,
            memory: reads.iter().map(|(_, len)| vec![0xee; *len as usize]).collect(),
            done: vec![None; reads.len()],
            target: None,
            buffer: Vec::new(),
        }
    }

    fn ask(&mut self, key: u32, (at, len): (u64, u64)) -> Request {
        let request = read(at, len);
        let head = self.asks.begin(key, &request);
        Request::parse(head.bytes(), self.asks.mode()).unwrap().unwrap()
    }

    /// Takes the stream, at most `cut` bytes a time.
    fn take(&mut self, mut stream: &[u8], cut: usize) -> Result<(), devsplice_nbd::Broken> {
        loop {
            if let Some((key, at, left)) = &mut self.target {
                let count = stream.len().min(cut).min(*left as usize);
                let place = *at as usize;
                self.memory[*key as usize][place..place + count].copy_from_slice(&stream[..count]);
                stream = &stream[count..];
                (*at, *left) = (*at + count as u32, *left - count as u32);
                if *left > 0 {
                    assert!(stream.is_empty() || count > 0);
                    if stream.is_empty() {
                        return Ok(());
                    }
                    continue;
                }
                self.target = None;
            }
            match self.asks.next(&self.buffer)? {
                (0, None) => {
                    if stream.is_empty() {
                        return Ok(());
                    }
                    let room = self.asks.room(self.buffer.len());
                    let count = stream.len().min(cut).min(room);
                    self.buffer.extend(&stream[..count]);
                    stream = &stream[count..];
                }
                (taken, said) => {
                    drop(self.buffer.drain(..taken));
                    match said {
                        None => {}
                        Some(Said::Data { key, at, len }) => {
                            assert!(self.buffer.is_empty(), "data was received with headers");
                            self.target = Some((key, at, len));
                        }
                        Some(Said::Hole { key, at, len }) => {
                            self.memory[key as usize][at as usize..(at + len) as usize].fill(0);
                        }
                        Some(Said::Done { key, result }) => {
                            let before = self.done[key as usize].replace(result);
                            assert_eq!(before, None, "{key} is answered twice");
                        }
                    }
                }
            }
        }
    }
}

fn read(offset: u64, length: u64) -> Request {
    Request { flags: 0, command: command::READ, cookie: 0, offset, length }
}

proptest! {
    #[test]
    fn every_read_gets_its_bytes_however_they_come(
        mode in 0..3_usize,
        reads in prop::collection::vec((0..1_u64 << 20, 1..9000_u64), 1..12),
        styles in prop::collection::vec((1..5000_u64, any::<bool>(), any::<bool>()), 12),
        order in any::<prop::sample::Index>(),
        cut in 1..6000_usize,
    ) {
        let mode = MODES[mode];
        let mut client = Client::new(mode, &reads);
        let mut stream = Vec::new();
        let mut answers: Vec<_> = (0..).zip(&reads).map(|(key, one)| {
            answer(mode, &client.ask(key, *one), styles[key as usize])
        }).collect();
        let turn = order.index(answers.len());
        answers.rotate_left(turn);
        answers.iter().for_each(|answer| stream.extend(answer));
        for part in stream.chunks(cut) {
            client.take(part, 1 + cut / 2).unwrap();
        }
        for (key, (at, len)) in reads.iter().enumerate() {
            prop_assert_eq!(client.done[key], Some(Ok(())));
            prop_assert!(client.memory[key] == data(*at, *len), "read {} has other bytes", key);
        }
    }

    #[test]
    fn no_stream_of_bytes_fills_what_was_not_asked_for(
        mode in 0..3_usize,
        good in any::<bool>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        noise in prop::collection::vec(any::<u8>(), 0..200),
        style in (1..5000_u64, any::<bool>(), any::<bool>()),
    ) {
        let mode = MODES[mode];
        let (reads, before) = ([(4096, 6000), (0, 512)], vec![0xee; 512]);
        let mut client = Client::new(mode, &reads);
        let first = client.ask(0, reads[0]);
        let mut stream = if good { answer(mode, &first, style) } else { Vec::new() };
        for (at, value) in flips {
            if !stream.is_empty() {
                let at = at.index(stream.len());
                stream[at] ^= value;
            }
        }
        stream.extend(noise);
        let _ = client.take(&stream, 777);
        prop_assert!(client.memory[1] == before, "a read that was not asked for was filled");
        if client.done[0] == Some(Ok(())) {
            // Flipped data is data; but no byte is left as it was.
            prop_assert!(client.asks.take_blame().is_none());
        }
    }
}

#[test]
fn an_answer_that_leaves_bytes_out_is_an_error() {
    for mode in [Mode::Structured, Mode::Extended] {
        let mut client = Client::new(mode, &[(0, 1000)]);
        let cookie = client.ask(0, (0, 1000)).cookie;
        let part = [&[0; 8][..], &data(0, 999)].concat();
        let part = chunk_of(mode, (chunk::DATA, chunk::DONE), cookie, &part);
        client.take(&part, 4096).unwrap();
        assert_eq!(client.done[0], Some(Err(error::EIO)));
        assert!(client.asks.take_blame().is_some());
    }
}

#[test]
fn what_answers_nothing_that_was_asked_breaks_the_connection() {
    for mode in MODES {
        let broken = |make: &dyn Fn(&Request) -> Vec<u8>| {
            let mut client = Client::new(mode, &[(4096, 1000)]);
            let request = client.ask(0, (4096, 1000));
            client.take(&make(&request), 4096).is_err()
        };
        let at = |at: u64, len: u64| [&at.to_be_bytes()[..], &vec![1; len as usize]].concat();
        let hole = |at: u64, len: u32| [&at.to_be_bytes()[..], &len.to_be_bytes()].concat();
        let piece = |kind: u16, request: &Request, content: &[u8]| {
            chunk_of(mode, (kind, 0), request.cookie, content)
        };
        let other = |request: &Request| Head::done(mode, (request.cookie ^ 1, 0), 0);
        assert!(broken(&|request| other(request).bytes().to_vec()), "another key");
        let late = |request: &Request| Head::done(mode, (request.cookie ^ 1 << 32, 0), 0);
        assert!(broken(&|request| late(request).bytes().to_vec()), "an earlier turn");
        assert!(broken(&|_| vec![0; 64]), "no reply");
        if mode == Mode::Simple {
            continue;
        }
        assert!(broken(&|r| piece(chunk::DATA, r, &at(0, 10))), "before it");
        assert!(broken(&|r| piece(chunk::DATA, r, &at(4096, 1001))), "beyond it");
        assert!(broken(&|r| piece(chunk::DATA, r, &at(u64::MAX, 10))), "an overflow");
        assert!(broken(&|r| piece(chunk::DATA, r, &at(4096, 0))), "nothing");
        assert!(broken(&|r| piece(chunk::HOLE, r, &hole(4096, 1001))), "a hole beyond it");
        assert!(broken(&|r| piece(chunk::HOLE, r, &hole(4096, 0))), "no hole");
        let twice = |r: &Request| {
            [piece(chunk::DATA, r, &at(4096, 500)), piece(chunk::HOLE, r, &hole(4595, 1))].concat()
        };
        assert!(broken(&twice), "the same bytes twice");
        assert!(broken(&|r| piece(chunk::NONE, r, &[])), "an end that is none");
        assert!(broken(&|r| piece(chunk::ERROR, r, &[0; 6])), "an error that is none");
        assert!(broken(&|r| piece(chunk::ERROR, r, &[1; 4])), "an error without its number");
        assert!(broken(&|r| piece(chunk::STATUS, r, &[0; 12])), "extents for a read");
        assert!(broken(&|r| piece(99, r, &[])), "no such chunk");
        let long = |r: &Request| {
            let mut head = piece(chunk::ERROR, r, &[0; 6]);
            let at = if mode == Mode::Extended { 28 } else { 16 };
            head[at..at + 4].fill(0xff);
            head
        };
        assert!(broken(&long), "a text without end");
        if mode == Mode::Structured {
            assert!(broken(&|r| Head::data(Mode::Simple, (r.cookie, 0), 0).bytes().to_vec()));
        }
    }
}

#[test]
fn errors_come_with_and_without_words_and_the_stream_goes_on() {
    for mode in MODES {
        let mut client = Client::new(mode, &[(0, 10), (0, 10), (5000, 1)]);
        let requests: Vec<_> = (0..3)
            .map(|key| client.ask(key, [(0, 10), (0, 10), (5000, 1)][key as usize]))
            .collect();
        let mut stream = Head::done(mode, (requests[0].cookie, 0), error::ENOSPC).bytes().to_vec();
        if mode == Mode::Simple {
            stream.extend(Head::done(mode, (requests[1].cookie, 0), error::EINVAL).bytes());
        } else {
            let text = [&error::EINVAL.to_be_bytes()[..], &[0, 9], b"no reason"].concat();
            stream.extend(chunk_of(mode, (chunk::ERROR, 0), requests[1].cookie, &text));
            let offset = [&error::EIO.to_be_bytes()[..], &[0, 0], &[0; 8]].concat();
            stream.extend(chunk_of(mode, (0x8002, chunk::DONE), requests[1].cookie, &offset));
        }
        stream.extend(answer(mode, &requests[2], (100, false, false)));
        for byte in &stream {
            client.take(std::slice::from_ref(byte), 1).unwrap();
        }
        let second = if mode == Mode::Simple { error::EINVAL } else { error::EIO };
        assert_eq!(client.done, [Some(Err(error::ENOSPC)), Some(Err(second)), Some(Ok(()))]);
    }
}

#[test]
fn extents_are_read_as_the_mode_writes_them() {
    for mode in [Mode::Structured, Mode::Extended] {
        let mut asks = Asks::new(1);
        asks.restart(mode, Some(CONTEXT));
        let request = Request { command: command::BLOCK_STATUS, ..read(0, 1 << 20) };
        let head = asks.begin(0, &request);
        let cookie = Request::parse(head.bytes(), mode).unwrap().unwrap().cookie;
        let mut bytes = Head::status(mode, (cookie, 0), CONTEXT, 2).bytes().to_vec();
        bytes.extend(Head::extent(mode, 4096, 0).bytes());
        bytes.extend(Head::extent(mode, 8192, 3).bytes());
        let mut done = false;
        let mut rest = &bytes[..];
        for _ in 0..10 {
            let (taken, said) = asks.next(rest).unwrap();
            rest = &rest[taken..];
            done |= said == Some(Said::Done { key: 0, result: Ok(()) });
        }
        assert!(done && rest.is_empty());
        let found: Vec<_> = asks.extents().iter().map(|one| (one.len, one.is_hole)).collect();
        assert_eq!(found, [(4096, false), (8192, true)]);
        let head = asks.begin(0, &request);
        let cookie = Request::parse(head.bytes(), mode).unwrap().unwrap().cookie;
        let nothing = chunk_of(mode, (chunk::NONE, chunk::DONE), cookie, &[]);
        let (taken, said) = asks.next(&nothing).unwrap();
        let said = said.or_else(|| asks.next(&nothing[taken..]).unwrap().1);
        let none = Err(error::EIO);
        assert_eq!(said, Some(Said::Done { key: 0, result: none }), "it says nothing");
        let other = Head::status(mode, (cookie, 0), CONTEXT + 1, 0);
        assert!(asks.next(other.bytes()).is_err(), "the question is over");
        assert!(Reply::parse(other.bytes(), mode).is_ok());
    }
}
