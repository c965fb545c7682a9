//! Answers for one ublk queue, or one thread's part of it, served in batches (`UBLK_F_BATCH_IO`,
//! since 7.0): tags come by one command that stays, and all that a turn finishes goes in another.
//!
//! Several threads may serve one queue. Each has its own standing command; the kernel gives each
//! tag to one of them, which commits it: only the ring that a tag came to can take its pages out of
//! their slot. So each tag has the same slot number in all rings, and nothing here is shared.
//!
//! The kernel asks the command that has stood longest until that is out of buffers; sent again, it
//! is the last in the row. So a thread with work in hand keeps buffers back where others share the
//! queue: what it would have to leave lying goes to them.
//!
//! Between fetch and commit a tag goes the same way as in [`queue`](super::queue).

use devsplice_core::{Errno, Error, ErrorKind, Extent, Io, Op, Result};
use devsplice_engine::{Completion, Export, FileId, Inbox, Request, Rest, Ring};
use devsplice_uring::uapi::{CQE_BUFFER, CQE_MORE};
use devsplice_uring::{Buffers, Command, Uring};
use zerocopy::IntoBytes;

use super::DataPath;
use super::batch_wire::Wire;
use super::map::Descriptors;
use super::progress::Progress;
use super::queue::{QueueConfig, direct, payload_bytes, request};
use super::uapi::{
    BATCH_AUTO_BUF_REG_FALLBACK, BATCH_HAS_BUF_ADDR, BatchIo, ELEMENT_BYTES, Element,
    IO_F_NEED_REG_BUF, IoCmd, io, user_copy_at,
};

/// What a completion is about: the high half of its index. The low half is a tag, or nothing.
mod kind {
    /// The command that brings tags.
    pub(super) const FETCH: u32 = 0;
    /// All tags are given to the kernel for the first time.
    pub(super) const PREPARE: u32 = 1;
    /// A list of finished tags.
    pub(super) const COMMIT: u32 = 2;
    /// Registration of a tag's pages.
    pub(super) const REGISTER: u32 = 3;
    /// Release of a tag's pages.
    pub(super) const UNREGISTER: u32 = 4;
    /// Data of a write on the way to our memory.
    pub(super) const PULL: u32 = 5;
    /// Data of a read on the way from our memory.
    pub(super) const PUSH: u32 = 6;
}

/// As in include/uapi/asm-generic/errno.h.
const ENOBUFS: i32 = 105;

const fn index(kind: u32, tag: u16) -> u32 {
    kind << 16 | tag as u32
}

/// Buffers of a thread that has a queue for itself: enough for every tag to come alone.
const OWN: Buffers = Buffers { count: 64, tags: 128 };
/// Buffers of a thread that shares a queue: what it takes before others get their turn.
const SHARED: Buffers = Buffers { count: 2, tags: 8 };

/// Which part of its queue a thread has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// It gives the queue's tags to the kernel.
    pub(crate) is_first: bool,
    /// Others serve the queue as well.
    pub(crate) is_shared: bool,
    /// Each tag has two slots, which take turns from request to request.
    pub(crate) rotates: bool,
}

/// What is known of a request between fetch and commit.
#[derive(Clone, Copy)]
struct Tag {
    /// Not known of reads and writes whose pages were in their slot from the start: the engine
    /// knows it.
    io: Io,
    /// Whether its data is in the device's own pages, rather than in memory of ours.
    in_slot: bool,
    /// It has come and is not listed for a commit.
    is_ours: bool,
    /// Bytes that have been pulled or pushed.
    progress: Progress,
    /// How far behind its first slot the one is that it has now.
    turn: u16,
}

/// One queue, as far as one thread serves it.
pub(crate) struct BatchQueue {
    config: QueueConfig,
    part: Part,
    lane: u16,
    file: FileId,
    descriptors: Descriptors,
    tags: Box<[Tag]>,
    /// Requests that have come and are not committed.
    owned: u16,
    /// Elements in the list that is filled.
    listed: u16,
    /// Elements in the list that is out.
    out: u16,
    /// Buffers that are kept back, a bit each.
    kept: u64,
    /// No further request will come.
    is_over: bool,
}

