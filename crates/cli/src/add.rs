//! Answers for `devsplice add`: checks what can be checked at once, starts the server, tells how
//! that went.

use std::io::{BufRead, BufReader, PipeWriter, Write};
use std::process::ExitCode;

use devsplice_core::size::show_size;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_spec::Plan;
use serde_json::json;

use crate::args::Add;
use crate::assemble::CATALOG;
use crate::server::{self, Server};
use crate::state::Disk;
use crate::{front, guard, say, state};

/// Makes a disk.
///
/// # Errors
/// Whatever stands in the way; nothing is left behind then.
pub fn run(add: &Add) -> Result<ExitCode> {
    if let Some(name) = &add.name {
        state::check_name(name)?;
    }
    let plan = Plan::load(&add.stack, &CATALOG)?;
    if add.foreground {
        return foreground(add, &plan);
    }
    let os = |error| Error::os("server process", &error);
    let (reader, writer) = std::io::pipe().map_err(os)?;
    match fork::fork().map_err(os)? {
        fork::Fork::Parent(_) => {
            drop(writer);
            told(add, BufReader::new(reader))
        }
        fork::Fork::Child => {
            drop(reader);
            let _ = rustix::process::setsid();
            background(add, &plan, writer)
        }
    }
}

fn start(add: &Add, plan: &Plan) -> Result<Server> {
    // A core dump could end up on the very disk that has just lost its server.
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    let choice = front::choose(add.export, add.data_path)?;
    let guard = guard::start()?;
    Server::start(add, plan, choice, guard)
}

fn foreground(add: &Add, plan: &Plan) -> Result<ExitCode> {
    let server = start(add, plan)?;
    show(add, server.disk());
    server.run().map(|()| ExitCode::SUCCESS)
}

/// The server's process: reports how its start went, then serves.
fn background(add: &Add, plan: &Plan, mut status: PipeWriter) -> Result<ExitCode> {
    let started = start(add, plan);
    let report = match &started {
        Ok(server) => json!({ "disk": server.disk() }),
        Err(error) => json!({ "error": error.to_string() }),
    };
    let server = match started {
        Ok(server) => server,
        Err(_) => {
            send(&mut status, &report);
            return Ok(ExitCode::from(1));
        }
    };
    // The current directory of a daemon must keep no file system busy. Files are open by now.
    let _ = std::env::set_current_dir("/");
    server::silence(Some(&server.disk().name))?;
    send(&mut status, &report);
    drop(status);
    server.run().map(|()| ExitCode::SUCCESS)
}

/// Sends the report in one write: formatting into the pipe would wake the reader for every word.
fn send(status: &mut PipeWriter, report: &serde_json::Value) {
    let _ = status.write_all(format!("{report}\n").as_bytes());
}

/// The caller's process: waits for the report and passes it on.
fn told(add: &Add, mut status: impl BufRead) -> Result<ExitCode> {
    let mut line = String::new();
    let read = status.read_line(&mut line);
    let report: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
    if let Some(error) = report["error"].as_str() {
        eprintln!("devsplice: {error}");
        return Ok(ExitCode::from(1));
    }
    match serde_json::from_value::<Disk>(report["disk"].clone()) {
        Ok(disk) => {
            show(add, &disk);
            Ok(ExitCode::SUCCESS)
        }
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

/// The node on standard output, for scripts; the rest on standard error.
fn show(add: &Add, disk: &Disk) {
    for warning in &disk.warnings {
        eprintln!("devsplice: note: {warning}");
    }
    if add.json {
        say!("{}", serde_json::to_string_pretty(disk).unwrap_or_default());
        return;
    }
    say!("{}", disk.device);
    let about = format!(
        "{}: {} over {} ({}), data path {}; devsplice info {} says more\n",
        disk.name,
        show_size(disk.size),
        disk.export,
        disk.why,
        disk.data_path,
        disk.name
    );
    let _ = std::io::stderr().write_all(about.as_bytes());
}
