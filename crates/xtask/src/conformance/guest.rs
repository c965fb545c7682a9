//! Answers for the tests as they run in the machine: one after the other, each within its time,
//! nothing of it left for the next.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::results::{Outcome, Results};
use super::suites::Suite as Kind;
use crate::Fallible;
use crate::bench::run::bounded;
use crate::proc;

/// Where the tests put their files: a file system of a real kind.
const FILES: &str = "/scratch";
/// Exit codes of a test: out of time, out of time and killed.
const LATE: [i32; 2] = [124, 137];
/// Seconds for the removal of what a test has left.
const REMOVAL: u32 = 60;
/// How long its last processes may take to go.
const END: Duration = Duration::from_secs(5);

/// A test and where it runs.
struct Suite {
    kind: Kind,
    directory: PathBuf,
    server: PathBuf,
    limit: u32,
    /// Where programs are looked for.
    path: OsString,
}

/// Carries out the plan in `directory`, until its time is over or a test leaves things behind.
pub fn run(directory: &Path) -> Fallible<u8> {
    let file = directory.join("plan.json");
    let text =
        fs::read_to_string(&file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
    let plan: Value = serde_json::from_str(&text).map_err(|e| format!("the plan: {e}"))?;
    let kind = Kind::named(plan["suite"].as_str().unwrap_or_default());
    let suite = Suite {
        kind,
        directory: directory.into(),
        server: directory.join("suite").join(kind.server()),
        limit: plan["limit"].as_u64().and_then(|limit| u32::try_from(limit).ok()).unwrap_or(300),
        path: path_with(plan["tracer"].as_str().unwrap_or_default()),
    };
    let turn = Duration::from_secs(plan["turn"].as_u64().unwrap_or(0));
    let (start, mut results) = (Instant::now(), Results::default());
    for name in plan["tests"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if start.elapsed() > turn {
            break;
        }
        let outcome = suite.test(name)?;
        println!(
            "{name:<14} {:<5} {:>6.0} s  {}",
            outcome.verdict, outcome.seconds, outcome.reason
        );
        results.put(name, outcome);
        results.save(&directory.join("new.json"))?;
        if !suite.clear() {
            println!("xtask: {name} has left devices that do not go; a fresh machine goes on");
            break;
        }
    }
    Ok(0)
}

impl Suite {
    fn test(&self, name: &str) -> Fallible<Outcome> {
        let log = self.directory.join("logs").join(format!("{}.txt", name.replace('/', "-")));
        let place = self.directory.join("suite");
        let mut command = bounded(self.limit, "bash");
        // To a file: a server that a test leaves behind would hold a pipe open.
        command.args(["-c", "exec bash \"$@\" >\"$0\" 2>&1 </dev/null"]).arg(&log);
        command
            .args(self.kind.words(&place, name))
            .env("PATH", &self.path)
            .env("TMPDIR", FILES)
            .envs(self.kind.environment(&place, Path::new(FILES)))
            .current_dir(self.kind.place(&place));
        let start = Instant::now();
        let status = command.status().map_err(|e| format!("cannot start a test: {e}"))?;
        let seconds = start.elapsed().as_secs_f64();
        let said = fs::read_to_string(&log).unwrap_or_default();
        let wrong = self.kind.verdict(&said).err();
        let (verdict, reason) = match status.code() {
            Some(code) if self.kind.was_skipped(code, &said) => {
                let script = self.kind.script(&place, name);
                let script = fs::read_to_string(script).unwrap_or_default();
                ("skip", missing(&script, &self.path).unwrap_or_else(|| last_word(&said)))
            }
            Some(0) if wrong.is_none() => ("pass", String::new()),
            Some(code) if LATE.contains(&code) => {
                let said = last_word(&said);
                ("hang", format!("not done in {} s: {said}", self.limit))
            }
            Some(code) => {
                let word =
                    wrong.filter(|line| !line.is_empty()).unwrap_or_else(|| last_word(&said));
                ("fail", format!("exit code {code}: {word}"))
            }
            None => ("fail", "ended by a signal".to_owned()),
        };
        Ok(Outcome { verdict: verdict.into(), seconds, reason })
    }

    /// Removes what a test has left: devices, servers, mounts, files. Whether the machine is as it
    /// was.
    fn clear(&self) -> bool {
        if has_devices() {
            let mut del = bounded(REMOVAL, &self.server);
            let _ = proc::run_quiet(del.args(["del", "-a"]));
            self.kill_servers();
        }
        let end = Instant::now() + END;
        while has_devices() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = proc::run_quiet(bounded(30, "sh").args(["-c", LEAVINGS]).arg(FILES));
        !has_devices()
    }

    /// Kills what runs the program of the tests' server.
    fn kill_servers(&self) {
        let same = |one: &fs::Metadata, other: &fs::Metadata| {
            (one.dev(), one.ino()) == (other.dev(), other.ino())
        };
        let Ok(program) = fs::metadata(&self.server) else { return };
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let is_server =
                fs::metadata(process.path().join("exe")).is_ok_and(|exe| same(&exe, &program));
            if is_server && process.file_name() != *std::process::id().to_string() {
                let mut kill = Command::new("kill");
                let _ = proc::run_quiet(kill.arg("-9").arg(process.file_name()));
            }
        }
    }
}

