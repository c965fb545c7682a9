//! Answers for zones: parts of a device that are written from their start on, as a layer that has
//! them and a front end that knows of them talk about them.
//!
//! Zones are kept in order before a request is routed: a front end begins each change with
//! [`Zones::begin`], which says where it goes or refuses it, and ends it with [`Zones::end`]. So a
//! layer's `map` stays a pure answer, and routing a request twice changes nothing. See
//! docs/decisions/023.md.

use crate::errno::Errno;
use crate::io::{Extent, Io};

/// What all zones of a device have in common. All sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// From the start of a zone to that of the next, a power of two.
    pub zone: u64,
    /// How many there are.
    pub count: u32,
    /// Most that are open at a time; 0 for any number.
    pub max_open: u32,
    /// Most that are neither empty nor full; 0 for any number.
    pub max_active: u32,
    /// Most bytes of an append.
    pub max_append: u64,
}

/// What may be done with a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It is written anywhere: an ordinary part of the device.
    Conventional,
    /// Nothing was written since it was reset.
    Empty,
    /// It is being written.
    ImplicitlyOpen,
    /// It was opened to be written.
    ExplicitlyOpen,
    /// It is written in part.
    Closed,
    /// It takes nothing more until it is reset.
    Full,
}

/// One zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Its first byte.
    pub at: u64,
    /// Bytes to the next one.
    pub len: u64,
    /// Bytes that it takes.
    pub capacity: u64,
    /// Bytes that were written: the next one goes there. Means nothing of a conventional zone.
    pub written: u64,
    /// What may be done with it.
    pub condition: Condition,
}

/// What a front end is asked for that has to do with zones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A write at a place of the client's choice; whether it must be durable.
    Write(bool),
    /// A write at the place where its zone goes on; likewise.
    Append(bool),
    /// Everything that was done before is to be durable.
    Flush,
    /// Room among the open zones is to be kept for this one.
    Open,
    /// It is not.
    Close,
    /// Nothing more is written to it.
    Finish,
    /// It is written from its start again.
    Reset,
    /// All are.
    ResetAll,
}

/// A change that was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// What the stack is asked for: of an append, a write where it goes.
    pub io: Io,
    /// What the layer knows it by at its end.
    pub ticket: u64,
}

/// The zones of a device.
pub trait Zones: Send + Sync {
    /// What they have in common.
    fn shape(&self) -> Shape;

    /// One of them.
    fn zone(&self, number: u32) -> Option<Zone>;

    /// A request begins. `None` if nothing is left to do for it.
    ///
    /// # Errors
    /// Why it is refused: `EIO` off the place where its zone goes on, beyond its end, or where it
    /// makes no sense; `ETOOMANYREFS` and `EOVERFLOW` if too many zones would be open or active;
    /// `EBUSY` for a zone that something else is changing.
    fn begin(&self, ask: Ask, extent: Extent) -> Result<Option<Begun>, Errno>;

    /// What was begun has come to its end. Called before the client knows.
    fn end(&self, begun: &Begun, result: Result<(), Errno>);

    /// The device had another server before. What that had in flight may come again: the first
    /// write to each zone may therefore repeat the last one.
    fn taken_over(&self);
}
