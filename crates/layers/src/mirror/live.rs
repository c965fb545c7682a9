//! Answers for what a mirror does when `map` cannot answer, when a leg fails, and for people.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devsplice_core::prelude::*;

use super::assemble::Role;
use super::format::{LegState, Super, super_at};
use super::state::{State, lock, port_of, ports, region};

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

impl State {
    /// The superblock to change. A generation that some leg may have seen is never used again: a
    /// write that failed may be on the disk all the same, and then tells another story.
    fn next_super(&self) -> Super {
        let mut next = *lock(&self.sb);
        next.before = self.common.load(Ordering::SeqCst);
        next.generation = self.generations.fetch_add(1, Ordering::SeqCst) + 1;
        next
    }

    /// Puts a changed superblock on every leg that is written and not `gone`; a leg on which that
    /// fails is dropped in the same change. The caller has the turn to change.
    async fn write_super(
        &self,
        mut next: Super,
        mut gone: u32,
        meta: &Rc<dyn Meta>,
    ) -> Result<u32, Errno> {
        // Each round loses a leg, so there are at most as many rounds as legs.
        'again: loop {
            let sets = self.sets();
            if sets.in_sync & !gone == 0 {
                return Err(Errno::EIO);
            }
            // Those that hold the data first: what the others tell must not be news to them.
            let (first, then) = (sets.in_sync & !gone, sets.rebuilding & !gone);
            for port in ports(first).chain(ports(then)) {
                let Some(own) = self.leg_of_port(port) else { continue };
                if let Err(errno) = self.write_copy(&next, (port, own), meta).await {
                    meta.event(format!("leg at port {} dropped: {errno}", port.0));
                    gone |= 1 << port.0;
                    next.generation = self.next_super().generation;
                    self.mark_failed(&mut next, port);
                    continue 'again;
                }
            }
            *lock(&self.sb) = next;
            self.common.store(next.generation, Ordering::SeqCst);
            self.supers_differ.store(false, Ordering::SeqCst);
            return Ok(gone);
        }
    }

    /// Writes a leg's copy of the superblock over the older of its two.
    async fn write_copy(
        &self,
        sb: &Super,
        (port, own): (Port, usize),
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        let copy = Super { own: u8::try_from(own).unwrap_or(u8::MAX), ..*sb };
        let index = usize::from(port.0);
        let place = 1 - lock(&self.super_in)[index];
        meta.write(port, self.meta_at[index] + super_at(place), copy.encode(), true).await?;
        lock(&self.super_in)[index] = place;
        Ok(())
    }

    fn mark_failed(&self, sb: &mut Super, port: Port) {
        if let Some(leg) = self.leg_of_port(port) {
            sb.legs[leg] = sb.leg(LegState::Failed);
        }
    }

    /// Gives up a leg: first on the disks of the others, then here, so that no write that it lacks
    /// is acknowledged before that is known for good.
    pub(crate) async fn drop_leg(
        &self,
        port: Port,
        errno: Errno,
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        let _turn = self.change.take().await;
        let sets = self.sets();
        if sets.written() >> port.0 & 1 == 0 {
            return Ok(());
        }
        let left = sets.without(port);
        if left.in_sync == 0 {
            return Err(errno);
        }
        let mut next = self.next_super();
        self.mark_failed(&mut next, port);
        let gone = self.write_super(next, 1 << port.0, meta).await?;
        self.gone(gone);
        meta.event(format!("leg at port {} dropped: {errno}", port.0));
        Ok(())
    }

    /// These ports' legs are out.
    fn gone(&self, gone: u32) {
        let mut roles = lock(&self.roles);
        for port in ports(gone) {
            if let Some(Role::Leg { state, logged, .. }) = roles.get_mut(usize::from(port.0)) {
                *logged = *state == LegState::InSync;
                *state = LegState::Failed;
            }
        }
        drop(roles);
        let left = ports(gone).fold(self.sets(), super::state::Sets::without);
        self.set_sets(left);
    }

    /// Puts what was found when the legs were opened on their disks, if it is not on all of them: a
    /// leg that has not heard of another one's failure would believe in that one, were it left
    /// alone with it.
    pub(crate) async fn settle(&self, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        if self.logs_differ.load(Ordering::SeqCst) {
            let _log = self.log_turn.take().await;
            self.write_all(meta).await?;
            self.logs_differ.store(false, Ordering::SeqCst);
        }
        let _turn = self.change.take().await;
        let mut next = self.next_super();
        let mut changed = self.supers_differ.load(Ordering::SeqCst);
        for index in 0..next.leg_count() {
            let port = self.port_of_leg(index);
            let role = port.and_then(|port| lock(&self.roles).get(usize::from(port.0)).copied());
            let state = match role {
                Some(Role::Leg { state, .. }) => state,
                _ => LegState::Failed,
            };
            if state != next.legs[index].state {
                next.legs[index] = next.leg(state);
                changed = true;
            }
        }
        if changed {
            let gone = self.write_super(next, 0, meta).await?;
            self.gone(gone);
        }
        self.ready.store(true, Ordering::SeqCst);
        self.moved.ring();
        Ok(())
    }

    /// A leg that has got everything is in sync.
    pub(crate) async fn promote(&self, meta: &Rc<dyn Meta>) -> Result<(), Errno> {
        self.flush_legs(meta).await?;
        let _turn = self.change.take().await;
        let sets = self.sets();
        if sets.rebuilding == 0 {
            return Ok(());
        }
        let mut next = self.next_super();
        for port in ports(sets.rebuilding) {
            if let Some(leg) = self.leg_of_port(port) {
                next.legs[leg] = next.leg(LegState::InSync);
            }
        }
        let gone = self.write_super(next, 0, meta).await?;
        self.gone(gone);
        let mut sets = self.sets();
        for port in ports(sets.rebuilding) {
            if let Some(Role::Leg { state, .. }) = lock(&self.roles).get_mut(usize::from(port.0)) {
                *state = LegState::InSync;
            }
            meta.event(format!("leg at port {} is in sync", port.0));
        }
        sets.in_sync |= std::mem::take(&mut sets.rebuilding);
        self.set_sets(sets);
        Ok(())
    }

    /// Takes in a device that is no leg, or has been dropped: from now on it is written, and what
    /// it lacks is copied in the background.
    async fn add(&self, port: Port, meta: &Rc<dyn Meta>) -> Result<Result<String, String>, Errno> {
        let role = lock(&self.roles).get(usize::from(port.0)).copied();
        let (index, logged) = match role {
            None => return Ok(Err(format!("there is no port {}", port.0))),
            Some(Role::Leg { state: LegState::Failed, index, logged }) => (index, logged),
            Some(Role::Leg { state, .. }) => {
                return Ok(Err(format!("port {} is {}", port.0, state.name())));
            }
            Some(Role::Spare) => match self.vacant_leg() {
                Some(index) => (index, false),
                None => return Ok(Err("no leg has failed whose place it could take".to_owned())),
            },
        };
        let _sync = self.sync.take().await;
        let _log = self.log_turn.take().await;
        // Writes wait meanwhile: none may go to regions that the log does not know yet.
        if !self.ready.swap(false, Ordering::SeqCst) {
            // Nor must they go because of this before the states that were found are on disk.
            return Ok(Err("the legs' states are not on disk yet; try again".to_owned()));
        }
        meta.grace().await?;
        let added = self.take_in(port, (index, logged), meta).await;
        self.added.fetch_add(1, Ordering::SeqCst);
        self.ready.store(true, Ordering::SeqCst);
        self.moved.ring();
        self.work.ring();
        added?;
        let what = if logged { "what it lacks by the log" } else { "everything" };
        Ok(Ok(format!("port {} is leg {index}; {what} is being copied to it", port.0)))
    }

    async fn take_in(
        &self,
        port: Port,
        (index, logged): (usize, bool),
        meta: &Rc<dyn Meta>,
    ) -> Result<(), Errno> {
        if !logged {
            self.mark_all(meta).await?;
        }
        self.unsync(!logged);
        self.copy_log(port, meta).await?;
        let _change = self.change.take().await;
        let mut next = self.next_super();
        next.legs[index] = next.leg(LegState::Rebuilding);
        let gone = self.write_super(next, 0, meta).await?;
        self.gone(gone);
        let now = *lock(&self.sb);
        if let Err(errno) = self.write_copy(&now, (port, index), meta).await {
            let mut next = self.next_super();
            next.legs[index] = next.leg(LegState::Failed);
            // Where that fails as well, it is still missing by what is written.
            if let Ok(gone) = self.write_super(next, 0, meta).await {
                self.gone(gone);
            }
            return Err(errno);
        }
        let mut roles = lock(&self.roles);
        if let Some(role) = roles.get_mut(usize::from(port.0)) {
            *role = Role::Leg { index, state: LegState::Rebuilding, logged: true };
        }
        drop(roles);
        let mut sets = self.sets();
        sets.rebuilding |= 1 << port.0;
        self.set_sets(sets);
        Ok(())
    }

    /// A leg of the set that no port has.
    fn vacant_leg(&self) -> Option<usize> {
        let legs = lock(&self.sb).leg_count();
        (0..legs).find(|index| self.port_of_leg(*index).is_none())
    }

    fn legs_status(&self) -> Value {
        let roles = lock(&self.roles).clone();
        let sb = *lock(&self.sb);
        let mut legs = Vec::new();
        for (port, role) in (0..).zip(roles) {
            let (leg, state) = match role {
                Role::Leg { index, state, .. } => (Value::Number(index as u64), state.name()),
                Role::Spare => (Value::Text("none".to_owned()), "spare"),
            };
            let state = Value::Text(state.to_owned());
            legs.push(vec![("port", Value::Number(port)), ("leg", leg), ("state", state)]);
        }
        for index in 0..sb.leg_count() {
            if self.port_of_leg(index).is_none() {
                legs.push(vec![
                    ("port", Value::Text("none".to_owned())),
                    ("leg", Value::Number(index as u64)),
                    ("state", Value::Text("missing".to_owned())),
                ]);
            }
        }
        Value::List(legs)
    }
}

