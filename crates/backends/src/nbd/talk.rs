//! Answers for questions to a server that are asked one at a time and waited for: metadata of
//! layers, and what is there.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use devsplice_core::Errno;
use devsplice_nbd::Request;
use devsplice_nbd::client::{Asks, Extent, Said, asks::errno};
use devsplice_nbd::limits::MAX_REPLY;
use devsplice_nbd::wire::{can, command};
use devsplice_uring::Link;
use devsplice_uring::ktls::Records;

use super::connect::{Plain, limit};

/// How long the server may take for the next bytes, where nobody says when all has to be there.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a question about what is there.
const LOOK: u64 = 1 << 30;

/// A connection of which nobody else knows.
pub(super) struct Talk {
    link: Link,
    asks: Asks,
    /// Something has gone wrong: what the socket brings next may be anything.
    is_broken: bool,
    /// Answers are to be there by then.
    until: Option<Instant>,
}

impl Talk {
    pub(super) fn new(link: Link) -> Talk {
        let mut asks = Asks::new(1);
        asks.restart(link.agreed.mode, link.agreed.allocation);
        Talk { link, asks, is_broken: false, until: None }
    }

    /// Answers that are not there by then break it.
    pub(super) fn until(&mut self, until: Instant) -> &mut Talk {
        self.until = Some(until);
        self
    }

    /// The connection, if it is as good as new.
    pub(super) fn into_link(self) -> Option<Link> {
        let is_good = !self.is_broken && limit(self.link.socket.as_fd(), None).is_ok();
        is_good.then_some(self.link)
    }

    /// Reads all of `into`.
    pub(super) fn read_at(&mut self, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let most = usize::try_from(self.link.agreed.most).unwrap_or(into.len());
        let mut at = at;
        for part in into.chunks_mut(most) {
            let len = part.len() as u64;
            self.ask((command::READ, at, len), &[], part)?;
            at += len;
        }
        Ok(())
    }

    /// Writes all of `from`, durably.
    pub(super) fn write_at(&mut self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let most = usize::try_from(self.link.agreed.most).unwrap_or(from.len());
        let mut at = at;
        for part in from.chunks(most) {
            let len = part.len() as u64;
            self.ask((command::WRITE, at, len), part, &mut [])?;
            at += len;
        }
        if self.link.agreed.flags & can::FLUSH == 0 {
            return Ok(());
        }
        self.ask((command::FLUSH, 0, 0), &[], &mut [])
    }

    /// What is there from `at` on, where the server says so.
    pub(super) fn extents(&mut self, at: u64, len: u64) -> Result<&[Extent], Errno> {
        if self.link.agreed.allocation.is_none() {
            return Err(Errno::EOPNOTSUPP);
        }
        self.ask((command::BLOCK_STATUS, at, len.min(LOOK)), &[], &mut [])?;
        Ok(self.asks.extents())
    }

    /// Asks, and waits for the answer.
    fn ask(
        &mut self,
        (command, offset, length): (u16, u64, u64),
        data: &[u8],
        into: &mut [u8],
    ) -> Result<(), Errno> {
        if self.is_broken {
            return Err(Errno::EIO);
        }
        let asked =
            self.exchange(&Request { flags: 0, command, cookie: 0, offset, length }, data, into);
        asked.unwrap_or_else(|_| {
            self.is_broken = true;
            Err(Errno::EIO)
        })
    }

    fn exchange(
        &mut self,
        request: &Request,
        data: &[u8],
        into: &mut [u8],
    ) -> io::Result<Result<(), Errno>> {
        let Link { socket, records, .. } = &mut self.link;
        let (socket, records) = (socket.as_fd(), records.as_deref_mut());
        let mut stream = Timed { socket, records, until: self.until };
        stream.write_all(self.asks.begin(0, request).bytes())?;
        stream.write_all(data)?;
        let mut bytes = [0; MAX_REPLY + 64];
        let (mut from, mut to) = (0, 0);
        loop {
            let told = self.asks.next(&bytes[from..to]);
            let told = told.map_err(|broken| io::Error::other(broken.0))?;
            from += told.0;
            match told {
                (0, None) => {
                    bytes.copy_within(from..to, 0);
                    (from, to) = (0, to - from);
                    let end = bytes.len().min(to + self.asks.room(to));
                    match stream.read(&mut bytes[to..end]) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(count) => to += count,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                (_, None) => {}
                (_, Some(Said::Data { at, len, .. })) => {
                    // `room` has seen to it that none of it is in `bytes`.
                    stream.read_exact(&mut into[at as usize..][..len as usize])?;
                }
                (_, Some(Said::Hole { at, len, .. })) => {
                    into[at as usize..][..len as usize].fill(0);
                }
                (_, Some(Said::Done { result, .. })) => return Ok(result.map_err(errno)),
            }
        }
    }
}

/// A socket each of whose calls ends when it has taken too long.
struct Timed<'a> {
    socket: BorrowedFd<'a>,
    records: Option<&'a mut (dyn Records + 'static)>,
    until: Option<Instant>,
}

impl Timed<'_> {
    fn limited(&mut self) -> io::Result<Plain<'_>> {
        let left = match self.until {
            Some(until) => until.saturating_duration_since(Instant::now()),
            None => PATIENCE,
        };
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // The kernel counts in microseconds, and 0 would be for ever.
        limit(self.socket, Some(left.max(Duration::from_millis(1))))?;
        Ok(Plain { socket: self.socket, records: self.records.as_deref_mut() })
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.limited()?.read(into)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.limited()?.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
