//! Answers for the NBD server as a client sees it: over a socket, against files.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod asked;
#[path = "../../../tls/tests/authority/mod.rs"]
mod authority;
mod bad;
mod flushes;
mod peer;
mod stale;

use std::io::Write;
use std::time::Duration;

use devsplice_nbd::Mode;
use devsplice_nbd::wire::{ask, command, error};
use peer::{Host, Peer, pattern};

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

#[test]
fn what_is_written_is_there_and_what_is_read_is_what_is_there() {
    for in_memory in [false, true] {
        written_is_there(&Host::new("data", |wishes| wishes.in_memory = in_memory));
    }
}

fn written_is_there(host: &Host) {
    for (at, mode) in (0..).map(|n| n * 8192 + 512).zip(MODES) {
        let mut peer = host.peer(mode);
        let data = pattern(4096, at);
        assert_eq!(peer.write(at, &data, 0), 0);
        assert_eq!(peer.read(at, 4096), Ok(data.clone()), "{mode:?}");
        assert_eq!(host.file(at, 4096), data);
        assert_eq!(peer.read(at - 512, 512), Ok(vec![0; 512]), "the neighbour is untouched");
        assert_eq!(peer.plain(command::FLUSH, 0, (0, 0)), 0);
        assert_eq!(peer.write(at, &pattern(512, 1), ask::FUA), 0);
        assert_eq!(peer.read(at, 512), Ok(pattern(512, 1)));
        assert_eq!(peer.plain(command::WRITE_ZEROES, ask::FUA, (at, 2048)), 0);
        assert_eq!(peer.read(at, 2048), Ok(vec![0; 2048]));
        assert_eq!(peer.plain(command::TRIM, 0, (at + 2048, 1024)), 0);
        assert_eq!(peer.read(at + 3072, 1024).unwrap(), data[3072..]);
    }
}

#[test]
fn the_largest_request_goes_both_ways_and_a_larger_one_is_refused() {
    let host = Host::new("large", |_| {});
    let mut peer = host.peer(Mode::Structured);
    let most = 32 << 20;
    let data = pattern(most, 7);
    assert_eq!(peer.write(0, &data, 0), 0);
    assert!(peer.read(0, most as u32).unwrap() == data);
    assert!(host.file(0, most) == data);
    assert_eq!(peer.read(0, most as u32 + 512), Err(error::EINVAL));
    assert_eq!(peer.write(0, &vec![9; most + 512], 0), error::EINVAL, "its data is skipped");
    assert!(peer.read(0, most as u32).unwrap() == data, "nothing of it was written");
}

/// Many at once, small and large mixed, so that data comes in every way that there is: all of it
/// staged, a part, none.
#[test]
fn requests_that_come_together_are_all_done_and_each_reply_is_whole() {
    for in_memory in [false, true] {
        mixed(&Host::new("mixed", |wishes| {
            (wishes.depth, wishes.in_memory) = (16, in_memory);
        }));
    }
}

fn mixed(host: &Host) {
    for (mode, seed) in MODES.into_iter().zip([3_u64, 5, 7]) {
        let mut peer = host.peer(mode);
        let mut expected = Vec::new();
        let (mut at, mut bytes) = (0, Vec::new());
        for n in 0..200_u64 {
            let len = [512, 4096, 512 * 7, 128 << 10, 20 << 10, 60 << 10][(n * seed % 6) as usize];
            let data = pattern(len, n + seed);
            bytes.extend(peer.request(command::WRITE, 0, (at, len as u64)));
            bytes.extend(&data);
            expected.push((at, data));
            at += len as u64;
        }
        peer.send_from_thread(bytes);
        for _ in 0..expected.len() {
            assert_eq!(peer.reply().1.error, 0);
        }
        // Read them all at once; replies come in any order.
        let mut cookies = Vec::new();
        let mut bytes = Vec::new();
        for (at, data) in &expected {
            bytes.extend(peer.request(command::READ, 0, (*at, data.len() as u64)));
            cookies.push(peer.last_cookie());
        }
        peer.send_from_thread(bytes);
        for _ in 0..expected.len() {
            let (cookie, reply) = peer.reply();
            let index = cookies.iter().position(|one| *one == cookie).unwrap();
            assert!(reply.data == expected[index].1, "{mode:?}: read {index} differs");
            cookies[index] = u64::MAX;
        }
    }
}

