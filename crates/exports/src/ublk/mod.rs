//! Answers for the ublk front end: a /dev/ublkbN whose requests this process serves.

mod adopt;
mod batch;
#[cfg(test)]
mod batch_tests;
mod batch_wire;
mod control;
mod ending;
mod extra;
#[cfg(test)]
mod fallback;
#[cfg(feature = "imitation")]
pub mod imitation;
mod integrity;
mod map;
mod outside;
mod params;
mod progress;
mod queue;
mod recovery;
mod shape;
mod shared;
mod uapi;
mod zoned;

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result, Stack, Zones};
use devsplice_engine::{Counts, Export};
use devsplice_uring::{FileKind, RingFile, Uring};
use rustix::fs::OFlags;
use rustix::thread::CpuSet;

pub use control::{CONTROL, Control, available};
pub use extra::{Extra, Segments};
pub use integrity::Integrity;
pub use outside::{Seen, Shared, Trial};
pub use recovery::{Fit, Recovery, Suspended};

use crate::threads::{Bottom, Crew, OnMade, Service, Shape, Work};
use batch::BatchQueue;
use ending::Ending;
use queue::{Queue, QueueConfig};
use shape::{is_low_depth, max_io, shape};
use shared::Marked;
use uapi::{
    DevInfo, F_AUTO_BUF_REG, F_BATCH_IO, F_NEED_GET_DATA, F_NO_AUTO_PART_SCAN, F_PER_IO_DAEMON,
    F_SAFE_STOP, F_UNPRIVILEGED, F_UPDATE_SIZE, F_USER_COPY, F_ZERO_COPY, F_ZONED, Params,
};

/// How a request's data reaches its place. Best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPath {
    /// The kernel puts the request's pages into a slot by itself (6.16). No copy.
    AutoRegister,
    /// We ask for that, and for its end, with a command each (6.15). No copy.
    Register,
    /// We read and write the data through the character device (6.5). One copy.
    UserCopy,
    /// The kernel copies to and from memory of ours (6.0). One copy.
    Copy,
}

impl DataPath {
    /// All of them, best first.
    pub const ALL: [DataPath; 4] =
        [DataPath::AutoRegister, DataPath::Register, DataPath::UserCopy, DataPath::Copy];

    /// The word that users see and type.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            DataPath::AutoRegister => "auto-register",
            DataPath::Register => "register",
            DataPath::UserCopy => "user-copy",
            DataPath::Copy => "copy",
        }
    }

    /// Copies of each payload byte that this process has a part in.
    #[must_use]
    pub const fn copies(self) -> u32 {
        match self {
            DataPath::AutoRegister | DataPath::Register => 0,
            DataPath::UserCopy | DataPath::Copy => 1,
        }
    }

    /// The feature flags that it needs; the ones that let it fall back are among them.
    const fn flags(self) -> u64 {
        match self {
            DataPath::AutoRegister => F_AUTO_BUF_REG | F_ZERO_COPY | F_USER_COPY,
            DataPath::Register => F_ZERO_COPY | F_USER_COPY,
            DataPath::UserCopy => F_USER_COPY,
            DataPath::Copy => 0,
        }
    }

    /// The path of a device that was made with these flags.
    const fn of(flags: u64) -> DataPath {
        match flags {
            flags if flags & F_AUTO_BUF_REG != 0 => DataPath::AutoRegister,
            flags if flags & F_ZERO_COPY != 0 => DataPath::Register,
            flags if flags & F_USER_COPY != 0 => DataPath::UserCopy,
            _ => DataPath::Copy,
        }
    }

    /// The paths that a kernel with these features has, best first.
    #[must_use]
    pub fn offered(features: u64) -> Vec<DataPath> {
        let has = |path: &DataPath| path.flags() & !features == 0;
        DataPath::ALL.into_iter().filter(has).collect()
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a device is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its number; `None` for the first free one.
    pub id: Option<u32>,
    /// Queues; the kernel takes at most one per CPU.
    pub queues: u16,
    /// Threads that serve them; more than queues only in batches and without [`DataPath::Copy`].
    pub threads: u16,
    /// Requests in flight per queue, 1 to 4096.
    pub depth: u16,
    /// Refuse what changes data, whatever the stack allows.
    pub read_only: bool,
    /// Which data path; `None` for the best there is.
    pub data_path: Option<DataPath>,
    /// Whether queues are served in batches (7.0), as threads that share a queue need; `None` to
    /// do so where they do.
    pub batch: Option<bool>,
    /// Whether the kernel looks for partitions when the disk appears.
    pub part_scan: bool,
    /// Whether a queue's thread runs only where the queue's requests come from.
    pub affinity: bool,
    /// Seconds after which a request is reported as stuck; 0 for never.
    pub stuck_seconds: u32,
    /// What becomes of the disk when its server dies; `None` for the best that the kernel has.
    pub recovery: Option<Recovery>,
}

