//! Answers for the descriptors that keep a disk over FUSE while its server is replaced: from whom
//! they are had, and that they are those.
//!
//! The guard has them. Where the disk is a unit's, systemd has them, too: the unit's next start
//! gets them if server and guard are both gone.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::fuse::{self, Kept};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::state::{Disk, Keeper};
use crate::{notify, passed};

/// Copies of a process's descriptors with these numbers.
///
/// # Errors
/// If it is gone, has no such descriptor, or this process may not look into it.
pub fn pull(pid: u32, fds: &[i32]) -> Result<Vec<OwnedFd>> {
    copies(&process(pid)?, pid, fds)
}

fn failed(pid: u32, errno: Errno) -> Error {
    Error::os(format!("descriptors of process {pid}"), &errno.into())
}

fn process(pid: u32) -> Result<OwnedFd> {
    let gone = || Error::new(ErrorKind::NotFound, format!("process {pid}"), "is gone");
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
    pidfd_open(raw, PidfdFlags::empty()).map_err(|errno| failed(pid, errno))
}

fn copies(process: &OwnedFd, pid: u32, fds: &[i32]) -> Result<Vec<OwnedFd>> {
    let copy = |fd: &i32| pidfd_getfd(process, *fd, PidfdGetfdFlags::empty());
    fds.iter().map(|fd| copy(fd).map_err(|errno| failed(pid, errno))).collect()
}

/// When a process started, in the kernel's ticks since boot: with its number, that is no other.
pub fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 22; the second, a name, may contain anything, and the third comes first here.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// What keeps a disk, of descriptors that are had already.
pub fn with(disk: &Disk, fuse: Vec<OwnedFd>) -> Option<Kept> {
    let keeper = disk.keeper.as_ref()?;
    let number = disk.fuse_connection?;
    let (told, path) = (keeper.told.clone(), disk.device.clone());
    (!fuse.is_empty()).then_some(Kept { fuse, number, told, path })
}

/// What keeps a disk, from who keeps it: its guard. `None` if that does not any more: the process
/// may be gone, and its number another's.
pub fn of(disk: &Disk) -> Option<Kept> {
    let Keeper { pid, started, fds, .. } = disk.keeper.as_ref()?;
    with(disk, from((*pid, *started), fds, disk)?)
}

/// The same from its server, for where that lives and its guard does not.
pub fn of_server(disk: &Disk) -> Option<Kept> {
    let Keeper { own, own_started, .. } = disk.keeper.as_ref()?;
    with(disk, from((disk.pid, *own_started), own, disk)?)
}

fn from((pid, since): (u32, u64), fds: &[i32], disk: &Disk) -> Option<Vec<OwnedFd>> {
    // First: as long as there is anything to be had by it, nobody else has the number.
    let process = process(pid).ok()?;
    let is_it = since == 0 || started(pid) == Some(since);
    let all_ours = is_it && fds.iter().all(|fd| is_ours(pid, *fd, disk));
    all_ours.then(|| copies(&process, pid, fds).ok()).flatten()
}

/// Whether a process's descriptor is one of the disk's connection.
fn is_ours(pid: u32, fd: i32, disk: &Disk) -> bool {
    fuse::is_of(Path::new(&format!("/proc/{pid}/fd/{fd}")), disk.fuse_connection)
}

/// Has systemd keep what this process serves the disk by, where it is a unit's.
pub fn store(disk: &Disk, fds: &[OwnedFd]) {
    if let Some(name) = stored_as(disk) {
        notify::store(&name, fds);
    }
}

/// Has systemd let go of that: the disk is gone.
pub fn unstore(disk: &Disk) {
    if let Some(name) = stored_as(disk) {
        notify::unstore(&name);
    }
}

/// The numbers of descriptors here.
pub fn numbers(fds: &[OwnedFd]) -> Vec<i32> {
    fds.iter().map(AsRawFd::as_raw_fd).collect()
}

/// What systemd has kept of the disk for this process, as long as the kernel has its connection.
pub fn stored(disk: &Disk) -> Vec<OwnedFd> {
    let Some(name) = stored_as(disk) else { return Vec::new() };
    let pid = std::process::id();
    let numbers = passed::numbers(&name).into_iter().filter(|fd| is_ours(pid, *fd, disk));
    // The numbers themselves stay open beside these copies; that changes nothing, as the guard has
    // the same.
    let fds = pull(pid, &numbers.collect::<Vec<_>>()).unwrap_or_default();
    if fds.iter().all(is_connected) { fds } else { Vec::new() }
}

