//! Answers for copy, compare, map and bench from outside: what arrives, what is left out, how they
//! end when they are stopped, killed or fail.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use devsplice_e2e::{Group, Kind, MIB, Outcome, Room, call, need, need_tool, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("a_copy_is_equal_whatever_its_requests_and_layers", copies);
    group.add("a_copy_leaves_holes_where_nbdcopy_does", holes);
    group.add("a_copy_that_is_killed_goes_on_where_it_was_safe", killed);
    group.add("a_copy_goes_on_only_to_what_it_was_begun_to", same_target);
    group.add("a_copy_goes_on_only_between_the_devices_it_was_begun_with", same_devices);
    group.add("a_copy_that_is_interrupted_says_so_and_goes_on", interrupted);
    group.add("a_copy_is_verified_and_tells_how_far_it_is", verified);
    group.add("what_cannot_be_copied_is_refused_or_fails_with_the_place", bad);
    group.add("a_disk_is_not_copied_to_its_own_partition_nor_back", partitions);
    group.add("who_asks_a_throttled_disk_for_holes_pays_nothing", holes_are_free);
    group.add("a_source_that_is_cut_off_meanwhile_is_not_copied_as_zeros", cut_off);
    group.add("compare_finds_the_first_byte_that_differs", compare);
    group.add("map_shows_data_and_holes_through_layers", map);
    group.add("bench_measures_and_overwrites_only_when_told", bench);
    group.add("a_mirror_is_copied_to_and_from", mirror);
    group.add("a_disk_that_is_served_is_copied_to_and_from_by_its_name", move || served(kind));
}

/// Bytes that differ from place to place.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A file of data, holes, written zeros, and single blocks of data in between; not a multiple of
/// any request.
fn source(room: &Room, name: &str) -> String {
    let path = room.file(name, 24 * MIB + 12 * 1024);
    let file = File::options().write(true).open(&path).expect("the file just made");
    let write = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).expect("room");
    write(0, &noise(1, 5 << 20));
    write(6 * MIB, &vec![0; 2 << 20]);
    write(9 * MIB + 4096, &noise(2, 4096));
    write(9 * MIB + 3 * 4096, &noise(3, 8192));
    write(16 * MIB - 4096, &noise(4, (1 << 20) + 8192));
    write(24 * MIB + 8 * 1024, &noise(5, 4096));
    file.sync_all().expect("a disk that syncs");
    path
}

fn same(one: &str, other: &str) {
    call("cmp", [one, other]).limit(60).ok();
}

fn blocks(path: &str) -> u64 {
    std::fs::metadata(path).expect("a file").blocks()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

fn copies() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let ways: [&[&str]; 6] = [
        &[],
        &["--request-size", "4k", "--requests", "64", "--threads", "3"],
        &["--request-size", "1M", "--requests", "1", "--threads", "1"],
        &["--request-size", "12k", "--sparse", "0"],
        &["--allocated"],
        &["--sparse", "64k", "--request-size", "512k", "--verify"],
    ];
    for (index, way) in ways.into_iter().enumerate() {
        let to = room.path(&format!("to{index}"));
        room.devsplice(["copy", &from, &to].iter().chain(way)).ok();
        same(&from, &to);
        // Over what is there: holes and zeros of the source must replace it.
        let full = room.full_file(&format!("full{index}"), 24 * MIB + 12 * 1024, 0xa5);
        room.devsplice(["copy", &from, &full].iter().chain(way)).ok();
        same(&from, &full);
    }
    // Through layers, on both sides, to a larger disk; what is beyond stays.
    let [a, b] = ["a", "b"].map(|name| room.full_file(name, 16 * MIB, 0x5a));
    let stripe = format!("linear(stripe(chunk=64k, {a}, {b}), offset=1M)");
    room.devsplice(["copy", &from, &stripe, "--request-size", "256k"]).ok();
    let back = room.path("back");
    let size = (24 * MIB + 12 * 1024).to_string();
    let window = format!("linear(stripe(chunk=64k, {a}, {b}), offset=1M, size={size})");
    room.devsplice(["copy", &window, &back]).ok();
    same(&from, &back);
    let end = std::fs::read(&b).expect("a file");
    assert!(end[(15 << 20)..].iter().all(|byte| *byte == 0x5a), "written beyond the copy");
    Ok(())
}

