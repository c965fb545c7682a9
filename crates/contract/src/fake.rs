//! Answers for a ring without a kernel: moves bytes between vectors, late, out of order, faulty.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devsplice_core::{Errno, Io, Limits, Op, Result};
use devsplice_engine::desk::{INNER_BYTES, INNER_DEPTH};
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{
    Completion, Event, FileId, Pages, Part, Ring, RingCounts, Splice, To, Wake,
};

use crate::rng::Rng;

mod ahead;
mod disk;

pub use ahead::Linked;
pub use disk::Disk;
use disk::check;

/// Disks above this size hold nothing and read as zeros.
const MATERIAL: u64 = 64 << 20;

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// No batch takes this many nanoseconds of virtual time.
const LONGEST: u64 = 60_000_000_000;

/// What goes wrong with a splice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails.
    Fail(Errno),
    /// No progress, as at the end of a file.
    Nothing,
    /// More done than asked.
    TooMuch,
    /// So many bytes done.
    Short(u64),
    /// Never completes.
    Hang,
}

/// A range of a disk where splices go wrong, the first `times` of them.
#[derive(Clone, Copy, Debug)]
pub struct Bad {
    /// Which disk.
    pub file: u16,
    /// First byte of the bad range.
    pub from: u64,
    /// The byte behind its last one.
    pub to: u64,
    /// What happens to splices that touch it.
    pub fault: Fault,
    /// To how many.
    pub times: u32,
}

/// Chances in percent, for each splice; and places where splices go wrong for certain.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Transfers that move less than asked.
    pub short: u64,
    /// Splices that fail with `EAGAIN`.
    pub eagain: u64,
    /// Splices that fail with `EINTR`.
    pub eintr: u64,
    /// The places.
    pub bad: Vec<Bad>,
}

/// A splice as the ring came to see it.
#[derive(Clone, Copy, Debug)]
pub struct Logged {
    /// When.
    pub sent: u64,
    /// Where to.
    pub to: To,
    /// What.
    pub op: Op,
    /// Whether it had to be durable.
    pub fua: bool,
    /// First byte there.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Ranges of the request's pages.
    pub part_count: usize,
}

/// A splice of a request, not of a layer's own.
#[derive(Clone, Debug)]
pub struct Traced {
    /// Where to.
    pub to: To,
    /// First byte there.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Ranges of the request's pages.
    pub parts: Vec<Part>,
}

#[derive(Clone, Copy)]
struct Flying {
    key: u32,
    op: Op,
    fua: bool,
    to: To,
    at: u64,
    len: u64,
    pages: Pages,
    parts: [Part; MAX_PARTS],
    part_count: usize,
    certain: Option<Fault>,
    /// Changes of its disk that had been done when it was sent.
    changes_before: usize,
}

enum What {
    Splice(Flying),
    Timer(u32),
    Fetch(u16, u32),
}

struct Due {
    at: u64,
    what: What,
}

/// All that lies below the engine.
pub struct World {
    /// Nanoseconds since the start.
    pub now: u64,
    /// Chance.
    pub rng: Rng,
    /// The disks, by the number of their file.
    pub disks: Vec<Disk>,
    /// The requests' memory.
    pub pages: Vec<Vec<u8>>,
    /// What goes wrong.
    pub faults: Faults,
    /// What was sent.
    pub log: Vec<Logged>,
    /// Whether it is kept.
    pub logs: bool,
    /// Waiting with nothing to come is an error unless this is set; then it sets `asleep`.
    pub may_sleep: bool,
    /// The worker waits and nothing will ever come.
    pub asleep: bool,
    /// Whether splices of requests are kept in `traced`.
    pub traces: bool,
    /// Those that were sent.
    pub traced: Vec<Traced>,
    /// First pages of requests of which a splice met a place where it goes wrong.
    pub hits: Vec<u32>,
    /// How many splices of layers' own did.
    pub inner_hits: u64,
    /// Timers that have run out.
    pub timers: u64,
    /// Lanes whose memory was given back, and when.
    pub rests: Vec<(u16, u64)>,
    /// What is linked behind splices.
    pub ahead: Linked,
    /// When whoever waits has waited too long.
    deadline: u64,
    flights: u32,
    /// The pages of each lane of an export.
    outer: Vec<std::ops::Range<usize>>,
    /// The first page of each inner lane.
    inner: std::collections::BTreeMap<u16, u32>,
    due: Vec<Due>,
    ready: VecDeque<Event>,
    counts: RingCounts,
}

