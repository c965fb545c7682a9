//! Answers for a mirror: the same data on several devices, `mirror(/dev/a, /dev/b)`.
//!
//! Writes go to all legs at once, from the same pages; reads are spread. Each leg keeps the
//! mirror's metadata at its end (docs/formats/mirror.md): which legs hold everything, and a log of
//! regions that may differ. A region's bit is on disk before the first write to it goes, so after a
//! crash only those regions are copied. A leg that fails is dropped on the disks of the others
//! before a write that it lacks is acknowledged.
//!
//! What it does not do: tell which leg is right when two that can both be read differ (it takes the
//! first); keep legs equal in blocks that were discarded and not written since, or to which a
//! client sends two writes at once; nor keep what an unfinished write left before a crash from
//! changing once more, if the leg that is read from is lost before the legs are equal again.

mod assemble;
mod check;
mod format;
mod live;
mod log;
mod state;
mod sync;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use devsplice_core::prelude::*;

use assemble::{Found, decide};
use format::{
    BLOCK, Bits, LEAST_REGION, LOG_AT, Leg, LegState, MOST_LEGS, MOST_LOG_BLOCKS, Super,
    default_region, meta_at, read_super, super_at,
};
use state::State;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "mirror",
    about: "the same data on several devices (RAID 1), with a log for quick resync",
    below: Arity::Many,
    keys: &[
        Key::optional("degraded", Kind::Switch, "go on without a leg that is missing, default off"),
        Key::optional("rate", Kind::Size, "bytes a second that rebuilds may copy, default any"),
        Key::optional(
            "clean",
            Kind::Duration,
            "time after which an idle region is clean, default 5s",
        ),
        Key::optional(
            "region",
            Kind::Size,
            "bytes for one bit of the log, at format; default by size",
        ),
    ],
    make: |args| {
        Ok(Box::new(Mirror {
            degraded: args.switch("degraded")?.unwrap_or(false),
            rate: args.size("rate")?.unwrap_or(0),
            clean_ns: args.duration_ns("clean")?.unwrap_or(5_000_000_000),
            state: None,
        }))
    },
};

struct Mirror {
    degraded: bool,
    rate: u64,
    clean_ns: u64,
    state: Option<Arc<State>>,
}

/// Where each device's metadata begins.
fn places(legs: &[Limits]) -> Result<Vec<u64>> {
    if legs.len() > MOST_LEGS {
        let reason = format!("{} devices, the most is {MOST_LEGS}", legs.len());
        return Err(Error::invalid("mirror", reason));
    }
    let place = |(port, leg): (usize, &Limits)| {
        meta_at(leg.size).ok_or_else(|| {
            let reason = format!("device {port} has {} bytes, too few for metadata", leg.size);
            Error::invalid("mirror", reason)
        })
    };
    legs.iter().enumerate().map(place).collect()
}

fn number(port: usize) -> Port {
    Port(u16::try_from(port).unwrap_or(u16::MAX))
}

impl Mirror {
    /// What the legs are, and in which place each one's superblock is.
    fn assemble(&self, below: &mut dyn Lower, places: &[u64]) -> Result<(Found, Vec<u8>)> {
        let mut supers = Vec::new();
        let mut super_in = Vec::new();
        for (port, at) in places.iter().enumerate() {
            let found = read_super(below, number(port), *at).map_err(|errno| {
                let thing = format!("metadata of device {port}");
                Error::new(ErrorKind::Os, thing, format!("cannot be read: {errno}"))
                    .next("leave the device out, and say degraded=on")
            })?;
            supers.push(found.map(|(found, _)| found));
            super_in.push(found.map_or(1, |(_, place)| place));
        }
        Ok((decide(&supers, self.degraded)?, super_in))
    }
}

/// The bits of all legs that hold the truth, together; and whether some leg's log says less. It
/// may, after a crash, and must not for long: that leg could be the only one left.
fn read_log(below: &mut dyn Lower, found: &Found, places: &[u64]) -> Result<(Bits, bool), Errno> {
    let blocks = found.newest.log_blocks();
    let mut bits = Bits::new(blocks);
    let mut read = Vec::new();
    let ports = found.ports(LegState::InSync) | found.ports(LegState::Rebuilding);
    for port in state::ports(ports) {
        for block in 0..usize::try_from(blocks).unwrap_or(0) {
            let mut bytes = vec![0; BLOCK];
            let at = places[usize::from(port.0)] + LOG_AT + (block * BLOCK) as u64;
            below.read(port, at, &mut bytes)?;
            bits.add(block, &bytes);
            read.push((block, bytes));
        }
    }
    let differ = read.iter().any(|(block, bytes)| bits.encode(*block) != *bytes);
    Ok((bits, differ))
}

