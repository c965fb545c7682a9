//! Answers for connections whose TLS the kernel does, where there is more than data: what a server
//! says about TLS, and new keys.

use std::os::fd::AsFd;

use super::receive::ended;
use super::{Conn, Remotes, Uring};

impl Conn {
    /// A receive has failed, or found the end. A record that is no data is taken out of the way
    /// here; then it may be tried again.
    ///
    /// # Errors
    /// If the connection is of no use any more.
    pub(super) fn hear(&mut self, ring: &Uring, result: i32) -> Result<(), String> {
        if result == -libc::EIO
            && let Some(records) = &mut self.records
        {
            let socket = ring.files[usize::from(self.file.0)].fd.as_fd();
            return if records.hear(socket)? { Ok(()) } else { Err(ended(0)) };
        }
        match &self.records {
            Some(_) if result == -libc::EBADMSG => {
                Err("TLS: what it sends is no record".to_owned())
            }
            _ => Err(ended(result)),
        }
    }

    /// So many bytes have gone with a send.
    pub(super) fn count(&mut self, bytes: u32) {
        if let Some(records) = &mut self.records {
            records.sent(bytes.into());
        }
    }
}

impl Remotes {
    /// Renews the keys of what is sent, if that is due and nothing is being sent. Whether the
    /// connection is still there.
    pub(super) fn renew(&mut self, ring: &mut Uring, index: usize) -> bool {
        let conn = &mut self.conns[index];
        if let Some(records) = &mut conn.records
            && records.is_due()
            && conn.batch.out == 0
            && conn.talk.is_up()
        {
            let socket = ring.files[usize::from(conn.file.0)].fd.as_fd();
            if let Err(why) = records.renew(socket) {
                self.lose(ring, index, why);
            }
        }
        self.conns[index].talk.is_up()
    }
}
