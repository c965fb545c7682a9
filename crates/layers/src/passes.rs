//! Answers for requests that were resolved and are asked about again: this time they go down.
//!
//! A request is routed on by the thread that resolved it, before that thread looks at another one,
//! so a pass cannot be taken by a request that merely looks the same.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::thread::{ThreadId, current};

use devsplice_core::Io;

/// Passes that were given and not used yet.
#[derive(Default)]
pub struct Passes {
    count: AtomicUsize,
    given: Mutex<Vec<(ThreadId, Io)>>,
}

impl Passes {
    /// The next time that this thread asks about `io`, it may pass.
    pub fn give(&self, io: Io) {
        self.given.lock().unwrap_or_else(PoisonError::into_inner).push((current().id(), io));
        self.count.fetch_add(1, SeqCst);
    }

    /// Whether `io` may pass; only once.
    pub fn take(&self, io: &Io) -> bool {
        if self.count.load(SeqCst) == 0 {
            return false;
        }
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let this = (current().id(), *io);
        let Some(place) = given.iter().position(|one| *one == this) else { return false };
        given.swap_remove(place);
        self.count.fetch_sub(1, SeqCst);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devsplice_core::Op;

    #[test]
    fn a_pass_is_for_one_request_of_one_thread_and_used_once() {
        let passes = Passes::default();
        let (a, b) = (Io::new(Op::Read, 0, 512), Io::new(Op::Read, 512, 512));
        assert!(!passes.take(&a));
        passes.give(a);
        assert!(!passes.take(&b));
        std::thread::scope(|scope| {
            assert!(!scope.spawn(|| passes.take(&a)).join().unwrap());
        });
        assert!(passes.take(&a) && !passes.take(&a));
    }
}