impl BatchQueue {
    pub(crate) fn new(
        config: QueueConfig,
        part: Part,
        file: FileId,
        descriptors: Descriptors,
    ) -> BatchQueue {
        let tag =
            Tag { io: NOTHING, in_slot: false, is_ours: false, progress: Progress::NONE, turn: 0 };
        let tags = vec![tag; usize::from(config.depth)].into();
        BatchQueue {
            config,
            part,
            lane: 0,
            file,
            descriptors,
            tags,
            owned: 0,
            listed: 0,
            out: 0,
            kept: 0,
            is_over: false,
        }
    }

    /// Bytes of an element: it has an address where the kernel copies.
    fn element_bytes(&self) -> u8 {
        let has_addr = self.config.path == DataPath::Copy;
        if has_addr { 2 * ELEMENT_BYTES } else { ELEMENT_BYTES }
    }

    /// A command for many tags.
    fn batch(&self, op: u32, count: u16) -> Command {
        let flags = match self.config.path {
            _ if op == io::FETCH_IO_CMDS => 0,
            DataPath::AutoRegister => BATCH_AUTO_BUF_REG_FALLBACK,
            DataPath::Copy => BATCH_HAS_BUF_ADDR,
            DataPath::Register | DataPath::UserCopy => 0,
        };
        let is_fetch = op == io::FETCH_IO_CMDS;
        let elem_bytes = if is_fetch { 2 } else { self.element_bytes() };
        let q_id = self.config.queue;
        let batch = BatchIo { q_id, flags, nr_elem: count, elem_bytes, ..BatchIo::default() };
        let mut payload = [0; 16];
        payload.copy_from_slice(batch.as_bytes());
        Command { op, payload, aux: 0, lend: None }
    }

    fn fetch<W: Wire>(&mut self, ring: &mut W) {
        self.give_buffers(ring);
        let command = self.batch(io::FETCH_IO_CMDS, self.config.depth);
        ring.fetch_tags((self.lane, index(kind::FETCH, 0)), self.file, &command);
    }

    fn give_buffers<W: Wire>(&mut self, ring: &mut W) {
        while self.kept != 0 {
            let buffer = self.kept.trailing_zeros();
            self.kept &= self.kept - 1;
            ring.give_buffer(self.lane, u16::try_from(buffer).unwrap_or(0));
        }
    }

    /// Adds a tag to the list that goes to the kernel next.
    #[inline(always)]
    fn list<W: Wire>(&mut self, ring: &mut W, tag: u16, result: i32) {
        let path = self.config.path;
        let is_auto = path == DataPath::AutoRegister;
        if is_auto && self.part.rotates {
            let turn = &mut self.tags[usize::from(tag)].turn;
            *turn = self.config.depth - *turn;
        }
        let buf_index = if is_auto { ring.slot_index(self.lane, self.slot(tag)) } else { 0 };
        let addr = if path == DataPath::Copy { ring.lend_memory(self.lane, tag) } else { 0 };
        let element = Element { tag, buf_index, result, addr };
        ring.list(self.lane, zerocopy::transmute!(element));
        self.listed += 1;
    }

    fn send<W: Wire>(&mut self, ring: &mut W, (op, kind): (u32, u32)) {
        let command = self.batch(op, self.listed);
        ring.send_list((self.lane, index(kind, 0)), self.file, &command);
        self.out = std::mem::take(&mut self.listed);
    }

    /// The number of a tag's slot among the lane's.
    #[inline]
    fn slot(&self, tag: u16) -> u16 {
        tag + self.tags[usize::from(tag)].turn
    }

