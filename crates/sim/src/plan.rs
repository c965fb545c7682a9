//! Answers for what a seed decides before anything runs: faults, depths, crashes.

use crate::rng::Rng;

/// How often splices go wrong, of a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) short: u64,
    pub(crate) again: u64,
    pub(crate) interrupted: u64,
    pub(crate) io_error: u64,
    pub(crate) no_space: u64,
    /// Nothing done and no error, as at the end of a file.
    pub(crate) nothing: u64,
    pub(crate) late: u64,
    /// Most splices that a disk takes at once; more meet `EAGAIN`. 0 for any number.
    pub(crate) disk_queue: u32,
    /// The n-th splice never completes; 0 for none.
    pub(crate) lost_at: u64,
}

/// When the power goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Crash {
    #[default]
    Never,
    /// When the n-th flush has been done below, or just before.
    Flush(u64),
    /// Before the n-th event.
    Event(u64),
    /// So many nanoseconds after the start.
    Time(u64),
}

/// What a seed decides.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) faults: Faults,
    /// When each life of the engine ends; only the last one ends well.
    pub(crate) crashes: Vec<Crash>,
    /// Requests in each life.
    pub(crate) requests: u64,
    pub(crate) devices: u64,
    pub(crate) lanes: u64,
    pub(crate) depth: u64,
    pub(crate) flights: u32,
    /// Entries of the submission queue.
    pub(crate) entries: u64,
    /// Most events that are seen in one turn.
    pub(crate) batch: u64,
    /// Most nanoseconds of an ordinary splice.
    pub(crate) latency_ns: u64,
    /// Seconds after which the watchdog reports.
    pub(crate) stuck_s: u32,
}

impl Plan {
    pub(crate) fn new(rng: &mut Rng) -> Plan {
        let mut faults = Faults::default();
        let faulty = rng.percent(75);
        if faulty {
            let mut chance = |likely: &[u64]| if rng.percent(40) { rng.pick(likely) } else { 0 };
            faults.short = chance(&[20, 100, 400]);
            faults.again = chance(&[10, 50, 300]);
            faults.interrupted = chance(&[10, 50, 300]);
            faults.io_error = chance(&[2, 10, 50]);
            faults.no_space = chance(&[2, 10, 50]);
            faults.nothing = chance(&[2, 10]);
            faults.late = chance(&[2, 10]);
            faults.disk_queue = chance(&[2, 4, 16]) as u32;
        }
        let crash_count = rng.pick(&[0, 0, 1, 1, 2, 3]);
        let mut crashes: Vec<_> = (0..crash_count).map(|_| crash(rng)).collect();
        crashes.push(Crash::Never);
        if rng.percent(3) {
            faults.lost_at = rng.between(1, 60);
        }
        Plan {
            faults,
            requests: rng.between(50, 150) / crashes.len() as u64,
            crashes,
            devices: if rng.percent(85) { 1 } else { 2 },
            lanes: rng.pick(&[1, 1, 2, 3]),
            depth: rng.pick(&[1, 2, 4, 8, 16, 32]),
            // What never comes back keeps its flight; the others need one, too.
            flights: rng.pick(&[1, 4, 16, 64, 256]).max(if faults.lost_at > 0 { 4 } else { 1 }),
            entries: rng.pick(&[1, 4, 16, 128]),
            batch: rng.pick(&[1, 2, 8, 64]),
            latency_ns: rng.pick(&[2_000, 50_000, 1_000_000]),
            stuck_s: rng.between(3, 6) as u32,
        }
    }
}

fn crash(rng: &mut Rng) -> Crash {
    match rng.below(3) {
        0 => Crash::Flush(rng.between(1, 6)),
        1 => Crash::Event(rng.between(1, 400)),
        _ => Crash::Time(rng.pick(&[100_000, 1_000_000, 20_000_000]) * rng.between(1, 10) / 10),
    }
}
