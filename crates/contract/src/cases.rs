//! Answers for the promises that everything keeps which takes requests: one function each. The
//! three entries run the same ones.

use devsplice_core::{Errno, Op};

use crate::bench::{BATCH, Bench, LARGEST};
use crate::suite::{Outcome, Verdict};

/// A promise and its test.
pub type Promise = (&'static str, fn(&mut Bench) -> Outcome);

/// Batches of a random case.
const ROUNDS: usize = 12;

/// What every target promises, read-only ones but the last.
pub const PROMISES: &[Promise] = &[
    ("reads_bring_what_was_written", reads_bring_what_was_written),
    ("the_smallest_write_changes_its_block_only", smallest_writes),
    ("requests_begin_and_end_on_any_block", any_block),
    ("mixed_requests_at_depth_keep_every_byte", mixed),
    ("reads_beside_writes_of_the_same_place_bring_old_or_new", racing_reads),
    ("writes_that_overlap_leave_one_of_them_in_each_block", overlapping),
    ("the_largest_request_is_done_whole", largest),
    ("what_is_discarded_reads_as_before_or_as_zeros", discarded),
    ("what_is_zeroed_reads_as_zeros", zeroed),
    ("flushes_and_durable_writes_succeed_among_others", flushes),
];

/// What a target promises to which requests come from a front end of ours.
pub const INNER: &[Promise] = &[
    ("requests_that_make_no_sense_are_refused_and_change_nothing", refused),
    ("what_was_flushed_or_written_durably_survives_a_power_cut", survives),
];

const KEPT: Outcome = Ok(Verdict::Kept);

fn none(reason: &str) -> Outcome {
    Ok(Verdict::NotMade(reason.into()))
}

/// Leaves out what changes data where nothing may be changed; else fills.
macro_rules! filled {
    ($bench:ident) => {
        if !$bench.offers(Op::Write) {
            return none("it is read-only");
        }
        $bench.fill(64 << 10)?;
    };
}

fn reads_bring_what_was_written(bench: &mut Bench) -> Outcome {
    filled!(bench);
    for step in [bench.block(), 4096, 20 << 10, LARGEST] {
        // The smallest step over a large device would take long and show nothing more.
        if bench.span / step <= 8192 {
            bench.check(step)?;
        }
    }
    bench.fill(LARGEST)?;
    bench.check(12 << 10)?;
    KEPT
}

fn smallest_writes(bench: &mut Bench) -> Outcome {
    filled!(bench);
    let (block, span) = (bench.block(), bench.span);
    let mut places = vec![0, span - block];
    for _ in 0..BATCH - 2 {
        places.push(bench.rng.below(span / block) * block);
    }
    places.sort_unstable();
    places.dedup();
    let asks: Vec<_> = places.iter().map(|at| bench.ask(Op::Write, *at, block)).collect();
    bench.must(&asks)?;
    bench.check(64 << 10)?;
    KEPT
}

fn any_block(bench: &mut Bench) -> Outcome {
    filled!(bench);
    let (block, span) = (bench.block(), bench.span);
    for count in 1..=17 {
        let len = (count * block).min(span);
        // Step by one block more than the length: every remainder of any chunk comes up.
        let steps = (span / (len + block)).min(BATCH as u64);
        let writes: Vec<_> =
            (0..steps).map(|step| bench.ask(Op::Write, step * (len + block), len)).collect();
        bench.must(&writes)?;
        let reads: Vec<_> =
            (0..steps).map(|step| bench.ask(Op::Read, step * (len + block), len)).collect();
        bench.must(&reads)?;
    }
    bench.check(64 << 10)?;
    KEPT
}

fn mixed(bench: &mut Bench) -> Outcome {
    filled!(bench);
    for round in 0..ROUNDS {
        let most = if round % 4 == 3 { LARGEST } else { 64 << 10 };
        let asks = bench.mix([40, 40, 4, 8], most);
        bench.must(&asks)?;
    }
    bench.check(64 << 10)?;
    KEPT
}

fn racing_reads(bench: &mut Bench) -> Outcome {
    filled!(bench);
    for _ in 0..ROUNDS {
        let mut asks = bench.mix([0, 100, 0, 0], 32 << 10);
        for place in 0..asks.len() {
            // One sector, which no read sees half of: more would be two reads.
            let extent = asks[place].io.extent;
            asks.push(bench.ask(Op::Read, extent.at, bench.block()));
        }
        bench.must(&asks)?;
    }
    KEPT
}

fn overlapping(bench: &mut Bench) -> Outcome {
    filled!(bench);
    for _ in 0..ROUNDS {
        let hot = bench.extent(128 << 10);
        let mut asks = Vec::new();
        for _ in 0..BATCH / 2 {
            let extent = bench.extent(64 << 10);
            let at = (hot.at + extent.at % hot.len).min(bench.span - extent.len);
            asks.push(bench.ask(Op::Write, at, extent.len));
        }
        bench.must(&asks)?;
        bench.check(64 << 10)?;
    }
    KEPT
}

fn largest(bench: &mut Bench) -> Outcome {
    filled!(bench);
    let len = LARGEST.min(bench.span);
    let places = [0, (bench.span - len) / 2 / bench.block() * bench.block(), bench.span - len];
    for at in places {
        let write = bench.ask(Op::Write, at, len);
        let read = bench.ask(Op::Read, at, len);
        bench.must(&[write])?;
        bench.must(&[read])?;
    }
    for op in [Op::Discard, Op::WriteZeroes { unmap: false }, Op::WriteZeroes { unmap: true }] {
        if bench.offers(op) {
            let whole = bench.ask(op, 0, bench.span);
            bench.must(&[whole])?;
            bench.check(64 << 10)?;
        }
    }
    KEPT
}

fn discarded(bench: &mut Bench) -> Outcome {
    if !bench.offers(Op::Discard) {
        return none("it offers no discard");
    }
    holes(bench, &[Op::Discard])
}

fn zeroed(bench: &mut Bench) -> Outcome {
    let ops = [Op::WriteZeroes { unmap: false }, Op::WriteZeroes { unmap: true }];
    if !ops.iter().all(|op| bench.offers(*op)) {
        return none("it offers no write-zeroes");
    }
    holes(bench, &ops)
}

/// Makes holes of all sizes, and looks at them and their neighbours; then writes into them.
fn holes(bench: &mut Bench, ops: &[Op]) -> Outcome {
    filled!(bench);
    for (round, most) in [bench.block(), 4096, 64 << 10, LARGEST].into_iter().enumerate() {
        let op = ops[round % ops.len()];
        let places = bench.mix([0, 100, 0, 0], most);
        let asks: Vec<_> =
            places.iter().map(|ask| bench.ask(op, ask.io.extent.at, ask.io.extent.len)).collect();
        bench.must(&asks)?;
        bench.check(64 << 10)?;
    }
    let asks = bench.mix([30, 70, 0, 0], 64 << 10);
    bench.must(&asks)?;
    bench.check(64 << 10)?;
    KEPT
}

fn flushes(bench: &mut Bench) -> Outcome {
    filled!(bench);
    for _ in 0..ROUNDS / 2 {
        let mut asks = bench.mix([20, 60, 20, 0], 32 << 10);
        let alone = bench.ask(Op::Flush, 0, 0);
        asks.push(alone);
        bench.must(&asks)?;
        bench.must(&[alone])?;
    }
    bench.check(64 << 10)?;
    KEPT
}

fn refused(bench: &mut Bench) -> Outcome {
    if bench.offers(Op::Write) {
        bench.fill(64 << 10)?;
    }
    let (block, size) = (bench.block(), bench.limits.size);
    let mut asks = Vec::new();
    let places = [
        (size, block),
        (size - block, 2 * block),
        (0, 0),
        (u64::MAX - block + 1, 2 * block),
        (1 << 63, 1 << 63),
        (block / 2, block),
        (0, block / 2),
    ];
    for (at, len) in places {
        // One sector is half a block where blocks are larger.
        let whole = at % block == 0 && len % block == 0;
        if whole || block > 512 {
            for op in [Op::Read, Op::Write] {
                // Memory for it could not be had.
                if len <= LARGEST {
                    asks.push((bench.ask(op, at, len), Errno::EINVAL));
                }
            }
            asks.push((bench.ask(Op::Discard, at, len), Errno::EINVAL));
        }
    }
    if bench.limits.read_only {
        asks.retain(|(ask, _)| !ask.io.op.changes());
    }
    for op in [Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }] {
        if !bench.offers(op) {
            let errno = if bench.limits.read_only { Errno::EROFS } else { Errno::EOPNOTSUPP };
            asks.push((bench.ask(op, 0, block), errno));
        }
    }
    bench.must_refuse(&asks)?;
    bench.check(64 << 10)?;
    KEPT
}

