//! Answers for devices with zones, judged by util-linux's blkzone, by fio's zoned mode and by the
//! lengths of their files.

use std::path::Path;
use std::time::Duration;

use devsplice_e2e::{Disk, Group, Kind, MIB, Outcome, Room, call, engines, need_tool};

/// Bytes of a zone.
const ZONE: u64 = 4 * MIB;
const SECTORS: u64 = ZONE / 512;

pub fn add(group: &mut Group, kind: Kind, is_home: bool) {
    if !kind.is_ublk() || kind == Kind::Ublk("copy") {
        group.add("zones_are_refused_where_there_are_none", move || refused(kind));
        group.add("zones_are_not_written_by_who_does_not_know_them", unwritten);
        return;
    }
    group.add("zones_fio_writes_and_verifies_many_zones_at_once", move || verified(kind));
    if is_home {
        group.add("zones_are_opened_closed_finished_and_reset", move || managed(kind));
        group.add("zones_outlive_servers_that_are_killed_while_they_are_written", move || {
            killed(kind)
        });
        group.add("zones_what_is_appended_is_where_btrfs_is_told", move || appended(kind));
        crate::alike::add(group, kind);
    }
}

/// A device: 2 conventional zones, `count` in all.
fn zoned<'r>(room: &'r Room, kind: Kind, count: u32, keys: &str) -> Disk<'r> {
    let directory = room.path("zones");
    std::fs::create_dir_all(&directory).unwrap();
    let files = format!("zones(path={directory}, size=4M, count={count}, conventional=2)");
    room.add(kind, &format!("zoned({files}{keys})"), &["--no-part-scan"])
}

/// What blkzone reports of each zone: bytes written, and its condition.
pub fn report(node: &Path) -> Vec<(u64, String)> {
    let said = call("blkzone", ["report", node.to_str().unwrap()]).limit(20).ok();
    let zone = |line: &str| {
        let behind = |key: &str| line.split(key).nth(1).unwrap_or_default().to_owned();
        let pointer = behind("wptr 0x");
        let pointer = pointer.split_whitespace().next().unwrap_or_default();
        let condition = behind("zcond:").split(['(', ')']).nth(1).unwrap_or_default().to_owned();
        (u64::from_str_radix(pointer, 16).unwrap().wrapping_mul(512), condition)
    };
    said.lines().map(zone).collect()
}

/// Does this to so many zones from a byte on, or to all behind it; whether that went well.
pub fn blkzone(node: &Path, verb: &str, at: u64, zones: Option<u64>) -> bool {
    let mut words = vec![verb.to_owned(), "-o".to_owned(), (at / 512).to_string()];
    words.extend(zones.iter().flat_map(|count| ["-c".to_owned(), count.to_string()]));
    words.push(node.display().to_string());
    call("blkzone", words).limit(20).run().code == Some(0)
}

fn manage(disk: &Disk<'_>, verb: &str, zone: u64) -> bool {
    blkzone(&disk.node, verb, zone * ZONE, Some(1))
}

/// Writes `count` blocks of 64 KiB at a place of a zone.
fn write(disk: &Disk<'_>, zone: u64, block: u64, count: u64) -> bool {
    let at = (zone * ZONE / 65_536 + block).to_string();
    let words = [
        "if=/dev/urandom".to_owned(),
        format!("of={}", disk.node.display()),
        "bs=64k".to_owned(),
        format!("count={count}"),
        format!("seek={at}"),
        "oflag=direct".to_owned(),
        "conv=notrunc".to_owned(),
    ];
    call("dd", words).limit(60).run().code == Some(0)
}

fn length(room: &Room, zone: u64) -> u64 {
    std::fs::metadata(room.path(&format!("zones/seq-{zone:06}"))).unwrap().len()
}

fn fio(room: &Room, node: &Path, more: &[&str]) {
    let mut words: Vec<String> = [
        "--direct=1",
        "--zonemode=zbd",
        "--ioengine=libaio",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--group_reporting",
    ]
    .map(str::to_owned)
    .to_vec();
    words.push(format!("--filename={}", node.display()));
    words.extend(more.iter().map(|&word| word.to_owned()));
    let ran = call("fio", words).dir(&room.dir).limit(120).run();
    assert!(ran.code == Some(0) && ran.out.contains("err= 0:"), "{}\n{}", ran.out, ran.err);
}

