//! Answers for I/O threads that serve many devices: each has several workers, every one with a ring
//! of its own, and turns those that have something to do, one after another.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use devsplice_core::{Error, Result};
use devsplice_engine::Worker;
use devsplice_uring::thread::Start;
use devsplice_uring::{Brief, Uring};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use crate::threads::{Gate, Place, Unended, settled};

/// Events taken from the kernel at a time.
const EVENTS: usize = 256;
/// What the bell for new workers is called among the events; the others are places of workers.
const NEW: u64 = u64::MAX;

/// A worker that is served here.
pub(crate) struct Member {
    /// Its requests and its ring.
    pub(crate) worker: Worker<Uring>,
    /// What is known of that ring.
    pub(crate) brief: Brief,
    /// Dropped when it has come to its end, and has let go of everything.
    pub(crate) unended: Unended,
    /// What it waits at before its first turn; none once that has opened.
    pub(crate) gate: Option<Arc<Gate>>,
    /// Told that it cannot go on.
    pub(crate) on_death: fn(Error),
}

/// Makes a worker on the thread that is to serve it; none if that failed.
pub(crate) type Make = Box<dyn FnOnce() -> Option<Member> + Send>;

/// A thread as others see it.
struct Seat {
    makes: Mutex<mpsc::Sender<Make>>,
    bell: Arc<OwnedFd>,
}

