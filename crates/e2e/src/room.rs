//! Answers for a test's surroundings: a directory, a state directory and names of its own, lower
//! devices and mounts; everything goes when the test ends, however it ends.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::MIB;
use crate::command::{Call, call};
use crate::disk::Disk;
use crate::host::{Kind, need, program};
use crate::suite::Skip;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Where the rooms of this run are.
pub(crate) fn base() -> PathBuf {
    let set = std::env::var_os("DEVSPLICE_SCRATCH").map(PathBuf::from);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let scratch = mounts.lines().any(|line| line.split(' ').nth(1) == Some("/scratch"));
    let parent = set.unwrap_or_else(|| if scratch { "/scratch" } else { "/tmp" }.into());
    parent.join(format!("devsplice-e2e-{}", std::process::id()))
}

/// What the names of this run's disks begin with.
pub(crate) fn prefix() -> String {
    format!("e2e-{}-", std::process::id())
}

/// A test's surroundings.
pub struct Room {
    /// For files.
    pub dir: PathBuf,
    /// For devsplice's state.
    pub run: PathBuf,
    /// What is to be called, last first, when the test is over.
    tidy: RefCell<Vec<(String, Vec<String>)>>,
    /// The command under test.
    pub program: PathBuf,
}

impl Room {
    /// An empty one.
    ///
    /// # Panics
    /// If there is no room.
    #[must_use]
    #[allow(clippy::new_without_default)] // It makes directories.
    pub fn new() -> Room {
        let dir = base().join(COUNT.fetch_add(1, Ordering::Relaxed).to_string());
        let run = dir.join("run");
        std::fs::create_dir_all(&dir).expect("a directory for the test");
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&dir, open).expect("a directory that all may enter");
        let program = program().expect("the command under test");
        Room { dir, run, tidy: RefCell::default(), program }
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    /// A new file of zeros; its path.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn file(&self, name: &str, size: u64) -> String {
        let path = self.path(name);
        let file = File::create(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        file.set_len(size).unwrap_or_else(|error| panic!("{path}: {error}"));
        path
    }

