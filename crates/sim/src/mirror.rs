//! Answers for a layer that exists to test fan-out: writes to all legs, reads from one in turn.
//!
//! It keeps no log and repairs nothing, so its legs may differ after a failure or a crash.

use devsplice_core::prelude::*;

/// Bytes that are read from one leg before the next one's turn.
const TURN: u64 = 4096;

/// The layer.
#[derive(Default)]
pub(crate) struct Mirror {
    legs: u64,
}

impl Layer for Mirror {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let legs = below.limits();
        self.legs = legs.len() as u64;
        let block = legs.iter().map(|leg| u64::from(leg.block)).max().unwrap_or(512);
        let size = legs.iter().map(|leg| leg.size).min().unwrap_or(0);
        Limits::stack(legs, size - size % block)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        if io.op != Op::Read {
            return Ok(Map::All { len, at });
        }
        // A stack has at most 255 lower devices below a layer.
        let port = Port((at / TURN % self.legs) as u16);
        Ok(Map::To { len: len.min(TURN - at % TURN), port, at })
    }
}
