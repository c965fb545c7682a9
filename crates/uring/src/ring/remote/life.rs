//! Answers for the life of a connection: how it is lost, what is held meanwhile and for how long,
//! how the next one takes over.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use devsplice_core::Errno;
use devsplice_nbd::client::conversation::Accused;
use devsplice_nbd::wire::command;
use devsplice_nbd::{Broken, Request};
use rustix::net::sockopt::socket_domain;
use rustix::net::{AddressFamily, SendFlags, Shutdown, send, shutdown};

use super::super::lent::send_memory;
use super::{BELL, Conn, DATA, Link, PROD, Receiving, Remotes, SECOND, SENT, TICK, Uring};
use super::{shown, user_data};
use crate::files::{FileKind, RingFile};
use crate::uapi::{OP_ASYNC_CANCEL, OP_POLL_ADD, OP_TIMEOUT, Sqe};

impl Conn {
    /// Whether the server may still read what it was sent over the connection that was lost. Where
    /// both ends are on this machine, that is so until it has, or has closed its end: what is sent
    /// is at its end, and closing ours takes nothing back.
    fn has_unread(&self, ring: &Uring) -> bool {
        let is_unread = |socket: BorrowedFd<'_>| {
            socket_domain(socket) == Ok(AddressFamily::UNIX)
                && send_memory(socket).is_some_and(|(queued, _)| queued > 0)
        };
        is_unread(self.socket(ring)) || self.beyond.iter().any(|beyond| is_unread(beyond.as_fd()))
    }
}

impl Remotes {
    /// What the server has said is no NBD.
    pub(super) fn broke(&mut self, ring: &mut Uring, index: usize, broken: Broken) {
        if self.conns[index].talk.broke() {
            self.end(ring, index, format!("it sends {}", broken.0));
        }
    }

    /// A connection is of no use any more.
    pub(super) fn lose(&mut self, ring: &mut Uring, index: usize, why: String) {
        if self.conns[index].talk.lose() {
            self.end(ring, index, why);
        }
    }

    fn end(&mut self, ring: &mut Uring, index: usize, why: String) {
        let conn = &mut self.conns[index];
        conn.lost = why;
        // What is out ends by it. It may be closed already.
        let _ = shutdown(conn.socket(ring), Shutdown::Both);
        if let Some(beyond) = &conn.beyond {
            let _ = shutdown(beyond, Shutdown::Both);
        }
        self.settle(ring, index);
    }

    /// Begins to hold what is open, when no entry of the connection is out any more.
    pub(super) fn settle(&mut self, ring: &mut Uring, index: usize) {
        let conn = &mut self.conns[index];
        if !conn.is_quiet() || !conn.talk.hold() {
            return;
        }
        conn.batch.clear();
        conn.receiving = Receiving::default();
        let line = Arc::clone(&conn.line);
        conn.remote.dial(&line, Some(&conn.lost));
        self.accuse(ring, index);
        // There may soon be a connection again, and no answer over that one, either.
        self.give_up(ring, index);
        self.arm_tick(ring);
    }

    /// Fails what was lost with one connection after another while others are answered.
    fn accuse(&mut self, ring: &mut Uring, index: usize) {
        while let Some(Accused { key, losses, is_over }) = self.conns[index].talk.accused() {
            let what = shown(&self.asks[key as usize]);
            let end = if is_over { "it fails" } else { "it may be why, and is asked again" };
            let text = format!("{losses} connections were lost while {what} had no answer: {end}");
            self.conns[index].remote.tell(&text);
            if is_over {
                self.land(ring, key, Err(Errno::EIO));
            }
        }
    }

    /// Fails what is held, and what comes until there is a connection, if it is time for that.
    fn give_up(&mut self, ring: &mut Uring, index: usize) {
        let conn = &mut self.conns[index];
        let Some((why, count)) = conn.talk.give_up() else { return };
        conn.remote.tell(&format!("{why}: {count} requests fail, and all until it is back"));
        while let Some(key) = self.conns[index].talk.abandoned() {
            self.land(ring, key, Err(Errno::EIO));
        }
    }

