//! Answers for what a ublk device has only when it is asked for: parameters and ways of the driver
//! that are no use to a disk, but that those who test the driver want to see taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use devsplice_core::{Errno, Error, ErrorKind, Io, Result};
use devsplice_engine::{Completion, Export, Inbox, Rest, Ring};
use devsplice_uring::Uring;
use rustix::process::Signal;

use super::DataPath;
use super::integrity::Integrity;
use super::uapi::{
    DevInfo, F_AUTO_BUF_REG, F_BATCH_IO, F_INTEGRITY, F_IO_DESC_SIZE, F_NEED_GET_DATA,
    F_PER_IO_DAEMON, F_QUIESCE, F_SHMEM_ZC, F_UNPRIVILEGED, F_USER_COPY, F_USER_RECOVERY,
    F_USER_RECOVERY_FAIL_IO, F_USER_RECOVERY_REISSUE, F_ZERO_COPY, F_ZONED, IoDesc,
    PARAM_DMA_ALIGN, PARAM_SEGMENT, Params,
};

/// What memory the requests of a device have, whatever lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Alignment of each segment's address and length less one.
    pub dma_mask: u32,
    /// No segment crosses a multiple of this and one.
    pub boundary_mask: u64,
    /// Most bytes of a segment.
    pub max_bytes: u32,
    /// Most segments of a request.
    pub max_count: u16,
}

/// What is asked for; by default nothing.
#[derive(Clone, Debug, Default)]
pub struct Extra {
    /// What memory requests have.
    pub segments: Option<Segments>,
    /// Whether the data of a write comes only when it is asked for (`DataPath::Copy` alone).
    pub need_get_data: bool,
    /// Whether it is made as one without privileges has to (`DataPath::Copy` alone).
    pub unprivileged: bool,
    /// Bytes from one request's descriptor to the next: a multiple of 8 from 24 to 256.
    pub descriptor_bytes: Option<u16>,
    /// Integrity data of requests (`DataPath::UserCopy` alone).
    pub integrity: Option<Integrity>,
    /// Whether memory of clients can be told to the driver ([`super::Shared`]), which then says
    /// which requests come from there. Their data moves as that of all others.
    pub shared_memory: bool,
    /// Bytes that came from or went to such memory, as they are counted.
    #[doc(hidden)]
    pub shared_bytes: Arc<AtomicU64>,
    /// Whether the server kills itself when it has fetched the first request of a queue.
    pub dies_fetching: bool,
    /// Whether every thread serves some tags of every queue, as many threads as are asked for.
    pub per_io: bool,
    /// Threads of each queue, each of which serves some of its tags (not in batches, where threads
    /// of a queue take whatever comes); 0 and 1 for one that serves them all.
    pub per_queue: u16,
    /// Whether requests that come one at a time are served with fewer calls, at the price of some
    /// work where a request is of several pieces (`DataPath::AutoRegister`, not in batches). If
    /// nothing is said, where that pays.
    pub low_depth: Option<bool>,
    /// Whether each tag has two slots that take turns (`DataPath::AutoRegister` in batches alone).
    pub rotates: bool,
    /// Whether all slots are taken, so that every request has to fall back to a copy.
    pub no_slots: bool,
    /// What else is done to the ring of each queue's thread, for tests.
    #[doc(hidden)]
    pub prepare: Option<fn(&mut Uring) -> Result<()>>,
}

impl Extra {
    /// Of these features of a kernel, the ones that it may use.
    pub(super) fn usable(&self, features: u64) -> u64 {
        // The driver lets nobody without privileges have them (include/uapi/linux/ublk_cmd.h).
        const PRIVILEGED: u64 = F_ZERO_COPY
            | F_USER_COPY
            | F_AUTO_BUF_REG
            | F_USER_RECOVERY
            | F_USER_RECOVERY_REISSUE
            | F_USER_RECOVERY_FAIL_IO
            | F_QUIESCE
            | F_ZONED
            | F_INTEGRITY;
        if self.unprivileged { features & !PRIVILEGED } else { features }
    }

    /// Whether tags of a queue are dealt out to threads.
    pub(super) fn deals(&self) -> bool {
        self.per_io || self.per_queue > 1
    }

    /// The feature flags that it takes.
    pub(super) fn flags(&self) -> u64 {
        let get_data = if self.need_get_data { F_NEED_GET_DATA } else { 0 };
        let per_io = if self.deals() { F_PER_IO_DAEMON } else { 0 };
        let integrity = if self.integrity.is_some() { F_INTEGRITY } else { 0 };
        let shared = if self.shared_memory { F_SHMEM_ZC } else { 0 };
        let unprivileged = if self.unprivileged { F_UNPRIVILEGED } else { 0 };
        get_data
            | unprivileged
            | per_io
            | integrity
            | shared
            | if self.descriptor_bytes.is_some() { F_IO_DESC_SIZE } else { 0 }
    }