impl Seat {
    fn ring(&self) {
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

/// The threads. They live as long as the process.
pub struct Pool {
    seats: Vec<Seat>,
    next: AtomicUsize,
    warning: Option<String>,
}

impl Pool {
    /// Starts as many threads.
    ///
    /// # Errors
    /// If they cannot be had.
    pub fn start(threads: usize) -> Result<Arc<Pool>> {
        // What a thread needs that is shut in once it runs.
        devsplice_uring::zeroes()?;
        devsplice_uring::probe::sockets_take_slots();
        let starter = starter()?;
        let (ready, news) = mpsc::channel();
        let mut seats = Vec::new();
        for number in 0..threads.max(1) {
            let (makes, inbox) = mpsc::channel();
            let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| Error::os("an I/O thread's bell", &errno.into()))?;
            let bell = Arc::new(bell);
            seats.push(Seat { makes: Mutex::new(makes), bell: Arc::clone(&bell) });
            let (ready, starter) = (ready.clone(), starter.clone());
            let thread = std::thread::Builder::new().name(format!("io/{number}"));
            let started = thread.stack_size(256 << 10).spawn(move || {
                let flusher = devsplice_uring::thread::set_io_flusher();
                devsplice_uring::thread::start_by(starter);
                match Table::new(inbox, bell) {
                    Ok(mut table) => {
                        settled(Place::InPool);
                        let _ = ready.send(Ok(flusher.err().map(|error| error.to_string())));
                        drop(ready);
                        table.serve();
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            });
            started.map_err(|error| Error::os("I/O thread", &error))?;
        }
        drop(ready);
        let mut warning = None;
        for said in news {
            warning = said?;
        }
        Ok(Arc::new(Pool { seats, next: AtomicUsize::new(0), warning }))
    }

    /// How many threads there are.
    #[must_use]
    pub fn thread_count(&self) -> usize {
        self.seats.len()
    }

    /// What is not as it should be, though the threads run.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        self.warning.clone()
    }

    /// Has the next thread make and serve a worker.
    pub(crate) fn take(&self, make: Make) {
        let seat = &self.seats[self.next.fetch_add(1, Ordering::Relaxed) % self.seats.len()];
        let makes = seat.makes.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread lives as long as the process.
        let _ = makes.send(make);
        seat.ring();
    }

    /// Has all threads look whether members may begin that wait for others of their device.
    pub(crate) fn look_at_gates(&self) {
        self.seats.iter().for_each(Seat::ring);
    }
}

/// A thread that starts others for those that may not. It ends with the last of them.
fn starter() -> Result<mpsc::Sender<Start>> {
    let (starter, starts) = mpsc::channel::<Start>();
    let thread = std::thread::Builder::new().name("starter".to_owned()).stack_size(64 << 10);
    let body = move || {
        // Helpers are below writeback as well; they inherit this. The pool's threads warn.
        let _ = devsplice_uring::thread::set_io_flusher();
        starts.into_iter().for_each(|start| start());
    };
    thread.spawn(body).map_err(|error| Error::os("I/O thread", &error))?;
    Ok(starter)
}

/// A thread from inside.
struct Table {
    inbox: mpsc::Receiver<Make>,
    bell: Arc<OwnedFd>,
    epoll: OwnedFd,
    /// By number. Places of those that have ended are used again.
    members: Vec<Option<Member>>,
    free: Vec<usize>,
    turns: Turns,
}

/// Whose turn it is: members with something to do, each once, in the order in which they got it.
#[derive(Default)]
struct Turns {
    queue: VecDeque<usize>,
    is_in: Vec<bool>,
}

impl Turns {
    /// There is one more member.
    fn grow(&mut self) {
        self.is_in.push(false);
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// This one has something to do.
    fn wake(&mut self, place: usize) {
        if !std::mem::replace(&mut self.is_in[place], true) {
            self.queue.push_back(place);
        }
    }

    /// A turn for each that has something to do now. Who has more after that, as `turn` says, comes
    /// again behind all others.
    fn round(&mut self, mut turn: impl FnMut(usize) -> bool) {
        for _ in 0..self.queue.len() {
            let Some(place) = self.queue.pop_front() else { return };
            self.is_in[place] = false;
            if turn(place) {
                self.wake(place);
            }
        }
    }
}

impl Table {
    fn new(inbox: mpsc::Receiver<Make>, bell: Arc<OwnedFd>) -> Result<Table> {
        let os = |errno: rustix::io::Errno| Error::os("an I/O thread's epoll", &errno.into());
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(os)?;
        epoll::add(&epoll, &bell, EventData::new_u64(NEW), EventFlags::IN).map_err(os)?;
        Ok(Table {
            inbox,
            bell,
            epoll,
            members: Vec::new(),
            free: Vec::new(),
            turns: Turns::default(),
        })
    }

    fn serve(&mut self) {
        loop {
            self.round();
            self.wait();
        }
    }

    /// One turn for each that has something to do: nobody waits for more than the turn of each of
    /// the others, and what a turn does is bounded by the depth of its queues.
    fn round(&mut self) {
        let (members, mut ended) = (&mut self.members, Vec::new());
        self.turns.round(|place| {
            let Some(member) = &mut members[place] else { return false };
            match member.gate.as_ref().map(|gate| gate.look()) {
                None => {}
                Some(Some(true)) => member.gate = None,
                // It is woken when that is known.
                Some(None) => return false,
                Some(Some(false)) => {
                    ended.push(place);
                    return false;
                }
            }
            match member.worker.turn() {
                Ok(true) => return member.brief.has_more(),
                Ok(false) => ended.push(place),
                Err(error) => (member.on_death)(error),
            }
            false
        });
        ended.into_iter().for_each(|place| self.end(place));
    }

    fn end(&mut self, place: usize) {
        let Some(Member { worker, brief, unended, .. }) = self.members[place].take() else {
            return;
        };
        let _ = epoll::delete(&self.epoll, &brief.bell);
        // The bell may be the ring's own descriptor.
        drop((worker, brief));
        self.free.push(place);
        drop(unended);
    }

    /// Sleeps until somebody has something to do; not at all if somebody has.
    fn wait(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let limit = if self.turns.is_empty() { None } else { Some(&at_once) };
        let room = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.epoll, room, limit).is_err() {
            // Interrupted: there may be nothing, and then the next wait is a wait.
            return;
        }
        for event in events {
            match event.data.u64() {
                NEW => self.hire(),
                place => {
                    let place = usize::try_from(place).unwrap_or(usize::MAX);
                    // It may have ended since.
                    if self.members.get(place).is_some_and(Option::is_some) {
                        self.turns.wake(place);
                    }
                }
            }
        }
    }

    /// Makes the workers that were asked for, and wakes those that wait at a gate.
    fn hire(&mut self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
        for (place, member) in self.members.iter().enumerate() {
            if member.as_ref().is_some_and(|member| member.gate.is_some()) {
                self.turns.wake(place);
            }
        }
        while let Ok(make) = self.inbox.try_recv() {
            let Some(member) = make() else { continue };
            let place = self.free.pop().unwrap_or(self.members.len());
            if place == self.members.len() {
                self.members.push(None);
                self.turns.grow();
            }
            let data = EventData::new_u64(place as u64);
            let flags = EventFlags::IN | EventFlags::ET;
            if let Err(errno) = epoll::add(&self.epoll, &member.brief.bell, data, flags) {
                (member.on_death)(Error::os("a ring's bell", &errno.into()));
            }
            self.members[place] = Some(member);
            self.turns.wake(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_always_has_more_keeps_nobody_waiting_for_more_than_a_turn() {
        let mut turns = Turns::default();
        (0..3).for_each(|_| turns.grow());
        let mut order = Vec::new();
        let mut round = |turns: &mut Turns| {
            turns.round(|place| {
                order.push(place);
                place == 0
            });
        };
        turns.wake(0);
        round(&mut turns);
        // The busy one is in the row again when others come; one that comes twice has one turn.
        [1, 2, 1].into_iter().for_each(|place| turns.wake(place));
        round(&mut turns);
        turns.wake(2);
        round(&mut turns);
        round(&mut turns);
        assert_eq!(order, [0, 0, 1, 2, 0, 2, 0]);
    }
}
