//! Answers for the choice of a front end, and for treating them alike.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::Counts;
use devsplice_exports::threads::{Crew, OnMade, Service};
use devsplice_exports::ublk::Fit;
use devsplice_exports::{fuse, nbd, ublk};

use crate::args::{Add, Export, PathChoice};
use crate::passed;
use crate::state::{Claim, Disk};

/// A disk of either kind.
pub enum Front {
    /// /dev/ublkbN.
    Ublk(Box<ublk::Device>),
    /// /dev/loopN over a file of ours.
    Fuse(Box<fuse::Device>),
    /// Clients come by NBD.
    Nbd(Box<nbd::Device>),
}

/// A disk of either kind that nobody serves.
pub enum Suspended {
    /// /dev/ublkbN.
    Ublk(Box<ublk::Suspended>),
    /// /dev/loopN over a file of ours.
    Fuse(Box<fuse::Suspended>),
    /// Clients wait to be let in.
    Nbd(Box<nbd::Suspended>),
}

impl Suspended {
    /// A disk whose server is gone, by what that one wrote of it. `kept` keeps it over FUSE.
    ///
    /// # Errors
    /// If there is no such disk any more, or not enough is known of it.
    pub fn find(left: &Disk, claim: &Claim, kept: Option<fuse::Kept>) -> Result<Suspended> {
        let add = left.made_with.as_ref();
        let add = add.ok_or_else(|| Error::invalid(&left.name, "its options are lost"))?;
        if let Some(id) = left.ublk_id {
            // Queues and their depth are as they were; the kernel knows them.
            let options = options(add, add.queues.unwrap_or(0), add.threads.unwrap_or(0));
            let suspended = ublk::Suspended::find_with(id, &options, extra(add))?;
            return Ok(Suspended::Ublk(Box::new(suspended)));
        }
        let gone = || Error::new(ErrorKind::NotFound, &left.name, "nobody keeps it any more");
        let kept = kept.ok_or_else(gone)?;
        let queues = u16::try_from(kept.fuse.len()).unwrap_or(1);
        let options = fuse_options(add, (&left.name, queues), claim.lock()?)?;
        Ok(Suspended::Fuse(Box::new(fuse::Suspended::find(kept, options))))
    }

    /// The descriptors that keep it, and what its users were told of it, over FUSE.
    pub fn kept(&self) -> Option<(&[OwnedFd], &str)> {
        let Suspended::Fuse(suspended) = self else { return None };
        let kept = suspended.kept();
        Some((&kept.fuse, &kept.told))
    }

    /// Serves it again.
    ///
    /// # Errors
    /// As the front end says. It is still suspended then.
    pub fn resume(self, service: Service, fit: Fit) -> Result<Front, (Suspended, Error)> {
        match self {
            Suspended::Ublk(suspended) => match suspended.resume(service, fit) {
                Ok(device) => Ok(Front::Ublk(Box::new(device))),
                Err((suspended, error)) => Err((Suspended::Ublk(suspended), error)),
            },
            // Another size is another file for the loop device: it is refused as any difference.
            Suspended::Fuse(suspended) => match suspended.resume(service) {
                Ok(device) => Ok(Front::Fuse(Box::new(device))),
                Err((suspended, error)) => Err((Suspended::Fuse(suspended), error)),
            },
            Suspended::Nbd(suspended) => match suspended.resume(service) {
                Ok(device) => Ok(Front::Nbd(Box::new(device))),
                Err((suspended, error)) => Err((Suspended::Nbd(suspended), error)),
            },
        }
    }

    /// Removes it; what the kernel holds fails.
    ///
    /// # Errors
    /// As the front end says.
    pub fn remove(self) -> Result<()> {
        match self {
            Suspended::Ublk(suspended) => suspended.remove(),
            Suspended::Fuse(suspended) => suspended.remove(),
            Suspended::Nbd(_) => Ok(()),
        }
    }
}

/// Most queues that are made unasked.
const QUEUES: usize = 4;

