//! Answers for a stack: which layer lies over which, immutable once built.
//!
//! Composition is data. Layers never hold each other; the router walks the stack for them.

use std::sync::Arc;

use crate::check;
use crate::errno::Errno;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Extent, Io, Op};
use crate::layer::{Layer, Lower};
use crate::limits::Limits;
use crate::live::Live;
use crate::map::{Map, Port};
use crate::probe::{MAX_PROBES, Probe, Wait};
use crate::route::{Bend, Piece, Place, Route};
use crate::zones::Zones;

/// Most layers above one another. Bounds what a request keeps while it is routed.
pub const MAX_DEPTH: usize = 12;
/// Most lower devices of one layer.
pub const MAX_PORTS: usize = 4000;
/// Most places in a stack.
pub const MAX_NODES: usize = 4096;

/// A place in a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeId(pub(crate) u16);

impl NodeId {
    #[inline]
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }

    /// Its number in its stack, below [`MAX_NODES`].
    #[must_use]
    pub fn number(self) -> u16 {
        self.0
    }
}

/// A bottom of a stack, counted from 0 in the order they were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendId(pub u16);

pub(crate) enum What {
    Layer { layer: Box<dyn Layer>, ports: Box<[NodeId]> },
    Backend(BackendId),
}

/// As large as a power of two, and not larger than that: each layer on the way of each request is
/// found by its number.
#[repr(align(128))]
pub(crate) struct Node {
    pub(crate) name: Box<str>,
    pub(crate) limits: Limits,
    /// The bits that no position and no length may have: the block minus one.
    pub(crate) mask: u64,
    pub(crate) what: What,
    // In a box of its own, for the size.
    #[allow(clippy::redundant_allocation)]
    live: Option<Box<Arc<dyn Live>>>,
    pub(crate) id: NodeId,
    /// The bit of its probe, if it has one.
    pub(crate) probe: u8,
    /// Layers from here to the deepest bottom.
    depth: u8,
    used: bool,
}

const _: () = assert!(size_of::<Node>() == 128);

impl Node {
    /// The places below.
    pub(crate) fn ports(&self) -> &[NodeId] {
        match &self.what {
            What::Layer { ports, .. } => ports,
            What::Backend(_) => &[],
        }
    }

    /// Whether it has a live side.
    pub(crate) fn is_live(&self) -> bool {
        self.live.is_some()
    }
}

/// A finished stack.
pub struct Stack {
    pub(crate) nodes: Box<[Node]>,
    root: NodeId,
    /// The bits that no position and no length of an ordinary read or write may have; every bit,
    /// if the device is read-only.
    mask: u64,
    backend_count: u16,
    probes: Box<[Arc<Probe>]>,
    zones: Option<Arc<dyn Zones>>,
    /// By place, the layer over it.
    above: Box<[Option<NodeId>]>,
}

impl Stack {
    /// Tells probes, by their bits, of something that is done.
    pub fn record(&self, probes: u8, op: Op, len: u64, ns: u64) {
        for (bit, probe) in self.probes.iter().enumerate() {
            if probes >> bit & 1 == 1 {
                probe.record(op, len, ns);
            }
        }
    }

