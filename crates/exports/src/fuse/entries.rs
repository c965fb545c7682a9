//! Answers for one queue of FUSE over io_uring: entries that bring requests, commits that answer
//! them and fetch the next.
//!
//! The kernel has a queue for each CPU that there may be, and a request goes to that of the CPU it
//! was made on. An entry goes round: register, request, engine, commit. Where it has a slot, and
//! the request pages, these are in the slot from the request to the commit.
//!
//! FUSE ends a request at its commit: whoever made it may use its pages for something else from
//! then on, whatever still names the slot. So there is none before all that was submitted for the
//! request has come back, which is the engine's promise: it calls `finish` then, and not before.

use std::sync::Arc;

use devsplice_core::{Errno, Error, ErrorKind, Io, Op, Result};
use devsplice_engine::{Completion, Export, FileId, Inbox, Request, Rest};
use devsplice_uring::{FUSE_OP_AT, FuseEntry, FusePayload, Uring};
use zerocopy::IntoBytes;

use super::node::{Answer, Node};
use super::wire::{self, OUT_HEADER, WriteOut};

/// What an event's number says beside its tag; entries have 0.
const POOL: u32 = 1 << 16;

const ENOTCONN: i32 = 107;
const ECONNABORTED: i32 = 103;
const ECANCELED: i32 = 125;

#[derive(Clone, Copy, Default)]
struct Entry {
    /// The number of the request that it serves.
    unique: u64,
    what: FuseEntry,
    /// The buffer that was taken of the pool.
    buffer: Option<u16>,
    is_dead: bool,
}

/// One queue.
pub struct Queue {
    node: Arc<Node>,
    /// /dev/fuse, and the queue's number.
    device: (FileId, u16),
    payload: FusePayload,
    lane: u16,
    entries: Box<[Entry]>,
    dead: usize,
    /// The pool's command is out.
    adding: bool,
}

impl Queue {
    /// A queue of so many entries on `device`: /dev/fuse, and the queue's number.
    #[must_use]
    pub fn new(node: Arc<Node>, device: (FileId, u16), depth: u16, payload: FusePayload) -> Queue {
        let entries = vec![Entry::default(); usize::from(depth)].into();
        Queue { node, device, payload, lane: 0, entries, dead: 0, adding: false }
    }

    fn entry(&mut self, tag: u16) -> &mut Entry {
        &mut self.entries[usize::from(tag)]
    }

    /// The slot of memory that has the payload of the tag's request, or takes that of its answer.
    /// Only for what has one: the kernel has named a buffer then.
    fn room(&mut self, ring: &mut Uring, tag: u16) -> u16 {
        if self.payload == FusePayload::Own {
            return tag;
        }
        let (lane, entry) = (self.lane, self.entry(tag));
        *entry.buffer.get_or_insert_with(|| ring.fuse_take(lane, entry.what.place))
    }

    /// A request has come.
    fn arrived(&mut self, ring: &mut Uring, tag: u16, inbox: &mut Inbox) -> Result<()> {
        let lane = self.lane;
        let what = ring.fuse_entry(lane, tag);
        *self.entry(tag) = Entry { what, ..Entry::default() };
        let mut payload = [0; PAYLOAD_MAX];
        let is_named = wire::is_named(ring.fuse_headers(lane, tag));
        let len = if is_named { (what.len as usize).min(PAYLOAD_MAX) } else { 0 };
        if len > 0 {
            let slot = self.room(ring, tag);
            let memory = &ring.memory(lane, slot)[Uring::DATA_AT..];
            payload[..len].copy_from_slice(&memory[..len]);
        }
        let headers = &*ring.fuse_headers(lane, tag);
        let (header, operation) = headers.split_at(FUSE_OP_AT);
        let parsed = wire::parse_apart(header, operation, (&payload[..len], what.len));
        let (head, ask) =
            parsed.map_err(|wire::Broken| broken("an entry brings no request".to_owned()))?;
        let answer = match ask {
            Ok(ask) => self.node.answer(head, &ask),
            Err(errno) => Answer::Reply(Err(errno)),
        };
        self.entry(tag).unique = head.unique;
        match answer {
            Answer::Request(io) => {
                let pages = if what.in_slot {
                    ring.slots(lane).pages(tag)
                } else if io.op.has_pages() {
                    let slot = self.room(ring, tag);
                    ring.memory_pages(lane, slot)
                } else {
                    ring.memory_pages(lane, tag)
                };
                inbox.push(lane, Request { tag, io, pages });
            }
            Answer::Reply(Ok(body)) => self.reply(ring, tag, body.bytes()),
            // What takes no answer comes another way.
            Answer::Nothing => self.commit(ring, tag, Err(Errno::EIO), 0),
            Answer::Reply(Err(errno)) => self.commit(ring, tag, Err(errno), 0),
        }
        Ok(())
    }

