//! Answers for what requests and replies look like on the wire, both ways.

use crate::Broken;

/// Begins what a server says first.
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Follows it, and begins each option.
pub const OPTION: u64 = 0x4948_4156_454f_5054;
/// Begins each reply to an option.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

const REQUEST: u32 = 0x2560_9513;
const REQUEST_EXTENDED: u32 = 0x21e4_1c71;
const REPLY: u32 = 0x6744_6698;
const REPLY_STRUCTURED: u32 = 0x668e_33ef;
const REPLY_EXTENDED: u32 = 0x6e8a_278c;

/// Transmission flags: what an export can do.
pub mod can {
    /// There are such flags at all.
    pub const HAS_FLAGS: u16 = 1;
    /// Nothing can be changed.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Flushes are understood.
    pub const FLUSH: u16 = 1 << 2;
    /// A write may be asked to be durable.
    pub const FUA: u16 = 1 << 3;
    /// Seeks cost.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// Room can be given back.
    pub const TRIM: u16 = 1 << 5;
    /// Ranges can be zeroed.
    pub const WRITE_ZEROES: u16 = 1 << 6;
    /// A read may ask for one chunk.
    pub const DF: u16 = 1 << 7;
    /// A flush on one connection covers what was written on others.
    pub const MULTI_CONN: u16 = 1 << 8;
    /// Data can be fetched ahead.
    pub const CACHE: u16 = 1 << 10;
    /// Zeroing may be asked to fail rather than to be slow.
    pub const FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod command {
    /// Data is sent to the client.
    pub const READ: u16 = 0;
    /// Data follows the request.
    pub const WRITE: u16 = 1;
    /// The client goes; there is no reply.
    pub const DISCONNECT: u16 = 2;
    /// What was written becomes durable.
    pub const FLUSH: u16 = 3;
    /// The bytes are no longer needed.
    pub const TRIM: u16 = 4;
    /// The data will be needed.
    pub const CACHE: u16 = 5;
    /// The bytes read as zeros afterwards.
    pub const WRITE_ZEROES: u16 = 6;
    /// What is there.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
pub mod ask {
    /// Durable before the reply.
    pub const FUA: u16 = 1;
    /// Zeroed room must not be given back.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk only.
    pub const DF: u16 = 1 << 2;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeroing fails where it is no faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// With extended headers: the length is that of data behind the request.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Kinds of chunks.
pub mod chunk {
    /// Nothing follows.
    pub const NONE: u16 = 0;
    /// An offset, and data.
    pub const DATA: u16 = 1;
    /// An offset, and how many zeros are there.
    pub const HOLE: u16 = 2;
    /// Extents of a context.
    pub const STATUS: u16 = 5;
    /// The same, with 64-bit lengths.
    pub const STATUS_EXTENDED: u16 = 6;
    /// Set in all kinds that say an error.
    pub const IS_ERROR: u16 = 1 << 15;
    /// An error and what there is to say of it.
    pub const ERROR: u16 = IS_ERROR | 1;
    /// In a chunk's flags: the last of its reply.
    pub const DONE: u16 = 1;
}

/// `base:allocation`: nothing is allocated there.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: it reads as zeros.
pub const STATE_ZERO: u32 = 1 << 1;

/// Error numbers of the protocol, which are Linux's.
pub mod error {
    /// Changing is not allowed.
    pub const EPERM: u32 = 1;
    /// The device failed.
    pub const EIO: u32 = 5;
    /// There was no memory for it.
    pub const ENOMEM: u32 = 12;
    /// The request makes no sense.
    pub const EINVAL: u32 = 22;
    /// There is no room.
    pub const ENOSPC: u32 = 28;
    /// The reply would be too long.
    pub const EOVERFLOW: u32 = 75;
    /// The server does not do that.
    pub const ENOTSUP: u32 = 95;
    /// The server is about to go.
    pub const ESHUTDOWN: u32 = 108;
}

/// What was agreed on for requests and replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Each reply is a header, and a read's data.
    #[default]
    Simple,
    /// Replies are chunks.
    Structured,
    /// Replies are chunks, and lengths have 64 bits.
    Extended,
}

impl Mode {
    /// Bytes of a request's header.
    #[must_use]
    pub const fn request_len(self) -> usize {
        match self {
            Mode::Simple | Mode::Structured => 28,
            Mode::Extended => 32,
        }
    }

    /// Bytes of a whole reply to a read, its data left out, as [`Head::data`] makes it.
    #[must_use]
    pub const fn data_head_len(self) -> usize {
        match self {
            Mode::Simple => 16,
            Mode::Structured => 28,
            Mode::Extended => 40,
        }
    }
}

/// The longest request header.
pub const MAX_REQUEST_LEN: usize = 32;

/// The numbers of a message, one after the other, most significant byte first.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    /// A string with its length before it, of at most `most` bytes.
    pub(crate) fn string(&mut self, most: usize) -> Option<&[u8]> {
        let len = usize::try_from(self.u32()?).ok().filter(|len| *len <= most)?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(text)
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Of [`ask`].
    pub flags: u16,
    /// Of [`command`].
    pub command: u16,
    /// Comes back with the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl Request {
    /// The request that begins `bytes`, or none if there are too few.
    ///
    /// # Errors
    /// If no request begins there.
    #[inline]
    pub fn parse(bytes: &[u8], mode: Mode) -> Result<Option<Request>, Broken> {
        let Some(bytes) = bytes.get(..mode.request_len()) else { return Ok(None) };
        let mut fields = Fields(bytes);
        let magic = if mode == Mode::Extended { REQUEST_EXTENDED } else { REQUEST };
        if fields.u32() != Some(magic) {
            return Err(Broken("no request where one should begin"));
        }
        let parsed = (|| {
            Some(Request {
                flags: fields.u16()?,
                command: fields.u16()?,
                cookie: fields.u64()?,
                offset: fields.u64()?,
                length: match mode {
                    Mode::Extended => fields.u64()?,
                    _ => u64::from(fields.u32()?),
                },
            })
        })();
        Ok(parsed)
    }

    /// The bytes of the header.
    ///
    /// # Panics
    /// If the length does not fit in the mode: the caller has split the request.
    #[must_use]
    pub fn head(&self, mode: Mode) -> Head {
        let mut head = Head::EMPTY;
        let Request { flags, command, cookie, offset, length } = *self;
        head.u32(if mode == Mode::Extended { REQUEST_EXTENDED } else { REQUEST });
        head.u16(flags);
        head.u16(command);
        head.u64(cookie);
        head.u64(offset);
        match (mode, u32::try_from(length)) {
            (Mode::Extended, _) => head.u64(length),
            (_, Ok(length)) => head.u32(length),
            (_, Err(_)) => panic!("a request of {length} bytes in 32 bits"),
        }
        head
    }
}

/// A header of either side, ready to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    bytes: [u8; Head::ROOM],
    len: usize,
}

impl Head {
    /// Room for the longest: an extended reply's header with what a chunk has before its data.
    const ROOM: usize = 48;
    const EMPTY: Head = Head { bytes: [0; Head::ROOM], len: 0 };

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    fn u16(&mut self, value: u16) {
        self.put(&value.to_be_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_be_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_be_bytes());
    }

