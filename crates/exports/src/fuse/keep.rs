//! Answers for a disk over FUSE without a server: what keeps it, and how the next one takes over.
//!
//! The kernel ends a connection with the last descriptor of it, and what was read from one with
//! that one. So somebody else has all of them, too: a guard. Requests that come wait in the kernel;
//! those that had been read and not answered are asked for again (`FUSE_NOTIFY_RESEND`, Linux 6.9).
//!
//! A dead server's rings may have writes in flight, which must not land after one of its successor.
//! The kernel says nothing of that here, so a lock does: whoever serves has it, each ring has it
//! among its registered files, and gives those back only when everything that it had in flight has
//! come back (io_uring/io_uring.c, `io_ring_exit_work`). Who has got the lock may serve.
//!
//! What came by io_uring is not asked for again, and entries that are given a request while their
//! server dies fail it (fs/fuse/dev_uring.c, `fuse_uring_send_in_task`). Such a disk goes with its
//! server.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use rustix::event::{EventfdFlags, eventfd};
use zerocopy::IntoBytes;

use super::connection::os;
use super::node::Node;
use super::wire::{NOTIFY_RESEND, OUT_HEADER, OutHeader};
use super::{DataPath, Device, Options, PREFIX, make_queue, shape};
use crate::threads::{Crew, MakeQueue, Patience, Service, Work};

/// How long a disk may take until what it has in flight is done before somebody is told.
const DRAIN: Duration = Duration::from_secs(60);
/// How often it is looked whether that is so.
const STEP: Duration = Duration::from_micros(200);

/// The connection of a disk: whoever has it keeps the disk.
pub struct Kept {
    /// /dev/fuse, and clones of it.
    pub fuse: Vec<OwnedFd>,
    /// The connection's number.
    pub number: u32,
    /// What the disk's users were told of it ([`Device::told`]).
    pub told: String,
    /// The loop device.
    pub path: String,
}

/// What a device has that outlives its server.
pub(super) struct Keep {
    pub(super) kept: Kept,
    pub(super) options: Options,
    pub(super) stop: Arc<OwnedFd>,
}

/// What the queues of such a device have.
#[derive(Clone)]
pub(super) struct Lasting {
    pub(super) stop: Arc<OwnedFd>,
    pub(super) lock: Arc<OwnedFd>,
}

/// A disk that nobody serves; the kernel holds its requests.
pub struct Suspended {
    kept: Kept,
    options: Options,
}

/// Something to tell threads to stop with.
pub(super) fn new_stop() -> Result<Arc<OwnedFd>> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map(Arc::new)
        .map_err(|errno| os("an eventfd", errno))
}

fn tell(stop: &OwnedFd) {
    // It cannot be full: it is written to once.
    let _ = rustix::io::write(stop, &1_u64.to_ne_bytes());
}

impl Device {
    /// What the disk's users were told of it: a stack that is to go on must say the same.
    #[must_use]
    pub fn told(&self) -> &str {
        &self.told
    }

    /// The descriptors that keep the disk while its server is replaced; none if it goes with that.
    #[must_use]
    pub fn kept(&self) -> &[OwnedFd] {
        self.keep.as_ref().map_or(&[], |keep| &keep.kept.fuse)
    }

    /// The disk goes with its server from now on, whoever has its descriptors.
    pub fn forget(&mut self) {
        self.keep = None;
    }

    /// Finishes what is in flight and lets the kernel hold what comes. The threads have ended, and
    /// the stack and its bottoms are let go of, on return, however long what is below takes: every
    /// minute `late` is told.
    ///
    /// # Errors
    /// If the disk was made to go with its server. It is as before then.
    pub fn suspend(
        mut self,
        late: &mut dyn FnMut(&str),
    ) -> Result<Suspended, (Box<Device>, Error)> {
        let Some(Keep { kept, options, stop }) = self.keep.take() else {
            let reason = "it was made to go with its server";
            let error = Error::new(ErrorKind::Unsupported, self.path.clone(), reason)
                .next("Linux 6.9 or later, data path fuse-copy, and --recovery reissue");
            return Err((Box::new(self), error));
        };
        tell(&stop);
        let mut patience = Patience::new(DRAIN);
        while !self.crew.is_over() {
            if let Some(text) = patience.ended() {
                late(&text);
            }
            std::thread::sleep(STEP);
        }
        self.crew.join();
        Ok(Suspended { kept, options })
    }
}

