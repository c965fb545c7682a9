//! Answers for reads whose data stays in its file, in memory, until it is sent from there: nobody
//! copies it but the client.
//!
//! What a client gets is what the file holds when the client takes it from the socket. A read is
//! not over before that, so a write that comes in between is one that it raced with. Where layers
//! move data on their own, a place may belong to somebody else by then: there it is not done.
//!
//! Only over sockets of this machine, whose buffer says how much it has room for: sending from a
//! file cannot be asked not to wait.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use devsplice_core::{Errno, Op};
use devsplice_engine::{Completion, Event, FileId, Ring, Splice, To};

use super::Uring;
use super::choice::Choice;
use super::in_place::{MOST, last_errno};
use super::linger::Linger;
use super::socket::Outgoing;
use crate::splice::DATA_AT;

/// Bytes from which on it pays: it takes two calls, and what is shorter goes with others in one.
const LEAST: u64 = 32 << 10;
/// What the kernel may count beside the data of a reply.
const OVERHEAD: u64 = 8 << 10;
/// `SO_MEMINFO` and what is where in it (include/uapi/linux/sock_diag.h).
const SO_MEMINFO: libc::c_int = 55;
const MEMINFO_COUNT: usize = 9;
const MEMINFO_QUEUED: usize = 2;
const MEMINFO_ROOM: usize = 3;

/// Where the first bytes of a tag's data are instead of in its memory.
#[derive(Clone, Copy, Default)]
pub(super) struct Loan {
    file: u16,
    at: u64,
    /// How many; 0 where all is in memory.
    len: u32,
}

/// What is known of a lane's tags.
pub(super) struct Loans {
    tags: Box<[Loan]>,
    /// Whether the client of now may be served so.
    on: bool,
    /// Whether it is, where there is a CPU for it and for this thread.
    choice: Choice,
}

/// The kernel's memory for what a socket sends: how much holds bytes that the other end has not
/// taken (over a socket of this machine: not read), and how much there may be.
pub(super) fn send_memory(socket: BorrowedFd<'_>) -> Option<(u64, u64)> {
    let mut about = [0_u32; MEMINFO_COUNT];
    let mut len = libc::socklen_t::try_from(size_of_val(&about)).unwrap_or(0);
    let (fd, into) = (socket.as_raw_fd(), about.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `len` bytes, which `about` has, before the call returns.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, SO_MEMINFO, into, &raw mut len) };
    (result == 0).then(|| (about[MEMINFO_QUEUED].into(), about[MEMINFO_ROOM].into()))
}

impl Uring {
    /// Whether reads of a lane may be left in their files until they are sent, from now on. It has
    /// an effect where the thread works in place ([`Uring::work_in_place`]).
    pub fn lend_files(&mut self, lane: u16, on: bool) {
        let place = usize::from(lane);
        let slots = self.arena(lane).slots();
        if on && self.loans.len() <= place {
            self.loans.resize_with(place + 1, || None);
        }
        if let Some(loans) = self.loans.get_mut(place) {
            let tags = || vec![Loan::default(); slots].into();
            let loans =
                loans.get_or_insert_with(|| Loans { tags: tags(), on, choice: Choice::new() });
            (loans.on, loans.choice) = (on, Choice::new());
        }
    }

    /// The data of a tag's next reply is in its memory, unless a read says otherwise.
    #[inline]
    pub fn forget_loan(&mut self, lane: u16, tag: u16) {
        if let Some(loan) = self.loan(lane, tag) {
            loan.len = 0;
        }
    }

    #[inline]
    fn loan(&mut self, lane: u16, tag: u16) -> Option<&mut Loan> {
        self.loans.get_mut(usize::from(lane))?.as_mut()?.tags.get_mut(usize::from(tag))
    }

