//! Answers for what a layer may say about a request: where its first bytes go.

/// Which of a layer's lower devices, counted from 0 in the order of the stack expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port(pub u16);

/// Where the first `len` bytes of an [`Io`](crate::Io) go. The router asks again for the rest.
///
/// Further answers (allocation tickets, codecs) arrive with the layers that need them; see
/// docs/decisions/001.md and 006.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// The same pages, unread, at `at` of a lower device.
    To {
        /// Bytes that this answer is for: 1 to the request's length.
        len: u64,
        /// Which lower device.
        port: Port,
        /// First byte there.
        at: u64,
    },
    /// As `To`, but no earlier than `wait_ns` from now.
    After {
        /// Bytes that this answer is for.
        len: u64,
        /// Which lower device.
        port: Port,
        /// First byte there.
        at: u64,
        /// Nanoseconds.
        wait_ns: u64,
    },
    /// As `To`, and this layer's [`Probe`](crate::Probe) is told how long it takes.
    Watched {
        /// Bytes that this answer is for.
        len: u64,
        /// Which lower device.
        port: Port,
        /// First byte there.
        at: u64,
    },
    /// The same pages to every lower device: a mirror's write, or any layer's flush.
    All {
        /// Bytes that this answer is for.
        len: u64,
        /// First byte, the same on each lower device.
        at: u64,
    },
    /// As `All`, but only to some of the lower devices: a mirror that lacks a leg.
    Some {
        /// Bytes that this answer is for.
        len: u64,
        /// First byte, the same on each lower device.
        at: u64,
        /// Bit n stands for port n; at least one is set. Ports from 32 on cannot be named.
        ports: u32,
    },
    /// The same pages to two places: data and a log of it.
    Both {
        /// Bytes that this answer is for.
        len: u64,
        /// A lower device, and the first byte there.
        first: (Port, u64),
        /// Another place.
        second: (Port, u64),
    },
    /// Nothing below: a read sees zeros; whatever else succeeds without effect.
    Zero {
        /// Bytes that this answer is for.
        len: u64,
    },
    /// Not to be said from memory: [`Live::resolve`](crate::Live::resolve) first, then ask again.
    /// Only layers that have a live side answer this.
    Miss,
}

impl Map {
    /// The bytes that the answer is for; 0 for a miss.
    #[must_use]
    pub const fn len(&self) -> u64 {
        match *self {
            Map::To { len, .. }
            | Map::After { len, .. }
            | Map::Watched { len, .. }
            | Map::All { len, .. }
            | Map::Some { len, .. }
            | Map::Both { len, .. }
            | Map::Zero { len } => len,
            Map::Miss => 0,
        }
    }

    /// Whether the answer is for no bytes: a flush's, or a miss.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
