//! Answers for a server's client: the one that rings have (`nbd/client/conversation`), over
//! connections that are late, split at any byte, cut and half open.

use std::sync::Arc;

use devsplice_core::{Errno, Op};
use devsplice_engine::Event;
use devsplice_nbd::client::asks::errno;
use devsplice_nbd::client::conversation::{Accused, Question, Verdict, same_export};
use devsplice_nbd::client::{self as protocol, Said};

use super::{DOWN, Far, Out, Target, UP};
use crate::cells::{Cell, POISON, SECTOR, ZERO, sectors};
use crate::failure::Kind;
use crate::mutants::Mutant;
use crate::plan::Crash;
use crate::rng::index;
use crate::stream::{Data, Piece};
use crate::world::{End, Ended, Flying, Ready, What, World};

const SECOND: u64 = 1_000_000_000;
/// How long a handshake may take.
const GREETING_NS: u64 = SECOND;
/// Connections that are lost with a request before it may fail by itself.
const LOSSES: u32 = 5;
/// Connections of a run: far more than any needs.
const MOST_CONNECTIONS: u32 = 4000;
/// After so many the way is not cut any more: where a request takes a hundred steps of the way, and
/// each may cut it, none might come through in any time.
const CALM: u32 = 2000;

/// The cells of a splice's memory, in the order of its parts. They are whole sectors.
fn gathered(flying: &Flying, cells: &[Cell]) -> Arc<[Cell]> {
    let parts = &flying.parts[..usize::from(flying.part_count)];
    let sectors = parts.iter().flat_map(|part| {
        let (at, len) = (part.at as usize / SECTOR, part.len as usize / SECTOR);
        cells[at..at + len].iter().copied()
    });
    sectors.collect()
}

impl Far {
    /// A connection is lost with all that was asked.
    fn count_losses(&mut self, now: u64) {
        for (place, (count, first)) in self.places.iter().zip(&mut self.losses) {
            if place.is_some() {
                *first = if *count == 0 { now } else { *first };
                *count += 1;
            }
        }
    }
}

impl World {
    /// Which server has the disk, if one has.
    pub(crate) fn far_of(&self, disk: Option<u16>) -> Option<usize> {
        let disk = usize::from(disk?);
        self.fars.iter().position(|far| far.disk == disk)
    }

    /// A life begins: all servers are called.
    pub(crate) fn call_servers(&mut self) {
        for far in 0..self.fars.len() {
            let keys = self.keys.len();
            self.fars[far].begin(keys);
            self.dial(far, 1_000_000);
        }
    }

    /// A splice goes to a server.
    pub(crate) fn ask_far(&mut self, far: usize, place: u32) {
        let flying = self.flying[place as usize];
        let Flying { key, op, fua, at, len, .. } = flying;
        let parts = &flying.parts[..usize::from(flying.part_count)];
        if parts.iter().any(|part| !((part.at | part.len) as usize).is_multiple_of(SECTOR)) {
            return self.fail(Kind::Contract, format!("{op:?} for a server is off its sectors"));
        }
        let fua = fua && self.mutant != Some(Mutant::FarForced);
        let Far { talk, places, erred, losses, ghosts, ends, .. } = &mut self.fars[far];
        losses[key as usize] = (0, 0);
        (ghosts[key as usize], ends[key as usize]) = (false, u32::MAX);
        let question = Question { op, fua, at, len: talk.fit(op, len) };
        places[key as usize] = Some(place);
        erred[key as usize] = false;
        match talk.ask(key, question) {
            Some(result) => self.land(far, key, result),
            None => {
                self.tick_far(far);
                self.send_far(far);
            }
        }
    }

