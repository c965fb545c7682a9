//! Answers for what passes between the thread that greets clients and the I/O threads that serve
//! them: clients that have chosen, questions about ranges and their answers, the word to stop.
//!
//! Letters are rare: one a connection, one a question. Each side has a box with a lock and a bell;
//! the I/O side hears its bell through its ring, so it never waits for a letter. It takes the lock
//! for as long as it takes to move a letter out.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devsplice_core::{Errno, Result};
use devsplice_nbd::server::Session;
use devsplice_uring::Bell;
use devsplice_uring::ktls::Records;

use super::stale::Stale;
use crate::threads::OnEvent;

/// A client that has chosen the export.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: OwnedFd,
    /// What there is to do beside data, where the kernel does its TLS.
    pub(super) records: Option<Box<dyn Records>>,
    pub(super) session: Session,
    /// What it sent behind its choice: the first requests.
    pub(super) early: Vec<u8>,
    /// Who it is, for messages.
    pub(super) peer: String,
}

/// A run of bytes in the same state, of `devsplice_nbd::wire`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) len: u64,
    pub(super) state: u32,
}

/// What is there, from `at` on?
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) lane: usize,
    pub(super) tag: u16,
    pub(super) at: u64,
    pub(super) len: u64,
    /// Extents that the answer may have.
    pub(super) most: usize,
}

/// A letter for an I/O thread.
#[derive(Debug)]
pub(super) enum Letter {
    Client(Box<Client>),
    Answer {
        tag: u16,
        extents: Vec<Extent>,
    },
    /// Somebody comes; has who is here gone? Answered by [`Desk::looked`].
    Look(u64),
}

/// A place for one connection, on the I/O thread that serves it.
pub(super) struct Desk {
    letters: Mutex<VecDeque<Letter>>,
    pub(super) bell: Bell,
    /// A connection has it, or is promised it.
    taken: AtomicBool,
    /// Connections that it has had.
    pub(super) served: AtomicU32,
    /// The last [`Letter::Look`] that it has answered.
    pub(super) looked: AtomicU64,
}

impl Desk {
    pub(super) fn take_letter(&self) -> Option<Letter> {
        lock(&self.letters).pop_front()
    }

    pub(super) fn send(&self, letter: Letter) {
        lock(&self.letters).push_back(letter);
        self.bell.ring();
    }
}

/// A client that is told nothing more, and what it may still say over TLS by the kernel.
pub(super) type Leaving = (OwnedFd, Box<dyn Records>);

/// All that is shared between the threads of an export.
pub(super) struct Post {
    pub(super) desks: Box<[Desk]>,
    /// I/O threads; desk `n` is on thread `n % threads`.
    threads: usize,
    questions: Mutex<VecDeque<Question>>,
    /// Rung for the greeting thread.
    pub(super) bell: Bell,
    /// Rung for who answers questions.
    pub(super) asked: Bell,
    stop: AtomicBool,
    /// Clients get their answers before that.
    gently: AtomicBool,
    /// Flushes that failed, of any connection; and whether one did whose client had gone.
    failed_flushes: AtomicU32,
    is_untold: AtomicBool,
    /// Threads that there are for TLS.
    relays: AtomicUsize,
    /// Connections whose TLS the kernel does.
    sealed: AtomicUsize,
    /// Changes of connections that have ended.
    pub(super) stale: Stale,
    /// How often it was asked who has gone.
    looks: AtomicU64,
    /// Clients that have been told that it is over, for the greeting thread.
    leaving: Mutex<Vec<Leaving>>,
    /// CPUs that this process may use.
    cpus: usize,
    /// There is a CPU for each client and each thread that serves them: who waits may do so awake.
    pub(super) roomy: Arc<AtomicBool>,
    /// Told to the log.
    pub(super) say: OnEvent,
}

impl Post {
    /// How many flushes have failed so far.
    pub(super) fn failed_flushes(&self) -> u32 {
        self.failed_flushes.load(Ordering::Acquire)
    }

