//! Answers for TLS by the kernel after the handshake: keys are handed over, and what is no data,
//! alerts, tickets and new keys, is seen to here.
//!
//! Nobody but the kernel sees data. It encrypts what is sent in records of at most 16 KiB; how many
//! there were is counted from above, as rustls does not count any more.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use devsplice_core::{Error, Result};
use devsplice_uring::ktls::{self, Cipher, Direction, Records};
use rustix::io::Errno;
use rustls::kernel::KernelConnection;
use rustls::{AlertDescription, ConnectionTrafficSecrets};

use crate::reasons::reason;
use crate::side::Side;

/// Records with one pair of keys: AES-GCM is good for 2^24.5 of them (RFC 8446, section 5.5). From
/// the first on new keys are tried for, and with the last the connection ends.
const RENEW_AT: u64 = 1 << 22;
const END_AT: u64 = 1 << 23;
/// Records that are no data which a peer may send in a time.
const MOST_ASIDES: u32 = 100;
const WINDOW: Duration = Duration::from_secs(1);
/// Bytes of a record, at most.
const MAX_PLAIN: usize = (16 << 10) + 256;

/// Types of messages (RFC 8446, section 4).
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
/// A `KeyUpdate` that asks for none.
const OWN_UPDATE: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];
/// A warning, `close_notify`.
const CLOSE: [u8; 2] = [1, 0];
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;

/// Who knows the next keys.
pub(crate) trait Secrets: Send {
    /// Those that follow; their records are counted from the number.
    fn next(
        &mut self,
        way: Direction,
    ) -> std::result::Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
}

impl<Data: Send> Secrets for KernelConnection<Data> {
    fn next(
        &mut self,
        way: Direction,
    ) -> std::result::Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match way {
            Direction::Send => self.update_tx_secret(),
            Direction::Receive => self.update_rx_secret(),
        }
    }
}

/// A connection whose records the kernel encrypts and decrypts.
pub struct Session {
    secrets: Box<dyn Secrets>,
    theirs: &'static str,
    /// The peer is one that may give tickets.
    takes_tickets: bool,
    /// Records that were no data, since when.
    asides: u32,
    since: Instant,
    /// Records with the keys of now, at most, and how many there may be before they are renewed.
    records: u64,
    renew_at: u64,
    /// The peer wants others.
    is_asked: bool,
    is_closed: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TLS by the kernel, {} records", self.records)
    }
}

impl Session {
    fn new<S: Side>(secrets: Box<dyn Secrets>, theirs: &'static str) -> Session {
        Session {
            secrets,
            theirs,
            takes_tickets: S::TAKES_TICKETS,
            asides: 0,
            since: Instant::now(),
            records: 0,
            renew_at: RENEW_AT,
            is_asked: false,
            is_closed: false,
        }
    }

    fn wrong(&self, what: &str) -> String {
        format!("TLS: {} {what}", self.theirs)
    }

    fn next_keys(
        &mut self,
        way: Direction,
        socket: BorrowedFd<'_>,
    ) -> std::result::Result<(), String> {
        let (number, secrets) =
            self.secrets.next(way).map_err(|error| self.wrong(&format!("has no keys: {error}")))?;
        hand_over(socket, way, number, &secrets)
            .map_err(|errno| self.wrong(&format!("cannot have new keys: {errno}")))
    }

    fn alert(&self, record: &[u8]) -> std::result::Result<bool, String> {
        match *record {
            [_, CLOSE_NOTIFY] => Ok(false),
            [_, USER_CANCELED] => Ok(true),
            [_, what] => {
                let error = rustls::Error::AlertReceived(AlertDescription::from(what));
                Err(format!("TLS: {}", reason(&error, self.theirs)))
            }
            _ => Err(self.wrong("sends an alert that is none")),
        }
    }

    /// Looks at messages that come after the handshake. A message in parts is not taken.
    fn messages(
        &mut self,
        record: &[u8],
        socket: BorrowedFd<'_>,
    ) -> std::result::Result<(), String> {
        let mut rest = record;
        while let [kind, a, b, c, behind @ ..] = rest {
            let len = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let Some((message, behind)) = behind.split_at_checked(len) else {
                return Err(self.wrong("sends a message in parts"));
            };
            match (*kind, message) {
                // A ticket would be for a next connection, of which disks have few.
                (NEW_SESSION_TICKET, _) if self.takes_tickets => {}
                // What comes behind it has other keys, so it ends its record.
                (KEY_UPDATE, [asks @ 0..=1]) if behind.is_empty() => {
                    self.is_asked |= *asks == 1;
                    self.next_keys(Direction::Receive, socket)?;
                }
                (kind, _) => {
                    return Err(self.wrong(&format!("sends a message that may not come, {kind}")));
                }
            }
            rest = behind;
        }
        if rest.is_empty() { Ok(()) } else { Err(self.wrong("sends a message in parts")) }
    }
}

