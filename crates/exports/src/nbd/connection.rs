//! Answers for one connection on its I/O thread: requests received, replies sent.
//!
//! A tag's memory has a reply's header right before its data, so a read's reply is one range. What
//! has been finished in a turn goes out with one entry, as many ranges as there are replies.
//!
//! Requests are received into a memory of their own, many at a time: at 4 KiB one receive brings
//! what a client has in flight. Data of writes that comes along is copied from there; the rest is
//! received where it belongs. Where writes are large, nothing is received beyond the header, so
//! that no data has to be copied.
//!
//! A client that sends faster than it is served, or does not take its replies, is not read from:
//! tags and bytes in flight are bounded.

use std::collections::VecDeque;
use std::sync::Arc;

use devsplice_core::{Errno, Io, Limits, Op, Result};
use devsplice_engine::{Completion, Export, FileId, Inbox, Request, Rest};
use devsplice_nbd::limits::{MAX_EXTENTS, MAX_PAYLOAD};
use devsplice_nbd::server::{ALLOCATION, Ask, Refusal, Session};
use devsplice_nbd::wire::{MAX_REQUEST_LEN, error};
use devsplice_nbd::{Broken, Head, Mode};
use devsplice_uring::{FileKind, RingFile, Uring, Wait};

use super::listen::is_local;
use super::outbox::{Data, Outbox};
use super::post::{Client, Extent, Letter, Post, Question};
use super::state::{Intake, Phase, Tag, error_of, is_gone};

/// Bytes that are received at a time where data may come along.
pub(super) const STAGE: usize = 64 << 10;
/// A write from this size on is large: what follows it is received one by one.
const LARGE: u64 = 16 << 10;
/// Bytes of data in flight on one connection.
const MAX_BYTES: u64 = 2 * MAX_PAYLOAD as u64;

/// What an event's number says beside its tag.
pub(super) const RECEIVED: u32 = 0;
const SENT: u32 = 1;
const BELL: u32 = 2;
pub(super) const ROOM: u32 = 3;
const GONE: u32 = 4;
const CANCELLED: u32 = 5;

/// A connection's place on an I/O thread, whether somebody is there or not.
pub(super) struct Connection {
    pub(super) post: Arc<Post>,
    pub(super) desk: usize,
    limits: Limits,
    pub(super) lane: u16,
    /// What the ring calls the socket, and the bell.
    pub(super) socket: FileId,
    bell: FileId,
    pub(super) client: Option<Client>,
    pub(super) phase: Phase,
    /// The poll of the bell is out.
    listening: bool,
    /// A receive is out.
    pub(super) receiving: bool,
    /// It is waited for that the client goes; and no longer.
    watching: bool,
    unwatched: bool,
    pub(super) intake: Intake,
    /// The last write was large.
    large: bool,
    /// Received and not looked at: a range of the stage.
    pub(super) staged: (usize, usize),
    pub(super) tags: Box<[Tag]>,
    /// Free tags; the last used is the next to be used, as its memory is warm.
    pub(super) idle: Vec<u16>,
    bytes: u64,
    pub(super) outbox: Outbox,
    /// Tags that need a flush before their reply.
    unflushed: VecDeque<u16>,
    /// Changes that wait for those of connections that have ended.
    pub(super) held: VecDeque<(u16, Io)>,
    /// The stack leaves data where it is until somebody changes it.
    may_lend: bool,
    /// The client, over a network, is sent away and has not hung up.
    pub(super) sees_off: bool,
    /// Of the flushes that failed, those that this client knows of.
    told: u32,
    /// A wait for room in the socket is out.
    pub(super) awaits_room: bool,
}

impl Connection {
    /// A place at `desk`. The ring has `socket` and `bell` as files; the former is replaced by each
    /// client's.
    pub(super) fn new(
        (post, desk): (Arc<Post>, usize),
        limits: Limits,
        (socket, bell): (FileId, FileId),
        depth: u16,
        may_lend: bool,
    ) -> Connection {
        Connection {
            post,
            desk,
            limits,
            lane: 0,
            socket,
            bell,
            client: None,
            phase: Phase::Free,
            listening: false,
            receiving: false,
            watching: false,
            unwatched: false,
            intake: Intake::Request,
            large: false,
            staged: (0, 0),
            tags: vec![Tag::default(); usize::from(depth)].into(),
            idle: (0..depth).rev().collect(),
            bytes: 0,
            outbox: Outbox::new(depth),
            unflushed: VecDeque::with_capacity(usize::from(depth)),
            held: VecDeque::with_capacity(usize::from(depth)),
            may_lend,
            sees_off: false,
            told: 0,
            awaits_room: false,
        }
    }

