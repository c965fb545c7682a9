//! Answers for what a mirror knows while it runs, and for `map`: which legs a request goes to, and
//! whether the log allows it.
//!
//! Regions are clean (the log has no bit: no write may go), dirty (the bit is on disk), hot (dirty
//! and written lately), unsynced (dirty, and legs differ) or busy (being cleaned: writes wait).
//! Beside that there is one window in which legs are being made equal: writes to it wait.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use devsplice_core::prelude::*;
use devsplice_core::wait::{Bell, Turn};

use super::assemble::{Found, Role};
use super::format::{Bits, LegState, MOST_LEGS, Super};
use super::log::Log;

/// Bytes that are read from one leg before the next one's turn.
const READ_TURN: u64 = 256 << 10;
/// Bytes of the window in which legs are made equal.
pub(crate) const WINDOW: u64 = 256 << 10;
/// Regions that one answer looks at.
const MOST_REGIONS: u64 = 64;
/// No window is open.
const SHUT: u64 = u64::MAX;

pub(crate) mod region {
    //! States of a region.
    pub(crate) const CLEAN: u8 = 0;
    pub(crate) const DIRTY: u8 = 1;
    pub(crate) const HOT: u8 = 2;
    pub(crate) const UNSYNCED: u8 = 3;
    pub(crate) const BUSY: u8 = 4;
}

/// Numbers for people.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) repaired: AtomicU64,
    pub(crate) mismatched: AtomicU64,
    pub(crate) synced: AtomicU64,
    pub(crate) to_sync: AtomicU64,
    pub(crate) checked: AtomicU64,
}

/// A mirror that is open.
pub(crate) struct State {
    /// What the metadata says now. Changed by whoever has `change`.
    pub(crate) sb: Mutex<Super>,
    pub(crate) change: Turn,
    /// The last generation that was tried to be written.
    pub(crate) generations: AtomicU64,
    /// The last one that every leg in sync has.
    pub(crate) common: AtomicU64,
    /// Some leg that is written has another superblock than the one that counts.
    pub(crate) supers_differ: AtomicBool,
    /// By port, what lies there.
    pub(crate) roles: Mutex<Vec<Role>>,
    /// By port, where the metadata begins.
    pub(crate) meta_at: Vec<u64>,
    /// By port, in which of the two places its newest superblock is.
    pub(crate) super_in: Mutex<Vec<u8>>,
    /// Ports to read from in the low half, ports that are filled in the high half.
    sets: AtomicU32,
    regions: Box<[AtomicU8]>,
    pub(crate) region: u64,
    pub(crate) size: u64,
    /// Regions whose legs differ.
    pub(crate) unsynced: AtomicU64,
    window: AtomicU64,
    /// Who makes legs equal in a window, or compares them there.
    pub(crate) sync: Turn,
    /// Counts the legs that were added: what was copied before is not on them.
    pub(crate) added: AtomicU64,
    /// The window moved, a region is no longer busy, a leg changed: look again.
    pub(crate) moved: Bell,
    /// There may be something to do in the background.
    pub(crate) work: Bell,
    /// The states of legs as they were found are on disk: writes may go.
    pub(crate) ready: AtomicBool,
    pub(crate) log: Mutex<Log>,
    pub(crate) log_turn: Turn,
    /// Some leg's log lacks bits that another one's has.
    pub(crate) logs_differ: AtomicBool,
    pub(crate) clean_ns: u64,
    /// Writes whose regions are being marked.
    pub(crate) marking: AtomicU32,
    /// No region is cleaned before that time: a write that has to have many dirty would find the
    /// first ones clean again.
    pub(crate) dirty_until: AtomicU64,
    /// Some leg may not be written, so none is: legs stay as they were found.
    pub(crate) read_only: AtomicBool,
    /// Bytes a second that a rebuild may move; 0 for any number.
    pub(crate) rate: AtomicU64,
    pub(crate) tally: Tally,
    /// The last place that was repaired: one that fails again at once is not worth keeping.
    pub(crate) last_repair: Mutex<Option<(Port, Extent)>>,
    /// Rounds of making legs equal that failed one after another without a region done.
    pub(crate) failed_rounds: AtomicU64,
    /// The place that the last one ended at and why, as people were told.
    pub(crate) unreadable: Mutex<Option<(u64, Errno)>>,
}

