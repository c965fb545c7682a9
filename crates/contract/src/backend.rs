//! Answers for the second entry: a backend (a file, a block device, memory, bytes) through the real
//! engine on a real ring, with pages in memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devsplice_core::{Errno, ErrorKind, Limits, Op, Result, Stack, StackBuilder};
use devsplice_engine::{Event, FileId, Pages, Ring, RingCounts, Splice, Wake};
use devsplice_uring::{Bytes, Config, FileKind, LaneMemory, RingFile, Uring};
use rustix::event::{EventfdFlags, eventfd};

use crate::bench::{Bench, LARGEST};
use crate::cases::{INNER, PROMISES};
use crate::front::{Room, Setup, memory_needed, serve};
use crate::suite::{Case, Outcome, Suite, Verdict};
use crate::target::{Ask, Done, Target};

/// Requests in flight, and splices.
const DEPTH: u16 = 32;
const FLIGHTS: u32 = 48;
/// How long the ring of the case before may keep the backend open: the kernel takes rings down
/// after the call that closes them.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long requests may take; then they count as never finished.
const LONGEST: Duration = Duration::from_secs(60);
/// Bytes of a backend that are used.
const SPAN: u64 = 4 << 20;

/// An open backend.
#[derive(Clone)]
pub enum Bottom {
    /// What the kernel moves pages to and from.
    File {
        /// The file or device.
        fd: Arc<OwnedFd>,
        /// What it is.
        kind: FileKind,
        /// What it offers.
        limits: Limits,
    },
    /// What helper threads read and write.
    Bytes(Arc<dyn Bytes>),
}

impl Bottom {
    fn limits(&self) -> Limits {
        match self {
            Bottom::File { limits, .. } => *limits,
            Bottom::Bytes(bytes) => bytes.limits(),
        }
    }
}

type Open = Arc<dyn Fn() -> Result<Bottom> + Send + Sync>;

/// A backend under test. What it holds is overwritten.
#[derive(Clone)]
pub struct Subject {
    open: Open,
    seen_at: Option<PathBuf>,
    /// Held by the case that has it.
    alone: Arc<Mutex<()>>,
}

impl Subject {
    /// A backend that `open` opens; each case has it open alone.
    pub fn new(open: impl Fn() -> Result<Bottom> + Send + Sync + 'static) -> Subject {
        Subject { open: Arc::new(open), seen_at: None, alone: Arc::default() }
    }

    /// A backend of bytes that `make` makes.
    pub fn bytes(make: impl Fn() -> Arc<dyn Bytes> + Send + Sync + 'static) -> Subject {
        Subject::new(move || Ok(Bottom::Bytes(make())))
    }

    /// Where others find what the backend holds, byte for byte.
    #[must_use]
    pub fn seen_at(self, path: impl Into<PathBuf>) -> Subject {
        Subject { seen_at: Some(path.into()), ..self }
    }

    /// The backend, open, for a case of one's own; its random requests follow from the seed.
    ///
    /// # Errors
    /// If it does not open.
    pub fn bench(&self, seed: u64) -> Result<Bench, String> {
        Ok(bench(&self.target()?, seed))
    }

    fn target(&self) -> Result<RingTarget, String> {
        let end = Instant::now() + PATIENCE;
        let opened = loop {
            match (self.open)() {
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => break other,
            }
        };
        let bottom = opened.map_err(|error| error.to_string())?;
        let mut builder = StackBuilder::new();
        let (root, _) =
            builder.backend("backend", bottom.limits()).map_err(|error| error.to_string())?;
        let stack = Arc::new(builder.finish(root));
        Ok(RingTarget { bottom, stack })
    }
}

fn bench(target: &RingTarget, seed: u64) -> Bench {
    Bench::new(Box::new(target.clone()), SPAN, &[], seed)
}

/// The engine over one backend.
#[derive(Clone)]
struct RingTarget {
    bottom: Bottom,
    stack: Arc<Stack>,
}

