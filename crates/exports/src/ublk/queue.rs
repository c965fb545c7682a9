//! Answers for one ublk queue: descriptors become requests, results become commits.
//!
//! Each tag goes round: fetch -> (bring the data) -> engine -> (deliver the data) -> commit, which
//! fetches the next. What the steps in brackets are is the data path's affair ([`DataPath`]); the
//! engine sees pages and nothing else. A command that comes back with `ENODEV` is dead: the disk
//! was stopped, the tag is not used again.

mod zoned;

use std::sync::Arc;

use devsplice_core::{Errno, Error, ErrorKind, Extent, Io, Op, Result, Zones};
use devsplice_engine::{Completion, Export, FileId, Inbox, Request, Rest};
use devsplice_uring::{Command, Prepared, Slots, Uring};
use zerocopy::IntoBytes;

use super::DataPath;
use super::extra::Part;
use super::map::Descriptors;
use super::progress::Progress;
use super::uapi::{
    AUTO_BUF_REG_FALLBACK, IO_F_FUA, IO_F_NEED_REG_BUF, IO_F_NOUNMAP, IoCmd, IoDesc,
    RES_NEED_GET_DATA, io, op, user_copy_at,
};

use zoned::Zoned;

/// What of a tag a completion is about: the high half of its index.
mod kind {
    /// Its fetch, or the commit that fetches the next request.
    pub(super) const FETCH: u32 = 0;
    /// Registration of its pages.
    pub(super) const REGISTER: u32 = 1;
    /// Release of its pages.
    pub(super) const UNREGISTER: u32 = 2;
    /// Data of a write on the way to our memory.
    pub(super) const PULL: u32 = 3;
    /// Data of a read on the way from our memory.
    pub(super) const PUSH: u32 = 4;
}

const fn index(kind: u32, tag: u16) -> u32 {
    kind << 16 | tag as u32
}

/// How a queue's commands are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueConfig {
    pub(crate) queue: u16,
    pub(crate) depth: u16,
    pub(crate) path: DataPath,
    /// Whether commands have their ioctl-encoded numbers (since 6.4).
    pub(crate) encoded: bool,
    /// Which of the queue's tags; `depth` is how many. They are counted from 0 here.
    pub(crate) part: Part,
}

/// What is known of a request between fetch and commit.
#[derive(Clone, Copy)]
struct Tag {
    io: Io,
    /// Whether its data is in the device's own pages, rather than in memory of ours.
    in_slot: bool,
    /// Whether it is with the engine and is not direct. Of a direct request the kernel has put the
    /// pages into the slot and will take them out: it comes with one completion and goes with one
    /// command, and nothing is kept of it here.
    is_odd: bool,
    /// Of its data, that is pulled or pushed.
    progress: Progress,
    is_dead: bool,
    ahead: Ahead,
}

/// Where the commit is that was sent ahead, linked behind the splice of its request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ahead {
    /// There is none, or it is on its way like any other.
    No,
    /// The splice is out.
    Out,
    /// The splice is out, and the commit came back cancelled already.
    Cancelled,
    /// The splice was not done whole. The commit will come back cancelled, which means nothing.
    Broken,
}

/// One queue.
pub(crate) struct Queue {
    config: QueueConfig,
    lane: u16,
    file: FileId,
    descriptors: Descriptors,
    tags: Box<[Tag]>,
    /// How many of them are odd.
    odd: u16,
    dead: u16,
    direct: Option<Direct>,
    /// Whether commits can be sent ahead.
    goes_ahead: bool,
    zoned: Option<Box<Zoned>>,
}

/// How requests whose pages are in their slots are committed, where the kernel puts them there.
struct Direct {
    commit: Prepared,
    slots: Slots,
}

impl Queue {
    pub(crate) fn new(config: QueueConfig, file: FileId, descriptors: Descriptors) -> Queue {
        let io = Io::new(Op::Flush, 0, 0);
        let tag = Tag {
            io,
            in_slot: false,
            is_odd: false,
            progress: Progress::NONE,
            is_dead: false,
            ahead: Ahead::No,
        };
        let tags = vec![tag; usize::from(config.depth)].into();
        Queue {
            config,
            lane: 0,
            file,
            descriptors,
            tags,
            odd: 0,
            dead: 0,
            direct: None,
            goes_ahead: false,
            zoned: None,
        }
    }

