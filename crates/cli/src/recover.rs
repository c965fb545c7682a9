//! Answers for `devsplice recover` and `devsplice upgrade`: a server that goes on where another one
//! ended, or ends for it.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::args::{Recover, Upgrade};
use crate::assemble::assemble;
use crate::launch::{self, launch};
use crate::sandbox::Choice;
use crate::server::Server;
use crate::servers::{self, Seat};
use crate::state::{Claim, Disk, Found};
use crate::{client, guard, keeper, say, state};

/// How long a server may take to finish what is in flight.
const HAND_OVER: Duration = Duration::from_secs(150);
/// How long it may take to let go of the name after that.
const CLAIM: Duration = Duration::from_secs(10);
/// How long those who just look may have the seat of a server of many.
const GLANCE: Duration = Duration::from_secs(2);
/// How long a server may take to take a disk back.
const TAKE: Duration = Duration::from_secs(60);

/// What is said of a disk that another process has now, and that nobody serves, as before.
pub fn still(name: &str) -> String {
    format!("quiesced, as it was; devsplice resume {name} serves it")
}

/// Serves disks again whose servers are gone.
///
/// # Errors
/// If one cannot be served again; all are tried.
pub fn recover(recover: &Recover) -> Result<()> {
    let wanted = match &recover.name {
        Some(name) => vec![state::find(name)?],
        None => {
            let all = state::all()?.into_iter();
            all.filter(|one| !one.alive && guard::is_kept(&one.disk)).collect()
        }
    };
    each(wanted, |found| {
        let disk = back(&found.disk)?;
        if recover.json {
            say!("{}", disk.shown());
        } else {
            say!("{}", disk.device);
            if disk.quiesced {
                eprintln!("devsplice: {}: {}", disk.name, still(&disk.name));
            }
        }
        Ok(())
    })
}

/// Has a disk served again: by the server of many that it was one of, if that runs, else by a
/// process of its own.
///
/// # Errors
/// As [`again`].
pub fn back(left: &Disk) -> Result<Disk> {
    let server = left.server.as_deref().filter(|server| servers::find(server).is_ok());
    if let Some(server) = server {
        let disk = client::call_server(server, "recover", &json!({ "disk": left.name }), TAKE)?;
        return launch::disk(&json!({ "disk": disk }));
    }
    // Without a guard it may be systemd that has kept what keeps the disk, for this very process.
    // A guard that keeps one that is quiesced may be dying: it is asked for nothing.
    let is_guarded = !left.quiesced && guard::is_kept(left);
    let stored = if is_guarded { Vec::new() } else { keeper::stored(left) };
    let stored = Some(stored).filter(|stored| !stored.is_empty());
    let report = launch(|| {
        let server = again(&left.name, stored)?;
        let disk = server.disk()?;
        Ok((server, json!({ "disk": disk })))
    })?;
    launch::disk(&report)
}

/// Has a disk that is served taken over from its server, to be guarded by who asks for that.
///
/// # Errors
/// If it cannot be. Its server goes on then; or where that has left it already, a guard keeps it,
/// and tries to have it served again.
pub fn taken(found: &Found) -> Result<Disk> {
    launch::disk(&launch(|| succeed(found))?)
}

/// Does it for all, and fails at the end if it failed for one.
fn each(wanted: Vec<Found>, mut each: impl FnMut(&Found) -> Result<()>) -> Result<()> {
    if let [one] = wanted.as_slice() {
        return each(one);
    }
    let mut failed = Vec::new();
    for found in wanted {
        if let Err(error) = each(&found) {
            eprintln!("devsplice: {error}");
            failed.push(found.disk.name);
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, failed.join(", "), "not done"))
}

/// The server's process: takes over what a dead one left. `kept` is what its guard had to keep;
/// with none a person wants this, so that what went wrong before does not count, nor that a person
/// has quiesced it, which no other may end.
///
/// # Errors
/// If the kernel does not have the disk any more, another process serves it, or it cannot be.
pub fn again(name: &str, kept: Option<Vec<OwnedFd>>) -> Result<Server> {
    let guard = guard::start_with(kept.as_deref().unwrap_or_default())?;
    match guard::claim_kept(name, kept.as_ref().is_some_and(|kept| !kept.is_empty())) {
        Ok((claim, left)) if left.quiesced && kept.is_some() => {
            let kept = kept.and_then(|kept| keeper::with(&left, kept));
            Server::stay_held(claim, &left, guard, kept)
        }
        Ok((claim, mut left)) => {
            let kept = match kept {
                Some(kept) => keeper::with(&left, kept),
                None => {
                    left.restarts = 0;
                    keeper::of(&left)
                }
            };
            Server::take_over(claim, &left, guard, kept, "restarted")
        }
        Err(error) => {
            guard.dismiss();
            Err(error)
        }
    }
}

