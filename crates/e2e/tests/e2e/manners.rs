//! Answers for how a disk shows itself and behaves: figures, discards, flushes, read-only,
//! partitions, names, shapes.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use devsplice_e2e::{
    Disk, Group, Kind, MIB, Outcome, Room, call, engines, kernel_has_file_system, need, need_tool,
    skip, verify, wait_until,
};
use serde_json::Value;

use crate::verify::counts_fit;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("del_flushes_no_more_than_it_must", move || flushes_of_del(kind));
    group.add("a_forced_write_is_durable_below_before_it_is_done", move || forced_write(kind));
    group.add("lsblk_and_blockdev_show_the_figures_of_the_stack", move || figures(kind));
    group.add("blkdiscard_gives_room_back_and_reads_as_zeros", move || discards(kind));
    group.add("blkdiscard_z_zeroes_and_leaves_the_rest", move || zeroes(kind));
    group.add("fstrim_gives_the_room_of_removed_files_back", move || trims(kind));
    group.add("fsync_reaches_the_bottom_as_a_flush", move || flushes(kind));
    group.add("a_cache_is_admitted_where_there_is_one", move || admits_its_cache(kind));
    group.add("the_page_cache_before_a_device_without_one_is_admitted", move || {
        admits_the_page_cache(kind)
    });
    group.add("a_disk_made_read_only_refuses_changes", move || read_only(kind, &["-r"], false));
    group.add("a_disk_over_a_read_only_file_refuses_changes", move || read_only(kind, &[], true));
    group.add("a_disk_of_zeros_reads_as_zeros_and_refuses_changes", move || zero_layer(kind));
    group.add("partitions_appear_unless_told_otherwise", move || partitions(kind));
    group.add("a_link_by_name_leads_to_the_node", move || link(kind));
    group.add("every_shape_of_queues_threads_and_depth_keeps_bytes", move || shapes(kind));
    if kind.is_ublk() {
        group.add("an_id_that_is_asked_for_is_given", move || ids(kind));
        group.add("threads_stay_with_their_queues_unless_told_otherwise", move || affinity(kind));
    }
}

fn blockdev(disk: &Disk<'_>, option: &str) -> u64 {
    let node = disk.node.to_string_lossy().into_owned();
    call("blockdev", [option, &node]).ok().trim().parse().unwrap()
}

fn figures(kind: Kind) -> Outcome {
    need_tool("lsblk")?;
    let room = Room::new();
    let size = 12 * MIB + 8192;
    let file = room.file("a", size);
    for (stack, block) in [(format!("file({file}, direct=off)"), 512), (file.clone(), 0), {
        (format!("file({file}, block=4096)"), 4096)
    }] {
        let disk = room.add(kind, &stack, &["--no-part-scan"]);
        let told = disk.told["block"].as_u64().unwrap();
        assert!(block == 0 || told == block, "{}", disk.told);
        assert_eq!(blockdev(&disk, "--getsize64"), size);
        assert_eq!(blockdev(&disk, "--getss"), told);
        assert_eq!(blockdev(&disk, "--getro"), 0);
        let physical = blockdev(&disk, "--getpbsz");
        assert!(physical >= told && physical.is_multiple_of(told), "physical block {physical}");
        let node = disk.node.to_string_lossy().into_owned();
        let columns = "SIZE,RO,LOG-SEC,PHY-SEC,DISC-GRAN,DISC-MAX";
        let text = call("lsblk", ["-J", "-b", "-d", "-o", columns, &node]).ok();
        let value: Value = serde_json::from_str(&text).unwrap();
        let row = &value["blockdevices"][0];
        assert_eq!(row["size"], size, "{row}");
        assert_eq!(row["ro"], false, "{row}");
        assert_eq!(row["log-sec"], told, "{row}");
        let grain = row["disc-gran"].as_u64().unwrap_or(0);
        assert!(grain >= told && row["disc-max"].as_u64().unwrap_or(0) > 0, "{row}");
        disk.remove();
    }
    Ok(())
}

/// Bytes that a file has room for on its disk.
fn room_of(file: &str) -> u64 {
    std::fs::metadata(file).unwrap().blocks() * 512
}

