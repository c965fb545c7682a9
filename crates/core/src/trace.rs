//! Answers for the way of a request down a stack with a record of who sent what where: slower than
//! [`Route`](crate::Route), taken when something below has failed and somebody above may see to it.

use crate::check;
use crate::io::{Extent, Io, Op};
use crate::map::{Map, Port};
use crate::probe::Wait;
use crate::route::{Piece, Place, Stop};
use crate::stack::{Node, NodeId, Stack, What, lower};

/// A layer that sent a part of a request on, and through which of its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The layer.
    pub node: NodeId,
    /// What it was asked, cut to what it answered for.
    pub io: Io,
    /// The way that it chose.
    pub port: Port,
    up: Option<usize>,
}

struct Todo {
    node: NodeId,
    extent: Extent,
    part: u64,
    wait: Wait,
    up: Option<usize>,
}

/// A request on its way down.
pub struct Trace {
    op: Op,
    fua: bool,
    todo: Vec<Todo>,
    steps: Vec<Step>,
    last: Option<usize>,
}

impl Trace {
    /// The pieces of `io` from `node` on, the same that [`Route`](crate::Route) gives.
    #[must_use]
    pub fn new(node: NodeId, io: Io) -> Trace {
        let first = Todo { node, extent: io.extent, part: 0, wait: Wait::NONE, up: None };
        Trace { op: io.op, fua: io.fua, todo: vec![first], steps: Vec::new(), last: None }
    }

    /// Whether every piece was handed out.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.todo.is_empty()
    }

    /// The layers that the last piece, or the last error, came through, from the bottom up.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        let mut next = self.last;
        std::iter::from_fn(move || {
            let step = self.steps.get(next?)?;
            next = step.up;
            Some(step)
        })
    }

    /// Gives up the part at which the last call missed; [`Trace::steps`] tells how it came there.
    pub fn skip(&mut self) {
        if let Some(todo) = self.todo.pop() {
            self.last = todo.up;
        }
    }

    /// As [`Route::next`](crate::Route::next).
    ///
    /// # Panics
    /// If a layer breaks its contract.
    pub fn next(&mut self, stack: &Stack) -> Option<Result<Piece, Stop>> {
        loop {
            let todo = self.todo.pop()?;
            let node = &stack.nodes[todo.node.index()];
            let layer = match &node.what {
                What::Backend(id) => {
                    self.last = todo.up;
                    return Some(Ok(piece(Place::Backend(*id), &todo)));
                }
                What::Layer { layer, .. } => layer,
            };
            let io = Io { op: self.op, extent: todo.extent, fua: self.fua };
            let answer = if self.op == Op::Flush { layer.flush() } else { layer.map(io) };
            match answer {
                Err(errno) => {
                    self.last = todo.up;
                    return Some(Err(Stop::Error(errno)));
                }
                Ok(Map::Miss) => {
                    check::may_miss(&node.name, node.is_live());
                    let missed = Stop::Miss(todo.node, io);
                    self.todo.push(todo);
                    return Some(Err(missed));
                }
                Ok(answer) => {
                    if let Some(zero) = self.answered(stack, node, todo, answer) {
                        return Some(Ok(zero));
                    }
                }
            }
        }
    }

    /// Puts what an answer leads to on top; a piece where it leads nowhere.
    fn answered(
        &mut self,
        stack: &Stack,
        node: &Node,
        mut todo: Todo,
        answer: Map,
    ) -> Option<Piece> {
        let (len, up) = (answer.len(), todo.up);
        if self.op != Op::Flush {
            check::prefix(&node.name, todo.extent.len, len);
            let Extent { at, len: asked } = todo.extent;
            if len < asked {
                let (extent, part) = (Extent { at: at + len, len: asked - len }, todo.part + len);
                self.todo.push(Todo { extent, part, ..todo });
            }
            todo.extent.len = len;
        }
        let count = node.ports().len();
        let every = (0..count).map(|port| u16::try_from(port).unwrap_or(u16::MAX));
        let ways: Vec<(u16, u64)> = match answer {
            Map::Watched { port, at, .. } => {
                check::may_watch(&node.name, node.probe);
                todo.wait = todo.wait.watched(node.probe);
                vec![(port.0, at)]
            }
            Map::To { port, at, .. } | Map::After { port, at, .. } => vec![(port.0, at)],
            Map::All { at, .. } => every.map(|port| (port, at)).collect(),
            Map::Some { at, ports, .. } => {
                check::ports(&node.name, ports, count);
                every.filter(|port| ports >> port & 1 == 1).map(|port| (port, at)).collect()
            }
            Map::Both { .. } if self.op == Op::Flush => check::no_flush(&node.name),
            Map::Both { first, second, .. } => vec![(first.0.0, first.1), (second.0.0, second.1)],
            Map::Zero { .. } | Map::Miss => {
                self.last = up;
                return Some(piece(Place::Zero, &todo));
            }
        };
        let more_ns = if let Map::After { wait_ns, .. } = answer { wait_ns } else { 0 };
        let wait = todo.wait.plus_ns(more_ns);
        let io = Io { op: self.op, extent: todo.extent, fua: self.fua };
        for (port, at) in ways.into_iter().rev() {
            let at = if self.op == Op::Flush { 0 } else { at };
            let extent = Extent { at, len: todo.extent.len };
            let (child, _) = lower(&stack.nodes, node, node.ports(), (Port(port), extent));
            self.steps.push(Step { node: todo.node, io, port: Port(port), up });
            let up = Some(self.steps.len() - 1);
            self.todo.push(Todo { node: child, extent, part: todo.part, wait, up });
        }
        None
    }
}

