//! Answers for what the layers' tests share: a layer opened over made-up devices, its answers.

use devsplice_core::prelude::*;

/// Devices that read as `bytes`, the same for each of them, and as zeros behind those.
struct Made<'a> {
    limits: &'a [Limits],
    bytes: &'a [u8],
}

impl Lower for Made<'_> {
    fn limits(&self) -> &[Limits] {
        self.limits
    }

    fn read(&mut self, port: Port, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let limits = self.limits.get(usize::from(port.0)).ok_or(Errno::EINVAL)?;
        let extent = Extent { at, len: into.len() as u64 };
        let block = u64::from(limits.block);
        if !extent.within(limits.size)
            || !at.is_multiple_of(block)
            || !extent.len.is_multiple_of(block)
        {
            return Err(Errno::EINVAL);
        }
        let rest = self.bytes.get(usize::try_from(at).unwrap()..).unwrap_or(&[]);
        let have = rest.len().min(into.len());
        into[..have].copy_from_slice(&rest[..have]);
        into[have..].fill(0);
        Ok(())
    }
}

/// A plain disk.
pub fn disk(size: u64) -> Limits {
    Limits::ideal(size)
}

/// A disk with 4096-byte blocks.
pub fn disk_4k(size: u64) -> Limits {
    Limits { block: 4096, physical: 4096, discard: 4096, ..Limits::ideal(size) }
}

/// A layer made from `key=value` words and opened over `below`.
pub fn open(driver: &Driver, keys: &str, below: &[Limits]) -> Result<(Box<dyn Layer>, Limits)> {
    open_over(driver, keys, below, &[])
}

/// As [`open`], over devices that read as `bytes`.
pub fn open_over(
    driver: &Driver,
    keys: &str,
    below: &[Limits],
    bytes: &[u8],
) -> Result<(Box<dyn Layer>, Limits)> {
    let pairs = keys.split_whitespace().filter_map(|word| word.split_once('='));
    let given: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mut layer = (driver.make)(&Args::new(driver.name, driver.keys, &given)?)?;
    let limits = layer.open(&mut Made { limits: below, bytes }).and_then(Limits::checked)?;
    Ok((layer, limits))
}

/// The message with which a layer refuses its keys or what lies below.
pub fn refusal(driver: &Driver, keys: &str, below: &[Limits]) -> String {
    open(driver, keys, below).err().expect("it should be refused").to_string()
}

/// All answers for a request, up to the first error.
pub fn answers(layer: &dyn Layer, io: Io) -> Vec<Result<Map, Errno>> {
    let Io { mut extent, .. } = io;
    let mut all = Vec::new();
    while extent.len > 0 {
        let answer = layer.map(Io { extent, ..io });
        all.push(answer);
        let Ok(answer) = answer else { break };
        assert!((1..=extent.len).contains(&answer.len()), "{answer:?} for {extent:?}");
        extent = Extent { at: extent.at + answer.len(), len: extent.len - answer.len() };
    }
    all
}

/// The answer `To`.
pub fn to(port: u16, at: u64, len: u64) -> Result<Map, Errno> {
    Ok(Map::To { len, port: Port(port), at })
}
