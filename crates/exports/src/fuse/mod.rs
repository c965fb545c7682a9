//! Answers for a block device without ublk: one file of a FUSE mount that nobody else can reach,
//! and a loop device with direct I/O over it.
//!
//! The mount is attached to no path and lives by the loop device's reference alone: when the loop
//! device goes, the connection closes, and the I/O threads end. What waits for I/O that this
//! process serves runs apart (`devsplice_uring::thread::apart`) and is given up after a bounded
//! time.

mod connection;
mod loopdev;
pub mod node;
mod serve;
pub mod wire;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::Counts;
use devsplice_uring::{FileKind, LaneMemory, RingFile, loopctl, thread::apart};

use crate::threads::{Crew, OnMade, Service, Shape, Work};
use connection::{DEV_FUSE, Mount};
use loopdev::{Cleared, LOOP_CONTROL, PREFIX, Wanted};
use node::{MAX_WRITE, Node};
use serve::Queue;

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

/// What device to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name: the loop device is then "devsplice:NAME".
    pub name: String,
    /// Queues, each a clone of /dev/fuse.
    pub queues: u16,
    /// Threads that serve them.
    pub threads: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the kernel looks for partitions.
    pub part_scan: bool,
    /// Seconds after which a request is reported as stuck; 0 for never.
    pub stuck_seconds: u32,
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
    crew: Crew,
}

impl Device {
    /// Makes the device; it takes requests on return. `on_made` is told the connection's number.
    ///
    /// # Errors
    /// If anything is missing or refused; nothing is left behind then.
    pub fn attach(options: &Options, service: Service, on_made: OnMade<'_>) -> Result<Device> {
        available()?;
        check_name(&options.name)?;
        if service.stack.zones().is_some() {
            let reason = "a disk over FUSE has none";
            return Err(Error::new(ErrorKind::Unsupported, "zones", reason).next("--export ublk"));
        }
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
        let Mount { fd, queues, number } =
            connection::mount(&name, options.queues.max(1), read_only)?;
        let node = Arc::new(Node::new(&options.name, &limits, read_only));
        let work = Work {
            service,
            make: make_queue(node, queues, options.depth.max(1)),
            cpus: Box::new(|_| None),
        };
        on_made(number);
        // From here on, whatever fails: without the mount the connection closes, and the threads
        // end.
        let crew = Crew::start(shape(options), work)?;
        let attach = move |mount: Option<OwnedFd>| match mount {
            Some(mount) => loopdev::attach(&mount, &wanted),
            None => Err(Error::new(ErrorKind::Os, "the device's mount", "lost")),
        };
        match bounded("attaching", Some(&fd), ATTACH_LIMIT, attach) {
            Ok(path) => Ok(Device { path, name, number, crew }),
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

fn shape(options: &Options) -> Shape {
    let memory =
        LaneMemory { depth: options.depth.max(1), bytes: MAX_WRITE, slots: false, locked: false };
    let queues = options.queues.max(1);
    let (threads, stuck_seconds) = (options.threads.min(queues), options.stuck_seconds);
    Shape { queues, threads, is_shared: false, memory, stuck_seconds }
}

fn make_queue(node: Arc<Node>, queues: Vec<OwnedFd>, depth: u16) -> Box<crate::threads::MakeQueue> {
    Box::new(move |queue, ring| {
        let lost = || Error::new(ErrorKind::Os, DEV_FUSE, format!("no queue {queue}"));
        let fd = queues.get(usize::from(queue)).ok_or_else(lost)?;
        let fd = fd.try_clone().map_err(|error| Error::os(DEV_FUSE, &error))?;
        let file = ring.add_file(RingFile { fd, kind: FileKind::Other })?;
        Ok(Box::new(Queue::new(Arc::clone(&node), file, depth)))
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
