//! Answers for the disks that one process serves: who is there, and that what is done to one of
//! them is done by one at a time, while the others go on.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::Noted;
use devsplice_exports::threads::{Crew, Pool};
use devsplice_spec::Plan;
use serde_json::{Value, json};

use crate::args::Add;
use crate::events::Bus;
use crate::front::Front;
use crate::guard::{Hearing, Voice};
use crate::hosted::{Hosted, Wish, stuck_text};
use crate::listen::News;
use crate::state::{self, Claim, Disk, Keeper};
use crate::{front, guard, keeper};

/// Disks that are removed at a time where all are.
const AT_A_TIME: usize = 8;

/// How long it is until a disk that is in use still, by what a dead server had in flight, is tried
/// again: at first, and at most.
const AGAIN: Duration = Duration::from_millis(100);
const MOST_PAUSE: Duration = Duration::from_secs(10);

/// What it means that a server has lost its guard, and what to do about it.
pub const UNGUARDED: &str =
    "the server goes on without one; devsplice upgrade NAME makes another, with a guard";

/// What all disks of a process share.
pub struct Common {
    /// What the server is called, if it is one for many disks.
    pub server: Option<String>,
    /// The threads that serve them, if they share some.
    pub pool: Option<Arc<Pool>>,
    /// What happens.
    pub bus: Bus,
    /// Who keeps what has to outlive this process, of a server of one disk.
    voice: Option<Voice>,
    /// Whether the guard of this process has died.
    unguarded: AtomicBool,
    news: Sender<News>,
    crews: AtomicU32,
}

impl Common {
    /// Whether nobody waits for this process's end any more.
    pub fn is_unguarded(&self) -> bool {
        self.unguarded.load(Ordering::Relaxed)
    }

    /// The guard has died, of the server of these disks.
    pub fn lose_guard(&self, disks: &[String]) {
        self.unguarded.store(true, Ordering::Relaxed);
        disks.iter().for_each(|disk| self.bus.tell(disk, "unguarded", UNGUARDED));
    }
}

/// What ties a disk to its server.
pub struct Line {
    common: Arc<Common>,
    name: String,
    /// Which threads serve the disk; nothing that any others do is news.
    crew: u32,
}

impl Line {
    /// The server's name, if it has one.
    pub fn server(&self) -> Option<&str> {
        self.common.server.as_deref()
    }

    /// The threads that the disks of this server share.
    pub fn pool(&self) -> Option<Arc<Pool>> {
        self.common.pool.clone()
    }

    /// Has whoever looks for the disk's socket and log find the server's.
    pub fn connect(&mut self, name: &str) -> Result<()> {
        name.clone_into(&mut self.name);
        let Some(server) = &self.common.server else { return Ok(()) };
        for ending in ["sock", "log"] {
            let link = state::path(name, ending);
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(state::server_file(server, ending), &link)
                .map_err(|error| Error::os(link.display().to_string(), &error))?;
        }
        Ok(())
    }

    /// Has the guard keep descriptors of this process, so that they outlive it.
    ///
    /// # Errors
    /// If it cannot.
    pub fn keep(&self, fds: &[OwnedFd], told: &str) -> Result<Keeper> {
        let none = || Error::new(ErrorKind::Unsupported, "a server of many", "keeps no FUSE disk");
        self.common.voice.as_ref().ok_or_else(none)?.keep(fds, told)
    }

    /// How the guard is that has to keep what the kernel does not, and its process.
    pub fn keeper(&self) -> (Hearing, i32) {
        self.common
            .voice
            .as_ref()
            .map_or((Hearing::Gone, 0), |voice| (voice.hearing(), voice.pid()))
    }

    /// Has the guard keep what keeps the disk, and writes down that it does. Where it cannot, a
    /// disk that was kept before can still be taken over from this process, as long as that lives;
    /// one that is new goes with its server.
    pub fn entrust(&self, front: &mut Front, disk: &mut Disk) {
        let (fds, told) = front.kept();
        if fds.is_empty() {
            disk.keeper = None;
            return;
        }
        match self.keep(fds, told) {
            Ok(keeper) => {
                disk.keeper = Some(keeper);
                keeper::store(disk, fds);
            }
            Err(error) if disk.keeper.is_some() => {
                let own = keeper::numbers(fds);
                disk.keeper.iter_mut().for_each(|keeper| keeper.own.clone_from(&own));
                disk.warnings.push(format!("nobody keeps the disk but its server: {error}"));
            }
            Err(error) => {
                front.forget();
                disk.keeper = None;
                disk.recovery = front.recovery().to_owned();
                disk.warnings.push(format!("the disk goes with its server: {error}"));
            }
        }
    }

