//! Answers for the end of a disk: that it stops, its threads end and the device goes, and that this
//! goes on where it takes longer than somebody waits and nobody else will ask again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::{Counts, Served};

use super::{Control, Device, Made, PATIENCE};
use crate::threads::Crew;

/// How long a disk that nobody owns is tried to be removed.
const LAST: Duration = Duration::from_secs(3600);
/// How long after a try the next one is.
const PAUSE: Duration = Duration::from_secs(1);

/// A disk that is to go.
pub(super) struct Ending {
    control: Control,
    id: u32,
    /// Until all threads have ended.
    crew: Option<Crew>,
    counts: Counts,
    served: Arc<Served>,
}

impl Ending {
    pub(super) fn of(device: Device) -> Ending {
        let Device { made: Made { control, info, .. }, crew, .. } = device;
        let (served, counts) = (Arc::clone(&crew.served), Counts::default());
        Ending { control, id: info.dev_id, crew: Some(crew), counts, served }
    }

    /// Stops the disk, waits for its threads and deletes the device, as far as that is not done.
    ///
    /// # Errors
    /// Which step does not come to its end.
    pub(super) fn attempt(&mut self) -> Result<Counts> {
        if let Some(crew) = &self.crew {
            // As long as a thread of ours has the device open, the number is this disk's.
            let stopped = if crew.is_over() { Ok(()) } else { self.control.stop(self.id) };
            let end = Instant::now() + PATIENCE;
            while !crew.is_over() {
                if Instant::now() > end {
                    stopped?;
                    let reason = "its I/O threads have not ended; a request is stuck below";
                    return Err(Error::new(ErrorKind::Busy, format!("ublk {}", self.id), reason));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if let Some(crew) = self.crew.take() {
            self.counts = crew.join();
        }
        // Another tool may have deleted it already.
        match self.control.delete(self.id) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(self.counts),
        }
    }

    /// Removes a disk that nobody owns. Where that does not come to its end at once, as while the
    /// kernel is still about to make it appear, it goes on beside.
    pub(super) fn see_through(mut self) {
        if self.attempt().is_ok() || self.crew.is_none() {
            return;
        }
        let thread = std::thread::Builder::new().name(format!("end/{}", self.id));
        // Without a thread it is left to whoever clears up after this process.
        let _ = thread.spawn(move || self.go_on());
    }

    /// Whether the number has been given to another disk meanwhile: without its threads, this one
    /// is stopped, and has no server.
    fn is_anothers(&mut self) -> bool {
        let is_over = self.crew.as_ref().is_none_or(Crew::is_over);
        is_over && self.control.server(self.id).is_ok_and(|(_, state)| state != "dead")
    }

    /// Tries again until it is gone. Not once the threads are: the number may be another disk's.
    fn go_on(mut self) {
        let end = Instant::now() + LAST;
        while self.crew.is_some() && Instant::now() < end {
            std::thread::sleep(PAUSE);
            if self.is_anothers() || self.attempt().is_ok() {
                return;
            }
        }
        let text = "was given up and is left over: devsplice gc removes it";
        self.served.event(format!("ublk device {}: {text}", self.id));
    }
}
