//! Answers for waiting inside slow work: a bell that wakes all who wait, and a turn that one has.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// Wakes everybody who waits for it.
#[derive(Debug, Default)]
pub struct Bell {
    rung: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
}

impl Bell {
    /// Waits for the first ring after this call.
    pub fn wait(&self) -> impl Future<Output = ()> + '_ {
        Listen { bell: self, since: self.rung.load(Ordering::SeqCst) }
    }

    /// Wakes all.
    pub fn ring(&self) {
        self.rung.fetch_add(1, Ordering::SeqCst);
        let waiting = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *waiting)
        };
        for waker in waiting {
            waker.wake();
        }
    }
}

struct Listen<'a> {
    bell: &'a Bell,
    since: u64,
}

impl Future for Listen<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut waiting = self.bell.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.bell.rung.load(Ordering::SeqCst) != self.since {
            return Poll::Ready(());
        }
        if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            waiting.push(context.waker().clone());
        }
        Poll::Pending
    }
}

/// Something that one task has at a time, across waits.
#[derive(Debug, Default)]
pub struct Turn {
    taken: AtomicBool,
    free: Bell,
}

/// The turn is its holder's until this is dropped.
#[derive(Debug)]
pub struct Taken<'a> {
    turn: &'a Turn,
    // Slow work stays on its thread; so does this.
    _stays: Cell<()>,
}

impl Turn {
    /// Waits for the turn.
    pub async fn take(&self) -> Taken<'_> {
        loop {
            let free = self.free.wait();
            if !self.taken.swap(true, Ordering::SeqCst) {
                return Taken { turn: self, _stays: Cell::new(()) };
            }
            free.await;
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.turn.taken.store(false, Ordering::SeqCst);
        self.turn.free.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicU64);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn poll<F: Future>(future: Pin<&mut F>, count: &Arc<Count>) -> Option<F::Output> {
        let waker = count.clone().into();
        match future.poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_ring_between_the_call_and_the_first_look_is_not_missed() {
        let (bell, count) = (Bell::default(), Arc::new(Count::default()));
        let mut early = std::pin::pin!(bell.wait());
        bell.ring();
        assert!(poll(early.as_mut(), &count).is_some());
        let mut late = std::pin::pin!(bell.wait());
        assert!(poll(late.as_mut(), &count).is_none());
        bell.ring();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(poll(late.as_mut(), &count).is_some());
    }

    #[test]
    fn a_turn_is_one_holders_at_a_time_and_goes_on_when_it_is_dropped() {
        let (turn, count) = (Turn::default(), Arc::new(Count::default()));
        let mut first = std::pin::pin!(turn.take());
        let held = poll(first.as_mut(), &count);
        assert!(held.is_some());
        let mut second = std::pin::pin!(turn.take());
        assert!(poll(second.as_mut(), &count).is_none());
        drop(held);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(poll(second.as_mut(), &count).is_some());
    }
}
