//! Answers for one seed: builds its world, lets the engine live and die in it, judges the rest.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use devsplice_core::{Limits, Result, Stack, StackBuilder};
use devsplice_engine::desk::{INNER_BYTES, INNER_DEPTH};
use devsplice_engine::watch::OnStuck;
use devsplice_engine::{Answer, FileId, Lane, Served, Shared, Stuck, Worker};

use crate::cells::{SECTOR, ZERO};
use crate::disk::Disk;
use crate::export::SimExport;
use crate::failure::{Failure, Kind};
use crate::far::Far;
use crate::live::{Direct, mirror_of};
use crate::mutants::Mutant;
use crate::oracle::Oracle;
use crate::plan::{Crash, Faults, Plan};
use crate::ring::{Home, SimRing};
use crate::rng::{Rng, index};
use crate::tree::{Grown, Tree, grow};
use crate::workload::Workload;
use crate::world::{Device, End, Front, Slot, World};

/// How a seed is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Keep a line for each thing that happens.
    pub trace: bool,
    /// A bug to be put in.
    pub mutant: Option<Mutant>,
}

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The same for the same course of things.
    pub digest: u64,
    /// A line for each thing that happened, if they were asked for.
    pub trace: Vec<String>,
    /// Requests asked.
    pub requests: u64,
    /// Splices sent.
    pub splices: u64,
    /// Crashes survived.
    pub crashes: u64,
    /// Of these, such that a mirror survived.
    pub mirror_crashes: u64,
    /// Connections to servers that were lost.
    pub losses: u64,
    /// Servers that died.
    pub deaths: u64,
    /// Requests that failed since servers died of them, while others were answered.
    pub deadly: u64,
    /// Of these, such as a mirror had asked.
    pub deadly_legs: u64,
    /// What went wrong.
    pub failure: Option<Failure>,
}

/// Runs one seed. Whatever it does follows from the seed and the options alone.
#[must_use]
pub fn run(seed: u64, options: Options) -> Report {
    let mut rng = Rng::new(seed, 0);
    let plan = Plan::new(&mut rng);
    let mut run = Run {
        trees: Vec::new(),
        world: World::default(),
        crashes: 0,
        mirror_crashes: 0,
        checks: false,
        served: Vec::new(),
        answers: Vec::new(),
    };
    run.world.seed = seed;
    run.world.mutant = options.mutant;
    run.world.rng = Rng::new(seed, 1);
    run.world.trace.lines = options.trace.then(Vec::new);
    let failure = run.all(plan, &mut rng).err();
    let World { trace, asked, counts, losses, deaths, deadly, deadly_legs, .. } = run.world;
    Report {
        seed,
        digest: trace.digest,
        trace: trace.lines.unwrap_or_default(),
        requests: asked,
        splices: counts.sqes,
        crashes: run.crashes,
        mirror_crashes: run.mirror_crashes,
        losses,
        deaths,
        deadly,
        deadly_legs,
        failure,
    }
}

struct Run {
    trees: Vec<Tree>,
    world: World,
    crashes: u64,
    mirror_crashes: u64,
    /// Whether mirrors are told to compare their legs.
    checks: bool,
    /// The stacks of this life, for what they have to tell.
    served: Vec<Arc<Served>>,
    answers: Vec<mpsc::Receiver<Answer>>,
}

impl Run {
    fn all(&mut self, mut plan: Plan, rng: &mut Rng) -> Result<(), Failure> {
        self.world.plan = plan.clone();
        for device in 0..plan.devices {
            self.add_device(device, rng)?;
        }
        self.add_fronts(&plan);
        self.note(format_args!("{plan:?}"));
        let lives = plan.crashes.clone();
        self.world.keys = vec![false; plan.flights as usize];
        self.world.streaks = vec![0; plan.flights as usize];
        let is_live = self.world.devices.iter().any(|device| device.habits.is_some());
        if is_live || !self.world.fars.is_empty() {
            // A request that waits for a layer that waits for a lost splice is not the one lost,
            // nor is one that waits for a server.
            plan.faults.lost_at = 0;
        }
        self.world.plan = plan;
        for crash in lives {
            self.world.crash = match crash {
                Crash::Flush(more) => Crash::Flush(self.world.flushes + more),
                Crash::Event(more) => Crash::Event(self.world.events + more),
                Crash::Time(more) => Crash::Time(self.world.now + more),
                Crash::Never => Crash::Never,
            };
            match self.live()? {
                None => self.at_rest()?,
                Some(End::Crash) => {}
                Some(End::Lost) => return self.power_cut(),
                Some(End::Failure(failure)) => return Err(failure),
            }
            self.power_cut()?;
        }
        if self.world.devices.iter().any(|device| device.habits.is_some()) {
            return self.sweep();
        }
        Ok(())
    }

