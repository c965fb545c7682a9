//! Answers for all that lies around the engine: the clock, what is due, the disks, the clients.

use std::collections::{BinaryHeap, VecDeque};

use devsplice_core::{Errno, Io, Op};
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{Event, Part, RingCounts};

use crate::cells::{Cell, Mixes};
use crate::disk::Disk;
use crate::failure::{Failure, Kind};
use crate::far::Far;
use crate::live::Habits;
use crate::mutants::Mutant;
use crate::oracle::Oracle;
use crate::plan::{Crash, Plan};
use crate::rng::Rng;
use crate::trace::Trace;
use crate::tree::Planes;
use crate::workload::Workload;

/// Without any event but the watchdog's ticks for so long, a request is never finished.
const PATIENCE_NS: u64 = 20_000_000_000;
/// The timer key that the engine's watchdog uses.
const TICK_KEY: u32 = u32::MAX;
/// Timer keys beyond this are the engine's sleepers.
const SLEEPERS: u32 = u32::MAX - 16;

/// Something that will happen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum What {
    /// Bytes `from..to` of a splice move between pages and disk.
    Move {
        splice: u32,
        from: u32,
        to: u32,
    },
    /// A splice comes to its end.
    Complete {
        splice: u32,
    },
    /// A finished write hits the disk again: only with that bug.
    Again {
        echo: u32,
    },
    Timer {
        key: u32,
    },
    /// A front end's tag asks for its next request.
    Fetch {
        lane: u16,
        tag: u16,
    },
    /// Bytes arrive at a server or at its client.
    Flow {
        far: usize,
        connection: u32,
        way: usize,
    },
    /// A server works on a request.
    Serve {
        far: usize,
        job: u32,
    },
    /// A client hears that its connection has ended.
    Cut {
        far: usize,
        connection: u32,
    },
    /// A client tries to connect.
    Dial {
        far: usize,
    },
    /// A handshake has had its time.
    Impatient {
        far: usize,
        connection: u32,
    },
    /// A client of a server has waited for a second.
    Second {
        far: usize,
    },
}

/// The order is that of `BinaryHeap`, so it is turned round: the earliest is the greatest, and of
/// those at the same time the one that was asked for first.
#[derive(PartialEq, Eq)]
struct Due {
    at: u64,
    number: u64,
    what: What,
}

impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// A splice between submission and the end of all that it does.
#[derive(Clone, Copy)]
pub(crate) struct Flying {
    pub(crate) key: u32,
    pub(crate) op: Op,
    pub(crate) fua: bool,
    /// `None` for the source of zeros.
    pub(crate) disk: Option<u16>,
    pub(crate) at: u64,
    pub(crate) len: u64,
    /// Bytes that do move; fewer than `len` when it is short or fails.
    pub(crate) moves: u64,
    /// What is reported.
    pub(crate) result: Result<u64, Errno>,
    /// The error that a bug hides in `result`, or the one that is there.
    pub(crate) error: Option<Errno>,
    pub(crate) slot: u32,
    pub(crate) generation: u32,
    /// Which splice it is, counted over the whole run.
    pub(crate) serial: u32,
    /// Splices that had been seen to end when this one was asked for.
    pub(crate) ended_before: u32,
    /// Due things that name this splice.
    pub(crate) due: u8,
    pub(crate) part_count: u8,
    pub(crate) parts: [Part; MAX_PARTS],
}

/// A request's memory, and the request that has it.
#[derive(Default)]
pub(crate) struct Slot {
    pub(crate) lane: u16,
    pub(crate) tag: u16,
    pub(crate) request: Option<Asked>,
    /// Counts the requests that had it.
    pub(crate) generation: u32,
    pub(crate) cells: Vec<Cell>,
    /// The first lasting error that the engine was told of.
    pub(crate) error: Option<Errno>,
    /// A splice of it was short, so that the rest may begin anywhere.
    pub(crate) short: bool,
    /// Splices of it that have not been seen to end.
    pub(crate) out: u32,
}

/// A request that a client waits for.
#[derive(Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) io: Io,
    pub(crate) start: u64,
    /// The oracle's number, for one that changes data.
    pub(crate) change: Option<u32>,
}

