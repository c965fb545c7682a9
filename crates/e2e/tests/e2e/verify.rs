//! Answers for every byte: fio verifies each layer over each kind of bottom, and the counters say
//! whether any of them was copied.

use devsplice_e2e::{
    Disk, Group, Kind, MIB, Mode, Moved, Outcome, Room, Skip, call, engines, had, mode, need,
    need_tool, verify, wait_until,
};

/// What lies at the bottom.
#[derive(Clone, Copy, PartialEq)]
enum Bottom {
    File,
    CachedFile,
    LoopDevice,
    NullBlk,
}

impl Bottom {
    fn name(self) -> &'static str {
        match self {
            Bottom::File => "files",
            Bottom::CachedFile => "files_through_the_page_cache",
            Bottom::LoopDevice => "loop_devices",
            Bottom::NullBlk => "null_blk_devices",
        }
    }

    /// A new bottom: its path.
    fn path(self, room: &Room, name: &str, size: u64) -> Result<String, Skip> {
        match self {
            Bottom::File | Bottom::CachedFile => Ok(room.file(name, size)),
            Bottom::LoopDevice => Ok(room.loop_device(name, size)),
            Bottom::NullBlk => room.null_device(size, &[]),
        }
    }

    /// The expression of a bottom at `path`.
    fn of(self, path: &str) -> String {
        match self {
            Bottom::CachedFile => format!("file({path}, direct=off)"),
            _ => path.to_owned(),
        }
    }

    /// The expression of a new one.
    fn make(self, room: &Room, name: &str, size: u64) -> Result<String, Skip> {
        Ok(self.of(&self.path(room, name, size)?))
    }
}

/// A stack over bottoms of one kind.
type Make = fn(&Room, Bottom) -> Result<String, Skip>;

/// Every layer, and layers over layers.
const STACKS: &[(&str, Make)] = &[
    ("a_device_alone", |room, bottom| bottom.make(room, "a", 16 * MIB)),
    ("a_linear", |room, bottom| {
        Ok(format!("linear({}, offset=1M, size=16M)", bottom.make(room, "a", 18 * MIB)?))
    }),
    ("a_concat_of_unequal_parts", |room, bottom| {
        let (a, b, c) = (5 * MIB, 3 * MIB, 9 * MIB);
        let [a, b, c] = [("a", a), ("b", b), ("c", c)].map(|(n, size)| bottom.make(room, n, size));
        Ok(format!("concat({}, {}, {})", a?, b?, c?))
    }),
    ("a_stripe_of_two", |room, bottom| {
        let [a, b] = ["a", "b"].map(|name| bottom.make(room, name, 8 * MIB));
        Ok(format!("stripe({}, {})", a?, b?))
    }),
    ("a_stripe_of_three", |room, bottom| {
        let [a, b, c] = ["a", "b", "c"].map(|name| bottom.make(room, name, 6 * MIB));
        Ok(format!("stripe(chunk=4k, {}, {}, {})", a?, b?, c?))
    }),
    ("a_gpt_partition", |room, bottom| {
        need_tool("sgdisk")?;
        let path = bottom.path(room, "a", 20 * MIB)?;
        let plan = ["-n", "1:2048:+1M", "-n", "2:0:+16M", "-c", "2:data"];
        call("sgdisk", ["-o"].into_iter().chain(plan).chain([path.as_str()])).limit(90).ok();
        Ok(format!("partition({}, label=data)", bottom.of(&path)))
    }),
    ("an_mbr_partition", |room, bottom| {
        need_tool("sfdisk")?;
        let path = bottom.path(room, "a", 20 * MIB)?;
        let script = format!(
            "printf 'label: dos\\n2048,2048\\n4096,\\n' | sfdisk -q --no-reread --wipe never {path}"
        );
        call("sh", ["-c", &script]).limit(90).ok();
        Ok(format!("partition({}, number=2)", bottom.of(&path)))
    }),
    ("a_delay", |room, bottom| {
        Ok(format!("delay({}, read=1ms, write=500us)", bottom.make(room, "a", 16 * MIB)?))
    }),
    ("an_error_behind_the_range", |room, bottom| {
        Ok(format!("error({}, at=16M)", bottom.make(room, "a", 17 * MIB)?))
    }),
    ("a_throttle_under_stats", |room, bottom| {
        Ok(format!("stats(throttle({}, bps=200M, iops=20000))", bottom.make(room, "a", 16 * MIB)?))
    }),
    ("a_mirror_of_two", |room, bottom| {
        let [a, b] = ["a", "b"].map(|name| bottom.make(room, name, 17 * MIB));
        let mirror = format!("mirror({}, {})", a?, b?);
        room.devsplice(["format", &mirror]).ok();
        Ok(mirror)
    }),
    ("a_verify", |room, bottom| {
        let [a, b] = ["a", "b"].map(|name| bottom.make(room, name, 16 * MIB));
        Ok(format!("verify({}, {})", a?, b?))
    }),
    ("a_flaky", |room, bottom| {
        let [a, b] = ["a", "b"].map(|name| bottom.make(room, name, 16 * MIB));
        Ok(format!("flaky({}, {})", a?, b?))
    }),
    ("a_log", |room, bottom| {
        let log = bottom.make(room, "log", 64 * MIB)?;
        Ok(format!("log({}, {log})", bottom.make(room, "a", 16 * MIB)?))
    }),
    ("a_stripe_over_linears", |room, bottom| {
        let [a, b] = ["a", "b"].map(|name| bottom.make(room, name, 10 * MIB));
        let (a, b) = (a?, b?);
        Ok(format!(
            "stripe(chunk=16k, linear({a}, offset=512k, size=8M), linear({b}, offset=2M, size=8M))"
        ))
    }),
    ("a_concat_of_a_linear_and_a_stripe_of_a_delay", |room, bottom| {
        let [a, b, c] = ["a", "b", "c"].map(|name| bottom.make(room, name, 6 * MIB));
        let (a, b, c) = (a?, b?, c?);
        Ok(format!("concat(linear({a}, size=5M), stripe(delay({b}, write=200us), {c}))"))
    }),
];

