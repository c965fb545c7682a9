//! Answers for servers behind a socket that this process was started with, `fd:N`: whoever started
//! it has connected. Such a socket leads to its server once.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_uring::fds;
use rustix::net::{SocketType, getpeername, sockopt};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// Numbers in what is asked are no longer those of whoever started this process.
static IS_OVER: AtomicBool = AtomicBool::new(false);
/// Those that this process was started with, and that nobody has taken yet.
static NUMBERS: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Notes which descriptors this process was started with. To be called before it opens any: other
/// numbers are its own.
pub fn note_what_is_given() {
    let Ok(entries) = std::fs::read_dir(FDS) else { return };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut numbers: Vec<i32> = numbers.filter(|number| *number > 2).collect();
    // That of the directory was among them, and is not there any more.
    numbers.retain(|number| std::fs::read_link(format!("{FDS}/{number}")).is_ok());
    *lock(&NUMBERS) = numbers;
}

const FDS: &str = "/proc/self/fd";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on what is opened is said by others than who started this process: a number that they
/// give would be a descriptor of this process's own.
pub fn nothing_more_is_given() {
    IS_OVER.store(true, Ordering::Release);
}

/// A socket, and the export that is asked for behind it.
pub(super) struct Given {
    text: String,
    pub(super) export: String,
    /// Until it is used.
    socket: Mutex<Option<OwnedFd>>,
}

impl Given {
    /// Takes the socket that `fd:N` or `fd:N/EXPORT` names.
    ///
    /// # Errors
    /// If that is no number, or no connected socket of whoever started this process.
    pub(super) fn take(text: &str) -> Result<Given> {
        let rest = text.strip_prefix("fd:").unwrap_or(text);
        let (number, export) = rest.split_once('/').unwrap_or((rest, ""));
        let Some(number) = number.parse::<i32>().ok().filter(|number| *number > 2) else {
            let reason = "is no number of a socket, which are from 3 on";
            return Err(Error::invalid(text, reason).next("fd:N or fd:N/EXPORT"));
        };
        if IS_OVER.load(Ordering::Acquire) {
            let reason = "a server that runs was given no socket";
            return Err(Error::invalid(text, reason)
                .next("give it to devsplice add, without --server, when it is started"));
        }
        let os = |error: io::Error| {
            Error::os(text, &error).next("has this process been started with a connected socket?")
        };
        let mut numbers = lock(&NUMBERS);
        let Some(place) = numbers.iter().position(|one| *one == number) else {
            let reason = "this process was not started with it, or it is in use already";
            return Err(Error::invalid(text, reason).next(
                "has this process been started with a connected socket? each is opened once",
            ));
        };
        // A copy that is ours. The number stays as it was, but for programs that are started.
        let copied = pidfd_open(getpid(), PidfdFlags::empty())
            .and_then(|own| pidfd_getfd(own, number, PidfdGetfdFlags::empty()));
        let socket = copied.map_err(|errno| os(errno.into()))?;
        let kind = sockopt::socket_type(&socket).map_err(|errno| os(errno.into()))?;
        if kind != SocketType::STREAM {
            return Err(Error::invalid(text, "is no socket of a stream")
                .next("a connected socket of the file system, TCP or vsock"));
        }
        getpeername(&socket).map_err(|errno| os(errno.into()))?;
        fds::keep_to_ourselves(number);
        numbers.swap_remove(place);
        drop(numbers);
        // Nobody here expects to be told to come again. Where it is TCP, requests are sent whole.
        rustix::io::ioctl_fionbio(&socket, false).map_err(|errno| os(errno.into()))?;
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let (text, export) = (text.to_owned(), export.to_owned());
        Ok(Given { text, export, socket: Mutex::new(Some(socket)) })
    }

    pub(super) fn name(&self) -> String {
        self.text.clone()
    }

    /// The socket.
    pub(super) fn reach(&self) -> Result<OwnedFd> {
        lock(&self.socket).take().ok_or_else(|| {
            let reason = "a socket that was given leads to its server once";
            Error::new(ErrorKind::Os, &self.text, reason)
                .next("an address, nbd://..., is connected to again")
        })
    }
}
