//! Answers for what this machine is: root or not, which kernel, who holds a disk.

use std::path::Path;
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

/// Writes out what the file systems on the disk have in memory; gives up after `limit`, for the disk
/// may be what is stuck.
pub fn sync_mounts(device: &str, limit: Duration) -> bool {
    let mounts = mounts_of(device);
    if mounts.is_empty() {
        return true;
    }
    let (done, news) = std::sync::mpsc::channel();
    let spawned = std::thread::Builder::new().name("sync".into()).spawn(move || {
        for mount in mounts {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            if let Ok(fd) = rustix::fs::open(Path::new(&mount), flags, Mode::empty()) {
                let _ = rustix::fs::syncfs(fd);
            }
        }
        let _ = done.send(());
    });
    spawned.is_ok() && news.recv_timeout(limit).is_ok()
}
