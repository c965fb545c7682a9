//! Answers for I/O threads: N queues on M threads, each thread with one ring, started together.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result, Stack};
use devsplice_engine::{Counts, Export, FileId, Lane, Served, Shared, Stuck, Worker};
use devsplice_uring::{Brief, Bytes, Config, FileKind, LaneMemory, Remote, RingFile, Uring};
use rustix::thread::{CpuSet, sched_setaffinity};

pub use crate::pool::Pool;
use crate::pool::{Make, Member};

/// A bottom of the stack, open.
pub enum Bottom {
    /// What the kernel moves pages to and from.
    File {
        /// The file or device.
        fd: OwnedFd,
        /// What it is.
        kind: FileKind,
    },
    /// What helper threads read and write: requests need memory of ours.
    Bytes(Arc<dyn Bytes>),
    /// A server's, over a connection of each ring.
    Remote(Arc<dyn Remote>),
}

impl Bottom {
    /// Whether requests to it need memory of ours.
    #[must_use]
    pub fn needs_memory(&self) -> bool {
        matches!(self, Bottom::Bytes(_))
    }

    /// Gives a ring its own hold of it; what the ring calls it.
    ///
    /// # Errors
    /// If there is no further descriptor, or the ring has no room.
    pub(crate) fn add_to(&self, ring: &mut Uring) -> Result<FileId> {
        match self {
            Bottom::File { fd, kind } => {
                let fd = fd.try_clone().map_err(|error| Error::os("a file's copy", &error))?;
                ring.add_file(RingFile { fd, kind: *kind })
            }
            Bottom::Bytes(bytes) => ring.add_bytes(Arc::clone(bytes)),
            Bottom::Remote(remote) => ring.add_remote(remote),
        }
    }

    /// The server, if it is one's.
    fn remote(&self) -> Option<Arc<dyn Remote>> {
        match self {
            Bottom::File { .. } | Bottom::Bytes(_) => None,
            Bottom::Remote(remote) => Some(Arc::clone(remote)),
        }
    }

    /// How many rings it can be given to.
    #[must_use]
    pub fn most_rings(&self) -> u16 {
        match self {
            Bottom::File { .. } | Bottom::Bytes(_) => u16::MAX,
            Bottom::Remote(remote) => remote.most_lines(),
        }
    }
}

/// How a device's queues are served.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Queues of the device.
    pub queues: u16,
    /// Threads that serve them; more than queues only where threads can share one.
    pub threads: u16,
    /// Whether every thread serves every queue, each some of its requests; there may be more of
    /// them then.
    pub is_shared: bool,
    /// Whether the rings have entries of 128 bytes.
    pub is_wide: bool,
    /// What each queue's requests need.
    pub memory: LaneMemory,
    /// Seconds after which a request is reported as stuck; 0 for never.
    pub stuck_seconds: u32,
    /// Whether rings are for requests that come one at a time.
    pub low_depth: bool,
}

/// Makes the export of one queue: its number, the ring it lives on.
pub type MakeQueue = dyn Fn(u16, &mut Uring) -> Result<Box<dyn Export<Uring>>> + Send + Sync;

/// What a queue's thread is told about its place: the CPUs of queue `n`, or none to run anywhere.
pub type CpusOf = dyn Fn(u16) -> Option<CpuSet> + Send + Sync;

/// What a device serves, and who is told how that goes on its I/O threads.
pub struct Service {
    /// Decides where data goes.
    pub stack: Arc<Stack>,
    /// The stack's bottoms, in their order.
    pub bottoms: Vec<Bottom>,
    /// Threads that it shares with other devices; `None` for threads of its own.
    pub pool: Option<Arc<Pool>>,
    /// Told about requests that are stuck below.
    pub on_stuck: OnStuck,
    /// Told what live layers report.
    pub on_event: OnEvent,
    /// Told when a thread cannot go on; the device is lost then, and this should end the process.
    pub on_death: fn(Error),
}

impl Service {
    /// Refuses zones, for a front end whose writes would go past what keeps those in order.
    pub(crate) fn refuse_zones(&self, what: &str) -> Result<()> {
        if self.stack.zones().is_none() {
            return Ok(());
        }
        let reason = format!("{what} has none");
        Err(Error::new(ErrorKind::Unsupported, "zones", reason).next("--export ublk"))
    }
}

/// Told about a request that is stuck below. Called on an I/O thread, so it must not block.
pub type OnStuck = Arc<dyn Fn(&Stuck) + Send + Sync>;

/// Told what a live layer, or what serves clients, has to report; likewise.
pub type OnEvent = Arc<dyn Fn(&str) + Send + Sync>;

