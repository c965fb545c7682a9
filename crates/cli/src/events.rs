//! Answers for what happens to disks: events that a server keeps for a while and hands to whoever
//! follows them.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::state;

/// Events kept for who asks later.
const KEPT: usize = 256;
/// Events that a follower may be behind; one that falls further behind is cut off.
const BEHIND: usize = 1024;

/// What kinds there are, and what each says.
pub const KINDS: [(&str, &str); 11] = [
    ("added", "a disk was made"),
    ("removed", "a disk was removed"),
    ("restarted", "a disk is served again whose server had died"),
    ("upgraded", "a disk is served by another process than before, as was asked"),
    ("quiesced", "a disk is held, as was asked"),
    ("resumed", "a disk that was held is served again"),
    ("swapped", "a disk has another stack"),
    ("resized", "a disk has another size"),
    ("unguarded", "the guard of a disk's server has died, and the server goes on without one"),
    ("stuck", "a request has been below for long"),
    ("layer", "what a layer reports: a leg dropped, a resync done"),
];

/// The events of a server.
#[derive(Default)]
pub struct Bus {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    last: u64,
    kept: VecDeque<Arc<Value>>,
    followers: Vec<SyncSender<Arc<Value>>>,
}

impl Bus {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something has happened to a disk. Never waits: it is called on I/O threads, too.
    pub fn tell(&self, disk: &str, kind: &str, text: &str) {
        let mut inner = self.lock();
        inner.last += 1;
        let event = Arc::new(json!({
            "seq": inner.last, "time_ms": state::now_ms(), "disk": disk, "kind": kind, "text": text,
        }));
        if inner.kept.len() == KEPT {
            inner.kept.pop_front();
        }
        inner.kept.push_back(Arc::clone(&event));
        // Who is too far behind is forgotten, and sees the end of what it reads.
        inner.followers.retain(|follower| {
            !matches!(
                follower.try_send(Arc::clone(&event)),
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_))
            )
        });
    }

    /// What happens from now on, after what is kept of what came after event `since`. The second is
    /// the number of the last event so far.
    pub fn follow(&self, since: Option<u64>) -> (Receiver<Arc<Value>>, u64) {
        let (into, events) = sync_channel(BEHIND);
        let mut inner = self.lock();
        let since = since.unwrap_or(inner.last);
        let is_wanted = |event: &&Arc<Value>| event["seq"].as_u64().is_some_and(|seq| seq > since);
        for event in inner.kept.iter().filter(is_wanted) {
            // There is room for more than are kept.
            let _ = into.try_send(Arc::clone(event));
        }
        inner.followers.push(into);
        (events, inner.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_gets_what_it_missed_and_one_that_does_not_read_is_forgotten() {
        let bus = Bus::default();
        for number in 0..3 {
            bus.tell("a", "added", &number.to_string());
        }
        let (events, last) = bus.follow(Some(1));
        assert_eq!(last, 3);
        bus.tell("b", "removed", "");
        let seqs: Vec<_> = events.try_iter().map(|event| event["seq"].as_u64().unwrap()).collect();
        assert_eq!(seqs, [2, 3, 4]);
        let (slow, _) = bus.follow(None);
        for _ in 0..BEHIND {
            bus.tell("a", "stuck", "");
            assert_eq!(bus.lock().followers.len(), 2);
            while events.try_recv().is_ok() {}
        }
        bus.tell("a", "stuck", "one more than there is room for");
        assert_eq!(bus.lock().followers.len(), 1);
        assert_eq!(slow.iter().count(), BEHIND);
        assert_eq!(bus.lock().kept.len(), KEPT);
    }
}
