//! Answers for what a queue in batches needs of its ring: the real one in life, one that plays the
//! kernel in tests.

use devsplice_core::Result;
use devsplice_engine::{FileId, Pages};
use devsplice_uring::{Buffers, Command, MOST_TAGS, Uring};

/// Each method as [`Uring`] has it.
pub(crate) trait Wire {
    fn make_batch(&mut self, lane: u16, sizes: (u16, usize), buffers: Buffers) -> Result<()>;
    fn fetch_tags(&mut self, at: (u16, u32), file: FileId, command: &Command);
    fn tags(&mut self, lane: u16, buffer: u16, count: usize) -> [u16; MOST_TAGS];
    fn give_buffer(&mut self, lane: u16, buffer: u16);
    fn list(&mut self, lane: u16, words: [u64; 2]);
    fn send_list(&mut self, at: (u16, u32), file: FileId, command: &Command);
    fn resend_list(&mut self, at: (u16, u32), file: FileId, command: &Command, done: usize);
    fn list_done(&mut self, lane: u16);
    fn command(&mut self, at: (u16, u32), file: FileId, command: &Command);
    fn read(&mut self, at: (u16, u32), file: FileId, off: u64, range: (usize, usize));
    fn write(&mut self, at: (u16, u32), file: FileId, off: u64, range: (usize, usize));
    fn slot_index(&self, lane: u16, tag: u16) -> u16;
    fn pages(&self, lane: u16, tag: u16, in_slot: bool) -> Pages;
    fn lend_memory(&mut self, lane: u16, tag: u16) -> u64;
    fn memory_back(&mut self, lane: u16, tag: u16);
}

#[rustfmt::skip] // A line each is easier to check.
impl Wire for Uring {
    fn make_batch(&mut self, lane: u16, sizes: (u16, usize), buffers: Buffers) -> Result<()> {
        self.make_batch(lane, sizes, buffers)
    }
    fn fetch_tags(&mut self, at: (u16, u32), file: FileId, command: &Command) {
        self.fetch_tags(at, file, command);
    }
    #[inline]
    fn tags(&mut self, lane: u16, buffer: u16, count: usize) -> [u16; MOST_TAGS] {
        self.tags(lane, buffer, count)
    }
    fn give_buffer(&mut self, lane: u16, buffer: u16) { self.give_buffer(lane, buffer); }
    #[inline]
    fn list(&mut self, lane: u16, words: [u64; 2]) { self.list(lane, words); }
    fn send_list(&mut self, at: (u16, u32), file: FileId, command: &Command) {
        self.send_list(at, file, command);
    }
    fn resend_list(&mut self, at: (u16, u32), file: FileId, command: &Command, done: usize) {
        self.resend_list(at, file, command, done);
    }
    fn list_done(&mut self, lane: u16) { self.list_done(lane); }
    fn command(&mut self, at: (u16, u32), file: FileId, command: &Command) {
        self.command(at, file, command);
    }
    fn read(&mut self, at: (u16, u32), file: FileId, off: u64, range: (usize, usize)) {
        self.read(at, file, off, range);
    }
    fn write(&mut self, at: (u16, u32), file: FileId, off: u64, range: (usize, usize)) {
        self.write(at, file, off, range);
    }
    #[inline]
    fn slot_index(&self, lane: u16, tag: u16) -> u16 { self.slots(lane).index(tag) }
    #[inline]
    fn pages(&self, lane: u16, tag: u16, in_slot: bool) -> Pages { self.pages(lane, tag, in_slot) }
    fn lend_memory(&mut self, lane: u16, tag: u16) -> u64 { self.lend_memory(lane, tag) }
    fn memory_back(&mut self, lane: u16, tag: u16) { self.memory_back(lane, tag); }
}
