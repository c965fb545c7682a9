//! Answers for a server as all threads share it: what it has agreed to, who waits for a connection
//! to it, the thread that makes them, and what is told of all that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_nbd::Mode;
use devsplice_nbd::client::conversation::same_export;
use devsplice_nbd::client::{Agreed, Extent};
use devsplice_nbd::wire::can;
use devsplice_uring::{Line, Link, Patience, Remote, Standing};

use super::connect::{Target, connect, connect_within};
use super::talk::Talk;

/// The first wait between attempts to connect; it doubles up to the last.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LAST_WAIT: Duration = Duration::from_secs(5);
/// How long nothing is asked of what is there when that has failed.
const SILENCE: Duration = Duration::from_secs(10);
/// Extents that are kept of a server that takes one connection only.
const KEPT: usize = 1 << 16;

/// Somebody who is told what happens.
type Tell = Box<dyn Fn(&str) + Send>;

/// A server whose export is in use.
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    target: Target,
    mode: Mode,
    name: String,
    agreed: Agreed,
    patience: Patience,
    /// Nobody wants any more what waits.
    forsaken: AtomicBool,
    connections: u16,
    state: Mutex<State>,
    work: Condvar,
    /// Asked by whoever wants to know what is there.
    talk: Mutex<Looks>,
    /// Asked what is there while rings have their connections.
    beside: Mutex<Beside>,
    /// Grows with each connection that rings lose or get after the first: what is asked over one
    /// from before may be another server by now, which does not know what this one has done.
    generation: AtomicU64,
}

/// A connection for questions that come while the disk is used.
#[derive(Default)]
struct Beside {
    /// With the generation that it was made in.
    talk: Option<(Talk, u64)>,
    /// Before that, it is not tried again.
    next: Option<Instant>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Weak<Line>>,
    /// When the next attempt may be.
    next: Option<Instant>,
    wait: Duration,
    /// When a ring got a connection last, if none was lost since.
    handed: Option<Instant>,
    has_thread: bool,
    ended: bool,
    standing: Standing,
    away_since: Option<Instant>,
    tell: Option<Tell>,
}

impl State {
    /// A connection was lost. Another one is tried for at once, unless this one was as short as an
    /// attempt: a server may take connections and have no use for them.
    fn lost(&mut self, now: Instant) {
        match self.handed.take() {
            Some(then) if now.duration_since(then) < LAST_WAIT => self.back_off(now),
            Some(_) => self.wait = FIRST_WAIT,
            None => {}
        }
    }

    /// The next attempt has to wait, and the one after that longer.
    fn back_off(&mut self, now: Instant) {
        let wait = self.wait.clamp(FIRST_WAIT, LAST_WAIT);
        self.wait = (wait * 2).min(LAST_WAIT);
        // Not all clients of a server are to come at the same moment.
        self.next = Some(now + wait.mul_f32(jitter()));
    }
}

/// What is known of what is there.
#[derive(Default)]
struct Looks {
    talk: Option<Talk>,
    /// Where the list begins, and the list.
    at: u64,
    extents: Vec<Extent>,
    /// Nothing more can be asked.
    is_all: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Connects for the first time; `mode` is the best that is asked for.
    pub(super) fn open(
        (target, mode): (Target, Mode),
        connections: Option<u16>,
        patience: Patience,
    ) -> Result<Server> {
        let mut link = connect(&target, mode)?;
        if !target.is_there_again() {
            link.agreed.flags &= !can::MULTI_CONN;
        }
        let agreed = link.agreed.clone();
        let can_share = agreed.flags & can::MULTI_CONN != 0;
        let most = if can_share { u16::MAX } else { 1 };
        let connections = connections.unwrap_or(most).clamp(1, most);
        let talk = Mutex::new(Looks { talk: Some(Talk::new(link)), ..Looks::default() });
        let shared = Shared {
            name: target.name(),
            target,
            mode,
            agreed,
            patience,
            forsaken: AtomicBool::new(false),
            connections,
            state: Mutex::default(),
            work: Condvar::new(),
            talk,
            beside: Mutex::default(),
            generation: AtomicU64::new(0),
        };
        Ok(Server { shared: Arc::new(shared) })
    }

