//! Answers for what this kernel's io_uring can do, found by asking it.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use devsplice_core::{Error, Result};
use io_uring::{IoUring, Probe, squeue};

use crate::arena::Arena;
use crate::setup;
use crate::submit::{Queues, unavailable};
use crate::uapi::{self, Sqe};

/// The name of the operation that resetting a zone needs.
pub const CUTTING: &str = "cutting files, for zones";

/// What is there.
#[derive(Clone, Debug)]
pub struct Features {
    /// Names of operations that this program can use, and whether they are there.
    pub operations: Vec<(&'static str, bool)>,
    /// `IORING_SETUP_DEFER_TASKRUN`, since 6.1.
    pub defer_taskrun: bool,
}

/// Asks the kernel.
///
/// # Errors
/// If there is no io_uring at all; names the switch or sandbox that is in the way.
pub fn features() -> Result<Features> {
    let ring = IoUring::new(2).map_err(|error| unavailable(&error))?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|error| unavailable(&error))?;
    let names = [
        ("read, write", uapi::OP_READ),
        ("read, write on slots", uapi::OP_READ_FIXED),
        ("vectored read, write on slots", uapi::OP_READV_FIXED),
        ("device commands", uapi::OP_URING_CMD),
        ("fallocate", uapi::OP_FALLOCATE),
        ("timeout", uapi::OP_TIMEOUT),
        (CUTTING, uapi::OP_FTRUNCATE),
    ];
    let operations = names.into_iter().map(|(name, op)| (name, probe.is_supported(op))).collect();
    let mut builder = IoUring::<squeue::Entry>::builder();
    builder.setup_single_issuer().setup_defer_taskrun();
    Ok(Features { operations, defer_taskrun: builder.build(2).is_ok() })
}

/// Whether plain sends and receives take a registered buffer, since Linux 7.2; before, only reads
/// and writes of a socket do. Tried once, which takes a socket.
pub fn sockets_take_slots() -> bool {
    static TAKE: OnceLock<bool> = OnceLock::new();
    *TAKE.get_or_init(|| try_slot().unwrap_or(false))
}

fn try_slot() -> Result<bool> {
    const LEN: usize = 4096;
    let os = |error: std::io::Error| Error::os("a socket to try", &error);
    let (one, _other) = UnixStream::pair().map_err(os)?;
    // It outlives the ring, whose table names it.
    let memory = Arena::new(1, LEN, false)?;
    let mut queues = Queues::new(2, 4)?;
    setup::make_buffer_table(&queues.fd, 1).map_err(os)?;
    let addr = memory.address(0, 0, LEN);
    setup::put_buffer(&queues.fd, 0, (addr, LEN as u64)).map_err(os)?;
    queues.push(Sqe {
        opcode: uapi::OP_SEND,
        fd: one.as_raw_fd(),
        ioprio: uapi::RECVSEND_FIXED_BUF,
        addr,
        len: 1,
        op_flags: uapi::MSG_NOSIGNAL,
        ..Sqe::default()
    });
    queues.enter(1).map_err(os)?;
    let sent = queues.next().is_some_and(|cqe| cqe.result == 1);
    drop(queues);
    Ok(sent)
}
