//! Answers for the memory of exports that work in batches: the buffers in which tags come, and the
//! lists of elements that go.
//!
//! Tags come by one entry that completes again and again (multishot); each time the kernel takes a
//! buffer from a ring of buffers, which is shared with it. Elements go in lists: one is filled
//! while the other is the kernel's.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use devsplice_core::{Error, Result};
use devsplice_engine::{FileId, Pages};

use super::{Command, KIND_LIST, KIND_TAGS, Uring, command_entry};
use crate::arena::Arena;
use crate::setup;
use crate::splice::DATA_AT;
use crate::uapi::{CQE_MORE, SQE_BUFFER_SELECT, SQE_FIXED_FILE, Sqe, URING_CMD_MULTISHOT};

/// Most tags in a buffer; the kernel hands over at most as many at a time (`MAX_NR_TAG`,
/// drivers/block/ublk_drv.c, Linux 7.3).
pub const MOST_TAGS: usize = 128;
/// Bytes from buffer to buffer.
const BUFFER_BYTES: usize = MOST_TAGS * size_of::<u16>();
/// `struct io_uring_buf`: address, length, number; the tail of the ring lies in the rest of the
/// first.
const ENTRY_BYTES: usize = 16;
const LEN_AT: usize = 8;
const NUMBER_AT: usize = 12;
const TAIL_AT: usize = 14;
const PAGE: usize = 4096;

/// Buffers in which tags come.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    /// How many, a power of two. When all are taken the kernel ends the command that takes them.
    pub count: u16,
    /// Tags in each, at most [`MOST_TAGS`].
    pub tags: u16,
}

/// Memory of one lane.
pub(super) struct Batch {
    /// One slot: the ring of buffers, a page behind it the buffers. Lent while the entry that takes
    /// them is out.
    tags: Arena,
    buffers: Buffers,
    tail: u16,
    /// Two slots, a list each.
    lists: Arena,
    element: usize,
    /// Bytes of a full list.
    room: usize,
    /// The list that is filled, and how far.
    current: usize,
    filled: usize,
    /// What of the other one is sent and not dealt with, from where on.
    sent: Option<(usize, usize)>,
}

impl Batch {
    fn new(depth: u16, element: usize, buffers: Buffers) -> Result<Batch> {
        let (depth, count) = (usize::from(depth), usize::from(buffers.count));
        assert!(count.is_power_of_two() && count * ENTRY_BYTES <= PAGE, "{buffers:?}");
        assert!(usize::from(buffers.tags) * size_of::<u16>() <= BUFFER_BYTES, "{buffers:?}");
        let bytes = PAGE + (count * BUFFER_BYTES).next_multiple_of(PAGE);
        let list = (depth * element).next_multiple_of(PAGE);
        Ok(Batch {
            tags: Arena::new(1, bytes, true)?,
            buffers,
            tail: 0,
            lists: Arena::new(2, list, true)?,
            element,
            room: depth * element,
            current: 0,
            filled: 0,
            sent: None,
        })
    }

    fn buffer_at(&self, buffer: u16) -> usize {
        assert!(buffer < self.buffers.count, "buffer {buffer} of {:?}", self.buffers);
        PAGE + usize::from(buffer) * BUFFER_BYTES
    }

    /// Where a field of the ring of buffers lies.
    fn field<T>(&self, at: usize) -> NonNull<T> {
        self.tags.place(0, at, size_of::<T>()).cast()
    }

    /// Puts a buffer into the ring; the kernel sees it at once.
    fn give(&mut self, buffer: u16) {
        let address = self.tags.address(0, self.buffer_at(buffer), BUFFER_BYTES);
        let entry = usize::from(self.tail & (self.buffers.count - 1)) * ENTRY_BYTES;
        let len = u32::from(self.buffers.tags) * 2;
        // SAFETY: in the ring's page, aligned (`ENTRY_BYTES` is a multiple of 8). The kernel does
        // not look at this entry before the tail says so: at most `count` buffers exist, so the
        // entry's last one was taken, or it would not be given again.
        unsafe { self.field::<u64>(entry).write_volatile(address) };
        // SAFETY: as above.
        unsafe { self.field::<u32>(entry + LEN_AT).write_volatile(len) };
        // SAFETY: as above. The tail, in the two bytes behind, is left alone.
        unsafe { self.field::<u16>(entry + NUMBER_AT).write_volatile(buffer) };
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: as above; both sides use the tail atomically, and only this side writes it.
        unsafe { self.field::<AtomicU16>(TAIL_AT).as_ref() }.store(self.tail, Ordering::Release);
    }

