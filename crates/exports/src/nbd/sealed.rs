//! Answers for a connection whose TLS the kernel does, where there is more than data: what a client
//! says about TLS, new keys, the end.

use std::os::fd::AsFd;

use devsplice_core::Errno;
use devsplice_uring::Uring;

use super::connection::{Connection, ROOM};
use super::post::Client;
use super::state::Phase;

impl Connection {
    /// What the result of a receive means: a record that is no data is taken out of the way here,
    /// and the receive may be tried again. Nothing of it was received then.
    ///
    /// # Errors
    /// If the connection is of no use any more, as something is wrong with its TLS.
    pub(super) fn hear(&mut self, result: i32) -> Result<i32, String> {
        let again = -Errno::EAGAIN.raw();
        let Some(Client { socket, records: Some(records), .. }) = &mut self.client else {
            return Ok(result);
        };
        if result >= 0 || !matches!(self.phase, Phase::Open | Phase::Leaving) {
            return Ok(result);
        }
        match Errno::from_result(result) {
            errno if errno.is_transient() => Ok(result),
            Errno::EIO => records.hear(socket.as_fd()).map(|more| if more { again } else { 0 }),
            errno if super::state::is_gone(errno) => Ok(result),
            errno => Err(format!("TLS: what it sends is no record: {errno}")),
        }
    }

    /// A send is over.
    pub(super) fn count(&mut self, result: i32) {
        if let Some(Client { records: Some(records), .. }) = &mut self.client {
            records.sent(u64::try_from(result).unwrap_or(0));
        }
    }

    /// Renews the keys of what is sent, if that is due and nothing is being sent.
    pub(super) fn renew(&mut self, ring: &mut Uring) {
        let Some(Client { socket, records: Some(records), .. }) = &mut self.client else { return };
        if !records.is_due() || self.outbox.is_sending() {
            return;
        }
        if matches!(self.phase, Phase::Open | Phase::Leaving)
            && let Err(reason) = records.renew(socket.as_fd())
        {
            self.lose(Some(&reason));
            self.settle(ring);
        }
    }

    /// Tells a client that has got all its answers over TLS by the kernel that this is the end.
    /// Whether that is done; if not, there is no room for it before the client takes something.
    pub(super) fn has_last_word(&mut self, ring: &mut Uring) -> bool {
        let Some(Client { socket, records: Some(records), .. }) = &mut self.client else {
            return true;
        };
        if self.phase != Phase::Leaving || records.close(socket.as_fd()) {
            return true;
        }
        if !std::mem::replace(&mut self.awaits_room, true) {
            ring.poll_room((self.lane, ROOM << 16), self.socket);
        }
        false
    }

    /// Whether the kernel does TLS for it.
    pub(super) fn is_sealed(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.records.is_some())
    }

    /// The end of a connection of which nothing is out any more. One that has been told so over TLS
    /// by the kernel is waited for: what has been encrypted may not be with the network yet, and a
    /// socket that is closed with bytes unread, as the client's own last word would be, takes
    /// answers back that are under way.
    pub(super) fn farewell(&mut self) {
        let is_sealed = self.is_sealed();
        if is_sealed {
            self.post.unseal();
        }
        if self.phase == Phase::Leaving
            && is_sealed
            && let Some(Client { socket, records: Some(records), .. }) = self.client.take()
        {
            self.post.see_off(socket, records);
        } else {
            self.lose(None);
        }
    }
}

#[cfg(test)]
mod tests;
