//! Answers for how a ring comes to be: io_uring_setup, its two mappings, and what is registered
//! with it (include/uapi/linux/io_uring.h, Linux 7.3; every value is stable).

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::uapi::Sqe;

const SETUP_CQSIZE: u32 = 1 << 3;
const SETUP_CLAMP: u32 = 1 << 4;
const SETUP_SUBMIT_ALL: u32 = 1 << 7;
const SETUP_COOP_TASKRUN: u32 = 1 << 8;
const SETUP_SQE128: u32 = 1 << 10;
const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
const SETUP_NO_SQARRAY: u32 = 1 << 16;

/// Sets of flags, best first: since 6.6, 6.1, 5.18, ever.
pub(crate) const FLAG_SETS: [u32; 4] = [
    BASE | SETUP_SUBMIT_ALL | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_NO_SQARRAY,
    BASE | SETUP_SUBMIT_ALL | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN,
    BASE | SETUP_SUBMIT_ALL,
    BASE,
];
/// For requests that come one at a time (since 6.6). A thread that has nothing else to do is woken
/// with fewer steps so than with `DEFER_TASKRUN`.
pub(crate) const LOW_DEPTH_FLAGS: u32 =
    BASE | SETUP_SUBMIT_ALL | SETUP_SINGLE_ISSUER | SETUP_COOP_TASKRUN | SETUP_NO_SQARRAY;
/// For a ring that shares its thread, where the eventfd of one with `DEFER_TASKRUN` does not ring
/// (since 6.0).
pub(crate) const OWN_BELL_FLAGS: u32 =
    BASE | SETUP_SUBMIT_ALL | SETUP_SINGLE_ISSUER | SETUP_COOP_TASKRUN;
const BASE: u32 = SETUP_CQSIZE | SETUP_CLAMP;

/// The one set for a ring of 128-byte entries, whose commands touch memory of ours only while this
/// task is in the kernel (6.6; what needs it is younger).
pub(crate) const WIDE_FLAGS: u32 = FLAG_SETS[0] | SETUP_SQE128;

/// Both rings lie in one mapping (since 5.4).
const FEATURE_SINGLE_MMAP: u32 = 1;
/// Whether a thread may wait without being counted as one that waits for a disk (since 6.15).
const FEATURE_NO_IOWAIT: u32 = 1 << 17;
const OFFSET_RINGS: u64 = 0;
const OFFSET_ENTRIES: u64 = 0x1000_0000;

const UNREGISTER_FILES: u32 = 3;
const REGISTER_EVENTFD: u32 = 4;
const REGISTER_FILES_UPDATE: u32 = 6;
const REGISTER_FILES2: u32 = 13;
/// `IORING_REGISTER_BUFFERS_UPDATE` (since 5.13).
const REGISTER_BUFFERS_UPDATE: u32 = 16;
const REGISTER_BUFFERS2: u32 = 15;
const REGISTER_RING_FDS: u32 = 20;
const UNREGISTER_RING_FDS: u32 = 21;
const REGISTER_PBUF_RING: u32 = 22;
/// `IORING_RSRC_REGISTER_SPARSE`.
const SPARSE: u32 = 1;

/// `struct io_sqring_offsets`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SubmissionOffsets {
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) ring_mask: u32,
    pub(crate) ring_entries: u32,
    pub(crate) flags: u32,
    pub(crate) dropped: u32,
    pub(crate) array: u32,
    resv: u32,
    user_addr: u64,
}

/// `struct io_cqring_offsets`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CompletionOffsets {
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) ring_mask: u32,
    pub(crate) ring_entries: u32,
    pub(crate) overflow: u32,
    pub(crate) cqes: u32,
    pub(crate) flags: u32,
    resv: u32,
    user_addr: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Params {
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    pub(crate) sq: SubmissionOffsets,
    pub(crate) cq: CompletionOffsets,
}

const _: () = assert!(size_of::<Params>() == 120 && std::mem::offset_of!(Params, cq) == 80);

impl Params {
    /// Whether the kernel reads the submission queue through an array of indexes.
    pub(crate) fn has_array(&self) -> bool {
        self.flags & SETUP_NO_SQARRAY == 0
    }

