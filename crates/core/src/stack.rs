//! Answers for a stack: which layer lies over which, immutable once built.
//!
//! Composition is data. Layers never hold each other; the router walks the stack for them.

use crate::check;
use crate::errno::Errno;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Extent, Io, Op};
use crate::layer::{Layer, Lower};
use crate::limits::Limits;
use crate::map::Port;
use crate::route::{Place, Route};

/// Most layers above one another. Bounds what a request keeps while it is routed.
pub const MAX_DEPTH: usize = 12;
/// Most lower devices of one layer.
pub const MAX_PORTS: usize = 255;
/// Most places in a stack.
pub const MAX_NODES: usize = 4096;

/// A place in a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    #[inline]
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A bottom of a stack, counted from 0 in the order they were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendId(pub u16);

pub(crate) enum What {
    Layer { layer: Box<dyn Layer>, ports: Box<[NodeId]> },
    Backend(BackendId),
}

pub(crate) struct Node {
    pub(crate) name: Box<str>,
    pub(crate) limits: Limits,
    /// The bits that no position and no length may have: the block minus one.
    pub(crate) mask: u64,
    pub(crate) what: What,
    /// Layers from here to the deepest bottom.
    depth: usize,
    used: bool,
}

/// A finished stack.
pub struct Stack {
    pub(crate) nodes: Box<[Node]>,
    root: NodeId,
    backend_count: u16,
}

impl Stack {
    /// What the whole stack offers.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.node(self.root).limits
    }

    /// How many bottoms there are.
    #[must_use]
    pub fn backend_count(&self) -> u16 {
        self.backend_count
    }

    pub(crate) fn root(&self) -> NodeId {
        self.root
    }

    /// Starts the routing of a request that lies within [`Stack::limits`].
    #[must_use]
    #[inline]
    pub fn route(&self, io: Io) -> Route {
        Route::new(io, self.root)
    }

    /// Whether a client's request may enter: inside the device, on its blocks, allowed at all.
    ///
    /// # Errors
    /// `EINVAL` for a bad range, `EROFS` for a change of a read-only device, `EOPNOTSUPP` for an
    /// operation that the device does not offer.
    #[inline]
    pub fn admit(&self, io: &Io) -> Result<(), Errno> {
        let Node { limits, mask, .. } = self.node(self.root);
        let fits = io.extent.len != 0
            && (io.extent.at | io.extent.len) & mask == 0
            && io.extent.within(limits.size);
        if fits && io.op.has_pages() && !limits.read_only {
            return Ok(());
        }
        self.admit_other(io, fits)
    }

    /// As `admit`, for what is not an ordinary read or write that fits.
    #[inline(never)]
    fn admit_other(&self, io: &Io, fits: bool) -> Result<(), Errno> {
        let limits = self.limits();
        match io.op {
            Op::Flush => Ok(()),
            _ if !fits => Err(Errno::EINVAL),
            _ if limits.read_only && io.op.changes() => Err(Errno::EROFS),
            Op::Discard if limits.discard == 0 => Err(Errno::EOPNOTSUPP),
            Op::WriteZeroes { .. } if !limits.write_zeroes => Err(Errno::EOPNOTSUPP),
            _ => Ok(()),
        }
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }
}

/// Builds a stack from the bottom up.
#[derive(Default)]
pub struct StackBuilder {
    nodes: Vec<Node>,
    backend_count: u16,
}

/// Reads metadata from a bottom while a stack is built: backend, position, where to.
pub type Reader<'a> = dyn FnMut(BackendId, u64, &mut [u8]) -> Result<(), Errno> + 'a;

impl StackBuilder {
    /// An empty one.
    #[must_use]
    pub fn new() -> StackBuilder {
        StackBuilder::default()
    }

    /// Adds a bottom.
    ///
    /// # Errors
    /// If its limits break the rules, or the stack is full.
    pub fn backend(&mut self, name: &str, limits: Limits) -> Result<(NodeId, BackendId)> {
        let limits = limits.checked().map_err(|error| error.within(name))?;
        let id = BackendId(self.backend_count);
        self.backend_count += 1;
        let node = self.push(name, limits, What::Backend(id), 0)?;
        Ok((node, id))
    }

