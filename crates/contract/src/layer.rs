//! Answers for the first entry: a layer over model disks, through the real engine on a ring without
//! a kernel, against a flat model. Nothing it does needs rights, devices or time.

mod life;
mod map;
mod through;

use std::collections::BTreeMap;
use std::sync::Arc;

use devsplice_core::{
    Args, BackendId, Bottoms, Driver, Errno, Layer, Limits, Lower, Result, Stack, StackBuilder,
};

use crate::bench::Bench;
use crate::cases::{INNER, PROMISES};
use crate::suite::{Case, Outcome, Suite, Verdict};
use life::{FakeTarget, Handle};

/// Makes the layer anew; each case has one of its own.
type Make = Arc<dyn Fn() -> Result<Box<dyn Layer>> + Send + Sync>;
/// Writes what a layer needs to find below.
type Write = Arc<dyn Fn(&mut dyn Lower) -> Result<String> + Send + Sync>;

/// Seeds of each random case.
const SEEDS: u64 = 4;
/// A layer under test, with what lies below it.
#[derive(Clone)]
pub struct Subject {
    name: String,
    make: Make,
    below: Vec<Limits>,
    contents: Vec<Vec<u8>>,
    voids: Vec<(u64, u64)>,
    span: u64,
    format: Option<Write>,
    masks_errors: bool,
    resolves: bool,
    needs_equals: bool,
    mixes_old: bool,
    ends_at_failure: bool,
    scratch: Option<u16>,
    appends: Option<u16>,
    dispensable: Option<u16>,
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
            format: None,
            masks_errors: false,
            resolves: false,
            needs_equals: false,
            mixes_old: false,
            ends_at_failure: false,
            scratch: None,
            appends: None,
            dispensable: None,
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

    /// Made otherwise than it was to be; what it promises stays.
    #[must_use]
    pub fn made(
        self,
        make: impl Fn() -> Result<Box<dyn Layer>> + Send + Sync + 'static,
    ) -> Subject {
        Subject { make: Arc::new(make), ..self }
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

    /// An error below must not become one above, nor lose anything: there are copies, on every
    /// device. The layer gets the time to make them before the first request.
    #[must_use]
    pub fn masks_errors(self) -> Subject {
        Subject { masks_errors: true, ..self }
    }

    /// How metadata is written below before the layer is opened for the first time.
    #[must_use]
    pub fn formatted(
        self,
        format: impl Fn(&mut dyn Lower) -> Result<String> + Send + Sync + 'static,
    ) -> Subject {
        Subject { format: Some(Arc::new(format)), ..self }
    }

    /// What `map` cannot say it resolves, or it says another thing each time. Where data goes is
    /// then not asked of `map`, but looked at where it goes.
    #[must_use]
    pub fn resolves(self) -> Subject {
        Subject { resolves: true, ..self }
    }

    /// Its devices must hold the same, and it fails what differs. Two writes at once to one place,
    /// or a power cut, may leave them different; what it does then is right, and not looked at.
    #[must_use]
    pub fn needs_equals(self) -> Subject {
        Subject { needs_equals: true, ..self }
    }

    /// A read beside a write of the same place may bring what was there long ago. What such a read
    /// brings is not looked at.
    #[must_use]
    pub fn mixes_old(self) -> Subject {
        Subject { mixes_old: true, ..self }
    }

    /// Once a change has failed below, every change fails with `EIO` until it is opened again.
    #[must_use]
    pub fn ends_at_failure(self) -> Subject {
        Subject { ends_at_failure: true, ..self }
    }

    /// What lies on this device need not last: it holds what no flush has covered. A flush does not
    /// go there.
    #[must_use]
    pub fn scratch(self, device: u16) -> Subject {
        Subject { scratch: Some(device), ..self }
    }

    /// An error of this device is none of the layer: it goes on without.
    #[must_use]
    pub fn dispensable(self, device: u16) -> Subject {
        Subject { dispensable: Some(device), ..self }
    }

    /// Nothing is written twice to the same place of this device, so that what goes wrong there
    /// goes wrong from a place on.
    #[must_use]
    pub fn appends(self, device: u16) -> Subject {
        Subject { appends: Some(device), ..self }
    }

    /// The layer, open, for a case of one's own; its random requests follow from the seed.
    ///
    /// # Errors
    /// If it does not open.
    pub fn bench(&self, seed: u64) -> Result<Bench, String> {
        self.over(&self.below, seed)
    }

    fn build(&self, below: &[Limits], bottoms: &mut dyn Bottoms, is_new: bool) -> Result<Stack> {
        let mut builder = StackBuilder::new();
        let mut ports = Vec::new();
        for (place, limits) in below.iter().enumerate() {
            ports.push(builder.backend(&format!("disk {place}"), *limits)?.0);
        }
        if let Some(format) = &self.format
            && is_new
        {
            builder.format(&self.name, &ports, bottoms, |lower| format(lower))?;
        }
        let mut reader = |id: BackendId, at: u64, into: &mut [u8]| bottoms.read(id, at, into);
        let top = builder.layer(&self.name, (self.make)()?, &ports, &mut reader)?;
        Ok(builder.finish(top))
    }

    /// The layer over disks that hold what they hold at first, for routing alone.
    fn stack(&self, below: &[Limits]) -> Result<Stack> {
        self.build(below, &mut Paper::new(&self.contents), true)
    }

    /// The layer at work.
    fn target(&self, below: &[Limits], seed: u64) -> Result<(Bench, Handle), String> {
        let target = FakeTarget::new(self, below, seed)?;
        let handle = target.handle();
        Ok((target.bench(seed), handle))
    }

    /// A bench over `below` for a seed.
    fn over(&self, below: &[Limits], seed: u64) -> Result<Bench, String> {
        self.target(below, seed).map(|(bench, _)| bench)
    }
}

/// Disks of any size of which only what is not zero is kept.
struct Paper(BTreeMap<(u16, u64), u8>);

impl Paper {
    fn new(contents: &[Vec<u8>]) -> Paper {
        let mut paper = Paper(BTreeMap::new());
        for (disk, bytes) in (0..).zip(contents) {
            paper.put(disk, 0, bytes);
        }
        paper
    }

