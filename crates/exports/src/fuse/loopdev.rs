//! Answers for the loop device over the file: taking a free one, giving it back, who holds it.
//!
//! All of it waits for I/O that our own threads serve, so nothing here may run on one of them.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_uring::loopctl;
use rustix::fs::{Mode, OFlags, fsync, open, openat};
use rustix::io::Errno;

use super::connection::{self, abort, is_of, os};

/// Where free loop devices come from.
pub const LOOP_CONTROL: &str = "/dev/loop-control";
/// What a loop device's name begins with when it is ours.
pub const PREFIX: &str = "devsplice:";
/// How often another one is tried when somebody else was faster.
const MAX_TRIES: u32 = 32;

/// What the loop device is to be.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The device's name, which is that of the file, too.
    pub name: String,
    /// Logical block.
    pub block: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the kernel looks for partitions.
    pub part_scan: bool,
    /// Whether seeks cost.
    pub rotational: bool,
}

/// Puts the file on `mount` under a free loop device, with direct I/O; its path.
///
/// # Errors
/// If the file cannot be opened, or there is no loop device to be had.
pub fn attach(mount: &OwnedFd, wanted: &Wanted) -> Result<String> {
    let access = if wanted.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = openat(mount, wanted.name.as_str(), flags, Mode::empty())
        .map_err(|errno| os("opening the device's file", errno))?;
    let control = open_control()?;
    let mut flags = loopctl::DIRECT_IO;
    flags |= if wanted.read_only { loopctl::READ_ONLY } else { 0 };
    flags |= if wanted.part_scan { loopctl::PART_SCAN } else { 0 };
    let name = format!("{PREFIX}{}", wanted.name);
    for _ in 0..MAX_TRIES {
        let number = loopctl::free(control.as_fd())
            .map_err(|error| Error::os(LOOP_CONTROL, &error).next("detach unused loop devices"))?;
        let path = format!("/dev/loop{number}");
        let device = open(path.as_str(), access | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| os(&path, errno).next("mount devtmpfs on /dev, or mknod it"))?;
        match loopctl::configure(device.as_fd(), file.as_fd(), wanted.block, flags, &name) {
            Ok(()) => {
                if let Err(error) = make_writable((&path, &device), wanted) {
                    let _ = loopctl::clear(device.as_fd());
                    return Err(error);
                }
                tune(path.clone(), device, wanted.rotational);
                return Ok(path);
            }
            // Somebody else asked for a free one at the same time, and was first.
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
            Err(error) => return Err(Error::os(path, &error)),
        }
    }
    let reason = format!("{MAX_TRIES} free loop devices in a row were taken by others");
    Err(Error::new(ErrorKind::Busy, LOOP_CONTROL, reason).next("try again"))
}

/// A loop device that somebody has set read-only stays so when it is used again; and one that was
/// said to have no cache (`queue/write_cache`) would go on dropping all flushes.
fn make_writable((path, device): (&str, &OwnedFd), wanted: &Wanted) -> Result<()> {
    if wanted.read_only {
        return Ok(());
    }
    loopctl::set_writable(device.as_fd()).map_err(|error| Error::os(path, &error))?;
    set_queue(path, "write_cache", "write back")
}

/// Tells the queue what a loop device cannot be told; advice, so no error if that is not possible.
/// Only what the next use of the loop device sets anew: a limit on discards would outlast us.
///
/// The kernel freezes the queue for that, which takes several times as long as all the rest of an
/// attach. So nobody waits for it; `device`, which stays open meanwhile, sees to it that it is not
/// another disk's by then.
fn tune(path: String, device: OwnedFd, rotational: bool) {
    let thread = std::thread::Builder::new().name("apart".to_owned()).stack_size(64 << 10);
    let _ = thread.spawn(move || {
        let _ = set_queue(&path, "rotational", digit(rotational));
        drop(device);
    });
}

fn digit(is_on: bool) -> &'static str {
    if is_on { "1" } else { "0" }
}

