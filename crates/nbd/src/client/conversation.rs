//! Answers for what is asked of a server over one connection after another: what may be asked, what
//! is held when a connection is lost and asked again over the next one, when that is given up.
//!
//! There is no I/O here and no clock: whoever has the sockets tells what becomes of them, and when
//! a second is over. Reads, writes, zeroes, discards and flushes have the same effect when they are
//! done twice, so what has no answer can be asked again.
//!
//! A question may be what ends the connections: a server that dies of it answers others meanwhile,
//! so that it is never away for long. So losses are counted for each question, too. One that was
//! lost with several connections is a suspect. Suspects are asked one at a time, behind the rest,
//! which clears those that were lost by chance; one that goes on being lost fails, alone. One that
//! gets no answer, while others do, is waited for no longer than a silent server would be.

use std::collections::VecDeque;

use devsplice_core::{Errno, Op};

use super::asks::{Asks, Said, errno};
use super::{Agreed, Extent};
use crate::Broken;
use crate::wire::{Head, Mode, Request, ask as flag, can, command, error};

/// Connections that end over something that is no NBD, without a good answer between them, before
/// what is asked fails: the server will not do better.
const STRIKES: u8 = 3;
/// Connections that are lost with a question before it is a suspect.
const SUSPECT: u32 = 3;
/// Connections that are lost with a question before it fails, if it has waited for long enough.
const MOST_LOSSES: u32 = 5;
/// Seconds without a word after which it is asked whether bytes have moved.
const DOUBT: u32 = 2;
/// Most bytes of a question without data: in any mode, whatever the server's block.
const LONGEST: u64 = 0xffff_0000;

/// How long a server is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Seconds without a word from a server that owes an answer after which the connection is given
    /// up; 0 for never.
    pub answer: u32,
    /// Seconds without a good answer after which requests fail; and for a question that was lost
    /// with one connection after another, seconds since the first of them. `None` for never.
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

/// A question that was lost with one connection after another, whatever became of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accused {
    /// Which.
    pub key: u32,
    /// Connections that were lost with it.
    pub losses: u32,
    /// It is not asked again: it has failed.
    pub is_over: bool,
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
    /// Some of it was sent over the connection of now.
    is_asked: bool,
    /// A suspect that waits for others to be answered.
    is_held_back: bool,
    /// Connections that were lost with it, and when the first was.
    losses: u32,
    lost_at: u32,
}

impl Open {
    const NONE: Open = Open {
        is_open: false,
        question: Question { op: Op::Flush, fua: false, at: 0, len: 0 },
        serial: 0,
        is_sending: false,
        is_flushing: false,
        early: None,
        is_asked: false,
        is_held_back: false,
        losses: 0,
        lost_at: 0,
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
    /// The suspect that is asked, or about to be.
    tried: Option<u32>,
    /// When it was sent.
    tried_at: u32,
    accused: VecDeque<Accused>,
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
            tried: None,
            tried_at: 0,
            accused: VecDeque::new(),
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
        (open.is_sending, open.is_asked) = (true, true);
        if self.tried == Some(key) {
            self.tried_at = self.now;
        }
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
        for key in 0..self.open.len() {
            if self.open[key].is_open {
                self.hold_one(key);
            }
        }
        let open = &self.open;
        self.unsent.make_contiguous().sort_unstable_by_key(|key| open[*key as usize].serial);
        self.try_next();
        true
    }

    /// Holds a question, unless it was lost with too many connections.
    fn hold_one(&mut self, place: usize) {
        let Patience { outage, .. } = self.patience;
        let (open, now) = (&mut self.open[place], self.now);
        let Ok(key) = u32::try_from(place) else { return };
        let was_asked = std::mem::take(&mut open.is_asked);
        (open.is_sending, open.is_flushing, open.early) = (false, false, None);
        if was_asked {
            if open.losses == 0 {
                open.lost_at = now;
            }
            open.losses = open.losses.saturating_add(1);
            let losses = open.losses;
            let away = now.wrapping_sub(open.lost_at);
            // Who does not want to wait at all does not wait for a pattern to be seen.
            let most = if outage == Some(0) { 1 } else { MOST_LOSSES };
            let is_over = losses >= most && outage.is_some_and(|outage| away > outage);
            if is_over || losses == MOST_LOSSES {
                self.accused.push_back(Accused { key, losses, is_over });
            }
            if is_over {
                return;
            }
        }
        open.is_held_back = open.losses >= SUSPECT;
        if !open.is_held_back {
            self.unsent.push_back(key);
        }
    }

    /// Has the next suspect asked, as none is any more: the one that is the least suspect.
    #[cold]
    fn try_next(&mut self) {
        let suspects = (0..).zip(self.open.iter()).filter(|(_, open)| open.is_held_back);
        self.tried = suspects.min_by_key(|(_, open)| (open.losses, open.serial)).map(|one| one.0);
        if let Some(key) = self.tried {
            self.open[key as usize].is_held_back = false;
            self.unsent.push_back(key);
        }
    }

    /// The next of the questions of which there is something to be said since
    /// [`Conversation::hold`]; all have to be asked for before anything else is.
    pub fn accused(&mut self) -> Option<Accused> {
        let accused = self.accused.pop_front()?;
        if accused.is_over {
            self.close(accused.key);
        }
        Some(accused)
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
        Some((why, self.count as usize))
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

    /// From now on it is waited for as briefly as can be.
    pub fn hurry(&mut self) {
        self.patience = Patience { answer: 1, outage: Some(0) };
    }

    /// A second is over. If the server has been silent for longer than it may be, for how long. If
    /// not, there may be something to be sent.
    pub fn second(&mut self) -> Option<u32> {
        self.now = self.now.wrapping_add(1);
        let Patience { answer, .. } = self.patience;
        let is_sent = |key: u32| self.open[key as usize].is_asked;
        let is_late = self.now.wrapping_sub(self.tried_at) > answer;
        if self.state == State::Up && answer > 0 && is_late && self.tried.is_some_and(is_sent) {
            self.try_next();
        }
        let silent = self.now.wrapping_sub(self.heard);
        let is_owed = self.state == State::Up && self.count > 0;
        (is_owed && answer > 0 && silent > answer).then_some(answer)
    }

    /// Whether the server has been silent for some time, as far as is known. If bytes have moved
    /// that nobody has told of with [`Conversation::hear`], now is the time.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        let Patience { answer, .. } = self.patience;
        let is_owed = self.state == State::Up && self.count > 0;
        is_owed && answer > 0 && self.now.wrapping_sub(self.heard) >= answer.min(DOUBT)
    }

    /// Whether it has to be told of seconds.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.count > 0 || (self.state != State::Up && !self.is_failing)
    }

    fn close(&mut self, key: u32) {
        self.open[key as usize].is_open = false;
        self.count -= 1;
        if self.tried == Some(key) {
            self.try_next();
        }
    }
}
