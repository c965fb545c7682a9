//! Answers for replies on their way out of a connection: what is finished in a turn goes with one
//! entry, and each reply whole before the next begins.

use devsplice_core::Errno;
use devsplice_engine::FileId;
use devsplice_nbd::Head;
use devsplice_uring::{MAX_OUTGOING, Outgoing, Uring};

/// Bytes that go with one entry, but for the reply that brings them beyond: their tags are free
/// again only when all of them are gone.
const BATCH: u64 = 512 << 10;

/// What follows the head of a reply. Bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Data {
    None,
    /// As the tag's memory has it.
    Told(u32),
    /// As the engine has read it.
    Read(u32),
}

/// The replies of a connection that wait and that are being sent.
pub(super) struct Outbox {
    /// In the order in which they go: a ring of as many places as there are tags.
    replies: Box<[Outgoing]>,
    first: usize,
    count: usize,
    /// How many of them are with the kernel.
    sending: usize,
    /// Bytes of those that it has not confirmed.
    left: u64,
    /// Tags at the front whose replies are gone, and which nobody has freed yet.
    gone: usize,
}

impl Outbox {
    pub(super) fn new(depth: u16) -> Outbox {
        let replies = vec![Outgoing::default(); usize::from(depth)].into();
        Outbox { replies, first: 0, count: 0, sending: 0, left: 0, gone: 0 }
    }

    fn place(&self, index: usize) -> usize {
        (self.first + index) % self.replies.len()
    }

    /// Whether the kernel has some.
    pub(super) fn is_sending(&self) -> bool {
        self.sending > 0
    }

    /// Whether there are any.
    pub(super) fn has_any(&self) -> bool {
        self.count > 0
    }

    /// Puts a reply behind the others: `head`, and what follows it.
    ///
    /// # Panics
    /// If the tag's memory is lent, or there are more replies than tags.
    #[inline]
    pub(super) fn put(
        &mut self,
        ring: &mut Uring,
        (lane, tag): (u16, u16),
        head: &Head,
        data: Data,
    ) {
        let (len, is_read) = match data {
            Data::None => (0, false),
            Data::Told(len) => (len, false),
            Data::Read(len) => (len, true),
        };
        let bytes = head.bytes();
        let at = Uring::DATA_AT - bytes.len();
        ring.memory(lane, tag)[at..Uring::DATA_AT].copy_from_slice(bytes);
        assert!(self.count < self.replies.len(), "more replies than tags");
        let reply = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let place = self.place(self.count);
        self.replies[place] =
            Outgoing { tag, at: reply(at), len: reply(bytes.len()) + len, is_read };
        self.count += 1;
    }

    /// Sends what waits, unless some is being sent; whether the kernel does the socket's TLS.
    pub(super) fn flush(
        &mut self,
        ring: &mut Uring,
        (lane, index): (u16, u32),
        socket: FileId,
        is_sealed: bool,
    ) {
        if self.sending > 0 || self.count == 0 {
            return;
        }
        let mut parts = [Outgoing::default(); MAX_OUTGOING];
        let mut bytes = 0;
        while self.sending < self.count.min(MAX_OUTGOING) && bytes < BATCH {
            let reply = self.replies[self.place(self.sending)];
            parts[self.sending] = reply;
            bytes += u64::from(reply.len);
            self.sending += 1;
        }
        self.left = bytes;
        ring.send_parts((lane, index), socket, &parts[..self.sending], is_sealed);
    }

    /// The send is over: the replies that went whole are gone, the next send goes on with what is
    /// left.
    ///
    /// # Errors
    /// If it failed; nobody knows then how much of it went.
    pub(super) fn sent(&mut self, result: i32) -> Result<(), Errno> {
        self.sending = 0;
        let Ok(done) = u32::try_from(result) else {
            let errno = Errno::from_result(result);
            return if errno.is_transient() { Ok(()) } else { Err(errno) };
        };
        let mut done = u64::from(done);
        assert!(done <= self.left, "more was sent than there was");
        self.left = 0;
        while self.gone < self.count {
            let place = self.place(self.gone);
            let reply = &mut self.replies[place];
            if u64::from(reply.len) > done {
                let count = u32::try_from(done).unwrap_or(0);
                reply.at += count;
                reply.len -= count;
                break;
            }
            done -= u64::from(reply.len);
            self.gone += 1;
        }
        Ok(())
    }

    /// A tag whose reply is gone.
    pub(super) fn next_gone(&mut self) -> Option<u16> {
        self.gone = self.gone.checked_sub(1)?;
        self.next_left()
    }

    /// A tag whose reply will not be sent any more.
    pub(super) fn next_left(&mut self) -> Option<u16> {
        if self.count == 0 {
            return None;
        }
        let tag = self.replies[self.first].tag;
        self.first = self.place(1);
        self.count -= 1;
        Some(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As if they had been put and sent.
    fn with(lens: &[u32]) -> Outbox {
        let mut outbox = Outbox::new(4);
        outbox.first = 3;
        for (tag, len) in (0..).zip(lens) {
            let place = outbox.place(outbox.count);
            outbox.replies[place] = Outgoing { tag, at: 4080, len: *len, is_read: false };
            outbox.count += 1;
        }
        (outbox.sending, outbox.left) = (lens.len(), lens.iter().map(|len| u64::from(*len)).sum());
        outbox
    }

    #[test]
    fn a_short_send_goes_on_where_it_stopped() {
        let mut outbox = with(&[16, 4112, 16]);
        assert_eq!(outbox.sent(116), Ok(()));
        assert!(!outbox.is_sending() && outbox.has_any());
        assert_eq!((outbox.next_gone(), outbox.next_gone()), (Some(0), None));
        let next = outbox.replies[outbox.place(0)];
        assert_eq!(next, Outgoing { tag: 1, at: 4180, len: 4012, is_read: false });
        (outbox.sending, outbox.left) = (2, 4028);
        assert_eq!(outbox.sent(4028), Ok(()));
        assert_eq!([outbox.next_gone(), outbox.next_gone()], [Some(1), Some(2)]);
        assert!(outbox.next_gone().is_none() && !outbox.has_any());
    }

    #[test]
    fn what_is_lost_comes_back_tag_by_tag() {
        let mut outbox = with(&[16, 16]);
        assert_eq!(outbox.sent(-32).map_err(Errno::raw), Err(32));
        assert_eq!(outbox.next_gone(), None);
        assert_eq!([outbox.next_left(), outbox.next_left()], [Some(0), Some(1)]);
        let mut again = with(&[16]);
        assert_eq!(again.sent(-4), Ok(()));
        assert!(again.next_gone().is_none() && again.has_any());
    }
}
