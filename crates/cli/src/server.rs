//! Answers for the process that serves a disk: start-up, then signals and requests from the control
//! socket until it is told to stop.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::Stuck;
use devsplice_exports::fuse;
use devsplice_exports::host;
use devsplice_exports::threads::Service;
use devsplice_exports::ublk::{self, Fit};
use devsplice_spec::{Kind, Plan};
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};
use signal_hook::consts::SIGHUP;

use crate::args::{Add, Export, RecoveryChoice};
use crate::assemble::assemble_with;
use crate::front::{Front, Suspended};
use crate::guard::Guard;
use crate::listen::{Call, Lines, News};
use crate::sandbox::{self, Choice};
use crate::state::{self, Claim, Disk};
use crate::{notify, protect, tell};

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

/// A disk with its server's surroundings.
pub struct Server {
    pub(crate) phase: Phase,
    pub(crate) disk: Disk,
    pub(crate) plan: Plan,
    pub(crate) claim: Claim,
    pub(crate) guard: Guard,
    pub(crate) lines: Lines,
    news: Receiver<News>,
}

impl Server {
    /// Makes the disk. On an error everything is cleaned up, the guard dismissed.
    ///
    /// # Errors
    /// Whatever stands in the way.
    pub fn start(
        add: &Add,
        plan: &Plan,
        choice: (Export, String),
        mut guard: Guard,
    ) -> Result<Server> {
        let made = Server::begin(add, plan, choice, &mut guard);
        match made {
            Ok(parts) => Ok(parts.guarded(guard)),
            Err(error) => {
                guard.dismiss();
                Err(error)
            }
        }
    }