    fn slot_command<W: Wire>(&self, ring: &mut W, (op, kind): (u32, u32), tag: u16) {
        let addr = u64::from(ring.slot_index(self.lane, self.slot(tag)));
        let payload = IoCmd { q_id: self.config.queue, tag, result: 0, addr };
        let command = Command { op, payload: payload_bytes(&payload), aux: 0, lend: None };
        ring.command((self.lane, index(kind, tag)), self.file, &command);
    }

    #[inline(never)]
    fn commit<W: Wire>(&mut self, ring: &mut W, tag: u16, io: &Io, result: Result<(), Errno>) {
        let state = &mut self.tags[usize::from(tag)];
        debug_assert!(state.is_ours, "tag {tag} is committed twice");
        state.is_ours = false;
        let result = match result {
            Err(errno) => -errno.raw(),
            Ok(()) if io.op.has_pages() => i32::try_from(io.extent.len).unwrap_or(0),
            Ok(()) => 0,
        };
        if self.config.path == DataPath::Register && state.in_slot {
            // Carried out before the list that is sent behind it, so the slot is free again before
            // the next request can come.
            self.slot_command(ring, (io::UNREGISTER_IO_BUF, kind::UNREGISTER), tag);
        }
        self.list(ring, tag, result);
    }

    fn broken(&self, what: String) -> Error {
        Error::new(ErrorKind::Os, format!("ublk queue {}", self.config.queue), what)
    }

    /// The standing command has completed, for the last time or not.
    fn fetched<W: Wire>(
        &mut self,
        ring: &mut W,
        event: Completion,
        inbox: &mut Inbox,
    ) -> Result<()> {
        let Completion { result, flags, .. } = event;
        if flags & CQE_BUFFER != 0 {
            let buffer = u16::try_from(flags >> 16).unwrap_or(u16::MAX);
            let count = usize::try_from(result).unwrap_or(0) / 2;
            for tag in &ring.tags(self.lane, buffer, count)[..count] {
                self.arrived(ring, *tag, inbox)?;
            }
            if self.part.is_shared {
                self.kept |= 1 << buffer;
            } else {
                ring.give_buffer(self.lane, buffer);
            }
        } else if result > 0 {
            return Err(self.broken(format!("{result} bytes of tags came without a buffer")));
        }
        if flags & CQE_MORE != 0 {
            return Ok(());
        }
        if result >= 0 || result == -ENOBUFS {
            // Out of buffers, which are all given back by now; or the kernel had other reasons.
            // What waits there for a command comes with the next.
            self.fetch(ring);
        } else if result == -Errno::ENODEV.raw() {
            self.end(ring);
        } else {
            let errno = Errno::from_result(result);
            return Err(self.broken(format!("fetching failed: {errno}")));
        }
        Ok(())
    }

    /// The disk was stopped: the tags that the kernel has stay there.
    fn end<W: Wire>(&mut self, ring: &mut W) {
        self.is_over = true;
        if self.config.path == DataPath::Copy {
            for tag in (0..self.config.depth).filter(|tag| !self.tags[usize::from(*tag)].is_ours) {
                ring.memory_back(self.lane, tag);
            }
        }
    }

