//! Answers for what goes out over a connection: headers, and the pages of writes between them.
//!
//! A batch is a list of segments in the order of the stream. Headers alone go out at once. Where
//! all segments are memory of ours, one entry sends them. A slot needs an entry of its own, so
//! there they are linked: each is sent when the one before it is, whole; one that stops short stops
//! the rest, which goes out anew.

use std::os::fd::AsFd;

use devsplice_nbd::wire::MAX_REQUEST_LEN;
use rustix::net::{SendFlags, send};

use super::{Conn, Remotes, SENT, Uring, user_data};
use crate::arena::Arena;
use crate::ktls::send_flags;
use crate::ring::socket::MessageHeader;
use crate::splice::{DATA_AT, IoVec, PagesKind, with_slot};
use crate::uapi::{MSG_MORE, OP_SEND, OP_SENDMSG, SQE_FIXED_FILE, SQE_IO_LINK, Sqe};

/// Requests of a batch.
const MOST: usize = 64;
/// Segments of a batch.
const SEGMENTS: usize = 128;
/// Entries that are linked.
const CHAIN: usize = 32;
/// Where headers are in a connection's memory.
const OUT: usize = 0;

const _: () = assert!(MOST * MAX_REQUEST_LEN <= super::receive::ROOM);

/// A run of bytes of the stream.
#[derive(Clone, Copy, Default)]
struct Segment {
    /// In memory, or from the start of a slot.
    at: u64,
    len: u32,
    slot: Option<u16>,
}

/// What is being sent.
pub(super) struct Batch {
    segments: [Segment; SEGMENTS],
    count: usize,
    /// The first that is not sent, and how much of it is.
    next: usize,
    offset: u32,
    /// Entries that are out.
    pub(super) out: u16,
    /// One of them has stopped short or failed; those behind it were not carried out.
    is_cut: bool,
    error: i32,
    /// Whose requests they are.
    keys: [u32; MOST],
    key_count: usize,
    header: MessageHeader,
    vector: [IoVec; SEGMENTS],
}

impl Batch {
    pub(super) fn new() -> Box<Batch> {
        Box::new(Batch {
            segments: [Segment::default(); SEGMENTS],
            count: 0,
            next: 0,
            offset: 0,
            out: 0,
            is_cut: false,
            error: 0,
            keys: [0; MOST],
            key_count: 0,
            header: MessageHeader::default(),
            vector: [IoVec::default(); SEGMENTS],
        })
    }

    /// Forgets what was to be sent.
    pub(super) fn clear(&mut self) {
        (self.count, self.next, self.offset, self.key_count) = (0, 0, 0, 0);
        (self.is_cut, self.error) = (false, 0);
    }

    /// The completion of one of its entries is out.
    pub(super) fn give_back(&mut self, memory: &mut Arena) {
        self.out -= 1;
        memory.give_back(OUT);
    }

    fn push(&mut self, segment: Segment) {
        if let Some(last) = self.segments[..self.count].last_mut()
            && last.slot.is_none()
            && segment.slot.is_none()
            && last.at + u64::from(last.len) == segment.at
        {
            last.len += segment.len;
            return;
        }
        self.segments[self.count] = segment;
        self.count += 1;
    }

    /// What is left to be sent, from its first.
    fn rest(&self) -> impl Iterator<Item = Segment> {
        self.segments[self.next..self.count].iter().enumerate().map(|(index, segment)| {
            let done = if index == 0 { self.offset } else { 0 };
            Segment { at: segment.at + u64::from(done), len: segment.len - done, ..*segment }
        })
    }

    /// So much of the stream was sent.
    fn advance(&mut self, mut done: u32) {
        while self.next < self.count {
            let left = self.segments[self.next].len - self.offset;
            if done < left {
                self.offset += done;
                return;
            }
            done -= left;
            (self.next, self.offset) = (self.next + 1, 0);
        }
    }
}