    fn begin(
        add: &Add,
        plan: &Plan,
        (export, why): (Export, String),
        guard: &mut Guard,
    ) -> Result<Parts> {
        let add = lasting(add, plan)?;
        let claim = Claim::take(add.name.as_deref())?;
        guard.name(&claim.name);
        let name = claim.name.clone();
        let disk = Disk {
            name: name.clone(),
            export: export.name().to_owned(),
            why,
            read_only: add.read_only,
            serial: add.serial.clone(),
            made_with: Some(add.clone()),
            ..Disk::default()
        };
        let made = Server::make(plan, disk, claim, |service, disk, claim| {
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
        made.map(|parts| parts.entrusted(guard)).map_err(|(claim, error)| {
            claim.remove();
            error
        })
    }

    /// Serves a disk again whose server is gone. `left` is what that one wrote of it, `claim` the
    /// right to it.
    ///
    /// # Errors
    /// If it cannot be taken over; the disk is then as it was, and so is what is known of it.
    pub fn take_over(
        claim: Claim,
        left: &Disk,
        mut guard: Guard,
        kept: Option<fuse::Kept>,
    ) -> Result<Server> {
        guard.name(&claim.name);
        let made = left.plan().and_then(|plan| Ok((plan, Suspended::find(left, &claim, kept)?)));
        let (plan, suspended) = match made {
            Ok(made) => made,
            Err(error) => {
                guard.dismiss();
                return Err(error);
            }
        };
        let mut disk = left.clone();
        disk.quiesced = false;
        // Before anything else: the guard that has kept the disk so far is this very process.
        match suspended.kept().map(|(fds, told)| guard.keep(&fds, told)).transpose() {
            Ok(keeper) => disk.keeper = keeper,
            Err(error) => {
                guard.dismiss();
                return Err(error);
            }
        }
        let made = Server::make(&plan, disk, claim, |service, disk, claim| {
            // Whoever comes after this process has to know it.
            claim.write(disk)?;
            suspended.resume(service, Fit::Same).map_err(|(_, error)| error)
        });
        match made {
            Ok(parts) => Ok(parts.entrusted(&mut guard).guarded(guard)),
            Err((mut claim, error)) => {
                let _ = claim.write(left);
                guard.dismiss();
                Err(error)
            }
        }
    }

    /// Opens the stack, has `attach` make a front end of it, and starts what serves people.
    fn make(
        plan: &Plan,
        mut disk: Disk,
        mut claim: Claim,
        attach: impl FnOnce(Service, &mut Disk, &mut Claim) -> Result<Front>,
    ) -> Result<Parts, (Claim, Error)> {
        let made = (|| {
            let (news_in, news) = channel();
            let lines = Lines::open(&disk.name, news_in)?;
            disk.pid = std::process::id();
            disk.started_ms = state::now_ms();
            let service = open(plan, &mut disk)?;
            sandbox::process(disk.made_with.as_ref().map_or(Choice::On, |add| add.sandbox));
            let front = attach(service, &mut disk, &mut claim)?;
            Ok((lines, news, front))
        })();
        let (mut lines, news, front) = match made {
            Ok(made) => made,
            Err(error) => return Err((claim, error)),
        };
        disk.warnings.extend(front.crew().warnings.iter().cloned());
        disk.warnings.extend(protect::warnings().into_iter().chain(sandbox::warnings()));
        disk.device = front.path().to_owned();
        disk.data_path = front.data_path().to_owned();
        disk.recovery = front.recovery().to_owned();
        disk.batch = front.is_batched();
        if front.clients().is_none() {
            make_link(&disk);
        }
        lines.serve(front.crew());
        if let Err(error) = claim.write(&disk) {
            let _ = front.detach();
            return Err((claim, error));
        }
        Ok(Parts { front, disk, plan: plan.clone(), claim, lines, news })
    }

    /// What was made.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Serves until told to stop.
    ///
    /// # Errors
    /// If the disk could not be removed in the end.
    pub fn run(mut self) -> Result<()> {
        loop {
            match notify::recv(&self.news) {
                Ok(News::Request(Call::Stop { force }, answer)) => {
                    if !force && let Some(refusal) = self.refusal() {
                        answer.send(refusal);
                        continue;
                    }
                    // Without force the refusal has just been ruled out by writing all out.
                    let done = if force { self.close() } else { self.remove() };
                    let reply = match &done {
                        Ok(()) => json!({ "result": "stopped" }),
                        Err(error) => json!({ "error": error.to_string() }),
                    };
                    // The answer is written by another thread; the process must not end before it.
                    answer.deliver(reply);
                    return done;
                }
                Ok(News::Request(Call::HandOver, answer)) => match self.let_go() {
                    Ok(()) => {
                        answer.deliver(json!({ "result": "handed over" }));
                        return Ok(());
                    }
                    Err((server, error)) => {
                        self = *server;
                        answer.send(json!({ "error": error.to_string() }));
                    }
                },
                Ok(News::Request(call, answer)) => {
                    answer.send(self.answer(call));
                }
                Ok(News::Signal(SIGHUP)) => {}
                Ok(News::Ended(crew)) if !self.lines.is_current(crew) => {}
                Ok(News::Signal(_) | News::Ended(_)) | Err(_) => return self.close(),
            }
        }
    }

    fn answer(&mut self, call: Call) -> Value {
        let done = match call {
            Call::Info => return self.info(),
            Call::Quiesce => self.quiesce(),
            Call::Resume => self.resume(),
            Call::Swap { stack, labels, shrink } => self.swap(&stack, &labels, shrink),
            Call::Resize { shrink } => self.resize(shrink),
            Call::Stop { .. } | Call::HandOver => Err(Error::invalid("request", "out of place")),
        };
        match done {
            Ok(text) => json!({ "result": text }),
            Err(error) => json!({ "error": error.to_string() }),
        }
    }

    /// Why the disk must not be removed now, if so. Otherwise everything written to it is below.
    fn refusal(&self) -> Option<Value> {
        let Disk { name, device, .. } = &self.disk;
        let Phase::Up(front) = &self.phase else {
            return Some(json!({ "error": format!(
                "{name} ({device}): is quiesced, requests may be waiting; resume it first, or \
                 --force to lose them"
            )}));
        };
        match front.clients() {
            None => {}
            Some(0) => return None,
            Some(count) => {
                return Some(json!({ "error": format!(
                    "{name} ({device}): is held by {count} NBD connections; end them first, or \
                     --force to cut them off"
                )}));
            }
        }
        if !host::is_held(device) {
            if host::sync(device, SYNC_PATIENCE) {
                return None;
            }
            let log = state::path(name, "log");
            return Some(json!({ "error": format!(
                "{name} ({device}): data in memory could not be written to it; see {}, or --force \
                 to lose it",
                log.display()
            )}));
        }
        let mounts = host::mounts_of(device);
        let holder = match mounts.is_empty() {
            true => "held by another user (swap, LVM, another server)".to_owned(),
            false => format!("mounted on {}", mounts.join(", ")),
        };
        Some(json!({ "error": format!(
            "{name} ({device}): is {holder}; unmount it first, or --force to remove it all the same"
        )}))
    }

    fn info(&self) -> Value {
        let mut info = self.disk.shown();
        info["protection"] = protect::shown();
        info["sandbox"] = sandbox::shown();
        info["held"] = json!(host::is_held(&self.disk.device));
        let Phase::Up(front) = &self.phase else {
            info["state"] = json!("quiesced");
            return json!({ "result": info });
        };
        let crew = front.crew();
        let counts: serde_json::Map<String, Value> =
            crew.counts().list().into_iter().map(|(k, v)| (k.to_owned(), v.into())).collect();
        info["state"] = json!("live");
        if let Some(clients) = front.clients() {
            info["clients"] = json!(clients);
            info["held"] = json!(clients > 0);
        }
        info["threads"] = json!(crew.thread_count());
        info["counts"] = Value::Object(counts);
        info["layers"] = tell::layers(&crew.served.stack);
        info["events"] = json!(crew.served.events());
        json!({ "result": info })
    }

    /// Writes out what is in memory, then removes the disk in any case.
    fn close(self) -> Result<()> {
        let device = &self.disk.device;
        let is_up = matches!(self.phase, Phase::Up(_));
        if is_up && !host::sync(device, FORCED_SYNC_PATIENCE) {
            eprintln!("devsplice: {device}: data in memory could not be written to it");
        }
        self.remove()
    }

    /// Removes the disk and all traces of it.
    fn remove(self) -> Result<()> {
        notify::stopping();
        let Server { phase, claim, guard, .. } = self;
        let removed = match phase {
            Phase::Up(front) => front.detach().map(drop),
            Phase::Held(suspended) => suspended.remove(),
            Phase::Between => Ok(()),
        };
        match removed {
            Ok(()) => {
                claim.remove();
                guard.dismiss();
                Ok(())
            }
            // The guard tries again when this process has let go of everything.
            Err(error) => Err(error),
        }
    }
}

/// A server but for its guard.
struct Parts {
    front: Front,
    disk: Disk,
    plan: Plan,
    claim: Claim,
    lines: Lines,
    news: Receiver<News>,
}

impl Parts {
    /// Has the guard keep what keeps the disk.
    fn entrusted(mut self, guard: &mut Guard) -> Parts {
        entrust(&mut self.front, &mut self.disk, guard);
        // Written once more; if that fails, it is as if nobody kept the disk.
        let _ = self.claim.write(&self.disk);
        self
    }

    fn guarded(self, guard: Guard) -> Server {
        notify::ready(&self.disk.device, guard.pid());
        let Parts { front, disk, plan, claim, lines, news } = self;
        Server { phase: Phase::Up(front), disk, plan, claim, guard, lines, news }
    }
}

/// Has the guard keep what keeps the disk, and writes down that it does. Where it cannot the disk
/// goes with its server.
pub(crate) fn entrust(front: &mut Front, disk: &mut Disk, guard: &mut Guard) {
    let (fds, told) = front.kept();
    if fds.is_empty() {
        disk.keeper = None;
        return;
    }
    match guard.keep(&fds, told) {
        Ok(keeper) => disk.keeper = Some(keeper),
        Err(error) => {
            front.forget();
            disk.keeper = None;
            disk.recovery = front.recovery().to_owned();
            disk.warnings.push(format!("the disk goes with its server: {error}"));
        }
    }
}

/// The options, with a recovery that this stack can have.
fn lasting(add: &Add, plan: &Plan) -> Result<Add> {
    let mut add = add.clone();
    if add.recovery.forced() == Some(ublk::Recovery::Off) {
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
    let is_passing = |kind: Kind| match kind {
        Kind::Source(source) => !devsplice_backends::outlives_process(source.name),
        Kind::Layer(_) => false,
    };
    plan.places.iter().find(|place| is_passing(place.kind)).map(|place| place.label.as_str())
}

/// Opens a stack to serve it, and writes down what the disk is with it.
pub(crate) fn open(plan: &Plan, disk: &mut Disk) -> Result<Service> {
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
    Ok(Service { stack, bottoms, on_stuck: report_stuck, on_event: report, on_death: die })
}

fn report_stuck(stuck: &Stuck) {
    let Stuck { lane, tag, io, flying, seconds } = stuck;
    eprintln!(
        "devsplice: a request has been below for {seconds} s: {} of {} bytes at {} (queue {lane}, \
         tag {tag}, {flying} splices out)",
        io.op.name(),
        io.extent.len,
        io.extent.at
    );
}

/// What a layer reports, in the log.
fn report(text: &str) {
    eprintln!("devsplice: {text}");
}

/// An I/O thread cannot go on: the device is lost. The guard cleans up.
#[allow(clippy::needless_pass_by_value)]
pub(crate) fn die(error: Error) {
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

/// Lets go of the terminal: standard input and output become /dev/null, standard error goes to the
/// log of `name`, or nowhere.
///
/// # Errors
/// If /dev/null or the log cannot be opened.
pub fn silence(name: Option<&str>) -> Result<()> {
    let open = |path: &std::path::Path, flags| {
        rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Error::os(path.display().to_string(), &errno.into()))
    };
    let null = open(std::path::Path::new("/dev/null"), OFlags::RDWR)?;
    let log = match name {
        Some(name) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND;
            Some(open(&state::path(name, "log"), flags)?)
        }
        None => None,
    };
    let failed =
        |errno: rustix::io::Errno| Error::new(ErrorKind::Os, "standard streams", errno.to_string());
    rustix::stdio::dup2_stdin(&null).map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(failed)?;
    rustix::stdio::dup2_stderr(log.as_ref().unwrap_or(&null)).map_err(failed)
}
