//! Answers for layers with a live side, from outside: what `tell` and `info` do, and that each of
//! the layers made for testing does to a real disk what its page says.

use std::time::Instant;

use devsplice_e2e::{Disk, Group, Kind, MIB, Outcome, Room, call};
use serde_json::Value;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("tell_reaches_the_layer_that_it_names", move || tell(kind));
    group.add("tell_refuses_what_cannot_be_done", move || tell_refused(kind));
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
