//! Answers for which bytes of a read are there already: none may come twice, or others would be
//! missing though their number is right.

use crate::Broken;

/// Runs that are kept at most. Servers send a read's chunks in their order, which makes one run.
const MOST: usize = 8;

/// Runs of bytes, in order, no two of which touch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filled {
    runs: [(u32, u32); MOST],
    count: usize,
}

impl Filled {
    pub(super) const NONE: Filled = Filled { runs: [(0, 0); MOST], count: 0 };

    /// Adds the bytes `from..to`.
    pub(super) fn add(&mut self, from: u32, to: u32) -> Result<(), Broken> {
        let runs = &self.runs[..self.count];
        let place = runs.iter().take_while(|(start, _)| *start < from).count();
        let before = place.checked_sub(1).map(|before| runs[before].1);
        let behind = runs.get(place).map(|(start, _)| *start);
        if before.is_some_and(|end| end > from) || behind.is_some_and(|start| start < to) {
            return Err(Broken("data that came already"));
        }
        match (before == Some(from), behind == Some(to)) {
            (true, true) => {
                self.runs[place - 1].1 = self.runs[place].1;
                self.runs.copy_within(place + 1..self.count, place);
                self.count -= 1;
            }
            (true, false) => self.runs[place - 1].1 = to,
            (false, true) => self.runs[place].0 = from,
            (false, false) if self.count == MOST => {
                return Err(Broken("data in more places than anybody would send it"));
            }
            (false, false) => {
                self.runs.copy_within(place..self.count, place + 1);
                self.runs[place] = (from, to);
                self.count += 1;
            }
        }
        Ok(())
    }

    /// Whether the first `len` bytes are there, and nothing else.
    pub(super) fn is_all(&self, len: u64) -> bool {
        self.count == 1 && self.runs[0].0 == 0 && u64::from(self.runs[0].1) == len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_in_any_order_and_nothing_comes_twice() {
        let orders = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [2, 0, 3, 1], [1, 3, 0, 2]];
        for order in orders {
            let mut filled = Filled::NONE;
            for (done, part) in order.into_iter().enumerate() {
                assert!(!filled.is_all(40), "{order:?} after {done}");
                filled.add(part * 10, part * 10 + 10).unwrap();
                for (from, to) in [(part * 10, part * 10 + 10), (part * 10 + 3, part * 10 + 4)] {
                    assert!(filled.add(from, to).is_err(), "{order:?}: {from}..{to} twice");
                }
            }
            assert!(filled.is_all(40) && !filled.is_all(41));
            assert!(filled.add(39, 41).is_err() && filled.add(0, 40).is_err());
        }
    }

    #[test]
    fn what_is_scattered_without_end_is_refused() {
        let mut filled = Filled::NONE;
        let added = (0..100).take_while(|at| filled.add(at * 2, at * 2 + 1).is_ok()).count();
        assert_eq!(added, MOST);
    }
}
