//! Answers for the question whether a run has left anything on the machine.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::host::{Mode, mode};
use crate::room::{base, prefix};

/// What is about to go may take this long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Devices, links, mounts and processes of this run that should be gone, and are not within some
/// seconds. Removes the run's directory.
#[must_use]
pub fn leftovers() -> Vec<String> {
    let end = Instant::now() + PATIENCE;
    loop {
        let left = look();
        if left.is_empty() || Instant::now() > end {
            return left;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn look() -> Vec<String> {
    let mut left = Vec::new();
    let (base, prefix) = (base(), prefix());
    let base_text = base.to_string_lossy().into_owned();
    for entry in entries("/dev") {
        // A machine with other users has other ublk devices as well.
        if mode() == Mode::Vm && (entry.starts_with("ublkc") || entry.starts_with("ublkb")) {
            left.push(format!("/dev/{entry}"));
        }
    }
    let links = entries("/dev/devsplice").into_iter().filter(|name| name.starts_with(&prefix));
    left.extend(links.map(|name| format!("/dev/devsplice/{name}")));
    for disk in entries("/sys/block") {
        let path = format!("/sys/block/{disk}/loop/backing_file");
        let file = std::fs::read_to_string(path).unwrap_or_default();
        if file.starts_with(&format!("/{prefix}")) || file.starts_with(&base_text) {
            left.push(format!("/dev/{disk} over {}", file.trim()));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let ours = mounts.lines().filter(|line| line.contains(&base_text));
    left.extend(ours.map(|line| format!("mount {line}")));
    left.extend(processes(&base_text));
    let _ = std::fs::remove_dir_all(&base);
    if base.exists() {
        left.push(base_text);
    }
    left
}

fn entries(dir: &str) -> Vec<String> {
    let all = std::fs::read_dir(dir).into_iter().flatten().flatten();
    all.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Processes that were started in one of the rooms.
fn processes(base: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in entries("/proc") {
        let dir = Path::new("/proc").join(&entry);
        let Ok(environment) = std::fs::read(dir.join("environ")) else { continue };
        let is_ours = |word: &[u8]| {
            String::from_utf8_lossy(word)
                .strip_prefix("DEVSPLICE_RUN=")
                .is_some_and(|run| run.starts_with(base))
        };
        if environment.split(|byte| *byte == 0).any(is_ours) {
            let line = std::fs::read(dir.join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            found.push(format!("process {entry}: {line}"));
        }
    }
    found
}