/// Most bytes of a request. Larger ones cost more memory where data is copied and gain nothing.
const MAX_IO: u32 = 1 << 20;
/// How long others may look at a disk that is to go: udev and its like do, for a moment.
const GLANCE: Duration = Duration::from_secs(5);
/// How long the character device may take to appear, or to be let go.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device as the kernel made it, and how it is served.
struct Made {
    control: Control,
    info: DevInfo,
    data_path: DataPath,
    options: Options,
    extra: Extra,
}

/// A disk that is being served.
pub struct Device {
    made: Made,
    path: String,
    crew: Crew,
}

/// Names of what the kernel's ublk driver can do, and whether it is there.
#[must_use]
pub fn feature_names(features: u64) -> Vec<(&'static str, bool)> {
    uapi::FEATURES.iter().map(|(bit, name)| (*name, features >> bit & 1 == 1)).collect()
}

impl Device {
    /// Makes a disk of `service.stack` and returns when it can be used. `on_made` is told the
    /// device's number.
    ///
    /// # Errors
    /// Without the driver, rights, or the data path asked for; nothing is left behind then.
    pub fn attach(options: &Options, service: Service, on_made: OnMade<'_>) -> Result<Device> {
        Device::attach_with(options, Extra::default(), service, on_made)
    }

    /// The same, with what else is asked of the driver.
    ///
    /// # Errors
    /// As [`Device::attach`].
    pub fn attach_with(
        options: &Options,
        extra: Extra,
        service: Service,
        on_made: OnMade<'_>,
    ) -> Result<Device> {
        Device::make(Control::open()?, (options, extra), service, on_made)
    }

    fn make(
        mut control: Control,
        (options, extra): (&Options, Extra),
        service: Service,
        on_made: OnMade<'_>,
    ) -> Result<Device> {
        // Bytes that a helper thread reads and writes must be in memory of ours.
        let in_memory = service.bottoms.iter().any(crate::threads::Bottom::needs_memory);
        let usable = if in_memory { !(F_ZERO_COPY | F_AUTO_BUF_REG) } else { !0 };
        let features = extra.usable(control.features());
        let data_path = choose_path(options.data_path, features & usable)?;
        let recovery = recovery::choose(options.recovery, features)?;
        let batch = choose_batch((options, &extra), data_path, features)?;
        let zoned = zoned::flags(&service.stack, (options, &extra), data_path, features)?;
        let mut wish = wish(options, (data_path, recovery, batch), features);
        extra.wish(&mut wish, data_path)?;
        wish.flags |= zoned;
        let info = control.add(wish)?;
        on_made(info.dev_id);
        let lost =
            (data_path.flags() | recovery.flags() | extra.flags() | batch | zoned) & !info.flags;
        if lost != 0 {
            let _ = control.delete(info.dev_id);
            if lost == F_UNPRIVILEGED {
                return Err(Error::invalid("--unprivileged", "is for users without CAP_SYS_ADMIN")
                    .next("leave it out, or run it as such a user"));
            }
            let reason = format!("the kernel took no {data_path} path (flags {lost:#x} refused)");
            return Err(Error::new(ErrorKind::Unsupported, "ublk", reason)
                .next("--data-path auto, and report this kernel"));
        }
        let mut made = Made { control, info, data_path, options: options.clone(), extra };
        let id = info.dev_id;
        if made.extra.unprivileged {
            outside::wait_for_node(id)?;
        }
        let params = made.params(&service.stack);
        let started = made.control.set_params(id, params).and_then(|()| made.crew(service));
        let crew = match started {
            Ok(crew) => crew,
            Err(error) => {
                let _ = made.control.stop(id);
                let _ = made.control.delete(id);
                return Err(error);
            }
        };
        let mut device = Device { made, path: node(id), crew };
        match device.made.control.start(id) {
            Ok(()) => {
                device.keep_pages_stable(false);
                Ok(device)
            }
            Err(error) => {
                Ending::of(device).see_through();
                Err(error)
            }
        }
    }

