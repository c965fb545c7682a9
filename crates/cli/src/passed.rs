//! Answers for what whoever started this process has passed on (`LISTEN_FDS`, see
//! sd_listen_fds(3)): sockets that systemd listens at already, and what it has kept for a unit.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use devsplice_core::{Error, ErrorKind, Result};
use rustix::net::sockopt::socket_acceptconn;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// How an address begins that means such sockets.
pub const SCHEME: &str = "systemd:";
/// The first number that they have.
const FIRST: i32 = 3;
/// Most of them.
const MOST: usize = 4096;

/// Names, and sockets that are listened at.
static PASSED: OnceLock<Vec<(String, OwnedFd)>> = OnceLock::new();

/// Takes what was passed, if it was to this process: its children, which serve, have another
/// number. Early, for who is shut in may not any more.
pub fn take() {
    let Some(all) = passed() else { return };
    let Ok(own) = pidfd_open(getpid(), PidfdFlags::empty()) else { return };
    let copy = |(name, number)| {
        let fd = pidfd_getfd(&own, number, PidfdGetfdFlags::empty()).ok()?;
        // systemd keeps other things for a unit as well.
        (socket_acceptconn(&fd) == Ok(true)).then_some((name, fd))
    };
    let _ = PASSED.set(all.into_iter().filter_map(copy).collect());
}

/// The numbers of what was passed to this process by that name.
pub fn numbers(name: &str) -> Vec<i32> {
    let all = passed().unwrap_or_default().into_iter();
    all.filter(|(one, _)| one == name).map(|(_, number)| number).collect()
}

/// What was passed to this very process.
fn passed() -> Option<Vec<(String, i32)>> {
    let get = |name: &str| std::env::var(name).unwrap_or_default();
    let is_ours = get("LISTEN_PID") == std::process::id().to_string();
    is_ours.then(|| named(&get("LISTEN_FDS"), &get("LISTEN_FDNAMES")))
}

fn named(count: &str, names: &str) -> Vec<(String, i32)> {
    let count = count.parse().unwrap_or(0_usize).min(MOST);
    let names = names.split(':').chain(std::iter::repeat("")).map(str::to_owned);
    names.zip(FIRST..).take(count).collect()
}

/// The sockets that the address means: those of the name behind `systemd:`, or all.
///
/// # Errors
/// If there are none.
pub fn sockets(address: &str) -> Result<Vec<OwnedFd>> {
    let wanted = address.strip_prefix(SCHEME).unwrap_or(address);
    let all = PASSED.get().into_iter().flatten();
    let meant = all.filter(|(name, _)| wanted.is_empty() || wanted == name);
    let copies: std::io::Result<Vec<OwnedFd>> = meant.map(|(_, fd)| fd.try_clone()).collect();
    let found = copies.map_err(|error| Error::os(address, &error))?;
    if !found.is_empty() {
        return Ok(found);
    }
    let reason = match PASSED.get() {
        None => "nobody has passed a socket to this process (LISTEN_PID, LISTEN_FDS)",
        Some(_) => "no socket of this name that is listened at was passed (LISTEN_FDNAMES)",
    };
    Err(Error::new(ErrorKind::Invalid, address, reason)
        .next("start it by a .socket unit; see docs/nbd.md"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_names_that_were_given() {
        let found = |count, names| named(count, names);
        let pair = |name: &str, number| (name.to_owned(), number);
        assert_eq!(found("2", "a:b"), [pair("a", 3), pair("b", 4)]);
        assert_eq!(found("2", "a"), [pair("a", 3), pair("", 4)]);
        assert_eq!(found("1", "a:b:c"), [pair("a", 3)]);
        assert_eq!(found("1", ""), [pair("", 3)]);
        for count in ["", "0", "-1", "x"] {
            assert!(found(count, "a").is_empty(), "{count}");
        }
        assert_eq!(found("99999999", "").len(), MOST);
    }

    #[test]
    fn who_was_passed_nothing_is_told_so() {
        let said = sockets("systemd:web").unwrap_err().to_string();
        assert!(said.starts_with("systemd:web") && said.contains("LISTEN_FDS"), "{said}");
    }
}
