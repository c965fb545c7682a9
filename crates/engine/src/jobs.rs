//! Answers for requests in flight: a fixed table per export, one entry a tag.

use devsplice_core::trace::{Step, Trace};
use devsplice_core::{Errno, Io, NodeId, Op, Piece, Route, Stack, Stop};

use crate::ring::Pages;

/// A request that failed and is routed again, piece by piece.
pub(crate) struct Careful {
    pub(crate) trace: Trace,
    /// What failed this time: the layers that it came through, from the bottom up, and how.
    pub(crate) failures: Vec<(Vec<Step>, Errno)>,
    /// Times that it was begun again because layers have seen to all failures.
    pub(crate) rounds: u8,
}

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
    /// Where it enters the stack.
    pub(crate) node: NodeId,
    /// Fetched and not finished.
    pub(crate) active: bool,
    /// It is over, whatever layers could do about its error.
    pub(crate) refused: bool,
    /// The phase in which its last pass was routed, until that has landed.
    pub(crate) phase: Option<usize>,
    /// The layer that must resolve something before routing can go on.
    pub(crate) missed: Option<(NodeId, Io)>,
    pub(crate) careful: Option<Box<Careful>>,
    /// A change of it has failed below.
    pub(crate) unsettled: bool,
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
            node: stack.root(),
            active: false,
            refused: false,
            phase: None,
            missed: None,
            careful: None,
            unsettled: false,
        }
    }

    /// Begins a request at a place of its stack.
    #[inline]
    pub(crate) fn begin(&mut self, (io, pages): (Io, Pages), node: NodeId, tick: u32) {
        self.io = io;
        self.pages = pages;
        self.flying = 0;
        self.errno = None;
        self.since = tick;
        self.node = node;
        self.active = true;
        self.refused = false;
        self.route.restart_at(self.routed(), node);
    }

    /// Takes it from the top again: whatever layers answered before counts for nothing any more.
    pub(crate) fn restart(&mut self) {
        let (io, node) = (self.routed(), self.node);
        self.errno = None;
        self.held = None;
        match &mut self.careful {
            Some(careful) => {
                careful.trace = Trace::new(node, io);
                careful.failures.clear();
            }
            None => self.route.restart_at(io, node),
        }
    }

    /// The request as it is routed: where a flush is said to be has no meaning; Linux leaves
    /// anything there.
    #[inline]
    pub(crate) fn routed(&self) -> Io {
        if self.io.op == Op::Flush { Io::new(Op::Flush, 0, 0) } else { self.io }
    }

    /// Records the request's first error and gives up what was not sent yet.
    pub(crate) fn fail(&mut self, errno: Errno) {
        self.errno.get_or_insert(errno);
        self.route.abandon();
        self.held = None;
        self.missed = None;
    }

    /// The next piece to find room for.
    #[inline]
    pub(crate) fn next(&mut self, stack: &Stack) -> Option<Result<Piece, Stop>> {
        match self.held.take() {
            Some(piece) => Some(Ok(piece)),
            None => self.route.next(stack),
        }
    }

    /// Whether all of it was routed and all that was sent has landed.
    pub(crate) fn is_over(&self) -> bool {
        let is_done = match &self.careful {
            Some(careful) => careful.trace.is_done(),
            None => self.route.is_done(),
        };
        self.flying == 0 && self.held.is_none() && is_done
    }
}
