//! Answers for the connection to the kernel: a mount that is attached to no path, its queues, and
//! how it is cut.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_uring::control::ControlRing;
use devsplice_uring::loopctl;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use zerocopy::IntoBytes;

use super::node::{Answer, Node};
use super::wire::{Ask, Body, MAJOR, out_header, parse};

/// `FUSE_IO_URING_CMD_ADD_QUEUE`, and what is asked of it (`FUSE_URING_ZERO_COPY`).
const CMD_ADD_QUEUE: u32 = 3;
const QUEUE_ZERO_COPY: u64 = 1;
/// How long that may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(5);
/// What a reader must have room for before anything is agreed (`FUSE_MIN_READ_BUFFER`).
const HANDSHAKE_BYTES: usize = 8192;
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// The kernel's side of FUSE.
pub const DEV_FUSE: &str = "/dev/fuse";

/// Whether a process's descriptor, /proc/PID/fd/N, is one of the FUSE connection of this number.
/// Newer kernels say of which one it is (6.18 does); with older ones any of FUSE will do.
#[must_use]
pub fn is_of(fd: &Path, connection: Option<u32>) -> bool {
    let link = std::fs::read_link(fd);
    if link.ok().as_deref().and_then(|to| to.to_str()) != Some(DEV_FUSE) {
        return false;
    }
    let info = fd.to_string_lossy().replace("/fd/", "/fdinfo/");
    let info = std::fs::read_to_string(info).unwrap_or_default();
    let of = info.lines().find_map(|line| line.strip_prefix("fuse_connection:"));
    of.is_none_or(|number| number.trim().parse().ok() == connection)
}

/// Whether processes can be looked into at all: there is a /proc here, of this process's kind.
#[must_use]
pub fn can_look() -> bool {
    std::fs::symlink_metadata("/proc/self/fd").is_ok()
}

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

/// Does the handshake on a fresh connection: what the kernel offered, all 64 bits of it.
///
/// # Errors
/// If the kernel does not speak our protocol, or says nothing.
pub fn greet(fuse: &OwnedFd, node: &Node) -> Result<u64> {
    let failed = |errno| os("FUSE's handshake", errno);
    let refused = || {
        Error::new(ErrorKind::Unsupported, "FUSE", "this kernel's protocol is too old")
            .next("a kernel from 5.19")
    };
    // It may ask twice: in its version, then in ours.
    for _ in 0..2 {
        let patience = Timespec { tv_sec: 5, tv_nsec: 0 };
        let there = poll(&mut [PollFd::new(fuse, PollFlags::IN)], Some(&patience));
        if there.map_err(failed)? == 0 {
            return Err(Error::new(ErrorKind::Busy, "FUSE's handshake", "nothing comes"));
        }
        let mut bytes = [0; HANDSHAKE_BYTES];
        let len = rustix::io::read(fuse, &mut bytes).map_err(failed)?;
        let (head, Ok(ask)) = parse(&bytes[..len]).map_err(|_| refused())? else {
            return Err(refused());
        };
        let Ask::Init { major, flags, .. } = ask else { return Err(refused()) };
        let Answer::Reply(answer) = node.answer(head, &ask) else { return Err(refused()) };
        let body = answer.unwrap_or(Body::EMPTY);
        let header = out_header(head.unique, answer.map(|body| body.bytes().len()));
        let reply = [header.as_bytes(), body.bytes()].concat();
        rustix::io::write(fuse, &reply).map_err(failed)?;
        if answer.is_err() {
            return Err(refused());
        }
        if major == MAJOR {
            return Ok(flags);
        }
    }
    Err(refused())
}

/// Makes a connection's queues for io_uring: one for each CPU that there may be, whose requests
/// have their pages in slots.
///
/// # Errors
/// If the kernel has no such queues.
pub fn add_queues(fuse: &OwnedFd, count: u16) -> Result<()> {
    let mut ring = ControlRing::new()?;
    for queue in 0..count {
        let mut payload = [0; 80];
        payload[..8].copy_from_slice(&QUEUE_ZERO_COPY.to_ne_bytes());
        payload[16..18].copy_from_slice(&queue.to_ne_bytes());
        let command = ("a queue of FUSE over io_uring", CMD_ADD_QUEUE);
        let result = ring.command(fuse.as_fd(), command, payload, None, COMMAND_LIMIT)?;
        if result < 0 {
            let reason = "this kernel's FUSE over io_uring has no zero copy (Linux 7.3 has)";
            let errno = devsplice_core::Errno::from_result(result);
            return Err(Error::new(ErrorKind::Unsupported, "FUSE", format!("{reason}: {errno}")));
        }
    }
    Ok(())
}

/// How many CPUs there may be: so many queues has FUSE over io_uring.
///
/// # Errors
/// If the kernel does not say.
pub fn possible_cpus() -> Result<u16> {
    let text = std::fs::read_to_string(POSSIBLE).map_err(|error| Error::os(POSSIBLE, &error))?;
    count_of(text.trim()).ok_or_else(|| Error::new(ErrorKind::Os, POSSIBLE, "makes no sense"))
}

/// How many numbers a list such as `0-3,8` has.
fn count_of(list: &str) -> Option<u16> {
    list.split(',').try_fold(0_u16, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
        last.checked_sub(first)?.checked_add(1)?.checked_add(sum)
    })
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

#[cfg(test)]
mod tests {
    #[test]
    fn possible_cpus_are_counted() {
        for (list, count) in [("0", 1), ("0-1", 2), ("0-3,8", 5), ("0-3,8-11,63", 9)] {
            assert_eq!(super::count_of(list), Some(count), "{list}");
        }
        for list in ["", "x", "3-1", "0-65535", "-"] {
            assert_eq!(super::count_of(list), None, "{list}");
        }
    }
}