impl Layer for Mirror {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let legs = below.limits().to_vec();
        let places = places(&legs)?;
        let (found, super_in) = self.assemble(below, &places)?;
        let size = found.newest.size;
        for (port, at) in places.iter().enumerate() {
            if *at < size && found.roles[port] != assemble::Role::Spare {
                let reason = format!("device {port} is too small for the mirror's {size} bytes");
                return Err(Error::invalid("mirror", reason));
            }
        }
        let (bits, differ) = read_log(below, &found, &places).map_err(|errno| {
            Error::new(ErrorKind::Os, "the mirror's log", format!("cannot be read: {errno}"))
        })?;
        let state = State::new(&found, (places, super_in), bits, self.clean_ns);
        state.rate.store(self.rate, Ordering::SeqCst);
        state.logs_differ.store(differ, Ordering::SeqCst);
        let mut limits = Limits::stack(&legs, size)?;
        state.read_only.store(limits.read_only, Ordering::SeqCst);
        self.state = Some(Arc::new(state));
        limits.stable_writes = true;
        Ok(limits)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        self.state.as_ref().map(|state| state.map(io)).ok_or(Errno::ENXIO)
    }

    fn flush(&self) -> Result<Map, Errno> {
        let state = self.state.as_ref().ok_or(Errno::ENXIO)?;
        Ok(Map::Some { len: 0, at: 0, ports: state.sets().written() })
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        self.state.clone().map(|state| -> Arc<dyn Live> { state })
    }
}

/// A number that nobody else has.
fn fresh_id() -> [u8; 16] {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let mut id = [0; 16];
    for half in id.chunks_exact_mut(8) {
        // The standard library seeds each of these from the kernel's random numbers.
        half.copy_from_slice(&RandomState::new().build_hasher().finish().to_le_bytes());
    }
    id
}

/// Writes the metadata of a new mirror. The first device's data is what counts: with `force` over
/// a mirror that is there, otherwise only where there is none; the other devices are filled from it
/// when the mirror is first started.
///
/// # Errors
/// If a device is too small, holds a mirror already, or cannot be written.
pub fn format(args: &Args, below: &mut dyn Lower, force: bool) -> Result<String> {
    let legs = below.limits().to_vec();
    let places = places(&legs)?;
    if legs.len() < 2 {
        return Err(Error::invalid("mirror", "one device is no mirror; give two or more"));
    }
    let size = places.iter().min().copied().unwrap_or(0);
    let region = args.size("region")?.unwrap_or_else(|| default_region(size));
    let mut states = [Leg::default(); MOST_LEGS];
    for (index, leg) in states.iter_mut().enumerate().take(legs.len()) {
        let state = if index == 0 { LegState::InSync } else { LegState::Rebuilding };
        *leg = Leg { state, since: 1, before: 0 };
    }
    let new =
        Super { set: fresh_id(), generation: 1, before: 0, size, region, own: 0, legs: states };
    if !region.is_power_of_two() || region < LEAST_REGION || new.log_blocks() > MOST_LOG_BLOCKS {
        let reason = format!("{region} is no power of two from {LEAST_REGION}, or too small here");
        return Err(Error::invalid("region", reason)
            .next(format!("{} is the default", default_region(size))));
    }
    let os = |port: usize, errno: Errno| {
        Error::new(ErrorKind::Os, format!("device {port}"), errno.to_string())
    };
    for (port, at) in places.iter().enumerate() {
        let there = read_super(below, number(port), *at).map_err(|errno| os(port, errno))?;
        if there.is_some() && !force {
            let reason = format!("device {port} is a leg of a mirror already");
            return Err(
                Error::new(ErrorKind::Busy, "mirror", reason).next("--force makes it forget that")
            );
        }
    }
    let mut all = Bits::new(new.log_blocks());
    (0..size.div_ceil(region)).for_each(|index| all.set(index, true));
    for (port, at) in places.iter().enumerate() {
        let own = u8::try_from(port).unwrap_or(u8::MAX);
        let copy = Super { own, ..new };
        let mut blocks = vec![(super_at(1), vec![0; BLOCK])];
        for block in 0..usize::try_from(new.log_blocks()).unwrap_or(0) {
            blocks.push((LOG_AT + (block * BLOCK) as u64, all.encode(block)));
        }
        blocks.push((super_at(0), copy.encode()));
        for (place, bytes) in blocks {
            below.write(number(port), at + place, &bytes).map_err(|errno| os(port, errno))?;
        }
    }
    Ok(format!("mirror of {} devices, {size} bytes, {region} bytes a region", legs.len()))
}
