//! Answers for what other ublk tools do to a device that another process serves.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::ublk::{Control, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::wish::Which;
use super::{list, record};
use crate::say;

/// How long a server may take to end once its device is stopped, and a device to go once it is
/// deleted.
const PATIENCE: Duration = Duration::from_secs(10);

/// Removes devices: stops them, waits for their servers' ends, deletes them.
///
/// # Errors
/// If one does not stop or does not go away, or without the one asked for.
pub fn del(which: Which) -> Result<()> {
    let mut control = Control::open()?;
    match which {
        Which::One(id) => remove(&mut control, id),
        Which::All => {
            let removed = list::all().into_iter().map(|id| remove(&mut control, id));
            removed.filter(|done| !is_gone(done)).fold(Ok(()), Result::and)
        }
    }
}

fn is_gone(done: &Result<()>) -> bool {
    matches!(done, Err(error) if error.kind() == ErrorKind::NotFound)
}

fn remove(control: &mut Control, id: u32) -> Result<()> {
    let (server, _) = control.server(id)?;
    let process = pid(server).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let before = node(id);
    let stopped = control.stop(id);
    if let Some(process) = &process
        && stopped.is_ok()
    {
        wait_for_end(process);
    }
    control.delete(id)?;
    record::forget(id);
    let end = Instant::now() + PATIENCE;
    // It goes when the last descriptor of its server is closed, which the end of one that was
    // killed may leave to a worker of the kernel. Then somebody else may take its number at once.
    let is_there = |control: &mut Control| match node(id) {
        Some(now) => Some(now) == before,
        None => control.server(id).is_ok(),
    };
    while is_there(control) {
        if Instant::now() > end {
            let thing = format!("ublk device {id}");
            return Err(Error::new(ErrorKind::Busy, thing, "is deleted and has not gone away"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    stopped
}

/// What tells a device's node from that of the next one with its number.
fn node(id: u32) -> Option<(u64, i64, i64)> {
    let node = std::fs::metadata(format!("/dev/ublkc{id}")).ok()?;
    Some((node.ino(), node.ctime(), node.ctime_nsec()))
}

/// The process of that number, unless there is none or it is this one.
fn pid(server: i32) -> Option<Pid> {
    Pid::from_raw(server.max(0)).filter(|pid| *pid != rustix::process::getpid())
}

fn wait_for_end(process: &OwnedFd) {
    let limit = Timespec { tv_sec: i64::try_from(PATIENCE.as_secs()).unwrap_or(1), tv_nsec: 0 };
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit));
}

/// Takes the disk away and leaves the device, whose server ends.
///
/// # Errors
/// If there is none, or somebody has it open and it was to be stopped safely.
pub fn stop(id: u32, is_safe: bool) -> Result<()> {
    let mut control = Control::open()?;
    if is_safe { control.stop_if_idle(id) } else { control.stop(id) }
}

/// Has the server let the device go, which the kernel keeps for the next one.
///
/// # Errors
/// If the device was not made for that, or what is in flight does not come back.
pub fn quiesce(id: u32) -> Result<()> {
    let mut control = Control::open()?;
    let end = Instant::now() + PATIENCE;
    loop {
        // What is committed after a call waits again; the next call ends that.
        control.let_go(id, PATIENCE)?;
        let (_, state) = control.server(id)?;
        if state != "live" {
            return Ok(());
        }
        if Instant::now() > end {
            let thing = format!("ublk device {id}");
            return Err(Error::new(ErrorKind::Busy, thing, "its server has not let it go"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Gives the disk another size.
///
/// # Errors
/// As the driver says.
pub fn resize(id: u32, bytes: u64) -> Result<()> {
    Control::open()?.resize(id, bytes)
}

/// Makes a device, tries parameters on it and deletes it.
///
/// # Errors
/// If the driver does not take them.
pub fn try_out(id: Option<u32>, trial: &Trial) -> Result<()> {
    let verdict = Control::open()?.takes(id, trial)?;
    say!("SET_PARAMS {}", if verdict.is_ok() { "succeeded" } else { "failed" });
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_that_is_no_other_process_is_waited_for() {
        let own = rustix::process::getpid().as_raw_nonzero().get();
        for server in [0, -1, own] {
            assert!(pid(server).is_none(), "{server}");
        }
        assert!(pid(own + 1).is_some());
    }

    #[test]
    fn a_device_that_is_gone_is_no_failure_to_remove_all() {
        let error = |kind| Err(Error::new(kind, "x", "y"));
        assert!(is_gone(&error(ErrorKind::NotFound)));
        assert!(!is_gone(&error(ErrorKind::Busy)) && !is_gone(&Ok(())));
    }
}
