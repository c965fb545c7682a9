//! Answers for what an I/O thread must be before its ring exists: one that never waits for its own
//! device.

use devsplice_core::{Error, Result};

/// include/uapi/linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Marks the calling thread as one that memory reclaim must not wait on (`PR_SET_IO_FLUSHER`,
/// Linux 5.6): we sit below writeback. Threads and io_uring workers created later inherit it.
///
/// # Errors
/// Without CAP_SYS_RESOURCE. The thread works, but may dead-lock when memory runs out.
pub fn set_io_flusher() -> Result<()> {
    let (on, zero): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: this prctl takes plain numbers and touches no memory of ours.
    let done = unsafe { libc::prctl(PR_SET_IO_FLUSHER, on, zero, zero, zero) };
    if done == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Error::os("PR_SET_IO_FLUSHER", &error).next("run with CAP_SYS_RESOURCE"))
}
