//! Answers for what a queue does to memory while requests come in a burst. The kernel's end of
//! /dev/fuse is a socket that keeps messages apart.

use devsplice_core::Limits;
use devsplice_engine::{Event, Inbox, Ring};
use devsplice_uring::{Config, FileKind, LaneMemory, RingFile, Uring};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::super::wire::InHeader;
use super::*;

const DEPTH: u16 = 16;
/// `FUSE_GETATTR`: it is answered at once.
const GETATTR: u32 = 3;
const REQUESTS: u64 = 120;

fn getattr(unique: u64) -> Vec<u8> {
    let body = [0_u8; 16];
    let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let header = InHeader { len, opcode: GETATTR, unique, node: 2, ..InHeader::default() };
    [header.as_bytes(), &body].concat()
}

#[test]
fn memory_is_made_resident_for_one_tag_a_turn_and_each_request_is_answered() {
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (kernel, fd) = pair.unwrap();
    rustix::io::ioctl_fionbio(&kernel, true).unwrap();
    let memory = LaneMemory { depth: DEPTH, bytes: MAX_WRITE, slots: false, locked: false };
    let config = Config { flights: 1, files: 1, lanes: vec![memory], inner: 0 };
    let mut ring = Uring::new(&config).unwrap();
    let file = ring.add_file(RingFile { fd, kind: FileKind::Other }).unwrap();
    let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let node = Arc::new(Node::new("disk", &Limits::ideal(1 << 20), false));
    let mut queue = Queue::new(node, file, DEPTH, Some(stop));
    let mut inbox = Inbox::with_capacity(usize::from(DEPTH));
    queue.arm(&mut ring, 0).unwrap();
    rustix::io::write(&kernel, &getattr(0)).unwrap();
    ring.enter(false).unwrap();
    assert_eq!(queue.fresh + queue.older, 0, "something is read before the first turn");
    queue.flush(&mut ring);
    let resident = |queue: &Queue| queue.tags.iter().filter(|tag| tag.resident).count();
    assert_eq!(resident(&queue), 1);
    let (mut asked, mut answered, mut most_out) = (1, Vec::new(), 0);
    while answered.len() < usize::try_from(REQUESTS).unwrap() {
        // More are waiting than can be read: a burst.
        while asked < REQUESTS && rustix::io::write(&kernel, &getattr(asked)).is_ok() {
            asked += 1;
        }
        let before = resident(&queue);
        ring.enter(true).unwrap();
        while let Some(event) = ring.next() {
            if let Event::Export { completion, .. } = event {
                queue.event(&mut ring, completion, &mut inbox).unwrap();
            }
        }
        assert!(resident(&queue) <= before + 1, "{} after {before} in one turn", resident(&queue));
        let reading = queue.tags.iter().filter(|tag| tag.reading);
        assert!(reading.clone().all(|tag| tag.resident), "memory that is not there is read into");
        most_out = most_out.max(reading.count());
        assert!(queue.fresh + queue.older > 0, "nothing is asked for");
        let mut reply = [0; 256];
        while let Ok(len) = rustix::io::read(&kernel, &mut reply) {
            assert!(len > OUT_HEADER, "an error");
            answered.push(u64::from_ne_bytes(reply[8..16].try_into().unwrap()));
        }
    }
    answered.sort_unstable();
    assert!(answered.iter().copied().eq(0..REQUESTS));
    assert!(most_out > 2, "the window has not grown: {most_out} reads at a time");
}
