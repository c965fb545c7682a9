//! Answers for a connection: which key it is by, and what of TLS is let through.

use std::task::{Poll, Waker};

use s2n_tls::config::{Builder, Config};
use s2n_tls::connection;
use s2n_tls::enums::{Blinding, Mode, PskHmac};
use s2n_tls::error::Error;
use s2n_tls::psk::Psk;
use s2n_tls::security::Policy;
use zeroize::Zeroizing;

use crate::hello::Hello;
use crate::users::{User, Users};
use crate::wire::Wire;

/// TLS 1.3 with AES-GCM and ChaCha20-Poly1305, X25519 and the NIST curves, and no older version:
/// a numbered policy of s2n-tls, which does not change.
const POLICY: &str = "AWS-CRT-SDK-TLSv1.3-2023";
/// Plain bytes of a record at most (RFC 8446, section 5.1).
const RECORD: usize = 16 << 10;
/// A record that has an alert and is not encrypted: fatal, of the kind that is put at its end.
const ALERT: [u8; 6] = [21, 3, 3, 0, 2, 2];
/// `decrypt_error`: for a user that is not known as for one with another key, so that nobody learns
/// which there are (RFC 8446, section 6.2).
const DECRYPT_ERROR: u8 = 51;
const PROTOCOL_VERSION: u8 = 70;
const HANDSHAKE_FAILURE: u8 = 40;

/// What is wrong with a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It has said first what does not do; a client.
    Hello(Hello),
    /// It has agreed by something else than a key.
    NoKey,
    /// It says so, by an alert of this number (RFC 8446, section 6).
    Alert(u8),
    /// Anything else.
    Other,
}

/// A connection that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What is known of the reason.
    pub why: Why,
    /// In the library's words.
    pub text: String,
}

/// A side of a connection.
pub struct Connection {
    wire: Wire,
    mode: Mode,
    is_agreed: bool,
    /// Whether anything was sent, and so what comes next may have to be encrypted.
    has_spoken: bool,
    plain: Box<[u8]>,
}

fn refused(error: &Error) -> Refused {
    Refused { why: Why::Other, text: format!("{} ({})", error.message(), error.name()) }
}

fn config() -> Result<Builder, Error> {
    let mut config = Builder::new();
    config.set_security_policy(&Policy::from_version(POLICY)?)?;
    // No certificate is believed: without a key there is nobody.
    config.with_system_certs(false)?;
    // What failed is told at once. A delay would hide how long it took where padding is checked
    // (CBC), which no cipher of TLS 1.3 has; keys are too long to be guessed.
    config.set_max_blinding_delay(0)?;
    Ok(config)
}

pub(crate) fn key(user: &[u8], secret: &[u8]) -> Result<Psk, Error> {
    let mut psk = Psk::builder()?;
    // What GnuTLS takes keys for, and RFC 8446 where nothing is said (section 4.2.11).
    psk.set_identity(user)?.set_secret(secret)?.set_hmac(PskHmac::SHA256)?;
    psk.build()
}

impl Connection {
    /// The library's part, without I/O.
    fn library(mode: Mode, config: Config) -> Result<connection::Connection, Error> {
        let mut connection = connection::Connection::new(mode);
        connection.set_config(config)?.set_blinding(Blinding::SelfService)?;
        connection.prefer_throughput()?;
        // Its callbacks are asked for one; they never wait.
        connection.set_waker(Some(Waker::noop()))?;
        Ok(connection)
    }

    fn with(mode: Mode, connection: connection::Connection) -> Result<Connection, Error> {
        let plain = vec![0; RECORD].into();
        let wire = Wire::new(connection)?;
        Ok(Connection { wire, mode, is_agreed: false, has_spoken: false, plain })
    }

    /// A server's side, for clients that are one of these users and have its key. It is looked for
    /// by the first [`crate::MAX_NAMES`] names that a client has. Whoever names a
    /// user that comes twice here, or whose key is shorter than [`crate::MIN_KEY`] or all zeros, is
    /// refused.
    ///
    /// # Errors
    /// If the library has no memory.
    pub fn server<'a>(
        keys: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Result<Connection, Refused> {
        let own = |(user, secret): (&[u8], &[u8])| -> User {
            (user.to_vec(), Zeroizing::new(secret.to_vec()))
        };
        let users = Users::new(keys.into_iter().map(own).collect());
        let server = || {
            let mut config = config()?;
            config.set_client_hello_callback(users)?;
            Connection::with(Mode::Server, Connection::library(Mode::Server, config.build()?)?)
        };
        server().map_err(|error| refused(&error))
    }

