//! Answers for the thread that greets clients: accepts them, leads the handshake, hands those that
//! have chosen to the I/O threads. It also answers questions about ranges, which may wait for a
//! file system. Those that may wait for a server are answered by a thread of their own.
//!
//! All clients that are being greeted are served in turn, none for longer than it has sent bytes
//! for. There are never more of them than free desks: others wait in the kernel's queue.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_nbd::server::{Handshake, Offer, Tls};
use devsplice_nbd::wire::can;
use devsplice_uring::ktls::Records;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::Secure;
use super::extents;
use super::guest::{Guest, Step};
use super::listen::{Listener, Peer, Rule};
use super::post::{Leaving, Letter, Post};
use crate::extents::Extents;

/// Clients that are accepted in a row.
const AT_ONCE: usize = 32;

/// How long a client may take to hang up when it has heard that it is over.
const LINGER: Duration = Duration::from_secs(10);

/// A client that has been told that it is over, over TLS by the kernel.
struct Leaver {
    socket: OwnedFd,
    records: Box<dyn Records>,
    end: Instant,
}

impl Leaver {
    fn new((socket, records): Leaving) -> Leaver {
        Leaver { socket, records, end: Instant::now() + LINGER }
    }

    /// Takes what it still sends.
    fn is_over(&mut self) -> bool {
        let mut bytes = [0; 4096];
        for _ in 0..AT_ONCE {
            let got = recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT);
            if matches!(got, Err(Errno::AGAIN | Errno::INTR)) {
                break;
            }
            if self.is_last(got.map(|(_, count)| count)) {
                return true;
            }
        }
        Instant::now() >= self.end
    }

    /// Whether nothing comes after what a receive has brought. One fails at each record that is no
    /// data: the client's last word, or new keys, behind which that is yet to come.
    fn is_last(&mut self, got: Result<usize, Errno>) -> bool {
        match got {
            Ok(count) => count == 0,
            Err(Errno::IO) => self.records.hear(self.socket.as_fd()) != Ok(true),
            Err(_) => true,
        }
    }
}

/// What the thread serves with.
pub(super) struct Host {
    pub(super) post: Arc<Post>,
    /// What questions are answered from, unless somebody else does.
    pub(super) known: Option<Extents>,
    pub(super) offer: Offer,
    pub(super) rules: Vec<Rule>,
    /// Whether clients that come over a network may change data.
    pub(super) writable: bool,
    /// TLS, where it is spoken.
    pub(super) secure: Option<Secure>,
}

impl Host {
    /// Greets until told to stop.
    pub(super) fn run(&self, listeners: &[Listener]) {
        let mut guests: Vec<Guest> = Vec::new();
        let mut leavers: Vec<Leaver> = Vec::new();
        while !self.post.is_stopping() {
            self.wait(listeners, &guests, &leavers);
            self.post.bell.heard();
            leavers.retain_mut(|leaver| !leaver.is_over());
            leavers.extend(self.post.take_leaving().into_iter().map(Leaver::new));
            if let Some(known) = &self.known {
                answer(&self.post, known);
            }
            let mut left = Vec::with_capacity(guests.len());
            for mut guest in guests {
                match guest.serve(&self.post, self.secure.as_ref()) {
                    Step::Stays => left.push(guest),
                    Step::Chose if !guest.may_enter(&self.post) => left.push(guest),
                    Step::Chose => self.hand_over(guest),
                    Step::Gone(reason) => self.part(&guest.peer, reason),
                }
            }
            guests = left;
            for listener in listeners {
                self.accept(listener, &mut guests, leavers.len());
            }
        }
    }

    fn has_room(&self, guests: &[Guest], leavers: usize) -> bool {
        // A relay outlives its connection by the moment that its client needs to go.
        let places = (self.post.taken() + guests.len()).max(self.post.relays()).max(leavers);
        places < self.post.desks.len()
    }

    /// Waits until there is something to do.
    fn wait(&self, listeners: &[Listener], guests: &[Guest], leavers: &[Leaver]) {
        let mut all = vec![PollFd::new(self.post.bell.ear(), PollFlags::IN)];
        if self.known.is_some() {
            all.push(PollFd::new(self.post.asked.ear(), PollFlags::IN));
        }
        if self.has_room(guests, leavers.len()) {
            all.extend(listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
        }
        all.extend(guests.iter().filter_map(Guest::poll));
        all.extend(leavers.iter().map(|leaver| PollFd::new(&leaver.socket, PollFlags::IN)));
        let ends = guests.iter().filter_map(Guest::limit);
        let first = ends.chain(leavers.iter().map(|leaver| leaver.end)).min();
        let limit = first.map(|end| end.saturating_duration_since(Instant::now()));
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        // An interruption is as good as an event: all are looked at.
        let _ = poll(&mut all, limit.as_ref());
    }

    fn accept(&self, listener: &Listener, guests: &mut Vec<Guest>, leavers: usize) {
        // Others want to be served in between, however many there are that may not connect.
        for _ in 0..AT_ONCE {
            if !self.has_room(guests, leavers) || self.post.is_stopping() {
                return;
            }
            let (socket, peer) = match listener.accept() {
                Ok(client) => client,
                Err(error) if is_of_client(&error) => continue,
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        (self.post.say)(&format!("nbd: a client could not be accepted: {error}"));
                        // Out of descriptors, perhaps: not to be tried a million times a second.
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    return;
                }
            };
            if !peer.may_enter(&self.rules) {
                (self.post.say)(&format!("nbd: {}: may not connect (--allow)", peer.shown()));
                continue;
            }
            let mut offer = self.offer.clone();
            if peer.is_remote() && !self.writable {
                offer.flags = read_only(offer.flags);
            }
            let tls = self.secure.as_ref().map_or(Tls::Off, |secure| secure.policy);
            let handshake = Handshake::new(vec![offer]).with_tls(tls);
            guests.push(Guest::new(socket, handshake, peer));
        }
    }

