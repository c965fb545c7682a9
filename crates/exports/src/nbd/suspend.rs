//! Answers for a disk over NBD that nobody serves for a while: clients have been sent away, those
//! that come wait in the kernel's queue, and find what is there by then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_core::{Error, Result};

use super::listen::Listener;
use super::{Device, END_LIMIT, NO_ZONES, Options, unfinished};
use crate::threads::Service;

/// How long a question to a server below may take beyond its end.
const TELL_LIMIT: Duration = Duration::from_secs(12);

/// How long what was asked for may take to be answered; then clients are cut off, and what waits
/// for a server below fails, as nobody is there to hear of it.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A disk that nobody serves.
pub struct Suspended {
    options: Options,
    listeners: Arc<[Listener]>,
}

impl Device {
    /// Answers what clients have asked for, disconnects them, lets go of all that is below.
    ///
    /// # Errors
    /// If what is in flight below does not come back. Then nobody serves clients, and it can be
    /// tried again.
    pub fn suspend(mut self) -> Result<Suspended, (Box<Device>, Error)> {
        self.post.dismiss();
        match self.end(ANSWER_LIMIT + END_LIMIT) {
            Ok(()) => Ok(Suspended { options: self.options, listeners: self.listeners }),
            Err(error) => Err((Box::new(self), error)),
        }
    }

    /// Whether its clients have been sent away, and what they had asked for has not come back.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.post.is_stopping()
    }

    /// Waits for all threads to end. Clients that take too long are cut off.
    pub(super) fn end(&mut self, limit: Duration) -> Result<()> {
        if let Some(greeter) = self.greeter.take() {
            // It has nothing to give; a panic has ended the process.
            let _ = greeter.join();
        }
        let begin = Instant::now();
        let end = begin + limit;
        while !self.crew.is_over() {
            let now = Instant::now();
            if now + END_LIMIT >= end {
                self.post.stop();
            }
            if now >= begin + ANSWER_LIMIT {
                self.crew.remotes.iter().for_each(|remote| remote.forsake());
            }
            if now >= end {
                return Err(unfinished());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.await_teller();
        Ok(())
    }

    /// What is below is held by who asks it, too. A question has its time; beyond that, only the
    /// search for a host's name, or a socket's file where many wait already, can keep it.
    fn await_teller(&mut self) {
        let Some(teller) = self.teller.take() else { return };
        let end = Instant::now() + TELL_LIMIT;
        while !teller.is_finished() {
            if Instant::now() >= end {
                let text = "nbd: a server below is still being asked; it is let go of after that";
                return (self.post.say)(text);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = teller.join();
    }
}

impl Suspended {
    /// Serves it again, with what is below by now.
    ///
    /// # Errors
    /// As [`Device::attach`]; it is still suspended then.
    pub fn resume(self, service: Service) -> Result<Device, (Box<Suspended>, Error)> {
        service
            .refuse_zones(NO_ZONES)
            .and_then(|()| Device::serve(&self.options, &self.listeners, service))
            .map_err(|error| (Box::new(self), error))
    }
}
