//! Answers for the promise that nothing is allocated between fetch and finish, on the real ring and
//! the real front ends: the allocator of this whole process is counted while requests flow.

#![allow(clippy::unwrap_used)] // All of this is a test.

use std::alloc::System;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Barrier, RwLock};
use std::thread;

use devsplice_core::{Args, Errno, Limits, Stack, StackBuilder};
use devsplice_exports::threads::{Bottom, Crew, Service};
use devsplice_exports::{fuse, nbd, ublk};
use devsplice_nbd::client::{Handshake, Outcome, Wish};
use devsplice_nbd::wire::command;
use devsplice_nbd::{Mode as Replies, Request};
use devsplice_uring::{Bytes, FileKind};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const SIZE: u64 = 64 << 20;
const THREADS: u64 = 4;
const ROUNDS: u64 = 2000;
/// How often it is looked. The whole process is counted: another thread than those of the data path
/// may do something once, as the one that greets NBD's clients does. What allocates for requests
/// does so in each.
const WINDOWS: usize = 3;
/// A leg of bytes: helper threads copy from and to it.
struct Leg(RwLock<Vec<u8>>);

impl Bytes for Leg {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.copy_from_slice(&self.0.read().unwrap()[at as usize..][..into.len()]);
        Ok(())
    }

    fn write_at(&self, at: u64, from: &[u8]) -> std::io::Result<()> {
        self.0.write().unwrap()[at as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
}

/// linear over linear over a stripe of two memory files: three layers. One of them may be bytes.
fn stack(with_bytes: bool) -> (Arc<Stack>, Vec<Bottom>) {
    let mut builder = StackBuilder::new();
    let mut none = |_, _: u64, _: &mut [u8]| Err(Errno::EIO);
    let mut layer =
        |builder: &mut StackBuilder, name: &str, given: &[(&str, &str)], ports: &[_]| {
            let driver = devsplice_layers::find(name).unwrap();
            let given: Vec<_> = given.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            let args = Args::new(name, driver.keys, &given).unwrap();
            builder.layer(name, (driver.make)(&args).unwrap(), ports, &mut none).unwrap()
        };
    let mut bottoms = Vec::new();
    let mut legs = Vec::new();
    for leg in 0..2 {
        if with_bytes && leg == 1 {
            let bytes = vec![0; usize::try_from(SIZE).unwrap()];
            bottoms.push(Bottom::Bytes(Arc::new(Leg(RwLock::new(bytes)))));
            legs.push(builder.backend("leg", Limits::ideal(SIZE)).unwrap().0);
            continue;
        }
        let fd = rustix::fs::memfd_create("leg", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, SIZE).unwrap();
        bottoms.push(Bottom::File { fd, kind: FileKind::Regular });
        legs.push(builder.backend("leg", Limits::ideal(SIZE)).unwrap().0);
    }
    let stripe = layer(&mut builder, "stripe", &[("chunk", "4k")], &legs);
    let lower = layer(&mut builder, "linear", &[("offset", "1M")], &[stripe]);
    let upper = layer(&mut builder, "linear", &[("offset", "1M")], &[lower]);
    (Arc::new(builder.finish(upper)), bottoms)
}

fn service(with_bytes: bool) -> Service {
    let (stack, bottoms) = stack(with_bytes);
    let on_death = |error| panic!("{error}");
    Service {
        stack,
        bottoms,
        pool: None,
        on_stuck: Arc::new(|_| {}),
        on_event: Arc::new(|_| {}),
        on_death,
    }
}

/// Reads and writes with several threads; checks that nothing is allocated once all has been used.
fn flow(path: &str, crew: &Crew) {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let node = path.to_owned();
    flow_of(path, crew, move |index, barrier| {
        client(&rustix::fs::open(&node, flags, Mode::empty()).unwrap(), index, barrier);
    });
}

/// As `flow`, for clients of any kind, which wait at the barrier when they are warm, before and
/// after what is looked at.
fn flow_of(path: &str, crew: &Crew, client: impl Fn(u64, &Barrier) + Clone + Send + 'static) {
    let barrier = Arc::new(Barrier::new(usize::try_from(THREADS).unwrap() + 1));
    let threads: Vec<_> = (0..THREADS)
        .map(|index| {
            let (barrier, client) = (Arc::clone(&barrier), client.clone());
            thread::spawn(move || client(index, &barrier))
        })
        .collect();
    barrier.wait(); // warm
    let before = crew.counts();
    let mut changes = Vec::with_capacity(WINDOWS);
    for _ in 0..WINDOWS {
        let region = Region::new(ALLOCATOR);
        barrier.wait(); // go
        barrier.wait(); // done
        let change = region.change();
        changes.push((change.allocations, change.reallocations));
    }
    let after = crew.counts();
    assert!(changes.contains(&(0, 0)), "{path}: {changes:?}");
    assert!(after.requests - before.requests >= THREADS * ROUNDS, "{path}: {after:?}");
    assert!(after.pieces - before.pieces > after.requests - before.requests, "pieces are split");
    for thread in threads {
        thread.join().unwrap();
    }
}

fn client(disk: &OwnedFd, index: u64, barrier: &Barrier) {
    let mut room = vec![0_u8; 16384 + 4096];
    let start = room.as_ptr().align_offset(4096);
    let bytes = &mut room[start..start + 16384];
    let mut pass = |rounds: u64| {
        for round in 0..rounds {
            // 4 to 16 KiB over 4 KiB chunks: one to four pieces.
            let len = usize::try_from(4096 * (1 + round % 4)).unwrap();
            let at = index * (8 << 20) + (round * 16384) % (8 << 20);
            if round % 2 == 0 {
                assert_eq!(rustix::io::pwrite(disk, &bytes[..len], at), Ok(len));
            } else {
                assert_eq!(rustix::io::pread(disk, &mut bytes[..len], at), Ok(len));
            }
        }
    };
    pass(200);
    barrier.wait(); // warm
    for _ in 0..WINDOWS {
        barrier.wait(); // go
        pass(ROUNDS);
        barrier.wait(); // done
    }
}

/// A client of NBD: several requests at a time, of which each has its answer before the next.
fn nbd_client(path: &str, index: u64, barrier: &Barrier) {
    const AT_ONCE: u64 = 8;
    let mut socket = UnixStream::connect(path).unwrap();
    let wish = Wish { name: String::new(), mode: Replies::Simple, allocation: false, tls: false };
    let mut handshake = Handshake::new(wish);
    while *handshake.outcome() == Outcome::Open {
        socket.write_all(handshake.output()).unwrap();
        handshake.sent(handshake.output().len());
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        handshake.receive(&byte).unwrap();
    }
    let mut bytes = vec![0_u8; 28 + 16384];
    let mut pass = |rounds: u64| {
        for round in 0..rounds / AT_ONCE {
            let is_write = round % 2 == 0;
            let len = usize::try_from(4096 * (1 + round % 4)).unwrap();
            for cookie in 0..AT_ONCE {
                let command = if is_write { command::WRITE } else { command::READ };
                let offset = index * (8 << 20) + (cookie * 16384 + round * 512) % (4 << 20);
                let length = len as u64;
                let request = Request { flags: 0, command, cookie, offset, length };
                bytes[..28].copy_from_slice(request.head(Replies::Simple).bytes());
                let sent = if is_write { 28 + len } else { 28 };
                socket.write_all(&bytes[..sent]).unwrap();
            }
            for _ in 0..AT_ONCE {
                let count = if is_write { 16 } else { 16 + len };
                socket.read_exact(&mut bytes[..count]).unwrap();
                assert_eq!(bytes[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
            }
        }
    };
    pass(2000);
    barrier.wait(); // warm
    for _ in 0..WINDOWS {
        barrier.wait(); // go
        pass(ROUNDS);
        barrier.wait(); // done
    }
}

fn on_nbd(with_bytes: bool) {
    let socket = std::env::temp_dir().join(format!("no-allocation-{}", std::process::id()));
    let options = nbd::Options {
        name: "disk".to_owned(),
        listen: vec![nbd::Uri::parse(&format!("unix:{}", socket.display())).unwrap()],
        passed: Vec::new(),
        allow: Vec::new(),
        writable: false,
        read_only: false,
        connections: 4,
        threads: 2,
        depth: 32,
        stuck_seconds: 30,
        secure: None,
    };
    let device = nbd::Device::attach(&options, service(with_bytes)).unwrap();
    let path = socket.display().to_string();
    flow_of("nbd", device.crew(), move |index, barrier| nbd_client(&path, index, barrier));
    device.detach().unwrap();
}

fn on_fuse(with_bytes: bool, path: Option<fuse::DataPath>) -> bool {
    if let Err(error) = fuse::available() {
        println!("left out: {error}");
        return false;
    }
    let options = fuse::Options {
        name: "no-allocation".to_owned(),
        data_path: path,
        queues: 2,
        threads: 2,
        depth: 32,
        read_only: false,
        part_scan: false,
        stuck_seconds: 30,
        keep: None,
        must_keep: false,
    };
    let device = fuse::Device::attach(&options, service(with_bytes), &mut |_| {}).unwrap();
    flow(device.path(), device.crew());
    device.detach(true).unwrap();
    true
}

fn on_ublk() -> bool {
    let control = match ublk::Control::open() {
        Ok(control) => control,
        Err(error) => {
            println!("left out: {error}");
            return false;
        }
    };
    let offered = ublk::DataPath::offered(control.features());
    let with = |bytes| offered.iter().map(move |path| (*path, bytes));
    // Bytes need a path that copies.
    let paths: Vec<_> =
        with(false).chain(with(true).filter(|(path, _)| path.copies() > 0)).collect();
    let has_batches = ublk::feature_names(control.features()).contains(&("batch-io", true));
    // In batches each queue has a thread, or threads share it.
    let ways = [(false, 2), (true, 2), (true, 3)];
    let ways = ways.into_iter().filter(|(batch, _)| has_batches || !batch);
    for ((path, with_bytes), (batch, threads)) in
        ways.flat_map(|way| paths.iter().map(move |path| (*path, way)))
    {
        let options = ublk::Options {
            id: None,
            queues: 2,
            threads,
            depth: 32,
            read_only: false,
            data_path: Some(path),
            batch: Some(batch),
            part_scan: false,
            affinity: true,
            stuck_seconds: 30,
            recovery: Some(ublk::Recovery::Off),
        };
        let device = ublk::Device::attach(&options, service(with_bytes), &mut |_| {}).unwrap();
        flow(device.path(), device.crew());
        device.detach().unwrap();
    }
    true
}

// One test: the allocator is counted for the whole process, so nothing may run beside it.
#[test]
fn nothing_is_allocated_while_requests_flow() {
    on_nbd(false);
    on_nbd(true);
    let ran = (on_ublk(), on_fuse(false, Some(fuse::DataPath::Copy)) && on_fuse(true, None));
    // Those by io_uring where somebody has switched them on.
    for path in fuse::offered() {
        println!("{path:?}");
        assert!(on_fuse(false, Some(path)));
    }
    println!("ublk: {}, fuse: {}", ran.0, ran.1);
}
