//! Answers for ublk served for requests that come one at a time: every byte at any depth, fewer
//! calls, and nothing that ticks when there is nothing to do.

use devsplice_e2e::{
    Disk, Group, Kind, MIB, Outcome, PATHS, Process, Room, call, engines, wait_until,
};

use crate::ublk::offers;
use crate::verify::counts_fit;

pub fn add(group: &mut Group) {
    group.add("depths_that_change_keep_every_byte", changing);
    group.add("one_at_a_time_takes_about_one_call", calls);
    group.add("memory_of_clients_takes_about_one_call", shared);
    group.add("an_idle_disk_costs_nothing_behind_a_last_request", idle);
}

/// One job of fio; its report.
fn fio(room: &Room, disk: &Disk<'_>, more: &[&str]) -> serde_json::Value {
    let fixed = [
        "--name=low",
        "--output-format=json",
        "--direct=1",
        "--ioengine=io_uring",
        "--randrepeat=0",
        "--size=16M",
    ];
    let node = format!("--filename={}", disk.node.display());
    let arguments = fixed.iter().chain(more).map(|&word| word.to_owned());
    let report = call("fio", arguments.chain([node])).dir(&room.dir).limit(120).ok();
    let start = report.find('{').unwrap_or(0);
    let value: serde_json::Value = serde_json::from_str(&report[start..]).unwrap();
    assert_eq!(value["jobs"][0]["error"], 0, "{report}");
    value["jobs"][0].clone()
}

fn changing() -> Outcome {
    engines()?;
    let room = Room::new();
    let [a, b] = ["a", "b"].map(|name| room.file(name, 8 * MIB));
    let disk = room.add(Kind::Ublk(PATHS[0]), &format!("stripe(chunk=64k, {a}, {b})"), &[]);
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1"];
    // One, many, and as many as come between two waits, with flushes and discards among them.
    let loads: [&[&str]; 4] = [
        &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=16"],
        &["--rw=randwrite", "--bs=4k", "--iodepth=32"],
        &["--rw=randwrite", "--bsrange=4k-256k", "--iodepth=2", "--fdatasync=8"],
        &["--rw=randwrite", "--bs=8k", "--iodepth=8", "--iodepth_batch=4", "--iodepth_low=1"],
    ];
    let mut moved = devsplice_e2e::Moved { read: 0, written: 0 };
    for load in loads {
        let job = fio(&room, &disk, &[&verify[..], load].concat());
        moved.read += job["read"]["io_bytes"].as_u64().unwrap_or(0);
        moved.written += job["write"]["io_bytes"].as_u64().unwrap_or(0);
    }
    assert_eq!((moved.read, moved.written), (64 * MIB, 64 * MIB));
    counts_fit(&disk, moved);
    assert!(disk.count("flushes") > 0);
    fio(&room, &disk, &["--rw=trimwrite", "--bs=16k", "--iodepth=1"]);
    assert!(disk.count("discards") > 0 && disk.count("errors") == 0, "{}", disk.info());
    disk.remove();
    Ok(())
}

fn calls() -> Outcome {
    engines()?;
    let room = Room::new();
    let file = room.full_file("a", 16 * MIB, 0x2d);
    let each = |kind: Kind| {
        let disk = room.add(kind, &file, &["--no-part-scan", "--queues", "1"]);
        let before = disk.count("enters");
        fio(&room, &disk, &["--rw=randread", "--bs=4k", "--iodepth=1", "--time_based=0"]);
        let calls = disk.count("enters") - before;
        disk.remove();
        calls
    };
    let (ordinary, low) = (each(Kind::ManyAtATime), each(Kind::Ublk(PATHS[0])));
    // 4096 requests.
    assert!(ordinary > 7000 && low < 5500, "{low} calls, {ordinary} without");
    Ok(())
}

fn shared() -> Outcome {
    engines()?;
    let room = Room::new();
    offers(&room, "shared-memory")?;
    let memory = format!("/dev/shm/{}", room.name());
    std::fs::File::create(&memory).unwrap().set_len(MIB).unwrap();
    room.later("rm", &["-f", &memory]);
    let more = ["--no-part-scan", "--queues", "1", "--shared-memory", &memory];
    let disk = room.add(Kind::Ublk(PATHS[0]), &room.file("a", 16 * MIB), &more);
    let before = disk.count("enters");
    let place = format!("--mem=mmapshared:{memory}");
    let load = ["--size=4M", "--rw=randwrite", "--bs=4k", "--iodepth=1", "--verify=crc32c"];
    fio(&room, &disk, &[&load[..], &[&place]].concat());
    // 1024 writes, and as many reads to verify them.
    let calls = disk.count("enters") - before;
    assert!(calls < 2750, "{calls} calls");
    // The last one's splice is heard of a little later.
    wait_until(5, "the last request", || disk.count("bytes_shared") >= 8 * MIB);
    assert!(disk.count("bytes_shared") <= disk.count("bytes_spliced"), "{}", disk.info());
    disk.remove();
    Ok(())
}

/// Ticks of CPU time that a process has used.
fn ticks(server: Process) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.0)).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum()
}

fn idle() -> Outcome {
    let room = Room::new();
    let file = room.full_file("a", 4 * MIB, 0x2d);
    let disk = room.add(Kind::Ublk(PATHS[0]), &file, &["--no-part-scan"]);
    let node = format!("if={}", disk.node.display());
    call("dd", [&node[..], "of=/dev/null", "bs=4096", "count=64", "iflag=direct"]).ok();
    // It takes 5 ms, not a second, until the last one is known to be done.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let requests = disk.count("requests");
    assert!(requests >= 64, "the last one is counted: {requests}");
    std::thread::sleep(std::time::Duration::from_millis(3500));
    let enters = disk.count("enters");
    assert_eq!(disk.info()["low_depth"], true);
    let before = ticks(disk.server());
    std::thread::sleep(std::time::Duration::from_millis(3000));
    assert_eq!(ticks(disk.server()), before);
    assert_eq!(disk.count("enters"), enters, "its threads sleep");
    disk.remove();
    Ok(())
}