    /// Tells the engine what a splice came to.
    fn land(&mut self, far: usize, key: u32, result: Result<(), Errno>) {
        let Far { places, talk, erred, gave_up, .. } = &mut self.fars[far];
        let Some(place) = places[key as usize].take() else {
            return self.fail(Kind::StalePages, format!("key {key} has landed twice"));
        };
        let flying = self.flying[place as usize];
        let done = talk.fit(flying.op, flying.len);
        let may_fail = erred[key as usize] || *gave_up;
        if let Err(errno) = result
            && !may_fail
        {
            let text = format!("the server was asked for {:?}: {errno}", flying.op);
            return self.fail(Kind::NeedlessError, text);
        }
        if flying.op == Op::Flush && result.is_ok() {
            self.flushes += 1;
            if self.crash == Crash::Flush(self.flushes) {
                self.end = Some(End::Crash);
            }
        }
        self.free.push(place);
        self.streaks[key as usize] = 0;
        let Flying { serial, slot, .. } = flying;
        let short = result.is_ok() && done < flying.len;
        let splice = Some(Ended { serial, slot, error: result.err(), short });
        let event = Event::Splice { key, result: result.map(|()| done) };
        self.ready.push_back(Ready { event, splice });
    }

    /// Begins to send what waits, as far as there is room.
    fn send_far(&mut self, far: usize) {
        // Each round sends something or ends.
        while self.fars[far].talk.is_up() && self.fars[far].batch.is_empty() {
            let most = self.rng.between(1, 16) as usize;
            let Far { talk, batch, keys, places, .. } = &mut self.fars[far];
            while keys.len() < most
                && let Some((key, has_data)) = talk.first_unsent()
                && let Some(head) = talk.send()
            {
                batch.push_back(Out::Head(Piece::bytes(head.bytes())));
                keys.push(key);
                if has_data && let Some(place) = places[key as usize] {
                    let Flying { op, serial, len, .. } = self.flying[place as usize];
                    let len = index(talk.fit(op, len));
                    batch.push_back(Out::Data { place, serial, done: 0, len });
                }
            }
            if batch.is_empty() {
                return;
            }
            self.pump(far);
        }
    }

    /// Hands over to the connection what it has room for.
    fn pump(&mut self, far: usize) {
        while let Some(out) = self.fars[far].batch.pop_front() {
            let Far { weather, pipes, .. } = &self.fars[far];
            let room = weather.room.saturating_sub(pipes[UP].under_way.len());
            let rest = match out {
                _ if room == 0 => Some(out),
                Out::Head(piece) => {
                    self.fars[far].pipes[UP].under_way.push(piece);
                    None
                }
                Out::Data { place, serial, done, len } => {
                    let flying = self.flying[place as usize];
                    let slot = &self.slots[flying.slot as usize];
                    if flying.serial != serial || slot.generation != flying.generation {
                        let text = "data is sent of a request that has ended";
                        return self.fail(Kind::StalePages, text);
                    }
                    let end = len.min(done + room);
                    let piece = Piece::cells(gathered(&flying, &slot.cells), done, end);
                    self.fars[far].pipes[UP].under_way.push(piece);
                    (end < len).then_some(Out::Data { place, serial, done: end, len })
                }
            };
            if let Some(rest) = rest {
                self.fars[far].batch.push_front(rest);
                break;
            }
            self.fars[far].talk.hear();
        }
        self.let_flow(far, UP);
        if !self.fars[far].batch.is_empty() {
            return;
        }
        for key in std::mem::take(&mut self.fars[far].keys) {
            if let Some(result) = self.fars[far].talk.sent(key) {
                self.land(far, key, result);
            }
        }
    }

    /// Has what is under way arrive, some time.
    pub(crate) fn let_flow(&mut self, far: usize, way: usize) {
        let Far { pipes, connection, is_linked, .. } = &mut self.fars[far];
        let pipe = &mut pipes[way];
        if !*is_linked || pipe.is_flowing || pipe.is_silent || pipe.under_way.len() == 0 {
            return;
        }
        pipe.is_flowing = true;
        let connection = *connection;
        let ns = self.rng.below(self.plan.latency_ns);
        self.later(ns, What::Flow { far, connection, way });
    }