    /// A client's side.
    ///
    /// # Errors
    /// If the key is shorter than [`crate::MIN_KEY`] or all zeros.
    pub fn client(user: &[u8], secret: &[u8]) -> Result<Connection, Refused> {
        let client = || {
            let mut connection = Connection::library(Mode::Client, config()?.build()?)?;
            connection.append_psk(&key(user, secret)?)?;
            Connection::with(Mode::Client, connection)
        };
        client().map_err(|error| refused(&error))
    }

    /// Whether the peers have agreed.
    #[must_use]
    pub fn is_agreed(&self) -> bool {
        self.is_agreed
    }

    fn put(&mut self, records: &[u8], out: &mut Vec<u8>) {
        let mut bytes = self.wire.bytes();
        let taken = std::mem::take(&mut bytes.taken);
        bytes.incoming.drain(..taken);
        bytes.incoming.extend_from_slice(records);
        std::mem::swap(&mut bytes.outgoing, out);
    }

    fn take(&mut self, out: &mut Vec<u8>, before: usize) {
        std::mem::swap(&mut self.wire.bytes().outgoing, out);
        self.has_spoken |= out.len() > before;
    }

    /// Goes on with a handshake; whether it is done. What is to be sent is put behind `out`, also
    /// if it has failed.
    ///
    /// # Errors
    /// If there will be no agreement.
    pub fn agree(&mut self, records: &[u8], out: &mut Vec<u8>) -> Result<bool, Refused> {
        let before = out.len();
        self.put(records, out);
        let result = match self.wire.negotiate() {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(())) => match self.wire.name_length() {
                Ok(1..) => Ok(true),
                _ => Err(Refused { why: Why::NoKey, text: "without one".to_owned() }),
            },
            Poll::Ready(Err(error)) => Err(self.why(&error)),
        };
        let result = result.inspect_err(|refused| self.alert(refused));
        self.take(out, before);
        self.is_agreed = matches!(result, Ok(true));
        result
    }

    fn why(&self, error: &Error) -> Refused {
        let mut refused = refused(error);
        if let Some(alert) = self.wire.alert() {
            refused.why = Why::Alert(alert);
        } else if matches!(self.mode, Mode::Server) && !self.is_agreed {
            refused.why =
                self.wire.hello().map_or(Why::Other, |hello| Why::Hello(Hello::read(&hello)));
        } else if !self.is_agreed && self.wire.name_length().is_ok_and(|length| length == 0) {
            refused.why = Why::NoKey;
        }
        refused
    }

    /// Has the peer told that it is over.
    fn alert(&mut self, refused: &Refused) {
        let code = match &refused.why {
            Why::Alert(_) => return,
            Why::Hello(hello) if !hello.has_tls13 => PROTOCOL_VERSION,
            Why::Hello(hello) if !hello.users.is_empty() => DECRYPT_ERROR,
            _ => HANDSHAKE_FAILURE,
        };
        if matches!(self.mode, Mode::Server) && !self.has_spoken {
            let mut bytes = self.wire.bytes();
            bytes.outgoing.extend(ALERT);
            bytes.outgoing.push(code);
        } else {
            self.wire.shut_down();
        }
    }

    /// Decrypts records as far as they have come, also half ones; whether the peer has said that
    /// nothing more comes. All of them are taken.
    ///
    /// # Errors
    /// If something is wrong with them.
    pub fn open(
        &mut self,
        records: &[u8],
        out: &mut Vec<u8>,
        give: &mut dyn FnMut(&[u8]),
    ) -> Result<bool, Refused> {
        let before = out.len();
        self.put(records, out);
        let result = loop {
            match self.wire.receive(&mut self.plain) {
                Poll::Ready(Ok(0)) => break Ok(true),
                Poll::Ready(Ok(count)) => give(&self.plain[..count]),
                Poll::Pending => break Ok(false),
                Poll::Ready(Err(error)) => break Err(self.why(&error)),
            }
        };
        let result = result.inspect_err(|refused| self.alert(refused));
        self.take(out, before);
        result
    }

    /// Encrypts.
    ///
    /// # Errors
    /// If the connection is over.
    pub fn seal(&mut self, mut plain: &[u8], out: &mut Vec<u8>) -> Result<(), Refused> {
        let before = out.len();
        self.put(&[], out);
        let mut result = Ok(());
        while !plain.is_empty() && result.is_ok() {
            result = match self.wire.send(plain) {
                Poll::Ready(Ok(count)) if count > 0 => {
                    plain = &plain[count..];
                    Ok(())
                }
                Poll::Ready(Err(error)) => Err(self.why(&error)),
                // There is always room.
                _ => Err(Refused { why: Why::Other, text: "TLS does not go on".to_owned() }),
            };
        }
        self.take(out, before);
        result
    }

    /// Has the peer told that nothing more comes from here.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        let before = out.len();
        self.put(&[], out);
        self.wire.shut_down();
        self.take(out, before);
    }
}