    fn hand_over(&self, guest: Guest) {
        let peer = guest.peer;
        let Some(client) = guest.chosen() else { return };
        match self.post.take_desk() {
            Some(desk) => desk.send(Letter::Client(Box::new(client))),
            None => self.part(&peer, Some("comes when all connections are taken".into())),
        }
    }

    fn part(&self, peer: &Peer, reason: Option<String>) {
        if let Some(reason) = reason {
            (self.post.say)(&format!("nbd: {}: {reason}; disconnected", peer.shown()));
        }
    }
}

/// Whether it says of one client only that it has left before it was let in.
fn is_of_client(error: &std::io::Error) -> bool {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// Answers all questions that there are.
fn answer(post: &Post, known: &Extents) {
    post.asked.heard();
    while !post.is_stopping()
        && let Some(question) = post.take_question()
    {
        let range = (question.at, question.len);
        let extents = extents::list(known, range, question.most);
        let letter = Letter::Answer { tag: question.tag, extents };
        post.desks[question.lane].send(letter);
    }
}

/// Answers questions until told to stop, where that may take a while.
pub(super) fn answer_all(post: &Post, known: &Extents) {
    while !post.is_stopping() {
        let _ = poll(&mut [PollFd::new(post.asked.ear(), PollFlags::IN)], None);
        answer(post, known);
    }
}

/// The flags of the same export for who may change nothing.
pub(super) fn read_only(flags: u16) -> u16 {
    (flags | can::READ_ONLY) & !(can::TRIM | can::WRITE_ZEROES | can::FAST_ZERO)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::BorrowedFd;

    use super::*;

    fn host(rules: &[&str]) -> Host {
        let offer = Offer {
            name: "disk".to_owned(),
            description: String::new(),
            size: 4096,
            flags: can::HAS_FLAGS,
            block: 512,
            preferred: 4096,
        };
        Host {
            post: Post::new(4, 1, Arc::new(|_| {})).unwrap(),
            known: None,
            offer,
            rules: rules.iter().map(|text| Rule::parse(text).unwrap()).collect(),
            writable: false,
            secure: None,
        }
    }

    /// A listener with so many clients in its queue.
    fn queued(count: usize) -> (Listener, Vec<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let clients = (0..count).map(|_| TcpStream::connect(address).unwrap()).collect();
        (Listener::Tcp(listener), clients)
    }

    fn left_in_queue(listener: &Listener) -> usize {
        std::iter::from_fn(|| listener.accept().ok()).count()
    }

    /// What a client says in records that are no data, one after another.
    #[derive(Debug)]
    struct Says(Vec<Result<bool, String>>);

    impl Records for Says {
        fn hear(&mut self, _: BorrowedFd<'_>) -> Result<bool, String> {
            self.0.pop().unwrap()
        }
        fn sent(&mut self, _: u64) {}
        fn is_due(&self) -> bool {
            false
        }
        fn renew(&mut self, _: BorrowedFd<'_>) -> Result<(), String> {
            Ok(())
        }
        fn close(&mut self, _: BorrowedFd<'_>) -> bool {
            true
        }
    }

    #[test]
    fn who_leaves_is_waited_for_until_its_last_word_whatever_it_says_before() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let last = [Err("wrong".to_owned()), Ok(false), Ok(true), Ok(true)];
        let mut leaver = Leaver::new((ours.into(), Box::new(Says(last.to_vec()))));
        assert!(!leaver.is_over(), "it has not said anything");
        theirs.write_all(&[1; 9000]).unwrap();
        assert!(!leaver.is_over());
        let heard = [(); 4].map(|()| leaver.is_last(Err(Errno::IO)));
        assert_eq!(heard, [false, false, true, true], "new keys, new keys, the end; what is wrong");
        assert!(leaver.is_last(Ok(0)) && leaver.is_last(Err(Errno::CONNRESET)));
        drop(theirs);
        assert!(leaver.is_over());
    }

    #[test]
    fn those_that_may_not_connect_keep_nobody_waiting() {
        let host = host(&["192.0.2.0/24"]);
        let (listener, _clients) = queued(AT_ONCE + 3);
        let mut guests = Vec::new();
        host.accept(&listener, &mut guests, 0);
        assert!(guests.is_empty());
        assert_eq!(left_in_queue(&listener), 3);
    }

    #[test]
    fn nobody_is_accepted_any_more_who_comes_at_the_end() {
        let host = host(&["192.0.2.0/24"]);
        let (listener, _clients) = queued(2);
        host.post.stop();
        host.accept(&listener, &mut Vec::new(), 0);
        assert_eq!(left_in_queue(&listener), 2);
    }

    #[test]
    fn only_what_is_short_makes_the_greeter_pause() {
        use rustix::io::Errno;
        let of = |errno: Errno| is_of_client(&errno.into());
        assert!([Errno::CONNABORTED, Errno::CONNRESET, Errno::INTR].into_iter().all(of));
        assert!(![Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS].into_iter().any(of));
    }
}
