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

/// The timer that brings the second completion when the watchdog's brings the first. No flight's,
/// and no sleeper's.
pub(crate) const SECOND_TICK_KEY: u32 = u32::MAX - 10;
/// How long a splice that is done may go unnoticed when no request follows it.
const SECOND_TICK_NS: u64 = 5_000_000;
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

    /// Waits for a splice and the next request. If that does not come, this tick does soon; and it
    /// and the watchdog's together wake a thread whose splice is stuck.
    #[inline(never)]
    pub(crate) fn enter_for_two(&mut self) -> Result<()> {
        if !self.ahead.is_second_armed {
            self.ahead.is_second_armed = true;
            self.ring.after(SECOND_TICK_KEY, SECOND_TICK_NS);
        }
        self.ring.enter_for_two()
    }

    pub(crate) fn second_tick(&mut self) {
        self.ahead.is_second_armed = false;
    }
}

#[cfg(test)]
mod tests {
    use devsplice_core::{Io, Op};

    use super::*;
    use crate::export::Request;
    use crate::ring::Pages;

    fn inbox(count: u16) -> Inbox {
        let mut inbox = Inbox::with_capacity(4);
        for tag in 0..count {
            inbox.push(0, Request { tag, io: Io::new(Op::Read, 0, 512), pages: Pages(0) });
        }
        inbox
    }

    #[test]
    fn only_one_request_with_no_other_under_way_is_alone() {
        let mut ahead = Ahead { on: true, ..Ahead::OFF };
        for (count, is_busy, is_alone) in
            [(1, false, true), (2, false, false), (1, true, false), (0, false, false)]
        {
            ahead.look(&inbox(count), is_busy);
            assert_eq!(ahead.is_alone, is_alone, "{count} came, busy: {is_busy}");
        }
        let mut off = Ahead::OFF;
        off.look(&inbox(1), false);
        assert!(!off.is_alone);
    }

    #[test]
    fn pauses_double_while_requests_meet_and_are_short_again_when_they_do_not() {
        let mut ahead = Ahead { on: true, ..Ahead::OFF };
        let sent = |ahead: &mut Ahead, met: bool| {
            let mut waited = 0;
            while !ahead.is_alone {
                ahead.look(&inbox(1), false);
                waited += u32::from(!ahead.is_alone);
            }
            (ahead.is_alone, ahead.is_out) = (false, true);
            ahead.landed(&inbox(u16::from(met)));
            waited
        };
        let waits: Vec<_> = (0..4).map(|_| sent(&mut ahead, true)).collect();
        assert_eq!(waits, [0, 64, 128, 256]);
        assert_eq!(sent(&mut ahead, false), 512);
        for _ in 1..1024 {
            assert_eq!(sent(&mut ahead, false), 0);
        }
        sent(&mut ahead, true);
        assert_eq!(sent(&mut ahead, true), 64);
        let longest = (0..20).map(|_| sent(&mut ahead, true)).max();
        assert_eq!(longest, Some(LAST_PAUSE));
    }
}