fn holes() -> Outcome {
    need_tool("nbdcopy")?;
    let room = Room::new();
    let from = source(&room, "from");
    let [ours, theirs, full] = ["ours", "theirs", "full"].map(|name| room.path(name));
    room.devsplice(["copy", &from, &ours]).ok();
    call("nbdcopy", [&from, &theirs]).limit(60).ok();
    assert!(blocks(&ours) <= blocks(&theirs), "{} and {}", blocks(&ours), blocks(&theirs));
    assert!(blocks(&ours) < blocks(&from), "written zeros were written again");
    room.devsplice(["copy", "--allocated", &from, &full]).ok();
    assert!(blocks(&full) * 512 >= 24 * MIB, "{} blocks", blocks(&full));
    // A hole over data gives its room back.
    let over = room.full_file("over", 24 * MIB + 12 * 1024, 1);
    room.devsplice(["copy", &from, &over]).ok();
    assert!(blocks(&over) <= blocks(&theirs) + 64, "{} blocks", blocks(&over));
    Ok(())
}

/// A copy of 8 MiB and holes at 2 MiB a second that has come so far that the resume file says so.
fn slow_copy<'a>(room: &Room, from: &'a str, to: &'a str) -> (Vec<String>, devsplice_e2e::Running) {
    let slow = format!("throttle({from}, bps=2M)");
    let arguments = ["copy", &slow, to, "--resume", "state", "--request-size", "64k", "--json"];
    let arguments: Vec<String> = arguments.map(str::to_owned).into();
    let running = room.devsplice(&arguments).start();
    let state = room.path("state");
    let done = || {
        let text = std::fs::read_to_string(&state).unwrap_or_default();
        serde_json::from_str::<Value>(&text).ok().and_then(|state| state["done"].as_u64())
    };
    wait_until(30, "a mark", || done().is_some_and(|done| done > MIB));
    (arguments, running)
}

/// A copy that has come some way and was killed; its arguments.
fn broken_off(room: &Room, from: &str, to: &str) -> Vec<String> {
    let (arguments, mut running) = slow_copy(room, from, to);
    let pid = Pid::from_raw(i32::try_from(running.pid()).expect("a pid")).expect("a pid");
    kill_process(pid, Signal::KILL).expect("a process to kill");
    wait_until(10, "the end", || running.is_over());
    arguments
}

/// Goes on, must not begin anew, and must be right.
fn goes_on(room: &Room, arguments: &[String], from: &str, to: &str) {
    let told = json(&room.devsplice(arguments).ok());
    let bytes = told["bytes"].as_u64().expect("bytes");
    assert!(bytes > 0 && bytes < 23 * MIB, "it began anew, or did nothing: {told}");
    same(from, to);
    assert!(!Path::new(&room.path("state")).exists(), "the resume file stays");
}

fn killed() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let to = room.path("to");
    let arguments = broken_off(&room, &from, &to);
    goes_on(&room, &arguments, &from, &to);
    // Of another source, or one that was changed, nothing goes on.
    let again = room.path("again");
    let (arguments, running) = slow_copy(&room, &from, &again);
    drop(running);
    let mut other = arguments.clone();
    other[1] = format!("throttle({from}, bps=5M)");
    assert!(room.refusal(&other).contains("is of a copy of"));
    let file = File::options().write(true).open(&from).expect("the source");
    file.write_all_at(&[7], 100).expect("room");
    assert!(room.refusal(&arguments).contains("has been changed"));
    Ok(())
}