/// A device under test.
pub(crate) struct Device {
    pub(crate) oracle: Oracle,
    pub(crate) workload: Workload,
    pub(crate) planes: Planes,
    pub(crate) first_disk: usize,
    pub(crate) disk_count: usize,
    /// What its layers may answer by themselves.
    pub(crate) errors: Vec<Errno>,
    pub(crate) writes: u32,
    /// Only with live layers: what is done to it beside requests.
    pub(crate) habits: Option<Habits>,
}

/// A queue of a front end.
#[derive(Clone, Copy)]
pub(crate) struct Front {
    pub(crate) device: usize,
    pub(crate) first_slot: usize,
}

/// Why the engine was stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The power went.
    Crash,
    /// Nothing is left to happen but what was lost on purpose.
    Lost,
    Failure(Failure),
}

/// A completed splice or another event on its way to the engine.
#[derive(Clone, Copy)]
pub(crate) struct Ready {
    pub(crate) event: Event,
    pub(crate) splice: Option<Ended>,
}

/// What a completed splice means for its request.
#[derive(Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) serial: u32,
    pub(crate) slot: u32,
    /// The error with which the request must fail.
    pub(crate) error: Option<Errno>,
    /// It did a part of what was asked.
    pub(crate) short: bool,
}

/// What a finished write left, for the bug that writes it again.
pub(crate) struct Echo {
    pub(crate) disk: u16,
    pub(crate) first: usize,
    pub(crate) cells: Vec<Cell>,
    pub(crate) serial: u32,
}

/// Everything but the engine.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) plan: Plan,
    pub(crate) mutant: Option<Mutant>,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    /// Counts asks and ends, so that no two are at the same moment.
    pub(crate) moment: u64,
    pub(crate) disks: Vec<Disk>,
    pub(crate) devices: Vec<Device>,
    pub(crate) fronts: Vec<Front>,
    pub(crate) slots: Vec<Slot>,
    /// From here on they are for what layers ask themselves.
    pub(crate) first_inner: usize,
    pub(crate) mixes: Mixes,
    pub(crate) trace: Trace,
    pub(crate) end: Option<End>,
    /// The lane and tag whose splice was lost on purpose.
    pub(crate) lost: Option<(u16, u16)>,
    pub(crate) crash: Crash,
    /// Splices that were handed over and not submitted.
    pub(crate) queue: Vec<u32>,
    pub(crate) flying: Vec<Flying>,
    pub(crate) free: Vec<u32>,
    /// Which keys are out, by key.
    pub(crate) keys: Vec<bool>,
    /// Transient errors in a row, by key.
    pub(crate) streaks: Vec<u8>,
    /// For each splice of the run, its place among those that were seen to end; 0 for not yet.
    pub(crate) ended: Vec<u32>,
    pub(crate) ended_count: u32,
    pub(crate) ready: VecDeque<Ready>,
    pub(crate) counts: RingCounts,
    pub(crate) asked: u64,
    /// In this life some splice has failed for good.
    pub(crate) erred: bool,
    pub(crate) echoes: Vec<Echo>,
    /// Disks that are behind servers.
    pub(crate) fars: Vec<Far>,
    /// Connections that were lost, and deaths of servers.
    pub(crate) losses: u64,
    pub(crate) deaths: u64,
    /// Requests that failed by themselves, as their server died of them; and those of legs.
    pub(crate) deadly: u64,
    pub(crate) deadly_legs: u64,
    heap: BinaryHeap<Due>,
    number: u64,
    pub(crate) events: u64,
    pub(crate) flushes: u64,
    progress: u64,
}

impl World {
    /// Lets something happen in `ns` nanoseconds.
    pub(crate) fn later(&mut self, ns: u64, what: What) {
        self.number += 1;
        self.heap.push(Due { at: self.now + ns, number: self.number, what });
    }

