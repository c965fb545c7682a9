//! Answers for what the kernel says of a block device under /sys/dev/block
//! (Documentation/ABI/stable/ sysfs-block).

use std::fs::read_to_string;
use std::path::PathBuf;

/// A block device's directory.
pub struct Device {
    own: PathBuf,
    /// Of the whole disk, where `own` is a partition.
    queue: PathBuf,
}

/// What names a disk in the same way wherever it is plugged in, with the file that says so, from
/// the disk's directory: what the drive, the device mapper or md were given to tell it from others.
const LASTING: [&str; 6] = ["wwid", "device/wwid", "dm/uuid", "md/uuid", "serial", "device/serial"];

impl Device {
    /// By number; `None` where there is no such device.
    #[must_use]
    pub fn find(rdev: u64) -> Option<Device> {
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        let own = PathBuf::from(format!("/sys/dev/block/{major}:{minor}")).canonicalize().ok()?;
        let queue =
            [own.join("queue"), own.join("../queue")].into_iter().find(|dir| dir.is_dir())?;
        Some(Device { own, queue })
    }

    /// A number of the device itself: `size` (in sectors), `ro`.
    pub(crate) fn own(&self, name: &str) -> Option<u64> {
        read_to_string(self.own.join(name)).ok()?.trim().parse().ok()
    }

    /// A number of its queue.
    pub(crate) fn queue(&self, name: &str) -> Option<u64> {
        self.queue_text(name)?.parse().ok()
    }

    /// A number of its queue that has to fit 32 bits; the largest where it does not.
    pub(crate) fn queue32(&self, name: &str) -> Option<u32> {
        self.queue(name).map(|number| u32::try_from(number).unwrap_or(u32::MAX))
    }

    /// A word of its queue.
    pub(crate) fn queue_text(&self, name: &str) -> Option<String> {
        Some(read_to_string(self.queue.join(name)).ok()?.trim().to_owned())
    }

    /// The number of the whole disk that it is a partition of; its own, if it is none.
    #[must_use]
    pub fn disk(&self) -> Option<u64> {
        let text = self.whole("dev")?;
        let (major, minor) = text.split_once(':')?;
        Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
    }

    /// A word of the whole disk.
    fn whole(&self, name: &str) -> Option<String> {
        let text = read_to_string(self.queue.join("..").join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// What tells it from every other device, as well as the kernel knows: where the disk has a
    /// name that lasts, that one; else its number, which disk since this boot of the machine it is
    /// (`diskseq`, since 5.15), and which boot. With its size, and where a partition begins.
    #[must_use]
    pub fn identity(&self) -> String {
        let number = |name: &str| self.own(name).unwrap_or(0);
        let lasting = LASTING.iter().find_map(|name| Some(format!("{name} {}", self.whole(name)?)));
        let disk = lasting.unwrap_or_else(|| {
            let boot = read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            let [dev, disk] = ["dev", "diskseq"].map(|name| self.whole(name).unwrap_or_default());
            format!("number {dev}, the {disk}. disk of boot {}", boot.trim())
        });
        format!("device {disk}: {} sectors from {}", number("size"), number("start"))
    }
}

/// Loop devices and the files they lie over.
pub(crate) fn loops() -> Vec<(String, String)> {
    let Ok(blocks) = std::fs::read_dir("/sys/block") else { return Vec::new() };
    let pair = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_str().filter(|name| name.starts_with("loop"))?;
        let file = read_to_string(entry.path().join("loop/backing_file")).ok()?;
        Some((format!("/dev/{name}"), file.trim_end_matches('\n').to_owned()))
    };
    blocks.flatten().filter_map(pair).collect()
}
