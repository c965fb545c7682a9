//! Answers for the outside programs of the demo: each has a time limit, none can hold it up.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::Fallible;
use crate::proc;

/// For what is done in a moment.
pub const QUICK: Duration = Duration::from_secs(30);
/// For what moves data; an emulated machine is slow.
pub const SLOW: Duration = Duration::from_secs(180);
/// How long a program may take to obey SIGTERM, then SIGKILL.
const GRACE: Duration = Duration::from_secs(3);
/// Lines of a failed program's output that are shown.
const TAIL: usize = 8;
/// Columns of a command that are shown.
const SHOWN: usize = 200;

/// A program to be run once.
pub struct Tool {
    command: Command,
    limit: Duration,
    uncut: bool,
    is_loud: bool,
}

impl Tool {
    /// A program, and how long it may take.
    pub fn new(program: impl AsRef<OsStr>, limit: Duration) -> Self {
        let program = program.as_ref();
        let found = program.to_str().and_then(proc::find_program);
        let mut command = Command::new(found.as_deref().map_or(program, |path| path.as_os_str()));
        // A ^C is for the demo alone: it ends what runs, and cleans up with more programs.
        command.process_group(0).stdin(Stdio::null());
        Self { command, limit, uncut: false, is_loud: false }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// No signal cuts it short: it is over in a moment, or it cleans up.
    pub fn uncut(mut self) -> Self {
        self.uncut = true;
        self
    }

    /// Its standard error goes where ours goes, as it is written.
    pub fn loud(mut self) -> Self {
        self.is_loud = true;
        self
    }

    /// Runs it; what it wrote to its standard output.
    pub fn run(mut self) -> Fallible<String> {
        let shown = show(&self.command);
        let stderr = if self.is_loud { Stdio::inherit() } else { Stdio::piped() };
        self.command.stdout(Stdio::piped()).stderr(stderr);
        let start = Instant::now();
        let mut child = self.command.spawn().map_err(|e| format!("cannot start {shown}: {e}"))?;
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        let ended = self.wait(&mut child, start);
        let (stdout, stderr) = (received(&stdout), received(&stderr));
        match ended {
            Ok(status) if status.success() => Ok(stdout),
            Ok(status) => Err(complaint(&shown, &status.to_string(), &stdout, &stderr)),
            Err(reason) => Err(complaint(&shown, &reason, &stdout, &stderr)),
        }
    }

    fn wait(&self, child: &mut Child, start: Instant) -> Fallible<ExitStatus> {
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) => {}
                Err(e) => return Err(format!("cannot wait for it: {e}")),
            }
            let reason = match proc::interrupted() {
                Some(signal) if !self.uncut => format!("cut short by signal {signal}"),
                _ if start.elapsed() > self.limit => {
                    format!("not done after {} s", self.limit.as_secs())
                }
                _ => {
                    proc::nap();
                    continue;
                }
            };
            return Err(match end(child) {
                true => reason,
                false => format!("{reason}; it does not even obey SIGKILL and is left alone"),
            });
        }
    }
}

/// Ends a program with all that it started. False if it cannot be ended: it waits in the kernel,
/// and waiting for it would be waiting for ever.
fn end(child: &mut Child) -> bool {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    for signal in [Signal::TERM, Signal::KILL] {
        if let Some(group) = group {
            // It may have ended by itself.
            let _ = kill_process_group(group, signal);
        }
        let until = Instant::now() + GRACE;
        while Instant::now() < until {
            if !matches!(child.try_wait(), Ok(None)) {
                return true;
            }
            proc::nap();
        }
    }
    false
}

/// Reads a pipe in the background.
fn collect(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        // A pipe that breaks has ended; what came before counts.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut all));
        // Nobody waits for a program that was left alone.
        let _ = sender.send(all);
    });
    receiver
}

/// What came through a pipe, unless somebody holds it open beyond the program's end.
fn received(pipe: &Receiver<Vec<u8>>) -> String {
    let all = pipe.recv_timeout(GRACE).unwrap_or_default();
    String::from_utf8_lossy(&all).into_owned()
}

/// A failed command: what it was, how it ended, its last words.
fn complaint(shown: &str, reason: &str, stdout: &str, stderr: &str) -> String {
    let words = if stderr.trim().is_empty() { stdout } else { stderr };
    let lines: Vec<&str> = words.lines().filter(|line| !line.trim().is_empty()).collect();
    let mut text = format!("{shown}: {reason}");
    for line in &lines[lines.len().saturating_sub(TAIL)..] {
        text.push('\n');
        text.push_str(line);
    }
    text
}

/// The command for people to read, cut where it gets long.
fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let mut line = String::new();
    for word in words {
        if line.len() > SHOWN {
            line.push_str(" ...");
            break;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&word.to_string_lossy());
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_wrote_is_returned() {
        assert_eq!(Tool::new("echo", QUICK).args(["a", "b"]).run(), Ok("a b\n".into()));
    }

    #[test]
    fn a_failure_names_the_command_its_end_and_its_last_words() {
        let failed = Tool::new("/bin/sh", QUICK).args(["-c", "echo why >&2; exit 3"]).run();
        assert_eq!(failed, Err("/bin/sh -c echo why >&2; exit 3: exit status: 3\nwhy".to_owned()));
        let absent = Tool::new("/no/such/program", QUICK).run();
        assert!(absent.is_err_and(|e| e.starts_with("cannot start /no/such/program")));
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended_with_its_children() {
        let limit = Duration::from_millis(100);
        let start = Instant::now();
        let ended = Tool::new("/bin/sh", limit).args(["-c", "sleep 60; sleep 60"]).run();
        assert!(ended.is_err_and(|e| e.contains("not done after 0 s")));
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
