//! Answers for the third entry: a block device or a file from outside, as any program uses it, with
//! direct I/O from many threads. It knows nothing of who serves it.

mod pool;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Limits, Op, Result};
use rustix::fs::{Mode, OFlags, SeekFrom};

use self::pool::{How, Pool};
use crate::bench::{Bench, LARGEST};
use crate::cases::PROMISES;
use crate::suite::{Case, Outcome, Suite, Verdict};
use crate::target::{Ask, Done, Target};

/// How long another's claim of the device may last.
const CLAIM: Duration = Duration::from_secs(3);

/// What takes a device away while it is used.
type Remove = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// A device under test. What it holds is overwritten.
#[derive(Clone)]
pub struct Subject {
    path: PathBuf,
    jobs: usize,
    depth: usize,
    span: u64,
    seed: u64,
    patience: Duration,
    remove: Arc<Mutex<Option<Remove>>>,
    /// Held by the case that has it.
    alone: Arc<Mutex<()>>,
}

impl Subject {
    /// The device or file at `path`: two jobs of 16 requests each over its first 16 MiB.
    pub fn new(path: impl Into<PathBuf>) -> Subject {
        Subject {
            path: path.into(),
            jobs: 2,
            depth: 16,
            span: 16 << 20,
            seed: 1,
            patience: Duration::from_secs(60),
            remove: Arc::default(),
            alone: Arc::default(),
        }
    }

    /// So many jobs, each with a descriptor of its own and so many requests in flight.
    #[must_use]
    pub fn load(self, jobs: usize, depth: usize) -> Subject {
        Subject { jobs: jobs.max(1), depth: depth.max(1), ..self }
    }

    /// Only the first bytes are used.
    #[must_use]
    pub fn span(self, span: u64) -> Subject {
        Subject { span, ..self }
    }

    /// Other random requests.
    #[must_use]
    pub fn seed(self, seed: u64) -> Subject {
        Subject { seed, ..self }
    }

    /// How long requests may take before they count as never finished.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Subject {
        Subject { patience, ..self }
    }

    /// How the device is taken away, for the case that tries that; it is the last one.
    #[must_use]
    pub fn removed_by(
        self,
        remove: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Subject {
        Subject { remove: Arc::new(Mutex::new(Some(Box::new(remove)))), ..self }
    }

    fn open(&self, may_go: bool) -> Result<DeviceTarget> {
        let about = About::of(&self.path)?;
        let mut files = Vec::new();
        for job in 0..self.jobs {
            files.push(Arc::new(about.open(&self.path, job == 0)?));
        }
        let how = How { may_go, ..about.how };
        let pool = Pool::new(files, self.depth, how, self.patience);
        Ok(DeviceTarget { pool, limits: about.limits })
    }

    /// The device, open, for a case of one's own.
    ///
    /// # Errors
    /// If it does not open.
    pub fn bench(&self) -> Result<Bench, String> {
        self.bench_that_may_go(false)
    }

    fn bench_that_may_go(&self, may_go: bool) -> Result<Bench, String> {
        let target = self.open(may_go).map_err(|error| error.to_string())?;
        Ok(Bench::new(Box::new(target), self.span, &[], self.seed))
    }
}

/// What can be found out about a node.
struct About {
    limits: Limits,
    how: How,
    direct: bool,
}

impl About {
    fn of(path: &Path) -> Result<About> {
        let thing = path.display().to_string();
        let os = |error: std::io::Error| Error::os(thing.as_str(), &error);
        let stat = std::fs::metadata(path).map_err(os)?;
        let is_block = stat.file_type().is_block_device();
        if !is_block && !stat.is_file() {
            let reason = "is neither a block device nor a file";
            return Err(Error::new(ErrorKind::Invalid, thing.as_str(), reason));
        }
        let file = File::open(path).map_err(os)?;
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| os(errno.into()))?;
        let sysfs = format!("/sys/dev/block/{}:{}", major(stat.rdev()), minor(stat.rdev()));
        let number = |file: &str| {
            let paths = [format!("{sysfs}/{file}"), format!("{sysfs}/../{file}")];
            let text = paths.iter().find_map(|path| std::fs::read_to_string(path).ok())?;
            text.trim().parse::<u64>().ok()
        };
        let direct = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT, Mode::empty()).is_ok();
        let block = match is_block {
            true => rustix::fs::ioctl_blksszget(&file).map_err(|errno| os(errno.into()))?,
            // What direct I/O on any file takes.
            false if direct => 4096,
            false => 512,
        };
        let can_discard =
            !is_block || number("queue/discard_max_bytes").is_some_and(|most| most > 0);
        let limits = Limits {
            block,
            physical: block,
            discard: if can_discard { block } else { 0 },
            read_only: is_block && number("ro") == Some(1),
            ..Limits::ideal(size / u64::from(block) * u64::from(block))
        };
        // The mask of what memory it takes, since 6.0; before, block devices took 512.
        let mask = if is_block { number("queue/dma_alignment").unwrap_or(511) } else { 4095 };
        let align = usize::try_from(mask + 1).unwrap_or(4096).clamp(1, 4096);
        let how = How { is_block, align, may_go: false };
        Ok(About { limits: limits.checked().map_err(|error| error.within(&thing))?, how, direct })
    }

    fn open(&self, path: &Path, first: bool) -> Result<File> {
        let access = if self.limits.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let mut flags = access | OFlags::CLOEXEC;
        if self.direct {
            flags |= OFlags::DIRECT;
        }
        // Refuses a device that is mounted or that another one uses.
        if self.how.is_block && first {
            flags |= OFlags::EXCL;
        }
        let end = Instant::now() + CLAIM;
        loop {
            match rustix::fs::open(path, flags, Mode::empty()) {
                // Somebody looks at it (udev does), or a fork holds our last descriptor.
                Err(rustix::io::Errno::BUSY) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Ok(fd) => return Ok(fd.into()),
                Err(errno) => return Err(Error::os(path.display().to_string(), &errno.into())),
            }
        }
    }
}

