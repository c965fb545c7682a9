//! Answers for `devsplice udev-info`: what udev's rules ask of a disk's node, from the files of
//! state alone. It opens no device and asks no server: udev waits for it, and others for udev.

use std::path::Path;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::ublk;

use crate::args::UdevInfo;
use crate::say;
use crate::state::{self, Disk};

/// Prints variables for udev.
///
/// # Errors
/// If the node is none of a disk of ours; then nothing is printed.
pub fn run(info: &UdevInfo) -> Result<()> {
    let node = &info.device;
    if info.owner {
        return owner(node);
    }
    let all = state::all()?;
    let file = backing_file(node);
    let ours = all.iter().map(|found| &found.disk).find(|disk| is_of(disk, node, file.as_deref()));
    let Some(disk) = ours else {
        return Err(Error::new(ErrorKind::NotFound, node, "is no disk of devsplice"));
    };
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    for (name, value) in variables(disk, machine.trim()) {
        say!("{name}={value}");
    }
    Ok(())
}

/// Prints who has made a node of ublk, if that was somebody without privileges. The driver is
/// asked, which waits for no server to tell that.
fn owner(node: &str) -> Result<()> {
    let none = || Error::new(ErrorKind::NotFound, node, "is no node of a user's device");
    let id = ublk_number(node).ok_or_else(none)?;
    let (user, group) = ublk::Control::open()?.owner(id)?.ok_or_else(none)?;
    say!("DEVSPLICE_OWNER={user}\nDEVSPLICE_GROUP={group}");
    Ok(())
}

/// The number of the device whose node, or whose partition's, this is.
fn ublk_number(node: &str) -> Option<u32> {
    let name = node.strip_prefix("/dev/ublkb").or_else(|| node.strip_prefix("/dev/ublkc"))?;
    let end = name.find(|c: char| !c.is_ascii_digit()).unwrap_or(name.len());
    let rest = &name[end..];
    let is_partition = rest.strip_prefix('p').is_some_and(|part| part.parse::<u32>().is_ok());
    if rest.is_empty() || is_partition { name[..end].parse().ok() } else { None }
}

/// Whether a node is a disk's. When udev asks first, the server may not know the node yet: the
/// number of the ublk device is written before there is one, and so is the name of the file below a
/// loop device.
fn is_of(disk: &Disk, node: &str, backing_file: Option<&str>) -> bool {
    if let Some(number) = disk.ublk_id {
        return node == format!("/dev/ublkb{number}");
    }
    disk.fuse_connection.is_some()
        && backing_file == Some(&format!("/{}", disk.name))
        && (disk.device.is_empty() || disk.device == node)
}

/// What a loop device is over, as the kernel tells it.
fn backing_file(node: &str) -> Option<String> {
    let name = Path::new(node).file_name()?.to_str()?.strip_prefix("loop")?;
    let path = format!("/sys/block/loop{name}/loop/backing_file");
    std::fs::read_to_string(path).ok().map(|text| text.trim_end().to_owned())
}

fn variables(disk: &Disk, machine: &str) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("DEVSPLICE_NAME", disk.name.clone()),
        ("DEVSPLICE_EXPORT", disk.export.clone()),
        ("DEVSPLICE_UUID", uuid(machine, &disk.name)),
    ];
    // As a part of a link's name: what may not be in one is left out.
    let is_fit = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    let serial: String = disk.serial.iter().flat_map(|text| text.chars()).filter(is_fit).collect();
    if !serial.is_empty() {
        all.push(("DEVSPLICE_SERIAL", serial));
    }
    all
}

/// What is the same for a name on a machine, whenever the disk is made again, and for nothing else:
/// a UUID of version 8 (RFC 9562) from 128 bits of FNV-1a.
fn uuid(machine: &str, name: &str) -> String {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = ["devsplice", machine, name].join("\0").into_bytes();
    let hash =
        bytes.iter().fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    let version = hash & !(0xf << 76) | 8 << 76;
    let variant = version & !(0b11 << 62) | 0b10 << 62;
    let text = format!("{variant:032x}");
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_node_of_ublk_has_its_devices_number() {
        let number = super::ublk_number;
        assert_eq!((number("/dev/ublkb7"), number("/dev/ublkc7")), (Some(7), Some(7)));
        assert_eq!((number("/dev/ublkb12p3"), number("/dev/ublkb12p")), (Some(12), None));
        for other in ["/dev/ublkb", "/dev/ublk-control", "/dev/loop1", "ublkb1", "/dev/ublkb1x"] {
            assert_eq!(number(other), None, "{other}");
        }
    }

    use super::*;

    fn ublk(number: u32) -> Disk {
        Disk { name: "a".into(), ublk_id: Some(number), ..Disk::default() }
    }

    #[test]
    fn a_node_is_known_before_its_server_knows_it() {
        assert!(is_of(&ublk(3), "/dev/ublkb3", None));
        assert!(!is_of(&ublk(3), "/dev/ublkb31", None) && !is_of(&ublk(31), "/dev/ublkb3", None));
        let mut fuse = Disk { name: "a".into(), fuse_connection: Some(9), ..Disk::default() };
        assert!(is_of(&fuse, "/dev/loop4", Some("/a")));
        assert!(!is_of(&fuse, "/dev/loop4", Some("/ab")) && !is_of(&fuse, "/dev/loop4", None));
        fuse.device = "/dev/loop5".into();
        assert!(!is_of(&fuse, "/dev/loop4", Some("/a")));
    }

    #[test]
    fn variables_can_be_parts_of_links() {
        let serial = Some("S/3 \n\"x\u{e9}-1".to_owned());
        let all = variables(&Disk { serial, ..ublk(0) }, "m");
        assert!(all.contains(&("DEVSPLICE_SERIAL", "S3x-1".to_owned())), "{all:?}");
        assert!(!variables(&ublk(0), "m").iter().any(|(name, _)| *name == "DEVSPLICE_SERIAL"));
    }

    #[test]
    fn a_uuid_is_of_its_version_and_of_machine_and_name() {
        let one = uuid("m", "a");
        assert_eq!(one, uuid("m", "a"));
        assert!(one != uuid("m", "b") && one != uuid("n", "a") && uuid("ma", "") != uuid("m", "a"));
        assert_eq!((one.len(), &one[14..15]), (36, "8"));
        assert!(["8", "9", "a", "b"].contains(&&one[19..20]), "{one}");
    }
}