/// What is asked of a server of many: its threads, its sandbox. Else it is as it was.
type Wanted = (Option<usize>, Option<Choice>);

/// The same for a server of many, with all of its disks that the kernel keeps. `why` is the event.
///
/// # Errors
/// If there is such a server already, or it cannot be had. Disks that cannot be are left as they
/// are.
pub fn again_many(name: &str, wanted: Wanted, why: &str) -> Result<Server> {
    let guard = guard::start()?;
    let seat = match seat(name) {
        Ok(Some(seat)) => seat,
        other => {
            guard.dismiss();
            other?;
            let thing = format!("server `{name}`");
            return Err(Error::new(ErrorKind::Busy, thing, "runs already")
                .next(format!("devsplice add --server {name} gives it disks")));
        }
    };
    many(name, seat, wanted, guard, why)
}

/// The seat of a server of many. Who just looks whether it is taken takes it for a moment.
fn seat(name: &str) -> Result<Option<Seat>> {
    let end = Instant::now() + GLANCE;
    loop {
        match Seat::take(name) {
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            taken => return taken,
        }
    }
}

fn many(
    name: &str,
    mut seat: Seat,
    (threads, sandbox): Wanted,
    guard: guard::Guard,
    why: &str,
) -> Result<Server> {
    let had = Some(seat.about.threads).filter(|threads| *threads > 0);
    let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
    seat.about.threads = threads.or(had).unwrap_or_else(cpus);
    seat.about.sandbox = sandbox.unwrap_or(seat.about.sandbox);
    let server = Server::of_many(seat, guard)?;
    let mut late = Vec::new();
    for Found { disk, .. } in servers::disks(name)? {
        if guard::is_kept(&disk)
            && let Err(error) = server.hall().inherit(&disk.name, why)
        {
            eprintln!("devsplice: {error}");
            late.extend((error.kind() == ErrorKind::Busy).then_some(disk.name));
        }
    }
    server.hall().inherit_late(late, why);
    Ok(server)
}

/// Takes disks over from the programs that serve them.
///
/// # Errors
/// If one cannot be taken over; what becomes of it then, [`taken`] says. All are tried.
pub fn upgrade(upgrade: &Upgrade) -> Result<()> {
    if let Some(binary) = &upgrade.binary {
        return Err(replace(upgrade, binary));
    }
    let wanted = match &upgrade.name {
        Some(name) => vec![state::find(name)?],
        None => {
            let all = state::all()?.into_iter();
            all.filter(|one| one.alive && one.disk.outlives_server()).collect()
        }
    };
    let mut done = std::collections::BTreeSet::new();
    each(wanted, |found| {
        let report = match &found.disk.server {
            // It takes all of its disks along.
            Some(server) if !done.insert(server.clone()) => return Ok(()),
            Some(server) => launch(|| succeed_many(server))?,
            None => launch(|| succeed(found))?,
        };
        for moved in report["moved"].as_array().into_iter().flatten() {
            show(moved, upgrade.json);
        }
        Ok(())
    })
}

fn show(moved: &Value, json: bool) {
    if json {
        return say!("{moved}");
    }
    say!("{}", shown(moved));
}

/// What is said of a disk that was taken over.
fn shown(moved: &Value) -> String {
    let (name, pause) = (moved["name"].as_str(), moved["pause_ms"].as_f64().unwrap_or(0.0));
    let (from, to) = (&moved["from"], &moved["to"]);
    let name = name.unwrap_or_default();
    match moved["quiesced"].as_bool() {
        Some(true) => format!("{name}: process {to} instead of {from}, {}", still(name)),
        _ => format!("{name}: process {to} instead of {from}, pause {pause:.1} ms"),
    }
}

fn moved(disk: &Disk, (from, to): (u32, u32), start: Instant) -> Value {
    let pause_ms = start.elapsed().as_secs_f64() * 1000.0;
    let Disk { name, quiesced, .. } = disk;
    json!({ "name": name, "from": from, "to": to, "pause_ms": pause_ms, "quiesced": quiesced })
}

/// Becomes the other program, with the same wish.
fn replace(upgrade: &Upgrade, binary: &std::path::Path) -> Error {
    let path = binary.display().to_string();
    let old_goes_on = "the old program goes on serving";
    let version = std::process::Command::new(binary).arg("--version").output();
    match version {
        Ok(said) if said.status.success() && said.stdout.starts_with(b"devsplice ") => {}
        Ok(said) => {
            let reason = format!("does not say that it is devsplice ({})", said.status);
            return Error::invalid(path, reason).next(old_goes_on);
        }
        Err(error) => return Error::os(path, &error).next(old_goes_on),
    }
    let mut command = std::process::Command::new(binary);
    command.arg("upgrade").args(&upgrade.name);
    if upgrade.all {
        command.arg("--all");
    }
    if upgrade.json {
        command.arg("--json");
    }
    let error = command.exec();
    Error::os(path, &error).next(old_goes_on)
}

