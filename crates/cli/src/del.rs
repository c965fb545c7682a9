//! Answers for `devsplice del`: stops a disk's server, or clears up after one that is gone.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::{host, ublk};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;

use crate::args::Del;
use crate::state::{Claim, Disk, Found};
use crate::{client, guard, servers, state};

/// Longer than the server's own patience with the device.
const LIMIT: Duration = Duration::from_secs(240);
/// How long a server may take that is to go in any case; then it is killed.
const FORCED_LIMIT: Duration = Duration::from_secs(60);
/// How long a process may take to end once it is done or killed, and its guard to clean up.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Removes a disk, or all.
///
/// # Errors
/// If there is no such disk, or it is held and force was not given.
pub fn run(del: &Del) -> Result<()> {
    if let Some(server) = &del.server {
        return end(server, del.force);
    }
    if !del.all {
        let word = del.name.as_deref().unwrap_or_default();
        return remove(&state::find(word)?, del.force);
    }
    let mut failed = Vec::new();
    for found in state::all()? {
        if let Err(error) = remove(&found, del.force) {
            eprintln!("devsplice: {error}");
            failed.push(found.disk.name);
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, failed.join(", "), "not removed"))
}

/// Removes a server of many with all of its disks.
fn end(name: &str, force: bool) -> Result<()> {
    let about = servers::find(name)?;
    let process = pidfd(about.pid);
    client::call_server(name, "shutdown", &json!({ "force": force }), LIMIT)?;
    if let Some(process) = &process {
        wait_for_end(process);
    }
    Ok(())
}

fn pidfd(pid: u32) -> Option<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

fn remove(found: &Found, force: bool) -> Result<()> {
    if !found.alive {
        return clear(found, force);
    }
    let disk = &found.disk;
    // One that has other disks as well goes on.
    let process = pidfd(disk.pid).filter(|_| disk.server.is_none());
    let limit = if force { FORCED_LIMIT } else { LIMIT };
    match client::call(&disk.name, "stop", &json!({ "force": force }), limit) {
        // Its files are free for the next server when it has ended.
        Ok(_) => process.as_ref().map_or((), wait_for_end),
        Err(error) => match process.filter(|_| force && error.kind() == ErrorKind::Timeout) {
            Some(process) => return kill(disk, &process),
            None => return Err(error),
        },
    }
    Ok(())
}

/// Clears up after a dead server, unless its guard has just put another in its place.
fn clear(found: &Found, force: bool) -> Result<()> {
    let name = &found.disk.name;
    let end = Instant::now() + END_LIMIT;
    while Instant::now() < end {
        if let Some((claim, left)) = Claim::hold(name)? {
            let keeper = left.as_ref().filter(|_| !force).and_then(guard::kept_by);
            if let (Some(keeper), Some(left)) = (keeper, &left)
                && is_in_use(left)
            {
                let reason = format!("is in use; {}", keeper.says());
                let next = keeper.next(name);
                return Err(Error::new(ErrorKind::Busy, name, reason)
                    .next(format!("{next}; --force loses what is not written")));
            }
            if let Some(left) = left {
                guard::clean(&left);
            }
            claim.remove();
            return Ok(());
        }
        let Ok(now) = state::find(name) else { return Ok(()) };
        if now.alive {
            return remove(&now, force);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(Error::new(ErrorKind::Busy, name, "another process is starting or clearing it up"))
}

/// Whether somebody has a disk without a server claimed, mounted or, where the kernel can say so
/// (7.0), just open. One that nobody has open is stopped by asking; it is to go anyway.
fn is_in_use(left: &Disk) -> bool {
    let stop = |id| ublk::Control::open().and_then(|mut control| control.stop_if_idle(id));
    let is_open = |id| stop(id).is_err_and(|error| error.kind() == ErrorKind::Busy);
    host::is_held(&left.device) || left.ublk_id.is_some_and(is_open)
}

fn wait_for_end(process: &OwnedFd) {
    let limit = Timespec { tv_sec: i64::try_from(END_LIMIT.as_secs()).unwrap_or(1), tv_nsec: 0 };
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit));
}

/// Ends a server that does not answer, and removes the disk, in whatever state its guard finds it.
fn kill(disk: &Disk, process: &OwnedFd) -> Result<()> {
    eprintln!(
        "devsplice: {}: its server (process {}) does not answer: killed",
        disk.name, disk.pid
    );
    state::doom(&disk.name)?;
    let _ = pidfd_send_signal(process, Signal::KILL);
    wait_for_end(process);
    let end = Instant::now() + END_LIMIT;
    while state::path(&disk.name, "json").exists() {
        if let Some(claim) = Claim::try_take(&disk.name)? {
            claim.remove();
        } else if Instant::now() > end {
            let reason = "its server was killed and has not ended; a request is stuck below";
            return Err(Error::new(ErrorKind::Busy, disk.name.clone(), reason)
                .next("see dmesg for the device below"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
