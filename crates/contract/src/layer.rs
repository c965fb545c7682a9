//! Answers for the first entry: a layer over model disks, through the real engine on a ring without
//! a kernel, against a flat model. Nothing it does needs rights, devices or time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devsplice_core::{
    Args, BackendId, Dma, Driver, Errno, Io, Layer, Limits, Op, Place, Result, Stack, StackBuilder,
};
use devsplice_engine::{FileId, Pages};

use crate::bench::{BATCH, Bench, LARGEST, expect};
use crate::cases::{INNER, PROMISES};
use crate::fake::{Bad, FakeRing, Fault, Faults, World};
use crate::front::{Room, Setup, laxer, memory_needed, serve};
use crate::suite::{Case, Outcome, Suite, Verdict};
use crate::target::{Ask, Done, Target};

/// Makes the layer anew; each case has one of its own.
type Make = Arc<dyn Fn() -> Result<Box<dyn Layer>> + Send + Sync>;

/// Seeds of each random case.
const SEEDS: u64 = 4;
/// Requests in flight, and splices: few of these, so that requests wait for room, and many.
const SHAPES: [(u16, u32); 3] = [(16, 64), (3, 1), (64, 256)];

/// A layer under test, with what lies below it.
#[derive(Clone)]
pub struct Subject {
    name: String,
    make: Make,
    below: Vec<Limits>,
    contents: Vec<Vec<u8>>,
    voids: Vec<(u64, u64)>,
    span: u64,
    masks_errors: bool,
}

impl Subject {
    /// A layer that `make` makes, over disks of zeros.
    pub fn new(
        name: &str,
        below: &[Limits],
        make: impl Fn() -> Result<Box<dyn Layer>> + Send + Sync + 'static,
    ) -> Subject {
        Subject {
            name: name.into(),
            make: Arc::new(make),
            below: below.into(),
            contents: Vec::new(),
            voids: Vec::new(),
            span: u64::MAX,
            masks_errors: false,
        }
    }

    /// A driver with its keys as users write them: `chunk=4k offset=1M`.
    #[must_use]
    pub fn driver(driver: &'static Driver, keys: &str, below: &[Limits]) -> Subject {
        let pairs = keys.split_whitespace().filter_map(|word| word.split_once('='));
        let given: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let make = move || (driver.make)(&Args::new(driver.name, driver.keys, &given)?);
        Subject::new(driver.name, below, make)
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the disks hold at first, from their start; the rest is zeros. For layers that find
    /// something of theirs there.
    #[must_use]
    pub fn holding(self, contents: Vec<Vec<u8>>) -> Subject {
        Subject { contents, ..self }
    }

    /// Bytes `from..to` of the layer keep nothing: writes are dropped, reads are zeros.
    #[must_use]
    pub fn void(mut self, from: u64, to: u64) -> Subject {
        self.voids.push((from, to));
        self
    }

    /// Only the first bytes are used: behind them the layer does what a disk would not.
    #[must_use]
    pub fn span(self, span: u64) -> Subject {
        Subject { span, ..self }
    }

    /// An error below need not become one above: there are copies.
    #[must_use]
    pub fn masks_errors(self) -> Subject {
        Subject { masks_errors: true, ..self }
    }

    /// The layer, open, for a case of one's own; its random requests follow from the seed.
    ///
    /// # Errors
    /// If it does not open.
    pub fn bench(&self, seed: u64) -> Result<Bench, String> {
        self.over(&self.below, seed)
    }

    fn build(&self, below: &[Limits]) -> Result<Stack> {
        let mut builder = StackBuilder::new();
        let mut ports = Vec::new();
        for (place, limits) in below.iter().enumerate() {
            ports.push(builder.backend(&format!("disk {place}"), *limits)?.0);
        }
        let mut reader = |id: BackendId, at: u64, into: &mut [u8]| {
            let held = self.contents.get(usize::from(id.0)).map_or(&[][..], Vec::as_slice);
            let from = usize::try_from(at).unwrap_or(usize::MAX).min(held.len());
            let count = into.len().min(held.len() - from);
            into.fill(0);
            into[..count].copy_from_slice(&held[from..from + count]);
            Ok(())
        };
        let top = builder.layer(&self.name, (self.make)()?, &ports, &mut reader)?;
        Ok(builder.finish(top))
    }

    fn target(&self, below: &[Limits], seed: u64) -> Result<FakeTarget, String> {
        let (depth, flights) = SHAPES[usize::try_from(seed).unwrap_or(0) % SHAPES.len()];
        let stack = self.build(below).map_err(|error| format!("it does not open: {error}"))?;
        let mut world = World::new(seed + 1, Faults::default(), flights);
        world.logs = false;
        for (place, limits) in below.iter().enumerate() {
            let bytes = self.contents.get(place).map_or(&[][..], Vec::as_slice);
            world.add_strict_disk(*limits, bytes);
        }
        let world = Arc::new(Mutex::new(world));
        Ok(FakeTarget { world, stack: Arc::new(stack), depth, flights })
    }

    fn bench_of(&self, target: &FakeTarget, seed: u64) -> Bench {
        Bench::new(Box::new(target.clone()), self.span, &self.voids, seed)
    }

    /// A bench over `below` for a seed.
    fn over(&self, below: &[Limits], seed: u64) -> Result<Bench, String> {
        Ok(self.bench_of(&self.target(below, seed)?, seed))
    }
}

/// The engine over a fake ring.
#[derive(Clone)]
struct FakeTarget {
    world: Arc<Mutex<World>>,
    stack: Arc<Stack>,
    depth: u16,
    flights: u32,
}

impl FakeTarget {
    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }
}

