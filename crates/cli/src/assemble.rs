//! Answers for turning a plan into a stack: opens the bottoms, builds the layers over them.

use std::sync::Arc;

use devsplice_backends::{Access, Opened};
use devsplice_core::{BackendId, Errno, Error, NodeId, Result, Stack, StackBuilder};
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
    let mut builder = StackBuilder::new();
    let mut bottoms: Vec<(String, Opened)> = Vec::new();
    let mut nodes: Vec<NodeId> = Vec::new();
    for place in &plan.places {
        let node = match place.kind {
            Kind::Source(source) => {
                let opened = devsplice_backends::open(source.name, &place.args, access)?;
                let (node, _) = builder.backend(&place.label, opened.limits)?;
                bottoms.push((place.label.clone(), opened));
                node
            }
            Kind::Layer(driver) => {
                let layer = (driver.make)(&place.args)?;
                let ports: Vec<_> = place.below.iter().map(|index| nodes[*index]).collect();
                let mut read = |id: BackendId, at: u64, into: &mut [u8]| {
                    let (_, bottom) = bottoms.get(usize::from(id.0)).ok_or(Errno::EINVAL)?;
                    bottom.read_at(at, into)
                };
                builder.layer(&place.label, layer, &ports, &mut read)?
            }
        };
        nodes.push(node);
    }
    let root = nodes.get(plan.root).copied();
    let root = root.ok_or_else(|| Error::invalid("stack", "is empty"))?;
    Ok(Assembled { stack: Arc::new(builder.finish(root)), bottoms })
}