    /// There may be a connection.
    pub(super) fn connected(&mut self, ring: &mut Uring, index: usize) {
        let conn = &mut self.conns[index];
        let link = conn.line.take();
        if let Some(link) = link
            && conn.talk.is_down()
        {
            conn.next = Some(link);
            self.take_over(ring, index);
            if self.conns[index].next.is_some() {
                let text = "has not read what it was sent before; requests wait until it has";
                self.conns[index].remote.tell(text);
            }
        }
        ring.queues.push(Sqe {
            opcode: OP_POLL_ADD,
            fd: self.conns[index].line.bell.ear().as_raw_fd(),
            op_flags: u32::try_from(libc::POLLIN).unwrap_or(1),
            user_data: user_data(index, BELL),
            ..Sqe::default()
        });
    }

    /// Takes the next connection, if there is one and nothing can come after what is said over it.
    fn take_over(&mut self, ring: &mut Uring, index: usize) {
        let conn = &mut self.conns[index];
        if conn.next.is_some() && conn.has_unread(ring) {
            return self.arm_tick(ring);
        }
        let Some(Link { socket, agreed, beyond, records }) = conn.next.take() else { return };
        match ring.replace_file(conn.file, RingFile { fd: socket, kind: FileKind::Other }) {
            Ok(()) => {
                (conn.beyond, conn.records) = (beyond, records);
                conn.talk.connected(&agreed);
                self.receive(ring, index);
            }
            Err(error) => {
                let line = Arc::clone(&conn.line);
                conn.remote.dial(&line, Some(&error.to_string()));
            }
        }
    }

    /// Has what is under way say how far it has come. An entry that completes when all of its bytes
    /// have moved says nothing before; one that is cancelled completes with those that have, or
    /// with `ECANCELED` if none has (io_uring/net.c, `io_sendrecv_fail`, Linux 6.1 to 7.3). What is
    /// left goes on with another.
    fn prod(&mut self, ring: &mut Uring, index: usize) {
        let conn = &self.conns[index];
        for (what, is_out) in [(SENT, conn.batch.out > 0), (DATA, conn.receiving.has_data_out())] {
            if is_out {
                ring.queues.push(Sqe {
                    opcode: OP_ASYNC_CANCEL,
                    fd: -1,
                    // Of those that are linked, the first: the others have not begun.
                    addr: user_data(index, what),
                    user_data: user_data(index, PROD),
                    ..Sqe::default()
                });
            }
        }
    }

    pub(super) fn arm_tick(&mut self, ring: &mut Uring) {
        if std::mem::replace(&mut self.is_ticking, true) {
            return;
        }
        ring.queues.push(Sqe {
            opcode: OP_TIMEOUT,
            fd: -1,
            addr: std::ptr::from_ref(&SECOND) as u64,
            len: 1,
            user_data: user_data(0, TICK),
            ..Sqe::default()
        });
    }

    /// A second is over.
    pub(super) fn tick(&mut self, ring: &mut Uring) {
        self.is_ticking = false;
        let mut is_waiting = false;
        for index in 0..self.conns.len() {
            let conn = &mut self.conns[index];
            if conn.remote.is_forsaken() {
                conn.talk.hurry();
            }
            if let Some(seconds) = conn.talk.second() {
                self.lose(ring, index, format!("it has not answered for {seconds} s"));
            } else if conn.talk.is_in_doubt() {
                self.prod(ring, index);
            }
            self.send(ring, index);
            self.take_over(ring, index);
            self.give_up(ring, index);
            is_waiting |= self.conns[index].talk.is_waiting();
        }
        if is_waiting {
            self.arm_tick(ring);
        }
    }

    /// Says goodbye where that can be, and ends the connections.
    pub(super) fn part(&mut self, ring: &mut Uring) {
        for conn in &mut self.conns {
            if conn.talk.is_down() {
                if conn.next.take().is_some() {
                    conn.remote.part();
                }
                continue;
            }
            let socket = ring.files[usize::from(conn.file.0)].fd.as_fd();
            let mut how = Shutdown::Both;
            if conn.talk.is_up() && conn.batch.out == 0 {
                let goodbye = Request {
                    flags: 0,
                    command: command::DISCONNECT,
                    cookie: 0,
                    offset: 0,
                    length: 0,
                };
                // There is room for it, or nobody listens any more.
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                if send(socket, goodbye.head(conn.talk.mode()).bytes(), flags).is_ok() {
                    // It has to get there; the server hangs up when it does.
                    how = Shutdown::Write;
                }
            }
            match &mut conn.records {
                // What has been encrypted may not be with the network yet; a shutdown loses it.
                Some(records) if how == Shutdown::Write => drop(records.close(socket)),
                _ => drop(shutdown(socket, how)),
            }
            conn.remote.part();
        }
    }
}