    /// Asks for it.
    ///
    /// # Errors
    /// If it makes no sense with that data path.
    pub(super) fn wish(&self, info: &mut DevInfo, path: DataPath) -> Result<()> {
        if self.need_get_data && path != DataPath::Copy {
            let reason = format!("asking for a write's data is the copy path's, not {path}'s");
            return Err(Error::invalid("ublk", reason));
        }
        if self.need_get_data && info.flags & F_BATCH_IO != 0 {
            return Err(Error::invalid("ublk", "in batches a write always comes with its data"));
        }
        if self.shared_memory && path == DataPath::Copy {
            // The driver would copy nothing of a request from such memory, and we would not know.
            let reason = format!("memory shared with clients does not go with the {path} path");
            return Err(Error::invalid("ublk", reason));
        }
        if self.integrity.is_some() && path != DataPath::UserCopy {
            let reason = format!("integrity data goes with the user-copy path, not {path}");
            return Err(Error::invalid("ublk", reason));
        }
        if self.no_slots && path != DataPath::AutoRegister {
            return Err(Error::invalid("ublk", format!("the {path} path needs its slots")));
        }
        if self.rotates && (path != DataPath::AutoRegister || info.flags & F_BATCH_IO == 0) {
            return Err(Error::invalid("ublk", "slots take turns on auto-register in batches"));
        }
        info.flags |= self.flags();
        info.io_desc_size = self.descriptor_bytes.unwrap_or(0);
        Ok(())
    }

    /// Tells the kernel of it.
    pub(super) fn limit(&self, params: &mut Params) {
        if let Some(integrity) = &self.integrity {
            integrity.limit(params);
        }
        let Some(segments) = self.segments else { return };
        params.types |= PARAM_DMA_ALIGN | PARAM_SEGMENT;
        params.dma_alignment = segments.dma_mask;
        params.seg_boundary_mask = segments.boundary_mask;
        params.max_segment_size = segments.max_bytes;
        params.max_segments = segments.max_count;
    }

    /// Readies the ring of a queue's thread.
    pub(super) fn prepare(&self, ring: &mut Uring) -> Result<()> {
        self.prepare.map_or(Ok(()), |prepare| prepare(ring))
    }

    /// The queue with what is asked for.
    pub(super) fn around(&self, queue: Box<dyn Export<Uring>>) -> Box<dyn Export<Uring>> {
        let queue = if self.no_slots { Box::new(NoSlots(queue)) } else { queue };
        if self.dies_fetching { Box::new(Dying(queue)) } else { queue }
    }
}

/// A queue whose server dies as soon as it has fetched: for tests of what the kernel makes of a
/// device some of whose requests only are waited for.
struct Dying(Box<dyn Export<Uring>>);

impl Export<Uring> for Dying {
    fn depth(&self) -> u16 {
        self.0.depth()
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.0.arm(ring, lane)?;
        // The kernel has to have the commands before the process is gone.
        ring.enter(false)?;
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
        Ok(())
    }

    fn event(&mut self, ring: &mut Uring, event: Completion, inbox: &mut Inbox) -> Result<()> {
        self.0.event(ring, event, inbox)
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        self.0.finish(ring, tag, io, result);
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    fn flush(&mut self, ring: &mut Uring) {
        self.0.flush(ring);
    }

    fn rest(&mut self, ring: &mut Uring) -> Rest {
        self.0.rest(ring)
    }
}

/// Which tags of a queue one thread serves: every `step`-th from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) first: u16,
    pub(crate) step: u16,
}

impl Part {
    /// All of them.
    pub(crate) const WHOLE: Part = Part { first: 0, step: 1 };

    /// How many of a queue's `depth` tags it has.
    pub(crate) fn depth(self, depth: u16) -> u16 {
        depth.saturating_sub(self.first).div_ceil(self.step)
    }

    /// The queue's number for a tag of the part.
    #[inline]
    pub(crate) fn tag(self, tag: u16) -> u16 {
        self.first + tag * self.step
    }
}

/// Deals the tags of queues out to threads.
pub(super) struct Dealer {
    threads: u16,
    dealt: Vec<AtomicU16>,
}

impl Dealer {
    /// For that many queues, each of which `threads` threads serve.
    pub(super) fn new(queues: u16, threads: u16) -> Dealer {
        let dealt = (0..queues).map(|_| AtomicU16::new(0)).collect();
        Dealer { threads: threads.max(1), dealt }
    }

    /// The next part of a queue, each of which goes to one thread alone.
    ///
    /// # Errors
    /// If all are dealt.
    pub(super) fn deal(&self, queue: u16) -> Result<Part> {
        let next =
            self.dealt.get(usize::from(queue)).map(|next| next.fetch_add(1, Ordering::Relaxed));
        match next.filter(|first| *first < self.threads) {
            Some(first) => Ok(Part { first, step: self.threads }),
            None => {
                Err(Error::new(ErrorKind::Os, format!("ublk queue {queue}"), "has no tags left"))
            }
        }
    }
}