/// Replies that are left in the file until there is room in the socket, and those for which there
/// is none, in turns; the client takes them in portions of its own.
#[test]
fn a_client_that_takes_its_replies_late_gets_what_was_there() {
    let host = Host::new("late", |wishes| wishes.in_memory = true);
    let len = 128 << 10;
    for (mode, seed) in MODES.into_iter().zip(1..) {
        let mut peer = host.peer(mode);
        for n in 0..64 {
            assert_eq!(peer.write(n * len, &pattern(len as usize, n + seed), 0), 0);
        }
        let mut bytes = Vec::new();
        for n in 0..64 {
            // A short one between them has to stay in its place.
            bytes.extend(peer.request(command::READ, 0, (n * len, len)));
            bytes.extend(peer.request(command::READ, 0, (n * len, 512)));
        }
        let last = peer.last_cookie();
        peer.send_from_thread(bytes);
        for n in 0..128 {
            if n % 16 == 0 {
                std::thread::sleep(Duration::from_millis(20));
            }
            let (cookie, reply) = peer.reply();
            let number = 127 - (last - cookie);
            let all = pattern(len as usize, number / 2 + seed);
            let expected = if number.is_multiple_of(2) { &all[..] } else { &all[..512] };
            assert!(reply.data == expected, "{mode:?}: reply to request {number} differs");
        }
    }
}

/// The engine has long done with the requests when the client takes the first reply, and gives
/// memory back that nobody needs.
#[test]
fn a_client_that_takes_its_replies_after_seconds_gets_what_was_there() {
    let len = 256 << 10;
    for in_memory in [false, true] {
        let host = Host::new("slow", |wishes| wishes.in_memory = in_memory);
        let mut peer = host.peer(Mode::Extended);
        for n in 0..32 {
            assert_eq!(peer.write(n * len, &pattern(len as usize, n + 1), 0), 0);
        }
        for n in 0..32 {
            let bytes = peer.request(command::READ, 0, (n * len, len));
            peer.send(&bytes);
        }
        let last = peer.last_cookie();
        for n in 0..32 {
            if n == 0 || n == 20 {
                std::thread::sleep(Duration::from_millis(3500));
            }
            let (cookie, reply) = peer.reply();
            let number = 31 - (last - cookie);
            let expected = pattern(len as usize, number + 1);
            assert!(reply.data == expected, "in memory {in_memory}: reply {number} differs");
        }
    }
}

/// As there, with the first half of a write's data.
#[test]
fn data_that_comes_in_halves_seconds_apart_is_written_whole() {
    let host = Host::new("halves", |_| ());
    let mut peer = host.peer(Mode::Extended);
    let data = pattern(1 << 20, 3);
    let head = peer.request(command::WRITE, 0, (0, 1 << 20));
    peer.send(&head);
    for part in data.chunks((1 << 20) / 3) {
        peer.send(part);
        std::thread::sleep(Duration::from_millis(2500));
    }
    assert_eq!(peer.reply().1.error, 0);
    assert!(peer.read(0, 1 << 20).as_ref() == Ok(&data));
}

#[test]
fn what_is_read_from_memory_is_not_copied_for_a_client_of_this_machine() {
    let host = Host::new("lent", |wishes| wishes.in_memory = true);
    let mut peer = host.peer(Mode::Structured);
    assert_eq!(peer.write(0, &pattern(256 << 10, 1), 0), 0);
    let before = host.device().crew().counts();
    assert_eq!(peer.read(0, 128 << 10).unwrap(), pattern(256 << 10, 1)[..128 << 10]);
    assert_eq!(peer.read(0, 4096).unwrap(), pattern(4096, 1));
    // Counted at the end of the turn, which may be after the reply.
    host.wait_for(|counts| counts.bytes_copied == before.bytes_copied + 4096);
    host.wait_for(|counts| counts.bytes_spliced == before.bytes_spliced + (128 << 10));
}

/// Which of the two ways is faster is tried while there is a CPU for the client and its thread.
#[test]
fn a_client_that_reads_much_gets_it_either_way() {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        eprintln!("skipped: there is one CPU");
        return;
    }
    let host = Host::new("ways", |wishes| wishes.in_memory = true);
    let mut peer = host.peer(Mode::Structured);
    let (len, places) = (128_u64 << 10, 8);
    for place in 0..places {
        assert_eq!(peer.write(place * len, &pattern(len as usize, place), 0), 0);
    }
    let before = host.device().crew().counts();
    let counts = || {
        let now = host.device().crew().counts();
        (now.bytes_copied - before.bytes_copied, now.bytes_spliced - before.bytes_spliced)
    };
    for number in 0..20_000 {
        let place = number % places;
        let read = peer.read(place * len, 128 << 10).unwrap();
        assert!(read == pattern(len as usize, place), "read {number} differs");
        if number % 64 == 0 && counts().0 > 64 * len {
            break;
        }
    }
    let (copied, spliced) = counts();
    assert!(copied > 64 * len && spliced >= 16 << 20, "{copied} copied, {spliced} lent");
}