    /// The memory that requests are received into: behind those of the tags.
    pub(super) fn stage(&self) -> u16 {
        u16::try_from(self.tags.len()).unwrap_or(u16::MAX)
    }

    fn session(&self) -> Option<&Session> {
        self.client.as_ref().map(|client| &client.session)
    }

    fn mode(&self) -> Mode {
        self.session().map_or(Mode::Simple, |session| session.mode)
    }

    fn listen(&mut self, ring: &mut Uring) {
        self.listening = true;
        ring.poll((self.lane, BELL << 16), self.bell);
    }

    /// Something has come for this place.
    fn rung(&mut self, ring: &mut Uring, inbox: &mut Inbox) {
        self.listening = false;
        let post = Arc::clone(&self.post);
        post.desks[self.desk].bell.heard();
        while let Some(letter) = post.desks[self.desk].take_letter() {
            match letter {
                Letter::Client(client) => self.welcome(ring, *client),
                Letter::Answer { tag, extents } => self.tell(ring, tag, &extents),
                Letter::Look(look) => self.look(look),
            }
        }
        while let Some(tag) = self.unflushed.pop_front() {
            self.start(inbox, tag, Io::new(Op::Flush, 0, 0), ring);
        }
        self.go_on(ring, inbox);
        if post.is_stopping() {
            self.end();
        }
        if !post.is_stopping() || self.phase == Phase::Leaving {
            self.listen(ring);
        }
        self.take(ring, inbox);
        // An answer may have been the last thing that was out for a client who has gone.
        self.settle(ring);
    }

    /// Takes a client in.
    fn welcome(&mut self, ring: &mut Uring, client: Client) {
        debug_assert!(self.phase == Phase::Free, "a desk was given away twice");
        let place = client.socket.try_clone().map_err(|error| error.to_string());
        let put = place.and_then(|fd| {
            ring.replace_file(self.socket, RingFile { fd, kind: FileKind::Other })
                .map_err(|error| error.to_string())
        });
        if let Err(error) = put {
            (self.post.say)(&format!("nbd: {}: {error}", client.peer));
            return self.post.leave(self.desk);
        }
        let (stage, early) = (self.stage(), client.early.len());
        ring.memory(self.lane, stage)[..early].copy_from_slice(&client.early);
        self.staged = (0, early);
        self.intake = Intake::Request;
        self.large = false;
        self.phase = Phase::Open;
        self.sees_off = false;
        self.told = self.post.failed_flushes();
        self.post.seal(client.records.is_some());
        ring.lend_files(self.lane, self.may_lend && is_local(&client.socket));
        self.client = Some(client);
        (self.watching, self.unwatched) = (true, false);
        ring.poll_end((self.lane, GONE << 16), self.socket);
    }

    /// The client has gone, or it is not waited for any more.
    fn gone(&mut self, ring: &mut Uring, result: i32) {
        self.watching = false;
        if result > 0 {
            self.notice();
        }
        self.settle(ring);
    }

    /// Whether it is still waited for that the client goes; it is asked no longer to be.
    pub(super) fn unwatch(&mut self, ring: &mut Uring) -> bool {
        if self.watching && !std::mem::replace(&mut self.unwatched, true) {
            ring.cancel_poll((self.lane, CANCELLED << 16), GONE << 16);
        }
        self.watching
    }

    /// Takes what is staged; asks for more.
    fn take(&mut self, ring: &mut Uring, inbox: &mut Inbox) {
        if self.phase != Phase::Open || self.receiving {
            return;
        }
        match self.parse(ring, inbox) {
            Ok(()) => self.receive(ring),
            Err(Broken(reason)) => self.lose(Some(reason)),
        }
        self.settle(ring);
    }

    /// Whether another request may be taken.
    fn has_room(&self) -> bool {
        !self.idle.is_empty() && self.bytes < MAX_BYTES
    }

