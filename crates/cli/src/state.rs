//! Answers for what is known of served disks between commands: files under /run/devsplice.
//!
//! NAME.json says what a disk is; its server holds a lock on it for as long as it lives, so that a
//! process number that was used again misleads nobody. NAME.next is what it is to say, while that
//! is written over what it says. NAME.sock is where the server listens, NAME.log what it had to
//! say. Where one server has many disks, the last two are links to what it has: @SERVER.sock and
//! @SERVER.log; @SERVER.server says who it is.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_spec::Plan;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::Add;
use crate::assemble::CATALOG;
use crate::guard;

/// What a disk is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Disk {
    /// What users call it.
    pub name: String,
    /// Its node; empty until it is there.
    pub device: String,
    /// The server of many disks that it is one of; none for one of its own.
    #[serde(default)]
    pub server: Option<String>,
    /// `ublk` or `fuse`.
    pub export: String,
    /// Why this front end.
    pub why: String,
    /// How data moves.
    pub data_path: String,
    /// Whether requests come and go in batches.
    #[serde(default)]
    pub batch: bool,
    /// Whether it is served for requests that come one at a time.
    #[serde(default)]
    pub low_depth: bool,
    /// What of the driver's features it was made with, as `devsplice features` names them.
    #[serde(default)]
    pub features: Vec<String>,
    /// Number of the ublk device.
    pub ublk_id: Option<u32>,
    /// Number of the FUSE connection.
    #[serde(default)]
    pub fuse_connection: Option<u32>,
    /// Who keeps its FUSE connection while its server is replaced.
    #[serde(default)]
    pub keeper: Option<Keeper>,
    /// The process that serves it.
    pub pid: u32,
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    pub block: u32,
    /// Whether changes are refused.
    pub read_only: bool,
    /// As given with --serial.
    pub serial: Option<String>,
    /// The stack as one line.
    pub stack: String,
    /// What messages and `tell` call its places, in the stack's order.
    #[serde(default)]
    pub labels: Vec<String>,
    /// What becomes of it when its server dies.
    #[serde(default)]
    pub recovery: String,
    /// Whether it was quiesced, so that the kernel holds its requests.
    #[serde(default)]
    pub quiesced: bool,
    /// Whether it was to be let go of, and a device below holds on to requests. It is served to
    /// nobody then.
    #[serde(default)]
    pub ending: bool,
    /// How often in a row its server died within [`SETTLED_MS`] of its start.
    #[serde(default)]
    pub restarts: u32,
    /// When its server started, in milliseconds since 1970.
    #[serde(default)]
    pub started_ms: u64,
    /// The options that it was made with.
    #[serde(default)]
    pub made_with: Option<Add>,
    /// Whether another tool has made it, so that it was told other things than we would have.
    #[serde(default)]
    pub adopted: bool,
    /// What is not as one would wish.
    pub warnings: Vec<String>,
}

/// A process that has all descriptors of a FUSE connection.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Keeper {
    /// Its number.
    pub pid: u32,
    /// When it started ([`crate::keeper::started`]): later processes may have its number. 0 if that
    /// is not known.
    #[serde(default)]
    pub started: u64,
    /// The descriptors' numbers there.
    pub fds: Vec<i32>,
    /// Their numbers in the server itself, for where its guard is gone.
    #[serde(default)]
    pub own: Vec<i32>,
    /// When the server started.
    #[serde(default)]
    pub own_started: u64,
    /// What the disk's users were told of it.
    pub told: String,
}

/// How long a dead server may have its lock.
pub const LINGER: Duration = Duration::from_secs(2);
/// Milliseconds after which a server's death is not the start's fault.
pub const SETTLED_MS: u64 = 1000;

impl Disk {
    /// Its stack as a plan.
    ///
    /// # Errors
    /// If a file of it is used twice by now, or this program does not know a layer of it.
    pub fn plan(&self) -> Result<Plan> {
        Ok(Plan::parse(&self.stack, &CATALOG)?.labelled(&self.labels))
    }

    /// Whether the kernel keeps it when its server dies.
    pub fn outlives_server(&self) -> bool {
        (self.ublk_id.is_some() || self.keeper.is_some())
            && !matches!(self.recovery.as_str(), "" | "off")
    }

    /// What of it people may want to read.
    pub fn shown(&self) -> Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        if let Some(fields) = value.as_object_mut() {
            for own in ["made_with", "labels", "keeper"] {
                fields.remove(own);
            }
        }
        value
    }
}