    /// The queue of a device with these zones, if it has any.
    pub(super) fn with_zones(mut self, zones: Option<Arc<dyn Zones>>) -> Queue {
        let depth = self.config.depth;
        self.zoned = zones.map(|zones| Box::new(Zoned::new(zones, depth)));
        self
    }

    #[inline]
    fn op(&self, op: u32) -> u32 {
        if self.config.encoded { op } else { op & 0xff }
    }

    /// Fetches, or commits `result` and fetches.
    fn fetch(&self, ring: &mut Uring, op: u32, tag: u16, result: i32) {
        let kernels = self.config.part.tag(tag);
        let addr = self.zoned.as_ref().map_or(0, |zoned| zoned.sector(tag));
        let payload = IoCmd { q_id: self.config.queue, tag: kernels, result, addr };
        let path = self.config.path;
        let auto = path == DataPath::AutoRegister;
        let slot = if auto { u64::from(ring.slots(self.lane).index(tag)) } else { 0 };
        let command = Command {
            op: self.op(op),
            payload: payload_bytes(&payload),
            aux: if auto { slot | AUTO_BUF_REG_FALLBACK } else { 0 },
            lend: (path == DataPath::Copy).then_some(tag),
        };
        ring.command((self.lane, index(kind::FETCH, tag)), self.file, &command);
    }

    fn slot_command(&self, ring: &mut Uring, (op, kind): (u32, u32), tag: u16) {
        let addr = u64::from(ring.slots(self.lane).index(tag));
        let kernels = self.config.part.tag(tag);
        let payload = IoCmd { q_id: self.config.queue, tag: kernels, result: 0, addr };
        let payload = payload_bytes(&payload);
        let command = Command { op: self.op(op), payload, aux: 0, lend: None };
        ring.command((self.lane, index(kind, tag)), self.file, &command);
    }

    fn commit(&mut self, ring: &mut Uring, tag: u16, result: Result<(), Errno>) {
        if let Some(zoned) = &mut self.zoned {
            zoned.end(tag, result);
        }
        let state = &self.tags[usize::from(tag)];
        if state.is_dead {
            return;
        }
        let result = match result {
            Err(errno) => -errno.raw(),
            Ok(()) if state.io.op.has_pages() => i32::try_from(state.io.extent.len).unwrap_or(0),
            Ok(()) => 0,
        };
        if self.config.path == DataPath::Register && state.in_slot {
            // Both are carried out in order while they are submitted, so the slot is free again
            // before the next request can come.
            self.slot_command(ring, (io::UNREGISTER_IO_BUF, kind::UNREGISTER), tag);
        }
        self.fetch(ring, io::COMMIT_AND_FETCH_REQ, tag, result);
    }

    /// A request has arrived: brings its data, if it has to be brought.
    fn fetched(&mut self, ring: &mut Uring, tag: u16, inbox: &mut Inbox) {
        let descriptor = self.descriptors.read(tag);
        let io = if self.zoned.is_some() {
            let Some(io) = self.asked_of_zones(ring, tag, &descriptor) else { return };
            io
        } else if let Ok(io) = request(&descriptor) {
            io
        } else {
            self.tags[usize::from(tag)].io = Io::new(Op::Flush, 0, 0);
            return self.commit(ring, tag, Err(Errno::EOPNOTSUPP));
        };
        let has_pages = io.op.has_pages();
        let path = self.config.path;
        let in_slot = match path {
            DataPath::AutoRegister => descriptor.op_flags & IO_F_NEED_REG_BUF == 0,
            DataPath::Register => true,
            DataPath::UserCopy | DataPath::Copy => false,
        };
        let state = &mut self.tags[usize::from(tag)];
        (state.io, state.in_slot) = (io, in_slot && has_pages);
        state.progress = Progress::NONE;
        match path {
            _ if !has_pages => self.hand_over(ring, tag, inbox),
            DataPath::Register => {
                self.slot_command(ring, (io::REGISTER_IO_BUF, kind::REGISTER), tag);
            }
            _ if in_slot || path == DataPath::Copy => self.hand_over(ring, tag, inbox),
            _ => self.bring(ring, tag, inbox),
        }
    }

