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
        PagesKind::Memory { lane: lane.to_le_bytes()[0], slot: tag }.pack()
    }
}
