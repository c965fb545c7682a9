//! Answers for changes that are under way below when their connection ends: a client asks for them
//! again over the next one, and what it is answered there is not taken back.

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use devsplice_core::Limits;
use devsplice_nbd::Mode;
use devsplice_nbd::wire::{command, error};
use devsplice_uring::Bytes;

use crate::peer::{Host, Peer, SIZE, pattern};

const PATIENCE: Duration = Duration::from_secs(20);
/// How long what may not happen is waited for.
const MOMENT: Duration = Duration::from_millis(300);

/// A disk whose first change waits until a test lets it go on.
struct Slow {
    bytes: Mutex<Vec<u8>>,
    /// Changes that have begun, and whether the first may go on.
    begun: Mutex<(u32, bool)>,
    changed: Condvar,
}

impl Slow {
    fn new() -> Arc<Slow> {
        let bytes = Mutex::new(vec![0; 1 << 20]);
        Arc::new(Slow { bytes, begun: Mutex::default(), changed: Condvar::new() })
    }

    fn wait(&self, is_so: impl Fn(&(u32, bool)) -> bool) {
        let begun = self.begun.lock().unwrap();
        let wait = self.changed.wait_timeout_while(begun, PATIENCE, |begun| !is_so(begun));
        assert!(!wait.unwrap().1.timed_out());
    }

    /// Waits until the first has begun.
    fn wait_for_first(&self) {
        self.wait(|(count, _)| *count > 0);
    }

    fn go_on(&self) {
        self.begun.lock().unwrap().1 = true;
        self.changed.notify_all();
    }

    fn begin(&self) {
        let mut begun = self.begun.lock().unwrap();
        begun.0 += 1;
        let is_first = begun.0 == 1;
        drop(begun);
        self.changed.notify_all();
        if is_first {
            self.wait(|(_, may)| *may);
        }
    }
}

impl Bytes for Slow {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let at = at as usize;
        into.copy_from_slice(&self.bytes.lock().unwrap()[at..at + into.len()]);
        Ok(())
    }

    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.begin();
        let at = at as usize;
        self.bytes.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(at, len)
    }

    fn limits(&self) -> Limits {
        Limits::ideal(SIZE)
    }
}

fn host(name: &str, slow: &Arc<Slow>, depth: u16) -> Host {
    let bytes: Arc<dyn Bytes> = slow.clone();
    Host::new(name, |wishes| {
        (wishes.bytes, wishes.depth) = (Some(bytes), depth);
        wishes.listen.push("nbd://127.0.0.1:0".to_owned());
        wishes.writable = true;
    })
}

/// Writes one after the other; what it was answered.
fn writes(mut peer: Peer, at: u64, all: Vec<Vec<u8>>) -> (JoinHandle<Peer>, Receiver<u32>) {
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        for data in all {
            sender.send(peer.write(at, &data, 0)).unwrap();
        }
        peer
    });
    (thread, receiver)
}

#[test]
fn a_change_of_a_connection_that_has_ended_takes_back_nothing_that_was_answered_over_another() {
    for change in [command::WRITE, command::WRITE_ZEROES, command::TRIM] {
        for is_there_before in [false, true] {
            takes_back_nothing(change, is_there_before);
        }
    }
}

fn takes_back_nothing(change: u16, is_there_before: bool) {
    let slow = Slow::new();
    let mut host = host("stale", &slow, 8);
    let [first, second, third] = [1, 2, 3].map(|seed| pattern(4096, seed));
    let mut old = host.peer(Mode::Structured);
    let mut next = is_there_before.then(|| host.peer(Mode::Structured));
    let mut bytes = old.request(change, 0, (8192, 4096));
    if change == command::WRITE {
        bytes.extend(&first);
    }
    old.send(&bytes);
    slow.wait_for_first();
    old.cut();
    if is_there_before {
        // It has heard by then: what it holds below is all that it is here for.
        std::thread::sleep(MOMENT);
    }
    let mut next = next.take().unwrap_or_else(|| host.peer(Mode::Structured));
    assert_eq!(next.write(0, &third, 0), 0, "the rest of the disk is there for everybody");
    let (thread, answers) = writes(next, 8192, vec![first, second.clone()]);
    let mut other = host.peer(Mode::Extended);
    assert!(answers.recv_timeout(MOMENT).is_err(), "answered beside what is under way");
    assert_eq!(other.read(0, 4096).as_ref(), Ok(&third));
    assert_eq!(other.read(8192, 4096), Ok(vec![0; 4096]));
    assert_eq!(other.write(8192 - 512, &third[..512], 0), 0, "the neighbour");
    assert_eq!(other.plain(command::FLUSH, 0, (0, 0)), 0);
    slow.go_on();
    for _ in 0..2 {
        assert_eq!(answers.recv_timeout(PATIENCE), Ok(0));
    }
    let next = thread.join().unwrap();
    host.wait_until(2);
    assert!(other.read(8192, 4096).as_ref() == Ok(&second), "an old change came last");
    assert!(other.read(8192 - 512, 512).as_deref() == Ok(&third[..512]));
    drop(next);
    host.end();
}

