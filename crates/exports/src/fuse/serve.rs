//! Answers for one queue of the file: requests read from /dev/fuse, replies written to it.
//!
//! A tag's memory takes a request such that a write's data begins on a page; a read's data lies at
//! the same place, with the reply's header right before it. So a request costs three entries: read
//! it, splice, write the reply.
//!
//! How many reads are out is what matters. One for each free tag would be the simplest, but where
//! nothing is queued the kernel parks a read on the device's wait queue, and each request then
//! wakes all of them to no avail. One alone would fetch a single request per call into the kernel.
//! So there is a window: it doubles when every read that was out has brought a request (more may be
//! queued), and shrinks when one that had been parked comes back while others still wait. With one
//! request at a time it stays at one or two; in a burst a call into the kernel fetches as many as
//! there are. A parked read is also the wait for the next request: a poll is needed only on kernels
//! that answer EAGAIN instead of parking.
//!
//! A queue of a disk that outlives its server can be stopped: it asks for nothing more, and is
//! closed when all that it was asked has an answer. And it reads into resident memory only. A
//! process that is being killed cannot make memory resident any more: a request that the kernel was
//! just handing over then would fail, as what cannot be copied to its reader does. Making it so
//! takes long (a megabyte each), and requests wait meanwhile: so in each turn that is done for one
//! tag at most, and a wide window takes some turns to be reached.
//!
//! After a burst the window is wide, and each parked read keeps the memory that its tag had for the
//! requests before. So when there have been no requests for a while all but one are cancelled.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use devsplice_core::{Errno, Error, ErrorKind, Io, Op, Result};
use devsplice_engine::{Completion, Export, FileId, Inbox, Request, Rest, Ring};
use devsplice_uring::Uring;
use zerocopy::IntoBytes;

use super::node::{Answer, MAX_WRITE, Node};
use super::wire::{self, OUT_HEADER, OutHeader, WRITE_HEADER, WriteOut};

/// Where a request is read to, and how much of it: exactly what the kernel asks a reader to have
/// room for (fs/fuse/dev.c, `fuse_dev_do_read`).
const READ_RANGE: (usize, usize) =
    (Uring::DATA_AT - WRITE_HEADER, WRITE_HEADER + MAX_WRITE as usize);
/// Where a reply begins.
const REPLY_AT: usize = Uring::DATA_AT - OUT_HEADER;
/// How often a reply is sent again that the kernel did not take for a passing reason.
const MAX_TRIES: u8 = 10;

/// What an event's number says beside its tag.
const READ: u32 = 0;
const REPLY: u32 = 1;
const POLL: u32 = 2;
const CANCEL: u32 = 3;
const STOP: u32 = 4;

const ECONNABORTED: i32 = 103;
const ECANCELED: i32 = 125;

#[derive(Clone, Copy, Default)]
struct Tag {
    /// The number of the request that it serves.
    unique: u64,
    /// The ring's count of calls when its read was queued.
    queued: u64,
    reply_len: usize,
    tries: u8,
    /// Its read is out.
    reading: bool,
    /// All of its memory is resident.
    resident: bool,
}

/// One queue.
pub struct Queue {
    node: Arc<Node>,
    file: FileId,
    lane: u16,
    tags: Box<[Tag]>,
    /// Free tags; the last used is the next to be used, as its memory is warm.
    idle: Vec<u16>,
    /// Reads that may be out.
    window: usize,
    /// Reads that are out: queued since the last call into the kernel, and before it.
    fresh: usize,
    older: usize,
    /// Whether it has had a turn: it asks for requests from then on.
    has_begun: bool,
    /// The ring's count of calls when `fresh` was begun.
    turn: u64,
    /// The same when memory was last made resident.
    populated: u64,
    replies: usize,
    /// A read came back empty-handed: wait before the next.
    dry: bool,
    polling: bool,
    closed: bool,
    /// Readable when the queue is to stop; where there is one, the disk outlives its server.
    stop: Option<Arc<OwnedFd>>,
    stopping: bool,
}

impl Queue {
    /// A queue on `file`, /dev/fuse or a clone of it.
    #[must_use]
    pub fn new(node: Arc<Node>, file: FileId, depth: u16, stop: Option<Arc<OwnedFd>>) -> Queue {
        Queue {
            node,
            file,
            lane: 0,
            tags: vec![Tag::default(); usize::from(depth)].into(),
            idle: (0..depth).rev().collect(),
            window: 1,
            fresh: 0,
            older: 0,
            has_begun: false,
            turn: 0,
            populated: u64::MAX,
            replies: 0,
            dry: false,
            polling: false,
            closed: false,
            stop,
            stopping: false,
        }
    }

