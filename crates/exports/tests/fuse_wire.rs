//! Answers for the FUSE protocol without a kernel: what is taken for what, what is answered, and
//! that no bytes at all make it panic.
#![allow(clippy::unwrap_used)]

use devsplice_core::{Errno, Io, Limits, Op};
use devsplice_exports::fuse::node::{Answer, MAX_WRITE, Node, Wish};
use devsplice_exports::fuse::wire::{
    Ask, AttrOut, Broken, ENOSYS, EntryOut, Head, InHeader, InitIn, InitOut, ROOT, WRITE_HEADER,
    is_named, out_header, parse, parse_apart,
};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

const FILE: u64 = 2;

fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let header = InHeader { len, opcode, unique: 77, node: FILE, ..InHeader::default() };
    [header.as_bytes(), body].concat()
}

fn ask(opcode: u32, body: &[u8]) -> Result<Ask<'static>, Errno> {
    let bytes = message(opcode, body).leak();
    let (head, ask) = parse(bytes).unwrap();
    assert_eq!(head, Head { unique: 77, node: FILE });
    ask
}

/// Handle, position, length: the front of reads and writes.
fn range(at: u64, len: u32) -> Vec<u8> {
    let mut bytes = [0_u64.to_ne_bytes(), at.to_ne_bytes()].concat();
    bytes.extend(len.to_ne_bytes());
    bytes.resize(40, 0);
    bytes
}

fn fallocate(at: u64, len: u64, mode: u32) -> Vec<u8> {
    let mut bytes = [0_u64.to_ne_bytes(), at.to_ne_bytes(), len.to_ne_bytes()].concat();
    bytes.extend(mode.to_ne_bytes());
    bytes.resize(32, 0);
    bytes
}

#[test]
fn requests_are_taken_for_what_they_are() {
    assert_eq!(WRITE_HEADER, 80);
    assert_eq!(ask(1, b"name\0"), Ok(Ask::Lookup { name: b"name" }));
    assert_eq!(ask(15, &range(4096, 512)), Ok(Ask::Read { at: 4096, len: 512 }));
    let write = [range(4096, 512), vec![9; 512]].concat();
    assert_eq!(ask(16, &write), Ok(Ask::Write { at: 4096, len: 512 }));
    let zero = |unmap| Ok(Ask::Zero { at: 512, len: 1 << 40, unmap });
    assert_eq!(ask(43, &fallocate(512, 1 << 40, 3)), zero(true));
    assert_eq!(ask(43, &fallocate(512, 1 << 40, 17)), zero(false));
    for opcode in [2, 36, 42] {
        assert_eq!(ask(opcode, &[]), Ok(Ask::Silent));
    }
}

#[test]
fn what_is_cut_short_or_unknown_is_answered_with_an_error() {
    for (opcode, body, errno) in [
        (1, &b"name without an end"[..], Errno::EIO),
        (4, &[0; 8], Errno::EIO),
        (15, &[0; 12], Errno::EIO),
        (16, &range(0, 512), Errno::EIO),
        (26, &[0; 8], Errno::EIO),
        (43, &[0; 16], Errno::EIO),
        (43, &fallocate(0, 512, 0), Errno::EOPNOTSUPP),
        (43, &fallocate(0, 512, 2), Errno::EOPNOTSUPP),
        (39, &[], ENOSYS),
        (46, &[], ENOSYS),
        (4096, &[], ENOSYS),
        (u32::MAX, &[], ENOSYS),
    ] {
        assert_eq!(ask(opcode, body), Err(errno), "{opcode}");
    }
    let mut lies = message(15, &range(0, 512));
    lies.push(0);
    assert_eq!(parse(&lies), Err(Broken));
    assert_eq!(parse(&[]), Err(Broken));
}

fn node(limits: Limits, read_only: bool) -> Node {
    Node::new("disk", &limits, read_only)
}

fn limits() -> Limits {
    Limits { volatile_cache: true, fast_zeroes: true, ..Limits::ideal(1 << 20) }
}

fn answer(node: &Node, at_node: u64, ask: Ask<'_>) -> Result<Option<Io>, Errno> {
    match node.answer(Head { unique: 1, node: at_node }, &ask) {
        Answer::Reply(Ok(_)) | Answer::Nothing => Ok(None),
        Answer::Reply(Err(errno)) => Err(errno),
        Answer::Request(io) => Ok(Some(io)),
    }
}