impl Remotes {
    /// Sends what was asked for, unless something is on its way.
    pub(super) fn send(&mut self, ring: &mut Uring, index: usize) {
        // Each round takes something of what waits.
        while self.may_send(index) && self.renew(ring, index) {
            self.gather(ring, index);
            match self.send_now(ring, index) {
                true => self.all_sent(ring, index),
                false => self.submit(ring, index),
            }
        }
    }

    fn may_send(&self, index: usize) -> bool {
        let Conn { talk, batch, .. } = &self.conns[index];
        talk.is_up() && batch.out == 0 && talk.has_unsent()
    }

    /// Sends a batch that is only headers, if there is room for them; whether that was all.
    ///
    /// An entry's completion would end the wait for an answer, so that there would be two calls
    /// into the kernel for a request. A header with data behind it is not sent so: the server would
    /// run for the header alone.
    fn send_now(&mut self, ring: &Uring, index: usize) -> bool {
        let conn = &mut self.conns[index];
        let [only] = &conn.batch.segments[..conn.batch.count] else { return false };
        // Headers lie together in the memory that they have.
        let len = only.len as usize;
        debug_assert!(only.slot.is_none() && only.at == conn.memory.address(OUT, 0, len));
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let socket = ring.files[usize::from(conn.file.0)].fd.as_fd();
        // What goes wrong with this goes wrong again with an entry, which says so.
        if let Ok(done @ 1..) = send(socket, &conn.memory.bytes(OUT)[..len], flags) {
            let done = u32::try_from(done).unwrap_or(0);
            conn.batch.advance(done);
            conn.count(done);
            conn.talk.hear();
        }
        conn.batch.next == conn.batch.count
    }

    /// Makes a batch of what waits.
    fn gather(&mut self, ring: &Uring, index: usize) {
        let Remotes { conns, asks, .. } = self;
        let conn = &mut conns[index];
        let batch = &mut *conn.batch;
        batch.clear();
        // Bytes of headers; there is room for those of a batch.
        let mut heads = 0;
        while let Some((key, has_data)) = conn.talk.first_unsent() {
            let ask = &asks[key as usize];
            let parts = if has_data { ask.part_count } else { 0 };
            if batch.key_count == MOST || batch.count + 1 + parts > SEGMENTS {
                break;
            }
            let Some(head) = conn.talk.send() else { break };
            let (place, bytes) = (heads, head.bytes());
            heads += bytes.len();
            conn.memory.bytes(OUT)[place..place + bytes.len()].copy_from_slice(bytes);
            let at = conn.memory.address(OUT, place, bytes.len());
            batch.push(Segment { at, len: u32::try_from(bytes.len()).unwrap_or(0), slot: None });
            let pages = PagesKind::unpack(ask.pages);
            for part in &ask.parts[..parts] {
                batch.push(match pages {
                    PagesKind::Slot(slot) => {
                        Segment { at: u64::from(part.at), len: part.len, slot: Some(slot) }
                    }
                    PagesKind::Memory { lane, slot } => {
                        let Some(arena) = &ring.arenas[usize::from(lane)] else { continue };
                        let at = DATA_AT + part.at as usize;
                        let at = arena.address(usize::from(slot), at, part.len as usize);
                        Segment { at, len: part.len, slot: None }
                    }
                });
            }
            batch.keys[batch.key_count] = key;
            batch.key_count += 1;
        }
    }