    /// The disk's node.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The device's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.made.info.dev_id
    }

    /// The data path in use.
    #[must_use]
    pub fn data_path(&self) -> DataPath {
        self.made.data_path
    }

    /// The word that users type for the way of its data.
    #[must_use]
    pub fn data_word(&self) -> &'static str {
        match self.made.info.flags & F_NEED_GET_DATA {
            0 => self.made.data_path.name(),
            _ => "get-data",
        }
    }

    /// Bytes that this server has moved from and to memory shared with clients, if the driver was
    /// told of such.
    #[must_use]
    pub fn shared_bytes(&self) -> Option<u64> {
        let Extra { shared_memory, shared_bytes, .. } = &self.made.extra;
        shared_memory.then(|| shared_bytes.load(Ordering::Relaxed))
    }

    /// What becomes of the disk when its server dies.
    #[must_use]
    pub fn recovery(&self) -> Recovery {
        Recovery::of(self.made.info.flags)
    }

    /// Whether its queues are served in batches.
    #[must_use]
    pub fn is_batched(&self) -> bool {
        self.made.info.flags & F_BATCH_IO != 0
    }

    /// Whether it is served as one whose requests come one at a time.
    #[must_use]
    pub fn is_low_depth(&self) -> bool {
        self.crew.is_low_depth
    }

    /// What of the driver's features it was made with, by the names of [`feature_names`].
    #[must_use]
    pub fn features(&self) -> Vec<&'static str> {
        let all = feature_names(self.made.info.flags).into_iter();
        all.filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect()
    }

    /// Queues and their depth, as the kernel made them.
    #[must_use]
    pub fn queues(&self) -> (u16, u16) {
        (self.made.info.nr_hw_queues, self.made.info.queue_depth)
    }

    /// The threads that serve it.
    #[must_use]
    pub fn crew(&self) -> &Crew {
        &self.crew
    }

    /// Takes the disk away if nobody has it open; afterwards nobody can open it. Where the kernel
    /// cannot do that (before 7.0) nothing is done.
    ///
    /// # Errors
    /// If somebody has it open for more than a glance. It is as before then.
    pub fn stop_if_unused(&mut self) -> Result<()> {
        if self.made.info.flags & F_SAFE_STOP == 0 {
            return Ok(());
        }
        let (id, end) = (self.id(), Instant::now() + GLANCE);
        loop {
            match self.made.control.stop_if_idle(id) {
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                // Another tool has stopped it.
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                done => return done,
            }
        }
    }

    /// Removes the disk: waits for I/O in flight, ends the threads, deletes the device. Whoever has
    /// the disk open sees errors from then on.
    ///
    /// # Errors
    /// If the driver hangs, or something else keeps the device; it says which step.
    pub fn detach(self) -> Result<Counts> {
        Ending::of(self).attempt()
    }
}