    /// The next moment.
    pub(crate) fn tick(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// Records the first thing that went wrong; the engine is stopped when it enters the ring.
    pub(crate) fn fail(&mut self, kind: Kind, text: impl Into<String>) {
        if !matches!(self.end, Some(End::Failure(_))) {
            let text = format!("{} (at {} ns)", text.into(), self.now);
            self.end = Some(End::Failure(Failure::new(kind, text)));
        }
    }

    /// Lets happen what is due, and with `wait` at least one thing that the engine sees.
    pub(crate) fn pass(&mut self, wait: bool) {
        let most = self.rng.between(1, self.plan.batch) as usize;
        while self.end.is_none() && self.ready.len() < most {
            let Some(next) = self.heap.peek() else {
                if wait && self.ready.is_empty() {
                    self.asleep();
                }
                return;
            };
            if next.at > self.now && (!wait || !self.ready.is_empty()) {
                return;
            }
            let crashes = match self.crash {
                Crash::Event(number) => self.events + 1 == number,
                Crash::Time(at) => next.at >= at,
                _ => false,
            };
            if crashes {
                self.end = Some(End::Crash);
                return;
            }
            if let Some(Due { at, what, .. }) = self.heap.pop() {
                self.now = self.now.max(at);
                self.events += 1;
                self.happen(what);
            }
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Timer { key: TICK_KEY } => {
                if self.now - self.progress > PATIENCE_NS || self.only_ticks_wake() {
                    return self.asleep();
                }
                self.tell(Event::Timer { key: TICK_KEY });
                return;
            }
            What::Timer { key } if key > SLEEPERS => {
                // A sleeper in the background is no progress.
                self.tell(Event::Timer { key });
                return;
            }
            // Nor is one who waits for a server.
            What::Second { far } => return self.second(far),
            What::Dial { far } => return self.connect(far),
            What::Impatient { far, connection } => return self.impatient(far, connection),
            What::Timer { key } => self.tell(Event::Timer { key }),
            What::Fetch { lane, tag } => {
                let index = u32::from(tag);
                let completion = devsplice_engine::Completion { index, result: 0, flags: 0 };
                self.tell(Event::Export { lane, completion });
            }
            What::Move { splice, from, to } => self.carry(splice, u64::from(from), u64::from(to)),
            What::Complete { splice } => self.complete(splice),
            What::Again { echo } => self.echo(echo),
            What::Flow { far, connection, way } => self.flow(far, connection, way),
            What::Serve { far, job } => self.serve(far, job),
            What::Cut { far, connection } => self.heard_of_cut(far, connection),
        }
        self.progress = self.now;
    }

    /// Whether the watchdog's tick is all that there was to wait for while requests are in flight:
    /// the engine went to sleep with work left, and a device that is merely busy would crawl.
    fn only_ticks_wake(&self) -> bool {
        self.heap.is_empty()
            && self.ready.is_empty()
            && self.lost.is_none()
            && self.slots.iter().any(|slot| slot.request.is_some())
    }

    fn tell(&mut self, event: Event) {
        self.ready.push_back(Ready { event, splice: None });
    }

    /// Nothing will happen any more: what is missing was lost on purpose, or the engine hangs.
    fn asleep(&mut self) {
        if self.lost.is_some() {
            self.end = Some(End::Lost);
            return;
        }
        let busy = self.slots.iter().find(|slot| slot.request.is_some());
        let text = match busy.and_then(|slot| slot.request.map(|asked| (slot, asked))) {
            None => "the engine waits and no request is in flight".to_owned(),
            Some((slot, asked)) => format!(
                "{:?} on lane {} tag {} is never finished; {} splices out",
                asked.io, slot.lane, slot.tag, slot.out
            ),
        };
        self.fail(Kind::Hang, text);
    }

    /// The start of the oldest request in flight, or now.
    pub(crate) fn oldest(&self) -> u64 {
        let starts = self.slots.iter().filter_map(|slot| slot.request.map(|asked| asked.start));
        starts.min().unwrap_or(self.moment)
    }

    /// Forgets what was in flight: the engine is gone.
    pub(crate) fn forget(&mut self) {
        self.heap.clear();
        self.ready.clear();
        self.queue.clear();
        self.flying.clear();
        self.free.clear();
        self.echoes.clear();
        self.keys.fill(false);
        self.streaks.fill(0);
        for slot in &mut self.slots {
            slot.request = None;
            slot.generation += 1;
            slot.out = 0;
        }
        self.progress = self.now;
        self.erred = false;
        self.lost = None;
        self.end = None;
    }
}
