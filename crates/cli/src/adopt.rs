//! Answers for `devsplice adopt`: a ublk device that another tool has made and that nobody serves
//! any more, served from now on as one of ours.

use std::path::Path;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::ublk::{Control, Fit, Recovery, Seen};
use devsplice_spec::Plan;
use serde_json::json;

use crate::args::{self, Add, Export};
use crate::assemble::CATALOG;
use crate::launch::{self, launch};
use crate::server::Server;
use crate::state::{Claim, Disk};
use crate::{guard, hosted, say, state};

/// States of a device (`UBLK_S_DEV_*`): held or failing for want of a server.
const WAITING: [u16; 2] = [2, 3];
/// `UBLK_F_UNPRIVILEGED_DEV`.
const UNPRIVILEGED: u64 = 1 << 5;

/// Takes it over.
///
/// # Errors
/// If there is no such device, somebody serves it, or the stack does not fit it. It is as it was
/// then.
pub fn run(adopt: &args::Adopt) -> Result<()> {
    if let Some(name) = &adopt.name {
        state::check_name(name)?;
    }
    let here = std::env::current_dir().map_err(|error| Error::os("current directory", &error))?;
    let plan = Plan::load(&adopt.stack, &CATALOG)?.anchored(&here)?;
    let id = number(&adopt.device)?;
    let seen = Control::open()?.look(id)?;
    check(&seen, &plan)?;
    let report = launch(|| {
        let server = start(adopt, &plan, &seen)?;
        let disk = server.disk()?;
        Ok((server, json!({ "disk": disk })))
    })?;
    let disk = launch::disk(&report)?;
    for warning in &disk.warnings {
        eprintln!("devsplice: note: {warning}");
    }
    match adopt.json {
        true => say!("{}", serde_json::to_string_pretty(&disk.shown()).unwrap_or_default()),
        false => say!("{}", disk.device),
    }
    Ok(())
}

/// The number in `3`, `/dev/ublkb3`, `ublkc3`, or in what a link of the device's leads to.
fn number(device: &str) -> Result<u32> {
    let led = std::fs::canonicalize(device).ok();
    let name = led.as_deref().unwrap_or(Path::new(device)).file_name().unwrap_or_default();
    let name = name.to_string_lossy();
    let digits = name.strip_prefix("ublkb").or_else(|| name.strip_prefix("ublkc")).unwrap_or(&name);
    digits.parse().map_err(|_| {
        Error::invalid(device, "is no ublk device").next("give its number, or /dev/ublkbN")
    })
}

/// What can be said before anything is done.
fn check(seen: &Seen, plan: &Plan) -> Result<()> {
    let thing = format!("/dev/ublkb{}", seen.id);
    if let Some(ours) = state::all()?.into_iter().find(|one| one.disk.ublk_id == Some(seen.id)) {
        let name = ours.disk.name;
        let next = format!("devsplice recover {name}, or devsplice swap {name} STACK");
        return Err(Error::new(ErrorKind::Busy, thing, format!("is ours, {name}")).next(next));
    }
    if !WAITING.contains(&seen.state) {
        let reason = match (seen.state, seen.server) {
            (1, server) => format!("is served by process {server}"),
            _ => "is dead: the kernel has not kept it for another server".to_owned(),
        };
        return Err(Error::new(ErrorKind::Busy, thing, reason)
            .next("its server has to end, and to have made it with recovery"));
    }
    if seen.flags & UNPRIVILEGED != 0 {
        let reason = "belongs to an ordinary user, and is served by that one's programs only";
        return Err(Error::new(ErrorKind::Unsupported, thing, reason));
    }
    match hosted::passing(plan) {
        Some(place) => Err(Error::invalid(place, "is empty: the disk would lose its content")),
        None => Ok(()),
    }
}

/// The server's process.
fn start(adopt: &args::Adopt, plan: &Plan, seen: &Seen) -> Result<Server> {
    let made_with = options(adopt, seen)?;
    let guard = guard::start()?;
    let claim = match Claim::take(adopt.name.as_deref()) {
        Ok(claim) => claim,
        Err(error) => {
            guard.dismiss();
            return Err(error);
        }
    };
    let disk = Disk {
        name: claim.name.clone(),
        export: "ublk".to_owned(),
        why: "adopted".to_owned(),
        device: format!("/dev/ublkb{}", seen.id),
        ublk_id: Some(seen.id),
        stack: plan.to_expression(),
        labels: plan.labels(),
        adopted: true,
        recovery: Recovery::of(seen.flags).name().to_owned(),
        made_with: Some(made_with),
        ..Disk::default()
    };
    Server::adopt(claim, &disk, guard)
}

/// What it would have been made with.
fn options(adopt: &args::Adopt, seen: &Seen) -> Result<Add> {
    let plain = Add::with(json!({ "stack": adopt.stack }))
        .map_err(|error| Error::invalid(&adopt.stack, error.to_string()))?;
    Ok(Add {
        name: adopt.name.clone(),
        export: Export::Ublk,
        id: Some(seen.id),
        queues: Some(seen.queues),
        depth: seen.depth,
        read_only: seen.is_read_only,
        stuck_after: adopt.stuck_after,
        ..plain
    })
}

/// How well a stack has to fit a disk that is taken over.
pub fn fit(disk: &Disk) -> Fit {
    if disk.adopted { Fit::Adopted } else { Fit::Same }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_by_its_number_or_its_nodes() {
        for word in ["7", "/dev/ublkb7", "ublkb7", "/dev/ublkc7", "ublkc7"] {
            assert_eq!(number(word).unwrap(), 7, "{word}");
        }
        for word in ["", "/dev/sda", "ublkb", "ublkbx", "-1", "/dev/null"] {
            assert!(number(word).is_err(), "{word}");
        }
    }
}