impl RingTarget {
    fn ring(&self, bytes: u32) -> Result<(BellRing, FileId)> {
        let lane = LaneMemory { depth: DEPTH, bytes, slots: false, locked: false };
        let mut ring =
            Uring::new(&Config { flights: FLIGHTS, files: 2, lanes: vec![lane], inner: 0 })?;
        let os = |error: io::Error| devsplice_core::Error::os("a descriptor's copy", &error);
        let file = match &self.bottom {
            Bottom::File { fd, kind, .. } => {
                let fd = fd.try_clone().map_err(os)?;
                ring.add_file(RingFile { fd, kind: *kind })?
            }
            Bottom::Bytes(bytes) => ring.add_bytes(Arc::clone(bytes))?,
        };
        // Never read, so it is always readable.
        let bell = eventfd(1, EventfdFlags::CLOEXEC).map_err(|errno| os(errno.into()))?;
        let bell = ring.add_file(RingFile { fd: bell, kind: FileKind::Other })?;
        Ok((BellRing { ring, bell }, file))
    }

    /// An engine's whole life, on the calling thread.
    fn live(&self, asks: &[Ask]) -> Result<Vec<Done>, String> {
        // At least a page, so that every tag has memory.
        let bytes = u32::try_from(memory_needed(asks).max(4096)).unwrap_or(u32::MAX);
        let (ring, file) = self.ring(bytes).map_err(|error| error.to_string())?;
        let stack = &self.stack;
        serve(Setup { ring, stack, files: vec![file], depth: DEPTH, flights: FLIGHTS }, asks)
    }
}

impl Target for RingTarget {
    fn limits(&self) -> Limits {
        *self.stack.limits()
    }

    fn run(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String> {
        let (this, own, (tell, told)) = (self.clone(), asks.to_vec(), mpsc::channel());
        let thread = std::thread::spawn(move || {
            // Nobody listens when it took too long.
            let _ = tell.send(this.live(&own));
        });
        match told.recv_timeout(LONGEST) {
            Ok(dones) => dones,
            Err(RecvTimeoutError::Timeout) => {
                let first = asks.first().map(Ask::to_string).unwrap_or_default();
                let count = asks.len();
                Err(format!("asked: {count} requests, the first {first}; not done in {LONGEST:?}"))
            }
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Ok(()) => Err("the thread ended without a word".into()),
                Err(panic) => std::panic::resume_unwind(panic),
            },
        }
    }
}

/// A ring, and something that is always ready on it.
struct BellRing {
    ring: Uring,
    bell: FileId,
}

impl Ring for BellRing {
    fn splice(&mut self, key: u32, splice: &Splice<'_>) {
        self.ring.splice(key, splice);
    }

    fn after(&mut self, key: u32, ns: u64) {
        self.ring.after(key, ns);
    }

    fn enter(&mut self, wait: bool) -> Result<()> {
        self.ring.enter(wait)
    }

    fn next(&mut self) -> Option<Event> {
        self.ring.next()
    }

    fn now_ns(&self) -> u64 {
        self.ring.now_ns()
    }

    fn wake(&mut self) -> Wake {
        self.ring.wake()
    }

    fn inner_pages(&self, lane: u16, tag: u16) -> Pages {
        self.ring.inner_pages(lane, tag)
    }

    fn put(&mut self, lane: u16, tag: u16, bytes: &[u8]) {
        self.ring.put(lane, tag, bytes);
    }

    fn get(&mut self, lane: u16, tag: u16, bytes: &mut [u8]) {
        self.ring.get(lane, tag, bytes);
    }

    fn counts(&self) -> RingCounts {
        self.ring.counts()
    }
}

impl Room for BellRing {
    fn summon(&mut self, lane: u16, tag: u16) {
        self.ring.poll((lane, u32::from(tag)), self.bell);
    }

    fn memory_of(&self, lane: u16, tag: u16) -> Pages {
        self.ring.memory_pages(lane, tag)
    }

    fn load(&mut self, lane: u16, tag: u16, bytes: &[u8]) {
        self.ring.memory(lane, tag)[Uring::DATA_AT..][..bytes.len()].copy_from_slice(bytes);
    }

    fn unload(&mut self, lane: u16, tag: u16, len: usize) -> Vec<u8> {
        self.ring.memory(lane, tag)[Uring::DATA_AT..][..len].to_vec()
    }
}

