//! Answers for a ring that shares its thread with others: it never waits in the kernel, tells
//! whether there is more to do, and rings a bell when there is again.
//!
//! Completions are only put together when the thread enters the kernel (`DEFER_TASKRUN`), and until
//! then the ring's own descriptor wakes nobody who waits for it with epoll (tried on 6.18). So
//! the bell is an eventfd that is registered with the ring. It is silent while the ring is served.
//!
//! Some kernels ring it once, some milliseconds late, and never again: they put every ring off as
//! that of one eventfd within another, and what they mark for that stays marked
//! (`io_eventfd_do_signal`, io_uring/eventfd.c; seen on Debian's 6.12.117). There the ring is one
//! without `DEFER_TASKRUN`, which is put together while the thread sleeps, and is its own bell.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::Ring;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Config, LaneMemory, Uring};
use crate::arena::Arena;
use crate::bell::Bell;
use crate::submit::Queues;
use crate::{FileKind, RingFile, setup};

/// What is known of a ring that does not wait.
#[derive(Clone, Debug)]
pub struct Brief {
    /// Becomes readable when there is something to do again. It is never read: who waits for it
    /// waits for its edges. There may be more of them than there is to do.
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
    /// As [`Uring::new`], for a thread that serves other rings, too ([`Uring::be_brief`]).
    ///
    /// # Errors
    /// As there.
    pub fn for_pool(config: &Config) -> Result<Uring> {
        Uring::with(config, if rings_every_time() { Queues::new } else { Queues::own_bell })
    }

    /// From now on the ring does not wait in the kernel.
    ///
    /// # Errors
    /// If there is no bell to be had, or this kernel would not ring it.
    pub fn be_brief(&mut self) -> Result<Brief> {
        let os = |error: std::io::Error| Error::os("a ring's bell", &error);
        let bell = if self.queues.is_own_bell {
            self.queues.fd.try_clone().map_err(os)?
        } else if !rings_every_time() {
            let why = "this kernel wakes nobody for such a ring (io_uring's eventfd rings once); \
                       use a server of its own for the disk, or --batch off and --low-depth off";
            return Err(Error::new(ErrorKind::Unsupported, "a ring's bell", why));
        } else {
            let bell = silent_bell().map_err(os)?;
            setup::put_bell(&self.queues.fd, &bell).map_err(os)?;
            bell
        };
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

fn silent_bell() -> std::io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Whether this kernel rings the eventfd of a ring as often as it should; tried once.
pub(crate) fn rings_every_time() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return *known;
    }
    // What cannot be tried for lack of something is found when that is needed in earnest.
    try_bell().map_or(true, |rings| *KNOWN.get_or_init(|| rings))
}

/// Has something come for a ring twice, and looks each time whether the eventfd knows at once.
fn try_bell() -> Result<bool> {
    let os = |error: std::io::Error| Error::os("a ring's bell", &error);
    let config = Config { flights: 1, files: 1, lanes: vec![NO_MEMORY], inner: 0 };
    let mut ring = Uring::new(&config)?;
    let (ears, caller) = (silent_bell().map_err(os)?, Bell::new()?);
    setup::put_bell(&ring.queues.fd, &ears).map_err(os)?;
    let fd = caller.ear().try_clone().map_err(os)?;
    let file = ring.add_file(RingFile { fd, kind: FileKind::Other })?;
    for _ in 0..2 {
        ring.poll((0, 0), file);
        ring.enter_once(0)?;
        caller.ring();
        if rustix::io::read(&ears, &mut [0_u8; 8]).is_err() {
            return Ok(false);
        }
        caller.heard();
        ring.enter_once(0)?;
        while ring.next().is_some() {}
    }
    Ok(true)
}

const NO_MEMORY: LaneMemory = LaneMemory { depth: 1, bytes: 0, slots: false, locked: false };

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::event::epoll;

    use super::*;

    /// A ring that is woken by its bell is served as a pool's thread serves it.
    #[test]
    fn the_bell_rings_every_time() {
        let lane = LaneMemory { depth: 1, bytes: 4096, slots: false, locked: false };
        let config = Config { flights: 2, files: 1, lanes: vec![lane], inner: 0 };
        let mut ring = Uring::for_pool(&config).unwrap();
        let brief = ring.be_brief().unwrap();
        let bell = Arc::new(Bell::new().unwrap());
        let fd = bell.ear().try_clone().unwrap();
        let file = ring.add_file(RingFile { fd, kind: FileKind::Other }).unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let (data, edges) =
            (epoll::EventData::new_u64(0), epoll::EventFlags::IN | epoll::EventFlags::ET);
        epoll::add(&epoll, &brief.bell, data, edges).unwrap();
        for round in 0..10 {
            ring.poll((0, 0), file);
            let ringer = Arc::clone(&bell);
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                ringer.ring();
            });
            let heard = (0..10).any(|_| {
                ring.enter(true).unwrap();
                if ring.next().is_some() {
                    return true;
                }
                let limit = Timespec { tv_sec: 2, tv_nsec: 0 };
                let mut events = Vec::with_capacity(4);
                let room = rustix::buffer::spare_capacity(&mut events);
                assert_ne!(
                    epoll::wait(&epoll, room, Some(&limit)),
                    Ok(0),
                    "no bell in round {round}"
                );
                false
            });
            thread.join().unwrap();
            assert!(heard, "nothing in round {round}");
            bell.heard();
        }
    }
}
