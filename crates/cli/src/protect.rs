//! Answers for what a server's process must be, since the kernel writes memory out through it: not
//! waited for by memory reclaim, never paged out, never killed for memory, never dumped onto the
//! disk that it serves, and no holder of mounts that it does not show.
//!
//! What the machine does not allow is left out and said: a disk is served all the same.

use std::sync::OnceLock;

use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::CapabilitySet;
use serde_json::{Value, json};

use devsplice_uring::thread as threads;

/// What memory the kernel is to leave us when it kills processes for it: all.
const NEVER_KILLED: &str = "-1000";
/// Where that is said.
const OOM: &str = "/proc/self/oom_score_adj";

/// What was done, or why it was not.
struct Done {
    io_flusher: Result<(), String>,
    locked: Result<(), String>,
    spared: Result<(), String>,
    undumped: Result<(), String>,
    mounts: Result<(), String>,
}

static DONE: OnceLock<Done> = OnceLock::new();

/// Makes this process fit to serve a disk. To be called before it has threads or a guard: both get
/// all of this from it, but for the memory lock, which no copy inherits.
pub fn server() {
    let _ = DONE.set(Done {
        spared: spare(),
        undumped: no_core_dump(),
        io_flusher: threads::set_io_flusher().map_err(|error| error.to_string()),
        mounts: own_mounts(),
        locked: lock_memory(),
    });
}

/// Makes a guard, a copy of a server, stay in memory as well.
pub fn guard() {
    let _ = lock_memory();
}

/// What was done, for `info`.
pub fn shown() -> Value {
    let Some(done) = DONE.get() else { return Value::Null };
    let word = |result: &Result<(), String>| match result {
        Ok(()) => json!("on"),
        Err(reason) => json!(format!("off: {reason}")),
    };
    json!({
        "io_flusher": word(&done.io_flusher),
        "memory_locked": word(&done.locked),
        "spared_when_out_of_memory": word(&done.spared),
        "no_core_dump": word(&done.undumped),
        "own_mounts": word(&done.mounts),
    })
}

/// What may go wrong for want of protection, for whoever makes the disk. The I/O threads say so of
/// the flusher themselves; mounts that are shared endanger no disk of a machine without containers.
pub fn warnings() -> Vec<String> {
    let Some(done) = DONE.get() else { return Vec::new() };
    let all = [
        (&done.locked, "may be paged out, and wait for its own disk then"),
        (&done.spared, "may be killed when memory runs out"),
        (&done.undumped, "may be dumped onto its own disk when it dies"),
    ];
    let failed = all.into_iter().filter_map(|(done, what)| {
        let reason = done.as_ref().err()?;
        Some(format!("the server {what}: {reason}"))
    });
    failed.collect()
}

/// Has the kernel kill all others first when memory runs out.
fn spare() -> Result<(), String> {
    std::fs::write(OOM, NEVER_KILLED).map_err(|error| format!("{OOM}: {error}"))
}

/// No core dump. The limit is for programs that the kernel hands dumps to; it does not keep the
/// kernel from starting them (fs/coredump.c), so there is the other means.
fn no_core_dump() -> Result<(), String> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(|errno| errno.to_string())?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|errno| errno.to_string())
}

/// Keeps all memory of this process resident, as it is touched. Only where there is no limit: under
/// one, memory that is asked for later, while the disk is used, would be refused.
fn lock_memory() -> Result<(), String> {
    let limit = rustix::process::getrlimit(Resource::Memlock).current;
    let may = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if let Some(limit) = limit.filter(|_| !may) {
        let kib = limit >> 10;
        return Err(format!("only {kib} KiB may be locked (ulimit -l unlimited, or CAP_IPC_LOCK)"));
    }
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    rustix::mm::mlockall(flags).map_err(|errno| format!("mlockall: {errno}"))
}

/// Gives the process mounts of its own, which follow those of the machine. When a server is the
/// last process of a container and shares its mounts, its end unmounts what is on its own disk.
///
/// Only where each mount follows: one that did not would be held by the server after its unmount,
/// and whatever is on it, unseen.
fn own_mounts() -> Result<(), String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(place) = stays_behind(&table) {
        return Err(format!("{place} is no shared mount, its unmount would not reach the server"));
    }
    threads::own_mounts().map_err(|error| error.to_string())
}

/// A mount of /proc/self/mountinfo that would not follow the machine's.
fn stays_behind(table: &str) -> Option<&str> {
    if table.is_empty() {
        return Some("/");
    }
    let private = table.lines().find(|line| {
        // Number, parent, device, root, place, options, then what is optional up to a dash.
        let optional = line.split(' ').skip(6).take_while(|word| *word != "-");
        !optional.into_iter().any(|word| word.starts_with("shared:") || word.starts_with("master:"))
    });
    private.map(|line| line.split(' ').nth(4).unwrap_or("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_would_not_follow_is_found() {
        let shared = "27 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
                      30 27 8:2 / /srv rw,noatime master:4 propagate_from:2 - xfs /dev/sdb rw\n";
        assert_eq!(stays_behind(shared), None);
        let private = format!("{shared}31 27 8:3 / /mnt rw,shared - ext4 /dev/shared:1 rw\n");
        assert_eq!(stays_behind(&private), Some("/mnt"));
        let unbindable = format!("{shared}32 27 8:4 / /u rw unbindable - ext4 /dev/sdd rw\n");
        assert_eq!(stays_behind(&unbindable), Some("/u"));
        assert_eq!(stays_behind(""), Some("/"));
    }

    #[test]
    fn nothing_is_claimed_before_it_was_done() {
        // This process serves no disk.
        assert_eq!(shown(), Value::Null);
        assert!(warnings().is_empty());
    }
}