impl World {
    /// An empty one, for a worker with so many flights.
    #[must_use]
    pub fn new(seed: u64, faults: Faults, flights: u32) -> World {
        World {
            now: 0,
            rng: Rng::new(seed),
            disks: Vec::new(),
            pages: Vec::new(),
            faults,
            log: Vec::new(),
            logs: true,
            may_sleep: false,
            asleep: false,
            traces: false,
            traced: Vec::new(),
            hits: Vec::new(),
            inner_hits: 0,
            timers: 0,
            ahead: Linked::default(),
            deadline: LONGEST,
            rests: Vec::new(),
            flights,
            outer: Vec::new(),
            inner: std::collections::BTreeMap::new(),
            due: Vec::with_capacity(1 << 12),
            ready: VecDeque::with_capacity(1 << 12),
            counts: RingCounts::default(),
        }
    }

    /// Adds a disk of zeros that can do everything and loses nothing.
    pub fn add_disk(&mut self, size: u64) {
        let held = if size <= MATERIAL { size } else { 0 };
        self.disks.push(Disk {
            size,
            bytes: vec![0; index(held)],
            limits: None,
            durable: Vec::new(),
            changes: Vec::new(),
            bad_flush: None,
        });
    }

    /// Adds a disk that holds to its limits and begins with `bytes`, then zeros.
    pub fn add_strict_disk(&mut self, limits: Limits, bytes: &[u8]) {
        self.add_disk(limits.size);
        if let Some(disk) = self.disks.last_mut() {
            let held = bytes.len().min(disk.bytes.len());
            disk.bytes[..held].copy_from_slice(&bytes[..held]);
            disk.durable.clone_from(&disk.bytes);
            disk.limits = Some(limits);
        }
    }

    /// The power goes. What was in flight is done or not; the worker must be gone.
    pub fn cut(&mut self) {
        for due in std::mem::take(&mut self.due) {
            if let What::Splice(flying) = due.what
                && self.rng.percent(50)
                && flying.certain.is_none()
            {
                self.carry(&flying, flying.len);
            }
        }
        let World { disks, rng, .. } = self;
        disks.iter_mut().for_each(|disk| disk.cut(rng));
        self.settle();
    }

    /// Others wait from now on.
    pub fn begin_wait(&mut self) {
        self.deadline = self.now + LONGEST;
    }

    /// Whether pages are those of a layer's own requests.
    fn is_inner(&self, pages: Pages) -> bool {
        let end = u32::from(INNER_DEPTH);
        self.inner.values().any(|first| (*first..first + end).contains(&pages.0))
    }

    /// Bytes of a disk, for whoever builds a stack over it.
    ///
    /// # Errors
    /// `ENODEV` if there is no such disk, `EINVAL` if it has no such bytes.
    pub fn peek(&self, disk: u16, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let disk = self.disks.get(usize::from(disk)).ok_or(Errno::ENODEV)?;
        let bytes = disk.bytes.get(index(at)..).and_then(|rest| rest.get(..into.len()));
        into.copy_from_slice(bytes.ok_or(Errno::EINVAL)?);
        Ok(())
    }

    /// Puts bytes onto a disk for good.
    ///
    /// # Errors
    /// As [`World::peek`].
    pub fn poke(&mut self, disk: u16, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let disk = self.disks.get_mut(usize::from(disk)).ok_or(Errno::ENODEV)?;
        let range = index(at)..index(at).saturating_add(bytes.len());
        for image in [&mut disk.bytes, &mut disk.durable] {
            image.get_mut(range.clone()).ok_or(Errno::EINVAL)?.copy_from_slice(bytes);
        }
        Ok(())
    }

    /// A worker has ended: its time and its timers are over.
    ///
    /// # Panics
    /// If a splice of it is still out: it would hit the next request's pages.
    pub fn settle(&mut self) {
        assert!(
            !self.due.iter().any(|due| matches!(due.what, What::Splice(_))),
            "the worker ended and left a splice behind"
        );
        self.due.clear();
        self.ready.clear();
        self.pages.clear();
        self.outer.clear();
        self.inner.clear();
        self.hits.clear();
        self.now = 0;
        self.deadline = LONGEST;
    }

