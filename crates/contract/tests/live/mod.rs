//! Answers for live layers that break the contract: ours, with a bug between them and the engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devsplice_contract::layer::Subject;
use devsplice_core::prelude::*;
use devsplice_core::twist::{Twist, Twisted, nothing};
use devsplice_layers::{flaky, mirror};

/// A way to break it.
#[derive(Clone, Copy, PartialEq)]
pub enum Bug {
    /// A mirror's write goes to one leg only, now and then.
    OneLeg,
    /// A leg that failed is dropped in memory, and not on the disks of the others.
    StateLost,
    /// That a region may differ is not put into the log before it is written.
    LogLost,
    /// A leg that failed is not told of: the request fails.
    Unmasked,
    /// A flush does not wait for what is under way.
    NoGrace,
    /// What a flush copies to the disk is not flushed there.
    NoFlush,
}

/// Each bug, and a case that must be among those that find it.
pub const BUGS: &[(&str, Bug, &str)] = &[
    ("a_mirror_that_forgets_a_leg", Bug::OneLeg, "mixed_requests_at_depth_keep_every_byte"),
    ("a_mirror_that_forgets_which_leg_is_stale", Bug::StateLost, ERRORS),
    ("a_mirror_that_keeps_no_log", Bug::LogLost, "after_a_power_cut_any_device_may_be_lost"),
    ("a_mirror_that_hides_nothing", Bug::Unmasked, ERRORS),
    ("a_flush_that_does_not_wait", Bug::NoGrace, "flushes_and_durable_writes_succeed_among_others"),
    (
        "a_flush_that_is_not_passed_on",
        Bug::NoFlush,
        "what_was_flushed_or_written_durably_survives_a_power_cut",
    ),
];

const ERRORS: &str = "an_error_anywhere_below_fails_exactly_the_requests_that_touch_it";

/// The layer that a bug is one of.
pub fn bent(bug: Bug) -> Subject {
    let (subject, driver, keys) = match bug {
        Bug::OneLeg | Bug::StateLost | Bug::LogLost | Bug::Unmasked => {
            let below = [Limits::ideal(364 << 10), Limits::ideal(400 << 10)];
            let keys = "clean=1ms region=4k";
            (super::formatted(&mirror::DRIVER, keys, &below), &mirror::DRIVER, keys)
        }
        Bug::NoGrace | Bug::NoFlush => {
            let below = [Limits::ideal(200 << 10); 2];
            let subject = Subject::driver(&flaky::DRIVER, "", &below);
            (subject.resolves().scratch(1).mixes_old(), &flaky::DRIVER, "")
        }
    };
    let pairs = keys.split_whitespace().filter_map(|word| word.split_once('='));
    let given: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    subject.made(move || {
        let inner = (driver.make)(&Args::new(driver.name, driver.keys, &given)?)?;
        Ok(Box::new(Bent { inner, bug, writes: AtomicU64::new(0) }))
    })
}

struct Bent {
    inner: Box<dyn Layer>,
    bug: Bug,
    writes: AtomicU64,
}

impl Layer for Bent {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        self.inner.open(below)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        match self.inner.map(io)? {
            Map::Some { len, at, ports }
                if self.bug == Bug::OneLeg
                    && io.op == Op::Write
                    && self.writes.fetch_add(1, Ordering::SeqCst) % 7 == 6 =>
            {
                Ok(Map::Some { len, at, ports: ports & ports.wrapping_neg() })
            }
            map => Ok(map),
        }
    }

    fn flush(&self) -> Result<Map, Errno> {
        self.inner.flush()
    }

    fn live(&self) -> Option<Arc<dyn Live>> {
        let inner = self.inner.live()?;
        Some(Arc::new(Twisted { live: inner, twist: self.bug }))
    }
}

impl Twist for Bug {
    fn write(&self, meta: &dyn Meta, port: Port, at: u64, bytes: Vec<u8>, durable: bool) -> Slow {
        // A mirror's superblock begins so.
        let is_super = bytes.starts_with(b"dspl");
        match self {
            Bug::StateLost if is_super => nothing(),
            // Only what has to be there before a write goes.
            Bug::LogLost if durable && !is_super => nothing(),
            _ => meta.write(port, at, bytes, durable),
        }
    }

    fn flush(&self, meta: &dyn Meta, port: Port) -> Slow {
        if *self == Bug::NoFlush { nothing() } else { meta.flush(port) }
    }

    fn grace(&self, meta: &dyn Meta) -> Slow {
        if *self == Bug::NoGrace { nothing() } else { meta.grace() }
    }

    fn sees_to_failures(&self, live: &dyn Live) -> bool {
        *self != Bug::Unmasked && live.sees_to_failures()
    }
}
