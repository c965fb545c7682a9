//! Answers for I/O that live layers ask for: orders that wait for a tag of the inner lane, become
//! requests there, and hand their results back.
//!
//! A tag's memory stays with its order through all steps of it (read here, write there, flush), so
//! a copy needs no bytes to be touched.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use devsplice_core::live::MOST_BYTES;
use devsplice_core::{Errno, Io, NodeId, Op, Result};

use crate::export::{Export, Inbox, Rest};
use crate::ring::{Completion, Ring};

/// Orders of one level that are carried out at a time.
pub const INNER_DEPTH: u16 = 8;
/// Bytes of memory that each of them has.
#[allow(clippy::cast_possible_truncation)]
pub const INNER_BYTES: u32 = MOST_BYTES as u32;

/// What a layer wants done, step by step with the same memory.
pub(crate) struct Order {
    /// What is put into the memory first.
    pub(crate) bytes: Vec<u8>,
    /// Where and what, in their order; not empty.
    pub(crate) steps: VecDeque<(NodeId, Io)>,
    /// Whether the memory is handed back at the end.
    pub(crate) wants_bytes: bool,
}

/// An order between its acceptance and its end.
struct Running {
    id: u64,
    order: Order,
    result: Result<(), Errno>,
}

/// The orders of one level of a stack on one thread.
#[derive(Default)]
pub(crate) struct Desk {
    next_id: u64,
    waiting: VecDeque<(u64, Order)>,
    free: Vec<u16>,
    running: Vec<Option<Running>>,
    /// Tags whose step has ended and whose next one is to be started, or which are over.
    stepped: VecDeque<u16>,
    /// Who is told about an order; gone when nobody wants to know any more.
    wakers: BTreeMap<u64, Waker>,
    done: BTreeMap<u64, Result<Vec<u8>, Errno>>,
    /// Sleepers by the time at which they are woken.
    sleeping: BTreeMap<(u64, u64), Waker>,
    pub(crate) now_ns: u64,
}

/// Shared between the thread and the slow work that it drives.
pub(crate) type SharedDesk = Arc<Mutex<Desk>>;

pub(crate) fn lock(desk: &SharedDesk) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Desk {
    pub(crate) fn new() -> SharedDesk {
        let running = (0..INNER_DEPTH).map(|_| None).collect();
        let free = (0..INNER_DEPTH).rev().collect();
        Arc::new(Mutex::new(Desk { running, free, ..Desk::default() }))
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Accepts an order.
    pub(crate) fn place(&mut self, order: Order, waker: &Waker) -> u64 {
        let id = self.id();
        self.waiting.push_back((id, order));
        self.wakers.insert(id, waker.clone());
        id
    }

    /// The result of an order, once it is there.
    pub(crate) fn collect(&mut self, id: u64, waker: &Waker) -> Option<Result<Vec<u8>, Errno>> {
        let done = self.done.remove(&id);
        if done.is_none() {
            self.wakers.insert(id, waker.clone());
        }
        done
    }

    /// Nobody waits for an order any more. What runs goes on to its end.
    pub(crate) fn forget(&mut self, id: u64) {
        self.wakers.remove(&id);
        self.done.remove(&id);
        self.waiting.retain(|(other, _)| *other != id);
    }

    /// The next request to be started on the inner lane: its tag, where, what.
    pub(crate) fn next(&mut self) -> Option<(u16, NodeId, Io)> {
        while let Some(tag) = self.stepped.pop_front() {
            let place = &mut self.running[usize::from(tag)];
            let Some(running) = place else { continue };
            if running.result.is_ok()
                && let Some((node, io)) = running.order.steps.pop_front()
            {
                return Some((tag, node, io));
            }
        }
        let tag = *self.free.last()?;
        let (id, mut order) = self.waiting.pop_front()?;
        self.free.pop();
        let (node, io) = order.steps.pop_front()?;
        self.running[usize::from(tag)] = Some(Running { id, order, result: Ok(()) });
        Some((tag, node, io))
    }

    /// What is to be put into the memory of a tag whose order begins.
    pub(crate) fn take_bytes(&mut self, tag: u16) -> Vec<u8> {
        let running = self.running[usize::from(tag)].as_mut();
        running.map(|running| std::mem::take(&mut running.order.bytes)).unwrap_or_default()
    }

    /// A step of a tag's order has ended. `bytes` brings what its memory holds.
    fn stepped(&mut self, tag: u16, result: Result<(), Errno>, bytes: impl FnOnce() -> Vec<u8>) {
        let place = &mut self.running[usize::from(tag)];
        let Some(running) = place else { return };
        running.result = result;
        if result.is_ok() && !running.order.steps.is_empty() {
            self.stepped.push_back(tag);
            return;
        }
        let (id, wants_bytes) = (running.id, running.order.wants_bytes);
        *place = None;
        self.free.push(tag);
        if let Some(waker) = self.wakers.remove(&id) {
            let bytes = if wants_bytes && result.is_ok() { bytes() } else { Vec::new() };
            self.done.insert(id, result.map(|()| bytes));
            waker.wake();
        }
    }

    /// Sleeps until `at`; what this returns names the sleeper.
    pub(crate) fn sleep(&mut self, at: u64, waker: &Waker) -> (u64, u64) {
        let key = (at, self.id());
        self.sleeping.insert(key, waker.clone());
        key
    }

    /// Whether a sleeper's time has come; if not, `waker` is told when it has.
    pub(crate) fn is_awake(&mut self, key: (u64, u64), waker: &Waker) -> bool {
        if key.0 <= self.now_ns {
            self.sleeping.remove(&key);
            return true;
        }
        self.sleeping.insert(key, waker.clone());
        false
    }

    pub(crate) fn rise(&mut self, key: (u64, u64)) {
        self.sleeping.remove(&key);
    }

    /// Wakes those whose time has come; when the next one is due.
    pub(crate) fn wake_sleepers(&mut self) -> Option<u64> {
        while let Some(first) = self.sleeping.first_entry() {
            if first.key().0 > self.now_ns {
                return Some(first.key().0);
            }
            first.remove().wake();
        }
        None
    }
}

/// The inner lane as the engine sees it: its requests come from the desk.
pub(crate) struct Inner {
    pub(crate) desk: SharedDesk,
    pub(crate) lane: u16,
}

impl<R: Ring> Export<R> for Inner {
    fn depth(&self) -> u16 {
        INNER_DEPTH
    }

    fn arm(&mut self, _: &mut R, _: u16) -> Result<()> {
        Ok(())
    }

    fn event(&mut self, _: &mut R, _: Completion, _: &mut Inbox) -> Result<()> {
        Ok(())
    }

    fn finish(&mut self, ring: &mut R, tag: u16, io: &Io, result: Result<(), Errno>) {
        let lane = self.lane;
        lock(&self.desk).stepped(tag, result, || {
            let len = if io.op == Op::Read { io.extent.len } else { 0 };
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            ring.get(lane, tag, &mut bytes);
            bytes
        });
    }

    fn is_closed(&self) -> bool {
        true
    }

    fn flush(&mut self, _: &mut R) {}

    fn rest(&mut self, _: &mut R) -> Rest {
        Rest::Now
    }
}