/// Whether a process that is neither its server nor its guard keeps the disk: systemd, for the next
/// start of its unit. Where that cannot be found out, one does.
pub fn is_elsewhere(disk: &Disk) -> bool {
    if disk.keeper.is_none() || disk.device.is_empty() {
        return false;
    }
    let Some(all) = fuse::keepers(&disk.device, &disk.name) else { return true };
    let keeps = |&(pid, fd): &(u32, i32)| match pull(pid, &[fd]) {
        Ok(fds) => fds.iter().all(is_connected),
        // It may have gone meanwhile.
        Err(_) => is_ours(pid, fd, disk),
    };
    all.iter().any(keeps)
}

/// A number is another connection's as soon as this one is gone. So what is stored by that name
/// before is let go of (`store`), and what has been stored is the disk's only if it is connected
/// still: then nobody else has had the number since.
fn stored_as(disk: &Disk) -> Option<String> {
    Some(format!("fuse-{}", disk.fuse_connection?))
}

/// Whether the kernel still has the connection of which this is one.
fn is_connected(fuse: &OwnedFd) -> bool {
    let mut waits = [PollFd::new(fuse, PollFlags::empty())];
    poll(&mut waits, Some(&Timespec::default())).is_ok_and(|count| count == 0)
}

/// Numbers as one word.
pub fn list(fds: &[i32]) -> String {
    fds.iter().map(i32::to_string).collect::<Vec<_>>().join(",")
}

/// The other way round; what is no number is left out.
pub fn unlist(text: &str) -> Vec<i32> {
    text.trim().split(',').filter_map(|word| word.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_copied_from_a_process_that_has_them() {
        let (reader, writer) = std::io::pipe().unwrap();
        let fds = [reader.as_raw_fd(), writer.as_raw_fd()];
        assert_eq!(unlist(&list(&fds)), fds);
        let pulled = pull(std::process::id(), &fds).unwrap();
        assert_eq!(pulled.len(), 2);
        drop(writer);
        assert_eq!(rustix::io::write(&pulled[1], b"x").unwrap(), 1);
        let mut byte = [0];
        assert_eq!(rustix::io::read(&reader, &mut byte).unwrap(), 1);
        assert!(pull(std::process::id(), &[9999]).is_err());
        // What is no FUSE connection keeps nothing.
        let keeper = Some(Keeper { pid: std::process::id(), fds: fds.into(), ..Keeper::default() });
        let disk = Disk { keeper, fuse_connection: Some(1), ..Disk::default() };
        assert!(of(&disk).is_none());
    }

    #[test]
    fn a_number_that_is_another_process_now_keeps_nothing() {
        let pid = std::process::id();
        let since = started(pid).unwrap();
        assert!(since > 0 && started(1) != Some(since) && started(u32::MAX).is_none());
        // As on a kernel that does not say of which connection it is.
        let Ok(fuse) = std::fs::File::open("/dev/fuse") else { return };
        let (fds, own) = (vec![fuse.as_raw_fd()], vec![fuse.as_raw_fd()]);
        let keeper = Keeper { pid, started: since, fds, own, ..Keeper::default() };
        let keeper = Keeper { own_started: since, ..keeper };
        let disk = |keeper: Keeper| Disk {
            keeper: Some(keeper),
            fuse_connection: Some(1),
            pid,
            ..Disk::default()
        };
        let kept = of(&disk(keeper.clone()));
        assert_eq!(kept.map(|kept| kept.fuse.len()), Some(1));
        assert!(of(&disk(Keeper { started: since + 1, ..keeper.clone() })).is_none());
        // Where the guard is gone, who has the server's number is nobody to take a disk from.
        let without_guard = disk(Keeper { pid: u32::MAX, ..keeper.clone() });
        assert!(of(&without_guard).is_none());
        assert!(of_server(&without_guard).is_some());
        assert!(of_server(&disk(Keeper { own_started: since + 1, ..keeper })).is_none());
    }
}
