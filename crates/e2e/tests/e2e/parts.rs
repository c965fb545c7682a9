//! Answers for partitions as the kernel sees them: their numbers and places.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use devsplice_e2e::{Group, Outcome, Room, call, need};

pub fn add(group: &mut Group) {
    group.add("partitions_have_the_numbers_that_the_kernel_gives_them", judged);
}

/// All block numbers count 4 KiB here, so that direct I/O can be as it likes.
const UNIT: u64 = 8;
const SIZE: u64 = 1000 * UNIT * 512;

/// Writes a table of (slot, type, first, count).
fn table(image: &File, at: u64, entries: &[(u64, u8, u64, u64)]) {
    let start = at * UNIT * 512;
    for (slot, kind, first, count) in entries {
        let mut entry = [0; 16];
        entry[4] = *kind;
        for (place, number) in [(8, *first), (12, *count)] {
            let number = u32::try_from(number * UNIT).expect("a small number");
            entry[place..place + 4].copy_from_slice(&number.to_le_bytes());
        }
        image.write_all_at(&entry, start + 446 + 16 * slot).expect("room");
    }
    image.write_all_at(&[0x55, 0xaa], start + 510).expect("room");
}

/// A disk with all that is special.
fn image(room: &Room) -> String {
    let path = room.file("image", SIZE);
    let file = File::options().write(true).open(&path).expect("the file just made");
    for unit in 0..1000_u64 {
        let page: Vec<u8> = unit.to_le_bytes().repeat(512);
        file.write_all_at(&page, unit * 4096).expect("room");
    }
    let tables = [0, 100, 150, 300, 350, 500];
    for at in tables {
        file.write_all_at(&[0; 512], at * 4096).expect("room");
    }
    // An entry of type 0 with a size; two containers; an entry without a size.
    table(&file, 0, &[(0, 0, 8, 8), (1, 0x0f, 100, 300), (2, 5, 500, 100), (3, 0x83, 900, 0)]);
    // The third leaves what the table was given, the fourth does not.
    let first = [(0, 0, 1, 9), (1, 0x85, 50, 50), (2, 0x83, 90, 300), (3, 0x83, 20, 5)];
    table(&file, 100, &first);
    // Two links; garbage among the flags.
    table(&file, 150, &[(0, 5, 200, 20), (1, 5, 250, 20), (2, 0x83, 10, 41), (3, 0x83, 10, 40)]);
    file.write_all_at(&[0x7c], 150 * 4096 + 446 + 32).expect("room");
    table(&file, 300, &[(0, 0x83, 2, 10), (1, 0x83, 12, 0), (2, 0x83, 1, 21)]);
    table(&file, 350, &[(0, 0x83, 3, 10)]);
    table(&file, 500, &[(0, 0x83, 4, 10), (1, 0x83, 20, 30)]);
    path
}

/// First sector and count of a loop device's partition.
fn place(node: &str, number: u32) -> Option<(u64, u64)> {
    let name = node.strip_prefix("/dev/")?;
    let dir = Path::new("/sys/block").join(name).join(format!("{name}p{number}"));
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok();
    Some((read("start")?, read("size")?))
}

fn judged() -> Outcome {
    let room = Room::new();
    let path = image(&room);
    let node = call("losetup", ["-f", "--show", "-P", "-r", &path]).ok().trim().to_owned();
    room.later("losetup", &["-d", &node]);
    need(place(&node, 1).is_some(), "this kernel reads no such tables")?;
    let kernel: Vec<_> = (1..16).map(|number| place(&node, number)).collect();
    call("losetup", ["-d", &node]).ok();
    let whole = std::fs::read(&path).expect("the image");
    let mut count = 0;
    for (number, theirs) in (1..16).zip(kernel) {
        let part = format!("partition(file({path}, readonly=on), number={number}, sector=512)");
        // To the kernel the containers are partitions of two sectors.
        let Some((first, sectors)) = theirs.filter(|_| !matches!(number, 2 | 3)) else {
            let text = room.refusal(["copy", &part, &room.path("none")]);
            assert!(text.contains("no such partition"), "{number}: {text}");
            continue;
        };
        let out = room.path(&format!("part{number}"));
        room.devsplice(["copy", &part, &out]).ok();
        let at = usize::try_from(first * 512).expect("64 bits");
        let len = usize::try_from(sectors * 512).expect("64 bits");
        let ours = std::fs::read(&out).expect("a copy");
        assert!(ours == whole[at..at + len], "{number}: not {sectors} sectors from {first}");
        count += 1;
    }
    assert_eq!(count, 7, "partitions that both have");
    Ok(())
}
