//! Answers for what a block device can only be asked by an ioctl (include/uapi/linux/fs.h). They
//! block; never on an I/O thread.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `_IO(0x12, 119)`.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Discards `len` bytes at `at` of a block device.
///
/// # Errors
/// As the kernel says; `EOPNOTSUPP` if the device does not discard.
pub fn discard(device: BorrowedFd<'_>, at: u64, len: u64) -> io::Result<()> {
    let range = [at, len];
    // SAFETY: the command reads the sixteen bytes of `range` during the call alone; on a file that
    // is no block device it is unknown.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
