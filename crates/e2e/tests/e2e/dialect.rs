//! Answers for devices made under other tools' names: every byte of them, and their life as those
//! tools' suites expect it.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use devsplice_e2e::{
    Call, Group, Kind, MIB, Outcome, Room, call, engines, need, program, verify, wait_until,
};

use crate::nbd::Served;

/// The tools with the words that make a loop device over a file.
const TOOLS: &[(&str, &[&str])] = &[
    ("kublk", &["add", "-t", "loop"]),
    ("miniublk", &["add", "-t", "loop", "-f"]),
    ("rublk", &["add", "loop", "-f"]),
    ("ublk", &["add", "-t", "loop", "-f"]),
];

/// Tools with the words that make a device which outlives its server, and those that have it
/// served again, as their suites say them: blktests has its own tool told everything again, and its
/// wrapper for the one written in Rust leaves all but the number out; so do ublksrv's tests.
const KEPT: &[(&str, &str, &str)] = &[
    ("miniublk", "add -t loop -r -f FILE", "recover -t loop -n ID -f FILE"),
    ("rublk", "add loop -r -f FILE", "recover -n ID"),
    ("ublk", "add -t loop -r 1 -i 1 -q 2 -d 64 -z -f FILE", "recover -n ID"),
];

/// Ways of kublk's data, and the features that they need.
const WAYS: &[(&str, &str, &[&str])] = &[
    ("copied", "", &[]),
    ("copied_when_asked", "-g", &["NEED_GET_DATA"]),
    ("copied_by_the_server", "-u", &["USER_COPY"]),
    ("registered", "-z", &["SUPPORT_ZERO_COPY"]),
    ("registered_by_the_kernel", "--auto_zc", &["AUTO_BUF_REG"]),
    ("registered_in_slots_that_take_turns", "--auto_zc -b --rotate_auto_buf", &["BATCH_IO"]),
    ("fallen_back", "-z --auto_zc --auto_zc_fallback", &["AUTO_BUF_REG"]),
    ("told_in_wide_descriptors", "--io_desc_size 64", &["IO_DESC_SIZE"]),
    ("spread_over_threads", "--auto_zc --nthreads 3 --per_io_tasks", &["PER_IO_DAEMON"]),
    ("copied_by_many_threads", "-u --nthreads 5 --per_io_tasks", &["PER_IO_DAEMON"]),
];

pub fn add(group: &mut Group, kind: Kind) {
    if !kind.is_ublk() {
        return;
    }
    for (tool, words) in TOOLS {
        let name = format!("{tool}s_devices_are_true_and_left_when_their_server_dies");
        group.add(&name, move || life(tool, words));
    }
    for (tool, words, again) in KEPT {
        let name = format!("{tool}s_devices_are_recovered_as_their_suites_do");
        group.add(&name, move || recovered(tool, words, again));
    }
    for (name, flags, features) in WAYS {
        let name = format!("a_stripe_of_kublk_is_true_with_data_{name}");
        group.add(&name, move || way(flags, features));
    }
    group.add("a_device_whose_server_died_while_it_fetched_goes", dies_fetching);
    group.add("ublks_queues_have_threads_of_their_own_and_again_after_recovery", threads_of_queues);
    group.add("ublks_devices_are_stopped_and_deleted_by_a_signal", signalled);
    group.add("ublks_devices_over_an_nbd_server_are_true_and_recovered", over_nbd);
    group.add("integrity_data_of_kublk_is_kept_and_checked", integrity);
}

/// The binary under another name.
struct Tool<'r> {
    room: &'r Room,
    path: PathBuf,
}

