//! Answers for certificates and keys in files, named as nbdkit and libnbd name them, and for what
//! rustls makes of them.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devsplice_core::{Error, ErrorKind, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, UnbufferedClientConnection, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};

use crate::keyed::Keyed;
use crate::{ClientSide, Handshake, Keys, ServerSide};

/// Most bytes of a file of certificates.
const MAX_FILE: u64 = 4 << 20;

/// A directory with `ca-cert.pem`, and `ca-crl.pem` where some have been revoked; for a server
/// `server-cert.pem` and `server-key.pem`, for a client that shows who it is `client-cert.pem` and
/// `client-key.pem`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificates(pub PathBuf);

impl Certificates {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn text(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path(name);
        let os = |error: &std::io::Error| Error::os(path.display().to_string(), error);
        let file = std::fs::File::open(&path).map_err(|error| os(&error))?;
        let mut text = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(|error| os(&error))?;
        if text.len() as u64 > MAX_FILE {
            return Err(Error::invalid(path.display().to_string(), "is too large to be a key"));
        }
        Ok(text)
    }

    /// All objects of a kind in a file; one at least.
    fn all<T: PemObject>(&self, name: &str, what: &str) -> Result<Vec<T>> {
        let text = self.text(name)?;
        let wrong = |reason: String| Error::invalid(self.path(name).display().to_string(), reason);
        let all: std::result::Result<Vec<T>, pem::Error> = T::pem_slice_iter(&text).collect();
        let all = all.map_err(|error| wrong(format!("is no PEM: {error}")))?;
        if all.is_empty() { Err(wrong(format!("has no {what} in PEM"))) } else { Ok(all) }
    }

    /// Those whose signature makes a certificate good.
    fn authorities(&self, name: &str) -> Result<RootCertStore> {
        let mut store = RootCertStore::empty();
        let all: Vec<CertificateDer<'static>> = self.all(name, "certificate")?;
        // Systems have some that are not understood, which is no reason to believe none.
        let (known, _) = store.add_parsable_certificates(all);
        if known == 0 {
            let path = self.path(name).display().to_string();
            return Err(Error::invalid(path, "has no certificate that can be used"));
        }
        Ok(store)
    }

    fn wrong(&self, name: &str, error: &rustls::Error) -> Error {
        Error::invalid(self.path(name).display().to_string(), error.to_string())
    }

    fn key(&self, name: &str) -> Result<PrivateKeyDer<'static>> {
        let text = self.text(name)?;
        PrivateKeyDer::from_pem_slice(&text).map_err(|_| {
            let path = self.path(name).display().to_string();
            Error::invalid(path, "has no private key in PEM").next("a key without a passphrase")
        })
    }

    /// Whether there is such a file. One that cannot be looked at is there: whoever reads it says
    /// what is wrong.
    fn has(&self, name: &str) -> bool {
        self.path(name).try_exists().unwrap_or(true)
    }

    /// What is revoked; nothing where there is no such file.
    fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        match self.all("ca-crl.pem", "list of revoked certificates") {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            other => other,
        }
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A server's side of TLS by certificates: what it shows, and whom it lets in.
#[derive(Clone, Debug)]
struct Certified {
    certificates: Certificates,
    verify: bool,
}

impl Certified {
    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>> {
        let roots = Arc::new(self.certificates.authorities("ca-cert.pem")?);
        WebPkiClientVerifier::builder_with_provider(roots, provider())
            .with_crls(self.certificates.revoked()?)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| {
                let path = self.certificates.path("ca-cert.pem");
                Error::invalid(path.display().to_string(), error.to_string())
            })
    }

    fn config(&self) -> Result<Arc<ServerConfig>> {
        let files = &self.certificates;
        let chain = files.all("server-cert.pem", "certificate")?;
        let key = files.key("server-key.pem")?;
        let versions = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| files.wrong("", &error))?;
        let clients = match self.verify {
            true => versions.with_client_cert_verifier(self.verifier()?),
            false => versions.with_no_client_auth(),
        };
        let mut config = clients
            .with_single_cert(chain, key)
            .map_err(|error| files.wrong("server-cert.pem", &error))?;
        // A ticket is a record that is no data, which the kernel does not hand out as such; and
        // connections of disks are made rarely.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.enable_secret_extraction = true;
        Ok(Arc::new(config))
    }
}

/// A server's side of TLS.
#[derive(Clone, Debug)]
pub struct Server(Proof);

/// By what it and its clients are known.
#[derive(Clone, Debug)]
enum Proof {
    Certified(Certified),
    Keys(Keys),
}

impl Server {
    /// Looks at the files. They are read again for each client, so renewed ones need no restart.
    /// With `verify`, clients have to show a certificate by an authority of `ca-cert.pem`.
    ///
    /// # Errors
    /// If a file is missing or is not what it should be; names it.
    pub fn new(certificates: Certificates, verify: bool) -> Result<Server> {
        let certified = Certified { certificates, verify };
        certified.config().map(|_| Server(Proof::Certified(certified)))
    }