#[test]
fn what_a_file_has_lost_is_an_error_and_no_zeros() {
    for in_memory in [false, true] {
        let host = Host::new("lost", |wishes| wishes.in_memory = in_memory);
        let mut peer = host.peer(Mode::Structured);
        assert_eq!(peer.write(0, &pattern(128 << 10, 1), 0), 0);
        host.cut_file(100 << 10);
        for len in [64 << 10, 4096] {
            assert_eq!(peer.read((100 << 10) - 512, len), Err(error::EIO), "{len}");
        }
        assert_eq!(peer.read(0, 64 << 10).unwrap(), pattern(128 << 10, 1)[..64 << 10]);
    }
}

#[test]
fn bytes_may_come_one_by_one() {
    let host = Host::new("drip", |_| {});
    for mode in MODES {
        let mut peer = host.peer(mode);
        let mut bytes = peer.request(command::WRITE, 0, (0, 512));
        bytes.extend(pattern(512, 4));
        bytes.extend(peer.request(command::READ, 0, (0, 512)));
        for byte in bytes {
            peer.send(&[byte]);
        }
        assert_eq!(peer.reply().1.error, 0);
        // Sent before the write was answered, so it may see either; asked again it may not.
        peer.reply();
        assert_eq!(peer.read(0, 512), Ok(pattern(512, 4)));
    }
}

#[test]
fn holes_are_told_and_data_never_is_one() {
    let host = Host::new("status", |_| {});
    for mode in [Mode::Structured, Mode::Extended] {
        let mut peer = host.peer(mode);
        assert_eq!(peer.write(1 << 20, &pattern(64 << 10, 1), 0), 0);
        let mib = 1 << 20;
        let (hole, data) = (3, 0);
        let all = peer.status(0, (0, 4 << 20));
        assert_eq!(all, [(mib, hole), (64 << 10, data), (3 * mib - (64 << 10), hole)], "{mode:?}");
        assert_eq!(peer.status(ask::REQ_ONE, (0, 4 << 20)), [(mib, hole)]);
        assert_eq!(peer.status(0, (mib + 512, 512)), [(512, data)]);
    }
    let mut simple = host.peer(Mode::Simple);
    assert_eq!(simple.plain(command::BLOCK_STATUS, 0, (0, 512)), error::EINVAL);
}

#[test]
fn several_connections_see_one_disk() {
    let host = Host::new("several", |_| {});
    let mut peers: Vec<_> = (0..4).map(|_| host.peer(Mode::Structured)).collect();
    host.wait_until(4);
    for (n, peer) in peers.iter_mut().enumerate() {
        assert_eq!(peer.write(n as u64 * 4096, &pattern(4096, n as u64), 0), 0);
    }
    for peer in &mut peers {
        for n in 0..4_u64 {
            assert_eq!(peer.read(n * 4096, 4096), Ok(pattern(4096, n)));
        }
    }
    for peer in peers {
        peer.disconnect();
    }
    host.wait_until_free();
}

#[test]
fn more_clients_than_places_wait_and_come_in_when_one_goes() {
    let host = Host::new("full", |options| options.connections = 2);
    let first = host.peer(Mode::Structured);
    let _second = host.peer(Mode::Structured);
    let (sender, receiver) = std::sync::mpsc::channel();
    let path = host.socket();
    let waiting = std::thread::spawn(move || {
        let mut peer = Peer::connect(&path, Mode::Structured);
        sender.send(peer.read(0, 512)).unwrap();
    });
    assert!(receiver.recv_timeout(Duration::from_millis(300)).is_err(), "it came in");
    first.disconnect();
    assert_eq!(receiver.recv_timeout(Duration::from_secs(20)), Ok(Ok(vec![0; 512])));
    waiting.join().unwrap();
}

