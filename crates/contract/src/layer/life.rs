//! Answers for a layer at work: model disks, a stack over them that is built anew after each life,
//! and the engine on a ring without a kernel.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devsplice_core::{BackendId, Bottoms, Errno, Limits, Stack};
use devsplice_engine::{FileId, Pages};

use super::Subject;
use crate::bench::Bench;
use crate::fake::{FakeRing, Faults, Traced, World};
use crate::front::{Life, Room, Setup, memory_needed};
use crate::target::{Ask, Done, Target};

/// Requests in flight, and splices: few of these, so that requests wait for room, and many.
const SHAPES: [(u16, u32); 3] = [(16, 64), (3, 1), (64, 256)];
/// Turns in which a layer must have done what it does in the background.
const PATIENCE: u32 = 100_000;

/// The disks of a world, for whoever builds a stack over them.
struct Direct<'a>(&'a mut World);

impl Bottoms for Direct<'_> {
    fn read(&mut self, id: BackendId, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.0.peek(id.0, at, into)
    }

    fn write(&mut self, id: BackendId, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.0.poke(id.0, at, bytes)
    }
}

/// What a case sees of a target beside requests.
#[derive(Clone)]
pub(super) struct Handle {
    world: Arc<Mutex<World>>,
    /// The stack as it was first.
    pub(super) stack: Arc<Stack>,
    /// Of the last batch, the requests of which a splice met a place where it goes wrong.
    hits: Arc<Mutex<Vec<bool>>>,
    below: Arc<Mutex<Vec<Limits>>>,
    /// Before the next batch the layer gets the time to do what it does in the background.
    rests: Arc<AtomicBool>,
}

