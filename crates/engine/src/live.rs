//! Answers for live layers on an I/O thread: requests that miss or fail wait here while a layer
//! resolves or sees to it; what runs beside requests; the end of a device.

use std::rc::Rc;
use std::sync::Arc;

use devsplice_core::trace::Trace;
use devsplice_core::{Errno, Io, Meta, NodeId, Op, Result, Slow, Stack, Stop};

use crate::counts::one_more;
use crate::desk::{self, Desk, Inner, SharedDesk};
use crate::flights;
use crate::jobs::{Careful, Job, Lost, known};
use crate::queue::{Lane, Worker};
use crate::ring::{Pages, Ring, To};
use crate::served::{Served, Shard, Wake};
use crate::slow::{Executor, Hand, Purpose, see_to_all};

/// Times that a failed request is routed again after a layer has seen to its failure.
const MAX_ROUNDS: u8 = 24;
/// Failures of one pass that layers are told of; with more of them they are told before its end.
const MOST_FAILURES: usize = 256;
/// Timer keys of sleepers: these many below the watchdog's.
const SLEEP_KEYS: u32 = 8;
/// The first of them.
const FIRST_SLEEP_KEY: u32 = u32::MAX - SLEEP_KEYS;

/// What a lane over live layers needs.
pub(crate) struct LaneLive {
    pub(crate) served: Arc<Served>,
    shard: Arc<Shard>,
    desks: Desks,
    /// Whether a layer may see to failures.
    pub(crate) guarded: bool,
}

/// The desks of one stack on a thread: one for each level, which is how many live layers lie over
/// the one that asks. An order has a tag of its level to its end, and what it waits for below is of
/// the levels behind; so no order waits for a tag that waits for it.
type Desks = Arc<[SharedDesk]>;

/// The live side of one device on this thread.
struct Side {
    served: Arc<Served>,
    desks: Desks,
    /// The inner lane of the first desk; the others follow.
    lane: u16,
    is_home: bool,
    has_left: bool,
}

/// The slow work of a thread.
pub(crate) struct SlowSide {
    executor: Executor,
    sides: Vec<Side>,
    /// When each timer for sleepers fires; 0 for one that is free.
    timers: [u64; SLEEP_KEYS as usize],
    stopping: bool,
}

/// Whether a timer is a sleeper's.
pub(crate) fn is_sleep_key(key: u32) -> bool {
    (FIRST_SLEEP_KEY..u32::MAX).contains(&key)
}

impl LaneLive {
    fn hand(&self, node: NodeId) -> Rc<dyn Meta> {
        hand(&self.served, &self.desks, node)
    }

    /// A request of which nothing is out: what is to be done about its failures, if anything. The
    /// first time it fails it is routed again with care, one piece at a time, so that it is known
    /// who sent what where; what is lost is not sent again, but counts as failed. At the end of
    /// such a pass the layers above each failure are told.
    fn care(&self, stack: &Stack, job: &mut Job) -> Option<Slow> {
        let (io, node) = (job.routed(), job.node);
        let Some(careful) = &mut job.careful else {
            job.errno.take()?;
            let trace = Trace::new(node, io);
            job.careful = Some(Box::new(Careful { trace, failures: Vec::new(), rounds: 0 }));
            return Some(Box::pin(std::future::ready(Ok(()))));
        };
        if let Some(errno) = job.errno.take() {
            careful.failures.push((careful.trace.steps().copied().collect(), errno));
        }
        let is_over = careful.trace.is_done() || careful.failures.len() >= MOST_FAILURES;
        if !is_over || careful.failures.is_empty() || job.held.is_some() {
            return None;
        }
        job.lost.clear();
        careful.rounds += 1;
        let give_up = careful.rounds > MAX_ROUNDS;
        let failures = std::mem::take(&mut careful.failures);
        let told = failures.into_iter().map(|(steps, errno)| {
            let concerned = steps.into_iter().filter_map(|step| {
                let layer = stack.live(step.node).filter(|layer| layer.sees_to_failures())?;
                Some((layer.clone(), (step.io, step.port), self.hand(step.node)))
            });
            (concerned.collect(), errno)
        });
        Some(see_to_all(told.collect(), give_up))
    }

    /// A splice of a request has failed for good.
    pub(crate) fn failed(&self, job: &mut Job, to: To, errno: Errno) {
        if self.guarded && job.is_durable() {
            job.lose(Lost::At(to), errno);
        }
        self.unsettle(job);
    }

    /// A request has failed, and the layers concerned are still to be told.
    fn unsettle(&self, job: &mut Job) {
        // A flush, too: what it was told is not told again to who flushes next.
        if job.io.op != Op::Read && !std::mem::replace(&mut job.unsettled, true) {
            self.served.unsettle();
        }
    }

