//! Answers for how a connection and its requests can stand, and for what failures are called.

use devsplice_core::Errno;
use devsplice_nbd::wire::error;

/// What a tag's request was.
#[derive(Clone, Copy, Default)]
pub(super) struct Tag {
    pub(super) cookie: u64,
    pub(super) offset: u64,
    /// Bytes of data that count as in flight.
    pub(super) bytes: u32,
    /// It has to be durable, which takes a flush behind it.
    pub(super) flush: bool,
    /// It is a question that has no answer yet.
    pub(super) asked: bool,
    /// Bytes that it changes, while that is under way below.
    pub(super) changes: u64,
    /// It is, and its connection has ended.
    pub(super) is_stale: bool,
}

/// What is to come from the client next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intake {
    Request,
    /// The data of a write: so many of its bytes are there.
    Data {
        tag: u16,
        there: u32,
        len: u32,
        fua: bool,
    },
    /// Data of a request that was refused.
    Skip {
        left: u64,
    },
}

impl Intake {
    /// Whether nothing of a request is there, with `staged` bytes from and to.
    pub(super) fn is_between(&self, staged: (usize, usize)) -> bool {
        *self == Intake::Request && staged.0 == staged.1
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nobody is here.
    Free,
    /// Requests are taken.
    Open,
    /// None are, and what was asked is answered.
    Leaving,
    /// Nothing is answered any more.
    Lost,
}

const EPIPE: i32 = 32;
const ECONNRESET: i32 = 104;

/// Whether the other end is not there any more.
pub(super) fn is_gone(errno: Errno) -> bool {
    errno.raw() == EPIPE || errno.raw() == ECONNRESET
}

/// The protocol's number for a failure.
pub(super) fn error_of(errno: Errno) -> u32 {
    match errno {
        Errno::EPERM | Errno::EROFS | Errno::EACCES => error::EPERM,
        Errno::ENOMEM => error::ENOMEM,
        Errno::EINVAL => error::EINVAL,
        Errno::ENOSPC => error::ENOSPC,
        Errno::EOPNOTSUPP => error::ENOTSUP,
        _ => error::EIO,
    }
}