impl<'r> Tool<'r> {
    fn new(room: &'r Room, name: &str) -> Tool<'r> {
        let path = room.dir.join(name);
        std::os::unix::fs::symlink(program().unwrap(), &path).unwrap();
        Tool { room, path }
    }

    fn call(&self, words: &[&str]) -> Call {
        let call = call(&self.path, words).dir(&self.room.dir).limit(60);
        call.env("DEVSPLICE_RUN", &self.room.run)
    }

    fn needs(&self, features: &[&str]) -> Outcome {
        let offered = self.call(&["features"]).ok();
        for name in features {
            let is_there = offered.lines().any(|line| line.ends_with(&format!("UBLK_F_{name}")));
            need(is_there, &format!("this kernel's ublk has no {name}"))?;
        }
        Ok(())
    }

    /// Makes a device; its number, as the suites read it.
    fn add(&self, words: &[&str]) -> String {
        let said = self.call(words).ok();
        let line = said.lines().find(|line| line.contains("dev id")).expect("a list of the device");
        let id = line.split([' ', ':']).nth(2).unwrap().to_owned();
        assert!(id.parse::<u32>().is_ok(), "{said}");
        self.room.later(&self.path.to_string_lossy(), &["del", "-n", &id]);
        id
    }

    /// A word of the line of a list that holds `key`, counted from 1.
    fn field(&self, id: &str, key: &str, at: usize) -> String {
        let said = self.call(&["list", "-n", id]).ok();
        let line = said.lines().find(|line| line.contains(key)).unwrap_or_default();
        line.split_whitespace().nth(at - 1).unwrap_or_default().to_owned()
    }

    fn del(&self, id: &str) {
        // Another test may take the number at once: then the node is another one.
        let node = || std::fs::metadata(format!("/dev/ublkc{id}")).map(|node| node.ino()).ok();
        let before = node();
        assert!(before.is_some(), "no device {id}");
        let _ = self.call(&["del", "-n", id]).ok();
        assert_ne!(node(), before, "device {id} is still there");
    }
}

fn node(id: &str) -> PathBuf {
    format!("/dev/ublkb{id}").into()
}

fn life(name: &str, words: &[&str]) -> Outcome {
    engines()?;
    let room = Room::new();
    let (tool, file) = (Tool::new(&room, name), room.file("a", 16 * MIB));
    let words: Vec<&str> = words.iter().copied().chain([file.as_str()]).collect();
    let at = if name == "ublk" { 9 } else { 11 };
    // Stopped by del.
    let id = tool.add(&words);
    verify(&room, &node(&id), 16 * MIB, "512-64k");
    assert_eq!(tool.field(&id, "state", at), "LIVE");
    tool.del(&id);
    // Deleted by another process than the server, which was killed.
    let id = tool.add(&words);
    let server = tool.field(&id, "pid", 7);
    let _ = call("kill", ["-9", &server]).ok();
    wait_until(10, "a dead device", || tool.field(&id, "state", at) == "DEAD");
    tool.del(&id);
    // Nothing of either holds the file, which others serve alone again.
    let id = tool.add(&words);
    room.add_refused(Kind::Ublk("copy"), &file, &[], &["in use"]);
    tool.del(&id);
    Ok(())
}

fn recovered(name: &str, words: &str, again: &str) -> Outcome {
    engines()?;
    let room = Room::new();
    let (tool, file) = (Tool::new(&room, name), room.file("a", 16 * MIB));
    let at = if name == "ublk" { 9 } else { 11 };
    // The name alone: whoever recovers it may be elsewhere by then.
    assert!(file.ends_with("/a"));
    let words: Vec<&str> = words.split(' ').map(|w| if w == "FILE" { "a" } else { w }).collect();
    let id = tool.add(&words);
    let server = tool.field(&id, "pid", 7);
    let _ = call("kill", ["-9", &server]).ok();
    wait_until(20, "a quiesced device", || tool.field(&id, "state", at) == "QUIESCED");
    let said = again.replace("ID", &id).replace("FILE", &file);
    let said: Vec<&str> = said.split(' ').collect();
    let _ = tool.call(&said).dir(std::path::Path::new("/")).ok();
    assert_eq!(tool.field(&id, "state", at), "LIVE");
    assert_ne!(tool.field(&id, "pid", 7), server);
    verify(&room, &node(&id), 16 * MIB, "512-64k");
    if name == "ublk" {
        let _ = tool.call(&["quiesce", "-n", &id]).ok();
        assert_eq!(tool.field(&id, "state", at), "QUIESCED");
    }
    tool.del(&id);
    // Nothing is known of the next of that number.
    if again == "recover -n ID" {
        let ran = tool.call(&["recover", "-n", &id]).run().ended_with(1);
        assert!(ran.err.contains("nothing is known"), "{}", ran.err);
    }
    Ok(())
}

/// Threads of each queue, as the list names them; all of the server's, none of two queues.
fn threads_of_queues() -> Outcome {
    engines()?;
    let room = Room::new();
    let (tool, file) = (Tool::new(&room, "ublk"), room.file("a", 16 * MIB));
    tool.needs(&["PER_IO_DAEMON"])?;
    let words = "add -t loop -q 2 -d 65 -T 4 -z -r 1 -f";
    let words: Vec<&str> = words.split(' ').chain([file.as_str()]).collect();
    let id = tool.add(&words);
    for server in 0..2 {
        let said = tool.call(&["list", "-n", &id]).ok();
        let pid = tool.field(&id, "pid", 7);
        let lists = said.lines().filter_map(|line| line.split_once(": tid "));
        let mut all: Vec<&str> = Vec::new();
        for (_, list) in lists {
            let list = list.split(" affinity").next().unwrap_or_default();
            assert_eq!(list.split(' ').count(), 4, "{said}");
            all.extend(list.split(' '));
        }
        let is_its = |thread: &&str| PathBuf::from(format!("/proc/{pid}/task/{thread}")).exists();
        assert!(!all.is_empty() && all.iter().all(is_its), "{said}");
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count, "a thread serves two queues: {said}");
        verify(&room, &node(&id), 16 * MIB, "512-64k");
        if server == 0 {
            let _ = call("kill", ["-9", &pid]).ok();
            wait_until(20, "a quiesced device", || tool.field(&id, "state", 9) == "QUIESCED");
            let _ = tool.call(&["recover", "-n", &id]).ok();
            assert_eq!(tool.field(&id, "state", 9), "LIVE");
        }
    }
    tool.del(&id);
    Ok(())
}