    /// A request is about to be routed. It counts as under way until nothing that a layer has
    /// answered is held any more.
    #[inline]
    pub(crate) fn begin(&self, tag: u16, job: &mut Job) {
        if job.since_epoch == 0 {
            job.since_epoch = self.served.epoch();
        } else if !job.is_waiting {
            return;
        }
        job.is_waiting = false;
        self.shard.goes(tag, job.since_epoch);
    }

    /// A request waits for a layer, and goes on from there.
    fn waits(&self, tag: u16, job: &mut Job, at: NodeId) {
        job.is_waiting = true;
        self.served.waits(&self.shard, (tag, job.since_epoch), at);
    }

    fn end(&self, tag: u16, job: &mut Job) {
        let epoch = std::mem::take(&mut job.since_epoch);
        job.is_waiting = false;
        if epoch != 0 {
            self.served.end(&self.shard, (tag, epoch));
        }
    }

    /// A request has ended.
    pub(crate) fn ended(&self, tag: u16, job: &mut Job) {
        self.end(tag, job);
        job.careful = None;
        job.lost.clear();
        if std::mem::take(&mut job.unsettled) {
            self.served.settled();
        }
    }
}

fn hand(served: &Arc<Served>, desks: &Desks, node: NodeId) -> Rc<dyn Meta> {
    // A desk was made for each level that a live layer is at.
    let level = served.stack.live_level(node).min(desks.len() - 1);
    Rc::new(Hand { served: served.clone(), desk: desks[level].clone(), node })
}

impl<R: Ring> Worker<R> {
    /// Gives each live stack among `lanes` its inner lanes, behind those of the exports.
    pub(crate) fn make_live(ring: &mut R, lanes: &mut Vec<Lane<R>>) -> Option<Box<SlowSide>> {
        let lives = |lane: &Lane<R>| lane.served.stack.lives().next().is_some();
        if !lanes.iter().any(lives) {
            return None;
        }
        let wake: Wake = ring.wake();
        let mut sides: Vec<Side> = Vec::new();
        for index in 0..lanes.len() {
            let served = lanes[index].served.clone();
            if !lives(&lanes[index]) {
                continue;
            }
            let known = sides.iter().position(|side| Arc::ptr_eq(&side.served, &served));
            let place = known.unwrap_or_else(|| {
                let is_home = served.join(&wake);
                let lane = u16::try_from(lanes.len()).unwrap_or(u16::MAX);
                let desks: Desks = (0..served.stack.live_levels()).map(|_| Desk::new()).collect();
                for (desk, lane) in desks.iter().zip(lane..) {
                    let inner = Inner { desk: desk.clone(), lane };
                    let files = lanes[index].files.clone();
                    let mut inner = Lane::new(Box::new(inner), served.clone(), files);
                    inner.live = Some(LaneLive::new(&served, &desks, inner.jobs.len()));
                    inner.is_inner = true;
                    lanes.push(inner);
                }
                sides.push(Side { served: served.clone(), desks, lane, is_home, has_left: false });
                sides.len() - 1
            });
            let depth = lanes[index].jobs.len();
            lanes[index].live = Some(LaneLive::new(&served, &sides[place].desks, depth));
        }
        let timers = [0; SLEEP_KEYS as usize];
        Some(Box::new(SlowSide { executor: Executor::new(wake), sides, timers, stopping: false }))
    }

    /// Starts what live layers do in the background.
    pub(crate) fn start_background(&mut self) {
        let Some(slow) = &mut self.slow else { return };
        for side in slow.sides.iter().filter(|side| side.is_home) {
            for (node, _, live) in side.served.stack.lives() {
                let hand = side.hand(node);
                slow.executor.spawn(Purpose::Background, live.clone().run(hand));
            }
        }
    }

    /// Lets slow work go on as far as it can without anything new from the kernel.
    pub(crate) fn slow_turn(&mut self) {
        let Some(mut slow) = self.slow.take() else { return };
        let now_ns = self.ring.now_ns();
        for side in &slow.sides {
            side.desks.iter().for_each(|desk| desk::lock(desk).now_ns = now_ns);
            if side.is_home && !slow.stopping {
                while let Some(letter) = side.served.next_letter() {
                    slow.executor.spawn(Purpose::Background, side.answer(letter));
                }
            }
        }
        slow.set_timers(&mut self.ring, now_ns);
        loop {
            let mut quiet = true;
            while let Some(ended) = slow.executor.poll() {
                quiet = false;
                if let Some((Purpose::Request(lane, tag), result)) = ended {
                    self.slow = Some(slow);
                    self.slow_done(lane, tag, result);
                    slow = match self.slow.take() {
                        Some(slow) => slow,
                        None => return,
                    };
                }
            }
            for side in 0..slow.sides.len() {
                let (desks, first) = (slow.sides[side].desks.clone(), slow.sides[side].lane);
                for (desk, lane) in desks.iter().zip(first..) {
                    self.slow = Some(slow);
                    quiet &= self.start_orders(desk, lane);
                    slow = match self.slow.take() {
                        Some(slow) => slow,
                        None => return,
                    };
                }
            }
            if quiet {
                break;
            }
        }
        slow.set_timers(&mut self.ring, now_ns);
        self.slow = Some(slow);
    }

