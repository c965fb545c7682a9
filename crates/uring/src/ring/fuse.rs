//! Answers for FUSE's commands (include/uapi/linux/fuse.h, protocol 7.46): entries that bring a
//! request and take its answer, the memory for headers, and whose a payload's memory is.
//!
//! The headers of an entry, and its payload where each has its own, are the kernel's from the
//! command until its completion. Where a queue has a pool of payload buffers these are the
//! kernel's, but for those that it has named with a request: from then until the commit they are
//! the request's.

use devsplice_core::Result;
use devsplice_engine::FileId;

use super::{KIND_EXPORT, KIND_FUSE, Uring, tag_of};
use crate::arena::Arena;
use crate::splice::DATA_AT;
use crate::uapi::{OP_URING_CMD, SQE_FIXED_FILE, Sqe};

const CMD_REGISTER: u64 = 1;
const CMD_COMMIT_AND_FETCH: u64 = 2;
const CMD_ADD_BUFPOOL: u64 = 4;

/// `struct fuse_uring_req_header`: a header of 128 bytes, one of the operation of as many, and 32
/// about the payload.
const HEADERS: usize = 288;
/// Where the operation's header begins.
pub const FUSE_OP_AT: usize = 128;
const PAYLOAD_LEN_AT: usize = 272;
const PAYLOAD_PLACE_AT: usize = 276;
/// The lowest of the 64 bits there says that the request's pages are in the entry's slot.
const IN_SLOT_AT: usize = 256;
/// Where the two vectors that a registration names lie, behind the headers.
const VECTORS_AT: usize = 1024;

/// Where payloads go that are not in slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FusePayload {
    /// Each entry has memory of its own, that of its tag.
    Own,
    /// The lane's memory but for the last tag's is a pool of which the kernel gives to entries.
    Pool,
}

/// What an entry says of its payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FuseEntry {
    /// Bytes of it.
    pub len: u32,
    /// Where it is in the pool; 0 where it is in none, too.
    pub place: u32,
    /// Whether the request's pages are in the entry's slot.
    pub in_slot: bool,
}

/// A lane's headers.
pub(super) struct Headers {
    memory: Arena,
    queue: u16,
    file: FileId,
    payload: FusePayload,
}

impl Uring {
    /// Bytes from one payload buffer of a pool to the next, where each has room for `bytes`: what
    /// the kernel must take for the largest payload.
    #[must_use]
    pub const fn fuse_stride(bytes: u32) -> u32 {
        DATA_AT as u32 + bytes.next_multiple_of(4096)
    }

    /// Makes a lane one of FUSE's queue number `queue`, on `file`, which is /dev/fuse.
    ///
    /// # Errors
    /// If memory is short.
    pub fn make_fuse(
        &mut self,
        (lane, depth): (u16, u16),
        (file, queue): (FileId, u16),
        payload: FusePayload,
    ) -> Result<()> {
        assert!(depth > 1 || payload == FusePayload::Own, "a pool of nothing");
        let memory = Arena::new(usize::from(depth), 4096, false)?;
        let index = usize::from(lane);
        if self.fuse.len() <= index {
            self.fuse.resize_with(index + 1, || None);
        }
        self.fuse[index] = Some(Headers { memory, queue, file, payload });
        Ok(())
    }

    fn headers(&mut self, lane: u16) -> (&mut Headers, &mut Arena) {
        let index = usize::from(lane);
        match (self.fuse.get_mut(index), self.arenas.get_mut(index)) {
            (Some(Some(headers)), Some(Some(arena))) => (headers, arena),
            _ => panic!("lane {lane} is not FUSE's, or has no memory of its own"),
        }
    }

    /// Gives the lane's memory to the kernel as its pool of payload buffers. The completion has
    /// `index`.
    pub fn fuse_add_pool(&mut self, (lane, index): (u16, u32)) {
        let (headers, arena) = self.headers(lane);
        let count = headers.memory.slots() - 1;
        // What the kernel takes for a buffer ends in the room for headers of the next one, which is
        // not used: no payload is as long.
        let base = arena.address(0, DATA_AT, 0);
        let stride = arena.address(1, 0, 0) - arena.address(0, 0, 0);
        (0..count).for_each(|slot| arena.lend(slot));
        let (file, queue) = (headers.file, u64::from(headers.queue));
        let sqe = Sqe { user_data: at(KIND_EXPORT, lane, index), ..command(file, CMD_ADD_BUFPOOL) };
        let len = stride * count as u64;
        self.queues.push_wide(sqe, rest([queue, base, len]));
    }