    /// Does something with the connection that no ring has yet.
    pub(super) fn with_talk<T>(&self, then: impl FnOnce(&mut Talk) -> T) -> Option<T> {
        lock(&self.shared.talk).talk.as_mut().map(then)
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shared.name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.work.notify_all();
    }
}

impl Remote for Server {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn agreed(&self) -> &Agreed {
        &self.shared.agreed
    }

    fn patience(&self) -> Patience {
        self.shared.patience
    }

    fn forsake(&self) {
        self.shared.forsaken.store(true, Ordering::Release);
    }

    fn is_forsaken(&self) -> bool {
        self.shared.forsaken.load(Ordering::Acquire)
    }

    fn most_lines(&self) -> u16 {
        self.shared.connections
    }

    fn dial(&self, line: &Arc<Line>, lost: Option<&str>) {
        let shared = &self.shared;
        if lost.is_none()
            && let Some(link) = lock(&shared.talk).talk.take().and_then(Talk::into_link)
        {
            lock(&shared.state).standing.take(&link);
            line.deliver(link);
        } else {
            shared.wait(line, lost);
        }
        // Here somebody makes the thread; whoever loses connections waits for nobody.
        let mut state = lock(&shared.state);
        if lost.is_none() && !std::mem::replace(&mut state.has_thread, true) {
            let shared = Arc::clone(shared);
            let serve = move || shared.serve();
            if let Err(error) = devsplice_uring::thread::start("nbd/connect".to_owned(), serve) {
                state.has_thread = false;
                state.standing.last_error = Some(format!("no thread to connect: {error}"));
            }
        }
    }

    fn part(&self) {
        let mut state = lock(&self.shared.state);
        state.standing.connections = state.standing.connections.saturating_sub(1);
    }

    fn tell(&self, text: &str) {
        self.shared.tell(text);
    }

    fn listen(&self, tell: Box<dyn Fn(&str) + Send>) {
        lock(&self.shared.state).tell = Some(tell);
    }

    fn standing(&self) -> Standing {
        lock(&self.shared.state).standing.clone()
    }

    fn look_ahead(&self) {
        self.shared.look_ahead();
    }

    fn look(&self, at: u64, most: u64) -> Option<Extent> {
        self.shared.look(at, most)
    }

    fn look_now(&self, at: u64, most: u64, until: Instant) -> Option<Vec<Extent>> {
        self.shared.look_now(at, most, until)
    }

    fn tells_now(&self) -> bool {
        self.shared.tells_now()
    }
}

impl Shared {
    fn tell(&self, text: &str) {
        let state = lock(&self.state);
        if let Some(tell) = &state.tell {
            tell(&format!("{}: {text}", self.name));
        }
    }

    /// Takes note that a line wants a connection.
    fn wait(&self, line: &Arc<Line>, lost: Option<&str>) {
        let mut state = lock(&self.state);
        state.waiting.push(Arc::downgrade(line));
        let Some(why) = lost else {
            drop(state);
            return self.work.notify_all();
        };
        self.generation.fetch_add(1, Ordering::AcqRel);
        state.standing.connections = state.standing.connections.saturating_sub(1);
        state.standing.last_error = Some(why.to_owned());
        let is_news = state.away_since.is_none();
        let now = Instant::now();
        state.away_since.get_or_insert(now);
        state.lost(now);
        drop(state);
        self.work.notify_all();
        if is_news {
            self.tell(&format!("connection lost: {why}; requests wait for the next one"));
        }
    }

