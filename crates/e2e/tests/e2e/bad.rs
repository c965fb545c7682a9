//! Answers for bad input: each mistake is refused with a message that names the thing and a next
//! step, and leaves nothing behind.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use devsplice_e2e::{
    Group, Kind, MIB, Mode, Outcome, PATHS, Room, Setting, call, kernel_has_file_system, mode,
    need, need_tool, program, skip,
};
use serde_json::Value;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("stacks_that_do_not_parse_are_shown_with_the_place", move || unparsable(kind));
    group.add("unknown_drivers_and_keys_list_the_known_ones", move || unknown(kind));
    group.add("a_toml_file_with_a_cycle_is_refused", move || cycle(kind));
    group.add("toml_mistakes_name_file_and_device", move || bad_toml(kind));
    group.add("what_is_no_file_or_device_is_named", move || no_files(kind));
    group.add("sizes_that_do_not_fit_say_how_to_mend_it", move || bad_sizes(kind));
    group.add("a_file_used_twice_in_a_stack_is_refused_by_any_name", move || used_twice(kind));
    group.add("a_file_that_another_disk_serves_is_refused", move || served_already(kind));
    group.add("a_file_under_a_loop_device_is_refused", move || under_loop(kind));
    group.add("a_mounted_device_is_refused", move || mounted(kind));
    group.add("a_device_that_is_let_go_in_a_moment_is_waited_for", move || held_below(kind));
    group.add("a_file_that_may_not_be_read_is_named", unreadable);
    group.add("a_read_only_device_asks_for_readonly", move || read_only_device(kind));
    group.add("names_that_are_taken_or_bad_are_refused", move || names(kind));
    group.add("numbers_out_of_range_are_refused", move || ranges(kind));
    group.add("a_data_path_of_another_front_end_is_refused", move || data_paths(kind));
    group.add("a_partition_that_is_not_there_lists_those_that_are", move || no_partition(kind));
    if mode() == Mode::Vm {
        group.alone("with_io_uring_disabled_add_says_so", move || io_uring_disabled(kind));
        group.alone("without_the_module_auto_takes_fuse_and_says_why", without_module);
        group.alone("add_loads_the_module_by_itself", loads_module);
    }
}

/// Such a device takes no lock, and one that only reads could see what we write change under it.
fn under_loop(kind: Kind) -> Outcome {
    need_tool("losetup")?;
    let room = Room::new();
    for more in [&[][..], &["-r"]] {
        let file = room.file("a", 4 * MIB);
        let words = ["-f", "--show"].iter().chain(more).copied().chain([file.as_str()]);
        let node = call("losetup", words).ok().trim().to_owned();
        room.add_refused(kind, &file, &[], &[&file, &format!("in use by {node}"), "losetup -d"]);
        call("losetup", ["-d", &node]).ok();
        // Somebody who merely reads it is not in the way.
        let _reader = std::fs::File::open(&file).unwrap();
        room.add(kind, &file, &["--no-part-scan"]).remove();
    }
    Ok(())
}

/// As after a kill: the kernel closes the device of a dead server some time later.
fn held_below(kind: Kind) -> Outcome {
    use std::os::unix::fs::OpenOptionsExt;
    let room = Room::new();
    let below = room.loop_device("below", 4 * MIB);
    let exclusive = 0o200;
    let hold = || std::fs::File::options().read(true).custom_flags(exclusive).open(&below).unwrap();
    let held = hold();
    room.add_refused(kind, &below, &[], &[&below, "in use"]);
    let release = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(held);
    });
    room.add(kind, &below, &[]).remove();
    release.join().unwrap();
    drop(hold());
    Ok(())
}

/// `add` needs root, whom no mode of a file keeps out; `explain` does not.
fn unreadable() -> Outcome {
    need_tool("setpriv")?;
    let room = Room::new();
    let file = room.file("secret", MIB);
    call("chmod", ["0", &file]).ok();
    call("chmod", ["755", &room.dir.to_string_lossy()]).ok();
    let program = program().unwrap_or_default().to_string_lossy().into_owned();
    let as_nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", &program];
    let explain = |path: &str| call("setpriv", as_nobody.iter().chain(&["explain", path])).run();
    let ran = explain(&file).ended_with(1);
    assert!(ran.err.contains(&file) && ran.err.contains("Permission denied"), "{}", ran.err);
    assert!(ran.out.is_empty() && !ran.err.contains("panicked"), "{}{}", ran.out, ran.err);
    call("chmod", ["644", &file]).ok();
    let _ = explain(&file).ok();
    Ok(())
}

