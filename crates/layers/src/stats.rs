//! Answers for how long things take: `stats(disk)`, then `devsplice info`, where a row is an
//! operation and a size with its count and its latencies.
//!
//! What is timed is a splice below this layer, from when it is first sent (or begins to wait, if a
//! layer asks for that) to its good end; neighbours that are gathered count as one.

use std::rc::Rc;
use std::sync::Arc;

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "stats",
    about: "counts latencies by operation and size",
    below: Arity::One,
    keys: &[],
    make: |_| Ok(Box::new(Stats(Arc::default()))),
};

struct Stats(Arc<Probe>);

impl Layer for Stats {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        below.only()
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        Ok(Map::Watched { len: io.extent.len, port: Port(0), at: io.extent.at })
    }

    fn flush(&self) -> Result<Map, Errno> {
        self.map(Io::new(Op::Flush, 0, 0))
    }

    fn probe(&self) -> Option<Arc<Probe>> {
        Some(self.0.clone())
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        Some(Arc::new(Shown(self.0.clone())))
    }
}

/// What people see of it.
struct Shown(Arc<Probe>);

impl Live for Shown {
    fn resolve(self: Arc<Self>, _: Io, _: Rc<dyn Meta>) -> Slow {
        Box::pin(std::future::ready(Ok(())))
    }

    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        _: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        let answer = if words == ["reset"] {
            self.0.reset();
            Ok("reset".to_owned())
        } else {
            Err("commands: reset".to_owned())
        };
        Box::pin(std::future::ready(Ok(answer)))
    }

    fn status(&self) -> Vec<(&'static str, Value)> {
        vec![("latencies", Value::List(self.0.rows()))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{disk, open};

    #[test]
    fn everything_is_watched_on_its_way_to_the_same_place() {
        let (stats, limits) = open(&DRIVER, "", &[disk(1 << 20)]).unwrap();
        assert_eq!(limits, disk(1 << 20));
        for op in [Op::Read, Op::Write, Op::Discard] {
            let want = Map::Watched { len: 4096, port: Port(0), at: 512 };
            assert_eq!(stats.map(Io::new(op, 512, 4096)), Ok(want));
        }
        assert_eq!(stats.flush(), Ok(Map::Watched { len: 0, port: Port(0), at: 0 }));
        assert!(stats.probe().is_some() && stats.live().is_some());
    }
}
