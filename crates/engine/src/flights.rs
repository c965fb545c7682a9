//! Answers for splices in flight: a fixed table, what each still has to move, how often tried.

use devsplice_core::{Errno, Op, Piece, Place, Wait};

use crate::ring::{FileId, MAX_PARTS, Pages, Part, Splice, To};

/// Attempts without progress before a transient error becomes the request's.
pub const MAX_ATTEMPTS: u8 = 10;
/// First wait before a splice that met `EAGAIN` is sent again; doubles each time.
pub const FIRST_BACKOFF_NS: u64 = 50_000;

/// One or more pieces that lie together below, on their way.
#[derive(Clone, Copy, Debug)]
pub struct Flight {
    pub(crate) lane: u16,
    pub(crate) tag: u16,
    pub(crate) op: Op,
    pub(crate) fua: bool,
    pub(crate) pages: Pages,
    pub(crate) to: To,
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) wait: Wait,
    /// When it was sent first and how long it was, if probes are to be told.
    pub(crate) sent: (u64, u64),
    attempts: u8,
    part_count: u8,
    /// While it is free: which one is taken after it.
    next_free: u32,
    parts: [Part; MAX_PARTS],
}

/// What is to be done with a flight that was not done whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It is over.
    Failed(Errno),
    /// The rest must be sent.
    Again,
    /// The rest must be sent, but not before this many nanoseconds.
    Later(u64),
}

impl Flight {
    const EMPTY: Flight = Flight {
        lane: 0,
        tag: 0,
        op: Op::Flush,
        fua: false,
        pages: Pages(0),
        to: To::Zero,
        at: 0,
        len: 0,
        wait: Wait::NONE,
        sent: (0, 0),
        attempts: 0,
        part_count: 0,
        next_free: NONE,
        parts: [Part { at: 0, len: 0 }; MAX_PARTS],
    };

    /// Starts with the first piece.
    #[inline]
    pub(crate) fn start(
        &mut self,
        owner: (u16, u16),
        (op, fua, pages): (Op, bool, Pages),
        to: To,
        piece: &Piece,
    ) {
        (self.lane, self.tag) = owner;
        (self.op, self.fua, self.pages) = (op, fua, pages);
        self.to = to;
        self.at = piece.at;
        self.len = piece.len;
        self.wait = piece.wait;
        self.attempts = 0;
        self.part_count = 0;
        if op.has_pages() {
            self.parts[0] = part_of(piece);
            self.part_count = 1;
        }
    }

    /// Takes a piece that continues this flight below, if there is room; whether it did.
    #[inline]
    pub(crate) fn extend(&mut self, to: To, piece: &Piece) -> bool {
        if self.to != to || self.at + self.len != piece.at || self.wait != piece.wait {
            return false;
        }
        if self.op.has_pages() {
            let part = part_of(piece);
            let count = usize::from(self.part_count);
            let last = &mut self.parts[count - 1];
            if last.at + last.len == part.at {
                last.len += part.len;
            } else if count < MAX_PARTS {
                self.parts[count] = part;
                self.part_count += 1;
            } else {
                return false;
            }
        }
        self.len += piece.len;
        true
    }

    /// What is still to be moved.
    #[inline]
    pub(crate) fn splice(&self) -> Splice<'_> {
        Splice {
            op: self.op,
            fua: self.fua,
            to: self.to,
            at: self.at,
            len: self.len,
            pages: self.pages,
            parts: &self.parts[..usize::from(self.part_count)],
        }
    }

    /// Whether a place without anything behind it already holds what was asked.
    #[inline]
    pub(crate) fn is_void(&self) -> bool {
        self.to == To::Zero && self.op != Op::Read
    }

    /// Whether it can go to the ring as it is.
    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        self.wait.is_none() && !self.is_void()
    }

    /// Takes a result into account that is not all that was asked. A short one moves the flight to
    /// what is left; one without progress, where bytes were due, is an error: the place ends before
    /// the device does.
    pub(crate) fn fell_short(&mut self, result: Result<u64, Errno>) -> Next {
        match result {
            Ok(done) if done >= self.len || done == 0 => Next::Failed(Errno::EIO),
            Ok(done) => {
                self.advance(done);
                self.attempts = 0;
                Next::Again
            }
            Err(errno) if errno.is_transient() => {
                if self.attempts == MAX_ATTEMPTS {
                    return Next::Failed(Errno::EIO);
                }
                let backoff_ns = FIRST_BACKOFF_NS << self.attempts;
                self.attempts += 1;
                match errno {
                    Errno::EINTR => Next::Again,
                    _ => Next::Later(backoff_ns),
                }
            }
            Err(errno) => Next::Failed(errno),
        }
    }

    fn advance(&mut self, done: u64) {
        self.at += done;
        self.len -= done;
        let mut done = done;
        let count = usize::from(self.part_count);
        let mut first = 0;
        while first < count && done >= u64::from(self.parts[first].len) {
            done -= u64::from(self.parts[first].len);
            first += 1;
        }
        self.parts.copy_within(first..count, 0);
        self.part_count -= u8::try_from(first).unwrap_or(0);
        if self.part_count > 0 {
            // Below a part's length, so it fits.
            let done = u32::try_from(done).unwrap_or(0);
            self.parts[0].at += done;
            self.parts[0].len -= done;
        }
    }
}

/// A request with pages is bounded by its export to far below 4 GiB, so its parts fit.
#[inline]
fn part_of(piece: &Piece) -> Part {
    #[allow(clippy::cast_possible_truncation)]
    Part { at: piece.part as u32, len: piece.len as u32 }
}