    /// A request has arrived: brings its data, if it has to be brought.
    #[inline]
    fn arrived<W: Wire>(&mut self, ring: &mut W, tag: u16, inbox: &mut Inbox) -> Result<()> {
        let is_new = self.tags.get(usize::from(tag)).is_some_and(|state| !state.is_ours);
        if !is_new {
            return Err(self.broken(format!("the kernel handed out tag {tag} of its own")));
        }
        self.owned += 1;
        let path = self.config.path;
        let descriptor = self.descriptors.read(tag);
        if path == DataPath::AutoRegister
            && let Some(io) = direct(&descriptor)
        {
            let state = &mut self.tags[usize::from(tag)];
            (state.in_slot, state.is_ours) = (true, true);
            let pages = ring.pages(self.lane, self.slot(tag), true);
            inbox.push(self.lane, Request { tag, io, pages });
            return Ok(());
        }
        if path == DataPath::Copy {
            ring.memory_back(self.lane, tag);
        }
        let asked = request(&descriptor);
        let io = asked.unwrap_or(NOTHING);
        let may_have_slot = match path {
            DataPath::AutoRegister => descriptor.op_flags & IO_F_NEED_REG_BUF == 0,
            DataPath::Register => true,
            DataPath::UserCopy | DataPath::Copy => false,
        };
        let in_slot = may_have_slot && io.op.has_pages();
        let state = &mut self.tags[usize::from(tag)];
        *state = Tag { io, in_slot, is_ours: true, progress: Progress::NONE, turn: state.turn };
        match path {
            _ if asked.is_err() => self.commit(ring, tag, &NOTHING, Err(Errno::EOPNOTSUPP)),
            _ if !io.op.has_pages() => self.hand_over(ring, tag, inbox),
            DataPath::Register => {
                self.slot_command(ring, (io::REGISTER_IO_BUF, kind::REGISTER), tag);
            }
            _ if in_slot || path == DataPath::Copy => self.hand_over(ring, tag, inbox),
            _ => self.bring(ring, tag, inbox),
        }
        Ok(())
    }

    /// Gets the data of a write into our memory; a read has none yet.
    fn bring<W: Wire>(&mut self, ring: &mut W, tag: u16, inbox: &mut Inbox) {
        if self.tags[usize::from(tag)].io.op == Op::Write {
            self.pull(ring, tag);
        } else {
            self.hand_over(ring, tag, inbox);
        }
    }

    fn hand_over<W: Wire>(&self, ring: &W, tag: u16, inbox: &mut Inbox) {
        let Tag { io, in_slot, .. } = self.tags[usize::from(tag)];
        let at = if in_slot { self.slot(tag) } else { tag };
        let pages = ring.pages(self.lane, at, in_slot);
        inbox.push(self.lane, Request { tag, io, pages });
    }

    /// What of the tag's data is still to be moved, and where it is on the character device.
    fn left(&self, tag: u16) -> (u64, (usize, usize)) {
        let Tag { io, progress: Progress { moved, .. }, .. } = self.tags[usize::from(tag)];
        let at = user_copy_at(self.config.queue, tag) + u64::from(moved);
        let len = usize::try_from(io.extent.len).unwrap_or(0) - moved as usize;
        (at, (Uring::DATA_AT + moved as usize, len))
    }

    fn pull<W: Wire>(&self, ring: &mut W, tag: u16) {
        let (at, range) = self.left(tag);
        ring.read((self.lane, index(kind::PULL, tag)), self.file, at, range);
    }

    fn push<W: Wire>(&self, ring: &mut W, tag: u16) {
        let (at, range) = self.left(tag);
        ring.write((self.lane, index(kind::PUSH, tag)), self.file, at, range);
    }

    /// A pull or push has come back: goes on with it, or with what follows.
    fn moved<W: Wire>(&mut self, ring: &mut W, event: Completion, inbox: &mut Inbox) {
        let tag = u16::try_from(event.index & 0xffff).unwrap_or(0);
        let is_pull = event.index >> 16 == kind::PULL;
        let state = &mut self.tags[usize::from(tag)];
        let io = state.io;
        if let Err(errno) = state.progress.take(event.result) {
            return self.commit(ring, tag, &io, Err(errno));
        }
        match (is_pull, u64::from(state.progress.moved) >= io.extent.len) {
            (true, true) => self.hand_over(ring, tag, inbox),
            (true, false) => self.pull(ring, tag),
            (false, true) => self.commit(ring, tag, &io, Ok(())),
            (false, false) => self.push(ring, tag),
        }
    }

