//! Answers for the ring's queues and the one call into the kernel: push, enter, next completion.
//!
//! Entries are written where the kernel reads them, and completions read where it writes them. What
//! each side knows of the other's progress is fetched when it is needed and not before, and our own
//! is published once for each call.

use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use devsplice_core::{Error, ErrorKind, Result};

use crate::setup::{
    self, Cqe, FLAG_SETS, LOW_DEPTH_FLAGS, Made, Mapping, OWN_BELL_FLAGS, WIDE_FLAGS,
};
use crate::uapi::{ENTER_EXT_ARG, ENTER_GETEVENTS, ENTER_NO_IOWAIT, ENTER_REGISTERED_RING, Sqe};

/// `IORING_CQ_EVENTFD_DISABLED` (since 5.8).
const CQ_EVENTFD_DISABLED: u32 = 1;
/// How long is waited at a time, in nanoseconds, where the kernel takes no entries for now.
const SHORT_NS: i64 = 1_000_000;
/// How often it is tried to hand over entries where there is no room for more: for a minute or two.
const MOST_ROUNDS: u32 = 100_000;

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct GetEvents {
    sigmask: u64,
    sigmask_bytes: u32,
    min_wait_us: u32,
    timeout: u64,
}

/// The pair of queues with its counters.
pub(crate) struct Queues {
    sq_head: NonNull<AtomicU32>,
    sq_tail: NonNull<AtomicU32>,
    sq_mask: u32,
    sqes: NonNull<Sqe>,
    /// 1 where each entry has a second half of 64 bytes, which only some commands use; else 0.
    wide: u8,
    /// Entries since the start, so where the next one goes; published by `enter`.
    tail: u64,
    /// Where there is no room any more, as far as is known.
    full_at: u64,
    cq_head: NonNull<AtomicU32>,
    cq_tail: NonNull<AtomicU32>,
    cq_mask: u32,
    cqes: NonNull<Cqe>,
    cq_flags: NonNull<AtomicU32>,
    /// The next completion to take; published when all that are known of are taken.
    head: u32,
    /// Behind the last completion that is known of.
    known: u32,
    /// What `io_uring_enter` is told: the descriptor, or its index among the task's registered
    /// ones.
    enter_fd: i32,
    enter_flags: u32,
    pub(crate) enters: u64,
    /// Whether it was made for requests that come one at a time.
    pub(crate) is_low_depth: bool,
    /// Its own descriptor tells who waits for it with epoll.
    pub(crate) is_own_bell: bool,
    /// Where the second entry of a pair is that may not have been taken yet, counted as `tail`.
    pair_at: Option<u64>,
    /// How many more times entries are refused, as where the kernel has no memory for them.
    #[cfg(test)]
    pub(crate) refusals: u32,
    /// What is submitted instead of what was asked for, where only this process is of interest.
    #[cfg(feature = "imitation")]
    pub(crate) imitation: crate::imitation::Imitation,
    // The pointers above are into these.
    _rings: Mapping,
    _entries: Mapping,
    pub(crate) fd: OwnedFd,
}

// SAFETY: the pointers are into mappings that this value owns and that no other value has pointers
// into; nothing of it is bound to a thread.
unsafe impl Send for Queues {}

impl Queues {
    /// A ring for the calling thread, with the best set of flags that the kernel takes.
    pub(crate) fn new(entries: u32, completions: u32) -> Result<Queues> {
        let mut last = None;
        for flags in FLAG_SETS {
            match setup::make(entries, completions, flags) {
                Ok(made) => return Ok(Queues::with(made)),
                Err(error) => last = Some(error),
            }
        }
        let error = last.unwrap_or_else(|| std::io::ErrorKind::Unsupported.into());
        Err(unavailable(&error))
    }

    /// As `new`, with entries of 128 bytes.
    pub(crate) fn wide(entries: u32, completions: u32) -> Result<Queues> {
        let made = setup::make(entries, completions, WIDE_FLAGS);
        made.map(Queues::with).map_err(|error| unavailable(&error))
    }

