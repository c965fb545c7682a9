//! Answers for a server: what comes over a connection is understood by the protocol's server side
//! and done to a disk, each in its own time. It may fail, lie, say that it goes, and die.
//!
//! It ends what came over a connection when the next one comes. One that does not may do an old
//! write after a newer one, which no client can help; as a mutant, it is found.

use std::collections::BTreeMap;
use std::sync::Arc;

use devsplice_core::Op;
use devsplice_nbd::server::{Ask, Handshake, Outcome, Refusal, Session};
use devsplice_nbd::wire::{can, error};
use devsplice_nbd::{Head, Mode, Request};

use crate::cells::{Cell, POISON, SECTOR, sectors};
use crate::failure::Kind;
use crate::far::{DOWN, Far, UP};
use crate::mutants::Mutant;
use crate::rng::index;
use crate::splices::{Change, harden, zero};
use crate::stream::{Data, Piece};
use crate::world::{What, World};

/// How long an old write lasts, with that bug, at most.
const SLOW_NS: u64 = 1_000_000_000;

/// What is to come from the client next.
#[derive(Clone, Copy, Default)]
enum Intake {
    #[default]
    Request,
    /// Data of a write; so many of its bytes are there.
    Data {
        job: u32,
        there: usize,
    },
    Skip {
        left: u64,
    },
}

/// A request that is worked on.
struct Job {
    request: Request,
    ask: Ask,
    connection: u32,
    /// What is written.
    cells: Vec<Cell>,
    /// Sectors that are written already.
    done: usize,
    serial: u32,
    ended_before: u32,
}

impl Job {
    /// What is to be done, and whether for good.
    fn what(&self) -> (Op, bool) {
        match self.ask {
            Ask::Read => (Op::Read, false),
            Ask::Write { fua } => (Op::Write, fua),
            Ask::Trim { fua } => (Op::Discard, fua),
            Ask::WriteZeroes { fua, unmap, .. } => (Op::WriteZeroes { unmap }, fua),
            _ => (Op::Flush, false),
        }
    }

    /// Whether the server dies of it.
    fn is_deadly(&self, deadly: Option<u64>) -> bool {
        let block = self.request.offset / 4096;
        matches!(self.ask, Ask::Write { .. })
            && deadly.is_some_and(|deadly| block.is_multiple_of(deadly))
    }
}

/// A server and what it is at.
#[derive(Default)]
pub(crate) struct Server {
    /// Nobody can connect before.
    pub(crate) down_until: u64,
    greeting: Option<Handshake>,
    session: Option<Session>,
    intake: Intake,
    jobs: BTreeMap<u32, Job>,
    number: u32,
}

impl World {
    /// A client has connected.
    pub(crate) fn accept(&mut self, far: usize) {
        let is_kept = self.mutant == Some(Mutant::FarOldWrites);
        let Far { server, offer, pipes, .. } = &mut self.fars[far];
        if !is_kept {
            server.jobs.clear();
        }
        let mut greeting = Handshake::new(vec![offer.clone()]);
        pipes[DOWN].under_way.push(Piece::bytes(greeting.output()));
        let count = greeting.output().len();
        greeting.sent(count);
        (server.greeting, server.session) = (Some(greeting), None);
        server.intake = Intake::Request;
        self.let_flow(far, DOWN);
    }

    /// The server looks at what has arrived.
    pub(crate) fn server_takes(&mut self, far: usize) {
        // Each round takes bytes or returns.
        while self.end.is_none() && self.fars[far].is_linked {
            let is_more = match (&self.fars[far].server.session, self.fars[far].server.intake) {
                (None, _) => self.welcome(far),
                (Some(session), Intake::Request) => {
                    let mode = session.mode;
                    self.next_request_of(far, mode)
                }
                (_, Intake::Data { job, there }) => self.take_data(far, job, there),
                (_, Intake::Skip { left }) => {
                    let arrived = &mut self.fars[far].pipes[UP].there;
                    let piece = arrived.take(usize::try_from(left).unwrap_or(usize::MAX));
                    let left = left - piece.as_ref().map_or(0, |piece| piece.len() as u64);
                    self.fars[far].server.intake = match left {
                        0 => Intake::Request,
                        left => Intake::Skip { left },
                    };
                    piece.is_some() || left == 0
                }
            };
            if !is_more {
                return;
            }
        }
    }