    /// Some bytes arrive.
    pub(crate) fn flow(&mut self, far: usize, connection: u32, way: usize) {
        if !self.fars[far].is_linked || self.fars[far].connection != connection {
            return;
        }
        let weather = self.fars[far].weather();
        let Far { pipes, patience, .. } = &mut self.fars[far];
        let pipe = &mut pipes[way];
        pipe.is_flowing = false;
        if self.rng.permille(weather.cut) && connection < CALM {
            return self.cut(far);
        }
        if patience.answer > 0 && self.rng.permille(weather.silent) {
            pipe.is_silent = true;
        }
        if pipe.is_silent {
            return;
        }
        let all = pipe.under_way.len();
        let count = if self.rng.percent(50) { all } else { index(self.rng.between(1, all as u64)) };
        pipe.under_way.pour(&mut pipe.there, count);
        if way == UP {
            self.server_takes(far);
            self.pump(far);
            self.send_far(far);
        } else {
            self.fars[far].talk.hear();
            self.client_takes(far);
        }
        self.let_flow(far, way);
    }

    /// A connection ends. The client hears of it, unless it is silent about that, too.
    pub(crate) fn cut(&mut self, far: usize) {
        let Far { pipes, patience, connection, .. } = &mut self.fars[far];
        pipes.iter_mut().for_each(|pipe| pipe.is_silent = true);
        let connection = *connection;
        if patience.answer == 0 || self.rng.percent(70) {
            let ns = self.rng.below(3 * self.plan.latency_ns);
            self.later(ns, What::Cut { far, connection });
        }
    }

    /// The client hears that a connection has ended, or has waited for long enough.
    pub(crate) fn heard_of_cut(&mut self, far: usize, connection: u32) {
        if self.fars[far].is_linked && self.fars[far].connection == connection {
            self.lose(far, false);
        }
    }

    /// The client gives a connection up.
    fn lose(&mut self, far: usize, is_broken: bool) {
        let Far { talk, target, away_since, strikes, in_vain, ends, .. } = &mut self.fars[far];
        let was_up = if is_broken { talk.broke() } else { talk.lose() };
        *strikes += u32::from(is_broken);
        *in_vain += 1;
        away_since.get_or_insert(self.now);
        if let Some(Target { key, at, .. }) = *target
            && self.mutant == Some(Mutant::FarReplyCut)
        {
            ends[key as usize] = at;
        }
        self.fars[far].unlink();
        if was_up {
            self.losses += 1;
            self.fars[far].count_losses(self.now);
            self.fars[far].talk.hold();
            self.accuse(far);
            self.forget_held(far);
            self.give_up(far);
        }
        let ns = self.rng.pick(&[1000, 10_000_000, 300_000_000]);
        self.dial(far, ns);
        self.tick_far(far);
    }

    /// What bugs make of what is held: to the client it is done, as it will be to the server.
    fn forget_held(&mut self, far: usize) {
        let Far { places, ghosts, .. } = &mut self.fars[far];
        for (place, ghost) in places.iter().zip(ghosts) {
            let op = place.map(|place| self.flying[place as usize].op);
            *ghost |= match self.mutant {
                Some(Mutant::FarHeldLost) => matches!(op, Some(Op::Write | Op::WriteZeroes { .. })),
                Some(Mutant::FarFlushLost) => op == Some(Op::Flush),
                _ => false,
            };
        }
    }

    /// What has been lost with one connection after another may fail, by itself.
    fn accuse(&mut self, far: usize) {
        while let Some(Accused { key, is_over, .. }) = self.fars[far].talk.accused() {
            if !is_over {
                continue;
            }
            let Far { losses, erred, patience, .. } = &mut self.fars[far];
            let (count, first) = losses[key as usize];
            let away = self.now - first;
            let is_time = patience.outage.is_some_and(|outage| away >= u64::from(outage) * SECOND);
            if count < LOSSES || !is_time {
                let text = format!("a request was given up after {count} losses in {away} ns");
                return self.fail(Kind::NeedlessError, text);
            }
            erred[key as usize] = true;
            let device = self.fars[far].device;
            self.deadly += 1;
            self.deadly_legs += u64::from(self.devices[device].habits.is_some());
            self.land(far, key, Err(Errno::EIO));
        }
    }