/// Told the number of what was made in the kernel, as soon as somebody would have to clear it up
/// after us: a ublk device's, or a FUSE connection's.
pub type OnMade<'a> = &'a mut dyn FnMut(u32);

/// What an I/O thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// One device: it has all that it needs when it is settled.
    Alone,
    /// The devices of a pool, as they come: it makes rings for them later.
    InPool,
}

/// What each I/O thread does when it has all that it needs, before it serves.
static SETTLED: OnceLock<fn(Place)> = OnceLock::new();

/// Has every I/O thread of this process do something when it has all that it needs. Only the first
/// call counts.
pub fn on_settled(hook: fn(Place)) {
    let _ = SETTLED.set(hook);
}

pub(crate) fn settled(place: Place) {
    if let Some(hook) = SETTLED.get() {
        hook(place);
    }
}

/// What the threads need, shared between them.
pub struct Work {
    /// What they serve.
    pub service: Service,
    /// Makes each queue.
    pub make: Box<MakeQueue>,
    /// Where each queue's thread runs.
    pub cpus: Box<CpusOf>,
}

/// Waits for what is in flight below, which takes as long as it takes, and says so now and then.
pub(crate) struct Patience {
    every: Duration,
    begin: Instant,
    told: u32,
}

impl Patience {
    pub(crate) fn new(every: Duration) -> Patience {
        Patience { every, begin: Instant::now(), told: 0 }
    }

    /// What there is to say, each time that it has ended.
    pub(crate) fn ended(&mut self) -> Option<String> {
        let waited = self.begin.elapsed();
        if waited < self.every * (self.told + 1) {
            return None;
        }
        self.told += 1;
        let seconds = waited.as_secs();
        Some(format!("what is in flight below has not come back in {seconds} s: still waiting"))
    }
}

