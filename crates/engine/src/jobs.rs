//! Answers for requests in flight: a fixed table per export, one entry a tag.

use devsplice_core::{Errno, Io, Op, Piece, Route, Stack};

use crate::ring::Pages;

/// A request between fetch and finish.
pub(crate) struct Job {
    pub(crate) io: Io,
    pub(crate) pages: Pages,
    /// What is still to be routed.
    pub(crate) route: Route,
    /// The piece that came out of the route last and found no room.
    pub(crate) held: Option<Piece>,
    /// Splices that are out, or waiting to be sent.
    pub(crate) flying: u32,
    /// The first error; nothing more is routed once there is one.
    pub(crate) errno: Option<Errno>,
    /// The watchdog's tick at the start.
    pub(crate) since: u32,
    /// Fetched and not finished.
    pub(crate) active: bool,
}

impl Job {
    pub(crate) fn idle(stack: &Stack) -> Job {
        let io = Io::new(Op::Flush, 0, 0);
        let route = stack.route(io);
        Job {
            io,
            pages: Pages(0),
            route,
            held: None,
            flying: 0,
            errno: None,
            since: 0,
            active: false,
        }
    }

    /// Records the request's first error and gives up what was not sent yet.
    pub(crate) fn fail(&mut self, errno: Errno) {
        self.errno.get_or_insert(errno);
        self.route.abandon();
        self.held = None;
    }

    /// The next piece to find room for.
    #[inline]
    pub(crate) fn next(&mut self, stack: &Stack) -> Option<Result<Piece, Errno>> {
        match self.held.take() {
            Some(piece) => Some(Ok(piece)),
            None => self.route.next(stack),
        }
    }

    /// Whether all of it was routed and all that was sent has landed.
    pub(crate) fn is_over(&self) -> bool {
        self.flying == 0 && self.held.is_none() && self.route.is_done()
    }
}
