//! Answers for how much of a device's data is in memory that its clients share with us: the driver
//! marks each such request, and its data moves as that of all others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devsplice_core::{Errno, Io, Result};
use devsplice_engine::{Completion, Export, Inbox, Rest};
use devsplice_uring::Uring;

use super::map::Descriptors;
use super::uapi::IO_F_SHMEM_ZC;

/// A queue of a device that has been told of such memory.
pub(super) struct Marked {
    inner: Box<dyn Export<Uring>>,
    descriptors: Descriptors,
    bytes: Arc<AtomicU64>,
    /// Bytes of the request whose end was sent ahead, of which there is one at most.
    ahead: u64,
}

impl Marked {
    /// Counts `bytes` of a queue.
    pub(super) fn new(
        inner: Box<dyn Export<Uring>>,
        descriptors: Descriptors,
        bytes: Arc<AtomicU64>,
    ) -> Marked {
        Marked { inner, descriptors, bytes, ahead: 0 }
    }

    /// How much of this request's data is in such memory. Its descriptor is the request's until it
    /// is committed, so this is asked before.
    fn marked(&self, tag: u16, io: &Io) -> u64 {
        let is_marked = self.descriptors.read(tag).op_flags & IO_F_SHMEM_ZC != 0;
        if is_marked && io.op.has_pages() { io.extent.len } else { 0 }
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
        if result.is_ok() {
            self.bytes.fetch_add(self.marked(tag, io), Ordering::Relaxed);
        }
        self.inner.finish(ring, tag, io, result);
    }

    fn goes_ahead(&self) -> bool {
        self.inner.goes_ahead()
    }

    fn may_finish_ahead(&self, tag: u16) -> bool {
        self.inner.may_finish_ahead(tag)
    }

    fn finish_ahead(&mut self, ring: &mut Uring, tag: u16, io: &Io) {
        self.ahead = self.marked(tag, io);
        self.inner.finish_ahead(ring, tag, io);
    }

    fn went_ahead(&mut self, tag: u16) {
        self.bytes.fetch_add(std::mem::take(&mut self.ahead), Ordering::Relaxed);
        self.inner.went_ahead(tag);
    }

    fn take_back(&mut self, tag: u16) {
        self.ahead = 0;
        self.inner.take_back(tag);
    }

    fn flush(&mut self, ring: &mut Uring) {
        self.inner.flush(ring);
    }

    fn rest(&mut self, ring: &mut Uring) -> Rest {
        self.inner.rest(ring)
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Mutex;

    use devsplice_core::Op;
    use devsplice_uring::{Config, LaneMemory};
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::super::extra::Part;
    use super::*;

    /// What a queue was asked to do.
    struct Told(Arc<Mutex<Vec<&'static str>>>);

    impl Told {
        fn note(&self, word: &'static str) {
            self.0.lock().unwrap().push(word);
        }
    }

    impl Export<Uring> for Told {
        fn depth(&self) -> u16 {
            2
        }

        fn arm(&mut self, _: &mut Uring, _: u16) -> Result<()> {
            Ok(())
        }

        fn event(&mut self, _: &mut Uring, _: Completion, _: &mut Inbox) -> Result<()> {
            Ok(())
        }

        fn finish(&mut self, _: &mut Uring, _: u16, _: &Io, _: Result<(), Errno>) {
            self.note("finish");
        }

        fn goes_ahead(&self) -> bool {
            true
        }

        fn may_finish_ahead(&self, tag: u16) -> bool {
            tag == 1
        }

        fn finish_ahead(&mut self, _: &mut Uring, _: u16, _: &Io) {
            self.note("ahead");
        }

        fn went_ahead(&mut self, _: u16) {
            self.note("went");
        }

        fn take_back(&mut self, _: u16) {
            self.note("back");
        }

        fn flush(&mut self, _: &mut Uring) {}

        fn rest(&mut self, _: &mut Uring) -> Rest {
            Rest::Now
        }

        fn is_closed(&self) -> bool {
            false
        }
    }

    #[test]
    fn requests_whose_end_goes_ahead_are_counted_once_when_they_are_done() {
        let memory = LaneMemory { depth: 2, bytes: 4096, slots: false, locked: false };
        let config = Config { flights: 64, files: 1, lanes: vec![memory], inner: 0 };
        let mut ring = Uring::new(&config).unwrap();
        // The second of two descriptors is marked.
        let mut page = [0_u8; 4096];
        page[24..28].copy_from_slice(&IO_F_SHMEM_ZC.to_ne_bytes());
        let fd = memfd_create("descriptors", MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &page).unwrap();
        let descriptors = Descriptors::map(fd.as_fd(), 0, (2, 24), Part::WHOLE).unwrap();
        let (told, bytes) = (Arc::default(), Arc::default());
        let inner = Box::new(Told(Arc::clone(&told)));
        let mut queue = Marked::new(inner, descriptors, Arc::clone(&bytes));
        let (io, counted) = (Io::new(Op::Read, 0, 4096), || bytes.load(Ordering::Relaxed));
        assert!(queue.goes_ahead() && queue.may_finish_ahead(1) && !queue.may_finish_ahead(0));
        queue.finish_ahead(&mut ring, 1, &io);
        assert_eq!(counted(), 0, "it may yet fail");
        queue.went_ahead(1);
        assert_eq!(counted(), 4096);
        // One that was short is ours again and ends like any other.
        queue.finish_ahead(&mut ring, 1, &io);
        queue.take_back(1);
        queue.finish(&mut ring, 1, &io, Ok(()));
        assert_eq!(counted(), 8192);
        queue.finish(&mut ring, 1, &io, Err(Errno::EIO));
        // The kernel has marked no such one.
        queue.finish_ahead(&mut ring, 0, &io);
        queue.went_ahead(0);
        queue.finish(&mut ring, 0, &io, Ok(()));
        assert_eq!(counted(), 8192);
        let told = told.lock().unwrap().join(" ");
        assert_eq!(told, "ahead went ahead back finish finish ahead went finish");
    }
}