    /// Goes on with a handshake; whether there is more to be looked at.
    fn welcome(&mut self, far: usize) -> bool {
        let Far { server, pipes, .. } = &mut self.fars[far];
        let Some(greeting) = &mut server.greeting else { return false };
        let bytes = pipes[UP].there.head(64).unwrap_or_default();
        let Ok(taken) = greeting.receive(&bytes) else {
            self.fail(Kind::Contract, "a server does not understand a handshake");
            return false;
        };
        pipes[UP].there.skip(taken);
        let output = greeting.output().to_vec();
        greeting.sent(output.len());
        pipes[DOWN].under_way.push(Piece::bytes(&output));
        if let Outcome::Chosen(session) = greeting.outcome() {
            server.session = Some(session.clone());
            server.greeting = None;
        }
        self.let_flow(far, DOWN);
        taken > 0
    }

    /// A request, if one is there.
    fn next_request_of(&mut self, far: usize, mode: Mode) -> bool {
        let weather = self.fars[far].weather();
        let Far { server, pipes, .. } = &mut self.fars[far];
        let arrived = &mut pipes[UP].there;
        let len = mode.request_len();
        if arrived.len() < len {
            return false;
        }
        let bytes = arrived.head(len).unwrap_or_default();
        let Ok(Some(request)) = Request::parse(&bytes, mode) else {
            self.fail(Kind::Contract, "a client sends what is no request");
            return false;
        };
        arrived.skip(len);
        let Some(session) = &server.session else { return false };
        let refusal = match session.admit(&request) {
            Ok(ask) => {
                let skip = if matches!(ask, Ask::Write { .. }) { request.length } else { 0 };
                let full = if skip > 0 { error::ENOSPC } else { error::EIO };
                let refused = if self.rng.permille(weather.error) {
                    Some(full)
                } else {
                    self.rng.permille(weather.parting).then_some(error::ESHUTDOWN)
                };
                match refused {
                    Some(error) => Refusal::Reply { error, skip },
                    None => return self.take_on(far, request, ask),
                }
            }
            Err(refusal) => {
                let text = format!("a server refuses {request:?}: {refusal:?}");
                self.fail(Kind::Contract, text);
                return false;
            }
        };
        if let Refusal::Reply { error, skip } = refusal {
            server.intake = if skip > 0 { Intake::Skip { left: skip } } else { Intake::Request };
            self.reply_error(far, &request, error);
        }
        true
    }

    fn reply_error(&mut self, far: usize, request: &Request, error: u32) {
        // The lower half of a cookie is the client's key.
        let key = index(request.cookie & 0xffff_ffff);
        if let Some(erred) = self.fars[far].erred.get_mut(key) {
            *erred |= error != error::ESHUTDOWN;
        }
        self.reply(far, request, error, None);
    }

    fn take_on(&mut self, far: usize, request: Request, ask: Ask) -> bool {
        let serial = self.ended.len() as u32;
        self.ended.push(0);
        let ended_before = self.ended_count;
        let Far { server, connection, .. } = &mut self.fars[far];
        server.number += 1;
        let number = server.number;
        let is_write = matches!(ask, Ask::Write { .. });
        let count = if is_write { index(request.length) / SECTOR } else { 0 };
        let cells = vec![POISON; count];
        let connection = *connection;
        let job = Job { request, ask, connection, cells, done: 0, serial, ended_before };
        server.jobs.insert(number, job);
        if is_write {
            server.intake = Intake::Data { job: number, there: 0 };
        } else {
            self.work(far, number);
        }
        true
    }

    fn work(&mut self, far: usize, job: u32) {
        let ns = self.rng.below(self.plan.latency_ns);
        self.later(ns, What::Serve { far, job });
    }

    /// Data of a write.
    fn take_data(&mut self, far: usize, number: u32, there: usize) -> bool {
        let Far { server, pipes, .. } = &mut self.fars[far];
        let Some(job) = server.jobs.get_mut(&number) else { return false };
        let len = job.cells.len() * SECTOR;
        let Some(piece) = pipes[UP].there.take(len - there) else { return false };
        let mixes = &mut self.mixes;
        sectors(there, piece.len(), |sector, range, done| {
            let cell = &mut job.cells[sector];
            *cell = match &piece.data {
                Data::Cells(cells) => mixes.replace(*cell, range, cells, piece.from + done),
                // Headers that are taken for data.
                Data::Bytes(_) => POISON,
            };
        });
        let there = there + piece.len();
        if there < len {
            server.intake = Intake::Data { job: number, there };
        } else {
            server.intake = Intake::Request;
            self.work(far, number);
        }
        true
    }

