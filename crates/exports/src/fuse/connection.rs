//! Answers for the connection to the kernel: a mount that is attached to no path, its queues, and
//! how it is cut.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_uring::loopctl;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

/// The kernel's side of FUSE.
pub const DEV_FUSE: &str = "/dev/fuse";

/// An error of the operating system about `thing`.
pub fn os(thing: &str, errno: Errno) -> Error {
    Error::os(thing, &errno.into())
}

/// A mount that only the holder of [`Mount::fd`], and of files opened through it, can reach. It
/// goes with the last of them.
pub struct Mount {
    /// The mount itself.
    pub fd: OwnedFd,
    /// One per queue: /dev/fuse, and clones of it.
    pub queues: Vec<OwnedFd>,
    /// The connection's number in fusectl.
    pub number: u32,
}

/// Makes the mount. The kernel has queued its first request afterwards; until that is answered,
/// whoever opens a file there waits.
///
/// # Errors
/// If the kernel has no FUSE, or this process not the right to it.
pub fn mount(source: &str, queues: u16, read_only: bool) -> Result<Mount> {
    let first = open_fuse()?;
    let failed = |errno| os("mounting FUSE", errno);
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| match errno {
        Errno::NODEV => {
            Error::new(ErrorKind::NotFound, "FUSE", "not in this kernel").next("modprobe fuse")
        }
        errno => failed(errno),
    })?;
    let context = context.as_fd();
    for (key, value) in [
        ("source", source),
        ("fd", &first.as_raw_fd().to_string()),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
    ] {
        fsconfig_set_string(context, key, value).map_err(failed)?;
    }
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    if read_only {
        fsconfig_set_flag(context, "ro").map_err(failed)?;
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    fsconfig_create(context).map_err(failed)?;
    let fd = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed)?;
    // What the kernel knows by itself: nobody answers requests yet.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let number = statx(&fd, "", flags, StatxFlags::empty()).map_err(failed)?.stx_dev_minor;
    let mut all = vec![first];
    for _ in 1..queues {
        let clone = open_fuse()?;
        loopctl::clone_fuse(clone.as_fd(), all[0].as_fd())
            .map_err(|error| Error::os("another queue of FUSE", &error))?;
        all.push(clone);
    }
    Ok(Mount { fd, queues: all, number })
}

pub fn open_fuse() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(DEV_FUSE, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            Error::new(ErrorKind::NotFound, DEV_FUSE, "not found").next("modprobe fuse")
        }
        Errno::ACCESS | Errno::PERM => os(DEV_FUSE, errno).next("run as root"),
        errno => os(DEV_FUSE, errno),
    })
}

/// Cuts the connection: every request, in flight or to come, fails, and its queues close. This is
/// the way out when nothing else moves. No error if there is no such connection any more.
///
/// # Errors
/// If the kernel offers no way to do it.
pub fn abort(number: u32) -> Result<()> {
    let failed = |errno| os("aborting a FUSE connection", errno);
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
    fsconfig_create(&context).map_err(failed)?;
    let control = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .map_err(failed)?;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    match openat(&control, format!("{number}/abort"), flags, Mode::empty()) {
        Ok(file) => rustix::io::write(file, b"1").map(drop).map_err(failed),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed(errno)),
    }
}
