//! Answers for where the bytes of a device lie, for somebody who asks without reading them: who
//! looks for holes, or draws a map of a disk.

use crate::check;
use crate::io::Extent;
use crate::map::Map;
use crate::probe::Wait;
use crate::route::{Piece, Place};
use crate::stack::{Stack, What, lower};

impl Stack {
    /// Where the first bytes of an extent within [`Stack::limits`] lie: what a read of it would
    /// come to first. `None` where only reading tells: a layer would have to resolve something,
    /// asks several devices, or refuses. No request is counted, delayed or paid for.
    ///
    /// # Panics
    /// If a layer breaks its contract; see [`check`].
    #[must_use]
    pub fn locate(&self, extent: Extent) -> Option<Piece> {
        let Extent { mut at, mut len } = extent;
        let mut node = &self.nodes[self.root().index()];
        loop {
            let piece = |place, len| Piece { place, at, part: 0, len, wait: Wait::NONE };
            let (layer, ports) = match &node.what {
                What::Backend(id) => return Some(piece(Place::Backend(*id), len)),
                What::Layer { layer, ports } => (layer, ports),
            };
            let answer = layer.locate(Extent { at, len }).ok()?;
            let (port, to) = match answer {
                Map::To { port, at, .. }
                | Map::After { port, at, .. }
                | Map::Watched { port, at, .. } => (port, at),
                Map::Zero { len: zeros } => {
                    check::prefix(&node.name, len, zeros);
                    return Some(piece(Place::Zero, zeros));
                }
                Map::All { .. } | Map::Some { .. } | Map::Both { .. } | Map::Miss => return None,
            };
            check::prefix(&node.name, len, answer.len());
            (at, len) = (to, answer.len());
            node = lower(&self.nodes, node, ports, (port, Extent { at, len })).1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errno::Errno;
    use crate::error::Result;
    use crate::io::Io;
    use crate::layer::{Layer, Lower};
    use crate::limits::Limits;
    use crate::map::Port;
    use crate::stack::{BackendId, StackBuilder};

    /// Answers requests one way, and questions another.
    struct Sly(Result<Map, Errno>);

    impl Layer for Sly {
        fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
            Ok(below.limits()[0])
        }
        fn map(&self, _: Io) -> Result<Map, Errno> {
            Err(Errno::EIO)
        }
        fn locate(&self, _: Extent) -> Result<Map, Errno> {
            self.0
        }
    }

    /// The same for both.
    struct Shift;

    impl Layer for Shift {
        fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
            below.limits()[0].window(512, None)
        }
        fn map(&self, io: Io) -> Result<Map, Errno> {
            let len = io.extent.len.min(4096);
            Ok(Map::To { len, port: Port(0), at: io.extent.at + 512 })
        }
    }

    fn ask(layers: Vec<Box<dyn Layer>>) -> Option<(Place, u64, u64)> {
        let mut builder = StackBuilder::new();
        let (mut top, _) = builder.backend("disk", Limits::ideal(1 << 20)).unwrap();
        for layer in layers {
            top = builder.layer("layer", layer, &[top], &mut |_, _, _| Ok(())).unwrap();
        }
        let piece = builder.finish(top).locate(Extent { at: 1024, len: 8192 })?;
        assert!(piece.part == 0 && piece.wait.is_none());
        Some((piece.place, piece.at, piece.len))
    }

    #[test]
    fn who_asks_is_told_what_a_layer_says_to_those_who_ask() {
        let disk = Place::Backend(BackendId(0));
        assert_eq!(ask(vec![]), Some((disk, 1024, 8192)));
        assert_eq!(ask(vec![Box::new(Shift)]), Some((disk, 1536, 4096)));
        let sly = |map| Box::new(Sly(map)) as Box<dyn Layer>;
        let (len, port, at) = (2048, Port(0), 0);
        assert_eq!(
            ask(vec![Box::new(Shift), sly(Ok(Map::To { len, port, at }))]),
            Some((disk, 512, 2048))
        );
        assert_eq!(
            ask(vec![sly(Ok(Map::After { len, port, at, wait_ns: 9 }))]),
            Some((disk, 0, 2048))
        );
        assert_eq!(ask(vec![sly(Ok(Map::Zero { len: 512 }))]), Some((Place::Zero, 1024, 512)));
        for other in [Ok(Map::All { len, at }), Ok(Map::Miss), Err(Errno::EIO)] {
            assert_eq!(ask(vec![sly(other)]), None, "{other:?}");
        }
    }

    #[test]
    #[should_panic(expected = "layer broke its contract")]
    fn an_answer_for_more_than_was_asked_is_a_broken_contract() {
        ask(vec![Box::new(Sly(Ok(Map::To { len: 16_384, port: Port(0), at: 0 })))]);
    }
}
