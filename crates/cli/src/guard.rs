//! Answers for what is left when a server dies without a word: a second process waits for that. It
//! takes the server's place where the kernel keeps the disk; else it clears up the device, the link
//! and the state.

use std::io::{PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::{fuse, ublk};

use crate::server::{self, Server};
use crate::servers::{self, Seat};
use crate::state::{self, Claim, Disk, Keeper};
use crate::{keeper, protect, sandbox};

mod kept;
mod voice;

pub use kept::{KeptBy, claim_kept, is_kept, kept_by};
pub use voice::{Hearing, Voice};
use voice::{THERE_LIMIT, listen};

/// The server's end: its end tells the guard.
pub struct Guard {
    voice: Voice,
    /// Whether it may be the last that keeps the disk, from before this process serves it.
    keeps_on: bool,
}

/// How long a dead server's device may take to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long another program may take to take a disk over that was handed to it.
const SUCCESSION: Duration = Duration::from_secs(30);
/// How long it may be seen doing nothing.
const HESITATION: Duration = Duration::from_secs(2);
/// How often in a row a server may die soon after its start before it is let be.
const MOST_RESTARTS: u32 = 10;

/// How long it is before what could not be had below is tried again: at first, and at last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// What the server says before it goes in good order.
const FAREWELL: &str = "bye";
/// How often it is looked whether a disk has to be kept still.
const STAY: Duration = Duration::from_millis(100);
/// What it says before it leaves the disk to another program.
const HANDOVER: &str = "handover";

/// Starts a guard. To be called before any thread and any descriptor of a device exists: the guard
/// must hold neither.
///
/// # Errors
/// If there can be no further process.
pub fn start() -> Result<Guard> {
    start_with(&[])
}

/// As [`start`], of a process that keeps a disk: the guard keeps it from its first moment.
///
/// # Errors
/// As there.
pub fn start_with(inherited: &[OwnedFd]) -> Result<Guard> {
    let os = |error| Error::os("guard process", &error);
    let (reader, writer) = std::io::pipe().map_err(os)?;
    let (answers, answer) = std::io::pipe().map_err(os)?;
    match fork::fork().map_err(os)? {
        fork::Fork::Parent(pid) => {
            let voice = Voice::new(writer, answers, pid);
            Ok(Guard { voice, keeps_on: false })
        }
        fork::Fork::Child => {
            drop((writer, answers));
            protect::guard();
            let mut kept: Vec<_> = inherited.iter().filter_map(|fd| fd.try_clone().ok()).collect();
            match watch(reader, answer, &mut kept) {
                Some(Heir::Disk(name)) => succeed(&name, &kept),
                Some(Heir::Server(name)) => succeed_server(&name),
                None => {}
            }
            std::process::exit(0);
        }
    }
}

/// What this process is to be from now on.
enum Heir {
    /// The server of this disk.
    Disk(String),
    /// This server of many.
    Server(String),
}

/// Waits for the server's end. Without a farewell, what is to be served by this process from now
/// on, if it has been kept; otherwise what was left is cleaned up. `kept` is what this process had
/// to keep for that.
fn watch(reader: PipeReader, answer: PipeWriter, kept: &mut Vec<OwnedFd>) -> Option<Heir> {
    // The server's signals (a terminal's ^C reaches the whole group) are not for the guard.
    let _ = rustix::process::setsid();
    let _ = server::silence(None);
    let server = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let server = u32::try_from(server).unwrap_or(0);
    let said = listen(reader, answer, server, kept);
    let mut lines = said.iter().map(String::as_str);
    let name = lines.next()?;
    match (name.strip_prefix('@'), lines.next()) {
        (None, None) => orphaned(name, server, kept).map(Heir::Disk),
        (None, Some(HANDOVER)) => abandoned(name, server).map(Heir::Disk),
        (Some(name), None) => orphaned_server(name).map(Heir::Server),
        (Some(name), Some(HANDOVER)) => abandoned_server(name, server).map(Heir::Server),
        (_, Some(_)) => None,
    }
}

/// A disk whose server, process `server`, has died; `kept` is what this process keeps it by.
fn orphaned(name: &str, server: u32, kept: &[OwnedFd]) -> Option<String> {
    let is_kept_here = !kept.is_empty();
    // The lock goes with the last descriptor, a moment after the pipe. Where this process keeps the
    // disk it waits as long as it takes: what the server had in flight may be stuck below.
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end || is_kept_here {
        match Claim::hold(name) {
            Ok(Some((_, Some(disk)))) if is_anothers(&disk, server) => return None,
            Ok(Some((mut claim, Some(mut disk))))
                if (is_kept(&disk) || is_kept_here && disk.outlives_server())
                    && !state::is_doomed(name) =>
            {
                if is_kept_here {
                    keep_here(&mut disk, kept);
                    let _ = claim.write(&disk);
                }
                let served = worth(claim, disk);
                if served.is_none() && is_kept_here {
                    stay(name);
                }
                return served;
            }
            Ok(Some((_, Some(left)))) if !state::is_doomed(name) && kept_by(&left).is_some() => {
                return None;
            }
            Ok(Some((claim, left))) => {
                // It is ours until it is removed.
                if let Some(left) = left {
                    clean(&left);
                }
                claim.remove();
                return None;
            }
            Ok(None) if state::peek(name).is_some_and(|disk| is_anothers(&disk, server)) => {
                return None;
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => {
                let _ = server::silence(Some(&state::path(name, "log")));
                eprintln!("devsplice: {name}: its server has died: {error}");
                if is_kept_here {
                    stay(name);
                }
                return None;
            }
        }
    }
    None
}

/// Whether a disk has been served by another than process `server`, and that one's guard keeps it.
/// A number that is merely another is not enough: `server` may have died before it wrote its own,
/// and this process be the last that keeps the disk.
fn is_anothers(disk: &Disk, server: u32) -> bool {
    let is_ours = |keeper: &Keeper| keeper.pid == std::process::id();
    disk.pid != server && !disk.keeper.as_ref().is_some_and(is_ours) && keeper::of(disk).is_some()
}

/// Makes this process the one that keeps the disk: who wants it has to find that here.
fn keep_here(disk: &mut Disk, kept: &[OwnedFd]) {
    let Some(keeper) = &mut disk.keeper else { return };
    keeper.pid = std::process::id();
    keeper.started = keeper::started(keeper.pid).unwrap_or(0);
    keeper.fds = keeper::numbers(kept);
    keeper.own.clear();
}

/// A server of many that has died: its disks that the kernel has not kept are cleaned up.
fn orphaned_server(name: &str) -> Option<String> {
    let end = Instant::now() + PATIENCE;
    let mut seat = loop {
        match Seat::take(name).ok()? {
            // It has not got so far as to say who it is.
            Some(seat) if seat.is_new() => {
                seat.remove();
                return None;
            }
            Some(seat) => break seat,
            None if Instant::now() > end => return None,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    for found in servers::disks(name).ok()? {
        if kept_by(&found.disk).is_none()
            && let Ok(Some(claim)) = Claim::try_take(&found.disk.name)
        {
            claim.remove();
        }
    }
    let _ = server::silence(Some(&state::server_file(name, "log")));
    let about = &mut seat.about;
    let soon = state::now_ms().saturating_sub(about.started_ms) < state::SETTLED_MS;
    about.restarts = if soon { about.restarts + 1 } else { 1 };
    let is_hopeless = about.restarts > MOST_RESTARTS;
    eprintln!(
        "devsplice: server {name} (process {}) has died; {}",
        about.pid,
        if is_hopeless { "too often soon after its start: it stays so" } else { "another starts" }
    );
    if is_hopeless {
        about.restarts = 0;
    }
    let _ = seat.write();
    (!is_hopeless).then(|| name.to_owned())
}

/// A server of many whose disks process `server` handed to another program which has not taken
/// them.
fn abandoned_server(name: &str, server: u32) -> Option<String> {
    let (end, mut free_since) = (Instant::now() + SUCCESSION, None);
    while Instant::now() < end {
        match Seat::take(name).ok()? {
            // It has been taken over, and ended in good order.
            Some(seat) if seat.is_new() => {
                seat.remove();
                return None;
            }
            // Somebody has been there since: that one had a guard of its own.
            Some(seat) if seat.about.pid != server => return None,
            Some(seat) => {
                let since = *free_since.get_or_insert_with(Instant::now);
                if since.elapsed() > HESITATION {
                    drop(seat);
                    return Some(name.to_owned());
                }
            }
            None => free_since = None,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// Keeps a disk that is not to be served for now, until somebody else does or it is removed.
fn stay(name: &str) {
    let is_ours = |disk: Disk| disk.keeper.is_some_and(|one| one.pid == std::process::id());
    while state::peek(name).is_none_or(is_ours) && state::path(name, "json").exists() {
        std::thread::sleep(STAY);
    }
}

/// A disk that process `server` handed to another program which has not taken it.
fn abandoned(name: &str, server: u32) -> Option<String> {
    let (end, mut free_since) = (Instant::now() + SUCCESSION, None);
    while Instant::now() < end {
        match Claim::hold(name).ok()? {
            // Removed in good order meanwhile.
            Some((claim, None)) => {
                claim.remove();
                return None;
            }
            Some((claim, Some(disk))) => {
                // Somebody has served it since: that one had a guard of its own.
                if disk.pid != server {
                    return None;
                }
                let since = *free_since.get_or_insert_with(Instant::now);
                if since.elapsed() > HESITATION && is_kept(&disk) {
                    drop(claim);
                    return Some(disk.name);
                }
            }
            None => free_since = None,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// Whether a dead server is to be replaced: not where a person suspended the disk, and not for ever
/// where each dies soon after its start.
fn worth(mut claim: Claim, mut disk: Disk) -> Option<String> {
    if disk.quiesced {
        return None;
    }
    let soon = state::now_ms().saturating_sub(disk.started_ms) < state::SETTLED_MS;
    disk.restarts = if soon { disk.restarts + 1 } else { 1 };
    let _ = server::silence(Some(&state::path(&disk.name, "log")));
    if disk.restarts > MOST_RESTARTS {
        disk.restarts = 0;
        let name = &disk.name;
        eprintln!(
            "devsplice: {name}: its server has died {MOST_RESTARTS} times soon after its start; \
             the kernel holds its requests until devsplice recover {name} or devsplice del --force"
        );
        let _ = claim.write(&disk);
        return None;
    }
    let _ = claim.write(&disk);
    eprintln!(
        "devsplice: {}: its server (process {}) has died; another starts",
        disk.name, disk.pid
    );
    Some(disk.name)
}

/// Becomes the server. The claim on the name is taken anew: the next guard, a copy of this process,
/// must not have it.
fn succeed(name: &str, kept: &[OwnedFd]) {
    let _ = server::silence(Some(&state::path(name, "log")));
    let mut pause = FIRST_PAUSE;
    loop {
        // Whatever becomes of that, this process keeps what it has.
        let copies = kept.iter().filter_map(|fd| fd.try_clone().ok()).collect();
        let failed = become_server(name, || crate::recover::again(name, Some(copies)));
        if failed != Some(ErrorKind::Busy) || !waits(name, !kept.is_empty()) {
            break;
        }
        if sandbox::is_on() {
            // It can start no guard any more. Where this is a unit's, that is to be tried again:
            // it is for what ends abnormally alone.
            if kept.is_empty() {
                std::process::abort();
            }
            break;
        }
        // What a dead server has in flight below holds that for as long as it takes.
        eprintln!("devsplice: {name}: tried again in {} ms", pause.as_millis());
        std::thread::sleep(pause);
        pause = (pause * 2).min(LAST_PAUSE);
        if !waits(name, !kept.is_empty()) {
            break;
        }
    }
    if !kept.is_empty() {
        stay(name);
    }
    std::process::exit(1);
}

/// Whether a disk still waits for a server: nobody else has it, nor has removed it.
fn waits(name: &str, is_kept_here: bool) -> bool {
    let Ok(Some((_, Some(disk)))) = Claim::hold(name) else { return false };
    let is_there = is_kept(&disk) || is_kept_here && disk.outlives_server();
    is_there && !disk.quiesced && !state::is_doomed(name)
}

/// The same for a server of many.
fn succeed_server(name: &str) {
    let _ = server::silence(Some(&state::server_file(name, "log")));
    become_server(name, || crate::recover::again_many(name, (None, None), "restarted"));
    std::process::exit(1);
}

/// Serves, and ends with that. Returns where it cannot; why, if it has not begun.
fn become_server(name: &str, start: impl FnOnce() -> Result<Server>) -> Option<ErrorKind> {
    let _ = std::env::set_current_dir("/");
    let (error, kind) = match start().map(Server::run) {
        Ok(Ok(())) => std::process::exit(0),
        Ok(Err(error)) => (error, None),
        Err(error) => {
            let kind = error.kind();
            (error, Some(kind))
        }
    };
    eprintln!("devsplice: {error}; devsplice recover {name} tries again");
    kind
}

impl Guard {
    /// Its process.
    pub fn pid(&self) -> i32 {
        self.voice.pid()
    }

    /// Whether it has ended, without having been told to.
    pub fn has_died(&self) -> bool {
        matches!(fork::waitpid_nohang(self.voice.pid()), Ok(Some(_)))
    }

    /// For those that have something to be kept.
    pub fn voice(&self) -> Voice {
        self.voice.clone()
    }

    /// Names what is to be cleaned up after.
    pub fn name(&mut self, name: &str) {
        if !self.keeps_on {
            self.voice.say(name);
        }
    }

    /// Names the disk that is kept by what the guard was started with. If this process fails or
    /// dies the guard sees to it that somebody serves the disk, and keeps it until then.
    pub fn keep_on(&mut self, name: &str) {
        self.name(name);
        self.keeps_on = true;
    }

    /// Tells the guard that another program is to serve the disk. It stays until that one does.
    pub fn hand_over(self) {
        self.voice.say(HANDOVER);
        self.voice.end();
    }

    /// The disk is not served by this process after all. The guard goes; but one that may be the
    /// last to keep the disk goes on as if this process had died.
    pub fn give_up(self) {
        match self.keeps_on {
            true => self.voice.end(),
            false => self.dismiss(),
        }
    }

    /// Tells the guard that all is cleaned up, and waits for it to go; not for ever, as somebody
    /// may have stopped it.
    pub fn dismiss(self) {
        self.voice.say(&format!("{FAREWELL}\n{FAREWELL}"));
        self.voice.end();
        let end = Instant::now() + THERE_LIMIT;
        while matches!(fork::waitpid_nohang(self.voice.pid()), Ok(None)) {
            if Instant::now() > end {
                let pid = self.voice.pid();
                eprintln!("devsplice: the guard (process {pid}) is stopped: kill -CONT {pid}");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Takes the device of a server that is gone away. For who holds the claim on its name. Best
/// effort: each step is tried even if the one before it failed.
pub fn clean(disk: &Disk) {
    if let Some(id) = disk.ublk_id
        && let Ok(mut control) = ublk::Control::open()
    {
        clean_ublk(&mut control, id, disk.pid);
    }
    let _ = match (disk.fuse_connection, disk.device.as_str()) {
        // It died while it was attached.
        (Some(number), "") => fuse::clear_unknown(&disk.name, number),
        (Some(_), device) => fuse::clear_loop(device, &disk.name),
        (None, _) => Ok(false),
    };
}

/// Deletes a ublk device, unless a living process other than the dead server has it by now.
fn clean_ublk(control: &mut ublk::Control, id: u32, dead: u32) {
    let end = Instant::now() + PATIENCE;
    loop {
        let Ok((pid, state)) = control.server(id) else { return };
        let is_ours = u32::try_from(pid).is_ok_and(|pid| pid == dead) || pid <= 0;
        if !is_ours {
            return;
        }
        // The kernel stops the disk by itself as the server's descriptors close.
        if state == "dead" || Instant::now() > end {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    match control.delete(id) {
        Err(error) if error.kind() != ErrorKind::NotFound => eprintln!("devsplice: {error}"),
        _ => {}
    }
}
