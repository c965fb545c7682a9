//! Answers for a served disk as this machine sees it: who holds it, where it is mounted, what of
//! it is still in memory.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

/// How long looking at a disk may take.
const LOOK_PATIENCE: Duration = Duration::from_secs(5);
/// How long a claim has to last to count: the kernel claims a disk itself while it looks for
/// partitions, and so do tools that probe it.
const CLAIM_LASTS: Duration = Duration::from_millis(400);

/// Whether somebody holds the disk exclusively: a mounted file system, swap, LVM, another server. A
/// disk that cannot be looked at in time counts as held.
#[must_use]
pub fn is_held(device: &str) -> bool {
    let device = device.to_owned();
    let is_mounted = !mounts_of(&device).is_empty();
    let look = move || {
        let end = Instant::now() + CLAIM_LASTS;
        while open(&device, OFlags::EXCL).err() == Some(rustix::io::Errno::BUSY) {
            if is_mounted || Instant::now() > end {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    };
    apart(LOOK_PATIENCE, look).unwrap_or(true)
}

/// Does what may wait for I/O that this process serves: on a thread that keeps no descriptor of the
/// device open (a kill must close them all), and for at most `limit`.
fn apart<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    devsplice_uring::thread::apart(None, |_| work()).ok()?.recv_timeout(limit).ok()
}

fn open(path: &str, more: OFlags) -> Result<OwnedFd, rustix::io::Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
    rustix::fs::open(path, flags, Mode::empty())
}

/// Where the disk, or a partition of it, is mounted in this mount namespace.
#[must_use]
pub fn mounts_of(device: &str) -> Vec<String> {
    let Ok(table) = std::fs::read_to_string("/proc/self/mounts") else { return Vec::new() };
    let is_ours = |source: &str| {
        let rest = source.strip_prefix(device);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
    };
    table
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (source, target) = (words.next()?, words.next()?);
            is_ours(source).then(|| target.replace("\\040", " "))
        })
        .collect()
}

/// Writes out what the file systems on the disk, and its own page cache, have in memory. Whether
/// that was done within `limit`: the disk may be what is stuck, so nothing waits longer.
#[must_use]
pub fn sync(device: &str, limit: Duration) -> bool {
    let mounts = mounts_of(device);
    let device = device.to_owned();
    let write_out = move || {
        let mut all_well = true;
        for mount in mounts {
            all_well &= open(&mount, OFlags::empty()).and_then(rustix::fs::syncfs).is_ok();
        }
        // Gone already: then there is nothing to write out.
        if let Ok(disk) = open(&device, OFlags::empty()) {
            all_well &= rustix::fs::fsync(disk).is_ok();
        }
        all_well
    };
    apart(limit, write_out) == Some(true)
}
