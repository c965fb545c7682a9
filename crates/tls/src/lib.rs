//! Answers for TLS around a socket: the handshake, and what comes after it. Whoever uses it has a
//! socket before and a socket afterwards, from which plain bytes come and to which they go.
//!
//! rustls does the handshake ([`Handshake`]) with certificates, s2n-tls (`devsplice-psk`) with keys
//! that both sides have. Then a thread takes over (`relay`), between the real
//! socket and one end of a pair whose other end is the caller's.
#![forbid(unsafe_code)]

mod certified;
mod files;
mod handshake;
#[cfg_attr(not(feature = "psk"), path = "keyless.rs")]
mod keyed;
mod keys;
mod reasons;
mod relay;
mod side;

pub use files::{Certificates, Client, Server};
pub use handshake::{Handshake, Progress, Secured, Way};
pub use keyed::Keyed;
pub use keys::{Key, Keys, parse as parse_keys};
pub use side::{ClientSide, Fault, ServerSide, Side, Step, Taken};
