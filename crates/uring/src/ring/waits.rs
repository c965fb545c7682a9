//! Answers for waits of exports: until a file is readable, or no longer.

use std::os::fd::{AsRawFd, BorrowedFd};

use devsplice_engine::FileId;

use super::{KIND_EXPORT, KIND_EXPORT_LENT, Uring};
use crate::uapi::{OP_ASYNC_CANCEL, OP_POLL_ADD, SQE_FIXED_FILE, Sqe};

impl Uring {
    /// Waits until `file` is readable, once.
    pub fn poll(&mut self, place: (u16, u32), file: FileId) {
        self.poll_for(place, file, libc::POLLIN);
    }

    /// Waits until there is room for more in `file`, a socket, or nobody is at its other end; once.
    pub fn poll_room(&mut self, place: (u16, u32), file: FileId) {
        self.poll_for(place, file, libc::POLLOUT);
    }

    fn poll_for(&mut self, (lane, index): (u16, u32), file: FileId, events: libc::c_short) {
        self.queues.push(Sqe {
            opcode: OP_POLL_ADD,
            fd: i32::from(file.0),
            flags: SQE_FIXED_FILE,
            op_flags: u32::try_from(events).unwrap_or(1),
            user_data: KIND_EXPORT | u64::from(lane) << 32 | u64::from(index),
            ..Sqe::default()
        });
    }

    /// Waits until the other end of the socket `file` sends nothing more, whether or not there is
    /// something left to be received; once.
    pub fn poll_end(&mut self, (lane, index): (u16, u32), file: FileId) {
        self.queues.push(Sqe {
            opcode: OP_POLL_ADD,
            fd: i32::from(file.0),
            flags: SQE_FIXED_FILE,
            op_flags: u32::try_from(libc::POLLRDHUP).unwrap_or(0),
            user_data: KIND_EXPORT | u64::from(lane) << 32 | u64::from(index),
            ..Sqe::default()
        });
    }

    /// As [`Uring::poll`], of a file that is not among the ring's: such a wait may be left alone
    /// when the ring goes. The file must be open as long as the ring.
    pub fn poll_other(&mut self, (lane, index): (u16, u32), file: BorrowedFd<'_>) {
        self.queues.push(Sqe {
            opcode: OP_POLL_ADD,
            fd: file.as_raw_fd(),
            op_flags: u32::try_from(libc::POLLIN).unwrap_or(1),
            user_data: KIND_EXPORT | u64::from(lane) << 32 | u64::from(index),
            ..Sqe::default()
        });
    }

    /// As [`Uring::cancel`], for a [`Uring::poll`].
    pub fn cancel_poll(&mut self, (lane, index): (u16, u32), which: u32) {
        self.queues.push(Sqe {
            opcode: OP_ASYNC_CANCEL,
            fd: -1,
            addr: KIND_EXPORT | u64::from(lane) << 32 | u64::from(which),
            user_data: KIND_EXPORT | u64::from(lane) << 32 | u64::from(index),
            ..Sqe::default()
        });
    }

    /// Asks for an early end of the lane's [`Uring::read`] or [`Uring::write`] with the index
    /// `which`. It completes once in any case: with `ECANCELED` if this was in time.
    pub fn cancel(&mut self, (lane, index): (u16, u32), which: u32) {
        self.queues.push(Sqe {
            opcode: OP_ASYNC_CANCEL,
            fd: -1,
            addr: KIND_EXPORT_LENT | u64::from(lane) << 32 | u64::from(which),
            user_data: KIND_EXPORT | u64::from(lane) << 32 | u64::from(index),
            ..Sqe::default()
        });
    }
}
