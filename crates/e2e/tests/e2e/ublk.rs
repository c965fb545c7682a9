//! Answers for what only ublk can be asked for: ways of data and threads that are not the usual,
//! removal that nobody can come in between, memory of clients, users without privileges.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use devsplice_e2e::{
    Call, Group, Kind, MIB, Outcome, Room, call, engines, need, program, verify, wait_until,
};
use serde_json::Value;

use crate::verify::counts_fit;

const UBLK: Kind = Kind::Ublk("auto-register");
/// nobody, and a group that has nobody else in it.
const USER: u32 = 65534;
const GROUP: u32 = 64999;

pub fn add(group: &mut Group) {
    group.add("data_that_is_asked_for_is_true", get_data);
    group.add("threads_beyond_the_queues_share_them_without_batches", spread);
    group.add("a_disk_that_is_open_is_not_taken_away", safe_stop);
    group.add("memory_of_clients_is_known_to_the_driver_and_data_is_true", shared_memory);
}

/// Goes on if the driver has this.
pub fn offers(room: &Room, feature: &str) -> Outcome {
    let text = room.devsplice(["features", "--json"]).ok();
    let value: Value = serde_json::from_str(&text).unwrap();
    let is_there = value["ublk"]["features"][feature] == true;
    need(is_there, &format!("this kernel's ublk has no {feature}"))
}

fn has(value: &Value, feature: &str) -> bool {
    value["features"].as_array().is_some_and(|all| all.iter().any(|one| one == feature))
}

fn get_data() -> Outcome {
    engines()?;
    let room = Room::new();
    let disk = room.add(Kind::Ublk("get-data"), &room.file("a", 8 * MIB), &["--queues", "1"]);
    let info = disk.info();
    assert_eq!(info["data_path"], "get-data", "{info}");
    assert!(has(&info, "need-get-data"), "{info}");
    let moved = verify(&room, &disk.node, 8 * MIB, "512-64k");
    assert!(disk.count("bytes_copied") >= moved.read + moved.written, "{}", disk.info());
    disk.remove();
    // In batches there is no such way.
    room.add_refused(Kind::Ublk("get-data"), "mem:1M", &["--batch", "on"], &["batches"]);
    Ok(())
}

fn spread() -> Outcome {
    engines()?;
    let room = Room::new();
    offers(&room, "per-io-daemon")?;
    for path in ["auto-register", "copy"] {
        let file = room.file(path, 8 * MIB);
        let more = ["--queues", "1", "--threads", "3", "--batch", "off", "--depth", "10"];
        let disk = room.add(Kind::Ublk(path), &file, &more);
        let info = disk.info();
        assert_eq!((&info["threads"], &info["batch"]), (&Value::from(3), &Value::from(false)));
        assert!(has(&info, "per-io-daemon"), "{info}");
        let moved = verify(&room, &disk.node, 8 * MIB, "512-64k");
        counts_fit(&disk, moved);
        // Whoever takes over serves it in the same way.
        disk.server().signal(rustix::process::Signal::KILL);
        let first = disk.server().0;
        wait_until(20, "another server", || {
            let ran = room.devsplice(["info", "--json", &disk.name]).run();
            let value: Value = serde_json::from_str(&ran.out).unwrap_or_default();
            value["state"] == "live" && value["pid"] != first && value["threads"] == 3
        });
        verify(&room, &disk.node, 8 * MIB, "512-64k");
        disk.remove();
    }
    Ok(())
}

fn safe_stop() -> Outcome {
    let room = Room::new();
    offers(&room, "safe-stop")?;
    let disk = room.add(UBLK, "mem:4M", &["--no-part-scan"]);
    let info = disk.info();
    assert!(has(&info, "safe-stop") && has(&info, "no-auto-part-scan"), "{info}");
    // Not held, as a mount would: merely open.
    let open = std::fs::File::open(&disk.node).unwrap();
    let ran = disk.del(&[]).ended_with(1);
    let fits = ran.err.contains("open in another process") && ran.err.contains("--force");
    assert!(fits, "{}", ran.err);
    let mut bytes = [1; 512];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut bytes, 0).unwrap();
    assert_eq!(disk.info()["state"], "live");
    drop(open);
    disk.remove();
    let forced = room.add(UBLK, "mem:4M", &["--no-part-scan"]);
    let open = std::fs::File::open(&forced.node).unwrap();
    let _ = forced.del(&["--force"]).ok();
    drop(open);
    forced.is_gone_within(3);
    Ok(())
}