    /// A ring for the calling thread and for requests that come one at a time; as `new` where the
    /// kernel has none such.
    pub(crate) fn for_low_depth(entries: u32, completions: u32) -> Result<Queues> {
        match setup::make(entries, completions, LOW_DEPTH_FLAGS) {
            Ok(made) => Ok(Queues { is_low_depth: true, ..Queues::with(made) }),
            Err(_) => Queues::new(entries, completions),
        }
    }

    /// A ring for the calling thread that is its own bell.
    pub(crate) fn own_bell(entries: u32, completions: u32) -> Result<Queues> {
        let made = setup::make(entries, completions, OWN_BELL_FLAGS);
        let queues = made.map(Queues::with).map_err(|error| unavailable(&error))?;
        Ok(Queues { is_own_bell: true, ..queues })
    }

    fn with(made: Made) -> Queues {
        let Made { rings, entries, params, fd } = made;
        let (sq, cq) = (&params.sq, &params.cq);
        let (sq_entries, cq_entries) = (params.sq_entries, params.cq_entries);
        assert!(sq_entries.is_power_of_two() && cq_entries.is_power_of_two());
        if params.has_array() {
            let array: NonNull<AtomicU32> = rings.at(sq.array, sq_entries);
            for index in 0..sq_entries {
                // SAFETY: `at` has asserted that as many lie there.
                let place = unsafe { array.add(index as usize) };
                // SAFETY: as just said; both sides use it atomically.
                unsafe { place.as_ref() }.store(index, Ordering::Relaxed);
            }
        }
        let index = setup::register_with_task(&fd);
        let registered = if index.is_some() { ENTER_REGISTERED_RING } else { 0 };
        // Commands that fetch requests are always out, so an idle thread would be taken for one
        // that waits for a disk: a CPU would be shown as doing nothing else, and kept awake.
        let quiet = if params.can_wait_quietly() { ENTER_NO_IOWAIT } else { 0 };
        Queues {
            sq_head: rings.at(sq.head, 1),
            sq_tail: rings.at(sq.tail, 1),
            sq_mask: sq_entries - 1,
            sqes: entries.at(0, sq_entries << u8::from(params.is_wide())),
            wide: u8::from(params.is_wide()),
            tail: 0,
            full_at: u64::from(sq_entries),
            cq_head: rings.at(cq.head, 1),
            cq_tail: rings.at(cq.tail, 1),
            cq_mask: cq_entries - 1,
            cqes: rings.at(cq.cqes, cq_entries),
            cq_flags: rings.at(cq.flags, 1),
            head: 0,
            known: 0,
            enter_fd: index.unwrap_or_else(|| fd.as_raw_fd()),
            enter_flags: ENTER_GETEVENTS | registered | quiet,
            enters: 0,
            is_low_depth: false,
            is_own_bell: false,
            pair_at: None,
            #[cfg(test)]
            refusals: 0,
            #[cfg(feature = "imitation")]
            imitation: crate::imitation::Imitation::default(),
            _rings: rings,
            _entries: entries,
            fd,
        }
    }

    /// Gives up the ring's place among the task's registered ones.
    pub(crate) fn leave_task(&mut self) {
        if self.enter_flags & ENTER_REGISTERED_RING != 0 {
            setup::leave_task(&self.fd, self.enter_fd);
            self.enter_flags &= !ENTER_REGISTERED_RING;
            self.enter_fd = self.fd.as_raw_fd();
        }
    }

    /// Whether the kernel rings the registered eventfd. What is read of the ring after this call is
    /// as it was after it.
    pub(crate) fn set_bell(&self, on: bool) {
        let flags = if on { 0 } else { CQ_EVENTFD_DISABLED };
        // SAFETY: as in `queued`. Only this side writes it.
        unsafe { self.cq_flags.as_ref() }.store(flags, Ordering::SeqCst);
    }

    /// Where the ring's own count of entries, which wraps, stands at `tail`.
    #[inline]
    fn place(&self) -> u32 {
        #[allow(clippy::cast_possible_truncation)]
        let place = self.tail as u32;
        place
    }