#[test]
fn data_requests_become_io_within_the_file() {
    let file = node(limits(), false);
    let end = 1 << 20;
    let zeroes = |unmap| Op::WriteZeroes { unmap };
    for (ask, want) in [
        (Ask::Read { at: 0, len: 512 }, Ok(Some(Io::new(Op::Read, 0, 512)))),
        // A file is read to its end and not further.
        (Ask::Read { at: end - 512, len: 4096 }, Ok(Some(Io::new(Op::Read, end - 512, 512)))),
        (Ask::Read { at: end, len: 4096 }, Ok(None)),
        (Ask::Read { at: u64::MAX, len: 4096 }, Ok(None)),
        (Ask::Read { at: 0, len: MAX_WRITE + 1 }, Err(Errno::EIO)),
        (Ask::Write { at: 512, len: 1024 }, Ok(Some(Io::new(Op::Write, 512, 1024)))),
        (Ask::Write { at: 0, len: MAX_WRITE + 1 }, Err(Errno::EIO)),
        (Ask::Sync, Ok(Some(Io::new(Op::Flush, 0, 0)))),
        (Ask::Zero { at: 0, len: 512, unmap: true }, Ok(Some(Io::new(zeroes(true), 0, 512)))),
        (Ask::Zero { at: 0, len: 512, unmap: false }, Ok(Some(Io::new(zeroes(false), 0, 512)))),
    ] {
        assert_eq!(answer(&file, FILE, ask), want, "{ask:?}");
    }
    // The root directory has no data.
    assert_eq!(answer(&file, ROOT, Ask::Read { at: 0, len: 512 }), Err(Errno::EIO));
}

#[test]
fn what_the_stack_cannot_do_is_refused_at_the_door() {
    let read_only = node(limits(), true);
    for ask in [Ask::Write { at: 0, len: 512 }, Ask::Zero { at: 0, len: 512, unmap: true }] {
        assert_eq!(answer(&read_only, FILE, ask), Err(Errno::EROFS));
    }
    let plain = node(Limits { discard: 0, volatile_cache: false, ..limits() }, false);
    let punch = |unmap| Ask::Zero { at: 0, len: 512, unmap };
    assert_eq!(answer(&plain, FILE, punch(true)), Err(Errno::EOPNOTSUPP));
    assert!(answer(&plain, FILE, punch(false)).unwrap().is_some());
    // A discard that would write zeros is none.
    let slow = node(Limits { fast_zeroes: false, ..limits() }, false);
    assert_eq!(answer(&slow, FILE, punch(true)), Err(Errno::EOPNOTSUPP));
    assert!(answer(&slow, FILE, punch(false)).unwrap().is_some());
    assert_eq!(slow.told(), node(limits(), false).told(), "a disk goes on over either");
    assert_eq!(answer(&plain, FILE, Ask::Sync), Err(ENOSYS));
    for size in [0, 1 << 19, 1 << 21] {
        let cut = Ask::SetAttr { size: Some(size) };
        assert_eq!(answer(&plain, FILE, cut), Err(Errno::EINVAL));
    }
}

#[test]
fn there_is_one_name_and_it_tells_the_size() {
    let file = node(limits(), false);
    assert_eq!(answer(&file, ROOT, Ask::Lookup { name: b"disk2" }), Err(Errno::ENOENT));
    assert_eq!(answer(&file, FILE, Ask::Lookup { name: b"disk" }), Err(Errno::ENOENT));
    let head = Head { unique: 1, node: ROOT };
    let Answer::Reply(Ok(body)) = file.answer(head, &Ask::Lookup { name: b"disk" }) else {
        panic!("not found")
    };
    let entry = EntryOut::read_from_bytes(body.bytes()).unwrap();
    assert_eq!((entry.node, entry.attr.size, entry.attr.mode), (FILE, 1 << 20, 0o100_600));
    let Answer::Reply(Ok(body)) = file.answer(head, &Ask::GetAttr) else { panic!("no root") };
    assert_eq!(AttrOut::read_from_bytes(body.bytes()).unwrap().attr.mode, 0o40_700);
}

#[test]
fn the_handshake_takes_the_lower_version_and_insists_on_what_it_needs() {
    let file = node(limits(), false);
    let greet = |major, minor, flags| {
        let hello = InitIn { major, minor, max_readahead: 4096, flags };
        let ask = ask(26, hello.as_bytes()).unwrap();
        match file.answer(Head { unique: 1, node: 0 }, &ask) {
            Answer::Reply(Ok(body)) => Ok(InitOut::read_from_bytes(body.bytes()).unwrap()),
            Answer::Reply(Err(errno)) => Err(errno),
            other => panic!("{other:?}"),
        }
    };
    let old = greet(7, 31, u32::MAX).unwrap();
    assert_eq!((old.major, old.minor, old.max_write, old.max_pages), (7, 31, 1 << 20, 256));
    assert!(old.max_background >= 256);
    assert_eq!(greet(7, 60, u32::MAX).unwrap().minor, 46);
    assert_eq!(greet(8, 0, 0).unwrap().major, 7);
    for (major, minor, flags) in [(6, 40, u32::MAX), (7, 20, u32::MAX), (7, 45, 0)] {
        assert!(greet(major, minor, flags).is_err());
    }
}

