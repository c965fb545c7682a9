//! Answers for reads and writes of exports themselves, between a file and a tag's memory.

use devsplice_engine::FileId;

use super::{KIND_EXPORT_LENT, Uring, tag_of};
use crate::uapi::{OP_READ, OP_WRITE, SQE_FIXED_FILE, Sqe};

impl Uring {
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
