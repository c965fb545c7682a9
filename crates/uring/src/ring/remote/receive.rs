//! Answers for what comes in over a connection: headers into memory of its own, data into the
//! pages of the reads that it belongs to.
//!
//! Where a read's pages are the device's own, never more is received into that memory than is sure
//! to be headers: there is no way for us to bring data from there into such pages. Where they are
//! memory of ours, what came with the headers is copied.

use devsplice_nbd::client::Said;

use super::{Conn, DATA, HEAD, Remotes, Uring, user_data};
use crate::arena::Arena;
use crate::splice::{DATA_AT, PagesKind, with_slot, zero_slot};
use crate::uapi::{MSG_WAITALL, OP_RECV, RECVSEND_POLL_FIRST, SQE_FIXED_FILE, SQE_IO_LINK, Sqe};

/// Bytes of a connection's memory for what comes.
pub(super) const ROOM: usize = 64 << 10;
/// Where that is in the connection's memory.
const IN: usize = 1;
/// Reads from this size on are worth receiving to where they belong, and not with their headers.
pub(super) const LARGE: u64 = 32 << 10;

/// Data that is on its way into a read's pages.
#[derive(Clone, Copy)]
struct Target {
    key: u32,
    at: u32,
    left: u32,
    /// It does not come: the pages are zeroed.
    is_hole: bool,
}

/// Where a connection is in what it receives.
#[derive(Default)]
pub(super) struct Receiving {
    /// Bytes that were received and not looked at: from where to where.
    from: usize,
    to: usize,
    target: Option<Target>,
    /// Entries that are out.
    pub(super) out: u16,
    /// One of them is for headers.
    is_heading: bool,
}

impl Receiving {
    /// Whether data is on its way to where it belongs.
    pub(super) fn has_data_out(&self) -> bool {
        self.out > u16::from(self.is_heading)
    }

    /// The completion of an entry for headers is out.
    pub(super) fn head_back(&mut self, memory: &mut Arena) {
        self.out -= 1;
        self.is_heading = false;
        memory.give_back(IN);
    }
}

impl Remotes {
    /// Looks at what has come, and asks for more.
    pub(super) fn receive(&mut self, ring: &mut Uring, index: usize) {
        // Each round takes bytes, ends an answer or returns.
        while self.conns[index].talk.is_up() {
            let conn = &mut self.conns[index];
            if let Some(target) = conn.receiving.target {
                match self.fill(ring, index, target) {
                    true => continue,
                    false => return,
                }
            }
            let Receiving { from, to, is_heading, .. } = conn.receiving;
            // While an entry for headers is out, nothing is there that was not looked at.
            let bytes = if is_heading { &[][..] } else { &conn.memory.bytes(IN)[from..to] };
            match conn.talk.next(bytes) {
                Ok((0, None)) => return self.receive_head(ring, index),
                Ok((taken, said)) => {
                    conn.receiving.from += taken;
                    match said {
                        None => {}
                        Some(Said::Done { key, result }) => self.answered(ring, key, result),
                        Some(Said::Data { key, at, len }) => {
                            let left = self.copy(ring, index, (key, at), len);
                            let at = at + (len - left);
                            self.aim(index, Target { key, at, left, is_hole: false });
                        }
                        Some(Said::Hole { key, at, len }) => {
                            self.aim(index, Target { key, at, left: len, is_hole: true });
                        }
                    }
                }
                Err(broken) => return self.broke(ring, index, broken),
            }
        }
        self.settle(ring, index);
    }

    fn aim(&mut self, index: usize, target: Target) {
        self.conns[index].receiving.target = (target.left > 0).then_some(target);
    }

    /// Copies what came along with the headers to where it belongs; how much is still to come.
    fn copy(&mut self, ring: &mut Uring, index: usize, (key, at): (u32, u32), len: u32) -> u32 {
        let Remotes { conns, asks, .. } = self;
        let conn = &mut conns[index];
        let (ask, mut at, mut left) = (&asks[key as usize], at, len);
        while left > 0 && conn.receiving.from < conn.receiving.to {
            let there = conn.receiving.to - conn.receiving.from;
            let most = left.min(u32::try_from(there).unwrap_or(u32::MAX));
            let (Some(part), PagesKind::Memory { lane, slot }) =
                (ask.place(at, most), PagesKind::unpack(ask.pages))
            else {
                // `head_room` has seen to it that it is not so.
                panic!("data of a read was received where only headers may be")
            };
            let from = conn.receiving.from;
            let bytes = &conn.memory.bytes(IN)[from..from + part.len as usize];
            if let Some(arena) = &mut ring.arenas[usize::from(lane)] {
                arena.put_lent(usize::from(slot), DATA_AT + part.at as usize, bytes);
            }
            conn.receiving.from += part.len as usize;
            (at, left) = (at + part.len, left - part.len);
        }
        left
    }

    /// Receives headers, as far as it is sure that nothing else comes along.
    fn receive_head(&mut self, ring: &mut Uring, index: usize) {
        let room = self.head_room(index);
        let conn = &mut self.conns[index];
        if !conn.receiving.is_heading {
            push_head(conn, ring, (index, room));
        }
    }

    /// How many bytes may come into the connection's memory.
    fn head_room(&self, index: usize) -> usize {
        let conn = &self.conns[index];
        let have = conn.receiving.to - conn.receiving.from;
        let is_careful = self.has_slots || conn.large > 0;
        if is_careful { conn.talk.room(have).min(ROOM - have) } else { ROOM - have }
    }