fn unparsable(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", MIB);
    room.add_refused(kind, &format!("linear({file}, offset=1M"), &[], &["column", "^"]);
    room.add_refused(kind, &format!("linear({file}, offset=ten)"), &[], &["offset", "ten"]);
    room.add_refused(kind, &format!("stripe({file},, {file})"), &[], &["column"]);
    room.add_refused(kind, "", &[], &["column 1"]);
    room.add_refused(kind, "stripe()", &[], &["stripe"]);
    room.add_refused(kind, &"linear(".repeat(1000), &[], &[]);
    room.add_refused(kind, "mem:-5", &[], &["-5"]);
    room.add_refused(kind, "mem(size=1M, size=2M)", &[], &["size"]);
    room.add_refused(kind, "mem()", &[], &["size"]);
    Ok(())
}

fn unknown(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", MIB);
    let words = ["linaer", "did you mean linear", "concat", "stripe"];
    room.add_refused(kind, &format!("linaer({file})"), &[], &words);
    let words = ["offest", "offset", "size"];
    room.add_refused(kind, &format!("linear({file}, offest=1M)"), &[], &words);
    room.add_refused(kind, &format!("error({file}, read=EWHAT)"), &[], &["EWHAT"]);
    Ok(())
}

fn toml(room: &Room, text: &str) -> String {
    let path = room.path("stack.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn cycle(kind: Kind) -> Outcome {
    let room = Room::new();
    let text = "stack = \"a\"\n[device.a]\ndriver = \"linear\"\nbelow = [\"b\"]\n\
                [device.b]\ndriver = \"linear\"\nbelow = [\"a\"]\n";
    room.add_refused(kind, &toml(&room, text), &[], &["stack.toml", "itself"]);
    Ok(())
}

fn bad_toml(kind: Kind) -> Outcome {
    let room = Room::new();
    let missing = room.path("none.toml");
    room.add_refused(kind, &missing, &[], &[missing.as_str()]);
    room.add_refused(kind, &toml(&room, "stack = ["), &[], &["stack.toml", "line 1"]);
    let text = "stack = \"a\"\n[device.a]\ndriver = \"mem\"\nsize = \"1M\"\nsise = \"2M\"\n";
    room.add_refused(kind, &toml(&room, text), &[], &["stack.toml", "sise", "size"]);
    let text = "stack = \"b\"\n[device.a]\ndriver = \"mem\"\nsize = \"1M\"\n";
    room.add_refused(kind, &toml(&room, text), &[], &["stack.toml"]);
    Ok(())
}

fn no_files(kind: Kind) -> Outcome {
    let room = Room::new();
    let missing = room.path("missing");
    room.add_refused(kind, &missing, &[], &[&missing, "No such file"]);
    let dir = room.path("");
    room.add_refused(kind, &dir, &[], &["neither a file nor a block device"]);
    room.add_refused(kind, "/dev/null", &[], &["/dev/null", "neither a file nor a block device"]);
    let pipe = room.path("pipe");
    call("mkfifo", [&pipe]).ok();
    room.add_refused(kind, &pipe, &[], &[&pipe, "neither a file nor a block device"]);
    room.add_refused(kind, &format!("{}/x", room.file("a", MIB)), &[], &["Not a directory"]);
    Ok(())
}

fn bad_sizes(kind: Kind) -> Outcome {
    let room = Room::new();
    let odd = room.file("odd", MIB + 100);
    room.add_refused(kind, &odd, &[], &[&odd, "1048676 bytes", "no multiple", "truncate -s"]);
    let empty = room.file("empty", 0);
    room.add_refused(kind, &empty, &[], &[&empty, "is empty", "truncate -s"]);
    let file = room.file("a", MIB + 512);
    let stack = format!("file({file}, block=4096)");
    room.add_refused(kind, &stack, &[], &["no multiple of the 4096-byte block"]);
    let file = room.file("b", MIB);
    room.add_refused(kind, &format!("linear({file}, offset=2M)"), &[], &["leaves the"]);
    room.add_refused(kind, &format!("stripe(chunk=3k, {file})"), &[], &["chunk"]);
    room.add_refused(kind, &format!("file({file}, block=8k)"), &[], &["block"]);
    room.add_refused(kind, "mem:1000", &[], &["1000", "no multiple"]);
    Ok(())
}

fn used_twice(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", MIB);
    let (hard, soft) = (room.path("hard"), room.path("soft"));
    std::fs::hard_link(&file, &hard).unwrap();
    symlink(&file, &soft).unwrap();
    for other in [file.as_str(), &hard, &soft, "./a", ".//./a"] {
        room.add_refused(kind, &format!("concat({file}, {other})"), &[], &["the same file"]);
    }
    let both = format!("concat(file({file}, readonly=on), file({hard}, readonly=on))");
    let disk = room.add(kind, &both, &[]);
    assert_eq!(disk.size(), 2 * MIB);
    disk.remove();
    Ok(())
}

fn served_already(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", MIB);
    let first = room.add(kind, &file, &[]);
    room.add_refused(kind, &file, &[], &[&file, "in use", "devsplice list"]);
    let reader = format!("file({file}, readonly=on)");
    room.add_refused(kind, &reader, &[], &[&file, "in use"]);
    let node = first.node.to_string_lossy().into_owned();
    let upper = room.add(kind, &node, &[]);
    room.add_refused(kind, &node, &[], &[&node, "in use"]);
    let refused = first.del(&[]).ended_with(1);
    assert!(refused.err.contains("held"), "{}", refused.err);
    upper.remove();
    first.remove();
    Ok(())
}

fn mounted(kind: Kind) -> Outcome {
    need(kernel_has_file_system("ext4"), "this kernel mounts no ext4")?;
    let room = Room::new();
    let node = room.loop_device("a", 16 * MIB);
    call("mkfs.ext4", ["-q", "-F", &node]).ok();
    let at = room.mount_point("mnt");
    room.mount(&[&node], &at);
    room.add_refused(kind, &node, &[], &[&node, "in use", "unmount it"]);
    room.unmount(&at);
    room.add(kind, &node, &[]).remove();
    Ok(())
}

fn read_only_device(kind: Kind) -> Outcome {
    let room = Room::new();
    let node = room.loop_device("a", MIB);
    // The next user of that loop device would find it read-only as well.
    room.later("blockdev", &["--setrw", &node]);
    call("blockdev", ["--setro", &node]).ok();
    room.add_refused(kind, &node, &[], &[&node, "read-only", "readonly=on"]);
    room.add(kind, &format!("file({node}, readonly=on)"), &[]).remove();
    Ok(())
}

fn names(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, "mem:1M", &[]);
    let next = format!("devsplice del {}", disk.name);
    room.add_refused(kind, "mem:1M", &["-n", &disk.name], &[&disk.name, "running disk", &next]);
    for name in ["", ".", "..", "a/b", "../../etc/x", "a b", ".hidden", &"x".repeat(49)] {
        room.add_refused(kind, "mem:1M", &["-n", name], &["is no name", "letters"]);
    }
    disk.remove();
    for word in ["nobody", "/dev/nobody", ""] {
        let text = room.refusal(["info", word]);
        assert!(text.contains("no such disk"), "{text}");
    }
    Ok(())
}