fn same_target() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let [to, away, state] = ["to", "away", "state"].map(|name| room.path(name));
    let arguments = broken_off(&room, &from, &to);
    let kept = std::fs::read(&state).expect("a resume file");
    let refused = |words: &[&str]| {
        let text = room.refusal(&arguments);
        assert!(words.iter().all(|word| text.contains(word)), "no {words:?} in {text}");
        assert!(text.contains("remove") && text.contains("state"), "{text}");
        assert_eq!(std::fs::read(&state).expect("a resume file"), kept, "{text}");
    };
    // Gone, as when its file system is not mounted: none is made in its place.
    std::fs::rename(&to, &away).expect("a file to move");
    refused(&[&to, "is gone"]);
    assert!(!Path::new(&to).exists(), "another one was made");
    // Another one of that name and size.
    let other = room.full_file("to", 24 * MIB + 12 * 1024, 0x5a);
    refused(&[&to, "is another one"]);
    assert!(std::fs::read(&other).expect("a file").iter().all(|byte| *byte == 0x5a));
    std::fs::remove_file(&other).expect("a file to remove");
    // The same bytes elsewhere are another one, too.
    call("cp", ["-a", &away, &to]).ok();
    refused(&[&to, "is another one"]);
    std::fs::rename(&away, &to).expect("a file to move");
    goes_on(&room, &arguments, &from, &to);
    // A stack of the same name over the same file, but with its bytes elsewhere.
    let (wide, toml) = (room.file("wide", 32 * MIB), room.path("stack.toml"));
    let stack = |offset: &str| {
        let keys = format!("driver = \"linear\"\nbelow = [\"{wide}\"]\noffset = \"{offset}\"\n");
        let text = format!("stack = \"top\"\n[device.top]\n{keys}");
        std::fs::write(&toml, text).expect("a file");
    };
    stack("1M");
    let arguments = broken_off(&room, &from, &toml);
    stack("2M");
    let text = room.refusal(&arguments);
    assert!(text.contains("is another one"), "{text}");
    stack("1M");
    room.devsplice(&arguments).ok();
    Ok(())
}

/// Puts another file under a loop device; it begins with the other's bytes.
fn exchange(node: &str, file: &str) {
    call("losetup", ["-d", node]).ok();
    wait_until(10, "the loop device to let go", || {
        !Path::new("/sys/block").join(&node[5..]).join("loop").exists()
    });
    call("losetup", ["--direct-io=on", node, file]).ok();
}

fn same_devices() -> Outcome {
    let room = Room::new();
    let file = source(&room, "from");
    let (to, other) = (room.loop_device("to", 32 * MIB), room.full_file("other", 32 * MIB, 0x5a));
    let arguments = broken_off(&room, &file, &to);
    exchange(&to, &other);
    let text = room.refusal(&arguments);
    assert!(text.contains("is another one") && text.contains(&to), "{text}");
    assert!(std::fs::read(&other).expect("a file").iter().all(|byte| *byte == 0x5a));
    std::fs::remove_file(room.path("state")).expect("the resume file");
    room.devsplice(&arguments).ok();
    let (wanted, got) =
        (std::fs::read(&file).expect("a file"), std::fs::read(&other).expect("a file"));
    assert!(got[..wanted.len()] == wanted, "the copy that began anew is not whole");
    // The same for what is copied.
    let (from, target) = (room.loop_device("device", 24 * MIB), room.path("target"));
    let other = room.full_file("another", 24 * MIB, 0x5a);
    let arguments = broken_off(&room, &from, &target);
    exchange(&from, &other);
    let text = room.refusal(&arguments);
    assert!(text.contains("is another one, or has been changed"), "{text}");
    Ok(())
}

fn interrupted() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let to = room.path("to");
    let (arguments, running) = slow_copy(&room, &from, &to);
    let pid = Pid::from_raw(i32::try_from(running.pid()).expect("a pid")).expect("a pid");
    kill_process(pid, Signal::INT).expect("a process");
    let ran = running.finish().ended_with(1);
    assert!(ran.err.contains("interrupted") && ran.err.contains("the same command"), "{}", ran.err);
    goes_on(&room, &arguments, &from, &to);
    // Once it is whole, what there is to stop is the comparison: it is slower by the source's rate.
    let slow = format!("throttle({from}, bps=4M)");
    let ran = room.devsplice(["copy", "--verify", "--resume", "state", &slow, &to]);
    let running = ran.start();
    let state = room.path("state");
    wait_until(10, "the copy", || Path::new(&state).exists());
    wait_until(30, "its end", || !Path::new(&state).exists());
    let pid = Pid::from_raw(i32::try_from(running.pid()).expect("a pid")).expect("a pid");
    kill_process(pid, Signal::INT).expect("a process");
    let ran = running.finish().ended_with(1);
    assert!(ran.err.contains("not verified") && ran.err.contains("compare"), "{}", ran.err);
    same(&from, &to);
    Ok(())
}

