//! Answers for joining: pieces of one request that lie together below become one splice.

use devsplice_core::Piece;

use crate::flights::{Flight, Flights};
use crate::ring::To;

/// Flights that one pass of routing can have open; then they are sent and another pass follows.
pub(crate) const MAX_OPEN: usize = 64;
/// How far back a pass looks for a flight that a piece continues: stripes up to this wide gather.
const LOOK_BACK: usize = 16;

/// The flights of one request that routing has begun and not sent. Kept from request to request:
/// making it anew would cost as much as routing does.
pub(crate) struct Gather {
    keys: [u32; MAX_OPEN],
    count: usize,
}

impl Gather {
    pub(crate) fn new() -> Gather {
        Gather { keys: [0; MAX_OPEN], count: 0 }
    }

    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.count == MAX_OPEN
    }

    /// Adds `piece` to the open flight that it continues, if there is one; whether there was.
    #[inline]
    pub(crate) fn join(&self, flights: &mut Flights, to: To, piece: &Piece) -> bool {
        let recent = &self.keys[self.count.saturating_sub(LOOK_BACK)..self.count];
        recent.iter().rev().any(|key| Flight::extend(flights.get(*key), to, piece))
    }

    #[inline]
    pub(crate) fn open(&mut self, key: u32) {
        self.keys[self.count] = key;
        self.count += 1;
    }

    /// How many are open, and forgets them: [`Gather::closed`] still has each.
    #[inline]
    pub(crate) fn close(&mut self) -> usize {
        std::mem::take(&mut self.count)
    }

    /// One of the flights that were open, counted from the oldest.
    #[inline]
    pub(crate) fn closed(&self, place: usize) -> u32 {
        self.keys[place]
    }
}