    fn take_turn(&mut self, ring: &Uring) {
        let now = ring.counts().enters;
        if now != self.turn {
            self.turn = now;
            self.older += std::mem::take(&mut self.fresh);
        }
    }

    /// Queues reads as far as the window goes.
    fn refill(&mut self, ring: &mut Uring) {
        if self.closed || self.stopping || self.polling {
            return;
        }
        if self.dry {
            if self.fresh + self.older == 0 {
                self.dry = false;
                self.polling = true;
                ring.poll((self.lane, POLL << 16), self.file);
            }
            return;
        }
        while self.fresh + self.older < self.window {
            let Some(tag) = self.idle.pop() else { return };
            if !self.make_resident(ring, tag) {
                // Others are out: when all have come back this goes on.
                self.window = self.fresh + self.older;
                return self.idle.push(tag);
            }
            self.fresh += 1;
            let state = &mut self.tags[usize::from(tag)];
            (state.queued, state.reading) = (self.turn, true);
            ring.read((self.lane, READ << 16 | u32::from(tag)), self.file, 0, READ_RANGE);
        }
    }

    /// Whether a tag may be read into: its memory is resident, or is made so now. That may be put
    /// off while there is another read out.
    fn make_resident(&mut self, ring: &mut Uring, tag: u16) -> bool {
        let state = &mut self.tags[usize::from(tag)];
        if self.stop.is_none() || state.resident {
            return true;
        }
        if self.populated == self.turn && self.fresh + self.older > 0 {
            return false;
        }
        (self.populated, state.resident) = (self.turn, true);
        ring.populate(self.lane, tag);
        true
    }

    /// A read came back.
    fn arrived(
        &mut self,
        ring: &mut Uring,
        tag: u16,
        result: i32,
        inbox: &mut Inbox,
    ) -> Result<()> {
        // It was queued before the last call; saturating, as a call may have been made for room.
        self.older = self.older.saturating_sub(1);
        self.tags[usize::from(tag)].reading = false;
        let Ok(len) = usize::try_from(result) else {
            self.idle.push(tag);
            match Errno::from_result(result) {
                Errno::EAGAIN => self.dry = true,
                // The request went away while it was read.
                Errno::ENOENT | Errno::EINTR => {}
                // We asked for that.
                errno if errno.raw() == ECANCELED => {}
                Errno::ENODEV => self.closed = true,
                errno if errno.raw() == ECONNABORTED => self.closed = true,
                errno => return Err(broken(format!("reading a request failed: {errno:?}"))),
            }
            return Ok(());
        };
        if self.older == 0 {
            self.window = (self.window * 2).min(self.tags.len());
        } else if self.tags[usize::from(tag)].queued + 1 < self.turn {
            self.window = (self.window - 1).max(1);
        }
        let memory = ring.memory(self.lane, tag);
        let (at, room) = READ_RANGE;
        let parsed = wire::parse(&memory[at..at + len.min(room)]);
        let (head, ask) =
            parsed.map_err(|wire::Broken| broken(format!("{len} bytes are no request")))?;
        self.tags[usize::from(tag)].unique = head.unique;
        let answer = match ask {
            Ok(ask) => self.node.answer(head, &ask),
            Err(errno) => Answer::Reply(Err(errno)),
        };
        match answer {
            Answer::Nothing => self.idle.push(tag),
            Answer::Reply(Ok(body)) => self.reply(ring, tag, body.bytes()),
            Answer::Reply(Err(errno)) => self.refuse(ring, tag, errno),
            Answer::Request(io) => {
                let pages = ring.memory_pages(self.lane, tag);
                inbox.push(self.lane, Request { tag, io, pages });
            }
        }
        Ok(())
    }

    /// Cancels all reads that are out but for `kept` of them. One that brings a request all the
    /// same brings it as ever.
    fn cancel_reads(&mut self, ring: &mut Uring, kept: usize) {
        let reading = |tag: &u16| self.tags[usize::from(*tag)].reading;
        let all = 0..u16::try_from(self.tags.len()).unwrap_or(u16::MAX);
        for tag in all.filter(reading).skip(kept) {
            let index = |kind: u32| kind << 16 | u32::from(tag);
            ring.cancel((self.lane, index(CANCEL)), index(READ));
        }
    }

    /// Asks for no more requests.
    fn stop(&mut self, ring: &mut Uring) {
        self.stopping = true;
        self.cancel_reads(ring, 0);
        if self.polling {
            ring.cancel_poll((self.lane, CANCEL << 16), POLL << 16);
        }
    }