    /// What a flush on a connection comes to, or a write that is one as well. The kernel tells of
    /// what it could not write once for each open file (Linux 7.3, `file_check_and_advance_wb_err`,
    /// mm/filemap.c), and all connections share theirs: whoever has not been `told` is told by us.
    /// What was to be told to a client that has gone fails the next flush of anybody, as the one
    /// that comes back may ask. Where two flushes end at the same time, it may be with the next.
    pub(super) fn flushed(
        &self,
        (told, is_heard): (&mut u32, bool),
        result: Result<(), Errno>,
    ) -> Result<(), Errno> {
        match result {
            Err(_) if !is_heard => self.is_untold.store(true, Ordering::Release),
            Ok(()) if !is_heard => return Ok(()),
            Ok(()) if self.is_untold.load(Ordering::Acquire) => {
                // Whoever is first counts it for all.
                if self.is_untold.swap(false, Ordering::AcqRel) {
                    self.failed_flushes.fetch_add(1, Ordering::AcqRel);
                }
                *told = self.failed_flushes();
            }
            Ok(()) if *told == self.failed_flushes() => return Ok(()),
            Ok(()) => *told = self.failed_flushes(),
            Err(_) => *told = self.failed_flushes.fetch_add(1, Ordering::AcqRel) + 1,
        }
        result.and(Err(Errno::EIO))
    }

