//! Answers for the NBD protocol as bytes and events: what server and client say to each other, no
//! I/O, no clock. Written from the protocol document of the NBD project (doc/proto.md).
//!
//! Everything that a peer sends is bounded by a constant of [`limits`]: what is longer is refused
//! or skipped without being kept, and what is no NBD ends the connection.
#![forbid(unsafe_code)]

pub mod client;
pub mod limits;
pub mod server;
pub mod uri;
pub mod wire;

pub use wire::{Head, Mode, Request};

/// The peer does not speak the protocol: nothing that follows can be understood, so the connection
/// has to end. Says what was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken(pub &'static str);