/// Where state lives: DEVSPLICE_RUN, for tests, else /run/devsplice; a user's in the directory that
/// the user has for such.
pub fn dir() -> PathBuf {
    if let Some(run) = std::env::var_os("DEVSPLICE_RUN") {
        return PathBuf::from(run);
    }
    let users = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    match users.filter(|_| !rustix::process::geteuid().is_root()) {
        Some(run) => PathBuf::from(run).join("devsplice"),
        None => PathBuf::from("/run/devsplice"),
    }
}

/// The file of `name` with this ending.
pub fn path(name: &str, ending: &str) -> PathBuf {
    dir().join(format!("{name}.{ending}"))
}

/// The file of a server of many disks with this ending. No disk's name begins like it.
pub fn server_file(server: &str, ending: &str) -> PathBuf {
    dir().join(format!("@{server}.{ending}"))
}

/// Where a disk's node can be found by its name.
pub fn link(name: &str) -> PathBuf {
    PathBuf::from("/dev/devsplice").join(name)
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Says that the disk is to go, whatever its server was made for.
///
/// # Errors
/// If that cannot be written down.
pub fn doom(name: &str) -> Result<()> {
    let path = path(name, "doomed");
    File::create(&path).map(drop).map_err(|error| Error::os(path.display().to_string(), &error))
}

/// Whether it is to go.
pub fn is_doomed(name: &str) -> bool {
    path(name, "doomed").exists()
}

/// Makes the directory of links and the one of state.
///
/// # Errors
/// Without the right to.
pub fn make_dirs() -> Result<()> {
    let run = dir();
    DirBuilder::new().recursive(true).mode(0o700).create(&run).map_err(|error| {
        let error = Error::os(run.display().to_string(), &error);
        let next = "run as root, or set XDG_RUNTIME_DIR or DEVSPLICE_RUN to a directory of yours";
        if error.kind() == ErrorKind::Permission { error.next(next) } else { error }
    })
}

/// Checks a name that a user gave: it becomes part of file names.
///
/// # Errors
/// Which names are good.
pub fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 48 || name.starts_with('.') || !name.chars().all(good) {
        let reason = "is no name: 1 to 48 letters, digits, . _ -, not starting with a dot";
        return Err(Error::invalid(format!("`{name}`"), reason));
    }
    Ok(())
}

/// A state file that this process holds.
pub struct Claim {
    file: File,
    /// Whose it is.
    pub name: String,
}

impl Claim {
    /// Takes `name`, or the first free of d0, d1, ... What a dead server left under it is cleaned
    /// up, unless the kernel keeps its disk: that is not for a new one to lose.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn take(name: Option<&str>) -> Result<Claim> {
        make_dirs()?;
        if let Some(name) = name {
            check_name(name)?;
            let taken = |reason: &str| Error::new(ErrorKind::Busy, format!("`{name}`"), reason);
            return match Claim::hold_of_dead(name)? {
                Some((claim, left)) => match left.as_ref().and_then(guard::kept_by) {
                    Some(keeper) => Err(taken(keeper.says()).next(format!(
                        "{}; devsplice del {name} removes it; or choose another --name",
                        keeper.next(name)
                    ))),
                    None => Ok(cleaned((claim, left))),
                },
                None => Err(taken("is the name of a running disk")
                    .next(format!("devsplice del {name}, or choose another --name"))),
            };
        }
        for number in 0..65_536 {
            let name = format!("d{number}");
            // Where there may be hundreds, nobody waits to see whether one of them is just being
            // looked at.
            if look(&path(&name, "json")).is_ok_and(|found| found.is_some_and(|one| one.alive)) {
                continue;
            }
            match Claim::hold(&name) {
                Ok(Some((_, Some(left)))) if guard::kept_by(&left).is_some() => {}
                Ok(Some(held)) => return Ok(cleaned(held)),
                Ok(None) => {}
                // Nobody knows what that is.
                Err(error) if error.kind() == ErrorKind::Invalid => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(ErrorKind::Busy, "names", "d0 to d65535 are all taken"))
    }

    /// Takes `name` unless a server has it; what a dead one left under it is cleaned up.
    ///
    /// # Errors
    /// If the state file cannot be opened.
    pub fn try_take(name: &str) -> Result<Option<Claim>> {
        Ok(Claim::hold(name)?.map(cleaned))
    }

    /// Takes `name` unless a server has it, with what a dead one left under it.
    ///
    /// # Errors
    /// If the state file cannot be opened, or makes no sense: it stays as it is then.
    pub fn hold(name: &str) -> Result<Option<(Claim, Option<Disk>)>> {
        let path = path(name, "json");
        let os = |error| Error::os(path.display().to_string(), &error);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        for _ in 0..100 {
            let file = options.open(&path).map_err(os)?;
            if !lock(&file) {
                return Ok(None);
            }
            if !is_ghost(&file, &path) {
                let mut claim = Claim { file, name: name.to_owned() };
                let left = claim.read()?;
                return Ok(Some((claim, left)));
            }
        }
        Ok(None)
    }

