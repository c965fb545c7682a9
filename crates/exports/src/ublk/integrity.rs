//! Answers for integrity data of ublk requests: some bytes for each block, which the kernel or the
//! client makes and checks, and which have to come and go with the block.
//!
//! They are kept in a file beside the device, or nowhere by a device that keeps no data either:
//! what is read from that has zeros. A write's are fetched and stored when its data is down, a
//! read's are loaded and handed in when its data is there; only then is the request finished. The
//! file is opened so that what is written to it is durable; so a flush has nothing to add.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use devsplice_core::{Errno, Error, Io, Op, Result};
use devsplice_engine::{Completion, Export, FileId, Inbox, Rest};
use devsplice_uring::{FileKind, RingFile, Uring};
use rustix::fs::{Mode, OFlags};

use super::extra::Part;
use super::map::Descriptors;
use super::progress::Progress;
use super::uapi::{IO_F_INTEGRITY, PARAM_DISCARD, PARAM_INTEGRITY, Params, integrity_at};

/// What integrity data a device has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Integrity {
    /// Bytes for each logical block, 1 to 255.
    pub bytes: u8,
    /// `LBMD_PI_CAP_*`: 1 if it is checked by the kernel, 2 if it has a reference tag.
    pub flags: u32,
    /// Where in them the checked part is.
    pub offset: u8,
    /// `LBMD_PI_CSUM_*`: 0 none, 1 IP, 2 CRC-16 of T10, 4 CRC-64 of NVMe.
    pub checksum: u8,
    /// Bytes of its application tag.
    pub tag_bytes: u8,
    /// Where it is kept: that of the first block at the start.
    pub file: Option<PathBuf>,
}

impl Integrity {
    /// Tells the kernel of it. Discards and zeroing are not offered: they have no integrity data,
    /// and what is kept for blocks that they have changed would fail each later read of those.
    pub(super) fn limit(&self, params: &mut Params) {
        params.types = params.types & !PARAM_DISCARD | PARAM_INTEGRITY;
        (params.discard_granularity, params.max_discard_segments) = (0, 0);
        (params.max_discard_sectors, params.max_write_zeroes_sectors) = (0, 0);
        params.integrity_flags = self.flags;
        params.interval_exp = params.logical_bs_shift;
        params.metadata_size = self.bytes;
        params.pi_offset = self.offset;
        params.csum_type = self.checksum;
        params.tag_size = self.tag_bytes;
    }

    /// Most bytes of it in a request of at most `max_io` bytes.
    pub(super) fn room(&self, max_io: u32, block: u32) -> u32 {
        (max_io / block.max(512)).saturating_mul(u32::from(self.bytes)).next_multiple_of(4096)
    }
}

/// Opens the file that integrity data is kept in.
pub(super) fn open(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::DSYNC | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| Error::os(path.display().to_string(), &errno.into()))
}

/// Completions of ours: the high half of their index, above all of the queue's own.
const FIRST: u32 = 8;
const SECOND: u32 = 9;

/// A request whose data is done.
#[derive(Clone, Copy)]
struct Wait {
    io: Io,
    /// Of the step under way.
    progress: Progress,
}

/// What a queue is, as far as its integrity data needs it.
pub(super) struct Config {
    pub(super) queue: u16,
    pub(super) depth: u16,
    /// Bytes of a logical block.
    pub(super) block: u32,
    /// Bytes for each of them.
    pub(super) bytes: u8,
    /// Where in a tag's memory there is room, behind its data.
    pub(super) room_at: usize,
}

/// A queue with integrity data.
pub(super) struct Checked {
    inner: Box<dyn Export<Uring>>,
    config: Config,
    descriptors: Descriptors,
    /// The character device.
    device: FileId,
    kept: Option<FileId>,
    lane: u16,
    waits: Box<[Wait]>,
    waiting: usize,
}

impl Checked {
    pub(super) fn new(
        inner: Box<dyn Export<Uring>>,
        ring: &mut Uring,
        config: Config,
        (device, descriptors): (FileId, Descriptors),
        file: Option<&Path>,
    ) -> Result<Checked> {
        let kept = file.map(open).transpose()?;
        let kept = kept.map(|fd| ring.add_file(RingFile { fd, kind: FileKind::Regular }));
        let wait = Wait { io: Io::new(Op::Flush, 0, 0), progress: Progress::NONE };
        let waits = vec![wait; usize::from(config.depth)].into();
        let (lane, kept, waiting) = (0, kept.transpose()?, 0);
        Ok(Checked { inner, config, descriptors, device, kept, lane, waits, waiting })
    }

    /// Bytes of integrity data for so many of data.
    fn scaled(&self, bytes: u64) -> u64 {
        bytes / u64::from(self.config.block) * u64::from(self.config.bytes)
    }