fn piece(place: Place, todo: &Todo) -> Piece {
    let Todo { extent: Extent { at, len }, part, wait, .. } = *todo;
    Piece { place, at, part, len, wait }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errno::Errno;
    use crate::error::Result as Control;
    use crate::layer::{Layer, Lower};
    use crate::limits::Limits;
    use crate::live::{Live, Meta, Slow};
    use crate::probe::Probe;
    use crate::stack::StackBuilder;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Turns between all kinds of answers, chunk by chunk.
    struct Every {
        knows: Arc<AtomicBool>,
    }

    struct Learns;

    impl Live for Learns {
        fn resolve(self: Arc<Self>, _: Io, _: Rc<dyn Meta>) -> Slow {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    impl Layer for Every {
        fn open(&mut self, below: &mut dyn Lower) -> Control<Limits> {
            Limits::stack(below.limits(), below.limits()[0].size)
        }

        fn map(&self, io: Io) -> Result<Map, Errno> {
            let Extent { at, len } = io.extent;
            let len = len.min(1024 - at % 1024);
            Ok(match at / 1024 % 7 {
                0 => Map::To { len, port: Port(2), at },
                1 => Map::After { len, port: Port(0), at, wait_ns: 5 },
                2 => Map::All { len, at },
                3 => Map::Some { len, at, ports: 0b101 },
                4 => Map::Both { len, first: (Port(1), at), second: (Port(2), 0) },
                5 => Map::Watched { len, port: Port(1), at },
                _ if self.knows.load(Ordering::Relaxed) => Map::Zero { len },
                _ => Map::Miss,
            })
        }

        fn flush(&self) -> Result<Map, Errno> {
            Ok(Map::Some { len: 0, at: 0, ports: 0b110 })
        }

        fn probe(&self) -> Option<Arc<Probe>> {
            Some(Arc::default())
        }

        fn live(&self) -> Option<Arc<dyn Live>> {
            Some(Arc::new(Learns))
        }
    }

    fn stack(knows: &Arc<AtomicBool>) -> Stack {
        let mut builder = StackBuilder::new();
        let layer = |builder: &mut StackBuilder, ports: &[NodeId]| {
            let every = Box::new(Every { knows: knows.clone() });
            builder.layer("every", every, ports, &mut |_, _, _| Ok(())).unwrap()
        };
        let mut legs = Vec::new();
        for _ in 0..3 {
            let disks: Vec<_> =
                (0..3).map(|_| builder.backend("disk", Limits::ideal(8192)).unwrap().0).collect();
            legs.push(layer(&mut builder, &disks));
        }
        let root = layer(&mut builder, &legs);
        builder.finish(root)
    }

    #[test]
    fn a_trace_gives_the_pieces_of_a_route_in_the_same_order_misses_included() {
        for op in [Op::Read, Op::Write, Op::Discard, Op::Flush] {
            for (at, len) in [(0, 8192), (512, 4096), (5120, 1024), (1536, 6144)] {
                let io = if op == Op::Flush { Io::new(op, 0, 0) } else { Io::new(op, at, len) };
                let knows = Arc::new(AtomicBool::new(false));
                let stack = stack(&knows);
                let (mut route, mut trace) = (stack.route(io), Trace::new(stack.root(), io));
                for round in 0..1000 {
                    let (fast, slow) = (route.next(&stack), trace.next(&stack));
                    assert_eq!(fast, slow, "{io:?}");
                    assert_eq!(route.is_done(), trace.is_done());
                    match fast {
                        None => break,
                        Some(Err(Stop::Miss(..))) if round > 2 => {
                            knows.store(true, Ordering::Relaxed);
                        }
                        _ => {}
                    }
                }
                assert!(route.is_done());
            }
        }
    }

    #[test]
    fn the_steps_of_a_piece_name_each_layer_with_its_part_and_its_way() {
        let knows = Arc::new(AtomicBool::new(true));
        let stack = stack(&knows);
        let mut trace = Trace::new(stack.root(), Io::new(Op::Write, 512, 1024));
        let piece = trace.next(&stack).unwrap().unwrap();
        let steps: Vec<_> = trace.steps().copied().collect();
        assert_eq!((piece.at, piece.len), (512, 512));
        let ways: Vec<_> = steps.iter().map(|step| (step.io, step.port)).collect();
        let io = Io::new(Op::Write, 512, 512);
        assert_eq!(ways, [(io, Port(2)), (io, Port(2))]);
        assert_eq!(steps[1].node, stack.root());
    }
}
