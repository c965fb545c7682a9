//! Answers for places behind sockets: a ring's connections to them, what is asked over each, and
//! what becomes of that when a connection is lost.
//!
//! A socket is a stream, so one send and one receive of a connection are under way at a time, or
//! several that are linked. What has no answer when a connection ends is held, and sent again over
//! the next one, as `nbd/client/conversation` decides. The kernel uses none of a request's pages
//! any more when that happens, nor when it is answered.

mod life;
mod receive;
mod sealed;
mod send;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use devsplice_core::{Errno, Error, Op, Result};
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{FileId, Pages, Part, Splice, To};
pub use devsplice_nbd::client::Patience;
use devsplice_nbd::client::conversation::{Question, Verdict};
use devsplice_nbd::client::{Agreed, Conversation, Extent};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{Shutdown, shutdown};

use super::{KIND_REMOTE, Timespec, Uring};
use crate::arena::Arena;
use crate::bell::Bell;
use crate::files::{FileKind, RingFile};
use crate::ktls::Records;
use crate::probe;
use crate::splice::PagesKind;
use crate::uapi::{OP_POLL_ADD, Sqe};
use receive::Receiving;
use send::Batch;

/// Set in the identity of a file that is a connection; the rest is its index.
const IS_REMOTE: u16 = 1 << 15;
/// Rounds of 10 ms that a server has to hang up when it was told goodbye.
const GOODBYE: u32 = 20;
/// How often it is looked whether a server still answers.
static SECOND: Timespec = Timespec { seconds: 1, nanoseconds: 0 };

/// What an entry of a connection is, in the low half of its user data.
const SENT: u32 = 0;
const HEAD: u32 = 1;
const DATA: u32 = 2;
const TICK: u32 = 3;
const BELL: u32 = 4;
const PROD: u32 = 5;

/// A socket behind which a server has given us its export.
#[derive(Debug)]
pub struct Link {
    /// Connected.
    pub socket: OwnedFd,
    /// What was agreed on.
    pub agreed: Agreed,
    /// A socket of this machine that lies behind it, where it leads to somebody of ours.
    pub beyond: Option<OwnedFd>,
    /// What there is to do beside data, where the kernel does its TLS.
    pub records: Option<Box<dyn Records>>,
}

/// How things stand with a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Connections that there are.
    pub connections: u32,
    /// How often there was none where there had been one, and then one again.
    pub reconnects: u64,
    /// The kernel does the TLS of the last one.
    pub tls_kernel: bool,
    /// What went wrong last.
    pub last_error: Option<String>,
}

impl Standing {
    /// A ring gets this connection.
    pub fn take(&mut self, link: &Link) {
        self.connections += 1;
        self.tls_kernel = link.records.is_some();
    }
}

/// A server's export, of which each ring has a connection.
pub trait Remote: Send + Sync {
    /// What messages call it.
    fn name(&self) -> &str;

    /// What was agreed on when it was opened; no later connection offers less.
    fn agreed(&self) -> &Agreed;

    /// How long it is waited for.
    fn patience(&self) -> Patience;

    /// What waits for it is to fail soon, whatever [`Remote::patience`] says: nobody wants it.
    fn forsake(&self);

    /// Whether that was said.
    fn is_forsaken(&self) -> bool;

    /// Wants a connection for this line, in a while, from another thread: this one does not wait.
    /// `lost` is what became of the last one, if there was one.
    fn dial(&self, line: &Arc<Line>, lost: Option<&str>);

    /// A ring ends, and its connection with it.
    fn part(&self);

    /// Connections that it can have at a time. One of a server that does not promise that a flush
    /// over one covers what was written over others.
    fn most_lines(&self) -> u16;

    /// Something has happened that a user would want to know.
    fn tell(&self, text: &str);

    /// Has `tell` told from now on.
    fn listen(&self, tell: Box<dyn Fn(&str) + Send>);

    /// How things stand.
    fn standing(&self) -> Standing;

    /// [`Remote::look`] will be asked, of what nobody changes, and rings will have the connections.
    fn look_ahead(&self);

    /// What is there from `at` on, of at most `most` bytes, as far as the server tells. It is
    /// waited for.
    fn look(&self, at: u64, most: u64) -> Option<Extent>;