    /// A last life without faults: everything is read, and mirrors compare their legs.
    fn sweep(&mut self) -> Result<(), Failure> {
        self.world.forget();
        self.world.crash = Crash::Never;
        self.world.plan.faults = Faults::default();
        self.world.fars.iter_mut().for_each(Far::calm);
        let mut most = 0;
        for device in &mut self.world.devices {
            most = most.max(device.workload.sweep());
            if let Some(habits) = &mut device.habits {
                habits.commands = 0;
            }
        }
        self.world.plan.requests = most * self.world.fronts.len() as u64;
        self.checks = true;
        let ended = self.live()?;
        match ended {
            None => self.at_rest()?,
            Some(end) => return Err(Failure::new(Kind::Hang, format!("{end:?}"))),
        }
        for answer in std::mem::take(&mut self.answers) {
            let equal = match answer.try_recv() {
                Ok(Ok(text)) => text.contains(" 0 differing"),
                // A single leg has nothing to differ from.
                Ok(Err(text)) => text.contains("fewer than two"),
                Err(_) => true,
            };
            if !equal {
                return Err(Failure::new(Kind::Misplaced, "legs of a mirror differ"));
            }
        }
        Ok(())
    }

    fn note(&mut self, line: std::fmt::Arguments<'_>) {
        self.world.trace.note([0; 4], line);
    }

    fn add_device(&mut self, number: u64, rng: &mut Rng) -> Result<(), Failure> {
        let (grown, habits) = if rng.percent(25) {
            let (grown, habits) = crate::live::grow(rng);
            (grown, Some(habits))
        } else {
            (grow(rng), None)
        };
        self.note(format_args!("device {number}: {:?} over {:?}", grown.tree, grown.disks));
        let first_disk = self.world.disks.len();
        self.world.disks.extend(grown.disks.iter().map(|limits| Disk::new(*limits)));
        let has_servers = self.add_servers(number, first_disk, &grown, habits.is_some());
        let disks = (first_disk, grown.disks.len());
        let mutant = self.world.mutant;
        let stack = build(&grown.tree, mutant, &mut self.world, disks, true)?;
        let limits = *stack.limits();
        let faults = self.world.plan.faults;
        let kept = |sector: usize| {
            let keeps = |plane: &Vec<crate::tree::Place>| plane[sector].get().is_some();
            habits.is_some() || grown.planes.iter().any(keeps)
        };
        let Grown { tree, planes, errors, .. } = &grown;
        let sectors = index(limits.size / 512);
        // What a mirror's legs hold of a write that was never acknowledged may differ as long as
        // they are not made equal, and stays so where a leg is lost before; so it does in blocks
        // that were discarded.
        let failures = faults.io_error
            + faults.nothing
            + faults.no_space
            + faults.again
            + faults.interrupted
            + u64::from(faults.disk_queue);
        let settles = limits.discard == 0
            && failures == 0
            && !has_servers
            && habits.is_none_or(|habits| habits.commands == 0);
        let stable = if habits.is_some() { settles } else { !tree.has_mirror() };
        let oracle = Oracle::new((0..sectors).map(kept), limits.volatile_cache, stable);
        self.world.devices.push(Device {
            oracle,
            workload: Workload::new(Rng::new(rng.next(), number), limits),
            planes: planes.clone(),
            first_disk,
            disk_count: disks.1,
            errors: errors.clone(),
            writes: 0,
            habits,
        });
        self.trees.push(grown.tree);
        Ok(())
    }

    /// Puts some of a device's disks behind servers; whether there are any.
    fn add_servers(&mut self, device: u64, first: usize, grown: &Grown, is_live: bool) -> bool {
        let mut rng = Rng::new(self.world.seed, 100 + device);
        if !rng.percent(25) {
            return false;
        }
        let before = self.world.fars.len();
        for (disk, limits) in (first..).zip(&grown.disks) {
            if rng.percent(60) {
                let far = Far::new((index(device), disk), limits, is_live, &mut rng);
                self.note(format_args!("disk {disk} is far: {:?} {:?}", far.weather(), far.offer));
                self.world.fars.push(far);
            }
        }
        self.world.fars.len() > before
    }

