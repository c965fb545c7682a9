//! Answers for a disk that is to go on with another stack which cannot be had whole: nobody has
//! been served by what there was of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use devsplice_core::{Limits, StackBuilder};
use devsplice_uring::FileKind;

use super::*;
use crate::fuse;
use crate::threads::Bottom;

const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const O_DIRECT: i32 = 0o40000;

/// What a half of a crew has to serve what waits.
const TIME: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

struct Files(PathBuf);

impl Files {
    fn new() -> Files {
        let path = std::env::temp_dir().join(format!("devsplice-keep-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Files(path)
    }

    fn make(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        path
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn service(path: &Path) -> Service {
    let mut builder = StackBuilder::new();
    let (root, _) = builder.backend("file", Limits::ideal(SIZE)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    Service {
        stack: Arc::new(builder.finish(root)),
        bottoms: vec![Bottom::File { fd: file.into(), kind: FileKind::Regular }],
        pool: None,
        on_stuck: Arc::new(|stuck| println!("stuck: {stuck:?}")),
        on_event: Arc::new(|text| println!("event: {text}")),
        on_death: |error| panic!("an I/O thread died: {error}"),
    }
}

fn options(lock: File) -> Options {
    Options {
        name: format!("keep-{}", std::process::id()),
        data_path: Some(DataPath::Copy),
        queues: 2,
        threads: 2,
        depth: 16,
        read_only: false,
        part_scan: false,
        stuck_seconds: 20,
        keep: Some(Arc::new(lock.into())),
        must_keep: true,
    }
}

/// Writes block after block, each with its number; counts those that were acknowledged.
fn writer(path: &str, acknowledged: &Arc<AtomicU64>) -> JoinHandle<()> {
    let acknowledged = Arc::clone(acknowledged);
    let disk = OpenOptions::new().write(true).custom_flags(O_DIRECT).open(path).unwrap();
    std::thread::spawn(move || {
        let mut memory = vec![0_u8; 8192];
        let begin = memory.as_ptr().align_offset(4096);
        for number in 0..SIZE / BLOCK {
            let block = &mut memory[begin..begin + 4096];
            block.fill(1 + number.to_le_bytes()[0] / 2);
            disk.write_all_at(block, number * BLOCK).unwrap();
            acknowledged.fetch_add(1, Ordering::SeqCst);
        }
    })
}

/// The first queue is had, the second, some time later, is not.
fn fails_half_way(make: Box<MakeQueue>) -> Box<MakeQueue> {
    Box::new(move |queue, ring| {
        if queue == 0 {
            return make(queue, ring);
        }
        std::thread::sleep(TIME);
        Err(Error::new(ErrorKind::Os, "the second ring", "too many open files"))
    })
}

#[test]
fn a_resume_that_fails_half_way_has_acknowledged_nothing() {
    if let Err(error) = fuse::available() {
        return println!("skipped: {error}");
    }
    let files = Files::new();
    let (old, new) = (files.make("old"), files.make("new"));
    let options = options(File::create(files.0.join("lock")).unwrap());
    let device = match Device::attach(&options, service(&old), &mut |_| {}) {
        Ok(device) => device,
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            return println!("skipped: {error}");
        }
        Err(error) => panic!("{error}"),
    };
    let path = device.path().to_owned();
    let suspended = device.suspend(&mut |_| {}).map_err(|(_, error)| error);
    let mut suspended = suspended.unwrap();
    let acknowledged = Arc::new(AtomicU64::new(0));
    let writer = writer(&path, &acknowledged);
    let failed = suspended.serve(service(&new), fails_half_way);
    assert!(failed.is_err());
    // What a thread has in its hands that nobody waited for would come to its end now.
    std::thread::sleep(TIME);
    assert_eq!(acknowledged.load(Ordering::SeqCst), 0, "writes that nobody serves are lost");
    let resumed = suspended.resume(service(&old)).map_err(|(_, error)| error);
    let device = resumed.unwrap();
    let end = Instant::now() + LONG;
    while !writer.is_finished() {
        assert!(Instant::now() < end, "{} blocks", acknowledged.load(Ordering::SeqCst));
        std::thread::sleep(Duration::from_millis(10));
    }
    writer.join().unwrap();
    let (has, lacks) = (std::fs::read(&old).unwrap(), std::fs::read(&new).unwrap());
    assert!(has.iter().all(|byte| *byte != 0), "something is not where the disk is");
    assert!(lacks.iter().all(|byte| *byte == 0), "something is where the disk never was");
    device.detach(false).unwrap();
}
