//! One VM at a time on this machine: a lock that every run takes, whoever starts it.
//!
//! A VM that counts instructions has a lock of its own: what else runs does not change its figures.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::qemu::Accel;
use crate::Fallible;
use crate::proc;

/// Not below TMPDIR: it is the machine's lock, not the user's.
const LOCK: &str = "/tmp/devsplice-vm.lock";
const COUNTING_LOCK: &str = "/tmp/devsplice-vm-counting.lock";
const RUN_PREFIX: &str = "devsplice-vm.run-";

/// One of the machine's VM slots, held until dropped.
pub struct Slot {
    _file: File,
}

impl Slot {
    /// Waits for the slot, telling who holds it, and removes what killed runs left behind.
    pub fn take(accel: Accel) -> Fallible<Self> {
        let path = match accel {
            Accel::Icount => COUNTING_LOCK,
            Accel::Tcg | Accel::Kvm => LOCK,
        };
        let mut file = open(path).map_err(|e| format!("cannot open the lock file {path}: {e}"))?;
        let mut told = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(e) => return Err(format!("cannot lock {path}: {e}")),
            }
            if !told {
                let holder = std::fs::read_to_string(path).unwrap_or_default();
                eprintln!("xtask: waiting for another VM to end (process {})", holder.trim());
                told = true;
            }
            proc::check_interrupt()?;
            proc::nap();
        }
        // The number is for the message above; without it the lock works as well.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        remove_leftovers();
        Ok(Self { _file: file })
    }
}

/// Opens the lock file, any user's: with `fs.protected_regular` another user's file in /tmp may
/// not be opened with O_CREAT, and flock needs no write permission.
fn open(path: &str) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options
        .open(path)
        .or_else(|_| options.clone().create(true).mode(0o666).open(path))
        .or_else(|_| File::open(path))
}

/// The directory of this process's run.
pub fn run_directory() -> PathBuf {
    std::env::temp_dir().join(format!("{RUN_PREFIX}{}", std::process::id()))
}

/// Removes run directories whose process is gone (it was killed with SIGKILL).
fn remove_leftovers() {
    let Ok(list) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in list.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(RUN_PREFIX)) else {
            continue;
        };
        if pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists() {
            // Another user's leftovers stay: they are not ours to remove.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
