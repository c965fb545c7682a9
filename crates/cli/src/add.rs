//! Answers for `devsplice add`: checks what can be checked at once, starts the server, tells how
//! that went.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use devsplice_core::size::show_size;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::nbd;
use devsplice_spec::Plan;
use serde_json::json;

use crate::args::Add;
use crate::assemble::CATALOG;
use crate::launch::{self, launch};
use crate::server::Server;
use crate::state::{Disk, Found};
use crate::{client, front, guard, keeper, protect, recover, say, servers, state};

/// How long a server may take to make a disk.
const LIMIT: Duration = Duration::from_secs(90);
/// How long what a dead server has in flight may be waited for: less than a unit may take to start.
const STUCK: Duration = Duration::from_secs(120);
/// How long a process may take to die that has been killed.
const DYING: Duration = Duration::from_secs(1);
/// How many servers may die just when they are to be taken over from.
const MOST_TRIES: u32 = 3;
/// How often it is looked whether that is over.
const STEP: Duration = Duration::from_millis(20);

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
    let disk = match again(add, &plan)? {
        Some(disk) => disk,
        None => alone(add, &plan)?,
    };
    show(add, &disk);
    Ok(ExitCode::SUCCESS)
}

/// Takes over, or serves again, a disk that is there already; `None` if one is to be made.
fn again(add: &Add, plan: &Plan) -> Result<Option<Disk>> {
    let mut tries = 0;
    while let Some(found) = there(add, plan)? {
        if !found.alive {
            return recover::back(&found.disk).map(Some);
        }
        // Nobody guards it any more, or a process that is none of the unit's.
        tries += 1;
        match recover::taken(&found) {
            // It was dying already.
            Err(_) if tries < MOST_TRIES && found.ends_within(DYING) => {}
            taken => return taken.map(Some),
        }
    }
    Ok(None)
}

/// The disk that is to be taken over or served again rather than made.
fn there(add: &Add, plan: &Plan) -> Result<Option<Found>> {
    let Some(name) = add.name.as_deref().filter(|_| add.or_recover) else { return Ok(None) };
    let Some(found) = settled(name) else { return Ok(None) };
    let is_same = found.disk.stack == plan.to_expression();
    if found.alive {
        let can_be = is_same && found.disk.outlives_server() && found.disk.server.is_none();
        return Ok(can_be.then_some(found));
    }
    if !guard::is_kept(&found.disk) && keeper::stored(&found.disk).is_empty() {
        return Ok(None);
    }
    if !is_same {
        let reason = format!("waits for a server with another stack, {}", found.disk.stack);
        return Err(Error::new(ErrorKind::Busy, name, reason)
            .next(format!("devsplice recover {name}, then devsplice swap {name}")));
    }
    Ok(Some(found))
}

/// The disk of that name, once it is clear whether somebody serves it: what a server that was
/// killed has in flight below holds its lock for longer than it lived.
fn settled(name: &str) -> Option<Found> {
    let end = Instant::now() + STUCK;
    loop {
        let found = state::find(name).ok()?;
        if !found.alive || found.lives() || Instant::now() > end {
            return Some(found);
        }
        std::thread::sleep(STEP);
    }
}

/// The options with paths that mean the same to a process that is elsewhere.
fn anchored(add: &Add, here: &Path) -> Add {
    let mut add = add.clone();
    if let Some(file) = &mut add.ublk.shared_memory {
        *file = here.join(&*file).to_string_lossy().into_owned();
    }
    for address in &mut add.listen {
        // What is none is refused where it is used.
        if let Ok(uri) = nbd::Uri::parse(address) {
            *address = uri.anchored(here).to_string();
        }
    }
    if let Some(dir) = &mut add.tls.tls_certificates {
        *dir = here.join(&*dir);
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
    let choice = front::choose_for(add)?;
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
