//! Answers for the sandbox from inside: threads that try what they may not, and what they may.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;

use devsplice_core::prelude::*;
use devsplice_core::{Args, BackendId, StackBuilder};
use devsplice_exports::disk::Disk;
use devsplice_exports::fuse;

use super::*;

/// Runs `body` on a thread of its own, for good: a thread cannot be let out again.
fn apart<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(body).join().unwrap())
}

fn is_refused<T>(result: std::io::Result<T>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(1))
}

#[test]
fn an_io_thread_opens_connects_and_starts_nothing() {
    apart(|| {
        assert!(UnixDatagram::unbound().is_ok() && File::open("/dev/null").is_ok());
        let mut open = File::open("/dev/zero").unwrap();
        let (client, _other) = UnixStream::pair().unwrap();
        install(&io_filter(Place::Alone).unwrap()).unwrap();
        assert!(is_refused(File::open("/dev/null")));
        assert!(is_refused(UnixDatagram::unbound()));
        assert!(is_refused(Command::new("/bin/true").status()));
        assert!(is_refused(std::fs::remove_file("/no/such/file")));
        assert!(is_refused(
            rustix::process::test_kill_process(rustix::process::getpid()).map_err(Into::into)
        ));
        assert!(std::thread::Builder::new().spawn(|| ()).is_err());
        // It goes on with what it has.
        let mut bytes = vec![1; 1 << 20];
        open.read_exact(&mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        // A client of NBD that does not keep to the rules is sent away.
        client.shutdown(std::net::Shutdown::Both).unwrap();
        drop(open);
    });
}

#[test]
fn an_io_thread_has_no_files_by_other_ways_than_system_calls_of_its_own() {
    apart(|| {
        let how = files().unwrap();
        if how.contains("no Landlock") {
            println!("skipped: this kernel has no Landlock");
            return;
        }
        // The filter is not there; Landlock alone refuses (EACCES).
        let error = File::open("/dev/null").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(13), "{how}");
    });
}

#[test]
fn a_server_starts_no_programs_and_mounts_nothing_but_opens_files_and_has_threads() {
    apart(|| {
        let dir = std::env::temp_dir().join(format!("devsplice-box-{}", std::process::id()));
        for program in process_filters().unwrap() {
            install(&program).unwrap();
        }
        assert!(is_refused(Command::new("/bin/true").status()));
        let refused = |done: rustix::io::Result<()>| is_refused(done.map_err(Into::into));
        let none = rustix::mount::UnmountFlags::empty();
        assert!(refused(rustix::mount::unmount("/no/such", none)));
        assert!(refused(rustix::process::chroot("/")));
        assert!(refused(rustix::process::test_kill_process(rustix::process::getpid())));
        let packet = rustix::net::socket(
            rustix::net::AddressFamily::PACKET,
            rustix::net::SocketType::RAW,
            None,
        );
        assert!(is_refused(packet.map_err(Into::into)));
        File::create(&dir).unwrap().write_all(b"a").unwrap();
        assert_eq!(std::fs::read(&dir).unwrap(), b"a");
        std::fs::remove_file(&dir).unwrap();
        assert!(UnixListener::bind(&dir).is_ok());
        std::fs::remove_file(&dir).unwrap();
        assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
        let kept = devsplice_uring::thread::apart(None, |_| 8).unwrap();
        assert_eq!(kept.recv().unwrap(), 8);
    });
}

/// A layer that does what none may: it opens a file where it should only say where data goes.
struct Spy(Arc<Mutex<Vec<std::io::Result<()>>>>);

impl Layer for Spy {
    fn open(&mut self, below: &mut dyn Lower) -> devsplice_core::Result<Limits> {
        below.only()
    }

    fn map(&self, io: Io) -> std::result::Result<Map, Errno> {
        self.0.lock().unwrap().push(File::open("/etc/passwd").map(drop));
        Ok(Map::To { len: io.extent.len, port: Port(0), at: io.extent.at })
    }
}

#[test]
fn a_layer_that_opens_a_file_on_an_io_thread_is_refused_and_its_disk_goes_on() {
    if let Err(error) = fuse::available() {
        println!("skipped: {error}");
        return;
    }
    let tried = Arc::new(Mutex::new(Vec::new()));
    let mut builder = StackBuilder::new();
    let mut nothing = |_: BackendId, _: u64, _: &mut [u8]| Ok::<(), Errno>(());
    let null = devsplice_layers::find("null").unwrap();
    let size = ("size".to_owned(), "1M".to_owned());
    let words = Args::new(null.name, null.keys, &[size]).unwrap();
    let null = builder.layer("null", (null.make)(&words).unwrap(), &[], &mut nothing).unwrap();
    let spy = Box::new(Spy(Arc::clone(&tried)));
    let top = builder.layer("spy", spy, &[null], &mut nothing).unwrap();
    threads::on_settled(io_thread);
    let name = format!("box-{}", std::process::id());
    let disk = Disk::of_stack(&name, Arc::new(builder.finish(top)), Vec::new()).unwrap();
    let mut bytes = vec![1; 4096];
    let read = File::open(disk.path()).and_then(|mut node| node.read_exact(&mut bytes));
    disk.detach().unwrap();
    read.unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    let tried = tried.lock().unwrap();
    assert!(!tried.is_empty());
    let is_refused = |one: &std::io::Result<()>| {
        one.as_ref().is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    };
    assert!(tried.iter().all(is_refused), "{tried:?}");
}