    /// Takes the requests that are staged, as far as there is room for them.
    fn parse(&mut self, ring: &mut Uring, inbox: &mut Inbox) -> Result<(), Broken> {
        while self.phase == Phase::Open {
            match self.intake {
                Intake::Data { .. } => return Ok(()),
                Intake::Skip { left } => {
                    let (start, end) = self.staged;
                    let count = usize::try_from(left).unwrap_or(usize::MAX).min(end - start);
                    self.staged.0 += count;
                    let left = left - count as u64;
                    if left > 0 {
                        self.intake = Intake::Skip { left };
                        return Ok(());
                    }
                    self.intake = Intake::Request;
                }
                Intake::Request if !self.has_room() => return Ok(()),
                Intake::Request => {
                    let (mode, stage, (start, end)) = (self.mode(), self.stage(), self.staged);
                    let bytes = &ring.memory(self.lane, stage)[start..end];
                    let request = devsplice_nbd::Request::parse(bytes, mode)?;
                    let Some(request) = request else { return Ok(()) };
                    self.staged.0 += mode.request_len();
                    self.request(ring, inbox, &request)?;
                }
            }
        }
        Ok(())
    }

    /// Takes a request.
    fn request(
        &mut self,
        ring: &mut Uring,
        inbox: &mut Inbox,
        request: &devsplice_nbd::Request,
    ) -> Result<(), Broken> {
        let Some(session) = self.session() else { return Ok(()) };
        let (mode, answer) = (session.mode, session.admit(request));
        if answer == Ok(Ask::Disconnect) {
            self.phase = Phase::Leaving;
            // What has not begun would begin beside what the client asks for over another one.
            while let Some((held, _)) = self.held.pop_front() {
                self.reply(ring, held, error::ESHUTDOWN);
            }
            self.leave_behind();
            return Ok(());
        }
        let Some(tag) = self.idle.pop() else { return Err(Broken("no room for a request")) };
        let devsplice_nbd::Request { cookie, offset, length, .. } = *request;
        self.tags[usize::from(tag)] = Tag { cookie, offset, ..Tag::default() };
        let io = |op| Io::new(op, offset, length);
        match answer {
            Err(Refusal::Hopeless) => {
                self.free(tag);
                return Err(Broken("a request with more data than any has"));
            }
            Err(Refusal::Reply { error, skip }) => {
                self.large = skip >= LARGE;
                self.intake = if skip > 0 { Intake::Skip { left: skip } } else { self.intake };
                self.reply(ring, tag, error);
            }
            Ok(Ask::Read) => self.start(inbox, tag, io(Op::Read), ring),
            Ok(Ask::Write { fua }) => self.write(ring, inbox, (tag, length, fua)),
            Ok(Ask::Flush) => self.start(inbox, tag, Io::new(Op::Flush, 0, 0), ring),
            Ok(Ask::Trim { fua }) => {
                self.tags[usize::from(tag)].flush = fua;
                self.start(inbox, tag, io(Op::Discard), ring);
            }
            Ok(Ask::WriteZeroes { unmap, fast: true, .. })
                if !(unmap && self.limits.fast_zeroes) =>
            {
                self.reply(ring, tag, error::ENOTSUP);
            }
            Ok(Ask::WriteZeroes { fua, unmap, .. }) => {
                self.tags[usize::from(tag)].flush = fua;
                self.start(inbox, tag, io(Op::WriteZeroes { unmap }), ring);
            }
            Ok(Ask::Cache | Ask::Disconnect) => self.reply(ring, tag, 0),
            Ok(Ask::Status { one }) => {
                let most = if one { 1 } else { MAX_EXTENTS };
                // With 32 bits no extent can be longer.
                let len = if mode == Mode::Extended { length } else { length.min(1 << 31) };
                let question = Question { lane: self.desk, tag, at: offset, len, most };
                self.tags[usize::from(tag)].asked = true;
                self.post.ask(question);
            }
        }
        Ok(())
    }

    /// Takes what is there of a write's data.
    fn write(&mut self, ring: &mut Uring, inbox: &mut Inbox, (tag, len, fua): (u16, u64, bool)) {
        self.large = len >= LARGE;
        let (start, end) = self.staged;
        // Bounded by `MAX_PAYLOAD`, which `admit` has checked.
        let len = u32::try_from(len).unwrap_or(0);
        let there = (len as usize).min(end - start);
        if there > 0 {
            let stage = self.stage();
            ring.copy_memory(self.lane, (stage, start), (tag, Uring::DATA_AT), there);
            self.staged.0 += there;
        }
        let there = u32::try_from(there).unwrap_or(len);
        if there < len {
            self.intake = Intake::Data { tag, there, len, fua };
        } else {
            self.start_write(ring, inbox, (tag, len, fua));
        }
    }

