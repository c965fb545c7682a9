//! Answers for what is tested, as the cases see it: something that takes requests, many at a time.

use devsplice_core::{Errno, Io, Limits, Op};

use crate::content::{Stamp, fill};

/// A request of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// What and where.
    pub io: Io,
    /// For a write, whose bytes it carries.
    pub stamp: Stamp,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Done whole, or failed.
    pub result: Result<(), Errno>,
    /// For a read, what its memory holds afterwards.
    pub bytes: Vec<u8>,
}

impl Ask {
    /// The bytes of a write.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        fill(self.stamp, self.io.extent.at, self.io.extent.len)
    }
}

/// In words, for messages.
impl std::fmt::Display for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Io { op, extent, fua } = self.io;
        match op {
            Op::Flush => return f.write_str("flush"),
            Op::Write => write!(f, "write {}", self.stamp)?,
            Op::WriteZeroes { unmap: true } => f.write_str("write-zeroes with unmap")?,
            _ => f.write_str(op.name())?,
        }
        write!(f, " of {} bytes at {}{}", extent.len, extent.at, if fua { ", FUA" } else { "" })
    }
}

/// Something that keeps bytes and takes requests: a stack, a backend, a device.
pub trait Target {
    /// What it offers.
    fn limits(&self) -> Limits;

    /// Carries out all of `asks`, as many at a time as it can, and says what came of each, in their
    /// order.
    ///
    /// # Errors
    /// If it failed beyond the requests, or one of them was not finished.
    fn run(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String>;

    /// Cuts the power, if that can be done: what was not made durable may be lost.
    fn cut(&mut self) -> bool {
        false
    }
}
