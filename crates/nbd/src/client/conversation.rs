//! Answers for what is asked of a server over one connection after another: what may be asked, what
//! is held when a connection is lost and asked again over the next one, when that is given up.
//!
//! There is no I/O here and no clock: whoever has the sockets tells what becomes of them, and when
//! a second is over. Reads, writes, zeroes, discards and flushes have the same effect when they are
//! done twice, so what has no answer can be asked again.

use std::collections::VecDeque;

use devsplice_core::{Errno, Op};

use super::asks::{Asks, Said, errno};
use super::{Agreed, Extent};
use crate::Broken;
use crate::wire::{Head, Mode, Request, ask as flag, can, command, error};

/// Connections that end over something that is no NBD, without a good answer between them, before
/// what is asked fails: the server will not do better.
const STRIKES: u8 = 3;
/// Most bytes of a question without data: in any mode, whatever the server's block.
const LONGEST: u64 = 0xffff_0000;

/// How long a server is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Seconds without a word from a server that owes an answer after which the connection is given
    /// up; 0 for never.
    pub answer: u32,
    /// Seconds without a connection after which requests fail; `None` for never.
    pub outage: Option<u32>,
}

/// What is asked of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// What is to be done.
    pub op: Op,
    /// Whether it has to be durable when it is answered.
    pub fua: bool,
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// What an answer comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is more to be said or sent before it is over.
    Open,
    /// It is over.
    Over(Result<(), Errno>),
    /// The server is going: the connection is of no use any more.
    Parting,
}

/// A question that is not over.
#[derive(Clone, Copy)]
struct Open {
    is_open: bool,
    question: Question,
    /// The order of questions.
    serial: u64,
    /// Not all of it is sent: somebody may still name its data.
    is_sending: bool,
    /// It was done, and is being flushed since the server has no other way to make it durable.
    is_flushing: bool,
    /// The answer came before all of it was sent.
    early: Option<Result<(), Errno>>,
}

impl Open {
    const NONE: Open = Open {
        is_open: false,
        question: Question { op: Op::Flush, fua: false, at: 0, len: 0 },
        serial: 0,
        is_sending: false,
        is_flushing: false,
        early: None,
    };

    /// As the protocol says it.
    fn request(&self, has_fua: bool) -> Request {
        let Question { op, fua, at, len } = self.question;
        let fua = if fua && has_fua { flag::FUA } else { 0 };
        let (command, flags) = match op {
            _ if self.is_flushing => (command::FLUSH, 0),
            Op::Read => (command::READ, 0),
            Op::Write => (command::WRITE, fua),
            Op::Discard => (command::TRIM, fua),
            Op::WriteZeroes { unmap: true } => (command::WRITE_ZEROES, fua),
            Op::WriteZeroes { unmap: false } => (command::WRITE_ZEROES, fua | flag::NO_HOLE),
            Op::Flush | Op::Reset | Op::Finish => (command::FLUSH, 0),
        };
        let (offset, length) = if command == command::FLUSH { (0, 0) } else { (at, len) };
        Request { flags, command, cookie: 0, offset, length }
    }
}

/// How things stand with the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Questions go over it.
    Up,
    /// It was given up, and somebody may still be working on what was asked over it.
    Ending,
    /// There is none.
    Down,
}

/// Whether a server gives the export that was there before: what is other by now.
///
/// # Errors
/// If it is another one, or takes less.
pub fn same_export(then: &Agreed, now: &Agreed) -> Result<(), String> {
    if then.size != now.size {
        return Err(format!("{} bytes, it had {}", now.size, then.size));
    }
    if then.flags != now.flags {
        return Err(format!("flags {:#x}, it had {:#x}", now.flags, then.flags));
    }
    if now.block > then.block || now.most < then.most {
        return Err(format!("requests of {} to {} bytes", now.block, now.most));
    }
    Ok(())
}

/// All that is asked of a server from one place, under keys of the caller's.
pub struct Conversation {
    /// Of [`can`], as they were agreed on first; no later connection offers others.
    flags: u16,
    /// Bytes of data that a question may have.
    most: u32,
    patience: Patience,
    state: State,
    asks: Asks,
    /// By key.
    open: Box<[Open]>,
    /// How many of them are.
    count: u32,
    /// Keys of what is not sent yet, in order.
    unsent: VecDeque<u32>,
    serial: u64,
    /// Seconds since the beginning.
    now: u32,
    /// When the server was last heard of, or owed nothing.
    heard: u32,
    /// Since when there has been no good answer over any connection, if one was lost.
    down_since: Option<u32>,
    strikes: u8,
    /// Nothing is held any more.
    is_failing: bool,
}

