//! Answers for the contract over every layer of ours, and for the suite itself: layers that break a
//! promise are caught, each by the case that is named after it.
#![allow(clippy::unwrap_used)]

mod common;
mod live;

use std::process::ExitCode;

use common::{Trials, caught};
use devsplice_contract::layer::{self, Subject};
use devsplice_contract::{Outcome, Verdict};
use devsplice_core::prelude::*;
use devsplice_layers::{
    concat, delay, error, flaky, linear, log, mirror, null, partition, stats, stripe, throttle,
    verify, zero, zoned,
};

const KIB: u64 = 1 << 10;

fn disk(size: u64) -> Limits {
    Limits::ideal(size)
}

fn disk_4k(size: u64) -> Limits {
    Limits { block: 4096, physical: 4096, discard: 4096, ..Limits::ideal(size) }
}

/// An MBR with one partition of 250 KiB that begins at 36 KiB.
fn mbr() -> Vec<u8> {
    let mut sector = vec![0; 512];
    sector[446 + 4] = 0x83;
    sector[446 + 8..][..4].copy_from_slice(&72_u32.to_le_bytes());
    sector[446 + 12..][..4].copy_from_slice(&500_u32.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A driver that finds fresh metadata of its own below.
fn formatted(driver: &'static Driver, keys: &str, below: &[Limits]) -> Subject {
    let pairs = keys.split_whitespace().filter_map(|word| word.split_once('='));
    let given: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let format = devsplice_layers::format_of(driver.name).unwrap();
    Subject::driver(driver, keys, below)
        .formatted(move |lower| format(&Args::new(driver.name, driver.keys, &given)?, lower, false))
        .resolves()
        .masks_errors()
}

/// Layers that change what they answer. What each does not promise is a property with a name.
fn live_subjects() -> Vec<(&'static str, Subject)> {
    // Reads take turns of 256 KiB between the legs; 64 KiB of each are metadata.
    let (leg, more) = (disk(364 * KIB), disk(400 * KIB));
    let twins = [disk(200 * KIB); 2];
    let on = |driver, keys: &str, below: &[Limits]| Subject::driver(driver, keys, below).resolves();
    let recorded = |keys, size| on(&log::DRIVER, keys, &[disk(96 * KIB), disk(size)]);
    let fast = "iops=20000 write-bps=400M burst=100us";
    let twin = |keys: &str| on(&verify::DRIVER, keys, &twins);
    vec![
        ("mirror", formatted(&mirror::DRIVER, "clean=1ms region=4k", &[leg, more])),
        (
            "mirror_of_three",
            formatted(&mirror::DRIVER, "clean=10ms", &[more, leg, disk_4k(368 * KIB)]),
        ),
        ("throttle", on(&throttle::DRIVER, fast, &[disk(300 * KIB)])),
        ("stats", Subject::driver(&stats::DRIVER, "", &[disk(300 * KIB)])),
        ("verify", twin("").needs_equals()),
        ("verify_report", twin("on-mismatch=report")),
        ("flaky", on(&flaky::DRIVER, "", &[twins[0], more]).scratch(1).mixes_old()),
        ("log", recorded("", 20 << 20).appends(1).ends_at_failure()),
        ("log_full", recorded("on-full=stop-logging", 256 * KIB).appends(1).dispensable(1)),
    ]
}

fn subjects() -> Vec<(&'static str, Subject)> {
    let three = [disk(160 * KIB), disk(97 * KIB + 512), disk(64 * KIB)];
    let on = |driver, keys: &str| Subject::driver(driver, keys, &[disk(300 * KIB)]);
    vec![
        // Conventional zones are a device like any other.
        ("zoned", Subject::driver(&zoned::DRIVER, "", &[disk_4k(64 * KIB); 5])),
        ("linear", on(&linear::DRIVER, "offset=7k size=201k")),
        ("linear_4k", Subject::driver(&linear::DRIVER, "offset=8k", &[disk_4k(256 * KIB)])),
        ("concat", Subject::driver(&concat::DRIVER, "", &three)),
        ("stripe", Subject::driver(&stripe::DRIVER, "chunk=64k", &[disk(192 * KIB); 2])),
        ("stripe_narrow", Subject::driver(&stripe::DRIVER, "chunk=512", &[disk(64 * KIB); 5])),
        (
            "stripe_4k",
            Subject::driver(&stripe::DRIVER, "chunk=4k", &[disk_4k(128 * KIB), disk(160 * KIB)]),
        ),
        ("partition", on(&partition::DRIVER, "number=1").holding(vec![mbr()])),
        ("delay", on(&delay::DRIVER, "read=100us write=30us")),
        ("error", on(&error::DRIVER, "at=256k").span(256 * KIB)),
        ("null", Subject::driver(&null::DRIVER, "size=2M", &[]).void(0, u64::MAX)),
        ("zero", Subject::driver(&zero::DRIVER, "size=2M block=4k", &[]).void(0, u64::MAX)),
    ]
}

/// A way to break the contract.
#[derive(Clone, Copy, PartialEq)]
enum Bug {
    /// None: the layer that the others are bugs of keeps every promise.
    None,
    /// Requests that begin in the second half land a sector further.
    OffByOne,
    /// The legs change places when a request is long.
    Swapped,
    /// A block in the middle is kept nowhere.
    Dropped,
    /// Flushes reach the first leg only.
    HalfFlush,
    /// Flushes reach nobody.
    NoFlush,
    /// A volatile cache below is hidden.
    Hidden,
    /// A read-only device below is offered as writable.
    Writable,
    /// Long writes land at the start of their 32 KiB.
    Twice,
    /// Where a byte lies is computed with a product that large devices overflow.
    Overflow,
    /// Discards go a block too far.
    Greedy,
}

/// A concat of two equal halves, with a bug.
struct Bent {
    bug: Bug,
    half: u64,
}

impl Layer for Bent {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        self.half = below.limits()[0].size;
        let mut limits = Limits::stack(below.limits(), 2 * self.half)?;
        limits.volatile_cache &= self.bug != Bug::Hidden;
        limits.read_only &= self.bug != Bug::Writable;
        Ok(limits)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        let is_second = at >= self.half;
        let (mut port, mut place) = (u16::from(is_second), at % self.half);
        let mut len = len.min(self.half - place);
        match self.bug {
            Bug::OffByOne if is_second && place + len < self.half => place += 512,
            Bug::Swapped if len > 16 << 10 => port = 1 - port,
            Bug::Dropped if at == self.half / 2 => return Ok(Map::Zero { len: 512 }),
            Bug::Dropped if at < self.half / 2 => len = len.min(self.half / 2 - at),
            Bug::Twice if io.op == Op::Write && len > 16 << 10 => {
                (len, place) = (16 << 10, place / (32 << 10) * (32 << 10));
            }
            Bug::Overflow => place = (place * 4096 + 4096) / 4096 - 1,
            Bug::Greedy if io.op == Op::Discard && place >= 512 => place -= 512,
            _ => {}
        }
        Ok(Map::To { len, port: Port(port), at: place })
    }

    fn flush(&self) -> Result<Map, Errno> {
        match self.bug {
            Bug::HalfFlush => Ok(Map::To { len: 0, port: Port(0), at: 0 }),
            Bug::NoFlush => Ok(Map::Zero { len: 0 }),
            _ => Ok(Map::All { len: 0, at: 0 }),
        }
    }
}

fn bent(bug: Bug) -> Subject {
    let make = move || Ok(Box::new(Bent { bug, half: 0 }) as Box<dyn Layer>);
    Subject::new("bent", &[disk(128 * KIB); 2], make)
}

/// Each bug, and a case that must be among those that find it.
const BUGS: &[(&str, Bug, &str)] = &[
    ("off_by_one_sector", Bug::OffByOne, "reads_bring_what_was_written"),
    ("legs_that_change_places", Bug::Swapped, "mixed_requests_at_depth_keep_every_byte"),
    ("a_block_that_is_dropped", Bug::Dropped, "reads_bring_what_was_written"),
    ("a_flush_of_one_leg", Bug::HalfFlush, "a_flush_that_fails_on_any_device_below_fails"),
    (
        "a_flush_that_goes_nowhere",
        Bug::NoFlush,
        "what_was_flushed_or_written_durably_survives_a_power_cut",
    ),
    ("a_hidden_cache", Bug::Hidden, "it_offers_nothing_that_a_device_below_does_not"),
    ("a_hidden_lock", Bug::Writable, "it_offers_nothing_that_a_device_below_does_not"),
    ("a_long_write_over_itself", Bug::Twice, "the_largest_request_is_done_whole"),
    ("an_overflow", Bug::Overflow, "the_largest_devices_are_mapped_without_overflow"),
    ("a_discard_of_the_neighbour", Bug::Greedy, "what_is_discarded_reads_as_before_or_as_zeros"),
];

/// A driver without a subject here would make promises that nobody has tested.
fn every_driver_is_a_subject() -> Outcome {
    let subjects: Vec<_> = subjects().into_iter().chain(live_subjects()).collect();
    let has = |name: &str| subjects.iter().any(|(_, subject)| subject.name() == name);
    let names = devsplice_layers::DRIVERS.iter().map(|driver| driver.name);
    let missing: Vec<_> = names.filter(|name| !has(name)).collect();
    if missing.is_empty() {
        return Ok(Verdict::Kept);
    }
    Err(format!("no subject in crates/contract/tests/layers.rs: {}", missing.join(", ")))
}

fn main() -> ExitCode {
    let mut trials = Trials::default();
    trials.test("suite::every_driver_is_a_subject", every_driver_is_a_subject);
    for (name, subject) in subjects().into_iter().chain(live_subjects()) {
        trials.suite(name, layer::suite(&subject));
    }
    trials.suite("bent_by_no_bug", layer::suite(&bent(Bug::None)));
    for &(name, bug, case) in BUGS {
        let suite = layer::suite(&bent(bug));
        trials.test(&format!("suite::{name}_is_caught"), move || caught(suite, case));
    }
    for &(name, bug, case) in live::BUGS {
        let suite = layer::suite(&live::bent(bug));
        trials.test(&format!("suite::{name}_is_caught"), move || caught(suite, case));
    }
    trials.run()
}