    #[inline]
    fn tags(&self, buffer: u16, count: usize) -> [u16; MOST_TAGS] {
        assert!(count <= usize::from(self.buffers.tags), "{count} tags of {:?}", self.buffers);
        let place = self.tags.place(0, self.buffer_at(buffer), BUFFER_BYTES);
        // SAFETY: all of the buffer, aligned; zeros where the kernel has written nothing. It has
        // written what counts before the completion that named the buffer, and does not write it
        // again before `give`, which its lane calls later.
        unsafe { place.cast::<[u16; MOST_TAGS]>().read() }
    }

    /// Adds an element: its first words, as many as it has.
    #[inline]
    fn list(&mut self, [first, second]: [u64; 2]) {
        let (at, end) = (self.filled, self.filled + self.element);
        assert!(end <= self.room, "more is listed than there are tags");
        let list = self.lists.bytes(self.current);
        list[at..at + 8].copy_from_slice(&first.to_ne_bytes());
        if self.element > 8 {
            list[at + 8..at + 16].copy_from_slice(&second.to_ne_bytes());
        }
        self.filled = end;
    }
}

impl Uring {
    /// Makes what a lane needs to work in batches of up to `depth` elements of so many bytes.
    ///
    /// # Errors
    /// If memory is short, or the kernel has no rings of buffers (before 5.19).
    ///
    /// # Panics
    /// If the buffers break their rules.
    pub fn make_batch(
        &mut self,
        lane: u16,
        (depth, element): (u16, usize),
        buffers: Buffers,
    ) -> Result<()> {
        let mut batch = Batch::new(depth, element, buffers)?;
        // The memory outlives what takes buffers: it is lent as long as such an entry is out, and
        // what is lent is never unmapped.
        let ring = (batch.tags.address(0, 0, PAGE), u32::from(buffers.count));
        setup::put_buffer_ring(&self.queues.fd, lane, ring)
            .map_err(|error| Error::os("a ring of buffers for io_uring", &error))?;
        for buffer in 0..buffers.count {
            batch.give(buffer);
        }
        let index = usize::from(lane);
        if self.batches.len() <= index {
            self.batches.resize_with(index + 1, || None);
        }
        self.batches[index] = Some(batch);
        Ok(())
    }

    #[inline]
    fn batch(&mut self, lane: u16) -> &mut Batch {
        match self.batches.get_mut(usize::from(lane)) {
            Some(Some(batch)) => batch,
            _ => panic!("lane {lane} does not work in batches"),
        }
    }

    /// Sends the command that completes each time when tags have come. One per lane.
    pub fn fetch_tags(&mut self, (lane, index): (u16, u32), file: FileId, command: &Command) {
        let batch = self.batch(lane);
        assert!(!batch.tags.is_lent(), "lane {lane} asks for tags already");
        batch.tags.lend(0);
        let sqe = command_entry(KIND_TAGS, (lane, index), file, command);
        let flags = SQE_FIXED_FILE | SQE_BUFFER_SELECT;
        self.queues.push(Sqe { flags, op_flags: URING_CMD_MULTISHOT, buf_index: lane, ..sqe });
    }

    /// What lies in a buffer that a completion has named, of which the first `count` are tags.
    ///
    /// # Panics
    /// If there is no such buffer, or not as many fit.
    #[inline]
    #[must_use]
    pub fn tags(&mut self, lane: u16, buffer: u16, count: usize) -> [u16; MOST_TAGS] {
        self.batch(lane).tags(buffer, count)
    }

