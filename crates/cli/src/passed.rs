//! Answers for what whoever started this process has passed on (`LISTEN_FDS`, see
//! sd_listen_fds(3)): sockets that systemd listens at already, and what it has kept for a unit.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_uring::fds;
use rustix::net::sockopt::socket_acceptconn;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// How an address begins that means such sockets.
pub const SCHEME: &str = "systemd:";
/// The first number that they have.
const FIRST: i32 = 3;
/// Most of them.
const MOST: usize = 4096;

/// Sockets that are listened at.
static PASSED: OnceLock<Mutex<Vec<Passed>>> = OnceLock::new();

/// A socket, which one disk at a time accepts clients from.
struct Passed {
    name: String,
    fd: OwnedFd,
    /// The disk, and what it has of the socket as long as it is there.
    user: (String, Weak<OwnedFd>),
}

/// Takes what was passed, if it was to this process: its children, which serve, have another
/// number. Early, for who is shut in may not any more.
pub fn take() {
    let Some(all) = passed() else { return };
    // They stay open, for `numbers`; programs that are started are not to have them.
    all.iter().for_each(|(_, number)| fds::keep_to_ourselves(*number));
    let Ok(own) = pidfd_open(getpid(), PidfdFlags::empty()) else { return };
    let copy = |(name, number)| {
        let fd = pidfd_getfd(&own, number, PidfdGetfdFlags::empty()).ok()?;
        // systemd keeps other things for a unit as well.
        let user = Default::default();
        (socket_acceptconn(&fd) == Ok(true)).then_some(Passed { name, fd, user })
    };
    let _ = PASSED.set(Mutex::new(all.into_iter().filter_map(copy).collect()));
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

/// The sockets that the address means: those of the name behind `systemd:`, or all. They are
/// `disk`'s until what is given here is dropped; without a name it is only seen whether they can be
/// had.
///
/// # Errors
/// If there are none, or one is another disk's.
pub fn sockets(address: &str, disk: &str) -> Result<Vec<Arc<OwnedFd>>> {
    if let Some(all) = PASSED.get() {
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        let found = give(&mut all, address, disk)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let reason = match PASSED.get() {
        None => "nobody has passed a socket to this process (LISTEN_PID, LISTEN_FDS)",
        Some(_) => "no socket of this name that is listened at was passed (LISTEN_FDNAMES)",
    };
    Err(Error::new(ErrorKind::Invalid, address, reason)
        .next("start it by a .socket unit; see docs/nbd.md"))
}

fn give(all: &mut [Passed], address: &str, disk: &str) -> Result<Vec<Arc<OwnedFd>>> {
    let wanted = address.strip_prefix(SCHEME).unwrap_or(address);
    let meant = |one: &&mut Passed| wanted.is_empty() || wanted == one.name;
    let mut found = Vec::new();
    for one in all.iter_mut().filter(meant) {
        let (user, of) = &one.user;
        if of.strong_count() > 0 {
            let reason = format!("the socket `{}` is disk {user}'s", one.name);
            return Err(Error::new(ErrorKind::Busy, address, reason)
                .next("--listen systemd:NAME of another one, or del that disk first"));
        }
        let copy = one.fd.try_clone().map_err(|error| Error::os(address, &error))?;
        let copy = Arc::new(copy);
        if !disk.is_empty() {
            one.user = (disk.to_owned(), Arc::downgrade(&copy));
        }
        found.push(copy);
    }
    Ok(found)
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
        let said = sockets("systemd:web", "d").unwrap_err().to_string();
        assert!(said.starts_with("systemd:web") && said.contains("LISTEN_FDS"), "{said}");
    }

    #[test]
    fn a_socket_is_one_disks_until_that_is_gone() {
        let passed = |name: &str| {
            let fd = std::io::pipe().unwrap().0.into();
            Passed { name: name.to_owned(), fd, user: Default::default() }
        };
        let mut all = [passed("a"), passed("b")];
        assert_eq!(give(&mut all, "systemd:", "").unwrap().len(), 2, "it is only asked");
        let first = give(&mut all, "systemd:b", "one").unwrap();
        for address in ["systemd:", "systemd:b"] {
            let error = give(&mut all, address, "two").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert!(error.to_string().contains("disk one's"), "{error}");
        }
        // What was refused has kept nothing.
        assert_eq!(give(&mut all, "systemd:a", "two").unwrap().len(), 1);
        drop(first);
        assert_eq!(give(&mut all, "systemd:", "two").unwrap().len(), 2);
    }
}
