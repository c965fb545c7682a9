//! Answers for the way of a request down a stack: a loop that asks layers, never a recursion.
//!
//! A route is resumable: it can stop after any piece (the engine does, when its table is full) and
//! holds all it needs in a fixed array.

use crate::check;
use crate::errno::Errno;
use crate::io::{Extent, Io, Op};
use crate::map::{Map, Port};
use crate::probe::Wait;
use crate::stack::{BackendId, MAX_DEPTH, Node, NodeId, Stack, What, lower};

/// Each layer on the way down leaves at most the rest of its request and one fan-out behind.
const MAX_FRAMES: usize = 2 * MAX_DEPTH + 1;

/// Where a piece goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A bottom of the stack.
    Backend(BackendId),
    /// Nowhere: a read sees zeros, anything else is done.
    Zero,
}

/// A part of a request with one destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it goes.
    pub place: Place,
    /// First byte there.
    pub at: u64,
    /// First byte of the request that it carries.
    pub part: u64,
    /// Bytes; 0 for a flush.
    pub len: u64,
    /// How long it waits before it is sent, and who is told how long it takes.
    pub wait: Wait,
}

/// What is still to be routed: a range of a place, or the rest of a fan-out.
#[derive(Clone, Copy)]
struct Frame {
    at: u64,
    len: u64,
    part: u64,
    wait: Wait,
    node: NodeId,
    /// The next port of a fan-out from `node`; for a request to `node` itself `WHOLE`, or `FLUSH`.
    port: u16,
    /// Which of the first 32 ports a fan-out goes to.
    ports: u32,
}

/// Where a request does not go straight down, and what the layer there has answered.
pub struct Bend<'s> {
    pub(crate) node: &'s Node,
    pub(crate) io: Io,
    pub(crate) answer: Result<Map, Errno>,
}

/// Every port.
const EVERY: u32 = u32::MAX;

/// Why routing stopped before the end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A layer refuses the rest with this number.
    Error(Errno),
    /// This layer cannot answer for this part from memory. The route stands where it stood: asked
    /// for the next piece, it asks the layer again.
    Miss(NodeId, Io),
}

/// For whoever cannot resolve a miss: it is "not now".
impl From<Stop> for Errno {
    fn from(stop: Stop) -> Errno {
        match stop {
            Stop::Error(errno) => errno,
            Stop::Miss(..) => Errno::EAGAIN,
        }
    }
}

const WHOLE: u16 = u16::MAX;
const FLUSH: u16 = u16::MAX - 1;

/// The port of a frame that asks for `op` from a place itself.
#[inline]
fn itself(op: Op) -> u16 {
    if matches!(op, Op::Flush) { FLUSH } else { WHOLE }
}

/// A request on its way down a stack.
pub struct Route {
    op: Op,
    fua: bool,
    depth: u8,
    frames: [Frame; MAX_FRAMES],
}

impl Route {
    #[inline]
    pub(crate) fn new(io: Io, root: NodeId) -> Route {
        let Extent { at, len } = io.extent;
        let first = Frame {
            at,
            len,
            part: 0,
            wait: Wait::NONE,
            node: root,
            port: itself(io.op),
            ports: EVERY,
        };
        Route { op: io.op, fua: io.fua, depth: 1, frames: [first; MAX_FRAMES] }
    }

    /// Starts over with a request that has come to where it does not go straight down, from the
    /// answer that the layer there has given. What [`Route::next`] would have answered first.
    ///
    /// # Panics
    /// If a layer breaks its contract; see [`check`].
    #[inline(never)]
    pub fn follow(&mut self, stack: &Stack, bend: &Bend<'_>) -> Option<Result<Piece, Stop>> {
        let Bend { node, io, answer } = *bend;
        let Extent { at, len } = io.extent;
        (self.op, self.fua, self.depth) = (io.op, io.fua, 0);
        let (wait, node, port, ports) = (Wait::NONE, node.id, WHOLE, EVERY);
        let frame = Frame { at, len, part: 0, wait, node, port, ports };
        match self.walk(&stack.nodes, frame, Some(answer)) {
            None => self.next(stack),
            first => first,
        }
    }