    /// What the whole stack offers.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.node(self.root).limits
    }

    /// The zones of the device, if it has any. Whoever serves it has to know them.
    #[must_use]
    pub fn zones(&self) -> Option<&Arc<dyn Zones>> {
        self.zones.as_ref()
    }

    /// How many bottoms there are.
    #[must_use]
    pub fn backend_count(&self) -> u16 {
        self.backend_count
    }

    /// Where a client's requests enter.
    #[must_use]
    pub fn root(&self) -> NodeId {
        self.root
    }

    /// Starts the routing of a request that lies within [`Stack::limits`].
    #[must_use]
    #[inline]
    pub fn route(&self, io: Io) -> Route {
        Route::new(io, self.root)
    }

    /// The piece of a request that is of one and goes straight down, as nearly all do; otherwise
    /// what [`Route::follow`] goes on from. `io` lies within [`Stack::limits`] and is no flush.
    ///
    /// # Errors
    /// Where it does not go straight on.
    ///
    /// # Panics
    /// If a layer breaks its contract; see [`check`].
    #[inline(always)]
    pub fn straight(&self, io: Io) -> Result<Piece, Bend<'_>> {
        let Io { op, fua, extent: Extent { mut at, len } } = io;
        assert!(!matches!(op, Op::Flush), "a flush has no extent");
        let mut node = self.node(self.root);
        loop {
            let (layer, ports) = match &node.what {
                What::Backend(id) => {
                    let place = Place::Backend(*id);
                    return Ok(Piece { place, at, part: 0, len, wait: Wait::NONE });
                }
                What::Layer { layer, ports } => (layer, ports),
            };
            match layer.map(Io { op, extent: Extent { at, len }, fua }) {
                Ok(Map::To { len: all, port, at: to }) if all == len => {
                    at = to;
                    node = lower(&self.nodes, node, ports, (port, Extent { at, len })).1;
                }
                answer => {
                    let io = Io { op, extent: Extent { at, len }, fua };
                    return Err(Bend { node, io, answer });
                }
            }
        }
    }

    /// Whether a client's request may enter: inside the device, on its blocks, allowed at all.
    ///
    /// # Errors
    /// `EINVAL` for a bad range, `EROFS` for a change of a read-only device, `EOPNOTSUPP` for an
    /// operation that the device does not offer.
    #[inline]
    pub fn admit(&self, io: &Io) -> Result<(), Errno> {
        if self.is_ordinary(io) { Ok(()) } else { self.admit_other(io) }
    }

    /// Whether this is a read or write like most: one that [`Stack::admit`] lets in, of a device
    /// that can be written.
    #[inline(always)]
    #[must_use]
    pub fn is_ordinary(&self, io: &Io) -> bool {
        let Extent { at, len } = io.extent;
        let size = self.node(self.root).limits.size;
        // One less than no bytes is more than any size has room for.
        let has_room = |room: u64| len.wrapping_sub(1) < room;
        io.op.has_pages()
            && (at | len) & self.mask == 0
            && size.checked_sub(at).is_some_and(has_room)
    }

    /// As `admit`, for what is not ordinary.
    #[inline(never)]
    fn admit_other(&self, io: &Io) -> Result<(), Errno> {
        let Node { limits, mask, .. } = self.node(self.root);
        let Extent { at, len } = io.extent;
        let fits = len != 0 && (at | len) & mask == 0 && io.extent.within(limits.size);
        match io.op {
            Op::Flush => Ok(()),
            _ if !fits => Err(Errno::EINVAL),
            _ if limits.read_only && io.op.changes() => Err(Errno::EROFS),
            Op::Discard if limits.discard == 0 => Err(Errno::EOPNOTSUPP),
            Op::WriteZeroes { .. } if !limits.write_zeroes => Err(Errno::EOPNOTSUPP),
            Op::Reset | Op::Finish if self.zones.is_none() => Err(Errno::EOPNOTSUPP),
            _ => Ok(()),
        }
    }

    /// As [`Stack::admit`], for what a layer asks of a place below it: in range and on its blocks.
    ///
    /// # Errors
    /// `EINVAL` if it is not.
    pub fn admit_at(&self, node: NodeId, io: &Io) -> Result<(), Errno> {
        let Node { limits, mask, .. } = self.node(node);
        let Extent { at, len } = io.extent;
        let fits = len != 0 && (at | len) & mask == 0 && io.extent.within(limits.size);
        if io.op == Op::Flush || fits { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// What a place offers.
    #[must_use]
    pub fn limits_of(&self, node: NodeId) -> &Limits {
        &self.node(node).limits
    }

    /// What a place is called: its driver or source.
    #[must_use]
    pub fn name_of(&self, node: NodeId) -> &str {
        &self.node(node).name
    }

    /// The place below a layer's port, if it has it.
    #[must_use]
    pub fn below(&self, node: NodeId, port: Port) -> Option<NodeId> {
        self.node(node).ports().get(usize::from(port.0)).copied()
    }

    /// The live side of a layer, if it has one.
    #[must_use]
    pub fn live(&self, node: NodeId) -> Option<&Arc<dyn Live>> {
        self.node(node).live.as_deref()
    }

    /// The layers with a live side, from the bottom up.
    pub fn lives(&self) -> impl Iterator<Item = (NodeId, &str, &Arc<dyn Live>)> {
        (0..).zip(&self.nodes).filter_map(|(index, node)| {
            node.live.as_deref().map(|live| (NodeId(index), &*node.name, live))
        })
    }

    /// The layers over a place, from the bottom up.
    fn over(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        let up = |node: &NodeId| self.above.get(node.index()).copied().flatten();
        std::iter::successors(up(&node), up)
    }

    /// Whether the layer `upper` lies over the place with this number, directly or not.
    #[must_use]
    pub fn is_over(&self, upper: NodeId, number: u16) -> bool {
        self.over(NodeId(number)).any(|node| node == upper)
    }

    /// How many layers with a live side lie over a place.
    #[must_use]
    pub fn live_level(&self, node: NodeId) -> usize {
        self.over(node).filter(|node| self.node(*node).is_live()).count()
    }

    /// How many layers with a live side lie above one another at most, from 0 to [`MAX_DEPTH`].
    #[must_use]
    pub fn live_levels(&self) -> usize {
        self.lives().map(|(node, ..)| self.live_level(node) + 1).max().unwrap_or(0)
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
    probes: Vec<Arc<Probe>>,
    /// Of bottoms that grow: how far they have.
    filled: Vec<(NodeId, u64)>,
    /// The places that have zones.
    zoned: Vec<(NodeId, Arc<dyn Zones>)>,
}

/// Reads metadata from a bottom while a stack is built: backend, position, where to.
pub type Reader<'a> = dyn FnMut(BackendId, u64, &mut [u8]) -> Result<(), Errno> + 'a;

/// The bottoms of a stack, while metadata is written to them.
pub trait Bottoms {
    /// Reads from one, blocking.
    ///
    /// # Errors
    /// As it reports them.
    fn read(&mut self, id: BackendId, at: u64, into: &mut [u8]) -> Result<(), Errno>;

    /// Writes to one, durably, blocking.
    ///
    /// # Errors
    /// As it reports them.
    fn write(&mut self, id: BackendId, at: u64, bytes: &[u8]) -> Result<(), Errno>;
}

/// Bottoms that are only read.
struct ReadOnly<'a, 'r>(&'a mut Reader<'r>);

impl Bottoms for ReadOnly<'_, '_> {
    fn read(&mut self, id: BackendId, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        (self.0)(id, at, into)
    }

    fn write(&mut self, _: BackendId, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EROFS)
    }
}

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

    /// Adds a bottom that grows as it is written, up to the size in its limits: it has `filled`
    /// bytes by now.
    ///
    /// # Errors
    /// As for another.
    pub fn growing(
        &mut self,
        name: &str,
        limits: Limits,
        filled: u64,
    ) -> Result<(NodeId, BackendId)> {
        let (node, id) = self.backend(name, limits)?;
        self.filled.push((node, filled));
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
        let mut depth = 1_u8;
        for port in ports {
            if self.zoned.iter().any(|(zoned, _)| zoned == port) {
                let reason = "lies over a device with zones, which it knows nothing of";
                return Err(Error::new(ErrorKind::Unsupported, name, reason));
            }
            let node = &mut self.nodes[port.index()];
            if std::mem::replace(&mut node.used, true) {
                let reason = format!("{} already lies under another layer", node.name);
                return Err(Error::new(ErrorKind::Busy, name, reason));
            }
            depth = depth.max(node.depth + 1);
        }
        if usize::from(depth) > MAX_DEPTH {
            let reason = format!("more than {MAX_DEPTH} layers above one another");
            return Err(Error::invalid(name, reason));
        }
        let limits = {
            let mut bottoms = ReadOnly(reader);
            let mut below = self.over(ports, &mut bottoms);
            layer.open(&mut below).and_then(Limits::checked).map_err(|error| error.within(name))?
        };
        let (live, probe, zones) = (layer.live(), layer.probe(), layer.zones());
        if probe.is_some() && self.probes.len() == MAX_PROBES {
            let reason = format!("more than {MAX_PROBES} layers that count latencies");
            return Err(Error::invalid(name, reason));
        }
        let node = self.push(name, limits, What::Layer { layer, ports: ports.into() }, depth)?;
        self.nodes[node.index()].live = live.map(Box::new);
        if let Some(zones) = zones {
            self.zoned.push((node, zones));
        }
        if let Some(probe) = probe {
            self.nodes[node.index()].probe = 1 << self.probes.len();
            self.probes.push(probe);
        }
        Ok(node)
    }

    fn over<'a>(&'a self, ports: &'a [NodeId], bottoms: &'a mut dyn Bottoms) -> Below<'a> {
        let limits = ports.iter().map(|port| self.nodes[port.index()].limits).collect();
        Below { nodes: &self.nodes, ports, limits, filled: &self.filled, bottoms }
    }

    /// Writes fresh metadata for a layer over these places.
    ///
    /// # Errors
    /// What `format` reports.
    pub fn format(
        &self,
        name: &str,
        ports: &[NodeId],
        bottoms: &mut dyn Bottoms,
        format: impl FnOnce(&mut dyn Lower) -> Result<String>,
    ) -> Result<String> {
        format(&mut self.over(ports, bottoms)).map_err(|error| error.within(name))
    }

    fn push(&mut self, name: &str, limits: Limits, what: What, depth: u8) -> Result<NodeId> {
        if self.nodes.len() == MAX_NODES {
            return Err(Error::invalid(name, format!("more than {MAX_NODES} places in a stack")));
        }
        let id = NodeId(u16::try_from(self.nodes.len()).unwrap_or(u16::MAX));
        let mask = u64::from(limits.block) - 1;
        self.nodes.push(Node {
            name: name.into(),
            limits,
            mask,
            what,
            live: None,
            id,
            probe: 0,
            depth,
            used: false,
        });
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
        let Node { limits, mask, .. } = &self.nodes[root.index()];
        // Nothing is ordinary on a read-only device: no length is without every bit.
        let mask = if limits.read_only { u64::MAX } else { *mask };
        let (nodes, probes): (Box<[Node]>, _) = (self.nodes.into(), self.probes.into());
        let mut zoned = self.zoned.into_iter();
        let zones = zoned.find(|(node, _)| *node == root).map(|(_, zones)| zones);
        let above = above(&nodes);
        Stack { nodes, root, mask, backend_count: self.backend_count, probes, zones, above }
    }
}

