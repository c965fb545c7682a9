//! Answers for exports of NBD servers as bottoms: what may be said of one, how it is opened.
//!
//! Data does not come through here: each I/O thread's ring has a connection of its own
//! (`uring/ring/remote`), which is made here.

mod captive;
mod connect;
mod given;
mod server;
mod talk;

use std::path::Path;
use std::sync::Arc;

use devsplice_core::limits::{MAX_BLOCK, SECTOR};
use devsplice_core::{Args, Errno, Error, Key, Kind, Limits, Result, Source};
use devsplice_nbd::Mode;
use devsplice_nbd::client::Agreed;
use devsplice_nbd::uri::Uri;
use devsplice_nbd::wire::can;
use devsplice_uring::{Patience, Remote};

pub use given::{note_what_is_given, nothing_more_is_given};
pub use server::Server;

use crate::{Access, Body, Opened};
use captive::Captive;
use connect::Target;
use given::Given;

/// `nbd(uri)`.
pub const SOURCE: Source = Source {
    name: "nbd",
    about: "an export of an NBD server",
    keys: &[
        Key::required(
            "uri",
            Kind::Text,
            "where it is: nbd://..., nbd+unix://..., fd:N, [ COMMAND ]",
        ),
        Key::optional("readonly", Kind::Switch, "change nothing (off)"),
        Key::optional("connections", Kind::Count, "most connections (one a thread)"),
        Key::optional("replies", Kind::Text, "`simple`, or what it has: `best` (best)"),
        Key::optional("timeout", Kind::Duration, "give a silent connection up (60s; 0: never)"),
        Key::optional("reconnect-delay", Kind::Duration, "how long requests wait for one (60s)"),
        Key::optional("on-loss", Kind::Text, "then they `fail`, or wait on: `hold` (fail)"),
    ],
    main_key: Some("uri"),
    anchored: Some(anchored),
};

/// Where nothing else is said, in seconds.
const ANSWER: u32 = 60;
const OUTAGE: u32 = 60;

/// The same address, seen from the root.
fn anchored(uri: &str, here: &Path) -> String {
    Uri::parse(uri).map_or_else(|_| uri.to_owned(), |uri| uri.anchored(here).to_string())
}

/// Whether what is in it is still there when our process is not.
pub(crate) fn outlives_process(args: &Args) -> bool {
    !args.text("uri").is_some_and(|uri| uri.starts_with('[') || is_given(uri))
}

/// A socket that this process was started with.
fn is_given(uri: &str) -> bool {
    uri.starts_with("fd:")
}

/// Opens one.
///
/// # Errors
/// If the address is none, the server cannot be reached, has no such export, or one that is no
/// disk.
pub fn open(args: &Args, access: Access) -> Result<Opened> {
    let uri = args.text("uri").unwrap_or_default();
    let mut patience = patience(args)?;
    let target = match uri.starts_with('[') {
        true => Target::Captive(Captive::start(uri)?),
        false if is_given(uri) => {
            if args.text("on-loss") == Some("hold") {
                let reason =
                    "`hold` waits for a connection, and none comes after one that was given";
                return Err(Error::invalid("on-loss", reason)
                    .next("leave it out, or give an address, nbd://..., instead of fd:N"));
            }
            patience.outage = Some(0);
            Target::Given(Given::take(uri)?)
        }
        false => {
            let here =
                std::env::current_dir().map_err(|error| Error::os("current directory", &error))?;
            let uri = Uri::parse(uri)?.anchored(&here);
            if uri.by_kernel() {
                // I/O threads are confined when they begin.
                devsplice_uring::ktls::want();
            }
            Target::At(uri)
        }
    };
    let connections = args.count("connections")?;
    let connections = connections.map(|count| u16::try_from(count).unwrap_or(u16::MAX));
    let server = Server::open((target, mode(args)?), connections, patience)?;
    let name = server.name().to_owned();
    let limits = limits(server.agreed()).map_err(|error| error.within(&name))?;
    let asked = args.switch("readonly")?.unwrap_or(false);
    let read_only = limits.read_only || asked || access == Access::Read;
    let limits = Limits { read_only, ..limits };
    Ok(Opened { body: Body::Server(Arc::new(server)), limits, warnings: Vec::new() })
}

