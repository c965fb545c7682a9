//! The outside programs that the tools need: which Debian package has them, and installing it.

use std::path::Path;
use std::process::Command;

use crate::Fallible;
use crate::proc::{self, find_program};

/// Program, and the Debian package that ships it.
const PACKAGES: &[(&str, &str)] = &[
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("fio", "fio"),
    ("gpgv", "gpgv"),
    ("losetup", "mount"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("modprobe", "kmod"),
    ("nbdcopy", "libnbd-bin"),
    ("qemu-img", "qemu-utils"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("sfdisk", "fdisk"),
    ("sgdisk", "gdisk"),
    ("valgrind", "valgrind"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
];

/// The package that has `program`; a name that is not in the table is its own package.
fn package_of(program: &str) -> &str {
    PACKAGES.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package)
}

/// Whether `program` can be used as it is: found and, for busybox, linked statically (it runs in
/// an initramfs that has no libraries).
fn is_present(program: &str) -> bool {
    match find_program(program) {
        Some(path) if program == "busybox" => is_static(&path),
        found => found.is_some(),
    }
}

/// Whether the ELF file at `path` asks for no program interpreter, that is, no shared libraries.
fn is_static(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|image| elf_has_interpreter(&image) == Some(false))
}

/// Looks for a PT_INTERP (3) among the program headers of a 64-bit little-endian ELF image.
fn elf_has_interpreter(image: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let half = |at: usize| Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?));
    if image.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    // Elf64_Ehdr: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    let (start, size, count) = (usize::try_from(long(32)?).ok()?, half(54)?, half(56)?);
    for index in 0..usize::from(count) {
        if word(start.checked_add(index * usize::from(size))?)? == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

/// The programs among `programs` that are not there.
pub fn missing<'a>(programs: &[&'a str]) -> Vec<&'a str> {
    programs.iter().copied().filter(|program| !is_present(program)).collect()
}

/// Sees to it that every one of `programs` can be started: installs their packages when this is
/// root on a Debian-like system, and otherwise fails with the command to run.
pub fn ensure(programs: &[&str]) -> Fallible<()> {
    let lacking = missing(programs);
    if lacking.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = lacking.iter().map(|program| package_of(program)).collect();
    packages.sort_unstable();
    packages.dedup();
    install(&packages)?;
    match missing(programs).as_slice() {
        [] => Ok(()),
        still => Err(format!("{} still missing after installing {packages:?}", still.join(", "))),
    }
}

/// Installs Debian packages, or fails with the command that would.
pub fn install(packages: &[&str]) -> Fallible<()> {
    let list = packages.join(" ");
    let advice = format!("sudo apt-get install --no-install-recommends {list}");
    if !proc::is_root() {
        return Err(format!("these packages are needed and not installed; run: {advice}"));
    }
    if find_program("apt-get").is_none() {
        return Err(format!("no apt-get here; install what Debian calls: {list}"));
    }
    eprintln!("xtask: installing {list}");
    if apt_install(packages).is_ok() {
        return Ok(());
    }
    eprintln!("xtask: not in apt's lists as they are; running apt-get update");
    proc::run_quiet(Command::new("apt-get").arg("update"))?;
    apt_install(packages)
}

fn apt_install(packages: &[&str]) -> Fallible<()> {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command.args(["install", "-y", "--no-install-recommends"]).args(packages);
    proc::run_quiet(&mut command).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header with one program header of type `kind` right behind it.
    fn elf(kind: u32) -> Vec<u8> {
        let mut image = vec![0; 120];
        image[..5].copy_from_slice(b"\x7fELF\x02");
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        image[64..68].copy_from_slice(&kind.to_le_bytes());
        image
    }

    #[test]
    fn an_interpreter_tells_a_dynamic_program() {
        assert_eq!(elf_has_interpreter(&elf(3)), Some(true));
        assert_eq!(elf_has_interpreter(&elf(1)), Some(false));
        assert_eq!(elf_has_interpreter(b"#!/bin/sh"), None);
        assert_eq!(elf_has_interpreter(&elf(1)[..66]), None);
    }

    #[test]
    fn a_program_outside_the_table_is_its_own_package() {
        assert_eq!(package_of("sfdisk"), "fdisk");
        assert_eq!(package_of("blktrace"), "blktrace");
    }
}
