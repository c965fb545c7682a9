//! Answers for the descriptors that keep a disk over FUSE while its server is replaced: from whom
//! they are had, and that they are those.

use std::os::fd::OwnedFd;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::fuse::Kept;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::state::Disk;

/// Copies of a process's descriptors with these numbers.
///
/// # Errors
/// If it is gone, has no such descriptor, or this process may not look into it.
pub fn pull(pid: u32, fds: &[i32]) -> Result<Vec<OwnedFd>> {
    let failed = |errno: rustix::io::Errno| {
        Error::os(format!("descriptors of process {pid}"), &errno.into())
    };
    let gone = || Error::new(ErrorKind::NotFound, format!("process {pid}"), "is gone");
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    let pull = |fd: &i32| pidfd_getfd(&process, *fd, PidfdGetfdFlags::empty()).map_err(failed);
    fds.iter().map(pull).collect()
}

/// What keeps a disk, of descriptors that are had already.
pub fn with(disk: &Disk, fuse: Vec<OwnedFd>) -> Option<Kept> {
    let keeper = disk.keeper.as_ref()?;
    let number = disk.fuse_connection?;
    let (told, path) = (keeper.told.clone(), disk.device.clone());
    (!fuse.is_empty()).then_some(Kept { fuse, number, told, path })
}

/// What keeps a disk, from who keeps it. `None` if nobody does any more: the process may be gone,
/// and its number another's.
pub fn of(disk: &Disk) -> Option<Kept> {
    let keeper = disk.keeper.as_ref().filter(|keeper| !keeper.fds.is_empty())?;
    let is_fuse = |fd: &i32| {
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", keeper.pid));
        link.is_ok_and(|to| to.to_str() == Some("/dev/fuse"))
    };
    if !keeper.fds.iter().all(is_fuse) {
        return None;
    }
    with(disk, pull(keeper.pid, &keeper.fds).ok()?)
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
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::state::Keeper;

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
        let keeper = Some(Keeper { pid: std::process::id(), fds: fds.into(), told: String::new() });
        let disk = Disk { keeper, fuse_connection: Some(1), ..Disk::default() };
        assert!(of(&disk).is_none());
    }
}