fn ranges(kind: Kind) -> Outcome {
    let room = Room::new();
    for more in [["--depth", "0"], ["--queues", "0"], ["--threads", "0"], ["--depth", "4097"]] {
        let arguments = room.add_arguments(kind, "mem:1M", &more);
        let ran = room.devsplice(arguments).run().ended_with(2);
        assert!(ran.err.contains(more[0]) && ran.err.contains(more[1]), "{}", ran.err);
    }
    assert!(room.state().is_empty());
    Ok(())
}

fn data_paths(kind: Kind) -> Outcome {
    let room = Room::new();
    let both = ["add", "mem:1M", "--export", "fuse", "--data-path", "copy"];
    let text = room.refusal(both);
    assert!(text.contains("--data-path") && text.contains("--export ublk"), "{text}");
    let text = room.refusal(["add", "mem:1M", "--export", "fuse", "--batch", "on"]);
    assert!(text.contains("--batch") && text.contains("--export ublk"), "{text}");
    if !kind.is_ublk() {
        return Ok(());
    }
    let text = room.devsplice(["features", "--json"]).ok();
    let value: Value = serde_json::from_str(&text).unwrap();
    let offered = value["ublk"]["data_paths"].as_array().cloned().unwrap_or_default();
    for path in PATHS.into_iter().filter(|path| !offered.iter().any(|one| one == path)) {
        let words = ["--data-path", path, "it has: "];
        room.add_refused(Kind::Ublk(path), "mem:1M", &[], &words);
    }
    Ok(())
}

