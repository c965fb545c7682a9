//! Answers for memory that the kernel reads and writes: one mapping per lane, a slot per tag, and
//! for each slot how many submitted entries name it.

use std::ptr::NonNull;

use devsplice_core::{Error, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};

/// How memory is given back, be it locked or not (Linux 5.18): all of the process may be locked,
/// on fault.
const DONTNEED: libc::c_int = libc::MADV_DONTNEED_LOCKED;

/// The kernel's huge page, which it may give where a single byte is used.
const HUGE: usize = 2 << 20;

/// Slots of equal size. Untouched ones cost no memory.
pub(crate) struct Arena {
    base: NonNull<u8>,
    stride: usize,
    /// Entries in the kernel's hands that name each slot's memory.
    lent: Box<[u16]>,
    locked: bool,
}

// SAFETY: the mapping belongs to this value alone, and a shared reference gives no access to it.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps `slots` slots of `stride` bytes, a multiple of the page size; `locked` ones are made
    /// resident at once and stay so.
    pub(crate) fn new(slots: usize, stride: usize, locked: bool) -> Result<Arena> {
        let bytes = slots
            .checked_mul(stride)
            .filter(|bytes| *bytes > 0 && stride.is_multiple_of(4096))
            .ok_or_else(|| Error::invalid("request memory", format!("{slots} x {stride} bytes")))?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh private mapping at an address of the kernel's choice aliases nothing;
        // this value alone owns it until drop.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)
        }
        .map_err(|errno| Error::os(format!("{bytes} bytes of request memory"), &errno.into()))?;
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| Error::invalid("request memory", "mapped at address 0"))?;
        let arena = Arena { base, stride, lent: vec![0; slots].into(), locked };
        if stride > HUGE {
            // A slot as large is there for the rare request; most use the first pages of it, and a
            // huge page for each would be hundreds of times that.
            arena.have_small_pages();
        }
        if locked {
            // SAFETY: the range is exactly the mapping made above; locking changes no contents.
            unsafe { mlock(base.as_ptr().cast(), bytes) }.map_err(|errno| {
                Error::os(format!("locking {bytes} bytes of request memory"), &errno.into())
                    .next("raise the limit (ulimit -l), or lower --depth or --queues")
            })?;
        }
        Ok(arena)
    }

    /// Has the kernel give what is touched and no more: unasked it may give a huge page where a
    /// single byte is used. If that fails, it is so.
    pub(crate) fn have_small_pages(&self) {
        let bytes = self.lent.len() * self.stride;
        // SAFETY: the range is exactly this value's mapping; the advice changes no contents.
        let _ = unsafe { madvise(self.base.as_ptr().cast(), bytes, Advice::LinuxNoHugepage) };
    }

    /// The address of a range of a slot, for the kernel.
    ///
    /// # Panics
    /// If the range leaves the slot: the kernel would touch another request's memory.
    #[inline]
    pub(crate) fn address(&self, slot: usize, at: usize, len: usize) -> u64 {
        assert!(
            slot < self.lent.len() && at.checked_add(len).is_some_and(|end| end <= self.stride),
            "range {at}+{len} leaves slot {slot} of {} bytes",
            self.stride
        );
        (self.base.as_ptr() as usize + slot * self.stride + at) as u64
    }

    /// Where a range of a slot begins, for what is shared with the kernel while it is lent.
    ///
    /// # Panics
    /// As [`Arena::address`].
    #[inline]
    pub(crate) fn place(&self, slot: usize, at: usize, len: usize) -> NonNull<u8> {
        let _ = self.address(slot, at, len);
        // SAFETY: within the mapping: `address` has just asserted that the range is in its slot.
        unsafe { self.base.add(slot * self.stride + at) }
    }

    /// How many slots there are.
    pub(crate) fn slots(&self) -> usize {
        self.lent.len()
    }

    /// Bytes of a slot.
    pub(crate) fn room(&self) -> usize {
        self.stride
    }

    /// How many entries name the slot's memory.
    pub(crate) fn lent(&self, slot: usize) -> u16 {
        self.lent[slot]
    }

    /// An entry that names the slot's memory was queued.
    #[inline]
    pub(crate) fn lend(&mut self, slot: usize) {
        self.lent[slot] += 1;
    }

    /// The completion of such an entry is out.
    #[inline]
    pub(crate) fn give_back(&mut self, slot: usize) {
        self.lent[slot] -= 1;
    }

    /// The slot's bytes, while no entry names them.
    ///
    /// # Panics
    /// If one does.
    #[inline]
    pub(crate) fn bytes(&mut self, slot: usize) -> &mut [u8] {
        assert_eq!(self.lent[slot], 0, "slot {slot} is in the kernel's hands");
        // SAFETY: `slot` is below the number of slots (indexed above), so the offset is inside the
        // mapping.
        let start = unsafe { self.base.as_ptr().add(slot * self.stride) };
        // SAFETY: the mapping holds initialised (zero-filled) bytes; no queued entry names them
        // (the count above, kept by `Uring`), and `&mut self` excludes other slices.
        unsafe { std::slice::from_raw_parts_mut(start, self.stride) }
    }

    /// Puts bytes into a range of a slot that is lent, to whoever calls this.
    ///
    /// # Panics
    /// If the range leaves the slot.
    pub(crate) fn put_lent(&mut self, slot: usize, at: usize, bytes: &[u8]) {
        let place = self.place(slot, at, bytes.len());
        // SAFETY: `place` has asserted that the range is inside its slot. It is part of a read,
        // whose ranges belong to one splice alone, and this one's caller has no entry out that
        // names them; `bytes` lie in another mapping. No slice of the slot exists: it is lent.
        unsafe { place.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
    }

    /// As `put_lent`, of zeros.
    ///
    /// # Panics
    /// As there.
    pub(crate) fn zero_lent(&mut self, slot: usize, at: usize, len: usize) {
        let place = self.place(slot, at, len);
        // SAFETY: as in `put_lent`.
        unsafe { place.write_bytes(0, len) };
    }

    /// Copies between two slots that no entry names.
    ///
    /// # Panics
    /// If one names either, or they are the same, or a range leaves its slot.
    pub(crate) fn copy(&mut self, from: (usize, usize), to: (usize, usize), len: usize) {
        let places = [from, to].map(|(slot, at)| {
            assert_eq!(self.lent[slot], 0, "slot {slot} is in the kernel's hands");
            self.place(slot, at, len)
        });
        assert_ne!(from.0, to.0, "a copy from a slot to itself");
        let [from, to] = places;
        // SAFETY: `place` has asserted that both ranges are inside their slots, which are two, so
        // they do not overlap; the bytes are initialised (zero-filled); no queued entry names them
        // (the counts above, kept by `Uring`), and `&mut self` excludes slices of them.
        unsafe { from.copy_to_nonoverlapping(to, len) };
    }

    /// Gives back the memory of all slots that no entry names; their bytes are zeros then. For when
    /// nobody wants the data in them. What is locked stays.
    pub(crate) fn rest(&mut self) {
        let mut slot = 0;
        while !self.locked && slot < self.lent.len() {
            let free = self.lent[slot..].iter().take_while(|count| **count == 0).count();
            // SAFETY: `slot` is below the number of slots, so the offset is inside the mapping.
            let start = unsafe { self.base.as_ptr().add(slot * self.stride) };
            // SAFETY: the range is `free` whole slots of the mapping. No queued entry names them
            // (the count above, kept by `Uring`), `&mut self` excludes slices of them, and zeros
            // are as good as any bytes there. A failure leaves them as they are.
            let _ = unsafe { libc::madvise(start.cast(), free * self.stride, DONTNEED) };
            slot += free + 1;
        }
    }

    /// Makes all memory of a slot resident, so that the kernel touches it without waiting. Best
    /// effort: where there is none to be had, it waits later.
    pub(crate) fn populate(&self, slot: usize) {
        let start = self.place(slot, 0, self.stride);
        // SAFETY: a whole slot of the mapping, as `place` has asserted; no contents change.
        let _ = unsafe { madvise(start.as_ptr().cast(), self.stride, Advice::LinuxPopulateWrite) };
    }

    /// Whether the kernel may still touch any of it.
    pub(crate) fn is_lent(&self) -> bool {
        self.lent.iter().any(|count| *count != 0)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.is_lent() {
            // An entry is still out (the ring failed, or the device was torn down): its memory must
            // outlive it, so the mapping is left to the end of the process.
            return;
        }
        let bytes = self.lent.len() * self.stride;
        // SAFETY: the mapping is this value's own, of exactly this size, and nothing refers to it.
        // A failure would leave it mapped, which harms nothing.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_lent_ones_cannot_be_read() {
        let mut arena = Arena::new(2, 4096, true).unwrap();
        arena.bytes(0).fill(1);
        arena.bytes(1).fill(2);
        assert!(arena.bytes(0).iter().all(|byte| *byte == 1));
        assert_eq!(arena.address(1, 5, 1) - arena.address(0, 5, 1), 4096);
        arena.lend(1);
        let read = std::panic::AssertUnwindSafe(|| arena.bytes(1).len());
        assert!(std::panic::catch_unwind(read).is_err());
        arena.give_back(1);
        assert_eq!(arena.bytes(1).len(), 4096);
    }

    #[test]
    fn a_rest_gives_back_what_nobody_has_and_touches_nothing_else() {
        let mut arena = Arena::new(4, 8192, false).unwrap();
        for slot in 0..4 {
            arena.bytes(slot).fill(7);
        }
        arena.lend(1);
        arena.rest();
        arena.give_back(1);
        let held = |arena: &mut Arena, byte| {
            [0, 1, 2, 3].map(|slot| arena.bytes(slot).iter().all(|at| *at == byte))
        };
        assert_eq!(held(&mut arena, 7), [false, true, false, false]);
        assert_eq!(held(&mut arena, 0), [true, false, true, true]);
        let mut locked = Arena::new(1, 4096, true).unwrap();
        locked.bytes(0).fill(7);
        locked.rest();
        assert!(locked.bytes(0).iter().all(|byte| *byte == 7));
    }

    #[test]
    fn an_arena_is_of_small_pages_where_that_is_wanted() {
        // The flags of the mapping that has its first byte (proc(5): `nh` is "no huge page").
        let flags = |arena: &Arena| {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let at = arena.address(0, 0, 1);
            let has_it = |line: &str| {
                let (first, end) = line.split(' ').next()?.split_once('-')?;
                let number = |text| u64::from_str_radix(text, 16).ok();
                Some((number(first)?..number(end)?).contains(&at))
            };
            let ours = maps.lines().skip_while(|line| has_it(line) != Some(true));
            ours.skip(1).find_map(|line| line.strip_prefix("VmFlags:")).unwrap_or("").to_owned()
        };
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            println!("skipped: this kernel has no huge pages of its own accord");
            return;
        }
        let arena = Arena::new(4, 1 << 20, false).unwrap();
        assert!(!flags(&arena).contains(" nh"), "{}", flags(&arena));
        arena.have_small_pages();
        assert!(flags(&arena).contains(" nh"), "{}", flags(&arena));
        let large = Arena::new(1, 2 * HUGE, false).unwrap();
        assert!(flags(&large).contains(" nh"), "{}", flags(&large));
    }

    #[test]
    fn copies_stay_in_their_slots_and_away_from_what_is_lent() {
        let mut arena = Arena::new(2, 4096, false).unwrap();
        arena.bytes(0)[10..14].copy_from_slice(b"abcd");
        arena.copy((0, 10), (1, 4092), 4);
        assert_eq!(&arena.bytes(1)[4092..], b"abcd");
        arena.lend(1);
        let bad = [((0, 0), (1, 0), 1), ((0, 4093), (0, 0), 4), ((0, 0), (0, 8), 1)];
        for (from, to, len) in bad {
            let copy = std::panic::AssertUnwindSafe(|| arena.copy(from, to, len));
            assert!(std::panic::catch_unwind(copy).is_err(), "{from:?} {to:?} {len}");
        }
        arena.give_back(1);
    }

    #[test]
    fn ranges_outside_a_slot_panic() {
        let arena = Arena::new(1, 4096, false).unwrap();
        for (slot, at, len) in [(1, 0, 1), (0, 4096, 1), (0, 0, 4097), (0, usize::MAX, 2)] {
            let take = std::panic::AssertUnwindSafe(|| arena.address(slot, at, len));
            assert!(std::panic::catch_unwind(take).is_err());
        }
    }
}