    /// Gets the data of a write into our memory; a read has none yet.
    fn bring(&mut self, ring: &mut Uring, tag: u16, inbox: &mut Inbox) {
        if self.tags[usize::from(tag)].io.op == Op::Write {
            self.pull(ring, tag);
        } else {
            self.hand_over(ring, tag, inbox);
        }
    }

    /// What of the tag's data is still to be moved, and where it is on the character device.
    fn left(&self, tag: u16) -> (u64, (usize, usize)) {
        let Tag { io, progress: Progress { moved, .. }, .. } = self.tags[usize::from(tag)];
        let at = user_copy_at(self.config.queue, self.config.part.tag(tag)) + u64::from(moved);
        let len = usize::try_from(io.extent.len).unwrap_or(0) - moved as usize;
        (at, (Uring::DATA_AT + moved as usize, len))
    }

    fn pull(&self, ring: &mut Uring, tag: u16) {
        let (at, range) = self.left(tag);
        ring.read((self.lane, index(kind::PULL, tag)), self.file, at, range);
    }

    fn push(&self, ring: &mut Uring, tag: u16) {
        let (at, range) = self.left(tag);
        ring.write((self.lane, index(kind::PUSH, tag)), self.file, at, range);
    }

    /// Takes the result of a pull or push into account: whether all is moved.
    fn moved(&mut self, tag: u16, result: i32) -> Result<bool, Errno> {
        let Tag { io, progress, .. } = &mut self.tags[usize::from(tag)];
        progress.take(result)?;
        Ok(u64::from(progress.moved) >= io.extent.len)
    }

    fn hand_over(&mut self, ring: &Uring, tag: u16, inbox: &mut Inbox) {
        let state = &mut self.tags[usize::from(tag)];
        state.is_odd = true;
        self.odd += 1;
        let Tag { io, in_slot, .. } = *state;
        let pages = if in_slot {
            ring.slots(self.lane).pages(tag)
        } else {
            ring.memory_pages(self.lane, tag)
        };
        inbox.push(self.lane, Request { tag, io, pages });
    }

    /// The fetch, or the commit that fetches, of `tag` came back.
    fn fetch_done(
        &mut self,
        ring: &mut Uring,
        tag: u16,
        result: i32,
        inbox: &mut Inbox,
    ) -> Result<()> {
        if result == 0 {
            self.fetched(ring, tag, inbox);
            return Ok(());
        }
        if result == -Errno::ECANCELED.raw() && self.is_cancelled(tag) {
            return Ok(());
        }
        if result == RES_NEED_GET_DATA {
            // A write; its data comes into our memory now, which the command names as any fetch.
            self.fetch(ring, io::NEED_GET_DATA, tag, 0);
            return Ok(());
        }
        if result != -Errno::ENODEV.raw() {
            let errno = Errno::from_result(result);
            let thing = format!("ublk queue {} tag {tag}", self.config.queue);
            return Err(Error::new(ErrorKind::Os, thing, format!("command failed: {errno}")));
        }
        let state = &mut self.tags[usize::from(tag)];
        if !std::mem::replace(&mut state.is_dead, true) {
            self.dead += 1;
        }
        Ok(())
    }

    /// Whether a commit that came back cancelled was linked behind a splice, which has or will have
    /// failed then.
    fn is_cancelled(&mut self, tag: u16) -> bool {
        let ahead = &mut self.tags[usize::from(tag)].ahead;
        match *ahead {
            Ahead::Out => *ahead = Ahead::Cancelled,
            Ahead::Broken => *ahead = Ahead::No,
            Ahead::No | Ahead::Cancelled => return false,
        }
        true
    }

