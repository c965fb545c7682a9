//! Answers for files and block devices as bottoms: how they are opened, locked and what they can
//! do.
//!
//! Direct I/O is used where the file takes it with blocks of at most 4096 bytes (statx reports the
//! alignment since 6.1; before, it is tried); else the page cache is, with a warning.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use devsplice_core::layer::anchored_path;
use devsplice_core::limits::{MAX_BLOCK, SECTOR};
use devsplice_core::{Args, Dma, Error, ErrorKind, Key, Kind, Limits, Result, Source};
use devsplice_uring::lease::is_open_here_alone;
use devsplice_uring::{FileKind, is_in_memory};
use rustix::fs::{AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, StatxFlags};

use crate::sysfs::Device;
use crate::{Access, Body, Opened};

/// `file(path)`.
pub const SOURCE: Source = Source {
    name: "file",
    about: "a file or a block device",
    keys: &[
        Key::required("path", Kind::Text, "where it is"),
        Key::optional("readonly", Kind::Switch, "open for reading only (off)"),
        Key::optional("direct", Kind::Switch, "bypass the page cache (on where it can be)"),
        Key::optional("block", Kind::Size, "logical block (the smallest that the file takes)"),
    ],
    main_key: Some("path"),
    anchored: Some(anchored_path),
};

/// How long a server that was killed may take to let its files go: the kernel closes the files of a
/// ring some time after the process is gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

struct Wish<'a> {
    path: &'a str,
    access: Access,
    read_only: bool,
    direct: Option<bool>,
    block: Option<u32>,
}

/// Opens one.
///
/// # Errors
/// If it is not there, not readable, in use, neither file nor block device, or its size is no
/// multiple of its block.
pub fn open(args: &Args, access: Access) -> Result<Opened> {
    let path = args.text("path").unwrap_or_default();
    let block = args.size("block")?.map(|block| u32::try_from(block).unwrap_or(u32::MAX));
    let wish = Wish {
        path,
        access,
        read_only: args.switch("readonly")?.unwrap_or(false) || access == Access::Read,
        direct: args.switch("direct")?,
        block,
    };
    let stat = rustix::fs::stat(path).map_err(|errno| {
        let error = Error::os(path, &errno.into());
        match error.kind() {
            ErrorKind::NotFound => error.next(format!("truncate -s 1G {path} makes an empty disk")),
            _ => error,
        }
    })?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => open_regular(&wish),
        FileType::BlockDevice => open_block(&wish, stat.st_rdev),
        other => {
            let reason = format!("is a {other:?}, neither a file nor a block device");
            Err(Error::invalid(path, reason))
        }
    }
}

fn open_with(wish: &Wish<'_>, flags: OFlags) -> Result<OwnedFd> {
    let reads_only = wish.read_only || wish.access == Access::Look;
    let access = if reads_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | flags | OFlags::CLOEXEC | OFlags::NOCTTY;
    let opened = patiently(|| rustix::fs::open(wish.path, flags, Mode::empty()));
    opened.inspect(keep_access_time).map_err(|errno| {
        use rustix::io::Errno;
        let error = Error::os(wish.path, &errno.into());
        match errno {
            Errno::BUSY => Error::new(ErrorKind::Busy, wish.path, "is in use (mounted, or held)")
                .next("unmount it, or see who holds it: lsblk, fuser -v"),
            Errno::ROFS | Errno::ACCESS | Errno::PERM if !reads_only => {
                error.next("use readonly=on to serve it read-only")
            }
            _ => error,
        }
    })
}

/// Has reads leave the time of the last access alone: the disk's users are not the file's, and to
/// look whether it is due costs each read some instructions. Only its owner may ask for that; for
/// others nothing changes.
fn keep_access_time(fd: &OwnedFd) {
    if let Ok(flags) = rustix::fs::fcntl_getfl(fd) {
        let _ = rustix::fs::fcntl_setfl(fd, flags | OFlags::NOATIME);
    }
}

fn open_regular(wish: &Wish<'_>) -> Result<Opened> {
    let (fd, need, warnings) = open_unread(wish)?;
    let direct = need.is_some();
    let need = need.unwrap_or(DirectNeed { offset: SECTOR, memory: 1 });
    let size = size_of_file(&fd, wish)?;
    let limits = regular_limits(&fd, wish, need, size)?;
    Ok(Opened { body: Body::File { fd, kind: FileKind::Regular, direct }, limits, warnings })
}

