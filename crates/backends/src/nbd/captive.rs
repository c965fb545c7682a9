//! Answers for servers that are programs of ours, `[ nbdkit memory 1G ]`: started with a socket
//! that they are to serve (systemd's socket activation), ended with us whatever ends us.

use std::io::{self, PipeWriter};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use devsplice_core::{Error, Result};

/// Starts the program with descriptor 3 as its socket, and ends it when the pipe that stands at
/// standard output is closed at its other end: by us or by our end.
/// What was said of descriptors passed to us is no word about its.
const KEEPER: &str = r#"
unset LISTEN_FDNAMES LISTEN_PIDFDID
exec 3<&0 4<&1 0</dev/null 1>&2
sh -c 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"' sh "$@" 4<&- &
exec 3<&-
read -r end <&4
kill "$!" 2>/dev/null
wait
"#;

/// What a process that confines itself may not do, and who may.
const NO_PROGRAMS: &str = "a server of many, or one that runs already, starts no programs: start \
                           this one yourself and give its socket, or add the disk without --server";

/// A program that serves.
pub(super) struct Captive {
    words: Vec<String>,
    socket: PathBuf,
    /// Closed, it ends.
    line: Option<PipeWriter>,
    keeper: Child,
}

impl Captive {
    /// Starts what stands between the brackets.
    ///
    /// # Errors
    /// If that is nothing, or it cannot be started.
    pub(super) fn start(text: &str) -> Result<Captive> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        let words: Vec<String> =
            inner.unwrap_or_default().split_whitespace().map(str::to_owned).collect();
        if words.is_empty() {
            return Err(Error::invalid(text, "names no program").next("[ nbdkit memory 1G ]"));
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("devsplice-{}-{number}.nbd", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let os = |error: io::Error| Error::os(text, &error);
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(os)?;
        let (theirs, line) = std::io::pipe().map_err(os)?;
        let keeper = Command::new("sh")
            .args(["-c", KEEPER, "sh"])
            .args(&words)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .map_err(|error| {
                let _ = std::fs::remove_file(&socket);
                match error.kind() {
                    io::ErrorKind::PermissionDenied => os(error).next(NO_PROGRAMS),
                    _ => os(error),
                }
            })?;
        Ok(Captive { words, socket, line: Some(line), keeper })
    }

    pub(super) fn name(&self) -> String {
        format!("[ {} ]", self.words.join(" "))
    }

    /// A socket that is connected to it.
    pub(super) fn reach(&self) -> io::Result<OwnedFd> {
        super::connect::roomy(UnixStream::connect(&self.socket)?.into())
    }
}

impl Drop for Captive {
    fn drop(&mut self) {
        drop(self.line.take());
        let _ = std::fs::remove_file(&self.socket);
        // It ends the program and itself; what does not end by a signal is not waited for.
        let _ = self.keeper.try_wait();
    }
}
