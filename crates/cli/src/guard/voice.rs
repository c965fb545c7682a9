//! Answers for what a server and its guard say to each other, over two pipes: lines that the guard
//! reads to the server's end, and questions that it answers meanwhile.

use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::keeper;
use crate::state::Keeper;

/// What the server says before the numbers of descriptors that the guard is to have as well.
const KEEP: &str = "keep ";
/// How long the guard may take to have them.
const KEEP_LIMIT: Duration = Duration::from_secs(5);
/// What it says to hear whether the guard does anything.
const THERE: &str = "there ";
/// How long the guard may take to say so, or to go when it is told to.
pub(super) const THERE_LIMIT: Duration = Duration::from_secs(3);

/// What the server has to say to its guard, from wherever in it.
#[derive(Clone)]
pub struct Voice {
    pipes: Arc<Mutex<Option<Pipes>>>,
    pid: i32,
    /// When the guard started, and when this process did. Who is shut in cannot see that any more.
    started: [u64; 2],
}

struct Pipes {
    say: PipeWriter,
    answers: PipeReader,
    /// Questions so far. Each answer begins with the number of its own: one that comes late is not
    /// taken for that of the next.
    asked: u64,
}

/// How a guard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hearing {
    /// It does what it is there for.
    Good,
    /// It is there and does nothing: somebody has stopped it.
    Silent,
    /// It has ended.
    Gone,
}

impl Voice {
    /// To the guard in process `pid`, over these pipes.
    pub(super) fn new(say: PipeWriter, answers: PipeReader, pid: i32) -> Voice {
        let guard = u32::try_from(pid).unwrap_or(0);
        let started = [guard, std::process::id()].map(|pid| keeper::started(pid).unwrap_or(0));
        Voice { pipes: Arc::new(Mutex::new(Some(Pipes { say, answers, asked: 0 }))), pid, started }
    }

    /// Says no more, which the guard hears.
    pub(super) fn end(&self) {
        self.pipes().take();
    }

    /// To talk to the guard; none once it has been told all.
    fn pipes(&self) -> MutexGuard<'_, Option<Pipes>> {
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something that has no answer.
    pub(super) fn say(&self, line: &str) {
        if let Some(pipes) = &mut *self.pipes() {
            let _ = pipes.say.write_all(format!("{line}\n").as_bytes());
        }
    }

    /// The guard's process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How the guard is, for whoever is about to rely on it.
    pub fn hearing(&self) -> Hearing {
        match self.ask(THERE, "", THERE_LIMIT) {
            Ok(_) => Hearing::Good,
            Err(error) if error.kind() == ErrorKind::Timeout => Hearing::Silent,
            Err(_) => Hearing::Gone,
        }
    }

    /// The guard's answer to what it is asked.
    fn ask(&self, word: &str, what: &str, limit: Duration) -> Result<String> {
        let failed = |kind, reason: &str| Error::new(kind, "the guard", reason);
        let gone = || failed(ErrorKind::Os, "is gone");
        let os = |error| Error::os("the guard", &error);
        let mut pipes = self.pipes();
        let pipes = pipes.as_mut().ok_or_else(gone)?;
        pipes.asked += 1;
        let own = pipes.asked.to_string();
        pipes.say.write_all(format!("{word}{own} {what}\n").as_bytes()).map_err(os)?;
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| gone())?;
            let mut waits = [PollFd::new(&pipes.answers, PollFlags::IN)];
            match poll(&mut waits, Some(&left)) {
                Ok(0) => return Err(failed(ErrorKind::Timeout, "does not answer")),
                Err(rustix::io::Errno::INTR) => continue,
                _ => {}
            }
            // Answers are short enough to come whole (pipe(7), PIPE_BUF).
            let mut text = [0; 4096];
            let len = pipes.answers.read(&mut text).map_err(os)?;
            if len == 0 {
                return Err(gone());
            }
            let text = String::from_utf8_lossy(&text[..len]);
            let mut answers = text.lines().filter_map(|line| line.split_once(' '));
            if let Some((_, answer)) = answers.find(|(number, _)| *number == own) {
                return Ok(answer.to_owned());
            }
        }
    }

    /// Has the guard keep descriptors of this process, so that they outlive it.
    ///
    /// # Errors
    /// If it cannot.
    pub fn keep(&self, fds: &[OwnedFd], told: &str) -> Result<Keeper> {
        let own = keeper::numbers(fds);
        let failed = |reason: &str| Error::new(ErrorKind::Os, "the guard", reason);
        let answer = self.ask(KEEP, &keeper::list(&own), KEEP_LIMIT)?;
        let fds_there = keeper::unlist(&answer);
        if fds_there.len() != fds.len() {
            return Err(failed("cannot have descriptors of the server"));
        }
        let pid = u32::try_from(self.pid).unwrap_or(0);
        let [started, own_started] = self.started;
        let told = told.to_owned();
        Ok(Keeper { pid, started, fds: fds_there, own, own_started, told })
    }
}

/// Reads what the server says until its end, and keeps what it is told to keep.
pub(super) fn listen(
    reader: PipeReader,
    mut answer: PipeWriter,
    server: u32,
    kept: &mut Vec<OwnedFd>,
) -> Vec<String> {
    let mut said = Vec::new();
    for line in BufReader::new(reader).lines().map_while(std::result::Result::ok) {
        if let Some(number) = line.strip_prefix(THERE) {
            let _ = answer.write_all(format!("{number} \n").as_bytes());
            continue;
        }
        let Some((number, fds)) = line.strip_prefix(KEEP).and_then(|rest| rest.split_once(' '))
        else {
            said.push(line);
            continue;
        };
        // From a server that dies meanwhile there is nothing to be had: what there is is kept on.
        if let Ok(pulled) = keeper::pull(server, &keeper::unlist(fds)) {
            *kept = pulled;
        }
        let numbers = keeper::numbers(kept);
        let _ = answer.write_all(format!("{number} {}\n", keeper::list(&numbers)).as_bytes());
    }
    said
}