    /// What is there from `at` on, of at most `most` bytes, while others change it: it is asked
    /// now, and waited for until then. Nothing where the server does not tell, not by then, or not
    /// beside its connections.
    fn look_now(&self, at: u64, most: u64, until: Instant) -> Option<Vec<Extent>>;

    /// Whether that is ever anything.
    fn tells_now(&self) -> bool;
}

/// What a ring has of a [`Remote`]: where its next connection is put.
#[derive(Debug)]
pub struct Line {
    link: Mutex<Option<Link>>,
    bell: Bell,
}

impl Line {
    /// One to which nothing was delivered yet.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn new() -> Result<Arc<Line>> {
        Ok(Arc::new(Line { link: Mutex::default(), bell: Bell::new()? }))
    }

    /// Gives the ring its connection.
    pub fn deliver(&self, link: Link) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link);
        self.bell.ring();
    }

    fn take(&self) -> Option<Link> {
        self.bell.heard();
        self.link.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A splice that was asked for and has not landed: where its data is.
#[derive(Clone, Copy)]
struct Ask {
    conn: u16,
    op: Op,
    at: u64,
    len: u64,
    pages: Pages,
    parts: [Part; MAX_PARTS],
    part_count: usize,
}

impl Ask {
    const NONE: Ask = Ask {
        conn: 0,
        op: Op::Flush,
        at: 0,
        len: 0,
        pages: Pages(0),
        parts: [Part { at: 0, len: 0 }; MAX_PARTS],
        part_count: 0,
    };

    fn parts(&self) -> &[Part] {
        &self.parts[..self.part_count]
    }

    /// Whether it is a read that is worth receiving to where it belongs, not with its header.
    fn is_large(&self) -> bool {
        self.op == Op::Read && self.len >= receive::LARGE
    }

    /// The piece of the request's memory at byte `at` of what was asked, of at most `most` bytes.
    fn place(&self, at: u32, most: u32) -> Option<Part> {
        let mut before = at;
        for part in self.parts() {
            if before < part.len {
                return Some(Part { at: part.at + before, len: most.min(part.len - before) });
            }
            before -= part.len;
        }
        None
    }
}

/// A ring's connection to a server.
struct Conn {
    remote: Arc<dyn Remote>,
    line: Arc<Line>,
    /// Its socket's place in the ring's table of files.
    file: FileId,
    /// As [`Link::beyond`].
    beyond: Option<OwnedFd>,
    /// As [`Link::records`].
    records: Option<Box<dyn Records>>,
    /// The next connection, until the server has read what it was sent over the last one.
    next: Option<Link>,
    /// What is asked of the server.
    talk: Conversation,
    /// How much of what is not answered are large reads.
    large: u32,
    batch: Box<Batch>,
    receiving: Receiving,
    /// What becomes of headers: a slot for those that are sent, one for those that come.
    memory: Arena,
    /// Why the last one ended.
    lost: String,
}

/// The connections of a ring, and what was asked over them.
pub(super) struct Remotes {
    conns: Vec<Conn>,
    /// By key.
    asks: Box<[Ask]>,
    /// What has landed and was not reported.
    landed: VecDeque<(u32, Result<u64, Errno>)>,
    /// Seconds are counted, since somebody waits.
    is_ticking: bool,
    /// Requests of this ring may have pages that are not ours.
    has_slots: bool,
    /// Sends and receives take a slot. Before Linux 7.2 only reads and writes do.
    takes_slots: bool,
}

impl Uring {
    /// Adds a place behind a socket. It takes one place of what `Config::files` asked for. What is
    /// asked before there is a connection waits for it.
    ///
    /// # Errors
    /// As [`Uring::add_file`].
    pub fn add_remote(&mut self, remote: &Arc<dyn Remote>) -> Result<FileId> {
        // As for bytes: until there is a socket, what stands there refuses everything.
        let fd = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| Error::os("a place for a connection", &errno.into()))?;
        let file = self.add_file(RingFile { fd, kind: FileKind::Other })?;
        if self.remotes.is_none() {
            // What is linked is never taken apart so.
            self.warm_up()?;
            self.remotes = Some(Box::new(Remotes::new(self)));
        }
        let Some(remotes) = &mut self.remotes else { return Err(full()) };
        let index = u16::try_from(remotes.conns.len()).map_err(|_| full())?;
        let flights = u32::try_from(remotes.asks.len()).unwrap_or(u32::MAX);
        let line = Line::new()?;
        remotes.conns.push(Conn {
            remote: Arc::clone(remote),
            line: Arc::clone(&line),
            file,
            beyond: None,
            records: None,
            next: None,
            talk: Conversation::new(flights, remote.agreed(), remote.patience()),
            large: 0,
            batch: Batch::new(),
            receiving: Receiving::default(),
            memory: Arena::new(2, receive::ROOM, false)?,
            lost: String::new(),
        });
        self.listen_to(index);
        remote.dial(&line, None);
        Ok(FileId(IS_REMOTE | index))
    }

    /// Whether a splice goes to a place behind a socket.
    #[inline(always)]
    pub(super) fn is_remote(splice: &Splice<'_>) -> bool {
        matches!(splice.to, To::File(FileId(id)) if id & IS_REMOTE != 0)
    }

    /// Starts a splice to or from such a place.
    #[cold]
    #[inline(never)]
    pub(super) fn ask(&mut self, key: u32, splice: &Splice<'_>) {
        self.with_remotes(|remotes, ring| remotes.ask(ring, key, splice));
    }

    /// Sends what was asked since the last time. Nothing to wait for if something has landed.
    #[cold]
    #[inline(never)]
    pub(super) fn send_asked(&mut self) -> bool {
        self.with_remotes(|remotes, ring| {
            for index in 0..remotes.conns.len() {
                remotes.send(ring, index);
            }
            !remotes.landed.is_empty()
        })
    }

    /// The next of what has landed.
    pub(super) fn landed_far(&mut self) -> Option<(u32, Result<u64, Errno>)> {
        self.remotes.as_mut()?.landed.pop_front()
    }

    /// An entry of a connection has completed.
    #[cold]
    #[inline(never)]
    pub(super) fn remote_event(&mut self, (conn, what): (u16, u32), result: i32) {
        self.with_remotes(|remotes, ring| {
            let index = usize::from(conn);
            match what {
                SENT => remotes.sent(ring, index, result),
                HEAD => remotes.headed(ring, index, result),
                DATA => remotes.filled(ring, index, result),
                TICK => remotes.tick(ring),
                // Whether it has found something to end: that says so itself.
                PROD => {}
                _ => remotes.connected(ring, index),
            }
        });
    }

    fn with_remotes<T: Default>(&mut self, then: impl FnOnce(&mut Remotes, &mut Uring) -> T) -> T {
        let Some(mut remotes) = self.remotes.take() else { return T::default() };
        let done = then(&mut remotes, self);
        self.remotes = Some(remotes);
        done
    }

    /// Asks to hear of the next connection. As other bells, it is not among the registered files.
    fn listen_to(&mut self, index: u16) {
        let Some(remotes) = &self.remotes else { return };
        let fd = remotes.conns[usize::from(index)].line.bell.ear().as_raw_fd();
        self.queues.push(Sqe {
            opcode: OP_POLL_ADD,
            fd,
            op_flags: u32::try_from(libc::POLLIN).unwrap_or(1),
            user_data: user_data(usize::from(index), BELL),
            ..Sqe::default()
        });
    }

    /// Ends all connections, so that the kernel lets go of their memory.
    pub(super) fn hang_up(&mut self) {
        let Some(mut remotes) = self.remotes.take() else { return };
        remotes.part(self);
        for round in 0..100 {
            if round == GOODBYE {
                for conn in &remotes.conns {
                    let _ = shutdown(conn.socket(self), Shutdown::Both);
                }
            }
            if remotes.conns.iter().all(Conn::is_quiet) || self.queues.enter(0).is_err() {
                break;
            }
            while let Some(cqe) = self.queues.next() {
                if cqe.user_data & super::KIND_MASK == KIND_REMOTE {
                    let (conn, what) = super::lane_and_index(cqe.user_data);
                    remotes.quieted(usize::from(conn), what);
                }
            }
            let wait = rustix::event::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            let _ = poll(&mut [PollFd::new(&self.queues.fd, PollFlags::IN)], Some(&wait));
        }
    }
}

