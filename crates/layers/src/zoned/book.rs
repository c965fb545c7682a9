//! Answers for what is known of each zone: how far it is written, whether it is open, what is on
//! its way. One lock for all, held for a few instructions at the begin and the end of each change;
//! what `map` needs is read without it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use devsplice_core::zones::{Ask, Begun, Condition, Shape, Zone, Zones};
use devsplice_core::{Errno, Extent, Io, Op};

/// What holds for all zones. All sizes in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rules {
    pub(super) zone: u64,
    pub(super) capacity: u64,
    pub(super) count: u32,
    pub(super) max_open: u32,
    pub(super) max_active: u32,
    pub(super) append: u64,
}

/// What of a zone `map` reads. Relaxed throughout: what is asked for and what was done before is
/// ordered by the queues of the requests, and by the lock.
struct Edge {
    /// Bytes that can be read from the lower device.
    readable: AtomicU64,
    /// Bytes to which writes were let in.
    writable: AtomicU64,
    /// Whether it is being reset or finished.
    changing: AtomicBool,
    /// The turn of flushes in which it was changed last.
    changed: AtomicU64,
}

/// The rest of it.
#[derive(Clone, Debug)]
struct State {
    condition: Condition,
    /// Where the next write goes, counted from the zone's start.
    next: u64,
    /// Bytes that are known to be written.
    done: u64,
    /// Writes on their way.
    out: u32,
    /// A write has failed: where the next one goes is to be found out when none is on its way.
    failed: bool,
    /// The lower device may be longer than what was done: a write has failed since it was cut.
    stale: bool,
    /// It was last written by a server before this one, and its last write may come again.
    repeats: bool,
    /// When it was opened.
    opened: u64,
}

impl State {
    /// Whether a reset or finish has nothing to do.
    fn is_already(&self, condition: Condition) -> bool {
        self.condition == condition && !self.stale
    }
}

/// All zones.
#[derive(Default)]
pub(super) struct Book {
    rules: Rules,
    edges: Box<[Edge]>,
    states: Mutex<States>,
    /// Whether requests begin and end here. Until one has, nothing is known of what was changed.
    is_told: AtomicBool,
    /// The turn of flushes: what changes now is covered by a flush that begins later.
    turn: AtomicU64,
    /// The last turn all of whose changes are durable.
    durable: AtomicU64,
}

#[derive(Default)]
struct States {
    all: Vec<State>,
    open: u32,
    active: u32,
    clock: u64,
}

const fn is_open(condition: Condition) -> bool {
    matches!(condition, Condition::ImplicitlyOpen | Condition::ExplicitlyOpen)
}

const fn is_active(condition: Condition) -> bool {
    is_open(condition) || matches!(condition, Condition::Closed)
}

impl States {
    /// Gives a zone another condition, and keeps count of those that are open and active.
    fn turn_to(&mut self, zone: usize, condition: Condition) {
        let was = std::mem::replace(&mut self.all[zone].condition, condition);
        self.open += u32::from(is_open(condition));
        self.open -= u32::from(is_open(was));
        self.active += u32::from(is_active(condition));
        self.active -= u32::from(is_active(was));
    }

    /// Opens a zone, if there may be another open one. The one that was opened first of those that
    /// nobody asked to be open makes room.
    fn open(&mut self, zone: usize, as_what: Condition, rules: &Rules) -> Result<(), Errno> {
        let was = self.all[zone].condition;
        if was == Condition::Full || was == Condition::Conventional {
            return Err(Errno::EIO);
        }
        if !is_active(was) && rules.max_active != 0 && self.active >= rules.max_active {
            return Err(Errno::EOVERFLOW);
        }
        if !is_open(was) && rules.max_open != 0 && self.open >= rules.max_open {
            let can_close = |(_, one): &(usize, &State)| one.condition == Condition::ImplicitlyOpen;
            let first =
                self.all.iter().enumerate().filter(can_close).min_by_key(|(_, one)| one.opened);
            let first = first.map(|(place, _)| place).ok_or(Errno::ETOOMANYREFS)?;
            self.close(first);
        }
        if !(is_open(was) && as_what == Condition::ImplicitlyOpen) {
            self.turn_to(zone, as_what);
        }
        self.clock += 1;
        self.all[zone].opened = self.clock;
        Ok(())
    }

