//! Answers for `devsplice recover` and `devsplice upgrade`: a server that goes on where another one
//! ended, or ends for it.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::args::{Recover, Upgrade};
use crate::assemble::assemble;
use crate::launch::{Started, launch};
use crate::server::Server;
use crate::state::{Claim, Found};
use crate::{client, guard, keeper, say, state};

/// How long a server may take to finish what is in flight.
const HAND_OVER: Duration = Duration::from_secs(150);
/// How long it may take to let go of the name after that.
const CLAIM: Duration = Duration::from_secs(10);

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
        let started = launch(|| Ok((again(&found.disk.name, None)?, None)))?;
        if recover.json {
            say!("{}", started.disk.shown());
        } else {
            say!("{}", started.disk.device);
        }
        Ok(())
    })
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
/// with none a person wants this, so that what went wrong before does not count.
///
/// # Errors
/// If the kernel does not have the disk any more, another process serves it, or it cannot be.
pub fn again(name: &str, kept: Option<Vec<OwnedFd>>) -> Result<Server> {
    let busy = |reason: String| Error::new(ErrorKind::Busy, name, reason);
    let guard = guard::start()?;
    let held = match Claim::hold(name) {
        Ok(Some((claim, Some(left)))) if guard::is_kept(&left) => Ok((claim, left)),
        Ok(Some((_, Some(left)))) => {
            let reason = match left.outlives_server() {
                true => "the kernel does not have it any more".to_owned(),
                false => "was made to go with its server (--recovery off)".to_owned(),
            };
            Err(busy(reason).next(format!("devsplice del {name}, then add it again")))
        }
        Ok(Some((claim, None))) => {
            claim.remove();
            Err(Error::new(ErrorKind::NotFound, name, "is gone"))
        }
        Ok(None) => Err(busy("another process serves it".to_owned())),
        Err(error) => Err(error),
    };
    match held {
        Ok((claim, mut left)) => {
            let kept = match kept {
                Some(kept) => keeper::with(&left, kept),
                None => {
                    left.restarts = 0;
                    keeper::of(&left)
                }
            };
            Server::take_over(claim, &left, guard, kept)
        }
        Err(error) => {
            guard.dismiss();
            Err(error)
        }
    }
}

/// Takes disks over from the programs that serve them.
///
/// # Errors
/// If one cannot be taken over; its server goes on then. All are tried.
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
    each(wanted, |found| {
        let Started { disk, pause_ms } = launch(|| succeed(found))?;
        let pause = pause_ms.unwrap_or(0.0);
        let (old, new) = (found.disk.pid, disk.pid);
        if upgrade.json {
            say!("{}", json!({ "name": disk.name, "from": old, "to": new, "pause_ms": pause }));
        } else {
            say!("{}: process {new} instead of {old}, pause {pause:.1} ms", disk.name);
        }
        Ok(())
    })
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

/// The server's process: has the old one let go, and takes over. The pause of the disk's users,
/// too, in milliseconds.
fn succeed(found: &Found) -> Result<(Server, Option<f64>)> {
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
    // What can be found out beforehand is: the old server is still there if this fails.
    drop(assemble(&disk.plan()?, Access::Look)?);
    let guard = guard::start()?;
    // From the old guard, which is there until this process has taken over.
    let kept = keeper::of(disk);
    let start = Instant::now();
    if let Err(error) = client::call(name, "hand-over", &json!({}), HAND_OVER) {
        guard.dismiss();
        return Err(error);
    }
    let end = Instant::now() + CLAIM;
    let held = loop {
        match Claim::hold(name) {
            Ok(Some((claim, Some(left)))) => break Ok((claim, left)),
            Ok(Some((claim, None))) => {
                claim.remove();
                break Err(Error::new(ErrorKind::NotFound, name, "is gone"));
            }
            Ok(None) if Instant::now() > end => {
                break Err(Error::new(ErrorKind::Busy, name, "another process has taken it"));
            }
            Ok(None) => {}
            Err(error) => break Err(error),
        }
    };
    match held {
        Ok((claim, left)) => {
            let server = Server::take_over(claim, &left, guard, kept)?;
            Ok((server, Some(start.elapsed().as_secs_f64() * 1000.0)))
        }
        Err(error) => {
            guard.dismiss();
            Err(error)
        }
    }
}
