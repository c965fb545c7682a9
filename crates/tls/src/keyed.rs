//! Answers for a side that has keys instead of certificates, and for what went wrong with them in
//! words that say who has to do what.

use std::path::PathBuf;

use devsplice_core::{Error, Result};
use devsplice_psk::{Connection, Hello, Refused, Why};

use crate::keys::{Keys, shown};
use crate::side::{Fault, Step, Taken};

/// A side of a connection by a key.
pub struct Keyed {
    connection: Connection,
    /// Where the keys are from.
    file: PathBuf,
    /// The client's name; a server has many.
    user: Option<String>,
    /// The names that a server knows.
    known: Vec<Vec<u8>>,
}

fn broken(keys: &Keys, refused: Refused) -> Error {
    Error::invalid(keys.0.display().to_string(), refused.text)
}

impl Keyed {
    /// A server's side, for any of the users in a file.
    ///
    /// # Errors
    /// If the file is bad.
    pub(crate) fn server(keys: &Keys) -> Result<Keyed> {
        let all = keys.read()?;
        let connection = Connection::server(all.iter().map(|key| (&key.user[..], &key.secret[..])))
            .map_err(|refused| broken(keys, refused))?;
        let known = all.into_iter().map(|key| key.user).collect();
        Ok(Keyed { connection, file: keys.0.clone(), user: None, known })
    }

    /// A client's side, as one of them.
    ///
    /// # Errors
    /// If the file is bad, or has no key of that user.
    pub(crate) fn client(keys: &Keys, user: &str) -> Result<Keyed> {
        let key = keys.of(user)?;
        let connection =
            Connection::client(&key.user, &key.secret).map_err(|refused| broken(keys, refused))?;
        let user = Some(user.to_owned());
        Ok(Keyed { connection, file: keys.0.clone(), user, known: Vec::new() })
    }

    /// As [`crate::Side::agree`].
    pub(crate) fn agree(&mut self, records: &[u8], out: &mut Vec<u8>) -> Taken<Step> {
        if !is_record(records) {
            return (records.len(), Err(Fault::Keyed("speaks no TLS".to_owned())));
        }
        let before = out.len();
        let step = match self.connection.agree(records, out) {
            Ok(true) => {
                self.known = Vec::new();
                Ok(Step::Done)
            }
            // What there is to be sent goes before anything is waited for.
            Ok(false) if out.len() > before => Ok(Step::Again),
            Ok(false) => Ok(Step::Blocked),
            Err(refused) => Err(self.fault(&refused)),
        };
        (records.len(), step)
    }

    /// As [`crate::Side::is_handshaking`].
    pub(crate) fn is_handshaking(&self) -> bool {
        !self.connection.is_agreed()
    }

    /// As [`crate::Side::doubt`].
    pub(crate) fn doubt(&self, has_spoken: bool) -> Option<String> {
        let also = "or have certificates only, or no TLS 1.3";
        match &self.user {
            // GnuTLS says nothing of users and keys that are not to its liking.
            Some(user) => {
                let user = shown(user.as_bytes());
                Some(format!("it may not know {user}, or have another key of that user, {also}"))
            }
            None => has_spoken.then(|| format!("it may have another key, {also}")),
        }
    }

    /// As [`crate::Side::open`].
    pub(crate) fn open(
        &mut self,
        records: &[u8],
        out: &mut Vec<u8>,
        give: &mut dyn FnMut(&[u8]),
    ) -> Taken<bool> {
        let closed = self.connection.open(records, out, give);
        (records.len(), closed.map_err(|refused| self.fault(&refused)))
    }

    /// As [`crate::Side::seal`].
    pub(crate) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Taken<()> {
        if plain.is_empty() {
            self.connection.close(out);
            return (0, Ok(()));
        }
        let sealed = self.connection.seal(plain, out);
        (0, sealed.map_err(|refused| self.fault(&refused)))
    }

    fn fault(&self, refused: &Refused) -> Fault {
        let reason = match &refused.why {
            Why::Hello(hello) => self.hello(hello, &refused.text),
            Why::NoKey => {
                let text = &refused.text;
                format!("has not agreed by the key (it may have certificates only): {text}")
            }
            Why::Alert(code) => format!("says: {}", said(*code)),
            Why::Other => format!("does not go on in TLS: {}", refused.text),
        };
        Fault::Keyed(reason)
    }

    /// Why a client is refused that has said this.
    fn hello(&self, hello: &Hello, text: &str) -> String {
        let file = self.file.display();
        let Some(user) = &hello.user else {
            return match hello.has_tls13 {
                true => format!("has no key of a user in {file} (certificates only?)"),
                false => {
                    "speaks no TLS 1.3, and keys of users (PSK) go with no older one".to_owned()
                }
            };
        };
        // A long name is cut, and so may be a known one's beginning.
        match self.known.iter().any(|known| known == user) {
            true => {
                format!("says that it is {}, and has another key than {file}: {text}", shown(user))
            }
            false => format!("says that it is {}, of whom {file} has no key", shown(user)),
        }
    }
}

/// Whether that is one whole record, or nothing: what cannot be one is shown as it is, and s2n-tls
/// would wait for the rest.
fn is_record(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [kind, _, _, high, low, body @ ..] => {
            (20..=24).contains(kind) && body.len() == usize::from(u16::from_be_bytes([*high, *low]))
        }
        _ => false,
    }
}

fn said(alert: u8) -> String {
    let words = match alert {
        40 => "no version, cipher or key suits both (it may have certificates only)",
        47 | 51 | 115 => "no such user, or another key",
        70 => "no version of TLS in common (keys of users need TLS 1.3 here)",
        116 => "you have to show a certificate",
        other => return format!("alert {other}"),
    };
    words.to_owned()
}