    /// Entries that the kernel has not taken yet.
    #[inline]
    fn queued(&self) -> u32 {
        // SAFETY: `sq_head` was placed in the mapping, which lives as long as `self`; both sides
        // use it atomically.
        let taken = unsafe { self.sq_head.as_ref() }.load(Ordering::Acquire);
        self.place().wrapping_sub(taken)
    }

    /// Queues an entry; makes room by submitting when there is none.
    #[inline]
    pub(crate) fn push(&mut self, sqe: Sqe) {
        self.push_made(|| sqe);
    }

    /// As `push`, with the entry made when there is room: so nothing of it has to be kept over
    /// making some.
    #[inline]
    pub(crate) fn push_made(&mut self, make: impl FnOnce() -> Sqe) {
        if self.is_full() {
            self.make_room();
        }
        let place = ((self.place() & self.sq_mask) as usize) << self.wide;
        // SAFETY: below the number of entries, so inside the mapping that `at` has asserted.
        let place = unsafe { self.sqes.add(place) };
        // SAFETY: the kernel has taken what was here (`full_at` is a whole queue behind its head)
        // and reads it again only once the tail is published, in `enter`. Whatever the entry points
        // at lies in a table or arena of the `Uring` that builds it, and stays until its
        // completion; `Uring` alone calls this.
        unsafe { place.write(make()) };
        self.tail += 1;
    }

    /// As `push`, of an entry with a second half.
    ///
    /// # Panics
    /// If the ring's entries have none.
    pub(crate) fn push_wide(&mut self, sqe: Sqe, rest: [u64; 8]) {
        assert!(self.wide == 1, "the ring's entries have no second half");
        if self.is_full() {
            self.make_room();
        }
        let place = ((self.place() & self.sq_mask) as usize) << 1 | 1;
        // SAFETY: below twice the number of entries, so inside the mapping that `at` has asserted.
        let place = unsafe { self.sqes.add(place) };
        // SAFETY: as in `push_made`, which fills the half before it: the entry is not the kernel's
        // yet. The second half of an entry is as large as the first, and as aligned.
        unsafe { place.cast::<[u64; 8]>().write(rest) };
        self.push_made(|| sqe);
    }