    /// Pages for each tag of the next lane, large enough for `ios`; the number of the first.
    pub fn add_pages<'a>(&mut self, depth: u16, ios: impl Iterator<Item = &'a Io>) -> u32 {
        let with_pages = ios.filter(|io| io.op.has_pages());
        let most = with_pages.map(|io| io.extent.len).max().unwrap_or(0);
        let first = u32::try_from(self.pages.len()).unwrap_or(u32::MAX);
        let most = index(most.min(MATERIAL));
        self.outer.push(self.pages.len()..self.pages.len() + usize::from(depth));
        self.pages.extend((0..depth).map(|_| vec![0; most]));
        first
    }

    /// Timers and splices that are out.
    #[must_use]
    pub fn due_count(&self) -> usize {
        let fetch = |due: &&Due| !matches!(due.what, What::Fetch(..));
        self.due.iter().filter(fetch).count()
    }

    fn is_free(&self, key: u32) -> bool {
        !self.due.iter().any(|due| match due.what {
            What::Splice(Flying { key: other, .. }) | What::Timer(other) => key == other,
            What::Fetch(..) => false,
        })
    }

    /// Moves all that is due to the ready events, in any order.
    fn collect(&mut self) {
        loop {
            let now = self.now;
            let count = self.due.iter().filter(|due| due.at <= now).count();
            if count == 0 {
                return;
            }
            let which = index(self.rng.below(count as u64));
            let is_due = |(_, due): &(usize, &Due)| due.at <= now;
            let mut due = self.due.iter().enumerate().filter(is_due);
            let Some((place, _)) = due.nth(which) else { return };
            let event = match self.due.swap_remove(place).what {
                What::Splice(flying) => {
                    let result = self.complete(&flying);
                    self.ready.push_back(Event::Splice { key: flying.key, result });
                    self.follow(flying.key, result == Ok(flying.len));
                    continue;
                }
                What::Timer(key) => {
                    self.timers += 1;
                    Event::Timer { key }
                }
                What::Fetch(lane, index) => {
                    let completion = Completion { index, result: 0, flags: 0 };
                    Event::Export { lane, completion }
                }
            };
            self.ready.push_back(event);
        }
    }

    fn complete(&mut self, flying: &Flying) -> Result<u64, Errno> {
        match flying.certain {
            Some(Fault::Fail(errno)) => return Err(errno),
            Some(Fault::Nothing) => return Ok(0),
            Some(Fault::TooMuch) => return Ok(flying.len + 1),
            Some(Fault::Short(len)) => {
                self.carry(flying, len);
                return Ok(len);
            }
            Some(Fault::Hang) | None => (),
        }
        if let (To::File(file), Op::Flush) = (flying.to, flying.op) {
            self.disks[usize::from(file.0)].may_flush()?;
        }
        if self.rng.percent(self.faults.eagain) {
            return Err(Errno::EAGAIN);
        }
        if self.rng.percent(self.faults.eintr) {
            return Err(Errno::EINTR);
        }
        let mut len = flying.len;
        if flying.op.has_pages() && self.rng.percent(self.faults.short) {
            len = 1 + self.rng.below(len);
        }
        self.carry(flying, len);
        Ok(len)
    }

    /// Moves the first `len` bytes.
    fn carry(&mut self, flying: &Flying, len: u64) {
        let disk = match flying.to {
            To::File(file) => Some(&mut self.disks[usize::from(file.0)]),
            To::Zero => None,
        };
        let mut disk = disk.filter(|disk| !disk.bytes.is_empty());
        let (at, len) = (index(flying.at), index(len));
        if !flying.op.has_pages() {
            let Some(disk) = disk else { return };
            match flying.op {
                Op::Discard if self.rng.percent(50) => return,
                Op::Flush => {
                    let done = flying.changes_before.min(disk.changes.len());
                    disk.changes[..done].iter_mut().for_each(|change| change.durable = true);
                    return;
                }
                _ => disk.bytes[at..at + len].fill(0),
            }
            return disk.changed(at, len, false);
        }
        let pages = &mut self.pages[flying.pages.0 as usize];
        let (mut place, mut left) = (at, len);
        for part in &flying.parts[..flying.part_count] {
            let count = left.min(part.len as usize);
            let memory = &mut pages[part.at as usize..part.at as usize + count];
            match (&mut disk, flying.op) {
                (Some(disk), Op::Read) => memory.copy_from_slice(&disk.bytes[place..place + count]),
                (Some(disk), _) => disk.bytes[place..place + count].copy_from_slice(memory),
                (None, Op::Read) => memory.fill(0),
                (None, _) => (),
            }
            place += count;
            left -= count;
        }
        if let (Some(disk), Op::Write) = (disk, flying.op) {
            disk.changed(at, len, flying.fua);
        }
    }

    fn certain(&mut self, splice: &Splice<'_>) -> Option<Fault> {
        let To::File(FileId(file)) = splice.to else { return None };
        let hit = |bad: &&mut Bad| {
            bad.times > 0
                && bad.file == file
                && splice.at < bad.to
                && splice.at + splice.len > bad.from
        };
        let bad = self.faults.bad.iter_mut().find(hit)?;
        bad.times -= 1;
        Some(bad.fault)
    }
}

/// A ring over a [`World`].
#[derive(Clone)]
pub struct FakeRing {
    /// Where its splices go.
    pub world: Arc<Mutex<World>>,
}

impl FakeRing {
    /// The world, also while a failed test unwinds.
    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An export asks for an event, soon or at `at`.
    pub fn fetch(&self, lane: u16, index: u32, at: u64) {
        let mut world = self.lock();
        let soon = world.now + world.rng.below(50_000);
        world.due.push(Due { at: at.max(soon), what: What::Fetch(lane, index) });
    }
}