/// What a device's workers wait at when they have all that they need: none serves before all can.
/// Half of them would acknowledge writes of a disk that its caller is told is not served.
#[derive(Default)]
pub(crate) struct Gate {
    /// Whether they may serve; `None` while that is not known.
    opened: Mutex<Option<bool>>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Option<bool>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, opened: bool) {
        *self.lock() = Some(opened);
        self.changed.notify_all();
    }

    /// Waits until it is known whether to serve.
    fn wait(&self) -> bool {
        let mut inner = self.lock();
        loop {
            match *inner {
                Some(opened) => return opened,
                None => inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Whether to serve, for who has others to serve meanwhile.
    pub(crate) fn look(&self) -> Option<bool> {
        *self.lock()
    }
}

/// How many of a device's workers have not ended, and what follows when none has.
#[derive(Default)]
struct End(Mutex<(usize, Option<Then>)>);

type Then = Box<dyn FnOnce() + Send>;

impl End {
    fn lock(&self) -> MutexGuard<'_, (usize, Option<Then>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more that has not ended, until what is returned is dropped.
    fn one_more(self: &Arc<End>) -> Unended {
        self.lock().0 += 1;
        Unended(Arc::clone(self))
    }

    fn one_less(&self) {
        let mut inner = self.lock();
        inner.0 -= 1;
        let then = if inner.0 == 0 { inner.1.take() } else { None };
        drop(inner);
        if let Some(then) = then {
            then();
        }
    }

    fn is_over(&self) -> bool {
        self.lock().0 == 0
    }

    /// Has `then` done at the end, at once if that has been.
    fn then(&self, then: Then) {
        let mut inner = self.lock();
        if inner.0 > 0 {
            inner.1 = Some(then);
            return;
        }
        drop(inner);
        then();
    }
}

/// A worker that has not ended.
pub(crate) struct Unended(Arc<End>);

impl Drop for Unended {
    fn drop(&mut self) {
        self.0.one_less();
    }
}

/// Running I/O threads, or a device's share in them.
pub struct Crew {
    /// The stack, as its threads share it.
    pub served: Arc<Served>,
    /// Threads of its own; none in a pool.
    handles: Vec<JoinHandle<()>>,
    shared: Vec<Arc<Shared>>,
    end: Arc<End>,
    /// Whether its rings are for requests that come one at a time.
    pub is_low_depth: bool,
    /// What is not as it should be, though the threads run.
    pub warnings: Vec<String>,
    /// The servers below.
    pub remotes: Vec<Arc<dyn Remote>>,
}

impl Crew {
    /// Starts the threads and returns when every queue has asked for its first requests.
    ///
    /// # Errors
    /// The first thing that any thread could not do. None has served a request then, and all have
    /// ended and let go of what they had.
    pub fn start(mut shape: Shape, work: Work) -> Result<Crew> {
        if let Some(pool) = work.service.pool.as_ref().filter(|_| !shape.is_shared) {
            // More would be turned by the same threads.
            shape.threads = shape.threads.min(u16::try_from(pool.thread_count()).unwrap_or(1));
        }
        let rings = work.service.bottoms.iter().map(Bottom::most_rings).min();
        shape.threads = shape.threads.min(rings.unwrap_or(u16::MAX)).max(1);
        let on_event = Arc::clone(&work.service.on_event);
        let on_event = Box::new(move |text: &str| on_event(text));
        let served = Served::new(work.service.stack.clone(), on_event);
        let remotes: Vec<_> = work.service.bottoms.iter().filter_map(Bottom::remote).collect();
        for remote in &remotes {
            // The server's thread may be the last that knows of it.
            let served = Arc::downgrade(&served);
            remote.listen(Box::new(move |text| {
                if let Some(served) = served.upgrade() {
                    served.event(text.to_owned());
                }
            }));
        }
        let pool = work.service.pool.clone();
        let mut crew = Crew {
            served,
            handles: Vec::new(),
            shared: Vec::new(),
            end: Arc::default(),
            is_low_depth: shape.low_depth,
            warnings: pool.iter().filter_map(|pool| pool.warning()).collect(),
            remotes,
        };
        let gate = Arc::default();
        let mustered = crew.muster(&shape, &Arc::new(work), &gate);
        gate.open(mustered.is_ok());
        if let Some(pool) = pool {
            pool.look_at_gates();
        }
        match mustered {
            Ok(()) => {
                crew.warnings.dedup();
                Ok(crew)
            }
            Err(error) => {
                crew.join();
                Err(error)
            }
        }
    }

    /// Has every worker made; each waits at the gate then.
    fn muster(&mut self, shape: &Shape, work: &Arc<Work>, gate: &Arc<Gate>) -> Result<()> {
        let (ready, news) = mpsc::channel();
        // A queue's first thread is ready before others come to share it.
        for thread in 0..shape.threads {
            if thread == shape.queues && !shape.is_shared {
                self.wait(&news, thread)?;
            }
            let shared = Arc::new(Shared::default());
            self.shared.push(Arc::clone(&shared));
            let part = Part {
                shape: *shape,
                work: Arc::clone(work),
                served: Arc::clone(&self.served),
                queues: queues_of(thread, shape),
                shared,
                ready: ready.clone(),
                gate: Arc::clone(gate),
            };
            let unended = self.end.one_more();
            match &work.service.pool {
                Some(pool) => pool.take(part.in_pool(unended)),
                None => self.handles.push(part.on_thread(thread, unended)?),
            }
        }
        drop(ready);
        let was_waited = shape.threads > shape.queues && !shape.is_shared;
        let waited = if was_waited { shape.queues } else { 0 };
        self.wait(&news, shape.threads - waited)
    }

    /// Waits until `count` more threads are ready.
    fn wait(&mut self, news: &mpsc::Receiver<Result<Option<String>>>, count: u16) -> Result<()> {
        for _ in 0..count {
            match news.recv() {
                Ok(warning) => self.warnings.extend(warning?),
                Err(_) => {
                    return Err(Error::new(ErrorKind::Os, "I/O thread", "ended at its start"));
                }
            }
        }
        Ok(())
    }

    /// The counters of all threads together.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.iter().fold(Counts::default(), |sum, shared| sum.plus(&shared.read()))
    }

    /// How many threads serve it.
    #[must_use]
    pub fn thread_count(&self) -> usize {
        self.shared.len()
    }

    /// Does something in another thread when the last I/O thread has ended, or no thread of a pool
    /// serves it any more; at once if that is so. Only what was given last is done.
    pub fn at_end(&self, then: Box<dyn FnOnce() + Send>) {
        self.end.then(then);
    }

    /// Something to wait on in another thread: it fails to receive when the last I/O thread has
    /// ended.
    #[must_use]
    pub fn take_end(&self) -> Option<mpsc::Receiver<()>> {
        let (alive, end) = mpsc::channel();
        self.at_end(Box::new(move || drop(alive)));
        Some(end)
    }

    /// Whether every thread has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.end.is_over() && self.handles.iter().all(JoinHandle::is_finished)
    }

    /// Waits until every queue is closed and every request finished.
    pub fn join(self) -> Counts {
        if let Some(end) = self.take_end() {
            let _ = end.recv();
        }
        for handle in self.handles {
            // A thread that panicked has taken the process with it; see `on_death`.
            let _ = handle.join();
        }
        self.shared.iter().fold(Counts::default(), |sum, shared| sum.plus(&shared.read()))
    }
}

