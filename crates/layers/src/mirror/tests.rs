//! Answers for a mirror's background work over devices in memory, where a test says what the engine
//! would say.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::mirror::state::region;

/// What a write is said to take.
const WRITE_NS: u64 = 10;

/// Devices in memory. All that is asked of them is done at once, unless a test has it take turns.
struct Disks {
    limits: Vec<Limits>,
    bytes: RefCell<Vec<Vec<u8>>>,
    /// What a power cut would leave of the log, by port, and how many writes there had been then.
    durable: RefCell<Vec<(u64, Vec<u8>)>>,
    writes: RefCell<Vec<u64>>,
    unsettled: RefCell<bool>,
    now: RefCell<u64>,
    /// Writes to a port that fail from here on.
    bad: RefCell<Vec<(Port, std::ops::Range<u64>)>>,
    /// How many turns the next write or flush takes at most, and what says how many.
    turns: RefCell<(u64, u64)>,
}

impl Disks {
    fn new(count: usize, size: usize) -> Disks {
        let bytes = vec![vec![0; size]; count];
        Disks {
            limits: vec![Limits::ideal(size as u64); count],
            durable: RefCell::new(vec![(0, vec![0; BLOCK]); count]),
            writes: RefCell::new(vec![0; count]),
            bytes: RefCell::new(bytes),
            unsettled: RefCell::new(false),
            now: RefCell::new(0),
            bad: RefCell::default(),
            turns: RefCell::default(),
        }
    }

    fn take_turns(&self) -> Later {
        let (most, seed) = &mut *self.turns.borrow_mut();
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Later((*seed >> 33) % (*most + 1))
    }

    /// Makes durable what was written before, and no more.
    async fn flush(&self, port: Port) {
        let index = usize::from(port.0);
        let log = self.get(port, meta_at(self.limits[index].size).unwrap() + LOG_AT, BLOCK);
        let was = (self.writes.borrow()[index], log);
        self.take_turns().await;
        let durable = &mut self.durable.borrow_mut()[index];
        if was.0 > durable.0 {
            *durable = was;
        }
    }

    fn get(&self, port: Port, at: u64, len: usize) -> Vec<u8> {
        let at = usize::try_from(at).unwrap();
        self.bytes.borrow()[usize::from(port.0)][at..at + len].to_vec()
    }

    fn put(&self, port: Port, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        let all = &mut self.bytes.borrow_mut()[usize::from(port.0)];
        all[at..at + bytes.len()].copy_from_slice(bytes);
        self.writes.borrow_mut()[usize::from(port.0)] += 1;
    }
}

/// Waits for so many turns.
struct Later(u64);

impl Future for Later {
    type Output = ();

    fn poll(mut self: std::pin::Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        match self.0.checked_sub(1) {
            None => Poll::Ready(()),
            Some(left) => {
                self.0 = left;
                Poll::Pending
            }
        }
    }
}

/// As the layer sees them while it is made.
struct Below<'a>(&'a Disks);

impl Lower for Below<'_> {
    fn limits(&self) -> &[Limits] {
        &self.0.limits
    }

    fn read(&mut self, port: Port, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        into.copy_from_slice(&self.0.get(port, at, into.len()));
        Ok(())
    }

    fn write(&mut self, port: Port, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.0.put(port, at, bytes);
        Ok(())
    }
}

fn done<T: 'static>(value: T) -> Slow<T> {
    Box::pin(std::future::ready(Ok(value)))
}

/// As its live side sees them.
struct Lane(Rc<Disks>);

impl Meta for Lane {
    fn read(&self, port: Port, at: u64, len: usize) -> Slow<Vec<u8>> {
        done(self.0.get(port, at, len))
    }

    fn write(&self, port: Port, at: u64, bytes: Vec<u8>, durable: bool) -> Slow {
        let disks = self.0.clone();
        Box::pin(async move {
            disks.take_turns().await;
            *disks.now.borrow_mut() += WRITE_NS;
            if disks.bad.borrow().iter().any(|(bad, range)| *bad == port && range.contains(&at)) {
                return Err(Errno::EIO);
            }
            disks.put(port, at, &bytes);
            if durable {
                // As without FUA: a flush of its own follows.
                disks.flush(port).await;
            }
            Ok(())
        })
    }

    fn flush(&self, port: Port) -> Slow {
        let disks = self.0.clone();
        Box::pin(async move {
            disks.flush(port).await;
            Ok(())
        })
    }

