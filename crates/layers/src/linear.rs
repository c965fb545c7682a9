//! Answers for a window of one device: `linear(disk, offset=1M, size=10M)`.

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "linear",
    about: "a window of one device",
    below: Arity::One,
    keys: &[
        Key::optional("offset", Kind::Size, "where the window begins, default 0"),
        Key::optional("size", Kind::Size, "bytes in the window, default all from offset on"),
    ],
    make: |args| {
        let offset = args.size("offset")?.unwrap_or(0);
        Ok(Box::new(Linear { offset, size: args.size("size")? }))
    },
};

struct Linear {
    offset: u64,
    size: Option<u64>,
}

impl Layer for Linear {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        below.only()?.window(self.offset, self.size)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        Ok(Map::To { len: io.extent.len, port: Port(0), at: self.offset + io.extent.at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{disk, disk_4k, open, refusal, to};

    #[test]
    fn a_request_moves_by_the_offset() {
        let (linear, limits) = open(&DRIVER, "offset=1M size=2M", &[disk(8 << 20)]).unwrap();
        assert_eq!(limits.size, 2 << 20);
        assert_eq!(linear.map(Io::new(Op::Read, 512, 4096)), to(0, (1 << 20) + 512, 4096));
    }

    #[test]
    fn a_window_that_leaves_the_device_or_its_blocks_is_refused() {
        assert!(refusal(&DRIVER, "offset=1M", &[disk(1 << 20)]).contains("leaves the"));
        assert!(refusal(&DRIVER, "size=2M", &[disk(1 << 20)]).contains("leaves the"));
        assert!(refusal(&DRIVER, "offset=512", &[disk_4k(1 << 20)]).contains("no multiple"));
        assert!(refusal(&DRIVER, "", &[]).contains("exactly one"));
    }
}