    /// Commits a direct request that is done whole.
    #[inline]
    fn commit_direct(&self, ring: &mut Uring, tag: u16, io: &Io) {
        let Some(Direct { commit, slots }) = &self.direct else { return };
        let result = u32::try_from(io.extent.len).unwrap_or(0);
        let slot = u64::from(slots.index(tag));
        ring.send(commit, index(kind::FETCH, tag), (slot, payload_of(tag, result)));
    }

    /// Takes an event that does not bring a request with its pages in place.
    #[inline(never)]
    fn other_event(
        &mut self,
        ring: &mut Uring,
        event: &Completion,
        inbox: &mut Inbox,
    ) -> Result<()> {
        let tag = u16::try_from(event.index & 0xffff).unwrap_or(0);
        match event.index >> 16 {
            kind::FETCH => return self.fetch_done(ring, tag, event.result, inbox),
            kind::REGISTER if event.result >= 0 => self.hand_over(ring, tag, inbox),
            kind::REGISTER => {
                // No slot to be had: this request goes through our memory.
                self.tags[usize::from(tag)].in_slot = false;
                self.bring(ring, tag, inbox);
            }
            kind::PULL => match self.moved(tag, event.result) {
                Ok(true) => self.hand_over(ring, tag, inbox),
                Ok(false) => self.pull(ring, tag),
                Err(errno) => self.commit(ring, tag, Err(errno)),
            },
            kind::PUSH => match self.moved(tag, event.result) {
                Ok(true) => self.commit(ring, tag, Ok(())),
                Ok(false) => self.push(ring, tag),
                Err(errno) => self.commit(ring, tag, Err(errno)),
            },
            // Releasing a slot cannot leave anything to do: the commit behind it says what matters.
            _ => {}
        }
        Ok(())
    }

    /// Finishes a request that failed, or whose data is in memory of ours, or that has none.
    #[inline(never)]
    fn other_finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        let state = &mut self.tags[usize::from(tag)];
        if std::mem::take(&mut state.is_odd) {
            self.odd -= 1;
        }
        state.progress = Progress::NONE;
        let must_push = io.op == Op::Read && !state.in_slot && self.config.path != DataPath::Copy;
        if must_push && result.is_ok() {
            self.push(ring, tag);
        } else {
            self.commit(ring, tag, result);
        }
    }
}

/// Tag and result as they lie in the first half of a command's payload, behind the queue's number.
#[inline]
fn payload_of(tag: u16, result: u32) -> u64 {
    u64::from(tag) << 16 | u64::from(result) << 32
}

#[inline]
pub(super) fn payload_bytes(command: &IoCmd) -> [u8; 16] {
    let mut payload = [0; 16];
    payload.copy_from_slice(command.as_bytes());
    payload
}

/// What a descriptor asks for, if it is a read or write whose pages the kernel has put into a slot.
#[inline]
pub(super) fn direct(descriptor: &IoDesc) -> Option<Io> {
    let flags = descriptor.op_flags;
    // Reads are 0 and writes 1, so this leaves no other.
    const OTHERS: u32 = 0xff & !(op::READ | op::WRITE);
    if flags & (OTHERS | IO_F_NEED_REG_BUF) != 0 {
        return None;
    }
    // Force unit access counts for writes only: both bits at the place of the lower one.
    const _: () = assert!(op::WRITE == 1 && IO_F_FUA == 1 << 13);
    let (is_write, fua) = (flags & op::WRITE != 0, flags & flags >> 13 & 1 != 0);
    let at = descriptor.start_sector.saturating_mul(512);
    let extent = Extent { at, len: u64::from(descriptor.nr_sectors) * 512 };
    let op = if is_write { Op::Write } else { Op::Read };
    Some(Io { op, extent, fua })
}

