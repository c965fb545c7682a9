//! Answers for `devsplice del`: stops a disk's server, or clears up after one that is gone.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;

use crate::args::Del;
use crate::state::{Claim, Disk, Found};
use crate::{client, state};

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

fn remove(found: &Found, force: bool) -> Result<()> {
    if !found.alive {
        // Taking the name cleans up after its last server.
        if let Some(claim) = Claim::try_take(&found.disk.name)? {
            claim.remove();
        }
        return Ok(());
    }
    let disk = &found.disk;
    let process = i32::try_from(disk.pid)
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
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

fn wait_for_end(process: &OwnedFd) {
    let limit = Timespec { tv_sec: i64::try_from(END_LIMIT.as_secs()).unwrap_or(1), tv_nsec: 0 };
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit));
}

/// Ends a server that does not answer. Its guard cleans up; without a guard, this does.
fn kill(disk: &Disk, process: &OwnedFd) -> Result<()> {
    eprintln!(
        "devsplice: {}: its server (process {}) does not answer: killed",
        disk.name, disk.pid
    );
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
