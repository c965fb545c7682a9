//! Answers for ublk in batches: several jobs deep, flushes between, threads that share a queue.

use std::path::Path;

use devsplice_e2e::{Group, Kind, MIB, Outcome, Process, Room, call, engines, need_tool};

use crate::verify::counts_fit;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("four_deep_jobs_with_flushes_keep_every_byte", move || deep_jobs(kind));
    group.add("discards_and_zeroes_beside_writes_are_done", move || no_pages(kind));
    if matches!(kind, Kind::Shared(_)) {
        group.add("every_thread_of_a_busy_queue_serves_some_of_it", move || all_serve(kind));
    }
}

/// fio with four jobs; each has a quarter of the disk.
fn four_jobs(dir: &Path, node: &str, more: &[&str]) -> String {
    let fixed = [
        "--name=deep",
        "--output-format=json",
        "--direct=1",
        "--ioengine=io_uring",
        "--iodepth=32",
        "--numjobs=4",
        "--size=4M",
        "--offset_increment=4M",
        "--group_reporting",
    ];
    let arguments = fixed.iter().chain(more).map(|&word| word.to_owned());
    call("fio", arguments.chain([format!("--filename={node}")])).dir(dir).limit(90).ok()
}

fn deep_jobs(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let [a, b] = ["a", "b"].map(|name| room.file(name, 8 * MIB));
    let disk = room.add(kind, &format!("stripe(chunk=16k, {a}, {b})"), &[]);
    assert_eq!(disk.info()["batch"], true, "{}", disk.info());
    let threads = if matches!(kind, Kind::Shared(_)) { 3 } else { 2 };
    assert!(disk.info()["threads"].as_u64().is_some_and(|count| count <= threads));
    let node = disk.node.to_string_lossy().into_owned();
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1"];
    let write = ["--rw=randwrite", "--bsrange=4k-128k", "--fsync=16", "--randrepeat=0"];
    let report = four_jobs(&room.dir, &node, &[&verify[..], &write].concat());
    let value: serde_json::Value =
        serde_json::from_str(report.find('{').map_or("", |start| &report[start..])).unwrap();
    assert_eq!(value["jobs"][0]["error"], 0, "{report}");
    let bytes = |what: &str| value["jobs"][0][what]["io_bytes"].as_u64().unwrap_or(0);
    let moved = devsplice_e2e::Moved { read: bytes("read"), written: bytes("write") };
    assert_eq!((moved.read, moved.written), (16 * MIB, 16 * MIB), "{report}");
    counts_fit(&disk, moved);
    assert!(disk.count("flushes") > 0);
    disk.remove();
    Ok(())
}

fn no_pages(kind: Kind) -> Outcome {
    engines()?;
    need_tool("blkdiscard")?;
    let room = Room::new();
    let file = room.full_file("a", 20 * MIB, 0x6b);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let node = disk.node.to_string_lossy().into_owned();
    let dir = room.dir.clone();
    let jobs = std::thread::scope(|scope| {
        let jobs =
            scope.spawn(|| four_jobs(&dir, &node, &["--rw=randwrite", "--bs=4k", "--sync=dsync"]));
        for at in (16 * MIB..20 * MIB).step_by(MIB as usize) {
            let (at, len) = (format!("{at}"), format!("{MIB}"));
            call("blkdiscard", ["-z", "-o", &at, "-l", &len, &node]).limit(30).ok();
        }
        jobs.join()
    });
    assert!(jobs.is_ok_and(|report| report.contains("\"error\" : 0")));
    let len = (2 * MIB).to_string();
    call("blkdiscard", ["-o", "0", "-l", &len, &node]).limit(30).ok();
    assert!(disk.count("discards") > 0 && disk.count("errors") == 0, "{}", disk.info());
    disk.remove();
    let bytes = std::fs::read(&file).unwrap();
    assert!(bytes[16 * MIB as usize..].iter().all(|byte| *byte == 0), "not zeroed");
    assert!(bytes[..2 * MIB as usize].iter().all(|byte| *byte == 0), "a file's hole is zeros");
    Ok(())
}

/// How often each I/O thread has gone to sleep by itself.
fn sleeps(server: Process) -> Vec<u64> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.0)).unwrap();
    let of = |task: std::fs::DirEntry| {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        field("Name")?.starts_with("io/").then_some(())?;
        field("voluntary_ctxt_switches")?.parse().ok()
    };
    tasks.flatten().filter_map(of).collect()
}

fn all_serve(kind: Kind) -> Outcome {
    engines()?;
    let room = Room::new();
    let file = room.file("a", 16 * MIB);
    let disk = room.add(kind, &file, &["--no-part-scan"]);
    let before = sleeps(disk.server());
    assert_eq!(before.len(), 3);
    let node = disk.node.to_string_lossy().into_owned();
    four_jobs(&room.dir, &node, &["--rw=randwrite", "--bs=4k"]);
    let after = sleeps(disk.server());
    let used: Vec<_> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert!(used.iter().all(|count| *count > 10), "{used:?}");
    disk.remove();
    Ok(())
}
