//! Answers for what rustls makes of records, as a handshake and a relay need it.

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};

use crate::handshake::CONTROL;
use crate::side::{Step, Taken};

/// Bytes that encrypting what is taken at a time adds at most: a record each 16 KiB.
pub(crate) const OVERHEAD: usize = 4 << 10;

/// GnuTLS says nothing when a certificate is not to its liking.
pub(crate) const DOUBT: &str = "it may not trust the certificate that it was shown";

/// A connection of rustls, which has two types of them.
pub(crate) trait Unbuffered {
    /// What rustls tells them apart by.
    type Data;

    /// Takes records, says what is to be done next.
    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8])
    -> UnbufferedStatus<'c, 'i, Self::Data>;

    /// Whether the peers have not agreed yet.
    fn handshakes(&self) -> bool;

    /// Whether there is a record to be encoded.
    fn has_record(&self) -> bool;
}

impl Unbuffered for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        records: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn handshakes(&self) -> bool {
        self.is_handshaking()
    }

    fn has_record(&self) -> bool {
        self.wants_write()
    }
}

impl Unbuffered for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        records: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn handshakes(&self) -> bool {
        self.is_handshaking()
    }

    fn has_record(&self) -> bool {
        self.wants_write()
    }
}

/// One step of a handshake.
pub(crate) fn agree<C: Unbuffered>(
    side: &mut C,
    records: &mut [u8],
    out: &mut Vec<u8>,
) -> Taken<Step> {
    let (discard, result) = step(side, records, out);
    match result {
        Ok(Step::Blocked) if !side.handshakes() => (discard, Ok(Step::Done)),
        Ok(step) => (discard, Ok(step)),
        Err(error) => (alert(side, discard, records, out), Err(error.into())),
    }
}

/// One state of rustls.
fn step<C: Unbuffered>(
    side: &mut C,
    records: &mut [u8],
    out: &mut Vec<u8>,
) -> (usize, Result<Step, rustls::Error>) {
    let status = side.process(records);
    let step = match status.state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(out, CONTROL, |room| data.encode(room)).map(|()| Step::Again)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // `out` has it, and goes first.
            data.done();
            Ok(Step::Again)
        }
        // A server may write before it knows the client, which it does not.
        Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => {
            Ok(Step::Blocked)
        }
        // Nothing else can come before the end.
        Ok(_) => Err(rustls::Error::HandshakeNotComplete),
        Err(error) => Err(error),
    };
    (status.discard, step)
}

/// Has the peer told why there will be nothing; the bytes that are done with then.
fn alert<C: Unbuffered>(
    side: &mut C,
    mut taken: usize,
    records: &mut [u8],
    out: &mut Vec<u8>,
) -> usize {
    // Asked for more than the alert, rustls would look at the wrong bytes again.
    while side.has_record() {
        let status = side.process(&mut records[taken..]);
        let Ok(ConnectionState::EncodeTlsData(mut data)) = status.state else { break };
        if encode(out, CONTROL, |room| data.encode(room)).is_err() {
            break;
        }
        taken += status.discard;
    }
    taken
}

/// Decrypts all records that are there whole.
pub(crate) fn open<C: Unbuffered>(
    side: &mut C,
    records: &mut [u8],
    out: &mut Vec<u8>,
    give: &mut dyn FnMut(&[u8]),
) -> Taken<bool> {
    let (mut taken, mut is_closed) = (0, false);
    loop {
        let status = side.process(&mut records[taken..]);
        let is_over = match status.state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
                match traffic.next_record() {
                    Some(Ok(record)) => give(record.payload),
                    Some(Err(error)) => break Err(error),
                    None => break Ok(false),
                }
            },
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(out, CONTROL, |room| data.encode(room)).map(|()| false)
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Ok(false)
            }
            Ok(ConnectionState::PeerClosed) => {
                is_closed = true;
                Ok(false)
            }
            Ok(_) => Ok(true),
            Err(error) => Err(error),
        };
        taken += status.discard;
        match is_over {
            Ok(false) => {}
            Ok(true) => return (taken, Ok(is_closed)),
            Err(error) => return (alert(side, taken, records, out), Err(error.into())),
        }
    }
}

/// Encrypts; no bytes are the end.
pub(crate) fn seal<C: Unbuffered>(
    side: &mut C,
    records: &mut [u8],
    plain: &[u8],
    out: &mut Vec<u8>,
) -> Taken<()> {
    let mut taken = 0;
    for _ in 0..8 {
        let status = side.process(&mut records[taken..]);
        let mut is_done = false;
        let result = match status.state {
            Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                is_done = true;
                if plain.is_empty() {
                    encode(out, CONTROL, |room| traffic.queue_close_notify(room))
                } else {
                    encode(out, plain.len() + OVERHEAD, |room| traffic.encrypt(plain, room))
                }
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(out, CONTROL, |room| data.encode(room))
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Ok(())
            }
            Ok(ConnectionState::PeerClosed) => Ok(()),
            // Both ends have been told; nothing can be said any more.
            Ok(_) => {
                is_done = true;
                Ok(())
            }
            Err(error) => Err(error),
        };
        taken += status.discard;
        match result {
            Ok(()) if !is_done => {}
            result => return (taken, result.map_err(Into::into)),
        }
    }
    (taken, Err(rustls::Error::General("TLS does not go on".to_owned()).into()))
}

/// Has rustls put a record behind what is there already.
fn encode<E: Encoding>(
    to: &mut Vec<u8>,
    expected: usize,
    mut put: impl FnMut(&mut [u8]) -> Result<usize, E>,
) -> Result<(), rustls::Error> {
    let at = to.len();
    let mut room = expected;
    // The second time it has said how much it needs.
    for _ in 0..2 {
        to.resize(at + room, 0);
        match put(&mut to[at..]) {
            Ok(count) => {
                to.truncate(at + count);
                return Ok(());
            }
            Err(error) => room = error.needs()?,
        }
    }
    Err(rustls::Error::General("a record that has no size".to_owned()))
}

/// Why rustls has not put a record where it should.
trait Encoding {
    /// The room that it needs, if that is why.
    fn needs(&self) -> Result<usize, rustls::Error>;
}

impl Encoding for EncodeError {
    fn needs(&self) -> Result<usize, rustls::Error> {
        match self {
            EncodeError::InsufficientSize(size) => Ok(size.required_size),
            other => Err(rustls::Error::General(other.to_string())),
        }
    }
}

impl Encoding for EncryptError {
    fn needs(&self) -> Result<usize, rustls::Error> {
        match self {
            EncryptError::InsufficientSize(size) => Ok(size.required_size),
            other => Err(rustls::Error::General(other.to_string())),
        }
    }
}