fn shared_memory() -> Outcome {
    engines()?;
    let room = Room::new();
    offers(&room, "shared-memory")?;
    let memory = format!("/dev/shm/{}", room.name());
    std::fs::File::create(&memory).unwrap().set_len(2 * MIB).unwrap();
    room.later("rm", &["-f", &memory]);
    for path in ["auto-register", "register", "user-copy"] {
        shares(&room, path, &memory);
    }
    // Where the kernel would copy, it would leave out what is from there.
    let more = ["--shared-memory", &memory];
    room.add_refused(Kind::Ublk("copy"), "mem:1M", &more, &["copy path"]);
    room.add_refused(UBLK, "mem:1M", &["--shared-memory", "/nowhere"], &["/nowhere"]);
    Ok(())
}

/// A disk with this path for clients that share `memory` with it, and for others.
fn shares(room: &Room, path: &'static str, memory: &str) {
    let kind = Kind::Ublk(path);
    let disk = room.add(kind, &room.file(path, 8 * MIB), &["--shared-memory", memory]);
    let info = disk.info();
    assert!(has(&info, "shared-memory") && info["shared_memory"] == memory, "{info}");
    let shown = room.devsplice(["info", &disk.name]).ok();
    assert!(shown.contains(&format!("shared      {memory}")), "{shown}");
    // A client whose buffers are in that memory, and one whose are not.
    let words = "--name=shared --rw=randrw --bsrange=4k-64k --iodepth=8 --ioengine=libaio \
                 --direct=1 --size=8M --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
                 --do_verify=1 --randrepeat=0";
    let place =
        [format!("--filename={}", disk.node.display()), format!("--mem=mmapshared:{memory}")];
    let words = words.split_whitespace().map(str::to_owned).chain(place);
    call("fio", words).dir(&room.dir).limit(60).ok();
    let (moved, other) = match kind.copies() {
        true => ("bytes_copied", "bytes_spliced"),
        false => ("bytes_spliced", "bytes_copied"),
    };
    let shared = disk.count("bytes_shared");
    assert!(shared >= 8 * MIB && shared <= disk.count(moved), "{}", disk.info());
    assert_eq!(disk.count(other), 0, "{}", disk.info());
    verify(room, &disk.node, 8 * MIB, "512-64k");
    assert_eq!(disk.count("bytes_shared"), shared, "memory that nobody shares was counted");
    assert_eq!(disk.count("errors"), 0);
    disk.remove();
}

/// devsplice, or another program, as a user who may make devices.
struct User<'r> {
    room: &'r Room,
    copy: String,
}