    /// For clients that are a user of a file and have its key. It is read again for each of them.
    ///
    /// # Errors
    /// If it is missing or is not what it should be; names it.
    pub fn by_keys(keys: Keys) -> Result<Server> {
        Keyed::server(&keys).map(|_| Server(Proof::Keys(keys)))
    }

    /// Whether clients have to show who they are, and by what.
    #[must_use]
    pub fn verifies(&self) -> Option<&'static str> {
        match &self.0 {
            Proof::Certified(certified) => certified.verify.then_some("tls-verify-peer"),
            Proof::Keys(_) => Some("tls-psk"),
        }
    }

    /// Begins with a client that has connected and expects TLS.
    ///
    /// # Errors
    /// If the files have become bad.
    pub fn accept(&self, socket: OwnedFd) -> Result<Handshake<ServerSide>> {
        let side = match &self.0 {
            Proof::Certified(certified) => {
                let side = UnbufferedServerConnection::new(certified.config()?)
                    .map_err(|error| Error::invalid("TLS", error.to_string()))?;
                ServerSide::Certified(side.into())
            }
            Proof::Keys(keys) => ServerSide::Keyed(Keyed::server(keys)?.into()),
        };
        Ok(Handshake::new(side, socket, "the client"))
    }
}

/// Where systems keep the authorities that they trust.
const SYSTEM: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A client's side of TLS: whom it believes, and what it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Whose certificates are believed, and the client's own; the system's authorities without.
    pub certificates: Option<Certificates>,
    /// Whether the server has to prove that it is who it should be. Without, anybody between can
    /// read and change everything.
    pub verify: bool,
    /// Who it should be: the host that was connected to, or whoever sits there under another name.
    pub name: String,
    /// Who we are by a key that both have: then there are no certificates.
    pub user: Option<(String, Keys)>,
}

impl Client {
    fn authorities(&self) -> Result<(RootCertStore, Certificates)> {
        if let Some(files) = self.certificates.as_ref().filter(|files| files.has("ca-cert.pem")) {
            return Ok((files.authorities("ca-cert.pem")?, files.clone()));
        }
        let Some(path) = SYSTEM.iter().map(Path::new).find(|path| path.exists()) else {
            let reason = "this system has no list of authorities that it trusts";
            return Err(Error::new(ErrorKind::NotFound, "TLS", reason)
                .next("install ca-certificates, or name a directory with ca-cert.pem"));
        };
        let files = Certificates(PathBuf::from("/"));
        let name = path.to_string_lossy();
        Ok((files.authorities(&name)?, files))
    }

    fn verifier(&self) -> Result<Arc<dyn ServerCertVerifier>> {
        if !self.verify {
            return Ok(Arc::new(Anybody(provider())));
        }
        let (roots, files) = self.authorities()?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .with_crls(self.certificates.as_ref().map_or(Ok(Vec::new()), Certificates::revoked)?)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| Error::invalid(files.0.display().to_string(), error.to_string()))?;
        Ok(verifier)
    }

    fn config(&self) -> Result<ClientConfig> {
        if let Some(files) = &self.certificates
            && !files.has("ca-cert.pem")
            && !files.has("client-cert.pem")
        {
            // Without it the system's authorities would be believed instead.
            let reason = "has neither ca-cert.pem nor client-cert.pem";
            return Err(Error::new(ErrorKind::NotFound, files.0.display().to_string(), reason)
                .next("is that the directory with the certificates?"));
        }
        let wrong = |error: &rustls::Error| Error::invalid("TLS", error.to_string());
        let believing = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(&error))?
            .dangerous()
            .with_custom_certificate_verifier(self.verifier()?);
        let own = self.certificates.as_ref().filter(|files| files.has("client-cert.pem"));
        let mut config = match own {
            Some(files) => believing
                .with_client_auth_cert(
                    files.all("client-cert.pem", "certificate")?,
                    files.key("client-key.pem")?,
                )
                .map_err(|error| files.wrong("client-cert.pem", &error))?,
            None => believing.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Ok(config)
    }

    /// Begins with a server that expects TLS.
    ///
    /// # Errors
    /// If a file is missing or is not what it should be; names it. Or if the name is none.
    pub fn connect(&self, socket: OwnedFd) -> Result<Handshake<ClientSide>> {
        if let Some((user, keys)) = &self.user {
            let side = ClientSide::Keyed(Keyed::client(keys, user)?.into());
            return Ok(Handshake::new(side, socket, "the server"));
        }
        let name = ServerName::try_from(self.name.clone())
            .map_err(|_| Error::invalid(&self.name, "is no host name or address"))?;
        let side = UnbufferedClientConnection::new(Arc::new(self.config()?), name)
            .map_err(|error| Error::invalid("TLS", error.to_string()))?;
        Ok(Handshake::new(ClientSide::Certified(side.into()), socket, "the server"))
    }
}

/// Believes any server that has the key of what it shows.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
