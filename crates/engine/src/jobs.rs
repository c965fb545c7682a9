//! Answers for requests in flight: a fixed table per export, one entry a tag.

use devsplice_core::trace::{Step, Trace};
use devsplice_core::{Errno, Io, NodeId, Op, Piece, Route, Stack, Stop};

use crate::ring::{Pages, To};

/// A request that failed and is routed again, piece by piece.
pub(crate) struct Careful {
    pub(crate) trace: Trace,
    /// What failed this time: the layers that it came through, from the bottom up, and how.
    pub(crate) failures: Vec<(Vec<Step>, Errno)>,
    /// Times that it was begun again because layers have seen to all failures.
    pub(crate) rounds: u8,
}

/// Where a request has failed in a way that is not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// A device could not make durable what it had taken. It says so once: Linux reports an error
    /// of writeback to an open file once, and its next flush succeeds.
    At(To),
    /// A layer could not resolve what it was asked.
    Missed(NodeId, Io),
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
    /// As of when it is under way, and whether others see it wait; see `served`. 0 when it is not.
    pub(crate) since_epoch: u64,
    pub(crate) is_waiting: bool,
    /// The layer that must resolve something before routing can go on.
    pub(crate) missed: Option<(NodeId, Io)>,
    /// The layer that does.
    pub(crate) resolving: Option<(NodeId, Io)>,
    pub(crate) careful: Option<Box<Careful>>,
    /// What is known to have failed and was not told to layers yet. Empty unless something has.
    pub(crate) lost: Vec<(Lost, Errno)>,
    /// A change of it has failed below.
    pub(crate) unsettled: bool,
}

/// A request as it is routed: where a flush is said to be has no meaning; Linux leaves anything
/// there.
#[inline]
fn routed(io: Io) -> Io {
    if io.op == Op::Flush { Io::new(Op::Flush, 0, 0) } else { io }
}

/// What a request that has lost this failed with there, if it has.
pub(crate) fn known(lost: &[(Lost, Errno)], place: Lost) -> Option<Errno> {
    lost.iter().find(|(lost, _)| *lost == place).map(|(_, errno)| *errno)
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
            since_epoch: 0,
            is_waiting: false,
            missed: None,
            resolving: None,
            careful: None,
            lost: Vec::new(),
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

    /// Keeps in mind that it has failed there.
    pub(crate) fn lose(&mut self, lost: Lost, errno: Errno) {
        if known(&self.lost, lost).is_none() {
            self.lost.push((lost, errno));
        }
    }

    /// Whether it says that something is durable when it is done.
    pub(crate) fn is_durable(&self) -> bool {
        self.io.fua || self.io.op == Op::Flush
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
