//! Answers for what requests that this process makes itself need of a ring: a start, and a look at
//! the data.

use devsplice_core::Errno;

use super::{KIND_EXPORT, Uring};
use crate::splice::DATA_AT;
use crate::uapi::{OP_NOP, Sqe};

impl Uring {
    /// Brings the lane an event with this index, at the next turn.
    pub fn kick(&mut self, (lane, index): (u16, u32)) {
        self.queues.push(Sqe {
            opcode: OP_NOP,
            fd: -1,
            user_data: KIND_EXPORT | u64::from(lane) << 32 | u64::from(index),
            ..Sqe::default()
        });
    }

    /// The first `len` bytes of data of a tag of two lanes.
    ///
    /// # Errors
    /// `EINVAL` if the lanes are the same, or one has not that much memory.
    ///
    /// # Panics
    /// If an entry that names the memory is in the kernel's hands.
    pub fn both(&mut self, lanes: [u16; 2], tag: u16, len: usize) -> Result<[&[u8]; 2], Errno> {
        let [one, two] = lanes.map(usize::from);
        let Ok([Some(one), Some(two)]) = self.arenas.get_disjoint_mut([one, two]) else {
            return Err(Errno::EINVAL);
        };
        let range = DATA_AT..DATA_AT + len;
        let tag = usize::from(tag);
        match (one.bytes(tag).get(range.clone()), two.bytes(tag).get(range)) {
            (Some(one), Some(two)) => Ok([one, two]),
            _ => Err(Errno::EINVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use devsplice_engine::Ring;

    use super::*;
    use crate::ring::{Config, LaneMemory};

    #[test]
    fn a_rest_is_of_one_lanes_memory_and_of_no_inner_ones() {
        let lane = LaneMemory { depth: 2, bytes: 4096, slots: false, locked: false };
        let lanes = vec![lane, LaneMemory { bytes: 0, ..lane }, lane];
        let mut ring = Uring::new(&Config { flights: 2, files: 0, lanes, inner: 1 }).unwrap();
        for (lane, tag) in [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0)] {
            ring.memory(lane, tag).fill(7);
        }
        // One without memory, inner ones, and what is no lane have nothing to give.
        [1, 2, 3, 4].into_iter().for_each(|lane| ring.rest(lane));
        let mut holds = |byte| {
            let places = [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0)];
            places.map(|(lane, tag)| ring.memory(lane, tag).iter().all(|at| *at == byte))
        };
        assert_eq!(holds(7), [true, true, false, false, true]);
        assert_eq!(holds(0), [false, false, true, true, false]);
    }
}
