//! Answers for devices with zones beside those of the kernel's null_blk and zloop: the same is done
//! to both, and they say and hold the same. zloop's files are compared, too, and change owners.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use devsplice_contract::rng::Rng;
use devsplice_e2e::{Disk, Group, Kind, MIB, Outcome, Room, call, need, need_tool};

use crate::zoned::{blkzone, report};

/// Zones, of which so many are conventional; the bytes of one, and those that can be written.
const COUNT: u64 = 8;
const CONVENTIONAL: u64 = 2;
const ZONE: u64 = 4 * MIB;
const CAPACITY: u64 = 3 * MIB;
/// Operations in a row, after each few of which conditions are compared.
const STEPS: usize = 40;
const EACH: usize = 6;
/// Where zloop is told what to make and remove.
const CONTROL: &str = "/dev/zloop-control";

pub fn add(group: &mut Group, kind: Kind) {
    group.add("zones_are_as_those_of_null_blk", move || null_blk(kind));
    group.add("zones_and_their_files_are_as_those_of_zloop", move || zloop(kind));
}

/// How many zones may be open, and what is not done: where implementations differ, and may.
#[derive(Clone, Copy)]
struct Rules {
    open: u64,
    /// Whether zones are opened explicitly. With a limit zloop then closes none that was opened by
    /// a write, though such a one may be closed at any time; null_blk does.
    opens: bool,
    /// Whether writes go on behind a zone's capacity. zloop takes them.
    crosses: bool,
}

impl Rules {
    const ANY: Rules = Rules { open: 0, opens: true, crosses: true };
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write { zone: u64, at: u64, len: usize },
    Manage(&'static str, u64),
    ResetAll,
}

/// The step after `last`, over zones that are written so far.
fn step(rng: &mut Rng, last: Option<Step>, written: &[u64], rules: Rules) -> Step {
    let zone = rng.below(COUNT);
    // One that is closed with nothing written is empty.
    if let Some(Step::Manage("open", zone)) = last
        && rng.below(2) == 0
    {
        return Step::Manage("close", zone);
    }
    let len = [4096, 65_536, 512 << 10, 512 << 10][rng.below(4) as usize];
    let at = match (zone < CONVENTIONAL, rng.below(8)) {
        (true, _) => rng.below(ZONE / 4096 - 127) * 4096,
        // Not where it goes.
        (false, 0) => written[zone as usize].saturating_add(4096) % CAPACITY,
        (false, _) => written[zone as usize],
    };
    let room = if rules.crosses || zone < CONVENTIONAL { ZONE - at } else { CAPACITY - at };
    let len = len.min(room.max(4096) as usize);
    match rng.below(20) {
        0 | 1 if rules.opens => Step::Manage("open", zone),
        2 => Step::Manage("close", zone),
        3 => Step::Manage("finish", zone),
        4 | 5 => Step::Manage("reset", zone),
        6 if rng.below(3) == 0 => Step::ResetAll,
        _ => Step::Write { zone, at, len },
    }
}

/// Memory as direct I/O takes it.
struct Pages(Vec<u8>);

impl Pages {
    fn new(len: usize) -> Pages {
        Pages(vec![0; len + 4096])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let at = self.0.as_ptr().align_offset(4096);
        let len = self.0.len() - 4096;
        &mut self.0[at..at + len]
    }
}

/// One of the two devices.
struct One {
    node: PathBuf,
    file: File,
}

impl One {
    fn open(node: &Path) -> One {
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(node);
        One { node: node.into(), file: file.unwrap() }
    }

    /// Does it; whether that went well.
    fn does(&self, step: Step, data: &[u8]) -> bool {
        match step {
            Step::Write { zone, at, len } => {
                self.file.write_at(&data[..len], zone * ZONE + at).is_ok_and(|done| done == len)
            }
            Step::Manage(verb, zone) => blkzone(&self.node, verb, zone * ZONE, Some(1)),
            Step::ResetAll => blkzone(&self.node, "reset", 0, None),
        }
    }

    /// What there is of each zone, written and condition. Where the number of open zones is
    /// limited, which ones are closed for others is nobody's business.
    fn zones(&self, rules: Rules) -> Vec<(u64, String)> {
        let said = report(&self.node).into_iter().map(|(written, condition)| {
            let is_open_or_closed = condition == "oi" || condition == "cl";
            match condition.as_str() {
                "fu" => (CAPACITY, condition),
                "nw" => (0, condition),
                _ if rules.open > 0 && is_open_or_closed => (written, "active".to_owned()),
                _ => (written, condition),
            }
        });
        said.collect()
    }