    fn copy(&self, from: Port, to: Vec<Port>, at: u64, len: usize) -> Slow {
        let bytes = self.0.get(from, at, len);
        to.into_iter().for_each(|port| self.0.put(port, at, &bytes));
        done(())
    }

    fn sleep(&self, _: u64) -> Slow {
        done(())
    }

    fn now_ns(&self) -> u64 {
        *self.0.now.borrow()
    }

    fn grace(&self) -> Slow {
        done(())
    }

    fn is_unsettled(&self) -> bool {
        *self.0.unsettled.borrow()
    }

    fn event(&self, _: String) {}
}

/// The result of work that waits for nothing.
fn now<T>(work: impl Future<Output = T>) -> T {
    match std::pin::pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits"),
    }
}

/// A mirror as it is found on these disks.
fn opened(disks: &Disks) -> Arc<State> {
    let mut mirror = Mirror { degraded: true, rate: 0, clean_ns: 1, state: None };
    mirror.open(&mut Below(disks)).unwrap();
    mirror.state.unwrap()
}

/// A mirror whose legs are in sync and clean, in four regions of 64 KiB.
fn in_sync_of(count: usize) -> (Arc<State>, Rc<Disks>, Rc<dyn Meta>) {
    let disks = Rc::new(Disks::new(count, 5 * (64 << 10)));
    let given = [("region".to_owned(), "64k".to_owned())];
    let args = Args::new(DRIVER.name, DRIVER.keys, &given).unwrap();
    format(&args, &mut Below(&disks), false).unwrap();
    let meta: Rc<dyn Meta> = Rc::new(Lane(disks.clone()));
    let state = opened(&disks);
    now(state.settle(&meta)).unwrap();
    now(state.sync_all(&meta)).unwrap();
    now(state.clean(true, &meta)).unwrap();
    assert_eq!(state.sets().in_sync, (1 << count) - 1);
    (state, disks, meta)
}

fn in_sync() -> (Arc<State>, Rc<Disks>, Rc<dyn Meta>) {
    in_sync_of(2)
}

/// What a fresh start would find in the logs.
fn logged(disks: &Disks, index: u64) -> bool {
    opened(disks).state_of(index) == region::UNSYNCED
}

/// A write that failed on one leg has not been told of yet: a grace does not wait for it.
#[test]
fn a_region_is_not_clean_before_every_failed_write_has_ended() {
    let (state, disks, meta) = in_sync();
    assert!(!logged(&disks, 2));
    now(state.mark(2..=2, &meta)).unwrap();
    assert!(logged(&disks, 2) && !logged(&disks, 1));
    *disks.unsettled.borrow_mut() = true;
    for _ in 0..3 {
        assert_eq!(now(state.clean(true, &meta)), Err(Errno::EAGAIN));
        assert_eq!(state.state_of(2), region::DIRTY, "it is no longer busy, and tried again");
        assert!(logged(&disks, 2), "a crash now would leave the legs unequal");
    }
    *disks.unsettled.borrow_mut() = false;
    assert_eq!(now(state.clean(true, &meta)), Ok(false));
    assert_eq!(state.state_of(2), region::CLEAN);
    assert!(!logged(&disks, 2));
}

/// A write that has to have many regions dirty asks again when it has marked the last of them.
#[test]
fn nothing_is_cleaned_while_a_write_marks_its_regions_nor_soon_after() {
    let (state, disks, meta) = in_sync();
    assert!(!state.is_held(meta.now_ns()));
    // Somebody has the log: this one waits for it.
    let mut turn = Box::pin(state.log_turn.take());
    let Poll::Ready(taken) = turn.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
        panic!("nobody has the turn")
    };
    let extent = Extent { at: 0, len: 4 * (64 << 10) };
    let mut waiting = Box::pin(state.mark_for(extent, &meta));
    assert!(waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    assert!(state.is_held(u64::MAX));
    // A write that is given up holds nothing.
    drop(waiting);
    assert!(!state.is_held(meta.now_ns()));
    drop(taken);
    now(state.mark_for(extent, &meta)).unwrap();
    // One block of the log on each leg.
    let (end, took) = (meta.now_ns(), 2 * WRITE_NS);
    assert!(state.is_held(end + 7 * took) && !state.is_held(end + 8 * took));
    assert!((0..4).all(|index| logged(&disks, index)));
}

/// Whether a region's bit is in the log that a power cut would leave on a leg.
fn is_durable(disks: &Disks, port: Port, index: u64) -> bool {
    let mut bits = Bits::new(1);
    bits.add(0, &disks.durable.borrow()[usize::from(port.0)].1);
    bits.get(index)
}