/// Checks what is asked of a disk that is reached by NBD.
///
/// # Errors
/// For an option that such a disk has not, or an address that is none.
pub fn nbd(add: &Add) -> Result<(Export, String)> {
    let misplaced = [
        ("--export", !matches!(add.export, Export::Nbd | Export::Auto)),
        ("--data-path", add.data_path.forced().is_some()),
        ("--recovery", add.recovery.forced().is_some_and(|one| one != ublk::Recovery::Off)),
        ("--batch", add.batch.forced() == Some(true)),
        ("--id", add.id.is_some()),
        ("--queues", add.queues.is_some()),
        (add.ublk.first().unwrap_or_default(), add.ublk.first().is_some()),
    ];
    if let Some((option, _)) = misplaced.iter().find(|(_, is_there)| *is_there) {
        return Err(Error::invalid(*option, "a disk that is reached by NBD has no such thing")
            .next("leave it out, or leave out --listen and --export nbd"));
    }
    nbd_options(add, "").map(|_| (Export::Nbd, "asked for".to_owned()))
}

/// What to serve by NBD, and where.
fn nbd_options(add: &Add, name: &str) -> Result<nbd::Options> {
    let here = std::env::current_dir().map_err(|error| Error::os("current directory", &error))?;
    let address = |text: &&String| nbd::Uri::parse(text).map(|uri| uri.anchored(&here));
    let is_passed = |text: &&String| text.starts_with(passed::SCHEME);
    let (passed, listen): (Vec<_>, Vec<_>) = add.listen.iter().partition(is_passed);
    let mut sockets = Vec::new();
    for text in passed {
        sockets.extend(passed::sockets(text, name)?);
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = add.threads.unwrap_or_else(|| u16::try_from(cpus.min(QUEUES)).unwrap_or(1));
    Ok(nbd::Options {
        name: name.to_owned(),
        listen: listen.iter().map(address).collect::<Result<_>>()?,
        passed: sockets,
        allow: add.allow.iter().map(|text| nbd::Rule::parse(text)).collect::<Result<_>>()?,
        writable: add.writable,
        read_only: add.read_only,
        connections: add.connections,
        threads,
        depth: add.depth,
        stuck_seconds: add.stuck_after,
        secure: add.tls.secure(&here)?,
    })
}

/// Which front end a disk with these options is to have, and why.
///
/// # Errors
/// As [`choose`]; and if it is asked for what only another has.
pub fn choose_for(add: &Add) -> Result<(Export, String)> {
    // An address to listen at says what kind of disk is wanted.
    if add.export == Export::Nbd || !add.listen.is_empty() {
        return nbd(add);
    }
    if let Some(option) = add.tls.first() {
        return Err(Error::invalid(option, "is for disks that are reached by NBD")
            .next("say where clients connect: --listen nbd://HOST:PORT"));
    }
    let Some(option) = add.ublk.first() else { return choose(add.export, add.data_path) };
    if add.export == Export::Fuse || add.data_path.fuse().is_some() {
        return Err(Error::invalid(option, "is ublk's; FUSE has none")
            .next("leave it out, or --export ublk"));
    }
    choose(Export::Ublk, add.data_path)
        .map(|(export, _)| (export, format!("asked for by {option}")))
}

/// The front end that the options say, if they say one.
pub fn asked(add: &Add) -> Option<Export> {
    match add.export {
        _ if !add.listen.is_empty() => Some(Export::Nbd),
        Export::Auto if add.data_path.fuse().is_some() => Some(Export::Fuse),
        Export::Auto if add.data_path.forced().is_some() => Some(Export::Ublk),
        Export::Auto => add.ublk.first().map(|_| Export::Ublk),
        asked => Some(asked),
    }
}

/// Which front end, and why.
///
/// # Errors
/// If the one asked for is not to be had; or neither, then why ublk is not and why FUSE is not.
pub fn choose(asked: Export, path: PathChoice) -> Result<(Export, String)> {
    let (ublk_only, fuse_only) = (path.forced().is_some(), path.fuse().is_some());
    if asked == Export::Fuse && ublk_only {
        return Err(Error::invalid("--data-path", "names one of ublk's paths, not of FUSE's")
            .next("leave it out, or --export ublk"));
    }
    if asked == Export::Ublk && fuse_only {
        return Err(Error::invalid("--data-path", "names one of FUSE's paths, not of ublk's")
            .next("leave it out, or --export fuse"));
    }
    match asked {
        Export::Auto if ublk_only => {
            ublk_or_module().map(|()| (Export::Ublk, "asked for by --data-path".to_owned()))
        }
        Export::Auto if fuse_only => {
            fuse::available().map(|()| (Export::Fuse, "asked for by --data-path".to_owned()))
        }
        Export::Ublk => ublk_or_module().map(|()| (Export::Ublk, "asked for".to_owned())),
        Export::Fuse => fuse::available().map(|()| (Export::Fuse, "asked for".to_owned())),
        Export::Nbd => Ok((Export::Nbd, "asked for".to_owned())),
        Export::Auto => {
            let error = match ublk_or_module() {
                Ok(()) => return Ok((Export::Ublk, "the kernel has ublk".to_owned())),
                Err(error) => error,
            };
            if error.kind() == ErrorKind::Permission {
                return Err(error);
            }
            match fuse::available() {
                Ok(()) => Ok((Export::Fuse, format!("no ublk here: {}", error.cause()))),
                Err(other) => Err(Error::new(ErrorKind::Unsupported, "no way to make a disk", {
                    format!("ublk: {error}; FUSE + loop: {other}")
                })
                .next("devsplice doctor says more")),
            }
        }
    }
}

/// Checks for the ublk driver; loads its module where that is possible.
fn ublk_or_module() -> Result<()> {
    if !Path::new(ublk::CONTROL).exists() {
        if rustix::process::geteuid().is_root() {
            let _ = std::process::Command::new("modprobe")
                .args(["-q", "ublk_drv"])
                .stdin(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .status();
        } else {
            return Err(Error::new(ErrorKind::Permission, "devsplice add", "needs root")
                .next("run it with sudo; explain, features and doctor work without"));
        }
    }
    ublk::available()
}

impl Front {
    /// Makes the disk. `on_made` is told what of it will have to be cleared up, before it can be
    /// used.
    ///
    /// # Errors
    /// As the front end says.
    pub fn attach(
        add: &Add,
        (name, lock): (&str, Arc<OwnedFd>),
        export: Export,
        service: Service,
        on_made: OnMade<'_>,
    ) -> Result<Front> {
        if export == Export::Nbd {
            let device = nbd::Device::attach(&nbd_options(add, name)?, service)?;
            return Ok(Front::Nbd(Box::new(device)));
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        // FUSE has one list of requests per connection: more readers only wake each other in vain.
        // Where many devices share threads, more queues of one are served by the same ones.
        let is_one = export == Export::Fuse || service.pool.is_some();
        let most = if is_one { 1 } else { QUEUES };
        let queues = add.queues.unwrap_or_else(|| u16::try_from(cpus.min(most)).unwrap_or(1));
        let threads = add.threads.unwrap_or(queues);
        if export == Export::Fuse {
            if add.batch.forced() == Some(true) {
                return Err(Error::invalid("--batch", "is ublk's; FUSE has none")
                    .next("leave it out, or --export ublk"));
            }
            let options = fuse_options(add, (name, queues), lock)?;
            let device = fuse::Device::attach(&options, service, on_made)?;
            return Ok(Front::Fuse(Box::new(device)));
        }
        let options = options(add, queues, threads);
        let device = ublk::Device::attach_with(&options, extra(add), service, on_made)?;
        if let Some(file) = &add.ublk.shared_memory
            && let Err(error) = share(&device, file)
        {
            let _ = device.detach();
            return Err(error);
        }
        Ok(Front::Ublk(Box::new(device)))
    }

    /// The disk's node.
    pub fn path(&self) -> &str {
        match self {
            Front::Ublk(device) => device.path(),
            Front::Fuse(device) => device.path(),
            Front::Nbd(device) => device.uri(),
        }
    }

    /// The threads that serve it.
    pub fn crew(&self) -> &Crew {
        match self {
            Front::Ublk(device) => device.crew(),
            Front::Fuse(device) => device.crew(),
            Front::Nbd(device) => device.crew(),
        }
    }

    /// What becomes of the disk when its server dies, in a word.
    pub fn recovery(&self) -> &'static str {
        match self {
            Front::Ublk(device) => device.recovery().name(),
            Front::Fuse(device) if device.kept().is_empty() => ublk::Recovery::Off.name(),
            Front::Nbd(_) => ublk::Recovery::Off.name(),
            Front::Fuse(_) => ublk::Recovery::Reissue.name(),
        }
    }

    /// Whether [`Front::suspend`] can be.
    ///
    /// # Errors
    /// Why not.
    pub fn can_be_suspended(&self) -> Result<()> {
        match self {
            Front::Ublk(device) => device.can_be_suspended(),
            Front::Fuse(device) if !device.kept().is_empty() => Ok(()),
            Front::Nbd(_) => Ok(()),
            Front::Fuse(_) => {
                let reason = "goes with its server, so it cannot be suspended";
                Err(Error::new(ErrorKind::Unsupported, self.path(), reason))
            }
        }
    }

    /// Finishes what is in flight, has the kernel hold what comes, lets go of all that is below.
    /// `late` is told where that takes its time.
    ///
    /// # Errors
    /// If this disk cannot be suspended (it is as before then), or, over NBD, what is in flight
    /// does not come back: it is on its way then ([`Front::is_ending`]).
    pub fn suspend(self, late: &mut dyn FnMut(&str)) -> Result<Suspended, (Front, Error)> {
        match self {
            Front::Ublk(device) => match device.suspend(late) {
                Ok(suspended) => Ok(Suspended::Ublk(Box::new(suspended))),
                Err((back, error)) => Err((Front::Ublk(back), error)),
            },
            Front::Fuse(device) => match device.suspend(late) {
                Ok(suspended) => Ok(Suspended::Fuse(Box::new(suspended))),
                Err((back, error)) => Err((Front::Fuse(back), error)),
            },
            Front::Nbd(device) => match device.suspend() {
                Ok(suspended) => Ok(Suspended::Nbd(Box::new(suspended))),
                // Its clients wait for an answer, not the kernel.
                Err((back, error)) => Err((Front::Nbd(back), error)),
            },
        }
    }

    /// Whether it serves nobody, and has not let go of what is below: suspending it can be tried
    /// again.
    pub fn is_ending(&self) -> bool {
        match self {
            Front::Ublk(_) | Front::Fuse(_) => false,
            Front::Nbd(device) => device.is_ending(),
        }
    }

    /// The descriptors that keep the disk while its server is replaced, and what its users were
    /// told of it; none where the kernel keeps it, or nobody does.
    pub fn kept(&self) -> (&[OwnedFd], &str) {
        match self {
            Front::Ublk(_) | Front::Nbd(_) => (&[], ""),
            Front::Fuse(device) => (device.kept(), device.told()),
        }
    }

    /// The disk goes with its server after all.
    pub fn forget(&mut self) {
        if let Front::Fuse(device) = self {
            device.forget();
        }
    }

    /// How data moves, in a word.
    pub fn data_path(&self) -> &'static str {
        match self {
            Front::Ublk(device) => device.data_word(),
            Front::Fuse(device) => device.data_path().name(),
            Front::Nbd(_) => "nbd-copy",
        }
    }

    /// Bytes that came from and went to memory shared with clients, of a disk that has such.
    pub fn shared_bytes(&self) -> Option<u64> {
        match self {
            Front::Ublk(device) => device.shared_bytes(),
            Front::Fuse(_) | Front::Nbd(_) => None,
        }
    }

    /// What of the front end's features it has, in words.
    pub fn features(&self) -> Vec<&'static str> {
        match self {
            Front::Ublk(device) => device.features(),
            Front::Nbd(device) => device.features(),
            Front::Fuse(_) => Vec::new(),
        }
    }

    /// Whether requests come and go in batches.
    pub fn is_batched(&self) -> bool {
        match self {
            Front::Ublk(device) => device.is_batched(),
            Front::Fuse(_) | Front::Nbd(_) => false,
        }
    }

    /// Whether it is served for requests that come one at a time.
    pub fn is_low_depth(&self) -> bool {
        match self {
            Front::Ublk(device) => device.is_low_depth(),
            Front::Fuse(_) | Front::Nbd(_) => false,
        }
    }

    /// Clients that are connected, of a disk that has such.
    pub fn clients(&self) -> Option<usize> {
        match self {
            Front::Ublk(_) | Front::Fuse(_) => None,
            Front::Nbd(device) => Some(device.clients()),
        }
    }

    /// Clients that are reached over TLS by a thread of this process.
    pub fn tls_relays(&self) -> usize {
        match self {
            Front::Ublk(_) | Front::Fuse(_) => 0,
            Front::Nbd(device) => device.relays(),
        }
    }

    /// Clients that are reached over TLS by the kernel.
    pub fn tls_kernel(&self) -> usize {
        match self {
            Front::Ublk(_) | Front::Fuse(_) => 0,
            Front::Nbd(device) => device.sealed(),
        }
    }

    /// Sees to it that nobody comes to use the disk before it is removed, where the front end can.
    ///
    /// # Errors
    /// If somebody has it open; it is as before then.
    pub fn stop_if_unused(&mut self) -> Result<()> {
        match self {
            Front::Ublk(device) => device.stop_if_unused(),
            Front::Fuse(_) | Front::Nbd(_) => Ok(()),
        }
    }

    /// Removes the disk.
    ///
    /// # Errors
    /// If it does not go away; says what holds it.
    pub fn detach(self) -> Result<Counts> {
        match self {
            Front::Ublk(device) => device.detach(),
            Front::Fuse(device) => device.detach(true),
            Front::Nbd(device) => device.detach(),
        }
    }
}

