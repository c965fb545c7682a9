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

/// Two devices in memory. All that is asked of them is done at once.
struct Disks {
    limits: [Limits; 2],
    bytes: RefCell<[Vec<u8>; 2]>,
    unsettled: RefCell<bool>,
    now: RefCell<u64>,
}

impl Disks {
    fn new(size: usize) -> Disks {
        let limits = [Limits::ideal(size as u64); 2];
        let bytes = RefCell::new([vec![0; size], vec![0; size]]);
        Disks { limits, bytes, unsettled: RefCell::new(false), now: RefCell::new(0) }
    }

    fn get(&self, port: Port, at: u64, len: usize) -> Vec<u8> {
        let at = usize::try_from(at).unwrap();
        self.bytes.borrow()[usize::from(port.0)][at..at + len].to_vec()
    }

    fn put(&self, port: Port, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        let all = &mut self.bytes.borrow_mut()[usize::from(port.0)];
        all[at..at + bytes.len()].copy_from_slice(bytes);
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

impl Meta for Disks {
    fn read(&self, port: Port, at: u64, len: usize) -> Slow<Vec<u8>> {
        done(self.get(port, at, len))
    }

    fn write(&self, port: Port, at: u64, bytes: Vec<u8>, _: bool) -> Slow {
        *self.now.borrow_mut() += WRITE_NS;
        self.put(port, at, &bytes);
        done(())
    }

    fn flush(&self, _: Port) -> Slow {
        done(())
    }

    fn copy(&self, from: Port, to: Vec<Port>, at: u64, len: usize) -> Slow {
        let bytes = self.get(from, at, len);
        to.into_iter().for_each(|port| self.put(port, at, &bytes));
        done(())
    }

    fn sleep(&self, _: u64) -> Slow {
        done(())
    }

    fn now_ns(&self) -> u64 {
        *self.now.borrow()
    }

    fn grace(&self) -> Slow {
        done(())
    }

    fn is_unsettled(&self) -> bool {
        *self.unsettled.borrow()
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

/// A mirror whose legs are in sync and clean, in four regions of 64 KiB.
fn in_sync() -> (Arc<State>, Rc<Disks>, Rc<dyn Meta>) {
    let disks = Rc::new(Disks::new(5 * (64 << 10)));
    let given = [("region".to_owned(), "64k".to_owned())];
    let args = Args::new(DRIVER.name, DRIVER.keys, &given).unwrap();
    format(&args, &mut Below(&disks), false).unwrap();
    let mut mirror = Mirror { degraded: false, rate: 0, clean_ns: 1, state: None };
    mirror.open(&mut Below(&disks)).unwrap();
    let (state, meta): (_, Rc<dyn Meta>) = (mirror.state.unwrap(), disks.clone());
    now(state.sync_all(&meta)).unwrap();
    now(state.clean(true, &meta)).unwrap();
    assert_eq!(state.sets().in_sync, 0b11);
    (state, disks, meta)
}

/// What a fresh start would find in the logs.
fn logged(disks: &Disks, index: u64) -> bool {
    let mut mirror = Mirror { degraded: false, rate: 0, clean_ns: 1, state: None };
    mirror.open(&mut Below(disks)).unwrap();
    mirror.state.unwrap().state_of(index) == region::UNSYNCED
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