impl Conversation {
    /// The beginning; there is no connection yet. Keys are below `count`.
    #[must_use]
    pub fn new(count: u32, agreed: &Agreed, patience: Patience) -> Conversation {
        Conversation {
            flags: agreed.flags,
            most: agreed.most,
            patience,
            state: State::Down,
            asks: Asks::new(count),
            open: vec![Open::NONE; count as usize].into(),
            count: 0,
            unsent: VecDeque::with_capacity(count as usize),
            serial: 0,
            now: 0,
            heard: 0,
            down_since: None,
            strikes: 0,
            is_failing: false,
        }
    }

    fn can(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// How much of `len` bytes may be asked at a time.
    #[must_use]
    pub fn fit(&self, op: Op, len: u64) -> u64 {
        len.min(if op.has_pages() { u64::from(self.most) } else { LONGEST })
    }

    /// Takes a question, to be sent when it can be; or says at once what it comes to.
    ///
    /// # Panics
    /// If the key is in use.
    pub fn ask(&mut self, key: u32, question: Question) -> Option<Result<(), Errno>> {
        let refused = match question.op {
            Op::Read => None,
            Op::Write if !self.can(can::READ_ONLY) => None,
            Op::Write => Some(Err(Errno::EROFS)),
            // Nothing that it has said is done could be lost.
            Op::Flush if !self.can(can::FLUSH) => Some(Ok(())),
            Op::Flush => None,
            Op::Discard if self.can(can::TRIM) => None,
            Op::WriteZeroes { .. } if self.can(can::WRITE_ZEROES) => None,
            _ => Some(Err(Errno::EOPNOTSUPP)),
        };
        let refused = refused.or(self.is_failing.then_some(Err(Errno::EIO)));
        if refused.is_some() {
            return refused;
        }
        let place = &mut self.open[key as usize];
        assert!(!place.is_open, "key {key} is in use");
        self.serial += 1;
        *place = Open { is_open: true, question, serial: self.serial, ..Open::NONE };
        if self.count == 0 {
            self.heard = self.now;
        }
        self.count += 1;
        self.unsent.push_back(key);
        None
    }

    /// Whether questions can be sent.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// Whether a connection would be taken.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.state == State::Down
    }

    /// Whether questions wait to be sent.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// What is to be sent next, and whether the question's data goes with it.
    #[must_use]
    pub fn first_unsent(&self) -> Option<(u32, bool)> {
        let key = *self.unsent.front()?;
        let open = &self.open[key as usize];
        Some((key, open.question.op == Op::Write && !open.is_flushing))
    }

    /// Begins to send that: its header. When all of it is sent, [`Conversation::sent`] is told.
    pub fn send(&mut self) -> Option<Head> {
        let key = self.unsent.pop_front()?;
        let has_fua = self.can(can::FUA);
        let open = &mut self.open[key as usize];
        open.is_sending = true;
        Some(self.asks.begin(key, &open.request(has_fua)))
    }

    /// All of a question is sent, nobody names its data. What it comes to, if that is known.
    pub fn sent(&mut self, key: u32) -> Option<Result<(), Errno>> {
        let open = &mut self.open[key as usize];
        open.is_sending = false;
        let early = open.early.take()?;
        self.close(key);
        Some(early)
    }

    /// How many questions are not over.
    #[must_use]
    pub fn owed(&self) -> u32 {
        self.count
    }

    /// Bytes came from the server, or it took some.
    pub fn hear(&mut self) {
        self.heard = self.now;
    }

    /// As [`Asks::next`].
    ///
    /// # Errors
    /// If that is no answer to anything.
    pub fn next(&mut self, bytes: &[u8]) -> Result<(usize, Option<Said>), Broken> {
        self.asks.next(bytes)
    }

    /// As [`Asks::room`].
    #[must_use]
    pub fn room(&self, have: usize) -> usize {
        self.asks.room(have)
    }

