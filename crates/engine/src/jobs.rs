//! Answers for requests in flight: a fixed table per export, one entry a tag.

use devsplice_core::{Errno, Io, Op, Piece, Route, Stack};

use crate::export::Request;
use crate::ring::Pages;

/// A request between fetch and finish.
pub(crate) struct Job {
    pub(crate) io: Io,
    pub(crate) pages: Pages,
    /// What is still to be routed.
    pub(crate) route: Route,
    /// What came out of the route last and is still to be dealt with: a piece found no room.
    pub(crate) held: Option<Result<Piece, Errno>>,
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

    /// Takes a request and routes it. Its piece, if it is of one; if it is of more, or may not
    /// enter the stack at all, that is left for the passes that follow.
    #[inline]
    pub(crate) fn begin(&mut self, stack: &Stack, request: &Request, tick: u32) -> Option<Piece> {
        self.io = request.io;
        self.pages = request.pages;
        self.flying = 0;
        self.errno = None;
        self.since = tick;
        self.active = true;
        if let Err(errno) = stack.admit(&request.io) {
            self.fail(errno);
            return None;
        }
        // Where a flush is said to be has no meaning; Linux leaves anything there.
        let is_flush = request.io.op == Op::Flush;
        let io = if is_flush { Io::new(Op::Flush, 0, 0) } else { request.io };
        self.route.begin(stack, io, &mut self.held)
    }

    /// What its splices are to do, and with which pages.
    #[inline]
    pub(crate) fn what(&self) -> (Op, bool, Pages) {
        (self.io.op, self.io.fua, self.pages)
    }

    /// Records the request's first error and gives up what was not sent yet.
    #[cold]
    #[inline(never)]
    pub(crate) fn fail(&mut self, errno: Errno) {
        self.errno.get_or_insert(errno);
        self.route.abandon();
        self.held = None;
    }

    /// The next piece to find room for.
    #[inline]
    pub(crate) fn next(&mut self, stack: &Stack) -> Option<Result<Piece, Errno>> {
        match self.held.take() {
            Some(held) => Some(held),
            None => self.route.next(stack),
        }
    }

    /// Whether all of it was routed and all that was sent has landed.
    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        self.flying == 0 && self.held.is_none() && self.route.is_done()
    }
}
