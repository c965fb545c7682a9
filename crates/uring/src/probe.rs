//! Answers for what this kernel's io_uring can do, found by asking it.

use devsplice_core::Result;
use io_uring::{IoUring, Probe, squeue};

use crate::submit::unavailable;
use crate::uapi;

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
