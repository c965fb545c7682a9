//! Answers for the options of TLS.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::nbd::{Certificates, Secure, Server, Tls};
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
    /// Whether NBD clients speak TLS [default: require with --tls-certificates, else off].
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
    /// Have the kernel encrypt and decrypt where it can: TLS 1.3 over TCP, from Linux 6.14 on with
    /// the module tls.
    #[arg(long)]
    #[serde(default)]
    pub tls_kernel: bool,
    /// Keys of users instead of certificates: not to be had here, see docs/nbd.md.
    #[arg(long, value_name = "FILE", hide = true)]
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
            ("--tls-kernel", self.tls_kernel),
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
        if let Some(file) = &self.tls_psk {
            let reason = "TLS with keys of users (PSK) cannot be done: rustls has none";
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("--tls-psk {}", file.display()),
                reason,
            )
            .next("use certificates: --tls-certificates DIR --tls-verify-peer"));
        }
        let policy = match (self.tls, &self.tls_certificates) {
            (Some(TlsChoice::Off), _) | (None, None) => Tls::Off,
            (Some(TlsChoice::On), _) => Tls::Offered,
            (Some(TlsChoice::Require) | None, _) => Tls::Required,
        };
        match (policy, &self.tls_certificates) {
            (Tls::Off, _) if self.tls_verify_peer => {
                Err(Error::invalid("--tls-verify-peer", "there is no TLS in which to verify")
                    .next("--tls require --tls-certificates DIR"))
            }
            (Tls::Off, _) if self.tls_kernel => {
                Err(Error::invalid("--tls-kernel", "there is no TLS for the kernel to do")
                    .next("--tls require --tls-certificates DIR"))
            }
            (Tls::Off, _) => Ok(None),
            (_, None) => Err(Error::invalid("--tls", "there is no certificate to show")
                .next("--tls-certificates DIR, with server-cert.pem and server-key.pem")),
            (policy, Some(dir)) => {
                let files = Certificates(here.join(dir));
                let server = Server::new(files, self.tls_verify_peer)?;
                Ok(Some(Secure { policy, server, by_kernel: self.tls_kernel }))
            }
        }
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
            (TlsOptions { tls_psk: dir.clone(), ..plain.clone() }, "--tls-psk"),
            (TlsOptions { tls_verify_peer: true, ..plain.clone() }, "--tls-verify-peer"),
            (TlsOptions { tls_kernel: true, ..plain.clone() }, "--tls-kernel"),
            (TlsOptions { tls: Some(TlsChoice::On), ..plain.clone() }, "--tls"),
            (TlsOptions { tls_certificates: dir, ..plain.clone() }, "/does/not/exist"),
        ] {
            let error = options.secure(Path::new("/")).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
            assert!(options.first().is_some());
        }
    }
}