impl Target for FakeTarget {
    fn limits(&self) -> Limits {
        *self.stack.limits()
    }

    fn run(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String> {
        let most = usize::try_from(memory_needed(asks)).unwrap_or(0);
        self.lock().pages = vec![vec![0; most]; usize::from(self.depth)];
        let setup = Setup {
            ring: FakeRing { world: Arc::clone(&self.world) },
            stack: &self.stack,
            files: (0..self.stack.backend_count()).map(FileId).collect(),
            depth: self.depth,
            flights: self.flights,
        };
        let dones = serve(setup, asks)?;
        self.lock().settle();
        Ok(dones)
    }

    fn cut(&mut self) -> bool {
        self.lock().cut();
        true
    }
}

impl Room for FakeRing {
    fn summon(&mut self, lane: u16, tag: u16) {
        self.fetch(lane, u32::from(tag), 0);
    }

    fn memory_of(&self, _: u16, tag: u16) -> Pages {
        Pages(u32::from(tag))
    }

    fn load(&mut self, _: u16, tag: u16, bytes: &[u8]) {
        let world = &mut *self.world.lock().unwrap_or_else(PoisonError::into_inner);
        world.pages[usize::from(tag)][..bytes.len()].copy_from_slice(bytes);
    }

    fn unload(&mut self, _: u16, tag: u16, len: usize) -> Vec<u8> {
        let world = &*self.world.lock().unwrap_or_else(PoisonError::into_inner);
        world.pages[usize::from(tag)][..len].to_vec()
    }
}

/// A promise that only layers make.
type Own = (&'static str, fn(&Subject) -> Outcome);

/// Everything that a layer promises.
#[must_use]
pub fn suite(subject: &Subject) -> Suite {
    let mut suite = Suite::default();
    for (name, promise) in PROMISES.iter().chain(INNER) {
        add(&mut suite, subject, name, move |subject| {
            let mut below = subject.below.clone();
            if *name == "what_was_flushed_or_written_durably_survives_a_power_cut" {
                below.iter_mut().for_each(|limits| limits.volatile_cache = true);
            }
            for seed in 0..SEEDS {
                let at_seed = |how| format!("seed {seed}: {how}");
                let verdict = promise(&mut subject.over(&below, seed)?).map_err(at_seed)?;
                if verdict != Verdict::Kept {
                    return Ok(verdict);
                }
            }
            Ok(Verdict::Kept)
        });
    }
    let own: [Own; 6] = [
        ("answers_tile_each_request_and_repeat", answers),
        ("it_offers_nothing_that_a_device_below_does_not", as_strict),
        ("short_and_transient_results_below_go_unnoticed", unnoticed),
        ("an_error_anywhere_below_fails_exactly_the_requests_that_touch_it", errors),
        ("a_flush_that_fails_on_any_device_below_fails", flush_errors),
        ("the_largest_devices_are_mapped_without_overflow", huge),
    ];
    for (name, test) in own {
        add(&mut suite, subject, name, test);
    }
    suite
}

fn add(
    suite: &mut Suite,
    subject: &Subject,
    name: &str,
    test: impl FnOnce(&Subject) -> Outcome + Send + 'static,
) {
    let subject = subject.clone();
    suite.cases.push(Case::new(name, move || test(&subject)));
}

fn none(reason: &str) -> Outcome {
    Ok(Verdict::NotMade(reason.into()))
}

/// A piece of a request: which disk, where there, where in the request, bytes.
type Piece = (Option<u16>, u64, u64, u64);

fn pieces(stack: &Stack, io: Io) -> Result<Vec<Piece>, Errno> {
    let mut route = stack.route(io);
    let mut all = Vec::new();
    while let Some(piece) = route.next(stack) {
        let piece = piece?;
        let disk = match piece.place {
            Place::Backend(id) => Some(id.0),
            Place::Zero => None,
        };
        all.push((disk, piece.at, piece.part, piece.len));
    }
    Ok(all)
}

/// Routing alone, without data: the pieces of a read tile it, those of a change cover it, and equal
/// requests get equal answers.
fn answers(subject: &Subject) -> Outcome {
    let stack = subject.build(&subject.below).map_err(|error| error.to_string())?;
    let mut bench = subject.over(&subject.below, 0)?;
    let ops = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }];
    let ops: Vec<_> = ops.into_iter().filter(|op| bench.offers(*op)).collect();
    for round in 0..2000 {
        let op = ops[round % ops.len()];
        let extent = bench.extent(if round % 10 == 0 { LARGEST } else { 64 << 10 });
        let io = Io::new(op, extent.at, extent.len);
        let fails = |errno| format!("asked: {io:?}; answered: {errno}; must: somewhere");
        let first = pieces(&stack, io).map_err(fails)?;
        // Reads may take turns between copies.
        let repeats = subject.masks_errors || pieces(&stack, io).as_ref() == Ok(&first);
        let mut parts: Vec<_> = first.iter().map(|(.., part, len)| (*part, *len)).collect();
        parts.sort_unstable();
        let mut end = 0;
        for (part, len) in parts {
            let gap = part > end || (op == Op::Read && part != end);
            if gap {
                return Err(format!("asked: {io:?}; answered: {first:?}; wrong from {end} on"));
            }
            end = end.max(part + len);
        }
        if end != extent.len || !repeats {
            return Err(format!("asked: {io:?}; answered: {first:?}; incomplete, or not twice"));
        }
    }
    Ok(Verdict::Kept)
}

