//! Answers for `devsplice gc`: what is left of disks without a server, and removing it. `doctor`
//! shows the same.

use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::{fuse, ublk};
use serde_json::json;

use crate::args::Gc;
use crate::dialect;
use crate::guard::{self, KeptBy};
use crate::say;
use crate::servers::{self, Seat};
use crate::state::{self, Claim, Disk, Found};

/// How long a device that is being made may be without a server, a server without a process, and a
/// disk without its next server.
const SETTLE: Duration = Duration::from_millis(500);

/// Something that is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// State and link of a disk that is gone.
    State(String),
    /// A disk that is kept for the next server, and by whom.
    Waiting(String, KeptBy),
    /// A ublk device without a server of which there is no state: another tool's, or one of ours
    /// whose state was lost. Its number, and the kernel's word for its state.
    Ublk(u32, &'static str),
    /// What a server of many has left, and whether disks of it wait for it.
    Server(String, bool),
    /// A state file that makes no sense, and what there is to say of it.
    Unreadable(String),
    /// A loop device of ours of which there is no state: its path, and the disk's name.
    Loop(String, String),
}

impl Left {
    /// What it is, and what can be done about it.
    pub fn describe(&self) -> String {
        match self {
            Left::State(name) => {
                format!("{name}: its server is gone; devsplice del {name}, or gc, clears up")
            }
            Left::Unreadable(text) => text.clone(),
            Left::Waiting(name, by) => format!("{name}: {}; {}", by.says(), by.next(name)),
            Left::Server(name, true) => {
                format!("server {name}: is gone; devsplice serve {name} serves its disks again")
            }
            Left::Server(name, false) => {
                format!("server {name}: is gone; devsplice gc clears up, serve {name} starts it")
            }
            Left::Ublk(id, state) => format!(
                "/dev/ublkc{id}: {state}, no process serves it, and it is none of ours; devsplice \
                 gc --foreign removes it"
            ),
            Left::Loop(path, name) => {
                format!("{path}: left of a disk called {name}; devsplice gc removes it")
            }
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Left::State(_) => "state",
            Left::Waiting(..) => "waiting",
            Left::Server(..) => "server",
            Left::Ublk(..) => "ublk",
            Left::Loop(..) => "loop",
            Left::Unreadable(_) => "unreadable",
        }
    }

    fn thing(&self) -> String {
        match self {
            Left::State(name) | Left::Waiting(name, _) => name.clone(),
            Left::Server(name, _) => format!("@{name}"),
            Left::Ublk(id, _) => format!("/dev/ublkc{id}"),
            Left::Loop(path, _) => path.clone(),
            Left::Unreadable(text) => {
                text.split_once(": ").map_or(text.as_str(), |(path, _)| path).to_owned()
            }
        }
    }

    /// Whether it is to go.
    fn is_wanted(&self, gc: &Gc) -> bool {
        match self {
            Left::State(_) | Left::Loop(..) => true,
            Left::Waiting(..) => gc.waiting,
            Left::Server(_, has_waiting) => !has_waiting || gc.waiting,
            Left::Ublk(..) => gc.foreign,
            Left::Unreadable(_) => false,
        }
    }

    fn remove(&self) -> Result<()> {
        match self {
            // Somebody has to look at it.
            Left::Unreadable(_) => Ok(()),
            Left::State(name) => remove(name, false),
            Left::Waiting(name, _) => remove(name, true),
            Left::Server(name, _) => match Seat::take(name)? {
                Some(seat) => {
                    seat.remove();
                    Ok(())
                }
                None => Err(Error::new(ErrorKind::Busy, name, "another process has taken it")),
            },
            Left::Ublk(id, _) => {
                let mut control = ublk::Control::open()?;
                let _ = control.stop(*id);
                control.delete(*id)
            }
            Left::Loop(path, name) => fuse::clear_loop(path, name).map(drop),
        }
    }
}

/// Removes what is left of a disk; one that is kept by now only where that is meant.
fn remove(name: &str, even_if_kept: bool) -> Result<()> {
    let busy = |reason| Error::new(ErrorKind::Busy, name, reason);
    match Claim::hold(name)? {
        Some((_, Some(left))) if !even_if_kept && guard::kept_by(&left).is_some() => {
            Err(busy("is kept for the next server by now").next("devsplice list"))
        }
        Some(held) => {
            state::cleaned(held).remove();
            Ok(())
        }
        None => Err(busy("another process has taken it")),
    }
}

