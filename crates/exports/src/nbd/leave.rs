//! Answers for how a connection ends: with answers to what was asked for or at once, and what is
//! waited for before its place is the next client's.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devsplice_core::{Extent, Io};
use devsplice_engine::Inbox;
use devsplice_uring::{FileKind, RingFile, Uring, Wait};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;

use super::connection::{Connection, RECEIVED, STAGE};
use super::listen::is_local;
use super::post::Client;
use super::state::{Intake, Phase};

impl Connection {
    /// Ends the connection: with answers to what was asked for, or at once.
    pub(super) fn end(&mut self) {
        match &self.client {
            Some(client) if self.post.is_gentle() && self.phase == Phase::Open => {
                self.phase = Phase::Leaving;
                if is_local(&client.socket) {
                    // The receive that is out ends.
                    let _ = rustix::net::shutdown(&client.socket, Shutdown::Read);
                } else {
                    self.sees_off = true;
                }
            }
            _ if self.post.is_gentle() => {}
            _ => self.lose(None),
        }
        for tag in 0..self.stage() {
            // Nobody answers that any more.
            if std::mem::take(&mut self.tags[usize::from(tag)].asked) {
                self.free(tag);
            }
        }
    }

    /// Ends the connection at once. What is in flight below goes on; what changes the same bytes
    /// over another connection waits for that.
    pub(super) fn lose(&mut self, reason: Option<&str>) {
        if !matches!(self.phase, Phase::Open | Phase::Leaving) {
            return;
        }
        self.phase = Phase::Lost;
        self.leave_behind();
        while let Some((tag, _)) = self.held.pop_front() {
            // Nobody has begun it, and nobody will.
            self.free(tag);
        }
        let Some(client) = &self.client else { return };
        if let Some(reason) = reason {
            (self.post.say)(&format!("nbd: {}: {reason}; disconnected", client.peer));
        }
        let post = Arc::clone(&self.post);
        post.forget(self.desk, |tag| {
            if std::mem::take(&mut self.tags[usize::from(tag)].asked) {
                self.free(tag);
            }
        });
        let is_sending = self.outbox.is_sending();
        let Some(client) = &mut self.client else { return };
        if let Some(records) = &mut client.records
            && reason.is_none()
            && !is_sending
        {
            // Who does not take what there is will not hear of the end, either.
            let _ = records.close(client.socket.as_fd());
        }
        // Whatever is out on the socket ends now.
        let _ = rustix::net::shutdown(&client.socket, Shutdown::Both);
    }

    /// Somebody comes: if the client has gone it is noticed before that one is let in.
    pub(super) fn look(&mut self, look: u64) {
        if let Some(client) = &self.client {
            let ends = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
            let mut socket = [PollFd::new(&client.socket, PollFlags::RDHUP)];
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            if poll(&mut socket, Some(&at_once)).is_ok() && socket[0].revents().intersects(ends) {
                self.notice();
            }
        }
        self.post.desks[self.desk].looked.fetch_max(look, Ordering::AcqRel);
        self.post.bell.ring();
    }

    /// The client has gone, perhaps with requests sent that nobody has received yet: none of them
    /// may begin now that it may ask again over another connection.
    pub(super) fn notice(&mut self) {
        // What the kernel has not decrypted yet may be no TLS at all, and that is to be said: it is
        // received until it ends, as behind a relay.
        if self.phase == Phase::Open && !self.is_sealed() {
            let is_between = self.intake.is_between(self.staged);
            self.lose((!is_between).then_some("gone in the middle of a request"));
        }
    }

    /// The connection ends: its changes that are under way are those that others wait for.
    pub(super) fn leave_behind(&mut self) {
        for (number, tag) in (0..).zip(&mut self.tags) {
            if tag.changes > 0 && !std::mem::replace(&mut tag.is_stale, true) {
                let extent = Extent { at: tag.offset, len: tag.changes };
                self.post.stale.add(self.desk, number, extent);
            }
        }
    }

    /// A change has to wait for one that a connection which has ended has asked for.
    pub(super) fn hold(&mut self, tag: u16, io: Io) {
        if self.held.is_empty() {
            let peer = self.client.as_ref().map_or("", |client| &client.peer);
            let text = "waits for a change of the same bytes whose connection has ended";
            (self.post.say)(&format!("nbd: {peer}: {text}"));
        }
        self.held.push_back((tag, io));
    }

    /// Begins what has waited for changes that are over.
    pub(super) fn go_on(&mut self, ring: &mut Uring, inbox: &mut Inbox) {
        for _ in 0..self.held.len() {
            let Some((tag, io)) = self.held.pop_front() else { return };
            if self.post.stale.keeps(self.desk, io.extent) {
                self.held.push_back((tag, io));
            } else {
                self.begin(inbox, tag, io, ring);
                if self.phase != Phase::Open {
                    self.leave_behind();
                }
            }
        }
    }

    /// Leaves the place to the next client when nothing of this one is out any more.
    pub(super) fn settle(&mut self, ring: &mut Uring) {
        match self.phase {
            Phase::Leaving if self.sees_off => return self.see_off(ring),
            Phase::Leaving | Phase::Lost => {}
            Phase::Free | Phase::Open => return,
        }
        if self.receiving
            || self.awaits_room
            || self.outbox.is_sending()
            || (self.phase == Phase::Leaving && self.outbox.has_any())
        {
            return;
        }
        while let Some(tag) = self.outbox.next_left() {
            self.free(tag);
        }
        if let Intake::Data { tag, .. } = std::mem::replace(&mut self.intake, Intake::Request) {
            self.free(tag);
        }
        if self.idle.len() < self.tags.len() || self.unwatch(ring) {
            return;
        }
        if !self.has_last_word(ring) {
            return;
        }
        self.farewell();
        (self.phase, self.staged) = (Phase::Free, (0, 0));
        self.client = None;
        self.let_go(ring);
        self.post.leave(self.desk);
        if self.post.is_stopping() {
            // It is listened to as long as somebody is here.
            self.post.desks[self.desk].bell.ring();
        }
    }

    /// Takes what a client over a network still sends until it sees the end and hangs up: a socket
    /// that is closed with bytes unread loses answers under way. `Post::stop` bounds it.
    fn see_off(&mut self, ring: &mut Uring) {
        if !self.receiving {
            self.receiving = true;
            let index = (self.lane, RECEIVED << 16 | u32::from(self.stage()));
            ring.receive(index, self.socket, (0, STAGE), Wait::Some);
        }
        let half = usize::from(matches!(self.intake, Intake::Data { .. }));
        if self.outbox.has_any() || self.idle.len() + half < self.tags.len() {
            return;
        }
        // Some of what TLS by the kernel has encrypted may not be with the network yet, and would
        // be lost with a shutdown. The client hangs up when it hears that this is the end.
        if self.has_last_word(ring)
            && let Some(Client { socket, records: None, .. }) = &self.client
        {
            let _ = rustix::net::shutdown(socket, Shutdown::Write);
        }
    }

    /// Has the ring forget the socket, so that it closes.
    fn let_go(&self, ring: &mut Uring) {
        if let Ok(fd) = self.post.desks[self.desk].bell.ear().try_clone() {
            // Kept until the next client's replaces it if that fails; it is shut down in any case.
            let _ = ring.replace_file(self.socket, RingFile { fd, kind: FileKind::Other });
        }
    }
}
