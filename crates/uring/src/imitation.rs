//! Answers for a kernel that does nothing: each entry becomes a no-op that reports success.
//!
//! With it the instructions of this process can be counted on any machine, without a device. It is
//! only built for that (feature `imitation`): a server that has it would lose every byte.

use devsplice_core::Errno;

use crate::ring::Uring;
use crate::uapi::{OP_NOP, OP_TIMEOUT, OP_URING_CMD, Sqe};

/// `IORING_NOP_INJECT_RESULT` (since 6.10).
const INJECT_RESULT: u32 = 1;

/// How the imitation ends.
#[derive(Default)]
pub(crate) struct Imitation {
    on: bool,
    /// Commands that still succeed; then the device is gone.
    commands: u64,
}

impl Imitation {
    /// Makes an entry do nothing, successfully.
    pub(crate) fn replace(&mut self, sqe: &mut Sqe) {
        if !self.on || sqe.opcode == OP_NOP || sqe.opcode == OP_TIMEOUT {
            return;
        }
        let mut len = sqe.len;
        if sqe.opcode == OP_URING_CMD {
            len = match self.commands.checked_sub(1) {
                Some(left) => {
                    self.commands = left;
                    0
                }
                None => (-Errno::ENODEV.raw()).cast_unsigned(),
            };
        }
        let user_data = sqe.user_data;
        *sqe = Sqe { opcode: OP_NOP, len, op_flags: INJECT_RESULT, user_data, ..Sqe::default() };
    }
}

impl Uring {
    /// From now on nothing is done and everything succeeds; after `commands` of them, commands fail
    /// with `ENODEV`.
    pub fn imitate(&mut self, commands: u64) {
        self.queues.imitation = Imitation { on: true, commands };
    }
}
