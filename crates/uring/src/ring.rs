//! Answers for an I/O thread's ring: what the engine and the exports submit, what comes back to
//! whom.

mod ahead;
pub(crate) mod batch;
mod brief;
mod choice;
mod client;
mod config;
mod fuse;
mod helped;
pub(crate) mod in_place;
mod kept;
mod lent;
mod linger;
mod remote;
mod slots;
pub(crate) mod socket;
mod transfers;
mod waits;

pub use brief::Brief;
pub use config::{Config, LaneMemory};
pub use fuse::{FUSE_OP_AT, FuseEntry, FusePayload};
pub use remote::{Line, Link, Patience, Remote, Standing};
pub use slots::Slots;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use devsplice_core::{Errno, Error, Result};
use devsplice_engine::desk::{INNER_BYTES, INNER_DEPTH};
use devsplice_engine::{Completion, Event, FileId, Pages, Ring, RingCounts, Splice, Takes, Wake};
use rustix::fs::{Mode, OFlags};

use crate::arena::Arena;
use crate::bell::Bell;
use crate::bytes::Helpers;
use crate::files::{FileKind, RingFile, Slot};
use crate::setup::{self, Cqe};
use crate::splice::{DATA_AT, Flight, MOST_LANES, ZEROES_LEN, simple, simple_entry};
use crate::submit::Queues;
use crate::uapi::{OP_TIMEOUT, OP_URING_CMD, SQE_FIXED_FILE, Sqe};

/// A command for a character device (`IORING_OP_URING_CMD`).
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Its number.
    pub op: u32,
    /// The 16 bytes behind the entry's fixed fields.
    pub payload: [u8; 16],
    /// The entry's own address field, which some commands use for flags.
    pub aux: u64,
    /// Whether the device may read and write the data memory of this tag until the completion; its
    /// address is then put into the second half of the payload.
    pub lend: Option<u16>,
}

/// A command for one tag after another, of which all that is the same was made once.
pub struct Prepared(Sqe);

/// What an entry is, in the highest byte of its user data.
const KIND_SHIFT: u32 = 56;
const KIND_SPLICE: u64 = 1 << KIND_SHIFT;
const KIND_TIMER: u64 = 2 << KIND_SHIFT;
const KIND_EXPORT: u64 = 3 << KIND_SHIFT;
/// As `KIND_EXPORT`, for an entry that names the memory of the tag in the index's low half.
const KIND_EXPORT_LENT: u64 = 4 << KIND_SHIFT;
/// A splice of which nothing is kept: its result is what it says, and no memory of ours is lent.
const KIND_SIMPLE: u64 = 5 << KIND_SHIFT;
/// Somebody has rung from another thread.
pub(crate) const KIND_WAKE: u64 = 6 << KIND_SHIFT;
/// The helpers of byte backends have results.
const KIND_BELL: u64 = 7 << KIND_SHIFT;
/// Tags of requests have come, or will not come any more.
const KIND_TAGS: u64 = 8 << KIND_SHIFT;
/// A list of elements is the lane's again.
const KIND_LIST: u64 = 9 << KIND_SHIFT;
/// A lane's send is over.
const KIND_SENT: u64 = 10 << KIND_SHIFT;
/// An entry of FUSE has a request, or will not have one any more.
const KIND_FUSE: u64 = 11 << KIND_SHIFT;
/// Nobody wants to know.
const KIND_NOTHING: u64 = 12 << KIND_SHIFT;
/// Of a connection to a server.
const KIND_REMOTE: u64 = 13 << KIND_SHIFT;
const KIND_MASK: u64 = 0xff << KIND_SHIFT;

/// Files of the ring itself: what reads as zeros.
const OWN_FILES: u16 = 1;

/// `struct __kernel_timespec`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// Timer keys that are no flight's: the last `u32`s (the watchdog's and sleepers').
const KEYS_BEYOND: usize = 16;