/// Opens a file that may grow up to `room` bytes as it is written, and how long it is by now. Its
/// block is its file system's, as for the kernel's zloop.
pub(crate) fn open_growing(
    path: &str,
    access: Access,
    direct: Option<bool>,
    room: u64,
) -> Result<(Opened, u64)> {
    let mut wish = Wish { path, access, read_only: false, direct, block: None };
    let (fd, need, warnings) = open_unread(&wish)?;
    let direct = need.is_some();
    let need = need.unwrap_or(DirectNeed { offset: SECTOR, memory: 1 });
    let stat = rustix::fs::fstat(&fd).map_err(|errno| Error::os(path, &errno.into()))?;
    let unit = u32::try_from(stat.st_blksize).unwrap_or(MAX_BLOCK);
    if unit.is_power_of_two() && unit <= MAX_BLOCK {
        wish.block = Some(unit.max(need.offset).max(SECTOR));
    }
    let limits = regular_limits(&fd, &wish, need, room)?;
    let filled = u64::try_from(stat.st_size).unwrap_or(0);
    let body = Body::File { fd, kind: FileKind::Regular, direct };
    Ok((Opened { body, limits, warnings }, filled))
}

fn size_of_file(fd: &OwnedFd, wish: &Wish<'_>) -> Result<u64> {
    let stat = rustix::fs::fstat(fd).map_err(|errno| Error::os(wish.path, &errno.into()))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// Opens a file for direct I/O, where it can be, and locks it; what direct I/O asks for then.
fn open_unread(wish: &Wish<'_>) -> Result<(OwnedFd, Option<DirectNeed>, Vec<String>)> {
    let plain = open_with(wish, OFlags::empty())?;
    let mut warnings = Vec::new();
    let need = direct_need(&plain, wish);
    let use_direct = match (wish.direct, need) {
        (Some(false), _) => None,
        (_, Some(need)) if need.offset <= MAX_BLOCK => Some(need),
        (Some(true), _) => {
            let reason = "direct=on, but the file system does no direct I/O in blocks up to 4096";
            return Err(Error::new(ErrorKind::Unsupported, wish.path, reason).next("direct=off"));
        }
        (None, _) => {
            warnings.push(format!(
                "{}: no direct I/O here; data goes through the page cache (direct=off silences \
                 this)",
                wish.path
            ));
            None
        }
    };
    // A file in memory is the page cache: there is no way around it, and asked for one the kernel
    // would copy pages that it could lend.
    let around = use_direct.is_some() && !is_in_memory(&plain);
    let fd = match around {
        true => {
            let direct = open_with(wish, OFlags::DIRECT)?;
            // Whether anybody else has the file open is asked below.
            drop(plain);
            direct
        }
        false => plain,
    };
    if wish.access != Access::Look {
        lock(&fd, wish)?;
        if !wish.read_only {
            not_under_loop(&fd, wish)?;
        }
    }
    Ok((fd, use_direct, warnings))
}

/// Keeps other servers away for as long as the file is open: from a writer all, from a reader
/// writers; from who shares it those that do not.
fn lock(fd: &OwnedFd, wish: &Wish<'_>) -> Result<()> {
    let lock = if wish.read_only || wish.access == Access::Share {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    patiently(|| rustix::fs::flock(fd, lock)).map_err(|_| {
        let reason = "is in use: another process has locked it";
        Error::new(ErrorKind::Busy, wish.path, reason).next("see who: fuser -v, or devsplice list")
    })
}

/// Tries until it works, or fails in another way than by what a server before us may still hold.
fn patiently<T>(take: impl Fn() -> Result<T, rustix::io::Errno>) -> Result<T, rustix::io::Errno> {
    use rustix::io::Errno;
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match take() {
            Err(Errno::BUSY | Errno::AGAIN) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

/// A loop device takes no lock on its file, so it has to be looked for: among all of them, of which
/// there may be a thousand, but only where somebody else has the file open at all.
fn not_under_loop(fd: &OwnedFd, wish: &Wish<'_>) -> Result<()> {
    if is_open_here_alone(fd.as_fd()) {
        return Ok(());
    }
    let os = |errno: rustix::io::Errno| Error::os(wish.path, &errno.into());
    let ours = rustix::fs::fstat(fd).map_err(os)?;
    for (device, file) in crate::sysfs::loops() {
        let is_ours = rustix::fs::stat(&file)
            .is_ok_and(|its| (its.st_dev, its.st_ino) == (ours.st_dev, ours.st_ino));
        if is_ours {
            return Err(Error::new(ErrorKind::Busy, wish.path, format!("is in use by {device}"))
                .next(format!("losetup -d {device}, or serve {device} instead")));
        }
    }
    Ok(())
}

fn regular_limits(fd: &OwnedFd, wish: &Wish<'_>, need: DirectNeed, size: u64) -> Result<Limits> {
    let os = |errno: rustix::io::Errno| Error::os(wish.path, &errno.into());
    let stat = rustix::fs::fstat(fd).map_err(os)?;
    let block = chosen_block(wish, need.offset)?;
    let unit = u32::try_from(stat.st_blksize).unwrap_or(MAX_BLOCK);
    let unit = if unit.is_power_of_two() { unit.clamp(block, MAX_BLOCK) } else { block };
    whole_blocks(wish.path, size, block)?;
    let device = Device::find(stat.st_dev);
    let limits = Limits {
        block,
        physical: unit,
        io_min: unit,
        dma: Dma { align: need.memory, ..Dma::ANY },
        discard: unit,
        read_only: wish.read_only,
        fast_zeroes: punches(fd, wish),
        volatile_cache: !is_in_memory(fd),
        rotational: device.is_some_and(|device| device.queue("rotational") == Some(1)),
        ..Limits::ideal(size)
    };
    limits.checked().map_err(|error| error.within(wish.path))
}

/// How far behind its end a file is asked whether it can be punched: the second for where the first
/// is behind the end of what the file system can have (ext4 has 4 TiB with blocks of 1 KiB).
const BEHIND: [u64; 2] = [1 << 42, 1 << 30];

/// Whether holes can be punched: else zeros are written. Asked for where nothing is, far behind the
/// end, which changes nothing.
fn punches(fd: &OwnedFd, wish: &Wish<'_>) -> bool {
    if wish.read_only || wish.access == Access::Look {
        return false;
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let Ok(size) = size_of_file(fd, wish) else { return false };
    let Some(end) = size.checked_next_multiple_of(BEHIND[1]) else { return false };
    let places = BEHIND.into_iter().filter_map(|behind| end.checked_add(behind));
    let mut punched = places.map(|at| rustix::fs::fallocate(fd, flags, at, MAX_BLOCK.into()));
    punched.any(|result| result.is_ok())
}

fn chosen_block(wish: &Wish<'_>, least: u32) -> Result<u32> {
    let least = least.max(SECTOR);
    match wish.block {
        Some(block) if block < least => {
            let reason = format!("block={block} is below the {least} bytes that it needs");
            Err(Error::invalid(wish.path, reason).next(format!("block={least}, or direct=off")))
        }
        Some(block) if !block.is_power_of_two() || block > MAX_BLOCK => {
            let reason = format!("block={block} is not 512, 1024, 2048 or 4096");
            Err(Error::invalid(wish.path, reason))
        }
        chosen => Ok(chosen.unwrap_or(least)),
    }
}

fn whole_blocks(path: &str, size: u64, block: u32) -> Result<()> {
    let over = size % u64::from(block.max(1));
    if size == 0 {
        return Err(Error::invalid(path, "is empty").next(format!("truncate -s 1G {path}")));
    }
    if over == 0 {
        return Ok(());
    }
    let up = (size - over).saturating_add(u64::from(block));
    let reason = format!("its size, {size} bytes, is no multiple of the {block}-byte block");
    Err(Error::invalid(path, reason).next(format!("truncate -s {up} {path} pads it")))
}

/// What direct I/O asks of positions and of memory, in bytes.
#[derive(Clone, Copy)]
struct DirectNeed {
    offset: u32,
    memory: u32,
}

/// What direct I/O on an open file asks for; `None` where there is none.
fn direct_need(plain: &OwnedFd, wish: &Wish<'_>) -> Option<DirectNeed> {
    let mask = StatxFlags::DIOALIGN;
    if let Ok(statx) = rustix::fs::statx(plain, "", AtFlags::EMPTY_PATH, mask)
        && StatxFlags::from_bits_retain(statx.stx_mask).contains(mask)
    {
        // Zero: the file system knows direct I/O, but not for this file.
        let (offset, memory) = (statx.stx_dio_offset_align, statx.stx_dio_mem_align);
        return (offset != 0).then_some(DirectNeed { offset, memory: memory.max(1) });
    }
    // The file system does not say (tmpfs, FUSE, kernels before 6.1): try.
    let fd = open_with(wish, OFlags::DIRECT).ok()?;
    let mut room = vec![0_u8; 2 * MAX_BLOCK as usize];
    let start = room.as_ptr().align_offset(MAX_BLOCK as usize);
    [SECTOR, MAX_BLOCK].into_iter().find_map(|offset| {
        let bytes = &mut room[start..start + offset as usize];
        rustix::io::pread(fd.as_fd(), bytes, u64::from(offset)).ok()?;
        Some(DirectNeed { offset, memory: SECTOR })
    })
}

fn open_block(wish: &Wish<'_>, rdev: u64) -> Result<Opened> {
    let missing = || Error::new(ErrorKind::NotFound, wish.path, "no device behind this node");
    let device = Device::find(rdev).ok_or_else(missing)?;
    if device.own("ro") == Some(1) && !wish.read_only && wish.access != Access::Look {
        return Err(Error::new(ErrorKind::Permission, wish.path, "is a read-only device")
            .next("use readonly=on to serve it read-only"));
    }
    let direct = wish.direct.unwrap_or(true);
    // Exclusive: neither a mounted file system nor another driver may write behind our back.
    let is_shared = wish.read_only || wish.access == Access::Look;
    let exclusive = if is_shared { OFlags::empty() } else { OFlags::EXCL };
    let flags = if direct { OFlags::DIRECT | exclusive } else { exclusive };
    let fd = open_with(wish, flags)?;
    let number = |name: &str, default: u32| device.queue32(name).unwrap_or(default);
    let logical = number("logical_block_size", SECTOR);
    if logical > MAX_BLOCK {
        let reason = format!("its {logical}-byte blocks are larger than a page");
        return Err(Error::new(ErrorKind::Unsupported, wish.path, reason));
    }
    let block = chosen_block(wish, logical)?;
    let sectors = device.own("size").ok_or_else(missing)?;
    let size = sectors.saturating_mul(u64::from(SECTOR));
    whole_blocks(wish.path, size, block)?;
    let can_discard = device.queue("discard_max_bytes").is_some_and(|most| most > 0);
    let limits = Limits {
        block,
        physical: number("physical_block_size", block).max(block),
        io_min: number("minimum_io_size", 0),
        io_opt: number("optimal_io_size", 0),
        dma: if direct { dma(&device) } else { Dma::ANY },
        discard: if can_discard { number("discard_granularity", block).max(block) } else { 0 },
        read_only: wish.read_only,
        fast_zeroes: device.queue("write_zeroes_max_bytes").is_some_and(|most| most > 0),
        volatile_cache: is_cached(direct, device.queue_text("write_cache").as_deref()),
        rotational: device.queue("rotational") == Some(1),
        ..Limits::ideal(size)
    };
    let limits = limits.checked().map_err(|error| error.within(wish.path))?;
    let body = Body::File { fd, kind: FileKind::Block, direct };
    Ok(Opened { body, limits, warnings: Vec::new() })
}

/// Whether something may still be on its way to a block device when a write to it is done: in the
/// page cache, which nothing but a flush empties, or in a cache that the device says it has.
fn is_cached(direct: bool, write_cache: Option<&str>) -> bool {
    !direct || write_cache != Some("write through")
}

fn dma(device: &Device) -> Dma {
    Dma {
        // The mask, not the alignment (since 6.0); 511 is what block devices asked for before.
        align: device.queue32("dma_alignment").unwrap_or(511).saturating_add(1),
        virt_boundary: match device.queue32("virt_boundary_mask") {
            None | Some(0) => 0,
            Some(mask) => mask.saturating_add(1),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(given: &[(&str, &str)]) -> Result<Opened> {
        let given: Vec<_> = given.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        open(&Args::new("file", SOURCE.keys, &given).unwrap(), Access::Serve)
    }

    fn temp(name: &str, size: u64) -> String {
        let path = std::env::temp_dir().join(format!("devsplice-{name}-{}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn refusal(given: &[(&str, &str)]) -> String {
        file(given).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn a_file_that_is_not_there_or_no_file_is_named() {
        assert!(refusal(&[("path", "/nowhere/a.img")]).starts_with("/nowhere/a.img: "));
        assert!(refusal(&[("path", "/tmp")]).contains("neither a file nor a block device"));
        assert!(refusal(&[("path", "/dev/null")]).contains("neither a file nor a block device"));
    }

    #[test]
    fn a_size_off_the_block_says_how_to_pad() {
        let path = temp("odd", 1000);
        let text = refusal(&[("path", &path)]);
        assert!(text.contains("1000 bytes, is no multiple"), "{text}");
        assert!(text.contains("truncate -s "), "{text}");
        std::fs::remove_file(path).unwrap();
        let path = temp("empty", 0);
        assert!(refusal(&[("path", &path)]).contains("is empty"));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn only_what_can_be_punched_zeroes_fast() {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let none = SealFlags::empty();
        for (seals, size, is_fast) in [
            (none, 1 << 20, true),
            (none, 5 << 40, true),
            (SealFlags::FUTURE_WRITE, 1 << 20, false),
        ] {
            // Opened for writing, and the file system refuses holes all the same.
            let fd = memfd_create("devsplice-test", flags).unwrap();
            rustix::fs::ftruncate(&fd, size).unwrap();
            fcntl_add_seals(&fd, seals).unwrap();
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            let opened = file(&[("path", &path)]).unwrap();
            assert_eq!(opened.limits.fast_zeroes, is_fast, "{seals:?}, {size} bytes");
            assert_eq!(u64::try_from(rustix::fs::fstat(&fd).unwrap().st_size).unwrap(), size);
        }
    }

    #[test]
    fn reads_leave_the_time_of_the_last_access_alone() {
        let path = temp("access", 1 << 20);
        for direct in ["on", "off"] {
            let opened = file(&[("path", &path), ("direct", direct)]);
            // No direct I/O in this directory; the other way is looked at.
            let Ok(opened) = opened else { continue };
            let flags = rustix::fs::fcntl_getfl(opened.body.file().unwrap()).unwrap();
            assert!(flags.contains(OFlags::NOATIME), "direct={direct}: {flags:?}");
            assert_eq!(flags.contains(OFlags::DIRECT), direct == "on");
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn two_writers_of_one_file_are_refused_and_two_readers_are_not() {
        let path = temp("twice", 1 << 20);
        let first = file(&[("path", &path)]).unwrap();
        assert!(refusal(&[("path", &path)]).contains("in use"));
        drop(first);
        let reader = [("path", path.as_str()), ("readonly", "on")];
        let (first, second) = (file(&reader).unwrap(), file(&reader).unwrap());
        assert!(first.limits.read_only && second.limits.read_only);
        drop((first, second));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn who_shares_a_file_writes_it_beside_others_who_do_but_not_beside_who_does_not() {
        let path = temp("shared", 1 << 20);
        let given = [("path".to_owned(), path.clone())];
        let args = Args::new("file", SOURCE.keys, &given).unwrap();
        let share = || open(&args, Access::Share);
        let (first, second) = (share().unwrap(), share().unwrap());
        assert!(!first.limits.read_only && !second.limits.read_only);
        assert!(refusal(&[("path", &path)]).contains("in use"));
        drop((first, second));
        let alone = file(&[("path", &path)]).unwrap();
        assert!(share().map(|_| ()).unwrap_err().to_string().contains("in use"));
        drop(alone);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn who_reads_a_file_keeps_writers_away_and_is_kept_away_by_them() {
        let path = temp("read", 1 << 20);
        let given = [("path".to_owned(), path.clone())];
        let args = Args::new("file", SOURCE.keys, &given).unwrap();
        let read = || open(&args, Access::Read);
        let (first, second) = (read().unwrap(), read().unwrap());
        assert!(first.limits.read_only && second.limits.read_only);
        assert!(refusal(&[("path", &path)]).contains("in use"));
        drop((first, second));
        let alone = file(&[("path", &path)]).unwrap();
        assert!(read().map(|_| ()).unwrap_err().to_string().contains("in use"));
        drop(alone);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn the_page_cache_is_a_cache_whatever_the_device_says() {
        for write_cache in [None, Some("write back"), Some("write through")] {
            assert!(is_cached(false, write_cache), "{write_cache:?}");
        }
        assert!(is_cached(true, Some("write back")) && is_cached(true, None));
        assert!(!is_cached(true, Some("write through")));
    }

    #[test]
    fn a_block_below_what_the_file_takes_is_refused() {
        let path = temp("block", 1 << 20);
        assert!(refusal(&[("path", &path), ("block", "256")]).contains("below"));
        assert!(refusal(&[("path", &path), ("block", "64k")]).contains("block"));
        let opened = file(&[("path", &path), ("block", "4096")]).unwrap();
        assert_eq!((opened.limits.block, opened.limits.size), (4096, 1 << 20));
        drop(opened);
        std::fs::remove_file(path).unwrap();
    }
}