fn full() -> Error {
    Error::invalid("a ring's connections", "too many")
}

fn user_data(index: usize, what: u32) -> u64 {
    KIND_REMOTE | (index as u64) << 32 | u64::from(what)
}

impl Conn {
    /// Whether no entry of it but its bell is out.
    fn is_quiet(&self) -> bool {
        self.batch.out == 0 && self.receiving.out == 0
    }

    fn socket<'a>(&self, ring: &'a Uring) -> BorrowedFd<'a> {
        ring.files[usize::from(self.file.0)].fd.as_fd()
    }
}

impl Remotes {
    fn new(ring: &Uring) -> Remotes {
        let flights = ring.flights.len();
        Remotes {
            conns: Vec::new(),
            asks: vec![Ask::NONE; flights].into(),
            landed: VecDeque::with_capacity(flights),
            is_ticking: false,
            has_slots: ring.slot_bases.iter().any(Option::is_some),
            takes_slots: probe::sockets_take_slots(),
        }
    }

    fn ask(&mut self, ring: &mut Uring, key: u32, splice: &Splice<'_>) {
        let To::File(FileId(id)) = splice.to else { return };
        let index = usize::from(id & !IS_REMOTE);
        let conn = &mut self.conns[index];
        let mut ask = Ask {
            conn: id & !IS_REMOTE,
            op: splice.op,
            at: splice.at,
            // What is more is asked for when this has landed, short.
            len: conn.talk.fit(splice.op, splice.len),
            pages: splice.pages,
            ..Ask::NONE
        };
        let mut left = ask.len;
        for part in splice.parts {
            let len = u64::from(part.len).min(left);
            if len > 0 {
                ask.parts[ask.part_count] =
                    Part { at: part.at, len: u32::try_from(len).unwrap_or(part.len) };
                ask.part_count += 1;
                left -= len;
            }
        }
        if splice.op.has_pages()
            && let PagesKind::Memory { lane, slot } = PagesKind::unpack(splice.pages)
            && let Some(arena) = &mut ring.arenas[usize::from(lane)]
        {
            arena.lend(usize::from(slot));
        }
        conn.large += u32::from(ask.is_large());
        let question = Question { op: splice.op, fua: splice.fua, at: splice.at, len: ask.len };
        let refused = conn.talk.ask(key, question);
        self.asks[key as usize] = ask;
        match refused {
            Some(result) => self.land(ring, key, result),
            None => self.arm_tick(ring),
        }
    }

