//! Answers for what a ring does for live layers: being woken by other threads, time, and the memory
//! of the inner lanes.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use devsplice_engine::Wake;
use rustix::event::{EventfdFlags, eventfd};

use crate::ring::{KIND_WAKE, Uring};
use crate::uapi::{OP_POLL_ADD, Sqe};

impl Uring {
    /// What wakes this ring from another thread. Without a descriptor to be had it wakes nothing,
    /// and slow work goes on with the next event.
    pub(crate) fn make_wake(&mut self) -> Wake {
        let Ok(fd) = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK) else {
            return Arc::new(|| {});
        };
        let fd: Arc<OwnedFd> = Arc::new(fd);
        self.bell = Some(fd.clone());
        self.await_call();
        Arc::new(move || {
            // It can only fail when it was rung 2^64 - 2 times and nobody listened.
            let _ = rustix::io::write(&fd, &1_u64.to_ne_bytes());
        })
    }

    /// Asks to hear of the next call.
    fn await_call(&mut self) {
        let Some(bell) = &self.bell else { return };
        self.queues.push(Sqe {
            opcode: OP_POLL_ADD,
            fd: bell.as_raw_fd(),
            op_flags: u32::try_from(libc::POLLIN).unwrap_or(1),
            user_data: KIND_WAKE,
            ..Sqe::default()
        });
    }

    /// Somebody has called.
    pub(crate) fn woken(&mut self) {
        if let Some(bell) = &self.bell {
            // Does not block; what was written since is heard of once.
            let _ = rustix::io::read(bell, &mut [0; 8]);
        }
        self.await_call();
    }
}
