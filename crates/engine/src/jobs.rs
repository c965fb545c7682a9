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
    /// What came out of the route last and is still to be dealt with: a piece found no room.
    pub(crate) held: Option<Result<Piece, Stop>>,
    /// Splices that are out, or waiting to be sent.
    pub(crate) flying: u32,
    /// The first error; nothing more is routed once there is one. None without a request.
    pub(crate) errno: Option<Errno>,
    /// The watchdog's tick at the start.
    pub(crate) since: u32,
    /// Where it enters the stack: at the top, unless it is one of an inner lane.
    pub(crate) node: NodeId,
    /// Fetched and not finished.
    pub(crate) active: bool,
    /// Its end goes behind its splice, which is out.
    pub(crate) is_ahead: bool,
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

/// A request as it is routed: where a flush is said to be has no meaning; Linux leaves anything
/// there.
#[inline]
fn routed(io: Io) -> Io {
    if io.op == Op::Flush { Io::new(Op::Flush, 0, 0) } else { io }
}

impl Job {
    pub(crate) fn idle(stack: &Stack) -> Job {
        let io = Io::new(Op::Flush, 0, 0);
        let mut route = stack.route(io);
        route.abandon();
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
            is_ahead: false,
            refused: false,
            phase: None,
            missed: None,
            careful: None,
            unsettled: false,
        }
    }

    /// Takes a request; nothing of it is routed yet.
    #[inline(always)]
    pub(crate) fn take(&mut self, (io, pages): (Io, Pages), tick: u32) {
        debug_assert!(self.flying == 0 && self.errno.is_none() && self.is_over());
        // One by one, since a copy of the whole brings the gaps between them along.
        (self.io.op, self.io.extent, self.io.fua) = (io.op, io.extent, io.fua);
        self.pages = pages;
        self.since = tick;
        self.active = true;
        self.refused = false;
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

    /// The request as it is routed.
    pub(crate) fn routed(&self) -> Io {
        routed(self.io)
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
        self.missed = None;
    }

    /// The next piece to find room for.
    #[inline]
    pub(crate) fn next(&mut self, stack: &Stack) -> Option<Result<Piece, Stop>> {
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

    /// As `is_over`, for one that may be routed with care.
    pub(crate) fn is_over_with_care(&self) -> bool {
        match &self.careful {
            Some(careful) => self.held.is_none() && careful.trace.is_done(),
            None => self.is_over(),
        }
    }
}