    /// Starts over with another request, from a place inside the stack.
    pub fn restart_at(&mut self, io: Io, node: NodeId) {
        let Extent { at, len } = io.extent;
        (self.op, self.fua, self.depth) = (io.op, io.fua, 0);
        let port = itself(io.op);
        self.push(Frame { at, len, part: 0, wait: Wait::NONE, node, port, ports: EVERY });
    }

    /// Whether every piece was handed out.
    #[must_use]
    #[inline]
    pub fn is_done(&self) -> bool {
        self.depth == 0
    }

    /// Gives up the rest of the request.
    pub fn abandon(&mut self) {
        self.depth = 0;
    }

    /// The next piece, why there is none, or `None` at the end.
    ///
    /// # Panics
    /// If a layer breaks its contract; see [`check`].
    #[inline]
    pub fn next(&mut self, stack: &Stack) -> Option<Result<Piece, Stop>> {
        self.next_in(&stack.nodes)
    }

    pub(crate) fn next_in(&mut self, nodes: &[Node]) -> Option<Result<Piece, Stop>> {
        loop {
            let frame = self.pop()?;
            let answer = match frame.port {
                WHOLE => self.walk(nodes, frame, None),
                _ => self.spread(nodes),
            };
            if answer.is_some() {
                return answer;
            }
        }
    }

    /// Follows a request to a place down to where it ends: the piece, or the error. If there is
    /// neither, a fan-out was left on top. `answer` is what the layer at that place has said, if it
    /// was asked before.
    fn walk(
        &mut self,
        nodes: &[Node],
        mut frame: Frame,
        mut answer: Option<Result<Map, Errno>>,
    ) -> Option<Result<Piece, Stop>> {
        let mut node = &nodes[frame.node.index()];
        loop {
            let (layer, ports) = match &node.what {
                What::Backend(id) => return Some(Ok(piece(Place::Backend(*id), &frame))),
                What::Layer { layer, ports } => (layer, ports),
            };
            let answer = match answer.take() {
                Some(answer) => answer,
                None => {
                    let extent = Extent { at: frame.at, len: frame.len };
                    layer.map(Io { op: self.op, extent, fua: self.fua })
                }
            };
            let (len, port, at, wait_ns) = match answer {
                Ok(Map::To { len, port, at }) => (len, port, at, 0),
                Ok(Map::After { len, port, at, wait_ns }) => (len, port, at, wait_ns),
                answer => return self.end(nodes, frame, answer),
            };
            self.keep_rest(node, &mut frame, len);
            // Only now: what was kept for later does not wait for what this answer is about.
            frame.wait = frame.wait.plus_ns(wait_ns);
            frame.at = at;
            let extent = Extent { at, len: frame.len };
            (frame.node, node) = lower(nodes, node, ports, (port, extent));
        }
    }

    /// What an answer without a single lower place leads to: a piece, or a fan-out left on top.
    #[inline(never)]
    fn end(
        &mut self,
        nodes: &[Node],
        mut frame: Frame,
        answer: Result<Map, Errno>,
    ) -> Option<Result<Piece, Stop>> {
        let node = &nodes[frame.node.index()];
        let answer = match answer {
            Ok(Map::Miss) => return Some(Err(self.missed(node, frame))),
            Ok(answer) => answer,
            Err(errno) => return Some(Err(Stop::Error(errno))),
        };
        self.keep_rest(node, &mut frame, answer.len());
        match answer {
            Map::All { at, .. } => self.push(Frame { at, port: 0, ports: EVERY, ..frame }),
            Map::Watched { port, at, .. } => {
                check::may_watch(&node.name, node.probe);
                let extent = Extent { at, len: frame.len };
                let (child, _) = lower(nodes, node, node.ports(), (port, extent));
                let wait = frame.wait.watched(node.probe);
                self.push(Frame { at, node: child, port: WHOLE, wait, ..frame });
            }
            Map::Some { at, ports, .. } => {
                check::ports(&node.name, ports, node.ports().len());
                self.push(Frame { at, port: 0, ports, ..frame });
            }
            Map::Both { first, second, .. } => {
                for (port, at) in [second, first] {
                    let extent = Extent { at, len: frame.len };
                    let (child, _) = lower(nodes, node, node.ports(), (port, extent));
                    self.push(Frame { at, node: child, port: WHOLE, ..frame });
                }
            }
            _ => return Some(Ok(piece(Place::Zero, &frame))),
        }
        None
    }

