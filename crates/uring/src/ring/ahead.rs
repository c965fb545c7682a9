//! Answers for a ring that serves requests one at a time: what is carried out only when the splice
//! before it is done whole, in the same call (`IOSQE_IO_LINK`).
//!
//! Never `IOSQE_IO_HARDLINK`: that carries the next entry out after a short splice as well, and the
//! front end would take the request for done.

use devsplice_core::Result;
use devsplice_engine::Splice;

use super::{Config, KIND_NOTHING, KIND_SIMPLE, Uring};
use crate::splice::{simple, simple_entry};
use crate::submit::Queues;
use crate::uapi::{OP_NOP, SQE_IO_LINK, Sqe};

/// Entries that may be pushed between the first of a pair and the call that takes both.
const ROOM: u32 = 8;

impl Uring {
    /// A ring as [`Uring::new`] makes it, for requests that come one at a time. Where the kernel
    /// cannot make one, it is an ordinary ring.
    ///
    /// # Errors
    /// As [`Uring::new`].
    pub fn for_low_depth(config: &Config) -> Result<Uring> {
        let mut ring = Uring::with(config, Queues::for_low_depth)?;
        if ring.can_go_ahead() {
            ring.warm_up()?;
        }
        Ok(ring)
    }

    /// Whether an entry can be sent behind a splice.
    #[must_use]
    pub fn can_go_ahead(&self) -> bool {
        self.queues.is_low_depth
    }

    /// Has the kernel make all the requests that it will need: it keeps them as long as the ring
    /// is there. A pair of entries could be torn apart if there was no memory for the second, and
    /// the second be carried out whatever becomes of the first.
    pub(super) fn warm_up(&mut self) -> Result<()> {
        let count = self.queues.size();
        for _ in 0..count {
            self.queues.push(Sqe {
                opcode: OP_NOP,
                fd: -1,
                user_data: KIND_NOTHING,
                ..Sqe::default()
            });
        }
        devsplice_engine::Ring::enter(self, false)
    }