/// The queues that a thread serves. Where there are more threads than queues, they share them.
fn queues_of(thread: u16, shape: &Shape) -> Vec<u16> {
    if shape.is_shared {
        (0..shape.queues).collect()
    } else if thread < shape.queues {
        (thread..shape.queues).step_by(usize::from(shape.threads.max(1))).collect()
    } else {
        vec![thread % shape.queues.max(1)]
    }
}

/// What one worker of a device needs.
struct Part {
    shape: Shape,
    work: Arc<Work>,
    served: Arc<Served>,
    queues: Vec<u16>,
    shared: Arc<Shared>,
    ready: mpsc::Sender<Result<Option<String>>>,
    gate: Arc<Gate>,
}

impl Part {
    /// Starts a thread for it alone.
    fn on_thread(self, number: u16, unended: Unended) -> Result<JoinHandle<()>> {
        let name = format!("io/{number}");
        let thread = std::thread::Builder::new().name(name).stack_size(256 << 10);
        let started = thread.spawn(move || {
            self.serve();
            drop(unended);
        });
        started.map_err(|error| Error::os("I/O thread", &error))
    }

    /// An I/O thread from start to end.
    fn serve(self) {
        let mut warning = None;
        if let Err(error) = devsplice_uring::thread::set_io_flusher() {
            warning = Some(error.to_string());
        }
        if let Some(cpus) = self.queues.first().and_then(|queue| (self.work.cpus)(*queue)) {
            // Where the CPUs are not ours to use, running anywhere is the next best.
            let _ = sched_setaffinity(None, &cpus);
        }
        let (mut worker, _) = match self.prepare() {
            Ok(worker) => worker,
            Err(error) => {
                let _ = self.ready.send(Err(error));
                return;
            }
        };
        settled(Place::Alone);
        let on_death = self.work.service.on_death;
        let _ = self.ready.send(Ok(warning));
        let may_serve = self.gate.wait();
        drop(self);
        if !may_serve {
            return;
        }
        if let Err(error) = worker.run() {
            on_death(error);
        }
    }

    /// Makes a worker for a thread that has others.
    fn in_pool(self, unended: Unended) -> Make {
        Box::new(move || {
            let (on_death, ready) = (self.work.service.on_death, self.ready.clone());
            let gate = Some(Arc::clone(&self.gate));
            let made = self.prepare();
            // Who waits for the end relies on it that what is below has been let go of.
            drop(self);
            let error = match made {
                Ok((worker, Some(brief))) => {
                    let _ = ready.send(Ok(None));
                    return Some(Member { worker, brief, unended, gate, on_death });
                }
                Ok((_, None)) => Error::invalid("I/O thread", "is in no pool"),
                Err(error) => error,
            };
            let _ = ready.send(Err(error));
            None
        })
    }

    /// The worker; in a pool also what is known of its ring.
    fn prepare(&self) -> Result<(Worker<Uring>, Option<Brief>)> {
        let Part { shape, work, served, queues, shared, .. } = self;
        let lanes = vec![shape.memory; queues.len()];
        let tags = u32::from(shape.memory.depth) * u32::try_from(queues.len()).unwrap_or(1);
        let flights = (tags * 2).clamp(64, 4096);
        let Service { bottoms: opened, on_stuck, pool, .. } = &work.service;
        // A queue may have a file beside its device's.
        let files = opened.len() + 2 * queues.len();
        let files = u16::try_from(files)
            .map_err(|_| Error::invalid("stack", format!("{files} files in one ring")))?;
        let inner = u16::try_from(served.stack.live_levels()).unwrap_or(0);
        let make = match (shape.is_wide, shape.low_depth, pool) {
            (true, ..) => Uring::wide,
            (false, true, _) => Uring::for_low_depth,
            (false, false, Some(_)) => Uring::for_pool,
            (false, false, None) => Uring::new,
        };
        let mut ring = make(&Config { flights, files, lanes, inner })?;
        let brief = pool.as_ref().map(|_| ring.be_brief()).transpose()?;
        let mut bottoms = Vec::new();
        for bottom in opened {
            bottoms.push(bottom.add_to(&mut ring)?);
        }
        let mut lanes = Vec::new();
        for queue in queues {
            let export = (work.make)(*queue, &mut ring)?;
            lanes.push(Lane::new(export, Arc::clone(served), bottoms.clone().into()));
        }
        let (on_stuck, noted) = (Arc::clone(on_stuck), Arc::clone(served));
        let on_stuck = move |stuck: &Stuck| {
            on_stuck(stuck);
            noted.stuck(stuck);
        };
        let watch = (shape.stuck_seconds, Box::new(on_stuck) as Box<dyn Fn(&Stuck) + Send>);
        let mut worker = Worker::new(ring, lanes, flights, Arc::clone(shared), watch);
        worker.arm()?;
        Ok((worker, brief))
    }
}

#[cfg(test)]
mod tests;