fn discards(kind: Kind) -> Outcome {
    need_tool("blkdiscard")?;
    let room = Room::new();
    let file = room.full_file("a", 8 * MIB, 0x5a);
    let disk = room.add(kind, &file, &[]);
    let node = disk.node.to_string_lossy().into_owned();
    let before = room_of(&file);
    call("blkdiscard", ["-o", "1M", "-l", "4M", &node]).ok();
    disk.remove();
    let after = room_of(&file);
    assert!(before >= 8 * MIB && after <= before - 4 * MIB, "{before} bytes before, {after} after");
    let bytes = std::fs::read(&file).unwrap();
    let (low, high) = (MIB as usize, 5 * MIB as usize);
    assert!(bytes[..low].iter().all(|byte| *byte == 0x5a), "bytes in front were hit");
    assert!(bytes[low..high].iter().all(|byte| *byte == 0), "discarded bytes are not zero");
    assert!(bytes[high..].iter().all(|byte| *byte == 0x5a), "bytes behind were hit");
    Ok(())
}

fn zeroes(kind: Kind) -> Outcome {
    need_tool("blkdiscard")?;
    let room = Room::new();
    let [a, b] = ["a", "b"].map(|name| room.full_file(name, 4 * MIB, 0x5a));
    let disk = room.add(kind, &format!("stripe(chunk=64k, {a}, {b})"), &[]);
    let node = disk.node.to_string_lossy().into_owned();
    let (from, len) = (MIB + 4096, 3 * MIB);
    call("blkdiscard", ["-z", "-o", &from.to_string(), "-l", &len.to_string(), &node]).ok();
    let bytes = std::fs::read(&disk.node).unwrap();
    let (from, to) = (from as usize, (from + len) as usize);
    let first = bytes.iter().position(|byte| *byte == 0);
    assert_eq!(first, Some(from), "the zeros begin elsewhere");
    assert!(bytes[from..to].iter().all(|byte| *byte == 0), "bytes in the range are not zero");
    assert!(bytes[to..].iter().all(|byte| *byte == 0x5a), "bytes behind were hit");
    disk.remove();
    Ok(())
}

fn trims(kind: Kind) -> Outcome {
    need_tool("fstrim")?;
    need(kernel_has_file_system("ext4"), "this kernel mounts no ext4")?;
    let room = Room::new();
    let file = room.file("a", 32 * MIB);
    let disk = room.add(kind, &file, &[]);
    let node = disk.node.to_string_lossy().into_owned();
    call("mkfs.ext4", ["-q", "-F", "-E", "nodiscard", &node]).ok();
    let at = room.mount_point("mnt");
    room.mount(&[&node], &at);
    let big = at.join("big");
    std::fs::write(&big, vec![0x33; 8 * MIB as usize]).unwrap();
    call("sync", ["-f", &big.to_string_lossy()]).ok();
    let full = room_of(&file);
    std::fs::remove_file(&big).unwrap();
    call("sync", ["-f", &at.to_string_lossy()]).ok();
    call("fstrim", [&at]).ok();
    let trimmed = room_of(&file);
    room.unmount(&at);
    disk.remove();
    assert!(trimmed + 6 * MIB <= full, "{full} bytes before, {trimmed} after");
    Ok(())
}

fn flushes(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let before = disk.count("flushes");
    let node = format!("--filename={}", disk.node.display());
    let arguments = ["--name=f", "--rw=write", "--bs=4k", "--size=64k", "--fsync=1", "--direct=1"];
    call("fio", arguments.into_iter().chain([node.as_str()])).dir(&room.dir).ok();
    let flushes = disk.count("flushes") - before;
    assert!(flushes >= 15, "fsync after each of 16 writes made {flushes} flushes");
    disk.remove();
    Ok(())
}

fn admits_its_cache(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let disk = room.add(kind, &file, &[]);
    assert_eq!(disk.queue("write_cache"), "write back");
    if kind.is_ublk() {
        assert_eq!(disk.queue("fua"), "1");
    }
    disk.remove();
    if kind.is_ublk() {
        // A loop device always claims a cache.
        let disk = room.add(kind, "mem:4M", &[]);
        assert_eq!(disk.queue("write_cache"), "write through");
        assert_eq!(disk.queue("fua"), "0");
        disk.remove();
    }
    Ok(())
}