impl Live for State {
    fn resolve(self: Arc<Self>, io: Io, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            let moved = self.moved.wait();
            if self.is_blocked(io.extent) {
                moved.await;
                return Ok(());
            }
            self.mark_for(io.extent, &meta).await
        })
    }

    fn failed(self: Arc<Self>, io: Io, port: Port, errno: Errno, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            if self.is_read_only() {
                // To mend or to drop a leg is to write.
                return Err(errno);
            }
            if io.op == Op::Read {
                return self.mend(io.extent, port, errno, &meta).await;
            }
            // What a leg does not know how to do says nothing about what it holds.
            let unknown =
                errno == Errno::EOPNOTSUPP && matches!(io.op, Op::Discard | Op::WriteZeroes { .. });
            let seen_to =
                if unknown { Err(errno) } else { self.drop_leg(port, errno, &meta).await };
            if seen_to.is_err() && io.op.changes() {
                self.doubt(io.extent, &meta).await?;
            }
            seen_to
        })
    }

    fn sees_to_failures(&self) -> bool {
        true
    }

    fn run(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            if self.is_read_only() {
                return Ok(());
            }
            // Nothing can be written until the states are on disk; a disk that is slow to come
            // back gets time.
            while let Err(errno) = self.settle(&meta).await {
                meta.event(format!("cannot write metadata: {errno}"));
                meta.sleep(SECOND).await?;
            }
            loop {
                let work = self.work.wait();
                if self.sync_all(&meta).await.is_err() {
                    self.failed_rounds.fetch_add(1, Ordering::SeqCst);
                    meta.sleep(SECOND).await?;
                    continue;
                }
                self.failed_rounds.store(0, Ordering::SeqCst);
                let left = if self.is_degraded() {
                    false
                } else if self.is_held(meta.now_ns()) {
                    true
                } else {
                    self.clean(false, &meta).await.unwrap_or(true)
                };
                if left {
                    meta.sleep(self.clean_ns).await?;
                } else {
                    work.await;
                    // Whatever woke us is hot; give it the time to cool.
                    meta.sleep(self.clean_ns).await?;
                }
            }
        })
    }

    fn stop(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            self.shut_window();
            // What is read-only is never ready to be written.
            if !self.ready.load(Ordering::SeqCst) {
                return Ok(());
            }
            // What was being cleaned when the background ended.
            for index in 0..self.region_count() {
                self.turn_region(index, region::BUSY, region::DIRTY);
            }
            self.flush_legs(&meta).await?;
            while !self.is_degraded() && self.clean(true, &meta).await.unwrap_or(false) {}
            self.flush_legs(&meta).await
        })
    }

    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        meta: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        Box::pin(async move {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let port = |text: &str| text.parse().ok().filter(|port| *port < 16).map(port_of);
            match words.as_slice() {
                // What differs would be copied first, and nobody does.
                ["check"] if self.is_read_only() && self.unsynced.load(Ordering::SeqCst) > 0 => {
                    Ok(Err("a leg is read-only, and the legs are known to differ".to_owned()))
                }
                ["check"] => self.check(false, &meta).await,
                ["repair" | "add" | "fail", ..] if self.is_read_only() => {
                    Ok(Err("a leg is read-only, so none is written".to_owned()))
                }
                ["repair"] => self.check(true, &meta).await,
                ["add", number] => match port(number) {
                    Some(port) => self.add(port, &meta).await,
                    None => Ok(Err(format!("`{number}` is no port"))),
                },
                ["fail", number] => match port(number) {
                    Some(port) if self.sets().written() >> port.0 & 1 == 1 => {
                        match self.drop_leg(port, Errno::ECANCELED, &meta).await {
                            Ok(()) => Ok(Ok(format!("port {number} is dropped"))),
                            Err(_) => Ok(Err("it is the last leg that is in sync".to_owned())),
                        }
                    }
                    _ => Ok(Err(format!("port {number} is no leg that is written"))),
                },
                ["rate", text] => match devsplice_core::size::parse_size(text) {
                    Ok(rate) => {
                        self.rate.store(rate, Ordering::SeqCst);
                        Ok(Ok(format!("copies at most {rate} bytes a second; 0 is any number")))
                    }
                    Err(reason) => Ok(Err(reason)),
                },
                _ => Ok(Err("check, repair, add PORT, fail PORT, rate SIZE".to_owned())),
            }
        })
    }

    fn status(&self) -> Vec<(&'static str, Value)> {
        let sb = *lock(&self.sb);
        let tally = &self.tally;
        let number =
            |value: &std::sync::atomic::AtomicU64| Value::Number(value.load(Ordering::SeqCst));
        let regions = (0..self.region_count()).filter(|index| self.state_of(*index) != 0);
        let healthy = !self.is_degraded() && self.sets().rebuilding == 0;
        let state = match (healthy, self.unsynced.load(Ordering::SeqCst)) {
            (true, 0) => "in-sync",
            (true, _) => "resyncing",
            _ if self.sets().rebuilding != 0 => "rebuilding",
            _ => "degraded",
        };
        vec![
            ("state", Value::Text(state.to_owned())),
            ("legs", self.legs_status()),
            ("generation", Value::Number(sb.generation)),
            ("region_bytes", Value::Number(self.region)),
            ("regions_dirty", Value::Number(regions.count() as u64)),
            ("bytes_to_sync", number(&tally.to_sync)),
            ("bytes_synced", number(&tally.synced)),
            ("bytes_checked", number(&tally.checked)),
            ("mismatches", number(&tally.mismatched)),
            ("blocks_repaired", number(&tally.repaired)),
        ]
    }
}
