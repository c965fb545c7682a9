//! Answers for a ublk disk without a server: what becomes of it, and how the next one takes over.
//!
//! The kernel keeps such a disk, and holds its requests, if it was told so when it was made. A
//! server is gone for it when the last reference to the character device is: each ring has the
//! device among its registered files, and gives those back only when everything that it had in
//! flight has come back (io_uring/io_uring.c, `io_ring_exit_work`). So no write of a dead server
//! can land after one of its successor.

use std::fmt;
use std::time::{Duration, Instant};

use devsplice_core::size::show_size;
use devsplice_core::{Error, ErrorKind, Result, Stack};

use super::uapi::{
    ATTR_READ_ONLY, F_QUIESCE, F_SHMEM_ZC, F_UPDATE_SIZE, F_USER_RECOVERY, F_USER_RECOVERY_FAIL_IO,
    F_USER_RECOVERY_REISSUE, PARAM_DEVT, Params,
};
use super::{Control, DataPath, Device, Extra, Made, Options, adopt, node};
use crate::threads::{Patience, Service};

/// What becomes of a disk whose server dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// It goes; whoever uses it gets errors.
    Off,
    /// It stays. What was in flight is done again by the next server; new requests wait for that.
    Reissue,
    /// It stays. What was in flight fails; new requests wait for the next server.
    Fail,
    /// It stays. All requests fail until the next server is there.
    FailFast,
}

impl Recovery {
    const ALL: [Recovery; 4] =
        [Recovery::Reissue, Recovery::Fail, Recovery::FailFast, Recovery::Off];

    /// The word that users see and type.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Recovery::Off => "off",
            Recovery::Reissue => "reissue",
            Recovery::Fail => "fail",
            Recovery::FailFast => "fail-fast",
        }
    }

    pub(super) const fn flags(self) -> u64 {
        match self {
            Recovery::Off => 0,
            Recovery::Reissue => F_USER_RECOVERY | F_USER_RECOVERY_REISSUE,
            Recovery::Fail => F_USER_RECOVERY,
            Recovery::FailFast => F_USER_RECOVERY | F_USER_RECOVERY_FAIL_IO,
        }
    }

    /// Flags that make more of it where the kernel has them.
    pub(super) const fn extras(self) -> u64 {
        if matches!(self, Recovery::Off) { 0 } else { F_QUIESCE }
    }

    /// What a device with these flags was made for.
    #[must_use]
    pub fn of(flags: u64) -> Recovery {
        let all = Recovery::Reissue.flags() | Recovery::FailFast.flags();
        let is_it = |one: &Recovery| one.flags() == flags & all;
        Recovery::ALL.into_iter().find(is_it).unwrap_or(Recovery::Off)
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The one asked for, or the best that a kernel with these features has.
pub(super) fn choose(asked: Option<Recovery>, features: u64) -> Result<Recovery> {
    let has = |one: &Recovery| one.flags() & !features == 0;
    match asked {
        None => Ok(Some(Recovery::Reissue).filter(has).unwrap_or(Recovery::Off)),
        Some(one) if has(&one) => Ok(one),
        Some(one) => {
            let reason = format!("this kernel's ublk cannot keep a disk without a server ({one})");
            Err(Error::new(ErrorKind::Unsupported, "--recovery", reason).next("--recovery off"))
        }
    }
}

/// How long a dead server's rings may take to let go.
const RELEASE: Duration = Duration::from_secs(60);
/// How long a disk may take until what it has in flight is done before somebody is told. It takes
/// as long as what is below does, and other disks of its server must not end with it.
const DRAIN: Duration = Duration::from_secs(60);
/// How often it is looked whether that is so.
const STEP: Duration = Duration::from_millis(1);

/// A disk that nobody serves; the kernel holds its requests.
pub struct Suspended {
    made: Made,
}

/// What may be different in the stack that a disk goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Nothing that users of the disk see.
    Same,
    /// Its size.
    Resized,
    /// What another tool has told of it, as far as its users can rely on it.
    Adopted,
}