fn major(device: u64) -> u32 {
    rustix::fs::major(device)
}

fn minor(device: u64) -> u32 {
    rustix::fs::minor(device)
}

struct DeviceTarget {
    pool: Pool,
    limits: Limits,
}

impl Target for DeviceTarget {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn run(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String> {
        self.pool.run(asks)
    }
}

/// Everything that a device promises to those who use it.
#[must_use]
pub fn suite(subject: &Subject) -> Suite {
    let mut suite = Suite::default();
    for (name, promise) in PROMISES {
        add(&mut suite, subject, name, move |subject| promise(&mut subject.bench()?));
    }
    add(&mut suite, subject, "what_lies_off_the_device_or_its_blocks_is_refused", off_the_device);
    add(&mut suite, subject, "what_was_written_is_there_after_it_was_closed", reopened);
    add(&mut suite, subject, "removal_while_requests_fly_ends_each_of_them", removed);
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
        let _alone = subject.alone.lock().unwrap_or_else(PoisonError::into_inner);
        test(&subject)
    }));
}

fn none(reason: &str) -> Outcome {
    Ok(Verdict::NotMade(reason.into()))
}

fn off_the_device(subject: &Subject) -> Outcome {
    let about = About::of(&subject.path).map_err(|error| error.to_string())?;
    if !about.how.is_block {
        return none("files grow, and take what is off their blocks in their own way");
    }
    let mut bench = subject.bench()?;
    if bench.offers(Op::Write) {
        bench.fill(64 << 10)?;
    }
    let file = about.open(&subject.path, false).map_err(|error| error.to_string())?;
    let (size, block) = (bench.limits.size, bench.block());
    let mut room = vec![1_u8; 3 * 4096];
    let start = room.as_ptr().align_offset(4096);
    let len = usize::try_from(block).unwrap_or(4096);
    let bytes = &mut room[start..start + len];
    let got = rustix::io::pread(file.as_fd(), &mut *bytes, size);
    if got != Ok(0) {
        return Err(format!(
            "asked: read of {block} bytes at its end, {size}; came: {got:?}; must: 0"
        ));
    }
    if !bench.limits.read_only {
        let got = rustix::io::pwrite(file.as_fd(), &*bytes, size);
        if got.is_ok() {
            return Err(format!("asked: write at its end, {size}; came: {got:?}; must: an error"));
        }
        let off = &bytes[..len / 2];
        let got = rustix::io::pwrite(file.as_fd(), off, 0);
        if about.direct && got.is_ok() {
            return Err(format!("asked: write of half a block; came: {got:?}; must: an error"));
        }
        let past = devsplice_uring::blockctl::discard(file.as_fd(), size, block);
        if past.is_ok() {
            return Err(format!("asked: discard at its end, {size}; came: success"));
        }
    }
    bench.check(64 << 10)?;
    Ok(Verdict::Kept)
}

fn reopened(subject: &Subject) -> Outcome {
    let mut bench = subject.bench()?;
    if !bench.offers(Op::Write) {
        return none("it is read-only");
    }
    bench.fill(LARGEST)?;
    let asks = bench.mix([0, 90, 0, 0], 64 << 10);
    bench.must(&asks)?;
    let model = bench.model.clone();
    drop(bench);
    let mut bench = subject.bench()?;
    bench.model = model;
    bench.check(64 << 10)?;
    Ok(Verdict::Kept)
}

/// Each request ends, well or not, and soon; what it left is not looked at any more.
fn removed(subject: &Subject) -> Outcome {
    let remove = subject.remove.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(remove) = remove else {
        return none("nobody said how to remove it");
    };
    let mut bench = subject.bench_that_may_go(true)?;
    let writes = bench.offers(Op::Write);
    let remover = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        remove()
    });
    let mut ended = 0;
    let mut failed = false;
    // On for a while after the first failure, so that requests find the device gone, too.
    while ended < 3 {
        let mix = if writes { [50, 50, 0, 0] } else { [100, 0, 0, 0] };
        let asks = bench.mix(mix, 32 << 10);
        let dones = bench.run(&asks)?;
        failed |= dones.iter().any(|done| done.result.is_err());
        ended += u32::from(failed || remover.is_finished());
    }
    match remover.join() {
        Ok(Ok(())) => Ok(Verdict::Kept),
        Ok(Err(how)) => Err(format!("it could not be removed: {how}")),
        Err(_) => Err("the removal panicked".into()),
    }
}
