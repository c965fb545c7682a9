//! Answers for the side of a layer that changes: what `map` cannot say from memory, failures below,
//! work in the background. Apart from the data path, which only ever asks `map`.
//!
//! Everything here is a [`Slow`]: a future that an I/O thread drives between its requests. It may
//! read and write the layer's own metadata and wait; it never blocks the thread. State that `map`
//! reads is shared with it (atomics, short locks that are never held across an `await`).

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use crate::errno::Errno;
use crate::io::Io;
use crate::map::Port;

/// Work that takes its time. Driven by one thread, from its start to its end.
pub type Slow<T = ()> = Pin<Box<dyn Future<Output = Result<T, Errno>>>>;

/// What a layer shows of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number; what it counts is in its name.
    Number(u64),
    /// A word or a sentence.
    Text(String),
    /// Several, each with names and values of its own.
    List(Vec<Vec<(&'static str, Value)>>),
}

/// The live side of a layer.
pub trait Live: Send + Sync {
    /// Brings in, or makes room for, what `map` (or `flush`, for a flush) missed; then it is asked
    /// again, before this thread asks it about anything else. The request waits, and none of its
    /// pages are in use; what layers above have answered for it still holds, so this may wait for
    /// nothing that they do. Several may run at once. An error counts as a failure of this part on
    /// the way through the layers above.
    fn resolve(self: Arc<Self>, io: Io, meta: Rc<dyn Meta>) -> Slow;

    /// `io`, or its way down through `port`, failed with `errno`. Told of every part of a request
    /// that still fails when it is tried again, also when the request is lost anyway; and of every
    /// flush and every write with force unit access that failed at all, since a device tells only
    /// once that it has lost what it had taken. `Ok` when the
    /// layer has seen to it (a leg was dropped, a block repaired): then the whole request is routed
    /// again. An error is the request's, unless a layer further up sees to it.
    fn failed(self: Arc<Self>, io: Io, port: Port, errno: Errno, meta: Rc<dyn Meta>) -> Slow {
        let _ = (io, port, meta);
        Box::pin(std::future::ready(Err(errno)))
    }

    /// Whether [`Live::failed`] can see to anything.
    fn sees_to_failures(&self) -> bool {
        false
    }

    /// Work in the background, from the first request to the last. It is dropped where it waits
    /// when the device stops.
    fn run(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        let _ = meta;
        Box::pin(std::future::ready(Ok(())))
    }

    /// The device has served its last request: leave the metadata as clean as it can be.
    fn stop(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        let _ = meta;
        Box::pin(std::future::ready(Ok(())))
    }

    /// A command from a person. The answer is shown to them; so is an error's text.
    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        meta: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        let _ = (words, meta);
        Box::pin(std::future::ready(Ok(Err("this layer takes no commands".to_owned()))))
    }

    /// The layer's state, for `info`.
    fn status(&self) -> Vec<(&'static str, Value)> {
        Vec::new()
    }
}

/// What a live layer can do to the devices below it. Positions and lengths are multiples of their
/// blocks; what is read here may be metadata or, for a copy, data that the layer never sees.
pub trait Meta {
    /// Reads up to [`MOST_BYTES`].
    fn read(&self, port: Port, at: u64, len: usize) -> Slow<Vec<u8>>;

    /// Writes up to [`MOST_BYTES`]; with `durable` it is on the media when it is done.
    fn write(&self, port: Port, at: u64, bytes: Vec<u8>, durable: bool) -> Slow;

    /// Makes durable what was written to a port before.
    fn flush(&self, port: Port) -> Slow;

    /// Copies `len` bytes at `at` from one port to the same place of others, up to [`MOST_BYTES`].
    fn copy(&self, from: Port, to: Vec<Port>, at: u64, len: usize) -> Slow;

    /// Waits.
    fn sleep(&self, ns: u64) -> Slow;

    /// Nanoseconds since some moment.
    fn now_ns(&self) -> u64;

    /// Waits until no request is under way any more for which this layer answered before this call,
    /// also none that waits at a layer below. What `map` answers from now on holds for all that
    /// are.
    fn grace(&self) -> Slow;

    /// Whether a request that changes data has failed below and has not ended yet: what it left
    /// behind differs from place to place, and the layers concerned may not have been told. To be
    /// asked after a grace, which does not wait for such requests to end.
    fn is_unsettled(&self) -> bool;

    /// Whether the device ends, or is suspended, and nothing of its own is under way any more: what
    /// is done in the background and may take long is to go to sleep where it can be left.
    fn is_ending(&self) -> bool {
        false
    }

    /// Tells whoever watches the device.
    fn event(&self, text: String);
}

/// Most bytes of one read, write or copy.
pub const MOST_BYTES: usize = 64 << 10;
