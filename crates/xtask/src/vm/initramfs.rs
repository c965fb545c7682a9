//! The guest's initramfs: a cpio archive of busybox, two scripts and the modules to mount / with.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::Fallible;
use crate::kernel::Kernel;
use crate::proc::run_quiet;

/// A cpio archive in the "newc" format, in memory.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, 0o040_755, (0, 0), &[]);
    }

    /// Adds a regular file that may be executed.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, 0o100_755, (0, 0), content);
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, 0o020_600, (major, minor), &[]);
    }

    /// Closes the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = content.len() as u32;
        // ino mode uid gid nlink mtime size dev(2) rdev(2) namesize check
        let (name_size, links) = (path.len() as u32 + 1, 1);
        let (major, minor) = device;
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Headers and contents start at multiples of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A kernel's modules: what each needs, and what needs no module.
pub struct Modules {
    /// Module name to its file and the files it needs, as modules.dep lists them.
    loadable: HashMap<String, (String, Vec<String>)>,
    builtin: Vec<String>,
}

/// How a kernel answers for a driver.
#[derive(Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is part of the image.
    Builtin,
    /// It is a module.
    Loadable,
    /// This kernel was built without it.
    Absent,
}

impl Modules {
    /// Reads a kernel's lists.
    pub fn read(kernel: &Kernel) -> Fallible<Self> {
        let read = |name: &str| {
            let path = kernel.modules.join(name);
            fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))
        };
        Ok(Self::parse(&read("modules.dep")?, &read("modules.builtin").unwrap_or_default()))
    }

    fn parse(dep: &str, builtin: &str) -> Self {
        let parse_line = |line: &str| {
            let (file, needs) = line.split_once(':')?;
            let needs = needs.split_whitespace().map(str::to_owned).collect();
            Some((module_name(file), (file.to_owned(), needs)))
        };
        Self {
            loadable: dep.lines().filter_map(parse_line).collect(),
            builtin: builtin.lines().map(module_name).collect(),
        }
    }

    /// How this kernel has the driver called `name`.
    pub fn presence(&self, name: &str) -> Presence {
        let name = module_name(name);
        match () {
            () if self.loadable.contains_key(&name) => Presence::Loadable,
            () if self.builtin.contains(&name) => Presence::Builtin,
            () => Presence::Absent,
        }
    }

    /// The files to insert for `names`, in order, each after what it needs.
    pub fn closure(&self, names: &[&str]) -> Vec<String> {
        let mut order: Vec<String> = Vec::new();
        for name in names {
            let Some((file, needs)) = self.loadable.get(&module_name(name)) else { continue };
            // modules.dep lists direct needs first, so that the last is to be inserted first.
            for file in needs.iter().rev().chain([file]) {
                if !order.contains(file) {
                    order.push(file.clone());
                }
            }
        }
        order
    }
}

/// `kernel/fs/fuse/virtio-fs.ko.xz` is the module `virtio_fs`.
fn module_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    let end = base.find(".ko").unwrap_or(base.len());
    base[..end].replace('-', "_")
}

/// A module's code, decompressed.
pub fn module_image(path: &Path) -> Fallible<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display())),
    };
    run_quiet(Command::new(tool).arg("-dc").arg(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/fuse/virtiofs.ko: kernel/fs/fuse/fuse.ko kernel/v/ring.ko\n\
                       kernel/fs/fuse/fuse.ko:\nkernel/v/ring.ko:\n";

    #[test]
    fn a_module_comes_after_what_it_needs_and_once() {
        let modules = Modules::parse(DEP, "kernel/drivers/virtio/virtio-pci.ko\n");
        assert_eq!(
            modules.closure(&["virtiofs", "fuse", "absent"]),
            ["kernel/v/ring.ko", "kernel/fs/fuse/fuse.ko", "kernel/fs/fuse/virtiofs.ko"]
        );
        assert_eq!(modules.presence("virtio_pci"), Presence::Builtin);
        assert_eq!(modules.presence("fuse"), Presence::Loadable);
        assert_eq!(modules.presence("absent"), Presence::Absent);
    }

    #[test]
    fn an_entry_is_a_header_a_name_and_a_content_each_padded_to_four() {
        let mut archive = Archive::default();
        archive.file("ab", b"hello");
        let bytes = archive.finish();
        // 110 bytes of header and "ab\0" make 113, padded to 116; 5 of content, padded to 8.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[6 + 8 * 6..6 + 8 * 7], b"00000005");
        assert_eq!(&bytes[110..116], b"ab\0\0\0\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn a_module_is_named_by_its_file() {
        assert_eq!(module_name("kernel/drivers/block/null_blk/null-blk.ko.xz"), "null_blk");
        assert_eq!(module_name("brd"), "brd");
    }
}
