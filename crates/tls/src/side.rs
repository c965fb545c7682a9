//! Answers for the two sides of a connection, which rustls has as two types, as one.

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::UnbufferedStatus;

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

    /// Takes records, says what is to be done next.
    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8])
    -> UnbufferedStatus<'c, 'i, Self::Data>;

    /// Whether the peers have not agreed yet.
    fn is_handshaking(&self) -> bool;

    /// Whether there is a record to be encoded.
    fn has_record(&self) -> bool;
}

impl Side for ServerSide {
    type Data = ServerConnectionData;
    const DROPS_REST: bool = false;

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
}

impl Side for ClientSide {
    type Data = ClientConnectionData;
    const DROPS_REST: bool = true;

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
}
