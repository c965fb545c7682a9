//! Answers for the two sides of a connection, which rustls has as two types, as one.

use devsplice_uring::ktls::Cipher;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::UnbufferedStatus;
use rustls::{CipherSuite, CommonState, Error, ExtractedSecrets, ProtocolVersion};

use crate::kernel::Secrets;

/// A client's side.
pub type ClientSide = UnbufferedClientConnection;
/// A server's side.
pub type ServerSide = UnbufferedServerConnection;

/// A side of a connection.
pub trait Side: Send + 'static {
    /// What rustls tells them apart by.
    type Data: Send;

    /// Whether what is on its way is of no use when our end is gone. A server's last answers are;
    /// a client's last requests must not come after what it says over its next connection.
    const DROPS_REST: bool;

    /// Whether the peer may give tickets for later connections: servers may.
    const TAKES_TICKETS: bool;

    /// Takes records, says what is to be done next.
    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8])
    -> UnbufferedStatus<'c, 'i, Self::Data>;

    /// Whether the peers have not agreed yet.
    fn is_handshaking(&self) -> bool;

    /// Whether there is a record to be encoded.
    fn has_record(&self) -> bool;

    /// How records are encrypted, if that is a way that kernels have, with TLS 1.3.
    fn cipher(&self) -> Option<Cipher>;

    /// The keys of both ways, and who knows those that follow.
    ///
    /// # Errors
    /// If the handshake is not over.
    #[allow(private_interfaces)]
    fn into_kernel(self) -> Result<(ExtractedSecrets, Box<dyn Secrets>), Error>;
}

fn cipher(state: &CommonState) -> Option<Cipher> {
    if state.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
        return None;
    }
    match state.negotiated_cipher_suite()?.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => Some(Cipher::Aes128Gcm),
        CipherSuite::TLS13_AES_256_GCM_SHA384 => Some(Cipher::Aes256Gcm),
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => Some(Cipher::Chacha20Poly1305),
        _ => None,
    }
}

impl Side for ServerSide {
    type Data = ServerConnectionData;
    const DROPS_REST: bool = false;
    const TAKES_TICKETS: bool = false;

    fn process<'c, 'i>(
        &'c mut self,
        records: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn is_handshaking(&self) -> bool {
        (**self).is_handshaking()
    }

    fn has_record(&self) -> bool {
        (**self).wants_write()
    }

    fn cipher(&self) -> Option<Cipher> {
        cipher(self)
    }

    #[allow(private_interfaces)]
    fn into_kernel(self) -> Result<(ExtractedSecrets, Box<dyn Secrets>), Error> {
        let (secrets, next) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Box::new(next)))
    }
}

impl Side for ClientSide {
    type Data = ClientConnectionData;
    const DROPS_REST: bool = true;
    const TAKES_TICKETS: bool = true;

    fn process<'c, 'i>(
        &'c mut self,
        records: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn is_handshaking(&self) -> bool {
        (**self).is_handshaking()
    }

    fn has_record(&self) -> bool {
        (**self).wants_write()
    }

    fn cipher(&self) -> Option<Cipher> {
        cipher(self)
    }

    #[allow(private_interfaces)]
    fn into_kernel(self) -> Result<(ExtractedSecrets, Box<dyn Secrets>), Error> {
        let (secrets, next) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Box::new(next)))
    }
}