/// What devices below may lack, one thing at a time.
fn strictness() -> Vec<fn(&mut Limits)> {
    vec![
        |limits| (limits.block, limits.physical) = (4096, 4096),
        |limits| limits.physical = 4096,
        |limits| limits.read_only = true,
        |limits| limits.volatile_cache = true,
        |limits| limits.fua = false,
        |limits| limits.discard = 0,
        |limits| limits.write_zeroes = false,
        |limits| {
            let dma = Dma { align: 512, max_segments: 8, max_segment_size: 4096, ..Dma::ANY };
            limits.dma = Dma { virt_boundary: 4096, ..dma };
        },
    ]
}

/// Over devices each of which lacks something, the layer offers no more, and sends none what it
/// does not offer: the model disks see to that.
fn as_strict(subject: &Subject) -> Outcome {
    if subject.below.is_empty() {
        return none("nothing lies below");
    }
    let mut opened = 0;
    for bend in strictness() {
        for place in 0..subject.below.len() {
            let mut below = subject.below.clone();
            bend(&mut below[place]);
            // What it refuses to lie over, it makes no promise about.
            let Ok(stack) = subject.build(&below) else { continue };
            opened += 1;
            let wrong: Vec<_> = below.iter().flat_map(|one| laxer(stack.limits(), one)).collect();
            if let Some(text) = wrong.first() {
                return Err(format!("disk {place} of {}: {text}", below.len()));
            }
            let mut bench = subject.over(&below, 0)?;
            if bench.offers(Op::Write) {
                bench.fill(64 << 10)?;
            }
            for _ in 0..4 {
                let asks = bench.mix([40, 30, 5, 10], 64 << 10);
                bench.must(&asks)?;
            }
            bench.check(64 << 10)?;
        }
    }
    if opened == 0 { none("it opens over none of them") } else { Ok(Verdict::Kept) }
}

fn unnoticed(subject: &Subject) -> Outcome {
    for seed in 0..SEEDS {
        let target = subject.target(&subject.below, seed)?;
        let mut bench = subject.bench_of(&target, seed);
        if !bench.offers(Op::Write) {
            return none("it is read-only");
        }
        // Few enough transient errors that no splice meets too many in a row.
        target.faults(Faults { short: 40, eagain: 5, eintr: 5, bad: Vec::new() });
        bench.fill(64 << 10)?;
        for _ in 0..8 {
            let asks = bench.mix([40, 40, 4, 8], 128 << 10);
            bench.must(&asks).map_err(|how| format!("seed {seed}: {how}"))?;
        }
        bench.check(64 << 10)?;
    }
    Ok(Verdict::Kept)
}

/// Where a layer puts what it keeps: the first and the last block of pieces of all of it.
fn positions(stack: &Stack, bench: &mut Bench) -> Result<Vec<(u16, u64, u64)>, String> {
    let block = bench.block();
    let mut all = Vec::new();
    let mut at = 0;
    while at < bench.span {
        let len = LARGEST.min(bench.span - at);
        let found =
            pieces(stack, Io::new(Op::Write, at, len)).map_err(|errno| errno.to_string())?;
        for (disk, below, part, len) in found {
            let Some(disk) = disk else { continue };
            all.push((disk, below, at + part));
            all.push((disk, below + len - block, at + part + len - block));
        }
        at += len;
    }
    // The first, the last, and some in between.
    while all.len() > 24 {
        let place = bench.rng.below(all.len() as u64 - 2) + 1;
        all.swap_remove(usize::try_from(place).unwrap_or(0));
    }
    Ok(all)
}

