//! Answers for TLS around a socket: the handshake, and what comes after it. Whoever uses it has a
//! socket before and a socket afterwards, from which plain bytes come and to which they go.
//!
//! rustls does the handshake ([`Handshake`]). Then the kernel takes over where it can and that is
//! wanted ([`Session`]), or a thread (`relay`), between the real socket and one end of a pair whose
//! other end is the caller's.
#![forbid(unsafe_code)]

mod files;
mod handshake;
mod kernel;
mod reasons;
mod rehearsal;
mod relay;
mod side;

pub use files::{Certificates, Client, Server};
pub use handshake::{Handshake, Progress, Secured, Way};
pub use kernel::Session;
pub use side::{ClientSide, ServerSide, Side};
