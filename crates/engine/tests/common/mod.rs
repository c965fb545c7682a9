//! Answers for a world to test the engine in: disks, pages, a clock and chance, all repeatable.
#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::expect_used)]

pub mod export;
pub mod layers;
pub mod product;

use std::sync::{Arc, Mutex};

use devsplice_core::{Errno, Io, Limits, Op, Stack};
use devsplice_engine::watch::OnStuck;
use devsplice_engine::{Counts, FileId, Lane, Served, Shared, Worker};

pub use devsplice_contract::fake::{Bad, FakeRing, Fault, Faults, Logged, World};
pub use devsplice_contract::rng::Rng;
pub use export::{Ask, Done, FakeExport};
pub use layers::{Kind, Tree, build, disk, over};

/// What a test runs: a stack, how wide, with what faults, and what is asked of it.
pub struct Setup {
    pub stack: Arc<Stack>,
    pub disk: Limits,
    pub seed: u64,
    pub depth: u16,
    pub flights: u32,
    pub faults: Faults,
    /// One plan a lane; each lane has its own disks.
    pub plans: Vec<Vec<Ask>>,
    /// The range of the stack that holds only zeros.
    pub zeros: (u64, u64),
    /// Seconds after which requests are stuck.
    pub stuck: (u32, OnStuck),
    /// The front end stays open when all was asked.
    pub open: bool,
    /// Ticks at which the first lane's front end still holds data in tags' memory.
    pub holds: u32,
    /// Requests may overlap one another.
    pub overlaps: bool,
    /// Ends of requests that come alone are sent ahead.
    pub ahead: bool,
    /// The stack as it is served, if a test wants to hold on to it.
    pub served: Option<Arc<Served>>,
}

pub const MIB: u64 = 1 << 20;

/// A disk of `size` bytes that can do everything.
pub fn ideal(size: u64) -> Limits {
    Limits::ideal(size)
}

pub fn setup(tree: Tree, disk: Limits, plan: Vec<Ask>) -> Setup {
    Setup {
        stack: Arc::new(build(tree, disk)),
        disk,
        seed: 1,
        depth: 8,
        flights: 64,
        faults: Faults::default(),
        plans: vec![plan],
        zeros: (0, 0),
        stuck: (0, Box::new(|_| ())),
        open: false,
        holds: 0,
        overlaps: false,
        ahead: false,
        served: None,
    }
}

pub type Dones = Arc<Mutex<Vec<Done>>>;

/// A worker that can run, and the ends by which a test sees what it did.
pub struct Bench {
    pub worker: Worker<FakeRing>,
    pub world: Arc<Mutex<World>>,
    pub done: Dones,
    pub shared: Arc<Shared>,
}

/// What came of a run.
pub struct Outcome {
    pub done: Vec<Done>,
    pub log: Vec<Logged>,
    pub counts: Counts,
    /// Timers and splices that were still due at the end.
    pub left: usize,
    pub now: u64,
    /// How often the end of a request was sent ahead.
    pub ahead: u64,
}

impl Setup {
    /// The stack as the run will serve it.
    pub fn served(&mut self) -> Arc<Served> {
        let stack = &self.stack;
        self.served.get_or_insert_with(|| Served::quietly(stack.clone())).clone()
    }

    pub fn bench(self) -> Bench {
        let count = self.stack.backend_count();
        let mut world = World::new(self.seed, self.faults, self.flights);
        world.ahead.can = self.ahead;
        let done: Dones = Arc::new(Mutex::new(Vec::with_capacity(1 << 16)));
        let mut exports = Vec::new();
        for plan in self.plans {
            let base = world.disks.len();
            for _ in 0..count {
                world.add_disk(self.disk.size);
            }
            let pages = world.add_pages(self.depth, plan.iter().map(|ask| &ask.io));
            let limits = self.stack.limits();
            let export = FakeExport::new(self.depth, plan, pages, limits, self.zeros, done.clone());
            exports.push((base, export));
        }
        let world = Arc::new(Mutex::new(world));
        let holds = [self.holds].into_iter().chain(std::iter::repeat(0));
        let lanes = exports.into_iter().zip(holds).map(|((base, mut export), holds)| {
            export.stays_open = self.open;
            export.holds = holds;
            export.overlaps = self.overlaps;
            export.ahead = self.ahead;
            let file = |index| FileId(u16::try_from(base).unwrap() + index);
            let quiet = || Served::quietly(self.stack.clone());
            let served = self.served.clone().unwrap_or_else(quiet);
            Lane::new(Box::new(export), served, (0..count).map(file).collect())
        });
        let shared = Arc::new(Shared::default());
        let ring = FakeRing { world: world.clone() };
        let worker = Worker::new(ring, lanes.collect(), self.flights, shared.clone(), self.stuck);
        Bench { worker, world, done, shared }
    }

    /// Runs to the end; checks that every request was finished once.
    pub fn run(self) -> Outcome {
        let asked: usize = self.plans.iter().map(Vec::len).sum();
        let mut bench = self.bench();
        bench.worker.arm().unwrap();
        bench.worker.run().unwrap();
        let outcome = bench.end();
        assert_eq!(outcome.done.len(), asked, "every request is finished, once");
        assert_eq!(outcome.counts.requests, asked as u64);
        outcome
    }
}

impl Bench {
    pub fn end(self) -> Outcome {
        drop(self.worker);
        let mut world = self.world.lock().unwrap();
        let log = std::mem::take(&mut world.log);
        let done = std::mem::take(&mut *self.done.lock().unwrap());
        let (left, now) = (world.due_count(), world.now);
        let ahead = world.ahead.count;
        Outcome { done, log, counts: self.shared.read(), left, now, ahead }
    }
}

impl Outcome {
    pub fn all_succeed(&self) {
        for done in &self.done {
            assert_eq!(done.result, Ok(()), "{:?}", done.io);
        }
    }

    pub fn results(&self) -> Vec<Result<(), Errno>> {
        let mut sorted: Vec<_> = self.done.iter().map(|done| (done.seq, done.result)).collect();
        sorted.sort_by_key(|(seq, _)| *seq);
        sorted.into_iter().map(|(_, result)| result).collect()
    }

    pub fn done_at(&self, seq: usize) -> u64 {
        self.done.iter().find(|done| done.seq == seq).unwrap().at
    }
}

pub fn now(io: Io) -> Ask {
    Ask { at: 0, io }
}

/// Writes that fill the device, so that every block is known and differs from every other.
pub fn fill(size: u64) -> Vec<Ask> {
    let step = 64 << 10;
    let write = |at| now(Io::new(Op::Write, at, step.min(size - at)));
    (0..size.div_ceil(step)).map(|index| write(index * step)).collect()
}

/// A mix of all operations, 512 bytes to 256k.
pub fn mix(rng: &mut Rng, size: u64, count: usize) -> Vec<Ask> {
    let one = |rng: &mut Rng| {
        let op = match rng.below(20) {
            0..8 => Op::Read,
            8..15 => Op::Write,
            15 => Op::Flush,
            16..18 => Op::Discard,
            _ => Op::WriteZeroes { unmap: rng.percent(50) },
        };
        if op == Op::Flush {
            return now(Io::new(op, 0, 0));
        }
        let top = 1 << rng.below(10);
        let blocks = (1 + rng.below(top)).min(size / 512);
        let at = rng.below(size / 512 - blocks + 1);
        let fua = op == Op::Write && rng.percent(10);
        now(Io { fua, ..Io::new(op, at * 512, blocks * 512) })
    };
    (0..count).map(|_| one(rng)).collect()
}
