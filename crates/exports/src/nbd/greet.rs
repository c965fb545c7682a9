//! Answers for the thread that greets clients: accepts them, leads the handshake, hands those that
//! have chosen to the I/O threads. It also answers questions about ranges, which may wait for a
//! file system.
//!
//! All clients that are being greeted are served in turn, none for longer than it has sent bytes
//! for. There are never more of them than free desks: others wait in the kernel's queue.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_core::Stack;
use devsplice_nbd::limits::HANDSHAKE_SECONDS;
use devsplice_nbd::server::{Handshake, Offer, Outcome};
use devsplice_nbd::wire::can;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::extents::extents;
use super::listen::{Listener, Peer, Rule};
use super::post::{Client, Letter, Post};
use crate::threads::Bottom;

/// Bytes that are received at a time.
const CHUNK: usize = 4096;

/// Where questions are answered from.
pub(super) struct Looked {
    pub(super) stack: Arc<Stack>,
    pub(super) bottoms: Vec<Bottom>,
}

/// What the thread serves with.
pub(super) struct Host {
    pub(super) post: Arc<Post>,
    pub(super) looked_at: Looked,
    pub(super) offer: Offer,
    pub(super) rules: Vec<Rule>,
    /// Whether clients that come over a network may change data.
    pub(super) writable: bool,
}

/// A client that is being greeted.
struct Guest {
    socket: OwnedFd,
    handshake: Handshake,
    peer: Peer,
    /// Received and not taken yet.
    pending: Vec<u8>,
    end: Instant,
}

/// What has become of one.
enum Step {
    Stays,
    Chose,
    Gone(Option<String>),
}

impl Host {
    /// Greets until told to stop.
    pub(super) fn run(&self, listeners: &[Listener]) {
        let mut guests: Vec<Guest> = Vec::new();
        while !self.post.is_stopping() {
            self.wait(listeners, &guests);
            self.post.bell.heard();
            while let Some(question) = self.post.take_question() {
                let of = (&*self.looked_at.stack, &*self.looked_at.bottoms);
                let extents = extents(of, (question.at, question.len), question.most);
                let letter = Letter::Answer { tag: question.tag, extents };
                self.post.desks[question.lane].send(letter);
            }
            let mut left = Vec::with_capacity(guests.len());
            for mut guest in guests {
                match self.serve(&mut guest) {
                    Step::Stays => left.push(guest),
                    Step::Chose => self.hand_over(guest),
                    Step::Gone(reason) => self.part(&guest.peer, reason),
                }
            }
            guests = left;
            for listener in listeners {
                self.accept(listener, &mut guests);
            }
        }
    }

    fn has_room(&self, guests: &[Guest]) -> bool {
        self.post.taken() + guests.len() < self.post.desks.len()
    }

    /// Waits until there is something to do.
    fn wait(&self, listeners: &[Listener], guests: &[Guest]) {
        let mut all = vec![PollFd::new(self.post.bell.ear(), PollFlags::IN)];
        if self.has_room(guests) {
            all.extend(listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
        }
        for guest in guests {
            let waits = !guest.handshake.output().is_empty();
            let flags = if waits { PollFlags::OUT } else { PollFlags::IN };
            all.push(PollFd::from_borrowed_fd(guest.socket.as_fd(), flags));
        }
        let first = guests.iter().map(|guest| guest.end).min();
        let limit = first.map(|end| end.saturating_duration_since(Instant::now()));
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        // An interruption is as good as an event: all are looked at.
        let _ = poll(&mut all, limit.as_ref());
    }

    fn accept(&self, listener: &Listener, guests: &mut Vec<Guest>) {
        while self.has_room(guests) {
            let (socket, peer) = match listener.accept() {
                Ok(client) => client,
                Err(error) => {
                    if error.kind() != std::io::ErrorKind::WouldBlock {
                        (self.post.say)(&format!("nbd: a client could not be accepted: {error}"));
                        // Out of descriptors, perhaps: not to be tried a million times a second.
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    return;
                }
            };
            if !peer.may_enter(&self.rules) {
                (self.post.say)(&format!("nbd: {}: may not connect (--allow)", peer.shown()));
                continue;
            }
            let mut offer = self.offer.clone();
            if peer.is_remote() && !self.writable {
                offer.flags = read_only(offer.flags);
            }
            let end = Instant::now() + Duration::from_secs(HANDSHAKE_SECONDS);
            let handshake = Handshake::new(vec![offer]);
            guests.push(Guest { socket, handshake, peer, pending: Vec::new(), end });
        }
    }

    /// Goes on with a client as far as that is possible without waiting.
    fn serve(&self, guest: &mut Guest) -> Step {
        if Instant::now() >= guest.end {
            let reason = format!("has not chosen an export in {HANDSHAKE_SECONDS} s");
            return Step::Gone(Some(reason));
        }
        loop {
            while !guest.handshake.output().is_empty() {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                match rustix::net::send(&guest.socket, guest.handshake.output(), flags) {
                    Ok(count) => guest.handshake.sent(count),
                    Err(Errno::AGAIN) => return Step::Stays,
                    Err(Errno::INTR) => {}
                    Err(_) => return Step::Gone(None),
                }
            }
            match guest.handshake.outcome() {
                Outcome::Open => {}
                Outcome::Chosen(_) => return Step::Chose,
                Outcome::Closed => return Step::Gone(None),
            }
            if guest.pending.is_empty() {
                let mut bytes = [0; CHUNK];
                match rustix::net::recv(&guest.socket, &mut bytes, RecvFlags::DONTWAIT) {
                    Ok((_, 0)) => return Step::Gone(None),
                    Ok((_, count)) => guest.pending.extend(&bytes[..count]),
                    Err(Errno::AGAIN) => return Step::Stays,
                    Err(Errno::INTR) => continue,
                    Err(_) => return Step::Gone(None),
                }
            }
            match guest.handshake.receive(&guest.pending) {
                Ok(count) => drop(guest.pending.drain(..count)),
                Err(broken) => return Step::Gone(Some(format!("speaks no NBD: {}", broken.0))),
            }
        }
    }

    fn hand_over(&self, guest: Guest) {
        let Outcome::Chosen(session) = guest.handshake.outcome().clone() else { return };
        let peer = guest.peer.shown();
        match self.post.take_desk() {
            Some(desk) => desk.send(Letter::Client(Box::new(Client {
                socket: guest.socket,
                session,
                early: guest.pending,
                peer,
            }))),
            None => self.part(&guest.peer, Some("comes when all connections are taken".into())),
        }
    }

    fn part(&self, peer: &Peer, reason: Option<String>) {
        if let Some(reason) = reason {
            (self.post.say)(&format!("nbd: {}: {reason}; disconnected", peer.shown()));
        }
    }
}

/// The flags of the same export for who may change nothing.
pub(super) fn read_only(flags: u16) -> u16 {
    (flags | can::READ_ONLY) & !(can::TRIM | can::WRITE_ZEROES | can::FAST_ZERO)
}
