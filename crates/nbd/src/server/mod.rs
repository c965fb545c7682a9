//! Answers for the server's side of a connection: the handshake (`handshake`), and which requests
//! are let in afterwards.

pub(crate) mod handshake;

pub use handshake::{Handshake, Outcome, Tls};

use crate::limits::MAX_PAYLOAD;
use crate::wire::{Mode, Request, ask, can, command, error};

/// A device that clients can choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// What it is called.
    pub name: String,
    /// A line about it.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Of [`can`]: what this client may do with it.
    pub flags: u16,
    /// Requests are multiples of this.
    pub block: u32,
    /// Requests are best multiples of this.
    pub preferred: u32,
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// How requests and replies look.
    pub mode: Mode,
    /// Of [`can`].
    pub flags: u16,
    /// Bytes of the device.
    pub size: u64,
    /// Requests are multiples of this.
    pub block: u32,
    /// Whether `base:allocation` may be asked for.
    pub allocation: bool,
}

/// The number of `base:allocation` in replies.
pub const ALLOCATION: u32 = 1;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Data.
    Read,
    /// To take the data that follows.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// To make all durable.
    Flush,
    /// To forget a range.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// To zero a range.
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// Whether its room may be given back.
        unmap: bool,
        /// Whether it must fail rather than be slow.
        fast: bool,
    },
    /// To have a range ready; nothing need be done.
    Cache,
    /// What is there.
    Status {
        /// One extent is enough.
        one: bool,
    },
    /// To end the connection; without a reply.
    Disconnect,
}

/// A request that is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The reply is this error, after so many bytes that follow the request are skipped.
    Reply {
        /// Of [`error`].
        error: u32,
        /// Bytes of data behind the request.
        skip: u64,
    },
    /// More data is announced than anybody would send: the connection ends.
    Hopeless,
}

impl Session {
    /// What a request asks for; or why it is not done, which no part of it is then.
    ///
    /// # Errors
    /// For a request that the session does not allow, or that leaves the device.
    #[inline]
    pub fn admit(&self, request: &Request) -> Result<Ask, Refusal> {
        let Request { flags, command, offset, length, .. } = *request;
        let is_payload = flags & ask::PAYLOAD_LEN != 0;
        let carries = command == command::WRITE;
        let skip = if carries || (is_payload && self.mode == Mode::Extended) { length } else { 0 };
        let refuse = |error| Err(Refusal::Reply { error, skip });
        if skip > u64::from(u32::MAX) {
            return Err(Refusal::Hopeless);
        }
        let Some(asked) = self.understood(request) else { return refuse(error::EINVAL) };
        let changes = matches!(asked, Ask::Write { .. } | Ask::Trim { .. })
            || matches!(asked, Ask::WriteZeroes { .. });
        if changes && self.flags & can::READ_ONLY != 0 {
            return refuse(error::EPERM);
        }
        if matches!(asked, Ask::Flush | Ask::Disconnect) {
            return Ok(asked);
        }
        let is_within = offset.checked_add(length).is_some_and(|end| end <= self.size);
        let mask = u64::from(self.block) - 1;
        if !is_within {
            // What the document asks for where a write would need a device that is larger.
            return refuse(if changes { error::ENOSPC } else { error::EINVAL });
        }
        let is_aligned = (offset | length) & mask == 0;
        let is_data = matches!(asked, Ask::Read | Ask::Write { .. });
        if !is_aligned || length == 0 || (is_data && length > u64::from(MAX_PAYLOAD)) {
            return refuse(error::EINVAL);
        }
        Ok(asked)
    }

