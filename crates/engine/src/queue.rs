//! Answers for the life of requests on one I/O thread: events in, routing, splices, finish.
//!
//! [`Worker::turn`] is the whole of it: take a batch of events, start what arrived, enter once.

use std::collections::VecDeque;
use std::sync::Arc;

use devsplice_core::{Errno, Result, Stack, Stop};

use crate::counts::{Counts, Shared};
use crate::export::{Export, Inbox, Request};
use crate::flights::{self, Flights, Next};
use crate::gather::Gather;
use crate::jobs::Job;
use crate::live::{LaneLive, SlowSide, is_sleep_key};
use crate::ring::{Event, FileId, Ring};
use crate::served::Served;
use crate::watch::{OnStuck, Stuck, TICK_KEY, TICK_NS, Watch};

/// Pieces routed for one request before others get their turn: a discard of a whole device over a
/// narrow stripe has millions.
const PIECES_A_PASS: u32 = 1024;

/// One queue of an export with the stack that serves it.
pub struct Lane<R: Ring> {
    export: Box<dyn Export<R>>,
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
    inbox: Inbox,
    /// Requests with pieces left to route and none out, in the order they came to wait.
    waiting: VecDeque<(u16, u16)>,
    pub(crate) busy: u32,
    pub(crate) counts: Counts,
    shared: Arc<Shared>,
    pub(crate) watch: Watch,
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
            inbox: Inbox::with_capacity(tags),
            waiting: VecDeque::with_capacity(tags),
            busy: 0,
            counts: Counts::default(),
            shared,
            watch: Watch { tick: 0, armed: false, limit: stuck_seconds, on_stuck },
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
        while let Some(event) = self.ring.next() {
            match event {
                Event::Splice { key, result } => self.landed(key, result),
                Event::Timer { key: TICK_KEY } => self.tick(),
                Event::Timer { key } if is_sleep_key(key) => self.slept(key),
                Event::Timer { key } => self.send(key),
                Event::Woken => {}
                Event::Export { lane, completion } => {
                    let export = &mut self.lanes[usize::from(lane)].export;
                    export.event(&mut self.ring, completion, &mut self.inbox)?;
                }
            }
        }
        for _ in 0..self.waiting.len() {
            self.resume();
        }
        while let Some((lane, request)) = self.inbox.pop() {
            self.start(lane, request);
        }
        self.slow_turn();
        self.counts.set_ring(self.ring.counts());
        self.shared.publish(&self.counts);
        let is_closed = self.busy == 0 && self.lanes.iter().all(|lane| lane.export.is_closed());
        if is_closed && self.is_at_rest() {
            self.ring.enter(false)?;
            return Ok(false);
        }
        if self.busy > 0 && !self.watch.armed {
            self.watch.armed = true;
            self.ring.after(TICK_KEY, TICK_NS);
        }
        let can_go_on = !self.waiting.is_empty() && !self.flights.is_full();
        self.ring.enter(!can_go_on)?;
        Ok(true)
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

    fn start(&mut self, lane: u16, request: Request) {
        let Lane { stack, jobs, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(request.tag)];
        assert!(!job.active, "export handed out tag {} twice", request.tag);
        job.begin((request.io, request.pages), stack.root(), self.watch.tick);
        self.busy += 1;
        match stack.admit(&request.io) {
            Ok(()) => self.route(lane, request.tag),
            Err(errno) => self.refuse(lane, request.tag, errno),
        }
    }

    /// Ends a request of which nothing is out with an error that is nobody's to mend.
    pub(crate) fn refuse(&mut self, lane: u16, tag: u16, errno: Errno) {
        let job = &mut self.lanes[usize::from(lane)].jobs[usize::from(tag)];
        job.fail(errno);
        job.refused = true;
        self.settle(lane, tag);
    }