/// Where programs are looked for, with one more place before all others.
fn path_with(first: &str) -> OsString {
    let others = std::env::var_os("PATH").unwrap_or_default();
    let first = (!first.is_empty()).then(|| PathBuf::from(first));
    std::env::join_paths(first.into_iter().chain(std::env::split_paths(&others))).unwrap_or(others)
}

/// Unmounts and removes what lies in a directory, and ends an NBD server that has its number there.
const LEAVINGS: &str = "[ ! -f \"$0/nbds_pid\" ] || kill -9 $(cat \"$0/nbds_pid\"); \
                        for place in $(cut -d ' ' -f 2 /proc/mounts | grep \"^$0/\"); do \
                        umount -l \"$place\"; done; rm -rf \"$0\"/*";

fn has_devices() -> bool {
    let names = fs::read_dir("/dev").into_iter().flatten().flatten();
    names.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().starts_with("ublkc"))
}

/// The programs that a script asks for and that are not there.
fn missing(script: &str, path: &OsString) -> Option<String> {
    let asked = script.split("_have_program ").skip(1).filter_map(|rest| {
        let name = rest.split(|c: char| c.is_whitespace() || c == ';').next()?;
        (!name.is_empty()).then_some(name)
    });
    let is_there = |name: &&str| std::env::split_paths(path).any(|dir| dir.join(name).is_file());
    let missing: Vec<&str> = asked.filter(|name| !is_there(name)).collect();
    (!missing.is_empty()).then(|| format!("{} is not installed", missing.join(", ")))
}

/// What of a test's words says most about how it ended: what devsplice does not have, else the last
/// line that is not the test's name.
fn last_word(said: &str) -> String {
    let is_frame =
        |line: &str| line.starts_with("ublk selftest:") || line.ends_with(']') || line.is_empty();
    let mut lines = said.lines().map(str::trim).filter(|line| !is_frame(line));
    let lacking = said.lines().find(|line| line.contains("not supported by devsplice"));
    let word = lacking.or_else(|| lines.next_back()).unwrap_or("says nothing").trim();
    word.chars().take(160).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tests_last_word_is_no_frame_and_what_is_lacking_comes_first() {
        let said = "ublk selftest: x starting\nfail to add ublk dev -t null\n\nx : [FAIL]\n";
        assert_eq!(last_word(said), "fail to add ublk dev -t null");
        let said = format!("kublk: -b: not supported by devsplice yet\n{said}");
        assert_eq!(last_word(&said), "kublk: -b: not supported by devsplice yet");
        assert_eq!(last_word("ublk selftest: x\n"), "says nothing");
    }

    #[test]
    fn programs_that_a_script_asks_for_are_looked_for() {
        let script = "if ! _have_program sh; then\n! _have_program no-such-program; then";
        let path = path_with("/nowhere");
        assert!(std::env::split_paths(&path).next() == Some("/nowhere".into()));
        assert_eq!(missing(script, &path), Some("no-such-program is not installed".to_owned()));
        assert_eq!(missing("if ! _have_program sh; then", &path), None);
    }
}