/// Polls whatever `seed` picks until all of it is over.
fn run_mixed(mut work: Vec<Work<'_>>, mut seed: u64) {
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..1_000_000 {
        if work.is_empty() {
            return;
        }
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(7);
        let next = usize::try_from(seed >> 33).unwrap() % work.len();
        if work[next].as_mut().poll(&mut context).is_ready() {
            drop(work.swap_remove(next));
        }
    }
    panic!("it never ends");
}

/// Writes to three regions, one after the other, as the engine does.
async fn write_some(state: &Arc<State>, disks: &Disks, meta: &Rc<dyn Meta>, seed: u64) {
    for index in (seed..seed + 3).map(|index| index % 4) {
        let io = Io::new(Op::Write, index * (64 << 10), 4096);
        let sets = loop {
            match state.map(io) {
                Map::Some { ports, .. } => break ports,
                _ => state.clone().resolve(io, meta.clone()).await.unwrap(),
            }
        };
        for port in state::ports(sets) {
            let is_there = is_durable(disks, port, index);
            assert!(is_there, "leg {}, region {index}, seed {seed}", port.0);
            disks.put(port, io.extent.at, &seed.to_le_bytes());
        }
    }
}

type Work<'a> = std::pin::Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Some write, one cleans, and a leg goes and comes: nobody may rely on what somebody else has
/// written who does not wait for the media, or took back meanwhile.
#[test]
fn no_write_goes_before_its_bit_is_durable_on_every_leg_whoever_writes_the_log() {
    for seed in 0..2000 {
        let (state, disks, meta) = in_sync();
        *disks.turns.borrow_mut() = (6, seed);
        let (state, disks, meta) = (&state, &disks, &meta);
        let cleaner = async move {
            for _ in 0..10 {
                let _ = state.clean(true, meta).await;
                Later(3).await;
            }
        };
        let operator = async move {
            for words in ["fail 1", "add 1", "fail 0", "add 0"] {
                let words = words.split(' ').map(str::to_owned).collect();
                state.clone().command(words, meta.clone()).await.unwrap().unwrap();
                Later(3).await;
                state.sync_all(meta).await.unwrap();
            }
        };
        let mut work: Vec<Work<'_>> = vec![Box::pin(cleaner)];
        if seed % 2 == 0 {
            work.push(Box::pin(operator));
        }
        for number in 0..3 {
            work.push(Box::pin(write_some(state, disks, meta, seed + number)));
        }
        run_mixed(work, seed);
        assert_eq!(state.sets().in_sync, 0b11);
        assert!(disks.get(Port(0), 0, 4 << 16) == disks.get(Port(1), 0, 4 << 16), "seed {seed}");
    }
}

/// A leg comes while a bit is on its way to the disks.
#[test]
fn a_leg_that_is_added_makes_no_region_writable_whose_bit_is_not_durable() {
    let (state, disks, meta) = in_sync();
    assert!(tell(&state, "fail 1", &meta).unwrap().is_ok());
    let mut context = Context::from_waker(Waker::noop());
    let mut turn = Box::pin(state.log_turn.take());
    let Poll::Ready(taken) = turn.as_mut().poll(&mut context) else { panic!("it is free") };
    let mut mark = Box::pin(state.mark(2..=2, &meta));
    assert!(mark.as_mut().poll(&mut context).is_pending());
    drop(taken);
    assert!(tell(&state, "add 1", &meta).unwrap().is_ok());
    let io = Io::new(Op::Write, 2 * (64 << 10), 4096);
    assert_eq!(state.map(io), Map::Miss);
    now(mark).unwrap();
    assert_eq!(state.map(io), Map::Some { len: 4096, at: io.extent.at, ports: 0b11 });
    assert!([Port(0), Port(1)].iter().all(|port| is_durable(&disks, *port, 2)));
}

/// Puts a changed superblock on a leg, over the older of its two.
fn put_super(disks: &Disks, port: u16, change: impl Fn(&mut Super)) {
    let at = meta_at(disks.limits[usize::from(port)].size).unwrap();
    let (mut sb, place) = read_super(&mut Below(disks), Port(port), at).unwrap().unwrap();
    change(&mut sb);
    disks.put(Port(port), at + super_at(1 - place), &sb.encode());
}

fn super_of(disks: &Disks, port: u16) -> Super {
    let at = meta_at(disks.limits[usize::from(port)].size).unwrap();
    read_super(&mut Below(disks), Port(port), at).unwrap().unwrap().0
}