/// The page cache in front of a device that has none itself is one: without flushes what is written
/// stays there.
fn admits_the_page_cache(kind: Kind) -> Outcome {
    let room = Room::new();
    let below = room.loop_device("a", 4 * MIB);
    let queue = format!("/sys/block/{}/queue", below.trim_start_matches("/dev/"));
    // It stays with the loop device's number.
    room.later("sh", &["-c", &format!("echo write back > {queue}/write_cache")]);
    std::fs::write(format!("{queue}/write_cache"), "write through").unwrap();
    for (direct, is_cached) in [("off", true), ("on", false)] {
        let stack = format!("file({below}, direct={direct})");
        let text = room.devsplice(["explain", "--json", &stack]).ok();
        let told: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(told["volatile_cache"], is_cached, "direct={direct}: {told}");
        let disk = room.add(kind, &stack, &["--no-part-scan"]);
        if kind.is_ublk() {
            let word = if is_cached { "write back" } else { "write through" };
            assert_eq!(disk.queue("write_cache"), word, "direct={direct}");
        }
        if is_cached {
            let (of, before) = (format!("of={}", disk.node.display()), disk.count("flushes"));
            call("dd", ["if=/dev/zero", &of, "bs=4k", "count=8", "conv=notrunc,fsync"]).ok();
            assert!(disk.count("flushes") > before, "an fsync did not come down");
        }
        disk.remove();
    }
    Ok(())
}

/// Tries each way to change a disk.
fn refuses_changes(disk: &Disk<'_>) {
    assert_eq!(blockdev(disk, "--getro"), 1);
    assert_eq!(disk.told["read_only"], true);
    let node = disk.node.to_string_lossy().into_owned();
    let of = format!("of={node}");
    let write = ["if=/dev/zero", &of, "bs=4k", "count=1", "conv=notrunc", "oflag=direct"];
    let ran = call("dd", write).run();
    assert_ne!(ran.code, Some(0), "a write went through: {}", ran.err);
    assert_ne!(call("blkdiscard", [&node]).run().code, Some(0), "a discard went through");
    assert_ne!(call("blkdiscard", ["-z", &node]).run().code, Some(0), "zeroing went through");
}

fn read_only(kind: Kind, more: &[&str], below: bool) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 4 * MIB, 0x77);
    let stack = if below { format!("file({file}, readonly=on)") } else { file.clone() };
    let disk = room.add(kind, &stack, more);
    refuses_changes(&disk);
    let bytes = std::fs::read(&disk.node).unwrap();
    assert!(bytes.len() as u64 == 4 * MIB && bytes.iter().all(|byte| *byte == 0x77));
    disk.remove();
    assert!(std::fs::read(&file).unwrap().iter().all(|byte| *byte == 0x77));
    Ok(())
}

fn zero_layer(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, "zero(size=4M)", &[]);
    refuses_changes(&disk);
    let bytes = std::fs::read(&disk.node).unwrap();
    assert!(bytes.len() as u64 == 4 * MIB && bytes.iter().all(|byte| *byte == 0));
    disk.remove();
    Ok(())
}

fn partitions(kind: Kind) -> Outcome {
    need_tool("sgdisk")?;
    let room = Room::new();
    kernel_reads_tables(&room)?;
    let file = room.file("a", 8 * MIB);
    call("sgdisk", ["-o", "-n", "1:2048:+2M", "-n", "2:0:0", &file]).limit(90).ok();
    let disk = room.add(kind, &format!("file({file}, block=512)"), &[]);
    let first = format!("{}p1", disk.node.display());
    wait_until(5, &first, || Path::new(&first).exists());
    let size = call("blockdev", ["--getsize64", &first]).ok();
    assert_eq!(size.trim(), (2 * MIB).to_string());
    disk.remove();
    wait_until(5, &format!("the end of {first}"), || !Path::new(&first).exists());
    if kind.is_ublk() && !has_feature("NO_AUTO_PART_SCAN") {
        return skip("partitions do appear; this kernel's ublk cannot leave them out");
    }
    let disk = room.add(kind, &format!("file({file}, block=512)"), &["--no-part-scan"]);
    let first = format!("{}p1", disk.node.display());
    assert!(!Path::new(&first).exists(), "{first} is there");
    disk.remove();
    Ok(())
}

/// Goes on if this kernel finds partitions on anything: a plain loop device is asked.
fn kernel_reads_tables(room: &Room) -> Outcome {
    let file = room.file("plain", 8 * MIB);
    call("sgdisk", ["-o", "-n", "1:2048:0", &file]).limit(90).ok();
    let node = call("losetup", ["-f", "--show", "-P", &file]).ok();
    room.later("losetup", &["-d", node.trim()]);
    need(Path::new(&format!("{}p1", node.trim())).exists(), "this kernel reads no GPT")
}

fn has_feature(name: &str) -> bool {
    let text = Room::new().devsplice(["features", "--json"]).ok();
    let value: Value = serde_json::from_str(&text).unwrap();
    let all = value["ublk"]["features"].as_object().cloned().unwrap_or_default();
    let plain = |text: &str| text.to_lowercase().replace(['_', '-', ' '], "");
    all.iter().any(|(key, there)| plain(key).contains(&plain(name)) && there == true)
}

