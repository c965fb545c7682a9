//! Answers for a ring that shares its thread with others: it never waits in the kernel, tells
//! whether there is more to do, and rings a bell when there is again.
//!
//! Completions are only put together when the thread enters the kernel (`DEFER_TASKRUN`), and until
//! then the ring's own descriptor wakes nobody who waits for it with epoll (tried on 6.18). So
//! the bell is an eventfd that is registered with the ring. It is silent while the ring is served.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devsplice_core::{Error, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::Uring;
use crate::arena::Arena;
use crate::setup;

/// What is known of a ring that does not wait.
#[derive(Clone, Debug)]
pub struct Brief {
    /// Becomes readable when there is something to do again. It is never read: who waits for it
    /// waits for its edges.
    pub bell: Arc<OwnedFd>,
    more: Arc<AtomicBool>,
}

impl Brief {
    /// Whether there was something left to do when the ring was entered last. If not, the bell
    /// rings when there is.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.more.load(Ordering::Relaxed)
    }
}

impl Uring {
    /// From now on the ring does not wait in the kernel.
    ///
    /// # Errors
    /// If there is no bell to be had.
    pub fn be_brief(&mut self) -> Result<Brief> {
        let os = |error: std::io::Error| Error::os("a ring's bell", &error);
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| os(errno.into()))?;
        setup::put_bell(&self.queues.fd, &bell).map_err(os)?;
        // A thread has 16 places for rings of its own, and one keeps its ring for as long as the
        // thread lives, not the ring.
        self.queues.leave_task();
        // Most of the disks that share the thread are idle, and their first request, of a few
        // bytes, would take 2 MiB each.
        self.arenas.iter().flatten().for_each(Arena::have_small_pages);
        let brief = Brief { bell: Arc::new(bell), more: Arc::new(AtomicBool::new(true)) };
        self.brief = Some(brief.clone());
        Ok(brief)
    }

    /// As `enter`, without a wait.
    #[cold]
    #[inline(never)]
    pub(super) fn enter_briefly(&mut self, may_sleep: bool) -> Result<()> {
        self.queues.set_bell(false);
        self.enter_once(0)?;
        let mut more = !may_sleep || self.queues.has_completions() || self.queues.has_queued();
        if !more {
            // What comes from here on rings. What came before is seen now: the kernel runs only so
            // many pieces of work in a call, and may have some left that will not ring again.
            self.queues.set_bell(true);
            let ring = [PollFd::new(&self.queues.fd, PollFlags::IN)];
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            more = poll(&mut { ring }, Some(&at_once)) != Ok(0);
        }
        if let Some(brief) = &self.brief {
            brief.more.store(more, Ordering::Relaxed);
        }
        Ok(())
    }
}
