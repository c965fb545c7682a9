//! Answers for the thread that greets clients: accepts them, leads the handshake, hands those that
//! have chosen to the I/O threads. It also answers questions about ranges, which may wait for a
//! file system. Those that may wait for a server are answered by a thread of their own.
//!
//! All clients that are being greeted are served in turn, none for longer than it has sent bytes
//! for. There are never more of them than free desks: others wait in the kernel's queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_nbd::server::{Handshake, Offer, Tls};
use devsplice_nbd::wire::can;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Secure;
use super::extents;
use super::guest::{Guest, Step};
use super::listen::{Listener, Peer, Rule};
use super::post::{Letter, Post};
use crate::extents::Extents;

/// What the thread serves with.
pub(super) struct Host {
    pub(super) post: Arc<Post>,
    /// What questions are answered from, unless somebody else does.
    pub(super) known: Option<Extents>,
    pub(super) offer: Offer,
    pub(super) rules: Vec<Rule>,
    /// Whether clients that come over a network may change data.
    pub(super) writable: bool,
    /// TLS, where it is spoken.
    pub(super) secure: Option<Secure>,
}

impl Host {
    /// Greets until told to stop.
    pub(super) fn run(&self, listeners: &[Listener]) {
        let mut guests: Vec<Guest> = Vec::new();
        while !self.post.is_stopping() {
            self.wait(listeners, &guests);
            self.post.bell.heard();
            if let Some(known) = &self.known {
                answer(&self.post, known);
            }
            let mut left = Vec::with_capacity(guests.len());
            for mut guest in guests {
                match guest.serve(&self.post, self.secure.as_ref()) {
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
        // A relay outlives its connection by the moment that its client needs to go.
        let places = (self.post.taken() + guests.len()).max(self.post.relays());
        places < self.post.desks.len()
    }

    /// Waits until there is something to do.
    fn wait(&self, listeners: &[Listener], guests: &[Guest]) {
        let mut all = vec![PollFd::new(self.post.bell.ear(), PollFlags::IN)];
        if self.known.is_some() {
            all.push(PollFd::new(self.post.asked.ear(), PollFlags::IN));
        }
        if self.has_room(guests) {
            all.extend(listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
        }
        all.extend(guests.iter().filter_map(Guest::poll));
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
            let tls = self.secure.as_ref().map_or(Tls::Off, |secure| secure.policy);
            let handshake = Handshake::new(vec![offer]).with_tls(tls);
            guests.push(Guest::new(socket, handshake, peer));
        }
    }

    fn hand_over(&self, guest: Guest) {
        let peer = guest.peer;
        let Some(client) = guest.chosen() else { return };
        match self.post.take_desk() {
            Some(desk) => desk.send(Letter::Client(Box::new(client))),
            None => self.part(&peer, Some("comes when all connections are taken".into())),
        }
    }

    fn part(&self, peer: &Peer, reason: Option<String>) {
        if let Some(reason) = reason {
            (self.post.say)(&format!("nbd: {}: {reason}; disconnected", peer.shown()));
        }
    }
}

/// Answers all questions that there are.
fn answer(post: &Post, known: &Extents) {
    post.asked.heard();
    while !post.is_stopping()
        && let Some(question) = post.take_question()
    {
        let range = (question.at, question.len);
        let extents = extents::list(known, range, question.most);
        let letter = Letter::Answer { tag: question.tag, extents };
        post.desks[question.lane].send(letter);
    }
}

/// Answers questions until told to stop, where that may take a while.
pub(super) fn answer_all(post: &Post, known: &Extents) {
    while !post.is_stopping() {
        let _ = poll(&mut [PollFd::new(post.asked.ear(), PollFlags::IN)], None);
        answer(post, known);
    }
}

/// The flags of the same export for who may change nothing.
pub(super) fn read_only(flags: u16) -> u16 {
    (flags | can::READ_ONLY) & !(can::TRIM | can::WRITE_ZEROES | can::FAST_ZERO)
}
