//! Answers for requests in flight: takes them from exports, routes them, splices their pieces,
//! finishes them whole or failed. Generic over the ring that moves data; no system calls.
#![forbid(unsafe_code)]

mod ahead;
pub mod counts;
pub mod desk;
pub mod export;
pub mod flights;
mod gather;
pub mod jobs;
mod live;
pub mod queue;
pub mod ring;
pub mod served;
mod slow;
pub mod watch;

pub use counts::{Counts, RingCounts, Shared};
pub use export::{Export, Inbox, Request, Rest};
pub use queue::{Lane, Worker};
pub use ring::{Completion, Event, FileId, Pages, Part, Ring, Splice, Takes, To};
pub use served::{Answer, Noted, OnNoted, Served, Wake};
pub use watch::Stuck;
