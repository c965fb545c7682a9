//! The host's trees for the guest: whichever virtiofsd there is, QEMU's old one in C or the new.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use crate::Fallible;
use crate::deps;
use crate::proc::{self, Guard, find_program, is_executable, tied};

/// How long a daemon may take to offer its socket.
const START: Duration = Duration::from_secs(10);

/// A virtiofsd on this machine.
pub struct Daemon {
    path: PathBuf,
    /// QEMU's own, in C: up to QEMU 7.2, other options, root only.
    old: bool,
}

/// One directory to share.
pub struct Share<'a> {
    /// The directory.
    pub directory: &'a Path,
    /// Whether the guest may write.
    pub writable: bool,
}

/// How many inodes the guest may remember, where this machine does not let virtiofsd open files
/// without end: half of them are overlayfs's and cost nothing here, a quarter of the descriptors
/// are left for what the guest touches before it looks again.
pub fn inode_limit() -> Option<u64> {
    const PLENTY: u64 = 1_000_000;
    let most = getrlimit(Resource::Nofile).maximum?;
    let may_raise =
        capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_RESOURCE));
    (most < PLENTY && !may_raise).then_some(most / 2)
}

impl Daemon {
    /// Finds a virtiofsd; when there is none, installs or builds one.
    pub fn find() -> Fallible<Self> {
        if let Some(found) = Self::probe() {
            return Ok(found);
        }
        let installed = deps::install(&["virtiofsd"]).or_else(|_| {
            eprintln!("xtask: building virtiofsd with cargo; this takes some minutes");
            deps::install(&["libcap-ng-dev", "libseccomp-dev"])?;
            let mut cargo = Command::new("cargo");
            proc::run_quiet(cargo.args(["install", "--locked", "virtiofsd"])).map(drop)
        });
        installed.map_err(|e| format!("no virtiofsd here, and getting one failed: {e}"))?;
        Self::probe().ok_or_else(|| "virtiofsd was installed but is not found".into())
    }

    /// The virtiofsd that this user can run, if any: the old one needs root.
    pub fn probe() -> Option<Self> {
        let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
        let candidates =
            [home.join(".cargo/bin/virtiofsd"), "/usr/libexec/virtiofsd".into()].into_iter();
        let last = Some(PathBuf::from("/usr/lib/qemu/virtiofsd")).into_iter();
        candidates
            .chain(find_program("virtiofsd"))
            .chain(last)
            .filter(|path| is_executable(path))
            .find_map(|path| {
                let help = Command::new(&path).arg("--help").output().ok()?;
                let old = !String::from_utf8_lossy(&help.stdout).contains("--shared-dir");
                (!old || proc::is_root()).then_some(Self { path, old })
            })
    }

    /// Starts sharing a directory; the guest finds it behind the socket.
    pub fn share(&self, share: &Share<'_>, socket: &Path, log: &Path) -> Fallible<Guard> {
        let log = File::create(log).map_err(|e| format!("cannot create {}: {e}", log.display()))?;
        let mut command = tied(&self.path);
        command.arg(format!("--socket-path={}", socket.display()));
        // What runs meanwhile on the host is not for the guest to see: it may cache for ever.
        let cache = if share.writable { "auto" } else { "always" };
        let directory = share.directory.display();
        if self.old {
            command.arg("-o").arg(format!("source={directory},cache={cache},sandbox=chroot"));
            // A listed file is not an opened one: each costs a descriptor here.
            command.args(["-o", "no_readdirplus"]);
        } else {
            command.arg(format!("--shared-dir={directory}")).arg(format!("--cache={cache}"));
            // Announced mount points make overlayfs answer EREMOTE for every directory.
            command.args(["--sandbox=none", "--no-announce-submounts"]);
            command.args((!share.writable).then_some("--readonly"));
        }
        command.arg("--thread-pool-size=0");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut guard = Guard::spawn(&mut command)?;
        let end = Instant::now() + START;
        while !socket.exists() {
            if guard.try_wait()?.is_some() || Instant::now() > end {
                return Err(format!("{} did not start sharing {directory}", self.path.display()));
            }
            proc::check_interrupt()?;
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(guard)
    }
}
