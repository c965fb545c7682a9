//! Answers for the outside programs of the bench: none runs longer than it may; fio's words.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::cells::Cell;
use crate::Fallible;
use crate::proc::run_quiet;

/// Seconds that one sample may take.
const SAMPLE_LIMIT: u32 = 120;
/// Seconds that making or removing a device may take.
const DEVICE_LIMIT: u32 = 60;

/// A command that ends after `seconds` at the latest.
pub fn bounded(seconds: u32, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", &seconds.to_string()]).arg(program);
    command
}

/// Runs a command that may leave a server behind: its words go to a file, for such a server would
/// hold a pipe open.
pub fn run_detached(words: &[String], log: &Path) -> Fallible<()> {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" >\"$0\" 2>&1"]).arg(log);
    command.args(["timeout", "-k", "5", &DEVICE_LIMIT.to_string()]).args(words);
    run_quiet(&mut command).map(drop).map_err(|_| {
        let said = std::fs::read_to_string(log).unwrap_or_default();
        let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("said nothing");
        format!("{} failed: {}", words.join(" "), last.trim())
    })
}

/// What fio found out.
pub struct Load {
    /// I/Os that were done.
    pub ios: f64,
    /// Milliseconds that they took.
    pub milliseconds: f64,
}

/// The arguments of fio that every run has; `size` is how much of the device is used.
pub fn fio_arguments(node: &str, cell: &Cell, size: &str) -> Vec<String> {
    let Cell { rw, block, depth, .. } = cell;
    [
        "--name=bench",
        &format!("--filename={node}"),
        "--ioengine=io_uring",
        "--direct=1",
        &format!("--bs={block}"),
        &format!("--iodepth={depth}"),
        &format!("--rw={rw}"),
        &format!("--size={size}"),
        "--norandommap",
        "--allow_file_create=0",
        "--output-format=json",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Runs fio, with `more` arguments.
pub fn fio(mut arguments: Vec<String>, more: &[&str]) -> Fallible<Load> {
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    let output = run_quiet(bounded(SAMPLE_LIMIT, "fio").args(&arguments))?;
    let text = String::from_utf8_lossy(&output);
    parse(&text).ok_or_else(|| format!("fio {} did no I/O: {text}", arguments.join(" ")))
}

/// What fio's JSON says; fio may put a line of warning before it.
fn parse(text: &str) -> Option<Load> {
    let all: Value = serde_json::from_str(&text[text.find('{')?..]).ok()?;
    let job = &all["jobs"][0];
    let of = |way: &str, key: &str| job[way][key].as_f64().unwrap_or(0.0);
    if job["error"].as_i64() != Some(0) {
        return None;
    }
    let ios = of("read", "total_ios") + of("write", "total_ios");
    let milliseconds = of("read", "runtime").max(of("write", "runtime"));
    (ios > 0.0 && milliseconds > 0.0).then_some(Load { ios, milliseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_tells_ios_and_time() {
        let job = r#"{"jobs": [{"error": 0, "read": {"total_ios": 0, "runtime": 0},
                      "write": {"total_ios": 400, "runtime": 250}}]}"#;
        let load = parse(&format!("note: something\n{job}")).unwrap();
        assert_eq!((load.ios, load.milliseconds), (400.0, 250.0));
        assert!(parse(&job.replace("\"error\": 0", "\"error\": 5")).is_none());
        assert!(parse("no JSON").is_none());
    }
}
