//! Answers for a block device without ublk: one file of a FUSE mount that nobody else can reach,
//! and a loop device with direct I/O over it.
//!
//! The mount is attached to no path and lives by the loop device's reference alone: when the loop
//! device goes, the connection closes, and the I/O threads end. What waits for I/O that this
//! process serves runs apart (`devsplice_uring::thread::apart`) and is given up after a bounded
//! time.

mod connection;
mod entries;
mod keep;
mod loopdev;
pub mod node;
mod serve;
pub mod wire;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use devsplice_core::limits::SECTOR;
use devsplice_core::{Error, ErrorKind, Limits, Result};
use devsplice_engine::Counts;
use devsplice_uring::{FileKind, FusePayload, LaneMemory, RingFile, loopctl, thread::apart};

use crate::threads::{Bottom, Crew, OnMade, Service, Shape, Work};
use connection::{DEV_FUSE, Mount};
pub use connection::{can_look, is_of};
use keep::{Keep, Lasting, new_stop};
pub use keep::{Kept, Suspended};
use loopdev::{Cleared, LOOP_CONTROL, PREFIX, Wanted};
use node::{MAX_WRITE, Node, Wish};
use serve::Queue;
use wire::init;

/// How long the kernel may take to attach the device: a scan for partitions reads from it.
const ATTACH_LIMIT: Duration = Duration::from_secs(60);
/// How long a detach may flush.
const FLUSH_LIMIT: Duration = Duration::from_secs(120);
/// The same when it is forced.
const FORCED_FLUSH_LIMIT: Duration = Duration::from_secs(10);
/// How long the threads may take to end once the loop device is gone, or the connection cut.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How long a loop device may take to open that nobody serves any more.
const SCAN_PATIENCE: Duration = Duration::from_secs(1);
/// How long looking at the device may take.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// How requests come, and their data. Best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPath {
    /// By io_uring, with the request's pages in a slot (7.3). No copy.
    ZeroCopy,
    /// By io_uring, with the data in memory of ours (6.14). One copy.
    Entries,
    /// From /dev/fuse. One copy.
    Copy,
}

impl DataPath {
    /// All of them, best first.
    pub const ALL: [DataPath; 3] = [DataPath::ZeroCopy, DataPath::Entries, DataPath::Copy];

    /// The word that users see and type.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            DataPath::ZeroCopy => "fuse-zero-copy",
            DataPath::Entries => "fuse-uring",
            DataPath::Copy => "fuse-copy",
        }
    }

    /// Copies of each payload byte that this process has a part in.
    #[must_use]
    pub const fn copies(self) -> u32 {
        match self {
            DataPath::ZeroCopy => 0,
            DataPath::Entries | DataPath::Copy => 1,
        }
    }

    const fn wish(self) -> Wish {
        match self {
            DataPath::ZeroCopy => Wish::Slots,
            DataPath::Entries => Wish::Entries,
            DataPath::Copy => Wish::Read,
        }
    }
}

/// The data paths that this kernel has, found by asking for each on a connection of its own.
#[must_use]
pub fn offered() -> Vec<DataPath> {
    let limits = Limits::ideal(4096);
    let has = |path: &DataPath| connect(*path, ("devsplice-probe", 1), &limits, false).is_ok();
    DataPath::ALL.into_iter().filter(has).collect()
}

/// The data path that a disk gets unasked. What comes by io_uring goes with its server, and copying
/// by it is not worth that; without a copy, see [`CAUTION`].
pub const BEST: DataPath = DataPath::Copy;

/// What whoever asks for [`DataPath::ZeroCopy`] has to know. The kernel takes a reference to each
/// page of a request and drops it at the commit (fs/fuse/dev_uring.c, `fuse_zero_copy_release`).
/// Slab memory, from which XFS takes some of its metadata and its log, has no references to count
/// since Linux 6.15: the first one dropped frees the page under its owner.
pub const CAUTION: &str = "fuse-zero-copy: Linux 7.3 frees memory of file systems that write from \
                           slab memory (XFS does), and crashes; not for these";