    /// What comes before the payload of a chunk; `offset` is that of the request.
    fn chunk(
        mode: Mode,
        (kind, flags): (u16, u16),
        (cookie, offset): (u64, u64),
        len: u32,
    ) -> Head {
        let mut head = Head::EMPTY;
        head.u32(if mode == Mode::Extended { REPLY_EXTENDED } else { REPLY_STRUCTURED });
        head.u16(flags);
        head.u16(kind);
        head.u64(cookie);
        if mode == Mode::Extended {
            head.u64(offset);
            head.u64(u64::from(len));
        } else {
            head.u32(len);
        }
        head
    }

    fn simple(error: u32, cookie: u64) -> Head {
        let mut head = Head::EMPTY;
        head.u32(REPLY);
        head.u32(error);
        head.u64(cookie);
        head
    }

    /// A whole reply without data: `error` is 0 for success.
    #[must_use]
    pub fn done(mode: Mode, request: (u64, u64), error: u32) -> Head {
        match (mode, error) {
            (Mode::Simple, _) => Head::simple(error, request.0),
            (_, 0) => Head::chunk(mode, (chunk::NONE, chunk::DONE), request, 0),
            (_, error) => {
                let mut head = Head::chunk(mode, (chunk::ERROR, chunk::DONE), request, 6);
                head.u32(error);
                // No text: the number says it.
                head.u16(0);
                head
            }
        }
    }

    /// All of a reply to a read but the `len` bytes of data that follow it.
    #[must_use]
    #[inline]
    pub fn data(mode: Mode, request: (u64, u64), len: u32) -> Head {
        if mode == Mode::Simple {
            return Head::simple(0, request.0);
        }
        let mut head = Head::chunk(mode, (chunk::DATA, chunk::DONE), request, len + 8);
        head.u64(request.1);
        head
    }

    /// All of a reply about extents but the `count` extents, which follow as [`Head::extent`]
    /// writes them.
    #[must_use]
    pub fn status(mode: Mode, request: (u64, u64), context: u32, count: u32) -> Head {
        if mode == Mode::Extended {
            let kind = (chunk::STATUS_EXTENDED, chunk::DONE);
            let mut head = Head::chunk(mode, kind, request, 8 + count * 16);
            head.u32(context);
            head.u32(count);
            return head;
        }
        let mut head = Head::chunk(mode, (chunk::STATUS, chunk::DONE), request, 4 + count * 8);
        head.u32(context);
        head
    }