    fn give_up(&mut self, far: usize) {
        let Far { talk, patience, away_since, strikes, .. } = &mut self.fars[far];
        if talk.give_up().is_none() {
            return;
        }
        let away = self.now - away_since.unwrap_or(self.now);
        let is_over = patience.outage.is_some_and(|outage| away >= u64::from(outage) * SECOND);
        if *strikes < 3 && !is_over {
            let text = format!("a server was given up after {away} ns");
            return self.fail(Kind::NeedlessError, text);
        }
        self.fars[far].gave_up = true;
        while let Some(key) = self.fars[far].talk.abandoned() {
            self.land(far, key, Err(Errno::EIO));
        }
    }

    /// Counts seconds while somebody waits.
    fn tick_far(&mut self, far: usize) {
        let Far { talk, is_ticking, .. } = &mut self.fars[far];
        if talk.is_waiting() && !std::mem::replace(is_ticking, true) {
            self.later(SECOND, What::Second { far });
        }
    }

    /// A second is over.
    pub(crate) fn second(&mut self, far: usize) {
        self.fars[far].is_ticking = false;
        let is_silent = self.fars[far].talk.second().is_some();
        if is_silent && self.mutant != Some(Mutant::FarSilence) {
            self.lose(far, false);
        }
        self.send_far(far);
        self.give_up(far);
        self.tick_far(far);
    }

    /// Tries to connect, in a while of up to so many nanoseconds.
    fn dial(&mut self, far: usize, most_ns: u64) {
        if std::mem::replace(&mut self.fars[far].is_dialling, true) {
            return;
        }
        let ns = self.rng.below(most_ns);
        self.later(ns, What::Dial { far });
    }

    /// Connects, if the server is there.
    pub(crate) fn connect(&mut self, far: usize) {
        self.fars[far].is_dialling = false;
        if self.fars[far].is_linked {
            return;
        }
        if self.now < self.fars[far].server.down_until {
            return self.dial(far, SECOND);
        }
        let Far { connection, is_linked, greeting, wish, pipes, .. } = &mut self.fars[far];
        (*connection, *is_linked) = (*connection + 1, true);
        (*greeting, *pipes) = (Some(protocol::Handshake::new(wish.clone())), Default::default());
        let connection = *connection;
        if connection > MOST_CONNECTIONS {
            return self.fail(Kind::Hang, "a server is called for ever");
        }
        self.trace
            .note([far as u64, connection.into(), 0, self.now], format_args!("connect {far}"));
        self.later(GREETING_NS, What::Impatient { far, connection });
        self.accept(far);
    }

    /// A handshake has had its time.
    pub(crate) fn impatient(&mut self, far: usize, connection: u32) {
        let Far { is_linked, greeting, .. } = &self.fars[far];
        if *is_linked && self.fars[far].connection == connection && greeting.is_some() {
            self.lose(far, false);
        }
    }

    /// The client looks at what has arrived.
    fn client_takes(&mut self, far: usize) {
        if self.fars[far].greeting.is_some() && !self.greet(far) {
            return;
        }
        // Each round takes bytes, ends an answer or returns.
        while self.end.is_none() && self.fars[far].talk.is_up() {
            if let Some(target) = self.fars[far].target {
                match self.fill(far, target) {
                    true => continue,
                    false => return,
                }
            }
            let Far { talk, pipes, target, .. } = &mut self.fars[far];
            let arrived = &mut pipes[DOWN].there;
            let Some(bytes) = arrived.head(talk.room(0)) else {
                return self.fail(Kind::Contract, "data is received where headers are");
            };
            match talk.next(&bytes) {
                Ok((0, None)) => return,
                Ok((taken, said)) => {
                    arrived.skip(taken);
                    match said {
                        None => {}
                        Some(Said::Done { key, result }) => self.answered(far, key, result),
                        Some(Said::Data { key, at, len }) => {
                            *target = Some(Target { key, at, left: len, is_hole: false });
                        }
                        Some(Said::Hole { key, at, len }) => {
                            *target = Some(Target { key, at, left: len, is_hole: true });
                        }
                    }
                }
                Err(_) => return self.lose(far, true),
            }
        }
    }

