//! Answers for what tells the files, devices and servers below a stack from others that have their
//! names, as text that is kept for a later process.

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

fn is_device(stat: &Statx) -> bool {
    FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::BlockDevice
}

/// A number of a file is given to another one once it is removed, so its birth counts, where the
/// file system has it.
fn one(stat: &Statx) -> String {
    if is_device(stat) {
        let number = makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
        return Device::find(number).map_or_else(String::new, |device| device.identity());
    }
    let birth = match StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME) {
        true => format!(" born {}.{:09}", stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
        false => String::new(),
    };
    format!("file {}:{}:{}{birth}", stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino)
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
    fn layers_are_part_of_what_a_stack_is() {
        let path = std::env::temp_dir().join(format!("devsplice-layers.{}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let at = |offset: &str| told(&format!("linear({}, offset={offset})", path.display()));
        assert_eq!(at("4k").0, at("4k").0);
        assert_ne!(at("4k").0, at("8k").0);
        std::fs::remove_file(&path).unwrap();
    }
}