    /// One pass of a request of which nothing is out: routes it as far as the tables allow and
    /// sends what was gathered. The next pass follows when all of it has landed: then neighbours
    /// find each other, which they would not if each flight that lands made room for one piece, and
    /// no request takes more of the table than one pass.
    pub(crate) fn route(&mut self, lane: u16, tag: u16) {
        let Lane { stack, jobs, files, live, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        if let Some(live) = live {
            job.phase = Some(live.served.begin(&live.shard));
            if job.careful.is_some() {
                return self.route_carefully(lane, tag);
            }
        }
        let mut gather = Gather::new();
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
            if !gather.join(&mut self.flights, to, &piece) {
                let key = if gather.is_full() { None } else { self.flights.take() };
                let Some(key) = key else {
                    job.held = Some(piece);
                    break;
                };
                let flight = self.flights.get(key);
                flight.start((lane, tag), (job.io.op, job.io.fua), to, &piece);
                job.flying += 1;
                gather.open(key);
            }
            self.counts.pieces += 1;
        }
        let (keys, count) = gather.take();
        if count == 0 {
            return self.settle(lane, tag);
        }
        for key in &keys[..count] {
            self.counts.splices += 1;
            self.dispatch(*key);
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

    /// What follows when nothing of a request is out any more: its end, or its next pass.
    pub(crate) fn settle(&mut self, lane: u16, tag: u16) {
        let Lane { jobs, live, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        if let Some(live) = live {
            if let Some(phase) = job.phase.take() {
                live.served.end(&live.shard, phase);
            }
            if self.needs_slow(lane, tag) {
                return;
            }
        }
        let job = &self.lanes[usize::from(lane)].jobs[usize::from(tag)];
        if job.is_over() {
            self.finish(lane, tag);
        } else {
            self.waiting.push_back((lane, tag));
        }
    }

    pub(crate) fn send(&mut self, key: u32) {
        let flight = self.flights.get(key);
        if flight.is_void() {
            let len = flight.len;
            return self.landed(key, Ok(len));
        }
        let job = &self.lanes[usize::from(flight.lane)].jobs[usize::from(flight.tag)];
        self.ring.splice(key, &flight.splice(job.pages));
    }

    fn landed(&mut self, key: u32, result: Result<u64, Errno>) {
        let flight = self.flights.get(key);
        let (lane, tag) = (flight.lane, flight.tag);
        let result = match flight.landed(result) {
            Next::Again => {
                self.counts.retries += 1;
                return self.send(key);
            }
            Next::Later(ns) => {
                self.counts.retries += 1;
                return self.ring.after(key, ns);
            }
            Next::Done(result) => result,
        };
        let probes = flight.wait.probes();
        if probes != 0 && result.is_ok() {
            let (op, (sent_ns, len)) = (flight.op, flight.sent);
            let ns = self.ring.now_ns().saturating_sub(sent_ns);
            self.lanes[usize::from(lane)].stack.record(probes, op, len, ns);
        }
        self.flights.release(key);
        let job = &mut self.lanes[usize::from(lane)].jobs[usize::from(tag)];
        job.flying -= 1;
        if let Err(errno) = result {
            job.fail(errno);
        }
        if job.flying == 0 {
            self.settle(lane, tag);
        }
    }

    fn finish(&mut self, lane: u16, tag: u16) {
        let Lane { export, jobs, is_inner, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        debug_assert!(job.active, "tag {tag} finished twice");
        job.active = false;
        job.careful = None;
        self.busy -= 1;
        let result = job.errno.map_or(Ok(()), |errno| Err(errno.for_client()));
        if !*is_inner {
            self.counts.finished(job.io.op, result.is_ok());
        }
        export.finish(&mut self.ring, tag, &job.io, result);
    }

    fn tick(&mut self) {
        self.watch.armed = false;
        self.watch.tick = self.watch.tick.wrapping_add(1);
        for (index, lane) in self.lanes.iter().enumerate() {
            for (tag, job) in lane.jobs.iter().enumerate().filter(|(_, job)| job.active) {
                if self.watch.is_due(job.since) {
                    self.counts.stuck += 1;
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

impl<R: Ring> Drop for Worker<R> {
    fn drop(&mut self) {
        self.counts.set_ring(self.ring.counts());
        self.shared.publish(&self.counts);
    }
}