fn no_partition(kind: Kind) -> Outcome {
    need_tool("sgdisk")?;
    let room = Room::new();
    let file = room.file("a", 8 * MIB);
    let stack = format!("partition({file}, number=1)");
    room.add_refused(kind, &stack, &[], &["partition"]);
    call("sgdisk", ["-o", "-n", "1:2048:+1M", "-n", "3:0:0", "-c", "3:data", &file]).limit(90).ok();
    let stack = format!("partition({file}, number=2)");
    room.add_refused(kind, &stack, &[], &["number 2", "no such partition", "3", "data"]);
    let stack = format!("partition({file}, label=dta)");
    room.add_refused(kind, &stack, &[], &["dta", "data"]);
    room.add_refused(kind, &format!("partition({file})"), &[], &["number=1"]);
    Ok(())
}

fn io_uring_disabled(kind: Kind) -> Outcome {
    let room = Room::new();
    let setting = Setting::change("/proc/sys/kernel/io_uring_disabled", "2");
    need(setting.is_some(), "this kernel cannot disable io_uring")?;
    for export in ["auto", "fuse", "ublk"] {
        let text = room.refusal(["add", "mem:1M", "--export", export]);
        assert!(text.contains("io_uring"), "--export {export}: {text}");
        assert!(text.contains("io_uring_disabled"), "no next step: --export {export}: {text}");
    }
    let doctor = room.devsplice(["doctor"]).run();
    assert!(doctor.out.contains("io_uring_disabled"), "{}", doctor.out);
    drop(setting);
    room.add(kind, "mem:1M", &[]).remove();
    Ok(())
}

/// Takes ublk's module out, and puts it back at the end.
struct NoModule;

impl NoModule {
    fn new() -> Result<NoModule, devsplice_e2e::Skip> {
        need_tool("modprobe")?;
        let removed = call("modprobe", ["-r", "ublk_drv"]).run();
        if removed.code != Some(0) || Path::new("/dev/ublk-control").exists() {
            return skip(format!("ublk_drv cannot be removed: {}", removed.err.trim()));
        }
        Ok(NoModule)
    }
}

impl Drop for NoModule {
    fn drop(&mut self) {
        let _ = call("modprobe", ["ublk_drv"]).run();
    }
}

fn without_module() -> Outcome {
    Kind::Fuse.gate()?;
    let _gone = NoModule::new()?;
    let room = Room::new();
    let bin = room.mount_point("bin");
    let fake = bin.join("modprobe");
    std::fs::write(&fake, "#!/bin/sh\nexit 1\n").unwrap();
    std::fs::set_permissions(&fake, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", bin.display());

    let ran = room.devsplice(["add", "mem:1M", "--json"]).env("PATH", &path).run().ok();
    let told: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(told["export"], "fuse", "{told}");
    assert!(told["why"].as_str().unwrap().contains("ublk"), "{told}");
    room.devsplice(["del", told["name"].as_str().unwrap()]).ok();

    for way in [["--export", "ublk"], ["--data-path", "register"]] {
        let mut arguments = vec!["add", "mem:1M"];
        arguments.extend(way);
        let ran = room.devsplice(arguments).env("PATH", &path).run().ended_with(1);
        assert!(ran.err.contains("/dev/ublk-control"), "{}", ran.err);
        assert!(ran.err.contains("modprobe ublk_drv"), "no next step: {}", ran.err);
    }
    assert!(room.state().is_empty());
    Ok(())
}

fn loads_module() -> Outcome {
    let _gone = NoModule::new()?;
    let room = Room::new();
    let ran = room.devsplice(["add", "mem:1M", "--json"]).run().ok();
    let told: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(told["export"], "ublk", "{told}");
    room.devsplice(["del", told["name"].as_str().unwrap()]).ok();
    Ok(())
}
