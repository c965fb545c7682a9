//! Answers for a device that reads as zeros and refuses every change with `EROFS`.

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "zero",
    about: "reads as zeros, is read-only",
    below: Arity::None,
    keys: crate::bottom::KEYS,
    make: |args| Ok(Box::new(Zero(Limits { read_only: true, ..crate::bottom::limits(args)? }))),
};

struct Zero(Limits);

impl Layer for Zero {
    fn open(&mut self, _: &mut dyn Lower) -> Result<Limits> {
        Ok(self.0)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        if io.op.changes() { Err(Errno::EROFS) } else { Ok(Map::Zero { len: io.extent.len }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_zeros_and_refuses_each_change() {
        let (zero, limits) = crate::testing::open(&DRIVER, "size=1M", &[]).unwrap();
        assert!(limits.read_only);
        assert_eq!(zero.map(Io::new(Op::Read, 0, 512)), Ok(Map::Zero { len: 512 }));
        for op in [Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }] {
            assert_eq!(zero.map(Io::new(op, 0, 512)), Err(Errno::EROFS));
        }
    }
}