/// io_uring, one per I/O thread.
pub struct Uring {
    // Dropped first: the arenas and tables outlive it.
    pub(crate) queues: Queues,
    // Before the memory that they are lent.
    helpers: Option<Helpers>,
    /// If there are places behind sockets.
    remotes: Option<Box<remote::Remotes>>,
    files: Vec<Slot>,
    file_room: u16,
    flights: Box<[Flight]>,
    /// One per flight, and some for keys beyond them.
    times: Box<[Timespec]>,
    arenas: Vec<Option<Arena>>,
    /// How many of them are those of [`Config::lanes`]; the others are inner ones.
    outer: usize,
    /// Where each lane's slots start in the table of registered buffers.
    slot_bases: Vec<Option<u16>>,
    zeroes: Arena,
    /// For the lanes whose exports work in batches.
    batches: Vec<Option<batch::Batch>>,
    /// For the lanes whose exports send to sockets, since the first time that they did.
    messages: Vec<Option<Box<socket::Message>>>,
    /// For the lanes that FUSE uses.
    fuse: Vec<Option<fuse::Headers>>,
    /// What the thread has carried out itself, if it does.
    done: Option<in_place::Done>,
    /// How often in a row the kernel was passed by for that.
    passed: u8,
    /// If it stays awake before it sleeps.
    linger: Option<linger::Linger>,
    /// For the lanes whose replies may be sent from files.
    loans: Vec<Option<lent::Loans>>,
    /// Rung by other threads.
    pub(crate) bell: Option<Arc<Bell>>,
    /// If it shares its thread with other rings.
    brief: Option<Brief>,
    start: Instant,
    bytes_spliced: u64,
    bytes_copied: u64,
    bytes_meta: u64,
}

impl Uring {
    /// A ring for the calling thread.
    ///
    /// # Errors
    /// If the kernel has no io_uring to give, or the tables do not fit its limits.
    pub fn new(config: &Config) -> Result<Uring> {
        Uring::with(config, Queues::new)
    }

    /// As [`Uring::new`], with entries of 128 bytes, which some devices' commands need.
    ///
    /// # Errors
    /// As there.
    pub fn wide(config: &Config) -> Result<Uring> {
        Uring::with(config, Queues::wide)
    }

    fn with(config: &Config, queues: fn(u32, u32) -> Result<Queues>) -> Result<Uring> {
        let lanes = config.lanes.len() + usize::from(config.inner);
        if lanes > MOST_LANES {
            return Err(Error::invalid("ring", format!("{lanes} lanes (most {MOST_LANES})")));
        }
        let depth: u32 = config.lanes.iter().map(|lane| u32::from(lane.depth)).sum();
        let depth = depth + u32::from(config.inner) * u32::from(INNER_DEPTH);
        // A tag has at most its own command and its splices out at a time.
        let entries = (depth + config.flights).next_power_of_two().clamp(64, 4096);
        let queues = queues(entries, entries * 4)?;
        let mut arenas = Vec::new();
        let mut slot_bases = Vec::new();
        let mut slots = 0_u32;
        let own =
            LaneMemory { depth: INNER_DEPTH, bytes: INNER_BYTES, slots: false, locked: false };
        let inner = std::iter::repeat_n(&own, usize::from(config.inner));
        for lane in config.lanes.iter().chain(inner) {
            let stride = DATA_AT + (lane.bytes as usize).next_multiple_of(4096);
            let has_memory = lane.bytes > 0;
            let depth = usize::from(lane.depth);
            arenas.push(has_memory.then(|| Arena::new(depth, stride, lane.locked)).transpose()?);
            slot_bases.push(if lane.slots { u16::try_from(slots).ok() } else { None });
            slots += if lane.slots { u32::from(lane.depth) } else { 0 };
        }
        if slots > 0 {
            // 16384 is the kernel's limit (io_uring/rsrc.h, IORING_MAX_REG_BUFFERS).
            setup::make_buffer_table(&queues.fd, slots).map_err(|error| {
                Error::os(format!("{slots} buffer slots in one ring (most 16384)"), &error)
            })?;
        }
        setup::make_file_table(&queues.fd, u32::from(config.files + OWN_FILES))
            .map_err(|error| Error::os("io_uring's file table", &error))?;
        let mut ring = Uring {
            queues,
            helpers: None,
            remotes: None,
            files: Vec::with_capacity(usize::from(config.files + OWN_FILES)),
            file_room: config.files + OWN_FILES,
            flights: vec![Flight::IDLE; config.flights as usize].into(),
            times: vec![Timespec::default(); config.flights as usize + KEYS_BEYOND].into(),
            arenas,
            outer: config.lanes.len(),
            slot_bases,
            zeroes: Arena::new(1, ZEROES_LEN, false)?,
            batches: Vec::new(),
            messages: std::iter::repeat_with(|| None).take(config.lanes.len()).collect(),
            fuse: Vec::new(),
            done: None,
            passed: 0,
            linger: None,
            loans: Vec::new(),
            bell: None,
            brief: None,
            start: Instant::now(),
            bytes_spliced: 0,
            bytes_copied: 0,
            bytes_meta: 0,
        };
        let zero = crate::zeroes()?.try_clone().map_err(|error| Error::os("/dev/zero", &error))?;
        ring.add_file(RingFile { fd: zero, kind: FileKind::Other })?;
        Ok(ring)
    }

