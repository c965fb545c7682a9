//! Answers for what disks have done between two looks at them: the kernel counts what clients ask
//! for (`/sys/block/*/stat`), the server what came of it.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Bytes of a sector in the kernel's counters, whatever the disk's block is.
const SECTOR: u64 = 512;

/// The kernel's counters of a disk (Documentation/block/stat.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    reads: u64,
    read_sectors: u64,
    read_ms: u64,
    writes: u64,
    write_sectors: u64,
    write_ms: u64,
    in_flight: u64,
}

impl Stat {
    fn of(device: &str) -> Option<Stat> {
        let name = Path::new(device).file_name()?.to_str()?;
        Stat::parse(&std::fs::read_to_string(format!("/sys/class/block/{name}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Stat> {
        let all: Vec<u64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [reads, _, read_sectors, read_ms, writes, _, write_sectors, write_ms, in_flight, ..] =
            all[..]
        else {
            return None;
        };
        Some(Stat { reads, read_sectors, read_ms, writes, write_sectors, write_ms, in_flight })
    }
}

/// All disks at one moment.
pub struct Sample {
    at: Instant,
    disks: Vec<(Value, Option<Stat>)>,
}

/// What a disk does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// What it is called.
    pub name: String,
    /// `live`, `quiesced`, `ending`, `waiting`, `dead`, `silent`.
    pub state: String,
    /// Its node.
    pub device: String,
    /// Reads a second.
    pub reads: f64,
    /// Writes a second.
    pub writes: f64,
    /// Bytes read a second.
    pub read_bytes: f64,
    /// Bytes written a second.
    pub written_bytes: f64,
    /// Requests in flight now.
    pub queue: u64,
    /// How long a read or write took, in milliseconds; none if there was none.
    pub wait_ms: Option<f64>,
    /// Half of what went below the highest layer that measures stayed below this, in nanoseconds,
    /// since the disk was made; of the operation and size that is seen most.
    pub p50_ns: Option<u64>,
    /// The same for 99 of 100.
    pub p99_ns: Option<u64>,
    /// Requests that failed, since the disk was made.
    pub errors: u64,
}

impl Sample {
    /// Looks at the kernel's counters of these.
    pub fn take(disks: Vec<Value>) -> Sample {
        let look = |disk: Value| {
            let stat = Stat::of(disk["device"].as_str().unwrap_or_default());
            (disk, stat)
        };
        Sample { at: Instant::now(), disks: disks.into_iter().map(look).collect() }
    }

    /// What was done since another one. A disk that was not there then has done nothing yet.
    pub fn since(&self, last: &Sample) -> Vec<Row> {
        let passed = self.at.duration_since(last.at);
        let each = self.disks.iter().map(|(disk, stat)| {
            let is_same = |(other, _): &&(Value, Option<Stat>)| {
                other["name"] == disk["name"] && other["started_ms"] == disk["started_ms"]
            };
            let before = last.disks.iter().find(is_same).and_then(|(_, stat)| *stat);
            row(disk, before, *stat, passed)
        });
        each.collect()
    }
}

#[allow(clippy::cast_precision_loss)] // Rates for people.
fn row(disk: &Value, before: Option<Stat>, now: Option<Stat>, passed: Duration) -> Row {
    let text = |key: &str| disk[key].as_str().unwrap_or_default().to_owned();
    let now = now.unwrap_or_default();
    let before = before.unwrap_or(now);
    let since = |field: fn(&Stat) -> u64| field(&now).saturating_sub(field(&before)) as f64;
    let rate = |count: f64| count / passed.as_secs_f64().max(1e-3);
    let (reads, writes) = (since(|stat| stat.reads), since(|stat| stat.writes));
    let both = reads + writes;
    let ms = since(|stat| stat.read_ms) + since(|stat| stat.write_ms);
    let seen = most_seen(disk);
    Row {
        name: text("name"),
        state: text("state"),
        device: text("device"),
        reads: rate(reads),
        writes: rate(writes),
        read_bytes: rate(since(|stat| stat.read_sectors) * SECTOR as f64),
        written_bytes: rate(since(|stat| stat.write_sectors) * SECTOR as f64),
        queue: now.in_flight,
        wait_ms: (both > 0.0).then_some(ms / both),
        p50_ns: seen.and_then(|row| row["p50_ns"].as_u64()),
        p99_ns: seen.and_then(|row| row["p99_ns"].as_u64()),
        errors: disk["counts"]["errors"].as_u64().unwrap_or(0),
    }
}

/// The latencies of the operation and size that the highest layer which measures has seen most.
fn most_seen(disk: &Value) -> Option<&Value> {
    let mut layers = disk["layers"].as_array()?.iter();
    let rows = layers.find_map(|layer| layer["status"]["latencies"].as_array())?;
    rows.iter().max_by_key(|row| row["count"].as_u64())
}

impl Row {
    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "name": self.name, "state": self.state, "device": self.device,
            "reads_per_second": self.reads, "writes_per_second": self.writes,
            "read_bytes_per_second": self.read_bytes,
            "written_bytes_per_second": self.written_bytes,
            "queue": self.queue, "wait_ms": self.wait_ms,
            "p50_ns": self.p50_ns, "p99_ns": self.p99_ns, "errors": self.errors,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "     100        0      800       50      20        0     1600      \
                        30        3       70       80        0        0        0        0\n";

    #[test]
    fn the_kernels_counters_are_read_by_their_places() {
        let stat = Stat::parse(STAT).unwrap();
        let want = Stat {
            reads: 100,
            read_sectors: 800,
            read_ms: 50,
            writes: 20,
            write_sectors: 1600,
            write_ms: 30,
            in_flight: 3,
        };
        assert_eq!(stat, want);
        assert_eq!(Stat::parse("1 2 3"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn rates_are_of_what_was_done_in_between() {
        let before = Stat::parse(STAT).unwrap();
        let now = Stat { reads: 300, read_sectors: 2400, read_ms: 150, in_flight: 7, ..before };
        let latencies = json!([
            { "op": "read", "count": 9, "p50_ns": 10, "p99_ns": 20 },
            { "op": "write", "count": 90, "p50_ns": 30, "p99_ns": 40 },
        ]);
        let disk = json!({ "name": "a", "state": "live", "device": "/dev/ublkb0",
        "counts": { "errors": 2 }, "layers": [
            { "layer": "mirror", "status": { "state": "clean" } },
            { "layer": "stats", "status": { "latencies": latencies } },
        ]});
        let row = row(&disk, Some(before), Some(now), Duration::from_secs(2));
        assert_eq!((row.reads, row.writes, row.read_bytes), (100.0, 0.0, 409_600.0));
        assert_eq!((row.queue, row.wait_ms, row.errors), (7, Some(0.5), 2));
        assert_eq!((row.p50_ns, row.p99_ns), (Some(30), Some(40)));
        assert_eq!(row.json()["reads_per_second"], 100.0);
    }

    #[test]
    fn a_disk_that_is_new_or_counts_from_the_start_again_has_done_nothing() {
        let disk = json!({ "name": "a" });
        let now = Stat::parse(STAT);
        let new = row(&disk, None, now, Duration::from_secs(1));
        assert_eq!((new.reads, new.wait_ms, new.queue), (0.0, None, 3));
        let less = Stat { reads: 1, ..now.unwrap() };
        assert_eq!(row(&disk, now, Some(less), Duration::from_secs(1)).reads, 0.0);
        assert_eq!(row(&disk, now, None, Duration::from_secs(1)).queue, 0);
    }
}
