//! Answers for what reaches a server: signals, its control socket, the end of a disk's threads. And
//! for clients of the socket that are many, slow, silent, or not meant to be there.

use std::io::{ErrorKind as Io, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use devsplice_core::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use serde_json::{Value, json};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::hall::Hall;
use crate::rpc::{self, After, Said};

/// Most bytes of one request, or of one batch of them.
pub const MAX_REQUEST: usize = 2 << 20;
/// Clients that are served at a time; what comes beyond is told so and sent away.
pub const MAX_CLIENTS: usize = 64;
/// How long a client may take to send a request once it has begun, or to take an answer.
pub const CLIENT_PATIENCE: Duration = Duration::from_secs(5);
/// How long a client may say nothing.
pub const CLIENT_SILENCE: Duration = Duration::from_secs(60);
/// How often a follower of events is looked at: it may be gone.
const LOOK: Duration = Duration::from_secs(1);

/// What reaches the main thread.
pub enum News {
    /// A signal.
    Signal(i32),
    /// The I/O threads of this disk and number have ended.
    Ended(String, u32),
    /// Something was asked for that may be the end of this process, and the answer is out.
    Asked(After),
}

/// Where a server listens.
pub struct Ears {
    listener: UnixListener,
    signals: Signals,
}

impl Ears {
    /// Opens the control socket at `path` and takes the signals. Nothing is served yet.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn open(path: &std::path::Path) -> Result<Ears> {
        let _ = std::fs::remove_file(path);
        // Nobody else may connect, not even for the moment until its mode is set.
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let listener = UnixListener::bind(path);
        rustix::process::umask(before);
        let listener = listener.map_err(|error| Error::os(path.display().to_string(), &error))?;
        let signals = Signals::new([SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGCHLD])
            .map_err(|error| Error::os("signal handlers", &error))?;
        Ok(Ears { listener, signals })
    }

    /// From now on, what is asked of `hall` is done.
    pub fn listen(self, hall: &Arc<Hall>, news: &Sender<News>) {
        let Ears { listener, mut signals } = self;
        devsplice_backends::nbd::nothing_more_is_given();
        let out = news.clone();
        spawn("signals", move || {
            for signal in signals.forever() {
                let _ = out.send(News::Signal(signal));
            }
        });
        let (hall, news) = (Arc::clone(hall), news.clone());
        spawn("control", move || accept(&listener, &hall, &news));
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> bool {
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(512 << 10);
    match thread.spawn(body) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("devsplice: thread {name}: {error}");
            false
        }
    }
}

/// One of the clients that are served; gives its place back.
struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn accept(listener: &UnixListener, hall: &Arc<Hall>, news: &Sender<News>) {
    let taken = Arc::new(AtomicUsize::new(0));
    for client in listener.incoming() {
        let Ok(client) = client else {
            // Too many files are open, for example: it may be better in a moment.
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        if !is_allowed(&client) {
            continue;
        }
        let seat = Seat(Arc::clone(&taken));
        if taken.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
            let _ = client.set_nonblocking(true);
            let text = format!("more than {MAX_CLIENTS} clients; try again later");
            let _ = (&client).write_all(rpc::refusal(&text).as_bytes());
            continue;
        }
        let (hall, news) = (Arc::clone(hall), news.clone());
        spawn("client", move || {
            let _seat = seat;
            let _ = converse(&client, &hall, &news);
        });
    }
}

/// Root, or who this process runs as: nobody else gets a byte, whatever the socket's mode has
/// become.
fn is_allowed(client: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(client)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// Serves a client until it goes, errs or says nothing for long.
fn converse(client: &UnixStream, hall: &Hall, news: &Sender<News>) -> std::io::Result<()> {
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut kept = Vec::new();
    loop {
        let line = match next_line(client, &mut kept) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == Io::FileTooLarge => {
                let text = format!("more than {MAX_REQUEST} bytes in a request");
                return send(client, &rpc::refusal(&text));
            }
            Err(error) => return Err(error),
        };
        let Said { answer, after } = rpc::answer(hall, &line, &|| has_closed(client));
        let sent = answer.map_or(Ok(()), |answer| send(client, &answer));
        match after {
            After::Nothing => sent?,
            After::Follow(since) => {
                sent?;
                return follow(client, hall, since);
            }
            // Done is done, whether the client has heard of it or not.
            other => {
                let _ = news.send(News::Asked(other));
                sent?;
            }
        }
    }
}

/// The next line of a client, without its end; `kept` is what has come of the one after it.
fn next_line(mut client: &UnixStream, kept: &mut Vec<u8>) -> std::io::Result<Option<Vec<u8>>> {
    let mut looked = 0;
    let mut end = Instant::now() + if kept.is_empty() { CLIENT_SILENCE } else { CLIENT_PATIENCE };
    let mut room = [0; 4096];
    loop {
        if let Some(at) = kept[looked..].iter().position(|byte| *byte == b'\n') {
            let rest = kept.split_off(looked + at + 1);
            let mut line = std::mem::replace(kept, rest);
            line.pop();
            return Ok(Some(line));
        }
        looked = kept.len();
        if looked > MAX_REQUEST {
            return Err(Io::FileTooLarge.into());
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Io::TimedOut.into());
        }
        client.set_read_timeout(Some(left))?;
        let count = match client.read(&mut room) {
            Ok(count) => count,
            Err(error) if error.kind() == Io::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if count == 0 {
            // What has no end of a line is a request all the same if the client says no more.
            let rest = std::mem::take(kept);
            return Ok(Some(rest).filter(|rest| !rest.is_empty()));
        }
        if kept.is_empty() {
            end = Instant::now() + CLIENT_PATIENCE;
        }
        kept.extend_from_slice(&room[..count]);
    }
}

/// Sends in one write; for at most the client's patience, however slowly it reads.
fn send(mut client: &UnixStream, line: &str) -> std::io::Result<()> {
    let end = Instant::now() + CLIENT_PATIENCE;
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Io::TimedOut.into());
        }
        client.set_write_timeout(Some(left))?;
        match client.write(rest) {
            Ok(0) => return Err(Io::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == Io::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Sends events until the client goes or falls too far behind.
fn follow(client: &UnixStream, hall: &Hall, since: Option<u64>) -> std::io::Result<()> {
    let (events, last) = hall.common.bus.follow(since);
    send(client, &rpc::line(&rpc::note("following", &json!({ "last": last }))))?;
    loop {
        match events.recv_timeout(LOOK) {
            Ok(event) => send(client, &rpc::line(&rpc::note("event", &event)))?,
            Err(RecvTimeoutError::Timeout) if is_gone(client) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let text: Value = json!({ "text": "too far behind: some events are lost" });
                return send(client, &rpc::line(&rpc::note("lost", &text)));
            }
        }
    }
}

/// Whether a client has closed its connection. One that says no more may wait for an answer still:
/// its end is shut for what it would send alone.
fn has_closed(client: &UnixStream) -> bool {
    let mut ends = [PollFd::new(client, PollFlags::empty())];
    let count = poll(&mut ends, Some(&Timespec::default()));
    count.is_ok_and(|count| count > 0)
        && ends[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Whether a client that is not expected to say anything has closed its end.
fn is_gone(mut client: &UnixStream) -> bool {
    let mut byte = [0];
    if client.set_nonblocking(true).is_err() {
        return true;
    }
    let read = client.read(&mut byte);
    let is_open = client.set_nonblocking(false).is_ok();
    // What it says is not listened to any more.
    !is_open || matches!(read, Ok(0)) || read.is_err_and(|error| error.kind() != Io::WouldBlock)
}