/// Sets a switch of the queue of the device at `path`; where it is as wanted nothing is done, which
/// would wait for I/O.
fn set_queue(path: &str, switch: &str, wanted: &str) -> Result<()> {
    let device = path.rsplit('/').next().unwrap_or_default();
    let file = format!("/sys/block/{device}/queue/{switch}");
    if std::fs::read_to_string(&file).is_ok_and(|is| is.trim() == wanted) {
        return Ok(());
    }
    std::fs::write(&file, wanted).map_err(|error| Error::os(file, &error))
}

/// Has the page cache leave pages alone while they are written, or not any more: several places may
/// get them one by one and have to be the same. It would outlast us, so it is taken back.
///
/// # Errors
/// As the kernel says; names the file.
pub fn keep_pages_stable(path: &str, stable: bool) -> Result<()> {
    set_queue(path, "stable_writes", digit(stable))
}

/// Opens the place where loop devices come from.
///
/// # Errors
/// Names what is missing.
pub fn open_control() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    open(LOOP_CONTROL, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            Error::new(ErrorKind::NotFound, LOOP_CONTROL, "not found").next("modprobe loop")
        }
        Errno::ACCESS | Errno::PERM => os(LOOP_CONTROL, errno).next("run as root"),
        errno => os(LOOP_CONTROL, errno),
    })
}

/// What became of giving a loop device back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleared {
    /// It is free, or will be when the last one who has it open closes it.
    Yes,
    /// It was not ours to begin with, or not any more.
    NotOurs,
}

/// Gives the loop device at `path` back, if its name is `name`, after a flush. With `even_if_held`
/// also while it is mounted, in which case it goes at the unmount, and without a flush: it could
/// change nothing any more.
///
/// # Errors
/// [`ErrorKind::Busy`] while somebody holds it; or the flush failed.
pub fn clear(path: &str, name: &str, even_if_held: bool) -> Result<Cleared> {
    let exclusive = if even_if_held { OFlags::empty() } else { OFlags::EXCL };
    let Some((device, _)) = open_ours(path, name, exclusive)? else { return Ok(Cleared::NotOurs) };
    if !even_if_held {
        fsync(&device).map_err(|errno| os(path, errno).within("flush"))?;
    }
    give_back(path, &device)
}

/// Cuts the connection that served the loop device at `path`, if its name is `name`, and gives it
/// back; whether it was that one.
///
/// # Errors
/// As the kernel says.
pub fn clear_dead(path: &str, name: &str) -> Result<bool> {
    let Some((device, connection)) = open_ours(path, name, OFlags::empty())? else {
        return Ok(false);
    };
    // Most often it is cut already, or the last use of it ends with the loop device.
    let _ = abort(connection);
    Ok(give_back(path, &device)? == Cleared::Yes)
}

/// The loop device at `path` and the connection below it, if its name is `name`.
fn open_ours(path: &str, name: &str, exclusive: OFlags) -> Result<Option<(OwnedFd, u32)>> {
    let device = match open(path, OFlags::RDONLY | OFlags::CLOEXEC | exclusive, Mode::empty()) {
        Ok(device) => device,
        Err(Errno::NXIO | Errno::NODEV | Errno::NOENT) => return Ok(None),
        Err(Errno::BUSY) => return Err(held(path)),
        Err(errno) => return Err(os(path, errno)),
    };
    match loopctl::status(device.as_fd()) {
        Ok(status) if status.name == name => Ok(Some((device, status.minor))),
        Ok(_) => Ok(None),
        Err(error) if is_free(&error) => Ok(None),
        Err(error) => Err(Error::os(path, &error)),
    }
}

fn give_back(path: &str, device: &OwnedFd) -> Result<Cleared> {
    let _ = keep_pages_stable(path, false);
    match loopctl::clear(device.as_fd()) {
        Ok(()) => Ok(Cleared::Yes),
        Err(error) if is_free(&error) => Ok(Cleared::NotOurs),
        Err(error) => Err(Error::os(path, &error)),
    }
}