    /// A new file that is full of `byte`; its path.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn full_file(&self, name: &str, size: u64, byte: u8) -> String {
        let path = self.file(name, size);
        let file = File::options().write(true).open(&path).expect("the file just made");
        let chunk = vec![byte; MIB as usize];
        for at in (0..size).step_by(chunk.len()) {
            let len = chunk.len().min(usize::try_from(size - at).expect("64-bit sizes"));
            file.write_all_at(&chunk[..len], at).expect("room for a file");
        }
        file.sync_all().expect("a disk that syncs");
        path
    }

    /// A directory for a mount.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn mount_point(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        std::fs::create_dir_all(&path).expect("a directory for a mount");
        path
    }

    /// Mounts; it is unmounted with the room, if not before.
    ///
    /// # Panics
    /// If that fails.
    pub fn mount(&self, arguments: &[&str], at: &Path) {
        let at = at.to_string_lossy().into_owned();
        let _ = call("mount", arguments.iter().copied().chain([at.as_str()])).limit(60).ok();
        self.later("umount", &["-q", "-l", &at]);
    }

    /// Unmounts. On a busy machine somebody may be looking at the mount just then: it is tried for
    /// a while.
    ///
    /// # Panics
    /// If that fails.
    pub fn unmount(&self, at: &Path) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        loop {
            let ran = call("umount", [at]).limit(60).run();
            if ran.code == Some(0) || std::time::Instant::now() > end {
                let _ = ran.ok();
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }

    /// Calls a program when the test is over; what becomes of it does not matter.
    pub fn later(&self, program: &str, arguments: &[&str]) {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self.tidy.borrow_mut().push((program.to_owned(), arguments));
    }

    /// A loop device with direct I/O over a new file; its path.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn loop_device(&self, name: &str, size: u64) -> String {
        let file = self.file(name, size);
        let node = call("losetup", ["-f", "--show", "--direct-io=on", &file]).ok();
        self.later("losetup", &["-d", node.trim()]);
        node.trim().to_owned()
    }

    /// A device in memory, made by the kernel's null_blk with `more` of its attributes; its path.
    ///
    /// # Errors
    /// The skip, where the kernel has no null_blk that can be configured.
    ///
    /// # Panics
    /// If it has, and does not make one.
    pub fn null_device(&self, size: u64, more: &[(&str, &str)]) -> Result<String, Skip> {
        let root = Path::new("/sys/kernel/config/nullb");
        need(root.exists(), "no null_blk with configfs here")?;
        let name = format!("e2e{}n{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = root.join(&name);
        std::fs::create_dir(&dir).expect("a null_blk device");
        self.later("rmdir", &[&dir.to_string_lossy()]);
        let mib = (size / MIB).to_string();
        let usual = [
            ("size", mib.as_str()),
            ("memory_backed", "1"),
            ("blocksize", "512"),
            ("discard", "1"),
            ("completion_nsec", "0"),
            ("irqmode", "0"),
        ];
        for (file, value) in usual.iter().chain(more).chain(&[("power", "1")]) {
            std::fs::write(dir.join(file), value)
                .unwrap_or_else(|error| panic!("null_blk: {file}={value}: {error}"));
        }
        let index = std::fs::read_to_string(dir.join("index")).unwrap_or_default();
        let nodes = [format!("/dev/{name}"), format!("/dev/nullb{}", index.trim())];
        let node = nodes.into_iter().find(|node| Path::new(node).exists());
        Ok(node.expect("a node of the null_blk device"))
    }

    /// A name that no other test uses.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}{}", prefix(), COUNT.fetch_add(1, Ordering::Relaxed))
    }

    /// A call of devsplice.
    pub fn devsplice<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Call {
        call(&self.program, arguments).env("DEVSPLICE_RUN", &self.run).dir(&self.dir).limit(60)
    }

    /// The arguments that add a disk.
    #[must_use]
    pub fn add_arguments(&self, kind: Kind, stack: &str, more: &[&str]) -> Vec<String> {
        let mut all = vec!["add".to_owned(), stack.to_owned()];
        all.extend(kind.arguments().into_iter().map(str::to_owned));
        all.extend(more.iter().map(|&argument| argument.to_owned()));
        if !more.contains(&"-n") {
            all.extend(["-n".to_owned(), self.name()]);
        }
        all
    }

    /// Adds a disk.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn add(&self, kind: Kind, stack: &str, more: &[&str]) -> Disk<'_> {
        let mut arguments = self.add_arguments(kind, stack, more);
        arguments.push("--json".to_owned());
        let text = self.devsplice(&arguments).ok();
        let told = serde_json::from_str(&text).unwrap_or_else(|e| panic!("add: {e}: {text}"));
        Disk::new(self, kind, told)
    }

    /// Runs devsplice, which must refuse with exit code 1, and returns what it said. Nothing may be
    /// left of the attempt.
    ///
    /// # Panics
    /// If it does not refuse, says nothing or leaves something.
    pub fn refusal<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> String {
        let before = self.state();
        let ran = self.devsplice(arguments).run().ended_with(1);
        assert!(ran.out.is_empty(), "{}\nhas printed: {}", ran.line, ran.out);
        assert!(ran.err.starts_with("devsplice: "), "{}\nhas said: {}", ran.line, ran.err);
        assert!(!ran.err.contains("panicked"), "{}\nhas said: {}", ran.line, ran.err);
        assert_eq!(self.state(), before, "{} has left state", ran.line);
        ran.err
    }

    /// As [`Room::refusal`], of `add`; the message must hold all of `words`.
    ///
    /// # Panics
    /// If it does not.
    pub fn add_refused(&self, kind: Kind, stack: &str, more: &[&str], words: &[&str]) {
        let text = self.refusal(self.add_arguments(kind, stack, more));
        for word in words {
            assert!(text.contains(word), "{stack}: no `{word}` in: {text}");
        }
    }

    /// The names of the state files.
    #[must_use]
    pub fn state(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.run).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let quietly = |program: &str, arguments: &[String]| {
            let ended = std::panic::catch_unwind(|| call(program, arguments).limit(20).run());
            drop(ended);
        };
        if !self.state().is_empty() {
            let all = ["del", "--all", "--force"];
            let removing = std::panic::AssertUnwindSafe(|| self.devsplice(all).limit(60).run());
            let _ = std::panic::catch_unwind(removing);
        }
        for (program, arguments) in self.tidy.take().iter().rev() {
            quietly(program, arguments);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
