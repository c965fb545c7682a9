//! Answers for the life of requests on one I/O thread: events in, routing, splices, finish.
//!
//! [`Worker::turn`] is the whole of it: take a batch of events, start what arrived, enter once.

use std::collections::VecDeque;
use std::sync::Arc;

use devsplice_core::{Errno, Result, Stack, Stop};

use crate::ahead::{Ahead, SECOND_TICK_KEY};
use crate::counts::{Shared, one_more};
use crate::export::{Export, Inbox, Request, Rest};
use crate::flights::{self, Flights, Next};
use crate::gather::Gather;
use crate::jobs::Job;
use crate::live::{LaneLive, SlowSide, is_sleep_key};
use crate::ring::{Event, FileId, Ring, Takes};
use crate::served::Served;
use crate::watch::{OnStuck, Stuck, TICK_KEY, TICK_NS, Watch};

/// Pieces routed for one request before others get their turn: a discard of a whole device over a
/// narrow stripe has millions.
const PIECES_A_PASS: u32 = 1024;

/// One queue of an export with the stack that serves it.
pub struct Lane<R: Ring> {
    pub(crate) export: Box<dyn Export<R>>,
    pub(crate) served: Arc<Served>,
    pub(crate) stack: Arc<Stack>,
    /// The ring's names for the stack's bottoms, in their order.
    pub(crate) files: Box<[FileId]>,
    pub(crate) jobs: Box<[Job]>,
    /// Only over a stack with live layers.
    pub(crate) live: Option<LaneLive>,
    /// Its requests are layers' own.
    pub(crate) is_inner: bool,
}

impl<R: Ring> Lane<R> {
    /// # Panics
    /// If `files` are not as many as the stack has bottoms.
    #[must_use]
    pub fn new(export: Box<dyn Export<R>>, served: Arc<Served>, files: Box<[FileId]>) -> Lane<R> {
        let stack = served.stack.clone();
        assert_eq!(files.len(), usize::from(stack.backend_count()), "a file for each bottom");
        let jobs = (0..export.depth()).map(|_| Job::idle(&stack)).collect();
        Lane { export, served, stack, files, jobs, live: None, is_inner: false }
    }
}

/// An I/O thread's work: a ring and the lanes that it serves.
pub struct Worker<R: Ring> {
    pub(crate) ring: R,
    pub(crate) lanes: Box<[Lane<R>]>,
    pub(crate) flights: Flights,
    gather: Gather,
    pub(crate) inbox: Inbox,
    /// Requests with pieces left to route and none out, in the order they came to wait.
    waiting: VecDeque<(u16, u16)>,
    pub(crate) busy: u32,
    pub(crate) counts: Arc<Shared>,
    pub(crate) watch: Watch,
    pub(crate) ahead: Ahead,
    /// Only with live layers.
    pub(crate) slow: Option<Box<SlowSide>>,
}

impl<R: Ring> Worker<R> {
    /// `flight_count` bounds the splices in flight and is at least 1. `stuck_seconds` is when a
    /// request is reported to `on_stuck`; 0 for never.
    pub fn new(
        mut ring: R,
        mut lanes: Vec<Lane<R>>,
        flight_count: u32,
        shared: Arc<Shared>,
        (stuck_seconds, on_stuck): (u32, OnStuck),
    ) -> Worker<R> {
        let slow = Self::make_live(&mut ring, &mut lanes);
        let tags: usize = lanes.iter().map(|lane| lane.jobs.len()).sum();
        Worker {
            ring,
            lanes: lanes.into(),
            flights: Flights::new(flight_count.max(1)),
            gather: Gather::new(),
            inbox: Inbox::with_capacity(tags),
            waiting: VecDeque::with_capacity(tags),
            busy: 0,
            counts: shared,
            watch: Watch {
                tick: 0,
                armed: false,
                ticked: false,
                finished: 0,
                limit: stuck_seconds,
                on_stuck,
            },
            ahead: Ahead::OFF,
            slow,
        }
    }

