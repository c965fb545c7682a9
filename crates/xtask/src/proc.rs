//! Child processes that never outlive this one: started, waited for and ended in one place.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::Fallible;

/// How often a waiting loop looks at its child, its deadline and the signals.
pub const POLL: Duration = Duration::from_millis(20);
/// How long a child may take to end after SIGTERM before SIGKILL follows.
const GRACE: Duration = Duration::from_secs(5);

/// What makes `setpriv` tie a process to this one.
const TIE: [&str; 3] = ["--pdeathsig", "KILL", "--"];

static SIGNAL: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// Turns SIGINT, SIGTERM and SIGHUP into a flag, so that destructors run and nothing is left over.
pub fn watch_signals() -> Fallible<()> {
    let flag = SIGNAL.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_usize(signal, Arc::clone(flag), signal as usize)
            .map_err(|e| format!("cannot watch signal {signal}: {e}"))?;
    }
    Ok(())
}

/// The signal that asked this process to end, if one came.
pub fn interrupted() -> Option<u8> {
    let number = SIGNAL.get().map_or(0, |flag| flag.load(Ordering::Relaxed));
    u8::try_from(number).ok().filter(|&n| n != 0)
}

/// Fails when a signal asked this process to end.
pub fn check_interrupt() -> Fallible<()> {
    interrupted().map_or(Ok(()), |signal| Err(format!("ended by signal {signal}")))
}

/// Pauses for one poll interval.
pub fn nap() {
    std::thread::sleep(POLL);
}

/// A child process that is ended when its guard goes out of scope.
pub struct Guard {
    name: String,
    child: Child,
}

impl Guard {
    /// Starts `command`.
    pub fn spawn(command: &mut Command) -> Fallible<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(|e| format!("cannot start {name}: {e}"))?;
        Ok(Self { name, child })
    }

    /// The child's exit status if it has ended.
    pub fn try_wait(&mut self) -> Fallible<Option<ExitStatus>> {
        self.child.try_wait().map_err(|e| format!("cannot wait for {}: {e}", self.name))
    }

    /// Waits for the child's end, or for a signal that asks this process to end.
    pub fn wait(&mut self) -> Fallible<ExitStatus> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            check_interrupt()?;
            nap();
        }
    }

    /// The child's standard output, once, if it was piped.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// The child's standard error, once, if it was piped.
    pub fn take_stderr(&mut self) -> Option<std::process::ChildStderr> {
        self.child.stderr.take()
    }

    /// Ends the child at once.
    pub fn kill(&mut self) {
        // Errors here mean that it has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let end = Instant::now() + GRACE;
        while Instant::now() < end {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            nap();
        }
        self.kill();
    }
}

/// A command whose process the kernel kills with this one, through util-linux's `setpriv`. Start
/// it from the main thread only: the kernel ties the child to the thread that started it.
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    match find_program("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(TIE).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// What a finished command wrote to its standard output.
pub type Written = Vec<u8>;

/// Runs `command` to its end and fails, with its last words, unless it succeeds.
pub fn run_quiet(command: &mut Command) -> Fallible<Written> {
    let shown = show(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Guard::spawn(command)?;
    let stdout = collect(child.take_stdout());
    let stderr = collect(child.take_stderr());
    let status = child.wait()?;
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    if status.success() {
        return Ok(stdout);
    }
    let words = String::from_utf8_lossy(&stderr);
    let lines: Vec<&str> = words.lines().collect();
    let tail = lines[lines.len().saturating_sub(5)..].join("\n  ");
    Err(format!("{shown} failed ({status}): {tail}"))
}

/// Reads a pipe to its end in the background, so that its writer never waits.
fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        // A pipe that breaks has ended; what came before counts.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut all));
        all
    })
}

/// A command line for people to read: the program and its first arguments.
pub fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let tie =
        if command.get_args().next().is_some_and(|arg| arg == TIE[0]) { TIE.len() + 1 } else { 0 };
    let words: Vec<_> = words.skip(tie).take(4).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

/// Where `name` would be started from: PATH, then the directories of the administrator's tools.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

/// Whether `file` is a regular file that may be executed by somebody.
pub fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