impl Device {
    /// Whether [`Device::suspend`] can be.
    ///
    /// # Errors
    /// If the disk was made without recovery, or before Linux 6.16.
    pub fn can_be_suspended(&self) -> Result<()> {
        if self.made.info.flags & F_QUIESCE != 0 {
            return Ok(());
        }
        let reason = "it was made without --recovery, or this kernel cannot hold its requests";
        Err(Error::new(ErrorKind::Unsupported, self.path.clone(), reason)
            .next("Linux 6.16 or later, and a --recovery other than off"))
    }

    /// Finishes what is in flight and has the kernel hold what comes. The threads have ended, and
    /// the stack and its bottoms are let go of, on return, however long what is below takes: every
    /// minute `late` is told.
    ///
    /// # Errors
    /// If the disk was made without recovery, or before Linux 6.16. It is as before then.
    pub fn suspend(self, late: &mut dyn FnMut(&str)) -> Result<Suspended, (Box<Device>, Error)> {
        if let Err(error) = self.can_be_suspended() {
            return Err((Box::new(self), error));
        }
        let Device { mut made, crew, .. } = self;
        let mut patience = Patience::new(DRAIN);
        // What was committed since the last call waits for its next request; each call ends those.
        let mut last = made.control.quiesce(made.info.dev_id, DRAIN);
        while !crew.is_over() {
            if let Some(text) = patience.ended() {
                let why = last.err().map_or_else(String::new, |error| format!(" ({error})"));
                late(&format!("{text}{why}"));
            }
            std::thread::sleep(STEP);
            last = made.control.quiesce(made.info.dev_id, DRAIN);
        }
        crew.join();
        Ok(Suspended { made })
    }

    /// Tells the disk's users of the size that its stack has by now.
    fn update_size(&mut self) -> Result<()> {
        let sectors = self.crew.served.stack.limits().size / 512;
        self.made.control.update_size(self.made.info.dev_id, sectors)
    }
}

/// Whether a device with these flags leaves data out: the driver does not copy that of clients
/// whose memory is shared, and whoever copies would take what is in ours for theirs.
fn loses_data(flags: u64) -> bool {
    flags & F_SHMEM_ZC != 0 && DataPath::of(flags) == DataPath::Copy
}

impl Suspended {
    /// A disk whose server is gone. Of `options`, what is about threads counts (0 of them: one for
    /// each queue); all else is as it was made.
    ///
    /// # Errors
    /// If there is no such device, it is not to be recovered, or a server has it.
    pub fn find(id: u32, options: &Options) -> Result<Suspended> {
        Suspended::find_with(id, options, Extra::default())
    }

    /// The same of one that was made with more than that.
    ///
    /// # Errors
    /// As [`Suspended::find`].
    pub fn find_with(id: u32, options: &Options, extra: Extra) -> Result<Suspended> {
        let mut control = Control::open()?;
        let info = control.info(id)?;
        let thing = node(id);
        let recovery = Recovery::of(info.flags);
        if recovery == Recovery::Off {
            let reason = "was made to go with its server, not to be recovered";
            return Err(Error::new(ErrorKind::Unsupported, thing, reason));
        }
        let data_path = DataPath::of(info.flags);
        if loses_data(info.flags) {
            let reason = "shares memory with its clients, whose data the driver does not copy then";
            return Err(Error::new(ErrorKind::Unsupported, thing, reason));
        }
        let threads = match options.threads {
            0 => info.nr_hw_queues,
            threads => threads,
        };
        let (recovery, queues) = (Some(recovery), options.queues.max(info.nr_hw_queues));
        let options = Options { id: Some(id), queues, threads, recovery, ..options.clone() };
        Ok(Suspended { made: Made { control, info, data_path, options, extra } })
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.made.info.dev_id
    }

    /// Serves it again. `fit` is what of the disk may be another than it was.
    ///
    /// # Errors
    /// If the stack does not fit the disk (nothing was done then), or the last server does not let
    /// go, or threads cannot be started. It is still suspended then.
    pub fn resume(mut self, service: Service, fit: Fit) -> Result<Device, (Box<Suspended>, Error)> {
        match self.serve(service, fit) {
            Ok(crew) => {
                let path = node(self.id());
                let mut device = Device { made: self.made, path, crew };
                if fit == Fit::Resized
                    && let Err(error) = device.update_size()
                {
                    device.crew.warnings.push(format!("its users know the old size: {error}"));
                }
                device.keep_pages_stable(true);
                Ok(device)
            }
            Err(error) => Err((Box::new(self), error)),
        }
    }