    /// All data that was written.
    fn content(&self, written: &[u64]) -> Vec<u8> {
        let mut pages = Pages::new(MIB as usize);
        let mut all = Vec::new();
        for (zone, written) in (0..).zip(written) {
            let end = if zone < CONVENTIONAL { ZONE } else { *written };
            for at in (0..end).step_by(MIB as usize) {
                let len = (end - at).min(MIB) as usize;
                let bytes = &mut pages.bytes()[..len];
                let read = self.file.read_exact_at(bytes, zone * ZONE + at);
                read.unwrap_or_else(|error| panic!("zone {zone}, {at}: {error}"));
                all.extend_from_slice(bytes);
            }
        }
        all
    }
}

/// What both say of their zones, which is the same; bytes that are written, by zone. After a write
/// that was refused, not to ask would be another test: the kernel may then refuse the next one as
/// well, whoever made the device, until it has asked where that goes.
fn written([ours, other]: [&One; 2], rules: Rules, when: &dyn Fn() -> String) -> Vec<u64> {
    let zones = ours.zones(rules);
    assert_eq!(zones, other.zones(rules), "{}", when());
    zones.into_iter().map(|(written, _)| written).collect()
}

/// Does the same to both, as this seed says; both have to say and hold the same.
fn same(both: [&One; 2], seed: u64, rules: Rules) {
    let mut rng = Rng::new(seed);
    let mut pages = Pages::new(512 << 10);
    let mut done = Vec::new();
    let mut ends = written(both, rules, &|| format!("seed {seed}, before all"));
    let (mut succeeded, mut last) = (0, None);
    for number in 1..=STEPS {
        let step = step(&mut rng, last, &ends, rules);
        last = Some(step);
        for sector in pages.bytes().chunks_exact_mut(512) {
            sector.fill(rng.next() as u8);
        }
        let went_well = both.map(|one| one.does(step, pages.bytes()));
        done.push(format!("{step:?}: {went_well:?}"));
        assert_eq!(went_well[0], went_well[1], "seed {seed}, after {done:#?}");
        succeeded += usize::from(went_well[0]);
        match step {
            Step::Write { zone, at, len } if went_well[0] && number % EACH != 0 => {
                if zone >= CONVENTIONAL {
                    ends[zone as usize] = at + len as u64;
                }
            }
            _ => ends = written(both, rules, &|| format!("seed {seed}, after {done:#?}")),
        }
    }
    assert!(succeeded * 2 > STEPS && succeeded < STEPS, "seed {seed}: {done:#?}");
    let [ours, other] = both.map(|one| one.content(&ends));
    let place = ours.iter().zip(&other).position(|(one, other)| one != other);
    assert_eq!(place, None, "seed {seed}: other data, of {ends:?}, after {done:#?}");
}

/// A device of ours whose files are in that directory.
fn disk<'r>(room: &'r Room, kind: Kind, directory: &str, rules: Rules) -> Disk<'r> {
    std::fs::create_dir_all(directory).unwrap();
    let files = format!("zones(path={directory}, size=4M, count=8, conventional=2)");
    let stack = format!("zoned({files}, capacity=3M, open={})", rules.open);
    room.add(kind, &stack, &["--no-part-scan"])
}

fn null_blk(kind: Kind) -> Outcome {
    need_tool("blkzone")?;
    for (seed, rules) in [(1, Rules::ANY), (2, Rules { open: 3, ..Rules::ANY })] {
        let room = Room::new();
        let open = rules.open.to_string();
        let size = COUNT * ZONE;
        let other = room.null_device(
            size,
            &[
                ("zoned", "1"),
                ("zone_size", "4"),
                ("zone_capacity", "3"),
                ("zone_nr_conv", "2"),
                ("zone_max_open", &open),
            ],
        )?;
        let disk = disk(&room, kind, &room.path("zones"), rules);
        let [ours, other] = [&disk.node, Path::new(&other)].map(One::open);
        same([&ours, &other], seed, rules);
        drop((ours, other));
        disk.remove();
    }
    Ok(())
}

/// What zloop has made; it goes with this value.
struct Zloop(u32);

impl Zloop {
    /// Device `number` over the files in the directory of that name in `base`.
    fn new(base: &str, number: u32, rules: Rules) -> Zloop {
        std::fs::create_dir_all(format!("{base}/{number}")).unwrap();
        let sizes = "capacity_mb=32,zone_size_mb=4,zone_capacity_mb=3,conv_zones=2";
        let open = rules.open;
        let all = format!("add id={number},{sizes},max_open_zones={open},base_dir={base}");
        std::fs::write(CONTROL, &all).unwrap_or_else(|error| panic!("zloop: {all}: {error}"));
        Zloop(number)
    }

    fn node(&self) -> PathBuf {
        format!("/dev/zloop{}", self.0).into()
    }
}

impl Drop for Zloop {
    fn drop(&mut self) {
        let _ = std::fs::write(CONTROL, format!("remove id={}", self.0));
    }
}

/// The files of a directory: their names and what they hold.
fn files(directory: &str) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    let one = |entry: std::fs::DirEntry| {
        (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).unwrap())
    };
    let mut files: Vec<_> = entries.map(one).collect();
    files.sort();
    files
}

fn zloop(kind: Kind) -> Outcome {
    need_tool("blkzone")?;
    if !Path::new(CONTROL).exists() && need_tool("modprobe").is_ok() {
        let _ = call("modprobe", ["-q", "zloop"]).run();
    }
    need(Path::new(CONTROL).exists(), "this kernel has no zloop")?;
    for (seed, open) in [(11, 0), (12, 2)] {
        let rules = Rules { open, opens: open == 0, crosses: false };
        let room = Room::new();
        let number = 900 + u32::try_from(seed).unwrap();
        let mut bases = [room.path("a"), room.path("b")];
        // The second time with the files of the other.
        for turn in 0..2 {
            let [of_ours, of_other] = bases.each_ref().map(|base| format!("{base}/{number}"));
            let disk = disk(&room, kind, &of_ours, rules);
            let zloop = Zloop::new(&bases[1], number, rules);
            let [ours, other] = [&disk.node, &zloop.node()].map(|node| One::open(node));
            same([&ours, &other], seed + 100 * turn, rules);
            drop((ours, other));
            drop(zloop);
            disk.remove();
            let [ours, other] = [files(&of_ours), files(&of_other)];
            let lengths = |files: &[(String, Vec<u8>)]| -> Vec<_> {
                files.iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect()
            };
            assert_eq!(lengths(&ours), lengths(&other), "seed {seed}, turn {turn}");
            assert!(ours == other, "seed {seed}, turn {turn}: the files hold other data");
            bases.reverse();
        }
    }
    Ok(())
}
