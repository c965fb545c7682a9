//! Answers for starting a server in the background: forks, waits for word of how it went, passes
//! that on.

use std::io::{BufRead, BufReader, PipeWriter, Write};

use devsplice_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::protect;
use crate::server::{self, Server};
use crate::state::Disk;

/// What a server said of its start.
pub struct Started {
    /// What it serves.
    pub disk: Disk,
    /// How long the disk's users had to wait, where it took it over, in milliseconds.
    pub pause_ms: Option<f64>,
}

/// Runs `start` in a process of its own, which then serves until it is told to stop: that process
/// does not return from here. The caller's learns what came of it.
///
/// # Errors
/// What `start` says.
pub fn launch(start: impl FnOnce() -> Result<(Server, Option<f64>)>) -> Result<Started> {
    let os = |error| Error::os("server process", &error);
    let (reader, writer) = std::io::pipe().map_err(os)?;
    match fork::fork().map_err(os)? {
        fork::Fork::Parent(_) => {
            drop(writer);
            told(BufReader::new(reader))
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
fn serve(
    start: impl FnOnce() -> Result<(Server, Option<f64>)>,
    mut status: PipeWriter,
) -> Result<i32> {
    protect::server();
    let (server, pause) = match start() {
        Ok(started) => started,
        Err(error) => {
            send(&mut status, &json!({ "error": error.to_string() }));
            return Ok(1);
        }
    };
    // The current directory of a daemon must keep no file system busy. Files are open by now.
    let _ = std::env::set_current_dir("/");
    server::silence(Some(&server.disk().name))?;
    send(&mut status, &json!({ "disk": server.disk(), "pause_ms": pause }));
    drop(status);
    server.run().map(|()| 0)
}

/// Sends the report in one write: formatting into the pipe would wake the reader for every word.
fn send(status: &mut PipeWriter, report: &Value) {
    let _ = status.write_all(format!("{report}\n").as_bytes());
}

/// The caller's process: waits for the report.
fn told(mut status: impl BufRead) -> Result<Started> {
    let mut line = String::new();
    let read = status.read_line(&mut line);
    let report: Value = serde_json::from_str(&line).unwrap_or_default();
    if let Some(error) = report["error"].as_str() {
        let (thing, reason) = error.split_once(": ").unwrap_or(("server", error));
        return Err(Error::new(ErrorKind::Os, thing, reason));
    }
    match serde_json::from_value::<Disk>(report["disk"].clone()) {
        Ok(disk) => Ok(Started { disk, pause_ms: report["pause_ms"].as_f64() }),
        Err(_) => {
            let reason = match read {
                Err(error) => error.to_string(),
                Ok(_) => "ended without a word".to_owned(),
            };
            Err(Error::new(ErrorKind::Os, "server process", reason)
                .next("run it with --foreground to see why"))
        }
    }
}
