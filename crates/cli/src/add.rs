//! Answers for `devsplice add`: checks what can be checked at once, starts the server, tells how
//! that went.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use devsplice_core::size::show_size;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::{nbd, ublk};
use devsplice_spec::Plan;
use serde_json::json;

use crate::args::{Add, Export};
use crate::assemble::CATALOG;
use crate::launch::{self, launch};
use crate::server::Server;
use crate::state::{Disk, Found};
use crate::{client, front, guard, hosted, keeper, protect, recover, say, servers, state};

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
    // Of all tries together.
    let end = Instant::now() + STUCK;
    let mut tries = 0;
    while let Some(found) = there(add, plan, end)? {
        if !found.alive {
            let mut disk = recover::back(&found.disk)?;
            if let Some(what) = unlike(add, plan, &found.disk) {
                let note = format!("served as it was, with another {what} than asked for");
                disk.warnings.push(note);
            }
            return Ok(Some(disk));
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
fn there(add: &Add, plan: &Plan, end: Instant) -> Result<Option<Found>> {
    let Some(name) = add.name.as_deref().filter(|_| add.or_recover) else { return Ok(None) };
    let Some(found) = settled(name, end, || state::find(name).ok())? else { return Ok(None) };
    let busy = |reason: String| Error::new(ErrorKind::Busy, format!("`{name}`"), reason);
    if found.alive {
        if !found.disk.outlives_server() || found.disk.server.is_some() {
            return Ok(None);
        }
        return match unlike(add, plan, &found.disk) {
            None => Ok(Some(found)),
            Some(what) => Err(busy(format!("is the name of a running disk with another {what}"))
                .next(format!("devsplice del {name}, or choose another --name"))),
        };
    }
    let is_stored = !keeper::stored(&found.disk).is_empty();
    if !guard::is_kept(&found.disk) && !is_stored {
        return Ok(None);
    }
    // What is below is in somebody's hands. What systemd has would be lost if this failed: see
    // recover::again, which leaves the disk as it is.
    if found.disk.quiesced && !is_stored {
        return Err(busy("is quiesced, and its server is gone".to_owned())
            .next(format!("devsplice recover {name} serves it again")));
    }
    Ok(Some(found))
}

/// In what a disk is not the one that is asked for, of what must not be taken for one another.
fn unlike(add: &Add, plan: &Plan, disk: &Disk) -> Option<String> {
    if disk.stack != plan.to_expression() {
        return Some(format!("stack, {},", disk.stack));
    }
    let is_read_only = disk.made_with.as_ref().is_some_and(|made| made.read_only);
    let recovery = hosted::lasting(add, plan, true).ok().map(|add| add.recovery.forced());
    let recovery = recovery.map(|forced| forced.unwrap_or(ublk::Recovery::Reissue).name());
    let export = front::asked(add).map(Export::name);
    let differing = [
        ("--read-only", is_read_only != add.read_only),
        ("--recovery", recovery != Some(disk.recovery.as_str())),
        ("--export", export.is_some_and(|export| export != disk.export)),
    ];
    differing.iter().find(|(_, differs)| *differs).map(|(option, _)| (*option).to_owned())
}

/// What there is, once it is clear whether somebody serves it: what a server that was killed has
/// in flight below holds its lock for longer than it lived.
///
/// # Errors
/// If that is not clear by `end`.
fn settled(
    name: &str,
    end: Instant,
    mut look: impl FnMut() -> Option<Found>,
) -> Result<Option<Found>> {
    loop {
        let Some(found) = look() else { return Ok(None) };
        if !found.alive || found.lives() {
            return Ok(Some(found));
        }
        if Instant::now() > end {
            let reason = "what its dead server had in flight is still stuck below";
            return Err(Error::new(ErrorKind::Busy, name, reason)
                .next("see what does not answer there (dmesg), then try again"));
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
    for path in add.tls.tls_certificates.iter_mut().chain(&mut add.tls.tls_psk) {
        *path = here.join(&*path);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stuck_below_is_waited_for_until_one_moment_for_all() {
        let found = |pid, alive| Some(Found { disk: Disk { pid, ..Disk::default() }, alive });
        let end = Instant::now();
        let stuck = settled("d", end, || found(u32::MAX, true)).unwrap_err();
        assert!(stuck.to_string().contains("stuck below"), "{stuck}");
        let own = std::process::id();
        assert!(settled("d", end, || found(own, true)).unwrap().unwrap().alive);
        assert!(!settled("d", end, || found(u32::MAX, false)).unwrap().unwrap().alive);
        assert!(settled("d", end, || None).unwrap().is_none());
    }
}