/// What device to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name: the loop device is then "devsplice:NAME".
    pub name: String,
    /// How requests come; `None` for the best that the kernel and the stack allow.
    pub data_path: Option<DataPath>,
    /// Queues, each a clone of /dev/fuse. (By io_uring there is one for each possible CPU.)
    pub queues: u16,
    /// Threads that serve them; 0 for as many as seem good.
    pub threads: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the kernel looks for partitions.
    pub part_scan: bool,
    /// Seconds after which a request is reported as stuck; 0 for never.
    pub stuck_seconds: u32,
    /// The lock that whoever serves the disk has, if the disk is to outlive its server.
    pub keep: Option<Arc<OwnedFd>>,
    /// Whether it must be possible that it does.
    pub must_keep: bool,
}

/// Whether devices can be made here.
///
/// # Errors
/// Names what is missing, and what to do about it.
pub fn available() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        let reason = "only root can attach a loop device";
        return Err(Error::new(ErrorKind::Permission, LOOP_CONTROL, reason).next("run as root"));
    }
    loopdev::open_control()?;
    connection::open_fuse().map(drop)
}

/// An attached device.
pub struct Device {
    path: String,
    name: String,
    /// The connection's number.
    number: u32,
    data_path: DataPath,
    crew: Crew,
    told: String,
    keep: Option<Keep>,
}

impl Device {
    /// Makes the device; it takes requests on return. `on_made` is told the connection's number.
    ///
    /// # Errors
    /// If anything is missing or refused; nothing is left behind then.
    pub fn attach(options: &Options, service: Service, on_made: OnMade<'_>) -> Result<Device> {
        available()?;
        check_name(&options.name)?;
        service.refuse_zones("a disk over FUSE")?;
        let limits = *service.stack.limits();
        let read_only = options.read_only || limits.read_only;
        let wanted = Wanted {
            name: options.name.clone(),
            block: limits.block,
            read_only,
            part_scan: options.part_scan,
            rotational: limits.rotational,
        };
        let name = format!("{PREFIX}{}", options.name);
        let made = choose(options, &service, read_only)?;
        let data_path = made.path;
        let shape = shape(options, (data_path, options.queues.max(1)))?;
        let (lasting, kept) = made.lasting(options)?;
        let told = made.node.told();
        let Made { mount: Mount { fd, queues, number }, node, .. } = made;
        let make = match data_path {
            DataPath::Copy => make_queue(node, queues, shape.memory.depth, lasting.clone()),
            path => make_entries(node, queues, shape.memory.depth, path),
        };
        let work = Work { service, make, cpus: Box::new(|_| None) };
        on_made(number);
        // From here on, whatever fails: without the mount the connection closes, and the threads
        // end.
        let mut crew = Crew::start(shape, work)?;
        let stable = limits.stable_writes && data_path.copies() == 0;
        let attach = move |mount: Option<OwnedFd>| match mount {
            Some(mount) => {
                let path = loopdev::attach(&mount, &wanted)?;
                let kept = if stable { loopdev::keep_pages_stable(&path, true) } else { Ok(()) };
                Ok((path, kept.err().map(|error| format!("{error}; legs may come to differ"))))
            }
            None => Err(Error::new(ErrorKind::Os, "the device's mount", "lost")),
        };
        match bounded("attaching", Some(&fd), ATTACH_LIMIT, attach) {
            Ok((path, warning)) => {
                crew.warnings.extend(warning);
                if data_path == DataPath::ZeroCopy {
                    crew.warnings.push(CAUTION.to_owned());
                }
                let keep = lasting.map(|Lasting { stop, .. }| Keep {
                    kept: Kept { fuse: kept, number, told: told.clone(), path: path.clone() },
                    options: options.clone(),
                    stop,
                });
                Ok(Device { path, name, number, data_path, crew, told, keep })
            }
            Err(error) => {
                // What hangs for want of an answer gets one now.
                let _ = connection::abort(number);
                drop(fd);
                wait_until(END_LIMIT, || crew.is_over());
                Err(error)
            }
        }
    }

    /// Where the device is.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How its requests come.
    #[must_use]
    pub fn data_path(&self) -> DataPath {
        self.data_path
    }

    /// The threads that serve it.
    #[must_use]
    pub fn crew(&self) -> &Crew {
        &self.crew
    }