    /// The thread that connects.
    fn serve(&self) {
        // As on I/O threads: memory that is needed here must not wait for the device.
        let _ = devsplice_uring::thread::set_io_flusher();
        loop {
            let mut state = lock(&self.state);
            loop {
                if state.ended {
                    return;
                }
                state.waiting.retain(|line| line.strong_count() > 0);
                let now = Instant::now();
                let left = state.next.and_then(|next| next.checked_duration_since(now));
                state = match (state.waiting.is_empty(), left) {
                    (false, None) => break,
                    (false, Some(left)) => {
                        let waited = self.work.wait_timeout(state, left);
                        waited.map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state)
                    }
                    (true, _) => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
                };
            }
            drop(state);
            match self.again() {
                Ok(link) => self.hand_over(link),
                Err(error) => self.put_off(&error),
            }
        }
    }

    /// Another connection, to the same export.
    fn again(&self) -> Result<Link> {
        self.same(connect(&self.target, self.mode)?)
    }

    /// The connection, if it is to the same export.
    fn same(&self, link: Link) -> Result<Link> {
        match same_export(&self.agreed, &link.agreed) {
            Ok(()) => Ok(link),
            Err(what) => {
                let reason = format!("the export is another one by now: {what}");
                Err(Error::new(ErrorKind::Invalid, &self.name, reason))
            }
        }
    }

    fn hand_over(&self, link: Link) {
        let mut state = lock(&self.state);
        state.next = None;
        let line = state.waiting.pop().and_then(|line| line.upgrade());
        let Some(line) = line else { return };
        // Before anything is asked over it.
        self.generation.fetch_add(1, Ordering::AcqRel);
        state.handed = Some(Instant::now());
        state.standing.take(&link);
        let away = state.away_since.take();
        state.standing.reconnects += u64::from(away.is_some());
        drop(state);
        line.deliver(link);
        if let Some(since) = away {
            let seconds = since.elapsed().as_secs_f32();
            self.tell(&format!("connected again after {seconds:.1} s"));
        }
    }

    fn put_off(&self, error: &Error) {
        let mut state = lock(&self.state);
        let now = Instant::now();
        state.back_off(now);
        state.away_since.get_or_insert(now);
        let text = error.to_string();
        let is_news = state.standing.last_error.as_ref() != Some(&text);
        state.standing.last_error = Some(text);
        drop(state);
        if is_news {
            let text = error.to_string();
            let reason = text.strip_prefix(&format!("{}: ", self.name)).unwrap_or(&text);
            self.tell(&format!("cannot be reached: {reason}"));
        }
    }

    /// The talk, on a connection of its own where the server takes several.
    fn talk<'a>(&self, looks: &'a mut Looks) -> Option<&'a mut Talk> {
        if looks.talk.is_none() && self.agreed.flags & can::MULTI_CONN != 0 && !looks.is_all {
            looks.talk = self.again().ok().map(Talk::new);
            looks.is_all = looks.talk.is_none();
        }
        looks.talk.as_mut()
    }

    /// Asks now for what could not be asked any more when a ring has the only connection.
    fn look_ahead(&self) {
        let mut looks = lock(&self.talk);
        if self.agreed.flags & can::MULTI_CONN != 0 {
            return;
        }
        let (mut at, mut all) = (0, Vec::new());
        while at < self.agreed.size && all.len() < KEPT {
            let left = self.agreed.size - at;
            let Some(talk) = looks.talk.as_mut() else { break };
            let Ok(extents) = talk.extents(at, left) else { break };
            let before = at;
            for extent in extents {
                let len = extent.len.min(self.agreed.size - at);
                if len > 0 {
                    all.push(Extent { len, ..*extent });
                    at += len;
                }
            }
            if at == before {
                break;
            }
        }
        (looks.at, looks.extents, looks.is_all) = (0, all, true);
    }

    fn look(&self, at: u64, most: u64) -> Option<Extent> {
        let mut looks = lock(&self.talk);
        if let Some(known) = looks.find(at, most) {
            return Some(known);
        }
        if looks.is_all {
            return None;
        }
        let extents = self.talk(&mut looks)?.extents(at, most).ok()?.to_vec();
        (looks.at, looks.extents) = (at, extents);
        looks.find(at, most)
    }
}

impl Shared {
    /// One that takes several connections shows over each what was done over the others.
    fn tells_now(&self) -> bool {
        self.agreed.flags & can::MULTI_CONN != 0 && self.agreed.allocation.is_some()
    }

