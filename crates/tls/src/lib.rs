//! Answers for TLS around a socket: the handshake, and what comes after it. Whoever uses it has a
//! socket before and a socket afterwards, from which plain bytes come and to which they go.
//!
//! rustls does the handshake ([`Handshake`]). Then a thread takes over (`relay`), between the real
//! socket and one end of a pair whose other end is the caller's.
#![forbid(unsafe_code)]

mod files;
mod handshake;
mod reasons;
mod relay;
mod side;

pub use files::{Certificates, Client, Server};
pub use handshake::{Handshake, Progress, Secured, Way};
pub use side::{ClientSide, ServerSide, Side};
