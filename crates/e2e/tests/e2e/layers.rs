//! Answers for layers with a live side, from outside: what `tell` and `info` do, and that each of
//! the layers made for testing does to a real disk what its page says.

use std::time::Instant;

use devsplice_e2e::{Disk, Group, Kind, MIB, Outcome, Room, call, need_tool};
use serde_json::Value;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("tell_reaches_the_layer_that_it_names", move || tell(kind));
    group.add("tell_refuses_what_cannot_be_done", move || tell_refused(kind));
    group.add("stats_are_shown_and_forgotten", move || stats(kind));
    group.add("verify_finds_what_differs", move || verify(kind));
    group.add("flaky_forgets_what_was_not_synced", move || flaky(kind));
    group.add("a_throttle_holds_its_rate", move || throttle(kind));
}

/// What a layer shows in `info`.
fn status(disk: &Disk<'_>, layer: &str) -> Value {
    let info = disk.info();
    let layers = info["layers"].as_array().expect("a list of layers");
    let one = layers.iter().find(|one| one["layer"] == layer);
    one.unwrap_or_else(|| panic!("no {layer} in {info:#}"))["status"].clone()
}

/// Writes `len` bytes of zeros past the page cache.
fn write(disk: &Disk<'_>, len: u64) {
    let of = format!("of={}", disk.node.display());
    let count = format!("count={}", len / 4096);
    call("dd", ["if=/dev/zero", &of, "bs=4k", &count, "conv=notrunc", "oflag=direct"]).ok();
}

fn tell(kind: Kind) -> Outcome {
    let room = Room::new();
    let stack = "throttle(throttle(mem:4M, iops=1000000), bps=1G)";
    let disk = room.add(kind, stack, &["--no-part-scan"]);
    assert_eq!(status(&disk, "throttle")["iops"], 1_000_000);
    assert_eq!(status(&disk, "throttle#2")["bps"], 1 << 30);
    let said = room.devsplice(["tell", &disk.name, "throttle#2", "set", "bps=2G"]).ok();
    assert_eq!(said, "set\n");
    assert_eq!(status(&disk, "throttle#2")["bps"], 2_u64 << 30);
    assert_eq!(status(&disk, "throttle")["iops"], 1_000_000, "the other one is as it was");
    let shown = room.devsplice(["info", &disk.name]).ok();
    for words in ["layer       throttle#2", "bps", "waited"] {
        assert!(shown.contains(words), "no `{words}` in: {shown}");
    }
    write(&disk, MIB);
    disk.remove();
    Ok(())
}

fn tell_refused(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, "throttle(mem:1M, iops=1000000)", &["--no-part-scan"]);
    let plain = room.add(kind, "mem:1M", &["--no-part-scan"]);
    for (words, wanted) in [
        (["tell", &disk.name, "mirror", "x"], "no such layer; these take commands: throttle"),
        (["tell", &plain.name, "throttle", "x"], "no layer of this disk takes commands"),
        (["tell", &disk.name, "throttle", "go"], "commands: set KEY=VALUE"),
        (["tell", "nobody", "throttle", "x"], "no such disk"),
    ] {
        let text = room.refusal(words);
        assert!(text.contains(wanted), "no `{wanted}` in: {text}");
    }
    let text = room.refusal(["tell", &disk.name, "throttle", "set", "speed=1"]);
    assert!(text.contains("unknown key `speed`; valid keys: bps"), "{text}");
    assert_eq!(status(&disk, "throttle")["iops"], 1_000_000);
    let _ = room.devsplice(["tell", &disk.name, "throttle"]).run().ended_with(2);
    assert_eq!(plain.info()["layers"], Value::Array(Vec::new()));
    disk.remove();
    plain.remove();
    Ok(())
}

/// The clock may be late, never early: only the upper bound of the rate is asserted here; that the
/// rate is used up is the engine's tests' to show, with a clock of their own.
fn throttle(kind: Kind) -> Outcome {
    let room = Room::new();
    let stack = "throttle(mem:4M, write-bps=1M, burst=1ms)";
    let disk = room.add(kind, stack, &["--no-part-scan"]);
    let start = Instant::now();
    write(&disk, MIB);
    let took = start.elapsed().as_secs_f64();
    assert!(took > 0.98, "1 MiB at 1 MiB/s took {took} s");
    assert!(status(&disk, "throttle")["waited"].as_u64() > Some(0));
    let said = room.devsplice(["tell", &disk.name, "throttle", "set", "iops=1000000"]).ok();
    assert_eq!(said, "set\n");
    disk.remove();
    Ok(())
}

/// Four KiB at `at` past the page cache.
fn read_4k(disk: &Disk<'_>, at: u64) -> (Option<i32>, Vec<u8>) {
    let room = Room::new();
    let copy = room.path("copy");
    let [from, of] = [format!("if={}", disk.node.display()), format!("of={copy}")];
    let skip = format!("skip={}", at / 4096);
    let ran = call("dd", [&from, &of, "bs=4k", "count=1", &skip, "iflag=direct"]).run();
    (ran.code, std::fs::read(copy).unwrap_or_default())
}

