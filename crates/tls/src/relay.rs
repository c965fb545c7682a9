//! Answers for TLS by a thread of this process, where the kernel has none: it moves bytes between
//! the real socket, where they are encrypted, and one end of a pair, where they are not.
//!
//! Each way has one buffer. Nothing is read for a way while its buffer has something, so a peer
//! that does not take is not read for, either, and nothing grows. The end of one way is carried
//! over as the end of that way; an error ends both.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use devsplice_core::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown,
    socketpair,
};

use crate::certified::OVERHEAD;
use crate::handshake::MAX_RECORD;
use crate::side::{Fault, Side};

/// Plain bytes that are taken at a time.
const PLAIN: usize = 64 << 10;
/// Encrypted bytes that are taken at a time.
const CIPHER: usize = 4 * MAX_RECORD;
/// Encrypted bytes that may wait when more is taken from a peer: its records may ask for answers.
const MAX_WAITING: usize = 2 * (PLAIN + OVERHEAD);
/// How long a peer may take to hear that it is over, and to go.
const LINGER: Duration = Duration::from_secs(10);

/// One that moves.
pub(crate) struct Relay<S> {
    side: S,
    outer: OwnedFd,
    theirs: &'static str,
    /// Received and not decrypted, the first `there` bytes: less than a record, but while it is
    /// worked on.
    cipher: Box<[u8]>,
    there: usize,
    /// Decrypted and not taken yet.
    up: Vec<u8>,
    up_at: usize,
    /// Encrypted and not taken yet.
    down: Vec<u8>,
    down_at: usize,
    plain: Vec<u8>,
    /// Our end takes nothing any more; what the peer sends is thrown away until it hears that.
    is_deaf: bool,
    /// Nothing more comes from the peer; and our end knows.
    peer_ended: bool,
    up_ended: bool,
    /// Nothing more comes from our end; and the peer knows.
    down_ended: bool,
    peer_told: bool,
}

/// Why a relay is over before both ways are.
enum Stop {
    /// One of the sockets is gone.
    Gone,
    /// Something is wrong with the peer.
    Broken(String),
}

/// Starts a thread for it; plain bytes come out of and go into the socket that is returned.
pub(crate) fn start<S: Side>(
    mut relay: Relay<S>,
    say: impl Fn(&str) + Send + 'static,
    ended: impl FnOnce() + Send + 'static,
) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|errno| Error::os("a pair of sockets", &errno.into()))?;
    std::thread::Builder::new()
        .name("tls".to_owned())
        .stack_size(512 << 10)
        .spawn(move || {
            if let Err(Stop::Broken(reason)) = relay.run(&ours) {
                say(&reason);
            }
            let _ = shutdown(&ours, Shutdown::Both);
            drop((relay, ours));
            ended();
        })
        .map_err(|error| Error::os("a thread for TLS", &error))?;
    Ok(theirs)
}

impl<S: Side> Relay<S> {
    pub(crate) fn new(side: S, outer: OwnedFd, theirs: &'static str) -> Relay<S> {
        Relay {
            side,
            outer,
            theirs,
            cipher: vec![0; CIPHER].into(),
            there: 0,
            up: Vec::new(),
            up_at: 0,
            down: Vec::with_capacity(PLAIN + OVERHEAD),
            down_at: 0,
            plain: vec![0; PLAIN],
            is_deaf: false,
            peer_ended: false,
            up_ended: false,
            down_ended: false,
            peer_told: false,
        }
    }

    fn broken(&self, fault: &Fault) -> Stop {
        Stop::Broken(fault.reason(self.theirs))
    }