    pub(super) fn new(desks: u16, threads: u16, say: OnEvent) -> Result<Arc<Post>> {
        let desk = |_| {
            Ok(Desk {
                letters: Mutex::default(),
                bell: Bell::new()?,
                taken: AtomicBool::new(false),
                served: AtomicU32::new(0),
                looked: AtomicU64::new(0),
            })
        };
        Ok(Arc::new(Post {
            desks: (0..desks).map(desk).collect::<Result<_>>()?,
            threads: usize::from(threads.max(1)),
            questions: Mutex::default(),
            bell: Bell::new()?,
            asked: Bell::new()?,
            stop: AtomicBool::new(false),
            gently: AtomicBool::new(false),
            failed_flushes: AtomicU32::new(0),
            is_untold: AtomicBool::new(false),
            relays: AtomicUsize::new(0),
            sealed: AtomicUsize::new(0),
            stale: Stale::default(),
            looks: AtomicU64::new(0),
            leaving: Mutex::default(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            roomy: Arc::new(AtomicBool::new(false)),
            say,
        }))
    }

    /// Finds out anew whether there is room for everybody.
    fn count(&self) {
        let clients = self.taken();
        let all = clients + clients.min(self.threads) + self.relays();
        self.roomy.store(clients > 0 && all <= self.cpus, Ordering::Relaxed);
    }

    /// How many desks are taken.
    pub(super) fn taken(&self) -> usize {
        self.desks.iter().filter(|desk| desk.taken.load(Ordering::Acquire)).count()
    }

    /// Takes a free desk, on the thread that has the fewest taken.
    pub(super) fn take_desk(&self) -> Option<&Desk> {
        let is_taken = |index: &usize| self.desks[*index].taken.load(Ordering::Acquire);
        let of_thread = |thread| (thread..self.desks.len()).step_by(self.threads);
        let load = |thread: usize| of_thread(thread).filter(is_taken).count();
        let free = (0..self.desks.len()).filter(|index| !is_taken(index));
        let index = free.min_by_key(|index| load(index % self.threads))?;
        self.desks[index].taken.store(true, Ordering::Release);
        self.desks[index].served.fetch_add(1, Ordering::Relaxed);
        // It is newer than all that have been asked for.
        self.desks[index].looked.store(self.looks.load(Ordering::Relaxed), Ordering::Release);
        self.count();
        Some(&self.desks[index])
    }

    /// The connection at a desk is over.
    pub(super) fn leave(&self, desk: usize) {
        self.desks[desk].taken.store(false, Ordering::Release);
        self.count();
        // Somebody may have waited for that.
        self.bell.ring();
    }

    /// Has all connections look whether their clients have gone; what [`Post::has_looked`] takes.
    pub(super) fn look(&self) -> u64 {
        let look = self.looks.fetch_add(1, Ordering::Relaxed) + 1;
        for desk in self.desks.iter().filter(|desk| desk.taken.load(Ordering::Acquire)) {
            desk.send(Letter::Look(look));
        }
        look
    }

    /// Whether they have.
    pub(super) fn has_looked(&self, look: u64) -> bool {
        self.desks.iter().all(|desk| {
            !desk.taken.load(Ordering::Acquire) || desk.looked.load(Ordering::Acquire) >= look
        })
    }

    /// A change is over whose connection had ended.
    pub(super) fn is_done(&self, desk: usize, tag: u16) {
        self.stale.remove(desk, tag, |waiting| self.desks[waiting].bell.ring());
    }

    /// How many threads there are for TLS.
    pub(super) fn relays(&self) -> usize {
        self.relays.load(Ordering::Acquire)
    }

    /// There is one more until that is dropped.
    pub(super) fn begin_relay(self: &Arc<Post>) -> Relayed {
        self.relays.fetch_add(1, Ordering::AcqRel);
        Relayed(Arc::clone(self))
    }

    /// A connection begins; whether the kernel does its TLS.
    pub(super) fn seal(&self, is_sealed: bool) {
        self.sealed.fetch_add(usize::from(is_sealed), Ordering::AcqRel);
    }

    /// One of those is over.
    pub(super) fn unseal(&self) {
        self.sealed.fetch_sub(1, Ordering::AcqRel);
    }

    /// How many connections there are whose TLS the kernel does.
    pub(super) fn sealed(&self) -> usize {
        self.sealed.load(Ordering::Acquire)
    }

    /// Has the greeting thread wait for a client to hang up.
    pub(super) fn see_off(&self, socket: OwnedFd, records: Box<dyn Records>) {
        lock(&self.leaving).push((socket, records));
        self.bell.ring();
    }

    /// Those that were given so.
    pub(super) fn take_leaving(&self) -> Vec<Leaving> {
        std::mem::take(&mut *lock(&self.leaving))
    }

    pub(super) fn ask(&self, question: Question) {
        lock(&self.questions).push_back(question);
        self.asked.ring();
    }

    pub(super) fn take_question(&self) -> Option<Question> {
        lock(&self.questions).pop_front()
    }

    /// Nobody waits for the answers of a desk any more; those of which nobody has begun to answer
    /// are told to `forgotten` by tag.
    pub(super) fn forget(&self, desk: usize, mut forgotten: impl FnMut(u16)) {
        lock(&self.questions).retain(|question| {
            let is_theirs = question.lane == desk;
            if is_theirs {
                forgotten(question.tag);
            }
            !is_theirs
        });
    }

    /// Tells all threads to end when what was asked for is answered.
    pub(super) fn dismiss(&self) {
        self.gently.store(true, Ordering::Release);
        self.end();
    }

    /// Tells all threads to end.
    pub(super) fn stop(&self) {
        self.gently.store(false, Ordering::Release);
        self.end();
    }

    fn end(&self) {
        self.stop.store(true, Ordering::Release);
        self.bell.ring();
        self.asked.ring();
        for desk in &self.desks {
            desk.bell.ring();
        }
    }

    pub(super) fn is_gentle(&self) -> bool {
        self.gently.load(Ordering::Acquire)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// A thread for TLS.
pub(super) struct Relayed(Arc<Post>);

impl Drop for Relayed {
    fn drop(&mut self) {
        self.0.relays.fetch_sub(1, Ordering::AcqRel);
        self.0.count();
        self.0.bell.ring();
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process; a letter is whole in any case.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_awake_where_clients_want_the_cpus() {
        let post = Post::new(6, 2, Arc::new(|_| {})).unwrap();
        let mut post = Arc::into_inner(post).unwrap();
        post.cpus = 4;
        let is_roomy = |post: &Post| post.roomy.load(Ordering::Relaxed);
        assert!(!is_roomy(&post), "there is nobody to wait for");
        let roomy = [true, true, false].map(|_| {
            post.take_desk().unwrap();
            is_roomy(&post)
        });
        assert_eq!(roomy, [true, true, false]);
        post.leave(0);
        assert!(is_roomy(&post));
    }

    #[test]
    fn questions_of_who_has_left_are_not_answered() {
        let post = Post::new(2, 1, Arc::new(|_| {})).unwrap();
        for (lane, tag) in [(0, 1), (1, 2), (0, 3)] {
            post.ask(Question { lane, tag, at: 0, len: 1, most: 1 });
        }
        let mut forgotten = Vec::new();
        post.forget(0, |tag| forgotten.push(tag));
        assert_eq!(forgotten, [1, 3]);
        assert_eq!(post.take_question().map(|question| question.tag), Some(2));
        assert!(post.take_question().is_none());
    }

    #[test]
    fn connections_are_shared_out_among_threads() {
        let post = Post::new(6, 2, Arc::new(|_| {})).unwrap();
        let index = |desk: &Desk| post.desks.iter().position(|one| std::ptr::eq(one, desk));
        let taken: Vec<_> = (0..4).map(|_| post.take_desk().and_then(index).unwrap() % 2).collect();
        assert_eq!(taken.iter().filter(|thread| **thread == 0).count(), 2, "{taken:?}");
        post.leave(0);
        post.leave(2);
        assert_eq!(post.take_desk().and_then(index), Some(0));
        assert_eq!(post.take_desk().and_then(index), Some(2));
        assert_eq!(post.taken(), 4);
        assert!((0..2).all(|_| post.take_desk().is_some()) && post.take_desk().is_none());
    }
}
