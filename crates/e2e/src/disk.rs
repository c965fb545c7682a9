//! Answers for a disk under test: what it says of itself, and that it goes without a trace.

use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::command::{Ran, wait_until};
use crate::host::Kind;
use crate::room::Room;

/// A disk that is served. It is removed with this.
pub struct Disk<'r> {
    room: &'r Room,
    /// What it is called.
    pub name: String,
    /// Its node.
    pub node: PathBuf,
    /// What `add` told about it.
    pub told: Value,
    /// What kind was asked for.
    pub kind: Kind,
}

impl<'r> Disk<'r> {
    pub(crate) fn new(room: &'r Room, kind: Kind, told: Value) -> Disk<'r> {
        let text = |key: &str| told[key].as_str().unwrap_or_default().to_owned();
        let (name, node) = (text("name"), PathBuf::from(text("device")));
        assert!(node.starts_with("/dev") && node.exists(), "no node: {told}");
        Disk { room, name, node, told, kind }
    }

    /// What `devsplice info --json` says.
    ///
    /// # Panics
    /// If it says nothing.
    #[must_use]
    pub fn info(&self) -> Value {
        let text = self.room.devsplice(["info", "--json", &self.name]).ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("info: {error}: {text}"))
    }

    /// One of its counters.
    ///
    /// # Panics
    /// If there is no such counter.
    #[must_use]
    pub fn count(&self, name: &str) -> u64 {
        let info = self.info();
        let count = info["counts"][name].as_u64();
        count.unwrap_or_else(|| panic!("no counter {name} in {info}"))
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.told["size"].as_u64().unwrap_or(0)
    }

    /// The process that serves it.
    #[must_use]
    pub fn server(&self) -> Process {
        Process(self.told["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0))
    }

    /// The process that cleans up if the server cannot.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn guard(&self) -> Process {
        let children = self.server().children();
        assert!(children.len() == 1, "the server has these children: {children:?}");
        Process(children[0])
    }

    /// A file of its request queue in sysfs.
    #[must_use]
    pub fn queue(&self, file: &str) -> String {
        let name = self.node.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path = format!("/sys/block/{name}/queue/{file}");
        std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
    }

    /// Where its node can be found by its name.
    #[must_use]
    pub fn link(&self) -> PathBuf {
        Path::new("/dev/devsplice").join(&self.name)
    }

    /// Where its server writes what it has to say.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.room.run.join(format!("{}.log", self.name)))
            .unwrap_or_default()
    }

    /// What is left of it: node, link, state, server.
    #[must_use]
    pub fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        if self.is_attached() {
            traces.push(self.node.display().to_string());
        }
        if self.link().symlink_metadata().is_ok() {
            traces.push(self.link().display().to_string());
        }
        for ending in ["json", "sock", "log"] {
            let path = self.room.run.join(format!("{}.{ending}", self.name));
            if path.exists() {
                traces.push(path.display().to_string());
            }
        }
        // A server of many goes on without it.
        if self.told["server"].is_null() && self.server().lives() {
            traces.push(format!("process {}", self.server().0));
        }
        traces
    }

    /// Whether the kernel still has it.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        if self.kind.is_ublk() {
            let other = self.node.to_string_lossy().replace("ublkb", "ublkc");
            return self.node.exists() || Path::new(&other).exists();
        }
        let name = self.node.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path = format!("/sys/block/{name}/loop/backing_file");
        let file = std::fs::read_to_string(path).unwrap_or_default();
        file.trim().trim_end_matches(" (deleted)") == format!("/{}", self.name)
    }

    /// Waits until nothing is left of it.
    ///
    /// # Panics
    /// If something is after `seconds`.
    pub fn is_gone_within(&self, seconds: u64) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
        loop {
            let traces = self.traces();
            if traces.is_empty() {
                return;
            }
            let late = std::time::Instant::now() > end;
            assert!(!late, "left after {seconds} s: {}", traces.join(", "));
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// `devsplice del`.
    #[must_use]
    pub fn del(&self, more: &[&str]) -> Ran {
        let mut arguments = vec!["del", &self.name];
        arguments.extend(more);
        self.room.devsplice(arguments).run()
    }

    /// Removes it, and sees that nothing is left.
    ///
    /// # Panics
    /// If it cannot be removed.
    pub fn remove(self) {
        let _ = self.del(&[]).ok();
        self.is_gone_within(3);
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        if !self.traces().is_empty() {
            let quietly = std::panic::AssertUnwindSafe(|| self.del(&["--force"]));
            let _ = std::panic::catch_unwind(quietly);
        }
    }
}

/// A process by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(pub u32);

impl Process {
    fn read(self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.0)).unwrap_or_default()
    }

    /// The fields of its `stat` behind its name: the first is the state.
    fn stat(self) -> Vec<String> {
        let stat = self.read("stat");
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        rest.split_whitespace().map(str::to_owned).collect()
    }

    /// Whether it is there, and no zombie.
    #[must_use]
    pub fn lives(self) -> bool {
        self.stat().first().is_some_and(|state| state != "Z" && state != "X")
    }

    /// Clock ticks that it has used, all threads together.
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    pub fn ticks(self) -> u64 {
        let stat = self.stat();
        let number = |index: usize| stat.get(index).and_then(|text| text.parse::<u64>().ok());
        let both = number(11).zip(number(12));
        let (user, system) = both.unwrap_or_else(|| panic!("no process {}", self.0));
        user + system
    }

    /// A line of its `status` in KiB, such as `VmRSS`.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn status_kib(self, name: &str) -> u64 {
        let status = self.read("status");
        let line = status.lines().find(|line| line.starts_with(&format!("{name}:")));
        let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        number.unwrap_or_else(|| panic!("no {name} of process {}", self.0))
    }

    /// Calls of `read` and its like that it has made (`syscr` of proc(5)).
    ///
    /// # Panics
    /// If it is not there.
    #[must_use]
    pub fn reads(self) -> u64 {
        let io = self.read("io");
        let count = io.lines().find_map(|line| line.strip_prefix("syscr: ")?.trim().parse().ok());
        count.unwrap_or_else(|| panic!("no count of reads of process {}", self.0))
    }

    /// For each of its threads: name, and the CPUs that it may run on.
    #[must_use]
    pub fn threads(self) -> Vec<(String, String)> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0));
        let about = |task: std::fs::DirEntry| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name))?;
                Some(line.split_once(':')?.1.trim().to_owned())
            };
            Some((field("Name")?, field("Cpus_allowed_list")?))
        };
        tasks.into_iter().flatten().flatten().filter_map(about).collect()
    }

    /// Its child processes.
    #[must_use]
    pub fn children(self) -> Vec<u32> {
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_child = |pid: &u32| {
            let parent = Process(*pid).stat().get(1).and_then(|parent| parent.parse().ok());
            parent == Some(self.0) && Process(*pid).lives()
        };
        numbers.filter(is_child).collect()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it is not there.
    pub fn signal(self, signal: Signal) {
        let pid = i32::try_from(self.0).ok().and_then(Pid::from_raw).expect("a process number");
        kill_process(pid, signal).unwrap_or_else(|error| panic!("process {}: {error}", self.0));
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If that takes longer than `seconds`.
    pub fn ends_within(self, seconds: u64) {
        wait_until(seconds, &format!("the end of process {}", self.0), || !self.lives());
    }
}
