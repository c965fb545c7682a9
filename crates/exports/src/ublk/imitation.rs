//! Answers for a ublk queue without ublk: its descriptors lie in a memory file and never change.
//!
//! Together with the ring's own imitation it shows what this process costs; see
//! `examples/user_cost.rs`.

use std::os::fd::{AsFd, OwnedFd};

use devsplice_core::{Error, Result};
use devsplice_engine::Export;
use devsplice_uring::{FileKind, RingFile, Uring};
use rustix::fs::MemfdFlags;
use zerocopy::IntoBytes;

use super::DataPath;
use super::extra::Part;
use super::map::Descriptors;
use super::queue::{Queue, QueueConfig};
use super::uapi::{IoDesc, op};

/// A queue of `depth` tags. Each asks for 4 KiB, a read and a write in turn, at the place that `at`
/// says.
///
/// # Errors
/// If there is no memory, or the ring takes no further file.
pub fn queue(
    ring: &mut Uring,
    depth: u16,
    at: impl Fn(u16) -> u64,
) -> Result<Box<dyn Export<Uring>>> {
    let fd = descriptors(depth, at)?;
    let descriptors = Descriptors::map(fd.as_fd(), 0, (depth, size_of::<IoDesc>()), Part::WHOLE)?;
    let file = ring.add_file(RingFile { fd, kind: FileKind::Other })?;
    let (path, part) = (DataPath::AutoRegister, Part::WHOLE);
    let config = QueueConfig { queue: 0, depth, path, encoded: true, part };
    Ok(Box::new(Queue::new(config, file, descriptors)))
}

fn descriptors(depth: u16, at: impl Fn(u16) -> u64) -> Result<OwnedFd> {
    let broken = |errno: rustix::io::Errno| Error::os("descriptors in memory", &errno.into());
    let fd = rustix::fs::memfd_create("descriptors", MemfdFlags::CLOEXEC).map_err(broken)?;
    let mut bytes = Vec::new();
    for tag in 0..depth {
        let op_flags = if tag % 2 == 0 { op::READ } else { op::WRITE };
        let start_sector = at(tag) / 512;
        bytes.extend(IoDesc { op_flags, nr_sectors: 8, start_sector, addr: 0 }.as_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    rustix::io::write(&fd, &bytes).map_err(broken)?;
    Ok(fd)
}