    /// Hands over what is left of the batch, or a part of it.
    fn submit(&mut self, ring: &mut Uring, index: usize) {
        let takes_slots = self.takes_slots;
        let conn = &mut self.conns[index];
        let batch = &mut *conn.batch;
        (batch.is_cut, batch.error) = (false, 0);
        // A send that may stop short does not stop what is linked behind it.
        let is_sealed = conn.records.is_some();
        let base = Sqe {
            fd: i32::from(conn.file.0),
            flags: SQE_FIXED_FILE,
            op_flags: send_flags(is_sealed),
            user_data: user_data(index, SENT),
            ..Sqe::default()
        };
        let left = batch.count - batch.next;
        if left > 1 && batch.rest().all(|segment| segment.slot.is_none()) {
            let mut vector = [IoVec::default(); SEGMENTS];
            for (entry, segment) in vector.iter_mut().zip(batch.rest()) {
                *entry = IoVec { base: segment.at, len: u64::from(segment.len) };
            }
            batch.vector = vector;
            batch.header.vector = batch.vector.as_ptr() as u64;
            batch.header.vector_len = left as u64;
            let addr = std::ptr::from_ref(&batch.header) as u64;
            ring.queues.push(Sqe { opcode: OP_SENDMSG, addr, len: 1, ..base });
            batch.out = 1;
            return conn.memory.lend(OUT);
        }
        let mut count = if is_sealed { 1 } else { left.min(CHAIN) };
        // All of a chain has to go with one call; what is queued goes before it.
        if !ring.queues.has_room_for(u32::try_from(count).unwrap_or(0)) {
            let _ = ring.queues.enter(0);
            ring.queues.make_room();
            if !ring.queues.has_room_for(u32::try_from(count).unwrap_or(0)) {
                // The kernel is short of something: what is alone cannot be taken apart.
                count = 1;
            }
        }
        for (place, segment) in batch.rest().take(count).enumerate() {
            let mut sqe = Sqe { opcode: OP_SEND, addr: segment.at, len: segment.len, ..base };
            if place + 1 < count {
                sqe.flags |= SQE_IO_LINK;
            }
            if place + 1 < left {
                sqe.op_flags |= MSG_MORE;
            }
            if let Some(slot) = segment.slot {
                (sqe, _) = with_slot(sqe, slot, segment.at, takes_slots);
            }
            ring.queues.push(sqe);
            conn.memory.lend(OUT);
        }
        batch.out = u16::try_from(count).unwrap_or(0);
    }

    /// An entry of a batch has completed.
    pub(super) fn sent(&mut self, ring: &mut Uring, index: usize, result: i32) {
        let conn = &mut self.conns[index];
        let batch = &mut *conn.batch;
        batch.give_back(&mut conn.memory);
        if !batch.is_cut {
            let is_chain = batch.header.vector_len == 0;
            let left = batch.segments[batch.next].len - batch.offset;
            match u32::try_from(result) {
                Ok(done) if done > 0 => {
                    batch.is_cut = is_chain && done < left;
                    batch.advance(done);
                    if let Some(records) = &mut conn.records {
                        records.sent(done.into());
                    }
                    conn.talk.hear();
                }
                Ok(_) => (batch.is_cut, batch.error) = (true, libc::EPIPE),
                Err(_) => (batch.is_cut, batch.error) = (true, -result),
            }
        }
        if batch.out > 0 {
            return;
        }
        batch.header.vector_len = 0;
        if !conn.talk.is_up() {
            return self.settle(ring, index);
        }
        match batch.error {
            // Cancelled is what was asked how far it has come.
            0 | libc::EINTR | libc::EAGAIN | libc::ECANCELED if batch.next < batch.count => {
                self.submit(ring, index);
            }
            0 => self.all_sent(ring, index),
            error => {
                let error = std::io::Error::from_raw_os_error(error);
                self.lose(ring, index, format!("it takes nothing: {error}"));
            }
        }
    }

    /// No entry names the pages of what the batch was of.
    fn all_sent(&mut self, ring: &mut Uring, index: usize) {
        let batch = &mut *self.conns[index].batch;
        let (keys, count) = (batch.keys, batch.key_count);
        batch.clear();
        for key in &keys[..count] {
            if let Some(result) = self.conns[index].talk.sent(*key) {
                self.land(ring, *key, result);
            }
        }
    }
}