    /// As `splice`, linked to the entry that is pushed next.
    pub(super) fn link(&mut self, key: u32, splice: &Splice<'_>) -> bool {
        if Uring::is_remote(splice) {
            return false;
        }
        let (true, Some(what)) = (self.can_go_ahead(), simple(splice)) else { return false };
        if !self.queues.has_room_for(ROOM) {
            return false;
        }
        let entry = simple_entry(splice, what);
        let (flags, user_data) = (entry.flags | SQE_IO_LINK, KIND_SIMPLE | u64::from(key));
        self.queues.push(Sqe { flags, user_data, ..entry });
        self.queues.mark_pair();
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;
    use std::sync::atomic::{AtomicU8, AtomicUsize};

    use devsplice_core::Op;
    use devsplice_engine::{Completion, Event, FileId, Part, Ring, To};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::files::{FileKind, RingFile};
    use crate::ring::LaneMemory;
    use crate::setup;

    const BYTES: usize = 8192;
    type Memory = [AtomicU8; BYTES];

    /// Memory at addresses that fit a part: a slot of a user's memory is named by its address.
    static MEMORY: [Memory; 8] = [const { [const { AtomicU8::new(0x5a) }; BYTES] }; 8];
    static TAKEN: AtomicUsize = AtomicUsize::new(0);

    /// A ring with a file of `size` bytes and memory of ours in slot 0.
    fn ring(size: u64) -> (Uring, FileId, &'static Memory) {
        let lane = LaneMemory { depth: 4, bytes: 4096, slots: true, locked: false };
        let config = Config { flights: 4, files: 1, lanes: vec![lane], inner: 0 };
        let mut ring = Uring::for_low_depth(&config).unwrap();
        let memory = &MEMORY[TAKEN.fetch_add(1, Relaxed)];
        let at = (memory.as_ptr() as u64, BYTES as u64);
        setup::put_buffer(&ring.queues.fd, 0, at).unwrap();
        let fd = memfd_create("bottom", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, size).unwrap();
        let file = ring.add_file(RingFile { fd, kind: FileKind::Regular }).unwrap();
        (ring, file, memory)
    }

    /// Whose memory, of which slot of a ring.
    fn read<T>(
        (ring, file, memory): (&mut Uring, FileId, &Memory),
        slot: u16,
        then: impl FnOnce(&mut Uring, &Splice<'_>) -> T,
    ) -> T {
        let parts = [Part { at: u32::try_from(memory.as_ptr() as usize).unwrap(), len: 4096 }];
        let (op, to, pages) = (Op::Read, To::File(file), ring.slots(0).pages(slot));
        then(ring, &Splice { op, fua: false, to, at: 0, len: 4096, pages, parts: &parts })
    }

    /// A read of 4 KiB from the start of a file, and a poll of /dev/zero behind it, which succeeds
    /// at once; what both come to.
    fn pair((ring, file, memory): (&mut Uring, FileId, &Memory), slot: u16) -> Vec<(u32, i64)> {
        assert!(read((ring, file, memory), slot, |ring, splice| ring.splice_first(3, splice)));
        ring.poll((0, 77), FileId(0));
        let mut all = Vec::new();
        while all.len() < 2 {
            let Some(event) = ring.next() else {
                ring.enter_for_two().unwrap();
                continue;
            };
            all.push(match event {
                Event::Splice { key, result: Ok(done) } => (key, i64::try_from(done).unwrap()),
                Event::Splice { key, result: Err(errno) } => (key, -i64::from(errno.raw())),
                Event::Export { completion: Completion { index, result, .. }, .. } => {
                    (index, i64::from(result))
                }
                other => panic!("{other:?}"),
            });
        }
        all
    }

    #[test]
    fn what_is_behind_a_splice_is_carried_out_only_when_that_is_done_whole() {
        const CANCELED: i64 = -125;
        const FAULT: i64 = -14;
        let (mut whole, file, memory) = ring(8192);
        let got = pair((&mut whole, file, memory), 0);
        assert!(got[0] == (3, 4096) && got[1].0 == 77 && got[1].1 > 0, "{got:?}");
        assert!(memory[..4096].iter().all(|byte| byte.load(Relaxed) == 0));
        assert_eq!(memory[4096].load(Relaxed), 0x5a);
        for size in [0, 1000, 4095] {
            let (mut short, file, memory) = ring(size);
            let got = pair((&mut short, file, memory), 0);
            assert_eq!(got, [(3, i64::try_from(size).unwrap()), (77, CANCELED)], "of {size}");
        }
        // Slot 1 is empty: the splice fails.
        let got = pair((&mut whole, file, memory), 1);
        assert_eq!(got, [(3, FAULT), (77, CANCELED)]);
    }

    #[test]
    fn a_pair_waits_for_room_and_an_ordinary_ring_has_none() {
        let (mut low, file, memory) = ring(8192);
        for index in 0..low.queues.size() - ROOM + 1 {
            low.poll((0, index), FileId(0));
        }
        let before = low.counts();
        let first = |ring: &mut Uring, splice: &Splice<'_>| ring.splice_first(3, splice);
        assert!(!read((&mut low, file, memory), 0, first), "no room for what comes behind");
        assert_eq!(low.counts(), before);
        low.enter(false).unwrap();
        assert!(read((&mut low, file, memory), 0, first));
        let lane = LaneMemory { depth: 4, bytes: 4096, slots: true, locked: false };
        let config = Config { flights: 4, files: 0, lanes: vec![lane], inner: 0 };
        let mut other = Uring::new(&config).unwrap();
        assert!(!read((&mut other, FileId(0), memory), 0, first));
    }

    #[test]
    fn a_pair_that_the_kernel_took_apart_is_noticed() {
        let (mut low, file, memory) = ring(8192);
        assert!(read((&mut low, file, memory), 0, |ring, splice| ring.splice_first(3, splice)));
        // Only the first goes, as when there is no memory for the second.
        let alone = std::panic::AssertUnwindSafe(|| low.enter(false));
        assert!(std::panic::catch_unwind(alone).is_err());
    }

    #[test]
    fn a_ring_that_waits_for_two_does_not_wait_over_one_that_is_known() {
        let (mut ring, ..) = ring(4096);
        ring.poll((0, 1), FileId(0));
        ring.enter(true).unwrap();
        ring.enter_for_two().unwrap();
        assert!(ring.next().is_some() && ring.next().is_none());
    }
}