#[test]
fn over_a_network_nothing_is_changed_unless_that_was_said() {
    for writable in [false, true] {
        let host = Host::new("tcp", |options| {
            options.listen.push("tcp:127.0.0.1:0".to_owned());
            options.writable = writable;
        });
        let mut peer = host.peer_by_tcp();
        assert_eq!(peer.is_read_only(), !writable);
        let expected = if writable { 0 } else { error::EPERM };
        assert_eq!(peer.write(0, &pattern(512, 1), 0), expected);
        let found = if writable { pattern(512, 1) } else { vec![0; 512] };
        assert_eq!(peer.read(0, 512), Ok(found));
        assert_eq!(host.peer(Mode::Simple).write(0, &pattern(512, 2), 0), 0, "it is local");
    }
}

#[test]
fn what_is_to_be_zeroed_fast_is_refused_where_that_takes_as_long_as_writing() {
    for slow_zeroes in [false, true] {
        let host = Host::new("zeroes", |options| options.slow_zeroes = slow_zeroes);
        let mut peer = host.peer(Mode::Structured);
        assert_eq!(peer.write(0, &pattern(8192, 1), 0), 0);
        let zero = |flags| (command::WRITE_ZEROES, flags);
        let mut send = |(command, flags), at| peer.plain(command, flags, (at, 4096));
        let fast = if slow_zeroes { error::ENOTSUP } else { 0 };
        assert_eq!(send(zero(ask::FAST_ZERO), 0), fast);
        assert_eq!(send(zero(ask::FAST_ZERO | ask::NO_HOLE), 4096), error::ENOTSUP);
        let mut expected = pattern(8192, 1);
        if !slow_zeroes {
            expected[..4096].fill(0);
        }
        assert_eq!(host.file(0, 8192), expected, "who is refused has changed nothing");
        assert_eq!(send(zero(0), 0), 0);
        assert_eq!(send(zero(ask::NO_HOLE), 4096), 0);
        assert_eq!(host.file(0, 8192), vec![0; 8192]);
    }
}

#[test]
fn a_read_only_disk_refuses_changes_from_everybody() {
    let host = Host::new("ro", |options| options.read_only = true);
    let mut peer = host.peer(Mode::Structured);
    assert!(peer.is_read_only());
    assert_eq!(peer.write(0, &pattern(512, 1), 0), error::EPERM);
    assert_eq!(peer.plain(command::TRIM, 0, (0, 512)), error::EINVAL);
    assert_eq!(host.file(0, 512), vec![0; 512]);
}

#[test]
fn a_disk_gets_another_size_when_its_clients_have_had_their_answers() {
    let mut host = Host::new("resize", |_| {});
    let (old, new) = (host.size(), host.size() * 2);
    for round in 0..10 {
        let [mut writes, mut writer, mut idle] = [0; 3].map(|_| host.peer(Mode::Structured));
        // One waits for many answers, one is in the middle of a write, one wants nothing.
        let first = writes.last_cookie() + 1;
        let mut bytes = Vec::new();
        for index in 0..32 {
            bytes.extend(writes.request(command::WRITE, ask::FUA, (index * 512, 512)));
            bytes.extend(pattern(512, index + round));
        }
        writes.send(&bytes);
        let mut bytes = writer.request(command::WRITE, 0, (1 << 20, 102_400));
        bytes.extend(vec![0xee; 50_000]);
        writer.send(&bytes);
        let size = if round % 2 == 0 { new } else { old };
        let path = host.socket();
        let mut waiting = None;
        host.resize(size, |_| {
            waiting = Some(std::thread::spawn(move || Peer::connect(&path, Mode::Extended)));
        });
        for cookie in writes.answered_until_end() {
            let index = cookie - first;
            assert_eq!(host.file(index * 512, 512), pattern(512, index + round), "{index}");
        }
        assert!(writer.answered_until_end().is_empty() && idle.answered_until_end().is_empty());
        assert_eq!(host.file(1 << 20, 512), vec![0; 512], "a part of a write");
        let mut peer = waiting.unwrap().join().unwrap();
        assert_eq!(peer.read(size - 512, 512).map(|data| data.len()), Ok(512));
        assert_eq!(peer.read(size, 512), Err(error::EINVAL));
    }
}

