//! Answers for how workers come to be and end: shares, and that none serves before all can.

use std::sync::atomic::{AtomicUsize, Ordering};

use devsplice_core::{Errno, Io};
use devsplice_engine::{Completion, Inbox, Rest};

use super::*;

#[test]
fn patience_is_told_of_once_each_time_it_ends() {
    let mut patience = Patience::new(Duration::from_millis(20));
    assert!(patience.ended().is_none());
    std::thread::sleep(Duration::from_millis(21));
    assert!(patience.ended().unwrap().contains("still waiting"));
    assert!(Patience::new(Duration::from_secs(60)).ended().is_none());
}

#[test]
fn threads_share_out_queues_or_queues_threads() {
    let memory = LaneMemory { depth: 1, bytes: 0, slots: false, locked: false };
    let all = |queues, threads| {
        let shape = Shape {
            queues,
            threads,
            is_shared: false,
            is_wide: false,
            low_depth: false,
            memory,
            stuck_seconds: 0,
        };
        (0..threads).map(|thread| queues_of(thread, &shape)).collect::<Vec<_>>()
    };
    assert_eq!(all(4, 2), [[0, 2], [1, 3]]);
    assert_eq!(all(3, 3), [[0], [1], [2]]);
    assert_eq!(all(2, 5), [[0], [1], [0], [1], [0]]);
    assert_eq!(all(5, 1), [[0, 1, 2, 3, 4]]);
}

/// A queue that says whether it was ever turned.
struct Idle(Arc<AtomicUsize>);

impl Export<Uring> for Idle {
    fn depth(&self) -> u16 {
        1
    }

    fn arm(&mut self, _: &mut Uring, _: u16) -> Result<()> {
        Ok(())
    }

    fn event(&mut self, _: &mut Uring, _: Completion, _: &mut Inbox) -> Result<()> {
        Ok(())
    }

    fn finish(&mut self, _: &mut Uring, _: u16, _: &Io, _: std::result::Result<(), Errno>) {}

    fn flush(&mut self, _: &mut Uring) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn rest(&mut self, _: &mut Uring) -> Rest {
        Rest::Now
    }

    fn is_closed(&self) -> bool {
        true
    }
}

/// Starts four workers of which the queue `bad` cannot be had, after the others. Each counts its
/// turns.
fn start(pool: Option<Arc<Pool>>, bad: Option<u16>, turns: &Arc<AtomicUsize>) -> Result<Crew> {
    let memory = LaneMemory { depth: 1, bytes: 4096, slots: false, locked: false };
    let shape = Shape {
        queues: 4,
        threads: 4,
        is_shared: false,
        is_wide: false,
        low_depth: false,
        memory,
        stuck_seconds: 0,
    };
    let mut builder = devsplice_core::StackBuilder::new();
    let (root, _) = builder.backend("file", devsplice_core::Limits::ideal(4096)).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let service = Service {
        stack: Arc::new(builder.finish(root)),
        bottoms: vec![Bottom::File { fd: null.into(), kind: FileKind::Other }],
        pool,
        on_stuck: Arc::new(|_| ()),
        on_event: Arc::new(|_| ()),
        on_death: |error| panic!("{error}"),
    };
    let counted = Arc::clone(turns);
    let make: Box<MakeQueue> = Box::new(move |queue, _| {
        if Some(queue) == bad {
            std::thread::sleep(Duration::from_millis(100));
            return Err(Error::invalid("a queue", "cannot be had"));
        }
        Ok(Box::new(Idle(Arc::clone(&counted))))
    });
    Crew::start(shape, Work { service, make, cpus: Box::new(|_| None) })
}

#[test]
fn none_serves_where_one_cannot_and_all_are_over_then() {
    for pool in [None, Some(Pool::start(2).unwrap())] {
        for bad in 0..4 {
            let turns = Arc::default();
            let failed = start(pool.clone(), Some(bad), &turns).err().unwrap();
            let left = Arc::strong_count(&turns) - 1;
            assert_eq!(left, 0, "some are not over without queue {bad}: {failed}");
            assert_eq!(turns.load(Ordering::SeqCst), 0, "one served without queue {bad}");
        }
        let turns = Arc::default();
        start(pool.clone(), None, &turns).unwrap().join();
        assert_eq!(turns.load(Ordering::SeqCst), 4, "each has one turn and is closed");
    }
}
