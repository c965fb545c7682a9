//! Answers for live layers: misses are resolved before a request goes on, failures are seen to,
//! grace holds, work in the background ends with the device, commands are answered.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::*;
use devsplice_core::prelude::*;
use devsplice_core::{Map, Op, StackBuilder};

/// Bytes for which there is one thing to learn.
const REGION: u64 = 16 << 10;

/// What the layer knows: two legs and a journal, of which a region must be told before it is used.
#[derive(Default)]
struct State {
    known: Mutex<BTreeSet<u64>>,
    /// Bit n: leg n has failed.
    failed: AtomicU32,
    resolves: AtomicU64,
    ticks: AtomicU64,
    stopped: AtomicBool,
    /// Everything misses.
    closed: AtomicBool,
    graces: AtomicU64,
}

struct Learner(Arc<State>);

const JOURNAL: Port = Port(2);

impl Layer for Learner {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        Limits::stack(below.limits(), below.limits()[0].size)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        let len = len.min(REGION - at % REGION);
        if self.0.closed.load(Ordering::SeqCst)
            || !self.0.known.lock().unwrap().contains(&(at / REGION))
        {
            return Ok(Map::Miss);
        }
        let ports = 0b11 & !self.0.failed.load(Ordering::SeqCst);
        if io.op == Op::Read {
            let port = Port(u16::try_from(ports.trailing_zeros()).unwrap());
            return Ok(Map::To { len, port, at });
        }
        Ok(Map::Some { len, at, ports })
    }

    fn flush(&self) -> Result<Map, Errno> {
        Ok(Map::Some { len: 0, at: 0, ports: 0b11 & !self.0.failed.load(Ordering::SeqCst) })
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        Some(self.0.clone())
    }
}

impl Live for State {
    fn resolve(self: Arc<Self>, io: Io, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            self.resolves.fetch_add(1, Ordering::SeqCst);
            let region = io.extent.at / REGION;
            let mut block = vec![0; 512];
            block[..8].copy_from_slice(&region.to_le_bytes());
            meta.write(JOURNAL, region * 512, block.clone(), true).await?;
            meta.sleep(10_000).await?;
            assert_eq!(meta.read(JOURNAL, region * 512, 512).await?, block);
            self.known.lock().unwrap().insert(region);
            // Whoever closes opens again; a write that waits tries again meanwhile.
            while self.closed.load(Ordering::SeqCst) {
                meta.sleep(50_000).await?;
            }
            Ok(())
        })
    }

    fn failed(self: Arc<Self>, io: Io, port: Port, errno: Errno, meta: Rc<dyn Meta>) -> Slow {
        // A change that failed is not over before somebody has seen to it, and grace does not wait
        // for it: this is how a layer knows.
        assert!(!io.op.changes() || meta.is_unsettled());
        Box::pin(async move {
            let failed = self.failed.load(Ordering::SeqCst) | 1 << port.0;
            if failed & 0b11 == 0b11 {
                return Err(errno);
            }
            meta.write(JOURNAL, 1 << 19, vec![port.0 as u8; 512], true).await?;
            self.failed.store(failed, Ordering::SeqCst);
            meta.event(format!("leg {} dropped", port.0));
            Ok(())
        })
    }

    fn sees_to_failures(&self) -> bool {
        true
    }

    fn run(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            loop {
                meta.sleep(300_000).await?;
                self.ticks.fetch_add(1, Ordering::SeqCst);
                self.closed.store(true, Ordering::SeqCst);
                meta.grace().await?;
                self.graces.fetch_add(1, Ordering::SeqCst);
                self.closed.store(false, Ordering::SeqCst);
            }
        })
    }

    fn stop(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            assert!(!meta.is_unsettled(), "every request has ended");
            meta.write(JOURNAL, (1 << 20) - 512, vec![7; 512], true).await?;
            self.stopped.store(true, Ordering::SeqCst);
            Ok(())
        })
    }

    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        meta: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        Box::pin(async move {
            meta.copy(Port(0), vec![Port(1)], 0, 4096).await?;
            Ok(Ok(words.join("-")))
        })
    }
}

fn learner(state: &Arc<State>) -> Arc<devsplice_core::Stack> {
    let mut builder = StackBuilder::new();
    let ports: Vec<_> =
        (0..3).map(|_| builder.backend("disk", Limits::ideal(MIB)).unwrap().0).collect();
    let layer = Box::new(Learner(state.clone()));
    let top = builder.layer("learner", layer, &ports, &mut |_, _, _| Ok(())).unwrap();
    Arc::new(builder.finish(top))
}

fn over_learner(state: &Arc<State>, plan: Vec<Ask>, seed: u64) -> Setup {
    let base = setup(disk(), ideal(MIB), plan);
    Setup { stack: learner(state), seed, ..base }
}

fn bad(file: u16, fault: Fault, times: u32) -> Bad {
    Bad { file, from: 0, to: MIB, fault, times }
}

#[test]
fn misses_are_resolved_once_a_region_and_the_data_is_right() {
    for seed in 0..30 {
        let state = Arc::new(State::default());
        let plan = mix(&mut Rng::new(seed), MIB, 300);
        let outcome = over_learner(&state, plan, seed).run();
        outcome.all_succeed();
        assert!(outcome.counts.misses > 0 && state.resolves.load(Ordering::SeqCst) > 0);
        assert!(state.stopped.load(Ordering::SeqCst), "stop ran to its end");
        assert!(state.ticks.load(Ordering::SeqCst) > 0, "the background ran");
        assert!(state.graces.load(Ordering::SeqCst) > 0, "grace ended under load");
    }
}

