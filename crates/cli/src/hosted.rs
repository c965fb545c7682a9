//! Answers for one disk of a server: how it comes to be, what it is, how it goes.

use std::sync::Arc;
use std::time::Duration;

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::{Served, Stuck};
use devsplice_exports::host;
use devsplice_exports::threads::{Pool, Service};
use devsplice_exports::{fuse, ublk};
use devsplice_spec::{Kind, Place, Plan};
use devsplice_uring::{Remote, Standing};
use serde_json::{Value, json};

use crate::adopt;
use crate::args::{Add, Export, RecoveryChoice};
use crate::assemble::assemble_with;
use crate::front::{Front, Suspended};
use crate::hall::{Line, UNGUARDED};
use crate::sandbox::{self, Choice};
use crate::state::{self, Claim, Disk};
use crate::{keeper, protect, tell};

/// How long what is in memory for the disk may take to be written out before it is removed.
const SYNC_PATIENCE: Duration = Duration::from_secs(120);
/// The same when it is removed in any case.
const FORCED_SYNC_PATIENCE: Duration = Duration::from_secs(15);

/// Whether a disk is served.
pub(crate) enum Phase {
    /// It is.
    Up(Front),
    /// The kernel holds its requests.
    Held(Suspended),
    /// On the way from one to the other.
    Between,
}

/// A disk with what belongs to it.
pub struct Hosted {
    pub(crate) phase: Phase,
    pub(crate) disk: Disk,
    pub(crate) plan: Plan,
    pub(crate) claim: Claim,
    pub(crate) line: Line,
}

/// What a new disk is to be, and why its front end.
pub struct Wish<'a> {
    /// The options.
    pub add: &'a Add,
    /// The stack.
    pub plan: &'a Plan,
    /// The front end, and why that one.
    pub choice: (Export, String),
}

impl Hosted {
    /// Makes the disk. On an error everything of it is cleaned up.
    ///
    /// # Errors
    /// Whatever stands in the way.
    pub fn begin(wish: Wish<'_>, claim: Claim, line: Line) -> Result<Hosted> {
        let Wish { add, plan, choice: (export, why) } = wish;
        let is_kept = export != Export::Fuse || line.server().is_none();
        let add = match shut_in(add, &line).and_then(|()| lasting(add, plan, is_kept)) {
            Ok(add) => add,
            Err(error) => {
                claim.remove();
                return Err(error);
            }
        };
        let name = claim.name.clone();
        let disk = Disk {
            name: name.clone(),
            server: line.server().map(str::to_owned),
            export: export.name().to_owned(),
            why,
            read_only: add.read_only,
            serial: add.serial.clone(),
            made_with: Some(add.clone()),
            ..Disk::default()
        };
        let made = Hosted::make(plan, disk, claim, line, |service, disk, claim| {
            // From now on somebody would have to clear up if this process died: so that is written
            // before the disk is there, which may take as long as a look for partitions does.
            let lock = claim.lock()?;
            let mut on_made = |number| {
                match export {
                    Export::Fuse => disk.fuse_connection = Some(number),
                    Export::Nbd => {}
                    _ => disk.ublk_id = Some(number),
                }
                let _ = claim.write(disk);
            };
            Front::attach(&add, (&name, lock), export, service, &mut on_made)
        });
        made.map_err(|(claim, error)| {
            claim.remove();
            error
        })
    }

    /// Serves a disk again whose server is gone. `left` is what that one wrote of it, `claim` the
    /// right to it, `kept` what keeps it over FUSE.
    ///
    /// # Errors
    /// If it cannot be taken over; the disk is then as it was, and so is what is known of it.
    pub fn take_over(
        claim: Claim,
        left: &Disk,
        kept: Option<fuse::Kept>,
        line: Line,
    ) -> Result<Hosted> {
        Hosted::follow(claim, (left, kept), line, |mut claim| drop(claim.write(left)))
    }

