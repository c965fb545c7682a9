//! Answers for requests in flight: a fixed table per export, one entry a tag.

use devsplice_core::{Errno, Io, Op, Route, Stack};

use crate::ring::Pages;

/// A request between fetch and finish.
pub(crate) struct Job {
    pub(crate) io: Io,
    pub(crate) pages: Pages,
    /// What is still to be routed.
    pub(crate) route: Route,
    /// Splices that are out, or waiting to be sent.
    pub(crate) flying: u32,
    /// The first error; nothing more is routed once there is one.
    pub(crate) errno: Option<Errno>,
    /// The watchdog's tick at the start.
    pub(crate) since: u32,
    /// Fetched and not finished.
    pub(crate) active: bool,
    /// In the worker's list of requests with pieces left to route.
    pub(crate) waiting: bool,
}

impl Job {
    pub(crate) fn idle(stack: &Stack) -> Job {
        let io = Io::new(Op::Flush, 0, 0);
        let route = stack.route(io);
        Job {
            io,
            pages: Pages(0),
            route,
            flying: 0,
            errno: None,
            since: 0,
            active: false,
            waiting: false,
        }
    }

    /// Records the request's first error and gives up what was not sent yet.
    pub(crate) fn fail(&mut self, errno: Errno) {
        self.errno.get_or_insert(errno);
        self.route.abandon();
    }

    /// Whether all of it was routed and all that was sent has landed.
    pub(crate) fn is_over(&self) -> bool {
        self.flying == 0 && self.route.is_done()
    }
}
