//! Answers for one partition of a device: `partition(disk, number=2)`, by GPT or MBR.
//!
//! The table is read once, when the stack is built, and never written. What a table says is
//! believed only as far as it fits the device; a partition that does not fit is not offered.
//!
//! Block numbers in a table count sectors of the disk that it was made for. The blocks of a file
//! may be larger than those, so sectors are found out (`sector`), or have to be said.

mod gpt;
mod mbr;
mod sector;

use devsplice_core::prelude::*;

/// As users name it.
pub const DRIVER: Driver = Driver {
    name: "partition",
    about: "one partition of a device, by GPT or MBR",
    below: Arity::One,
    keys: &[
        Key::optional("number", Kind::Count, "which partition, from 1 on"),
        Key::optional("label", Kind::Text, "the partition's GPT name, instead of number"),
        Key::optional("uuid", Kind::Text, "the partition's PARTUUID, instead of number"),
        Key::optional("sector", Kind::Size, "bytes that the table counts in, 512 or 4096"),
    ],
    make: |args| {
        let number = args.count("number")?;
        let (label, uuid) = (args.text("label"), args.text("uuid"));
        let which = match (number, label, uuid) {
            (Some(number), None, None) => Which::Number(number),
            (None, Some(label), None) => Which::Label(label.to_owned()),
            (None, None, Some(uuid)) => Which::Uuid(uuid.to_ascii_lowercase()),
            _ => {
                let error = Error::invalid("partition", "needs one of number, label and uuid");
                return Err(error.next("try number=1"));
            }
        };
        let sector = sector::asked(args.size("sector")?)?;
        Ok(Box::new(Partition { which, sector, at: 0 }))
    },
};

/// How the partition was asked for.
enum Which {
    Number(u64),
    Label(String),
    Uuid(String),
}

/// A partition as its table describes it, inside the device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    number: u64,
    /// First byte.
    at: u64,
    /// Bytes.
    len: u64,
    /// Empty in an MBR.
    label: String,
    uuid: String,
}

impl Part {
    /// From numbers of sectors, which are `disk.block`, if all of it lies inside the device.
    fn new(disk: &Limits, number: u64, first: u64, count: u64) -> Option<Part> {
        let block = u64::from(disk.block);
        let (at, len) = (first.checked_mul(block)?, count.checked_mul(block)?);
        let inside = len > 0 && Extent { at, len }.within(disk.size);
        let (label, uuid) = (String::new(), String::new());
        inside.then_some(Part { number, at, len, label, uuid })
    }
}

struct Partition {
    which: Which,
    sector: Option<u32>,
    at: u64,
}

impl Layer for Partition {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let disk = below.only()?;
        let parts = sector::read_parts(below, &disk, self.sector)?;
        let part = self.which.pick(&parts)?;
        self.at = part.at;
        let block = u64::from(disk.block);
        if part.at % block != 0 || part.len % block != 0 {
            let (at, len) = (part.at, part.len);
            let reason = format!("{len} bytes at {at} are off the {block}-byte blocks below");
            return Err(Error::invalid(format!("partition {}", part.number), reason)
                .next("for a file, direct=off has blocks of 512"));
        }
        disk.window(part.at, Some(part.len))
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        Ok(Map::To { len: io.extent.len, port: Port(0), at: self.at + io.extent.at })
    }
}

impl Which {
    fn pick<'p>(&self, parts: &'p [Part]) -> Result<&'p Part> {
        let (what, fits): (_, Vec<&Part>) = match self {
            Which::Number(number) => {
                let fits = parts.iter().filter(|part| part.number == *number);
                (format!("number {number}"), fits.collect())
            }
            Which::Label(label) => {
                let fits = parts.iter().filter(|part| part.label == *label);
                (format!("label {label}"), fits.collect())
            }
            Which::Uuid(uuid) => {
                let fits = parts.iter().filter(|part| part.uuid == *uuid);
                (format!("uuid {uuid}"), fits.collect())
            }
        };
        match fits[..] {
            [part] => Ok(part),
            [] => Err(Error::new(ErrorKind::NotFound, what, "no such partition").next(list(parts))),
            _ => {
                let error = Error::invalid(what, format!("{} partitions have it", fits.len()));
                Err(error.next(format!("take number=; {}", list(parts))))
            }
        }
    }
}

