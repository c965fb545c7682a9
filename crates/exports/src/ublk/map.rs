//! Answers for a queue's request descriptors, which the kernel shares read-only.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use devsplice_core::{Error, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::uapi::IoDesc;

const PAGE: usize = 4096;
/// `UBLK_MAX_QUEUE_DEPTH`, the distance between queues in descriptors.
const MAX_DEPTH: usize = 4096;

/// The descriptors of one queue.
pub(crate) struct Descriptors {
    base: NonNull<IoDesc>,
    depth: usize,
    bytes: usize,
}

// SAFETY: the mapping is read-only and belongs to this value alone; moving it to another thread of
// the process changes nothing.
unsafe impl Send for Descriptors {}

impl Descriptors {
    /// Maps the descriptors of `queue` from the character device.
    pub(crate) fn map(file: BorrowedFd<'_>, queue: u16, depth: u16) -> Result<Descriptors> {
        let stride = (MAX_DEPTH * size_of::<IoDesc>()).next_multiple_of(PAGE);
        let bytes = (usize::from(depth) * size_of::<IoDesc>()).next_multiple_of(PAGE);
        let offset = (usize::from(queue) * stride) as u64;
        let (prot, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a fresh mapping at an address of the kernel's choice; this value alone owns it.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, prot, flags, file, offset) }
            .map_err(|errno| Error::os("ublk descriptors", &errno.into()))?;
        let base = NonNull::new(base.cast())
            .ok_or_else(|| Error::invalid("ublk descriptors", "mapped at address 0"))?;
        Ok(Descriptors { base, depth: usize::from(depth), bytes })
    }

    /// A copy of a tag's descriptor. It is the request's from the completion of its fetch to its
    /// commit; the kernel writes it before it completes the fetch.
    #[inline]
    pub(crate) fn read(&self, tag: u16) -> IoDesc {
        let tag = usize::from(tag);
        if tag >= self.depth {
            no_tag(tag, self.depth);
        }
        // SAFETY: below the depth, so inside the mapping, which is at least depth x 24 bytes.
        let at = unsafe { self.base.as_ptr().add(tag) };
        // SAFETY: aligned (24 is a multiple of 8, the base is a page), mapped, plain data; volatile
        // because the kernel writes it between commits.
        unsafe { at.read_volatile() }
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
