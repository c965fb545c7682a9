//! Answers for the ring's queues and the one call into the kernel: push, enter, next completion.

use std::os::fd::AsRawFd;

use devsplice_core::{Error, ErrorKind, Result};
use io_uring::{IoUring, cqueue, squeue};

use crate::uapi::{ENTER_GETEVENTS, ENTER_REGISTERED_RING, REGISTER_RING_FDS, Sqe};

/// The pair of queues with its counters.
pub(crate) struct Queues {
    pub(crate) ring: IoUring,
    /// What `io_uring_enter` is told: the descriptor, or its index among the task's registered
    /// ones.
    enter_fd: i32,
    enter_flags: u32,
    pub(crate) sqes: u64,
    pub(crate) enters: u64,
}

impl Queues {
    /// A ring for the calling thread, with the best set of flags that the kernel takes.
    pub(crate) fn new(entries: u32, completions: u32) -> Result<Queues> {
        let mut last = None;
        for level in 0..4 {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(completions).setup_clamp().dontfork();
            if level < 3 {
                builder.setup_submit_all(); // 5.18
            }
            if level < 2 {
                builder.setup_single_issuer().setup_defer_taskrun(); // 6.1
            }
            if level < 1 {
                builder.setup_no_sqarray(); // 6.6
            }
            match builder.build(entries) {
                Ok(ring) => return Ok(Queues::with(ring)),
                Err(error) => last = Some(error),
            }
        }
        let error = last.unwrap_or_else(|| std::io::ErrorKind::Unsupported.into());
        Err(unavailable(&error))
    }

    fn with(ring: IoUring) -> Queues {
        let raw = ring.as_raw_fd();
        let mut queues =
            Queues { ring, enter_fd: raw, enter_flags: ENTER_GETEVENTS, sqes: 0, enters: 0 };
        #[repr(C)]
        struct Update {
            offset: u32,
            resv: u32,
            data: u64,
        }
        let data = u64::try_from(raw).unwrap_or(0);
        let mut update = Update { offset: u32::MAX, resv: 0, data };
        // SAFETY: `update` is a live `io_uring_rsrc_update`, the one element that the call is told
        // of; the kernel is done with it on return. Without the feature (before 5.18) it fails.
        let done = unsafe {
            let update = std::ptr::from_mut(&mut update);
            libc::syscall(libc::SYS_io_uring_register, raw, REGISTER_RING_FDS, update, 1)
        };
        if done == 1 {
            queues.enter_fd = i32::try_from(update.offset).unwrap_or(raw);
            queues.enter_flags |= ENTER_REGISTERED_RING;
        }
        queues
    }

    /// Queues an entry; makes room by submitting when there is none.
    #[inline]
    pub(crate) fn push(&mut self, sqe: &Sqe) {
        // SAFETY: `squeue::Entry` is `repr(C)` around `struct io_uring_sqe`, whose layout `Sqe` has
        // (size and offsets asserted in uapi); both are plain data.
        let entry: squeue::Entry = unsafe { std::mem::transmute(*sqe) };
        self.sqes += 1;
        for _ in 0..1_000_000 {
            // SAFETY: whatever the entry points at lies in a table or arena of the `Uring` that
            // builds it, and stays until its completion; `Uring` alone calls this.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: hand over what is there. An error leaves it queued; the next round tries again.
            let _ = self.enter(0);
        }
        panic!("the kernel takes no entries from io_uring's submission queue");
    }

    /// Submits everything queued and waits for `want` completions.
    pub(crate) fn enter(&mut self, want: u32) -> std::io::Result<()> {
        let queued = self.ring.submission().len();
        let to_submit = u32::try_from(queued).unwrap_or(u32::MAX);
        self.enters += 1;
        // SAFETY: the descriptor (or registered index) is this ring's; the call takes no pointers.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.enter_fd,
                to_submit,
                want,
                self.enter_flags,
                std::ptr::null::<u8>(),
                0_usize,
            )
        };
        if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }

    #[inline]
    pub(crate) fn next(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    #[inline]
    pub(crate) fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    #[inline]
    pub(crate) fn has_queued(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }
}

/// Why there is no io_uring, and what to do about it.
pub(crate) fn unavailable(error: &std::io::Error) -> Error {
    let base = Error::os("io_uring", error);
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            let reason = "switched off on this machine (kernel.io_uring_disabled, or a sandbox)";
            Error::new(ErrorKind::Permission, "io_uring", reason)
                .next("sysctl kernel.io_uring_disabled=0, or allow it in the sandbox")
        }
        Some(libc::ENOSYS) => Error::new(ErrorKind::Unsupported, "io_uring", "not in this kernel")
            .next("use a kernel from 6.0 with CONFIG_IO_URING"),
        Some(libc::ENOMEM) => base.next("raise the locked-memory limit (ulimit -l)"),
        _ => base,
    }
}