fn signalled() -> Outcome {
    let room = Room::new();
    let (tool, file) = (Tool::new(&room, "ublk"), room.file("a", 16 * MIB));
    for signal in ["-INT", "-TERM"] {
        let words = ["add", "-t", "loop", "--clean-teardown", "-r", "1", "-f", &file];
        let id = tool.add(&words);
        let inode = || {
            let node = std::fs::metadata(format!("/dev/ublkc{id}"));
            node.map(|node| node.ino()).ok()
        };
        let (before, server) = (inode(), tool.field(&id, "pid", 7));
        assert!(before.is_some());
        let _ = call("kill", [signal, &server]).ok();
        wait_until(20, "the end of the device", || inode() != before);
    }
    // Without that it is left, for `recover`.
    let id = tool.add(&["add", "-t", "loop", "-r", "1", "-f", &file]);
    let _ = call("kill", ["-TERM", &tool.field(&id, "pid", 7)]).ok();
    wait_until(20, "a quiesced device", || tool.field(&id, "state", 9) == "QUIESCED");
    tool.del(&id);
    Ok(())
}

fn over_nbd() -> Outcome {
    engines()?;
    let room = Room::new();
    let (tool, file) = (Tool::new(&room, "ublk"), room.file("a", 16 * MIB));
    let far = Served::new(&room, &file, &[]);
    let words = "add -t nbd -q 2 -z --send_zc -r 1 -i 1 --export_name";
    let more = [far.name.as_str(), "--unix", far.socket.as_str()];
    let words: Vec<&str> = words.split(' ').chain(more).collect();
    let id = tool.add(&words);
    verify(&room, &node(&id), 16 * MIB, "512-64k");
    let _ = call("kill", ["-9", &tool.field(&id, "pid", 7)]).ok();
    wait_until(20, "a quiesced device", || tool.field(&id, "state", 9) == "QUIESCED");
    let _ = tool.call(&["recover", "-n", &id]).ok();
    verify(&room, &node(&id), 16 * MIB, "512-64k");
    let device = std::fs::read(node(&id)).unwrap();
    tool.del(&id);
    far.remove();
    assert!(device == std::fs::read(&file).unwrap(), "the server's file holds something else");
    Ok(())
}

