//! Answers for running disks: what watches them, and what systemd and udev make of the files of
//! the package.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devsplice_e2e::{
    Group, Kind, MIB, Mode, Outcome, Room, call, mode, need, need_tool, program, wait_until,
};
use serde_json::Value;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("latencies_are_measured_below_each_layer_when_asked_for", move || latency(kind));
    group.add("metrics_are_printed_written_and_served_over_http", move || metrics(kind));
    group.add("top_shows_what_a_disk_does_to_scripts", move || top(kind));
    group.add("top_draws_on_a_terminal_and_ends_at_a_key", move || terminal(kind));
    group.alone("udevs_rules_make_links_and_take_them_away", move || udev(kind));
    group.alone("a_unit_survives_its_server_reloads_and_refuses_to_stop_a_busy_disk", move || {
        unit(kind)
    });
}

/// Reads all of a disk.
fn read(node: &Path) {
    let of = format!("if={}", node.display());
    call("dd", [&of, "of=/dev/null", "bs=4k", "iflag=direct", "status=none"]).ok();
}

fn latency(kind: Kind) -> Outcome {
    let room = Room::new();
    let stack = format!("linear({}, size=1M)", room.file("a", 2 * MIB));
    let plain = room.add(kind, &stack, &[]);
    read(&plain.node);
    assert_eq!(plain.info()["layers"], Value::Array(Vec::new()));
    plain.remove();
    let disk = room.add(kind, &stack, &["--latency"]);
    read(&disk.node);
    let info = disk.info();
    for layer in ["below linear", "below file"] {
        let all = info["layers"].as_array().unwrap();
        let one = all.iter().find(|one| one["layer"] == layer).unwrap_or_else(|| panic!("{info}"));
        let rows = one["status"]["latencies"].as_array().unwrap();
        let reads: u64 = rows
            .iter()
            .filter(|row| row["op"] == "read")
            .map(|row| {
                assert!(row["p50_ns"].as_u64() > Some(0), "{row}");
                assert!(row["p99_ns"].as_u64() >= row["p50_ns"].as_u64(), "{row}");
                row["count"].as_u64().unwrap()
            })
            .sum();
        assert!(reads > 0 && reads <= disk.count("splices"), "{layer}: {reads}");
    }
    disk.remove();
    Ok(())
}

