//! Answers for a connection: which key it is by, and what of TLS is let through.

use std::task::Poll;

use s2n_tls::config::{Builder, Config};
use s2n_tls::connection;
use s2n_tls::enums::{Blinding, Mode, PskHmac};
use s2n_tls::error::Error;
use s2n_tls::psk::Psk;
use s2n_tls::security::Policy;

use crate::hello::Hello;
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

fn config() -> Result<Config, Error> {
    let mut config = Builder::new();
    config.set_security_policy(&Policy::from_version(POLICY)?)?;
    // No certificate is believed: without a key there is nobody.
    config.with_system_certs(false)?;
    // What failed is told at once. A delay would hide how long it took where padding is checked
    // (CBC), which no cipher of TLS 1.3 has; keys are too long to be guessed.
    config.set_max_blinding_delay(0)?;
    config.build()
}

fn key(user: &[u8], secret: &[u8]) -> Result<Psk, Error> {
    let mut psk = Psk::builder()?;
    // What GnuTLS takes keys for, and RFC 8446 where nothing is said (section 4.2.11).
    psk.set_identity(user)?.set_secret(secret)?.set_hmac(PskHmac::SHA256)?;
    psk.build()
}

impl Connection {
    fn new<'a>(
        mode: Mode,
        keys: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Result<Connection, Error> {
        let mut connection = connection::Connection::new(mode);
        connection.set_config(config()?)?.set_blinding(Blinding::SelfService)?;
        connection.prefer_throughput()?;
        for (user, secret) in keys {
            connection.append_psk(&key(user, secret)?)?;
        }
        let plain = vec![0; RECORD].into();
        let wire = Wire::new(connection)?;
        Ok(Connection { wire, mode, is_agreed: false, has_spoken: false, plain })
    }

    /// A server's side, for clients that are one of these users and have its key. They are compared
    /// with each, in the same time.
    ///
    /// # Errors
    /// If a user comes twice, or a key is shorter than [`crate::MIN_KEY`] or all zeros.
    pub fn server<'a>(
        keys: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Result<Connection, Refused> {
        Connection::new(Mode::Server, keys).map_err(|error| refused(&error))
    }

    /// A client's side.
    ///
    /// # Errors
    /// As [`Connection::server`].
    pub fn client(user: &[u8], secret: &[u8]) -> Result<Connection, Refused> {
        Connection::new(Mode::Client, [(user, secret)]).map_err(|error| refused(&error))
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
        let result = match self.wire.connection.poll_negotiate() {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(_)) => match self.wire.connection.negotiated_psk_identity_length() {
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
        let connection = &self.wire.connection;
        if let Some(alert) = connection.alert() {
            refused.why = Why::Alert(alert);
        } else if matches!(self.mode, Mode::Server) && !self.is_agreed {
            let message = connection.client_hello().and_then(|hello| hello.raw_message());
            refused.why = message.map_or(Why::Other, |hello| Why::Hello(Hello::read(&hello)));
        } else if !self.is_agreed
            && connection.negotiated_psk_identity_length().is_ok_and(|length| length == 0)
        {
            refused.why = Why::NoKey;
        }
        refused
    }

    /// Has the peer told that it is over.
    fn alert(&mut self, refused: &Refused) {
        let code = match &refused.why {
            Why::Alert(_) => return,
            Why::Hello(hello) if !hello.has_tls13 => PROTOCOL_VERSION,
            Why::Hello(Hello { user: Some(_), .. }) => DECRYPT_ERROR,
            _ => HANDSHAKE_FAILURE,
        };
        if matches!(self.mode, Mode::Server) && !self.has_spoken {
            let mut bytes = self.wire.bytes();
            bytes.outgoing.extend(ALERT);
            bytes.outgoing.push(code);
        } else {
            let _ = self.wire.connection.poll_shutdown_send();
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
            match self.wire.connection.poll_recv(&mut self.plain) {
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
            result = match self.wire.connection.poll_send(plain) {
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
        let _ = self.wire.connection.poll_shutdown_send();
        self.take(out, before);
    }
}