    /// Puts back what a layer could not answer, so that it is asked again.
    fn missed(&mut self, node: &Node, frame: Frame) -> Stop {
        check::may_miss(&node.name, node.is_live());
        self.push(frame);
        let Frame { at, len, .. } = frame;
        let extent = Extent { at, len };
        Stop::Miss(frame.node, Io { op: self.op, extent, fua: self.fua })
    }

    /// What the frame that was just popped leads to, when it is no request with an extent.
    #[inline(never)]
    fn spread(&mut self, nodes: &[Node]) -> Option<Result<Piece, Stop>> {
        let frame = self.frames[usize::from(self.depth)];
        if frame.port == FLUSH {
            return self.sink(nodes, frame);
        }
        self.fan(nodes, &frame);
        None
    }

    /// Follows a flush down. It has no extent, so nothing is ever left over.
    fn sink(&mut self, nodes: &[Node], mut frame: Frame) -> Option<Result<Piece, Stop>> {
        loop {
            let node = &nodes[frame.node.index()];
            let (layer, ports) = match &node.what {
                What::Backend(id) => return Some(Ok(piece(Place::Backend(*id), &frame))),
                What::Layer { layer, ports } => (layer, ports),
            };
            let (port, wait_ns) = match layer.flush() {
                Ok(Map::To { port, .. }) => (port, 0),
                Ok(Map::After { port, wait_ns, .. }) => (port, wait_ns),
                Ok(Map::Watched { port, .. }) => {
                    check::may_watch(&node.name, node.probe);
                    frame.wait = frame.wait.watched(node.probe);
                    (port, 0)
                }
                Ok(Map::All { .. }) => {
                    self.push(Frame { port: 0, ports: EVERY, ..frame });
                    return None;
                }
                Ok(Map::Some { ports: some, .. }) => {
                    check::ports(&node.name, some, ports.len());
                    self.push(Frame { port: 0, ports: some, ..frame });
                    return None;
                }
                // A flush goes to devices, not to places on them.
                Ok(Map::Both { .. }) => check::no_flush(&node.name),
                Ok(Map::Zero { .. }) => return Some(Ok(piece(Place::Zero, &frame))),
                Ok(Map::Miss) => return Some(Err(self.missed(node, frame))),
                Err(errno) => return Some(Err(Stop::Error(errno))),
            };
            (frame.node, _) = lower(nodes, node, ports, (port, Extent { at: 0, len: 0 }));
            frame.wait = frame.wait.plus_ns(wait_ns);
        }
    }

    /// Puts the next leg of a fan-out on top of the legs behind it.
    fn fan(&mut self, nodes: &[Node], frame: &Frame) {
        let node = &nodes[frame.node.index()];
        let What::Layer { layer, ports } = &node.what else { return };
        let is_flush = self.op == Op::Flush;
        let is_meant = |port: &u16| {
            (*port >= 32 || frame.ports >> port & 1 == 1)
                && (!is_flush || layer.needs_flush(Port(*port)))
        };
        let mut meant = (frame.port..).take(ports.len() - usize::from(frame.port)).filter(is_meant);
        let Some(port) = meant.next() else { return };
        if let Some(next) = meant.next() {
            self.push(Frame { port: next, ..*frame });
        }
        let child = ports[usize::from(port)];
        let below = &nodes[child.index()];
        let extent = Extent { at: frame.at, len: frame.len };
        check::destination(&node.name, extent, &below.limits, below.mask);
        self.push(Frame { node: child, port: itself(self.op), ..*frame });
    }

    /// Shortens `frame` to the answered prefix and keeps what is behind it for later.
    #[inline]
    fn keep_rest(&mut self, node: &Node, frame: &mut Frame, len: u64) {
        if len == frame.len {
            return;
        }
        check::prefix(&node.name, frame.len, len);
        let (at, part) = (frame.at + len, frame.part + len);
        self.push(Frame { at, part, len: frame.len - len, ..*frame });
        frame.len = len;
    }

    #[inline]
    fn pop(&mut self) -> Option<Frame> {
        self.depth = self.depth.checked_sub(1)?;
        Some(self.frames[usize::from(self.depth)])
    }

