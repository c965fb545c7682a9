//! Answers for memory as a bottom: contents last as long as the device.
//!
//! It is a file in memory (memfd), so that a request's pages move to and from it inside the kernel.

use devsplice_core::{Args, Error, Key, Kind, Limits, Result, Source};
use devsplice_uring::FileKind;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::{Body, Opened};

/// `mem(size)`.
pub const SOURCE: Source = Source {
    name: "mem",
    about: "memory; contents last as long as the device",
    keys: &[Key::required("size", Kind::Size, "size of the device")],
    main_key: Some("size"),
    anchored: None,
};

/// Makes one.
///
/// # Errors
/// If the size is no multiple of 512 bytes or the kernel refuses it.
pub fn open(args: &Args) -> Result<Opened> {
    let size = args.size("size")?.unwrap_or(0);
    // A page is what a memory file can give back.
    let limits = Limits { discard: 4096, fast_zeroes: true, ..Limits::ideal(size) };
    let limits = limits.checked().map_err(|error| error.within("mem"))?;
    let thing = || format!("{size} bytes of memory");
    let fd = memfd_create("devsplice-mem", MemfdFlags::CLOEXEC)
        .map_err(|errno| Error::os(thing(), &errno.into()))?;
    ftruncate(&fd, size).map_err(|errno| Error::os(thing(), &errno.into()))?;
    let body = Body::File { fd, kind: FileKind::Regular, direct: false };
    Ok(Opened { body, limits, warnings: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mem(size: &str) -> Result<Opened> {
        let given = [("size".to_owned(), size.to_owned())];
        open(&Args::new("mem", SOURCE.keys, &given).unwrap())
    }

    #[test]
    fn memory_starts_as_zeros_and_has_its_size() {
        let mem = mem("1M").unwrap();
        let mut bytes = [1; 512];
        mem.read_at((1 << 20) - 512, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 512]);
        assert!(mem.read_at(1 << 20, &mut bytes).is_err());
        assert!(!mem.limits.volatile_cache);
    }

    #[test]
    fn odd_and_absurd_sizes_are_errors() {
        assert!(mem("1000").unwrap_err().to_string().contains("no multiple of the 512-byte block"));
        assert!(mem("0").is_err());
        assert!(mem("15E").is_err());
    }
}