    /// Adds a layer over places that were added before and lie under nothing yet.
    ///
    /// # Errors
    /// If the layer refuses what lies below, a place is used twice, or the stack is too deep.
    pub fn layer(
        &mut self,
        name: &str,
        mut layer: Box<dyn Layer>,
        ports: &[NodeId],
        reader: &mut Reader<'_>,
    ) -> Result<NodeId> {
        if ports.len() > MAX_PORTS {
            let reason = format!("{} lower devices, the most is {MAX_PORTS}", ports.len());
            return Err(Error::invalid(name, reason));
        }
        let mut depth = 1;
        for port in ports {
            let node = &mut self.nodes[port.index()];
            if std::mem::replace(&mut node.used, true) {
                let reason = format!("{} already lies under another layer", node.name);
                return Err(Error::new(ErrorKind::Busy, name, reason));
            }
            depth = depth.max(node.depth + 1);
        }
        if depth > MAX_DEPTH {
            let reason = format!("more than {MAX_DEPTH} layers above one another");
            return Err(Error::invalid(name, reason));
        }
        let limits = {
            let limits: Vec<_> = ports.iter().map(|port| self.nodes[port.index()].limits).collect();
            let mut below = Below { nodes: &self.nodes, ports, limits, reader };
            layer.open(&mut below).and_then(Limits::checked).map_err(|error| error.within(name))?
        };
        self.push(name, limits, What::Layer { layer, ports: ports.into() }, depth)
    }

    fn push(&mut self, name: &str, limits: Limits, what: What, depth: usize) -> Result<NodeId> {
        if self.nodes.len() == MAX_NODES {
            return Err(Error::invalid(name, format!("more than {MAX_NODES} places in a stack")));
        }
        let id = NodeId(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX));
        let mask = u64::from(limits.block) - 1;
        self.nodes.push(Node { name: name.into(), limits, mask, what, depth, used: false });
        Ok(id)
    }

    /// What a place offers.
    #[must_use]
    pub fn limits(&self, node: NodeId) -> &Limits {
        &self.nodes[node.index()].limits
    }

    /// The stack whose top is `root`.
    #[must_use]
    pub fn finish(self, root: NodeId) -> Stack {
        Stack { nodes: self.nodes.into(), root, backend_count: self.backend_count }
    }
}

struct Below<'a, 'r> {
    nodes: &'a [Node],
    ports: &'a [NodeId],
    limits: Vec<Limits>,
    reader: &'a mut Reader<'r>,
}

impl Lower for Below<'_, '_> {
    fn limits(&self) -> &[Limits] {
        &self.limits
    }

    fn read(&mut self, port: Port, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let node = *self.ports.get(usize::from(port.0)).ok_or(Errno::EINVAL)?;
        let limits = &self.limits[usize::from(port.0)];
        let extent = Extent { at, len: into.len() as u64 };
        let block = u64::from(limits.block) - 1;
        if extent.len == 0 || !extent.within(limits.size) || (at | extent.len) & block != 0 {
            return Err(Errno::EINVAL);
        }
        let mut route = Route::new(Io { op: Op::Read, extent, fua: false }, node);
        while let Some(piece) = route.next_in(self.nodes) {
            let piece = piece?;
            let part = usize::try_from(piece.part).map_err(|_| Errno::EINVAL)?;
            let len = usize::try_from(piece.len).map_err(|_| Errno::EINVAL)?;
            let bytes = &mut into[part..part + len];
            match piece.place {
                Place::Backend(id) => (self.reader)(id, piece.at, bytes)?,
                Place::Zero => bytes.fill(0),
            }
        }
        Ok(())
    }
}

/// Checks one answer and the place it names; returns the lower place.
#[inline]
pub(crate) fn lower<'n>(
    nodes: &'n [Node],
    node: &Node,
    ports: &[NodeId],
    to: (Port, Extent),
) -> (NodeId, &'n Node) {
    let (port, extent) = to;
    let Some(&child) = ports.get(usize::from(port.0)) else { check::no_port(&node.name, port) };
    let below = &nodes[child.index()];
    check::destination(&node.name, extent, &below.limits, below.mask);
    (child, below)
}