    #[inline]
    fn push(&mut self, frame: Frame) {
        // The builder bounds the depth of a stack, so the array cannot run over.
        self.frames[usize::from(self.depth)] = frame;
        self.depth += 1;
    }
}

#[inline]
fn piece(place: Place, frame: &Frame) -> Piece {
    let Frame { at, len, part, wait, .. } = *frame;
    Piece { place, at, part, len, wait }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::error::Result as Control;
    use crate::layer::{Layer, Lower};
    use crate::limits::Limits;
    use crate::map::Port;
    use crate::stack::StackBuilder;

    /// Answers at most `chunk` bytes at a time, as `kind` says.
    struct Fake {
        chunk: u64,
        kind: fn(Io, u64) -> Result<Map, Errno>,
    }

    impl Layer for Fake {
        fn open(&mut self, below: &mut dyn Lower) -> Control<Limits> {
            let size = below.limits().iter().map(|l| l.size).min().unwrap_or(1 << 20);
            Limits::stack(below.limits(), size)
        }
        fn map(&self, io: Io) -> Result<Map, Errno> {
            (self.kind)(io, io.extent.len.min(self.chunk))
        }
    }

    fn to(io: Io, len: u64) -> Result<Map, Errno> {
        Ok(Map::To { len, port: Port(0), at: io.extent.at })
    }

    fn all(io: Io, len: u64) -> Result<Map, Errno> {
        Ok(Map::All { len, at: io.extent.at })
    }

    fn over(kind: fn(Io, u64) -> Result<Map, Errno>, chunk: u64, legs: usize) -> Stack {
        let mut builder = StackBuilder::new();
        let mut ports = Vec::new();
        for _ in 0..legs {
            let (leg, _) = builder.backend("leg", Limits::ideal(1 << 20)).unwrap();
            // A layer below each leg, so that a fan-out is nested in more routing.
            let fake = Box::new(Fake { chunk: 1024, kind: to });
            ports.push(builder.layer("sub", fake, &[leg], &mut |_, _, _| Ok(())).unwrap());
        }
        let fake = Box::new(Fake { chunk, kind });
        let top = builder.layer("top", fake, &ports, &mut |_, _, _| Ok(())).unwrap();
        builder.finish(top)
    }

    fn pieces(stack: &Stack, io: Io) -> Vec<Result<Piece, Stop>> {
        let mut route = stack.route(io);
        std::iter::from_fn(|| route.next(stack)).collect()
    }

    #[test]
    fn what_is_kept_of_a_request_stays_small() {
        // Copied for each rest and each fan-out; a probe's bit must not make it grow.
        assert_eq!(size_of::<Frame>(), 40);
    }

    #[test]
    fn pieces_of_a_prefix_answer_tile_the_request() {
        let stack = over(to, 1536, 1);
        let got = pieces(&stack, Io::new(Op::Read, 512, 4096));
        let mut part = 0;
        for piece in got {
            let piece = piece.unwrap();
            assert_eq!((piece.part, piece.at), (part, 512 + part));
            part += piece.len;
        }
        assert_eq!(part, 4096);
    }

    /// As the engine asks: straight down first, and on from where it bends.
    fn straight(stack: &Stack, io: Io) -> Vec<Result<Piece, Stop>> {
        let mut route = stack.route(io);
        let mut first = match stack.straight(io) {
            Ok(piece) => return vec![Ok(piece)],
            Err(bend) => route.follow(stack, &bend),
        };
        std::iter::from_fn(|| first.take().or_else(|| route.next(stack))).collect()
    }

    #[test]
    fn what_goes_straight_down_or_bends_is_what_a_route_gives() {
        let late =
            |io: Io, len| Ok(Map::After { len, port: Port(0), at: io.extent.at, wait_ns: 5 });
        let some = |io: Io, len| Ok(Map::Some { len, at: io.extent.at, ports: 0b10 });
        let zero = |_: Io, len| Ok(Map::Zero { len });
        let no = |io: Io, len| if io.extent.at < 2048 { to(io, len) } else { Err(Errno::EIO) };
        for kind in [to, all, late, some, zero, no] {
            for chunk in [512, 1536, 4096] {
                let stack = over(kind, chunk, 2);
                for (at, len) in [(0, 512), (512, 1024), (512, 4096), (2048, 512)] {
                    let io = Io::new(Op::Write, at, len);
                    assert_eq!(straight(&stack, io), pieces(&stack, io), "{chunk} {io:?}");
                }
            }
        }
    }

    /// Answers 1 KiB at a time, and keeps what it was asked.
    struct Asked(Arc<Mutex<Vec<Extent>>>);

    impl Layer for Asked {
        fn open(&mut self, below: &mut dyn Lower) -> Control<Limits> {
            below.only()
        }
        fn map(&self, io: Io) -> Result<Map, Errno> {
            self.0.lock().unwrap().push(io.extent);
            to(io, io.extent.len.min(1024))
        }
    }

    #[test]
    fn no_layer_is_asked_twice_for_the_same_bytes() {
        let asked = Arc::default();
        let mut builder = StackBuilder::new();
        let (mut top, _) = builder.backend("disk", Limits::ideal(1 << 20)).unwrap();
        for _ in 0..2 {
            let layer = Box::new(Asked(Arc::clone(&asked)));
            top = builder.layer("x", layer, &[top], &mut |_, _, _| Ok(())).unwrap();
        }
        let stack = builder.finish(top);
        assert_eq!(straight(&stack, Io::new(Op::Read, 512, 2560)).len(), 3);
        let of = |at, len| Extent { at, len };
        let upper = [of(512, 2560), of(1536, 1536), of(2560, 512)];
        let lower = [of(512, 1024), of(1536, 1024), of(2560, 512)];
        let both: Vec<_> = upper.into_iter().zip(lower).flat_map(<[Extent; 2]>::from).collect();
        assert_eq!(*asked.lock().unwrap(), both);
    }

    #[test]
    #[should_panic(expected = "layer top broke its contract")]
    fn an_answer_for_more_than_was_asked_is_a_broken_contract_on_the_straight_way_too() {
        let stack = over(|io, len| to(io, len + 512), 512, 1);
        straight(&stack, Io::new(Op::Read, 0, 512));
    }

    #[test]
    #[should_panic(expected = "layer top broke its contract")]
    fn an_answer_behind_the_lower_device_is_one_on_the_straight_way_too() {
        let stack = over(|_, len| Ok(Map::To { len, port: Port(0), at: 1 << 20 }), 512, 1);
        straight(&stack, Io::new(Op::Read, 0, 512));
    }

    #[test]
    fn what_is_ordinary_may_enter_and_has_pages() {
        for read_only in [false, true] {
            let mut builder = StackBuilder::new();
            let limits = Limits { read_only, ..Limits::ideal(8192) };
            let (top, _) = builder.backend("disk", limits).unwrap();
            let stack = builder.finish(top);
            for op in [Op::Read, Op::Write, Op::Flush, Op::Discard] {
                for at in [0, 256, 512, 8192, 8704, u64::MAX - 511] {
                    for len in [0, 256, 512, 8192, 8704, u64::MAX - 511] {
                        let io = Io::new(op, at, len);
                        let may = op.has_pages() && stack.admit(&io).is_ok();
                        assert_eq!(stack.is_ordinary(&io), may && !read_only, "{io:?}");
                        let fits = len != 0 && at % 512 == 0 && len % 512 == 0;
                        let fits = fits && at < 8192 && len <= 8192 - at;
                        let is_read = op == Op::Read;
                        let should = fits && (is_read || op == Op::Write && !read_only);
                        assert_eq!(may, should, "{io:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_fan_out_sends_each_byte_to_each_leg_once() {
        let stack = over(all, 2048, 3);
        let mut seen = [[0u8; 8]; 3];
        for piece in pieces(&stack, Io::new(Op::Write, 0, 4096)) {
            let piece = piece.unwrap();
            let Place::Backend(id) = piece.place else { panic!("zero") };
            assert_eq!(piece.at, piece.part);
            for block in piece.part / 512..(piece.part + piece.len) / 512 {
                seen[usize::from(id.0)][usize::try_from(block).unwrap()] += 1;
            }
        }
        assert_eq!(seen, [[1; 8]; 3]);
    }

    #[test]
    fn a_flush_reaches_every_bottom_once() {
        let stack = over(to, 512, 5);
        let got = pieces(&stack, Io::new(Op::Flush, 0, 0));
        let mut ids: Vec<_> = got
            .into_iter()
            .map(|piece| match piece.unwrap() {
                Piece { place: Place::Backend(id), len: 0, .. } => id.0,
                other => panic!("{other:?}"),
            })
            .collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn an_error_answer_comes_out_in_its_place() {
        let stack =
            over(|io, len| if io.extent.at < 1024 { to(io, len) } else { Err(Errno::EIO) }, 512, 1);
        let got = pieces(&stack, Io::new(Op::Read, 0, 2048));
        assert!(got[0].is_ok() && got[1].is_ok());
        assert_eq!(got[2], Err(Stop::Error(Errno::EIO)));
    }

    #[test]
    #[should_panic(expected = "layer top broke its contract")]
    fn an_answer_behind_the_lower_device_is_a_broken_contract() {
        let stack = over(|_, len| Ok(Map::To { len, port: Port(0), at: 1 << 20 }), 512, 1);
        pieces(&stack, Io::new(Op::Read, 0, 512));
    }

    #[test]
    #[should_panic(expected = "it has no port 7")]
    fn an_answer_to_a_port_that_is_not_there_is_a_broken_contract() {
        let stack = over(|io, len| Ok(Map::To { len, port: Port(7), at: io.extent.at }), 512, 1);
        pieces(&stack, Io::new(Op::Read, 0, 512));
    }

    #[test]
    fn the_rest_of_a_request_does_not_wait_for_a_delayed_prefix() {
        let late_start = |io: Io, len| {
            let (port, at) = (Port(0), io.extent.at);
            Ok(if at == 0 {
                Map::After { len, port, at, wait_ns: 5 }
            } else {
                Map::To { len, port, at }
            })
        };
        let stack = over(late_start, 512, 1);
        let waits: Vec<_> = pieces(&stack, Io::new(Op::Read, 0, 1536))
            .into_iter()
            .map(|piece| piece.unwrap().wait.ns())
            .collect();
        assert_eq!(waits, [5, 0, 0]);
    }

    #[test]
    fn waits_add_up_on_the_way_down() {
        let late =
            |io: Io, len| Ok(Map::After { len, port: Port(0), at: io.extent.at, wait_ns: 5 });
        let mut builder = StackBuilder::new();
        let (leg, _) = builder.backend("leg", Limits::ideal(1 << 20)).unwrap();
        let mut top = leg;
        for _ in 0..3 {
            let fake = Box::new(Fake { chunk: u64::MAX, kind: late });
            top = builder.layer("late", fake, &[top], &mut |_, _, _| Ok(())).unwrap();
        }
        let stack = builder.finish(top);
        assert_eq!(pieces(&stack, Io::new(Op::Read, 0, 512))[0].unwrap().wait.ns(), 15);
    }

    #[test]
    fn the_deepest_stack_with_the_most_splits_fits_the_frames() {
        let mut builder = StackBuilder::new();
        let (mut top, _) = builder.backend("leg", Limits::ideal(1 << 20)).unwrap();
        for depth in 0..crate::stack::MAX_DEPTH {
            let kind = if depth % 2 == 0 { all } else { to };
            let fake = Box::new(Fake { chunk: 512 << depth, kind });
            top = builder.layer("x", fake, &[top], &mut |_, _, _| Ok(())).unwrap();
        }
        let one_more = Box::new(Fake { chunk: 512, kind: to });
        let error = builder.layer("x", one_more, &[top], &mut |_, _, _| Ok(())).err();
        assert!(error.unwrap().to_string().contains("above one another"));
        let stack = builder.finish(top);
        let len: u64 = 1 << 20;
        let got = pieces(&stack, Io::new(Op::Write, 0, len));
        assert_eq!(got.into_iter().map(|p| p.unwrap().len).sum::<u64>(), len);
    }

    #[test]
    fn a_device_below_two_layers_is_refused() {
        let mut builder = StackBuilder::new();
        let (leg, _) = builder.backend("disk", Limits::ideal(1 << 20)).unwrap();
        let mut add = |ports: &[NodeId]| {
            let fake = Box::new(Fake { chunk: 512, kind: to });
            builder.layer("x", fake, ports, &mut |_, _, _| Ok(()))
        };
        add(&[leg]).unwrap();
        assert!(add(&[leg]).is_err());
    }
}