    /// Does a request, or a part of it.
    pub(crate) fn serve(&mut self, far: usize, number: u32) {
        let weather = self.fars[far].weather();
        let Far { server, disk, connection, .. } = &mut self.fars[far];
        let (place, connection) = (*disk, *connection);
        if !server.jobs.contains_key(&number) {
            return;
        }
        let is_deadly = server.jobs.get(&number).is_some_and(|job| job.is_deadly(weather.deadly));
        if self.rng.permille(weather.death) || is_deadly {
            return self.die(far);
        }
        let Some(mut job) = server.jobs.remove(&number) else { return };
        let is_live = job.connection == connection && self.fars[far].is_linked;
        if is_live && self.rng.permille(weather.garbage) {
            return self.lie(far, &job);
        }
        if !is_live && self.mutant == Some(Mutant::FarOldWrites) && self.rng.percent(80) {
            self.fars[far].server.jobs.insert(number, job);
            let ns = self.rng.below(SLOW_NS);
            return self.later(ns, What::Serve { far, job: number });
        }
        let (op, fua) = job.what();
        // The lower half of a cookie is the client's key.
        let key = index(job.request.cookie & 0xffff_ffff);
        if is_live && self.fars[far].ghosts[key] {
            return self.reply(far, &job.request, 0, None);
        }
        let Request { offset, length, .. } = job.request;
        let (at, len) = (index(offset), index(length));
        let first = at / SECTOR;
        let disk = &mut self.disks[place];
        let mut data = None;
        match op {
            Op::Read => {
                data = Some(disk.visible()[first..first + len / SECTOR].into());
            }
            Op::Write => {
                let count = job.cells.len();
                let to = if self.rng.percent(25) {
                    index(self.rng.between(job.done as u64, count as u64))
                } else {
                    count
                };
                for sector in job.done..to {
                    disk.put(first + sector, job.cells[sector], job.serial);
                }
                if to < count {
                    job.done = to;
                    self.fars[far].server.jobs.insert(number, job);
                    return self.work(far, number);
                }
            }
            Op::Flush => {}
            _ => zero(disk, &mut self.rng, (op, job.serial), (at, len), false),
        }
        let change = Change { op, fua, serial: job.serial, ended_before: job.ended_before };
        let has_fua = self.fars[far].offer.flags & can::FUA != 0;
        harden(disk, &change, has_fua, &self.ended, self.mutant);
        self.ended_count += 1;
        self.ended[job.serial as usize] = self.ended_count;
        if is_live {
            self.reply(far, &job.request, 0, data);
        }
    }

    fn reply(&mut self, far: usize, request: &Request, error: u32, data: Option<Arc<[Cell]>>) {
        let Far { server, pipes, .. } = &mut self.fars[far];
        let Some(session) = &server.session else { return };
        let whose = (request.cookie, request.offset);
        let stream = &mut pipes[DOWN].under_way;
        match data {
            // A request is far below 4 GiB.
            Some(cells) => {
                let len = cells.len() * SECTOR;
                stream.push(Piece::bytes(Head::data(session.mode, whose, len as u32).bytes()));
                stream.push(Piece::cells(cells, 0, len));
            }
            None => stream.push(Piece::bytes(Head::done(session.mode, whose, error).bytes())),
        }
        self.let_flow(far, DOWN);
    }

    /// Answers what was asked before under the same key. To a client that looks at the key only,
    /// that is an answer to what it asks now.
    fn lie(&mut self, far: usize, job: &Job) {
        let is_believed = self.mutant == Some(Mutant::FarCookie) && job.ask != Ask::Read;
        let turn = if is_believed { 0 } else { 1 << 32 };
        let cookie = job.request.cookie.wrapping_sub(turn);
        self.reply(far, &Request { cookie, ..job.request }, 0, None);
    }

    /// The server dies, and what it has not flushed may die with it.
    fn die(&mut self, far: usize) {
        let weather = self.fars[far].weather();
        let Far { server, disk, device, .. } = &mut self.fars[far];
        let (disk, device) = (*disk, *device);
        let outage = self.rng.below(1_500_000_000);
        *server = Server { down_until: self.now + outage, ..Server::default() };
        self.deaths += 1;
        self.trace.note([far as u64, outage, 0, self.now], format_args!("server {far} dies"));
        if weather.forgets {
            self.disks[disk].crash(&mut self.rng);
            let now = self.tick();
            let device = &mut self.devices[device];
            let inside = disk - device.first_disk;
            let is_there = |sector: usize| {
                let mut places = device.planes.iter().filter_map(|plane| plane[sector].get());
                places.any(|(disk, _)| disk == inside)
            };
            device.oracle.forgot(now, is_there);
        }
        self.cut(far);
    }
}