    /// Registers a file.
    ///
    /// # Errors
    /// If the table that [`Config::files`] asked for is full, or the kernel refuses the file.
    pub fn add_file(&mut self, file: RingFile) -> Result<FileId> {
        let index = u16::try_from(self.files.len()).unwrap_or(u16::MAX);
        if index >= self.file_room {
            return Err(Error::invalid("io_uring's file table", "full"));
        }
        setup::put_file(&self.queues.fd, u32::from(index), file.fd.as_raw_fd())
            .map_err(|error| Error::os("registering a file with io_uring", &error))?;
        self.files.push(Slot::new(file));
        Ok(FileId(index))
    }

    /// A tag's memory: [`Uring::DATA_AT`] bytes for headers, then its data.
    ///
    /// # Panics
    /// If an entry that names it is in the kernel's hands, or the lane has no memory.
    pub fn memory(&mut self, lane: u16, tag: u16) -> &mut [u8] {
        self.arena(lane).bytes(usize::from(tag))
    }

    /// Where the data starts in a tag's memory.
    pub const DATA_AT: usize = DATA_AT;

    fn arena(&mut self, lane: u16) -> &mut Arena {
        match &mut self.arenas[usize::from(lane)] {
            Some(arena) => arena,
            None => panic!("lane {lane} has no memory of its own"),
        }
    }

    /// Sends a command to a character device. With [`Command::lend`], the low half of `index` must
    /// be that tag.
    #[inline]
    pub fn command(&mut self, (lane, index): (u16, u32), file: FileId, command: &Command) {
        match command.lend {
            None => self.queues.push(command_entry(KIND_EXPORT, (lane, index), file, command)),
            Some(tag) => self.lending_command((lane, index), file, (tag, command)),
        }
    }

    /// Makes what [`Uring::send`] needs of a command that lends nothing.
    #[must_use]
    pub fn prepare(&self, lane: u16, file: FileId, command: &Command) -> Prepared {
        debug_assert!(command.lend.is_none());
        Prepared(command_entry(KIND_EXPORT, (lane, 0), file, command))
    }

    /// Sends a prepared command under `index`, whose address field and first half of the payload
    /// have these bits as well.
    #[inline]
    pub fn send(&mut self, prepared: &Prepared, index: u32, (aux, payload): (u64, u64)) {
        if self.queues.is_full() {
            return self.send_later(prepared, index, (aux, payload));
        }
        let Prepared(all) = prepared;
        self.queues.push_made(|| Sqe {
            addr: all.addr | aux,
            user_data: all.user_data | u64::from(index),
            addr3: all.addr3 | payload,
            ..*all
        });
    }

    /// As `send`, where there may be no room. Apart, so that nothing has to be kept over making
    /// some where there is.
    #[cold]
    #[inline(never)]
    fn send_later(&mut self, prepared: &Prepared, index: u32, bits: (u64, u64)) {
        self.queues.make_room();
        self.send(prepared, index, bits);
    }

    #[inline(never)]
    fn lending_command(
        &mut self,
        (lane, index): (u16, u32),
        file: FileId,
        (tag, command): (u16, &Command),
    ) {
        debug_assert_eq!(tag_of(index), usize::from(tag));
        let arena = self.arena(lane);
        let address = arena.address(usize::from(tag), DATA_AT, 0);
        arena.lend(usize::from(tag));
        let mut command = *command;
        command.payload[8..].copy_from_slice(&address.to_ne_bytes());
        self.queues.push(command_entry(KIND_EXPORT_LENT, (lane, index), file, &command));
    }