/// What can be found out of a take-over beforehand: the old server is still there if that fails.
fn look(found: &Found) -> Result<()> {
    let Found { disk, alive } = found;
    let name = &disk.name;
    if !alive {
        let error = Error::new(ErrorKind::NotFound, name, "its server is gone");
        return Err(error.next(format!("devsplice recover {name} serves it again")));
    }
    if disk.quiesced {
        let error = Error::invalid(name, "is quiesced");
        return Err(error.next(format!("devsplice resume {name} first")));
    }
    if !disk.outlives_server() {
        let reason = "goes with its server, so another cannot take it over";
        return Err(Error::new(ErrorKind::Unsupported, name, reason));
    }
    assemble(&disk.plan()?, Access::Look).map(drop)
}

/// Waits until a server has let go of something.
fn let_go<T>(name: &str, mut take: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + CLAIM;
    loop {
        match take()? {
            Some(taken) => return Ok(taken),
            None if Instant::now() > end => {
                return Err(Error::new(ErrorKind::Busy, name, "another process has taken it"));
            }
            None => {}
        }
    }
}

/// The server's process: has the old one let go, and takes over.
fn succeed(found: &Found) -> Result<(Server, launch::Report)> {
    look(found)?;
    let name = &found.disk.name;
    // From the old guard, which is there until this process has taken over; or from the server,
    // which lives.
    let kept = keeper::of(&found.disk).or_else(|| keeper::of_server(&found.disk));
    if kept.is_none() && found.disk.ublk_id.is_none() {
        let reason = "what keeps it cannot be had from its guard nor from its server";
        return Err(Error::new(ErrorKind::Permission, name, reason)
            .next("that takes /proc (mount -t proc proc /proc) and a kernel that lets root look"));
    }
    let mut guard = guard::start_with(kept.as_ref().map_or(&[], |kept| &kept.fuse))?;
    // The old server lets go of the disk. If it has no guard nothing else keeps it then, whatever
    // becomes of this process.
    if kept.is_some() {
        guard.keep_on(name);
    }
    let start = Instant::now();
    if let Err(error) = client::call(name, "hand-over", &json!({}), HAND_OVER) {
        match error.kind() {
            // It has refused, and goes on.
            ErrorKind::Busy => guard.dismiss(),
            _ => guard.give_up(),
        }
        return Err(error);
    }
    let taken = match let_go(name, || Claim::hold(name)) {
        Ok((claim, Some(left))) => Ok((claim, left)),
        Ok((claim, None)) => {
            claim.remove();
            Err(Error::new(ErrorKind::NotFound, name, "is gone"))
        }
        Err(error) => Err(error),
    };
    match taken {
        Ok((claim, left)) => {
            let server = Server::take_over(claim, &left, guard, kept, "upgraded")?;
            let disk = server.disk()?;
            let moved = moved(&disk, (left.pid, disk.pid), start);
            Ok((server, json!({ "moved": [moved], "disk": disk })))
        }
        Err(error) => {
            guard.give_up();
            Err(error)
        }
    }
}

/// The same for a server of many, with all of its disks.
fn succeed_many(name: &str) -> Result<(Server, launch::Report)> {
    let old = servers::find(name)?;
    let disks = servers::disks(name)?;
    disks.iter().try_for_each(look)?;
    let guard = guard::start()?;
    let start = Instant::now();
    let taken = client::call_server(name, "hand-over", &json!({}), HAND_OVER)
        .and_then(|_| let_go(name, || Seat::take(name)));
    let seat = match taken {
        Ok(seat) => seat,
        Err(error) => {
            guard.dismiss();
            return Err(error);
        }
    };
    let server = many(name, seat, (None, None), guard, "upgraded")?;
    let names = server.hall().names();
    let pids = (old.pid, std::process::id());
    let moved: Vec<_> = server.hall().disks().iter().map(|disk| moved(disk, pids, start)).collect();
    let lost = disks.iter().map(|found| &found.disk.name).filter(|name| !names.contains(name));
    for name in lost {
        eprintln!("devsplice: {name}: not taken over; devsplice recover {name} tries again");
    }
    Ok((server, json!({ "moved": moved })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_was_quiesced_and_is_still_is_not_said_to_be_served() {
        let disk = |quiesced| Disk { name: "home".to_owned(), quiesced, ..Disk::default() };
        let moved = |quiesced| moved(&disk(quiesced), (1, 2), Instant::now());
        assert_eq!((moved(true)["quiesced"].clone(), moved(false)["quiesced"].clone()), {
            (json!(true), json!(false))
        });
        let said = shown(&moved(true));
        let want = "home: process 2 instead of 1, quiesced, as it was; devsplice resume home";
        assert!(said.starts_with(want), "{said}");
        assert!(shown(&moved(false)).starts_with("home: process 2 instead of 1, pause "));
    }
}
