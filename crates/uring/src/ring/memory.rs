//! Answers for the memory of a lane's tags: who may look at it, and entries of exports that fill or
//! drain it.

use devsplice_engine::FileId;

use super::{KIND_EXPORT_LENT, Uring, tag_of};
use crate::arena::Arena;
use crate::splice::DATA_AT;
use crate::uapi::{OP_READ, OP_WRITE, SQE_FIXED_FILE, Sqe};

impl Uring {
    /// A tag's memory: [`Uring::DATA_AT`] bytes for headers, then its data.
    ///
    /// # Panics
    /// If an entry that names it is in the kernel's hands, or the lane has no memory.
    pub fn memory(&mut self, lane: u16, tag: u16) -> &mut [u8] {
        self.arena(lane).bytes(usize::from(tag))
    }

    /// Where the data starts in a tag's memory.
    pub const DATA_AT: usize = DATA_AT;

    pub(super) fn arena(&mut self, lane: u16) -> &mut Arena {
        match &mut self.arenas[usize::from(lane)] {
            Some(arena) => arena,
            None => panic!("lane {lane} has no memory of its own"),
        }
    }

    /// Reads from `file` at `off` into bytes `at..at + len` of a tag's memory. The completion's
    /// index is `index`, whose low half must be the tag.
    pub fn read(
        &mut self,
        (lane, index): (u16, u32),
        file: FileId,
        off: u64,
        range: (usize, usize),
    ) {
        self.move_memory(OP_READ, (lane, index), file, off, range);
    }

    /// Writes bytes `at..at + len` of a tag's memory to `file` at `off`; as [`Uring::read`].
    pub fn write(
        &mut self,
        (lane, index): (u16, u32),
        file: FileId,
        off: u64,
        range: (usize, usize),
    ) {
        self.move_memory(OP_WRITE, (lane, index), file, off, range);
    }

    fn move_memory(
        &mut self,
        opcode: u8,
        (lane, index): (u16, u32),
        file: FileId,
        off: u64,
        (at, len): (usize, usize),
    ) {
        let tag = tag_of(index);
        let arena = self.arena(lane);
        let addr = arena.address(tag, at, len);
        arena.lend(tag);
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let user_data = KIND_EXPORT_LENT | u64::from(lane) << 32 | u64::from(index);
        let fd = i32::from(file.0);
        let flags = SQE_FIXED_FILE;
        self.queues.push(Sqe { opcode, fd, flags, off, addr, len, user_data, ..Sqe::default() });
    }
}