fn verified() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let [to, lines] = ["to", "lines"].map(|name| room.path(name));
    let program = devsplice_e2e::program().expect("the command under test");
    let script =
        format!("'{}' copy --verify --progress=3 '{from}' '{to}' 3> '{lines}'", program.display());
    call("sh", ["-c", &script]).limit(60).ok();
    same(&from, &to);
    let text = std::fs::read_to_string(&lines).expect("progress");
    let numbers: Vec<u32> = text
        .lines()
        .map(|line| line.strip_suffix("/100").and_then(|n| n.parse().ok()).expect("N/100"))
        .collect();
    // Once for the copy, once for the comparison.
    assert_eq!(numbers.iter().filter(|number| **number == 100).count(), 2, "{text}");
    // A target that loses what is written is found out.
    let size = 24 * MIB + 12 * 1024;
    let ran = room.devsplice(["copy", "--verify", &from, &format!("null(size={size})")]).run();
    let ran = ran.ended_with(1);
    assert!(ran.err.contains("differs from") && ran.err.contains("at byte 0,"), "{}", ran.err);
    let refused = room.refusal(["copy", "--progress=77", &from, &room.path("other")]);
    assert!(refused.contains("--progress=77"), "{refused}");
    Ok(())
}

fn bad() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let small = room.file("small", MIB);
    let refused = |arguments: &[&str], words: &[&str]| {
        let text = room.refusal(arguments.iter().copied());
        for word in words {
            assert!(text.contains(word), "{arguments:?}: no `{word}` in {text}");
        }
    };
    refused(&["copy", &from, &small], &["has 1048576 bytes", "truncate"]);
    refused(&["copy", &from, &from], &["in use"]);
    refused(&["copy", "./nothing", &small], &["nothing", "No such file"]);
    assert!(!Path::new(&room.path("nothing")).exists());
    let size = 24 * MIB + 12 * 1024;
    let full = room.full_file("full", size, 9);
    refused(&["copy", &from, &format!("file({full}, readonly=on)")], &["is read-only"]);
    refused(&["copy", "--request-size", "1k", &from, &room.path("x")], &["--request-size"]);
    refused(&["copy", "--sparse", "100", &from, &room.path("y")], &["--sparse"]);
    // Errors name the side, the request and the reason, and end the copy.
    let broken = format!("error({from}, read=EIO, at=16M, len=4k)");
    refused(&["copy", "--sparse", "0", &broken, &room.path("z")], &["read of", "EIO"]);
    let broken = format!("error({full}, write=ENOSPC)");
    refused(&["copy", &from, &broken], &["write of", "ENOSPC", "full"]);
    let broken = format!("error({full}, flush=EIO)");
    refused(&["copy", &from, &broken], &["flush failed", "EIO"]);
    Ok(())
}

fn partitions() -> Outcome {
    need_tool("sfdisk")?;
    let room = Room::new();
    let file = room.full_file("disk", 16 * MIB, 0x11);
    let table = "label: gpt\nstart=2048, size=8192\nstart=12288, size=8192\n";
    std::fs::write(room.path("table"), table).expect("a file");
    let input = File::open(room.path("table")).expect("a file");
    call("sfdisk", ["-q", "--no-reread", &file]).input(input).ok();
    let before = std::fs::read(&file).expect("a file");
    let node = call("losetup", ["-f", "--show", "-P", &file]).ok().trim().to_owned();
    room.later("losetup", &["-d", &node]);
    let (first, second) = (format!("{node}p1"), format!("{node}p2"));
    let is_there = || Path::new(&first).exists() && Path::new(&second).exists();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while !is_there() && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    need(is_there(), "no partitions of loop devices here")?;
    let linear = format!("linear({node}, size=4M)");
    for (from, to) in [(&first, &node), (&linear, &first), (&first, &first)] {
        let text = room.refusal(["copy", from, to]);
        assert!(
            text.contains("lies on the same file or device") || text.contains("in use"),
            "{text}"
        );
    }
    assert!(std::fs::read(&file).expect("a file") == before, "something was written");
    room.devsplice(["copy", "--allocated", &first, &second]).ok();
    let after = std::fs::read(&file).expect("a file");
    assert!(after[12_288 * 512..20_480 * 512] == before[2048 * 512..10_240 * 512]);
    Ok(())
}