    /// Moves until both ways are over, or one cannot go on.
    fn run(&mut self, inner: &OwnedFd) -> Result<(), Stop> {
        let mut end: Option<Instant> = None;
        loop {
            self.give_up(inner)?;
            self.give_down()?;
            if self.up_ended && self.peer_told {
                return Ok(());
            }
            if self.down_ended && end.is_none() {
                end = Some(Instant::now() + LINGER);
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Stop::Gone);
            }
            let (outer_ready, inner_ready) = self.wait(inner, left)?;
            if outer_ready && self.takes_outer() {
                self.take_outer(inner)?;
            }
            if inner_ready && self.takes_inner() {
                self.take_inner(inner)?;
            }
        }
    }

    fn takes_outer(&self) -> bool {
        !self.peer_ended && self.up.is_empty() && self.down.len() < MAX_WAITING
    }

    fn takes_inner(&self) -> bool {
        !self.down_ended && self.down.is_empty()
    }

    /// Waits until something can be moved: something at the real socket, something at the pair.
    fn wait(&self, inner: &OwnedFd, limit: Option<Duration>) -> Result<(bool, bool), Stop> {
        let flags = |takes, gives| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, takes);
            flags.set(PollFlags::OUT, gives);
            flags
        };
        let outer = flags(self.takes_outer(), !self.down.is_empty());
        let inner_flags = flags(self.takes_inner(), !self.up.is_empty());
        let mut all = [
            PollFd::from_borrowed_fd(self.outer.as_fd(), outer),
            PollFd::from_borrowed_fd(inner.as_fd(), inner_flags),
        ];
        // One that nothing is wanted of would only say again and again that its peer has gone.
        let range = match (outer.is_empty(), inner_flags.is_empty() && !S::DROPS_REST) {
            (true, _) => 1..2,
            (_, true) => 0..1,
            _ => 0..2,
        };
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        // An interruption is as good as an event: both are looked at.
        let _ = poll(&mut all[range], limit.as_ref());
        if S::DROPS_REST && all[1].revents().contains(PollFlags::HUP) {
            // Nothing that it has not sent yet is sent when it is closed.
            let _ = set_socket_linger(&self.outer, Some(Duration::ZERO));
            return Err(Stop::Gone);
        }
        Ok((!all[0].revents().is_empty(), !all[1].revents().is_empty()))
    }

    /// Takes what the peer has sent, and gives on what can be given at once.
    fn take_outer(&mut self, inner: &OwnedFd) -> Result<(), Stop> {
        match recv(&self.outer, &mut self.cipher[self.there..], RecvFlags::DONTWAIT) {
            // Without a word: what it has said until now is good, and the protocol inside knows
            // whether that is all.
            Ok((_, 0)) => self.peer_ended = true,
            Ok((_, count)) => {
                self.there += count;
                self.decrypt(inner)?;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return Err(Stop::Gone),
        }
        Ok(())
    }

    /// Decrypts all records that are there whole.
    fn decrypt(&mut self, inner: &OwnedFd) -> Result<(), Stop> {
        let Relay { side, cipher, there, up, down, is_deaf, .. } = self;
        let mut give = |plain: &[u8]| {
            if !*is_deaf {
                give(inner, plain, up);
            }
        };
        let (taken, closed) = side.open(&mut cipher[..*there], down, &mut give);
        self.forget(taken);
        match closed {
            Ok(is_closed) => self.peer_ended |= is_closed,
            Err(fault) => {
                // It is told why, if it listens.
                let _ = self.give_down();
                return Err(self.broken(&fault));
            }
        }
        Ok(())
    }

    fn forget(&mut self, taken: usize) {
        self.cipher.copy_within(taken..self.there, 0);
        self.there -= taken;
    }

    /// Gives our end what it has not taken yet; and the end, when that is next.
    fn give_up(&mut self, inner: &OwnedFd) -> Result<(), Stop> {
        while self.up_at < self.up.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(inner, &self.up[self.up_at..], flags) {
                Ok(count) => self.up_at += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                // Nobody will take it, and no more. There may be something left for the peer: a
                // socket that is closed with bytes unread takes back what is under way.
                Err(_) => {
                    self.up_at = self.up.len();
                    self.is_deaf = true;
                }
            }
        }
        self.up.clear();
        self.up_at = 0;
        if self.peer_ended && !self.up_ended {
            self.up_ended = true;
            let _ = shutdown(inner, Shutdown::Write);
        }
        Ok(())
    }

    /// Takes what our end has to say, and encrypts it.
    fn take_inner(&mut self, inner: &OwnedFd) -> Result<(), Stop> {
        let count = match recv(inner, &mut self.plain[..], RecvFlags::DONTWAIT) {
            Ok((_, count)) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => 0,
        };
        self.down_ended = count == 0;
        self.encrypt(count)
    }

    /// Encrypts so many plain bytes; none is the end.
    fn encrypt(&mut self, count: usize) -> Result<(), Stop> {
        let Relay { side, cipher, there, down, plain, .. } = self;
        let (taken, result) = side.seal(&mut cipher[..*there], &plain[..count], down);
        self.forget(taken);
        result.map_err(|fault| self.broken(&fault))
    }

    /// Gives the peer what it has not taken yet; and the end, when that is next.
    fn give_down(&mut self) -> Result<(), Stop> {
        while self.down_at < self.down.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.outer, &self.down[self.down_at..], flags) {
                Ok(count) => self.down_at += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Stop::Gone),
            }
        }
        self.down.clear();
        self.down_at = 0;
        if self.down_ended && !self.peer_told {
            self.peer_told = true;
            let _ = shutdown(&self.outer, Shutdown::Write);
        }
        Ok(())
    }
}

/// Gives our end what it takes at once; the rest waits.
fn give(inner: &OwnedFd, mut bytes: &[u8], rest: &mut Vec<u8>) {
    while rest.is_empty() && !bytes.is_empty() {
        match send(inner, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            // Found again, and dealt with, when the rest is given.
            Err(_) => break,
        }
    }
    rest.extend_from_slice(bytes);
}