/// By place, the layer over it.
fn above(nodes: &[Node]) -> Box<[Option<NodeId>]> {
    let mut above = vec![None; nodes.len()];
    for node in nodes {
        node.ports().iter().for_each(|port| above[port.index()] = Some(node.id));
    }
    above.into()
}

struct Below<'a> {
    nodes: &'a [Node],
    ports: &'a [NodeId],
    limits: Vec<Limits>,
    filled: &'a [(NodeId, u64)],
    bottoms: &'a mut dyn Bottoms,
}

impl Below<'_> {
    /// Where a request to a port goes, or `EINVAL` if it does not fit there.
    fn route(&self, port: Port, op: Op, at: u64, len: usize) -> Result<Route, Errno> {
        let node = *self.ports.get(usize::from(port.0)).ok_or(Errno::EINVAL)?;
        let limits = &self.limits[usize::from(port.0)];
        let extent = Extent { at, len: len as u64 };
        let block = u64::from(limits.block) - 1;
        if extent.len == 0 || !extent.within(limits.size) || (at | extent.len) & block != 0 {
            return Err(Errno::EINVAL);
        }
        Ok(Route::new(Io { op, extent, fua: false }, node))
    }
}

/// The bytes of a request that a piece is about.
fn bytes_of(piece: &Piece) -> Result<std::ops::Range<usize>, Errno> {
    let part = usize::try_from(piece.part).map_err(|_| Errno::EINVAL)?;
    let len = usize::try_from(piece.len).map_err(|_| Errno::EINVAL)?;
    Ok(part..part + len)
}

