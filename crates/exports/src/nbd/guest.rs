//! Answers for one client that is being greeted, until it has chosen an export: over a plain socket
//! first, and over TLS from where that begins.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_nbd::limits::HANDSHAKE_SECONDS;
use devsplice_nbd::server::{Handshake, Outcome};
use devsplice_tls::{Progress, Secured, ServerSide, Way};
use devsplice_uring::ktls::Records;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::Secure;
use super::listen::Peer;
use super::post::{Client, Post};

/// Bytes that are received at a time.
const CHUNK: usize = 4096;
/// Records that are no data.
const MOST_ASIDES: u32 = 100;

/// What NBD is spoken over.
enum Line {
    /// A socket from which plain bytes come: the client's own, or what TLS has made of it; and
    /// what is left to do where the kernel does TLS.
    Open(OwnedFd, Option<Box<dyn Records>>),
    /// TLS is being agreed on.
    Securing(Box<devsplice_tls::Handshake<ServerSide>>),
    /// It has gone wrong.
    Cut,
}

/// A client that is being greeted.
pub(super) struct Guest {
    line: Line,
    handshake: Handshake,
    pub(super) peer: Peer,
    /// Received and not taken yet.
    pending: Vec<u8>,
    end: Instant,
    /// It has chosen, and this has to be over before it is let in.
    look: Option<u64>,
    /// TLS waits for the client to take something.
    writes: bool,
    /// Records that were no data.
    asides: u32,
}

/// What has become of one.
pub(super) enum Step {
    Stays,
    Chose,
    Gone(Option<String>),
}

impl Guest {
    pub(super) fn new(socket: OwnedFd, handshake: Handshake, peer: Peer) -> Guest {
        let end = Instant::now() + Duration::from_secs(HANDSHAKE_SECONDS);
        let line = Line::Open(socket, None);
        let pending = Vec::new();
        Guest { line, handshake, peer, pending, end, look: None, writes: false, asides: 0 }
    }

