//! Answers for the shortest driver there is: `ramdisk SIZE` makes a disk, prints its node, and
//! removes it when its standard input ends.
//!
//!     # ramdisk 64M < /dev/tty

use std::io::{self, Read};
use std::sync::{PoisonError, RwLock};

use devsplice_core::size::parse_size;
use devsplice_core::{Error, Result};
use devsplice_exports::disk::Disk;
use devsplice_uring::Bytes;

struct Ram(RwLock<Vec<u8>>, u64);

// The driver: ten lines.
impl Bytes for Ram {
    fn size(&self) -> u64 {
        self.1
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.0.read().map_err(poisoned)?[at as usize..][..into.len()]);
        Ok(())
    }

    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.0.write().map_err(poisoned)?[at as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
}

fn poisoned<T>(_: PoisonError<T>) -> io::Error {
    io::Error::other("another call has panicked")
}

fn main() -> Result<()> {
    let usage = || Error::invalid("usage", "ramdisk SIZE");
    let word = std::env::args().nth(1).ok_or_else(usage)?;
    let size = parse_size(&word).map_err(|reason| Error::invalid("SIZE", reason))?;
    let bytes = vec![0; usize::try_from(size).map_err(|_| usage())?];
    let name = format!("ramdisk-{}", std::process::id());
    let disk = Disk::of_bytes(&name, Ram(RwLock::new(bytes), size))?;
    println!("{}", disk.path());
    let _ = io::stdin().read_to_end(&mut Vec::new());
    println!("{} requests", disk.detach()?.requests);
    Ok(())
}
