//! Answers for two devices that must hold the same: `verify(disk, twin)`. What is written goes to
//! both; what is read comes from the first, after both were read and compared.
//!
//! Discards are not offered: afterwards the two might differ and both be right. The devices must
//! be equal when the disk is made (two that read as zeros are). A read waits for the comparison; it
//! then goes down like any other, so what changes in between is the client's own race.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use devsplice_core::prelude::*;

mod live;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "verify",
    about: "two devices that must hold the same; reads compare them",
    below: Arity::Many,
    keys: &[Key::optional("on-mismatch", Kind::Text, "error (EIO, default) or report (only)")],
    make: |args| {
        let fails = match args.text("on-mismatch").unwrap_or("error") {
            "error" => true,
            "report" => false,
            other => {
                let reason = format!("`{other}` is neither error nor report");
                return Err(Error::invalid("verify: on-mismatch", reason));
            }
        };
        Ok(Box::new(Verify(Arc::new(live::Twins::new(fails)))))
    },
};

struct Verify(Arc<live::Twins>);

impl Layer for Verify {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let [one, twin] = below.limits() else {
            let reason = format!("{} given, verify lies over two", below.limits().len());
            return Err(Error::invalid("lower devices", reason));
        };
        if one.size != twin.size {
            let reason = format!("{} and {} bytes: they cannot be equal", one.size, twin.size);
            return Err(Error::invalid("sizes", reason).next("cut the larger one with linear"));
        }
        let limits = Limits { discard: 0, ..Limits::stack(&[*one, *twin], one.size)? };
        self.0.size.store(limits.size, SeqCst);
        self.0.block.store(u64::from(limits.block), SeqCst);
        Ok(limits)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        Ok(match io.op {
            Op::Read if self.0.passes.take(&io) => Map::To { len, port: Port(0), at },
            Op::Read => Map::Miss,
            // A comparison wants to know whether what differs is only on its way.
            _ if self.0.still.load(SeqCst) > 0 => Map::Miss,
            _ => Map::All { len, at },
        })
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        Some(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{disk, open, refusal};

    #[test]
    fn what_is_written_goes_to_both_and_what_is_read_is_compared_first() {
        let (verify, limits) = open(&DRIVER, "", &[disk(1 << 20), disk(1 << 20)]).unwrap();
        assert_eq!(limits, Limits { discard: 0, ..disk(1 << 20) });
        let all = Ok(Map::All { len: 4096, at: 512 });
        assert_eq!(verify.map(Io::new(Op::Write, 512, 4096)), all);
        assert_eq!(verify.map(Io::new(Op::WriteZeroes { unmap: true }, 512, 4096)), all);
        assert_eq!(verify.map(Io::new(Op::Read, 512, 4096)), Ok(Map::Miss));
        assert_eq!(verify.flush(), Ok(Map::All { len: 0, at: 0 }));
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        assert!(refusal(&DRIVER, "", &[disk(512)]).contains("lies over two"));
        assert!(refusal(&DRIVER, "", &[disk(512), disk(1024)]).contains("cannot be equal"));
        let text = refusal(&DRIVER, "on-mismatch=panic", &[disk(512), disk(512)]);
        assert!(text.contains("neither error nor report"), "{text}");
    }
}
