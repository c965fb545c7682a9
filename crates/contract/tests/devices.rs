//! Answers for the contract from outside: files, loop devices, and the FUSE front end on this
//! machine; and that a front end which serves wrong bytes is caught.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use common::{Trials, caught};
use devsplice_contract::device::{self, Subject};
use devsplice_contract::{Outcome, Verdict};
use devsplice_core::StackBuilder;
use devsplice_core::prelude::*;
use devsplice_engine::Stuck;
use devsplice_exports::fuse::{self, Device, Options};
use devsplice_exports::threads::{Bottom, Service};
use devsplice_uring::FileKind;

const SIZE: u64 = 4 << 20;

/// A file that goes with the test.
struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Temp {
        let name = format!("devsplice-outside-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        Temp(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Passes everything on, but one sector of long writes goes to its neighbour.
struct Slip {
    slips: bool,
}

impl Layer for Slip {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        below.only()
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        let port = Port(0);
        Ok(match io.op {
            Op::Write if self.slips && len > 16 << 10 => Map::To { len: 4096, port, at },
            Op::Write if self.slips && len == 16 << 10 && at >= 4096 => {
                Map::To { len, port, at: at - 4096 }
            }
            _ => Map::To { len, port, at },
        })
    }
}

/// A disk over FUSE on a layer; `None` and why where that cannot be.
fn serve(name: &str, slips: bool) -> Result<(Device, Temp)> {
    fuse::available()?;
    let temp = Temp::new(name);
    let limits = Limits { volatile_cache: true, discard: 4096, ..Limits::ideal(SIZE) };
    let mut builder = StackBuilder::new();
    let (file, _) = builder.backend("file", limits)?;
    let mut no_reader = |_, _, _: &mut [u8]| Err(Errno::EIO);
    let top = builder.layer("slip", Box::new(Slip { slips }), &[file], &mut no_reader)?;
    let file = std::fs::File::options().read(true).write(true).open(&temp.0).unwrap();
    let bottoms = vec![Bottom::File { fd: file.into(), kind: FileKind::Regular }];
    let options = Options {
        name: format!("{name}-{}", std::process::id()),
        data_path: None,
        queues: 1,
        threads: 1,
        depth: 64,
        read_only: false,
        part_scan: false,
        stuck_seconds: 20,
        keep: None,
        must_keep: false,
    };
    let on_stuck = Arc::new(|stuck: &Stuck| println!("stuck: {stuck:?}"));
    let on_death = |error: Error| panic!("an I/O thread died: {error}");
    let stack = Arc::new(builder.finish(top));
    let service =
        Service { stack, bottoms, pool: None, on_stuck, on_event: Arc::new(|_| {}), on_death };
    Ok((Device::attach(&options, service, &mut |_| {})?, temp))
}

fn subject(path: &str) -> Subject {
    Subject::new(path).span(SIZE).patience(Duration::from_secs(30))
}

/// All cases over one device, then its removal in the midst of requests.
fn fuse_loop() -> Outcome {
    let (device, _temp) = match serve("contract", false) {
        Ok(served) => served,
        Err(error) => return Ok(Verdict::Skipped(error.to_string())),
    };
    let device = Arc::new(device);
    let taken = Arc::clone(&device);
    let subject = subject(device.path())
        .removed_by(move || taken.detach(true).map(drop).map_err(|error| error.to_string()));
    let report = device::suite(&subject).run();
    // Whatever became of it.
    let _ = device.detach(true);
    println!("{report}");
    if report.is_kept() { Ok(Verdict::Kept) } else { Err(report.to_string()) }
}

fn slipping_fuse_loop() -> Outcome {
    let (device, _temp) = match serve("slipping", true) {
        Ok(served) => served,
        Err(error) => return Ok(Verdict::Skipped(error.to_string())),
    };
    let found = caught(device::suite(&subject(device.path())), "reads_bring_what_was_written");
    device.detach(true).unwrap();
    found
}

fn main() -> ExitCode {
    let mut trials = Trials::default();
    let temp = Temp::new("file");
    trials.suite("file", device::suite(&subject(temp.0.to_str().unwrap())));
    trials.test("fuse_loop::everything", fuse_loop);
    trials.test("suite::a_front_end_that_slips_is_caught", slipping_fuse_loop);
    trials.run()
}
