//! Answers for requests that come one at a time: the end of such a one is sent ahead, behind its
//! splice, and both go to the kernel in one call.
//!
//! The splice reports as any other and is booked as any other. The second call is saved by waiting
//! for two completions: the splice's and the next request's. A request that comes while the splice
//! is still out would wait for it: where that happens, none is sent ahead for a while.

use devsplice_core::Result;

use crate::export::Inbox;
use crate::queue::Worker;
use crate::ring::{Ring, To};
use crate::watch::TICK_NS;

/// The timer that brings the second completion when the watchdog's brings the first. No flight's,
/// and no sleeper's.
pub(crate) const SECOND_TICK_KEY: u32 = u32::MAX - 10;
/// Requests that come alone and are not sent ahead after one has met another.
const FIRST_PAUSE: u32 = 64;
/// The pause doubles up to this, each time that it happens again soon.
const LAST_PAUSE: u32 = 1 << 16;

/// What is known of requests that come one at a time.
pub(crate) struct Ahead {
    /// Whether all of the thread's exports can send ends ahead.
    on: bool,
    /// The request that is started next is the only one.
    pub(crate) is_alone: bool,
    /// A splice is out with the end of its request behind it.
    pub(crate) is_out: bool,
    is_second_armed: bool,
    /// Requests that come alone and are not to be sent ahead.
    pause: u32,
    next_pause: u32,
    /// Requests that were sent ahead and met no other since one did.
    met_none: u32,
}

impl Ahead {
    pub(crate) const OFF: Ahead = Ahead {
        on: false,
        is_alone: false,
        is_out: false,
        is_second_armed: false,
        pause: 0,
        next_pause: FIRST_PAUSE,
        met_none: 0,
    };

    /// Looks at what has come in this turn, before any of it is started.
    #[inline]
    pub(crate) fn look(&mut self, inbox: &Inbox, is_busy: bool) {
        let arrived = inbox.requests().len();
        self.is_alone = false;
        if !self.on || arrived == 0 {
            return;
        }
        if self.is_out {
            self.has_met();
        } else if arrived == 1 && !is_busy {
            self.is_alone = self.pause == 0;
            self.pause = self.pause.saturating_sub(1);
        }
    }

    /// Another request has come while the splice was out.
    fn has_met(&mut self) {
        self.pause = self.next_pause;
        self.next_pause = (self.next_pause * 2).min(LAST_PAUSE);
        self.met_none = 0;
    }

    /// A splice was done whole, and its request with it. `inbox` has what came before that.
    fn landed(&mut self, inbox: &Inbox) {
        self.is_out = false;
        if !inbox.requests().is_empty() {
            return self.has_met();
        }
        self.met_none += 1;
        if self.met_none >= self.next_pause {
            self.met_none = 0;
            self.next_pause = FIRST_PAUSE;
        }
    }
}

impl<R: Ring> Worker<R> {
    /// Finds out whether ends can be sent ahead. Layers with a live side have to hear of a failure
    /// before its request is over; there it is never done.
    pub(crate) fn look_ahead(&mut self) {
        let can = self.lanes.iter().all(|lane| lane.export.goes_ahead());
        self.ahead.on = can && self.slow.is_none();
    }

    /// Sends the splice of the only request, and its end behind it if that can be.
    #[inline(never)]
    pub(crate) fn send_alone(&mut self, lane: u16, tag: u16, key: u32) {
        let Worker { ring, lanes, flights, ahead, .. } = self;
        let export = &mut lanes[usize::from(lane)].export;
        let job = &mut lanes[usize::from(lane)].jobs[usize::from(tag)];
        let splice = flights.get(key).splice();
        let can = matches!(splice.to, To::File(_)) && export.may_finish_ahead(tag);
        if !can || !ring.splice_first(key, &splice) {
            return ring.splice(key, &splice);
        }
        export.finish_ahead(ring, tag, &job.io);
        job.is_ahead = true;
        ahead.is_out = true;
    }

    /// The splice was done whole, so the end of its request has been sent.
    #[inline(never)]
    pub(crate) fn went_ahead(&mut self, lane: u16, tag: u16) {
        self.ahead.landed(&self.inbox);
        let lane = &mut self.lanes[usize::from(lane)];
        lane.jobs[usize::from(tag)].is_ahead = false;
        lane.export.went_ahead(tag);
    }

    /// The splice was not done whole, so the end of its request was not sent and never will be.
    pub(crate) fn take_back(&mut self, lane: u16, tag: u16) {
        let lane = &mut self.lanes[usize::from(lane)];
        if std::mem::take(&mut lane.jobs[usize::from(tag)].is_ahead) {
            self.ahead.is_out = false;
            lane.export.take_back(tag);
        }
    }

    /// Waits for a splice and the next request. The ticks bring two completions as well, so a
    /// thread wakes within seconds even if nothing else comes.
    #[inline(never)]
    pub(crate) fn enter_for_two(&mut self) -> Result<()> {
        if !self.ahead.is_second_armed {
            self.ahead.is_second_armed = true;
            self.ring.after(SECOND_TICK_KEY, TICK_NS);
        }
        self.ring.enter_for_two()
    }

    pub(crate) fn second_tick(&mut self) {
        self.ahead.is_second_armed = false;
    }
}
