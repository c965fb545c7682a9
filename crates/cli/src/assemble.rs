//! Answers for turning a plan into a stack: opens the bottoms, builds the layers over them.

use std::sync::Arc;

use devsplice_backends::{Access, Opened};
use devsplice_core::{BackendId, Bottoms, Errno, Error, NodeId, Result, Stack, StackBuilder};
use devsplice_exports::threads::Bottom;
use devsplice_spec::{Catalog, Kind, Plan};

/// Everything that an expression may name.
pub const CATALOG: Catalog =
    Catalog { layers: devsplice_layers::DRIVERS, sources: devsplice_backends::SOURCES };

/// A stack with its bottoms open.
pub struct Assembled {
    /// Decides where data goes.
    pub stack: Arc<Stack>,
    /// The bottoms with the labels of their places, in the stack's order.
    pub bottoms: Vec<(String, Opened)>,
}

impl Assembled {
    /// What is not as one would wish, from all bottoms.
    pub fn warnings(&self) -> Vec<String> {
        self.bottoms.iter().flat_map(|(_, opened)| opened.warnings.iter().cloned()).collect()
    }

    /// The stack, and the bottoms as the I/O threads take them.
    pub fn into_parts(self) -> (Arc<Stack>, Vec<Bottom>) {
        let bottom =
            |(_, opened): (String, Opened)| Bottom::File { fd: opened.fd, kind: opened.kind };
        (self.stack, self.bottoms.into_iter().map(bottom).collect())
    }
}

/// Opens and builds, to serve the stack or only to look at it.
///
/// # Errors
/// What could not be opened, or which layer refuses what lies below it.
pub fn assemble(plan: &Plan, access: Access) -> Result<Assembled> {
    let Parts { builder, bottoms, nodes } = build(plan, access, plan.places.len())?;
    let root = single(&nodes, plan.root)?;
    Ok(Assembled { stack: Arc::new(builder.finish(root)), bottoms })
}

/// Writes fresh metadata for the layer at the top of a stack; what was made.
///
/// # Errors
/// If that layer keeps none, or what is below it cannot be opened or written.
pub fn format(plan: &Plan, force: bool) -> Result<String> {
    let place = plan.places.get(plan.root).ok_or_else(|| Error::invalid("stack", "is empty"))?;
    let format = match place.kind {
        Kind::Layer(driver) => devsplice_layers::format_of(driver.name),
        Kind::Source(_) => None,
    };
    let Some(format) = format else {
        return Err(Error::invalid(&place.label, "keeps no metadata: there is nothing to format"));
    };
    // Places come before those above them.
    let Parts { builder, bottoms, nodes } = build(plan, Access::Serve, plan.root)?;
    let ports: Vec<_> = place.below.iter().flat_map(|index| nodes[*index].clone()).collect();
    let mut bottoms = Open(bottoms);
    builder.format(&place.label, &ports, &mut bottoms, |below| format(&place.args, below, force))
}

/// Bottoms that metadata is written to.
struct Open(Vec<(String, Opened)>);

impl Bottoms for Open {
    fn read(&mut self, id: BackendId, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let (_, bottom) = self.0.get(usize::from(id.0)).ok_or(Errno::EINVAL)?;
        bottom.read_at(at, into)
    }

    fn write(&mut self, id: BackendId, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let (_, bottom) = self.0.get(usize::from(id.0)).ok_or(Errno::EINVAL)?;
        bottom.write_at(at, bytes)
    }
}

/// A stack on its way.
struct Parts {
    builder: StackBuilder,
    bottoms: Vec<(String, Opened)>,
    /// Of each place: one, or several where a source stands for several files.
    nodes: Vec<Vec<NodeId>>,
}

/// Opens and builds the first `count` places of a plan.
fn build(plan: &Plan, access: Access, count: usize) -> Result<Parts> {
    let mut builder = StackBuilder::new();
    let mut bottoms: Vec<(String, Opened)> = Vec::new();
    let mut nodes: Vec<Vec<NodeId>> = Vec::new();
    for place in &plan.places[..count] {
        let node = match place.kind {
            Kind::Source(source) => {
                let mut all = Vec::new();
                for one in devsplice_backends::open_all(source.name, &place.args, access)? {
                    let (opened, filled) = one;
                    let (node, _) = match filled {
                        None => builder.backend(&place.label, opened.limits)?,
                        Some(filled) => builder.growing(&place.label, opened.limits, filled)?,
                    };
                    bottoms.push((place.label.clone(), opened));
                    all.push(node);
                }
                all
            }
            Kind::Layer(driver) => {
                let layer = (driver.make)(&place.args)?;
                let ports: Vec<_> =
                    place.below.iter().flat_map(|index| nodes[*index].clone()).collect();
                let mut read = |id: BackendId, at: u64, into: &mut [u8]| {
                    let (_, bottom) = bottoms.get(usize::from(id.0)).ok_or(Errno::EINVAL)?;
                    bottom.read_at(at, into)
                };
                vec![builder.layer(&place.label, layer, &ports, &mut read)?]
            }
        };
        nodes.push(node);
    }
    Ok(Parts { builder, bottoms, nodes })
}

/// The top of a stack.
fn single(nodes: &[Vec<NodeId>], root: usize) -> Result<NodeId> {
    match nodes.get(root).map(Vec::as_slice) {
        Some([root]) => Ok(*root),
        Some([_, ..]) => Err(Error::invalid("stack", "is several files, no device")
            .next("put a layer over them: zoned(zones:DIR)")),
        _ => Err(Error::invalid("stack", "is empty")),
    }
}