impl Ring for FakeRing {
    fn splice(&mut self, key: u32, splice: &Splice<'_>) {
        let world = &mut *self.lock();
        world.ahead.is_nothing_between();
        check(splice, world);
        assert!(key < world.flights && world.is_free(key), "flight {key} is in use");
        let Splice { op, fua, to, at, len, pages, parts } = *splice;
        if world.logs {
            let part_count = parts.len();
            world.log.push(Logged { sent: world.now, to, op, fua, at, len, part_count });
        }
        let is_inner = world.is_inner(pages);
        if world.traces && !is_inner {
            world.traced.push(Traced { to, at, len, parts: parts.to_vec() });
        }
        let certain = world.certain(splice);
        if certain.is_some() && is_inner {
            world.inner_hits += 1;
        } else if certain.is_some() {
            world.hits.push(pages.0);
        }
        let mut held = [Part::default(); MAX_PARTS];
        held[..parts.len()].copy_from_slice(parts);
        let part_count = parts.len();
        let changes_before = match to {
            To::File(file) => world.disks[usize::from(file.0)].changes.len(),
            To::Zero => 0,
        };
        let what = What::Splice(Flying {
            key,
            op,
            fua,
            to,
            at,
            len,
            pages,
            parts: held,
            part_count,
            certain,
            changes_before,
        });
        let latency = 1000 + world.rng.below(100_000);
        let at = if certain == Some(Fault::Hang) { u64::MAX } else { world.now + latency };
        world.due.push(Due { at, what });
    }

    fn splice_first(&mut self, key: u32, splice: &Splice<'_>) -> bool {
        self.link(key, splice)
    }

    fn after(&mut self, key: u32, ns: u64) {
        let world = &mut *self.lock();
        world.ahead.is_nothing_between();
        assert!(world.is_free(key), "timer {key} is in use");
        world.due.push(Due { at: world.now + ns, what: What::Timer(key) });
    }

    fn enter(&mut self, wait: bool) -> Result<()> {
        let world = &mut *self.lock();
        world.ahead.is_nothing_between();
        world.counts.enters += 1;
        world.now += 1000;
        // The watchdog's ticks go on for ever while a request hangs.
        assert!(world.now < world.deadline, "a request is never finished");
        world.collect();
        if !wait || !world.ready.is_empty() {
            return Ok(());
        }
        let first = world.due.iter().map(|due| due.at).min().unwrap_or(u64::MAX);
        if first == u64::MAX {
            assert!(world.may_sleep, "the worker waits for ever");
            world.asleep = true;
            return Ok(());
        }
        world.now = first;
        world.collect();
        Ok(())
    }

    fn enter_for_two(&mut self) -> Result<()> {
        self.wait_for_two()
    }

    fn next(&mut self) -> Option<Event> {
        self.lock().ready.pop_front()
    }

    fn now_ns(&self) -> u64 {
        self.lock().now
    }

    fn wake(&mut self) -> Wake {
        // All is on one thread.
        Arc::new(|| {})
    }

    fn inner_pages(&self, lane: u16, tag: u16) -> Pages {
        let world = &mut *self.lock();
        let first = *world.inner.entry(lane).or_insert_with(|| {
            // There are a few lanes with a few pages each.
            let first = u32::try_from(world.pages.len()).unwrap_or(u32::MAX);
            world.pages.extend((0..INNER_DEPTH).map(|_| vec![0; INNER_BYTES as usize]));
            first
        });
        Pages(first + u32::from(tag))
    }

    fn put(&mut self, lane: u16, tag: u16, bytes: &[u8]) {
        let pages = self.inner_pages(lane, tag).0 as usize;
        self.lock().pages[pages][..bytes.len()].copy_from_slice(bytes);
    }

    fn get(&mut self, lane: u16, tag: u16, bytes: &mut [u8]) {
        let pages = self.inner_pages(lane, tag).0 as usize;
        bytes.copy_from_slice(&self.lock().pages[pages][..bytes.len()]);
    }

    /// Whoever still wants data in its pages sees that it is gone.
    fn rest(&mut self, lane: u16) {
        let world = &mut *self.lock();
        let of_lane = match world.outer.get(usize::from(lane)) {
            Some(of_lane) => of_lane.clone(),
            // Whoever has made pages otherwise has one lane.
            None if world.outer.is_empty() => 0..world.pages.len(),
            None => return,
        };
        world.rests.push((lane, world.now));
        world.pages[of_lane].iter_mut().for_each(|pages| pages.fill(0xee));
    }

    fn counts(&self) -> RingCounts {
        self.lock().counts
    }
}