impl Handle {
    pub(super) fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    pub(super) fn hits(&self) -> Vec<bool> {
        self.hits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn below(&self) -> Vec<Limits> {
        self.below.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The next life is over a device that may not be written.
    pub(super) fn lock_device(&self, place: usize) {
        let mut below = self.below.lock().unwrap_or_else(PoisonError::into_inner);
        below[place].read_only = true;
        self.lock().disks[place].lock();
    }

    /// Before the next batch all that a layer does in the background is to be done.
    pub(super) fn rest(&self) {
        self.rests.store(true, Ordering::SeqCst);
    }

    /// From here on splices of requests are kept; what was kept before.
    pub(super) fn trace(&self) -> Vec<Traced> {
        let mut world = self.lock();
        world.traces = true;
        std::mem::take(&mut world.traced)
    }
}

/// The engine over a fake ring.
pub(super) struct FakeTarget {
    subject: Subject,
    handle: Handle,
    depth: u16,
    flights: u32,
    /// The device is removed after each batch, and made anew.
    short_lived: bool,
    stack: Option<Arc<Stack>>,
    life: Option<Life<FakeRing>>,
}

impl FakeTarget {
    /// # Errors
    /// If the layer does not open.
    pub(super) fn new(
        subject: &Subject,
        below: &[Limits],
        seed: u64,
    ) -> Result<FakeTarget, String> {
        let shape = usize::try_from(seed).unwrap_or(0);
        let (depth, flights) = SHAPES[shape % SHAPES.len()];
        let mut world = World::new(seed + 1, Faults::default(), flights);
        world.logs = false;
        for (place, limits) in below.iter().enumerate() {
            let bytes = subject.contents.get(place).map_or(&[][..], Vec::as_slice);
            world.add_strict_disk(*limits, bytes);
        }
        let stack = open(subject, below, &mut world, true)?;
        let short_lived = seed % 2 == 1;
        // Of copies, other seeds begin before they are made.
        let rests = Arc::new(AtomicBool::new(subject.masks_errors && !short_lived));
        let hits = Arc::default();
        let limits = Arc::new(Mutex::new(below.to_vec()));
        let handle = Handle {
            world: Arc::new(Mutex::new(world)),
            stack: Arc::clone(&stack),
            hits,
            rests,
            below: limits,
        };
        Ok(FakeTarget {
            subject: subject.clone(),
            handle,
            depth,
            flights,
            short_lived,
            stack: Some(stack),
            life: None,
        })
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    pub(super) fn bench(self, seed: u64) -> Bench {
        let (span, voids) = (self.subject.span, self.subject.voids.clone());
        Bench::new(Box::new(self), span, &voids, seed)
    }

    fn ring(&self) -> FakeRing {
        FakeRing { world: Arc::clone(&self.handle.world) }
    }

    /// The engine at work, over a stack that is built from what the disks hold if need be.
    fn begin(&mut self) -> Result<Life<FakeRing>, String> {
        let stack = match self.stack.take() {
            Some(stack) => stack,
            None => {
                let below = self.handle.below();
                open(&self.subject, &below, &mut self.handle.lock(), false)?
            }
        };
        self.handle.lock().pages = vec![Vec::new(); usize::from(self.depth)];
        Life::begin(Setup {
            ring: self.ring(),
            stack: &stack,
            files: (0..stack.backend_count()).map(FileId).collect(),
            depth: self.depth,
            flights: self.flights,
        })
    }
}

fn open(
    subject: &Subject,
    below: &[Limits],
    world: &mut World,
    is_new: bool,
) -> Result<Arc<Stack>, String> {
    let stack = subject.build(below, &mut Direct(world), is_new);
    stack.map(Arc::new).map_err(|error| format!("it does not open: {error}"))
}

/// Serves until nothing moves any more, so that what a layer does in the background is done.
fn settle(life: &mut Life<FakeRing>, handle: &Handle) -> Result<(), String> {
    let mut turns = 0;
    {
        let mut world = handle.lock();
        world.begin_wait();
        (world.may_sleep, world.asleep) = (true, false);
    }
    while !handle.lock().asleep {
        turns += 1;
        if turns > PATIENCE {
            return Err("its background work does not end".into());
        }
        life.turn()?;
    }
    handle.lock().may_sleep = false;
    Ok(())
}

impl Target for FakeTarget {
    fn limits(&self) -> Limits {
        *self.handle.stack.limits()
    }

    fn run(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String> {
        if self.life.is_none() {
            self.life = Some(self.begin()?);
        }
        let Some(life) = &mut self.life else { return Err("nothing serves it".into()) };
        if self.handle.rests.swap(false, Ordering::SeqCst) {
            settle(life, &self.handle)?;
        }
        let most = usize::try_from(memory_needed(asks)).unwrap_or(0);
        let mut ring = FakeRing { world: Arc::clone(&self.handle.world) };
        {
            let mut world = self.handle.lock();
            world.begin_wait();
            // What is refused may be finished before anything has to come.
            (world.may_sleep, world.asleep) = (true, false);
            let pages = world.pages.iter_mut().take(usize::from(self.depth));
            pages.filter(|page| page.len() < most).for_each(|page| page.resize(most, 0));
        }
        let (dones, hits) = life.run(&mut ring, asks)?;
        *self.handle.hits.lock().unwrap_or_else(PoisonError::into_inner) = hits;
        self.handle.lock().may_sleep = false;
        if self.short_lived
            && let Some(life) = self.life.take()
        {
            life.end()?;
            self.handle.lock().settle();
        }
        Ok(dones)
    }

    fn cut(&mut self) -> bool {
        self.life = None;
        self.stack = None;
        self.handle.lock().cut();
        true
    }
}

impl Room for FakeRing {
    fn summon(&mut self, lane: u16, tag: u16) {
        self.fetch(lane, u32::from(tag), 0);
    }

    fn memory_of(&self, _: u16, tag: u16) -> Pages {
        Pages(u32::from(tag))
    }

    fn load(&mut self, _: u16, tag: u16, bytes: &[u8]) {
        let world = &mut *self.world.lock().unwrap_or_else(PoisonError::into_inner);
        world.pages[usize::from(tag)][..bytes.len()].copy_from_slice(bytes);
    }

    fn unload(&mut self, _: u16, tag: u16, len: usize) -> Vec<u8> {
        let world = &*self.world.lock().unwrap_or_else(PoisonError::into_inner);
        world.pages[usize::from(tag)][..len].to_vec()
    }

    fn was_hit(&mut self, _: u16, tag: u16) -> bool {
        let world = &mut *self.world.lock().unwrap_or_else(PoisonError::into_inner);
        let before = world.hits.len();
        world.hits.retain(|page| *page != u32::from(tag));
        world.hits.len() < before
    }

    fn is_asleep(&self) -> bool {
        self.world.lock().unwrap_or_else(PoisonError::into_inner).asleep
    }
}
