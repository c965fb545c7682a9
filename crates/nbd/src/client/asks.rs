//! Answers for what a client has asked of an export, and for reading what the server says to it:
//! whose answer it is, where data goes, whether an answer is whole.
//!
//! The data itself is not looked at: whoever reads the stream is told where the next bytes belong,
//! and moves them there.

use devsplice_core::Errno;

use super::filled::Filled;
use crate::Broken;
use crate::limits::MAX_REPLY;
use crate::wire::{Fields, Head, Mode, Reply, Request, STATE_HOLE, STATE_ZERO};
use crate::wire::{ask, chunk, command, error};

/// What the server says next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// The next `len` bytes of the stream are those of a read from its byte `at` on.
    Data {
        /// Which read.
        key: u32,
        /// First byte, counted from the read's first.
        at: u32,
        /// Bytes.
        len: u32,
    },
    /// These bytes of a read are zeros; nothing of them follows.
    Hole {
        /// Which read.
        key: u32,
        /// First byte, counted from the read's first.
        at: u32,
        /// Bytes.
        len: u32,
    },
    /// An answer is whole.
    Done {
        /// Which.
        key: u32,
        /// What it comes to; an error is one of [`error`].
        result: Result<(), u32>,
    },
}

/// A run of bytes and what `base:allocation` says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// Nothing is allocated there.
    pub is_hole: bool,
    /// It reads as zeros.
    pub is_zero: bool,
}

/// Something that was asked.
#[derive(Clone, Copy)]
struct Ask {
    is_open: bool,
    command: u16,
    /// Which use of this place; part of the cookie, so that an answer to an earlier one is none.
    turn: u32,
    at: u64,
    len: u64,
    error: u32,
    filled: Filled,
}

/// Where the stream is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Within {
    /// At the beginning of a reply or chunk.
    Nothing,
    /// In a message that nobody reads.
    Text { key: u32, left: usize, is_last: bool },
    /// At the end of a chunk.
    End { key: u32, is_last: bool },
}

/// What is asked over one connection, under keys of the caller's.
pub struct Asks {
    mode: Mode,
    context: Option<u32>,
    asks: Box<[Ask]>,
    within: Within,
    /// Bytes from the beginning of what was not taken yet without which there is nothing to say.
    need: usize,
    turn: u32,
    extents: Vec<Extent>,
    blame: Option<&'static str>,
}

impl Asks {
    /// None yet; keys are below `count`.
    #[must_use]
    pub fn new(count: u32) -> Asks {
        let none = Ask {
            is_open: false,
            command: 0,
            turn: 0,
            at: 0,
            len: 0,
            error: 0,
            filled: Filled::NONE,
        };
        Asks {
            mode: Mode::Simple,
            context: None,
            asks: vec![none; count as usize].into(),
            within: Within::Nothing,
            need: 0,
            turn: 0,
            extents: Vec::new(),
            blame: None,
        }
    }

    /// Forgets all that was asked: a new connection begins, of this mode. `context` is the number
    /// of `base:allocation`.
    pub fn restart(&mut self, mode: Mode, context: Option<u32>) {
        (self.mode, self.context, self.within, self.need) = (mode, context, Within::Nothing, 0);
        self.asks.iter_mut().for_each(|ask| ask.is_open = false);
    }

    /// Takes note of a question and gives its header. The cookie in `request` does not matter. In
    /// extended mode the flag for a write's length is added.
    ///
    /// # Panics
    /// If the key is in use, or the length needs more than 32 bits where the mode has no more.
    pub fn begin(&mut self, key: u32, request: &Request) -> Head {
        self.turn = self.turn.wrapping_add(1);
        let place = &mut self.asks[key as usize];
        assert!(!place.is_open, "key {key} is in use");
        *place = Ask {
            is_open: true,
            command: request.command,
            turn: self.turn,
            at: request.offset,
            len: request.length,
            error: 0,
            filled: Filled::NONE,
        };
        if request.command == command::BLOCK_STATUS {
            // An answer without any must not look like the one before.
            self.extents.clear();
        }
        let mut flags = request.flags;
        if self.mode == Mode::Extended && request.command == command::WRITE {
            flags |= ask::PAYLOAD_LEN;
        }
        let cookie = u64::from(self.turn) << 32 | u64::from(key);
        Request { cookie, flags, ..*request }.head(self.mode)
    }