impl Lower for Below<'_> {
    fn limits(&self) -> &[Limits] {
        &self.limits
    }

    fn filled(&self, port: Port) -> Option<u64> {
        let node = self.ports.get(usize::from(port.0))?;
        self.filled.iter().find(|(other, _)| other == node).map(|(_, filled)| *filled)
    }

    fn read(&mut self, port: Port, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let mut route = self.route(port, Op::Read, at, into.len())?;
        while let Some(piece) = route.next_in(self.nodes) {
            // Nothing serves the stack yet, so nobody could resolve a miss.
            let piece = piece?;
            let bytes = &mut into[bytes_of(&piece)?];
            match piece.place {
                Place::Backend(id) => self.bottoms.read(id, piece.at, bytes)?,
                Place::Zero => bytes.fill(0),
            }
        }
        Ok(())
    }

    fn write(&mut self, port: Port, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let mut route = self.route(port, Op::Write, at, bytes.len())?;
        while let Some(piece) = route.next_in(self.nodes) {
            let piece = piece?;
            if let Place::Backend(id) = piece.place {
                self.bottoms.write(id, piece.at, &bytes[bytes_of(&piece)?])?;
            }
        }
        Ok(())
    }
}

/// Checks one answer and the place it names; returns the lower place.
#[inline(always)]
pub(crate) fn lower<'n>(
    nodes: &'n [Node],
    node: &Node,
    ports: &[NodeId],
    to: (Port, Extent),
) -> (NodeId, &'n Node) {
    let (port, extent) = to;
    let Some(&child) = ports.get(usize::from(port.0)) else { no_port(node, port) };
    let below = &nodes[child.index()];
    if !check::lies_in(extent, below.limits.size, below.mask) {
        no_destination(node, extent, below);
    }
    (child, below)
}

// They take the places as they are, so that nothing is read for them where nothing is wrong.

#[cold]
#[inline(never)]
fn no_port(node: &Node, port: Port) -> ! {
    check::no_port(&node.name, port)
}

#[cold]
#[inline(never)]
fn no_destination(node: &Node, extent: Extent, below: &Node) -> ! {
    check::no_destination(&node.name, extent, &below.limits)
}