    fn look_now(&self, at: u64, most: u64, until: Instant) -> Option<Vec<Extent>> {
        if !self.tells_now() {
            return None;
        }
        let generation = || self.generation.load(Ordering::Acquire);
        let mut beside = lock(&self.beside);
        beside.talk.take_if(|(_, born)| *born != generation());
        if beside.talk.is_none() {
            let now = Instant::now();
            if beside.next.is_some_and(|next| next > now) {
                return None;
            }
            let (born, left) = (generation(), until.saturating_duration_since(now));
            let link = (!left.is_zero()).then(|| connect_within(&self.target, self.mode, left));
            let link = link.and_then(|link| link.and_then(|link| self.same(link)).ok());
            beside.talk = link.map(|link| (Talk::new(link), born));
        }
        let most = most.min(self.agreed.size.saturating_sub(at));
        let ask = |(talk, born): &mut (Talk, u64)| {
            let told = talk.until(until).extents(at, most).map(<[_]>::to_vec);
            // What was written meanwhile may have gone to somebody else.
            (told, *born == generation())
        };
        match beside.talk.as_mut().map(ask) {
            Some((Ok(extents), true)) => return Some(extents),
            // The next question makes another.
            Some((Ok(_), false)) => {}
            // A connection over which something has failed is not asked again.
            Some((Err(_), _)) | None => beside.next = Some(Instant::now() + SILENCE),
        }
        beside.talk = None;
        None
    }
}

impl Looks {
    /// What is known of the bytes from `at` on.
    fn find(&self, at: u64, most: u64) -> Option<Extent> {
        let mut from = self.at;
        for extent in &self.extents {
            let end = from.saturating_add(extent.len);
            if (from..end).contains(&at) {
                return Some(Extent { len: (end - at).min(most), ..*extent });
            }
            from = end;
        }
        None
    }
}

