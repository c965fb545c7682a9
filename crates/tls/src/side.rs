//! Answers for what a handshake and a relay need of the library that does TLS, for both sides of a
//! connection: bytes in, bytes out, and no I/O.

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;

use crate::certified;
use crate::keyed::Keyed;
use crate::reasons;

/// What comes next in a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It goes on without anything from the peer.
    Again,
    /// A record has to come.
    Blocked,
    /// Both agree.
    Done,
}

/// Why there is no connection, or no more of it.
#[derive(Debug)]
pub enum Fault {
    /// rustls says it.
    Rustls(rustls::Error),
    /// So does whoever works with keys, without the name of the peer that is in front of it.
    Keyed(String),
}

impl Fault {
    /// In words; `theirs` is what the peer is called.
    pub(crate) fn reason(&self, theirs: &str) -> String {
        match self {
            Fault::Rustls(error) => reasons::reason(error, theirs),
            Fault::Keyed(reason) => format!("{theirs} {reason}"),
        }
    }
}

impl From<rustls::Error> for Fault {
    fn from(error: rustls::Error) -> Fault {
        Fault::Rustls(error)
    }
}

/// Bytes at the front of what was given that are done with, and what has come of them. Where that
/// is a fault, what the peer is to be told of it is behind `out`.
pub type Taken<T> = (usize, Result<T, Fault>);

/// A side of a connection. What is to be sent is put behind what is in `out` already.
pub trait Side: Send + 'static {
    /// Whether what is on its way is of no use when our end is gone. A server's last answers are;
    /// a client's last requests must not come after what it says over its next connection.
    const DROPS_REST: bool;

    /// One step of a handshake; `records` are whole, and those that it is not done with are shown
    /// again.
    fn agree(&mut self, records: &mut [u8], out: &mut Vec<u8>) -> Taken<Step>;

    /// Whether the peers have not agreed yet.
    fn is_handshaking(&self) -> bool;

    /// What a peer may not like that says nothing of it and goes, if it has said anything at all or
    /// not.
    fn doubt(&self, has_spoken: bool) -> Option<String>;

    /// Decrypts all records that are there whole; whether the peer has said that it was the last.
    fn open(
        &mut self,
        records: &mut [u8],
        out: &mut Vec<u8>,
        give: &mut dyn FnMut(&[u8]),
    ) -> Taken<bool>;

    /// Encrypts; no bytes are the end. `records` is what [`Side::open`] was not done with.
    fn seal(&mut self, records: &mut [u8], plain: &[u8], out: &mut Vec<u8>) -> Taken<()>;
}

/// A server's side.
pub enum ServerSide {
    /// With certificates.
    Certified(Box<UnbufferedServerConnection>),
    /// With a key that both have.
    Keyed(Box<Keyed>),
}

/// A client's side.
pub enum ClientSide {
    /// With certificates.
    Certified(Box<UnbufferedClientConnection>),
    /// With a key that both have.
    Keyed(Box<Keyed>),
}

/// Each of the two as whichever library it is.
macro_rules! side {
    ($side:ident, $drops_rest:literal) => {
        impl Side for $side {
            const DROPS_REST: bool = $drops_rest;

            fn agree(&mut self, records: &mut [u8], out: &mut Vec<u8>) -> Taken<Step> {
                match self {
                    $side::Certified(side) => certified::agree(&mut **side, records, out),
                    $side::Keyed(side) => side.agree(records, out),
                }
            }

            fn is_handshaking(&self) -> bool {
                match self {
                    $side::Certified(side) => side.is_handshaking(),
                    $side::Keyed(side) => side.is_handshaking(),
                }
            }

            fn doubt(&self, has_spoken: bool) -> Option<String> {
                match self {
                    $side::Certified(_) => has_spoken.then(|| certified::DOUBT.to_owned()),
                    $side::Keyed(side) => side.doubt(has_spoken),
                }
            }

            fn open(
                &mut self,
                records: &mut [u8],
                out: &mut Vec<u8>,
                give: &mut dyn FnMut(&[u8]),
            ) -> Taken<bool> {
                match self {
                    $side::Certified(side) => certified::open(&mut **side, records, out, give),
                    $side::Keyed(side) => side.open(records, out, give),
                }
            }

            fn seal(&mut self, records: &mut [u8], plain: &[u8], out: &mut Vec<u8>) -> Taken<()> {
                match self {
                    $side::Certified(side) => certified::seal(&mut **side, records, plain, out),
                    $side::Keyed(side) => side.seal(plain, out),
                }
            }
        }
    };
}

side!(ServerSide, false);
side!(ClientSide, true);
