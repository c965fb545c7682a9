//! Answers for how much of a device's data is in memory that its clients share with us: the driver
//! marks each such request, and its data moves as that of all others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devsplice_core::{Errno, Io, Result};
use devsplice_engine::{Completion, Export, Inbox};
use devsplice_uring::Uring;

use super::map::Descriptors;
use super::uapi::IO_F_SHMEM_ZC;

/// A queue of a device that has been told of such memory.
pub(super) struct Marked {
    inner: Box<dyn Export<Uring>>,
    descriptors: Descriptors,
    bytes: Arc<AtomicU64>,
}

impl Marked {
    /// Counts `bytes` of a queue.
    pub(super) fn new(
        inner: Box<dyn Export<Uring>>,
        descriptors: Descriptors,
        bytes: Arc<AtomicU64>,
    ) -> Marked {
        Marked { inner, descriptors, bytes }
    }
}

impl Export<Uring> for Marked {
    fn depth(&self) -> u16 {
        self.inner.depth()
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.inner.arm(ring, lane)
    }

    fn event(&mut self, ring: &mut Uring, event: Completion, inbox: &mut Inbox) -> Result<()> {
        self.inner.event(ring, event, inbox)
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        // The descriptor is the request's until it is committed.
        let is_marked = self.descriptors.read(tag).op_flags & IO_F_SHMEM_ZC != 0;
        if is_marked && io.op.has_pages() && result.is_ok() {
            self.bytes.fetch_add(io.extent.len, Ordering::Relaxed);
        }
        self.inner.finish(ring, tag, io, result);
    }

    fn flush(&mut self, ring: &mut Uring) {
        self.inner.flush(ring);
    }

    fn rest(&mut self, ring: &mut Uring) -> bool {
        self.inner.rest(ring)
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }
}