/// How the server is to answer, at best.
fn mode(args: &Args) -> Result<Mode> {
    match args.text("replies") {
        None | Some("best") => Ok(Mode::Extended),
        Some("simple") => Ok(Mode::Simple),
        Some(other) => {
            let reason = format!("`{other}` is neither simple nor best");
            Err(Error::invalid("replies", reason).next("replies=simple, or leave it out"))
        }
    }
}

fn patience(args: &Args) -> Result<Patience> {
    const SECOND: u64 = 1_000_000_000;
    let seconds = |key: &str, otherwise: u32| -> Result<u32> {
        let ns = args.duration_ns(key)?;
        Ok(ns.map_or(otherwise, |ns| u32::try_from(ns.div_ceil(SECOND)).unwrap_or(u32::MAX)))
    };
    let (answer, outage) = (seconds("timeout", ANSWER)?, seconds("reconnect-delay", OUTAGE)?);
    let outage = match args.text("on-loss") {
        None | Some("fail") => Some(outage),
        Some("hold") => None,
        Some(other) => {
            let reason = format!("`{other}` is neither fail nor hold");
            return Err(Error::invalid("on-loss", reason).next("on-loss=fail or on-loss=hold"));
        }
    };
    Ok(Patience { answer, outage })
}

fn limits(agreed: &Agreed) -> Result<Limits> {
    let Agreed { block, preferred, size, flags, .. } = *agreed;
    if block > MAX_BLOCK {
        let reason = format!("has blocks of {block} bytes, a disk's are {MAX_BLOCK} at most");
        return Err(Error::invalid("export", reason)
            .next("nbdkit's --filter=blocksize serves smaller ones"));
    }
    let block = block.max(SECTOR);
    if size == 0 || !size.is_multiple_of(u64::from(block)) {
        let reason = format!("its size, {size} bytes, is no multiple of the {block}-byte block");
        return Err(Error::invalid("export", reason)
            .next("nbdkit's --filter=truncate round-up=512 fills it up"));
    }
    let has = |flag: u16| flags & flag != 0;
    let physical = preferred.clamp(block, MAX_BLOCK);
    let physical = if physical.is_power_of_two() { physical } else { block };
    let limits = Limits {
        block,
        physical,
        io_min: physical,
        discard: if has(can::TRIM) { physical } else { 0 },
        write_zeroes: has(can::WRITE_ZEROES),
        // What knows when zeroing takes as long as writing is taken for what is quicker than that:
        // it costs this side a command in any case.
        fast_zeroes: has(can::WRITE_ZEROES) && has(can::FAST_ZERO),
        read_only: has(can::READ_ONLY),
        volatile_cache: has(can::FLUSH),
        fua: has(can::FUA),
        rotational: has(can::ROTATIONAL),
        ..Limits::ideal(size)
    };
    limits.checked()
}

/// Reads metadata, blocking.
pub(crate) fn read_at(server: &Server, at: u64, into: &mut [u8]) -> Result<(), Errno> {
    server.with_talk(|talk| talk.read_at(at, into)).unwrap_or(Err(Errno::EBUSY))
}

/// Writes metadata, durably, blocking.
pub(crate) fn write_at(server: &Server, at: u64, from: &[u8]) -> Result<(), Errno> {
    server.with_talk(|talk| talk.write_at(at, from)).unwrap_or(Err(Errno::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_knows_when_zeroing_is_slow_is_taken_for_quick() {
        for (more, is_fast) in [(0, false), (can::FAST_ZERO, true)] {
            let flags = can::HAS_FLAGS | can::WRITE_ZEROES | can::TRIM | more;
            let agreed = Agreed {
                mode: Mode::Simple,
                flags,
                size: 1 << 20,
                block: 512,
                preferred: 4096,
                most: 1 << 20,
                allocation: None,
            };
            let limits = limits(&agreed).unwrap();
            assert_eq!((limits.fast_zeroes, limits.discard), (is_fast, 4096));
        }
    }
}