/// The value of a metric's line that begins like this.
fn value(text: &str, begin: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(begin));
    let line = line.unwrap_or_else(|| panic!("no {begin} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Every line is a comment or a name, labels and a number, and each name has a type.
fn check(text: &str) {
    assert!(text.ends_with("# EOF\n"));
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (metric, number) = line.rsplit_once(' ').unwrap();
        assert!(number.parse::<f64>().is_ok(), "{line}");
        let (name, labels) = metric.split_once('{').unwrap();
        assert!(name.starts_with("devsplice_") && labels.ends_with('}'), "{line}");
        let base = name.strip_suffix("_total").unwrap_or(name);
        assert!(text.contains(&format!("# TYPE {base} ")), "{line}");
    }
}

fn metrics(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", MIB), &["--latency"]);
    read(&disk.node);
    let text = room.devsplice(["metrics"]).ok();
    check(&text);
    let own = format!("{{disk=\"{}\"", disk.name);
    assert!(value(&text, &format!("devsplice_requests_total{own},op=\"read\"")) > 0.0);
    let name = if kind.copies() { "copied" } else { "spliced" };
    assert!(value(&text, &format!("devsplice_{name}_bytes_total{own}")) >= 1_048_576.0);
    assert_eq!(value(&text, &format!("devsplice_disk_state{own},state=\"live\"")) as u64, 1);
    assert_eq!(value(&text, &format!("devsplice_size_bytes{own}")) as u64, MIB);
    assert!(text.contains("layer=\"below file\""), "{text}");

    let file = room.path("devsplice.prom");
    room.devsplice(["metrics", "--textfile", &file]).ok();
    check(&std::fs::read_to_string(&file).unwrap());

    let server = room.devsplice(["metrics", "--listen", "127.0.0.1:0"]).start();
    wait_until(20, "the address", || server.said().contains("/metrics"));
    let said = server.said();
    let address = said.trim().trim_start_matches("http://").trim_end_matches("/metrics").to_owned();
    let get = |path: &str| {
        let mut socket = TcpStream::connect(&address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    };
    // One who says nothing and goes does not matter to the next.
    drop(TcpStream::connect(&address).unwrap());
    let (head, body) = get("/metrics");
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("openmetrics-text"), "{head}");
    check(&body);
    assert!(body.contains(&disk.name));
    assert!(get("/other").0.starts_with("HTTP/1.1 404"));
    drop(server);
    disk.remove();
    Ok(())
}

fn top(kind: Kind) -> Outcome {
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", 16 * MIB), &["--latency"]);
    let running = room.devsplice(["top", "--json", "-n", "1", "-d", "1.5"]).start();
    // Within the interval, once the first look was taken.
    std::thread::sleep(Duration::from_millis(600));
    read(&disk.node);
    let out = running.finish().ok().out;
    let rows: Value = serde_json::from_str(&out).unwrap();
    let row = rows.as_array().unwrap().iter().find(|row| row["name"] == disk.name.as_str());
    let row = row.unwrap_or_else(|| panic!("{out}"));
    assert_eq!(row["state"], "live");
    assert!(row["reads_per_second"].as_f64().unwrap() > 1.0, "{row}");
    assert!(row["read_bytes_per_second"].as_f64().unwrap() > 1e5, "{row}");
    assert!(row["p50_ns"].as_u64() > Some(0), "{row}");
    assert_eq!(row["written_bytes_per_second"], 0.0);
    let text = room.devsplice(["top", "--once", "-d", "0.2"]).ok();
    assert!(text.starts_with("NAME") && text.contains(&disk.name), "{text}");
    // Two tables, since its output is no terminal.
    let text = room.devsplice(["top", "-n", "2", "-d", "0.2"]).ok();
    assert_eq!(text.matches("NAME").count(), 2, "{text}");
    disk.remove();
    Ok(())
}

fn terminal(kind: Kind) -> Outcome {
    need_tool("script")?;
    let room = Room::new();
    let disk = room.add(kind, &room.file("a", MIB), &[]);
    let program = program().expect("a program");
    // A key comes from a pipe by way of the pseudo-terminal that `script` makes.
    let line = format!(
        "(sleep 2; printf s; sleep 1; printf q) | \
         script -qec 'stty rows 20 cols 120; {} top -d 0.5' /dev/null",
        program.display()
    );
    let call = call("sh", ["-c", &line]).env("DEVSPLICE_RUN", &room.run).env("TERM", "xterm");
    let out = call.limit(30).ok();
    assert!(out.contains(&disk.name) && out.contains("quit"), "{out:?}");
    // The screen is another one, and it is left at the end.
    let (enter, leave) = (out.find("\x1b[?1049h"), out.rfind("\x1b[?1049l"));
    assert!(enter.is_some() && leave > enter, "{out:?}");
    assert!(out.contains("throughput"), "the key changed nothing: {out:?}");
    disk.remove();
    Ok(())
}

/// A file of the package, with the program under test in it.
fn packaged(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    let text = std::fs::read_to_string(root.join(path)).expect("a file of the package");
    let program = program().expect("a program");
    text.replace("/usr/bin/devsplice", &program.display().to_string())
}

/// A file that is removed at the end.
struct Placed(PathBuf);

impl Placed {
    fn new(path: &str, text: &str) -> Placed {
        let path = PathBuf::from(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        Placed(path)
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn udev(kind: Kind) -> Outcome {
    need(mode() == Mode::Vm, "starts udev, and changes its rules")?;
    let daemon = "/lib/systemd/systemd-udevd";
    need(Path::new(daemon).exists(), "no udev here")?;
    let rules = packaged("udev/60-devsplice.rules");
    let _rules = Placed::new("/run/udev/rules.d/60-devsplice.rules", &rules);
    let running = call(daemon, ["--debug"]).limit(200).start();
    wait_until(20, "udev", || Path::new("/run/udev/control").exists());
    let settle = || call("udevadm", ["settle", "-t", "20"]).ok();
    let room = Room::new();
    let image = room.file("a", 32 * MIB);
    // What udev asks is answered from the usual place of state.
    let devsplice = |words: &[&str]| {
        let program = program().expect("a program");
        call(program, words).env("DEVSPLICE_RUN", "/run/devsplice").limit(60)
    };
    let name = room.name();
    let mut add = room.add_arguments(kind, &image, &["-n", &name]);
    add.extend(["--serial", "e2e S1"].map(str::to_owned));
    let add: Vec<_> = add.iter().map(String::as_str).collect();
    let node = devsplice(&add).ok().trim().to_owned();
    settle();
    let target = |link: &str| std::fs::canonicalize(link).ok().map(|at| at.display().to_string());
    let links = || {
        let ids = std::fs::read_dir("/dev/disk/by-id").into_iter().flatten().flatten();
        let ids = ids.map(|entry| entry.path().display().to_string());
        let ours = ids.filter(|link| target(link).as_deref() == Some(&node));
        let mut all: Vec<_> = ours.collect();
        all.sort();
        all
    };
    let by_id = links();
    assert_eq!(by_id.len(), 2, "{by_id:?}");
    assert!(by_id[0].starts_with("/dev/disk/by-id/devsplice-"), "{by_id:?}");
    assert_eq!(by_id[1], "/dev/disk/by-id/devsplice_e2eS1");
    assert_eq!(target(&format!("/dev/devsplice/{name}")), Some(node.clone()));
    // A change that somebody makes is seen when it is closed.
    call("mkfs.ext4", ["-q", "-F", "-L", "e2e-ops", &node]).ok();
    settle();
    let label = || target("/dev/disk/by-label/e2e-ops") == Some(node.clone());
    wait_until(20, "a link by label", label);
    devsplice(&["del", &name]).ok();
    settle();
    let gone = || links().is_empty() && target("/dev/disk/by-label/e2e-ops").is_none();
    wait_until(20, "the end of the links", gone);
    if kind.is_ublk() {
        crate::ublk::of_a_user_without_rules(&room)?;
        let path = "/run/udev/rules.d/60-devsplice-ublk.rules";
        let _rules = Placed::new(path, &packaged("udev/60-devsplice-ublk.rules"));
        crate::ublk::of_a_user(&room, Path::new(path))?;
    }
    drop(running);
    let _ = std::fs::remove_file("/run/udev/control");
    Ok(())
}

/// What is run among systemd's processes: a line for each step.
const STEPS: &str = "
    systemctl start devsplice@UNIT; echo started $? $(systemctl is-active devsplice@UNIT)
    mount /dev/devsplice/UNIT MNT
    systemctl stop devsplice@UNIT; echo busy $(systemctl is-active devsplice@UNIT)
    touch MNT/still-there && sync -f MNT && echo written
    umount MNT; PROGRAM del UNIT; systemctl reset-failed
    systemctl start devsplice@UNIT
    server() { PROGRAM info UNIT --json | sed -n 's/^  \"pid\": \\([0-9]*\\).*/\\1/p'; }
    first=$(server); kill -9 $first
    is_new() { now=$(server); [ -n \"$now\" ] && [ $now != $first ]; }
    for i in $(seq 100); do is_new && break; sleep 0.1; done
    sleep 0.5; echo killed $(systemctl is-active devsplice@UNIT)
    second=$(server); main=$(systemctl show -p MainPID --value devsplice@UNIT)
    [ $second != $first ] && [ $main != $second ] && [ -d /proc/$main ] && echo guarded
    systemctl reload devsplice@UNIT; echo reloaded $? $(systemctl is-active devsplice@UNIT)
    third=$(server); [ $third != $second ] && echo another
    main=$(systemctl show -p MainPID --value devsplice@UNIT); kill -9 $main $third
    is_up() { systemctl -q is-active devsplice@UNIT; }
    is_back() { now=$(server); [ -n \"$now\" ] && [ $now != $third ] && is_up; }
    for i in $(seq 100); do is_back && break; sleep 0.1; done
    sleep 0.5; echo back $(systemctl is-active devsplice@UNIT)
    systemctl stop devsplice@UNIT; echo stopped $? $(systemctl is-active devsplice@UNIT)
    [ -e /run/devsplice/UNIT.json ] || echo gone
";

fn unit(kind: Kind) -> Outcome {
    need(mode() == Mode::Vm, "starts systemd")?;
    need(kind.is_ublk(), "stored.rs does it for FUSE")?;
    need(Path::new("/lib/systemd/systemd").exists(), "no systemd here")?;
    need_tool("nsenter")?;
    let room = Room::new();
    let image = room.file("a", 32 * MIB);
    call("mkfs.ext4", ["-q", "-F", &image]).ok();
    let name = room.name();
    let target = "[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n";
    let _files = [
        Placed::new(&format!("/etc/devsplice/{name}.toml"), &format!("stack = \"{image}\"\n")),
        Placed::new(
            "/etc/systemd/system/devsplice@.service",
            &packaged("systemd/devsplice@.service"),
        ),
        Placed::new("/etc/systemd/system/e2e.target", target),
        Placed::new(&room.path("steps"), &{
            let mnt = room.mount_point("mnt").display().to_string();
            let program = program().expect("a program").display().to_string();
            STEPS.replace("UNIT", &name).replace("PROGRAM", &program).replace("MNT", &mnt)
        }),
    ];
    std::fs::create_dir_all("/run/systemd/system").unwrap();
    let line = "mkdir -p /sys/fs/cgroup/e2e; echo $$ > /sys/fs/cgroup/e2e/cgroup.procs; \
                exec unshare --fork --pid --mount --mount-proc --kill-child /lib/systemd/systemd \
                --system --unit=e2e.target --log-target=null --show-status=0";
    let systemd = call("sh", ["-c", line]).env("container", "other").limit(200).start();
    let state = |pid: u32| {
        let words = ["-t", &pid.to_string(), "-p", "-m", "systemctl", "is-active", "e2e.target"];
        call("nsenter", words).run().out.trim() == "active"
    };
    let mut inner = None;
    wait_until(60, "systemd", || {
        let children = devsplice_e2e::Process(systemd.pid()).children();
        inner = children.first().copied().filter(|pid| state(*pid));
        inner.is_some()
    });
    let pid = inner.unwrap().to_string();
    let out = call("nsenter", ["-t", &pid, "-p", "-m", "sh", &room.path("steps")]).limit(120).run();
    let want = "started 0 active\nbusy failed\nwritten\nkilled active\nguarded\nreloaded 0 active\n\
                another\nback active\nstopped 0 inactive\ngone\n";
    assert_eq!(out.out, want, "{}", out.err);
    drop(systemd);
    Ok(())
}
