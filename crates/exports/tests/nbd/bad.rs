//! Answers for clients that are wrong, malicious or unlucky: they lose their connection at most,
//! and nobody else notices.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use devsplice_nbd::Mode;
use devsplice_nbd::wire::{command, error};

use super::peer::{Host, pattern};

/// A host with a client that must not notice anything, and what it sees.
fn undisturbed(name: &str, disturb: impl Fn(&Host)) {
    for in_memory in [false, true] {
        let host = Host::new(name, |options| {
            (options.connections, options.in_memory) = (2, in_memory);
        });
        undisturbed_by(&host, &disturb);
    }
}

fn undisturbed_by(host: &Host, disturb: impl Fn(&Host)) {
    let mut witness = host.peer(Mode::Structured);
    assert_eq!(witness.write(0, &pattern(4096, 1), 0), 0);
    disturb(host);
    assert_eq!(witness.read(0, 4096), Ok(pattern(4096, 1)));
    // The other place is free again.
    let mut next = host.peer(Mode::Extended);
    assert_eq!(next.read(0, 4096), Ok(pattern(4096, 1)));
}

fn ends(mut socket: &UnixStream) {
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest);
    assert_eq!(socket.read(&mut [0; 1]).map_err(|error| error.kind()).unwrap_or(0), 0);
}

#[test]
fn what_is_no_nbd_ends_the_connection() {
    undisturbed("garbage", |host| {
        let mut socket = UnixStream::connect(host.socket()).unwrap();
        let _ = socket.write_all(&[0xff; 5000]);
        ends(&socket);
        let mut peer = host.peer(Mode::Structured);
        peer.send(&[0xee; 28]);
        ends(&peer.socket());
    });
}

#[test]
fn a_request_that_is_refused_leaves_the_next_one_right() {
    undisturbed("refused", |host| {
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let mut peer = host.peer(mode);
            let size = host.size();
            assert_eq!(peer.read(size, 512), Err(error::EINVAL));
            assert_eq!(peer.read(100, 512), Err(error::EINVAL));
            assert_eq!(peer.read(u64::MAX - 511, 512), Err(error::EINVAL));
            assert_eq!(peer.write(size - 512, &pattern(1024, 2), 0), error::ENOSPC);
            assert_eq!(peer.write(512, &pattern(700, 2), 0), error::EINVAL);
            assert_eq!(peer.write(512, &pattern(100_100, 2), 0), error::EINVAL);
            assert_eq!(peer.plain(99, 0, (0, 512)), error::EINVAL);
            assert_eq!(peer.plain(command::READ, 1 << 12, (0, 512)), error::EINVAL);
            assert_eq!(peer.read(512, 512).unwrap(), pattern(4096, 1)[512..1024]);
            peer.disconnect();
            // Of its two places one is the witness's.
            host.wait_until(1);
        }
    });
}

#[test]
fn a_write_of_more_than_can_be_skipped_ends_the_connection_and_frees_its_place() {
    let host = Host::new("hopeless", |options| options.connections = 1);
    for _ in 0..2 {
        let mut peer = host.peer(Mode::Extended);
        let head = peer.request(command::WRITE, 0, (0, 1 << 33));
        peer.send(&head);
        ends(&peer.socket());
        host.wait_until_free();
    }
    assert_eq!(host.peer(Mode::Extended).read(0, 512), Ok(vec![0; 512]));
}

#[test]
fn a_write_whose_client_goes_in_the_middle_is_not_begun() {
    undisturbed("cut", |host| {
        for there in [0, 1, 511, 65_536, 99_999] {
            let mut peer = host.peer(Mode::Structured);
            let head = peer.request(command::WRITE, 0, (8192, 100_352));
            peer.send(&head);
            peer.send(&vec![7; there]);
            peer.cut();
            host.wait_until(1);
            assert!(host.file(8192, 100_352).iter().all(|byte| *byte == 0), "{there}");
        }
    });
}

#[test]
fn a_client_that_goes_with_requests_in_flight_leaves_its_place() {
    undisturbed("gone", |host| {
        for _ in 0..20 {
            let mut peer = host.peer(Mode::Structured);
            let mut bytes = Vec::new();
            for n in 0..40 {
                bytes.extend(peer.request(command::READ, 0, (n << 16, 1 << 16)));
                bytes.extend(peer.request(command::BLOCK_STATUS, 0, (n << 16, 1 << 16)));
                bytes.extend(peer.request(command::FLUSH, 0, (0, 0)));
            }
            peer.send(&bytes);
            peer.cut();
            host.wait_until(1);
        }
    });
}

#[test]
fn a_client_that_takes_no_replies_is_not_read_from_for_ever() {
    undisturbed("stuffed", |host| {
        let mut peer = host.peer(Mode::Structured);
        let request = peer.request(command::READ, 0, (0, 1 << 20));
        let socket = peer.socket();
        socket.set_nonblocking(true).unwrap();
        let mut taken = 0_usize;
        for _ in 0..50 {
            while let Ok(count) = (&socket).write(&request.repeat(100)) {
                taken += count;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // What sockets hold, what is staged, what is in flight.
        assert!(taken < 4 << 20, "{taken} bytes of requests were taken");
        peer.cut();
        host.wait_until(1);
    });
}

#[test]
fn a_client_that_takes_no_replies_does_not_hold_up_those_on_its_thread() {
    for in_memory in [false, true] {
        let host =
            Host::new("greedy", |wishes| (wishes.threads, wishes.in_memory) = (1, in_memory));
        let mut witness = host.peer(Mode::Structured);
        let mut greedy = host.peer(Mode::Structured);
        for len in [4096, 64 << 10, 128 << 10, 256 << 10, 1 << 20] {
            let mut bytes = Vec::new();
            for n in 0..40 {
                bytes.extend(greedy.request(command::READ, 0, (n << 20, len)));
            }
            greedy.send(&bytes);
            witness.socket().set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            for n in 0..100_u64 {
                assert_eq!(witness.write(n * 4096, &pattern(4096, n), 0), 0);
                assert_eq!(witness.read(n * 4096, 4096), Ok(pattern(4096, n)), "{len}");
            }
        }
        greedy.cut();
        host.wait_until(1);
    }
}

#[test]
fn who_says_nothing_is_shown_the_door() {
    let host = Host::new("silent", |options| options.connections = 1);
    let silent = UnixStream::connect(host.socket()).unwrap();
    let start = std::time::Instant::now();
    // It holds the only place, so this one waits for it to be thrown out.
    let mut next = host.peer(Mode::Structured);
    assert_eq!(next.read(0, 512), Ok(vec![0; 512]));
    let waited = start.elapsed();
    assert!((5..25).contains(&waited.as_secs()), "{waited:?}");
    ends(&silent);
}