    /// Gives back a buffer that a completion has named, once its tags are taken.
    #[inline]
    pub fn give_buffer(&mut self, lane: u16, buffer: u16) {
        self.batch(lane).give(buffer);
    }

    /// Adds an element to the list that is filled: its first words, as many as it has.
    ///
    /// # Panics
    /// If it does not fit: there are more elements than tags then.
    #[inline]
    pub fn list(&mut self, lane: u16, words: [u64; 2]) {
        self.batch(lane).list(words);
    }

    /// Sends a command with the list that was filled; the next elements go to the other one.
    ///
    /// # Panics
    /// If the last one that was sent is not dealt with.
    pub fn send_list(&mut self, at: (u16, u32), file: FileId, command: &Command) {
        let batch = self.batch(at.0);
        assert!(batch.sent.is_none(), "lane {} has a list out", at.0);
        batch.sent = Some((batch.current, 0));
        batch.current ^= 1;
        batch.filled = 0;
        self.send_sent(at, file, command);
    }

    /// Sends what is left of the list that came back, without its first `done` bytes.
    ///
    /// # Panics
    /// If there is none.
    pub fn resend_list(&mut self, at: (u16, u32), file: FileId, command: &Command, done: usize) {
        if let Some((_, from)) = &mut self.batch(at.0).sent {
            *from += done;
        }
        self.send_sent(at, file, command);
    }

    fn send_sent(&mut self, at: (u16, u32), file: FileId, command: &Command) {
        let batch = self.batch(at.0);
        let Some((slot, from)) = batch.sent else { panic!("lane {} has no list out", at.0) };
        let aux = batch.lists.address(slot, from, batch.element);
        batch.lists.lend(slot);
        let command = Command { aux, ..*command };
        self.queues.push(command_entry(KIND_LIST, at, file, &command));
    }

    /// The list that came back is dealt with and may be filled again.
    pub fn list_done(&mut self, lane: u16) {
        self.batch(lane).sent = None;
    }

    /// Takes back what a completion returns.
    pub(super) fn batch_completed(&mut self, kind: u64, lane: u16, flags: u32) {
        let batch = self.batch(lane);
        match batch.sent {
            Some((slot, _)) if kind == KIND_LIST => batch.lists.give_back(slot),
            _ if kind == KIND_TAGS && flags & CQE_MORE == 0 => batch.tags.give_back(0),
            _ => {}
        }
    }

    /// The address of a tag's data, which the device may read and write until
    /// [`Uring::memory_back`].
    pub fn lend_memory(&mut self, lane: u16, tag: u16) -> u64 {
        let arena = self.arena(lane);
        arena.lend(usize::from(tag));
        arena.address(usize::from(tag), DATA_AT, 0)
    }

    /// The device is through with such memory.
    pub fn memory_back(&mut self, lane: u16, tag: u16) {
        self.arena(lane).give_back(usize::from(tag));
    }