/// Whether a loop device has no file: somebody else has given it back.
fn is_free(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NXIO.raw_os_error())
}

/// The error for a device that somebody has.
fn held(path: &str) -> Error {
    let reason = "in use: mounted, or held by another program";
    Error::new(ErrorKind::Busy, path, reason)
        .next(format!("umount it, or see `lsblk {path}` and `fuser -v {path}`"))
}

/// Loop devices over the file of a device called `name`, as far as can be said without opening
/// them: the file lies in the root of its mount, which has no path.
pub fn over(name: &str) -> Vec<String> {
    let Ok(blocks) = std::fs::read_dir("/sys/block") else { return Vec::new() };
    let is_over = |entry: &std::fs::DirEntry| {
        let file = std::fs::read_to_string(entry.path().join("loop/backing_file"));
        file.is_ok_and(|file| {
            file.trim_end_matches('\n').trim_end_matches(" (deleted)") == format!("/{name}")
        })
    };
    let path = |entry: std::fs::DirEntry| format!("/dev/{}", entry.file_name().to_string_lossy());
    blocks.flatten().filter(is_over).map(path).collect()
}

/// Loop devices that were made for devices of ours: path, and the device's name.
pub fn all_ours() -> Vec<(String, String)> {
    let Ok(blocks) = std::fs::read_dir("/sys/block") else { return Vec::new() };
    let ours = |entry: std::fs::DirEntry| {
        // Without a file it belongs to nobody, and opening it would make more of them.
        let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        let path = format!("/dev/{}", entry.file_name().to_string_lossy());
        // A file of ours lies in the root of a mount that has no path.
        let lies_in_root = file.trim_end().rsplit_once('/').is_some_and(|(dir, _)| dir.is_empty());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let device = open(path.as_str(), flags, Mode::empty()).ok().filter(|_| lies_in_root)?;
        let name = loopctl::status(device.as_fd()).ok()?.name;
        Some((path, name.strip_prefix(PREFIX)?.to_owned()))
    };
    blocks.flatten().filter_map(ours).collect()
}

/// Who has the connection that serves the loop device at `path`, if its name is `name`: process and
/// descriptor, one of each process. Nothing is read from it, which would take as long as that
/// process does not answer.
///
/// # Errors
/// As the kernel says; if /proc does not show it.
pub fn keepers(path: &str, name: &str) -> Result<Vec<(u32, i32)>> {
    let Some((_, connection)) = open_ours(path, name, OFlags::NONBLOCK)? else {
        return Ok(Vec::new());
    };
    if !connection::can_look() {
        return Err(Error::new(ErrorKind::NotFound, "/proc", "shows no descriptors"));
    }
    let processes = std::fs::read_dir("/proc").map_err(|error| Error::os("/proc", &error))?;
    let number = |name: &OsStr| name.to_str().and_then(|name| name.parse().ok());
    let one = |process: std::fs::DirEntry| {
        let fd = open_in(&process, |file| is_of(file, Some(connection)))?;
        let fd = i32::try_from(number(&fd)?).ok()?;
        Some((number(&process.file_name())?, fd))
    };
    Ok(processes.flatten().filter_map(one).collect())
}

/// The first descriptor of a process, by its directory under /proc, of which `is_it` holds.
fn open_in(process: &std::fs::DirEntry, is_it: impl Fn(&Path) -> bool) -> Option<OsString> {
    let mut files = std::fs::read_dir(process.path().join("fd")).ok()?.flatten();
    files.find(|file| is_it(&file.path())).map(|file| file.file_name())
}

/// The processes that have `path` open, as "name (pid)".
pub fn holders(path: &str) -> Vec<String> {
    let mut all = Vec::new();
    let Ok(processes) = std::fs::read_dir("/proc") else { return all };
    for process in processes.flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let is_it =
            |file: &Path| std::fs::read_link(file).is_ok_and(|to| to.to_str() == Some(path));
        if open_in(&process, is_it).is_some() {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            all.push(format!("{} ({pid})", name.trim_end()));
        }
    }
    all
}
