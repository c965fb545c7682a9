//! Answers for what becomes of a disk over FUSE that is kept where something is in the way: its
//! state cannot be written or read, what is below is in use, or takes its time.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use devsplice_e2e::{
    Group, Kind, MIB, Outcome, Process, Room, Server, call, kernel_is, need, need_tool, wait_until,
};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;

use crate::recover::{kill, server, state};

pub fn add(group: &mut Group, kind: Kind) {
    let keeps = || need(kernel_is(6, 9), "FUSE sends no request again before Linux 6.9");
    group.add("kept_a_swap_that_cannot_be_written_down_changes_nothing", move || {
        keeps().and_then(|()| full_run(kind))
    });
    group.add("kept_a_state_file_that_makes_no_sense_is_left_alone", move || {
        keeps().and_then(|()| junk(kind))
    });
    group.add("kept_what_is_in_use_below_is_tried_again", move || {
        keeps().and_then(|()| in_use_below(kind))
    });
    group.add("kept_a_guard_that_is_stopped_is_not_relied_on", move || {
        keeps().and_then(|()| stopped_guard(kind))
    });
    group.add("kept_nothing_is_done_for_who_has_gone_before_its_turn", move || {
        keeps().and_then(|()| gone_before_its_turn(kind))
    });
    group.add("kept_quiesce_waits_for_more_than_a_minute", move || {
        keeps().and_then(|()| long_quiesce(kind))
    });
    group.alone("many_a_disk_that_comes_while_its_server_ends_is_not_lost", late);
}

/// Fills a file system to the last byte.
fn fill(at: &Path) {
    let mut file = File::create(at).unwrap();
    while file.write(&[0; 512]).is_ok() {}
}

/// Writes to the disk, past its page cache.
fn write(node: &Path, count: u32) {
    let to = format!("of={}", node.display());
    let (from, count) = ("if=/dev/urandom", format!("count={count}"));
    call("dd", [from, &to, "bs=64k", &count, "oflag=direct", "iflag=fullblock"]).ok();
}