    /// Asks every export for its first requests.
    ///
    /// # Errors
    /// If an export or the ring refuses.
    pub fn arm(&mut self) -> Result<()> {
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            lane.export.arm(&mut self.ring, u16::try_from(index).unwrap_or(u16::MAX))?;
        }
        self.look_ahead();
        self.start_background();
        self.ring.enter(false)
    }

    /// Serves until every export is closed and every request finished.
    ///
    /// # Errors
    /// If the ring or an export fails; nothing is served any more then.
    pub fn run(&mut self) -> Result<()> {
        while self.turn()? {}
        Ok(())
    }

    /// One batch: what has happened, what it leads to, one call into the kernel. Whether there is
    /// more to come.
    ///
    /// # Errors
    /// If the ring or an export fails.
    pub fn turn(&mut self) -> Result<bool> {
        R::report(self)?;
        for _ in 0..self.waiting.len() {
            self.resume();
        }
        // Out of the way for as long: what starts a request does not put another there.
        let mut inbox = std::mem::take(&mut self.inbox);
        self.ahead.look(&inbox, self.busy > 0);
        if self.slow.is_none() {
            for (lane, request) in inbox.requests() {
                self.start(*lane, request);
            }
        } else {
            for (lane, request) in inbox.requests() {
                self.start_live(*lane, request);
            }
            self.slow_turn();
        }
        inbox.clear();
        self.inbox = inbox;
        if std::mem::take(&mut self.watch.ticked) && self.busy == 0 {
            self.rest();
        }
        for lane in &mut self.lanes {
            lane.export.flush(&mut self.ring);
        }
        self.counts.set_ring(self.ring.counts());
        if self.is_left() && self.is_at_rest() {
            self.ring.enter(false)?;
            return Ok(false);
        }
        if self.busy > 0 {
            self.arm_tick();
        }
        if self.ahead.is_out && self.busy == 1 {
            self.enter_for_two()?;
            return Ok(true);
        }
        let can_go_on = !self.waiting.is_empty() && !self.flights.is_full();
        self.ring.enter(!can_go_on)?;
        Ok(true)
    }

    /// Whether no export asks for anything any more, and none waits for an answer.
    fn is_left(&self) -> bool {
        if self.busy > 0 && self.slow.is_none() {
            return false;
        }
        let asks = |lane: &Lane<R>| lane.jobs.iter().any(|job| job.active);
        let all = || self.lanes.iter();
        all().all(|lane| lane.export.is_closed())
            && (self.busy == 0 || !all().any(|lane| !lane.is_inner && asks(lane)))
    }

    /// Goes on with the request that has waited longest, if there is room for its pieces.
    fn resume(&mut self) {
        if self.flights.is_full() {
            return;
        }
        if let Some((lane, tag)) = self.waiting.pop_front() {
            self.route(lane, tag);
        }
    }

    #[inline(always)]
    fn start(&mut self, lane: u16, request: &Request) {
        let Worker { ring, lanes, flights, counts, ahead, .. } = self;
        let Lane { stack, jobs, files, .. } = &mut lanes[usize::from(lane)];
        let Request { tag, io, pages } = *request;
        let job = &mut jobs[usize::from(tag)];
        assert!(!job.active, "export handed out tag {tag} twice");
        self.busy += 1;
        job.take((io, pages), self.watch.tick);
        if !stack.is_ordinary(&io) {
            return self.start_other(lane, tag);
        }
        // Nearly every request is of one piece and needs no gathering.
        let piece = match stack.straight(io) {
            Ok(piece) => piece,
            Err(bend) => {
                job.held = job.route.follow(stack, &bend);
                return self.route(lane, tag);
            }
        };
        let Some(key) = flights.take() else {
            job.held = Some(Ok(piece));
            return self.route(lane, tag);
        };
        one_more(&counts.pieces);
        one_more(&counts.splices);
        job.flying = 1;
        let flight = flights.get(key);
        flight.start((lane, tag), (io.op, io.fua, pages), flights::place(&piece, files), &piece);
        if flight.is_ready() {
            if ahead.is_alone {
                return self.send_alone(lane, tag, key);
            }
            ring.splice(key, &flight.splice());
        } else {
            self.dispatch(key);
        }
    }

    /// As `start`, for a request that is not like most; it may not enter the stack at all.
    #[inline(never)]
    fn start_other(&mut self, lane: u16, tag: u16) {
        let Lane { stack, jobs, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        match stack.admit(&job.io) {
            Ok(()) => job.restart(),
            Err(errno) => job.fail(errno),
        }
        self.route(lane, tag);
    }

    /// As `start`, where layers may want to know what is under way.
    #[inline(never)]
    fn start_live(&mut self, lane: u16, request: &Request) {
        let Lane { stack, jobs, .. } = &mut self.lanes[usize::from(lane)];
        let (tag, root) = (request.tag, stack.root());
        let refused = stack.admit(&request.io).err();
        assert!(!jobs[usize::from(tag)].active, "export handed out tag {tag} twice");
        self.start_at((lane, tag), (request.io, request.pages), root, refused);
    }

    /// Ends a request of which nothing is out with an error that is nobody's to mend.
    pub(crate) fn refuse(&mut self, lane: u16, tag: u16, errno: Errno) {
        let job = &mut self.lanes[usize::from(lane)].jobs[usize::from(tag)];
        job.careful = None;
        job.fail(errno);
        job.refused = true;
        self.settle(lane, tag, 0);
    }

    /// One pass of a request of which nothing is out: routes it as far as the tables allow and
    /// sends what was gathered. The next pass follows when all of it has landed: then neighbours
    /// find each other, which they would not if each flight that lands made room for one piece, and
    /// no request takes more of the table than one pass.
    #[inline(never)]
    pub(crate) fn route(&mut self, lane: u16, tag: u16) {
        let Worker { lanes, flights, gather, counts, .. } = self;
        let Lane { stack, jobs, files, live, .. } = &mut lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        if let Some(live) = live {
            live.begin(tag, job);
            if job.careful.is_some() {
                return self.route_carefully(lane, tag);
            }
        }
        debug_assert!(job.active && job.flying == 0, "tag {tag} routed while it is out");
        for _ in 0..PIECES_A_PASS {
            let piece = match job.next(stack) {
                None => break,
                Some(Err(Stop::Error(errno))) => {
                    job.fail(errno);
                    break;
                }
                Some(Err(Stop::Miss(node, io))) => {
                    job.missed = Some((node, io));
                    break;
                }
                Some(Ok(piece)) => piece,
            };
            let to = flights::place(&piece, files);
            if !gather.join(flights, to, &piece) {
                let key = if gather.is_full() { None } else { flights.take() };
                let Some(key) = key else {
                    job.held = Some(Ok(piece));
                    break;
                };
                flights.get(key).start((lane, tag), job.what(), to, &piece);
                job.flying += 1;
                gather.open(key);
            }
            one_more(&counts.pieces);
        }
        let count = gather.close();
        if count == 0 {
            return self.settle(lane, tag, 0);
        }
        for place in 0..count {
            one_more(&self.counts.splices);
            self.dispatch(self.gather.closed(place));
        }
    }

    /// Sends a new flight, at once or when it has waited.
    pub(crate) fn dispatch(&mut self, key: u32) {
        let flight = self.flights.get(key);
        if flight.wait.is_none() {
            return self.send(key);
        }
        flight.sent = (self.ring.now_ns(), flight.len);
        match flight.wait.ns() {
            0 => self.send(key),
            wait_ns => self.ring.after(key, wait_ns),
        }
    }

    fn send(&mut self, key: u32) {
        let flight = self.flights.get(key);
        if flight.is_void() {
            let len = flight.len;
            return self.landed(key, Ok(len));
        }
        self.ring.splice(key, &flight.splice());
    }

    #[inline(always)]
    fn landed(&mut self, key: u32, result: Result<u64, Errno>) {
        match result {
            Ok(done) => match self.flights.land(key, done) {
                Some((lane, tag)) => self.settle(lane, tag, 1),
                None => self.landed_otherwise(key, done),
            },
            Err(_) => self.fell_short(key, result),
        }
    }

    /// As `landed`, for a flight that somebody watches or that is not done whole.
    #[inline(never)]
    fn landed_otherwise(&mut self, key: u32, done: u64) {
        let flight = self.flights.get(key);
        let (lane, tag) = (flight.lane, flight.tag);
        if done != flight.len {
            return self.fell_short(key, Ok(done));
        }
        self.record(key);
        self.flights.release(key);
        self.settle(lane, tag, 1);
    }

    /// Counts what a flight took, for the layers that want to know.
    #[cold]
    #[inline(never)]
    fn record(&mut self, key: u32) {
        let flight = self.flights.get(key);
        let (probes, op, (sent_ns, len)) = (flight.wait.probes(), flight.op, flight.sent);
        if probes == 0 {
            return;
        }
        let lane = usize::from(flight.lane);
        let ns = self.ring.now_ns().saturating_sub(sent_ns);
        self.lanes[lane].stack.record(probes, op, len, ns);
    }

    /// As `landed`, when it is not done whole.
    #[cold]
    #[inline(never)]
    fn fell_short(&mut self, key: u32, result: Result<u64, Errno>) {
        let flight = self.flights.get(key);
        let (lane, tag) = (flight.lane, flight.tag);
        self.take_back(lane, tag);
        let flight = self.flights.get(key);
        match flight.fell_short(result) {
            Next::Again => {
                one_more(&self.counts.retries);
                self.send(key);
            }
            Next::Later(ns) => {
                one_more(&self.counts.retries);
                self.ring.after(key, ns);
            }
            Next::Failed(errno) => {
                let to = flight.to;
                self.flights.release(key);
                let Lane { jobs, live, .. } = &mut self.lanes[usize::from(lane)];
                let job = &mut jobs[usize::from(tag)];
                job.fail(errno);
                if let Some(live) = live {
                    live.failed(job, to, errno);
                }
                self.settle(lane, tag, 1);
            }
        }
    }

    /// Takes note that `landed` flights of a request are over. What follows when nothing of it is
    /// out any more: its end, or its next pass.
    #[inline(always)]
    pub(crate) fn settle(&mut self, lane: u16, tag: u16, landed: u32) {
        let Worker { ring, lanes, counts, slow, busy, .. } = self;
        let Lane { export, jobs, .. } = &mut lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        job.flying -= landed;
        if job.flying > 0 {
            return;
        }
        if slow.is_some() {
            return self.settle_live(lane, tag);
        }
        if !job.is_over() {
            return self.waiting.push_back((lane, tag));
        }
        if job.errno.is_some() {
            return self.finish(lane, tag);
        }
        debug_assert!(job.active, "tag {tag} finished twice");
        job.active = false;
        *busy -= 1;
        counts.finished(job.io.op);
        if job.is_ahead {
            return self.went_ahead(lane, tag);
        }
        export.finish(ring, tag, &job.io, Ok(()));
    }

    /// As `settle`, where a layer may have to do something first. What layers ask themselves is not
    /// counted as requests.
    #[inline(never)]
    fn settle_live(&mut self, lane: u16, tag: u16) {
        if self.needs_slow(lane, tag) {
            return;
        }
        let Lane { export, jobs, live, is_inner, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        if !job.is_over_with_care() {
            return self.waiting.push_back((lane, tag));
        }
        if let Some(live) = live {
            live.ended(tag, job);
        }
        if !*is_inner {
            return self.finish(lane, tag);
        }
        job.active = false;
        self.busy -= 1;
        let result = job.errno.take().map_or(Ok(()), Err);
        export.finish(&mut self.ring, tag, &job.io, result);
    }

    /// Ends a request, done or failed.
    #[inline(never)]
    fn finish(&mut self, lane: u16, tag: u16) {
        let Lane { export, jobs, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        debug_assert!(job.active, "tag {tag} finished twice");
        job.active = false;
        self.busy -= 1;
        self.counts.finished(job.io.op);
        let result = match job.errno.take() {
            None => Ok(()),
            Some(errno) => {
                one_more(&self.counts.errors);
                Err(errno.for_client())
            }
        };
        export.finish(&mut self.ring, tag, &job.io, result);
    }

    fn arm_tick(&mut self) {
        if !self.watch.armed {
            self.watch.armed = true;
            self.ring.after(TICK_KEY, TICK_NS);
        }
    }

    /// A tick has found nothing to do. If that was so ever since the last one, the memory of each
    /// lane whose export holds nothing in it is given back. Only at the end of a turn: no event is
    /// left then whose data has not been looked at.
    fn rest(&mut self) {
        let finished = self.counts.read().requests;
        let is_idle = std::mem::replace(&mut self.watch.finished, finished) == finished;
        let mut again = !is_idle;
        if is_idle {
            for (lane, of) in (0..).zip(&mut self.lanes) {
                let rest = of.export.rest(&mut self.ring);
                again |= rest != Rest::Now;
                if rest != Rest::Keep {
                    self.ring.rest(lane);
                }
            }
        }
        if again {
            self.arm_tick();
        }
    }

    fn tick(&mut self) {
        self.watch.armed = false;
        self.watch.ticked = true;
        self.watch.tick = self.watch.tick.wrapping_add(1);
        for (index, lane) in self.lanes.iter().enumerate() {
            for (tag, job) in lane.jobs.iter().enumerate().filter(|(_, job)| job.active) {
                if self.watch.is_due(job.since) {
                    one_more(&self.counts.stuck);
                    (self.watch.on_stuck)(&Stuck {
                        lane: u16::try_from(index).unwrap_or(u16::MAX),
                        tag: u16::try_from(tag).unwrap_or(u16::MAX),
                        io: job.io,
                        flying: job.flying,
                        seconds: self.watch.tick.wrapping_sub(job.since),
                    });
                }
            }
        }
    }
}

impl<R: Ring> Takes<R> for Worker<R> {
    #[inline(always)]
    fn ring(&mut self) -> &mut R {
        &mut self.ring
    }

    #[inline(always)]
    fn take(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Splice { key, result } => self.landed(key, result),
            Event::Timer { key: TICK_KEY } => self.tick(),
            Event::Timer { key: SECOND_TICK_KEY } => self.second_tick(),
            Event::Timer { key } if is_sleep_key(key) => self.slept(key),
            Event::Timer { key } => self.send(key),
            Event::Woken => {}
            Event::Export { lane, completion } => {
                let export = &mut self.lanes[usize::from(lane)].export;
                return export.event(&mut self.ring, completion, &mut self.inbox);
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn take_other(&mut self, event: Event) -> Result<()> {
        self.take(event)
    }
}

impl<R: Ring> Drop for Worker<R> {
    fn drop(&mut self) {
        self.counts.set_ring(self.ring.counts());
    }
}