    /// What is to be waited for; nothing where all is over.
    pub(super) fn poll(&self) -> Option<PollFd<'_>> {
        let (fd, writes) = match &self.line {
            _ if self.look.is_some() => return None,
            Line::Securing(handshake) => (handshake.as_fd(), self.writes),
            Line::Open(socket, _) => (socket.as_fd(), !self.handshake.output().is_empty()),
            Line::Cut => return None,
        };
        let flags = if writes { PollFlags::OUT } else { PollFlags::IN };
        Some(PollFd::from_borrowed_fd(fd, flags))
    }

    /// By when it has to have chosen.
    pub(super) fn limit(&self) -> Option<Instant> {
        self.look.is_none().then_some(self.end)
    }

    /// Whether it may be let in, as it has chosen: it may be here for the second time, and what it
    /// asks for now must not be done beside what it has asked for over a connection that has ended,
    /// so all others look first whether theirs has.
    pub(super) fn may_enter(&mut self, post: &Post) -> bool {
        let look = *self.look.get_or_insert_with(|| post.look());
        post.has_looked(look)
    }

    /// Goes on as far as that is possible without waiting.
    pub(super) fn serve(&mut self, post: &Arc<Post>, secure: Option<&Secure>) -> Step {
        if self.look.is_some() {
            return Step::Chose;
        }
        if Instant::now() >= self.end {
            let what = match self.line {
                Line::Securing(_) => "finished a TLS handshake",
                _ => "chosen an export",
            };
            return Step::Gone(Some(format!("has not {what} in {HANDSHAKE_SECONDS} s")));
        }
        loop {
            let step = match self.line {
                Line::Open(..) => self.talk(secure),
                _ => self.secure(post, secure),
            };
            if let Some(step) = step {
                return step;
            }
        }
    }

    /// A part of the conversation; what has become of it, unless it goes on.
    fn talk(&mut self, secure: Option<&Secure>) -> Option<Step> {
        if let Some(step) = self.send() {
            return Some(step);
        }
        match self.handshake.outcome() {
            Outcome::Open => {}
            Outcome::Secure => return self.begin_tls(secure),
            Outcome::Chosen(_) => return Some(Step::Chose),
            Outcome::Closed => return Some(self.gone()),
        }
        if self.pending.is_empty() {
            let Line::Open(socket, _) = &self.line else { return None };
            let mut bytes = [0; CHUNK];
            match rustix::net::recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Some(self.gone()),
                Ok((_, count)) => self.pending.extend(&bytes[..count]),
                Err(Errno::AGAIN) => return Some(Step::Stays),
                Err(Errno::INTR) => return None,
                Err(Errno::IO) => return self.hear(),
                Err(_) => return Some(self.gone()),
            }
        }
        match self.handshake.receive(&self.pending) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(broken) => {
                return Some(Step::Gone(Some(format!("speaks no NBD: {}", broken.0))));
            }
        }
        None
    }

    /// Sends what there is to send; what has become of the client, unless all of it went.
    fn send(&mut self) -> Option<Step> {
        let Line::Open(socket, records) = &mut self.line else { return None };
        if let Some(records) = records.as_mut().filter(|records| records.is_due())
            && let Err(reason) = records.renew(socket.as_fd())
        {
            return Some(Step::Gone(Some(reason)));
        }
        while !self.handshake.output().is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&*socket, self.handshake.output(), flags) {
                Ok(count) => {
                    self.handshake.sent(count);
                    if let Some(records) = records {
                        records.sent(count as u64);
                    }
                }
                Err(Errno::AGAIN) => return Some(Step::Stays),
                Err(Errno::INTR) => {}
                Err(_) => return Some(self.gone()),
            }
        }
        None
    }

    /// A record has come that is no data, where the kernel does TLS.
    fn hear(&mut self) -> Option<Step> {
        self.asides += 1;
        let Line::Open(socket, Some(records)) = &mut self.line else { return Some(self.gone()) };
        if self.asides > MOST_ASIDES {
            let reason = "speaks of nothing but TLS";
            return Some(Step::Gone(Some(reason.to_owned())));
        }
        match records.hear(socket.as_fd()) {
            Ok(true) => None,
            Ok(false) => Some(self.gone()),
            Err(reason) => Some(Step::Gone(Some(reason))),
        }
    }

    /// It has left.
    fn gone(&self) -> Step {
        Step::Gone(self.handshake.refused().map(|what| format!("{what} (--tls)")))
    }

    /// The client has been told that TLS begins.
    fn begin_tls(&mut self, secure: Option<&Secure>) -> Option<Step> {
        if !self.pending.is_empty() {
            // Whoever can write to the network may have written that.
            let reason = "has sent more behind STARTTLS without waiting for the answer";
            return Some(Step::Gone(Some(reason.to_owned())));
        }
        let (Line::Open(socket, _), Some(secure)) =
            (std::mem::replace(&mut self.line, Line::Cut), secure)
        else {
            return Some(Step::Gone(Some("wants TLS, and there is none".to_owned())));
        };
        match secure.server.accept(socket) {
            Ok(handshake) => self.line = Line::Securing(Box::new(handshake)),
            Err(error) => return Some(Step::Gone(Some(error.to_string()))),
        }
        None
    }

    /// A part of the agreement on TLS.
    fn secure(&mut self, post: &Arc<Post>, secure: Option<&Secure>) -> Option<Step> {
        let Line::Securing(handshake) = &mut self.line else { return Some(Step::Gone(None)) };
        match handshake.advance() {
            Ok(Progress::Done) => {}
            Ok(progress) => {
                self.writes = progress == Progress::Writes;
                return Some(Step::Stays);
            }
            Err(error) => return Some(Step::Gone(Some(error.to_string()))),
        }
        let Line::Securing(handshake) = std::mem::replace(&mut self.line, Line::Cut) else {
            return Some(Step::Gone(None));
        };
        let (say, name) = (post.say.clone(), self.peer.shown());
        let relay = post.begin_relay();
        let secured = handshake.finish(
            secure.is_some_and(|secure| secure.by_kernel),
            move |reason| say(&format!("nbd: {name}: TLS: {reason}; disconnected")),
            move || drop(relay),
        );
        match secured {
            Ok(Secured { socket, way: Way::Relay }) => self.line = Line::Open(socket, None),
            Ok(Secured { socket, way: Way::Kernel(session) }) => {
                self.line = Line::Open(socket, Some(session));
            }
            Err(error) => return Some(Step::Gone(Some(error.to_string()))),
        }
        self.handshake.secured();
        None
    }

    /// What it has become, if it has chosen.
    pub(super) fn chosen(self) -> Option<Client> {
        let Outcome::Chosen(session) = self.handshake.outcome().clone() else { return None };
        let Line::Open(socket, records) = self.line else { return None };
        Some(Client { socket, records, session, early: self.pending, peer: self.peer.shown() })
    }
}