    fn start_write(
        &mut self,
        ring: &mut Uring,
        inbox: &mut Inbox,
        (tag, len, fua): (u16, u32, bool),
    ) {
        let offset = self.tags[usize::from(tag)].offset;
        let mut io = Io::new(Op::Write, offset, u64::from(len));
        io.fua = fua && self.limits.fua;
        self.tags[usize::from(tag)].flush = fua && !io.fua;
        self.start(inbox, tag, io, ring);
    }

    /// Gives a request to the engine.
    fn start(&mut self, inbox: &mut Inbox, tag: u16, io: Io, ring: &mut Uring) {
        let state = &mut self.tags[usize::from(tag)];
        if io.op.has_pages() {
            state.bytes = u32::try_from(io.extent.len).unwrap_or(u32::MAX);
            self.bytes += u64::from(state.bytes);
        }
        if io.op.changes() && self.post.stale.keeps(self.desk, io.extent) {
            return self.hold(tag, io);
        }
        self.begin(inbox, tag, io, ring);
    }

    /// As [`Connection::start`], for what has not been counted as in flight only now.
    pub(super) fn begin(&mut self, inbox: &mut Inbox, tag: u16, io: Io, ring: &mut Uring) {
        if io.op.changes() {
            self.tags[usize::from(tag)].changes = io.extent.len;
        }
        ring.forget_loan(self.lane, tag);
        let pages = ring.memory_pages(self.lane, tag);
        inbox.push(self.lane, Request { tag, io, pages });
    }

    /// Asks the socket for what is to come next.
    fn receive(&mut self, ring: &mut Uring) {
        if self.phase != Phase::Open {
            return;
        }
        let stage = self.stage();
        if let Intake::Data { tag, there, len, .. } = self.intake {
            let range = (Uring::DATA_AT + there as usize, (len - there) as usize);
            self.receiving = true;
            let index = (self.lane, RECEIVED << 16 | u32::from(tag));
            return ring.receive(index, self.socket, range, Wait::All);
        }
        if self.intake == Intake::Request && !self.has_room() {
            return;
        }
        let (start, end) = self.staged;
        if start > 0 {
            // What is left is less than a header.
            ring.memory(self.lane, stage).copy_within(start..end, 0);
            self.staged = (0, end - start);
        }
        let end = self.staged.1;
        let most = match self.intake {
            Intake::Request if self.large => self.mode().request_len() - end,
            _ => STAGE - end,
        };
        let wait = if self.large { Wait::Some } else { Wait::First };
        self.receiving = true;
        let index = (self.lane, RECEIVED << 16 | u32::from(stage));
        ring.receive(index, self.socket, (end, most), wait);
    }

    /// A receive is over.
    fn received(&mut self, ring: &mut Uring, result: i32, inbox: &mut Inbox) {
        self.receiving = false;
        let heard = self.hear(result);
        let result = *heard.as_ref().unwrap_or(&0);
        let count = u32::try_from(result).unwrap_or(0);
        let again = result < 0 && Errno::from_result(result).is_transient();
        if self.phase != Phase::Open {
            self.sees_off &= count > 0 || again;
            return self.settle(ring);
        }
        if count == 0 && !again {
            // Between two requests that is a client who goes without a word, as many do.
            let is_between = self.intake.is_between(self.staged);
            let gone = (!is_between).then_some("gone in the middle of a request");
            self.lose(heard.as_ref().err().map(String::as_str).or(gone));
            return self.settle(ring);
        }
        match self.intake {
            Intake::Data { tag, there, len, fua } => {
                let there = there + count;
                if there >= len {
                    self.intake = Intake::Request;
                    self.start_write(ring, inbox, (tag, len, fua));
                } else {
                    self.intake = Intake::Data { tag, there, len, fua };
                }
            }
            _ => self.staged.1 += count as usize,
        }
        self.take(ring, inbox);
    }

    /// The reply to a request without data.
    fn reply(&mut self, ring: &mut Uring, tag: u16, error: u32) {
        let Tag { cookie, offset, .. } = self.tags[usize::from(tag)];
        let head = Head::done(self.mode(), (cookie, offset), error);
        self.outbox.put(ring, (self.lane, tag), &head, Data::None);
    }

