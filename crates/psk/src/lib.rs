//! Answers for TLS 1.3 with keys that both sides have beforehand (PSK), by s2n-tls: a connection as
//! bytes in and bytes out, without I/O and without files. Only what was agreed on by such a key,
//! and with a key exchange beside it (`psk_dhe_ke`), is a connection.

mod connection;
mod hello;
mod wire;

pub use connection::{Connection, Refused, Why};
pub use hello::{Hello, MAX_SHOWN};

/// Bytes of the shortest key: what s2n-tls takes, after RFC 9257, section 6.
pub const MIN_KEY: usize = 16;