/// Everything that a backend promises.
#[must_use]
pub fn suite(subject: &Subject) -> Suite {
    let mut suite = Suite::default();
    // No power can be cut here: the first of the inner ones alone.
    for (name, promise) in PROMISES.iter().chain(&INNER[..1]) {
        add(&mut suite, subject, name, move |subject| promise(&mut subject.bench(1)?));
    }
    add(&mut suite, subject, "what_was_flushed_is_there_for_others", seen);
    add(&mut suite, subject, "a_backend_that_ends_early_is_an_error_and_no_success", ends_early);
    suite
}

fn add(
    suite: &mut Suite,
    subject: &Subject,
    name: &str,
    test: impl FnOnce(&Subject) -> Outcome + Send + 'static,
) {
    let subject = subject.clone();
    suite.cases.push(Case::new(name, move || {
        let probe = Config { flights: 1, files: 1, lanes: Vec::new(), inner: 0 };
        let _alone = subject.alone.lock().unwrap_or_else(PoisonError::into_inner);
        match Uring::new(&probe) {
            Ok(_) => test(&subject),
            Err(error) => Ok(Verdict::Skipped(format!("no ring here: {error}"))),
        }
    }));
}

/// Whoever opens the same file beside us finds what was written and flushed.
fn seen(subject: &Subject) -> Outcome {
    let Some(path) = &subject.seen_at else {
        return Ok(Verdict::NotMade("nobody else can see it".into()));
    };
    let mut bench = subject.bench(2)?;
    if !bench.offers(Op::Write) {
        return Ok(Verdict::NotMade("it is read-only".into()));
    }
    let other = std::fs::File::open(path).map_err(|error| format!("{path:?}: {error}"))?;
    for durable in [false, true] {
        bench.fill(LARGEST)?;
        let asks = if durable && bench.limits.fua {
            let writes: Vec<_> = bench.mix([0, 100, 0, 0], 64 << 10);
            writes.iter().map(|ask| bench.fua(ask.io.extent.at, ask.io.extent.len)).collect()
        } else {
            bench.mix([0, 80, 0, 10], 64 << 10)
        };
        bench.must(&asks)?;
        let flush = bench.ask(Op::Flush, 0, 0);
        bench.must(&[flush])?;
        let reads: Vec<_> =
            (0..bench.span).step_by(4096).map(|at| bench.ask(Op::Read, at, 4096)).collect();
        let read = |ask: &Ask| {
            let mut bytes = vec![0; 4096];
            let done = rustix::io::pread(other.as_fd(), &mut bytes, ask.io.extent.at);
            bytes.truncate(done.unwrap_or(0));
            Done { result: Ok(()), bytes }
        };
        let dones: Vec<_> = reads.iter().map(read).collect();
        let by_others = |how| format!("as others see it in {}: {how}", path.display());
        bench.model.batch(&reads, &dones).map_err(by_others)?;
    }
    Ok(Verdict::Kept)
}

/// The kernel's results are short at its end, then 0: the request fails, whatever was moved.
fn ends_early(subject: &Subject) -> Outcome {
    let target = subject.target()?;
    let mut bench = bench(&target, 3);
    let none = || Ok(Verdict::NotMade("only files that may be written are cut short".into()));
    let Bottom::File { fd, kind: FileKind::Regular, .. } = &target.bottom else { return none() };
    if !bench.offers(Op::Write) {
        return none();
    }
    let size = bench.limits.size;
    bench.fill(LARGEST)?;
    let end = bench.span / 2;
    let cut = |len| rustix::fs::ftruncate(&**fd, len).map_err(|error| error.to_string());
    cut(end)?;
    let block = bench.block();
    let asks = [
        (bench.ask(Op::Read, end - block, 2 * block), Err(Errno::EIO)),
        (bench.ask(Op::Read, end, block), Err(Errno::EIO)),
        (bench.ask(Op::Read, end - LARGEST, LARGEST), Ok(())),
        (bench.ask(Op::Read, end - LARGEST / 2, LARGEST), Err(Errno::EIO)),
    ];
    let only: Vec<_> = asks.iter().map(|(ask, _)| *ask).collect();
    let dones = bench.run(&only);
    cut(size)?;
    crate::bench::expect(&only, &dones?, |place| asks[place].1)?;
    Ok(Verdict::Kept)
}