    /// Starts what layers have asked for, as far as there are tags; whether there was nothing.
    fn start_orders(&mut self, desk: &SharedDesk, lane: u16) -> bool {
        let mut quiet = true;
        loop {
            let next = desk::lock(desk).next();
            let Some((tag, node, io)) = next else { return quiet };
            quiet = false;
            let bytes = desk::lock(desk).take_bytes(tag);
            if !bytes.is_empty() {
                self.ring.put(lane, tag, &bytes);
            }
            let pages = self.ring.inner_pages(lane, tag);
            let stack = &self.lanes[usize::from(lane)].stack;
            let refused = stack.admit_at(node, &io).err();
            self.start_at((lane, tag), (io, pages), node, refused);
        }
    }

    /// A request that enters its stack at a place, unless it is refused.
    pub(crate) fn start_at(
        &mut self,
        (lane, tag): (u16, u16),
        (io, pages): (Io, Pages),
        node: NodeId,
        refused: Option<Errno>,
    ) {
        let job = &mut self.lanes[usize::from(lane)].jobs[usize::from(tag)];
        job.take((io, pages), self.watch.tick);
        job.node = node;
        job.restart();
        self.busy += 1;
        match refused {
            Some(errno) => self.refuse(lane, tag, errno),
            None => self.route(lane, tag),
        }
    }

    /// A sleepers' timer has fired.
    pub(crate) fn slept(&mut self, key: u32) {
        if let Some(slow) = &mut self.slow {
            slow.timers[(key - FIRST_SLEEP_KEY) as usize] = 0;
        }
    }

