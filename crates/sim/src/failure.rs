//! Answers for what the simulator can find wrong.

use std::fmt;

/// A kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A read succeeded and a sector of its pages was not filled: kernel memory would leak.
    Unfilled,
    /// A read brought what the sector cannot hold.
    WrongData,
    /// What a disk holds is not what belongs there.
    Misplaced,
    /// What survived a crash is not what had to.
    LostData,
    /// A request failed and nothing below had.
    NeedlessError,
    /// A request succeeded though a part of it had failed, or failed with another number.
    WrongResult,
    /// The engine waits for nothing, or a request was never finished.
    Hang,
    /// The watchdog was silent about a request that never came back.
    Silent,
    /// A request's pages were used after its end, or by two.
    StalePages,
    /// The engine asked the ring for what no ring can do.
    Contract,
    /// The engine or a layer panicked.
    Panic,
    /// The stack could not be built.
    Build,
}

/// What went wrong in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For a caller that decides by it.
    pub kind: Kind,
    /// What, where and when.
    pub text: String,
}

impl Failure {
    pub(crate) fn new(kind: Kind, text: impl Into<String>) -> Failure {
        Failure { kind, text: text.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.text)
    }
}