fn verified(kind: Kind) -> Outcome {
    engines()?;
    need_tool("blkzone")?;
    let room = Room::new();
    let disk = zoned(&room, kind, 14, ", open=6");
    assert_eq!(
        (disk.queue("zoned"), disk.queue("chunk_sectors")),
        ("host-managed".into(), "8192".into())
    );
    assert_eq!(disk.queue("max_open_zones"), "6");
    let features = disk.info()["features"].clone();
    assert!(features.as_array().unwrap().contains(&"zoned".into()), "{features}");
    let jobs = ["--name=z", "--rw=write", "--bs=16k", "--numjobs=3", "--size=8m", "--offset=8m"];
    fio(
        &room,
        &disk.node,
        &[&jobs[..], &["--offset_increment=16m", "--max_open_zones=6"]].concat(),
    );
    assert!(disk.count("bytes_spliced") + disk.count("bytes_copied") >= 2 * 3 * 8 * MIB);
    let random = ["--name=r", "--rw=randwrite", "--bsrange=4k-64k", "--offset=8m", "--size=48m"];
    fio(&room, &disk.node, &[&random[..], &["--io_size=24m", "--max_open_zones=4"]].concat());
    for (zone, (written, condition)) in report(&disk.node).iter().enumerate().skip(2) {
        let written = if condition == "fu" { ZONE } else { *written };
        assert_eq!(length(&room, zone as u64), written, "zone {zone}, {condition}");
    }
    assert_eq!(disk.count("errors"), 0);
    if !kind.copies() {
        assert_eq!(disk.count("bytes_copied"), 0);
    }
    disk.remove();
    Ok(())
}

fn managed(kind: Kind) -> Outcome {
    need_tool("blkzone")?;
    let room = Room::new();
    let disk = zoned(&room, kind, 6, ", open=2, capacity=3M");
    let conditions = |disk: &Disk<'_>| -> Vec<String> {
        report(&disk.node).into_iter().map(|(_, condition)| condition).collect()
    };
    assert_eq!(conditions(&disk), ["nw", "nw", "em", "em", "em", "em"]);
    assert!(write(&disk, 2, 0, 2) && !write(&disk, 2, 0, 1) && !write(&disk, 2, 5, 1));
    assert_eq!(report(&disk.node)[2], (128 << 10, "oi".to_owned()));
    assert!(manage(&disk, "open", 3) && manage(&disk, "open", 4));
    assert_eq!(conditions(&disk), ["nw", "nw", "cl", "oe", "oe", "em"]);
    assert!(!manage(&disk, "open", 5) && !write(&disk, 5, 0, 1));
    assert!(manage(&disk, "close", 3) && manage(&disk, "finish", 4));
    assert_eq!(conditions(&disk), ["nw", "nw", "cl", "em", "fu", "em"]);
    assert_eq!((length(&room, 2), length(&room, 4)), (128 << 10, 3 * MIB));
    assert!(write(&disk, 2, 2, 46) && !write(&disk, 2, 48, 1));
    assert_eq!(conditions(&disk)[2], "fu");
    assert!(write(&disk, 0, 7, 1) && write(&disk, 0, 3, 1) && !manage(&disk, "reset", 0));
    // Another server finds what the files say.
    let _ = room.devsplice(["upgrade", &disk.name]).ok();
    assert_eq!(conditions(&disk), ["nw", "nw", "fu", "em", "fu", "em"]);
    assert!(manage(&disk, "reset", 4) && manage(&disk, "reset", 4));
    assert_eq!((length(&room, 2), length(&room, 4)), (3 * MIB, 0));
    let node = disk.node.to_str().unwrap();
    let _ = call("blkzone", ["reset", "-o", &(2 * SECTORS).to_string(), node]).limit(20).ok();
    assert_eq!(conditions(&disk), ["nw", "nw", "em", "em", "em", "em"]);
    assert_eq!((2..6).map(|zone| length(&room, zone)).sum::<u64>(), 0);
    disk.remove();
    Ok(())
}

