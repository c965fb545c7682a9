//! Answers for disks over FUSE where processes cannot be looked into: there is no /proc. What does
//! not need that works; what does is refused, and nothing is taken for lost that cannot be seen.

use std::time::Duration;

use devsplice_e2e::{
    Call, Group, Kind, MIB, Outcome, Process, Room, call, kernel_is, need, need_tool, program,
    wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("kept_without_proc_guards_work_and_nothing_is_cleaned_up", move || {
        need(kernel_is(6, 9), "FUSE sends no request again before Linux 6.9")?;
        need_tool("unshare")?;
        without_proc(kind)
    });
}

/// What is done with mounts of its own, where /proc is an empty directory.
const BLIND: &str = "mount -t tmpfs none /proc && exec \"$@\"";

fn blind(room: &Room, words: &[String]) -> Call {
    let program = program().expect("a program").display().to_string();
    let first = ["-m", "sh", "-c", BLIND, "sh", &program];
    let words = first.into_iter().chain(words.iter().map(String::as_str));
    call("unshare", words).env("DEVSPLICE_RUN", &room.run).dir(&room.dir).limit(60)
}

fn without_proc(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 4 * MIB, 0x5a);
    let name = room.name();
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    blind(&room, &room.add_arguments(kind, &file, &["-n", &name, "--no-part-scan"])).ok();
    let listed = || {
        let list = room.devsplice(["list", "--json"]).ok();
        let list: Vec<Value> = serde_json::from_str(&list).unwrap();
        list.into_iter().find(|one| one["name"] == *name).unwrap_or_default()
    };
    let server = || Process(listed()["pid"].as_u64().unwrap_or(0).try_into().unwrap_or(0));
    let node = listed()["device"].as_str().unwrap_or_default().to_owned();
    let is_whole = || drop(call("cmp", ["-n", "4194304", &file, &node]).limit(30).ok());
    is_whole();
    let refused = blind(&room, &words(&["upgrade", &name])).run().ended_with(1).err;
    assert!(refused.contains("mount -t proc"), "{refused}");
    is_whole();
    // Its guard has what it needs.
    let old = server();
    old.signal(Signal::KILL);
    old.ends_within(20);
    wait_until(20, "another server", || server() != old && listed()["state"] == "live");
    is_whole();
    // Nobody serves it for a while; who cannot see that a guard keeps it leaves it alone.
    room.devsplice(["quiesce", &name]).ok();
    let old = server();
    old.signal(Signal::KILL);
    old.ends_within(20);
    wait_until(20, "a disk that waits", || listed()["state"] == "waiting");
    let said = blind(&room, &words(&["gc"])).ok();
    assert!(said.contains("kept: ") && said.contains(&name), "{said}");
    let add = room.add_arguments(kind, &file, &["-n", &name]);
    let refused = blind(&room, &add).run().ended_with(1).err;
    assert!(refused.contains("devsplice recover"), "{refused}");
    std::thread::sleep(Duration::from_millis(300));
    room.devsplice(["recover", &name]).ok();
    is_whole();
    room.devsplice(["del", &name]).ok();
    wait_until(5, "no state", || room.state().is_empty());
    Ok(())
}
