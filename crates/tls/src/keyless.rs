//! Answers for sides with keys where there are none: built without the feature `psk`.

use devsplice_core::{Error, ErrorKind, Result};

use crate::keys::Keys;
use crate::side::{Step, Taken};

/// A side of a connection by a key, which nobody has here.
pub enum Keyed {}

impl Keyed {
    /// None.
    ///
    /// # Errors
    /// Always.
    pub(crate) fn server(keys: &Keys) -> Result<Keyed> {
        let reason = "this devsplice was built without TLS with keys of users (PSK)";
        Err(Error::new(ErrorKind::Unsupported, keys.0.display().to_string(), reason)
            .next("build it with --features psk, or use certificates"))
    }

    /// None.
    ///
    /// # Errors
    /// Always.
    pub(crate) fn client(keys: &Keys, _: &str) -> Result<Keyed> {
        Keyed::server(keys)
    }

    /// As [`crate::Side::agree`].
    pub(crate) fn agree(&mut self, _: &[u8], _: &mut Vec<u8>) -> Taken<Step> {
        match *self {}
    }

    /// As [`crate::Side::is_handshaking`].
    pub(crate) fn is_handshaking(&self) -> bool {
        match *self {}
    }

    /// As [`crate::Side::doubt`].
    pub(crate) fn doubt(&self, _: bool) -> Option<String> {
        match *self {}
    }

    /// As [`crate::Side::open`].
    pub(crate) fn open(
        &mut self,
        _: &[u8],
        _: &mut Vec<u8>,
        _: &mut dyn FnMut(&[u8]),
    ) -> Taken<bool> {
        match *self {}
    }

    /// As [`crate::Side::seal`].
    pub(crate) fn seal(&mut self, _: &[u8], _: &mut Vec<u8>) -> Taken<()> {
        match *self {}
    }
}
