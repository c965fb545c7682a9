//! Answers for a queue's request descriptors, which the kernel shares read-only.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use devsplice_core::{Error, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::extra::Part;
use super::uapi::IoDesc;

const PAGE: usize = 4096;
/// `UBLK_MAX_QUEUE_DEPTH`, the distance between queues in descriptors.
const MAX_DEPTH: usize = 4096;

/// The descriptors of one queue.
pub(crate) struct Descriptors {
    base: NonNull<IoDesc>,
    depth: usize,
    /// Bytes from the base to the first that is ours, a multiple of 8.
    first: usize,
    /// Bytes from one to the next: at least one's size, and a multiple of 8.
    each: usize,
    bytes: usize,
}

// SAFETY: the mapping is read-only and belongs to this value alone; moving it to another thread of
// the process changes nothing.
unsafe impl Send for Descriptors {}

impl Descriptors {
    /// Maps the descriptors of `queue` from the character device, of which there are `depth`, each
    /// `each` bytes after the one before it, and `part` are read here, by their places in it.
    pub(crate) fn map(
        file: BorrowedFd<'_>,
        queue: u16,
        (depth, each): (u16, usize),
        part: Part,
    ) -> Result<Descriptors> {
        assert!(each >= size_of::<IoDesc>() && each % align_of::<IoDesc>() == 0, "{each} bytes");
        let stride = (MAX_DEPTH * each).next_multiple_of(PAGE);
        let bytes = (usize::from(depth) * each).next_multiple_of(PAGE);
        let offset = (usize::from(queue) * stride) as u64;
        let (prot, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a fresh mapping at an address of the kernel's choice; this value alone owns it.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, prot, flags, file, offset) }
            .map_err(|errno| Error::os("ublk descriptors", &errno.into()))?;
        let base = NonNull::new(base.cast())
            .ok_or_else(|| Error::invalid("ublk descriptors", "mapped at address 0"))?;
        // The last one read is at `part.tag(depth - 1)`, which is below the queue's depth.
        let (depth, first) = (usize::from(part.depth(depth)), usize::from(part.first) * each);
        Ok(Descriptors { base, depth, first, each: usize::from(part.step) * each, bytes })
    }

    /// A copy of a tag's descriptor. It is the request's from the completion of its fetch to its
    /// commit; the kernel writes it before it completes the fetch.
    #[inline]
    pub(crate) fn read(&self, tag: u16) -> IoDesc {
        let tag = usize::from(tag);
        if tag >= self.depth {
            no_tag(tag, self.depth);
        }
        // SAFETY: below the part's depth, so below the queue's, for which the mapping has room.
        let at = unsafe { self.base.as_ptr().byte_add(self.first + tag * self.each) };
        // SAFETY: aligned (`map` took multiples of 8 alone, the base is a page), mapped with all of
        // its bytes (each is at least as large), plain data; volatile because the kernel writes it
        // between commits.
        unsafe { at.read_volatile() }
    }
}

/// A file that others have mapped, too: memory that a client's requests may come from.
pub(crate) struct SharedFile {
    base: NonNull<std::ffi::c_void>,
    bytes: usize,
}

// SAFETY: nothing is ever read or written through the mapping, so it makes no difference which
// thread has it.
unsafe impl Send for SharedFile {}

impl SharedFile {
    /// Maps the first `bytes` of a file.
    pub(crate) fn map(file: BorrowedFd<'_>, bytes: usize, writable: bool) -> Result<SharedFile> {
        let write = if writable { ProtFlags::WRITE } else { ProtFlags::empty() };
        let (prot, flags) = (ProtFlags::READ | write, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a fresh mapping at an address of the kernel's choice; this value alone owns it.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, prot, flags, file, 0) }
            .map_err(|errno| Error::os("memory shared with clients", &errno.into()))?;
        let base = NonNull::new(base)
            .ok_or_else(|| Error::invalid("memory shared with clients", "mapped at address 0"))?;
        Ok(SharedFile { base, bytes })
    }

    /// Its address and size, for the kernel.
    pub(crate) fn place(&self) -> (u64, u64) {
        (self.base.as_ptr() as u64, self.bytes as u64)
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping, of exactly this size, through which nobody has a
        // reference. What the kernel has pinned stays, mapped or not.
        let _ = unsafe { munmap(self.base.as_ptr(), self.bytes) };
    }
}

#[cold]
#[inline(never)]
fn no_tag(tag: usize, depth: usize) -> ! {
    panic!("tag {tag} of {depth}")
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping, of exactly this size; `read` hands out copies only.
        // A failure would leave it mapped, which harms nothing.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
