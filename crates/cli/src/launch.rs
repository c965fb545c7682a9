//! Answers for starting a server in the background: forks, waits for word of how it went, passes
//! that on.

use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write, empty};

use devsplice_core::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};

use crate::protect;
use crate::server::{self, Server};
use crate::state::Disk;

/// What a server says of its start: its disk for example, and whatever else there is to know.
pub type Report = Value;

/// The disk of which a server has reported.
///
/// # Errors
/// If it has reported none.
pub fn disk(report: &Report) -> Result<Disk> {
    serde_json::from_value(report["disk"].clone())
        .map_err(|_| Error::new(ErrorKind::Os, "server process", "has not said what it serves"))
}

/// Runs `start` in a process of its own, which then serves until it is told to stop: that process
/// does not return from here. The caller's learns what came of it.
///
/// # Errors
/// What `start` says.
pub fn launch(start: impl FnOnce() -> Result<(Server, Report)>) -> Result<Report> {
    let os = |error| Error::os("server process", &error);
    let (reader, writer) = std::io::pipe().map_err(os)?;
    match fork::fork().map_err(os)? {
        fork::Fork::Parent(pid) => {
            drop(writer);
            match await_word(&reader, pid) {
                true => told(BufReader::new(reader)),
                false => told(empty()),
            }
        }
        fork::Fork::Child => {
            drop(reader);
            let _ = rustix::process::setsid();
            match serve(start, writer) {
                Ok(code) => std::process::exit(code),
                Err(error) => {
                    eprintln!("devsplice: {error}");
                    std::process::exit(1);
                }
            }
        }
    }
}

/// The server's process: reports how its start went, then serves.
fn serve(start: impl FnOnce() -> Result<(Server, Report)>, mut status: PipeWriter) -> Result<i32> {
    protect::server();
    let (server, report) = match start() {
        Ok(started) => started,
        Err(error) => {
            send(&mut status, &json!({ "error": error.to_string() }));
            return Ok(1);
        }
    };
    // The current directory of a daemon must keep no file system busy. Files are open by now.
    let _ = std::env::set_current_dir("/");
    server::silence(Some(server.log()))?;
    send(&mut status, &report);
    drop(status);
    server.run().map(|()| 0)
}

/// Sends the report in one write: formatting into the pipe would wake the reader for every word.
fn send(status: &mut PipeWriter, report: &Value) {
    let _ = status.write_all(format!("{report}\n").as_bytes());
}

/// Waits for the report, or for the end of who has to make it: whether there is one. The pipe alone
/// does not tell: the guard of who died has it open, too, and may live for as long as the disk.
fn await_word(status: &PipeReader, pid: i32) -> bool {
    let process = Pid::from_raw(pid).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let Some(Ok(process)) = process else { return true };
    let mut waits = [PollFd::new(status, PollFlags::IN), PollFd::new(&process, PollFlags::IN)];
    while poll(&mut waits, None) == Err(Errno::INTR) {}
    !waits[0].revents().is_empty() || waits[1].revents().is_empty()
}

/// The caller's process: reads the report.
fn told(mut status: impl BufRead) -> Result<Report> {
    let mut line = String::new();
    let read = status.read_line(&mut line);
    let report: Value = serde_json::from_str(&line).unwrap_or_default();
    if let Some(error) = report["error"].as_str() {
        let (thing, reason) = error.split_once(": ").unwrap_or(("server", error));
        return Err(Error::new(ErrorKind::Os, thing, reason));
    }
    if report.is_object() {
        return Ok(report);
    }
    let reason = match read {
        Err(error) => error.to_string(),
        Ok(_) => "ended without a word".to_owned(),
    };
    Err(Error::new(ErrorKind::Os, "server process", reason)
        .next("run it with --foreground to see why"))
}