    /// The pages of a request: in the slot of its tag, or in its memory.
    #[inline]
    #[must_use]
    pub fn pages(&self, lane: u16, tag: u16, in_slot: bool) -> Pages {
        if in_slot { self.slots(lane).pages(tag) } else { self.memory_pages(lane, tag) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{Config, LaneMemory};

    const BUFFERS: Buffers = Buffers { count: 4, tags: 8 };

    #[test]
    fn given_buffers_lie_in_the_ring_in_order_and_do_not_overlap() {
        let mut batch = Batch::new(100, 8, BUFFERS).unwrap();
        for buffer in [2, 0, 3, 1, 2] {
            batch.give(buffer);
        }
        let base = batch.tags.address(0, 0, PAGE);
        let bytes = batch.tags.bytes(0);
        let entry = |place: usize| {
            let entry = &bytes[place * ENTRY_BYTES..][..ENTRY_BYTES];
            let address = u64::from_ne_bytes(entry[..8].try_into().unwrap());
            let len = u32::from_ne_bytes(entry[8..12].try_into().unwrap());
            (address - base, len, u16::from_ne_bytes(entry[12..14].try_into().unwrap()))
        };
        let at = |buffer: u16| 4096 + u64::from(buffer) * 256;
        // The fifth has come round to the first place, and left the tail there alone.
        for (place, buffer) in [2, 0, 3, 1].into_iter().enumerate() {
            assert_eq!(entry(place), (at(buffer), 16, buffer));
        }
        assert_eq!(u16::from_ne_bytes(bytes[TAIL_AT..][..2].try_into().unwrap()), 5);
    }

    #[test]
    fn tags_are_read_from_the_buffer_that_is_named() {
        let mut batch = Batch::new(8, 8, BUFFERS).unwrap();
        let at = batch.buffer_at(3);
        batch.tags.bytes(0)[at + 4..][..2].copy_from_slice(&513_u16.to_ne_bytes());
        assert_eq!(batch.tags(3, 3)[..3], [0, 0, 513]);
        assert_eq!(batch.tags(2, 8), [0; MOST_TAGS]);
        for (buffer, count) in [(4, 1), (0, 9)] {
            let read = std::panic::AssertUnwindSafe(|| batch.tags(buffer, count));
            assert!(std::panic::catch_unwind(read).is_err());
        }
    }

    fn ring() -> Uring {
        let lane = LaneMemory { depth: 4, bytes: 4096, slots: false, locked: false };
        Uring::new(&Config { flights: 4, files: 0, lanes: vec![lane], inner: 0 }).unwrap()
    }

    #[test]
    fn a_list_that_is_out_is_neither_filled_nor_followed_by_another() {
        let mut ring = ring();
        ring.make_batch(0, (2, 8), BUFFERS).unwrap();
        let command = Command { op: 0, payload: [0; 16], aux: 0, lend: None };
        ring.list(0, [1; 2]);
        ring.send_list((0, 0), FileId(0), &command);
        let batch = ring.batch(0);
        assert_eq!((batch.current, batch.filled, batch.sent), (1, 0, Some((0, 0))));
        assert!(batch.lists.is_lent());
        ring.list(0, [2; 2]);
        ring.list(0, [3; 2]);
        let third = std::panic::AssertUnwindSafe(|| ring.list(0, [4; 2]));
        assert!(std::panic::catch_unwind(third).is_err(), "more elements than tags");
        let second = std::panic::AssertUnwindSafe(|| ring.send_list((0, 0), FileId(0), &command));
        assert!(std::panic::catch_unwind(second).is_err(), "two lists out");
        ring.batch_completed(KIND_LIST, 0, 0);
        ring.list_done(0);
        assert!(!ring.batch(0).lists.is_lent());
    }

    #[test]
    fn what_is_left_of_a_list_is_sent_from_where_it_stopped() {
        let mut ring = ring();
        ring.make_batch(0, (4, 8), BUFFERS).unwrap();
        let command = Command { op: 0, payload: [0; 16], aux: 0, lend: None };
        for word in 0..4 {
            ring.list(0, [word; 2]);
        }
        ring.send_list((0, 0), FileId(0), &command);
        for (done, at) in [(8, 8), (16, 24)] {
            ring.batch_completed(KIND_LIST, 0, 0);
            ring.resend_list((0, 0), FileId(0), &command, done);
            assert_eq!(ring.batch(0).sent, Some((0, at)));
        }
        ring.batch_completed(KIND_LIST, 0, 0);
        assert_eq!(ring.batch(0).lists.bytes(0)[24..32], 3_u64.to_ne_bytes());
    }

    #[test]
    fn memory_that_tags_may_still_come_to_is_lent() {
        let mut ring = ring();
        ring.make_batch(0, (4, 8), BUFFERS).unwrap();
        let command = Command { op: 0, payload: [0; 16], aux: 0, lend: None };
        ring.fetch_tags((0, 0), FileId(0), &command);
        ring.batch_completed(KIND_TAGS, 0, CQE_MORE);
        assert!(ring.batch(0).tags.is_lent());
        ring.batch_completed(KIND_TAGS, 0, 0);
        assert!(!ring.batch(0).tags.is_lent());
    }
}