impl Records for Session {
    fn hear(&mut self, socket: BorrowedFd<'_>) -> std::result::Result<bool, String> {
        if self.since.elapsed() >= WINDOW {
            (self.since, self.asides) = (Instant::now(), 0);
        }
        self.asides += 1;
        if self.asides > MOST_ASIDES {
            return Err(self.wrong("speaks of nothing but TLS"));
        }
        let mut room = [0; MAX_PLAIN];
        let (kind, len) = match ktls::receive(socket, &mut room) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
            Err(errno) => return Err(self.wrong(&format!("sends what is no record: {errno}"))),
        };
        let record = &room[..len];
        match kind {
            None if len == 0 => Ok(false),
            Some(ktls::ALERT) => self.alert(record),
            Some(ktls::HANDSHAKE) if len > 0 => self.messages(record, socket).map(|()| true),
            Some(ktls::DATA) if len == 0 => Ok(true),
            _ => Err(self.wrong("sends a record that may not come")),
        }
    }

    fn sent(&mut self, bytes: u64) {
        // One that the send ended early, and the full ones.
        self.records = self.records.saturating_add(1 + (bytes >> 14));
    }

    fn is_due(&self) -> bool {
        self.is_asked || self.records >= self.renew_at
    }

    fn renew(&mut self, socket: BorrowedFd<'_>) -> std::result::Result<(), String> {
        match ktls::send(socket, ktls::HANDSHAKE, &OWN_UPDATE) {
            Ok(()) => {
                self.next_keys(Direction::Send, socket)?;
                (self.is_asked, self.records) = (false, 0);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::NOMEM | Errno::NOBUFS)
                if self.records < END_AT =>
            {
                Ok(())
            }
            Err(errno) => Err(self.wrong(&format!("cannot be told of new keys: {errno}"))),
        }
    }

    fn close(&mut self, socket: BorrowedFd<'_>) -> bool {
        // What fails otherwise is a connection that nobody is at any more.
        self.is_closed = self.is_closed
            || !matches!(ktls::send(socket, ktls::ALERT, &CLOSE), Err(Errno::AGAIN | Errno::INTR));
        self.is_closed
    }
}

/// Gives the kernel keys of one way.
fn hand_over(
    socket: BorrowedFd<'_>,
    way: Direction,
    number: u64,
    secrets: &ConnectionTrafficSecrets,
) -> std::result::Result<(), Errno> {
    let (cipher, key, nonce) = match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Cipher::Aes128Gcm, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Cipher::Aes256Gcm, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            (Cipher::Chacha20Poly1305, key, iv)
        }
        _ => return Err(Errno::OPNOTSUPP),
    };
    let keys = ktls::Keys { cipher, key: key.as_ref(), nonce: nonce.as_ref(), number };
    ktls::set_keys(socket, way, &keys)
}

/// Hands a connection over whose handshake is done.
///
/// # Errors
/// If the kernel refuses; the connection is of no use then.
pub(crate) fn begin<S: Side>(
    side: S,
    socket: BorrowedFd<'_>,
    theirs: &'static str,
) -> Result<Session> {
    let (secrets, next) = side
        .into_kernel()
        .map_err(|error| Error::invalid("TLS by the kernel", error.to_string()))?;
    let os = |errno: Errno| Error::os("TLS by the kernel", &errno.into());
    ktls::attach(socket).map_err(os)?;
    for (way, (number, secrets)) in
        [(Direction::Send, &secrets.tx), (Direction::Receive, &secrets.rx)]
    {
        hand_over(socket, way, *number, secrets).map_err(os)?;
    }
    Ok(Session::new::<S>(next, theirs))
}

/// Whether the kernel does all that is needed with such a socket and cipher.
pub(crate) fn can(socket: &OwnedFd, cipher: Cipher) -> bool {
    use std::os::fd::AsFd;
    ktls::is_tcp(socket.as_fd()) && crate::rehearsal::can(cipher)
}

#[cfg(test)]
mod tests;
