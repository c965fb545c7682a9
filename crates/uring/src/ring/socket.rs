//! Answers for sockets of exports: receiving into a tag's memory, and sending what lies in the
//! memory of many tags with one entry.
//!
//! Only one send of a lane is out at a time. Two that the kernel cannot finish at once could each
//! send a part of theirs in turn, and the peer would read a mixture.

use devsplice_core::{Error, Result};
use devsplice_engine::FileId;

use super::{KIND_EXPORT_LENT, KIND_SENT, Uring, tag_of};
use crate::files::{RingFile, Slot};
use crate::ktls::send_flags;
use crate::setup;
use crate::splice::IoVec;
use crate::uapi::{
    MSG_WAITALL, OP_RECV, OP_SEND, OP_SENDMSG, RECVSEND_POLL_FIRST, SQE_FIXED_FILE, Sqe,
};
use std::os::fd::AsRawFd;

/// Most ranges of memory in one send.
pub const MAX_OUTGOING: usize = 128;

/// A range of a tag's memory that is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outgoing {
    /// The tag.
    pub tag: u16,
    /// First byte, counted from the start of its memory.
    pub at: u32,
    /// Bytes.
    pub len: u32,
    /// They end with what was read, which may have been left in its file
    /// ([`Uring::lend_files`]).
    pub is_read: bool,
}

/// How a receive waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// For some bytes, which are not expected to be there yet.
    First,
    /// For some bytes, which may well be there.
    Some,
    /// For all of them.
    All,
}

/// `struct msghdr`.
#[repr(C)]
#[derive(Default)]
pub(super) struct MessageHeader {
    name: u64,
    name_len: u64,
    pub(super) vector: u64,
    pub(super) vector_len: u64,
    control: u64,
    control_len: u64,
    flags: u64,
}

const _: () = assert!(size_of::<MessageHeader>() == size_of::<libc::msghdr>());

/// What is kept of a lane's send until its completion.
pub(super) struct Message {
    header: MessageHeader,
    vector: [IoVec; MAX_OUTGOING],
    tags: [u16; MAX_OUTGOING],
    count: usize,
}

impl Message {
    pub(super) fn new() -> Box<Message> {
        Box::new(Message {
            header: MessageHeader::default(),
            vector: [IoVec::default(); MAX_OUTGOING],
            tags: [0; MAX_OUTGOING],
            count: 0,
        })
    }
}

impl Uring {
    /// Has `id` stand for another file from now on. No entry that names it is out.
    ///
    /// # Errors
    /// If the kernel refuses the file.
    pub fn replace_file(&mut self, id: FileId, file: RingFile) -> Result<()> {
        setup::put_file(&self.queues.fd, u32::from(id.0), file.fd.as_raw_fd())
            .map_err(|error| Error::os("registering a socket with io_uring", &error))?;
        self.files[usize::from(id.0)] = Slot::new(file);
        Ok(())
    }

    /// Receives into bytes `at..at + len` of a tag's memory. The completion's index is `index`,
    /// whose low half must be the tag.
    pub fn receive(
        &mut self,
        (lane, index): (u16, u32),
        socket: FileId,
        (at, len): (usize, usize),
        wait: Wait,
    ) {
        let tag = tag_of(index);
        let arena = self.arena(lane);
        let addr = arena.address(tag, at, len);
        arena.lend(tag);
        self.queues.push(Sqe {
            opcode: OP_RECV,
            fd: i32::from(socket.0),
            flags: SQE_FIXED_FILE,
            ioprio: if wait == Wait::First { RECVSEND_POLL_FIRST } else { 0 },
            addr,
            len: u32::try_from(len).unwrap_or(u32::MAX),
            op_flags: if wait == Wait::All { MSG_WAITALL } else { 0 },
            user_data: KIND_EXPORT_LENT | u64::from(lane) << 32 | u64::from(index),
            ..Sqe::default()
        });
    }

    /// Sends ranges of the memory of a lane's tags, in this order. The completion says how many
    /// bytes went; the memory is the kernel's until then. Where the kernel does the socket's TLS it
    /// does not wait for room for all of them: that cannot be asked there.
    ///
    /// # Panics
    /// If a send of the lane is out, or there are no ranges, or more than [`MAX_OUTGOING`].
    pub fn send_parts(
        &mut self,
        (lane, index): (u16, u32),
        socket: FileId,
        parts: &[Outgoing],
        is_sealed: bool,
    ) {
        let place = usize::from(lane);
        assert!((1..=MAX_OUTGOING).contains(&parts.len()), "{} ranges in a send", parts.len());
        let Some(count) = self.send_lent((lane, index), socket, parts) else { return };
        let parts = &parts[..count];
        let Some(arena) = &mut self.arenas[place] else { panic!("lane {lane} has no memory") };
        let message = self.messages[place].get_or_insert_with(Message::new);
        assert_eq!(message.count, 0, "a send of lane {lane} is out");
        message.count = parts.len();
        for (at, part) in parts.iter().enumerate() {
            let slot = usize::from(part.tag);
            let base = arena.address(slot, part.at as usize, part.len as usize);
            arena.lend(slot);
            message.tags[at] = part.tag;
            message.vector[at] = IoVec { base, len: u64::from(part.len) };
        }
        let mut sqe = Sqe {
            opcode: OP_SEND,
            fd: i32::from(socket.0),
            flags: SQE_FIXED_FILE,
            op_flags: send_flags(is_sealed),
            user_data: KIND_SENT | u64::from(lane) << 32 | u64::from(index),
            ..Sqe::default()
        };
        if let [part] = parts {
            (sqe.addr, sqe.len) = (message.vector[0].base, part.len);
        } else {
            message.header.vector = message.vector.as_ptr() as u64;
            message.header.vector_len = parts.len() as u64;
            sqe.opcode = OP_SENDMSG;
            (sqe.addr, sqe.len) = (std::ptr::from_ref(&message.header) as u64, 1);
        }
        self.queues.push(sqe);
    }

    /// A send is over: its memory is the lane's again.
    pub(super) fn sent(&mut self, lane: u16) {
        let place = usize::from(lane);
        if let (Some(message), Some(arena)) = (&mut self.messages[place], &mut self.arenas[place]) {
            for tag in &message.tags[..std::mem::take(&mut message.count)] {
                arena.give_back(usize::from(*tag));
            }
        }
    }

    /// Copies `len` bytes from the memory of one tag to that of another: each is a tag and where
    /// in its memory.
    ///
    /// # Panics
    /// If they are the same tag, or a range leaves its memory, or an entry names one of them.
    pub fn copy_memory(&mut self, lane: u16, from: (u16, usize), to: (u16, usize), len: usize) {
        let place = |(tag, at): (u16, usize)| (usize::from(tag), at);
        self.arena(lane).copy(place(from), place(to), len);
    }
}
