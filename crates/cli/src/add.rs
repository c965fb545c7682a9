//! Answers for `devsplice add`: checks what can be checked at once, starts the server, tells how
//! that went.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use devsplice_core::size::show_size;
use devsplice_core::{Error, Result};
use devsplice_spec::Plan;
use serde_json::json;

use crate::args::{Add, Export};
use crate::assemble::CATALOG;
use crate::launch::{self, launch};
use crate::server::Server;
use crate::state::Disk;
use crate::{client, front, guard, protect, say, servers, state};

/// How long a server may take to make a disk.
const LIMIT: Duration = Duration::from_secs(90);

/// Makes a disk.
///
/// # Errors
/// Whatever stands in the way; nothing is left behind then.
pub fn run(add: &Add) -> Result<ExitCode> {
    if let Some(name) = &add.name {
        state::check_name(name)?;
    }
    let here = std::env::current_dir().map_err(|error| Error::os("current directory", &error))?;
    let plan = Plan::load(&add.stack, &CATALOG)?.anchored(&here)?;
    let add = &anchored(add, &here);
    if let Some(server) = &add.server {
        let disk = join(add, &plan, server)?;
        show(add, &disk);
        return Ok(ExitCode::SUCCESS);
    }
    if add.foreground {
        protect::server();
        let server = start(add, &plan)?;
        show(add, &server.disk()?);
        return server.run().map(|()| ExitCode::SUCCESS);
    }
    show(add, &alone(add, &plan)?);
    Ok(ExitCode::SUCCESS)
}

/// The options with paths that mean the same to a process that is elsewhere.
fn anchored(add: &Add, here: &Path) -> Add {
    let mut add = add.clone();
    if let Some(file) = &mut add.ublk.shared_memory {
        *file = here.join(&*file).to_string_lossy().into_owned();
    }
    add
}

/// Makes a disk with a process of its own.
///
/// # Errors
/// As [`run`].
pub fn alone(add: &Add, plan: &Plan) -> Result<Disk> {
    let report = launch(|| {
        let server = start(add, plan)?;
        let disk = server.disk()?;
        Ok((server, json!({ "disk": disk })))
    })?;
    launch::disk(&report)
}

/// Has a server of many make a disk.
///
/// # Errors
/// As [`run`]; and if there is no such server.
pub fn join(add: &Add, plan: &Plan, server: &str) -> Result<Disk> {
    servers::find(server)?;
    let mut params = add.changed();
    params["stack"] = json!(plan.to_expression());
    params["labels"] = json!(plan.labels());
    let disk = client::call_server(server, "add", &params, LIMIT)?;
    launch::disk(&json!({ "disk": disk }))
}

fn start(add: &Add, plan: &Plan) -> Result<Server> {
    // An address to listen at says what kind of disk is wanted.
    let is_nbd = add.export == Export::Nbd || !add.listen.is_empty();
    if let Some(option) = add.tls.first().filter(|_| !is_nbd) {
        return Err(Error::invalid(option, "is for disks that are reached by NBD")
            .next("say where clients connect: --listen nbd://HOST:PORT"));
    }
    let choice = match is_nbd {
        true => front::nbd(add)?,
        false => front::choose_for(add)?,
    };
    let guard = guard::start()?;
    Server::start(add, plan, choice, guard)
}

/// The node on standard output, for scripts; the rest on standard error.
fn show(add: &Add, disk: &Disk) {
    for warning in &disk.warnings {
        eprintln!("devsplice: note: {warning}");
    }
    if add.json {
        say!("{}", serde_json::to_string_pretty(&disk.shown()).unwrap_or_default());
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