#[test]
fn misses_and_short_and_transient_results_go_together() {
    for seed in 0..30 {
        let state = Arc::new(State::default());
        let plan = mix(&mut Rng::new(seed), MIB, 200);
        let faults = Faults { short: 30, eagain: 20, eintr: 20, bad: vec![] };
        let base = over_learner(&state, plan, seed);
        Setup { faults, flights: 3, ..base }.run().all_succeed();
    }
}

#[test]
fn a_failed_leg_is_dropped_and_no_request_fails() {
    for seed in 0..30 {
        let state = Arc::new(State::default());
        let mut plan = fill(MIB);
        plan.extend(mix(&mut Rng::new(seed), MIB, 200));
        let fault = Fault::Fail(Errno::EIO);
        let faults = Faults {
            bad: vec![bad(u16::from(seed % 2 == 0), fault, u32::MAX)],
            ..Faults::default()
        };
        let base = over_learner(&state, plan, seed);
        let outcome = Setup { faults, ..base }.run();
        outcome.all_succeed();
        assert_eq!(state.failed.load(Ordering::SeqCst), 1 << u32::from(seed % 2 == 0));
    }
}

#[test]
fn a_failure_of_both_legs_is_the_requests_and_ends() {
    let state = Arc::new(State::default());
    let faults = Faults {
        bad: vec![
            bad(0, Fault::Fail(Errno::ENODATA), u32::MAX),
            bad(1, Fault::Fail(Errno::EIO), u32::MAX),
        ],
        ..Faults::default()
    };
    let plan = vec![now(Io::new(Op::Write, 0, 4096)), now(Io::new(Op::Read, 8192, 4096))];
    let base = over_learner(&state, plan, 1);
    let outcome = Setup { faults, ..base }.run();
    assert_eq!(outcome.results().into_iter().filter(Result::is_ok).count(), 0);
}

#[test]
fn metadata_that_cannot_be_written_fails_the_requests_that_need_it() {
    let state = Arc::new(State::default());
    let faults =
        Faults { bad: vec![bad(2, Fault::Fail(Errno::ENOSPC), u32::MAX)], ..Faults::default() };
    let plan = vec![now(Io::new(Op::Write, 0, 4096)), now(Io::new(Op::Read, 8192, 512))];
    let base = over_learner(&state, plan, 1);
    let outcome = Setup { faults, ..base }.run();
    assert_eq!(outcome.results(), [Err(Errno::ENOSPC), Err(Errno::ENOSPC)]);
    assert!(!state.stopped.load(Ordering::SeqCst));
}

#[test]
fn a_request_outside_the_device_is_refused_without_asking_layers() {
    let state = Arc::new(State::default());
    let plan = vec![now(Io::new(Op::Write, MIB, 4096))];
    let outcome = over_learner(&state, plan, 1).run();
    assert_eq!(outcome.results(), [Err(Errno::EINVAL)]);
    assert_eq!(state.resolves.load(Ordering::SeqCst), 0);
}

#[test]
fn a_command_is_answered_while_requests_are_served() {
    let state = Arc::new(State::default());
    let mut setup = over_learner(&state, mix(&mut Rng::new(3), MIB, 100), 3);
    let stack = setup.stack.clone();
    let (node, name, _) = stack.lives().next().unwrap();
    assert_eq!(name, "learner");
    let served = setup.served();
    let answer = served.command(node, vec!["a".into(), "b".into()]);
    setup.run().all_succeed();
    assert_eq!(answer.recv().unwrap(), Ok("a-b".to_owned()));
}

/// The thread that is a device's home has nothing left to do, and another one still serves: what
/// runs in the background must go on, for a request there may wait for it.
#[test]
fn the_background_lives_until_the_last_thread_has_served_its_last_request() {
    for seed in 0..20 {
        let state = Arc::new(State::default());
        let mut first = over_learner(&state, mix(&mut Rng::new(seed), MIB, 5), seed);
        let served = first.served();
        let rest = mix(&mut Rng::new(seed + 100), MIB, 300);
        let mut second = over_learner(&state, rest, seed + 100);
        (second.stack, second.served) = (first.stack.clone(), Some(served));
        let (mut home, mut other) = (first.bench(), second.bench());
        for bench in [&home, &other] {
            bench.world.lock().unwrap().may_sleep = true;
        }
        home.worker.arm().unwrap();
        other.worker.arm().unwrap();
        let (mut home_goes_on, mut other_goes_on) = (true, true);
        // Each has a clock of its own; what one waits for and the other does takes some turns.
        for _ in 0..100_000 {
            home_goes_on = home_goes_on && home.worker.turn().unwrap();
            other_goes_on = other_goes_on && other.worker.turn().unwrap();
            if !home_goes_on && !other_goes_on {
                break;
            }
            assert!(home_goes_on, "the home ended first");
        }
        assert!(!home_goes_on && !other_goes_on, "seed {seed}: it never ends");
        assert!(state.stopped.load(Ordering::SeqCst));
        other.end().all_succeed();
    }
}