    fn reply(&mut self, ring: &mut Uring, tag: u16, body: &[u8]) {
        if !body.is_empty() {
            let slot = self.room(ring, tag);
            let memory = &mut ring.memory(self.lane, slot)[Uring::DATA_AT..];
            memory[..body.len()].copy_from_slice(body);
        }
        self.commit(ring, tag, Ok(body.len()), body.len());
    }

    /// Answers, with `len` bytes of payload.
    fn commit(&mut self, ring: &mut Uring, tag: u16, result: Result<usize, Errno>, len: usize) {
        let Entry { unique, buffer, is_dead, .. } = *self.entry(tag);
        if is_dead {
            return;
        }
        let header = wire::out_header(unique, result);
        ring.fuse_headers(self.lane, tag)[..OUT_HEADER].copy_from_slice(header.as_bytes());
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        ring.fuse_commit((self.lane, tag), unique, len, buffer);
    }
}

/// The most that is looked at of a payload: a name, which FUSE bounds (`FUSE_NAME_MAX`), and two
/// zeros behind it.
const PAYLOAD_MAX: usize = 1026;

impl Export<Uring> for Queue {
    fn depth(&self) -> u16 {
        u16::try_from(self.entries.len()).unwrap_or(u16::MAX)
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.lane = lane;
        ring.make_fuse((lane, self.depth()), self.device, self.payload)?;
        if self.payload == FusePayload::Pool {
            self.adding = true;
            ring.fuse_add_pool((lane, POOL));
        }
        for tag in 0..self.depth() {
            ring.fuse_register(lane, tag);
        }
        Ok(())
    }

    fn event(&mut self, ring: &mut Uring, completion: Completion, inbox: &mut Inbox) -> Result<()> {
        let Completion { index, result, .. } = completion;
        let tag = u16::try_from(index & 0xffff).unwrap_or(0);
        if index & POOL != 0 {
            self.adding = false;
            return match result {
                0 => Ok(()),
                result => Err(failed("a pool of buffers", result)),
            };
        }
        match -result {
            0 => self.arrived(ring, tag, inbox),
            // The connection is at its end, or this ring. (`ENOENT`: the request of a commit was
            // ended with all others before it.)
            ENOTCONN | ECONNABORTED | ECANCELED | 2 | 19 => {
                if !std::mem::replace(&mut self.entry(tag).is_dead, true) {
                    self.dead += 1;
                }
                Ok(())
            }
            _ => Err(failed("an entry", result)),
        }
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        let len = usize::try_from(io.extent.len).unwrap_or(0);
        match (result, io.op) {
            (Err(errno), _) => self.commit(ring, tag, Err(errno), 0),
            // The stack has filled it to the last byte.
            (Ok(()), Op::Read) => self.commit(ring, tag, Ok(len), len),
            (Ok(()), Op::Write) => {
                let len = u32::try_from(io.extent.len).unwrap_or(0);
                self.reply(ring, tag, WriteOut { len, _a: 0 }.as_bytes());
            }
            (Ok(()), _) => self.commit(ring, tag, Ok(0), 0),
        }
    }

    fn rest(&mut self, _: &mut Uring) -> Rest {
        Rest::Now
    }

    fn is_closed(&self) -> bool {
        self.dead == self.entries.len() && !self.adding
    }

    fn flush(&mut self, _: &mut Uring) {}
}

fn failed(what: &str, result: i32) -> Error {
    broken(format!("{what} failed: {}", Errno::from_result(result)))
}

fn broken(reason: String) -> Error {
    Error::new(ErrorKind::Os, "FUSE over io_uring", reason)
}