/// It asks for no more than it has room for, so it has not heard of the end that is behind that.
#[test]
fn requests_that_nobody_has_received_do_not_begin_when_their_connection_has_ended() {
    for by_tcp in [false, true] {
        let slow = Slow::new();
        let mut host = host("unread", &slow, 1);
        let peer = || if by_tcp { host.peer_by_tcp() } else { host.peer(Mode::Structured) };
        let [first, second] = [1, 2].map(|seed| pattern(4096, seed));
        let mut old = peer();
        // Few enough to be there before the end is: what is not, nobody knows of.
        for _ in 0..6 {
            let mut bytes = old.request(command::WRITE, 0, (8192, 4096));
            bytes.extend(&first);
            old.send(&bytes);
        }
        slow.wait_for_first();
        old.cut();
        let (thread, answers) = writes(peer(), 8192, vec![first, second.clone()]);
        assert!(answers.recv_timeout(MOMENT).is_err(), "answered beside what is under way");
        slow.go_on();
        for _ in 0..2 {
            assert_eq!(answers.recv_timeout(PATIENCE), Ok(0));
        }
        let mut next = thread.join().unwrap();
        host.wait_until(1);
        assert!(next.read(8192, 4096).as_ref() == Ok(&second), "an old change came last");
        drop(next);
        host.end();
    }
}

#[test]
fn who_waits_and_goes_leaves_nothing_behind() {
    let slow = Slow::new();
    let mut host = host("left", &slow, 4);
    let mut old = host.peer(Mode::Structured);
    let [first, second] = [1, 2].map(|seed| pattern(4096, seed));
    let ask = |peer: &mut Peer, data: &[u8]| {
        let mut bytes = peer.request(command::WRITE, 0, (0, 4096));
        bytes.extend(data);
        peer.send(&bytes);
    };
    ask(&mut old, &first);
    slow.wait_for_first();
    old.cut();
    // More often than there are places.
    for _ in 0..20 {
        let mut peer = host.peer(Mode::Structured);
        for _ in 0..8 {
            ask(&mut peer, &second);
        }
        std::thread::sleep(Duration::from_millis(10));
        peer.cut();
    }
    host.wait_until(1);
    let mut waits = host.peer(Mode::Structured);
    ask(&mut waits, &second);
    let slowly = slow.clone();
    let going_on = std::thread::spawn(move || {
        std::thread::sleep(MOMENT);
        slowly.go_on();
    });
    // Who waits still is cut off; what is below comes back.
    host.end();
    going_on.join().unwrap();
    assert!(slow.bytes.lock().unwrap()[..4096] == first);
}

/// Who takes its leave has nothing begun that has not begun yet: it may ask for it over another.
#[test]
fn what_waits_is_not_begun_behind_a_goodbye() {
    let slow = Slow::new();
    let mut host = host("goodbye", &slow, 8);
    let [first, second, third] =
        [(4096, 1), (8192, 2), (4096, 3)].map(|(len, seed)| pattern(len, seed));
    let mut old = host.peer(Mode::Structured);
    let mut bytes = old.request(command::WRITE, 0, (8192, 4096));
    bytes.extend(&first);
    old.send(&bytes);
    slow.wait_for_first();
    old.cut();
    std::thread::sleep(MOMENT);
    let mut polite = host.peer(Mode::Structured);
    let mut bytes = polite.request(command::WRITE, 0, (8192, 8192));
    let cookie = polite.last_cookie();
    bytes.extend(&second);
    bytes.extend(polite.request(command::DISCONNECT, 0, (0, 0)));
    polite.send(&bytes);
    let (answered, answer) = polite.reply();
    assert_eq!((answered, answer.error), (cookie, error::ESHUTDOWN));
    let mut next = host.peer(Mode::Structured);
    // Behind what is under way, where the one that waited would have been, too.
    assert_eq!(next.write(12288, &third, 0), 0);
    slow.go_on();
    std::thread::sleep(MOMENT);
    assert!(next.read(12288, 4096).as_ref() == Ok(&third), "an old change came last");
    assert!(next.read(8192, 4096).as_ref() == Ok(&first));
    drop((polite, next));
    host.end();
}