    /// Leaves a read's data where it is if it can be sent from there; whether it was.
    pub(super) fn lend(&mut self, key: u32, (lane, slot): (u16, u16), splice: &Splice<'_>) -> bool {
        let (Op::Read, To::File(id), [part]) = (splice.op, splice.to, splice.parts) else {
            return false;
        };
        let is_on = |loans: &Loans| loans.on;
        if !self.loans.get(usize::from(lane)).and_then(Option::as_ref).is_some_and(is_on) {
            return false;
        }
        let (at, len) = (splice.at, part.len);
        if part.at != 0 || u64::from(len) != splice.len || splice.len < LEAST {
            return false;
        }
        // What is not there cannot be sent; reading it will tell.
        let size = rustix::fs::fstat(&self.files[usize::from(id.0)].fd)
            .map_or(0, |about| u64::try_from(about.st_size).unwrap_or(0));
        if at.checked_add(splice.len).is_none_or(|end| end > size) || !self.is_chosen(lane, len) {
            return false;
        }
        let Some(loan) = self.loan(lane, slot) else { return false };
        *loan = Loan { file: id.0, at, len };
        let Some(done) = &mut self.done else { return false };
        self.bytes_spliced += splice.len;
        done.push_back(Event::Splice { key, result: Ok(splice.len) });
        true
    }

    /// Whether a read is left in its file rather than copied. Where CPUs are short all are, as that
    /// takes the least work of the machine; else it is what this client gets its data faster by.
    fn is_chosen(&mut self, lane: u16, len: u32) -> bool {
        if !self.linger.as_ref().is_some_and(Linger::is_allowed) {
            return true;
        }
        let now = self.now_ns();
        let loans = self.loans.get_mut(usize::from(lane)).and_then(Option::as_mut);
        loans.is_some_and(|loans| loans.choice.lends(len.into(), now))
    }

    /// Sends the parts whose data is in files, and those before them; `None` if that was all there
    /// is to do now. Else how many of the parts are left to be sent from memory, which is where
    /// their data is then.
    pub(super) fn send_lent(
        &mut self,
        (lane, index): (u16, u32),
        socket: FileId,
        parts: &[Outgoing],
    ) -> Option<usize> {
        if self.loans.is_empty() {
            return Some(parts.len());
        }
        let mut is_lent =
            |part: &Outgoing| part.is_read && self.loan(lane, part.tag).is_some_and(|l| l.len > 0);
        let Some(first) = parts.iter().position(&mut is_lent) else { return Some(parts.len()) };
        if first > 0 {
            // Those before it go as always; it is looked at again afterwards.
            return Some(first);
        }
        let mut room = self.room(socket);
        let mut done = Ok(0_u64);
        for part in parts {
            let (len, count) = (u64::from(part.len), OVERHEAD);
            if !part.is_read || self.loan(lane, part.tag).is_none_or(|l| l.len == 0) {
                break;
            }
            if room < len + count {
                break;
            }
            room -= len + count;
            match (self.send_one(lane, socket, part), done) {
                (Ok(()), Ok(all)) => done = Ok(all + len),
                // Nothing of it went.
                (Err(Errno::EAGAIN), Ok(_)) => break,
                // One that is tried again elsewhere is none here: something may have gone.
                (Err(errno), _) => {
                    done = Err(if errno.is_transient() { Errno::EIO } else { errno });
                    break;
                }
                _ => break,
            }
        }
        if done == Ok(0) {
            match self.fetch(lane, parts[0].tag) {
                Ok(()) => return Some(1),
                Err(errno) => done = Err(errno),
            }
        }
        let result = match done {
            Ok(all) => i32::try_from(all).unwrap_or(i32::MAX),
            Err(errno) => -errno.raw(),
        };
        let completion = Completion { index, result, flags: 0 };
        self.done.as_mut()?.push_back(Event::Export { lane, completion });
        None
    }