    /// A list has come back: the kernel tells how many bytes of it were carried out, or why none.
    fn committed<W: Wire>(&mut self, ring: &mut W, result: i32) -> Result<()> {
        let each = i32::from(self.element_bytes());
        let done = u16::try_from(result / each).unwrap_or(0);
        if result <= 0 || result % each != 0 || done > self.out {
            let errno = Errno::from_result(result.min(0));
            return Err(self.broken(format!("a commit of {} failed: {errno}", self.out)));
        }
        self.owned -= done;
        self.out -= done;
        if self.out == 0 {
            ring.list_done(self.lane);
            return Ok(());
        }
        // It stopped at one; by itself that one says why.
        let command = self.batch(io::COMMIT_IO_CMDS, self.out);
        let at = (self.lane, index(kind::COMMIT, 0));
        ring.resend_list(at, self.file, &command, usize::try_from(result).unwrap_or(0));
        Ok(())
    }
}

/// What stands for a request that cannot be read.
const NOTHING: Io = Io { op: Op::Flush, extent: Extent { at: 0, len: 0 }, fua: false };

impl<R: Ring + Wire> Export<R> for BatchQueue {
    fn depth(&self) -> u16 {
        self.config.depth
    }

    fn arm(&mut self, ring: &mut R, lane: u16) -> Result<()> {
        self.lane = lane;
        let sizes = (self.config.depth, usize::from(self.element_bytes()));
        ring.make_batch(lane, sizes, if self.part.is_shared { SHARED } else { OWN })?;
        if self.part.is_first {
            for tag in 0..self.config.depth {
                self.list(ring, tag, 0);
            }
            self.send(ring, (io::PREP_IO_CMDS, kind::PREPARE));
        }
        self.fetch(ring);
        Ok(())
    }

    fn event(&mut self, ring: &mut R, event: Completion, inbox: &mut Inbox) -> Result<()> {
        let tag = u16::try_from(event.index & 0xffff).unwrap_or(0);
        match event.index >> 16 {
            kind::FETCH => return self.fetched(ring, event, inbox),
            kind::COMMIT => return self.committed(ring, event.result),
            kind::PREPARE if event.result == 0 => {
                self.out = 0;
                ring.list_done(self.lane);
            }
            kind::PREPARE => {
                let errno = Errno::from_result(event.result);
                return Err(self.broken(format!("preparing its tags failed: {errno}")));
            }
            kind::REGISTER if event.result >= 0 => self.hand_over(ring, tag, inbox),
            kind::REGISTER => {
                // No slot to be had: this request goes through our memory.
                self.tags[usize::from(tag)].in_slot = false;
                self.bring(ring, tag, inbox);
            }
            kind::PULL | kind::PUSH => self.moved(ring, event, inbox),
            // Releasing a slot cannot leave anything to do: the commit behind it says what matters.
            _ => {}
        }
        Ok(())
    }

    #[inline]
    fn finish(&mut self, ring: &mut R, tag: u16, io: &Io, result: Result<(), Errno>) {
        let state = &mut self.tags[usize::from(tag)];
        // Nearly all that is finished: done whole, in the device's own pages.
        if result.is_ok() && state.in_slot && self.config.path == DataPath::AutoRegister {
            debug_assert!(state.is_ours, "tag {tag} is committed twice");
            state.is_ours = false;
            return self.list(ring, tag, i32::try_from(io.extent.len).unwrap_or(0));
        }
        let must_push = io.op == Op::Read && !state.in_slot && self.config.path != DataPath::Copy;
        if must_push && result.is_ok() {
            state.progress = Progress::NONE;
            self.push(ring, tag);
        } else {
            self.commit(ring, tag, io, result);
        }
    }

    /// All that was finished goes in one list; while one is out, what is finished waits for it.
    /// With nothing left in hand, more may come here.
    fn flush(&mut self, ring: &mut R) {
        if self.listed > 0 && self.out == 0 {
            self.send(ring, (io::COMMIT_IO_CMDS, kind::COMMIT));
        }
        if self.kept != 0 && self.owned == self.listed + self.out {
            self.give_buffers(ring);
        }
    }

    fn rest(&mut self, _: &mut R) -> Rest {
        Rest::Now
    }

    fn is_closed(&self) -> bool {
        self.is_over && self.owned == 0 && self.out == 0
    }
}