impl Made {
    /// What the kernel is told of a disk of this stack.
    fn params(&self, stack: &Stack) -> Params {
        let limits = stack.limits();
        let read_only = self.options.read_only || limits.read_only;
        let max_io = max_io(&self.info, self.data_path);
        let mut params = params::params(limits, read_only, max_io, self.data_path.copies() == 0);
        self.extra.limit(&mut params);
        if let Some(zones) = stack.zones() {
            params::zoned(&mut params, &zones.shape());
        }
        params
    }

    /// Whether each thread is to serve some tags of every queue, since there are more threads than
    /// queues: the way to share queues where requests do not come in batches (6.16).
    fn spreads(&self) -> bool {
        let (Options { threads, queues, .. }, flags) = (&self.options, self.info.flags);
        let is_plain = flags & (F_BATCH_IO | F_ZONED) == 0 && self.extra.integrity.is_none();
        let extra = &self.extra;
        let is_odd = extra.low_depth == Some(true) || extra.dies_fetching || extra.per_queue > 1;
        threads > queues && flags & F_PER_IO_DAEMON != 0 && is_plain && !is_odd
    }

    /// Opens the device and has threads fetch from all its queues.
    fn crew(&mut self, service: Service) -> Result<Crew> {
        let info = self.info;
        let file = open_char(info.dev_id)?;
        self.extra.per_io |= service.pool.is_none() && self.spreads();
        // Those of a pool serve whole queues.
        self.extra.per_queue *= u16::from(service.pool.is_none());
        // Tags are dealt to as many threads as there will be.
        let rings = service.bottoms.iter().map(Bottom::most_rings).min().unwrap_or(u16::MAX);
        let threads = self.options.threads.min(rings);
        let options = Options { threads, ..self.options.clone() };
        let low_depth = is_low_depth(&self.extra, (&info, self.data_path), &service);
        let shape = Shape { low_depth, ..shape((&options, &self.extra), &info, self.data_path) };
        let is_shared = shape.threads > shape.queues && !self.extra.deals();
        // Threads of one queue are there to run beside each other.
        let affinity = self.options.affinity && !self.extra.deals() && !is_shared;
        let cpus = if affinity { queue_cpus(&mut self.control, &info) } else { Vec::new() };
        let way = (self.data_path, self.control.is_encoded(), is_shared);
        let block = service.stack.limits().block;
        let zones = service.stack.zones().cloned();
        let extra = (self.extra.clone(), zones);
        let make = queue_maker(file, &info, way, (extra, shape.threads, block));
        let cpus = Box::new(move |queue: u16| cpus.get(usize::from(queue)).copied().flatten());
        Crew::start(shape, Work { service, make, cpus })
    }
}

/// Where the disk is.
fn node(id: u32) -> String {
    format!("/dev/ublkb{id}")
}

fn choose_path(asked: Option<DataPath>, features: u64) -> Result<DataPath> {
    let offered = DataPath::offered(features);
    match asked {
        None => Ok(offered.first().copied().unwrap_or(DataPath::Copy)),
        Some(path) if offered.contains(&path) => Ok(path),
        Some(path) => {
            let names: Vec<_> = offered.iter().map(|path| path.name()).collect();
            let reason = format!("this kernel's ublk has no {path} path for this stack");
            Err(Error::new(ErrorKind::Unsupported, "--data-path", reason)
                .next(format!("it has: {}", names.join(", "))))
        }
    }
}