    /// Has a disk that a person has quiesced stay so, with this process in place of a server that
    /// is gone: nothing below is touched before `resume`.
    ///
    /// # Errors
    /// As [`Hosted::take_over`].
    pub fn stay_held(
        claim: Claim,
        left: &Disk,
        kept: Option<fuse::Kept>,
        line: Line,
    ) -> Result<Hosted> {
        let (plan, suspended) = (left.plan()?, Suspended::find(left, &claim, kept)?);
        let (mut disk, mut claim, mut line) = (left.clone(), claim, line);
        disk.pid = std::process::id();
        disk.started_ms = state::now_ms();
        disk.warnings = vec![format!("is quiesced; devsplice resume {} serves it", disk.name)];
        line.connect(&disk.name)?;
        if let Some((fds, told)) = suspended.kept() {
            disk.keeper = Some(line.keep(fds, told)?);
        }
        sandbox::process(disk.made_with.as_ref().map_or(Choice::On, |add| add.sandbox));
        claim.write(&disk)?;
        Ok(Hosted { phase: Phase::Held(suspended), disk, plan, claim, line })
    }

    /// Serves a disk that another tool has made: `disk` is what one of ours would have written.
    ///
    /// # Errors
    /// If it cannot be taken over; it is as it was then.
    pub fn adopt(claim: Claim, disk: &Disk, line: Line) -> Result<Hosted> {
        Hosted::follow(claim, (disk, None), line, Claim::remove)
    }

    /// Takes over; `back_out` is what becomes of the claim if that fails.
    fn follow(
        claim: Claim,
        (left, kept): (&Disk, Option<fuse::Kept>),
        line: Line,
        back_out: impl FnOnce(Claim),
    ) -> Result<Hosted> {
        let mut disk = left.clone();
        disk.quiesced = false;
        disk.server = line.server().map(str::to_owned);
        let found = (|| {
            let (plan, suspended) = (left.plan()?, Suspended::find(left, &claim, kept)?);
            // Before anything else: what has kept the disk so far may be this very process.
            disk.keeper = match suspended.kept() {
                Some((fds, told)) => Some(line.keep(fds, told)?),
                None => None,
            };
            Ok((plan, suspended))
        })();
        let (plan, suspended) = match found {
            Ok(found) => found,
            Err(error) => {
                back_out(claim);
                return Err(error);
            }
        };
        let made = Hosted::make(&plan, disk, claim, line, |service, disk, claim| {
            // Whoever comes after this process has to know it.
            claim.write(disk)?;
            suspended.resume(service, adopt::fit(disk)).map_err(|(_, error)| error)
        });
        made.map_err(|(claim, error)| {
            back_out(claim);
            error
        })
    }

    /// Opens the stack and has `attach` make a front end of it.
    fn make(
        plan: &Plan,
        mut disk: Disk,
        mut claim: Claim,
        mut line: Line,
        attach: impl FnOnce(Service, &mut Disk, &mut Claim) -> Result<Front>,
    ) -> Result<Hosted, (Claim, Error)> {
        disk.pid = std::process::id();
        disk.started_ms = state::now_ms();
        let made = line
            .connect(&disk.name)
            .and_then(|()| open(plan, &mut disk, line.pool()))
            .and_then(|service| {
                sandbox::process(disk.made_with.as_ref().map_or(Choice::On, |add| add.sandbox));
                attach(service, &mut disk, &mut claim)
            });
        let mut front = match made {
            Ok(front) => front,
            Err(error) => return Err((claim, error)),
        };
        line.entrust(&mut front, &mut disk);
        disk.warnings.extend(front.crew().warnings.iter().cloned());
        disk.warnings.extend(protect::warnings().into_iter().chain(sandbox::warnings()));
        disk.device = front.path().to_owned();
        disk.data_path = front.data_path().to_owned();
        disk.recovery = front.recovery().to_owned();
        disk.batch = front.is_batched();
        disk.low_depth = front.is_low_depth();
        disk.features = front.features().into_iter().map(str::to_owned).collect();
        if front.clients().is_none() {
            make_link(&disk);
        }
        if let Err(error) = claim.write(&disk) {
            let _ = front.detach();
            return Err((claim, error));
        }
        line.serve(front.crew());
        Ok(Hosted { phase: Phase::Up(front), disk, plan: plan.clone(), claim, line })
    }

    /// What it is.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What its threads share, while it is served.
    pub fn served(&self) -> Option<Arc<Served>> {
        match &self.phase {
            Phase::Up(front) => Some(Arc::clone(&front.crew().served)),
            _ => None,
        }
    }

    /// What messages call it.
    pub(crate) fn thing(&self) -> String {
        format!("{} ({})", self.disk.name, self.disk.device)
    }

