//! Answers for how little a ublk server takes: `miniublk null SIZE`, `miniublk file PATH`.
//!
//! It makes the disk, prints its node, and removes it when its standard input ends:
//!
//!     # miniublk file /srv/a.img < /dev/tty
//!
//! The layer below is all there is to a driver of one's own: it says where data goes.

use std::io::Read;
use std::sync::Arc;

use devsplice_core::prelude::*;
use devsplice_core::size::parse_size;
use devsplice_core::{BackendId, StackBuilder};
use devsplice_exports::threads::{Bottom, Service};
use devsplice_exports::ublk::{Device, Options, Recovery};
use devsplice_uring::FileKind;

/// Swaps the halves of a device: a layer that no user needs and every author understands.
struct Swap {
    half: u64,
}

impl Layer for Swap {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        let limits = below.only()?;
        self.half = limits.size / 2;
        limits.aligned("half of the device", self.half)?;
        Ok(limits)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        if at < self.half {
            // What is behind the middle is asked for again.
            return Ok(Map::To { len: len.min(self.half - at), port: Port(0), at: at + self.half });
        }
        Ok(Map::To { len, port: Port(0), at: at - self.half })
    }
}

/// Reads as zeros, drops what is written.
struct Null {
    size: u64,
}

impl Layer for Null {
    fn open(&mut self, _: &mut dyn Lower) -> Result<Limits> {
        Ok(Limits::ideal(self.size))
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        Ok(Map::Zero { len: io.extent.len })
    }
}

fn usage() -> Error {
    Error::invalid("usage", "miniublk null SIZE | miniublk file PATH | miniublk swap PATH")
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [kind, what] = &words[..] else { return Err(usage()) };
    let mut builder = StackBuilder::new();
    let mut bottoms = Vec::new();
    // Neither layer keeps metadata below, so there is nothing to read while the stack is built.
    let mut no_reader = |_: BackendId, _: u64, _: &mut [u8]| Err(Errno::EIO);
    let top = match kind.as_str() {
        "null" => {
            let size = parse_size(what).map_err(|reason| Error::invalid("SIZE", reason))?;
            builder.layer("null", Box::new(Null { size }), &[], &mut no_reader)?
        }
        "file" | "swap" => {
            let os = |error: std::io::Error| Error::os(what.as_str(), &error);
            let file = std::fs::File::options().read(true).write(true).open(what).map_err(os)?;
            let size = file.metadata().map_err(os)?.len();
            // Through the page cache, for brevity: so what is written must be flushed to last.
            let limits = Limits { volatile_cache: true, ..Limits::ideal(size) };
            bottoms.push(Bottom::File { fd: file.into(), kind: FileKind::Regular });
            let (file, _) = builder.backend(what, limits)?;
            match kind.as_str() {
                "swap" => {
                    builder.layer("swap", Box::new(Swap { half: 0 }), &[file], &mut no_reader)?
                }
                _ => file,
            }
        }
        _ => return Err(usage()),
    };
    let options = Options {
        id: None,
        queues: 1,
        threads: 1,
        depth: 64,
        read_only: false,
        data_path: None,
        batch: None,
        part_scan: false,
        affinity: true,
        stuck_seconds: 30,
        recovery: Some(Recovery::Off),
    };
    let stack = Arc::new(builder.finish(top));
    let on_stuck = Arc::new(|stuck: &devsplice_engine::Stuck| eprintln!("miniublk: {stuck:?}"));
    let on_death = |error| {
        eprintln!("miniublk: {error}");
        std::process::exit(1);
    };
    let service =
        Service { stack, bottoms, pool: None, on_stuck, on_event: Arc::new(|_| {}), on_death };
    let device = Device::attach(&options, service, &mut |_| {})?;
    println!("{}", device.path());
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    let counts = device.detach()?;
    println!("{} requests, {} bytes copied", counts.requests, counts.bytes_copied);
    Ok(())
}