#[test]
fn requests_that_were_taken_are_answered_before_a_disk_is_suspended() {
    let mut host = Host::new("dismiss", |_| {});
    let size = host.size();
    let mut total = 0;
    for round in 0..20 {
        let mut peer = host.peer(Mode::Structured);
        // The first is taken before the others come: there is its answer.
        assert_eq!(peer.write(0, &pattern(512, round), 0), 0);
        let first = peer.last_cookie() + 1;
        let mut bytes = Vec::new();
        for index in 0..32 {
            bytes.extend(peer.request(command::WRITE, ask::FUA, (index * 4096, 4096)));
            bytes.extend(pattern(4096, index + round));
        }
        peer.send(&bytes);
        std::thread::sleep(Duration::from_micros(100 * round));
        host.resize(size, |host| {
            // What is there now was answered: nobody changes it any more.
            let done: Vec<u64> = (0..32)
                .filter(|index| host.file(index * 4096, 4096) == pattern(4096, index + round))
                .collect();
            let answered = peer.answered_until_end();
            let indices: Vec<u64> = answered.iter().map(|cookie| cookie - first).collect();
            assert!(done.iter().all(|index| indices.contains(index)), "{done:?} {indices:?}");
            total += done.len();
        });
    }
    assert!(total > 0, "none was taken in time");
}

/// What the kernel has taken to send it throws away when it closes a socket that holds requests
/// which nobody has read.
#[test]
fn answers_arrive_over_tcp_though_the_client_goes_on_asking_when_it_is_sent_away() {
    answers_arrive(false);
}

/// There a thread is between, which has to do as the kernel does.
#[test]
fn answers_arrive_over_tls_though_the_client_goes_on_asking_when_it_is_sent_away() {
    answers_arrive(true);
}

fn answers_arrive(by_tls: bool) {
    let mut host = Host::new(if by_tls { "dismiss-tls" } else { "dismiss-tcp" }, |wishes| {
        wishes.listen.push("nbd://127.0.0.1:0".to_owned());
        wishes.depth = 16;
        wishes.by_tls = by_tls;
    });
    let size = host.size();
    for _ in 0..3 {
        let mut peer = if by_tls { host.peer_by_tls() } else { host.peer_by_tcp() };
        let mut bytes = Vec::new();
        for n in 0..20_000 {
            bytes.extend(peer.request(command::READ, 0, (n % 128 * (256 << 10), 256 << 10)));
        }
        let mut socket = peer.socket();
        let asking = std::thread::spawn(move || drop(socket.write_all(&bytes)));
        let mut answers = peer.socket();
        let reading = std::thread::spawn(move || {
            let (mut chunk, mut total) = (vec![0; 64 << 10], 0);
            loop {
                match std::io::Read::read(&mut answers, &mut chunk) {
                    Ok(0) => {
                        let _ = answers.shutdown(std::net::Shutdown::Both);
                        return total;
                    }
                    Ok(count) => total += count,
                    Err(error) => panic!("{error} after {total} bytes"),
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        std::thread::sleep(Duration::from_millis(200));
        host.resize(size, |_| {});
        // A head of 20 bytes, the offset, the data.
        let total = reading.join().unwrap();
        assert!(total > 0 && total % (28 + (256 << 10)) == 0, "{total}: a part of a reply");
        drop(peer);
        asking.join().unwrap();
    }
}

#[test]
fn an_end_with_clients_in_the_middle_of_things_comes_in_time_and_frees_the_socket() {
    let mut host = Host::new("end", |_| {});
    let mut peers: Vec<_> = (0..3).map(|_| host.peer(Mode::Structured)).collect();
    for peer in &mut peers {
        let mut bytes = Vec::new();
        for n in 0..60 {
            bytes.extend(peer.request(command::READ, 0, (n << 20, 1 << 20)));
        }
        peer.send(&bytes);
    }
    let start = std::time::Instant::now();
    host.end();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert!(!std::path::Path::new(&host.socket()).exists());
}

#[test]
fn an_end_does_not_wait_for_answers_to_questions_that_nobody_answers_any_more() {
    for _ in 0..3 {
        let mut host = Host::new("end-asked", |_| {});
        let mut peers: Vec<_> = (0..4).map(|_| host.peer(Mode::Structured)).collect();
        let asking: Vec<_> = peers
            .iter_mut()
            .map(|peer| {
                let request = peer.request(command::BLOCK_STATUS, 0, (0, 1 << 20));
                let (socket, mut answers) = (peer.socket(), peer.socket());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut answers, &mut std::io::sink());
                });
                let requests = request.repeat(1000);
                std::thread::spawn(move || while (&socket).write_all(&requests).is_ok() {})
            })
            .collect();
        std::thread::sleep(Duration::from_millis(100));
        host.end();
        asking.into_iter().for_each(|asks| asks.join().unwrap());
    }
}
