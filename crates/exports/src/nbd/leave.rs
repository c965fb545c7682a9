//! Answers for how a connection ends: with answers to what was asked for or at once, and what is
//! waited for before its place is the next client's.

use std::os::fd::AsFd;
use std::sync::Arc;

use devsplice_uring::{FileKind, RingFile, Uring, Wait};
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

    /// Ends the connection at once; what is in flight below goes on.
    pub(super) fn lose(&mut self, reason: Option<&str>) {
        if !matches!(self.phase, Phase::Open | Phase::Leaving) {
            return;
        }
        self.phase = Phase::Lost;
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
        if self.idle.len() < self.tags.len() {
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