/// Something between 0.75 and 1.25.
fn jitter() -> f32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.map_or(0, |now| now.subsec_nanos()) ^ std::process::id().wrapping_mul(0x9e37);
    #[allow(clippy::cast_precision_loss)]
    let part = (nanos % 1000) as f32 / 1000.0;
    0.75 + part / 2.0
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::net::{TcpListener, TcpStream};

    use devsplice_nbd::Request;
    use devsplice_nbd::server::{self, ALLOCATION, Offer};
    use devsplice_nbd::uri::Uri;
    use devsplice_nbd::wire::Head;

    use super::*;

    #[test]
    fn waits_differ_a_little() {
        for _ in 0..100 {
            assert!((0.75..=1.25).contains(&jitter()));
        }
    }

    #[test]
    fn a_connection_that_was_short_is_followed_by_a_wait_and_one_that_was_not_by_none() {
        let (start, mut state) = (Instant::now(), State::default());
        state.lost(start);
        assert_eq!(state.next, None, "the first one");
        for wait in [0.1, 0.2, 0.4] {
            (state.next, state.handed) = (None, Some(start));
            state.lost(start);
            let next = state.next.unwrap().duration_since(start).as_secs_f32();
            assert!((wait * 0.74..wait * 1.26).contains(&next), "{next} s for {wait}");
        }
        (state.next, state.handed) = (None, Some(start));
        state.lost(start + LAST_WAIT);
        assert_eq!((state.next, state.wait), (None, FIRST_WAIT));
    }

    #[test]
    fn what_is_known_is_found_from_any_byte_of_it() {
        let extent = |len, is_hole| Extent { len, is_hole, is_zero: is_hole };
        let extents = vec![extent(100, false), extent(50, true)];
        let looks = Looks { at: 1000, extents, ..Looks::default() };
        assert_eq!(looks.find(999, 10), None);
        assert_eq!(looks.find(1000, 10), Some(extent(10, false)));
        assert_eq!(looks.find(1099, 10), Some(extent(1, false)));
        assert_eq!(looks.find(1100, 100), Some(extent(50, true)));
        assert_eq!(looks.find(1150, 1), None);
    }

    /// What a server of the test does with a question about what is there.
    #[derive(Clone, Copy)]
    enum Manner {
        Data,
        Hole,
        /// A byte of the answer now and then.
        Dribbles,
    }

    /// Serves one client.
    fn serve(stream: &mut TcpStream, manner: Manner) -> io::Result<()> {
        let (name, size) = ("a".to_owned(), 1 << 20);
        let (flags, block) = (can::HAS_FLAGS | can::MULTI_CONN, 512);
        let description = String::new();
        let offer = Offer { name, description, size, flags, block, preferred: 4096 };
        let mut handshake = server::Handshake::new(vec![offer]);
        let (mut bytes, mut there) = ([0; 4096], 0);
        loop {
            while !handshake.output().is_empty() {
                let count = stream.write(handshake.output())?;
                handshake.sent(count);
            }
            if matches!(handshake.outcome(), server::Outcome::Chosen(_)) {
                break;
            }
            // The client says no more than it can know it may.
            there += stream.read(&mut bytes[there..])?;
            let taken = handshake.receive(&bytes[..there]);
            let taken = taken.map_err(|error| io::Error::other(error.0))?;
            bytes.copy_within(taken..there, 0);
            there -= taken;
        }
        let mut request = [0; 32];
        loop {
            stream.read_exact(&mut request)?;
            let asked = Request::parse(&request, Mode::Extended).ok().flatten();
            let asked = asked.ok_or(io::ErrorKind::InvalidData)?;
            let state = if matches!(manner, Manner::Data) { 0 } else { 3 };
            let head = Head::status(Mode::Extended, (asked.cookie, asked.offset), ALLOCATION, 1);
            let extent = Head::extent(Mode::Extended, asked.length, state);
            if matches!(manner, Manner::Dribbles) {
                for byte in head.bytes() {
                    stream.write_all(&[*byte])?;
                    std::thread::sleep(Duration::from_millis(200));
                }
            } else {
                stream.write_all(head.bytes())?;
            }
            stream.write_all(extent.bytes())?;
        }
    }

    /// A server whose connections behave so, one after another.
    fn server_of(manners: &'static [Manner]) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("nbd://{}/a", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for manner in manners {
                let mut stream = listener.accept().unwrap().0;
                std::thread::spawn(move || serve(&mut stream, *manner));
            }
        });
        let patience = Patience { answer: 60, outage: Some(60) };
        let target = Target::At(Uri::parse(&uri).unwrap());
        Server::open((target, Mode::Extended), None, patience).unwrap()
    }

    fn is_hole(server: &Server, seconds: u64) -> Option<bool> {
        let until = Instant::now() + Duration::from_secs(seconds);
        server.look_now(0, 4096, until).map(|list| list[0].is_hole)
    }

    #[test]
    fn after_a_failover_the_old_server_is_not_asked_any_more() {
        // The first connection is a ring's. The second is asked, as long as no ring has lost its.
        let server = server_of(&[Manner::Hole, Manner::Hole, Manner::Data, Manner::Hole]);
        assert_eq!([is_hole(&server, 5), is_hole(&server, 5)], [Some(true), Some(true)]);
        let line = Line::new().unwrap();
        server.shared.wait(&line, Some("gone"));
        assert_eq!(is_hole(&server, 5), Some(false), "the new one knows of data");
        // Nor what was asked before a ring got the connection that it has.
        let link = server.shared.again().unwrap();
        server.shared.hand_over(link);
        let generation = server.shared.generation.load(Ordering::Acquire);
        let born = lock(&server.shared.beside).talk.as_ref().map(|(_, born)| *born);
        assert!(born.is_some_and(|born| born < generation));
    }

    #[test]
    fn a_server_that_dribbles_has_no_longer_than_it_is_given() {
        let server = server_of(&[Manner::Hole, Manner::Dribbles]);
        let start = Instant::now();
        assert_eq!(is_hole(&server, 1), None);
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        // It is left alone for a while.
        assert_eq!(is_hole(&server, 5), None);
        assert!(start.elapsed() < Duration::from_secs(3));
    }
}
