//! Answers for where a request's pages are: a slot of the table of registered buffers, or memory of
//! ours.

use devsplice_core::{Error, Result};
use devsplice_engine::Pages;

use super::Uring;
use crate::setup;
use crate::splice::{PagesKind, ZEROES_LEN};

/// The slots of a lane: one for each tag, in their order.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    first: u16,
}

impl Slots {
    /// The index of a tag's slot in the ring's table of registered buffers.
    #[inline]
    #[must_use]
    pub const fn index(self, tag: u16) -> u16 {
        self.first + tag
    }

    /// The pages of a request whose data is the device's own, in the slot of its tag.
    #[inline]
    #[must_use]
    pub fn pages(self, tag: u16) -> Pages {
        PagesKind::Slot(self.index(tag)).pack()
    }
}

impl Uring {
    /// Fills a slot of the table of registered buffers with memory of ours, so that a device finds
    /// it taken: for tests of what follows then.
    ///
    /// # Errors
    /// As the kernel says.
    #[doc(hidden)]
    pub fn occupy_slot(&mut self, index: u16) -> Result<()> {
        let memory = self.zeroes.address(0, 0, ZEROES_LEN);
        // The memory is the ring's own and outlives its table of buffers (`queues` is dropped
        // first); no entry that could write to it names the slot.
        setup::put_buffer(&self.queues.fd, u32::from(index), (memory, ZEROES_LEN as u64))
            .map_err(|error| Error::os("registering a buffer with io_uring", &error))
    }

    /// The slots of a lane.
    ///
    /// # Panics
    /// If the lane was made without slots.
    #[inline]
    #[must_use]
    pub fn slots(&self, lane: u16) -> Slots {
        match self.slot_bases[usize::from(lane)] {
            Some(first) => Slots { first },
            None => panic!("lane {lane} has no slots"),
        }
    }

    /// Makes the memory of a tag resident.
    pub fn populate(&mut self, lane: u16, tag: u16) {
        self.arena(lane).populate(usize::from(tag));
    }

    /// The pages of a request whose data is in the memory of its tag.
    #[inline]
    #[must_use]
    pub fn memory_pages(&self, lane: u16, tag: u16) -> Pages {
        PagesKind::Memory { lane, slot: tag }.pack()
    }
}

#[cfg(test)]
mod tests {
    use devsplice_core::Op;
    use devsplice_engine::{Event, Part, Ring, Splice, To};
    use rustix::io::pread;

    use super::*;
    use crate::files::{FileKind, RingFile};
    use crate::ring::{Config, DATA_AT, LaneMemory};
    use crate::splice::MOST_LANES;

    /// A server may have that many clients on one thread, and a stack that keeps records beside.
    #[test]
    fn memory_of_the_three_hundredth_lane_is_its_own() {
        let lane = LaneMemory { depth: 1, bytes: 4096, slots: false, locked: false };
        let lanes = vec![lane; 300];
        let mut ring = Uring::new(&Config { flights: 2, files: 1, lanes, inner: 1 }).unwrap();
        let fd = rustix::fs::memfd_create("lanes", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let look = fd.try_clone().unwrap();
        let file = ring.add_file(RingFile { fd, kind: FileKind::Regular }).unwrap();
        for lane in 0..300 {
            ring.memory(lane, 0)[DATA_AT..][..512].fill(lane.to_le_bytes()[0] ^ 0x55);
        }
        ring.put(300, 0, &[7; 512]);
        for lane in [300, 299, 256, 44, 0] {
            let pages = ring.inner_pages(lane, 0);
            let (to, parts) = (To::File(file), &[Part { at: 0, len: 512 }]);
            let write = Splice { op: Op::Write, fua: false, to, at: 0, len: 512, pages, parts };
            ring.splice(0, &write);
            ring.enter(true).unwrap();
            assert!(matches!(ring.next(), Some(Event::Splice { result: Ok(512), .. })));
            let mut bytes = [0; 512];
            assert_eq!(pread(&look, &mut bytes, 0), Ok(512));
            let own = if lane == 300 { 7 } else { lane.to_le_bytes()[0] ^ 0x55 };
            assert_eq!(bytes, [own; 512], "lane {lane}");
        }
    }

    #[test]
    fn more_lanes_than_pages_can_name_are_refused() {
        let lane = LaneMemory { depth: 1, bytes: 0, slots: false, locked: false };
        let lanes = vec![lane; MOST_LANES];
        let made = Uring::new(&Config { flights: 1, files: 1, lanes, inner: 1 });
        assert!(made.err().unwrap().to_string().contains("32769 lanes"));
    }
}