fn survives(bench: &mut Bench) -> Outcome {
    filled!(bench);
    for _ in 0..ROUNDS {
        let flush = bench.ask(Op::Flush, 0, 0);
        bench.must(&[flush])?;
        let asks = bench.mix([0, 80, 5, 5], 64 << 10);
        bench.must(&asks)?;
        if bench.rng.percent(50) {
            let flush = bench.ask(Op::Flush, 0, 0);
            bench.must(&[flush])?;
        }
        let asks = bench.mix([0, 85, 0, 5], 64 << 10);
        bench.must(&asks)?;
        if !bench.cut() {
            return Ok(Verdict::Skipped("its power cannot be cut".into()));
        }
        bench.check(64 << 10)?;
    }
    KEPT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::SECTOR;
    use crate::target::{Ask, Done, Target};
    use devsplice_core::Limits;

    /// Ways in which a thing that keeps bytes can go wrong.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Lie {
        None,
        /// One byte of a write is not written.
        Drop,
        /// A long write succeeds and its last sector was not written.
        Short,
        /// A long read succeeds and its last sector was not filled.
        Unfilled,
        /// A read brings what was there before the last write.
        Stale,
        /// Zeroing does nothing.
        NotZeroed,
        /// A discard reaches the sector behind its end.
        Neighbour,
        /// What is refused was done.
        DoneAnyway,
        /// A request in a hundred is never answered.
        Lost,
        /// What was flushed is lost with power.
        Volatile,
        /// A request in a hundred fails.
        Fails,
    }

    struct Memory {
        bytes: Vec<u8>,
        old: Vec<u8>,
        durable: Vec<u8>,
        lie: Lie,
        count: usize,
    }

    impl Memory {
        fn one(&mut self, ask: &Ask) -> Done {
            let extent = ask.io.extent;
            self.count += 1;
            let refused = extent.end().is_none_or(|end| end > self.bytes.len() as u64)
                || ask.io.op != Op::Flush && extent.len == 0
                || !(extent.at | extent.len).is_multiple_of(SECTOR as u64);
            if refused && self.lie != Lie::DoneAnyway {
                return Done { result: Err(Errno::EINVAL), bytes: Vec::new() };
            }
            if self.lie == Lie::Fails && self.count.is_multiple_of(100) {
                return Done { result: Err(Errno::EIO), bytes: Vec::new() };
            }
            let from = (extent.at as usize).min(self.bytes.len());
            let to = from.saturating_add(extent.len as usize).min(self.bytes.len());
            let range = from..to;
            let mut read = Vec::new();
            if ask.io.op.changes() {
                self.old.clone_from(&self.bytes);
            }
            let is_long = range.len() > 8 * SECTOR;
            match ask.io.op {
                Op::Read => {
                    let all = if self.lie == Lie::Stale { &self.old } else { &self.bytes };
                    read = all[range].to_vec();
                    if self.lie == Lie::Unfilled && is_long {
                        let end = read.len() - SECTOR;
                        read[end..].fill(crate::content::POISON);
                    }
                }
                Op::Write => {
                    let mut bytes = ask.bytes();
                    bytes.truncate(range.len());
                    let kept = self.bytes[to.saturating_sub(SECTOR)..to].to_vec();
                    let byte = self.bytes.get(from + 77).copied();
                    self.bytes[range].copy_from_slice(&bytes);
                    if self.lie == Lie::Short && is_long {
                        self.bytes[to - SECTOR..to].copy_from_slice(&kept);
                    }
                    if let (Lie::Drop, Some(byte)) = (self.lie, byte) {
                        self.bytes[from + 77] = byte;
                    }
                }
                Op::Discard if self.lie == Lie::Neighbour => {
                    let to = (to + SECTOR).min(self.bytes.len());
                    self.bytes[from..to].fill(0);
                }
                Op::WriteZeroes { .. } if self.lie == Lie::NotZeroed => {}
                Op::Flush => {}
                _ => self.bytes[range].fill(0),
            }
            if self.lie != Lie::Volatile {
                self.durable.clone_from(&self.bytes);
            }
            let result = if refused { Err(Errno::EINVAL) } else { Ok(()) };
            Done { result, bytes: read }
        }
    }

    impl Target for Memory {
        fn limits(&self) -> Limits {
            Limits::ideal(self.bytes.len() as u64)
        }

        fn run(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String> {
            let mut dones: Vec<_> = asks.iter().map(|ask| self.one(ask)).collect();
            if self.lie == Lie::Lost && self.count > 100 {
                dones.pop();
            }
            Ok(dones)
        }

        fn cut(&mut self) -> bool {
            self.bytes.clone_from(&self.durable);
            true
        }
    }

    /// The promises that a lie breaks.
    fn broken(lie: Lie) -> Vec<&'static str> {
        let test = |(name, promise): &Promise| {
            let bytes = vec![0; 256 << 10];
            let durable = bytes.clone();
            let memory = Memory { bytes, old: durable.clone(), durable, lie, count: 0 };
            let mut bench = Bench::new(Box::new(memory), u64::MAX, &[], 1);
            promise(&mut bench).is_err().then_some(*name)
        };
        PROMISES.iter().chain(INNER).filter_map(test).collect()
    }

    #[test]
    fn what_keeps_every_promise_is_found_to() {
        assert_eq!(broken(Lie::None), [""; 0]);
    }

    #[test]
    fn each_lie_is_found_by_the_case_that_is_about_it() {
        for (lie, by) in [
            (Lie::Drop, "reads_bring_what_was_written"),
            (Lie::Short, "reads_bring_what_was_written"),
            (Lie::Unfilled, "reads_bring_what_was_written"),
            (Lie::Stale, "mixed_requests_at_depth_keep_every_byte"),
            (Lie::NotZeroed, "what_is_zeroed_reads_as_zeros"),
            (Lie::Neighbour, "what_is_discarded_reads_as_before_or_as_zeros"),
            (Lie::DoneAnyway, "requests_that_make_no_sense_are_refused_and_change_nothing"),
            (Lie::Lost, "mixed_requests_at_depth_keep_every_byte"),
            (Lie::Volatile, "what_was_flushed_or_written_durably_survives_a_power_cut"),
            (Lie::Fails, "mixed_requests_at_depth_keep_every_byte"),
        ] {
            let broken = broken(lie);
            assert!(broken.contains(&by), "{lie:?} is found by {broken:?} only");
        }
    }
}