    /// Removes it; what the kernel holds fails.
    ///
    /// # Errors
    /// If the driver hangs, or something else keeps the device.
    pub fn remove(mut self) -> Result<()> {
        let id = self.id();
        self.made.control.stop(id)?;
        match self.made.control.delete(id) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn serve(&mut self, service: Service, fit: Fit) -> Result<crate::threads::Crew> {
        let id = self.id();
        self.check(&service.stack, fit)?;
        let end = Instant::now() + RELEASE;
        loop {
            match self.made.control.start_recovery(id) {
                Err(error) if error.kind() != ErrorKind::Busy => return Err(error),
                Err(error) if Instant::now() > end => {
                    let (pid, state) = self.made.control.server(id)?;
                    let reason = format!("is {state}; process {pid} has not let go of it");
                    return Err(
                        Error::new(ErrorKind::Busy, node(id), reason).next(error.to_string())
                    );
                }
                Err(_) => std::thread::sleep(STEP),
                Ok(()) => break,
            }
        }
        if let Some(zones) = service.stack.zones() {
            zones.taken_over();
        }
        let crew = self.made.crew(service)?;
        self.made.control.end_recovery(id)?;
        Ok(crew)
    }

    /// Whether a stack is what the disk's users know.
    fn check(&mut self, stack: &Stack, fit: Fit) -> Result<()> {
        let id = self.id();
        let bottoms_differ = |what: &str, was: String, is: String| {
            let reason = format!("the disk has {what} {was}, the stack {is}");
            Error::invalid(node(id), reason).next("give the stack that it was made of")
        };
        let was = self.made.control.params(id)?;
        if fit == Fit::Adopted {
            self.made.options.read_only = was.attrs & ATTR_READ_ONLY != 0;
        }
        let is = self.made.params(stack);
        if fit == Fit::Adopted {
            return match adopt::misfit(&was, &is) {
                None => Ok(()),
                Some(reason) => Err(Error::invalid(node(id), reason)
                    .next("give the stack that it was made of; nothing was done")),
            };
        }
        let (size, new) = (was.dev_sectors.saturating_mul(512), is.dev_sectors * 512);
        let has_size = self.made.info.flags & F_UPDATE_SIZE != 0;
        if size != new && !(fit == Fit::Resized && has_size) {
            return Err(bottoms_differ("a size of", show_size(size), show_size(new)));
        }
        if was.logical_bs_shift != is.logical_bs_shift {
            let block = |params: &Params| show_size(1 << params.logical_bs_shift.min(28));
            return Err(bottoms_differ("blocks of", block(&was), block(&is)));
        }
        let common = |params: &Params| Params {
            len: 0,
            types: params.types & !PARAM_DEVT,
            dev_sectors: 0,
            devt: [0; 4],
            ..*params
        };
        if common(&was) != common(&is) {
            let reason = "what the stack offers (discard, cache, alignment, access) is not what \
                          the disk's users were told";
            return Err(Error::invalid(node(id), reason).next("give the stack that it was made of"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::uapi::F_USER_COPY;
    use super::*;

    #[test]
    fn a_device_that_copies_and_shares_memory_is_not_taken_over() {
        assert!(loses_data(F_SHMEM_ZC));
        assert!(loses_data(F_SHMEM_ZC | F_USER_RECOVERY));
        assert!(!loses_data(F_SHMEM_ZC | F_USER_COPY) && !loses_data(F_USER_RECOVERY));
    }

    #[test]
    fn a_policy_is_known_by_its_flags_and_the_best_is_chosen_that_a_kernel_has() {
        for one in Recovery::ALL {
            assert_eq!(Recovery::of(one.flags() | 1 | F_QUIESCE), one);
        }
        let all = Recovery::Reissue.flags() | Recovery::FailFast.flags();
        assert_eq!(choose(None, all).unwrap(), Recovery::Reissue);
        assert_eq!(choose(None, F_USER_RECOVERY).unwrap(), Recovery::Off);
        assert_eq!(choose(None, 0).unwrap(), Recovery::Off);
        assert_eq!(choose(Some(Recovery::Fail), F_USER_RECOVERY).unwrap(), Recovery::Fail);
        assert!(choose(Some(Recovery::FailFast), F_USER_RECOVERY).is_err());
    }
}
