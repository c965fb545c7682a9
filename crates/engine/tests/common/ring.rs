//! Answers for a ring without a kernel: moves bytes between vectors, late, out of order, faulty.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use devsplice_core::{Errno, Io, Op, Result};
use devsplice_engine::desk::{INNER_BYTES, INNER_DEPTH};
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{
    Completion, Event, FileId, Pages, Part, Ring, RingCounts, Splice, To, Wake,
};

use super::Rng;

/// Disks above this size hold nothing and read as zeros.
const MATERIAL: u64 = 64 << 20;

/// No test takes this many nanoseconds of virtual time.
const LONGEST: u64 = 60_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
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
#[derive(Clone, Copy)]
pub struct Bad {
    pub file: u16,
    pub from: u64,
    pub to: u64,
    pub fault: Fault,
    pub times: u32,
}

/// Chances in percent, for each splice; and places where splices go wrong for certain.
#[derive(Clone, Default)]
pub struct Faults {
    pub short: u64,
    pub eagain: u64,
    pub eintr: u64,
    pub bad: Vec<Bad>,
}

/// A splice as the ring came to see it.
#[derive(Clone, Copy, Debug)]
pub struct Logged {
    pub sent: u64,
    pub to: To,
    pub op: Op,
    pub fua: bool,
    pub at: u64,
    pub len: u64,
    pub part_count: usize,
}

