//! Answers for a request as a layer sees it: what and where, never the data.

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill the request's pages.
    Read,
    /// Drain the request's pages.
    Write,
    /// Make every write that was completed before this request was sent durable.
    Flush,
    /// The bytes are no longer needed; afterwards they may read as anything that was there or
    /// zeros.
    Discard,
    /// Afterwards the bytes read as zeros.
    WriteZeroes {
        /// Whether the room below may be given back.
        unmap: bool,
    },
    /// The bottom ends where the request begins: a zone is empty. Only for devices with zones.
    Reset,
    /// The bottom ends where the request ends, and no bytes before that change: a zone is full.
    /// Only for devices with zones.
    Finish,
}

impl Op {
    /// Whether the request carries pages.
    #[must_use]
    pub const fn has_pages(self) -> bool {
        matches!(self, Op::Read | Op::Write)
    }

    /// Whether the request changes what later reads see.
    #[must_use]
    pub const fn changes(self) -> bool {
        !matches!(self, Op::Read | Op::Flush)
    }

    /// The word that users see and type.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes { .. } => "write-zeroes",
            Op::Reset => "zone-reset",
            Op::Finish => "zone-finish",
        }
    }
}

/// A range of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub at: u64,
    /// Bytes; 0 only for a flush.
    pub len: u64,
}

impl Extent {
    /// The byte behind the last one, or `None` when that does not fit 64 bits.
    #[must_use]
    pub const fn end(self) -> Option<u64> {
        self.at.checked_add(self.len)
    }

    /// Whether all of it lies within the first `size` bytes.
    #[must_use]
    pub const fn within(self, size: u64) -> bool {
        match self.end() {
            Some(end) => end <= size,
            None => false,
        }
    }
}

/// A request as a layer sees it. There is no buffer to reach for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// What to do.
    pub op: Op,
    /// Where, on the device that the layer offers.
    pub extent: Extent,
    /// Whether a write must be durable before it completes (force unit access).
    pub fua: bool,
}

impl Io {
    /// A request without force unit access.
    #[must_use]
    pub const fn new(op: Op, at: u64, len: u64) -> Io {
        Io { op, extent: Extent { at, len }, fua: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_that_overflows_lies_nowhere() {
        assert!(Extent { at: 4096, len: 4096 }.within(8192));
        assert!(!Extent { at: 4096, len: 4097 }.within(8192));
        assert!(!Extent { at: u64::MAX, len: 2 }.within(u64::MAX));
    }

    #[test]
    fn only_reads_and_writes_carry_pages() {
        assert!(Op::Read.has_pages() && Op::Write.has_pages());
        assert!(!Op::Discard.has_pages() && !Op::Flush.has_pages());
        assert!(Op::Discard.changes() && !Op::Read.changes() && !Op::Flush.changes());
    }
}
