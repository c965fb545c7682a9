//! Answers for devices that another tool has made: `adopt` serves them when their server is gone.
//!
//! The tool is the kernel's own test server if `DEVSPLICE_KUBLK` names it, else our imitation.

use std::path::{Path, PathBuf};

use devsplice_e2e::{
    Group, Kind, MIB, Outcome, Room, call, engines, need, program, verify, wait_until,
};

const SPAN: u64 = 16 * MIB;

pub fn add(group: &mut Group, kind: Kind) {
    if !kind.is_ublk() {
        return;
    }
    group.add("adopted_a_foreign_disk_goes_on_and_is_ours", adopted);
    group.add("adopted_what_does_not_fit_is_refused_and_left_as_it_was", refused);
}

/// The other tool.
fn tool(room: &Room) -> PathBuf {
    if let Some(path) = std::env::var_os("DEVSPLICE_KUBLK") {
        return path.into();
    }
    let path = room.dir.join("kublk");
    std::os::unix::fs::symlink(program().unwrap(), &path).unwrap();
    path
}

/// Has it make a disk of a file; its number.
fn made(room: &Room, tool: &Path, file: &str, more: &[&str]) -> String {
    let words = ["add", "-t", "loop", "-q", "1", "-d", "16", "--auto_zc", "-r", "1", "-i", "1"];
    let words: Vec<&str> = words.iter().chain(more).copied().chain([file]).collect();
    let said = call(tool, &words).dir(&room.dir).limit(60).ok();
    let line = said.lines().find(|line| line.contains("dev id")).expect("a list of the device");
    let id = line.split([' ', ':']).nth(2).unwrap().to_owned();
    assert!(id.parse::<u32>().is_ok(), "{said}");
    room.later(&tool.to_string_lossy(), &["del", "-n", &id]);
    id
}

/// What the tool says of a disk: the word behind `key`.
fn said(tool: &Path, id: &str, key: &str) -> String {
    let list = call(tool, ["list", "-n", id]).limit(60).ok();
    let mut words = list.split_whitespace().skip_while(|word| *word != key);
    words.nth(1).unwrap_or_default().to_owned()
}

/// Kills who serves it.
fn orphan(tool: &Path, id: &str) {
    let server = said(tool, id, "daemon_pid");
    let server = if server.is_empty() { said(tool, id, "pid") } else { server };
    assert!(server.parse::<u32>().is_ok_and(|pid| pid > 1), "no server: {server}");
    let _ = call("kill", ["-9", &server]).limit(10).ok();
    wait_until(20, "a disk without a server", || said(tool, id, "state") == "QUIESCED");
}

fn adopted() -> Outcome {
    engines()?;
    let room = Room::new();
    let (tool, file) = (tool(&room), room.file("a", SPAN));
    let id = made(&room, &tool, &file, &[]);
    let node = PathBuf::from(format!("/dev/ublkb{id}"));
    verify(&room, &node, SPAN, "4k-64k");
    let text = room.refusal(["adopt", &id, &file]);
    assert!(text.contains("is served by process"), "{text}");
    orphan(&tool, &id);
    let name = room.name();
    let told = room.devsplice(["adopt", node.to_str().unwrap(), &file, "-n", &name, "--json"]).ok();
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["name"], &told["why"]), (&name.clone().into(), &"adopted".into()));
    assert_eq!(
        (&told["recovery"], &told["data_path"]),
        (&"reissue".into(), &"auto-register".into())
    );
    let features = told["features"].as_array().unwrap();
    assert!(features.contains(&"user-recovery-reissue".into()), "{told}");
    verify(&room, &node, SPAN, "4k-128k");
    // From now on it is a disk like others: it outlives its server and can be suspended.
    let info = || -> serde_json::Value {
        let text = room.devsplice(["info", "--json", &name]).run().out;
        serde_json::from_str(&text).unwrap_or_default()
    };
    let first = info()["pid"].as_u64().unwrap();
    let _ = call("kill", ["-9", &first.to_string()]).limit(10).ok();
    wait_until(30, "another server", || {
        let now = info();
        now["state"] == "live" && now["pid"].as_u64() != Some(first)
    });
    verify(&room, &node, SPAN, "4k-128k");
    assert_eq!(info()["counts"]["bytes_copied"], 0);
    let _ = room.devsplice(["quiesce", &name]).ok();
    let _ = room.devsplice(["resume", &name]).ok();
    let text = room.refusal(["adopt", &id, &file]);
    assert!(text.contains(&format!("is ours, {name}")), "{text}");
    let _ = room.devsplice(["del", &name]).ok();
    assert!(!node.exists());
    Ok(())
}

fn refused() -> Outcome {
    let room = Room::new();
    let (tool, file) = (tool(&room), room.file("a", SPAN));
    let id = made(&room, &tool, &file, &[]);
    orphan(&tool, &id);
    let small = room.file("small", SPAN / 2);
    for (stack, words) in [
        (small.clone(), "it has 16M, the stack 8M"),
        (format!("linear({file}, size=8M)"), "it has 16M, the stack 8M"),
        (format!("file({file}, readonly=on)"), "it can be written, the stack cannot"),
        ("mem:16M".to_owned(), "is empty"),
        (room.path("none"), "No such file"),
    ] {
        let text = room.refusal(["adopt", &id, &stack]);
        assert!(text.contains(words), "{stack}: {text}");
        assert_eq!(said(&tool, &id, "state"), "QUIESCED", "{stack}");
    }
    let text = room.refusal(["adopt", "/dev/null", &file]);
    assert!(text.contains("is no ublk device"), "{text}");
    // What was refused has changed nothing: the right stack still fits.
    let name = room.name();
    let _ = room.devsplice(["adopt", &id, &file, "-n", &name]).ok();
    let _ = room.devsplice(["del", &name]).ok();
    need(!Path::new(&format!("/dev/ublkb{id}")).exists(), "another test has its number")
}