impl Suspended {
    /// A disk whose server is gone, by what kept it. Who calls this has the lock.
    #[must_use]
    pub fn find(kept: Kept, options: Options) -> Suspended {
        Suspended { kept, options }
    }

    /// What keeps it.
    #[must_use]
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Serves it again: first what had no answer, then what came meanwhile.
    ///
    /// # Errors
    /// If the stack is not what the disk's users were told (nothing was done then), or threads
    /// cannot be started. It is still suspended then: no request was taken, and no thread is left.
    pub fn resume(mut self, service: Service) -> Result<Device, (Box<Suspended>, Error)> {
        match self.serve(service, |make| make) {
            Ok((crew, stop)) => Ok(Device {
                path: self.kept.path.clone(),
                name: format!("{PREFIX}{}", self.options.name),
                number: self.kept.number,
                data_path: DataPath::Copy,
                crew,
                told: self.kept.told.clone(),
                keep: Some(Keep { kept: self.kept, options: self.options, stop }),
            }),
            Err(error) => Err((Box::new(self), error)),
        }
    }

    /// `made` has what makes the queues; tests have it fail.
    fn serve(
        &mut self,
        service: Service,
        made: impl FnOnce(Box<MakeQueue>) -> Box<MakeQueue>,
    ) -> Result<(Crew, Arc<OwnedFd>)> {
        let Suspended { kept, options } = self;
        let thing = kept.path.as_str();
        let node = Node::new(&options.name, service.stack.limits(), options.read_only);
        if node.told() != kept.told {
            let reason = format!("the disk has {}, the stack {}", kept.told, node.told());
            return Err(Error::invalid(thing, reason).next("give the stack that it was made of"));
        }
        let lock = options.keep.clone();
        let lock = lock.ok_or_else(|| Error::invalid(thing, "nobody has its lock"))?;
        let count = u16::try_from(kept.fuse.len()).unwrap_or(u16::MAX);
        let shape = shape(options, (DataPath::Copy, count))?;
        let os_error = |error| Error::os(thing, &error);
        let queues = kept.fuse.iter().map(|fd| fd.try_clone().map_err(os_error));
        let queues = queues.collect::<Result<Vec<_>>>()?;
        resend(kept)?;
        let stop = new_stop()?;
        let lasting = Some(Lasting { stop: Arc::clone(&stop), lock });
        let make = make_queue(Arc::new(node), queues, shape.memory.depth, lasting);
        let work = Work { service, make: made(make), cpus: Box::new(|_| None) };
        Ok((Crew::start(shape, work)?, stop))
    }

    /// Removes it; what the kernel holds fails.
    ///
    /// # Errors
    /// If the connection cannot be cut, or the loop device not be given back.
    pub fn remove(self) -> Result<()> {
        super::clear_loop(&self.kept.path, &self.options.name).map(drop)
    }
}

/// Has the kernel put what was read and not answered before what waits.
fn resend(kept: &Kept) -> Result<()> {
    let len = u32::try_from(OUT_HEADER).unwrap_or(0);
    let message = OutHeader { len, error: NOTIFY_RESEND, unique: 0 };
    let first = kept.fuse.first().ok_or_else(|| Error::invalid(kept.path.as_str(), "not kept"))?;
    match rustix::io::write(first, message.as_bytes()) {
        Ok(_) => Ok(()),
        Err(errno) => Err(os(&kept.path, errno).within("asking for what had no answer")),
    }
}

#[cfg(test)]
mod tests;
