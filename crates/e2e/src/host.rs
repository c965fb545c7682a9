//! Answers for this machine: which program is tested, root, tools, modules, front ends.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::command::call;
use crate::suite::{Outcome, skip};

/// Where the suite runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// On a machine that others use as well.
    Native,
    /// In a machine of its own, which may be changed at will, and is slow.
    Vm,
}

/// As DEVSPLICE_E2E says: `native` if nothing is said.
///
/// # Panics
/// If it is neither `native` nor `vm`.
#[must_use]
pub fn mode() -> Mode {
    match std::env::var("DEVSPLICE_E2E").as_deref() {
        Ok("vm") => Mode::Vm,
        Ok("native") | Err(_) => Mode::Native,
        Ok(other) => panic!("DEVSPLICE_E2E={other}: neither native nor vm"),
    }
}

/// Whether the same run has had this group of tests before, of the same program on the machine
/// itself: DEVSPLICE_E2E_HAD names such groups, with commas. There a virtual machine repeats only
/// what moves data, which is where its kernel may differ.
#[must_use]
pub fn had(group: &str) -> bool {
    let all = std::env::var("DEVSPLICE_E2E_HAD").unwrap_or_default();
    mode() == Mode::Vm && all.split(',').any(|one| one == group)
}

/// The command that is tested: DEVSPLICE_BIN, or what cargo built beside these tests.
#[must_use]
pub fn program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("DEVSPLICE_BIN") {
        return Some(PathBuf::from(path));
    }
    let this = std::env::current_exe().ok()?;
    let target = this.parent()?.parent()?.parent()?;
    let built = |profile: &str| target.join(profile).join("devsplice");
    ["release", "debug"].into_iter().map(built).find(|path| path.is_file())
}

/// Whether this is root.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Goes on if `is_so`, else skips.
///
/// # Errors
/// The skip.
pub fn need(is_so: bool, reason: &str) -> Outcome {
    if is_so { Ok(()) } else { skip(reason) }
}

/// Goes on if there is such a program.
///
/// # Errors
/// The skip.
pub fn need_tool(name: &str) -> Outcome {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    need(found, &format!("no program {name} here"))
}

/// Whether the kernel can mount such a file system, if need be with a module.
#[must_use]
pub fn kernel_has_file_system(name: &str) -> bool {
    let known = || {
        let all = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        all.split_whitespace().any(|word| word == name)
    };
    if !known() && need_tool("modprobe").is_ok() {
        let _ = call("modprobe", ["-q", name]).run();
    }
    known()
}

/// Whether the kernel is of this release or a later one.
#[must_use]
pub fn kernel_is(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (major, minor)
}

/// ublk's data paths, best first, as `--data-path` takes them.
pub const PATHS: [&str; 4] = ["auto-register", "register", "user-copy", "copy"];

/// FUSE's data paths by io_uring, best first.
pub const FUSE_PATHS: [&str; 2] = ["fuse-zero-copy", "fuse-uring"];

