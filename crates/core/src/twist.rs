//! Answers for live layers with a twist: what one asks of the devices below it is changed on its
//! way. For tests of tests: a layer that does not do what it should has to be found.

use std::rc::Rc;
use std::sync::Arc;

use crate::errno::Errno;
use crate::io::Io;
use crate::live::{Live, Meta, Slow, Value};
use crate::map::Port;

/// What is changed on the way down. Everything else is passed on as it is.
pub trait Twist: Clone + Send + Sync + 'static {
    /// Instead of a write.
    fn write(&self, meta: &dyn Meta, port: Port, at: u64, bytes: Vec<u8>, durable: bool) -> Slow {
        meta.write(port, at, bytes, durable)
    }

    /// Instead of a flush.
    fn flush(&self, meta: &dyn Meta, port: Port) -> Slow {
        meta.flush(port)
    }

    /// Instead of a copy.
    fn copy(&self, meta: &dyn Meta, from: Port, to: Vec<Port>, at: u64, len: usize) -> Slow {
        meta.copy(from, to, at, len)
    }

    /// Instead of a grace.
    fn grace(&self, meta: &dyn Meta) -> Slow {
        meta.grace()
    }

    /// Instead of the layer's answer whether it sees to failures.
    fn sees_to_failures(&self, live: &dyn Live) -> bool {
        live.sees_to_failures()
    }
}

/// Work that says it is done and has done nothing.
#[must_use]
pub fn nothing() -> Slow {
    Box::pin(std::future::ready(Ok(())))
}

/// A live side with a twist.
pub struct Twisted<T> {
    /// The true one.
    pub live: Arc<dyn Live>,
    /// What is different.
    pub twist: T,
}

impl<T: Twist> Twisted<T> {
    fn hand(&self, meta: Rc<dyn Meta>) -> Rc<dyn Meta> {
        Rc::new(Hand { meta, twist: self.twist.clone() })
    }
}

impl<T: Twist> Live for Twisted<T> {
    fn resolve(self: Arc<Self>, io: Io, meta: Rc<dyn Meta>) -> Slow {
        self.live.clone().resolve(io, self.hand(meta))
    }

    fn failed(self: Arc<Self>, io: Io, port: Port, errno: Errno, meta: Rc<dyn Meta>) -> Slow {
        self.live.clone().failed(io, port, errno, self.hand(meta))
    }

    fn sees_to_failures(&self) -> bool {
        self.twist.sees_to_failures(&*self.live)
    }

    fn run(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        self.live.clone().run(self.hand(meta))
    }

    fn stop(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        self.live.clone().stop(self.hand(meta))
    }

    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        meta: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        self.live.clone().command(words, self.hand(meta))
    }

    fn status(&self) -> Vec<(&'static str, Value)> {
        self.live.status()
    }
}

/// What such a layer reaches the devices below with.
struct Hand<T> {
    meta: Rc<dyn Meta>,
    twist: T,
}

impl<T: Twist> Meta for Hand<T> {
    fn read(&self, port: Port, at: u64, len: usize) -> Slow<Vec<u8>> {
        self.meta.read(port, at, len)
    }

    fn write(&self, port: Port, at: u64, bytes: Vec<u8>, durable: bool) -> Slow {
        self.twist.write(&*self.meta, port, at, bytes, durable)
    }

    fn flush(&self, port: Port) -> Slow {
        self.twist.flush(&*self.meta, port)
    }

    fn copy(&self, from: Port, to: Vec<Port>, at: u64, len: usize) -> Slow {
        self.twist.copy(&*self.meta, from, to, at, len)
    }

    fn sleep(&self, ns: u64) -> Slow {
        self.meta.sleep(ns)
    }

    fn now_ns(&self) -> u64 {
        self.meta.now_ns()
    }

    fn grace(&self) -> Slow {
        self.twist.grace(&*self.meta)
    }

    fn is_ending(&self) -> bool {
        self.meta.is_ending()
    }

    fn is_unsettled(&self) -> bool {
        self.meta.is_unsettled()
    }

    fn event(&self, text: String) {
        self.meta.event(text);
    }
}