    /// Whether `ENTER_NO_IOWAIT` is known.
    pub(crate) fn can_wait_quietly(&self) -> bool {
        self.features & FEATURE_NO_IOWAIT != 0
    }

    /// Whether an entry takes two places of 64 bytes.
    pub(crate) fn is_wide(&self) -> bool {
        self.flags & SETUP_SQE128 != 0
    }
}

/// `struct io_uring_cqe`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cqe {
    pub(crate) user_data: u64,
    pub(crate) result: i32,
    pub(crate) flags: u32,
}

/// Memory that is shared with the kernel.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    fn new(fd: &OwnedFd, bytes: usize, offset: u64) -> io::Result<Mapping> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        let flags = flags | MapFlags::POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; this value alone owns it.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, prot, flags, fd.as_fd(), offset) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        let mapping = Mapping { base, bytes };
        // A child of a fork has no business here.
        // SAFETY: exactly the mapping made above; the advice changes no contents.
        unsafe { madvise(base.as_ptr().cast(), bytes, Advice::LinuxDontFork) }?;
        Ok(mapping)
    }

    /// Where `count` values of a type begin, `offset` bytes into the mapping.
    ///
    /// # Panics
    /// If they do not lie within the mapping, aligned.
    pub(crate) fn at<T>(&self, offset: u32, count: u32) -> NonNull<T> {
        let (offset, count) = (offset as usize, count as usize);
        let end = count.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(offset));
        assert!(
            end.is_some_and(|end| end <= self.bytes) && offset.is_multiple_of(align_of::<T>()),
            "io_uring's tables end where the kernel says that one begins"
        );
        // SAFETY: within the mapping, as just asserted.
        unsafe { self.base.add(offset) }.cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping, of exactly this size; whoever has pointers from `at`
        // keeps them no longer than this value. A failure would leave it mapped, which is harmless.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// A ring as the kernel made it, its tables within reach.
pub(crate) struct Made {
    pub(crate) rings: Mapping,
    pub(crate) entries: Mapping,
    pub(crate) params: Params,
    pub(crate) fd: OwnedFd,
}

/// Makes a ring.
pub(crate) fn make(entries: u32, completions: u32, flags: u32) -> io::Result<Made> {
    let mut params = Params { flags, cq_entries: completions, ..Params::default() };
    // SAFETY: `params` is a live `struct io_uring_params` (size asserted above), which the kernel
    // reads and fills before the call returns.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, &raw mut params) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the call has just made this descriptor; nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if params.features & FEATURE_SINGLE_MMAP == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let bytes = |count: u32, size: usize, offset: u32| count as usize * size + offset as usize;
    let completions = bytes(params.cq_entries, size_of::<Cqe>(), params.cq.cqes);
    let array = if params.has_array() { bytes(params.sq_entries, 4, params.sq.array) } else { 0 };
    let rings = Mapping::new(&fd, completions.max(array), OFFSET_RINGS)?;
    let entries = bytes(params.sq_entries, size_of::<Sqe>() << u8::from(params.is_wide()), 0);
    let entries = Mapping::new(&fd, entries, OFFSET_ENTRIES)?;
    Ok(Made { rings, entries, params, fd })
}

/// io_uring_register with one argument that the kernel reads, and may write.
fn register<T>(fd: RawFd, what: u32, argument: &mut T, count: u32) -> io::Result<i32> {
    let argument = std::ptr::from_mut(argument);
    // SAFETY: the argument is a live value of the kind that `what` takes (each caller's affair),
    // and the kernel is done with it on return.
    let done = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, what, argument, count) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(done).unwrap_or(0)) }
}

/// `struct io_uring_rsrc_register`.
#[repr(C)]
struct Table {
    count: u32,
    flags: u32,
    resv: u64,
    data: u64,
    tags: u64,
}

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct Update {
    offset: u32,
    resv: u32,
    data: u64,
}