fn holes_are_free() -> Outcome {
    let room = Room::new();
    let path = room.file("from", 4096 * MIB);
    let file = File::options().write(true).open(&path).expect("the file just made");
    file.write_all_at(&noise(1, 1 << 20), 2048 * MIB).expect("room");
    file.sync_all().expect("a disk that syncs");
    // Reading the holes would take 17 minutes.
    let (slow, to) = (format!("throttle({path}, bps=4M)"), room.path("to"));
    room.devsplice(["copy", &slow, &to]).limit(30).ok();
    assert!(blocks(&to) * 512 <= 2 * MIB, "{} blocks", blocks(&to));
    let (ours, theirs) = (File::open(&to).expect("a file"), File::open(&path).expect("a file"));
    for at in [2048 * MIB, 2049 * MIB - 4096] {
        let mut pages = [[0; 4096]; 2];
        for (file, page) in [&ours, &theirs].into_iter().zip(&mut pages) {
            file.read_exact_at(page, at).expect("a page");
        }
        assert!(pages[0] == pages[1] && pages[0] != [0; 4096], "at {at}");
    }
    Ok(())
}

fn cut_off() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let to = room.path("to");
    let (_, running) = slow_copy(&room, &from, &to);
    // Of what is left nothing but a hole was to come.
    let file = File::options().write(true).open(&from).expect("the source");
    file.set_len(18 * MIB).expect("a shorter file");
    let ran = running.finish().ended_with(1);
    assert!(ran.err.contains("read of") && ran.err.contains("EIO"), "{}", ran.err);
    Ok(())
}

fn compare() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let to = room.path("to");
    room.devsplice(["copy", &from, &to]).ok();
    let ends = |arguments: &[&str], code: i32| {
        let all = ["compare"].iter().chain(arguments);
        room.devsplice(all).run().ended_with(code)
    };
    assert!(ends(&[&from, &to], 0).out.contains("the same"));
    let file = File::options().write(true).open(&to).expect("the copy");
    for at in [24 * MIB + 12 * 1024 - 1, 20 * MIB + 77, 13 * MIB + 5, 4095] {
        file.write_all_at(b"!", at).expect("room");
        let told = json(&ends(&[&from, &to, "--json", "--request-size", "16k"], 1).out);
        assert_eq!((told["same"].as_bool(), told["differ_at"].as_u64()), (Some(false), Some(at)));
    }
    room.devsplice(["copy", &from, &to]).ok();
    file.set_len(32 * MIB).expect("a longer file");
    assert!(ends(&[&from, &to], 0).out.contains("but for zeros at the end"));
    assert!(ends(&[&to, &from, "--strict"], 1).out.contains("differ in size"));
    file.write_all_at(b"!", 30 * MIB).expect("room");
    assert!(ends(&[&to, &from], 1).out.contains(&format!("at byte {}", 30 * MIB)));
    assert!(ends(&[&from, "./nothing"], 2).err.contains("No such file"));
    let broken = format!("error({from}, read=EIO)");
    assert!(ends(&[&broken, &to], 2).err.contains("EIO"));
    Ok(())
}

