//! Answers for what a ring does for live layers: being woken by other threads, time, and the memory
//! of the inner lanes.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use devsplice_engine::Wake;

use crate::bell::Bell;
use crate::ring::{KIND_WAKE, Uring};
use crate::uapi::{OP_POLL_ADD, Sqe};

impl Uring {
    /// What wakes this ring from another thread. Without a descriptor to be had it wakes nothing,
    /// and slow work goes on with the next event.
    pub(crate) fn make_wake(&mut self) -> Wake {
        let Ok(bell) = Bell::new() else { return Arc::new(|| {}) };
        let bell = Arc::new(bell);
        self.bell = Some(Arc::clone(&bell));
        self.await_call();
        Arc::new(move || bell.ring())
    }

    /// Asks to hear of the next call.
    fn await_call(&mut self) {
        let Some(bell) = &self.bell else { return };
        self.queues.push(Sqe {
            opcode: OP_POLL_ADD,
            fd: bell.ear().as_raw_fd(),
            op_flags: u32::try_from(libc::POLLIN).unwrap_or(1),
            user_data: KIND_WAKE,
            ..Sqe::default()
        });
    }

    /// Somebody has called.
    pub(crate) fn woken(&mut self) {
        if let Some(bell) = &self.bell {
            bell.heard();
        }
        self.await_call();
    }
}