/// Which ports take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sets {
    pub(crate) in_sync: u32,
    pub(crate) rebuilding: u32,
}

impl Sets {
    /// Ports that every write goes to.
    pub(crate) fn written(self) -> u32 {
        self.in_sync | self.rebuilding
    }

    /// Where unsynced regions are read from.
    pub(crate) fn primary(self) -> Port {
        port_of(self.in_sync.trailing_zeros())
    }

    pub(crate) fn without(self, port: Port) -> Sets {
        let mask = !(1 << port.0);
        Sets { in_sync: self.in_sync & mask, rebuilding: self.rebuilding & mask }
    }
}

/// A port by its number, which is below 32.
pub(crate) fn port_of(number: u32) -> Port {
    Port(u16::try_from(number).unwrap_or(u16::MAX))
}

/// The ports of a set.
pub(crate) fn ports(set: u32) -> impl Iterator<Item = Port> {
    (0..32).filter(move |port| set >> port & 1 == 1).map(port_of)
}

impl State {
    pub(crate) fn new(
        found: &Found,
        (meta_at, super_in): (Vec<u64>, Vec<u8>),
        bits: Bits,
        clean_ns: u64,
    ) -> State {
        let Super { size, region, .. } = found.newest;
        let sets = Sets {
            in_sync: found.ports(LegState::InSync),
            rebuilding: found.ports(LegState::Rebuilding),
        };
        let count = size.div_ceil(region);
        let mut unsynced = 0;
        let mut states = Vec::new();
        for index in 0..count {
            let dirty = bits.get(index);
            // With one leg there is nothing to differ from.
            let differs = dirty && sets.written().count_ones() > 1;
            unsynced += u64::from(differs);
            let state = match (dirty, differs) {
                (_, true) => region::UNSYNCED,
                (true, false) => region::DIRTY,
                _ => region::CLEAN,
            };
            states.push(AtomicU8::new(state));
        }
        State {
            sb: Mutex::new(found.newest),
            change: Turn::default(),
            generations: AtomicU64::new(found.newest.generation),
            common: AtomicU64::new(found.common),
            supers_differ: AtomicBool::new(found.differ),
            roles: Mutex::new(found.roles.clone()),
            meta_at,
            super_in: Mutex::new(super_in),
            sets: AtomicU32::new(sets.in_sync | sets.rebuilding << 16),
            regions: states.into(),
            region,
            size,
            unsynced: AtomicU64::new(unsynced),
            window: AtomicU64::new(SHUT),
            sync: Turn::default(),
            added: AtomicU64::new(0),
            moved: Bell::default(),
            work: Bell::default(),
            ready: AtomicBool::new(false),
            log: Mutex::new(Log::new(bits)),
            log_turn: Turn::default(),
            logs_differ: AtomicBool::new(false),
            clean_ns,
            marking: AtomicU32::new(0),
            dirty_until: AtomicU64::new(0),
            read_only: AtomicBool::new(false),
            rate: AtomicU64::new(0),
            tally: Tally::default(),
            last_repair: Mutex::new(None),
            failed_rounds: AtomicU64::new(0),
            unreadable: Mutex::new(None),
        }
    }

    pub(crate) fn sets(&self) -> Sets {
        let both = self.sets.load(Ordering::SeqCst);
        Sets { in_sync: both & 0xffff, rebuilding: both >> 16 }
    }