    /// Makes sure that it may be removed now: nobody holds it, everything written to it is below,
    /// and, where the kernel can do that, nobody comes to use it any more.
    ///
    /// # Errors
    /// Why it must not.
    pub fn release(&mut self) -> Result<()> {
        let thing = self.thing();
        let Disk { name, device, .. } = &self.disk;
        let busy = |reason: String| Error::new(ErrorKind::Busy, thing.clone(), reason);
        let Phase::Up(front) = &mut self.phase else {
            return Err(busy("is quiesced, requests may be waiting".to_owned())
                .next("resume it first, or --force to lose them"));
        };
        match front.clients() {
            None => {}
            Some(0) => return Ok(()),
            Some(count) => {
                return Err(busy(format!("is held by {count} NBD connections"))
                    .next("end them first, or --force to cut them off"));
            }
        }
        if !host::is_held(device) {
            if host::sync(device, SYNC_PATIENCE) {
                return front.stop_if_unused().map_err(|error| match error.kind() {
                    ErrorKind::Busy => busy("is open in another process".to_owned())
                        .next("end that first (fuser NODE finds it), or --force to remove it"),
                    _ => error,
                });
            }
            let log = state::path(name, "log");
            return Err(busy("data in memory could not be written to it".to_owned())
                .next(format!("see {}, or --force to lose it", log.display())));
        }
        let mounts = host::mounts_of(device);
        let holder = match mounts.is_empty() {
            true => "held by another user (swap, LVM, another server)".to_owned(),
            false => format!("mounted on {}", mounts.join(", ")),
        };
        Err(busy(format!("is {holder}"))
            .next("unmount it first, or --force to remove it all the same"))
    }

    /// What it is and has done.
    pub fn info(&self) -> Value {
        let mut info = self.disk.shown();
        info["protection"] = protect::shown();
        info["sandbox"] = sandbox::shown();
        info["held"] = json!(host::is_held(&self.disk.device));
        if self.line.is_unguarded() {
            let warnings = self.disk.warnings.iter().cloned();
            let lost = format!("its guard has died; {UNGUARDED}");
            info["warnings"] = warnings.chain([lost]).collect();
        }
        let add = self.disk.made_with.as_ref();
        if let Some(file) = add.and_then(|add| add.ublk.shared_memory.as_ref()) {
            info["shared_memory"] = json!(file);
        }
        let Phase::Up(front) = &self.phase else {
            info["state"] = json!("quiesced");
            return info;
        };
        let crew = front.crew();
        let counted = crew.counts().list().into_iter();
        let shared = front.shared_bytes().map(|bytes| ("bytes_shared", bytes));
        let counts: serde_json::Map<String, Value> =
            counted.chain(shared).map(|(k, v)| (k.to_owned(), v.into())).collect();
        info["state"] = json!(self.state());
        if let Some(clients) = front.clients() {
            info["clients"] = json!(clients);
            info["held"] = json!(clients > 0);
            info["tls_relays"] = json!(front.tls_relays());
            info["tls_kernel"] = json!(front.tls_kernel());
        }
        info["threads"] = json!(crew.thread_count());
        info["counts"] = Value::Object(counts);
        if !crew.remotes.is_empty() {
            info["servers"] = crew.remotes.iter().map(server).collect();
        }
        info["layers"] = tell::layers(&crew.served.stack);
        info["events"] = json!(crew.served.events());
        info
    }

    /// Writes out what is in memory, then removes the disk in any case.
    ///
    /// # Errors
    /// As [`Hosted::remove`].
    pub fn close(self) -> Result<(), (Box<Hosted>, Error)> {
        let device = &self.disk.device;
        let is_up = matches!(self.phase, Phase::Up(_));
        if is_up && !host::sync(device, FORCED_SYNC_PATIENCE) {
            eprintln!("devsplice: {device}: data in memory could not be written to it");
        }
        self.remove()
    }

    /// Removes the disk and all traces of it.
    ///
    /// # Errors
    /// If it does not go; somebody has to try again when this process has let go of everything.
    pub fn remove(mut self) -> Result<(), (Box<Hosted>, Error)> {
        self.line.pause();
        let removed = match std::mem::replace(&mut self.phase, Phase::Between) {
            Phase::Up(front) => front.detach().map(drop),
            Phase::Held(suspended) => suspended.remove(),
            // It has been tried before.
            Phase::Between => match self.disk.ublk_id {
                Some(id) => ublk::Control::open().and_then(|mut control| control.delete(id)),
                None => Ok(()),
            },
        };
        match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => Err((Box::new(self), error)),
            _ => {
                keeper::unstore(&self.disk);
                self.claim.remove();
                Ok(())
            }
        }
    }
}

