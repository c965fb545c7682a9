//! Answers for a handshake over a socket that does not block.
//!
//! Records are received one by one, never more: what follows the last of them is still in the
//! socket when it is handed over, to the kernel or to a thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use devsplice_core::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::relay::{self, Relay};
use crate::side::{Fault, Side, Step};

/// Bytes of a record's header.
const HEAD: usize = 5;
/// Bytes of the longest record.
pub(crate) const MAX_RECORD: usize = HEAD + (16 << 10) + 2048;
/// Bytes that a peer may send until both agree: some certificates, not a disk's worth of them.
const MAX_BYTES: usize = 256 << 10;
/// Bytes that most records of a handshake take, and all of them after it.
pub(crate) const CONTROL: usize = 512;
/// Steps between two waits; each takes a record or brings one.
const MAX_STEPS: usize = 1000;

/// How a handshake stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Something has to come from the peer.
    Reads,
    /// The peer has to take something.
    Writes,
    /// Both agree; [`Handshake::finish`].
    Done,
}

/// Who moves bytes between plain and encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A thread of this process.
    Relay,
}

/// What a handshake has come to.
pub struct Secured {
    /// Plain bytes come out of it and go into it.
    pub socket: OwnedFd,
    /// How.
    pub way: Way,
}

/// A handshake that is under way.
pub struct Handshake<S> {
    side: S,
    socket: OwnedFd,
    /// What the peer is called.
    theirs: &'static str,
    /// What has come of a record, or of those that the library wants to see again.
    incoming: Vec<u8>,
    /// Bytes at its front that the library has seen.
    seen: usize,
    outgoing: Vec<u8>,
    received: usize,
}

impl<S> AsFd for Handshake<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<S: Side> Handshake<S> {
    pub(crate) fn new(side: S, socket: OwnedFd, theirs: &'static str) -> Handshake<S> {
        Handshake {
            side,
            socket,
            theirs,
            incoming: Vec::new(),
            seen: 0,
            outgoing: Vec::new(),
            received: 0,
        }
    }

    fn error(&self, fault: &Fault) -> Error {
        Error::new(ErrorKind::Permission, "TLS", fault.reason(self.theirs))
    }

    fn lost(&self, reason: &str) -> Error {
        Error::new(ErrorKind::Os, "TLS", format!("{} {reason}", self.theirs))
    }

    fn gone(&self) -> Error {
        let why = self.side.doubt(self.received > 0);
        let why = why.map_or(String::new(), |why| format!(" ({why})"));
        self.lost(&format!("has gone in the middle of a handshake{why}"))
    }

    /// Goes on as far as that is possible without waiting.
    ///
    /// # Errors
    /// If there will be no agreement; says what is wrong with whom. The peer has been told.
    pub fn advance(&mut self) -> Result<Progress> {
        for _ in 0..MAX_STEPS {
            if !self.send()? {
                return Ok(Progress::Writes);
            }
            match self.step() {
                Ok(Step::Again) => {}
                Ok(Step::Done) if self.outgoing.is_empty() => return Ok(Progress::Done),
                Ok(Step::Done) => {}
                Ok(Step::Blocked) => {
                    if !self.receive()? {
                        return Ok(Progress::Reads);
                    }
                }
                Err(fault) => {
                    // It is told why, if it listens.
                    let _ = self.send();
                    return Err(self.error(&fault));
                }
            }
        }
        Err(self.lost("keeps us busy"))
    }

    /// Goes on until both agree, for a caller that may wait.
    ///
    /// # Errors
    /// As [`Handshake::advance`]; and if it is not done by `end`.
    pub fn wait(&mut self, end: Instant) -> Result<()> {
        loop {
            let flags = match self.advance()? {
                Progress::Done => return Ok(()),
                Progress::Reads => PollFlags::IN,
                Progress::Writes => PollFlags::OUT,
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let reason = format!("{} does not finish a handshake in time", self.theirs);
                return Err(Error::new(ErrorKind::Timeout, "TLS", reason));
            }
            let limit = Timespec::try_from(left).ok();
            // An interruption is as good as an event.
            let _ = poll(&mut [PollFd::new(&self.socket, flags)], limit.as_ref());
        }
    }

    /// Shows the records that are there to the library; what comes next.
    fn step(&mut self) -> std::result::Result<Step, Fault> {
        let records = &mut self.incoming[..self.seen];
        let (taken, step) = self.side.agree(records, &mut self.outgoing);
        self.incoming.drain(..taken);
        self.seen -= taken;
        step
    }

    /// Sends what there is to send; whether that is all gone.
    fn send(&mut self) -> Result<bool> {
        while !self.outgoing.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, &self.outgoing, flags) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(_) => return Err(self.gone()),
            }
        }
        Ok(true)
    }

    /// Receives what is missing of a record; whether it is there, and the library may see it.
    fn receive(&mut self) -> Result<bool> {
        loop {
            let there = self.incoming.len() - self.seen;
            let wanted = match self.incoming.get(self.seen..self.seen + HEAD) {
                None => HEAD,
                Some(head) => HEAD + usize::from(u16::from_be_bytes([head[3], head[4]])),
            };
            // What cannot be a record is shown to the library at once, which says what is wrong.
            let is_tls = there == 0 || (20..=24).contains(&self.incoming[self.seen]);
            if !is_tls || wanted > MAX_RECORD || (there >= HEAD && there == wanted) {
                self.seen = self.incoming.len();
                return Ok(true);
            }
            let mut room = [0; MAX_RECORD];
            let room = &mut room[..wanted - there];
            match rustix::net::recv(&self.socket, &mut *room, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(self.gone()),
                Ok((_, count)) => {
                    self.received += count;
                    if self.received > MAX_BYTES {
                        return Err(self.lost("sends a handshake longer than any"));
                    }
                    self.incoming.extend_from_slice(&room[..count]);
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(_) => return Err(self.gone()),
            }
        }
    }

    /// Hands the connection over. `say` is told what becomes of it later, `ended` when it is over
    /// and nothing of it is left in this process.
    ///
    /// # Errors
    /// If a thread or a pair of sockets cannot be had.
    ///
    /// # Panics
    /// If the handshake is not done.
    pub fn finish(
        self,
        say: impl Fn(&str) + Send + 'static,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<Secured> {
        let is_done = !self.side.is_handshaking() && self.outgoing.is_empty();
        assert!(is_done && self.incoming.is_empty(), "a handshake was cut short");
        let relay = Relay::new(self.side, self.socket, self.theirs);
        let socket = relay::start(relay, say, ended)?;
        Ok(Secured { socket, way: Way::Relay })
    }
}