/// The place of a piece, as the ring of `files` knows it.
#[inline]
pub(crate) fn place(piece: &Piece, files: &[FileId]) -> To {
    match piece.place {
        Place::Backend(id) => To::File(files[usize::from(id.0)]),
        Place::Zero => To::Zero,
    }
}

/// The key that no flight has.
const NONE: u32 = u32::MAX;

/// The table. The free ones are linked through it, the one that was released last is first.
pub(crate) struct Flights {
    table: Box<[Flight]>,
    free: u32,
}

impl Flights {
    pub(crate) fn new(capacity: u32) -> Flights {
        let mut table: Box<[Flight]> = vec![Flight::EMPTY; capacity as usize].into();
        for (next, flight) in (1..capacity).zip(&mut table) {
            flight.next_free = next;
        }
        Flights { free: if capacity == 0 { NONE } else { 0 }, table }
    }

    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.free == NONE
    }

    #[inline]
    pub(crate) fn take(&mut self) -> Option<u32> {
        let key = self.free;
        // `NONE` lies behind any table.
        self.free = self.table.get(key as usize)?.next_free;
        Some(key)
    }

    #[inline]
    pub(crate) fn release(&mut self, key: u32) {
        debug_assert!(!self.is_free(key), "flight {key} released twice");
        self.table[key as usize].next_free = self.free;
        self.free = key;
    }

    /// Whether `done` is all of a flight that nobody watches; its lane and tag then, and it is
    /// released.
    #[inline(always)]
    pub(crate) fn land(&mut self, key: u32, done: u64) -> Option<(u16, u16)> {
        let flight = &mut self.table[key as usize];
        if flight.len != done || !flight.wait.is_none() {
            return None;
        }
        flight.next_free = self.free;
        self.free = key;
        Some((flight.lane, flight.tag))
    }

    /// Goes through all that are free.
    fn is_free(&self, key: u32) -> bool {
        let next = |key: &u32| self.table.get(*key as usize).map(|flight| flight.next_free);
        std::iter::successors(Some(self.free), next).any(|free| free == key)
    }

    #[inline]
    pub(crate) fn get(&mut self, key: u32) -> &mut Flight {
        &mut self.table[key as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devsplice_core::BackendId;

    fn flight(parts: &[(u64, u64)]) -> Flight {
        let mut flight = Flight::EMPTY;
        let mut at = 4096;
        for (index, (part, len)) in parts.iter().enumerate() {
            let place = Place::Backend(BackendId(0));
            let piece = Piece { place, at, part: *part, len: *len, wait: Wait::NONE };
            if index == 0 {
                let what = (Op::Read, false, Pages(0));
                flight.start((0, 0), what, To::File(FileId(0)), &piece);
            } else {
                assert!(flight.extend(To::File(FileId(0)), &piece));
            }
            at += len;
        }
        flight
    }

    fn parts(flight: &Flight) -> Vec<(u32, u32)> {
        flight.splice().parts.iter().map(|part| (part.at, part.len)).collect()
    }

    #[test]
    fn each_flight_is_given_once_until_it_is_released() {
        let mut flights = Flights::new(3);
        let mut taken: Vec<u32> = std::iter::from_fn(|| flights.take()).collect();
        assert_eq!(taken, [0, 1, 2]);
        assert!(flights.is_full());
        flights.release(1);
        assert!(!flights.is_full() && flights.is_free(1) && !flights.is_free(0));
        flights.release(2);
        taken = std::iter::from_fn(|| flights.take()).collect();
        assert_eq!((taken, flights.take()), (vec![2, 1], None));
    }

    #[test]
    fn adjacent_parts_join_and_distant_ones_become_a_vector() {
        assert_eq!(parts(&flight(&[(0, 512), (512, 512)])), [(0, 1024)]);
        assert_eq!(parts(&flight(&[(0, 512), (1024, 512)])), [(0, 512), (1024, 512)]);
    }

    #[test]
    fn a_short_result_leaves_exactly_the_rest_wherever_it_ends() {
        let whole = flight(&[(0, 512), (1024, 512), (4096, 1024)]);
        let order: Vec<u64> = (0..512).chain(1024..1536).chain(4096..5120).collect();
        for done in 1..whole.len {
            let mut rest = whole;
            assert_eq!(rest.fell_short(Ok(done)), Next::Again);
            assert_eq!((rest.at, rest.len), (4096 + done, 2048 - done));
            let left: Vec<u64> = parts(&rest)
                .iter()
                .flat_map(|(at, len)| u64::from(*at)..u64::from(at + len))
                .collect();
            assert_eq!(left, order[usize::try_from(done).unwrap()..]);
        }
    }

    #[test]
    fn no_progress_and_too_much_are_errors() {
        assert_eq!(flight(&[(0, 512)]).fell_short(Ok(0)), Next::Failed(Errno::EIO));
        assert_eq!(flight(&[(0, 512)]).fell_short(Ok(513)), Next::Failed(Errno::EIO));
        let full = flight(&[(0, 512)]).fell_short(Err(Errno::ENOSPC));
        assert_eq!(full, Next::Failed(Errno::ENOSPC));
    }

    #[test]
    fn transient_errors_are_tried_a_bounded_number_of_times() {
        for errno in [Errno::EAGAIN, Errno::EINTR] {
            let mut one = flight(&[(0, 512)]);
            let mut tries = 0;
            while one.fell_short(Err(errno)) != Next::Failed(Errno::EIO) {
                tries += 1;
            }
            assert_eq!(tries, MAX_ATTEMPTS);
        }
    }
}
