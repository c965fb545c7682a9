//! Answers for loop devices and /dev/fuse clones: the few ioctls, each with its own plain types
//! (include/uapi/linux/loop.h, include/uapi/linux/fuse.h).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `LO_FLAGS_READ_ONLY`.
pub const READ_ONLY: u32 = 1;
/// `LO_FLAGS_PARTSCAN`.
pub const PART_SCAN: u32 = 8;
/// `LO_FLAGS_DIRECT_IO`.
pub const DIRECT_IO: u32 = 16;
/// Bytes of a loop device's name, the closing zero included.
pub const NAME_LEN: usize = 64;

const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
/// `_IO(0x12, 93)` (include/uapi/linux/fs.h).
const BLKROSET: libc::c_ulong = 0x125d;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
/// `_IOR(229, 0, uint32_t)`.
const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_LEN],
    crypt_name: [u8; NAME_LEN],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

impl Info {
    const EMPTY: Info = Info {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; NAME_LEN],
        crypt_name: [0; NAME_LEN],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

fn done(result: libc::c_int) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The number of a loop device that nobody uses at this moment; makes one if there is none.
///
/// # Errors
/// As the kernel says.
pub fn free(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: the command takes no argument and touches no memory of ours.
    done(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })
}

/// Puts `file` under a loop device in one step. `name` is cut to what the kernel keeps.
///
/// # Errors
/// As the kernel says; `EBUSY` if the device is in use.
pub fn configure(
    device: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    block: u32,
    flags: u32,
    name: &str,
) -> io::Result<()> {
    let fd = u32::try_from(file.as_raw_fd()).unwrap_or(u32::MAX);
    let mut info = Info { flags, ..Info::EMPTY };
    let len = name.len().min(NAME_LEN - 1);
    info.file_name[..len].copy_from_slice(&name.as_bytes()[..len]);
    let config = Config { fd, block_size: block, info, reserved: [0; 8] };
    // SAFETY: `config` is a live `struct loop_config` (size asserted above), read during the call
    // alone; on a file that is no loop device the command is unknown.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) })?;
    Ok(())
}

/// Takes the file away from a loop device: at once, or when the last one who has it open closes it.
///
/// # Errors
/// As the kernel says; `ENXIO` if there is no file.
pub fn clear(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the command takes no argument and touches no memory of ours.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) })?;
    Ok(())
}

/// Lets a block device be written to that `blockdev --setro` had closed.
///
/// # Errors
/// As the kernel says.
pub fn set_writable(device: BorrowedFd<'_>) -> io::Result<()> {
    let off: libc::c_int = 0;
    // SAFETY: the command reads the one number during the call alone.
    done(unsafe { libc::ioctl(device.as_raw_fd(), BLKROSET, &raw const off) })?;
    Ok(())
}

/// What a loop device says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The name that [`configure`] gave it.
    pub name: String,
    /// The minor number of what its file lies on; for FUSE, the connection's number.
    pub minor: u32,
}

/// What a loop device says of itself.
///
/// # Errors
/// As the kernel says; `ENXIO` if there is no file under it.
pub fn status(device: BorrowedFd<'_>) -> io::Result<Status> {
    let mut info = Info::EMPTY;
    // SAFETY: `info` is a live `struct loop_info64` (size asserted above), written during the call
    // alone; every bit pattern is valid for it.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
    let len = info.file_name.iter().position(|byte| *byte == 0).unwrap_or(NAME_LEN);
    let name = String::from_utf8_lossy(&info.file_name[..len]).into_owned();
    Ok(Status { name, minor: minor(info.device) })
}

/// The minor number in a device number as the kernel encodes it (include/linux/kdev_t.h,
/// `new_encode_dev`: 8 bits, then 12 of the major, then the rest).
fn minor(device: u64) -> u32 {
    let low = u32::try_from(device & 0xffff_ffff).unwrap_or(0);
    low & 0xff | low >> 12 & 0xfff00
}

/// Makes `new`, a fresh /dev/fuse, one more queue of the connection that `old` belongs to.
///
/// # Errors
/// As the kernel says.
pub fn clone_fuse(new: BorrowedFd<'_>, old: BorrowedFd<'_>) -> io::Result<()> {
    let old = u32::try_from(old.as_raw_fd()).unwrap_or(u32::MAX);
    // SAFETY: the command reads the four bytes of `old` during the call alone.
    done(unsafe { libc::ioctl(new.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const old) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_minor_number_is_taken_apart_as_the_kernel_put_it_together() {
        for (device, minor) in [(39, 39), (0x0010_0005, 0x105), (0x103, 3), (0xfff0_00ff, 0xfffff)]
        {
            assert_eq!(super::minor(device), minor, "{device:#x}");
        }
    }
}
