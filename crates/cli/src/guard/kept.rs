//! Answers for who keeps the disk of a dead server, and the right to serve it again.

use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::{fuse, ublk};

use crate::keeper;
use crate::state::{self, Claim, Disk};

/// The right to a disk that the kernel keeps, or this process does, and what its last server wrote
/// of it.
///
/// # Errors
/// If the kernel does not have it any more, or another process serves it.
pub fn claim_kept(name: &str, is_kept_here: bool) -> Result<(Claim, Disk)> {
    let busy = |reason: &str| Error::new(ErrorKind::Busy, name, reason);
    // A dead server's rings hold it for a moment longer than the server lived.
    let end = Instant::now() + state::LINGER;
    let held = loop {
        match Claim::hold(name)? {
            None if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            held => break held,
        }
    };
    match held {
        Some((claim, Some(left))) if is_kept(&left) || is_kept_here && left.outlives_server() => {
            Ok((claim, left))
        }
        Some((_, Some(left))) => {
            if let Some(keeper) = kept_by(&left) {
                return Err(busy(keeper.says()).next(keeper.next(name)));
            }
            let reason = match left.outlives_server() {
                true => "the kernel does not have it any more",
                false => "was made to go with its server (--recovery off)",
            };
            Err(busy(reason).next(format!("devsplice del {name}, then add it again")))
        }
        Some((claim, None)) => {
            claim.remove();
            Err(Error::new(ErrorKind::NotFound, name, "is gone"))
        }
        None => Err(busy("another process serves it")),
    }
}

/// Who keeps the disk of a dead server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptBy {
    /// The kernel, or its guard: for whoever wants to serve it.
    Kernel,
    /// Another process has what keeps it: systemd does, for the next start of its unit alone.
    Another,
}

impl KeptBy {
    /// Where the disk is, as a reason.
    pub fn says(self) -> &'static str {
        match self {
            KeptBy::Kernel => "its server is gone; the kernel keeps it and holds its requests",
            KeptBy::Another => {
                "its server is gone; another process (systemd) keeps it for its unit"
            }
        }
    }

    /// How it is served again.
    pub fn next(self, name: &str) -> String {
        match self {
            KeptBy::Kernel => format!("devsplice recover {name} serves it again"),
            KeptBy::Another => format!("the next start of {name}'s unit serves it again"),
        }
    }
}

/// Who keeps the disk of a dead server for the next one; `None` if it is gone, so that what is left
/// of it can go, too.
pub fn kept_by(disk: &Disk) -> Option<KeptBy> {
    if is_kept(disk) {
        return Some(KeptBy::Kernel);
    }
    let is_elsewhere = disk.outlives_server() && keeper::is_elsewhere(disk);
    is_elsewhere.then_some(KeptBy::Another)
}

/// Whether whoever wants to serve the disk of a dead server can have it. One over FUSE is taken for
/// kept where that cannot be seen, without /proc: it must not be cleaned up then.
pub fn is_kept(disk: &Disk) -> bool {
    if !disk.outlives_server() {
        return false;
    }
    let Some(id) = disk.ublk_id else { return !fuse::can_look() || keeper::of(disk).is_some() };
    // What cannot be asked for has not gone.
    let is_there = |error: Error| error.kind() != ErrorKind::NotFound;
    match ublk::Control::open().and_then(|mut control| control.server(id)) {
        // It becomes quiesced when the dead process has let go of everything, so it may still be
        // live.
        Ok((pid, state)) => {
            // One that is gone served it before: whoever took it over was killed before the kernel
            // knew.
            let is_its = pid <= 0
                || u32::try_from(pid).is_ok_and(|pid| pid == disk.pid || !state::runs(pid));
            state != "dead" && is_its
        }
        Err(error) => is_there(error),
    }
}