fn link(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, "mem:1M", &[]);
    assert_eq!(std::fs::canonicalize(disk.link()).unwrap(), disk.node);
    let by_link = room.devsplice(["info", "--json", &disk.link().to_string_lossy()]).ok();
    assert!(by_link.contains(&disk.name));
    let ran = room.devsplice(["del", &disk.node.to_string_lossy()]).run();
    let _ = ran.ok();
    disk.is_gone_within(3);
    Ok(())
}

fn shapes(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    for (queues, threads, depth) in [(1, 1, 1), (1, 1, 64), (4, 1, 8), (2, 2, 128), (4, 4, 32)] {
        let shape = [queues, threads, depth].map(|number: u32| number.to_string());
        let more = ["--queues", &shape[0], "--threads", &shape[1], "--depth", &shape[2]];
        let disk = room.add(kind, &file, &more);
        let served_by = disk.info()["threads"].as_u64().unwrap();
        assert!((1..=u64::from(threads)).contains(&served_by), "{served_by} threads");
        let moved = verify(&room, &disk.node, 4 * MIB, "4k-64k");
        counts_fit(&disk, moved);
        disk.remove();
    }
    Ok(())
}

fn ids(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, "mem:1M", &["--id", "41"]);
    assert_eq!(disk.node, Path::new("/dev/ublkb41"));
    assert_eq!(disk.told["ublk_id"], 41);
    room.add_refused(kind, "mem:1M", &["--id", "41"], &["41"]);
    assert!(disk.node.exists(), "the refusal has taken the other disk away");
    disk.remove();
    Ok(())
}

fn affinity(kind: Kind) -> Outcome {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    need(cpus > 1, "one CPU only")?;
    let room = Room::new();
    let masks = |more: &[&str]| {
        let disk = room.add(kind, "mem:1M", &[&["--queues", "2"], more].concat());
        let threads = disk.server().threads();
        disk.remove();
        let io = threads.into_iter().filter(|(name, _)| name.starts_with("io/"));
        io.map(|(_, cpus)| cpus).collect::<Vec<_>>()
    };
    let (bound, free) = (masks(&[]), masks(&["--no-affinity"]));
    assert_eq!((bound.len(), free.len()), (2, 2));
    assert_ne!(bound[0], bound[1], "both threads run on the same CPUs");
    assert_eq!(free[0], free[1]);
    Ok(())
}

/// How long `del` takes tells how often it flushes a disk whose flushes are slow. A loop device is
/// flushed once more as it is given back.
fn flushes_of_del(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, &format!("delay({}, flush=3s)", room.file("a", 4 * MIB)), &[]);
    need(disk.queue("write_cache") == "write back", "no cache below, so there are no flushes")?;
    let flushes = if kind.is_ublk() { 1 } else { 2 };
    let took = disk.del(&[]).ok().took;
    let (least, most) = (Duration::from_secs(3), Duration::from_secs(3 * (flushes + 1)));
    assert!((least..most).contains(&took), "{took:?} for {flushes} flushes of 3 s");
    disk.is_gone_within(3);
    Ok(())
}

/// The block layer makes a write and a flush of a forced write to a loop device: so its flushes
/// tell that the force has come down to it.
fn forced_write(kind: Kind) -> Outcome {
    need(kind.is_ublk(), "a loop device turns forced writes into flushes")?;
    let room = Room::new();
    let below = room.loop_device("below", 4 * MIB);
    let disk = room.add(kind, &below, &["--no-part-scan"]);
    need(disk.queue("fua") == "1", "the disk takes no forced writes")?;
    let stat = format!("/sys/block/{}/stat", below.trim_start_matches("/dev/"));
    let flushes = || {
        let text = std::fs::read_to_string(&stat).unwrap();
        text.split_whitespace().nth(15).unwrap().parse::<u64>().unwrap()
    };
    let (above, under) = (disk.count("flushes"), flushes());
    let of = format!("of={}", disk.node.display());
    call("dd", ["if=/dev/zero", &of, "bs=4k", "count=8", "oflag=direct,dsync"]).ok();
    let (above, under) = (disk.count("flushes") - above, flushes() - under);
    assert_eq!(disk.count("writes"), 8);
    assert_eq!(under, above + 8, "flushes below, and {above} asked for");
    disk.remove();
    Ok(())
}