fn dies_fetching() -> Outcome {
    let room = Room::new();
    let tool = Tool::new(&room, "kublk");
    let id = tool.add(&["add", "-t", "fault_inject", "-r", "1"]);
    let _ = call("kill", ["-9", &tool.field(&id, "pid", 7)]).ok();
    wait_until(20, "a quiesced device", || tool.field(&id, "state", 11) == "QUIESCED");
    let words = "recover --foreground -t fault_inject --die_during_fetch 1 -n";
    let words: Vec<&str> = words.split(' ').chain([id.as_str()]).collect();
    let ran = tool.call(&words).run();
    assert!(ran.code.is_none(), "it was not killed: {:?} {}", ran.code, ran.err);
    tool.del(&id);
    Ok(())
}

fn way(flags: &str, features: &[&str]) -> Outcome {
    engines()?;
    let room = Room::new();
    let tool = Tool::new(&room, "kublk");
    tool.needs(features)?;
    let files = ["a", "b"].map(|name| room.file(name, 8 * MIB));
    let mut words = vec!["add", "-t", "stripe", "-q", "2", "-d", "16"];
    words.extend(flags.split_whitespace());
    words.extend(files.iter().map(String::as_str));
    let id = tool.add(&words);
    verify(&room, &node(&id), 16 * MIB, "512-256k");
    // A flush goes all the way, and what was written is in the files.
    let _ = call(
        "dd",
        ["if=/dev/urandom", "bs=1M", "count=1", "conv=fsync", &{
            format!("of={}", node(&id).display())
        }],
    )
    .ok();
    let device = std::fs::read(node(&id)).unwrap();
    tool.del(&id);
    let [a, b] = files.map(|file| std::fs::read(file).unwrap());
    let chunks = a.chunks(64 << 10).zip(b.chunks(64 << 10));
    let both: Vec<u8> = chunks.flat_map(|(a, b)| [a, b].concat()).collect();
    assert!(device == both, "the files hold something else than the device showed");
    Ok(())
}

fn integrity() -> Outcome {
    engines()?;
    let room = Room::new();
    let tool = Tool::new(&room, "kublk");
    tool.needs(&["INTEGRITY"])?;
    let (data, kept) = (room.file("data", 8 * MIB), room.file("kept", MIB));
    let words = "add -t loop -u --integrity_capable --integrity_reftag --metadata_size 64 \
                 --pi_offset 48 --csum_type nvme";
    let words: Vec<&str> = words.split_whitespace().chain([data.as_str(), kept.as_str()]).collect();
    let id = tool.add(&words);
    verify(&room, &node(&id), 8 * MIB, "512-256k");
    let read = || {
        let from = format!("if={}", node(&id).display());
        call("dd", ["bs=512", "count=1", "iflag=direct", "of=/dev/null", &from]).run().code
    };
    let _ = call(
        "dd",
        ["if=/dev/zero", "bs=512", "count=1", "oflag=direct", &{
            format!("of={}", node(&id).display())
        }],
    )
    .ok();
    assert_eq!(read(), Some(0));
    // A byte of the data that is not what it was: the kernel finds out, by what was kept.
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[7] ^= 1;
    std::fs::write(&data, &bytes).unwrap();
    assert_ne!(read(), Some(0), "a wrong block was read without an error");
    tool.del(&id);
    Ok(())
}