/// The flag for batches, if there are to be any.
fn choose_batch(
    (options, extra): (&Options, &Extra),
    path: DataPath,
    features: u64,
) -> Result<u64> {
    let is_offered = features & F_BATCH_IO != 0;
    // Where the kernel copies, it does so to memory of the thread that committed last.
    let may_share = path != DataPath::Copy && !extra.deals();
    let is_shared = options.threads > options.queues && may_share;
    if extra.rotates && is_shared {
        // The turn of a tag would have to be known to all threads that it may come to.
        return Err(Error::invalid("ublk", "slots take turns where a queue has one thread"));
    }
    match options.batch {
        Some(true) if !is_offered => {
            let reason = "this kernel's ublk has none (they came with 7.0)";
            Err(Error::new(ErrorKind::Unsupported, "batches", reason).next("leave it to auto"))
        }
        None if is_shared => Ok(F_BATCH_IO & features),
        Some(true) => Ok(F_BATCH_IO),
        Some(false) | None => Ok(0),
    }
}

fn wish(
    options: &Options,
    (path, recovery, batch): (DataPath, Recovery, u64),
    features: u64,
) -> DevInfo {
    let extras = (recovery.extras() | F_UPDATE_SIZE) & features;
    let no_scan = if options.part_scan { 0 } else { F_NO_AUTO_PART_SCAN & features };
    DevInfo {
        nr_hw_queues: options.queues.max(1),
        queue_depth: options.depth.clamp(1, 4096),
        max_io_buf_bytes: MAX_IO,
        dev_id: options.id.unwrap_or(u32::MAX),
        flags: path.flags() | recovery.flags() | extras | no_scan | batch,
        ..DevInfo::default()
    }
}

/// Opens the character device, which udev may still be naming, or a server before us still closing.
fn open_char(id: u32) -> Result<OwnedFd> {
    let path = format!("/dev/ublkc{id}");
    let end = Instant::now() + PATIENCE;
    loop {
        match devsplice_uring::open(&path, OFlags::RDWR) {
            Err(error)
                if Instant::now() < end
                    && matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Busy) =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            done => return done,
        }
    }
}

/// What is asked for beside the usual, and the zones of the device.
type Asked = (Extra, Option<Arc<dyn Zones>>);

fn queue_maker(
    file: OwnedFd,
    info: &DevInfo,
    (path, encoded, is_shared): (DataPath, bool, bool),
    ((extra, zones), threads, block): (Asked, u16, u32),
) -> Box<crate::threads::MakeQueue> {
    let (depth, each) = (info.queue_depth, extra::descriptor_bytes(info));
    // All threads, or those of one queue.
    let hands = if extra.per_io { threads } else { threads / info.nr_hw_queues.max(1) };
    let dealer = extra::Dealer::new(info.nr_hw_queues, hands);
    let is_batched = info.flags & F_BATCH_IO != 0;
    let begun: Vec<_> = (0..info.nr_hw_queues).map(|_| AtomicBool::new(false)).collect();
    Box::new(move |queue, ring: &mut Uring| {
        extra.prepare(ring)?;
        let fd = file.try_clone().map_err(|error| Error::os("/dev/ublkc", &error))?;
        let part = match &extra {
            extra if extra.deals() => dealer.deal(queue)?,
            extra if extra.dies_fetching => extra::Part { first: 0, step: depth },
            _ => extra::Part::WHOLE,
        };
        let descriptors = map::Descriptors::map(fd.as_fd(), queue, (depth, each), part)?;
        let once_more = || map::Descriptors::map(fd.as_fd(), queue, (depth, each), part);
        let again = extra.integrity.as_ref().map(|_| once_more()).transpose()?;
        let marks = extra.shared_memory.then(once_more).transpose()?;
        let file = ring.add_file(RingFile { fd, kind: FileKind::Other })?;
        let depth = part.depth(depth);
        let config = QueueConfig { queue, depth, path, encoded, part };
        let made: Box<dyn Export<Uring>> = if is_batched {
            let is_first = !begun[usize::from(queue)].swap(true, Ordering::Relaxed);
            let part = batch::Part { is_first, is_shared, rotates: extra.rotates };
            Box::new(BatchQueue::new(config, part, file, descriptors))
        } else {
            Box::new(Queue::new(config, file, descriptors).with_zones(zones.clone()))
        };
        let made = match marks {
            Some(marks) => Box::new(Marked::new(made, marks, extra.shared_bytes.clone())),
            None => made,
        };
        let (Some(kept), Some(again)) = (&extra.integrity, again) else {
            return Ok(extra.around(made));
        };
        let bytes = kept.bytes;
        let room_at = Uring::DATA_AT + MAX_IO as usize;
        let config = integrity::Config { queue, depth, block, bytes, room_at };
        let at = (file, again);
        let checked = integrity::Checked::new(made, ring, config, at, kept.file.as_deref())?;
        Ok(extra.around(Box::new(checked)))
    })
}