    /// What a request asks for, if this session has such requests with such flags.
    fn understood(&self, request: &Request) -> Option<Ask> {
        let has = |flag: u16| request.flags & flag != 0;
        let may = |flag: u16| self.flags & flag != 0;
        let fua = has(ask::FUA);
        let (known, asked) = match request.command {
            command::READ => (ask::DF, Ask::Read),
            command::WRITE => (0, Ask::Write { fua }),
            command::DISCONNECT => (0, Ask::Disconnect),
            command::FLUSH if may(can::FLUSH) => (0, Ask::Flush),
            command::TRIM if may(can::TRIM) => (0, Ask::Trim { fua }),
            command::CACHE if may(can::CACHE) => (0, Ask::Cache),
            command::WRITE_ZEROES if may(can::WRITE_ZEROES) => {
                let (unmap, fast) = (!has(ask::NO_HOLE), has(ask::FAST_ZERO));
                let known = if may(can::FAST_ZERO) { ask::FAST_ZERO } else { 0 };
                (known | ask::NO_HOLE, Ask::WriteZeroes { fua, unmap, fast })
            }
            command::BLOCK_STATUS if self.allocation => {
                (ask::REQ_ONE, Ask::Status { one: has(ask::REQ_ONE) })
            }
            _ => return None,
        };
        // Any command may come with FUA; it means something for those that change data. A flush
        // that says so is one by Linux.
        let known = known | if may(can::FUA) { ask::FUA } else { 0 };
        // A client with extended headers says of a write that its length is its data's.
        let carries = request.command == command::WRITE && self.mode == Mode::Extended;
        if carries != has(ask::PAYLOAD_LEN) {
            return None;
        }
        let known = known | if carries { ask::PAYLOAD_LEN } else { 0 };
        (request.flags & !known == 0).then_some(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(mode: Mode) -> Session {
        let flags = can::HAS_FLAGS | can::FLUSH | can::FUA | can::TRIM | can::WRITE_ZEROES;
        Session { mode, flags, size: 1 << 30, block: 512, allocation: true }
    }

    fn request(command: u16, flags: u16, offset: u64, length: u64) -> Request {
        Request { flags, command, cookie: 1, offset, length }
    }

    #[test]
    fn what_is_asked_is_what_is_done() {
        let all = session(Mode::Structured);
        let admit = |command, flags| all.admit(&request(command, flags, 512, 4096));
        assert_eq!(admit(command::READ, 0), Ok(Ask::Read));
        assert_eq!(admit(command::WRITE, 1), Ok(Ask::Write { fua: true }));
        let zeroes = Ask::WriteZeroes { fua: false, unmap: false, fast: false };
        assert_eq!(admit(command::WRITE_ZEROES, ask::NO_HOLE), Ok(zeroes));
        assert_eq!(admit(command::BLOCK_STATUS, ask::REQ_ONE), Ok(Ask::Status { one: true }));
        assert_eq!(all.admit(&request(command::FLUSH, 0, 0, 0)), Ok(Ask::Flush));
    }

    #[test]
    fn what_leaves_the_device_or_its_blocks_is_refused_and_its_data_skipped() {
        let all = session(Mode::Simple);
        for (offset, length) in
            [(1 << 30, 512), (u64::MAX - 511, 512), (1, 512), (0, 511), (0, 0), (0, 33 << 20)]
        {
            let read = all.admit(&request(command::READ, 0, offset, length));
            let refused = Err(Refusal::Reply { error: error::EINVAL, skip: 0 });
            assert_eq!(read, refused, "{offset}+{length}");
            let write = all.admit(&request(command::WRITE, 0, offset, length));
            assert!(matches!(write, Err(Refusal::Reply { skip, .. }) if skip == length));
        }
        let zeroes = all.admit(&request(command::WRITE_ZEROES, 0, 0, 1 << 30));
        assert!(zeroes.is_ok(), "only data is bounded");
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        let mut none = session(Mode::Simple);
        (none.flags, none.allocation) = (can::HAS_FLAGS | can::READ_ONLY, false);
        for command in [command::FLUSH, command::TRIM, command::WRITE_ZEROES, 7, 8, 99] {
            assert!(none.admit(&request(command, 0, 0, 512)).is_err(), "{command}");
        }
        assert!(none.admit(&request(command::READ, ask::FUA, 0, 512)).is_err());
        assert!(none.admit(&request(command::READ, 1 << 9, 0, 512)).is_err());
        let write = none.admit(&request(command::WRITE, 0, 0, 512));
        assert_eq!(write, Err(Refusal::Reply { error: error::EPERM, skip: 512 }));
    }

    #[test]
    fn with_extended_headers_only_writes_carry_data() {
        let all = session(Mode::Extended);
        let write = |flags, length| all.admit(&request(command::WRITE, flags, 0, length));
        assert!(write(ask::PAYLOAD_LEN, 512).is_ok());
        assert!(write(0, 512).is_err());
        assert_eq!(write(ask::PAYLOAD_LEN, 1 << 40), Err(Refusal::Hopeless));
        let read = all.admit(&request(command::READ, ask::PAYLOAD_LEN, 0, 512));
        assert_eq!(read, Err(Refusal::Reply { error: error::EINVAL, skip: 512 }));
    }
}