    /// Goes on with a step of `tag`: what it has not moved yet.
    fn step(&self, ring: &mut Uring, kind: u32, tag: u16) {
        let Wait { io, progress } = self.waits[usize::from(tag)];
        let moved = progress.moved as usize;
        let len = usize::try_from(self.scaled(io.extent.len)).unwrap_or(0) - moved;
        let range = (self.config.room_at + moved, len);
        let place = (self.lane, kind << 16 | u32::from(tag));
        let requests = integrity_at(self.config.queue, Part::WHOLE.tag(tag)) + moved as u64;
        let stored = self.scaled(io.extent.at) + moved as u64;
        match (io.op == Op::Write, kind, self.kept) {
            (true, FIRST, _) => ring.read(place, self.device, requests, range),
            (true, _, Some(kept)) => ring.write(place, kept, stored, range),
            (false, FIRST, Some(kept)) => ring.read(place, kept, stored, range),
            // Nothing else ever wrote to that memory: it is zeros where nothing was loaded.
            _ => ring.write(place, self.device, requests, range),
        }
    }

    /// A step has moved something, or failed.
    fn stepped(&mut self, ring: &mut Uring, kind: u32, tag: u16, result: i32) {
        let Wait { io, progress } = &mut self.waits[usize::from(tag)];
        if progress.take(result).is_err() {
            return self.done(ring, tag, Err(Errno::EIO));
        }
        let (moved, len) = (u64::from(progress.moved), io.extent.len);
        if moved < self.scaled(len) {
            self.step(ring, kind, tag);
        } else if kind == FIRST {
            self.waits[usize::from(tag)].progress = Progress::NONE;
            self.step(ring, SECOND, tag);
        } else {
            self.done(ring, tag, Ok(()));
        }
    }

    fn done(&mut self, ring: &mut Uring, tag: u16, result: Result<(), Errno>) {
        self.waiting -= 1;
        let io = self.waits[usize::from(tag)].io;
        self.inner.finish(ring, tag, &io, result);
    }
}

impl Export<Uring> for Checked {
    fn depth(&self) -> u16 {
        self.inner.depth()
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.lane = lane;
        self.inner.arm(ring, lane)
    }

    fn event(&mut self, ring: &mut Uring, event: Completion, inbox: &mut Inbox) -> Result<()> {
        let kind = event.index >> 16;
        if kind < FIRST {
            return self.inner.event(ring, event, inbox);
        }
        let tag = u16::try_from(event.index & 0xffff).unwrap_or(0);
        self.stepped(ring, kind, tag, event.result);
        Ok(())
    }

    fn finish(&mut self, ring: &mut Uring, tag: u16, io: &Io, result: Result<(), Errno>) {
        // The descriptor is the request's until it is committed.
        let has = self.descriptors.read(tag).op_flags & IO_F_INTEGRITY != 0;
        let is_dropped = io.op == Op::Write && self.kept.is_none();
        if result.is_err() || !io.op.has_pages() || !has || is_dropped {
            return self.inner.finish(ring, tag, io, result);
        }
        self.waits[usize::from(tag)] = Wait { io: *io, progress: Progress::NONE };
        self.waiting += 1;
        let loads = io.op == Op::Write || self.kept.is_some();
        self.step(ring, if loads { FIRST } else { SECOND }, tag);
    }

    fn flush(&mut self, ring: &mut Uring) {
        self.inner.flush(ring);
    }

    fn rest(&mut self, ring: &mut Uring) -> Rest {
        self.inner.rest(ring)
    }

    fn is_closed(&self) -> bool {
        self.waiting == 0 && self.inner.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use devsplice_core::Limits;

    use super::*;

    #[test]
    fn the_kernel_is_told_and_there_is_room_for_the_largest_request() {
        let integrity =
            Integrity { bytes: 64, flags: 3, offset: 48, checksum: 4, tag_bytes: 8, file: None };
        let mut params = Params { logical_bs_shift: 9, ..Params::default() };
        integrity.limit(&mut params);
        assert_eq!(params.types, PARAM_INTEGRITY);
        assert_eq!((params.integrity_flags, params.interval_exp), (3, 9));
        assert_eq!((params.metadata_size, params.pi_offset), (64, 48));
        assert_eq!((params.csum_type, params.tag_size), (4, 8));
        assert_eq!(integrity.room(1 << 20, 512), 128 << 10);
        assert_eq!(Integrity { bytes: 8, ..integrity }.room(1 << 20, 4096), 4096);
    }

    #[test]
    fn a_disk_with_integrity_data_offers_nothing_that_would_leave_it_behind() {
        let integrity = Integrity { bytes: 8, ..Integrity::default() };
        let (limits, bare) = (Limits::ideal(1 << 20), Params::default());
        let mut params = super::super::params::params(&limits, false, 1 << 20, false);
        assert!(params.types & PARAM_DISCARD != 0 && params.max_write_zeroes_sectors != 0);
        integrity.limit(&mut params);
        assert_eq!(params.types & (PARAM_DISCARD | PARAM_INTEGRITY), PARAM_INTEGRITY);
        assert_eq!(params.max_discard_sectors, bare.max_discard_sectors);
        assert_eq!(params.max_write_zeroes_sectors, bare.max_write_zeroes_sectors);
        assert_eq!(params.discard_granularity, bare.discard_granularity);
    }

    #[test]
    fn integrity_data_is_beside_the_data_of_its_request() {
        let data = super::super::uapi::user_copy_at(3, 77);
        assert_eq!(integrity_at(3, 77), data | 1 << 62);
    }
}