    /// Whether there is no room, as far as is known.
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.tail == self.full_at
    }

    /// How many entries it has room for.
    pub(crate) fn size(&self) -> u32 {
        self.sq_mask + 1
    }

    /// Whether `count` more entries can be pushed before the kernel is entered.
    pub(crate) fn has_room_for(&mut self, count: u32) -> bool {
        let end = self.tail - u64::from(self.queued()) + u64::from(self.size());
        self.full_at = end;
        self.tail + u64::from(count) <= end
    }

    /// The entry that was pushed last and the next one are a pair.
    pub(crate) fn mark_pair(&mut self) {
        self.pair_at = Some(self.tail);
    }

    /// Looks whether the kernel has taken both entries of a pair.
    ///
    /// # Panics
    /// If it has taken the first alone: the second would be carried out whatever becomes of that.
    #[cold]
    #[inline(never)]
    fn check_pair(&mut self, second: u64) {
        let taken = self.tail - u64::from(self.queued());
        assert!(taken != second, "the kernel took a splice without what is linked behind it");
        if taken > second {
            self.pair_at = None;
        }
    }

    /// Finds out what the kernel has taken; hands over what is there if that is nothing.
    #[cold]
    #[inline(never)]
    pub(crate) fn make_room(&mut self) {
        for _ in 0..MOST_ROUNDS {
            self.full_at = self.tail - u64::from(self.queued()) + u64::from(self.sq_mask) + 1;
            if self.tail != self.full_at {
                return;
            }
            // An error leaves them queued; the next round tries again, when something has come.
            if self.enter(0).is_err() {
                self.attend(true);
            }
        }
        panic!("the kernel takes no entries from io_uring's submission queue");
    }

    /// Submits everything queued and waits for `want` completions.
    #[inline]
    pub(crate) fn enter(&mut self, want: u32) -> std::io::Result<()> {
        let to_submit = self.queued();
        #[cfg(feature = "imitation")]
        self.imitate(to_submit);
        // SAFETY: as in `taken`. Only this side writes it; what lies before it was written above.
        unsafe { self.sq_tail.as_ref() }.store(self.place(), Ordering::Release);
        self.publish_head();
        self.enters += 1;
        let failed = self.call((to_submit, want), None).err();
        if let Some(second) = self.pair_at {
            self.check_pair(second);
        }
        failed.map_or(Ok(()), |error| Err(self.refused(error, want)))
    }

    /// Calls into the kernel: entries to submit, completions to wait for, and for how long.
    #[inline(always)]
    fn call(
        &mut self,
        (to_submit, want): (u32, u32),
        wait: Option<&GetEvents>,
    ) -> std::io::Result<()> {
        #[cfg(test)]
        if to_submit > 0 && self.refusals > 0 {
            self.refusals -= 1;
            return Err(std::io::Error::from_raw_os_error(libc::EAGAIN));
        }
        let (flags, argument, bytes) = match wait {
            None => (0, std::ptr::null(), 0),
            Some(wait) => (ENTER_EXT_ARG, std::ptr::from_ref(wait), size_of::<GetEvents>()),
        };
        // SAFETY: the descriptor (or registered index) is this ring's. The argument is none, or a
        // live `struct io_uring_getevents_arg` of that size, which the kernel reads, as the time
        // that it points at, before the call returns.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.enter_fd,
                to_submit,
                want,
                self.enter_flags | flags,
                argument,
                bytes,
            )
        };
        if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }

    /// A call has failed. Where the kernel has no memory for entries it leaves before it looks at
    /// what has come (Linux 7.3, io_uring/io_uring.c, `io_uring_enter`), which may be what gives
    /// memory back, and on a ring with `DEFER_TASKRUN` comes in no other way. So that is asked for
    /// alone; who would have waited waits, but not for long.
    #[cold]
    #[inline(never)]
    fn refused(&mut self, error: std::io::Error, want: u32) -> std::io::Error {
        if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) {
            self.attend(want > 0);
        }
        error
    }

    /// Looks at what has come and submits nothing; may wait a moment for something to come.
    fn attend(&mut self, may_wait: bool) {
        // SAFETY: as in `next`.
        let come = unsafe { self.cq_tail.as_ref() }.load(Ordering::Acquire);
        // What was not taken yet is counted by the kernel as well.
        let want = if may_wait { come.wrapping_sub(self.head) + 1 } else { 0 };
        let time = [0, SHORT_NS];
        let timeout = time.as_ptr() as u64;
        let wait = GetEvents { sigmask: 0, sigmask_bytes: 0, min_wait_us: 0, timeout };
        self.publish_head();
        self.enters += 1;
        // What could be said is that nothing has come, or that a signal has.
        let _ = self.call((0, want), Some(&wait));
    }

    /// Gives the places of the completions that were taken back to the kernel.
    #[inline]
    fn publish_head(&self) {
        // SAFETY: as in `taken`. Only this side writes it.
        unsafe { self.cq_head.as_ref() }.store(self.head, Ordering::Release);
    }

    #[inline]
    pub(crate) fn next(&mut self) -> Option<Cqe> {
        if !self.has_completions() {
            self.publish_head();
            return None;
        }
        let place = (self.head & self.cq_mask) as usize;
        // SAFETY: below the number of completions, so inside the mapping that `at` has asserted.
        let place = unsafe { self.cqes.add(place) };
        // SAFETY: before `known`, so the kernel has written it (the load of the tail acquired
        // that), and after the published head, so it does not write it again yet.
        let cqe = unsafe { place.read() };
        self.head = self.head.wrapping_add(1);
        Some(cqe)
    }

    #[inline]
    pub(crate) fn has_completions(&mut self) -> bool {
        if self.head == self.known {
            // SAFETY: as in `taken`.
            self.known = unsafe { self.cq_tail.as_ref() }.load(Ordering::Acquire);
        }
        self.head != self.known
    }

    #[inline]
    pub(crate) fn has_queued(&self) -> bool {
        self.queued() != 0
    }

    /// Entries pushed since the start.
    #[inline]
    pub(crate) fn pushed(&self) -> u64 {
        self.tail
    }

    /// Replaces what is queued and not submitted, in its place.
    #[cfg(feature = "imitation")]
    #[inline(never)]
    fn imitate(&mut self, queued: u32) {
        for back in (1..=queued).rev() {
            let place = (self.place().wrapping_sub(back) & self.sq_mask) as usize;
            let place = place << self.wide;
            // SAFETY: as in `push`.
            let mut place = unsafe { self.sqes.add(place) };
            // SAFETY: written by `push`, and not published to the kernel yet.
            self.imitation.replace(unsafe { place.as_mut() });
        }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use devsplice_engine::{FileId, Ring};

    use crate::bell::Bell;
    use crate::files::{FileKind, RingFile};
    use crate::ring::{Config, LaneMemory, Uring};

    /// A ring, and somebody who is waited for on it under the index 7.
    fn ring_and_bell() -> (Uring, Arc<Bell>) {
        let lane = LaneMemory { depth: 4, bytes: 0, slots: false, locked: false };
        let config = Config { flights: 4, files: 1, lanes: vec![lane], inner: 0 };
        let mut ring = Uring::new(&config).unwrap();
        let bell = Arc::new(Bell::new().unwrap());
        let fd = bell.ear().try_clone().unwrap();
        let file = ring.add_file(RingFile { fd, kind: FileKind::Other }).unwrap();
        ring.poll((0, 7), file);
        ring.enter(false).unwrap();
        (ring, bell)
    }

    fn comes(ring: &mut Uring) -> Option<u32> {
        match ring.next() {
            Some(devsplice_engine::Event::Export { completion, .. }) => Some(completion.index),
            _ => None,
        }
    }

    #[test]
    fn what_has_come_is_seen_while_the_kernel_takes_no_entries() {
        for wait in [false, true] {
            let (mut ring, bell) = ring_and_bell();
            // Something that cannot be handed over.
            ring.poll((0, 8), FileId(0));
            ring.queues.refusals = u32::MAX;
            bell.ring();
            let come = (0..100).find_map(|_| {
                ring.enter(wait).unwrap();
                comes(&mut ring)
            });
            assert_eq!(come, Some(7), "waiting: {wait}");
            assert!(ring.queues.has_queued(), "what was refused is still to be handed over");
            ring.queues.refusals = 0;
            ring.enter(true).unwrap();
            assert_eq!(comes(&mut ring), Some(8));
        }
    }

    #[test]
    fn who_finds_no_entries_taken_and_nothing_come_neither_spins_nor_waits_for_good() {
        const ROUNDS: u32 = 20;
        let (mut ring, _bell) = ring_and_bell();
        ring.poll((0, 8), FileId(0));
        ring.queues.refusals = ROUNDS;
        let begin = Instant::now();
        while ring.queues.has_queued() {
            ring.enter(true).unwrap();
        }
        assert!(begin.elapsed() >= Duration::from_millis(u64::from(ROUNDS)));
        assert_eq!(comes(&mut ring), Some(8));
        // The same where there is no room for more.
        ring.queues.refusals = ROUNDS;
        let begin = Instant::now();
        for _ in 0..=ring.queues.size() {
            ring.poll((0, 8), FileId(0));
        }
        assert_eq!(ring.queues.refusals, 0);
        assert!(begin.elapsed() >= Duration::from_millis(u64::from(ROUNDS)));
    }

    #[test]
    fn what_comes_while_there_is_no_room_for_more_is_kept() {
        let (mut ring, bell) = ring_and_bell();
        ring.queues.refusals = 3;
        bell.ring();
        for _ in 0..=ring.queues.size() {
            ring.poll((0, 8), FileId(0));
        }
        assert_eq!(comes(&mut ring), Some(7));
        assert_eq!(comes(&mut ring), Some(8));
    }
}