fn map() -> Outcome {
    let room = Room::new();
    let path = room.file("a", 8 * MIB);
    let file = File::options().write(true).open(&path).expect("the file just made");
    file.write_all_at(&noise(1, 1 << 20), 2 * MIB).expect("room");
    file.sync_all().expect("a disk that syncs");
    let stack = format!("concat(linear({path}, offset=1M, size=4M), zero(size=1M))");
    let rows = json(&room.devsplice(["map", "--json", &stack]).ok());
    let rows: Vec<_> = rows.as_array().expect("rows").iter().collect();
    let told: Vec<_> = rows
        .iter()
        .map(|row| (row["start"].as_u64(), row["length"].as_u64(), row["content"].as_str()))
        .collect();
    let row = |at: u64, len: u64, what| (Some(at * MIB), Some(len * MIB), Some(what));
    let wanted = [row(0, 1, "hole"), row(1, 1, "data"), row(2, 2, "hole"), row(4, 1, "zero")];
    assert_eq!(told, wanted);
    let sums = json(&room.devsplice(["map", "--totals", "--json", &stack]).ok());
    assert_eq!((sums["data"].as_u64(), sums["zero"].as_u64()), (Some(MIB), Some(MIB)));
    Ok(())
}

fn bench() -> Outcome {
    let room = Room::new();
    let path = room.full_file("a", 8 * MIB, 3);
    let before = std::fs::read(&path).expect("a file");
    let refused = room.refusal(["bench", "--rw", "randwrite", &path]);
    assert!(refused.contains("--destroy"), "{refused}");
    for rw in ["read", "randread"] {
        let arguments = ["bench", "--rw", rw, "--runtime", "1", "--json", "--threads", "2", &path];
        let told = json(&room.devsplice(arguments).ok());
        let number = |name: &str| told[name].as_f64().expect("a number");
        assert!(number("requests") > 100.0 && number("seconds") >= 1.0, "{told}");
        let rate = number("requests") / number("seconds");
        assert!((number("requests_per_second") - rate).abs() < 1.0, "{told}");
        assert!(told["latencies"]["p50_ns"].as_u64() > Some(0), "{told}");
    }
    assert_eq!(std::fs::read(&path).expect("a file"), before);
    let arguments = ["bench", "--rw", "write", "--runtime", "1", "--destroy", "--bs", "64k", &path];
    room.devsplice(arguments).ok();
    assert_ne!(std::fs::read(&path).expect("a file"), before);
    let broken = format!("error({path}, read=EIO)");
    assert!(room.refusal(["bench", "--runtime", "1", &broken]).contains("EIO"));
    Ok(())
}

fn mirror() -> Outcome {
    let room = Room::new();
    let from = source(&room, "from");
    let [a, b] = ["a", "b"].map(|name| room.full_file(name, 32 * MIB, 0x11));
    let mirror = format!("mirror({a}, {b})");
    room.devsplice(["format", &mirror]).ok();
    room.devsplice(["copy", "--verify", &from, &mirror]).ok();
    // Behind the copy is what was there.
    let ran = room.devsplice(["compare", &mirror, &from]).run().ended_with(1);
    assert!(ran.out.contains(&format!("at byte {}", 24 * MIB + 12 * 1024)), "{}", ran.out);
    let back = room.path("back");
    let window = format!("linear({mirror}, size={})", 24 * MIB + 12 * 1024);
    room.devsplice(["copy", &window, &back]).ok();
    same(&from, &back);
    Ok(())
}

fn served(kind: Kind) -> Outcome {
    kind.gate()?;
    let room = Room::new();
    let from = source(&room, "from");
    let below = room.full_file("below", 32 * MIB, 0x77);
    let disk = room.add(kind, &below, &["--no-part-scan"]);
    room.devsplice(["copy", &from, &disk.name, "--verify"]).ok();
    let back = room.path("back");
    room.devsplice(["copy", &disk.node.to_string_lossy(), &back]).ok();
    let ran = room.devsplice(["compare", &disk.name, &back]).run().ended_with(0);
    assert!(ran.out.contains("the same"), "{}", ran.out);
    let refused = room.refusal(["copy", &from, &below]);
    assert!(refused.contains("in use"), "{refused}");
    disk.remove();
    let size = usize::try_from(24 * MIB + 12 * 1024).expect("64 bits");
    let (wanted, got) =
        (std::fs::read(&from).expect("a file"), std::fs::read(&below).expect("a file"));
    assert!(got[..size] == wanted, "what was copied to the disk is not below it");
    assert!(got[size..].iter().all(|byte| *byte == 0x77), "written beyond the copy");
    Ok(())
}