    /// How many bytes a socket takes without a wait, about.
    fn room(&self, socket: FileId) -> u64 {
        let memory = send_memory(self.files[usize::from(socket.0)].fd.as_fd());
        memory.map_or(0, |(queued, room)| room.saturating_sub(queued))
    }

    /// Sends one part, its head from memory and its data from the file: all of it, or nothing and
    /// `EAGAIN`. After any other error nobody knows how much of it went.
    fn send_one(&mut self, lane: u16, socket: FileId, part: &Outgoing) -> Result<(), Errno> {
        let loan = *self.loan(lane, part.tag).ok_or(Errno::EIO)?;
        let (at, end) = (part.at as usize, part.at as usize + part.len as usize);
        let until = DATA_AT + loan.len as usize;
        if at > DATA_AT || end < until {
            return Err(Errno::EIO);
        }
        self.send_memory(lane, socket, part.tag, (at, DATA_AT))?;
        self.send_rest(socket, &loan)
            .and_then(|()| self.send_memory(lane, socket, part.tag, (until, end)))
            .map_err(|errno| if errno.is_transient() { Errno::EIO } else { errno })?;
        self.forget_loan(lane, part.tag);
        Ok(())
    }

    /// Sends what lies in the file.
    fn send_rest(&self, socket: FileId, loan: &Loan) -> Result<(), Errno> {
        let to = self.files[usize::from(socket.0)].fd.as_raw_fd();
        let from = self.files[usize::from(loan.file)].fd.as_raw_fd();
        let mut place = i64::try_from(loan.at).map_err(|_| Errno::EINVAL)?;
        let mut left = loan.len as usize;
        while left > 0 {
            // SAFETY: both descriptors are open as long as their slots; the kernel reads and writes
            // `place` before the call returns.
            let count = unsafe { libc::sendfile(to, from, &raw mut place, left) };
            match usize::try_from(count) {
                // The file has become shorter: the client cannot be told any more.
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => left -= count,
                Err(_) if last_errno() == Errno::EINTR => {}
                Err(_) => return Err(last_errno()),
            }
        }
        Ok(())
    }

    /// Sends a range of a tag's memory to a socket that has room for it.
    fn send_memory(
        &mut self,
        lane: u16,
        socket: FileId,
        tag: u16,
        (at, end): (usize, usize),
    ) -> Result<(), Errno> {
        let fd = self.files[usize::from(socket.0)].fd.as_raw_fd();
        let bytes = &self.arena(lane).bytes(usize::from(tag))[at..end];
        if bytes.is_empty() {
            return Ok(());
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the kernel reads the slice, which is borrowed until the call returns.
        let count = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) };
        match usize::try_from(count) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(Errno::EIO),
            Err(_) => Err(last_errno()),
        }
    }

    /// Brings the data of a tag into its memory after all.
    fn fetch(&mut self, lane: u16, tag: u16) -> Result<(), Errno> {
        let loan = *self.loan(lane, tag).ok_or(Errno::EIO)?;
        debug_assert!(u64::from(loan.len) <= MOST, "more than the thread may copy");
        let fd = self.files[usize::from(loan.file)].fd.as_raw_fd();
        let into = &mut self.memory(lane, tag)[DATA_AT..DATA_AT + loan.len as usize];
        let mut there = 0;
        while there < into.len() {
            let (at, room) = (loan.at + there as u64, &mut into[there..]);
            let at = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
            // SAFETY: the kernel fills at most the slice, which is borrowed until the call returns;
            // the descriptor is open as long as its slot.
            let count = unsafe { libc::pread(fd, room.as_mut_ptr().cast(), room.len(), at) };
            match usize::try_from(count) {
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => there += count,
                Err(_) if last_errno() == Errno::EINTR => {}
                Err(_) => return Err(last_errno()),
            }
        }
        self.bytes_spliced -= u64::from(loan.len);
        self.bytes_copied += u64::from(loan.len);
        self.forget_loan(lane, tag);
        Ok(())
    }
}
