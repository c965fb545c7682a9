//! Answers for a disk's life: a file system on it, real files in it, gone and back again.

use std::path::{Path, PathBuf};

use devsplice_e2e::{
    Group, Kind, MIB, Outcome, Room, call, kernel_has_file_system, need, need_tool,
};

pub fn add(group: &mut Group, kind: Kind) {
    let name = "ext4_with_real_files_on_a_stripe_survives_del_and_add";
    group.add(name, move || file_system(kind, "ext4", 48 * MIB));
    let name = "xfs_with_real_files_on_a_stripe_survives_del_and_add";
    group.add(name, move || {
        // The kernel would crash (`fuse::CAUTION`), and all tests with it.
        let is_safe = kind != Kind::FuseUring("fuse-zero-copy");
        need(is_safe, "Linux 7.3 frees slab pages of FUSE's zero copy, from which XFS writes")?;
        file_system(kind, "xfs", 320 * MIB)
    });
    let name = "files_written_and_not_synced_are_there_after_a_plain_del";
    group.add(name, move || unsynced(kind));
}

fn file_system(kind: Kind, what: &str, size: u64) -> Outcome {
    need_tool(&format!("mkfs.{what}"))?;
    need_tool("sha256sum")?;
    need(kernel_has_file_system(what), &format!("this kernel mounts no {what}"))?;
    let room = Room::new();
    let [a, b] = ["a", "b"].map(|name| room.file(name, size / 2));
    let stack = format!("stripe({a}, {b})");
    let disk = room.add(kind, &stack, &[]);
    let force = if what == "xfs" { "-f" } else { "-F" };
    call(format!("mkfs.{what}"), ["-q", force, &disk.node.to_string_lossy()]).limit(60).ok();
    let at = room.mount_point("mnt");
    room.mount(&["-t", what, &disk.node.to_string_lossy()], &at);
    let count = copy_real_files(&at);
    let script = "find . -type f -print0 | sort -z | xargs -0 sha256sum > ../sums";
    call("sh", ["-c", script]).dir(&at).ok();
    room.unmount(&at);
    disk.remove();

    let disk = room.add(kind, &stack, &[]);
    room.mount(&["-t", what, &disk.node.to_string_lossy()], &at);
    call("sha256sum", ["--quiet", "--strict", "-c", "../sums"]).dir(&at).ok();
    let sums = std::fs::read_to_string(room.path("sums")).unwrap_or_default();
    assert_eq!(sums.lines().count(), count);
    room.unmount(&at);
    let node = disk.node.to_string_lossy().into_owned();
    match what {
        "ext4" => call("e2fsck", ["-fn", &node]).ok(),
        _ => call("xfs_repair", ["-n", &node]).ok(),
    };
    disk.remove();
    Ok(())
}

/// Copies some files of this machine; how many.
fn copy_real_files(to: &Path) -> usize {
    let mut files = Vec::new();
    let roots = ["/usr/include", "/usr/share/doc", "/usr/bin", "/etc"];
    let mut left = 3 * MIB;
    for root in roots {
        collect(Path::new(root), 0, &mut left, &mut files);
    }
    assert!(files.len() > 4, "this machine has no files to copy");
    for (number, file) in files.iter().enumerate() {
        let name = file.file_name().unwrap().to_string_lossy();
        let dir = to.join(format!("d{}", number % 7));
        std::fs::create_dir_all(&dir).unwrap();
        let copied = std::fs::copy(file, dir.join(format!("{number}-{name}")));
        copied.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
    files.len()
}

fn collect(dir: &Path, depth: usize, left: &mut u64, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut entries: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        let Ok(about) = path.symlink_metadata() else { continue };
        if files.len() >= 120 {
            return;
        }
        if about.is_dir() && depth < 2 {
            collect(&path, depth + 1, left, files);
        } else if about.is_file() && about.len() > 0 && about.len() <= *left / 4 {
            *left -= about.len();
            files.push(path);
        }
    }
}

/// `del` writes out what is only in memory. What was unmounted is; what was written to the node
/// itself is not.
fn unsynced(kind: Kind) -> Outcome {
    let room = Room::new();
    let file = room.file("a", 16 * MIB);
    let disk = room.add(kind, &file, &[]);
    let of = format!("of={}", disk.node.display());
    let from = room.full_file("bytes", 4 * MIB, 0xa7);
    call("dd", [&format!("if={from}"), &of, "bs=64k", "conv=notrunc", "status=none"]).ok();
    disk.remove();
    let (have, want) = (std::fs::read(&file).unwrap(), std::fs::read(from).unwrap());
    assert!(have[..want.len()] == want[..], "bytes were lost at del");
    Ok(())
}