    /// Flushes the device and takes it away. Where it is held, that is an error, and it goes on as
    /// before; it can be tried again. With `force` nothing is flushed (whoever wants that has done
    /// it, see `host::sync`), requests fail from now on, and the loop device goes when its last
    /// user lets go.
    ///
    /// # Errors
    /// If it is in use, or cannot be flushed, or the threads do not end.
    pub fn detach(&self, force: bool) -> Result<Counts> {
        let (path, name) = (self.path.clone(), self.name.clone());
        let clear = move |_| loopdev::clear(&path, &name, force);
        let limit = if force { FORCED_FLUSH_LIMIT } else { FLUSH_LIMIT };
        let cleared = bounded("detaching", None, limit, clear);
        if !force {
            // Where it is not ours any more, somebody else has taken the file away already.
            let (Cleared::Yes | Cleared::NotOurs) = cleared?;
        }
        if wait_until(LOOK_LIMIT, || self.crew.is_over()) {
            return Ok(self.crew.counts());
        }
        if !force {
            let reason = match loopdev::holders(&self.path) {
                all if all.is_empty() => "still in use; it goes when its last user lets go".into(),
                all => format!("still open in {}; it goes when they close it", all.join(", ")),
            };
            return Err(Error::new(ErrorKind::Busy, self.path.clone(), reason)
                .next("end them and wait, or detach with --force"));
        }
        let number = self.number;
        bounded("cutting the connection", None, LOOK_LIMIT, move |_| connection::abort(number))?;
        if wait_until(END_LIMIT, || self.crew.is_over()) {
            return Ok(self.crew.counts());
        }
        let reason = format!("I/O below has not come back in {} s", END_LIMIT.as_secs());
        Err(Error::new(ErrorKind::Busy, self.path.clone(), reason)
            .next("see dmesg for the device below; ending this process gives the rest back"))
    }
}

/// Gives the loop device at `path` back whose server is gone: for a guard, another process, that
/// cleans up after it. Whether it was the one of device `name`; any other is left alone.
///
/// The connection is cut first: a dying process may still wait for I/O that it served itself, and
/// as long as it does, its memory keeps its rings, and these keep the connection.
///
/// # Errors
/// If it cannot be given back.
pub fn clear_loop(path: &str, name: &str) -> Result<bool> {
    let (path, name) = (path.to_owned(), format!("{PREFIX}{name}"));
    bounded("clearing a loop device", None, FORCED_FLUSH_LIMIT, move |_| {
        loopdev::clear_dead(&path, &name)
    })
}