    /// Whether there is an unanswered question of this key.
    #[must_use]
    pub fn is_open(&self, key: u32) -> bool {
        self.asks[key as usize].is_open
    }

    /// How questions and answers look.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// How many bytes may be received behind the `have` that are there, so that none of a read's
    /// data is among them. Some byte is still to come, so it is at least one.
    #[must_use]
    pub fn room(&self, have: usize) -> usize {
        let head = self.mode.data_head_len();
        let most = match self.within {
            Within::Text { left, .. } => left + head,
            _ => head.max(self.need),
        };
        most.saturating_sub(have).max(1)
    }

    /// What was wrong with the last answer that came to `EIO` though the server did not say so.
    pub fn take_blame(&mut self) -> Option<&'static str> {
        self.blame.take()
    }

    /// What the last answer about a range has said.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// What `bytes`, the next of the stream, say first, and how many of them were taken for that:
    /// none and nothing where more are needed. Behind [`Said::Data`] the stream goes on after that
    /// data.
    ///
    /// # Errors
    /// If that is no answer to anything.
    pub fn next(&mut self, bytes: &[u8]) -> Result<(usize, Option<Said>), Broken> {
        match self.within {
            Within::Nothing => {
                let Some((reply, len)) = Reply::parse(bytes, self.mode)? else {
                    return Ok((0, None));
                };
                match reply {
                    Reply::Simple { cookie, error } => {
                        let key = self.find(cookie)?;
                        self.simple(key, error).map(|said| (len, said))
                    }
                    Reply::Chunk { cookie, flags, kind, length } => {
                        let key = self.find(cookie)?;
                        self.chunk(key, (kind, flags), length, (bytes, len))
                    }
                }
            }
            Within::Text { key, left, is_last } => {
                let count = left.min(bytes.len());
                self.within = match left - count {
                    0 => Within::End { key, is_last },
                    left => Within::Text { key, left, is_last },
                };
                if left == 0 { self.next(bytes) } else { Ok((count, None)) }
            }
            Within::End { key, is_last } => {
                self.within = Within::Nothing;
                if is_last { Ok((0, Some(self.finish(key)))) } else { self.next(bytes) }
            }
        }
    }

    fn find(&self, cookie: u64) -> Result<u32, Broken> {
        #[allow(clippy::cast_possible_truncation)]
        let (key, turn) = (cookie as u32, (cookie >> 32) as u32);
        match self.asks.get(key as usize) {
            Some(ask) if ask.is_open && ask.turn == turn => Ok(key),
            _ => Err(Broken("an answer to nothing that was asked")),
        }
    }

    fn simple(&mut self, key: u32, error: u32) -> Result<Option<Said>, Broken> {
        let ask = &mut self.asks[key as usize];
        ask.error = error;
        if self.mode != Mode::Simple && ask.command == command::READ {
            return Err(Broken("a simple answer to a read, where chunks were agreed on"));
        }
        self.within = Within::End { key, is_last: true };
        if error == 0 && ask.command == command::READ {
            return self.data(key, ask_at(&self.asks, key), None).map(Some);
        }
        Ok(None)
    }

    /// A chunk whose header is `head` bytes long and whose content is behind it.
    fn chunk(
        &mut self,
        key: u32,
        (kind, flags): (u16, u16),
        length: u64,
        (bytes, head): (&[u8], usize),
    ) -> Result<(usize, Option<Said>), Broken> {
        let is_last = flags & chunk::DONE != 0;
        let is_read = self.asks[key as usize].command == command::READ;
        let is_status = matches!(kind, chunk::STATUS | chunk::STATUS_EXTENDED);
        // What has to be there before anything can be said.
        let least = match kind {
            chunk::NONE if length == 0 && is_last => 0,
            chunk::DATA if is_read && length > 8 => 8,
            chunk::HOLE if is_read && length == 12 => 12,
            _ if is_status && length <= MAX_REPLY as u64 => length,
            _ if kind & chunk::IS_ERROR != 0 && (6..=MAX_REPLY as u64).contains(&length) => 6,
            _ => return Err(Broken("a chunk that does not belong to what was asked")),
        };
        let least = usize::try_from(least).unwrap_or(MAX_REPLY);
        let Some(content) = bytes.get(head..head + least) else {
            self.need = head + least;
            return Ok((0, None));
        };
        let taken = head + least;
        self.need = 0;
        let mut fields = Fields(content);
        self.within = Within::End { key, is_last };
        let said = match kind {
            chunk::NONE => None,
            chunk::DATA => Some(self.data(key, fields.u64().unwrap_or(0), Some(length - 8))?),
            chunk::HOLE => {
                let (at, len) = (fields.u64().unwrap_or(0), fields.u32().unwrap_or(0));
                let (at, len) = self.fill(key, at, u64::from(len))?;
                Some(Said::Hole { key, at, len })
            }
            _ if is_status => {
                self.status(key, kind, fields)?;
                None
            }
            _ => {
                let error = fields.u32().filter(|error| *error != 0);
                self.asks[key as usize].error = error.ok_or(Broken("an error that is none"))?;
                let left = usize::try_from(length).unwrap_or(0) - least;
                if left > 0 {
                    self.within = Within::Text { key, left, is_last };
                }
                None
            }
        };
        Ok((taken, said))
    }

    /// Data of a read: `len` bytes, or all.
    fn data(&mut self, key: u32, at: u64, len: Option<u64>) -> Result<Said, Broken> {
        let len = len.unwrap_or(self.asks[key as usize].len);
        let (at, len) = self.fill(key, at, len)?;
        Ok(Said::Data { key, at, len })
    }

    /// Takes note that a range, given as the device's, is there; as the read's.
    fn fill(&mut self, key: u32, at: u64, len: u64) -> Result<(u32, u32), Broken> {
        let ask = &mut self.asks[key as usize];
        let outside = Broken("data that was not asked for");
        let from = at.checked_sub(ask.at).ok_or(outside)?;
        let to = from.checked_add(len).filter(|to| *to <= ask.len && len > 0).ok_or(outside)?;
        let narrow = |at: u64| u32::try_from(at).map_err(|_| outside);
        let (from, to) = (narrow(from)?, narrow(to)?);
        ask.filled.add(from, to)?;
        Ok((from, to - from))
    }

    fn status(&mut self, key: u32, kind: u16, mut fields: Fields<'_>) -> Result<(), Broken> {
        let ask = &self.asks[key as usize];
        let is_wide = kind == chunk::STATUS_EXTENDED;
        let wrong = Broken("extents that make no sense");
        if ask.command != command::BLOCK_STATUS || fields.u32() != self.context {
            return Err(Broken("extents that were not asked for"));
        }
        if is_wide != (self.mode == Mode::Extended) || (is_wide && fields.u32().is_none()) {
            return Err(wrong);
        }
        self.extents.clear();
        let size = if is_wide { 16 } else { 8 };
        if fields.0.is_empty() || !fields.0.len().is_multiple_of(size) {
            return Err(wrong);
        }
        while !fields.0.is_empty() {
            let (len, state) = match is_wide {
                true => (fields.u64(), fields.u64()),
                false => (fields.u32().map(u64::from), fields.u32().map(u64::from)),
            };
            let (len, state) = (len.filter(|len| *len > 0).ok_or(wrong)?, state.ok_or(wrong)?);
            let is = |flag: u32| state & u64::from(flag) != 0;
            let (is_hole, is_zero) = (is(STATE_HOLE), is(STATE_ZERO));
            self.extents.push(Extent { len, is_hole, is_zero });
        }
        Ok(())
    }

    /// The last of an answer was read.
    fn finish(&mut self, key: u32) -> Said {
        let ask = &mut self.asks[key as usize];
        ask.is_open = false;
        let is_whole = match ask.command {
            command::READ => ask.filled.is_all(ask.len),
            command::BLOCK_STATUS => !self.extents.is_empty(),
            _ => true,
        };
        let result = match ask.error {
            0 if is_whole => Ok(()),
            0 => {
                self.blame = Some("an answer that leaves out what was asked for");
                Err(error::EIO)
            }
            error => Err(error),
        };
        Said::Done { key, result }
    }
}

/// An error of the protocol as one of Linux's.
#[must_use]
pub fn errno(error: u32) -> Errno {
    match error {
        error::EPERM => Errno::EPERM,
        error::ENOMEM => Errno::ENOMEM,
        error::EINVAL => Errno::EINVAL,
        error::ENOSPC => Errno::ENOSPC,
        error::EOVERFLOW => Errno::EOVERFLOW,
        error::ENOTSUP => Errno::EOPNOTSUPP,
        _ => Errno::EIO,
    }
}

fn ask_at(asks: &[Ask], key: u32) -> u64 {
    asks[key as usize].at
}