    /// A splice is over; nothing of the kernel's names its pages.
    fn land(&mut self, ring: &mut Uring, key: u32, result: Result<(), Errno>) {
        let ask = &self.asks[key as usize];
        let conn = &mut self.conns[usize::from(ask.conn)];
        conn.large -= u32::from(ask.is_large());
        let result = result.map(|()| ask.len);
        if ask.op.has_pages() {
            let done = result.unwrap_or(0);
            match PagesKind::unpack(ask.pages) {
                PagesKind::Slot(_) => ring.bytes_spliced += done,
                PagesKind::Memory { lane, slot } => {
                    if let Some(arena) = &mut ring.arenas[usize::from(lane)] {
                        arena.give_back(usize::from(slot));
                    }
                    let is_inner = usize::from(lane) >= ring.outer;
                    *(if is_inner { &mut ring.bytes_meta } else { &mut ring.bytes_copied }) += done;
                }
            }
        }
        self.landed.push_back((key, result));
    }

    /// The server has answered.
    fn answered(&mut self, ring: &mut Uring, key: u32, result: Result<(), u32>) {
        let ask = &self.asks[key as usize];
        let index = usize::from(ask.conn);
        let conn = &mut self.conns[index];
        let (blame, verdict) = conn.talk.answered(key, result);
        if let Some(blame) = blame {
            conn.remote.tell(&format!("gives {blame}: {} failed", shown(ask)));
        }
        match verdict {
            Verdict::Open => {}
            Verdict::Over(result) => self.land(ring, key, result),
            Verdict::Parting => self.lose(ring, index, "it is being shut down".to_owned()),
        }
    }

    /// As the completion of an entry, where nobody wants to know its result.
    fn quieted(&mut self, index: usize, what: u32) {
        let conn = &mut self.conns[index];
        match what {
            SENT => conn.batch.give_back(&mut conn.memory),
            HEAD => conn.receiving.head_back(&mut conn.memory),
            DATA => conn.receiving.out -= 1,
            _ => {}
        }
    }
}

fn shown(ask: &Ask) -> String {
    format!("{} of {} bytes at {}", ask.op.name(), ask.len, ask.at)
}