/// What a descriptor asks for; an error for an operation that we never offered.
#[inline]
pub(super) fn request(descriptor: &IoDesc) -> Result<Io, Errno> {
    let flags = descriptor.op_flags;
    let op = match flags & 0xff {
        op::READ => Op::Read,
        op::WRITE => Op::Write,
        op::FLUSH => return Ok(Io::new(Op::Flush, 0, 0)),
        op::DISCARD => Op::Discard,
        op::WRITE_ZEROES => Op::WriteZeroes { unmap: flags & IO_F_NOUNMAP == 0 },
        _ => return Err(Errno::EOPNOTSUPP),
    };
    // A start beyond 2^55 sectors would be beyond any size; admission refuses it.
    let at = descriptor.start_sector.saturating_mul(512);
    let mut io = Io::new(op, at, u64::from(descriptor.nr_sectors) * 512);
    io.fua = op == Op::Write && flags & IO_F_FUA != 0;
    Ok(io)
}

impl Export<Uring> for Queue {
    fn depth(&self) -> u16 {
        self.config.depth
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.lane = lane;
        // A prepared commit has the tag as it is counted here.
        let is_whole = self.config.part == Part::WHOLE;
        let is_plain = is_whole && self.zoned.is_none();
        if self.config.path == DataPath::AutoRegister && is_plain {
            let payload = IoCmd { q_id: self.config.queue, tag: 0, result: 0, addr: 0 };
            let command = Command {
                op: self.op(io::COMMIT_AND_FETCH_REQ),
                payload: payload_bytes(&payload),
                aux: AUTO_BUF_REG_FALLBACK,
                lend: None,
            };
            let commit = ring.prepare(lane, self.file, &command);
            self.direct = Some(Direct { commit, slots: ring.slots(lane) });
            self.goes_ahead = ring.can_go_ahead();
        }
        for tag in 0..self.config.depth {
            self.fetch(ring, io::FETCH_REQ, tag, 0);
        }
        Ok(())
    }

    fn event(&mut self, ring: &mut Uring, event: Completion, inbox: &mut Inbox) -> Result<()> {
        let tag = u16::try_from(event.index & 0xffff).unwrap_or(0);
        let has_come = event.index == index(kind::FETCH, tag) && event.result == 0;
        if has_come
            && let Some(Direct { slots, .. }) = &self.direct
            && let Some(io) = direct(&self.descriptors.read(tag))
        {
            inbox.push(self.lane, Request { tag, io, pages: slots.pages(tag) });
            return Ok(());
        }
        self.other_event(ring, &event, inbox)
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        let is_direct = result.is_ok() && (self.odd == 0 || !self.tags[usize::from(tag)].is_odd);
        if !is_direct || self.direct.is_none() {
            return self.other_finish(ring, tag, io, result);
        }
        self.commit_direct(ring, tag, io);
    }

    fn goes_ahead(&self) -> bool {
        self.goes_ahead
    }

    fn may_finish_ahead(&self, tag: u16) -> bool {
        // One that was broken and not heard of since would be taken for the next.
        let state = &self.tags[usize::from(tag)];
        self.goes_ahead && !state.is_odd && state.ahead == Ahead::No
    }

    fn finish_ahead(&mut self, ring: &mut Uring, tag: u16, io: &Io) {
        self.tags[usize::from(tag)].ahead = Ahead::Out;
        self.commit_direct(ring, tag, io);
    }

    fn went_ahead(&mut self, tag: u16) {
        let before = std::mem::replace(&mut self.tags[usize::from(tag)].ahead, Ahead::No);
        // The kernel has told both: the client's data would be there, and it would never hear so.
        assert!(before == Ahead::Out, "tag {tag}: a commit was cancelled behind a whole splice");
    }

    fn take_back(&mut self, tag: u16) {
        let ahead = &mut self.tags[usize::from(tag)].ahead;
        *ahead = if *ahead == Ahead::Cancelled { Ahead::No } else { Ahead::Broken };
    }

    fn is_closed(&self) -> bool {
        self.dead == self.config.depth
    }

    fn flush(&mut self, _: &mut Uring) {}