/// The state of a disk of many files needs more room than there is. Nothing may be served by then
/// that is not written down.
fn full_run(kind: Kind) -> Outcome {
    let room = Room::new();
    std::fs::create_dir_all(&room.run).unwrap();
    room.mount(&["-t", "tmpfs", "-o", "size=256k", "none"], &room.run);
    let old = room.full_file("a", 4 * MIB, 0x5a);
    let disk = room.add(kind, &old, &["--no-part-scan", "--queues", "1"]);
    let parts: Vec<_> = (0..64)
        .map(|number| room.file(&format!("{number}-{}", "part".repeat(20)), 65536))
        .collect();
    let long = format!("concat({})", parts.join(", "));
    fill(&room.run.join("full"));
    let refused = room.devsplice(["swap", &disk.name, &long]).run();
    assert_eq!(refused.code, Some(1), "{}{}", refused.out, refused.err);
    assert!(refused.err.contains("nothing was changed"), "{}", refused.err);
    assert_eq!(disk.info()["state"], "live");
    assert_eq!(disk.info()["stack"], format!("file({old})"));
    write(&disk.node, 16);
    // Whoever comes next, with a log that is full, serves what was written to.
    let before = server(&disk);
    before.signal(Signal::KILL);
    before.ends_within(10);
    wait_until(20, "another server", || {
        let info = room.devsplice(["info", "--json", &disk.name]).run().out;
        let info: serde_json::Value = serde_json::from_str(&info).unwrap_or_default();
        info["state"] == "live" && info["pid"] != before.0
    });
    call("cmp", ["-n", "4194304", &old, &disk.node.to_string_lossy()]).ok();
    std::fs::remove_file(room.run.join("full")).unwrap();
    room.devsplice(["swap", &disk.name, &long]).ok();
    write(&disk.node, 16);
    kill(&room, &disk);
    assert!(disk.info()["stack"].as_str().unwrap_or_default().starts_with("concat("));
    assert!(!room.run.join(format!("{}.next", disk.name)).exists());
    let there = std::fs::read(&disk.node).unwrap();
    let below: Vec<u8> = parts.iter().flat_map(|part| std::fs::read(part).unwrap()).collect();
    assert!(there == below && there.iter().any(|byte| *byte != 0));
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// What nobody can read may be what another program wrote: of a disk that is there.
fn junk(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 4 * MIB, 0x5a);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let path = room.run.join(format!("{}.json", disk.name));
    let whole = std::fs::read_to_string(&path).unwrap();
    let junk = whole.replacen("\"size\"", "\"extent\"", 1);
    let (guard, old) = (disk.guard(), server(&disk));
    std::fs::write(&path, &junk).unwrap();
    old.signal(Signal::KILL);
    old.ends_within(10);
    let says = |text: &str| {
        let is_named = text.contains(&path.display().to_string());
        assert!(is_named && text.contains("does not say what the disk is"), "{text}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), junk);
    };
    wait_until(10, "the guard's word", || disk.log().contains("does not say what the disk is"));
    assert!(guard.lives(), "nobody keeps the disk");
    says(&room.refusal(["recover", &disk.name]));
    says(&room.refusal(["del", &disk.name]));
    says(&room.refusal(room.add_arguments(kind, &file, &["-n", &disk.name])));
    says(&room.devsplice(["gc"]).ok());
    says(&room.devsplice(["gc", "--waiting"]).ok());
    says(&room.devsplice(["doctor"]).run().out);
    assert!(disk.is_attached());
    // Once it makes sense again the disk is there as it was.
    std::fs::write(&path, &whole).unwrap();
    room.devsplice(["recover", &disk.name]).ok();
    call("cmp", ["-n", "4194304", &file, &disk.node.to_string_lossy()]).ok();
    // Without anybody to keep it.
    let old = server(&disk);
    let guard = Process(old.children().first().copied().unwrap_or(0));
    guard.signal(Signal::KILL);
    guard.ends_within(5);
    std::fs::write(&path, &junk).unwrap();
    old.signal(Signal::KILL);
    old.ends_within(10);
    says(&room.refusal(["recover", &disk.name]));
    std::fs::write(&path, &whole).unwrap();
    wait_until(10, "the end of its lock", || state(&room, &disk) != "live");
    let _ = disk.del(&["--force"]).ok();
    disk.is_gone_within(10);
    Ok(())
}

/// As what a dead server had in flight may be for longer than an open waits.
fn in_use_below(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 4 * MIB, 0x5a);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let old = server(&disk);
    let ours = File::open(&file).unwrap();
    disk.guard().signal(Signal::STOP);
    let guard = disk.guard();
    old.signal(Signal::KILL);
    old.ends_within(10);
    wait_until(5, "the file is free", || {
        flock(&ours, FlockOperation::NonBlockingLockExclusive).is_ok()
    });
    guard.signal(Signal::CONT);
    let node = disk.node.to_string_lossy().into_owned();
    let mut reader = call("cmp", ["-n", "4194304", &file, &node]).limit(40).start();
    std::thread::sleep(Duration::from_secs(4));
    assert!(!reader.is_over(), "a read has ended without a server");
    assert!(disk.log().contains("tried again"), "{}", disk.log());
    drop(ours);
    wait_until(12, "the read's end", || reader.is_over());
    assert_eq!(reader.finish().code, Some(0));
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// What it has would be kept; but nobody would serve the disk if its server died on the way.
fn stopped_guard(kind: Kind) -> Outcome {
    let room = Room::new();
    let (old, new) = (room.full_file("a", 4 * MIB, 0x5a), room.full_file("b", 4 * MIB, 0x5a));
    let disk = room.add(kind, &old, &["--no-part-scan", "--queues", "2"]);
    let guard = disk.guard();
    guard.signal(Signal::STOP);
    let refused = room.devsplice(["swap", &disk.name, &new]).run().ended_with(1).err;
    let next = format!("kill -CONT {}", guard.0);
    assert!(refused.contains("does not answer") && refused.contains(&next), "{refused}");
    assert_eq!(state(&room, &disk), "live");
    guard.signal(Signal::CONT);
    // The answer to what it was asked meanwhile is not taken for that to this.
    let _ = room.devsplice(["swap", &disk.name, &new]).ok();
    let warnings = disk.info()["warnings"].to_string();
    assert!(!warnings.contains("nobody keeps"), "{warnings}");
    kill(&room, &disk);
    call("cmp", ["-n", "4194304", &new, &disk.node.to_string_lossy()]).ok();
    let guard = Process(server(&disk).children().first().copied().unwrap_or(0));
    guard.signal(Signal::STOP);
    // Nor is it waited for, for ever.
    let begin = Instant::now();
    let _ = disk.del(&[]).ok();
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    guard.signal(Signal::CONT);
    disk.is_gone_within(5);
    Ok(())
}

/// A client asks for something while the disk is being held, which takes as long as what is below
/// does, and does not stay for the answer.
fn gone_before_its_turn(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let disk = room.add(kind, &format!("delay({file}, write=2s)"), &["--no-part-scan"]);
    let to = format!("of={}", disk.node.display());
    let hold = || {
        let dd = ["if=/dev/zero", &to, "bs=4k", "count=1", "oflag=direct"];
        let writer = call("dd", dd).limit(20).start();
        std::thread::sleep(Duration::from_millis(300));
        let quiesce = room.devsplice(["quiesce", &disk.name]).limit(20).start();
        std::thread::sleep(Duration::from_millis(300));
        (writer, quiesce)
    };
    let wish = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"resume\"}\n";
    let say = || {
        let mut client = UnixStream::connect(room.run.join(format!("{}.sock", disk.name))).unwrap();
        client.write_all(wish.as_bytes()).unwrap();
        client
    };
    let (writer, mut quiesce) = hold();
    drop(say());
    assert!(!quiesce.is_over(), "nobody has had to wait");
    assert_eq!((quiesce.finish().code, writer.finish().code), (Some(0), Some(0)));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(state(&room, &disk), "quiesced");
    let _ = room.devsplice(["resume", &disk.name]).ok();
    // Who only says no more waits for the answer.
    let (writer, quiesce) = hold();
    let mut client = say();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("is served again"), "{answer}");
    assert_eq!((quiesce.finish().code, writer.finish().code), (Some(0), Some(0)));
    assert_eq!(state(&room, &disk), "live");
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

fn long_quiesce(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let disk = room.add(kind, &format!("delay({file}, write=64s)"), &["--no-part-scan"]);
    let old = server(&disk);
    let to = format!("of={}", disk.node.display());
    let dd = ["if=/dev/zero", &to, "bs=4k", "count=1", "oflag=direct"];
    let writer = call("dd", dd).limit(90).start();
    std::thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    room.devsplice(["quiesce", &disk.name]).limit(100).ok();
    assert!(begin.elapsed() > Duration::from_secs(61), "{:?}", begin.elapsed());
    assert!(disk.log().contains("still waiting"), "{}", disk.log());
    assert_eq!(writer.finish().code, Some(0));
    assert_eq!((server(&disk), state(&room, &disk)), (old, "quiesced".to_owned()));
    room.devsplice(["resume", &disk.name]).ok();
    let _ = disk.del(&[]).ok();
    disk.is_gone_within(5);
    Ok(())
}

/// Each way to go: what comes just then is removed with the rest, or refused.
fn late() -> Outcome {
    need_tool("losetup")?;
    let room = Room::new();
    for round in 0..6 {
        let server = Server::start(&room, &["--threads", "1"]);
        let process = server.process();
        let begun: Vec<_> = (0..4)
            .map(|number| {
                let file = room.file(&format!("{round}-{number}"), MIB);
                let name = room.name();
                let add = ["add", &file, "-n", &name, "--export", "fuse", "--server", &server.name];
                room.devsplice(add).start()
            })
            .collect();
        std::thread::sleep(Duration::from_millis(5 + 4 * round));
        room.devsplice(["del", "--server", &server.name, "--force"]).ok();
        process.ends_within(20);
        for one in begun {
            let _ = one.finish();
        }
        let left = std::fs::read_dir(&room.run).unwrap().count();
        assert_eq!(left, 0, "round {round}: something is left in {}", room.run.display());
    }
    let loops = call("losetup", ["-l", "-n", "-O", "BACK-FILE"]).ok();
    assert!(!loops.contains("e2e-") || !loops.contains(&room.name()), "{loops}");
    Ok(())
}