    fn reply(&mut self, ring: &mut Uring, tag: u16, body: &[u8]) {
        let memory = ring.memory(self.lane, tag);
        memory[Uring::DATA_AT..Uring::DATA_AT + body.len()].copy_from_slice(body);
        let header = wire::out_header(self.tags[usize::from(tag)].unique, Ok(body.len()));
        self.send(ring, tag, header, body.len());
    }

    fn refuse(&mut self, ring: &mut Uring, tag: u16, errno: Errno) {
        let header = wire::out_header(self.tags[usize::from(tag)].unique, Err(errno));
        self.send(ring, tag, header, 0);
    }

    /// Sends the header and the `body` bytes of the tag's memory behind it.
    fn send(&mut self, ring: &mut Uring, tag: u16, header: OutHeader, body: usize) {
        let memory = ring.memory(self.lane, tag);
        memory[REPLY_AT..Uring::DATA_AT].copy_from_slice(header.as_bytes());
        self.replies += 1;
        let state = &mut self.tags[usize::from(tag)];
        state.reply_len = OUT_HEADER + body;
        state.tries = 0;
        self.write(ring, tag);
    }

    fn write(&mut self, ring: &mut Uring, tag: u16) {
        let len = self.tags[usize::from(tag)].reply_len;
        let index = REPLY << 16 | u32::from(tag);
        ring.write((self.lane, index), self.file, 0, (REPLY_AT, len));
    }

    /// A reply is out. Where the kernel did not take it, the request is gone (aborted) or the
    /// kernel has ended it with an error of its own.
    fn replied(&mut self, ring: &mut Uring, tag: u16, result: i32) {
        let state = &mut self.tags[usize::from(tag)];
        let errno = Errno::from_result(result);
        if result < 0 && (errno.is_transient() || errno == Errno::ENOMEM) && state.tries < MAX_TRIES
        {
            state.tries += 1;
            return self.write(ring, tag);
        }
        self.replies -= 1;
        self.idle.push(tag);
    }
}

impl Export<Uring> for Queue {
    fn depth(&self) -> u16 {
        u16::try_from(self.tags.len()).unwrap_or(u16::MAX)
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.lane = lane;
        self.turn = ring.counts().enters;
        if let Some(stop) = &self.stop {
            ring.poll_other((lane, STOP << 16), stop.as_fd());
        }
        // Nothing is read before the first turn: a read takes a request off the list that all
        // queues share, and where another queue cannot be had nobody would answer it.
        Ok(())
    }

    fn event(&mut self, ring: &mut Uring, completion: Completion, inbox: &mut Inbox) -> Result<()> {
        self.take_turn(ring);
        let tag = completion.index.to_le_bytes();
        let tag = u16::from_le_bytes([tag[0], tag[1]]);
        match completion.index >> 16 {
            READ => self.arrived(ring, tag, completion.result, inbox)?,
            REPLY => self.replied(ring, tag, completion.result),
            CANCEL => {}
            STOP => self.stop(ring),
            _ => self.polling = false,
        }
        self.refill(ring);
        Ok(())
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        match (result, io.op) {
            _ if self.closed => self.idle.push(tag),
            (Err(errno), _) => self.refuse(ring, tag, errno),
            (Ok(()), Op::Read) => {
                // The stack has filled it to the last byte; its length is bounded by MAX_WRITE.
                let len = usize::try_from(io.extent.len).unwrap_or(0);
                let header = wire::out_header(self.tags[usize::from(tag)].unique, Ok(len));
                self.send(ring, tag, header, len);
            }
            (Ok(()), Op::Write) => {
                let len = u32::try_from(io.extent.len).unwrap_or(0);
                self.reply(ring, tag, WriteOut { len, _a: 0 }.as_bytes());
            }
            (Ok(()), _) => self.reply(ring, tag, &[]),
        }
    }

    fn rest(&mut self, ring: &mut Uring) -> Rest {
        for tag in &mut self.tags {
            tag.resident &= tag.reading;
        }
        if self.window == 1 {
            return Rest::Now;
        }
        self.window = 1;
        self.cancel_reads(ring, 1);
        Rest::Again
    }

    fn is_closed(&self) -> bool {
        (self.closed || self.stopping)
            && self.fresh + self.older + self.replies == 0
            && !self.polling
    }

    fn flush(&mut self, ring: &mut Uring) {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.take_turn(ring);
            self.refill(ring);
        }
    }
}

fn broken(reason: String) -> Error {
    Error::new(ErrorKind::Os, "/dev/fuse", reason)
}

#[cfg(test)]
mod tests;