    /// These threads serve the disk from now on.
    pub fn serve(&mut self, crew: &Crew) {
        self.crew = self.common.crews.fetch_add(1, Ordering::Relaxed) + 1;
        let (common, name, number) = (Arc::clone(&self.common), self.name.clone(), self.crew);
        let (news, ended) = (self.common.news.clone(), self.name.clone());
        crew.served.note(Box::new(move |noted| match noted {
            Noted::Layer(text) => common.bus.tell(&name, "layer", text),
            Noted::Stuck(stuck) => common.bus.tell(&name, "stuck", &stuck_text(stuck)),
        }));
        crew.at_end(Box::new(move || {
            let _ = news.send(News::Ended(ended, number));
        }));
    }

    /// Nobody serves the disk for now; that its threads end is no news.
    pub fn pause(&mut self) {
        self.crew = 0;
    }

    /// Whether the server has lost its guard.
    pub fn is_unguarded(&self) -> bool {
        self.common.is_unguarded()
    }

    /// Something has happened to the disk.
    pub fn tell(&self, kind: &str, text: &str) {
        self.common.bus.tell(&self.name, kind, text);
    }
}

/// A disk's place. Empty when it is gone.
type Slot = Arc<Mutex<Option<Hosted>>>;

/// The disks of a process.
pub struct Hall {
    /// What they share.
    pub common: Arc<Common>,
    slots: Mutex<BTreeMap<String, Slot>>,
    /// Whether no disk is to come any more. Who brings one has this until it is in its place, so
    /// that none comes that nobody knows of.
    closed: RwLock<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hall {
    /// Without disks. `server` is what it is called and who works there, if it is for many.
    pub fn new(
        server: Option<(String, Arc<Pool>)>,
        voice: Option<Voice>,
        news: Sender<News>,
    ) -> Hall {
        let (server, pool) = server.unzip();
        let crews = AtomicU32::new(0);
        let (bus, unguarded) = (Bus::default(), AtomicBool::new(false));
        let common = Arc::new(Common { server, pool, bus, voice, unguarded, news, crews });
        Hall { common, slots: Mutex::default(), closed: RwLock::default() }
    }

    /// For a disk that is to come.
    pub fn line(&self) -> Line {
        Line { common: Arc::clone(&self.common), name: String::new(), crew: 0 }
    }

    /// A disk has come.
    pub fn insert(&self, hosted: Hosted) {
        let name = hosted.disk().name.clone();
        lock(&self.slots).insert(name, Arc::new(Mutex::new(Some(hosted))));
    }

    /// The right to bring a disk. Once nobody gets it any more, all that had it are done.
    ///
    /// # Errors
    /// If no disk is to come any more.
    fn open(&self) -> Result<RwLockReadGuard<'_, bool>> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            let server = self.common.server.as_deref().unwrap_or("this server");
            return Err(Error::new(ErrorKind::Busy, server, "is ending"));
        }
        Ok(closed)
    }

    fn set_closed(&self, closed: bool) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = closed;
    }

    /// Makes a disk.
    ///
    /// # Errors
    /// Whatever stands in the way; nothing is left behind then.
    pub fn add(&self, add: &Add, plan: &Plan) -> Result<Disk> {
        if self.common.server.is_none() {
            let reason = "is for one disk, which it has";
            return Err(Error::new(ErrorKind::Unsupported, "this server", reason)
                .next("devsplice serve starts one for many"));
        }
        let _open = self.open()?;
        let choice = front::choose_for(add)?;
        let claim = Claim::take(add.name.as_deref())?;
        let hosted = Hosted::begin(Wish { add, plan, choice }, claim, self.line())?;
        let disk = hosted.disk().clone();
        hosted.line.tell("added", &format!("{} is {}", disk.device, disk.stack));
        self.insert(hosted);
        Ok(disk)
    }

    /// Serves a disk again that this server, or one of its name, has served: as a person wants it,
    /// also where one has quiesced it.
    ///
    /// # Errors
    /// If the kernel does not keep it, or another process has it.
    pub fn recover(&self, name: &str, why: &str) -> Result<Disk> {
        let _open = self.open()?;
        let (claim, left) = guard::claim_kept(name, false)?;
        self.welcome(&left, why, Hosted::take_over(claim, &left, None, self.line())?)
    }

    /// As [`Hall::inherit`], of disks that cannot be had yet, as something below is in use: what
    /// their dead server had in flight there may be stuck. They are tried again as long as it
    /// takes, less and less often, and others are served meanwhile.
    pub fn inherit_late(self: &Arc<Hall>, mut names: Vec<String>, why: &str) {
        if names.is_empty() {
            return;
        }
        let (hall, why) = (Arc::clone(self), why.to_owned());
        std::thread::spawn(move || {
            let mut pause = AGAIN;
            while !names.is_empty() {
                std::thread::sleep(pause);
                pause = (pause * 2).min(MOST_PAUSE);
                names.retain(|name| match hall.inherit(name, &why) {
                    Ok(_) => false,
                    Err(error) if error.kind() == ErrorKind::Busy => true,
                    Err(error) => {
                        eprintln!("devsplice: {error}; devsplice recover {name} tries again");
                        false
                    }
                });
            }
        });
    }

    /// Takes a disk over as its last server has left it: one that a person has quiesced stays so.
    ///
    /// # Errors
    /// As [`Hall::recover`].
    pub fn inherit(&self, name: &str, why: &str) -> Result<Disk> {
        let _open = self.open()?;
        let (claim, left) = guard::claim_kept(name, false)?;
        if !left.quiesced {
            return self.welcome(&left, why, Hosted::take_over(claim, &left, None, self.line())?);
        }
        self.welcome(&left, "quiesced", Hosted::stay_held(claim, &left, None, self.line())?)
    }

    fn welcome(&self, left: &Disk, why: &str, hosted: Hosted) -> Result<Disk> {
        let disk = hosted.disk().clone();
        hosted.line.tell(why, &format!("process {} instead of {}", disk.pid, left.pid));
        self.insert(hosted);
        Ok(disk)
    }

    /// The names of all disks.
    pub fn names(&self) -> Vec<String> {
        lock(&self.slots).keys().cloned().collect()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        lock(&self.slots).is_empty()
    }

    /// The name of the disk that is meant: where there is but one, it need not be said.
    fn meant(&self, name: Option<&str>) -> Result<(String, Slot)> {
        let slots = lock(&self.slots);
        let only = || slots.first_key_value().filter(|_| slots.len() == 1);
        let found = match name {
            Some(name) => slots.get_key_value(name),
            None => only(),
        };
        if let Some((name, slot)) = found {
            return Ok((name.clone(), Arc::clone(slot)));
        }
        Err(match name {
            Some(name) => Error::new(ErrorKind::NotFound, name, "is not served here"),
            None => Error::invalid("disk", format!("say which of {}", slots.len())),
        })
    }

    /// Does something with a disk while nobody else does.
    ///
    /// # Errors
    /// If there is no such disk; and what `work` says.
    pub fn with<T>(
        &self,
        name: Option<&str>,
        work: impl FnOnce(&mut Hosted) -> Result<T>,
    ) -> Result<T> {
        let (name, slot) = self.meant(name)?;
        match &mut *lock(&slot) {
            Some(hosted) => work(hosted),
            None => Err(Error::new(ErrorKind::NotFound, name, "is gone")),
        }
    }

    /// Removes a disk; unless `force`, only if nobody would miss it. When its turn has come,
    /// `is_wanted` is asked, by what the disk is called.
    ///
    /// # Errors
    /// Why it must not go, or does not.
    pub fn remove(
        &self,
        name: Option<&str>,
        force: bool,
        is_wanted: &dyn Fn(&str) -> Result<()>,
    ) -> Result<()> {
        let (name, slot) = self.meant(name)?;
        let mut place = lock(&slot);
        let Some(hosted) = place.as_mut() else {
            return Err(Error::new(ErrorKind::NotFound, name, "is gone"));
        };
        is_wanted(&hosted.thing())?;
        if !force {
            hosted.release()?;
        }
        self.take_away(&name, &mut place, force)
    }

    /// Empties a disk's place. Where it does not go it stays in the place, to be tried again.
    fn take_away(&self, name: &str, place: &mut Option<Hosted>, flush: bool) -> Result<()> {
        let Some(hosted) = place.take() else { return Ok(()) };
        let thing = hosted.thing();
        match if flush { hosted.close() } else { hosted.remove() } {
            Ok(()) => {
                lock(&self.slots).remove(name);
                self.common.bus.tell(name, "removed", &thing);
                Ok(())
            }
            Err((hosted, error)) => {
                *place = Some(*hosted);
                Err(error)
            }
        }
    }

    /// The threads of this number have ended. If that was by themselves, the disk is removed that
    /// they served, and this says so.
    ///
    /// # Errors
    /// If it does not go.
    pub fn ended(&self, name: &str, crew: u32) -> Result<bool> {
        let Ok((_, slot)) = self.meant(Some(name)) else { return Ok(false) };
        let mut place = lock(&slot);
        if place.as_ref().is_none_or(|hosted| hosted.line.crew != crew) {
            return Ok(false);
        }
        self.take_away(name, &mut place, true).map(|()| true)
    }

    /// Removes every disk in any case. The first error; all are tried.
    ///
    /// # Errors
    /// If one does not go.
    pub fn close(&self) -> Result<()> {
        self.set_closed(true);
        let failed = self.each(|name| {
            let (_, slot) = self.meant(Some(name))?;
            self.take_away(name, &mut lock(&slot), true)
        });
        failed.into_iter().next().map_or(Ok(()), Err)
    }

    /// Removes every disk that nobody would miss; why others stay.
    pub fn clear(&self, force: bool) -> Vec<Error> {
        self.each(|name| self.remove(Some(name), force, &|_| Ok(())))
    }

    /// Does something with every disk, several at a time: the kernel makes whoever takes a device
    /// away wait for others.
    fn each(&self, work: impl Fn(&str) -> Result<()> + Sync) -> Vec<Error> {
        let names = Mutex::new(self.names().into_iter());
        let failed = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..AT_A_TIME {
                scope.spawn(|| {
                    loop {
                        let name = lock(&names).next();
                        let Some(name) = name else { return };
                        if let Err(error) = work(&name) {
                            lock(&failed).push(error);
                        }
                    }
                });
            }
        });
        std::mem::take(&mut *lock(&failed))
    }

    /// Leaves every disk to another program: on return nothing of them is held here. When it is the
    /// turn of that, `is_wanted` is asked.
    ///
    /// # Errors
    /// If one cannot be left: all are served as before then.
    pub fn hand_over(&self, is_wanted: &dyn Fn() -> Result<()>) -> Result<()> {
        self.set_closed(true);
        let slots: Vec<Slot> = lock(&self.slots).values().cloned().collect();
        let mut places: Vec<_> = slots.iter().map(|slot| lock(slot)).collect();
        let mut disks: Vec<&mut Hosted> =
            places.iter_mut().filter_map(|place| place.as_mut()).collect();
        let can_be_left = || disks.iter().try_for_each(|hosted| hosted.can_be_left());
        let mut done = is_wanted().and_then(|()| can_be_left());
        let mut held = 0;
        while done.is_ok() && held < disks.len() {
            done = hold_one(&mut disks, held);
            held = if done.is_ok() { held + 1 } else { held };
        }
        if done.is_ok() {
            places.iter_mut().for_each(|place| **place = None);
            lock(&self.slots).clear();
            return Ok(());
        }
        go_on(&mut disks[..held]);
        self.set_closed(false);
        done
    }

    /// A disk that was to go and did not.
    pub fn broken(&self) -> Option<String> {
        let slots: Vec<Slot> = lock(&self.slots).values().cloned().collect();
        slots.iter().find_map(|slot| {
            let place = slot.try_lock().ok()?;
            let hosted = place.as_ref().filter(|hosted| hosted.state() == "broken")?;
            Some(hosted.thing())
        })
    }

    /// All disks as far as they are known without waiting for any.
    pub fn list(&self) -> Value {
        let all: Vec<(String, Slot)> =
            lock(&self.slots).iter().map(|(name, slot)| (name.clone(), slot.clone())).collect();
        let shown = all.iter().filter_map(|(name, slot)| match slot.try_lock() {
            Ok(place) => place.as_ref().map(|hosted| {
                let mut shown = hosted.disk().shown();
                shown["state"] = json!(hosted.state());
                shown
            }),
            Err(_) => Some(json!({ "name": name, "state": "busy" })),
        });
        Value::Array(shown.collect())
    }

    /// What was written down of every disk, for `save`.
    pub fn disks(&self) -> Vec<Disk> {
        let slots: Vec<Slot> = lock(&self.slots).values().cloned().collect();
        slots.iter().filter_map(|slot| Some(lock(slot).as_ref()?.disk().clone())).collect()
    }
}

/// Holds one of several disks that are to be left together, those before it being held. If it takes
/// long, their clients do not wait for it.
fn hold_one(disks: &mut [&mut Hosted], index: usize) -> Result<()> {
    let (before, rest) = disks.split_at_mut(index);
    let mut is_late = false;
    let done = rest[0].hold_with(&mut || {
        if !std::mem::replace(&mut is_late, true) {
            go_on(before);
        }
    });
    if !is_late {
        return done;
    }
    done.and_then(|()| rest[0].go_on_as_before())?;
    let why = "what is in flight below it has not come back for too long; try again";
    Err(Error::new(ErrorKind::Busy, rest[0].thing(), why))
}

/// Serves disks that are held as before.
fn go_on(disks: &mut [&mut Hosted]) {
    for hosted in disks.iter_mut().filter(|hosted| hosted.state() == "quiesced") {
        if let Err(error) = hosted.go_on_as_before() {
            eprintln!("devsplice: {error}");
        }
    }
}
