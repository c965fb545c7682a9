//! Answers for the options of TLS.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use devsplice_core::{Error, Result};
use devsplice_exports::nbd::{Certificates, Keys, Secure, Server, Tls};
use serde::{Deserialize, Serialize};

/// Whether NBD clients speak TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsChoice {
    /// No.
    Off,
    /// Those that want to.
    On,
    /// All have to.
    Require,
}

/// TLS for a disk that is reached by NBD.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
pub struct TlsOptions {
    /// Whether NBD clients speak TLS [default: require with --tls-certificates or --tls-psk, else
    /// off].
    #[arg(long, value_enum)]
    #[serde(default)]
    pub tls: Option<TlsChoice>,
    /// Where ca-cert.pem, server-cert.pem and server-key.pem are, and ca-crl.pem if there is one.
    #[arg(long, value_name = "DIR")]
    #[serde(default)]
    pub tls_certificates: Option<PathBuf>,
    /// Let in only clients with a certificate by the authority in ca-cert.pem.
    #[arg(long)]
    #[serde(default)]
    pub tls_verify_peer: bool,
    /// Let in only clients that are a user in this file and have its key: lines of USER:KEY, as
    /// psktool writes them. Nobody else may be able to read it.
    #[arg(long, value_name = "FILE")]
    #[serde(default)]
    pub tls_psk: Option<PathBuf>,
}

impl TlsOptions {
    /// The first option that was given.
    pub fn first(&self) -> Option<&'static str> {
        [
            ("--tls", self.tls.is_some()),
            ("--tls-certificates", self.tls_certificates.is_some()),
            ("--tls-verify-peer", self.tls_verify_peer),
            ("--tls-psk", self.tls_psk.is_some()),
        ]
        .into_iter()
        .find_map(|(option, is_there)| is_there.then_some(option))
    }

    /// What they mean; the files are looked at.
    ///
    /// # Errors
    /// If they make no sense together, or the files none.
    pub fn secure(&self, here: &Path) -> Result<Option<Secure>> {
        if self.tls_psk.is_some() && (self.tls_certificates.is_some() || self.tls_verify_peer) {
            let reason = "clients are known by keys or by certificates, not by both";
            return Err(Error::invalid("--tls-psk", reason)
                .next("leave --tls-certificates and --tls-verify-peer out, or --tls-psk"));
        }
        let is_there = self.tls_certificates.is_some() || self.tls_psk.is_some();
        let policy = match (self.tls, is_there) {
            (Some(TlsChoice::Off), _) | (None, false) => Tls::Off,
            (Some(TlsChoice::On), _) => Tls::Offered,
            (Some(TlsChoice::Require) | None, _) => Tls::Required,
        };
        if policy == Tls::Off {
            return match self.tls_verify_peer {
                true => {
                    Err(Error::invalid("--tls-verify-peer", "there is no TLS in which to verify")
                        .next("--tls require --tls-certificates DIR"))
                }
                false => Ok(None),
            };
        }
        let server = match (&self.tls_certificates, &self.tls_psk) {
            (Some(dir), _) => Server::new(Certificates(here.join(dir)), self.tls_verify_peer)?,
            (None, Some(file)) => Server::by_keys(Keys(here.join(file)))?,
            (None, None) => {
                return Err(Error::invalid("--tls", "there is no certificate to show, and no key")
                    .next("--tls-certificates DIR with server-cert.pem, or --tls-psk FILE"));
            }
        };
        Ok(Some(Secure { policy, server }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_make_no_sense_are_refused_by_name() {
        let plain = TlsOptions::default();
        assert!(plain.secure(Path::new("/")).unwrap().is_none() && plain.first().is_none());
        let dir = Some(PathBuf::from("/does/not/exist"));
        for (options, name) in [
            (
                TlsOptions { tls_psk: dir.clone(), tls_certificates: dir.clone(), ..plain.clone() },
                "--tls-psk",
            ),
            (
                TlsOptions { tls_psk: dir.clone(), tls_verify_peer: true, ..plain.clone() },
                "--tls-psk",
            ),
            (TlsOptions { tls_psk: dir.clone(), ..plain.clone() }, "/does/not/exist"),
            (TlsOptions { tls_verify_peer: true, ..plain.clone() }, "--tls-verify-peer"),
            (TlsOptions { tls: Some(TlsChoice::On), ..plain.clone() }, "--tls"),
            (TlsOptions { tls_certificates: dir, ..plain.clone() }, "/does/not/exist"),
        ] {
            let error = options.secure(Path::new("/")).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
            assert!(options.first().is_some());
        }
    }
}
