//! Answers for how many threads serve a device, and with how much memory for its requests.

use devsplice_core::limits::SECTOR;
use devsplice_uring::LaneMemory;
use rustix::process::{Resource, getrlimit};

use super::uapi::{DevInfo, F_BATCH_IO, F_UNPRIVILEGED};
use super::{DataPath, Extra, MAX_IO, Options};
use crate::threads::{Bottom, Service, Shape};

/// Bytes that the requests of a device may have locked where the kernel copies (`DataPath::Copy`):
/// that memory has to be there before a request comes. Requests are smaller then.
const MAX_LOCKED: u32 = 12 << 20;
/// What a request may at least have there, however many there are.
const MIN_IO: u32 = 16 << 10;
/// Most threads of a device.
const MAX_THREADS: u16 = 256;

/// Most bytes of a request on this path.
pub(super) fn max_io(info: &DevInfo, path: DataPath) -> u32 {
    if path != DataPath::Copy {
        return MAX_IO;
    }
    let tags = u32::from(info.nr_hw_queues) * u32::from(info.queue_depth);
    // Each has a page for headers, too.
    let limit = match info.flags & F_UNPRIVILEGED {
        0 => None,
        _ => getrlimit(Resource::Memlock).current,
    };
    let each = (may_lock(limit) / tags.max(1)).saturating_sub(4096).clamp(MIN_IO, MAX_IO);
    1 << each.ilog2()
}

/// Bytes that the requests of a device may have locked: of a user's limit a part is left for what
/// batches lock.
fn may_lock(limit: Option<u64>) -> u32 {
    let most = limit.and_then(|limit| u32::try_from(limit / 4 * 3).ok());
    most.map_or(MAX_LOCKED, |most| most.min(MAX_LOCKED))
}

/// The threads and their memory.
pub(super) fn shape((options, extra): (&Options, &Extra), info: &DevInfo, path: DataPath) -> Shape {
    let slots = path.copies() == 0;
    let is_batched = info.flags & F_BATCH_IO != 0 && path != DataPath::Copy;
    let queues = info.nr_hw_queues.max(1);
    let most = match (extra.per_io, is_batched) {
        (true, _) => info.queue_depth,
        (false, true) => MAX_THREADS,
        (false, false) => info.nr_hw_queues,
    };
    let room = extra.integrity.as_ref().map_or(0, |kept| kept.room(MAX_IO, SECTOR));
    // As many of each queue, and a tag at least for each.
    let each = extra.per_queue.min(info.queue_depth).min(MAX_THREADS.min(options.threads) / queues);
    let (threads, hands) = match each {
        0 | 1 => {
            let threads = options.threads.clamp(1, most);
            (threads, if extra.per_io { threads } else { 1 })
        }
        each => (queues * each, each),
    };
    let depth = info.queue_depth.div_ceil(hands);
    // Zero-copy paths have memory for the requests that fall back; untouched, it costs nothing.
    let memory = LaneMemory {
        depth: if extra.rotates { depth.saturating_mul(2) } else { depth },
        bytes: max_io(info, path) + room,
        slots,
        locked: path == DataPath::Copy,
    };
    Shape {
        queues: info.nr_hw_queues,
        threads,
        is_shared: extra.per_io,
        is_wide: false,
        memory,
        stuck_seconds: options.stuck_seconds,
        low_depth: false,
    }
}

/// Whether it is served as one whose requests come one at a time: as was asked, or where it pays.
pub(super) fn is_low_depth(
    extra: &Extra,
    (info, path): (&DevInfo, DataPath),
    service: &Service,
) -> bool {
    let can = path == DataPath::AutoRegister && info.flags & F_BATCH_IO == 0;
    can && extra.low_depth.unwrap_or_else(|| pays_low_depth(extra, service))
}