    /// Brings the next of a read's data to where it belongs; whether it is there already.
    fn fill(&mut self, ring: &mut Uring, index: usize, target: Target) -> bool {
        let Remotes { conns, asks, takes_slots, .. } = self;
        let conn = &mut conns[index];
        let Target { key, at, left, is_hole } = target;
        let ask = &asks[key as usize];
        let Some(part) = ask.place(at, left) else { panic!("a read has no byte {at}") };
        let mut sqe = Sqe {
            opcode: OP_RECV,
            fd: i32::from(conn.file.0),
            flags: SQE_FIXED_FILE,
            op_flags: MSG_WAITALL,
            len: part.len,
            ..Sqe::default()
        };
        let mut is_whole = !is_hole;
        match PagesKind::unpack(ask.pages) {
            PagesKind::Memory { lane, slot } => {
                let place = (usize::from(slot), DATA_AT + part.at as usize);
                let Some(arena) = &mut ring.arenas[usize::from(lane)] else { return false };
                if is_hole {
                    arena.zero_lent(place.0, place.1, part.len as usize);
                    self.aim(index, advanced(target, part.len));
                    return true;
                }
                sqe.addr = arena.address(place.0, place.1, part.len as usize);
            }
            PagesKind::Slot(slot) if is_hole => sqe = zero_slot(slot, part.at.into(), part.len),
            PagesKind::Slot(slot) => {
                (sqe, is_whole) = with_slot(sqe, slot, part.at.into(), *takes_slots);
            }
        }
        sqe.user_data = user_data(index, DATA);
        // What comes behind the data begins with headers again.
        let is_last = is_whole && part.len == left && !conn.receiving.is_heading;
        if is_last && ring.queues.has_room_for(2) {
            ring.queues.push(Sqe { flags: sqe.flags | SQE_IO_LINK, ..sqe });
            conn.receiving.out += 1;
            (conn.receiving.from, conn.receiving.to) = (0, 0);
            let room = self.head_room(index);
            push_head(&mut self.conns[index], ring, (index, room));
            return false;
        }
        ring.queues.push(sqe);
        conn.receiving.out += 1;
        false
    }

    /// An entry for headers has completed.
    pub(super) fn headed(&mut self, ring: &mut Uring, index: usize, result: i32) {
        let conn = &mut self.conns[index];
        conn.receiving.head_back(&mut conn.memory);
        if !conn.talk.is_up() {
            return self.settle(ring, index);
        }
        match result {
            1.. => {
                conn.receiving.to += usize::try_from(result).unwrap_or(0);
                conn.talk.hear();
            }
            // Linked behind data that has not come whole.
            _ if is_transient(result) => {}
            _ => match conn.hear(ring, result) {
                Ok(()) if !self.renew(ring, index) => return,
                Ok(()) => {}
                Err(why) => return self.lose(ring, index, why),
            },
        }
        let conn = &self.conns[index];
        if conn.receiving.target.is_none() || conn.receiving.out == 0 {
            self.receive(ring, index);
        }
    }

    /// An entry for data has completed.
    pub(super) fn filled(&mut self, ring: &mut Uring, index: usize, result: i32) {
        let conn = &mut self.conns[index];
        conn.receiving.out -= 1;
        if !conn.talk.is_up() {
            return self.settle(ring, index);
        }
        let Some(target) = conn.receiving.target else { return };
        match u32::try_from(result) {
            Ok(done) if done > 0 => {
                conn.talk.hear();
                self.aim(index, advanced(target, done));
            }
            Err(_) if is_transient(result) => {}
            _ => match conn.hear(ring, result) {
                Ok(()) if !self.renew(ring, index) => return,
                Ok(()) => {}
                Err(why) => return self.lose(ring, index, why),
            },
        }
        let receiving = &self.conns[index].receiving;
        // What was linked behind it was not carried out, and says so before this goes on.
        if receiving.target.is_some() && receiving.is_heading {
            return;
        }
        self.receive(ring, index);
    }
}

/// Asks for headers, at most `room` bytes behind what is there.
fn push_head(conn: &mut Conn, ring: &mut Uring, (index, room): (usize, usize)) {
    debug_assert!(!conn.receiving.is_heading);
    let Receiving { from, to, .. } = conn.receiving;
    if from > 0 {
        conn.memory.bytes(IN).copy_within(from..to, 0);
    }
    let have = to - from;
    (conn.receiving.from, conn.receiving.to) = (0, have);
    // Where nothing can be there yet it is not tried: behind the data of the only answer, or if
    // there is none to come.
    let is_early = conn.talk.owed() <= u32::from(conn.receiving.target.is_some());
    ring.queues.push(Sqe {
        opcode: OP_RECV,
        fd: i32::from(conn.file.0),
        flags: SQE_FIXED_FILE,
        ioprio: if is_early { RECVSEND_POLL_FIRST } else { 0 },
        addr: conn.memory.address(IN, have, room),
        len: u32::try_from(room).unwrap_or(0),
        user_data: user_data(index, HEAD),
        ..Sqe::default()
    });
    conn.memory.lend(IN);
    conn.receiving.is_heading = true;
    conn.receiving.out += 1;
}

fn advanced(target: Target, done: u32) -> Target {
    Target { at: target.at + done, left: target.left.saturating_sub(done), ..target }
}

/// Whether nothing has moved, and may yet. What is cancelled is, to hear how far it has come.
fn is_transient(result: i32) -> bool {
    [libc::EINTR, libc::EAGAIN, libc::ECANCELED].contains(&-result)
}

/// Why nothing comes any more.
pub(super) fn ended(result: i32) -> String {
    match result {
        0 => "it has closed the connection".to_owned(),
        _ => std::io::Error::from_raw_os_error(-result).to_string(),
    }
}