impl<'r> User<'r> {
    /// One with a copy of the program under test and a directory for state.
    fn new(room: &'r Room) -> User<'r> {
        let user = User { room, copy: room.path("devsplice") };
        std::fs::copy(program().unwrap(), &user.copy).unwrap();
        std::fs::set_permissions(&user.copy, std::fs::Permissions::from_mode(0o755)).unwrap();
        chown(room.mount_point("user"), Some(USER), Some(USER)).unwrap();
        user
    }

    /// A file of the user's.
    fn image(&self) -> String {
        let image = self.room.file("users", 8 * MIB);
        chown(&image, Some(USER), Some(USER)).unwrap();
        image
    }

    fn call(&self, program: &str, words: &[&str]) -> Call {
        let [user, group] = [USER, GROUP].map(|id| id.to_string());
        let ids = ["--reuid", &user, "--regid", &user, "--groups", &group, program];
        let call = call("setpriv", ids.into_iter().chain(words.iter().copied()));
        call.env("XDG_RUNTIME_DIR", self.room.path("user")).dir(&self.room.dir).limit(60)
    }

    fn devsplice(&self, words: &[&str]) -> Call {
        self.call(&self.copy, words)
    }

    /// Makes a disk; what is told of it.
    fn add(&self, image: &str) -> Value {
        let text = self.devsplice(&["add", image, "--unprivileged", "--json"]).ok();
        serde_json::from_str(&text).unwrap()
    }
}

/// A user who may make devices, but is not given their nodes: that is said, and root can clear up.
pub fn of_a_user_without_rules(room: &Room) -> Outcome {
    offers(room, "unprivileged")?;
    let control = Path::new("/dev/ublk-control");
    let mode = |mode| std::fs::set_permissions(control, std::fs::Permissions::from_mode(mode));
    let before = std::fs::metadata(control).unwrap().mode() & 0o777;
    mode(0o666).unwrap();
    let user = User::new(room);
    let ran = user.devsplice(&["add", &user.image(), "--unprivileged"]).run().ended_with(1);
    mode(before).unwrap();
    let node = ran.err.split(':').map(str::trim).find(|word| word.starts_with("/dev/ublkc"));
    let node = node.unwrap_or_else(|| panic!("no node in: {}", ran.err)).to_owned();
    assert!(ran.err.contains("60-devsplice-ublk.rules"), "{}", ran.err);
    assert!(Path::new(&node).exists() && user.devsplice(&["list"]).ok().find(&node).is_none());
    let said = room.devsplice(["gc", "--foreign"]).ok();
    assert!(said.contains(&format!("removed: {node}")), "{said}");
    assert!(!Path::new(&node).exists());
    Ok(())
}

/// A user's disk, with udev running and `rules` in force.
pub fn of_a_user(room: &Room, rules: &Path) -> Outcome {
    offers(room, "unprivileged")?;
    assert!(rules.exists());
    let groups = std::fs::read_to_string("/etc/group").unwrap();
    if !groups.contains("\nublk:") {
        std::fs::write("/etc/group", format!("{groups}ublk:x:{GROUP}:\n")).unwrap();
    }
    call("udevadm", ["control", "--reload"]).ok();
    let trigger = ["trigger", "--action=add", "--name-match=/dev/ublk-control"];
    call("udevadm", trigger).ok();
    call("udevadm", ["settle", "-t", "20"]).ok();
    assert_eq!(std::fs::metadata("/dev/ublk-control").unwrap().gid(), GROUP);

    let user = User::new(room);
    let image = user.image();
    let disk = user.add(&image);
    let (name, node) = (disk["name"].as_str().unwrap(), disk["device"].as_str().unwrap());
    assert_eq!((&disk["data_path"], &disk["recovery"]), (&"copy".into(), &"off".into()), "{disk}");
    assert!(has(&disk, "unprivileged"), "{disk}");
    wait_until(20, "a node of the user's", || {
        std::fs::metadata(node).is_ok_and(|node| (node.uid(), node.mode() & 0o777) == (USER, 0o600))
    });
    let words = "--name=user --rw=randrw --bsrange=512-128k --iodepth=16 --ioengine=io_uring \
                 --direct=1 --size=8M --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
                 --do_verify=1 --randrepeat=0";
    let file = format!("--filename={node}");
    let words: Vec<&str> = words.split_whitespace().chain([file.as_str()]).collect();
    user.call("fio", &words).ok();
    let text = user.devsplice(&["info", "--json", name]).ok();
    let info: Value = serde_json::from_str(&text).unwrap();
    assert!(info["counts"]["bytes_copied"].as_u64().unwrap() >= 8 * MIB, "{info}");
    assert_eq!(info["counts"]["errors"], 0, "{info}");
    assert!(user.devsplice(&["list"]).ok().contains(name));
    // Root sees it, and leaves it alone.
    let look = room.devsplice(["gc", "--dry-run", "--foreign"]).ok();
    assert!(!look.contains(&node.replace("ublkb", "ublkc")), "{look}");
    user.devsplice(&["del", name]).ok();
    assert!(!Path::new(node).exists() && !Path::new(&node.replace("ublkb", "ublkc")).exists());
    // One whose server is killed goes with it.
    let disk = user.add(&image);
    let node = disk["device"].as_str().unwrap().replace("ublkb", "ublkc");
    call("kill", ["-9", &disk["pid"].to_string()]).ok();
    wait_until(20, "the device's end", || !Path::new(&node).exists());
    // What such a disk cannot have is refused, and root is told that it needs none.
    for more in [["--data-path", "auto-register"], ["--recovery", "reissue"]] {
        let ran = user.devsplice(&["add", &image, "--unprivileged", more[0], more[1]]).run();
        assert!(ran.ended_with(1).err.contains(more[0]));
    }
    room.add_refused(Kind::Ublk("copy"), &image, &["--unprivileged"], &["CAP_SYS_ADMIN"]);
    Ok(())
}