fn killed(kind: Kind) -> Outcome {
    engines()?;
    need_tool("blkzone")?;
    let room = Room::new();
    let disk = zoned(&room, kind, 12, "");
    let node = disk.node.clone();
    std::thread::scope(|scope| {
        let fio = scope.spawn(|| {
            for _ in 0..4 {
                let jobs = ["--name=k", "--rw=write", "--bs=8k", "--numjobs=2", "--size=16m"];
                let place = ["--offset=8m", "--offset_increment=20m"];
                fio(&Room::new(), &node, &[&jobs[..], &place].concat());
            }
        });
        let mut kills = 0;
        while !fio.is_finished() && kills < 12 {
            // Ten deaths in a row within a second of the start would be taken for a bad server.
            let settle = if kills % 4 == 3 { 1100 } else { 0 };
            std::thread::sleep(Duration::from_millis(100 + kills * 131 % 500 + settle));
            crate::recover::kill(&room, &disk);
            kills += 1;
        }
        fio.join().expect("fio");
        assert!(kills >= 3, "killed {kills} times");
    });
    for (zone, (written, condition)) in report(&disk.node).iter().enumerate().skip(2) {
        let written = if condition == "fu" { ZONE } else { *written };
        assert_eq!(length(&room, zone as u64), written, "zone {zone}, {condition}");
    }
    disk.remove();
    Ok(())
}

/// btrfs writes data with zone append, and finds it where it was told that it is.
fn appended(kind: Kind) -> Outcome {
    engines()?;
    devsplice_e2e::need(devsplice_e2e::kernel_has_file_system("btrfs"), "no btrfs here")?;
    need_tool("mkfs.btrfs")?;
    let room = Room::new();
    let disk = zoned(&room, kind, 64, "");
    assert_ne!(disk.queue("zone_append_max_bytes"), "0");
    let node = disk.node.to_str().unwrap();
    let _ = call("mkfs.btrfs", ["-q", "-O", "zoned", "-d", "single", "-m", "single", node]).ok();
    let at = room.mount_point("btrfs");
    room.mount(&["-t", "btrfs", node], &at);
    let job = "--name=a --rw=randwrite --bsrange=4k-128k --numjobs=2 --size=12m --direct=1 \
               --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 \
               --verify_state_save=0 --do_verify=1 --group_reporting";
    let place = format!("--directory={}", at.display());
    let words: Vec<&str> = job.split_whitespace().chain([place.as_str()]).collect();
    let said = call("fio", &words).dir(&room.dir).limit(120).ok();
    assert!(said.contains("err= 0:"), "{said}");
    let data = |name: &str| std::fs::read(at.join(name)).unwrap();
    let before = ["a.0.0", "a.1.0"].map(data);
    room.unmount(&at);
    let _ = call("btrfs", ["check", "--check-data-csum", node]).limit(120).ok();
    room.mount(&["-t", "btrfs", node], &at);
    assert!(before == ["a.0.0", "a.1.0"].map(data), "other data than before");
    room.unmount(&at);
    assert_eq!(disk.count("errors"), 0, "{}", disk.info());
    disk.remove();
    Ok(())
}

fn refused(kind: Kind) -> Outcome {
    let room = Room::new();
    let directory = room.path("zones");
    std::fs::create_dir(&directory).unwrap();
    let stack = format!("zoned(zones(path={directory}, size=1M, count=3))");
    room.add_refused(kind, &stack, &[], &["zones"]);
    assert!(Path::new(&directory).exists());
    Ok(())
}

/// Who does not know zones writes none, neither over what is written nor behind it.
fn unwritten() -> Outcome {
    let room = Room::new();
    std::fs::create_dir(room.path("zones")).unwrap();
    let first = room.full_file("zones/seq-000000", MIB, 0x11);
    let second = room.full_file("zones/seq-000001", MIB / 4, 0x22);
    let full = room.full_file("full", 2 * MIB, 0x33);
    let stack = format!("zoned(zones(path={}, size=1M))", room.path("zones"));
    let listen = format!("unix:{}", room.path("socket"));
    let ways: [&[&str]; 4] = [
        &["copy", &full, &stack],
        &["bench", "--rw", "write", "--destroy", "--runtime", "1", &stack],
        &["bench", "--rw", "randwrite", "--destroy", "--runtime", "1", &stack],
        &["add", "--listen", &listen, &stack],
    ];
    for way in ways {
        let text = room.refusal(way);
        assert!(text.contains("zones") && text.contains("ublk"), "{text}");
    }
    assert!(!Path::new(&room.path("socket")).exists());
    assert!(std::fs::read(&first).unwrap() == vec![0x11; 1 << 20]);
    assert!(std::fs::read(&second).unwrap() == vec![0x22; 1 << 18]);
    // To read them is no harm.
    let back = room.path("back");
    room.devsplice(["copy", &stack, &back]).ok();
    assert!(std::fs::read(&back).unwrap()[..1 << 20] == vec![0x11; 1 << 20]);
    Ok(())
}