/// Checks that the disk is not to be less shut in than its server of many is.
fn shut_in(add: &Add, line: &Line) -> Result<()> {
    if add.sandbox == Choice::Off && line.server().is_some() && !sandbox::is_off() {
        let reason = "a server of many is shut in as a whole";
        return Err(Error::invalid("--sandbox", reason).next("devsplice serve --sandbox off"));
    }
    Ok(())
}

/// The options, with a recovery that this stack can have; `is_kept` if somebody keeps such a disk.
pub(crate) fn lasting(add: &Add, plan: &Plan, is_kept: bool) -> Result<Add> {
    let mut add = add.clone();
    if add.recovery.forced() == Some(ublk::Recovery::Off) {
        return Ok(add);
    }
    if !is_kept {
        if add.recovery != RecoveryChoice::Auto {
            let reason = "a disk over FUSE goes with a server of many";
            return Err(Error::invalid("--recovery", reason).next("leave out --server"));
        }
        add.recovery = RecoveryChoice::Off;
        return Ok(add);
    }
    if let Some(place) = passing(plan) {
        if add.recovery != RecoveryChoice::Auto {
            let reason = "what is in it goes with its server, so the disk has to go, too";
            return Err(Error::invalid(place, reason).next("--recovery off"));
        }
        add.recovery = RecoveryChoice::Off;
    }
    Ok(add)
}

/// A bottom whose content goes with its process.
pub(crate) fn passing(plan: &Plan) -> Option<&str> {
    let is_passing = |place: &Place| match place.kind {
        Kind::Source(source) => !devsplice_backends::outlives_process(source.name, &place.args),
        Kind::Layer(_) => false,
    };
    plan.places.iter().find(|place| is_passing(place)).map(|place| place.label.as_str())
}

/// Opens a stack to serve it, and writes down what the disk is with it.
pub(crate) fn open(plan: &Plan, disk: &mut Disk, pool: Option<Arc<Pool>>) -> Result<Service> {
    let latency = disk.made_with.as_ref().is_some_and(|add| add.latency);
    let assembled = assemble_with(plan, Access::Serve, latency)?;
    disk.warnings = assembled.warnings();
    let limits = *assembled.stack.limits();
    let asked = disk.made_with.as_ref().is_some_and(|add| add.read_only);
    disk.size = limits.size;
    disk.block = limits.block;
    disk.read_only = asked || limits.read_only;
    disk.stack = plan.to_expression();
    disk.labels = plan.labels();
    let (stack, bottoms) = assembled.into_parts();
    // One log may be that of many disks.
    let (name, again) = (disk.name.clone(), disk.name.clone());
    let on_stuck = Arc::new(move |stuck: &Stuck| report(&name, &stuck_text(stuck)));
    let on_event = Arc::new(move |text: &str| report(&again, text));
    Ok(Service { stack, bottoms, pool, on_stuck, on_event, on_death: die })
}

/// How things stand with a server below.
fn server(remote: &Arc<dyn Remote>) -> Value {
    let Standing { connections, reconnects, tls_kernel, last_error } = remote.standing();
    json!({
        "uri": remote.name(),
        "connections": connections,
        "reconnects": reconnects,
        "tls_kernel": tls_kernel,
        "last_error": last_error,
    })
}

/// A stuck request in words.
pub(crate) fn stuck_text(stuck: &Stuck) -> String {
    let Stuck { lane, tag, io, flying, seconds } = stuck;
    format!(
        "a request has been below for {seconds} s: {} of {} bytes at {} (queue {lane}, tag {tag}, \
         {flying} splices out)",
        io.op.name(),
        io.extent.len,
        io.extent.at
    )
}

/// What there is to say of a disk, in the log.
pub(crate) fn report(disk: &str, text: &str) {
    eprintln!("devsplice: {disk}: {text}");
}

/// An I/O thread cannot go on: what it serves is lost. The guard sees to it.
#[allow(clippy::needless_pass_by_value)]
fn die(error: Error) {
    eprintln!("devsplice: {error}; this process ends");
    std::process::exit(1);
}

fn make_link(disk: &Disk) {
    let link = state::link(&disk.name);
    if let Some(dir) = link.parent() {
        let _ = std::fs::create_dir_all(dir);
    }
    let _ = std::fs::remove_file(&link);
    // A convenience: where /dev cannot be written to, the node itself is still there.
    let _ = std::os::unix::fs::symlink(&disk.device, &link);
}
