//! Answers for what tells the files, devices and servers below a stack from others: as text that is
//! kept for a later process, and whether two stacks have any in common.

use std::os::fd::AsFd;

use devsplice_backends::sysfs::Device;
use devsplice_core::{Error, Result};
use devsplice_exports::threads::Bottom;
use devsplice_spec::Plan;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, makedev};

use super::Open;

impl Open {
    /// What is other where the stack, or a file, a device or a server below it is another one.
    ///
    /// # Errors
    /// If the kernel does not say what a file is.
    pub fn identity(&self, plan: &Plan) -> Result<String> {
        self.all(plan, one)
    }

    /// The same, and other once its files have been written to.
    ///
    /// # Errors
    /// As [`Open::identity`].
    pub fn stamp(&self, plan: &Plan) -> Result<String> {
        self.all(plan, |stat| {
            let time = stat.stx_mtime;
            match is_device(stat) {
                // A device node's times say nothing about the device.
                true => one(stat),
                false => format!("{} {}.{:09}", one(stat), time.tv_sec, time.tv_nsec),
            }
        })
    }

    /// Refuses what has a file or a device in common with this.
    ///
    /// # Errors
    /// If it has.
    pub fn apart_from(&self, other: &Open) -> Result<()> {
        let ours = self.lies_on();
        if other.lies_on().iter().any(|its| ours.iter().any(|our| our.meets(its))) {
            let reason = format!("lies on the same file or device as {}", self.name);
            return Err(Error::invalid(&other.name, reason));
        }
        Ok(())
    }

    /// Its files and devices.
    fn lies_on(&self) -> Vec<Lies> {
        let stats = self.bottoms.iter().filter_map(|bottom| match bottom {
            Bottom::File { fd, .. } => rustix::fs::fstat(fd.as_fd()).ok(),
            Bottom::Bytes(_) | Bottom::Remote(_) => None,
        });
        let one = |stat: rustix::fs::Stat| match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => {
                let disk = Device::find(stat.st_rdev).and_then(|device| device.disk());
                Lies::Device { number: stat.st_rdev, disk: disk.unwrap_or(stat.st_rdev) }
            }
            _ => Lies::File(stat.st_dev, stat.st_ino),
        };
        stats.map(one).collect()
    }

    fn all(&self, plan: &Plan, one: impl Fn(&Statx) -> String) -> Result<String> {
        let mut all = plan.to_expression();
        for bottom in &self.bottoms {
            let this = match bottom {
                Bottom::File { fd, .. } => {
                    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
                    let stat = rustix::fs::statx(fd.as_fd(), "", AtFlags::EMPTY_PATH, mask);
                    one(&stat.map_err(|errno| Error::os(&self.name, &errno.into()))?)
                }
                // A server says no more of an export.
                Bottom::Remote(remote) => {
                    format!("{} of {} bytes", remote.name(), remote.agreed().size)
                }
                Bottom::Bytes(_) => "bytes".to_owned(),
            };
            all.push_str("; ");
            all.push_str(&this);
        }
        Ok(all)
    }
}

/// What bytes lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lies {
    /// The number of a file system, and of a file there.
    File(u64, u64),
    /// A device, and the disk that it is a partition of, or itself.
    Device { number: u64, disk: u64 },
}

impl Lies {
    /// Whether the two have bytes in common: two partitions of a disk have not.
    fn meets(&self, other: &Lies) -> bool {
        match (*self, *other) {
            (Lies::Device { number: one, disk }, Lies::Device { number: two, disk: its }) => {
                one == two || (disk == its && (one == disk || two == disk))
            }
            _ => self == other,
        }
    }
}

fn is_device(stat: &Statx) -> bool {
    FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::BlockDevice
}

/// A number of a file is given to another one once it is removed, so its birth counts, where the
/// file system has it.
fn one(stat: &Statx) -> String {
    if is_device(stat) {
        let number = makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
        let unknown = || format!("number {}:{}", stat.stx_rdev_major, stat.stx_rdev_minor);
        return Device::find(number).map_or_else(unknown, |device| device.identity());
    }
    let (ino, born) = (stat.stx_ino, stat.stx_btime);
    // The device's number is another one after a mount or boot (btrfs, NFS, a disk that was plugged
    // in again); a birth to the nanosecond does without.
    match StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME) {
        true => format!("file {ino} born {}.{:09}", born.tv_sec, born.tv_nsec),
        false => format!("file {}:{}:{ino}", stat.stx_dev_major, stat.stx_dev_minor),
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan;
    use super::*;
    use devsplice_backends::Access;

    fn told(path: &str) -> (String, String) {
        let plan = plan(path).unwrap();
        let open = Open::of(path, &plan, Access::Read).unwrap();
        (open.identity(&plan).unwrap(), open.stamp(&plan).unwrap())
    }

    #[test]
    fn a_file_is_the_same_while_it_is_written_and_another_one_once_it_was_made_again() {
        let path = std::env::temp_dir().join(format!("devsplice-same.{}", std::process::id()));
        let name = path.to_str().unwrap();
        std::fs::write(&path, [1; 4096]).unwrap();
        let first = told(name);
        assert_eq!(told(name), first);
        std::fs::write(&path, [2; 4096]).unwrap();
        let written = told(name);
        assert_eq!(written.0, first.0);
        assert_ne!(written.1, first.1);
        // The number of the one that was removed is often given to the next.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, [2; 4096]).unwrap();
        assert_ne!(told(name).0, first.0);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_disk_meets_its_partitions_which_do_not_meet_each_other() {
        let device = |number, disk| Lies::Device { number, disk };
        let (disk, first, second) = (device(8, 8), device(9, 8), device(10, 8));
        let (another, file) = (device(16, 16), Lies::File(8, 8));
        for (one, two, meet) in [
            (disk, disk, true),
            (disk, first, true),
            (first, second, false),
            (first, first, true),
            (another, first, false),
            (another, disk, false),
            (file, disk, false),
            (file, file, true),
        ] {
            assert_eq!([one.meets(&two), two.meets(&one)], [meet; 2], "{one:?} {two:?}");
        }
    }

    #[test]
    fn layers_are_part_of_what_a_stack_is() {
        let path = std::env::temp_dir().join(format!("devsplice-layers.{}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let at = |offset: &str| told(&format!("linear({}, offset={offset})", path.display()));
        assert_eq!(at("4k").0, at("4k").0);
        assert_ne!(at("4k").0, at("8k").0);
        std::fs::remove_file(&path).unwrap();
    }
}