    pub(crate) fn set_sets(&self, sets: Sets) {
        self.sets.store(sets.in_sync | sets.rebuilding << 16, Ordering::SeqCst);
        self.moved.ring();
        self.work.ring();
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::SeqCst)
    }

    pub(crate) fn region_count(&self) -> u64 {
        self.regions.len() as u64
    }

    fn at(&self, index: u64) -> &AtomicU8 {
        // Extents lie inside the device, so their regions are there.
        &self.regions[usize::try_from(index).unwrap_or(usize::MAX)]
    }

    pub(crate) fn state_of(&self, index: u64) -> u8 {
        self.at(index).load(Ordering::SeqCst)
    }

    /// Changes a region's state if it is `from`; whether it was.
    pub(crate) fn turn_region(&self, index: u64, from: u8, to: u8) -> bool {
        self.at(index).compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The regions of an extent.
    pub(crate) fn regions_of(&self, extent: Extent) -> std::ops::RangeInclusive<u64> {
        extent.at / self.region..=(extent.at + extent.len - 1) / self.region
    }

    pub(crate) fn open_window(&self, at: u64) {
        self.window.store(at, Ordering::SeqCst);
        self.moved.ring();
    }

    pub(crate) fn shut_window(&self) {
        self.open_window(SHUT);
    }

    /// How much of `extent` lies before the window; `None` if it begins in it.
    fn before_window(&self, extent: Extent) -> Option<u64> {
        let window = self.window.load(Ordering::SeqCst);
        let Extent { at, len } = extent;
        if window == SHUT || at >= window.saturating_add(WINDOW) {
            return Some(len);
        }
        if at >= window { None } else { Some(len.min(window - at)) }
    }

    /// How much of a write may go: all of its regions are dirty on disk, none is busy, and no part
    /// of it is in the window.
    fn may_write(&self, extent: Extent) -> Option<u64> {
        if !self.ready.load(Ordering::SeqCst) {
            return None;
        }
        let len = self.before_window(extent)?;
        let end = extent.at + len;
        let mut may = 0;
        for index in self.regions_of(Extent { at: extent.at, len }).take(MOST_REGIONS as usize) {
            let mut state = self.state_of(index);
            if state == region::DIRTY && self.turn_region(index, region::DIRTY, region::HOT) {
                state = region::HOT;
            }
            if state != region::HOT && state != region::UNSYNCED {
                // A change that came between is seen when we are asked again.
                break;
            }
            may = end.min((index + 1) * self.region) - extent.at;
        }
        (may > 0).then_some(may)
    }

    /// Where the first bytes of a request go.
    pub(crate) fn map(&self, io: Io) -> Map {
        let Extent { at, len } = io.extent;
        let sets = self.sets();
        if io.op != Op::Read {
            return match self.may_write(io.extent) {
                Some(len) => Map::Some { len, at, ports: sets.written() },
                None => Map::Miss,
            };
        }
        let count = u64::from(sets.in_sync.count_ones());
        if count <= 1 || self.unsynced.load(Ordering::SeqCst) != 0 {
            return Map::To { len, port: sets.primary(), at };
        }
        let turn = at / READ_TURN % count;
        // Fewer than `turn` ports come before, and there are `count` of them.
        let nth = usize::try_from(turn).unwrap_or(0);
        let port = ports(sets.in_sync).nth(nth).unwrap_or(sets.primary());
        Map::To { len: len.min(READ_TURN - at % READ_TURN), port, at }
    }

    /// Why a write that missed has to wait: in the window, or its first region is busy.
    pub(crate) fn is_blocked(&self, extent: Extent) -> bool {
        !self.ready.load(Ordering::SeqCst)
            || self.before_window(extent).is_none()
            || self.state_of(extent.at / self.region) == region::BUSY
    }

    /// Whether some leg of the set lacks writes, so that the log must be kept. What the superblock
    /// says of a leg can be ahead of what is done to it, so both count.
    pub(crate) fn is_degraded(&self) -> bool {
        let written = self.sets().written().count_ones() as usize;
        let sb = lock(&self.sb);
        written < sb.leg_count() || sb.legs.iter().any(|leg| leg.state == LegState::Failed)
    }

    /// The port of a leg of the set, if it is here.
    pub(crate) fn port_of_leg(&self, wanted: usize) -> Option<Port> {
        let roles = lock(&self.roles);
        let place = roles
            .iter()
            .position(|role| matches!(role, Role::Leg { index, .. } if *index == wanted))?;
        u16::try_from(place).ok().map(Port)
    }

    /// The leg that lies at a port.
    pub(crate) fn leg_of_port(&self, port: Port) -> Option<usize> {
        match lock(&self.roles).get(usize::from(port.0)) {
            Some(Role::Leg { index, .. }) if *index < MOST_LEGS => Some(*index),
            _ => None,
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