    fn put(&mut self, disk: u16, at: u64, bytes: &[u8]) {
        for (place, byte) in (at..).zip(bytes) {
            if *byte == 0 {
                self.0.remove(&(disk, place));
            } else {
                self.0.insert((disk, place), *byte);
            }
        }
    }
}

impl Bottoms for Paper {
    fn read(&mut self, id: BackendId, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        into.fill(0);
        let end = at.saturating_add(into.len() as u64);
        for ((_, place), byte) in self.0.range((id.0, at)..(id.0, end)) {
            into[usize::try_from(place - at).unwrap_or(usize::MAX)] = *byte;
        }
        Ok(())
    }

    fn write(&mut self, id: BackendId, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.put(id.0, at, bytes);
        Ok(())
    }
}

/// A promise that only layers make.
type Own = (&'static str, fn(&Subject) -> Outcome);

/// The case in whose course power is cut.
const POWER_CUT: &str = "what_was_flushed_or_written_durably_survives_a_power_cut";

impl Subject {
    /// Why a case is not for this layer, by a property of it.
    fn exempt(&self, case: &str) -> Option<&'static str> {
        match case {
            POWER_CUT | "writes_that_overlap_leave_one_of_them_in_each_block"
                if self.needs_equals =>
            {
                Some("it fails what differs on its devices, as they may after this")
            }
            "reads_beside_writes_of_the_same_place_bring_old_or_new" if self.mixes_old => {
                Some("such reads may bring what was there long ago")
            }
            _ => None,
        }
    }
}

/// Everything that a layer promises.
#[must_use]
pub fn suite(subject: &Subject) -> Suite {
    let mut suite = Suite::default();
    for (name, promise) in PROMISES.iter().chain(INNER) {
        add(&mut suite, subject, name, move |subject| {
            if let Some(reason) = subject.exempt(name) {
                return none(reason);
            }
            let mut below = subject.below.clone();
            if *name == POWER_CUT {
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
    let own: [Own; 7] = [
        ("answers_tile_each_request_and_repeat", map::answers),
        ("it_offers_nothing_that_a_device_below_does_not", map::as_strict),
        ("short_and_transient_results_below_go_unnoticed", map::unnoticed),
        ("an_error_anywhere_below_fails_exactly_the_requests_that_touch_it", map::errors),
        ("a_flush_that_fails_on_any_device_below_fails", map::flush_errors),
        ("after_a_power_cut_any_device_may_be_lost", through::cut_then_fail),
        ("the_largest_devices_are_mapped_without_overflow", map::huge),
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
