//! Answers for the front end as the engine sees it: a source of requests that wants them finished.

use devsplice_core::{Errno, Io, Op, Result};

use crate::ring::{Completion, Pages, Ring};

/// A request that a front end received.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Which of the export's slots it takes: below [`Export::depth`], free until it is finished.
    pub tag: u16,
    /// What and where.
    pub io: Io,
    /// Its memory, for reads and writes.
    pub pages: Pages,
}

/// Requests that have arrived and not been started; bounded by the exports' depths.
#[derive(Debug, Default)]
pub struct Inbox {
    /// A place for each tag of each lane.
    places: Box<[(u16, Request)]>,
    count: usize,
}

impl Inbox {
    /// With room for as many requests: one for each tag of each lane.
    #[must_use]
    pub fn with_capacity(requests: usize) -> Inbox {
        let none = Request { tag: 0, io: Io::new(Op::Flush, 0, 0), pages: Pages(0) };
        Inbox { places: vec![(0, none); requests].into(), count: 0 }
    }

    /// Hands a request to the engine.
    ///
    /// # Panics
    /// If there are more requests than tags.
    #[inline]
    pub fn push(&mut self, lane: u16, request: Request) {
        self.places[self.count] = (lane, request);
        self.count += 1;
    }

    /// The requests with their lanes, in the order of arrival.
    #[inline]
    #[must_use]
    pub fn requests(&self) -> &[(u16, Request)] {
        &self.places[..self.count]
    }

    /// Forgets them all: they were started.
    pub fn clear(&mut self) {
        self.count = 0;
    }
}

/// One queue of a front end.
pub trait Export<R: Ring>: Send {
    /// Most requests in flight; tags are below it.
    fn depth(&self) -> u16;

    /// Asks for the first requests. `lane` is what this export's events carry.
    ///
    /// # Errors
    /// If the front end refuses.
    fn arm(&mut self, ring: &mut R, lane: u16) -> Result<()>;

    /// Takes one of the export's own events; puts what it brings into `inbox`.
    ///
    /// # Errors
    /// If the front end is broken beyond this request; the device stops then.
    fn event(&mut self, ring: &mut R, completion: Completion, inbox: &mut Inbox) -> Result<()>;

    /// Ends a request: everything it asked for is done, or it failed. All splices of its pages are
    /// over. The tag is free afterwards.
    fn finish(&mut self, ring: &mut R, tag: u16, io: &Io, result: Result<(), Errno>);

    /// Whether ends of requests can be sent ahead at all: asked once, when it is armed.
    fn goes_ahead(&self) -> bool {
        false
    }

    /// Whether the end of this request, which has just come, can be.
    fn may_finish_ahead(&self, _tag: u16) -> bool {
        false
    }

    /// As [`Export::finish`] of a request of which all is done, but sent at once behind the splice
    /// that [`Ring::splice_first`] has just started: the ring carries out the very next thing that
    /// is submitted when that splice is done whole, and never if it is not. So this submits one
    /// thing. [`Export::went_ahead`] or [`Export::take_back`] says which it was.
    fn finish_ahead(&mut self, _ring: &mut R, _tag: u16, _io: &Io) {}

    /// The end that was sent ahead is on its way. The tag is free.
    fn went_ahead(&mut self, _tag: u16) {}

    /// The end that was sent ahead will not be carried out: its completion says `ECANCELED`, if it
    /// has not said so already, and means nothing. The request is finished later like any other.
    fn take_back(&mut self, _tag: u16) {}

    /// The turn ends and the ring is entered: what was kept back to go together goes now.
    fn flush(&mut self, ring: &mut R);

    /// The engine has had no request for a second or two: takes back what keeps memory for the next
    /// ones, and says what may become of the memory of its lane's tags. An export that uses that of
    /// another lane answers for it there, too.
    fn rest(&mut self, ring: &mut R) -> Rest;

    /// Whether no further request can come.
    fn is_closed(&self) -> bool;
}

/// What may become of the memory of a lane's tags when the engine has no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nobody wants what is in it: it may be given back.
    Now,
    /// So, and some comes back only later: it is to be looked at again.
    Again,
    /// Some of it has data that is still on its way, as replies that a client takes slowly: it
    /// stays as it is, and is to be looked at again.
    Keep,
}

impl Rest {
    /// For an export whose memory is free again as soon as nothing is held in it.
    #[must_use]
    pub fn keep_if(held: bool) -> Rest {
        if held { Rest::Keep } else { Rest::Now }
    }
}
