//! Answers for running programs: every one has a time limit, and what it printed is kept.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::host::{Mode, mode};

/// How often something that is waited for is looked at.
const POLL: Duration = Duration::from_millis(10);
/// How long the output of a program may stay open when the program has ended.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(10);

/// What a program that has ended said.
pub struct Ran {
    /// Its command line.
    pub line: String,
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
    /// From start to end.
    pub took: Duration,
}

impl Ran {
    /// Itself, if it succeeded.
    ///
    /// # Panics
    /// If it did not, with all that it said.
    #[must_use]
    pub fn ok(self) -> Ran {
        self.ended_with(0)
    }

    /// Itself, if it ended with this exit code.
    ///
    /// # Panics
    /// If it did not, with all that it said.
    #[must_use]
    pub fn ended_with(self, code: i32) -> Ran {
        let Ran { line, out, err, .. } = &self;
        let ended = self.code;
        assert!(ended == Some(code), "{line}\nended with {ended:?}, not {code}:\n{out}{err}");
        self
    }
}

/// A program that is to be run.
pub struct Call {
    command: Command,
    input: Stdio,
    line: String,
    limit: Duration,
}

/// A call of `program`, which gets 30 seconds (three times as long in emulation).
pub fn call<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = A>,
) -> Call {
    let mut command = Command::new(program.as_ref());
    let mut line = program.as_ref().to_string_lossy().into_owned();
    for argument in arguments {
        line += &format!(" {}", argument.as_ref().to_string_lossy());
        command.arg(argument);
    }
    Call { command, input: Stdio::null(), line, limit: Duration::from_secs(30) }
}

impl Call {
    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Call {
        self.command.env(name, value);
        self
    }

    /// Sets its standard input, which is empty otherwise.
    #[must_use]
    pub fn input(mut self, input: impl Into<Stdio>) -> Call {
        self.input = input.into();
        self
    }

    /// Sets its current directory.
    #[must_use]
    pub fn dir(mut self, path: &Path) -> Call {
        self.command.current_dir(path);
        self
    }

    /// Sets how many seconds it gets (three times as many in emulation).
    #[must_use]
    pub fn limit(mut self, seconds: u64) -> Call {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// If it cannot be started or takes too long.
    #[must_use]
    pub fn run(self) -> Ran {
        self.start().finish()
    }

    /// Runs it to its end, which must be a good one; its standard output.
    ///
    /// # Panics
    /// If it fails.
    pub fn ok(self) -> String {
        self.run().ok().out
    }

    /// Starts it.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(mut self) -> Running {
        let slow = if mode() == Mode::Vm { 3 } else { 1 };
        self.command.stdin(self.input).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: what it starts can be ended with it.
        self.command.process_group(0);
        let start = Instant::now();
        let mut child =
            self.command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.line));
        let out = Output::of(child.stdout.take());
        let err = Output::of(child.stderr.take());
        Running { child, out, err, line: self.line, start, limit: self.limit * slow }
    }
}

/// What comes out of a pipe, as far as it has come.
struct Output {
    bytes: Arc<Mutex<Vec<u8>>>,
    end: Receiver<()>,
}

impl Output {
    fn of(pipe: Option<impl Read + Send + 'static>) -> Output {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (sender, end) = channel();
        let into = Arc::clone(&bytes);
        std::thread::spawn(move || {
            let mut pipe = pipe.expect("the output is a pipe");
            let mut room = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut room) {
                into.lock().expect("no reader panics").extend_from_slice(&room[..count]);
            }
            let _ = sender.send(());
        });
        Output { bytes, end }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().expect("no reader panics")).into_owned()
    }

    fn ends_within(&self, limit: Duration) -> bool {
        self.end.recv_timeout(limit).is_ok()
    }
}

/// A program that runs. It is ended with this.
pub struct Running {
    child: Child,
    out: Output,
    err: Output,
    line: String,
    start: Instant,
    limit: Duration,
}

impl Running {
    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn is_over(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// What it has printed so far.
    #[must_use]
    pub fn said(&self) -> String {
        self.out.text() + &self.err.text()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If that takes too long, or if something that it started keeps its output open.
    #[must_use]
    pub fn finish(mut self) -> Ran {
        if !self.ends_in_time() {
            self.kill();
            panic!("{}\nhas not ended in {:?}; it said:\n{}", self.line, self.limit, self.said());
        }
        let took = self.start.elapsed();
        let code = self.child.wait().ok().and_then(|status| status.code());
        for pipe in [&self.out, &self.err] {
            assert!(
                pipe.ends_within(OUTPUT_PATIENCE),
                "{}\nhas ended, but something that it started keeps its output open",
                self.line
            );
        }
        Ran { line: self.line.clone(), code, out: self.out.text(), err: self.err.text(), took }
    }

    /// Waits for its end as long as it may take. Not by looking again and again: what it took is
    /// measured to the millisecond by some.
    fn ends_in_time(&mut self) -> bool {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let process = id.and_then(|id| pidfd_open(id, PidfdFlags::empty()).ok());
        let end = self.start + self.limit;
        while !self.is_over() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            match (&process, Timespec::try_from(left)) {
                (Some(process), Ok(left)) => {
                    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left));
                }
                _ => std::thread::sleep(POLL),
            }
        }
        true
    }

    /// Ends it and all that it started.
    fn kill(&mut self) {
        let Ok(id) = i32::try_from(self.child.id()) else { return };
        if let Some(group) = Pid::from_raw(id) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let end = Instant::now() + Duration::from_secs(2);
        // What hangs in the kernel cannot be waited for.
        while !self.is_over() && Instant::now() < end {
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_over() {
            self.kill();
        }
    }
}

/// Waits until `is_so`.
///
/// # Panics
/// If that takes more than `seconds`.
pub fn wait_until(seconds: u64, what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !is_so() {
        assert!(Instant::now() < end, "waited {seconds} s in vain for: {what}");
        std::thread::sleep(POLL);
    }
}
