//! Answers for what the demo makes on this machine: a directory, disks, a mount; and for taking all
//! of it away again, whatever happened before.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde_json::Value;

use super::tool::{QUICK, SLOW, Tool};
use crate::Fallible;
use crate::proc;

/// What the directory is called, before the number of the process that made it.
const PREFIX: &str = "devsplice-demo-";
/// How long what must go may take to go.
const PATIENCE: Duration = Duration::from_secs(15);
/// And a server that is told to stop with force, before it is killed.
const FORCED: Duration = Duration::from_secs(40);

/// The demo's surroundings.
pub struct Site {
    /// The directory that everything is in.
    pub work: PathBuf,
    /// Name of the disk, this demo's alone.
    pub name: String,
    /// The command `devsplice`.
    bin: PathBuf,
}

impl Site {
    /// Makes the directory below `parent`.
    pub fn make(parent: &Path, bin: &Path) -> Fallible<Self> {
        let name = format!("{PREFIX}{}", std::process::id());
        let work = parent.join(&name);
        let failed = |e: std::io::Error| format!("cannot make {}: {e}", work.display());
        DirBuilder::new().mode(0o700).create(&work).map_err(failed)?;
        fs::create_dir(work.join("mnt")).map_err(failed)?;
        Ok(Self { work, name, bin: bin.into() })
    }

