//! Answers for what this machine is: root or not, which kernel, who holds a disk.

use std::time::Duration;

use rustix::fs::{Mode, OFlags};

/// Whether somebody holds the disk exclusively: a mounted file system, swap, LVM, another server.
pub fn is_held(device: &str) -> bool {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
    matches!(rustix::fs::open(device, flags, Mode::empty()), Err(rustix::io::Errno::BUSY))
}

/// Where the disk, or a partition of it, is mounted in this mount namespace.
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
pub fn sync(device: &str, limit: Duration) -> bool {
    let mounts = mounts_of(device);
    let device = device.to_owned();
    let (done, news) = std::sync::mpsc::channel();
    let spawned = std::thread::Builder::new().name("sync".into()).spawn(move || {
        let open = |path: &str| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            rustix::fs::open(path, flags, Mode::empty())
        };
        let mut all_well = true;
        for mount in mounts {
            all_well &= open(&mount).and_then(rustix::fs::syncfs).is_ok();
        }
        // Gone already: then there is nothing to write out.
        if let Ok(disk) = open(&device) {
            all_well &= rustix::fs::fsync(disk).is_ok();
        }
        let _ = done.send(all_well);
    });
    spawned.is_ok() && news.recv_timeout(limit) == Ok(true)
}
