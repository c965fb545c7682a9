//! Answers for a whole disk in one call: the front end that this machine has, its usual options.

use std::sync::Arc;

use devsplice_core::{Error, Result, Stack, StackBuilder};
use devsplice_engine::{Counts, Stuck};
use devsplice_uring::Bytes;

use crate::threads::{Bottom, Service};
use crate::{fuse, ublk};

/// Requests in flight.
const DEPTH: u16 = 64;
/// Seconds after which a request is reported as stuck.
const STUCK_SECONDS: u32 = 30;

/// A disk that this process serves. Dropping it does not remove it: [`Disk::detach`] does, and so
/// does the end of the process.
pub enum Disk {
    /// Over ublk.
    Ublk(Box<ublk::Device>),
    /// Over FUSE and a loop device, where there is no ublk.
    Fuse(Box<fuse::Device>),
}

impl Disk {
    /// A disk of bytes that `bytes` reads and writes. `name` is what the device is called where
    /// the front end has names.
    ///
    /// # Errors
    /// Without rights or any front end; or if the backend's limits break the rules.
    pub fn of_bytes(name: &str, bytes: impl Bytes + 'static) -> Result<Disk> {
        let bytes: Arc<dyn Bytes> = Arc::new(bytes);
        let mut builder = StackBuilder::new();
        let (root, _) = builder.backend(name, bytes.limits())?;
        Disk::of_stack(name, Arc::new(builder.finish(root)), vec![Bottom::Bytes(bytes)])
    }

    /// A disk of a stack over its open bottoms, in their order.
    ///
    /// # Errors
    /// As [`Disk::of_bytes`].
    pub fn of_stack(name: &str, stack: Arc<Stack>, bottoms: Vec<Bottom>) -> Result<Disk> {
        let service = Service {
            stack,
            bottoms,
            pool: None,
            on_stuck: Arc::new(stuck),
            on_event: Arc::new(tell),
            on_death: death,
        };
        if ublk::available().is_ok() {
            let options = ublk::Options {
                id: None,
                queues: 1,
                threads: 1,
                depth: DEPTH,
                read_only: false,
                data_path: None,
                batch: None,
                part_scan: false,
                affinity: false,
                stuck_seconds: STUCK_SECONDS,
                recovery: Some(ublk::Recovery::Off),
            };
            let device = ublk::Device::attach(&options, service, &mut |_| {})?;
            return Ok(Disk::Ublk(Box::new(device)));
        }
        let options = fuse::Options {
            name: name.to_owned(),
            data_path: None,
            queues: 1,
            threads: 1,
            depth: DEPTH,
            read_only: false,
            part_scan: false,
            stuck_seconds: STUCK_SECONDS,
            keep: None,
            must_keep: false,
        };
        let device = fuse::Device::attach(&options, service, &mut |_| {})?;
        Ok(Disk::Fuse(Box::new(device)))
    }

    /// Its node.
    #[must_use]
    pub fn path(&self) -> &str {
        match self {
            Disk::Ublk(device) => device.path(),
            Disk::Fuse(device) => device.path(),
        }
    }

    /// Removes it; what was done is returned.
    ///
    /// # Errors
    /// If it does not go away; says what holds it.
    pub fn detach(self) -> Result<Counts> {
        match self {
            Disk::Ublk(device) => device.detach(),
            Disk::Fuse(device) => device.detach(true),
        }
    }
}

fn tell(text: &str) {
    eprintln!("{text}");
}

fn stuck(stuck: &Stuck) {
    eprintln!("stuck: {stuck:?}");
}

/// Without its threads the disk is lost, and whoever waits for it would wait for ever.
#[allow(clippy::needless_pass_by_value)] // The signature is that of the hook.
fn death(error: Error) {
    eprintln!("{error}");
    std::process::abort();
}