    fn close(&mut self, zone: usize) {
        let is_empty = self.all[zone].next == 0;
        self.turn_to(zone, if is_empty { Condition::Empty } else { Condition::Closed });
    }
}

impl Book {
    /// Zones of which so many bytes are there; none of a conventional one.
    pub(super) fn new(rules: Rules, filled: &[Option<u64>]) -> Book {
        let mut states = States::default();
        let mut edges = Vec::new();
        for filled in filled {
            let (condition, next) = match *filled {
                None => (Condition::Conventional, rules.zone),
                Some(0) => (Condition::Empty, 0),
                Some(bytes) if bytes == rules.capacity => (Condition::Full, bytes),
                Some(bytes) => (Condition::Closed, bytes),
            };
            states.active += u32::from(condition == Condition::Closed);
            states.all.push(State {
                condition,
                next,
                done: next,
                out: 0,
                failed: false,
                stale: false,
                repeats: false,
                opened: 0,
            });
            edges.push(Edge {
                readable: AtomicU64::new(next),
                writable: AtomicU64::new(next),
                changing: AtomicBool::new(false),
                changed: AtomicU64::new(0),
            });
        }
        Book {
            rules,
            edges: edges.into(),
            states: Mutex::new(states),
            is_told: AtomicBool::new(false),
            turn: AtomicU64::new(1),
            durable: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn edge(&self, zone: u64) -> &Edge {
        // A request lies within the device.
        &self.edges[usize::try_from(zone).unwrap_or(usize::MAX)]
    }

    /// How many bytes from `inside` on can be read from the lower device.
    pub(super) fn readable(&self, zone: u64, inside: u64) -> u64 {
        self.edge(zone).readable.load(Ordering::Relaxed).saturating_sub(inside)
    }

    /// Whether a write up to `end` was let in.
    pub(super) fn may_write(&self, zone: u64, end: u64) -> bool {
        end <= self.edge(zone).writable.load(Ordering::Relaxed)
    }

    /// Whether it is being reset or finished.
    pub(super) fn is_changing(&self, zone: u64) -> bool {
        self.edge(zone).changing.load(Ordering::Relaxed)
    }

    /// Whether it was changed since the last flush.
    pub(super) fn needs_flush(&self, zone: u64) -> bool {
        let changed = self.edge(zone).changed.load(Ordering::SeqCst);
        changed > self.durable.load(Ordering::SeqCst) || !self.is_told.load(Ordering::Relaxed)
    }

    /// Takes note that a zone was changed. A flush that begins meanwhile may have passed by: then
    /// the note is for the turn behind that one. One total order, hence: of the note and the turn's
    /// end, whichever is second sees the other.
    fn is_changed(&self, zone: usize) {
        loop {
            let turn = self.turn.load(Ordering::SeqCst);
            self.edges[zone].changed.fetch_max(turn, Ordering::SeqCst);
            if self.turn.load(Ordering::SeqCst) == turn {
                return;
            }
        }
    }

    /// The zone that a request lies in, and where in it.
    fn place(&self, extent: Extent) -> Result<(usize, u64), Errno> {
        let zone = extent.at / self.rules.zone;
        if zone >= u64::from(self.rules.count) {
            return Err(Errno::EIO);
        }
        let inside = extent.at % self.rules.zone;
        Ok((usize::try_from(zone).map_err(|_| Errno::EIO)?, inside))
    }

    fn write(&self, extent: Extent, fua: bool, is_append: bool) -> Result<Option<Begun>, Errno> {
        let (zone, inside) = self.place(extent)?;
        let mut states = self.lock();
        let state = &mut states.all[zone];
        let len = extent.len;
        let end = inside.checked_add(len).ok_or(Errno::EIO)?;
        if state.condition == Condition::Conventional {
            if is_append || end > self.rules.zone {
                return Err(Errno::EIO);
            }
            let op = Op::Write;
            return Ok(Some(Begun { io: Io { op, extent, fua }, ticket: 0 }));
        }
        if self.edges[zone].changing.load(Ordering::Relaxed) {
            return Err(Errno::EBUSY);
        }
        if state.failed && state.out > 0 {
            return Err(Errno::EIO);
        }
        let (at, next) =
            if is_append { (state.next, state.next.saturating_add(len)) } else { (inside, end) };
        // What a dead server was about to do is done again: it may have been done in part.
        let is_again = state.repeats && !is_append && inside < state.next && end >= state.next;
        let fits = len != 0 && len <= self.rules.capacity && next <= self.rules.capacity;
        let is_append_too_long = is_append && len > self.rules.append;
        if !fits || is_append_too_long || (at != state.next && !is_again) {
            return Err(Errno::EIO);
        }
        if !(is_again && state.condition == Condition::Full) {
            states.open(zone, Condition::ImplicitlyOpen, &self.rules)?;
        }
        let state = &mut states.all[zone];
        state.repeats = false;
        state.next = next;
        state.out += 1;
        self.edges[zone].writable.store(next, Ordering::Relaxed);
        if next == self.rules.capacity {
            states.turn_to(zone, Condition::Full);
        }
        let at = extent.at - inside + at;
        let io = Io { op: Op::Write, extent: Extent { at, len }, fua };
        Ok(Some(Begun { io, ticket: 0 }))
    }

    /// Where the next write goes when one has failed and none is on its way any more: behind the
    /// last one that was done.
    fn mend(&self, states: &mut States, zone: usize) {
        let state = &mut states.all[zone];
        state.failed = false;
        state.next = state.done;
        self.edges[zone].writable.store(state.done, Ordering::Relaxed);
        let condition = match state.done {
            done if done == self.rules.capacity => Condition::Full,
            0 if !is_open(state.condition) => Condition::Empty,
            _ if !is_open(state.condition) => Condition::Closed,
            _ => state.condition,
        };
        states.turn_to(zone, condition);
    }

    fn written(&self, io: &Io, result: Result<(), Errno>) {
        let Ok((zone, inside)) = self.place(io.extent) else { return };
        if result.is_ok() {
            self.is_changed(zone);
        }
        let mut states = self.lock();
        let state = &mut states.all[zone];
        if state.condition == Condition::Conventional {
            // Part of it may be written all the same.
            return self.is_changed(zone);
        }
        state.out -= 1;
        match result {
            Ok(()) => {
                state.done = state.done.max(inside + io.extent.len);
                self.edges[zone].readable.fetch_max(state.done, Ordering::Relaxed);
            }
            Err(_) => (state.failed, state.stale) = (true, true),
        }
        if state.failed && state.out == 0 {
            self.mend(&mut states, zone);
        }
    }

    /// Begins a reset or finish of zones: whether there is anything to do.
    fn change(
        &self,
        zones: std::ops::Range<usize>,
        already: Condition,
        is_all: bool,
    ) -> Result<bool, Errno> {
        let states = self.lock();
        let mut has_work = false;
        for zone in zones.clone() {
            let state = &states.all[zone];
            if state.condition == Condition::Conventional {
                if is_all {
                    continue;
                }
                return Err(Errno::EIO);
            }
            if self.edges[zone].changing.load(Ordering::Relaxed) {
                return Err(Errno::EBUSY);
            }
            // A zone whose last write was let in is full, though that write is on its way: btrfs
            // finishes it as soon as that one has ended, whatever became of those before it.
            if state.is_already(already) {
                continue;
            }
            if state.out > 0 {
                return Err(Errno::EBUSY);
            }
            has_work = true;
        }
        for zone in zones {
            let state = &states.all[zone];
            if state.is_already(already) || state.condition == Condition::Conventional {
                continue;
            }
            let edge = &self.edges[zone];
            edge.changing.store(true, Ordering::Relaxed);
            if already == Condition::Empty {
                // From now on it reads as zeros, whether the lower device is cut by then or not.
                edge.readable.store(0, Ordering::Relaxed);
            }
        }
        Ok(has_work)
    }

    /// Resets or finishes that were begun have come to their end.
    fn changed(&self, io: &Io, result: Result<(), Errno>) {
        let Ok((first, _)) = self.place(io.extent) else { return };
        let count = usize::try_from(io.extent.len.div_ceil(self.rules.zone)).unwrap_or(0);
        let mut states = self.lock();
        for zone in first..(first + count).min(states.all.len()) {
            if !self.edges[zone].changing.swap(false, Ordering::Relaxed) {
                continue;
            }
            // Also one that failed may have been cut.
            self.is_changed(zone);
            let edge = &self.edges[zone];
            if result.is_err() {
                edge.readable.store(states.all[zone].done, Ordering::Relaxed);
                continue;
            }
            let (condition, end) = match io.op {
                Op::Reset => (Condition::Empty, 0),
                _ => (Condition::Full, self.rules.capacity),
            };
            states.turn_to(zone, condition);
            let state = &mut states.all[zone];
            (state.next, state.done) = (end, end);
            (state.stale, state.repeats) = (false, false);
            edge.readable.store(end, Ordering::Relaxed);
            edge.writable.store(end, Ordering::Relaxed);
        }
    }

    /// What the stack is asked for to reset or finish one zone.
    fn one(&self, zone: usize, ask: Ask) -> Result<Option<Begun>, Errno> {
        let (op, already, len) = match ask {
            Ask::Reset => (Op::Reset, Condition::Empty, self.rules.zone),
            _ => (Op::Finish, Condition::Full, self.rules.capacity),
        };
        let has_work = self.change(zone..zone + 1, already, false)?;
        let extent = Extent { at: zone as u64 * self.rules.zone, len };
        Ok(has_work.then_some(Begun { io: Io { op, extent, fua: false }, ticket: 0 }))
    }
}

impl Zones for Book {
    fn shape(&self) -> Shape {
        let Rules { zone, count, max_open, max_active, append, .. } = self.rules;
        Shape { zone, count, max_open, max_active, max_append: append }
    }

    fn zone(&self, number: u32) -> Option<Zone> {
        let states = self.lock();
        let state = states.all.get(number as usize)?;
        let Rules { zone, capacity, .. } = self.rules;
        let is_conventional = state.condition == Condition::Conventional;
        Some(Zone {
            at: u64::from(number) * zone,
            len: zone,
            capacity: if is_conventional { zone } else { capacity },
            written: state.next,
            condition: state.condition,
        })
    }

    fn begin(&self, ask: Ask, extent: Extent) -> Result<Option<Begun>, Errno> {
        self.is_told.store(true, Ordering::Relaxed);
        match ask {
            Ask::Write(fua) => return self.write(extent, fua, false),
            Ask::Append(fua) => return self.write(extent, fua, true),
            Ask::Flush => {
                let ticket = self.turn.fetch_add(1, Ordering::SeqCst);
                return Ok(Some(Begun { io: Io::new(Op::Flush, 0, 0), ticket }));
            }
            Ask::ResetAll => {
                let all = 0..self.edges.len();
                let has_work = self.change(all, Condition::Empty, true)?;
                let len = self.rules.zone * u64::from(self.rules.count);
                let io = Io::new(Op::Reset, 0, len);
                return Ok(has_work.then_some(Begun { io, ticket: 0 }));
            }
            _ => {}
        }
        let (zone, _) = self.place(extent)?;
        if matches!(ask, Ask::Reset | Ask::Finish) {
            return self.one(zone, ask);
        }
        let mut states = self.lock();
        if self.edges[zone].changing.load(Ordering::Relaxed) {
            return Err(Errno::EBUSY);
        }
        match (ask, states.all[zone].condition) {
            (Ask::Open, _) => states.open(zone, Condition::ExplicitlyOpen, &self.rules)?,
            (_, condition) if is_open(condition) => states.close(zone),
            (_, Condition::Closed) => {}
            _ => return Err(Errno::EIO),
        }
        Ok(None)
    }

    fn end(&self, begun: &Begun, result: Result<(), Errno>) {
        match begun.io.op {
            Op::Write => self.written(&begun.io, result),
            Op::Reset | Op::Finish => self.changed(&begun.io, result),
            Op::Flush if result.is_ok() => {
                self.durable.fetch_max(begun.ticket, Ordering::SeqCst);
            }
            _ => {}
        }
    }

    fn taken_over(&self) {
        for state in &mut self.lock().all {
            state.repeats = !matches!(state.condition, Condition::Conventional | Condition::Empty);
        }
    }
}
