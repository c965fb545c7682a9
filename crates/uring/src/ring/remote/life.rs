//! Answers for the life of a connection: how it is lost, what is held meanwhile and for how long,
//! how the next one takes over.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use devsplice_core::Errno;
use devsplice_nbd::wire::command;
use devsplice_nbd::{Broken, Mode, Request};
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::{
    BELL, Link, Patience, Receiving, Remotes, SECOND, STRIKES, State, TICK, Uring, user_data,
};
use crate::files::{FileKind, RingFile};
use crate::uapi::{OP_POLL_ADD, OP_TIMEOUT, Sqe};

impl Remotes {
    /// What the server has said is no NBD.
    pub(super) fn broke(&mut self, ring: &mut Uring, index: usize, broken: Broken) {
        let conn = &mut self.conns[index];
        conn.strikes = conn.strikes.saturating_add(1);
        self.lose(ring, index, format!("it sends {}", broken.0));
    }

    /// A connection is of no use any more.
    pub(super) fn lose(&mut self, ring: &mut Uring, index: usize, why: String) {
        let conn = &mut self.conns[index];
        if conn.state != State::Up {
            return;
        }
        conn.state = State::Ending;
        conn.lost = why;
        if conn.open == 0 {
            // Nobody has waited so far.
            conn.down_since = None;
        }
        // What is out ends by it. It may be closed already.
        let _ = shutdown(conn.socket(ring), Shutdown::Both);
        self.settle(ring, index);
    }

    /// Begins to hold what is open, when no entry of the connection is out any more.
    pub(super) fn settle(&mut self, ring: &mut Uring, index: usize) {
        let Remotes { conns, asks, tick, .. } = self;
        let conn = &mut conns[index];
        if conn.state != State::Ending || !conn.is_quiet() {
            return;
        }
        conn.state = State::Down;
        conn.down_since.get_or_insert(*tick);
        // There may soon be a connection again, and no answer over that one, either.
        let outage = conn.outage(*tick);
        conn.batch.clear();
        conn.receiving = Receiving::default();
        conn.asks.restart(Mode::Simple, None);
        conn.unsent.clear();
        for (key, ask) in (0..).zip(asks.iter_mut()) {
            if ask.is_open && usize::from(ask.conn) == index {
                (ask.is_sending, ask.is_flushing, ask.early) = (false, false, None);
                conn.unsent.push_back(key);
            }
        }
        conn.unsent.make_contiguous().sort_unstable_by_key(|key| asks[*key as usize].serial);
        let line = Arc::clone(&conn.line);
        conn.remote.dial(&line, Some(&conn.lost));
        if conn.strikes >= STRIKES {
            self.fail(ring, index, "speaks no NBD that can be understood");
        } else if let Some(outage) = outage {
            self.fail(ring, index, &format!("has been away for {outage} s"));
        }
        self.arm_tick(ring);
    }

    /// Gives up what is held, and what comes until there is a connection.
    fn fail(&mut self, ring: &mut Uring, index: usize, why: &str) {
        let conn = &mut self.conns[index];
        if std::mem::replace(&mut conn.is_failing, true) {
            return;
        }
        let count = conn.unsent.len();
        conn.remote.tell(&format!("{why}: {count} requests fail, and all until it is back"));
        while let Some(key) = self.conns[index].unsent.pop_front() {
            self.land(ring, key, Err(Errno::EIO));
        }
    }

    /// There may be a connection.
    pub(super) fn connected(&mut self, ring: &mut Uring, index: usize) {
        let conn = &mut self.conns[index];
        let link = conn.line.take();
        if let Some(link) = link
            && conn.state == State::Down
        {
            let Link { socket, agreed } = link;
            match ring.replace_file(conn.file, RingFile { fd: socket, kind: FileKind::Other }) {
                Ok(()) => {
                    conn.state = State::Up;
                    conn.asks.restart(agreed.mode, agreed.allocation);
                    (conn.heard, conn.is_failing) = (self.tick, false);
                    if conn.open == 0 {
                        conn.down_since = None;
                    }
                    self.receive(ring, index);
                }
                Err(error) => {
                    let line = Arc::clone(&conn.line);
                    conn.remote.dial(&line, Some(&error.to_string()));
                }
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
        self.tick = self.tick.wrapping_add(1);
        let mut is_waiting = false;
        for index in 0..self.conns.len() {
            let conn = &self.conns[index];
            let Patience { answer, .. } = conn.remote.patience();
            // Seconds are counted as they end, so one more than was meant is at least that.
            let silent = self.tick.wrapping_sub(conn.heard);
            if conn.state == State::Up && conn.open > 0 && answer > 0 && silent > answer {
                self.lose(ring, index, format!("it has not answered for {answer} s"));
            }
            let conn = &self.conns[index];
            if conn.state == State::Down
                && let Some(outage) = conn.outage(self.tick)
            {
                self.fail(ring, index, &format!("has been away for {outage} s"));
            }
            let conn = &self.conns[index];
            is_waiting |= conn.open > 0 || (conn.state != State::Up && !conn.is_failing);
        }
        if is_waiting {
            self.arm_tick(ring);
        }
    }

    /// Says goodbye where that can be, and ends the connections.
    pub(super) fn part(&mut self, ring: &mut Uring) {
        for conn in self.conns.iter_mut().filter(|conn| conn.state != State::Down) {
            let socket = conn.socket(ring);
            let mut how = Shutdown::Both;
            if conn.state == State::Up && conn.batch.out == 0 {
                let goodbye = Request {
                    flags: 0,
                    command: command::DISCONNECT,
                    cookie: 0,
                    offset: 0,
                    length: 0,
                };
                // There is room for it, or nobody listens any more.
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                if send(socket, goodbye.head(conn.asks.mode()).bytes(), flags).is_ok() {
                    // It has to get there; the server hangs up when it does.
                    how = Shutdown::Write;
                }
            }
            let _ = shutdown(socket, how);
            conn.remote.part();
        }
    }
}
