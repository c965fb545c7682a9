//! Answers for how far the bytes of a request are that this process moves itself, between the
//! device and memory of its own, and for how often that is tried.

use devsplice_core::{Errno, Result};
use devsplice_engine::flights::MAX_ATTEMPTS;

/// How far one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// Bytes that are moved.
    pub(super) moved: u32,
    /// Attempts since the last that moved some.
    attempts: u8,
}

impl Progress {
    pub(super) const NONE: Progress = Progress { moved: 0, attempts: 0 };

    /// Takes what came of an attempt into account; the next one is to move the rest.
    ///
    /// # Errors
    /// What the client is told, if there is to be none.
    pub(super) fn take(&mut self, result: i32) -> Result<(), Errno> {
        match u32::try_from(result) {
            Ok(0) => Err(Errno::EIO),
            Ok(count) => {
                self.moved += count;
                self.attempts = 0;
                Ok(())
            }
            Err(_) => {
                let errno = Errno::from_result(result);
                if !errno.is_transient() || self.attempts == MAX_ATTEMPTS {
                    return Err(errno.for_client());
                }
                self.attempts += 1;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_is_counted_and_no_bytes_are_an_error() {
        let mut progress = Progress::NONE;
        assert_eq!((progress.take(512), progress.take(100)), (Ok(()), Ok(())));
        assert_eq!(progress.moved, 612);
        assert_eq!(progress.take(0), Err(Errno::EIO));
        assert_eq!(progress.take(-Errno::ENOSPC.raw()), Err(Errno::ENOSPC));
        assert_eq!(progress.take(-Errno::EFAULT.raw()), Err(Errno::EIO));
        assert_eq!(progress.moved, 612);
    }

    #[test]
    fn what_may_go_better_the_next_time_is_tried_a_bounded_number_of_times() {
        for errno in [Errno::EAGAIN, Errno::EINTR] {
            let mut progress = Progress::NONE;
            for _ in 0..MAX_ATTEMPTS {
                assert_eq!(progress.take(-errno.raw()), Ok(()));
            }
            assert_eq!(progress.take(-errno.raw()), Err(Errno::EIO));
            // What has moved since makes it start anew.
            assert_eq!(progress.take(1), Ok(()));
            assert_eq!(progress.take(-errno.raw()), Ok(()));
        }
    }
}