    /// As [`Claim::hold`]; where a process that has died still has the lock, which goes with its
    /// last thread and with what it had in flight, a little later.
    fn hold_of_dead(name: &str) -> Result<Option<(Claim, Option<Disk>)>> {
        let end = Instant::now() + LINGER;
        loop {
            let held = Claim::hold(name)?;
            let is_dead = || peek(name).is_some_and(|disk| !runs(disk.pid));
            if held.is_some() || Instant::now() > end || !is_dead() {
                return Ok(held);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The lock itself: it is held until the last copy of this is closed.
    ///
    /// # Errors
    /// If there can be no further descriptor.
    pub fn lock(&self) -> Result<Arc<OwnedFd>> {
        let os = |error| Error::os(path(&self.name, "json").display().to_string(), &error);
        self.file.try_clone().map(|file| Arc::new(file.into())).map_err(os)
    }

    fn read(&mut self) -> Result<Option<Disk>> {
        let mut text = Vec::new();
        let done = self.file.rewind().and_then(|()| self.file.read_to_end(&mut text));
        done.map_err(|error| Error::os(path(&self.name, "json").display().to_string(), &error))?;
        parse(&self.name, &text)
    }

    /// Writes what the disk is: over what stood there, with blanks behind it, as the lock is that
    /// file's. Whoever is killed meanwhile, or has no room, must not leave half of it, or the next
    /// does not know what to serve: so what the kernel does not write in one piece is written
    /// beside it first.
    ///
    /// # Errors
    /// If the file cannot be written; it says what it said before then.
    pub fn write(&mut self, disk: &Disk) -> Result<()> {
        let text = serde_json::to_string(disk).unwrap_or_default();
        self.put(&text)
            .map_err(|error| Error::os(path(&self.name, "json").display().to_string(), &error))
    }

    fn put(&mut self, text: &str) -> std::io::Result<()> {
        let before = usize::try_from(self.file.metadata()?.len()).unwrap_or(0);
        let len = before.max(text.len());
        let text = format!("{text:len$}");
        let (next, new) = (path(&self.name, "next"), path(&self.name, "next~"));
        if len <= IN_ONE_PIECE && !next.exists() {
            return self.file.write_all_at(text.as_bytes(), 0);
        }
        let beside = write_new(&new, text.trim_end()).and_then(|()| std::fs::rename(&new, &next));
        if let Err(error) = beside {
            let _ = std::fs::remove_file(&new);
            // What needs no more room than it has is written all the same: a disk that waits for
            // it to be is worse.
            if len > before {
                return Err(error);
            }
            // One that is there from before would count.
            let _ = std::fs::remove_file(&next);
        }
        match self.file.write_all_at(text.as_bytes(), 0) {
            Ok(()) => {
                let _ = std::fs::remove_file(&next);
                Ok(())
            }
            // It is what counts now.
            Err(_) if next.exists() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes all state of the disk, and the link to its node.
    pub fn remove(self) {
        let _ = std::fs::remove_file(link(&self.name));
        for ending in ["sock", "log", "doomed", "next~", "next", "json"] {
            let _ = std::fs::remove_file(path(&self.name, ending));
        }
    }
}

/// Bytes from the start of a file that the kernel writes whole or not at all, whoever is killed
/// meanwhile and however full the file system is: a page (mm/filemap.c, `generic_perform_write`).
const IN_ONE_PIECE: usize = 4096;

/// Writes a file that only its owner reads.
fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)?.write_all_at(text.as_bytes(), 0)
}

/// What the state file of `name` says, or what it was to say where who wrote it was killed over
/// that. `None` if nothing was ever written.
///
/// # Errors
/// If neither makes sense.
fn parse(name: &str, text: &[u8]) -> Result<Option<Disk>> {
    if text.trim_ascii().is_empty() {
        return Ok(None);
    }
    // It is there only while what stands in the file may be half of it, which need not show.
    let next = std::fs::read(path(name, "next")).unwrap_or_default();
    if let Ok(disk) = serde_json::from_slice(&next) {
        return Ok(Some(disk));
    }
    serde_json::from_slice(text).map(Some).map_err(|reason| {
        let reason = format!("does not say what the disk is, and is kept as it is: {reason}");
        Error::invalid(path(name, "json").display().to_string(), reason).next(
            "a devsplice as new as the one that wrote it may know; devsplice adopt serves what \
             ublk has; remove the file if the disk is not missed",
        )
    })
}

/// Whether a file is not the one of that path any more: between open and lock its owner may have
/// removed it, and then the lock is on a ghost.
pub(crate) fn is_ghost(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(ours), Ok(named)) => ours.ino() != named.ino(),
        _ => true,
    }
}

/// A claim, after cleaning up what the last server left.
pub(crate) fn cleaned((claim, left): (Claim, Option<Disk>)) -> Claim {
    if let Some(left) = left {
        guard::clean(&left);
    }
    claim
}

/// Locks a state file, unless a server has. Who only looks (`list`) has it for a moment, which is
/// not to be taken for a server.
pub(crate) fn lock(file: &File) -> bool {
    for _ in 0..20 {
        if flock(file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    false
}

/// A disk as found under /run/devsplice.
#[derive(Clone, Debug)]
pub struct Found {
    /// What its state file says.
    pub disk: Disk,
    /// Whether its server lives.
    pub alive: bool,
}

impl Found {
    /// Whether its server's process runs; where it does not, and [`Found::alive`] says that it
    /// lives, something that it had in flight still has its lock.
    pub fn lives(&self) -> bool {
        runs(self.disk.pid)
    }

    /// Whether that process ends in this time.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self.lives() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        !self.lives()
    }
}

/// Whether a process is there and has not ended. (Threads of one that has may be about to.)
pub(crate) fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    let state = stat.ok().and_then(|stat| stat.rsplit_once(") ")?.1.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// What is in the directory of state.
fn entries() -> Result<Vec<PathBuf>> {
    let run = dir();
    match std::fs::read_dir(&run) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => {
            let error = Error::os(run.display().to_string(), &error);
            let is_permission = error.kind() == ErrorKind::Permission;
            Err(if is_permission { error.next("run as root") } else { error })
        }
    }
}

fn ends_in(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|one| one == ending)
}

/// Every disk, by name.
///
/// # Errors
/// If the directory is there and cannot be read.
pub fn all() -> Result<Vec<Found>> {
    let paths = entries()?.into_iter().filter(|path| ends_in(path, "json"));
    let mut found: Vec<_> = paths.filter_map(|path| look(&path).ok().flatten()).collect();
    found.sort_by(|a, b| a.disk.name.cmp(&b.disk.name));
    Ok(found)
}

/// Why the state files make no sense that do not.
///
/// # Errors
/// As [`all`].
pub fn unreadable() -> Result<Vec<Error>> {
    let paths = entries()?.into_iter().filter(|path| ends_in(path, "json"));
    let bad = |error: &Error| error.kind() == ErrorKind::Invalid;
    Ok(paths.filter_map(|path| look(&path).err()).filter(bad).collect())
}

/// The names of all servers of many of which there is a file, whether they live or not.
///
/// # Errors
/// As [`all`].
pub fn servers() -> Result<Vec<String>> {
    let paths = entries()?.into_iter().filter(|path| ends_in(path, "server"));
    let name = |path: PathBuf| Some(path.file_stem()?.to_str()?.strip_prefix('@')?.to_owned());
    let mut names: Vec<_> = paths.filter_map(name).collect();
    names.sort();
    Ok(names)
}

/// What the state file of `name` says, whoever has it.
pub fn peek(name: &str) -> Option<Disk> {
    parse(name, &std::fs::read(path(name, "json")).ok()?).ok().flatten()
}

/// Locks a file as one who only looks does; whether nobody has it.
pub(crate) fn lock_shared(file: &File) -> bool {
    flock(file, FlockOperation::NonBlockingLockShared).is_ok()
}

fn look(path: &Path) -> Result<Option<Found>> {
    let (Ok(file), Ok(text)) = (File::open(path), std::fs::read(path)) else { return Ok(None) };
    let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(disk) = parse(name, &text)? else { return Ok(None) };
    let alive = !lock_shared(&file);
    Ok(Some(Found { disk, alive }))
}

/// The disk that a user means by a name or a device node.
///
/// # Errors
/// If there is none; lists those that are there. If its state file makes no sense.
pub fn find(word: &str) -> Result<Found> {
    if check_name(word).is_ok()
        && let Some(found) = look(&path(word, "json"))?
    {
        return Ok(found);
    }
    let all = all()?;
    let by_node = std::fs::canonicalize(word).ok();
    let node = by_node.as_deref().and_then(|path| path.to_str()).unwrap_or(word);
    let hit = all.iter().find(|one| one.disk.name == word || one.disk.device == node);
    if let Some(hit) = hit {
        return Ok(hit.clone());
    }
    let names: Vec<_> = all.iter().map(|one| one.disk.name.as_str()).collect();
    let next = match names.is_empty() {
        true => "no disk is served here; devsplice add makes one".to_owned(),
        false => format!("these are: {}", names.join(", ")),
    };
    Err(Error::new(ErrorKind::NotFound, format!("`{word}`"), "no such disk").next(next))
}

#[cfg(test)]
mod tests;