fn register_table(fd: &OwnedFd, what: u32, count: u32) -> io::Result<()> {
    let mut table = Table { count, flags: SPARSE, resv: 0, data: 0, tags: 0 };
    let size = u32::try_from(size_of::<Table>()).unwrap_or(0);
    register(fd.as_raw_fd(), what, &mut table, size).map(drop)
}

/// Makes a table of registered buffers, all empty.
pub(crate) fn make_buffer_table(fd: &OwnedFd, count: u32) -> io::Result<()> {
    register_table(fd, REGISTER_BUFFERS2, count)
}

/// Makes a table of registered files, all empty.
pub(crate) fn make_file_table(fd: &OwnedFd, count: u32) -> io::Result<()> {
    register_table(fd, REGISTER_FILES2, count)
}

/// Puts a file into its place of the table.
pub(crate) fn put_file(fd: &OwnedFd, place: u32, file: RawFd) -> io::Result<()> {
    let files = [file];
    let mut update = Update { offset: place, resv: 0, data: files.as_ptr() as u64 };
    register(fd.as_raw_fd(), REGISTER_FILES_UPDATE, &mut update, 1).map(drop)
}

/// Puts memory, its address and length, into a place of the table of registered buffers. It must
/// outlive the table.
pub(crate) fn put_buffer(fd: &OwnedFd, place: u32, memory: (u64, u64)) -> io::Result<()> {
    /// `struct io_uring_rsrc_update2`.
    #[repr(C)]
    struct Update2 {
        offset: u32,
        resv: u32,
        data: u64,
        tags: u64,
        count: u32,
        resv2: u32,
    }
    let iovec = [memory.0, memory.1];
    let data = iovec.as_ptr() as u64;
    let mut update = Update2 { offset: place, resv: 0, data, tags: 0, count: 1, resv2: 0 };
    let size = u32::try_from(size_of::<Update2>()).unwrap_or(0);
    register(fd.as_raw_fd(), REGISTER_BUFFERS_UPDATE, &mut update, size).map(drop)
}

/// Lets entries of `group` take buffers from a ring of `entries` (a power of two) at `address`. It
/// must outlive the entries that do so.
pub(crate) fn put_buffer_ring(
    fd: &OwnedFd,
    group: u16,
    (address, entries): (u64, u32),
) -> io::Result<()> {
    /// `struct io_uring_buf_reg`.
    #[repr(C)]
    struct BufferRing {
        address: u64,
        entries: u32,
        group: u16,
        flags: u16,
        resv: [u64; 3],
    }
    let mut ring = BufferRing { address, entries, group, flags: 0, resv: [0; 3] };
    register(fd.as_raw_fd(), REGISTER_PBUF_RING, &mut ring, 1).map(drop)
}

/// Lets all registered files go.
pub(crate) fn drop_file_table(fd: &OwnedFd) {
    // SAFETY: takes no argument. There may be no table, which is as good.
    let _ = unsafe {
        libc::syscall(libc::SYS_io_uring_register, fd.as_raw_fd(), UNREGISTER_FILES, 0_usize, 0)
    };
}

/// Registers the ring with its task, which saves a look-up in each call (since 5.18); its index.
pub(crate) fn register_with_task(fd: &OwnedFd) -> Option<i32> {
    let data = u64::try_from(fd.as_raw_fd()).ok()?;
    let mut update = Update { offset: u32::MAX, resv: 0, data };
    let done = register(fd.as_raw_fd(), REGISTER_RING_FDS, &mut update, 1).ok()?;
    (done == 1).then(|| i32::try_from(update.offset).ok())?
}

/// Takes that back.
pub(crate) fn leave_task(fd: &OwnedFd, index: i32) {
    let mut update = Update { offset: u32::try_from(index).unwrap_or(0), resv: 0, data: 0 };
    // What could fail is that it is not there, which is as good.
    let _ = register(fd.as_raw_fd(), UNREGISTER_RING_FDS, &mut update, 1);
}

/// Has completions ring an eventfd.
pub(crate) fn put_bell(fd: &OwnedFd, bell: &OwnedFd) -> io::Result<()> {
    let mut bell = bell.as_raw_fd();
    register(fd.as_raw_fd(), REGISTER_EVENTFD, &mut bell, 1).map(drop)
}
