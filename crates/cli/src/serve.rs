//! Answers for `devsplice serve`: a process that serves many disks.

use devsplice_core::Result;
use serde_json::{Value, json};

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
    let quiesced = server.hall().disks().into_iter().filter(|disk| disk.quiesced);
    let report = json!({
        "server": serve.name,
        "pid": std::process::id(),
        "threads": server.threads(),
        "disks": server.hall().names(),
        "quiesced": quiesced.map(|disk| disk.name).collect::<Vec<_>>(),
    });
    Ok((server, report))
}

fn show(serve: &Serve, report: &Report) {
    if serve.json {
        return say!("{report}");
    }
    let (name, pid, threads) = (&serve.name, &report["pid"], &report["threads"]);
    say!("{name}: process {pid}, {threads} I/O threads; devsplice add --server {name} adds a disk");
    said_of_disks(report).iter().for_each(|line| say!("{line}"));
}

/// What is said of the disks that the server has from the start.
fn said_of_disks(report: &Report) -> Vec<String> {
    let all = |key: &str| report[key].as_array().cloned().unwrap_or_default();
    let quiesced = all("quiesced");
    let said = |disk: &Value| {
        let name = disk.as_str().unwrap_or_default();
        match quiesced.contains(disk) {
            true => format!("{name}: {}", recover::still(name)),
            false => format!("{name}: served again"),
        }
    };
    all("disks").iter().map(said).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_is_said_to_be_what_it_is() {
        let said = said_of_disks(&json!({ "disks": ["a", "b"], "quiesced": ["b"] }));
        assert_eq!(said[0], "a: served again");
        assert_eq!(said[1], "b: quiesced, as it was; devsplice resume b serves it");
    }
}