fn errors(subject: &Subject) -> Outcome {
    let target = subject.target(&subject.below, 0)?;
    let mut bench = subject.bench_of(&target, 0);
    if !bench.offers(Op::Write) {
        return none("it is read-only");
    }
    bench.fill(64 << 10)?;
    let places = positions(&target.stack, &mut bench)?;
    if places.is_empty() {
        return none("nothing lies below");
    }
    let ops = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }];
    for (turn, (file, from, above)) in places.into_iter().enumerate() {
        for op in ops.into_iter().filter(|op| bench.offers(*op)).collect::<Vec<_>>() {
            let errno = [Errno::EIO, Errno::ENOSPC, Errno::EILSEQ][turn % 3];
            let to = from + bench.block();
            let bad = Bad { file, from, to, fault: Fault::Fail(errno), times: u32::MAX };
            target.faults(Faults { bad: vec![bad], ..Faults::default() });
            let start = above.saturating_sub(bench.rng.below(9) * bench.block());
            let blocks = 1 + bench.rng.below(16) + (above - start) / bench.block();
            let len = (blocks * bench.block()).min(bench.span - start);
            let mut asks = vec![bench.ask(op, start, len)];
            asks.extend(apart(bench.mix([50, 50, 0, 0], 32 << 10), start, start + len));
            let want = |place: usize| touches(&target.stack, &asks[place], &bad, errno);
            let wants: Vec<_> = (0..asks.len()).map(want).collect();
            let dones = bench.run(&asks)?;
            if !subject.masks_errors {
                expect(&asks, &dones, |place| wants[place])
                    .map_err(|how| format!("disk {file} fails {errno} at {from}: {how}"))?;
            }
        }
    }
    target.faults(Faults::default());
    bench.fill(64 << 10)?;
    bench.check(64 << 10)?;
    Ok(Verdict::Kept)
}

fn apart(asks: Vec<Ask>, from: u64, to: u64) -> impl Iterator<Item = Ask> {
    asks.into_iter().take(BATCH / 2).filter(move |ask| {
        let extent = ask.io.extent;
        extent.at >= to || extent.at + extent.len <= from
    })
}

fn touches(stack: &Stack, ask: &Ask, bad: &Bad, errno: Errno) -> Result<(), Errno> {
    let hit = pieces(stack, ask.io)?
        .into_iter()
        .any(|(disk, at, _, len)| disk == Some(bad.file) && at < bad.to && at + len > bad.from);
    if hit { Err(errno) } else { Ok(()) }
}

fn flush_errors(subject: &Subject) -> Outcome {
    if subject.below.is_empty() || subject.masks_errors {
        return none("nothing lies below, or there are copies");
    }
    for place in 0..subject.below.len() {
        let target = subject.target(&subject.below, 0)?;
        let mut bench = subject.bench_of(&target, 0);
        target.lock().disks[place].bad_flush = Some(Errno::ENOSPC);
        let asks = [bench.ask(Op::Flush, 0, 0), bench.ask(Op::Read, 0, bench.block())];
        let dones = bench.run(&asks)?;
        let want = |ask: usize| if ask == 0 { Err(Errno::ENOSPC) } else { Ok(()) };
        expect(&asks, &dones, want).map_err(|how| format!("disk {place} fails it: {how}"))?;
    }
    Ok(Verdict::Kept)
}

fn huge(subject: &Subject) -> Outcome {
    let count = subject.below.len() as u64;
    if count == 0 {
        return none("nothing lies below");
    }
    let size = i64::MAX.cast_unsigned() / count / LARGEST * LARGEST;
    let below: Vec<_> = subject.below.iter().map(|one| Limits { size, ..*one }).collect();
    let stack = match subject.build(&below) {
        Ok(stack) => stack,
        Err(error) => return none(&format!("it does not lie over such: {error}")),
    };
    let size = subject.span.min(stack.limits().size);
    let len = LARGEST.min(size);
    for at in [0, (size - len) / 2 / LARGEST * LARGEST, size - len] {
        for op in [Op::Read, Op::Write, Op::Discard] {
            if stack.limits().read_only && op.changes() {
                continue;
            }
            let io = Io::new(op, at, len);
            let found = pieces(&stack, io).map_err(|errno| format!("asked: {io:?}; {errno}"))?;
            let sum: u64 = found.iter().map(|(.., len)| len).sum();
            if sum < len {
                return Err(format!("asked: {io:?}; answered for {sum} bytes"));
            }
        }
    }
    Ok(Verdict::Kept)
}