/// Three legs; the power went when leg 0 was being given up, and leg 1 alone knew of it.
fn half_dropped() -> (Rc<Disks>, Rc<dyn Meta>, u64) {
    let (_, disks, meta) = in_sync_of(3);
    let old = super_of(&disks, 2).generation;
    put_super(&disks, 1, |sb| {
        (sb.before, sb.generation) = (old, old + 1);
        sb.legs[0] = sb.leg(LegState::Failed);
    });
    (disks, meta, old)
}

/// When leg 1 is lost later, leg 2 must not take leg 0 for one that holds everything.
#[test]
fn a_drop_that_reached_one_leg_is_passed_on_before_anything_is_written() {
    let (disks, meta, old) = half_dropped();
    let state = opened(&disks);
    assert_eq!(state.sets().in_sync, 0b110);
    now(state.settle(&meta)).unwrap();
    for port in [1, 2] {
        let sb = super_of(&disks, port);
        assert_eq!((sb.legs[0].state, sb.generation), (LegState::Failed, old + 2), "leg {port}");
    }
    let left = [Some(super_of(&disks, 0)), None, Some(super_of(&disks, 2))];
    let found = decide(&left, true).unwrap();
    assert_eq!(found.ports(LegState::InSync), 0b100);
    assert_eq!(
        found.roles[0],
        assemble::Role::Leg { index: 0, state: LegState::Failed, logged: true },
        "no bit was taken back since"
    );
    // All know it now: nothing is written when it starts again.
    now(opened(&disks).settle(&meta)).unwrap();
    assert_eq!(super_of(&disks, 2).generation, old + 2);
}

/// Nothing was written meanwhile, so both are as good as they were.
#[test]
fn a_power_cut_while_a_drop_is_passed_on_costs_no_other_leg() {
    let mut seen = false;
    for seed in 0..100 {
        let (disks, meta, old) = half_dropped();
        let state = opened(&disks);
        *disks.turns.borrow_mut() = (6, seed);
        let mut work = Box::pin(state.settle(&meta));
        let mut context = Context::from_waker(Waker::noop());
        while super_of(&disks, 1).generation != old + 2 {
            assert!(work.as_mut().poll(&mut context).is_pending());
        }
        seen |= super_of(&disks, 2).generation == old;
        let io = Io::new(Op::Write, 0, 4096);
        assert_eq!(state.map(io), Map::Miss, "leg 2 does not know it yet");
        drop(work);
        *disks.turns.borrow_mut() = (0, 0);
        let state = opened(&disks);
        assert_eq!(state.sets().in_sync, 0b110, "seed {seed}");
        now(state.settle(&meta)).unwrap();
        assert_eq!(super_of(&disks, 1).generation, super_of(&disks, 2).generation);
    }
    assert!(seen);
}

fn tell(
    state: &Arc<State>,
    words: &str,
    meta: &Rc<dyn Meta>,
) -> Result<Result<String, String>, Errno> {
    let words = words.split(' ').map(str::to_owned).collect();
    now(state.clone().command(words, meta.clone()))
}

/// The superblocks of the others said that it was being filled, and nobody filled it.
#[test]
fn a_device_that_could_not_be_added_is_missing_as_before_and_its_place_is_vacant() {
    let (_, disks, meta) = in_sync_of(3);
    let at = meta_at(disks.limits[2].size).unwrap();
    disks.put(Port(2), at, &[0; 2 * BLOCK]);
    let state = opened(&disks);
    let not_yet = tell(&state, "add 2", &meta).unwrap();
    assert!(not_yet.unwrap_err().contains("on disk"), "leg 2 is not known to be missing");
    assert_eq!(state.map(Io::new(Op::Write, 0, 4096)), Map::Miss);
    now(state.settle(&meta)).unwrap();
    disks.bad.borrow_mut().push((Port(2), at..at + LOG_AT));
    for _ in 0..3 {
        assert_eq!(tell(&state, "add 2", &meta), Err(Errno::EIO));
        assert!(state.is_degraded());
        assert_eq!(super_of(&disks, 0).legs[2].state, LegState::Failed);
        now(state.sync_all(&meta)).unwrap();
        assert_eq!(now(state.clean(true, &meta)), Err(Errno::EAGAIN));
        assert!((0..4).all(|index| logged(&disks, index)), "it lacks everything");
    }
    disks.bad.borrow_mut().clear();
    assert!(tell(&state, "add 2", &meta).unwrap().is_ok());
    now(state.sync_all(&meta)).unwrap();
    assert_eq!(state.sets().in_sync, 0b111);
}
