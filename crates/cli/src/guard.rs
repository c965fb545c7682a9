//! Answers for what is left when a server dies without a word: a second process waits for that, and
//! clears up the device, the link and the state.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::{fuse, ublk};

use crate::state::{Claim, Disk};

/// The server's end: its end tells the guard.
pub struct Guard {
    pipe: PipeWriter,
    pid: i32,
}

/// How long a dead server's device may take to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the server says before it goes in good order.
const FAREWELL: &str = "bye";

/// Starts a guard. To be called before any thread and any descriptor of a device exists: the guard
/// must hold neither.
///
/// # Errors
/// If there can be no further process.
pub fn start() -> Result<Guard> {
    let os = |error| Error::os("guard process", &error);
    let (reader, writer) = std::io::pipe().map_err(os)?;
    match fork::fork().map_err(os)? {
        fork::Fork::Parent(pid) => Ok(Guard { pipe: writer, pid }),
        fork::Fork::Child => {
            drop(writer);
            watch(reader);
            std::process::exit(0);
        }
    }
}

/// Waits for the server's end; without a farewell, cleans up after the disk that it named.
fn watch(mut reader: PipeReader) {
    // The server's signals (a terminal's ^C reaches the whole group) are not for the guard.
    let _ = rustix::process::setsid();
    let _ = crate::server::silence(None);
    let mut said = String::new();
    let _ = reader.read_to_string(&mut said);
    let mut lines = said.lines();
    let (Some(name), None) = (lines.next(), lines.next()) else { return };
    // The lock goes with the last descriptor, a moment after the pipe.
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        match Claim::try_take(name) {
            // Whatever the server left is cleaned up by now; it is ours until it is removed.
            Ok(Some(claim)) => return claim.remove(),
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => return,
        }
    }
}

impl Guard {
    /// Names the disk that is to be cleaned up after.
    pub fn name(&mut self, name: &str) {
        let _ = self.pipe.write_all(format!("{name}\n").as_bytes());
    }

    /// Tells the guard that all is cleaned up, and waits for it to go.
    pub fn dismiss(mut self) {
        let _ = self.pipe.write_all(format!("{FAREWELL}\n{FAREWELL}\n").as_bytes());
        drop(self.pipe);
        let _ = fork::waitpid(self.pid);
    }
}

/// Takes the device of a server that is gone away. For who holds the claim on its name. Best
/// effort: each step is tried even if the one before it failed.
pub fn clean(disk: &Disk) {
    if let Some(id) = disk.ublk_id
        && let Ok(mut control) = ublk::Control::open()
    {
        clean_ublk(&mut control, id, disk.pid);
    }
    let _ = match (disk.fuse_connection, disk.device.as_str()) {
        // It died while it was attached.
        (Some(number), "") => fuse::clear_unknown(&disk.name, number),
        (Some(_), device) => fuse::clear_loop(device, &disk.name),
        (None, _) => Ok(false),
    };
}

/// Deletes a ublk device, unless a living process other than the dead server has it by now.
fn clean_ublk(control: &mut ublk::Control, id: u32, dead: u32) {
    let end = Instant::now() + PATIENCE;
    loop {
        let Ok((pid, state)) = control.server(id) else { return };
        let is_ours = u32::try_from(pid).is_ok_and(|pid| pid == dead) || pid <= 0;
        if !is_ours {
            return;
        }
        // The kernel stops the disk by itself as the server's descriptors close.
        if state == "dead" || Instant::now() > end {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    match control.delete(id) {
        Err(error) if error.kind() != ErrorKind::NotFound => eprintln!("devsplice: {error}"),
        _ => {}
    }
}