    /// How questions and answers look.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.asks.mode()
    }

    /// As [`Asks::extents`].
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        self.asks.extents()
    }

    /// The server has answered. What was wrong with the answer, if the server did not say so
    /// itself, and what it comes to.
    pub fn answered(
        &mut self,
        key: u32,
        result: Result<(), u32>,
    ) -> (Option<&'static str>, Verdict) {
        let blame = self.asks.take_blame();
        if result == Err(error::ESHUTDOWN) {
            return (blame, Verdict::Parting);
        }
        (self.down_since, self.strikes) = (None, 0);
        let is_lasting = self.can(can::FUA) || !self.can(can::FLUSH);
        let open = &mut self.open[key as usize];
        let Question { op, fua, .. } = open.question;
        if result.is_ok() && fua && op != Op::Read && !is_lasting && !open.is_flushing {
            open.is_flushing = true;
            self.unsent.push_back(key);
            return (blame, Verdict::Open);
        }
        let result = result.map_err(errno);
        if open.is_sending {
            open.early = Some(result);
            return (blame, Verdict::Open);
        }
        self.close(key);
        (blame, Verdict::Over(result))
    }

    /// What the server has said is no NBD. Whether that ends a connection that was there.
    pub fn broke(&mut self) -> bool {
        self.strikes = self.strikes.saturating_add(1);
        self.lose()
    }

    /// The connection is of no use any more. Whether there was one.
    pub fn lose(&mut self) -> bool {
        if self.state != State::Up {
            return false;
        }
        self.state = State::Ending;
        if self.count == 0 {
            // Nobody has waited so far.
            self.down_since = None;
        }
        true
    }

    /// Nobody works any more on what was asked over the connection that was lost: what has no
    /// answer is held for the next one. False if none was lost.
    pub fn hold(&mut self) -> bool {
        if self.state != State::Ending {
            return false;
        }
        self.state = State::Down;
        self.down_since.get_or_insert(self.now);
        self.asks.restart(Mode::Simple, None);
        self.unsent.clear();
        for (key, open) in (0..).zip(self.open.iter_mut()) {
            if open.is_open {
                (open.is_sending, open.is_flushing, open.early) = (false, false, None);
                self.unsent.push_back(key);
            }
        }
        let open = &self.open;
        self.unsent.make_contiguous().sort_unstable_by_key(|key| open[*key as usize].serial);
        true
    }

    /// Whether it is time to stop holding, until there is a connection: why, and how many questions
    /// fail, which [`Conversation::abandoned`] gives. Said once.
    pub fn give_up(&mut self) -> Option<(String, usize)> {
        if self.state != State::Down || self.is_failing {
            return None;
        }
        let why = if self.strikes >= STRIKES {
            "speaks no NBD that can be understood".to_owned()
        } else {
            let away = self.now.wrapping_sub(self.down_since?);
            // Seconds are counted as they end, so one more than was meant is at least that.
            let outage = self.patience.outage.filter(|outage| away > *outage)?;
            format!("has been away for {outage} s")
        };
        self.is_failing = true;
        Some((why, self.unsent.len()))
    }

    /// The next of the questions that have failed so.
    pub fn abandoned(&mut self) -> Option<u32> {
        if !self.is_failing {
            return None;
        }
        let key = self.unsent.pop_front()?;
        self.close(key);
        Some(key)
    }

    /// There is a connection. What is held is asked over it.
    pub fn connected(&mut self, agreed: &Agreed) {
        self.state = State::Up;
        self.asks.restart(agreed.mode, agreed.allocation);
        (self.heard, self.is_failing) = (self.now, false);
        if self.count == 0 {
            self.down_since = None;
        }
    }

    /// A second is over. If the server has been silent for longer than it may be, for how long.
    pub fn second(&mut self) -> Option<u32> {
        self.now = self.now.wrapping_add(1);
        let Patience { answer, .. } = self.patience;
        let silent = self.now.wrapping_sub(self.heard);
        let is_owed = self.state == State::Up && self.count > 0;
        (is_owed && answer > 0 && silent > answer).then_some(answer)
    }

    /// Whether it has to be told of seconds.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.count > 0 || (self.state != State::Up && !self.is_failing)
    }

    fn close(&mut self, key: u32) {
        self.open[key as usize].is_open = false;
        self.count -= 1;
    }
}