    /// What killed demos left below `parent`.
    pub fn abandoned(parent: &Path, bin: &Path) -> Vec<Self> {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        let is_abandoned = |name: &str, work: &Path| {
            let pid = name.strip_prefix(PREFIX).filter(|pid| pid.parse::<u32>().is_ok());
            let ours = || work.symlink_metadata().is_ok_and(|m| m.is_dir() && m.uid() == 0);
            pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) && ours()
        };
        entries
            .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
            .filter(|(name, work)| is_abandoned(name, work))
            .map(|(name, work)| Self { work, name, bin: bin.into() })
            .collect()
    }

    /// Where the file system is mounted.
    pub fn mount_point(&self) -> PathBuf {
        self.work.join("mnt")
    }

    fn run_directory(&self) -> PathBuf {
        self.work.join("run")
    }

    /// The command `devsplice`, with this demo's own state.
    pub fn devsplice(&self, limit: Duration) -> Tool {
        Tool::new(&self.bin, limit).env("DEVSPLICE_RUN", self.run_directory())
    }

    /// Serves a stack; what the command says of it.
    pub fn add(&self, stack: &str, export: &str) -> Fallible<Value> {
        let add = self.devsplice(QUICK).uncut();
        json(&add.args(["add", "--json", "--name", &self.name, "--export", export, stack]).run()?)
    }

    /// What the disk's server tells.
    pub fn info(&self) -> Fallible<Value> {
        json(&self.devsplice(QUICK).args(["info", "--json", &self.name]).run()?)
    }

    /// Stops the disk, and waits for its server's end. The kernel takes a ring apart, and with it
    /// the server's hold on the images, a moment after that.
    pub fn del(&self, images: &[PathBuf]) -> Fallible<()> {
        self.devsplice(SLOW).uncut().args(["del", &self.name]).run()?;
        let is_over =
            || self.processes().is_empty() && images.iter().all(|image| !is_locked(image));
        match wait_until(is_over) {
            true => Ok(()),
            false => Err(format!("the server holds on {} s after del", PATIENCE.as_secs())),
        }
    }

    /// Mounts the file system on `device`.
    pub fn mount(&self, device: &str) -> Fallible<()> {
        let mount = Tool::new("mount", QUICK).arg(device);
        mount.arg(self.mount_point()).run().map(drop)
    }

    /// Unmounts it; all data is written out then.
    pub fn unmount(&self) -> Fallible<()> {
        Tool::new("umount", SLOW).arg(self.mount_point()).run().map(drop)
    }

    fn is_mounted(&self) -> bool {
        let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let point = self.mount_point();
        table.lines().any(|line| line.split(' ').nth(1).is_some_and(|at| Path::new(at) == point))
    }

    /// Takes everything away, by force where need be; what is still there in the end.
    pub fn clean(&self) -> Vec<String> {
        if self.is_mounted() {
            // If that fails, the disk goes first, and then the mount.
            let umount = Tool::new("umount", PATIENCE).uncut();
            let _ = umount.arg(self.mount_point()).run();
        }
        if self.run_directory().exists() {
            self.end_disks();
        }
        if self.is_mounted() {
            let umount = Tool::new("umount", PATIENCE).uncut().arg("--lazy");
            let _ = umount.arg(self.mount_point()).run();
        }
        // Not through a mount: that would remove the files in it, or wait for a dead disk.
        if !self.is_mounted() {
            let _ = fs::remove_dir_all(&self.work);
        }
        self.left()
    }

    /// Removes the disks. A server that does not obey is killed, and its guard clears up after it;
    /// a guard that does not is killed, too, and the command clears up.
    fn end_disks(&self) {
        for _ in 0..3 {
            let del = self.devsplice(FORCED).uncut().args(["del", "--all", "--force"]);
            // Whether that worked is seen from what is still there.
            let _ = del.run();
            if wait_until(|| self.processes().is_empty()) && self.named_servers().is_empty() {
                return;
            }
            let living = self.processes();
            let mut unwanted = self.named_servers();
            unwanted.retain(|pid| living.contains(pid));
            for pid in if unwanted.is_empty() { living } else { unwanted } {
                // It may have ended by itself.
                let _ = Tool::new("kill", QUICK).uncut().args(["-KILL", &pid.to_string()]).run();
            }
            wait_until(|| self.processes().is_empty());
        }
    }

    /// The servers that state files name, living or dead.
    fn named_servers(&self) -> Vec<u64> {
        let files = fs::read_dir(self.run_directory()).into_iter().flatten().flatten();
        files
            .filter_map(|file| json(&fs::read_to_string(file.path()).ok()?).ok()?["pid"].as_u64())
            .collect()
    }

    /// Processes of the command `devsplice` that work on this demo's state.
    fn processes(&self) -> Vec<u64> {
        let mark = format!("DEVSPLICE_RUN={}", self.run_directory().display());
        let is_ours = |process: &Path| {
            let environment = fs::read(process.join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
        };
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes
            .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
            .filter(|(_, path)| is_ours(path))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// What is there of all that the demo made.
    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        if self.is_mounted() {
            left.push(format!("a mount on {}", self.mount_point().display()));
        }
        let link = Path::new("/dev/devsplice").join(&self.name);
        if let Ok(device) = fs::read_link(&link) {
            left.push(format!("the disk {}", device.display()));
        }
        left.extend(self.loop_devices().into_iter().map(|name| format!("the device /dev/{name}")));
        left.extend(self.processes().into_iter().map(|pid| format!("process {pid}")));
        if self.work.exists() {
            left.push(format!("the directory {}", self.work.display()));
        }
        left
    }

    /// Loop devices over this demo's disk: the file below them has its name.
    fn loop_devices(&self) -> Vec<String> {
        let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let is_ours = |name: &str| {
            let below = format!("/sys/block/{name}/loop/backing_file");
            let below = fs::read_to_string(below).unwrap_or_default();
            below.trim_end().trim_end_matches(" (deleted)").ends_with(&format!("/{}", self.name))
        };
        devices
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with("loop") && is_ours(name))
            .collect()
    }
}

/// Whether some process has locked the file, as the server does with what it serves from.
fn is_locked(file: &Path) -> bool {
    let lock = FlockOperation::NonBlockingLockExclusive;
    fs::File::open(file).is_ok_and(|file| flock(&file, lock) == Err(Errno::WOULDBLOCK))
}

fn json(text: &str) -> Fallible<Value> {
    serde_json::from_str(text).map_err(|e| format!("this is no JSON ({e}): {text}"))
}

fn wait_until(is_so: impl Fn() -> bool) -> bool {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() > until {
            return false;
        }
        proc::nap();
    }
    true
}