    /// The reply to a question about a range.
    fn tell(&mut self, ring: &mut Uring, tag: u16, extents: &[Extent]) {
        if !std::mem::take(&mut self.tags[usize::from(tag)].asked) {
            return;
        }
        if self.phase == Phase::Lost {
            return self.free(tag);
        }
        if extents.is_empty() {
            return self.reply(ring, tag, error::EIO);
        }
        let mode = self.mode();
        let data = &mut ring.memory(self.lane, tag)[Uring::DATA_AT..];
        let mut len = 0;
        for extent in extents {
            let head = Head::extent(mode, extent.len, extent.state);
            data[len..len + head.bytes().len()].copy_from_slice(head.bytes());
            len += head.bytes().len();
        }
        let Tag { cookie, offset, .. } = self.tags[usize::from(tag)];
        let count = u32::try_from(extents.len()).unwrap_or(0);
        let head = Head::status(mode, (cookie, offset), ALLOCATION, count);
        let len = u32::try_from(len).unwrap_or(0);
        self.outbox.put(ring, (self.lane, tag), &head, Data::Told(len));
    }

    pub(super) fn free(&mut self, tag: u16) {
        let state = &mut self.tags[usize::from(tag)];
        self.bytes -= u64::from(std::mem::take(&mut state.bytes));
        self.idle.push(tag);
    }

    /// A send is over.
    fn sent(&mut self, ring: &mut Uring, result: i32, inbox: &mut Inbox) {
        match self.outbox.sent(result) {
            Ok(()) => self.count(result),
            Err(errno) => {
                self.lose((!is_gone(errno)).then_some("a reply could not be sent"));
            }
        }
        while let Some(tag) = self.outbox.next_gone() {
            self.free(tag);
        }
        self.take(ring, inbox);
        self.settle(ring);
    }
}

impl Export<Uring> for Connection {
    fn depth(&self) -> u16 {
        u16::try_from(self.tags.len()).unwrap_or(u16::MAX)
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.lane = lane;
        self.listen(ring);
        Ok(())
    }

    fn event(&mut self, ring: &mut Uring, completion: Completion, inbox: &mut Inbox) -> Result<()> {
        match completion.index >> 16 {
            RECEIVED => self.received(ring, completion.result, inbox),
            SENT => self.sent(ring, completion.result, inbox),
            ROOM => {
                self.awaits_room = false;
                self.settle(ring);
            }
            GONE => self.gone(ring, completion.result),
            CANCELLED => {}
            _ => self.rung(ring, inbox),
        }
        Ok(())
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        let is_flush = io.op == Op::Flush || io.fua;
        let is_heard = self.phase != Phase::Lost;
        let result = match is_flush {
            true => self.post.flushed((&mut self.told, is_heard), result),
            false => result,
        };
        let state = &mut self.tags[usize::from(tag)];
        state.changes = 0;
        if std::mem::take(&mut state.is_stale) {
            self.post.is_done(self.desk, tag);
        }
        if self.phase == Phase::Lost {
            self.free(tag);
            return self.settle(ring);
        }
        match result {
            Err(errno) => self.reply(ring, tag, error_of(errno)),
            Ok(()) if io.op == Op::Read => {
                // The stack has filled it to the last byte.
                let (cookie, offset, len) = (state.cookie, state.offset, state.bytes);
                let head = Head::data(self.mode(), (cookie, offset), len);
                self.outbox.put(ring, (self.lane, tag), &head, Data::Read(len));
            }
            Ok(()) if std::mem::take(&mut state.flush) => {
                // Goes on with the next event, which this is.
                self.unflushed.push_back(tag);
                self.post.desks[self.desk].bell.ring();
            }
            Ok(()) => self.reply(ring, tag, 0),
        }
    }

    fn flush(&mut self, ring: &mut Uring) {
        self.renew(ring);
        if self.phase != Phase::Lost {
            let is_sealed = self.is_sealed();
            self.outbox.flush(ring, (self.lane, SENT << 16), self.socket, is_sealed);
        }
    }

    fn rest(&mut self, _: &mut Uring) -> Rest {
        let waits = !self.held.is_empty() || self.outbox.has_any();
        Rest::keep_if(waits || !self.intake.is_between(self.staged))
    }

    fn is_closed(&self) -> bool {
        self.phase == Phase::Free && self.post.is_stopping() && !self.listening
    }
}

const _: () = assert!(STAGE > MAX_REQUEST_LEN && MAX_EXTENTS * 16 <= 4096);