/// Whether most requests of this disk can go one at a time with fewer calls: their ends can be sent
/// ahead, behind the splice to a file, and nothing has to hear of them in between.
fn pays_low_depth(extra: &Extra, service: &Service) -> bool {
    let has_queues_of_its_own = !extra.deals() && service.pool.is_none();
    let is_plain = service.stack.zones().is_none() && extra.integrity.is_none();
    let is_file = |bottom: &Bottom| matches!(bottom, Bottom::File { .. });
    let is_quiet = service.stack.lives().next().is_none();
    has_queues_of_its_own && is_plain && is_quiet && service.bottoms.iter().all(is_file)
}

#[cfg(test)]
mod tests {
    use super::super::tests::options;
    use super::*;

    #[test]
    fn locked_memory_is_bounded_by_smaller_requests_and_other_paths_have_large_ones() {
        let info =
            |nr_hw_queues, queue_depth| DevInfo { nr_hw_queues, queue_depth, ..DevInfo::default() };
        let locked = |queues: u16, depth: u16| {
            let bytes = max_io(&info(queues, depth), DataPath::Copy);
            assert!(bytes.is_power_of_two() && (MIN_IO..=MAX_IO).contains(&bytes));
            u32::from(queues) * u32::from(depth) * (bytes + 4096)
        };
        for (queues, depth) in [(1, 1), (1, 128), (2, 128), (4, 128), (3, 100), (1, 256)] {
            assert!(locked(queues, depth) <= MAX_LOCKED, "{queues} x {depth}");
        }
        assert_eq!(max_io(&info(2, 128), DataPath::Copy), 32 << 10);
        assert_eq!(max_io(&info(4, 4096), DataPath::Copy), MIN_IO);
        for path in [DataPath::AutoRegister, DataPath::Register, DataPath::UserCopy] {
            assert_eq!(max_io(&info(4, 4096), path), MAX_IO);
        }
    }

    #[test]
    fn a_users_limit_is_not_exceeded() {
        assert_eq!([None, Some(u64::MAX), Some(1 << 30)].map(may_lock), [MAX_LOCKED; 3]);
        assert_eq!(
            [8 << 20, 64 << 10, 0].map(|limit| may_lock(Some(limit))),
            [6 << 20, 48 << 10, 0]
        );
    }

    #[test]
    fn more_threads_than_queues_are_for_batches_that_do_not_copy() {
        let threads = |flags, path| {
            let info = DevInfo { nr_hw_queues: 2, queue_depth: 4, flags, ..DevInfo::default() };
            shape((&options(None, 5), &Extra::default()), &info, path).threads
        };
        assert_eq!(threads(F_BATCH_IO, DataPath::AutoRegister), 5);
        assert_eq!(threads(F_BATCH_IO, DataPath::UserCopy), 5);
        assert_eq!(threads(F_BATCH_IO, DataPath::Copy), 2);
        assert_eq!(threads(0, DataPath::AutoRegister), 2);
    }

    #[test]
    fn queues_have_as_many_threads_of_their_own_as_there_are_for_all() {
        let shape = |queues, depth, per_queue, asked| {
            let info = DevInfo { nr_hw_queues: queues, queue_depth: depth, ..DevInfo::default() };
            let extra = Extra { per_queue, ..Extra::default() };
            let shape = shape((&options(None, asked), &extra), &info, DataPath::AutoRegister);
            assert!(!shape.is_shared);
            (shape.threads, shape.memory.depth)
        };
        assert_eq!(shape(2, 65, 4, 8), (8, 17));
        // The kernel has given it fewer queues than it was to have, or its bottoms have no rings.
        assert_eq!(shape(1, 65, 4, 8), (4, 17));
        assert_eq!(shape(2, 65, 4, 5), (4, 33));
        assert_eq!(shape(2, 65, 4, 3), (2, 65));
        assert_eq!(shape(2, 3, 4, 8), (6, 1));
        assert_eq!(shape(200, 65, 4, 800), (200, 65));
    }
}
