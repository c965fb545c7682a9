//! Answers for what the engine needs of the world: a ring that splices pages and tells when.

use devsplice_core::{Errno, Op, Result};

use crate::counts::RingCounts;
use crate::served::Wake;

/// Most parts of one splice. Bounds the vector that a ring keeps for it.
pub const MAX_PARTS: usize = 16;

/// A request's memory: a handle with no way in. Only the ring that minted it knows what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages(pub u32);

/// A file, device or socket that a ring has been given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId(pub u16);

/// A range of a request's pages, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Part {
    /// First byte, counted from the start of the request.
    pub at: u32,
    /// Bytes.
    pub len: u32,
}

/// The other end of a splice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// A file, device or socket.
    File(FileId),
    /// An endless source of zeros; reads only.
    Zero,
}

/// `dev_splice`: moves parts of a request's pages to or from a place, or changes the place.
#[derive(Clone, Copy, Debug)]
pub struct Splice<'a> {
    /// Read fills the pages from the place, write drains them to it; others carry no pages.
    pub op: Op,
    /// Whether a write must be durable when it completes.
    pub fua: bool,
    /// The other end.
    pub to: To,
    /// First byte there.
    pub at: u64,
    /// Bytes; for reads and writes the sum of the parts.
    pub len: u64,
    /// The request's memory.
    pub pages: Pages,
    /// Which ranges of it, in the order of the place; 1 to [`MAX_PARTS`] for reads and writes.
    pub parts: &'a [Part],
}

/// A completion that belongs to an export: what it submitted under `index`.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The export's own number for it.
    pub index: u32,
    /// The kernel's result.
    pub result: i32,
    /// The kernel's completion flags.
    pub flags: u32,
}

/// What a ring reports.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A splice came to its end: bytes done, which may be fewer than asked.
    Splice {
        /// As given to [`Ring::splice`].
        key: u32,
        /// Bytes done; the whole length for operations without pages.
        result: Result<u64, Errno>,
    },
    /// The time given to [`Ring::after`] is over.
    Timer {
        /// As given.
        key: u32,
    },
    /// Another thread has called what [`Ring::wake`] returned.
    Woken,
    /// Something that an export submitted.
    Export {
        /// The export's lane.
        lane: u16,
        /// What came back.
        completion: Completion,
    },
}

/// Who takes what a ring reports: the work of the thread, which owns the ring.
pub trait Takes<R> {
    /// The ring.
    fn ring(&mut self) -> &mut R;

    /// Takes an event. Made to be compiled once for each kind of event that nearly all are of.
    ///
    /// # Errors
    /// If the device cannot go on.
    fn take(&mut self, event: Event) -> Result<()>;

    /// Takes one of any other kind.
    ///
    /// # Errors
    /// If the device cannot go on.
    fn take_other(&mut self, event: Event) -> Result<()>;
}

/// A place to submit to and to wait at. One thread owns it. Memory that an operation needs is the
/// ring's until the operation's event is out.
pub trait Ring {
    /// Starts a splice. `key` is not in use by another splice.
    fn splice(&mut self, key: u32, splice: &Splice<'_>);

    /// As [`Ring::splice`], and what is submitted next is carried out when this splice is done
    /// whole, but never if it is not: `ECANCELED` then. Whether that can be had for this splice;
    /// nothing has been started if not. There is room for what comes next.
    fn splice_first(&mut self, _key: u32, _splice: &Splice<'_>) -> bool {
        false
    }

    /// Asks for an [`Event::Timer`] in `ns` nanoseconds. `key` is not in use by another timer.
    fn after(&mut self, key: u32, ns: u64);

    /// Submits all that was started; with `wait`, until at least one event is there.
    ///
    /// # Errors
    /// If the ring itself fails; the device cannot go on then.
    fn enter(&mut self, wait: bool) -> Result<()>;

    /// As `enter(true)`, but waits for two events. May return earlier.
    ///
    /// # Errors
    /// As [`Ring::enter`].
    fn enter_for_two(&mut self) -> Result<()> {
        self.enter(true)
    }

    /// The next event, if one is there.
    fn next(&mut self) -> Option<Event>;

    /// Gives all events that are there to `to`, in their order.
    ///
    /// # Errors
    /// What `to` reports; the events behind that are left.
    fn report(to: &mut impl Takes<Self>) -> Result<()>
    where
        Self: Sized,
    {
        while let Some(event) = to.ring().next() {
            to.take_other(event)?;
        }
        Ok(())
    }

    /// Nanoseconds since some moment.
    fn now_ns(&self) -> u64;

    /// What makes this ring report [`Event::Woken`], from any thread. Asked once.
    fn wake(&mut self) -> Wake;

    /// The memory of a tag of an inner lane, of [`INNER_BYTES`](crate::desk::INNER_BYTES).
    fn inner_pages(&self, lane: u16, tag: u16) -> Pages;

    /// Puts bytes at the start of such memory. No splice of it is out.
    fn put(&mut self, lane: u16, tag: u16, bytes: &[u8]);

    /// Gets bytes from the start of such memory. No splice of it is out.
    fn get(&mut self, lane: u16, tag: u16, bytes: &mut [u8]);

    /// Gives back memory of a lane that its requests have used and none uses now. Called when no
    /// request of any lane has been there for a second or two, and the lane's export holds nothing
    /// in it.
    fn rest(&mut self, _lane: u16) {}

    /// What the ring has counted since its start.
    fn counts(&self) -> RingCounts;
}