#[derive(Clone, Copy)]
struct Flying {
    key: u32,
    op: Op,
    to: To,
    at: u64,
    len: u64,
    pages: Pages,
    parts: [Part; MAX_PARTS],
    part_count: usize,
    certain: Option<Fault>,
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

pub struct Disk {
    pub size: u64,
    pub bytes: Vec<u8>,
}

/// All that lies below the engine.
pub struct World {
    pub now: u64,
    pub rng: Rng,
    pub disks: Vec<Disk>,
    pub pages: Vec<Vec<u8>>,
    pub faults: Faults,
    pub log: Vec<Logged>,
    pub logs: bool,
    /// Waiting with nothing to come is an error unless this is set; then it sets `asleep`.
    pub may_sleep: bool,
    pub asleep: bool,
    pub timers: u64,
    /// When memory was given back.
    pub rests: Vec<u64>,
    flights: u32,
    /// The first page of each inner lane.
    inner: std::collections::BTreeMap<u16, u32>,
    due: Vec<Due>,
    ready: VecDeque<Event>,
    counts: RingCounts,
}

impl World {
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
            timers: 0,
            rests: Vec::new(),
            flights,
            inner: std::collections::BTreeMap::new(),
            due: Vec::with_capacity(1 << 12),
            ready: VecDeque::with_capacity(1 << 12),
            counts: RingCounts::default(),
        }
    }

    pub fn add_disk(&mut self, size: u64) {
        let held = if size <= MATERIAL { size } else { 0 };
        self.disks.push(Disk { size, bytes: vec![0; usize::try_from(held).unwrap()] });
    }

    /// Pages for each tag, large enough for each of `ios`; the number of the first.
    pub fn add_pages<'a>(&mut self, depth: u16, ios: impl Iterator<Item = &'a Io>) -> u32 {
        let with_pages = ios.filter(|io| io.op.has_pages());
        let most = with_pages.map(|io| io.extent.len).max().unwrap_or(0);
        let first = u32::try_from(self.pages.len()).unwrap();
        let most = usize::try_from(most.min(MATERIAL)).unwrap();
        self.pages.extend((0..depth).map(|_| vec![0; most]));
        first
    }

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
            let which = usize::try_from(self.rng.below(count as u64)).unwrap();
            let is_due = |(_, due): &(usize, &Due)| due.at <= now;
            let (index, _) = self.due.iter().enumerate().filter(is_due).nth(which).unwrap();
            let event = match self.due.swap_remove(index).what {
                What::Splice(flying) => {
                    let result = self.complete(&flying);
                    Event::Splice { key: flying.key, result }
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
        let at = usize::try_from(flying.at).unwrap();
        if !flying.op.has_pages() {
            let Some(disk) = disk else { return };
            let range = at..at + usize::try_from(len).unwrap();
            match flying.op {
                Op::Discard if self.rng.percent(50) => (),
                Op::Discard | Op::WriteZeroes { .. } => disk.bytes[range].fill(0),
                _ => (),
            }
            return;
        }
        let pages = &mut self.pages[flying.pages.0 as usize];
        let (mut at, mut left) = (at, usize::try_from(len).unwrap());
        for part in &flying.parts[..flying.part_count] {
            let count = left.min(part.len as usize);
            let memory = &mut pages[part.at as usize..part.at as usize + count];
            match (&mut disk, flying.op) {
                (Some(disk), Op::Read) => memory.copy_from_slice(&disk.bytes[at..at + count]),
                (Some(disk), _) => disk.bytes[at..at + count].copy_from_slice(memory),
                (None, Op::Read) => memory.fill(0),
                (None, _) => (),
            }
            at += count;
            left -= count;
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

/// What every splice must hold to.
fn check(splice: &Splice<'_>, world: &World) {
    match splice.to {
        To::File(file) => {
            let size = world.disks[usize::from(file.0)].size;
            assert!(splice.at + splice.len <= size, "behind the end: {splice:?}");
        }
        To::Zero => assert_eq!(splice.op, Op::Read, "only reads need zeros"),
    }
    if !splice.op.has_pages() {
        assert!(splice.parts.is_empty(), "{splice:?}");
        assert_eq!(splice.len == 0, splice.op == Op::Flush, "{splice:?}");
        return;
    }
    assert!((1..=MAX_PARTS).contains(&splice.parts.len()), "{splice:?}");
    assert!(splice.parts.iter().all(|part| part.len > 0), "{splice:?}");
    let sum: u64 = splice.parts.iter().map(|part| u64::from(part.len)).sum();
    assert_eq!(sum, splice.len, "{splice:?}");
}

#[derive(Clone)]
pub struct FakeRing {
    pub world: Arc<Mutex<World>>,
}

impl FakeRing {
    /// An export asks for an event, soon or at `at`.
    pub fn fetch(&self, lane: u16, index: u32, at: u64) {
        let mut world = self.world.lock().unwrap();
        let soon = world.now + world.rng.below(50_000);
        world.due.push(Due { at: at.max(soon), what: What::Fetch(lane, index) });
    }
}

impl Ring for FakeRing {
    fn splice(&mut self, key: u32, splice: &Splice<'_>) {
        let world = &mut *self.world.lock().unwrap();
        check(splice, world);
        assert!(key < world.flights && world.is_free(key), "flight {key} is in use");
        let Splice { op, fua, to, at, len, pages, parts } = *splice;
        if world.logs {
            let part_count = parts.len();
            world.log.push(Logged { sent: world.now, to, op, fua, at, len, part_count });
        }
        let certain = world.certain(splice);
        let mut held = [Part::default(); MAX_PARTS];
        held[..parts.len()].copy_from_slice(parts);
        let part_count = parts.len();
        let what =
            What::Splice(Flying { key, op, to, at, len, pages, parts: held, part_count, certain });
        let latency = 1000 + world.rng.below(100_000);
        let at = if certain == Some(Fault::Hang) { u64::MAX } else { world.now + latency };
        world.due.push(Due { at, what });
    }

    fn after(&mut self, key: u32, ns: u64) {
        let world = &mut *self.world.lock().unwrap();
        assert!(world.is_free(key), "timer {key} is in use");
        world.due.push(Due { at: world.now + ns, what: What::Timer(key) });
    }

    fn enter(&mut self, wait: bool) -> Result<()> {
        let world = &mut *self.world.lock().unwrap();
        world.counts.enters += 1;
        world.now += 1000;
        // The watchdog's ticks go on for ever while a request hangs.
        assert!(world.now < LONGEST, "a request is never finished");
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

    fn next(&mut self) -> Option<Event> {
        self.world.lock().unwrap().ready.pop_front()
    }

    fn now_ns(&self) -> u64 {
        self.world.lock().unwrap().now
    }

    fn wake(&mut self) -> Wake {
        // All is on one thread.
        Arc::new(|| {})
    }

    fn inner_pages(&self, lane: u16, tag: u16) -> Pages {
        let world = &mut *self.world.lock().unwrap();
        let first = *world.inner.entry(lane).or_insert_with(|| {
            let first = u32::try_from(world.pages.len()).unwrap();
            world.pages.extend((0..INNER_DEPTH).map(|_| vec![0; INNER_BYTES as usize]));
            first
        });
        Pages(first + u32::from(tag))
    }

    fn put(&mut self, lane: u16, tag: u16, bytes: &[u8]) {
        let pages = self.inner_pages(lane, tag).0 as usize;
        self.world.lock().unwrap().pages[pages][..bytes.len()].copy_from_slice(bytes);
    }

    fn get(&mut self, lane: u16, tag: u16, bytes: &mut [u8]) {
        let pages = self.inner_pages(lane, tag).0 as usize;
        bytes.copy_from_slice(&self.world.lock().unwrap().pages[pages][..bytes.len()]);
    }

    /// Whoever still wants data in its pages sees that it is gone.
    fn rest(&mut self) {
        let world = &mut *self.world.lock().unwrap();
        world.rests.push(world.now);
        world.pages.iter_mut().for_each(|pages| pages.fill(0xee));
    }

    fn counts(&self) -> RingCounts {
        // Also asked while a failed test unwinds.
        self.world.lock().unwrap_or_else(std::sync::PoisonError::into_inner).counts
    }
}
