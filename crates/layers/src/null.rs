//! Answers for a device that keeps nothing: reads see zeros, writes are dropped.

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "null",
    about: "reads as zeros, takes writes and drops them",
    below: Arity::None,
    keys: crate::bottom::KEYS,
    make: |args| Ok(Box::new(Null(crate::bottom::limits(args)?))),
};

struct Null(Limits);

impl Layer for Null {
    fn open(&mut self, _: &mut dyn Lower) -> Result<Limits> {
        Ok(self.0)
    }
    fn map(&self, io: Io) -> Result<Map, Errno> {
        Ok(Map::Zero { len: io.extent.len })
    }
}

#[test]
fn nothing_lies_below() {
    let null = crate::testing::open(&DRIVER, "size=1M", &[]).unwrap().0;
    assert_eq!(null.map(Io::new(Op::Write, 512, 4096)), Ok(Map::Zero { len: 4096 }));
}