    /// Goes on with a handshake; whether it is over.
    fn greet(&mut self, far: usize) -> bool {
        let Far { greeting, pipes, talk, agreed, gave_up, .. } = &mut self.fars[far];
        let Some(client) = greeting else { return true };
        while *client.outcome() == protocol::Outcome::Open
            && let Some(bytes) = pipes[DOWN].there.head(64)
            && !bytes.is_empty()
        {
            match client.receive(&bytes) {
                Ok(taken) => pipes[DOWN].there.skip(taken),
                Err(broken) => {
                    self.fail(Kind::Contract, format!("a handshake: {}", broken.0));
                    return false;
                }
            }
        }
        let output = client.output().to_vec();
        client.sent(output.len());
        pipes[UP].under_way.push(Piece::bytes(&output));
        let protocol::Outcome::Chosen(now) = client.outcome() else {
            self.let_flow(far, UP);
            return false;
        };
        if let Err(what) = same_export(agreed, now) {
            self.fail(Kind::Contract, format!("another export: {what}"));
            return false;
        }
        talk.connected(now);
        *gave_up = false;
        *greeting = None;
        self.let_flow(far, UP);
        self.send_far(far);
        true
    }

    /// An answer is whole.
    fn answered(&mut self, far: usize, key: u32, result: Result<(), u32>) {
        let Far { talk, away_since, strikes, in_vain, keys, .. } = &mut self.fars[far];
        let (_, verdict) = talk.answered(key, result);
        if verdict != Verdict::Parting {
            (*away_since, *strikes, *in_vain) = (None, 0, 0);
        }
        match verdict {
            Verdict::Over(result) => {
                self.land(far, key, result);
                // Another may have waited for that.
                if self.fars[far].talk.has_unsent() {
                    self.send_far(far);
                }
            }
            Verdict::Parting => self.lose(far, false),
            Verdict::Open if self.mutant == Some(Mutant::FarEarly) && keys.contains(&key) => {
                self.land(far, key, result.map_err(errno));
            }
            Verdict::Open => self.send_far(far),
        }
    }

    /// Brings what has arrived of a read to its place; whether that is all of it.
    fn fill(&mut self, far: usize, target: Target) -> bool {
        let Target { key, at, left, is_hole } = target;
        let Far { places, pipes, .. } = &mut self.fars[far];
        let Some(place) = places[key as usize] else {
            self.fail(Kind::StalePages, "data comes for a request that has ended");
            return false;
        };
        let (source, from, len) = if is_hole {
            (Data::Cells(Arc::new([ZERO, ZERO])), 0, left as usize)
        } else {
            let Some(piece) = pipes[DOWN].there.take(left as usize) else { return false };
            let len = piece.len();
            (piece.data, piece.from, len)
        };
        let last = self.fars[far].ends[key as usize] as usize;
        let flying = self.flying[place as usize];
        let slot = &mut self.slots[flying.slot as usize];
        if slot.generation != flying.generation {
            self.fail(Kind::StalePages, "data comes for a request that has ended");
            return false;
        }
        let mixes = &mut self.mixes;
        let (mut start, begin, end) = (0, at as usize, at as usize + len);
        for part in &flying.parts[..usize::from(flying.part_count)] {
            let end = end.min(last);
            let (low, high) = (begin.max(start), end.min(start + part.len as usize));
            if low < high {
                let memory = part.at as usize + low - start;
                sectors(memory, high - low, |sector, range, done| {
                    let cell = &mut slot.cells[sector];
                    *cell = match &source {
                        Data::Cells(_) if is_hole => {
                            mixes.replace(*cell, range, &[ZERO, ZERO], range.0)
                        }
                        Data::Cells(cells) => {
                            mixes.replace(*cell, range, cells, from + low - begin + done)
                        }
                        // Headers that are taken for data.
                        Data::Bytes(_) => POISON,
                    };
                });
            }
            start += part.len as usize;
        }
        // It is no more than was left.
        let done = len as u32;
        let rest = Target { at: at + done, left: left - done, ..target };
        self.fars[far].target = (rest.left > 0).then_some(rest);
        true
    }
}
