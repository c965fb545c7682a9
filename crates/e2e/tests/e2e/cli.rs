//! Answers for the command itself: what it prints, for people and for programs, with root and
//! without.

use std::os::unix::fs::PermissionsExt;

use devsplice_e2e::{
    Call, Group, Kind, MIB, Outcome, Room, call, is_root, need, need_tool, program, wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

use devsplice_e2e::Process;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("add_list_info_and_del_tell_one_story", move || one_story(kind));
    group.add("add_in_the_foreground_serves_until_a_signal", move || foreground(kind));
    group.add("a_stack_in_a_toml_file_is_served", move || toml_file(kind));
    group.add("names_are_given_and_counted_up", move || given_names(kind));
    group.add("del_all_removes_every_disk", move || del_all(kind));
    group.add("explain_shows_pieces_and_copies_without_making_anything", explain);
    group.add("features_and_doctor_print_json", features_and_doctor);
    group.add("usage_mistakes_end_with_code_2", usage);
    group.add("without_root_add_says_at_once_what_it_needs", no_root_add);
    group.add("without_root_explain_features_and_doctor_work", no_root_rest);
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

/// Open where disks can be made.
fn disks(kind: Kind) -> Outcome {
    kind.gate()
}

fn one_story(kind: Kind) -> Outcome {
    disks(kind)?;
    let room = Room::new();
    let name = room.name();
    let stack = "linear(mem:2M, offset=512k)";
    let mut arguments = room.add_arguments(kind, stack, &["-n", &name]);
    arguments.extend(["--serial", "S3R1AL"].map(str::to_owned));
    let ran = room.devsplice(arguments).run().ok();
    let node = ran.out.trim().to_owned();
    assert!(node.starts_with("/dev/"), "standard output is the node alone: {}", ran.out);
    assert!(ran.err.contains(&name) && ran.err.contains("data path"), "{}", ran.err);
    let list = room.devsplice(["list"]).ok();
    assert!(list.starts_with("NAME"), "{list}");
    let row = list.lines().find(|line| line.starts_with(&name)).expect("a row of the disk");
    assert!(row.contains(&node) && row.contains("live") && row.contains("1536k"), "{row}");
    let listed = json(&room.devsplice(["list", "--json"]).ok());
    let info = json(&room.devsplice(["info", "--json", &name]).ok());
    for key in ["name", "device", "size", "stack", "data_path", "export", "why", "pid", "state"] {
        assert_eq!(listed[0][key], info[key], "{key}");
    }
    assert_eq!(info["device"], node.as_str());
    assert_eq!(info["serial"], "S3R1AL");
    assert_eq!(info["size"], 1536 << 10);
    for key in ["requests", "pieces", "sqes", "enters", "bytes_spliced", "bytes_copied"] {
        assert!(info["counts"][key].is_u64(), "no counter {key}: {info}");
    }
    let shown = room.devsplice(["info", &name]).ok();
    assert!(shown.contains("bytes_copied") && shown.contains(&node), "{shown}");
    let explained = room.devsplice(["explain", &name]).ok();
    assert!(explained.contains("linear"), "{explained}");
    room.devsplice(["del", &name]).ok();
    assert_eq!(json(&room.devsplice(["list", "--json"]).ok()), Value::Array(Vec::new()));
    assert!(room.state().is_empty(), "{:?}", room.state());
    let text = room.refusal(["del", &name]);
    assert!(text.contains("no such disk"), "{text}");
    Ok(())
}

fn foreground(kind: Kind) -> Outcome {
    disks(kind)?;
    for signal in [Signal::TERM, Signal::INT] {
        let room = Room::new();
        let arguments = room.add_arguments(kind, "mem:1M", &["--foreground"]);
        let mut running = room.devsplice(arguments).start();
        wait_until(20, "a node on standard output", || {
            assert!(!running.is_over(), "it has ended: {}", running.said());
            running.said().contains("/dev/")
        });
        let node = running.said().lines().next().unwrap_or_default().to_owned();
        assert!(std::path::Path::new(&node).exists(), "{}", running.said());
        Process(running.pid()).signal(signal);
        let _ = running.finish().ok();
        assert!(room.state().is_empty(), "{:?}", room.state());
    }
    Ok(())
}

fn toml_file(kind: Kind) -> Outcome {
    disks(kind)?;
    let room = Room::new();
    let [a, b] = ["a", "b"].map(|name| room.file(name, 2 * MIB));
    let text = format!(
        "stack = \"data\"\n[device.data]\ndriver = \"stripe\"\nchunk = \"16k\"\nbelow = [\"left\", \
         \"linear({b}, offset=1M)\"]\n[device.left]\ndriver = \"file\"\npath = \"{a}\"\n"
    );
    std::fs::write(room.path("stack.toml"), text).unwrap();
    let disk = room.add(kind, &room.path("stack.toml"), &[]);
    assert_eq!(disk.size(), 2 * MIB);
    disk.remove();
    Ok(())
}

fn given_names(kind: Kind) -> Outcome {
    disks(kind)?;
    let room = Room::new();
    let mut add = vec!["add", "mem:1M", "--json"];
    add.extend(kind.arguments());
    let names: Vec<_> = (0..2).map(|_| json(&room.devsplice(&add).ok())["name"].clone()).collect();
    room.devsplice(["del", "--all"]).ok();
    assert_eq!(names, ["d0", "d1"]);
    Ok(())
}

fn del_all(kind: Kind) -> Outcome {
    disks(kind)?;
    let room = Room::new();
    let made: Vec<_> = (0..3).map(|_| room.add(kind, "mem:1M", &[])).collect();
    room.devsplice(["del", "--all"]).ok();
    for disk in &made {
        disk.is_gone_within(3);
    }
    room.devsplice(["del", "--all"]).ok();
    Ok(())
}

fn explain() -> Outcome {
    let room = Room::new();
    let [a, b] = ["a", "b"].map(|name| room.file(name, 2 * MIB));
    let stack = format!("stripe(chunk=64k, {a}, {b})");
    let ways: [(&[&str], u64); 2] =
        [(&["--export", "ublk", "--data-path", "register"], 0), (&["--export", "fuse"], 1)];
    for (way, copies) in ways {
        let mut arguments = vec!["explain", &stack, "--json", "--at", "32k", "--len", "128k"];
        arguments.extend(way);
        let value = json(&room.devsplice(arguments).ok());
        assert_eq!(value["copies_in_process"], copies, "{value:#}");
        assert_eq!(value["piece_count"], 3, "{value:#}");
        let places: Vec<_> = value["pieces"].as_array().unwrap().iter().collect();
        let at: Vec<_> = places.iter().map(|piece| piece["at"].as_u64().unwrap()).collect();
        assert_eq!(at, [32 << 10, 0, 64 << 10], "{value:#}");
        assert_eq!(value["fails_with"], Value::Null);
    }
    let text = room.devsplice(["explain", &stack]).ok();
    assert!(text.contains("copies of each byte") && text.contains("stripe"), "{text}");
    let text = room.refusal(["explain", &stack, "--at", "8M"]);
    assert!(text.contains("would fail") && text.contains("4194304 bytes"), "{text}");
    assert!(room.state().is_empty());
    Ok(())
}

fn features_and_doctor() -> Outcome {
    let room = Room::new();
    let features = json(&room.devsplice(["features", "--json"]).ok());
    for part in ["kernel", "io_uring", "ublk", "fuse"] {
        assert!(!features[part].is_null(), "no {part}: {features:#}");
    }
    assert!(room.devsplice(["features"]).ok().contains("io_uring"));
    let ran = room.devsplice(["doctor", "--json"]).run();
    let findings = json(&ran.out);
    let checks: Vec<_> =
        findings.as_array().unwrap().iter().filter_map(|one| one["check"].as_str()).collect();
    for check in ["root", "io_uring", "ublk", "FUSE + loop"] {
        assert!(checks.contains(&check), "no {check}: {findings:#}");
    }
    assert!(matches!(ran.code, Some(0 | 1)));
    Ok(())
}

fn usage() -> Outcome {
    let room = Room::new();
    let wrong: &[&[&str]] = &[
        &[],
        &["ad"],
        &["add"],
        &["add", "mem:1M", "--depth", "0"],
        &["add", "mem:1M", "--depth", "9999"],
        &["add", "mem:1M", "--queues", "0"],
        &["add", "mem:1M", "--export", "nvme"],
        &["add", "mem:1M", "--data-path", "teleport"],
        &["del"],
        &["del", "x", "--all"],
        &["explain", "mem:1M", "--at", "minus one"],
    ];
    for arguments in wrong {
        let ran = room.devsplice(*arguments).run().ended_with(2);
        let said = ran.err.to_lowercase();
        assert!(said.contains("usage") || said.contains("--help"), "{}: {said}", ran.line);
        assert!(room.state().is_empty());
    }
    room.devsplice(["--help"]).ok();
    room.devsplice(["add", "--help"]).ok();
    assert!(room.devsplice(["--version"]).ok().starts_with("devsplice "));
    Ok(())
}

/// devsplice as somebody who is not root, with a state directory that is not theirs.
fn as_nobody(room: &Room, arguments: &[&str]) -> Result<Call, devsplice_e2e::Skip> {
    if !is_root() {
        return Ok(room.devsplice(arguments));
    }
    need_tool("setpriv")?;
    let copy = room.path("devsplice");
    if !std::path::Path::new(&copy).exists() {
        // By another process: a descriptor of ours that is open for writing could be inherited by a
        // child of another test's at this moment, and the copy would be "busy" when it is run.
        let source = program().unwrap();
        assert!(
            std::process::Command::new("cp").arg(source).arg(&copy).status().unwrap().success()
        );
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let ids = ["--reuid", "65534", "--regid", "65534", "--clear-groups", &copy];
    let call = call("setpriv", ids.into_iter().chain(arguments.iter().copied()));
    Ok(call.env("DEVSPLICE_RUN", &room.run).dir(&room.dir))
}

fn no_root_add() -> Outcome {
    let room = Room::new();
    for export in ["auto", "fuse", "ublk"] {
        let call = as_nobody(&room, &["add", "mem:1M", "--export", export])?;
        let ran = call.run().ended_with(1);
        assert!(ran.err.contains("root"), "--export {export}: {}", ran.err);
        assert!(ran.took.as_secs() < 5, "it took {:?} to say so", ran.took);
    }
    assert!(room.state().is_empty());
    Ok(())
}

fn no_root_rest() -> Outcome {
    let room = Room::new();
    let file = room.file("a", MIB);
    let ran = as_nobody(&room, &["explain", &file])?.run().ok();
    assert!(ran.out.contains("copies of each byte"), "{}", ran.out);
    let _ = as_nobody(&room, &["features"])?.run().ok();
    let ran = as_nobody(&room, &["doctor"])?.run();
    assert!(ran.out.contains("root"), "{}{}", ran.out, ran.err);
    let ran = as_nobody(&room, &["list"])?.run().ok();
    need(ran.err.is_empty(), &ran.err)
}
