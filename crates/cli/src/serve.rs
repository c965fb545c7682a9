//! Answers for `devsplice serve`: a process that serves many disks.

use devsplice_core::Result;
use serde_json::json;

use crate::args::Serve;
use crate::launch::{Report, launch};
use crate::protect;
use crate::server::Server;
use crate::{config, recover, say, state};

/// Starts it. Disks of a server of that name which has died, and which the kernel has kept, are
/// served again.
///
/// # Errors
/// If there is one of that name, or it cannot be had; or if a disk of the configuration cannot be
/// made: the others are, and the server runs.
pub fn run(serve: &Serve) -> Result<()> {
    state::check_name(&serve.name)?;
    let wanted = serve.config.as_deref().map(config::read).transpose()?;
    if serve.foreground {
        protect::server();
        let (server, report) = start(serve)?;
        show(serve, &report);
        if let Some(wanted) = wanted {
            for one in wanted {
                if let Err(error) = server.hall().add(&one.add, &one.plan) {
                    eprintln!("devsplice: {error}");
                }
            }
        }
        return server.run();
    }
    let report = launch(|| start(serve))?;
    show(serve, &report);
    match wanted {
        Some(wanted) => config::make(wanted, Some(&serve.name), serve.json),
        None => Ok(()),
    }
}

fn start(serve: &Serve) -> Result<(Server, Report)> {
    let threads = serve.threads.map(usize::from);
    let server = recover::again_many(&serve.name, (threads, serve.sandbox), "restarted")?;
    let report = json!({
        "server": serve.name,
        "pid": std::process::id(),
        "threads": server.threads(),
        "disks": server.hall().names(),
    });
    Ok((server, report))
}

fn show(serve: &Serve, report: &Report) {
    if serve.json {
        return say!("{report}");
    }
    let (name, pid, threads) = (&serve.name, &report["pid"], &report["threads"]);
    say!("{name}: process {pid}, {threads} I/O threads; devsplice add --server {name} adds a disk");
    for disk in report["disks"].as_array().into_iter().flatten() {
        say!("{}: served again", disk.as_str().unwrap_or_default());
    }
}