/// As [`clear_loop`], for a server that died before it knew its loop device: the kernel may still
/// be looking for partitions on it. Until it is done nobody can open the device to see whose it is,
/// and it waits for a server that is gone; so then the connection that the server named is cut.
///
/// # Errors
/// If it cannot be given back.
pub fn clear_unknown(name: &str, number: u32) -> Result<bool> {
    for path in loopdev::over(name) {
        let ours = format!("{PREFIX}{name}");
        let look = path.clone();
        let first = bounded("clearing a loop device", None, SCAN_PATIENCE, move |_| {
            loopdev::clear_dead(&look, &ours)
        });
        if first.is_err() {
            bounded("cutting the connection", None, LOOK_LIMIT, move |_| {
                connection::abort(number)
            })?;
        }
        if first.is_ok_and(|was_ours| was_ours) || clear_loop(&path, name)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Loop devices that were made for devices of ours, whoever serves them now: path, and name of the
/// device. Empty where looking at them takes too long: one waits for a server that is gone.
#[must_use]
pub fn loop_devices() -> Vec<(String, String)> {
    let all = bounded("looking at loop devices", None, LOOK_LIMIT, |_| Ok(loopdev::all_ours()));
    all.unwrap_or_default()
}

/// Whether a process serves the loop device at `path`, of a device called `name`. It counts as
/// served where that cannot be found out.
#[must_use]
pub fn is_served(path: &str, name: &str) -> bool {
    keepers(path, name).is_none_or(|all| !all.is_empty())
}

/// The processes that have the connection of the loop device at `path`, of a device called `name`,
/// each with a descriptor of it there: they serve it, or keep it for who does. `None` where that
/// cannot be found out.
#[must_use]
pub fn keepers(path: &str, name: &str) -> Option<Vec<(u32, i32)>> {
    let (path, name) = (path.to_owned(), format!("{PREFIX}{name}"));
    let look = move |_| loopdev::keepers(&path, &name);
    bounded("looking at a loop device", None, LOOK_LIMIT, look).ok()
}

/// A connection that has shaken hands.
struct Made {
    mount: Mount,
    node: Arc<Node>,
    path: DataPath,
    /// What the kernel offered.
    offered: u64,
}

impl Made {
    /// What makes the disk outlive its server, and the descriptors that somebody has to keep; where
    /// that is wanted, and possible.
    fn lasting(&self, options: &Options) -> Result<(Option<Lasting>, Vec<OwnedFd>)> {
        let Some(lock) = options.keep.clone() else { return Ok((None, Vec::new())) };
        let can = self.path == DataPath::Copy && self.offered & init::HAS_RESEND != 0;
        if !can {
            let reason = match self.path {
                DataPath::Copy => {
                    "this kernel's FUSE does not send requests again (Linux 6.9 does)"
                }
                _ => "requests that come by io_uring are not sent again",
            };
            if options.must_keep {
                return Err(Error::new(ErrorKind::Unsupported, "--recovery", reason)
                    .next("--recovery off, or --data-path fuse-copy on a newer kernel"));
            }
            return Ok((None, Vec::new()));
        }
        let clone = |fd: &OwnedFd| fd.try_clone().map_err(|error| Error::os(DEV_FUSE, &error));
        let kept = self.mount.queues.iter().map(clone).collect::<Result<_>>()?;
        Ok((Some(Lasting { stop: new_stop()?, lock }), kept))
    }
}

/// A connection of the best data path, or of the one that is asked for.
fn choose(options: &Options, service: &Service, read_only: bool) -> Result<Made> {
    let (limits, name) = (service.stack.limits(), (options.name.as_str(), options.queues.max(1)));
    let needs_memory = service.bottoms.iter().any(Bottom::needs_memory);
    if let Some(path) = options.data_path {
        if path == DataPath::ZeroCopy {
            takes_any_pages(limits, needs_memory)?;
        }
        return connect(path, name, limits, read_only);
    }
    connect(BEST, name, limits, read_only)
}

/// Whether the stack can do with whatever pages the users of a loop device come with.
fn takes_any_pages(limits: &Limits, needs_memory: bool) -> Result<()> {
    let reason = |reason: &str| {
        let thing = format!("data path {}", DataPath::ZeroCopy.name());
        Err(Error::new(ErrorKind::Unsupported, thing, reason)
            .next(format!("--data-path {}", DataPath::Copy.name())))
    };
    let dma = limits.dma;
    if needs_memory {
        return reason("a backend of the stack needs the data in memory of ours");
    }
    // A loop device lets pages begin at any sector, and cannot be told not to.
    if dma.align > SECTOR || dma.virt_boundary != 0 && limits.block > SECTOR {
        return reason("what is below does not take memory that begins at any sector");
    }
    Ok(())
}

fn connect(
    path: DataPath,
    (name, queues): (&str, u16),
    limits: &Limits,
    read_only: bool,
) -> Result<Made> {
    let queues = if path == DataPath::Copy { queues } else { 1 };
    let mount = connection::mount(&format!("{PREFIX}{name}"), queues, read_only)?;
    let node = Node::new(name, limits, read_only).wishing(path.wish());
    let offered = connection::greet(&mount.queues[0], &node)?;
    if path != DataPath::Copy && offered & init::OVER_IO_URING == 0 {
        let reason = "this kernel does not offer requests by io_uring (Linux 6.14 does)";
        return Err(Error::new(ErrorKind::Unsupported, "FUSE", reason)
            .next("echo 1 > /sys/module/fuse/parameters/enable_uring, where there is that file"));
    }
    if path == DataPath::ZeroCopy {
        connection::add_queues(&mount.queues[0], connection::possible_cpus()?)?;
    }
    Ok(Made { mount, node: Arc::new(node), path, offered })
}

/// Threads that serve the queues of io_uring unasked.
const THREADS: u16 = 4;
/// Most entries of all queues together: what a queue cannot take at once waits in the kernel.
const MOST_ENTRIES: u16 = 4096;

fn shape(options: &Options, (path, queues): (DataPath, u16)) -> Result<Shape> {
    let is_wide = path != DataPath::Copy;
    let queues = if is_wide { connection::possible_cpus()? } else { queues };
    let threads = match options.threads {
        0 if is_wide => std::thread::available_parallelism()
            .map_or(1, |cpus| u16::try_from(cpus.get()).unwrap_or(THREADS))
            .min(THREADS),
        0 => queues,
        asked => asked,
    };
    // A pool is of one entry less than there are.
    let (least, most) = if is_wide { (2, MOST_ENTRIES / queues) } else { (1, u16::MAX) };
    let depth = options.depth.min(most).max(least);
    let slots = path == DataPath::ZeroCopy;
    let memory = LaneMemory { depth, bytes: MAX_WRITE, slots, locked: false };
    let (threads, stuck_seconds) = (threads.min(queues), options.stuck_seconds);
    Ok(Shape {
        queues,
        threads,
        is_shared: false,
        is_wide,
        low_depth: false,
        memory,
        stuck_seconds,
    })
}

fn make_entries(
    node: Arc<Node>,
    fuse: Vec<OwnedFd>,
    depth: u16,
    path: DataPath,
) -> Box<crate::threads::MakeQueue> {
    let payload = if path == DataPath::ZeroCopy { FusePayload::Pool } else { FusePayload::Own };
    Box::new(move |queue, ring| {
        let lost = || Error::new(ErrorKind::Os, DEV_FUSE, "lost");
        let fd = fuse.first().ok_or_else(lost)?;
        let fd = fd.try_clone().map_err(|error| Error::os(DEV_FUSE, &error))?;
        let file = ring.add_file(RingFile { fd, kind: FileKind::Other })?;
        Ok(Box::new(entries::Queue::new(Arc::clone(&node), (file, queue), depth, payload)))
    })
}

fn make_queue(
    node: Arc<Node>,
    queues: Vec<OwnedFd>,
    depth: u16,
    lasting: Option<Lasting>,
) -> Box<crate::threads::MakeQueue> {
    Box::new(move |queue, ring| {
        let lost = || Error::new(ErrorKind::Os, DEV_FUSE, format!("no queue {queue}"));
        let fd = queues.get(usize::from(queue)).ok_or_else(lost)?;
        let fd = fd.try_clone().map_err(|error| Error::os(DEV_FUSE, &error))?;
        let file = ring.add_file(RingFile { fd, kind: FileKind::Other })?;
        if let Some(Lasting { lock, .. }) = &lasting {
            let fd = lock.try_clone().map_err(|error| Error::os("the disk's lock", &error))?;
            ring.add_file(RingFile { fd, kind: FileKind::Other })?;
        }
        let stop = lasting.as_ref().map(|lasting| Arc::clone(&lasting.stop));
        Ok(Box::new(Queue::new(Arc::clone(&node), file, depth, stop)))
    })
}

fn check_name(name: &str) -> Result<()> {
    let most = loopctl::NAME_LEN - 1 - PREFIX.len();
    let is_plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    if name.is_empty() || name == "." || name == ".." || name.len() > most {
        return Err(Error::invalid("name", format!("`{name}` is not of 1 to {most} characters")));
    }
    if !name.bytes().all(is_plain) {
        return Err(Error::invalid("name", format!("`{name}` has a character that none may have"))
            .next("use letters, digits, `-`, `_` and `.`"));
    }
    Ok(())
}

/// Does something that waits for I/O of ours, apart from the rest of the process, for at most
/// `limit`; it goes on without us after that.
fn bounded<T: Send + 'static>(
    what: &str,
    fd: Option<&OwnedFd>,
    limit: Duration,
    work: impl FnOnce(Option<OwnedFd>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let result = apart(fd.map(AsFd::as_fd), work)
        .map_err(|error| Error::os(format!("{what}: a thread"), &error))?;
    match result.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => {
            let reason = format!("not done after {} s", limit.as_secs());
            Err(Error::new(ErrorKind::Busy, what, reason).next("look for I/O that hangs below"))
        }
        Err(RecvTimeoutError::Disconnected) => {
            Err(Error::new(ErrorKind::Os, what, "ended without a result"))
        }
    }
}

/// Whether `is_so` comes true within `limit`.
fn wait_until(limit: Duration, is_so: impl Fn() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !is_so() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}