/// The stacks that are tried on data paths that get no full round.
const FEW: [&str; 4] =
    ["a_device_alone", "a_concat_of_unequal_parts", "a_gpt_partition", "a_stripe_over_linears"];

/// Bytes of the disk that fio uses.
const SPAN: u64 = 16 * MIB;

pub fn add(group: &mut Group, kind: Kind) {
    for &(stack, make) in STACKS {
        for bottom in bottoms(kind, stack) {
            let name = format!("{stack}_over_{}_keeps_every_byte_under_fio_verify", bottom.name());
            group.add(&name, move || keeps_every_byte(kind, bottom, make));
        }
    }
    group.add("memory_keeps_every_byte_under_fio_verify", move || memory(kind));
    group.add("blocks_of_512_bytes_are_kept_under_fio_verify", move || small_blocks(kind));
}

/// Over which bottoms a stack is tried.
fn bottoms(kind: Kind, stack: &str) -> Vec<Bottom> {
    let is_alone = stack == "a_device_alone";
    let is_few = FEW.contains(&stack);
    let mut bottoms = Vec::new();
    match (mode(), kind) {
        (Mode::Native, _) => {
            bottoms.push(Bottom::File);
            bottoms.extend(is_few.then_some(Bottom::LoopDevice));
        }
        (Mode::Vm, Kind::Ublk("auto-register")) => {
            // Every layer over files has been verified over FUSE then.
            bottoms.extend((is_few || !had("fuse")).then_some(Bottom::File));
            bottoms.push(Bottom::NullBlk);
            bottoms.extend(is_alone.then_some(Bottom::LoopDevice));
        }
        (Mode::Vm, _) if is_few => {
            bottoms.push(Bottom::File);
            bottoms.extend((is_alone || !kind.copies()).then_some(Bottom::NullBlk));
        }
        (Mode::Vm, _) => {}
    }
    bottoms.extend(is_alone.then_some(Bottom::CachedFile));
    bottoms
}

fn keeps_every_byte(kind: Kind, bottom: Bottom, make: Make) -> Outcome {
    engines()?;
    let room = Room::new();
    let stack = make(&room, bottom)?;
    let disk = room.add(kind, &stack, &[]);
    let moved = verify(&room, &disk.node, SPAN, "4k-256k");
    counts_fit(&disk, moved);
    disk.remove();
    Ok(())
}

/// Where the kernel can do without, no byte was copied; elsewhere each was, and nowhere did
/// anything fail.
pub fn counts_fit(disk: &Disk<'_>, moved: Moved) {
    let least = moved.read + moved.written;
    if !disk.kind.copies() {
        // The last request of a burst may be counted a little later.
        wait_until(5, "the last request", || disk.count("bytes_spliced") >= least);
    }
    let info = disk.info();
    let count = |name: &str| info["counts"][name].as_u64().expect("a counter");
    let (spliced, copied) = (count("bytes_spliced"), count("bytes_copied"));
    if disk.kind.copies() {
        assert_eq!(spliced, 0, "{info:#}");
        assert!(copied >= least, "{least} bytes were asked for: {info:#}");
    } else {
        assert_eq!(copied, 0, "{info:#}");
        assert!(spliced >= least, "{least} bytes were asked for: {info:#}");
    }
    assert_eq!(count("errors"), 0, "{info:#}");
    assert!(count("pieces") >= count("requests") - count("flushes"), "{info:#}");
}

fn memory(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let disk = room.add(kind, "mem:16M", &[]);
    let moved = verify(&room, &disk.node, SPAN, "4k-256k");
    counts_fit(&disk, moved);
    disk.remove();
    Ok(())
}

fn small_blocks(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let [a, b] = ["a", "b"].map(|name| room.file(name, 2 * MIB));
    let stack = format!("stripe(chunk=4k, file({a}, direct=off), file({b}, direct=off))");
    let disk = room.add(kind, &stack, &[]);
    need(disk.told["block"] == 512, "files take no 512-byte blocks here")?;
    let moved = verify(&room, &disk.node, 4 * MIB, "512-16k");
    counts_fit(&disk, moved);
    disk.remove();
    Ok(())
}