#[test]
fn io_uring_is_asked_for_where_it_is_wanted_and_offered() {
    const OVER_IO_URING: u32 = 1 << 9;
    let greet = |wish, more: Option<u32>| {
        let flags = !(u32::from(more.is_none()) << 30);
        let hello = InitIn { major: 7, minor: 46, max_readahead: 4096, flags };
        let hello = [hello.as_bytes(), more.unwrap_or(!0).as_bytes(), &[0; 44]].concat();
        let ask = ask(26, &hello).unwrap();
        let file = node(limits(), false).wishing(wish);
        let Answer::Reply(Ok(body)) = file.answer(Head { unique: 1, node: 0 }, &ask) else {
            panic!("refused")
        };
        let out = InitOut::read_from_bytes(body.bytes()).unwrap();
        assert_eq!(out.flags & 1 << 30 != 0, out.flags2 != 0);
        (out.flags2, out.max_write)
    };
    assert_eq!(greet(Wish::Read, Some(!0)), (0, 1 << 20));
    assert_eq!(greet(Wish::Entries, Some(OVER_IO_URING)), (OVER_IO_URING, 1 << 20));
    assert_eq!(greet(Wish::Slots, Some(!0)), (OVER_IO_URING, (1 << 20) + 4096));
    // Not offered, or without the word that would offer it.
    assert_eq!(greet(Wish::Slots, Some(!OVER_IO_URING)).0, 0);
    assert_eq!(greet(Wish::Slots, None).0, 0);
}

#[test]
fn a_request_in_parts_is_the_same_request() {
    let apart = |opcode, operation: &[u8], payload: &'static [u8], len| {
        let header = message(opcode, &[]);
        let operation = [operation, &[0xff; 128]].concat().leak();
        let (head, ask) = parse_apart(&header, &operation[..128], (payload, len)).unwrap();
        assert_eq!(head, Head { unique: 77, node: FILE });
        assert_eq!(is_named(&header), opcode == 1);
        ask
    };
    assert_eq!(apart(1, &[], b"name\0", 5), Ok(Ask::Lookup { name: b"name" }));
    assert_eq!(apart(1, &[], b"name", 4), Err(Errno::EIO));
    assert_eq!(apart(15, &range(4096, 512), &[], 0), Ok(Ask::Read { at: 4096, len: 512 }));
    assert_eq!(apart(16, &range(4096, 512), &[], 512), Ok(Ask::Write { at: 4096, len: 512 }));
    // As much data as the header says, or it is no write.
    assert_eq!(apart(16, &range(4096, 512), &[], 511), Err(Errno::EIO));
    let zero = Ok(Ask::Zero { at: 512, len: 1 << 40, unmap: true });
    assert_eq!(apart(43, &fallocate(512, 1 << 40, 3), &[], 0), zero);
    assert_eq!(parse_apart(&[0; 39], &[0; 128], (&[], 0)), Err(Broken));
}

#[test]
fn an_error_number_that_the_kernel_would_refuse_becomes_eio() {
    assert_eq!(out_header(5, Ok(4)).len, 20);
    assert_eq!(out_header(5, Err(Errno::ENOSPC)).error, -28);
    assert_eq!(out_header(5, Err(Errno::from_result(-512))).error, -5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
    }

    #[test]
    fn no_body_makes_it_panic_and_io_stays_in_bounds(
        opcode in 0_u32..60,
        at_node in 0_u64..4,
        extensions in 0_u16..30,
        body in proptest::collection::vec(any::<u8>(), 0..160),
    ) {
        let mut bytes = message(opcode, &body);
        bytes[16..24].copy_from_slice(&at_node.to_ne_bytes());
        bytes[36..38].copy_from_slice(&extensions.to_ne_bytes());
        let (head, ask) = parse(&bytes).unwrap();
        if let Ok(ask) = ask
            && let Answer::Request(io) = node(limits(), false).answer(head, &ask)
        {
            prop_assert!(!io.op.has_pages() || io.extent.len <= u64::from(MAX_WRITE));
            prop_assert!(io.op != Op::Read || io.extent.within(1 << 20));
            prop_assert_eq!(head.node, FILE);
        }
    }
}