/// A queue none of whose slots is free when the kernel wants to put a request's pages there.
struct NoSlots(Box<dyn Export<Uring>>);

impl Export<Uring> for NoSlots {
    fn depth(&self) -> u16 {
        self.0.depth()
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        for tag in 0..self.depth() {
            let slot = ring.slots(lane).index(tag);
            ring.occupy_slot(slot)?;
        }
        self.0.arm(ring, lane)
    }

    fn event(&mut self, ring: &mut Uring, event: Completion, inbox: &mut Inbox) -> Result<()> {
        self.0.event(ring, event, inbox)
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        self.0.finish(ring, tag, io, result);
    }

    fn flush(&mut self, ring: &mut Uring) {
        self.0.flush(ring);
    }

    fn rest(&mut self, ring: &mut Uring) -> Rest {
        self.0.rest(ring)
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// Bytes from one descriptor to the next, as the kernel took it. Kernels before 7.2 leave 0 there.
pub(super) fn descriptor_bytes(info: &DevInfo) -> usize {
    if info.flags & F_IO_DESC_SIZE == 0 {
        return size_of::<IoDesc>();
    }
    usize::from(info.io_desc_size).max(size_of::<IoDesc>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_asked_for_unless_it_is() {
        let (mut info, mut params) = (DevInfo::default(), Params::default());
        let extra = Extra::default();
        extra.wish(&mut info, DataPath::AutoRegister).unwrap();
        extra.limit(&mut params);
        assert_eq!((info.flags, info.io_desc_size, params.types), (0, 0, 0));
        assert_eq!(descriptor_bytes(&info), 24);
    }

    #[test]
    fn every_tag_of_a_queue_is_dealt_to_one_thread() {
        for (depth, threads) in [(16, 6), (128, 8), (3, 3), (1, 1), (5, 2)] {
            let dealer = Dealer::new(2, threads);
            let mut seen = vec![0; usize::from(depth)];
            for _ in 0..threads {
                let part = dealer.deal(1).unwrap();
                assert!(part.depth(depth) > 0 && part.depth(depth) <= depth.div_ceil(threads));
                for tag in 0..part.depth(depth) {
                    seen[usize::from(part.tag(tag))] += 1;
                }
            }
            assert!(seen.iter().all(|count| *count == 1), "{depth} {threads}: {seen:?}");
            assert!(dealer.deal(1).is_err() && dealer.deal(2).is_err());
            assert_eq!(dealer.deal(0).unwrap().first, 0);
        }
        assert_eq!((Part::WHOLE.depth(77), Part::WHOLE.tag(76)), (77, 76));
    }

    #[test]
    fn what_is_asked_for_is_told() {
        let segments =
            Segments { dma_mask: 4095, boundary_mask: 4095, max_bytes: 32_768, max_count: 32 };
        let extra = Extra {
            segments: Some(segments),
            need_get_data: true,
            descriptor_bytes: Some(64),
            ..Extra::default()
        };
        let (mut info, mut params) = (DevInfo::default(), Params::default());
        extra.wish(&mut info, DataPath::Copy).unwrap();
        assert_eq!(info.flags, F_NEED_GET_DATA | F_IO_DESC_SIZE);
        assert_eq!(descriptor_bytes(&info), 64);
        extra.limit(&mut params);
        assert_eq!(params.types, PARAM_DMA_ALIGN | PARAM_SEGMENT);
        assert_eq!((params.dma_alignment, params.seg_boundary_mask), (4095, 4095));
        assert_eq!((params.max_segment_size, params.max_segments), (32_768, 32));
        let dealing = [(false, 0), (false, 1), (false, 2), (true, 0)]
            .map(|(per_io, per_queue)| Extra { per_io, per_queue, ..Extra::default() }.flags());
        assert_eq!(dealing, [0, 0, F_PER_IO_DAEMON, F_PER_IO_DAEMON]);
        let no_slots = Extra { no_slots: true, ..Extra::default() };
        assert!(no_slots.wish(&mut info, DataPath::AutoRegister).is_ok());
        assert!(no_slots.wish(&mut info, DataPath::Copy).is_err());
        let rotating = Extra { rotates: true, ..Extra::default() };
        assert!(rotating.wish(&mut info, DataPath::AutoRegister).is_err());
        info.flags |= F_BATCH_IO;
        assert!(rotating.wish(&mut info, DataPath::AutoRegister).is_ok());
        assert!(rotating.wish(&mut info, DataPath::UserCopy).is_err());
        for path in [DataPath::AutoRegister, DataPath::Register, DataPath::UserCopy] {
            assert!(extra.wish(&mut info, path).is_err());
        }
    }
}