    fn rest(&mut self, _: &mut Uring) -> Rest {
        Rest::Now
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use devsplice_engine::Ring;
    use devsplice_uring::{Config, FileKind, LaneMemory, RingFile};
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn descriptor(op_flags: u32) -> IoDesc {
        IoDesc { op_flags, nr_sectors: 8, start_sector: 16, addr: 0 }
    }

    #[test]
    fn descriptors_become_requests_in_bytes() {
        let read = request(&descriptor(op::READ)).unwrap();
        assert_eq!(read, Io::new(Op::Read, 8192, 4096));
        let write = request(&descriptor(op::WRITE | IO_F_FUA)).unwrap();
        assert!(write.fua && write.op == Op::Write);
        assert_eq!(request(&descriptor(op::FLUSH)), Ok(Io::new(Op::Flush, 0, 0)));
    }

    #[test]
    fn a_prepared_commit_says_the_same_as_one_made_anew() {
        let whole = IoCmd { q_id: 3, tag: 77, result: 1 << 20, addr: 0 };
        let empty = payload_bytes(&IoCmd { q_id: 3, tag: 0, result: 0, addr: 0 });
        let first = |bytes: [u8; 16]| u64::from_ne_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(first(empty) | payload_of(77, 1 << 20), first(payload_bytes(&whole)));
    }

    #[test]
    fn what_is_direct_is_the_same_request_and_only_reads_and_writes_with_a_slot_are() {
        for flags in [op::READ, op::WRITE, op::WRITE | IO_F_FUA, op::READ | IO_F_FUA | 1 << 16] {
            let descriptor = descriptor(flags);
            assert_eq!(direct(&descriptor), Some(request(&descriptor).unwrap()), "{flags:#x}");
        }
        for op in 2..=255 {
            assert_eq!(direct(&descriptor(op)), None, "{op}");
        }
        assert_eq!(direct(&descriptor(op::READ | IO_F_NEED_REG_BUF)), None);
        assert_eq!(direct(&descriptor(op::WRITE | IO_F_NEED_REG_BUF)), None);
    }

    /// A queue of two tags without a driver: nothing is submitted. Its descriptors say these.
    fn two_tags(ops: [u32; 2]) -> (Queue, Uring, Inbox) {
        two_tags_on(Uring::new, ops)
    }

    fn two_tags_on(make: fn(&Config) -> Result<Uring>, ops: [u32; 2]) -> (Queue, Uring, Inbox) {
        let (depth, bytes) = (2, 4096);
        let memory = LaneMemory { depth, bytes, slots: true, locked: false };
        let config = Config { flights: 64, files: 1, lanes: vec![memory], inner: 0 };
        let mut ring = make(&config).unwrap();
        let fd = memfd_create("descriptors", MemfdFlags::CLOEXEC).unwrap();
        let mut page = ops.map(|flags| descriptor(flags).as_bytes().to_vec()).concat();
        page.resize(4096, 0);
        rustix::io::write(&fd, &page).unwrap();
        let part = Part::WHOLE;
        let descriptors = Descriptors::map(fd.as_fd(), 0, (depth, 24), part).unwrap();
        let file = ring.add_file(RingFile { fd, kind: FileKind::Other }).unwrap();
        let path = DataPath::AutoRegister;
        let config = QueueConfig { queue: 0, depth, path, encoded: true, part };
        let mut queue = Queue::new(config, file, descriptors);
        queue.arm(&mut ring, 0).unwrap();
        (queue, ring, Inbox::with_capacity(2))
    }

    #[test]
    fn a_request_without_a_slot_is_told_from_those_around_it() {
        let (mut queue, mut ring, mut inbox) = two_tags([op::READ, op::WRITE | IO_F_NEED_REG_BUF]);
        let io = request(&descriptor(op::READ)).unwrap();
        let done = |kind, tag, result| Completion { index: index(kind, tag), result, flags: 0 };
        for result in [Ok(()), Err(Errno::EIO)] {
            inbox.clear();
            queue.event(&mut ring, done(kind::FETCH, 0, 0), &mut inbox).unwrap();
            queue.event(&mut ring, done(kind::FETCH, 1, 0), &mut inbox).unwrap();
            // Its data is still to be brought: the engine has only the first.
            assert_eq!((queue.odd, inbox.requests().len()), (0, 1));
            queue.event(&mut ring, done(kind::PULL, 1, 4096), &mut inbox).unwrap();
            assert_eq!((queue.odd, inbox.requests().len()), (1, 2));
            let slots = inbox.requests().iter().map(|(_, request)| request.pages);
            let slot = ring.slots(0).pages(0);
            assert_eq!(slots.collect::<Vec<_>>(), [slot, ring.memory_pages(0, 1)]);
            queue.finish(&mut ring, 0, &io, result);
            assert!(queue.odd == 1 && queue.tags[1].is_odd);
            queue.finish(&mut ring, 1, &io, result);
            assert!(queue.odd == 0 && !queue.tags[1].is_odd);
        }
        // Two fetches; twice a pull and two commits.
        assert_eq!(ring.counts().sqes, 2 + 2 * 3);
    }

    #[test]
    fn a_commit_that_is_cancelled_behind_a_splice_means_nothing_and_any_other_is_an_error() {
        let make = || two_tags_on(Uring::for_low_depth, [op::READ, op::WRITE]);
        let io = request(&descriptor(op::READ)).unwrap();
        let done = |result| Completion { index: index(kind::FETCH, 0), result, flags: 0 };
        let cancelled = done(-Errno::ECANCELED.raw());
        // Whether the splice is heard of before its commit or after.
        for before in [true, false] {
            let (mut queue, mut ring, mut inbox) = make();
            for _ in 0..3 {
                inbox.clear();
                queue.event(&mut ring, done(0), &mut inbox).unwrap();
                assert!(queue.may_finish_ahead(0) && inbox.requests().len() == 1);
                let sqes = ring.counts().sqes;
                queue.finish_ahead(&mut ring, 0, &io);
                if before {
                    queue.take_back(0);
                    assert!(!queue.may_finish_ahead(0), "the next would be taken for this one");
                }
                queue.event(&mut ring, cancelled, &mut inbox).unwrap();
                if !before {
                    queue.take_back(0);
                }
                assert!(queue.may_finish_ahead(0) && queue.dead == 0);
                queue.finish(&mut ring, 0, &io, Ok(()));
                assert_eq!(ring.counts().sqes, sqes + 2, "sent ahead, and sent");
            }
            assert!(queue.event(&mut ring, cancelled, &mut inbox).is_err(), "not ahead any more");
        }
        let (mut queue, mut ring, mut inbox) = make();
        queue.event(&mut ring, done(0), &mut inbox).unwrap();
        queue.finish_ahead(&mut ring, 0, &io);
        queue.went_ahead(0);
        assert!(queue.event(&mut ring, cancelled, &mut inbox).is_err());
        // A queue whose disk is stopped dies as ever.
        queue.event(&mut ring, done(-Errno::ENODEV.raw()), &mut inbox).unwrap();
        assert_eq!(queue.dead, 1);
    }

    #[test]
    fn only_direct_requests_of_rings_made_for_it_have_their_commit_sent_ahead() {
        let (queue, ..) = two_tags([op::READ, op::WRITE]);
        assert!(!queue.goes_ahead() && !queue.may_finish_ahead(0));
        let ops = [op::FLUSH, op::WRITE];
        let (mut queue, mut ring, mut inbox) = two_tags_on(Uring::for_low_depth, ops);
        assert!(queue.goes_ahead());
        for tag in 0..2 {
            let come = Completion { index: index(kind::FETCH, tag), result: 0, flags: 0 };
            queue.event(&mut ring, come, &mut inbox).unwrap();
        }
        assert!(!queue.may_finish_ahead(0) && queue.may_finish_ahead(1));
    }

    #[test]
    fn zeroes_may_unmap_unless_told_not_to() {
        let may = request(&descriptor(op::WRITE_ZEROES)).unwrap().op;
        let must_not = request(&descriptor(op::WRITE_ZEROES | IO_F_NOUNMAP)).unwrap().op;
        assert_eq!(may, Op::WriteZeroes { unmap: true });
        assert_eq!(must_not, Op::WriteZeroes { unmap: false });
    }

    #[test]
    fn operations_that_were_never_offered_are_refused() {
        for op in [4, 10, 13, 18, 255] {
            assert_eq!(request(&descriptor(op)), Err(Errno::EOPNOTSUPP));
        }
    }
}