/// The CPUs of each queue, where the kernel tells.
fn queue_cpus(control: &mut Control, info: &DevInfo) -> Vec<Option<CpuSet>> {
    let mut all = Vec::new();
    for queue in 0..info.nr_hw_queues {
        let set = control.affinity(info.dev_id, queue).ok().and_then(|mask| {
            let mut set = CpuSet::new();
            for cpu in (0..CpuSet::MAX_CPU.min(mask.len() * 8))
                .filter(|cpu| mask[cpu / 8] >> (cpu % 8) & 1 == 1)
            {
                set.set(cpu);
            }
            (set.count() > 0).then_some(set)
        });
        all.push(set);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_path_that_a_kernel_has_is_chosen() {
        let all = F_AUTO_BUF_REG | F_ZERO_COPY | F_USER_COPY;
        assert_eq!(choose_path(None, all).unwrap(), DataPath::AutoRegister);
        assert_eq!(choose_path(None, F_ZERO_COPY | F_USER_COPY).unwrap(), DataPath::Register);
        assert_eq!(choose_path(None, F_USER_COPY).unwrap(), DataPath::UserCopy);
        assert_eq!(choose_path(None, 0).unwrap(), DataPath::Copy);
        assert_eq!(choose_path(Some(DataPath::Copy), all).unwrap(), DataPath::Copy);
    }

    #[test]
    fn a_path_that_is_not_there_is_refused_with_those_that_are() {
        let error = choose_path(Some(DataPath::Register), F_USER_COPY).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("no register path") && text.contains("user-copy, copy"), "{text}");
    }

    pub(super) fn options(batch: Option<bool>, threads: u16) -> Options {
        Options {
            id: None,
            queues: 2,
            threads,
            depth: 4,
            read_only: false,
            data_path: None,
            batch,
            part_scan: false,
            affinity: false,
            stuck_seconds: 0,
            recovery: None,
        }
    }

    #[test]
    fn batches_are_taken_when_asked_for_or_needed() {
        let choose = |batch, threads, path, features| {
            choose_batch((&options(batch, threads), &Extra::default()), path, features)
        };
        let auto = DataPath::AutoRegister;
        assert_eq!(choose(None, 2, auto, F_BATCH_IO).unwrap(), 0);
        assert_eq!(choose(None, 3, auto, F_BATCH_IO).unwrap(), F_BATCH_IO);
        assert_eq!(choose(None, 3, DataPath::Copy, F_BATCH_IO).unwrap(), 0);
        assert_eq!(choose(None, 3, auto, 0).unwrap(), 0);
        assert_eq!(choose(Some(false), 3, auto, F_BATCH_IO).unwrap(), 0);
        assert_eq!(choose(Some(true), 1, DataPath::Copy, F_BATCH_IO).unwrap(), F_BATCH_IO);
        let rotating = Extra { rotates: true, ..Extra::default() };
        let rotating =
            |threads| choose_batch((&options(Some(true), threads), &rotating), auto, F_BATCH_IO);
        assert!(rotating(2).is_ok() && rotating(3).is_err());
        let error = choose(Some(true), 1, auto, !F_BATCH_IO).unwrap_err().to_string();
        assert!(error.contains("7.0") && error.contains("auto"), "{error}");
    }
}