    /// What became of a splice of which nothing was kept.
    #[inline]
    fn moved(&mut self, result: i32) -> Result<u64, Errno> {
        let done = u64::try_from(result).map_err(|_| Errno::from_result(result))?;
        self.bytes_spliced += done;
        Ok(done)
    }

    /// Hands over what is queued, and waits for as many completions if none is known of.
    #[inline]
    fn enter_for(&mut self, most: u32) -> Result<()> {
        let most = if self.remotes.is_some() && self.send_asked() { 0 } else { most };
        if self.brief.is_some() {
            return self.enter_briefly(most > 0);
        }
        if self.passes_by() {
            return Ok(());
        }
        let want = if self.has_done() || self.queues.has_completions() { 0 } else { most };
        if self.linger.is_some() { self.enter_awake(want) } else { self.enter_once(want) }
    }

    /// Hands over what is queued, and waits for `want` completions.
    #[inline]
    fn enter_once(&mut self, want: u32) -> Result<()> {
        if want == 0 && !self.queues.has_queued() && self.queues.has_completions() {
            return Ok(());
        }
        match self.queues.enter(want) {
            Ok(()) => Ok(()),
            // Signals are not ours to handle; a full completion queue empties at the next turn.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(Error::os("io_uring_enter", &error)),
        }
    }

    /// What was done without the kernel's queues: by this thread, by helpers of byte backends, by
    /// servers.
    fn other_event(&mut self) -> Option<Event> {
        if let Some(event) = self.next_done() {
            return Some(event);
        }
        if self.remotes.is_some()
            && let Some((key, result)) = self.landed_far()
        {
            return Some(Event::Splice { key, result });
        }
        if self.helpers.is_some() { self.landed() } else { None }
    }

    /// What a completion means, if it means something to the engine.
    #[inline(never)]
    fn event(&mut self, data: u64, result: i32, flags: u32) -> Option<Event> {
        let (lane, index) = lane_and_index(data);
        let completion = Completion { index, result, flags };
        let kind = data & KIND_MASK;
        match kind {
            KIND_SIMPLE => return Some(Event::Splice { key: index, result: self.moved(result) }),
            KIND_EXPORT => {}
            KIND_SPLICE => {
                let result = self.spliced(index, result)?;
                return Some(Event::Splice { key: index, result });
            }
            KIND_TIMER => return Some(Event::Timer { key: index }),
            KIND_WAKE => {
                self.woken();
                return Some(Event::Woken);
            }
            KIND_BELL => {
                if let Some(helpers) = &self.helpers {
                    helpers.heard();
                }
                self.listen();
                return None;
            }
            KIND_SENT => self.sent(lane),
            KIND_FUSE => self.fuse_completed(lane, index),
            KIND_NOTHING => return None,
            KIND_REMOTE => {
                self.remote_event((lane, index), result);
                return None;
            }
            KIND_TAGS | KIND_LIST => self.batch_completed(kind, lane, flags),
            _ => self.arena(lane).give_back(tag_of(index)),
        }
        Some(Event::Export { lane, completion })
    }
}

#[inline]
fn command_entry(kind: u64, (lane, index): (u16, u32), file: FileId, command: &Command) -> Sqe {
    let (first, second) = command.payload.split_at(8);
    Sqe {
        opcode: OP_URING_CMD,
        fd: i32::from(file.0),
        flags: SQE_FIXED_FILE,
        off: u64::from(command.op),
        addr: command.aux,
        user_data: kind | u64::from(lane) << 32 | u64::from(index),
        addr3: u64::from_ne_bytes(first.try_into().unwrap_or_default()),
        pad: u64::from_ne_bytes(second.try_into().unwrap_or_default()),
        ..Sqe::default()
    }
}

/// Whose a completion is, and the number of what is complete.
#[inline]
#[allow(clippy::cast_possible_truncation)]
fn lane_and_index(data: u64) -> (u16, u32) {
    ((data >> 32) as u16, data as u32)
}

#[inline]
fn tag_of(index: u32) -> usize {
    (index & 0xffff) as usize
}

