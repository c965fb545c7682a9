//! Answers for splices of which something is kept until their completion: a vector, memory that is
//! lent, another way where a place refuses the first.

use devsplice_core::{Errno, Op, Result};
use devsplice_engine::{FileId, Pages, Splice};

use super::{KIND_SPLICE, Uring};
use crate::files::ZeroWay;
use crate::splice::{Around, PagesKind, ZEROES_LEN, entry};
use crate::uapi::Sqe;

impl Uring {
    /// A splice of which something is kept until its completion.
    #[inline(never)]
    pub(super) fn splice_kept(&mut self, key: u32, splice: &Splice<'_>) {
        if self.helpers.is_some() && self.helped(key, splice) {
            return;
        }
        if self.done.is_some() && self.in_place(key, splice) {
            return;
        }
        let zeroes = self.zeroes.address(0, 0, ZEROES_LEN);
        let around = Around { arenas: &self.arenas, files: &self.files, zeroes };
        let flight = &mut self.flights[key as usize];
        let sqe = entry(flight, splice, &around);
        if let Some(PagesKind::Memory { lane, slot }) = flight.pages
            && let Some(arena) = &mut self.arenas[usize::from(lane)]
        {
            arena.lend(usize::from(slot));
        }
        self.queues.push(Sqe { user_data: KIND_SPLICE | u64::from(key), ..sqe });
    }

    /// What became of one, or `None` if it was sent again another way.
    #[inline(never)]
    pub(super) fn spliced(&mut self, key: u32, result: i32) -> Option<Result<u64, Errno>> {
        let flight = &mut self.flights[key as usize];
        if let Some(PagesKind::Memory { lane, slot }) = flight.pages
            && let Some(arena) = &mut self.arenas[usize::from(lane)]
        {
            arena.give_back(usize::from(slot));
        }
        let Ok(done) = u64::try_from(result) else {
            return self.refused(key, Errno::from_result(result));
        };
        match (flight.op, flight.pages) {
            (Op::Read | Op::Write, Some(PagesKind::Slot(_))) => self.bytes_spliced += done,
            (Op::Read | Op::Write, Some(PagesKind::Memory { lane, .. }))
                if usize::from(lane) >= self.outer =>
            {
                self.bytes_meta += done;
            }
            (Op::Read | Op::Write, _) => self.bytes_copied += done,
            (Op::WriteZeroes { .. }, _) if flight.way == ZeroWay::Write => {}
            // The others report no length: they are done whole or not at all.
            _ => return Some(Ok(flight.len)),
        }
        Some(Ok(done))
    }

    /// Tries another way where a place does not know the operation; else the error is the result.
    fn refused(&mut self, key: u32, errno: Errno) -> Option<Result<u64, Errno>> {
        let flight = &mut self.flights[key as usize];
        let file = &mut self.files[usize::from(flight.file)];
        let unknown =
            matches!(errno, Errno::EOPNOTSUPP | Errno::EINVAL) || errno.raw() == libc::ENOTTY;
        let other_way = match flight.op {
            Op::WriteZeroes { unmap } => unknown && file.refused_zero(unmap, flight.way),
            Op::Discard => unknown && file.refused_discard(flight.discard),
            _ => false,
        };
        if !other_way {
            return Some(Err(errno));
        }
        let again = Splice {
            op: flight.op,
            fua: false,
            to: devsplice_engine::To::File(FileId(flight.file)),
            at: flight.at,
            len: flight.len,
            pages: Pages(0),
            parts: &[],
        };
        self.splice_kept(key, &again);
        None
    }
}

#[cfg(test)]
mod tests {
    use devsplice_engine::{Event, Ring, To};
    use rustix::fs::MemfdFlags;

    use super::*;
    use crate::files::{FileKind, RingFile};
    use crate::ring::Config;

    /// A file that is said to be a block device refuses the command and takes holes, as the devices
    /// of older kernels do.
    #[test]
    fn every_discard_that_is_out_at_the_first_refusal_goes_the_other_way() {
        const LEN: u64 = 4096;
        let config = Config { flights: 4, files: 1, lanes: Vec::new(), inner: 0 };
        let mut ring = Uring::new(&config).unwrap();
        let fd = rustix::fs::memfd_create("place", MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&fd, &[7; 4 * LEN as usize], 0).unwrap();
        let place = fd.try_clone().unwrap();
        let file = ring.add_file(RingFile { fd, kind: FileKind::Block }).unwrap();
        let discard = |ring: &mut Uring, key: u32| {
            let at = u64::from(key) * LEN;
            let (to, pages, parts) = (To::File(file), Pages(0), &[][..]);
            let splice = Splice { op: Op::Discard, fua: false, to, at, len: LEN, pages, parts };
            ring.splice(key, &splice);
        };
        let mut results = Vec::new();
        for keys in [0..3, 3..4] {
            let end = keys.end as usize;
            keys.for_each(|key| discard(&mut ring, key));
            while results.len() < end {
                ring.enter(true).unwrap();
                while let Some(event) = ring.next() {
                    let Event::Splice { key, result } = event else { continue };
                    results.push((key, result));
                }
            }
        }
        results.sort_by_key(|(key, _)| *key);
        assert_eq!(results, [0, 1, 2, 3].map(|key| (key, Ok(LEN))));
        let mut bytes = [1; 4 * LEN as usize];
        assert_eq!(rustix::io::pread(&place, &mut bytes, 0), Ok(bytes.len()));
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}
