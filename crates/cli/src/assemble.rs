//! Answers for turning a plan into a stack: opens the bottoms, builds the layers over them.

use std::sync::Arc;

use devsplice_backends::{Access, Body, Opened};
use devsplice_core::probe::MAX_PROBES;
use devsplice_core::stack::MAX_DEPTH;
use devsplice_core::{Args, BackendId, Bottoms, Errno, Error, NodeId, Result, Stack, StackBuilder};
use devsplice_exports::threads::Bottom;
use devsplice_layers::stats::DRIVER as STATS;
use devsplice_spec::{Catalog, Kind, Place, Plan};

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
        let bottom = |(_, opened): (String, Opened)| match opened.body {
            Body::File { fd, kind, .. } => Bottom::File { fd, kind },
            Body::Server(server) => Bottom::Remote(server),
        };
        (self.stack, self.bottoms.into_iter().map(bottom).collect())
    }
}

/// Opens and builds, to serve the stack or only to look at it.
///
/// # Errors
/// What could not be opened, or which layer refuses what lies below it.
pub fn assemble(plan: &Plan, access: Access) -> Result<Assembled> {
    assemble_with(plan, access, false)
}

/// The same; with `latency`, what goes down from each place is measured.
///
/// # Errors
/// As [`assemble`].
pub fn assemble_with(plan: &Plan, access: Access, latency: bool) -> Result<Assembled> {
    let measured = if latency { measured(plan) } else { Vec::new() };
    let Parts { builder, bottoms, nodes } = build(plan, access, plan.places.len(), &measured)?;
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
    let Parts { builder, bottoms, nodes } = build(plan, Access::Serve, plan.root, &[])?;
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

/// The places of a plan that are measured with `--latency`: all; or, where a stack has no room for
/// so many probes or would become too high, the top and the bottoms.
fn measured(plan: &Plan) -> Vec<usize> {
    // Places come before those above them.
    let mut heights: Vec<usize> = Vec::new();
    for place in &plan.places {
        heights.push(1 + place.below.iter().map(|below| heights[*below]).max().unwrap_or(0));
    }
    let height = heights.iter().max().copied().unwrap_or(0);
    let has_probe =
        |place: &&Place| matches!(place.kind, Kind::Layer(one) if one.name == STATS.name);
    let room = MAX_PROBES.saturating_sub(plan.places.iter().filter(has_probe).count());
    let all = 0..plan.places.len();
    if all.len() <= room && 2 * height <= MAX_DEPTH {
        return all.collect();
    }
    let is_bottom = |index: &usize| plan.places[*index].below.is_empty() && *index != plan.root;
    [plan.root].into_iter().chain(all.filter(is_bottom)).take(room).collect()
}

/// Opens and builds the first `count` places of a plan, with a `stats` over those `measured`.
fn build(plan: &Plan, access: Access, count: usize, measured: &[usize]) -> Result<Parts> {
    let mut builder = StackBuilder::new();
    let mut bottoms: Vec<(String, Opened)> = Vec::new();
    let mut nodes: Vec<Vec<NodeId>> = Vec::new();
    for (index, place) in plan.places[..count].iter().enumerate() {
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
        nodes.push(match node.as_slice() {
            // Several files are no device: what is over them is measured.
            [one] if measured.contains(&index) => {
                vec![measure(&mut builder, &place.label, *one)?]
            }
            _ => node,
        });
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

/// Puts a `stats` over a node, called after it.
fn measure(builder: &mut StackBuilder, label: &str, node: NodeId) -> Result<NodeId> {
    let none = Args::new(STATS.name, STATS.keys, &[])?;
    let layer = (STATS.make)(&none)?;
    // It reads nothing.
    let mut read = |_: BackendId, _: u64, _: &mut [u8]| Err(Errno::EINVAL);
    builder.layer(&format!("below {label}"), layer, &[node], &mut read)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is measured of a stack, as labels, and that such a stack can be built.
    fn labels(text: &str) -> Vec<String> {
        let plan = Plan::parse(text, &CATALOG).unwrap();
        let built = assemble_with(&plan, Access::Look, true).unwrap();
        let lives = built.stack.lives().map(|(_, name, _)| name.to_owned());
        let mut shown: Vec<_> = lives.filter(|name| name.starts_with("below ")).collect();
        let mut want: Vec<_> =
            measured(&plan).iter().map(|at| format!("below {}", plan.places[*at].label)).collect();
        shown.sort();
        want.sort();
        assert_eq!(shown, want);
        want
    }

    #[test]
    fn every_place_is_measured_where_there_is_room() {
        assert_eq!(labels("null(size=1M)"), ["below null"]);
        let want = ["below linear", "below null", "below null#2", "below stripe"];
        assert_eq!(labels("linear(stripe(null(size=1M), null(size=1M)))"), want);
        assert_eq!(labels("stats(null(size=1M))"), ["below null", "below stats"]);
    }

    #[test]
    fn of_a_stack_that_is_too_large_the_ends_are_measured() {
        let wide = format!("concat({})", ["null(size=1M)"; 9].join(", "));
        let of_wide = labels(&wide);
        assert_eq!((of_wide.len(), of_wide[0].as_str()), (8, "below concat"));
        let high = format!("{}null(size=1M){}", "linear(".repeat(9), ")".repeat(9));
        let of_high = labels(&high);
        assert_eq!(of_high.len(), 2, "{of_high:?}");
        let full = format!("{}null(size=1M){}", "stats(".repeat(8), ")".repeat(8));
        assert!(labels(&full).is_empty());
    }

    #[test]
    fn nothing_is_measured_unasked() {
        let plan = Plan::parse("linear(null(size=1M))", &CATALOG).unwrap();
        assert_eq!(assemble(&plan, Access::Look).unwrap().stack.lives().count(), 0);
    }
}