    /// Nothing of a request is out, and a layer must do something before it can go on: whether so.
    pub(crate) fn needs_slow(&mut self, lane: u16, tag: u16) -> bool {
        let Lane { stack, jobs, live, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        let (Some(live), Some(slow)) = (live, &mut self.slow) else { return false };
        if job.refused {
            return false;
        }
        let work = match job.missed.take() {
            Some((node, io)) => {
                let Some(layer) = stack.live(node) else { return false };
                one_more(&self.counts.misses);
                job.resolving = Some((node, io));
                live.waits(tag, job, node);
                layer.clone().resolve(io, live.hand(node))
            }
            None if live.guarded => {
                if job.errno.is_some() {
                    live.unsettle(job);
                }
                let Some(work) = live.care(stack, job) else { return false };
                live.end(tag, job);
                work
            }
            None => return false,
        };
        slow.executor.spawn(Purpose::Request(lane, tag), work);
        true
    }

    /// What a request waited for is done. One that missed goes on where it stood, at once: what the
    /// layer has let it know is for this request alone.
    fn slow_done(&mut self, lane: u16, tag: u16, result: Result<(), Errno>) {
        let Lane { jobs, live, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        let missed = job.resolving.take();
        match (result, missed, live) {
            (Ok(()), Some(_), _) => self.route(lane, tag),
            (Ok(()), None, _) => {
                job.restart();
                self.route(lane, tag);
            }
            (Err(errno), Some((node, io)), Some(live)) if live.guarded => {
                live.unsettle(job);
                match &mut job.careful {
                    Some(careful) => {
                        careful.trace.skip();
                        job.errno = Some(errno);
                    }
                    None => {
                        job.lose(Lost::Missed(node, io), errno);
                        job.fail(errno);
                    }
                }
                self.settle(lane, tag, 0);
            }
            (Err(errno), ..) => {
                job.errno = None;
                self.refuse(lane, tag, errno);
            }
        }
    }

    /// Sends the next piece of a request that is routed with care.
    pub(crate) fn route_carefully(&mut self, lane: u16, tag: u16) {
        let Lane { stack, jobs, files, .. } = &mut self.lanes[usize::from(lane)];
        let job = &mut jobs[usize::from(tag)];
        let Some(careful) = &mut job.careful else { return };
        let piece = match job.held.take() {
            Some(held) => Some(held),
            None => careful.trace.next(stack),
        };
        match piece {
            None => {}
            Some(Err(Stop::Error(errno))) => job.errno = Some(errno),
            Some(Err(Stop::Miss(node, io))) => match known(&job.lost, Lost::Missed(node, io)) {
                None => job.missed = Some((node, io)),
                Some(errno) => {
                    careful.trace.skip();
                    job.errno = Some(errno);
                }
            },
            Some(Ok(piece)) => {
                let to = flights::place(&piece, files);
                if let Some(errno) = known(&job.lost, Lost::At(to)) {
                    job.errno = Some(errno);
                    return self.settle(lane, tag, 0);
                }
                let Some(key) = self.flights.take() else {
                    job.held = Some(Ok(piece));
                    return self.settle(lane, tag, 0);
                };
                self.flights.get(key).start((lane, tag), job.what(), to, &piece);
                job.flying = 1;
                one_more(&self.counts.pieces);
                one_more(&self.counts.splices);
                return self.dispatch(key);
            }
        }
        self.settle(lane, tag, 0);
    }

    /// All exports are closed and no request of theirs is left: whether live layers are done as
    /// well. What they do in the background is not waited for: it is told, and left where it
    /// sleeps.
    pub(crate) fn is_at_rest(&mut self) -> bool {
        let is_idle = self.busy == 0;
        let Some(slow) = &mut self.slow else { return is_idle };
        if !slow.stopping {
            if is_idle {
                for side in slow.sides.iter_mut().filter(|side| !side.is_home && !side.has_left) {
                    side.has_left = true;
                    side.served.leave();
                }
            }
            // What runs in the background goes on for the others: a request of theirs may wait for
            // it.
            if slow.sides.iter().any(|side| side.is_home && !side.served.is_alone()) {
                return false;
            }
            if !is_idle {
                let homes = slow.sides.iter().filter(|side| side.is_home);
                homes.for_each(|side| side.served.end_soon());
                return false;
            }
            slow.executor.drop_background();
            slow.stopping = true;
            for side in slow.sides.iter().filter(|side| side.is_home) {
                side.served.drop_mail();
                slow.executor.spawn(Purpose::Stop, side.stop());
            }
            self.slow_turn();
        }
        let is_over = |slow: &SlowSide| !slow.executor.has(Purpose::Stop);
        self.busy == 0 && self.slow.as_deref().is_none_or(is_over)
    }
}

impl LaneLive {
    fn new(served: &Arc<Served>, desks: &Desks, depth: usize) -> LaneLive {
        let guarded = served.stack.lives().any(|(_, _, live)| live.sees_to_failures());
        let shard = Shard::new(depth);
        served.add(&shard);
        LaneLive { served: served.clone(), shard, desks: desks.clone(), guarded }
    }
}

impl Side {
    fn hand(&self, node: NodeId) -> Rc<dyn Meta> {
        hand(&self.served, &self.desks, node)
    }

    /// Has a layer carry out a command and sends its answer.
    fn answer(&self, letter: crate::served::Letter) -> Slow {
        let hand = self.hand(letter.node);
        let live = self.served.stack.live(letter.node).cloned();
        Box::pin(async move {
            let answer = match live {
                None => Err("this layer takes no commands".to_owned()),
                Some(live) => match live.command(letter.words, hand).await {
                    Ok(answer) => answer,
                    Err(errno) => Err(errno.to_string()),
                },
            };
            // Whoever asked may have gone.
            let _ = letter.reply.send(answer);
            Ok(())
        })
    }

    /// Ends the layers one after another from the top, since each may still use those below it.
    fn stop(&self) -> Slow {
        let mut layers: Vec<_> = self
            .served
            .stack
            .lives()
            .map(|(node, name, live)| (name.to_owned(), live.clone(), self.hand(node)))
            .collect();
        layers.reverse();
        let served = self.served.clone();
        Box::pin(async move {
            for (name, live, hand) in layers {
                if let Err(errno) = live.stop(hand).await {
                    served.event(format!("{name}: not stopped cleanly: {errno}"));
                }
            }
            Ok(())
        })
    }
}

impl SlowSide {
    /// Wakes sleepers, and sees to it that the next one is woken in time.
    fn set_timers<R: Ring>(&mut self, ring: &mut R, now_ns: u64) {
        let desks = self.sides.iter().flat_map(|side| &*side.desks);
        let due = desks.filter_map(|desk| desk::lock(desk).wake_sleepers()).min();
        let Some(due) = due else { return };
        let armed = self.timers.iter().filter(|at| **at != 0).min();
        if armed.is_some_and(|armed| *armed <= due) {
            return;
        }
        // Each timer that is armed is sooner than those before it, so a free one is found unless
        // the soonest of all is soon anyway.
        if let Some(free) = self.timers.iter().position(|at| *at == 0) {
            self.timers[free] = due;
            let key = FIRST_SLEEP_KEY + u32::try_from(free).unwrap_or(0);
            ring.after(key, (due - now_ns).max(1));
        }
    }
}