/// What a disk over FUSE is to be. `lock` is what whoever serves it has.
///
/// # Errors
/// If it is to be recovered in a way that FUSE has not.
pub fn fuse_options(
    add: &Add,
    (name, queues): (&str, u16),
    lock: Arc<OwnedFd>,
) -> Result<fuse::Options> {
    let recovery = add.recovery.forced();
    if matches!(recovery, Some(ublk::Recovery::Fail | ublk::Recovery::FailFast)) {
        let reason = "over FUSE, what was in flight can be done again, not be made to fail";
        return Err(Error::new(ErrorKind::Unsupported, "--recovery", reason)
            .next("--recovery reissue or off, or --export ublk"));
    }
    Ok(fuse::Options {
        name: name.to_owned(),
        data_path: add.data_path.fuse(),
        queues,
        threads: add.threads.unwrap_or(0),
        depth: add.depth,
        read_only: add.read_only,
        part_scan: !add.no_part_scan,
        stuck_seconds: add.stuck_after,
        keep: (recovery != Some(ublk::Recovery::Off)).then_some(lock),
        must_keep: recovery == Some(ublk::Recovery::Reissue),
    })
}

/// What else is asked of the driver.
pub fn extra(add: &Add) -> ublk::Extra {
    ublk::Extra {
        low_depth: add.low_depth.forced(),
        need_get_data: add.data_path == PathChoice::GetData,
        unprivileged: add.ublk.unprivileged,
        shared_memory: add.ublk.shared_memory.is_some(),
        ..ublk::Extra::default()
    }
}

/// Tells the driver of memory that clients share. What it has pinned stays known to it for as long
/// as the device is there; the data itself moves as that of all others.
fn share(device: &ublk::Device, file: &str) -> Result<()> {
    let mut control = ublk::Control::open()?;
    match control.share(device.id(), file, false) {
        // Only writes come from there then.
        Err(error) if error.kind() == ErrorKind::Permission => {
            control.share(device.id(), file, true).map(drop)
        }
        done => done.map(drop),
    }
}

/// What a ublk device is to be; of one that is there already, only what is about threads counts.
pub fn options(add: &Add, queues: u16, threads: u16) -> ublk::Options {
    ublk::Options {
        id: add.id,
        queues,
        threads,
        depth: add.depth,
        read_only: add.read_only,
        data_path: add.data_path.forced(),
        batch: add.batch.forced(),
        part_scan: !add.no_part_scan,
        affinity: !add.no_affinity,
        stuck_seconds: add.stuck_after,
        recovery: add.recovery.forced(),
    }
}