fn stats(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, "stats(mem:4M)", &["--no-part-scan"]);
    write(&disk, MIB);
    let row = |op: &str| {
        let status = status(&disk, "stats");
        let rows = status["latencies"].as_array().cloned().unwrap_or_default();
        rows.into_iter().find(|row| row["op"] == op && row["size"] == "4k")
    };
    let writes = row("write").expect("a row of writes");
    assert_eq!(writes["count"], MIB / 4096);
    let numbers = ["p50_ns", "p90_ns", "p99_ns", "p99.9_ns", "max_ns"]
        .map(|key| writes[key].as_u64().expect("a number"));
    assert!(numbers.is_sorted() && numbers[0] > 0, "{writes}");
    let shown = room.devsplice(["info", &disk.name]).ok();
    let line = shown.lines().find(|line| line.contains("op write")).unwrap_or_default();
    for words in ["size 4k", "count 256", "p99.9_ns"] {
        assert!(line.contains(words), "no `{words}` in: {shown}");
    }
    assert_eq!(room.devsplice(["tell", &disk.name, "stats", "reset"]).ok(), "reset\n");
    assert!(row("write").is_none(), "{}", status(&disk, "stats"));
    disk.remove();
    Ok(())
}

fn verify(kind: Kind) -> Outcome {
    let room = Room::new();
    let (one, twin) = (room.file("one", 4 * MIB), room.file("twin", 4 * MIB));
    let disk = room.add(kind, &format!("verify({one}, {twin})"), &["--no-part-scan"]);
    write(&disk, MIB);
    assert_eq!(read_4k(&disk, 0).0, Some(0));
    let tell = || room.devsplice(["tell", &disk.name, "verify", "check"]).ok();
    assert_eq!(tell(), format!("{} bytes compared, all equal\n", 4 * MIB));
    let file = std::fs::File::options().write(true).open(&twin).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 2 * MIB + 77).unwrap();
    assert_ne!(read_4k(&disk, 2 * MIB).0, Some(0), "what differs was read");
    assert_eq!(read_4k(&disk, 3 * MIB).0, Some(0));
    let event = format!("verify: the devices differ at byte {}", 2 * MIB + 77);
    assert_eq!(disk.info()["events"][0], event.as_str());
    assert!(disk.log().contains(&event), "the server's log: {}", disk.log());
    assert_eq!(tell(), "1 blocks differ, see the events\n");
    disk.remove();
    Ok(())
}

/// A file system on a disk that forgets: what was synced is there, what was not may not be.
fn flaky(kind: Kind) -> Outcome {
    need_tool("mkfs.ext4")?;
    let room = Room::new();
    let (base, scratch) = (room.file("base", 64 * MIB), room.file("scratch", 64 * MIB));
    let disk = room.add(kind, &format!("flaky({base}, {scratch})"), &["--no-part-scan"]);
    let node = disk.node.to_string_lossy().into_owned();
    let tell =
        |words: &[&str]| room.devsplice(["tell", &disk.name, "flaky"].iter().chain(words)).ok();
    call("mkfs.ext4", ["-q", "-F", &node]).limit(60).ok();
    let dir = room.mount_point("mounted");
    let (kept, lost) = (dir.join("kept"), dir.join("lost"));
    for (round, cut) in [&["all"][..], &["random", "5"], &["tear", "9"]].into_iter().enumerate() {
        room.mount(&[&node], &dir);
        let bytes = vec![round as u8 + 1; 300_000];
        std::fs::write(&kept, &bytes).unwrap();
        std::fs::File::open(&kept).unwrap().sync_all().unwrap();
        std::fs::File::open(&dir).unwrap().sync_all().unwrap();
        std::fs::write(&lost, &bytes).unwrap();
        let said = tell(&[&["cut"], cut].concat());
        assert!(said.starts_with("cut: "), "{said}");
        assert_eq!(status(&disk, "flaky")["power"], "off");
        // What it still has in memory cannot be written any more.
        let _ = call("umount", [&dir]).limit(60).run();
        assert_ne!(read_4k(&disk, 0).0, Some(0), "it serves without power");
        assert_eq!(tell(&["on"]), "on\n");
        room.mount(&[&node], &dir);
        assert!(std::fs::read(&kept).unwrap() == bytes, "what was synced is lost, {cut:?}");
        let is_whole = std::fs::read(&lost).is_ok_and(|found| found == bytes);
        assert!(!is_whole || cut[0] != "all", "nothing was lost");
        room.unmount(&dir);
        let ran = call("e2fsck", ["-f", "-n", &node]).run();
        assert_eq!(ran.code, Some(0), "{cut:?}: {}", ran.out);
    }
    assert_eq!(status(&disk, "flaky")["cuts"], 3);
    disk.remove();
    Ok(())
}