/// All that is left of disks without a server.
///
/// # Errors
/// If the state cannot be read.
pub fn look() -> Result<Vec<Left>> {
    let mut all = state::all()?;
    // A guard takes a moment to have its dead server's disk, and to let the next one have it.
    if all.iter().any(|one| !one.alive) {
        std::thread::sleep(SETTLE);
        let dead: Vec<_> = all.iter().filter(|one| !one.alive).map(which).collect();
        all = state::all()?;
        all.iter_mut().for_each(|one| one.alive |= !dead.contains(&which(one)));
    }
    let mut left = Vec::new();
    for found in all.iter().filter(|one| !one.alive) {
        let name = found.disk.name.clone();
        left.push(match guard::kept_by(&found.disk) {
            Some(keeper) => Left::Waiting(name, keeper),
            None => Left::State(name),
        });
    }
    left.extend(state::unreadable()?.iter().map(|error| Left::Unreadable(error.to_string())));
    for name in servers::dead(SETTLE)? {
        let is_its = |found: &&Found| found.disk.server.as_ref() == Some(&name);
        let has_waiting =
            all.iter().filter(is_its).any(|found| guard::kept_by(&found.disk).is_some());
        left.push(Left::Server(name, has_waiting));
    }
    let disks: Vec<&Disk> = all.iter().map(|found| &found.disk).collect();
    if let Ok(mut control) = ublk::Control::open() {
        let strangers = dialect::devices().into_iter().filter(|id| !is_known(&disks, *id));
        let mut unserved: Vec<u32> =
            strangers.filter(|id| is_unserved(&mut control, *id)).collect();
        // One that is being made has no server yet, but it has one in a moment.
        if !unserved.is_empty() {
            std::thread::sleep(SETTLE);
            unserved.retain(|id| is_unserved(&mut control, *id));
        }
        for id in unserved {
            let state = control.server(id).map_or("unknown", |(_, state)| state);
            left.push(Left::Ublk(id, state));
        }
    }
    let loops = fuse::loop_devices();
    let has_state = |name: &str| state::path(name, "json").exists();
    // Whoever uses our crates without this command keeps no state, and may live.
    let is_lost =
        |(path, name): &(String, String)| !has_state(name) && !fuse::is_served(path, name);
    let lost = loops.into_iter().filter(is_lost);
    left.extend(lost.map(|(path, name)| Left::Loop(path, name)));
    Ok(left)
}

/// Of which server of which disk something is.
fn which(found: &Found) -> (String, u32) {
    (found.disk.name.clone(), found.disk.pid)
}

/// Whether there is such a device, and nobody serves it.
fn is_unserved(control: &mut ublk::Control, id: u32) -> bool {
    control.server(id).is_ok_and(|(pid, _)| !is_alive(pid))
}

fn is_known(disks: &[&Disk], id: u32) -> bool {
    disks.iter().any(|disk| disk.ublk_id == Some(id))
}

fn is_alive(pid: i32) -> bool {
    rustix::process::Pid::from_raw(pid.max(0))
        .is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

/// Removes what is left.
///
/// # Errors
/// If something could not be removed; the rest is.
pub fn run(gc: &Gc) -> Result<()> {
    let (mut failed, mut report) = (Vec::new(), Vec::new());
    for one in look()? {
        let done = match one.is_wanted(gc) {
            false => "kept",
            true if gc.dry_run => "would be removed",
            true => match one.remove() {
                Ok(()) => "removed",
                Err(error) => {
                    eprintln!("devsplice: {error}");
                    failed.push(one.thing());
                    "failed"
                }
            },
        };
        if gc.json {
            report.push(json!({ "kind": one.kind(), "thing": one.thing(), "done": done }));
        } else if done == "kept" {
            say!("kept: {}", one.describe());
        } else {
            say!("{done}: {} ({})", one.thing(), one.kind());
        }
    }
    if gc.json {
        say!("{}", serde_json::to_string_pretty(&report).unwrap_or_default());
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, failed.join(", "), "not removed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_missed_goes_only_when_that_is_said() {
        let gc = |waiting, foreign| Gc { dry_run: false, waiting, foreign, json: false };
        let (state, waiting) = (Left::State("a".into()), Left::Waiting("b".into(), KeptBy::Kernel));
        let (ublk, of_loop) = (Left::Ublk(1, "dead"), Left::Loop("/dev/loop1".into(), "c".into()));
        let [empty, needed] = [false, true].map(|has| Left::Server("d".into(), has));
        let all = [&state, &waiting, &ublk, &of_loop, &empty, &needed];
        let wanted = |gc: &Gc| all.map(|one| one.is_wanted(gc));
        assert_eq!(wanted(&gc(false, false)), [true, false, false, true, true, false]);
        assert_eq!(wanted(&gc(true, true)), [true; 6]);
    }
}