/// A front end, and how data moves through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// FUSE + loop, by /dev/fuse.
    Fuse,
    /// The same, by io_uring, with a data path.
    FuseUring(&'static str),
    /// ublk with a data path.
    Ublk(&'static str),
    /// The same, in batches.
    Batch(&'static str),
    /// The same, with one queue that several threads share.
    Shared(&'static str),
    /// ublk without copies, not for requests that come one at a time.
    ManyAtATime,
}

impl Kind {
    /// As part of a test's name.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Kind::Fuse => "fuse".to_owned(),
            Kind::FuseUring(path) => path.replace('-', "_"),
            Kind::Ublk(path) => format!("ublk::{}", path.replace('-', "_")),
            Kind::Batch(path) => format!("ublk::batch_{}", path.replace('-', "_")),
            Kind::Shared(path) => format!("ublk::shared_{}", path.replace('-', "_")),
            Kind::ManyAtATime => "ublk::many_at_a_time".to_owned(),
        }
    }

    /// The arguments of `devsplice add`.
    #[must_use]
    pub fn arguments(self) -> Vec<&'static str> {
        match self {
            Kind::Fuse => vec!["--export", "fuse", "--data-path", "fuse-copy"],
            Kind::FuseUring(path) => vec!["--export", "fuse", "--data-path", path],
            Kind::Ublk(path) => vec!["--export", "ublk", "--data-path", path],
            Kind::Batch(path) => [&Kind::Ublk(path).arguments()[..], &["--batch", "on"]].concat(),
            Kind::ManyAtATime => {
                [&Kind::Ublk(PATHS[0]).arguments()[..], &["--low-depth", "off"]].concat()
            }
            Kind::Shared(path) => {
                let threads = ["--queues", "1", "--threads", "3"];
                [&Kind::Batch(path).arguments()[..], &threads].concat()
            }
        }
    }

    /// Whether data passes through the process.
    #[must_use]
    pub fn copies(self) -> bool {
        match self {
            Kind::Fuse => true,
            Kind::FuseUring(path) => path == "fuse-uring",
            Kind::ManyAtATime => false,
            Kind::Ublk(path) | Kind::Batch(path) | Kind::Shared(path) => {
                !matches!(path, "auto-register" | "register")
            }
        }
    }

    /// Whether it is ublk.
    #[must_use]
    pub fn is_ublk(self) -> bool {
        !matches!(self, Kind::Fuse | Kind::FuseUring(_))
    }

    /// Open if disks of this kind can be made here.
    ///
    /// # Errors
    /// The skip.
    pub fn gate(self) -> Outcome {
        need(is_root(), "needs root")?;
        match self {
            Kind::Fuse => {
                let opens = |path: &str| {
                    let open = std::fs::OpenOptions::new().read(true).write(true).open(path);
                    need(open.is_ok(), &format!("{path} cannot be opened"))
                };
                opens("/dev/fuse")?;
                opens("/dev/loop-control")
            }
            Kind::FuseUring(path) => {
                Kind::Fuse.gate()?;
                let offered = offered_paths("fuse");
                need(offered.iter().any(|one| one == path), &{
                    format!("this kernel's FUSE has no {path} path, but: {}", offered.join(", "))
                })
            }
            Kind::Batch(path) | Kind::Shared(path) => {
                Kind::Ublk(path).gate()?;
                let has_batches = features()["ublk"]["features"]["batch-io"] == true;
                need(has_batches, "this kernel's ublk has no batches")
            }
            Kind::ManyAtATime => Kind::Ublk(PATHS[0]).gate(),
            Kind::Ublk(path) => {
                need(Path::new("/dev/ublk-control").exists(), "no /dev/ublk-control: no ublk_drv")?;
                let offered = offered_paths("ublk");
                need(offered.iter().any(|one| one == path), &{
                    format!("this kernel's ublk has no {path} path, but: {}", offered.join(", "))
                })
            }
        }
    }
}

/// What the command under test says that this kernel has.
fn features() -> &'static serde_json::Value {
    static FEATURES: OnceLock<serde_json::Value> = OnceLock::new();
    FEATURES.get_or_init(|| {
        let Some(program) = program() else { return serde_json::Value::Null };
        if mode() == Mode::Vm {
            // FUSE over io_uring is off unless somebody wants it.
            let _ = std::fs::write("/sys/module/fuse/parameters/enable_uring", "1");
        }
        serde_json::from_str(&call(program, ["features", "--json"]).ok()).unwrap_or_default()
    })
}

fn offered_paths(front: &str) -> Vec<String> {
    let paths = features()[front]["data_paths"].as_array().cloned().unwrap_or_default();
    paths.iter().filter_map(|path| path.as_str().map(str::to_owned)).collect()
}

/// A value below /proc/sys that is changed for a while.
pub struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    /// Changes it; nothing where there is no such value, or on a machine that others use as well.
    #[must_use]
    pub fn change(path: &'static str, value: &str) -> Option<Setting> {
        if mode() != Mode::Vm {
            return None;
        }
        let before = std::fs::read_to_string(path).ok()?;
        std::fs::write(path, value).ok()?;
        Some(Setting { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = std::fs::write(self.path, &self.before);
    }
}