impl Ring for Uring {
    #[inline]
    fn splice(&mut self, key: u32, splice: &Splice<'_>) {
        if Uring::is_remote(splice) {
            return self.ask(key, &{ *splice });
        }
        match simple(splice) {
            Some(what) => {
                let user_data = KIND_SIMPLE | u64::from(key);
                self.queues.push_made(|| Sqe { user_data, ..simple_entry(splice, what) });
            }
            // A copy, so that only this way needs the splice in memory.
            None => self.splice_kept(key, &{ *splice }),
        }
    }

    fn splice_first(&mut self, key: u32, splice: &Splice<'_>) -> bool {
        self.link(key, splice)
    }

    fn after(&mut self, key: u32, ns: u64) {
        let beyond = (u32::MAX - key) as usize;
        let flights = self.times.len() - KEYS_BEYOND;
        let index = if beyond < KEYS_BEYOND { flights + beyond } else { key as usize };
        let seconds = i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX);
        let nanoseconds = i64::try_from(ns % 1_000_000_000).unwrap_or(0);
        self.times[index] = Timespec { seconds, nanoseconds };
        let addr = std::ptr::from_ref(&self.times[index]) as u64;
        let user_data = KIND_TIMER | u64::from(key);
        self.queues.push(Sqe {
            opcode: OP_TIMEOUT,
            fd: -1,
            addr,
            len: 1,
            user_data,
            ..Sqe::default()
        });
    }

    fn enter(&mut self, wait: bool) -> Result<()> {
        self.enter_for(u32::from(wait))
    }

    fn enter_for_two(&mut self) -> Result<()> {
        self.enter_for(2)
    }

    fn next(&mut self) -> Option<Event> {
        loop {
            let Some(cqe) = self.queues.next() else { return self.other_event() };
            if let Some(event) = self.event(cqe.user_data, cqe.result, cqe.flags) {
                return Some(event);
            }
        }
    }

    #[inline(always)]
    fn report(to: &mut impl Takes<Uring>) -> Result<()> {
        loop {
            let ring = to.ring();
            let Some(cqe) = ring.queues.next() else {
                match ring.other_event() {
                    None => return Ok(()),
                    Some(event) => to.take_other(event)?,
                }
                continue;
            };
            let Cqe { user_data: data, result, flags } = cqe;
            let (lane, index) = lane_and_index(data);
            let is = |kind: u64| data >> KIND_SHIFT == kind >> KIND_SHIFT;
            if is(KIND_EXPORT) {
                let completion = Completion { index, result, flags };
                to.take(Event::Export { lane, completion })?;
            } else if is(KIND_SIMPLE)
                && let Ok(done) = u64::try_from(result)
            {
                ring.bytes_spliced += done;
                to.take(Event::Splice { key: index, result: Ok(done) })?;
            } else if let Some(event) = ring.event(data, result, flags) {
                to.take_other(event)?;
            }
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn wake(&mut self) -> Wake {
        self.make_wake()
    }

    fn inner_pages(&self, lane: u16, tag: u16) -> Pages {
        self.memory_pages(lane, tag)
    }

    fn put(&mut self, lane: u16, tag: u16, bytes: &[u8]) {
        self.memory(lane, tag)[DATA_AT..][..bytes.len()].copy_from_slice(bytes);
    }

    fn get(&mut self, lane: u16, tag: u16, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.memory(lane, tag)[DATA_AT..][..bytes.len()]);
    }

    fn rest(&mut self, lane: u16) {
        if let Some(Some(arena)) = self.arenas[..self.outer].get_mut(usize::from(lane)) {
            arena.rest();
        }
    }

    fn counts(&self) -> RingCounts {
        RingCounts {
            sqes: self.queues.pushed(),
            enters: self.queues.enters,
            bytes_spliced: self.bytes_spliced,
            bytes_copied: self.bytes_copied,
            bytes_meta: self.bytes_meta,
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.hang_up();
        // The kernel takes a closed ring apart at its leisure; until then the files in its table
        // stay open, and locked. So they are let go here.
        setup::drop_file_table(&self.queues.fd);
    }
}

/// Opens `path` for a ring.
///
/// # Errors
/// If it cannot be opened.
pub fn open(path: &str, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::os(path, &errno.into()))
}
