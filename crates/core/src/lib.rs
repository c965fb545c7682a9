//! Answers for the words and rules of devsplice: what a request is, what a layer may answer, how a
//! stack routes. No I/O, no threads, no dependencies.
//!
//! A driver author needs [`Layer`], [`Map`] and [`Driver`]; `use devsplice_core::prelude::*;`.
#![forbid(unsafe_code)]

pub mod args;
pub mod check;
pub mod errno;
pub mod error;
pub mod io;
pub mod layer;
pub mod limits;
pub mod live;
mod locate;
pub mod map;
pub mod probe;
pub mod route;
pub mod size;
pub mod stack;
pub mod trace;
pub mod twist;
pub mod wait;
pub mod zones;

pub use args::{Args, Key, Kind};
pub use errno::Errno;
pub use error::{Error, ErrorKind, Result};
pub use io::{Extent, Io, Op};
pub use layer::{Arity, Driver, Layer, Lower, Source};
pub use limits::{Dma, Limits};
pub use live::{Live, Meta, Slow, Value};
pub use map::{Map, Port};
pub use probe::{Probe, Wait};
pub use route::{Piece, Place, Route, Stop};
pub use stack::{BackendId, Bottoms, NodeId, Stack, StackBuilder};
pub use zones::Zones;

/// What a layer's file imports.
pub mod prelude {
    pub use crate::args::{Args, Key, Kind};
    pub use crate::errno::Errno;
    pub use crate::error::{Error, ErrorKind, Result};
    pub use crate::io::{Extent, Io, Op};
    pub use crate::layer::{Arity, Driver, Layer, Lower};
    pub use crate::limits::Limits;
    pub use crate::live::{Live, Meta, Slow, Value};
    pub use crate::map::{Map, Port};
    pub use crate::probe::Probe;
}
