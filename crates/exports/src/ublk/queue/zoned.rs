//! Answers for requests of a device with zones: they begin and end with its layer, which says where
//! an append goes and what a report is told.

use std::sync::Arc;

use devsplice_core::zones::{Ask, Begun, Condition, Zone};
use devsplice_core::{Errno, Extent, Io, Op, Zones};
use devsplice_uring::Uring;
use zerocopy::{Immutable, IntoBytes};

use super::super::uapi::{IO_F_FUA, IoDesc, op};
use super::{Progress, Queue, request};

/// The zones of a queue's device, and what of them each of its tags is about.
pub(super) struct Zoned {
    zones: Arc<dyn Zones>,
    tags: Box<[About]>,
}

#[derive(Clone, Copy, Default)]
struct About {
    begun: Option<Begun>,
    /// The sector where an append goes, which the kernel is told with its result.
    sector: u64,
}

/// `struct blk_zone` (include/uapi/linux/blkzoned.h), in sectors of 512 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
struct Told {
    start: u64,
    len: u64,
    pointer: u64,
    kind: u8,
    condition: u8,
    not_sequential: u8,
    reset: u8,
    pad: [u8; 4],
    capacity: u64,
    reserved: [u8; 24],
}

const _: () = assert!(size_of::<Told>() == 64);

/// `BLK_ZONE_TYPE_*`.
const CONVENTIONAL: u8 = 1;
const SEQUENTIAL: u8 = 2;
/// The write pointer of a zone that has none.
const NO_POINTER: u64 = u64::MAX;

impl Told {
    fn new(zone: &Zone) -> Told {
        let (kind, condition) = match zone.condition {
            Condition::Conventional => (CONVENTIONAL, 0),
            Condition::Empty => (SEQUENTIAL, 1),
            Condition::ImplicitlyOpen => (SEQUENTIAL, 2),
            Condition::ExplicitlyOpen => (SEQUENTIAL, 3),
            Condition::Closed => (SEQUENTIAL, 4),
            Condition::Full => (SEQUENTIAL, 14),
        };
        let has_pointer = !matches!(zone.condition, Condition::Conventional | Condition::Full);
        Told {
            start: zone.at / 512,
            len: zone.len / 512,
            pointer: if has_pointer { (zone.at + zone.written) / 512 } else { NO_POINTER },
            kind,
            condition,
            not_sequential: 0,
            reset: 0,
            pad: [0; 4],
            capacity: zone.capacity / 512,
            reserved: [0; 24],
        }
    }
}

impl Zoned {
    pub(super) fn new(zones: Arc<dyn Zones>, depth: u16) -> Zoned {
        Zoned { zones, tags: vec![About::default(); usize::from(depth)].into() }
    }

    /// What the kernel is told beside a tag's result.
    pub(super) fn sector(&self, tag: u16) -> u64 {
        self.tags[usize::from(tag)].sector
    }

    /// A tag's request has come to its end, if it was begun.
    pub(super) fn end(&mut self, tag: u16, result: Result<(), Errno>) {
        if let Some(begun) = self.tags[usize::from(tag)].begun.take() {
            self.zones.end(&begun, result);
        }
    }

    /// What the stack is asked for, or `None` if there is nothing to do.
    fn begin(&mut self, tag: u16, descriptor: &IoDesc) -> Result<Option<Io>, Errno> {
        let fua = descriptor.op_flags & IO_F_FUA != 0;
        let ask = match descriptor.op_flags & 0xff {
            op::WRITE => Ask::Write(fua),
            op::ZONE_APPEND => Ask::Append(fua),
            op::FLUSH => Ask::Flush,
            op::ZONE_OPEN => Ask::Open,
            op::ZONE_CLOSE => Ask::Close,
            op::ZONE_FINISH => Ask::Finish,
            op::ZONE_RESET => Ask::Reset,
            op::ZONE_RESET_ALL => Ask::ResetAll,
            _ => return request(descriptor).map(Some),
        };
        let at = descriptor.start_sector.saturating_mul(512);
        let extent = Extent { at, len: u64::from(descriptor.nr_sectors) * 512 };
        let begun = self.zones.begin(ask, extent)?;
        let about = &mut self.tags[usize::from(tag)];
        about.begun = begun;
        if let (Ask::Append(_), Some(begun)) = (ask, begun) {
            about.sector = begun.io.extent.at / 512;
        }
        Ok(begun.map(|begun| begun.io))
    }

    /// Puts a report into `room`: as many zones as fit and were asked for. How many bytes it has.
    fn report(&self, descriptor: &IoDesc, room: &mut [u8]) -> usize {
        let at = descriptor.start_sector.saturating_mul(512);
        let first = u32::try_from(at / self.zones.shape().zone).unwrap_or(u32::MAX);
        let count = usize::try_from(descriptor.nr_sectors).unwrap_or(0);
        let places = room.chunks_exact_mut(size_of::<Told>()).take(count);
        let mut bytes = 0;
        for (number, place) in (first..).zip(places) {
            match self.zones.zone(number) {
                Some(zone) => place.copy_from_slice(Told::new(&zone).as_bytes()),
                // One without a length ends a report that is shorter than was asked for.
                None => place.fill(0),
            }
            bytes += place.len();
        }
        bytes
    }
}

impl Queue {
    /// What a descriptor asks of the stack, where there are zones. `None` if it is answered.
    #[inline(never)]
    pub(super) fn asked_of_zones(
        &mut self,
        ring: &mut Uring,
        tag: u16,
        descriptor: &IoDesc,
    ) -> Option<Io> {
        let zoned = self.zoned.as_mut()?;
        zoned.tags[usize::from(tag)] = About::default();
        if descriptor.op_flags & 0xff == op::REPORT_ZONES {
            let room = &mut ring.memory(self.lane, tag)[Uring::DATA_AT..];
            let len = zoned.report(descriptor, room) as u64;
            let state = &mut self.tags[usize::from(tag)];
            // From here on it is a read whose data is there.
            (state.io, state.in_slot) = (Io::new(Op::Read, 0, len), false);
            state.progress = Progress::NONE;
            self.push(ring, tag);
            return None;
        }
        let (errno, io) = match zoned.begin(tag, descriptor) {
            Ok(Some(io)) => return Some(io),
            Ok(None) => (None, Io::new(Op::Flush, 0, 0)),
            Err(errno) => (Some(errno), Io::new(Op::Flush, 0, 0)),
        };
        self.tags[usize::from(tag)].io = io;
        self.commit(ring, tag, errno.map_or(Ok(()), Err));
        None
    }
}