    /// Each device has at least one lane; their tags are slots one after another.
    fn add_fronts(&mut self, plan: &Plan) {
        for lane in 0..plan.lanes.max(plan.devices) {
            let first_slot = self.world.slots.len();
            let device = crate::rng::index(lane % plan.devices);
            self.world.fronts.push(Front { device, first_slot });
            for tag in 0..plan.depth {
                // Lanes and depths are small numbers.
                let (lane, tag) = (lane as u16, tag as u16);
                self.world.slots.push(Slot { lane, tag, ..Slot::default() });
            }
        }
        self.world.first_inner = self.world.slots.len();
        for _ in 0..plan.devices * u64::from(INNER_DEPTH) {
            let cells = vec![ZERO; INNER_BYTES as usize / SECTOR];
            self.world.slots.push(Slot { lane: u16::MAX, cells, ..Slot::default() });
        }
    }

    /// One life of the engine, from arming to its end. `None` if it ended well.
    fn live(&mut self) -> Result<Option<End>, Failure> {
        let home = Home::default();
        let stuck = Arc::new(Mutex::new(Vec::new()));
        let lanes = self.lanes()?;
        let flights = self.world.plan.flights;
        let told = stuck.clone();
        let on_stuck: OnStuck = Box::new(move |stuck: &Stuck| {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            told.push((stuck.lane, stuck.tag));
        });
        let silent = self.world.mutant == Some(Mutant::WatchdogSilent);
        self.world.call_servers();
        let watch = (if silent { 0 } else { self.world.plan.stuck_s }, on_stuck);
        let ring = SimRing::new(std::mem::take(&mut self.world), home.clone());
        let shared = Arc::new(Shared::default());
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut worker = Worker::new(ring, lanes, flights, shared, watch);
            worker.arm().and_then(|()| worker.run())
        }));
        self.world = std::mem::take(&mut home.lock().unwrap_or_else(PoisonError::into_inner));
        for served in std::mem::take(&mut self.served) {
            for event in served.events() {
                self.note(format_args!("told: {event}"));
            }
        }
        let end = self.world.end.take();
        let result = result.map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Failure::new(Kind::Panic, text.unwrap_or_default())
        })?;
        match (end, result) {
            (Some(End::Failure(failure)), _) => Err(failure),
            (Some(End::Lost), _) => {
                let stuck = stuck.lock().unwrap_or_else(PoisonError::into_inner);
                self.check_lost(&stuck).map(|()| Some(End::Lost))
            }
            (Some(end), _) => Ok(Some(end)),
            (None, Err(error)) => Err(Failure::new(Kind::Hang, error.to_string())),
            (None, Ok(())) => Ok(None),
        }
    }

    fn lanes(&mut self) -> Result<Vec<Lane<SimRing>>, Failure> {
        let mutant = self.world.mutant;
        let mut stacks = Vec::new();
        for (number, tree) in self.trees.iter().enumerate() {
            let device = &self.world.devices[number];
            let disks = (device.first_disk, device.disk_count);
            let served =
                Served::quietly(Arc::new(build(tree, mutant, &mut self.world, disks, false)?));
            let mirror = mirror_of(&served.stack);
            if let Some(mirror) = mirror
                && self.checks
                && served.stack.limits().discard == 0
            {
                self.answers.push(served.command(mirror, vec!["check".to_owned()]));
            }
            self.served.push(served.clone());
            stacks.push((served, mirror));
        }
        let world = &self.world;
        let lane = |(lane, front): (u16, &Front)| {
            let (served, mirror) = stacks[front.device].clone();
            let limits: Limits = *served.stack.limits();
            let count = world.fronts.len() as u64;
            let export = SimExport {
                // At most 32.
                depth: world.plan.depth as u16,
                lane,
                left: world.plan.requests / count + 1,
                limits,
                front: *front,
                told: mirror.map(|mirror| (served.clone(), mirror)),
            };
            let device = &world.devices[front.device];
            let disks = device.first_disk..device.first_disk + device.disk_count;
            let files = disks.map(|disk| FileId(disk as u16)).collect();
            Lane::new(Box::new(export), served, files)
        };
        Ok((0..).zip(&world.fronts).map(lane).collect())
    }

    /// After a lost completion: one request is missing, and the watchdog has named it.
    fn check_lost(&self, stuck: &[(u16, u16)]) -> Result<(), Failure> {
        let missing = self.world.slots.iter().filter(|slot| slot.request.is_some());
        let missing: Vec<_> = missing.map(|slot| (slot.lane, slot.tag)).collect();
        if Some(missing.as_slice()) != self.world.lost.as_ref().map(std::slice::from_ref) {
            let text = format!("of the requests {missing:?} only {:?} was lost", self.world.lost);
            return Err(Failure::new(Kind::Hang, text));
        }
        if !missing.iter().all(|lost| stuck.contains(lost)) {
            let text = format!("the watchdog did not name {missing:?} but {stuck:?}");
            return Err(Failure::new(Kind::Silent, text));
        }
        Ok(())
    }

    /// The engine has ended well: nothing is out, and each disk holds what belongs there.
    fn at_rest(&self) -> Result<(), Failure> {
        let world = &self.world;
        let out = world.slots.iter().any(|slot| slot.request.is_some() || slot.out > 0);
        if out || world.keys.contains(&true) {
            return Err(Failure::new(Kind::Hang, "the engine ended and left requests behind"));
        }
        self.check_images(Kind::Misplaced, Disk::visible, Oracle::at_rest)
    }

    /// The power goes; what survives is judged and is what the next life begins with.
    fn power_cut(&mut self) -> Result<(), Failure> {
        let world = &mut self.world;
        let now = world.tick();
        for disk in &mut world.disks {
            disk.crash(&mut world.rng);
        }
        self.crashes += 1;
        let mirrored = self.world.devices.iter().any(|device| device.habits.is_some());
        self.mirror_crashes += u64::from(mirrored);
        let crashes = self.crashes;
        self.note(format_args!("crash {crashes}"));
        self.check_images(Kind::LostData, Disk::durable, Oracle::survived)?;
        for device in &mut self.world.devices {
            device.oracle.crashed(now);
        }
        self.world.forget();
        Ok(())
    }

    fn check_images(&self, kind: Kind, image: ImageOf, judge: Judge) -> Result<(), Failure> {
        let World { devices, disks, mixes, .. } = &self.world;
        // What live layers leave where is their own affair; what it is worth shows in what is read.
        let plain = devices.iter().enumerate().filter(|(_, device)| device.habits.is_none());
        for (number, device) in plain {
            let disks = &disks[device.first_disk..][..device.disk_count];
            let mut mapped: Vec<Vec<bool>> =
                disks.iter().map(|disk| vec![false; image(disk).len()]).collect();
            for plane in &device.planes {
                for (sector, place) in plane.iter().enumerate() {
                    let Some((disk, at)) = place.get() else { continue };
                    mapped[disk][at] = true;
                    judge(&device.oracle, sector, image(&disks[disk])[at], mixes).map_err(
                        |text| {
                            let text = format!("device {number}, disk {disk} sector {at}: {text}");
                            Failure::new(kind, text)
                        },
                    )?;
                }
            }
            for (number, (disk, mapped)) in disks.iter().zip(mapped).enumerate() {
                let mut unmapped = image(disk).iter().zip(mapped).filter(|(_, mapped)| !mapped);
                if unmapped.any(|(cell, _)| *cell != crate::cells::ZERO) {
                    let text = format!("disk {number} was written where no sector lies");
                    return Err(Failure::new(Kind::Misplaced, text));
                }
            }
        }
        Ok(())
    }
}

type ImageOf = fn(&Disk) -> &[crate::cells::Cell];
type Judge =
    fn(&Oracle, usize, crate::cells::Cell, &crate::cells::Mixes) -> std::result::Result<(), String>;

/// Builds a device's stack over its disks: the first one and how many; with fresh metadata if it is
/// new.
fn build(
    tree: &Tree,
    mutant: Option<Mutant>,
    world: &mut World,
    (first, count): (usize, usize),
    is_new: bool,
) -> Result<Stack, Failure> {
    let mut builder = StackBuilder::new();
    let World { disks, mixes, .. } = world;
    let mut disks = Direct { disks: &mut disks[first..first + count], mixes };
    let root = tree
        .build(&mut builder, mutant, &mut disks, is_new)
        .map_err(|error| Failure::new(Kind::Build, format!("{error}: {tree:?}")))?;
    Ok(builder.finish(root))
}