    /// Registers an entry: its completion, under `tag`, is a request.
    pub fn fuse_register(&mut self, lane: u16, tag: u16) {
        let slot = self.slot_bases[usize::from(lane)].map_or(0, |first| first + tag);
        let (headers, arena) = self.headers(lane);
        let tag_slot = usize::from(tag);
        let header = headers.memory.address(tag_slot, 0, HEADERS);
        let payload = match headers.payload {
            FusePayload::Pool => (0, 0),
            FusePayload::Own => {
                let len = arena.room() - DATA_AT;
                let base = arena.address(tag_slot, DATA_AT, len);
                arena.lend(tag_slot);
                (base, len as u64)
            }
        };
        let bytes = headers.memory.bytes(tag_slot);
        let words = [header, HEADERS as u64, payload.0, payload.1];
        for (place, word) in bytes[VECTORS_AT..].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        let addr = headers.memory.address(tag_slot, VECTORS_AT, size_of_val(&words));
        headers.memory.lend(tag_slot);
        let (file, queue) = (headers.file, u64::from(headers.queue));
        let user_data = at(KIND_FUSE, lane, u32::from(tag));
        let sqe = Sqe { addr, len: 2, user_data, ..command(file, CMD_REGISTER) };
        self.queues.push_wide(sqe, rest([queue, u64::from(slot), 0]));
    }

    /// Commits the answer that stands in the entry's headers, with `len` bytes of payload, and
    /// fetches the next request. `buffer` is what was taken of the pool for it.
    pub fn fuse_commit(&mut self, (lane, tag): (u16, u16), id: u64, len: u32, buffer: Option<u16>) {
        let (headers, arena) = self.headers(lane);
        let slot = usize::from(tag);
        headers.memory.bytes(slot)[PAYLOAD_LEN_AT..][..4].copy_from_slice(&len.to_ne_bytes());
        headers.memory.lend(slot);
        match headers.payload {
            FusePayload::Own => arena.lend(slot),
            FusePayload::Pool => {
                if let Some(buffer) = buffer {
                    arena.lend(usize::from(buffer));
                }
            }
        }
        let (file, queue) = (headers.file, u64::from(headers.queue));
        let user_data = at(KIND_FUSE, lane, u32::from(tag));
        // The second word of the payload lies in the first half.
        let sqe = Sqe { user_data, pad: id, ..command(file, CMD_COMMIT_AND_FETCH) };
        self.queues.push_wide(sqe, rest([queue, 0, 0]));
    }

    /// A command of an entry came back.
    pub(super) fn fuse_completed(&mut self, lane: u16, index: u32) {
        let (headers, arena) = self.headers(lane);
        headers.memory.give_back(tag_of(index));
        if headers.payload == FusePayload::Own {
            arena.give_back(tag_of(index));
        }
    }

    /// An entry's headers: what has come, and where the answer's goes.
    ///
    /// # Panics
    /// If the kernel has them.
    pub fn fuse_headers(&mut self, lane: u16, tag: u16) -> &mut [u8] {
        &mut self.headers(lane).0.memory.bytes(usize::from(tag))[..HEADERS]
    }

    /// What an entry that has come says of its payload.
    ///
    /// # Panics
    /// If the kernel has it.
    pub fn fuse_entry(&mut self, lane: u16, tag: u16) -> FuseEntry {
        let bytes = self.fuse_headers(lane, tag);
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        FuseEntry {
            len: word(PAYLOAD_LEN_AT),
            place: word(PAYLOAD_PLACE_AT),
            in_slot: bytes[IN_SLOT_AT] & 1 != 0,
        }
    }

    /// Takes the payload buffer that the kernel has named with a request. It is the request's until
    /// its commit.
    ///
    /// # Panics
    /// If there is no buffer at that place, or another request has it.
    pub fn fuse_take(&mut self, lane: u16, place: u32) -> u16 {
        let (headers, arena) = self.headers(lane);
        let stride = arena.room();
        let buffer = place as usize / stride;
        let is_one = (place as usize).is_multiple_of(stride) && buffer + 1 < headers.memory.slots();
        assert!(is_one && arena.lent(buffer) == 1, "no free payload buffer at {place}");
        arena.give_back(buffer);
        u16::try_from(buffer).unwrap_or(u16::MAX)
    }
}

fn at(kind: u64, lane: u16, index: u32) -> u64 {
    kind | u64::from(lane) << 32 | u64::from(index)
}

fn command(file: FileId, op: u64) -> Sqe {
    let fd = i32::from(file.0);
    Sqe { opcode: OP_URING_CMD, fd, flags: SQE_FIXED_FILE, off: op, ..Sqe::default() }
}

/// The second half of an entry: what of the command's payload lies there.
fn rest(words: [u64; 3]) -> [u64; 8] {
    let mut rest = [0; 8];
    rest[..3].copy_from_slice(&words);
    rest
}