/// The partitions that exist, for messages.
fn list(parts: &[Part]) -> String {
    if parts.is_empty() {
        return "the table is empty".to_owned();
    }
    let show = |part: &Part| {
        let size = devsplice_core::size::show_size(part.len);
        let label = if part.label.is_empty() { "" } else { &format!(" {:?}", part.label) };
        format!("{}{label} ({size}, {})", part.number, part.uuid)
    };
    let shown: Vec<_> = parts.iter().take(16).map(show).collect();
    let more = if parts.len() > shown.len() { ", ..." } else { "" };
    format!("there are: {}{more}", shown.join(", "))
}

/// Reads metadata at any place, with a message that says where.
fn read(below: &mut dyn Lower, at: u64, into: &mut [u8]) -> Result<()> {
    let block = u64::from(below.only()?.block);
    let over = at % block;
    let len = (over + into.len() as u64).next_multiple_of(block);
    let failed =
        |errno| Error::new(ErrorKind::Os, "partition table", format!("read at byte {at}: {errno}"));
    if over == 0 && len == into.len() as u64 {
        return below.read(Port(0), at, into).map_err(failed);
    }
    // At most two blocks more than what is wanted, which is bounded.
    let mut around = vec![0; len as usize];
    below.read(Port(0), at - over, &mut around).map_err(failed)?;
    into.copy_from_slice(&around[over as usize..][..into.len()]);
    Ok(())
}

/// A little-endian number of `bytes`; 0 where they end before it does.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let field: &[u8] = bytes.get(at..at + N).unwrap_or(&[]);
    field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{disk, open, open_over, refusal};
    use proptest::prelude::*;

    #[test]
    fn exactly_one_way_to_name_the_partition_is_needed() {
        for keys in ["", "number=1 label=x", "label=x uuid=y"] {
            let text = refusal(&DRIVER, keys, &[disk(1 << 20)]);
            assert!(text.contains("needs one of number, label and uuid"), "{text}");
        }
        let text = refusal(&DRIVER, "number=1", &[disk(1 << 20)]);
        assert!(text.contains("no partition table"), "{text}");
    }

    #[test]
    fn a_name_that_two_partitions_share_is_refused() {
        let part = |number| Part { number, at: 0, len: 512, label: "x".into(), uuid: "u".into() };
        let parts = [part(1), part(7)];
        let text = Which::Label("x".into()).pick(&parts).unwrap_err().to_string();
        let want = "label x: 2 partitions have it; take number=; there are: 1 \"x\" (512, u), 7";
        assert!(text.starts_with(want), "{text}");
        assert_eq!(Which::Number(7).pick(&parts).unwrap(), &parts[1]);
        assert!(Which::Uuid("v".into()).pick(&parts).is_err());
    }

    #[test]
    fn a_device_that_cannot_be_read_is_an_error() {
        struct Bad([Limits; 1]);
        impl Lower for Bad {
            fn limits(&self) -> &[Limits] {
                &self.0
            }
            fn read(&mut self, _: Port, _: u64, _: &mut [u8]) -> Result<(), Errno> {
                Err(Errno::EIO)
            }
        }
        let mut layer = Partition { which: Which::Number(1), sector: None, at: 0 };
        let error = layer.open(&mut Bad([disk(1 << 20)])).unwrap_err();
        assert_eq!(error.to_string(), "partition table: read at byte 0: EIO");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_table_or_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 2048),
            kind in 0..8_u8,
            blocks in 1..64_u64,
        ) {
            // Most random blocks fail the first check; help some of them past it.
            bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
            for slot in 0..4 {
                bytes[446 + 16 * slot] &= 0x80;
                bytes[450 + 16 * slot] = [0xee, 0x05, 0x83, 0][usize::from(kind) % 4];
                bytes[454 + 16 * slot..][..8].copy_from_slice(&[slot as u8, 0, 0, 0, 2, 0, 0, 0]);
            }
            bytes[512..520].copy_from_slice(b"EFI PART");
            for number in 1..9 {
                let keys = format!("number={number}");
                let _ = open_over(&DRIVER, &keys, &[disk(blocks * 512)], &bytes);
            }
            let _ = open(&DRIVER, "label=x", &[disk(blocks * 512)]);
        }
    }
}