    /// One extent.
    #[must_use]
    pub fn extent(mode: Mode, len: u64, state: u32) -> Head {
        let mut head = Head::EMPTY;
        if mode == Mode::Extended {
            head.u64(len);
            head.u64(u64::from(state));
        } else {
            head.u32(u32::try_from(len).unwrap_or(u32::MAX));
            head.u32(state);
        }
        head
    }
}

/// What begins a reply, as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A simple one: the error, or 0 and then the data of a read.
    Simple {
        /// The request's.
        cookie: u64,
        /// 0 for success.
        error: u32,
    },
    /// A chunk: `length` bytes follow.
    Chunk {
        /// The request's.
        cookie: u64,
        /// [`chunk::DONE`] in the last of a reply.
        flags: u16,
        /// Of [`chunk`].
        kind: u16,
        /// Bytes that follow.
        length: u64,
    },
}

impl Reply {
    /// The longest that begins one.
    pub const MAX_LEN: usize = 32;

    /// What begins `bytes`, and its length; none if there are too few.
    ///
    /// # Errors
    /// If no reply begins there, or one of a mode that was not agreed on.
    pub fn parse(bytes: &[u8], mode: Mode) -> Result<Option<(Reply, usize)>, Broken> {
        let mut fields = Fields(bytes);
        let Some(magic) = fields.u32() else { return Ok(None) };
        let len = match (magic, mode) {
            (REPLY, Mode::Simple | Mode::Structured) => 16,
            (REPLY_STRUCTURED, Mode::Structured) => 20,
            (REPLY_EXTENDED, Mode::Extended) => 32,
            _ => return Err(Broken("no reply where one should begin")),
        };
        if bytes.len() < len {
            return Ok(None);
        }
        let parsed = (|| {
            if magic == REPLY {
                let error = fields.u32()?;
                return Some(Reply::Simple { cookie: fields.u64()?, error });
            }
            let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
            let length = match mode {
                // The offset is the request's, which is known.
                Mode::Extended => fields.u64().and(fields.u64())?,
                _ => u64::from(fields.u32()?),
            };
            Some(Reply::Chunk { cookie, flags, kind, length })
        })();
        Ok(parsed.map(|reply| (reply, len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

    #[test]
    fn a_request_reads_back_and_needs_all_of_its_bytes() {
        for mode in MODES {
            let request =
                Request { flags: 5, command: 1, cookie: 7 << 40, offset: 9 << 33, length: 4096 };
            let head = request.head(mode);
            assert_eq!(head.bytes().len(), mode.request_len());
            assert_eq!(Request::parse(head.bytes(), mode), Ok(Some(request)));
            for len in 0..head.bytes().len() {
                assert_eq!(Request::parse(&head.bytes()[..len], mode), Ok(None));
            }
        }
        assert!(Request::parse(&[0; 32], Mode::Simple).is_err());
    }

    /// The bytes as the protocol document has them, so that both sides cannot be wrong alike.
    #[test]
    fn headers_are_the_documents() {
        let request = Request { flags: 1, command: 1, cookie: 2, offset: 3, length: 4 };
        let expected = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0,
            0, 0, 4,
        ];
        assert_eq!(request.head(Mode::Structured).bytes(), expected);
        let simple = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 2];
        assert_eq!(Head::done(Mode::Simple, (2, 3), 5).bytes(), simple);
        let data = [
            0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 24, 0, 0, 0, 0, 0,
            0, 0, 3,
        ];
        assert_eq!(Head::data(Mode::Structured, (2, 3), 16).bytes(), data);
        let error = [
            0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 6, 0, 0, 0, 5,
            0, 0,
        ];
        assert_eq!(Head::done(Mode::Structured, (2, 3), 5).bytes(), error);
        let extended = [
            0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0,
            0, 0, 0, 0, 0, 0, 24, 0, 0, 0, 1, 0, 0, 0, 1,
        ];
        assert_eq!(Head::status(Mode::Extended, (2, 3), 1, 1).bytes(), extended);
    }

    #[test]
    fn a_reply_reads_back_in_its_mode_only() {
        for mode in MODES {
            let head = Head::data(mode, (2, 3), 16);
            let (reply, len) = Reply::parse(head.bytes(), mode).unwrap().unwrap();
            let expected = match mode {
                Mode::Simple => Reply::Simple { cookie: 2, error: 0 },
                _ => Reply::Chunk { cookie: 2, flags: 1, kind: chunk::DATA, length: 24 },
            };
            assert_eq!(reply, expected);
            assert_eq!(head.bytes().len(), mode.data_head_len());
            for short in 0..len {
                assert_eq!(Reply::parse(&head.bytes()[..short], mode), Ok(None));
            }
        }
        let structured = Head::data(Mode::Structured, (2, 3), 16);
        assert!(Reply::parse(structured.bytes(), Mode::Extended).is_err());
        assert!(Reply::parse(structured.bytes(), Mode::Simple).is_err());
        let simple = Head::done(Mode::Simple, (2, 3), 0);
        assert!(Reply::parse(simple.bytes(), Mode::Extended).is_err());
    }
}
