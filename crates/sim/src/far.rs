//! Answers for disks behind a server: what there is of one, and what may go wrong with it. What the
//! client does is in `client`, what the server does in `crate::server`.

mod client;

use std::collections::VecDeque;

use devsplice_core::Limits;
use devsplice_nbd::client::{self as protocol, Agreed, Conversation, Patience, Wish};
use devsplice_nbd::server::Offer;
use devsplice_nbd::wire::can;
use devsplice_nbd::{Mode, server};

use crate::rng::Rng;
use crate::server::Server;
use crate::stream::{Piece, Pipe};

/// Connections in a row without an answer, after which nothing goes wrong for a while: a large
/// write over a small room would never get through else.
const ENOUGH: u32 = 8;
/// The directions of a connection.
pub(crate) const UP: usize = 0;
pub(crate) const DOWN: usize = 1;

/// What may go wrong with a server and the way to it, of a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    /// A connection ends.
    cut: u64,
    /// A direction of a connection goes silent.
    silent: u64,
    /// The server dies.
    pub(crate) death: u64,
    /// The server answers what was not asked.
    pub(crate) garbage: u64,
    /// A request fails.
    pub(crate) error: u64,
    /// The server says that it goes.
    pub(crate) parting: u64,
    /// Writes that the server dies of, each time: those that begin in one of so many of the blocks
    /// of 4 KiB.
    pub(crate) deadly: Option<u64>,
    /// Bytes that are under way at most.
    room: usize,
    /// What the server has not flushed dies with it.
    pub(crate) forgets: bool,
}

/// A piece of what the client is about to send.
enum Out {
    Head(Piece),
    /// Data of a write, `done` bytes of which are sent.
    Data {
        place: u32,
        serial: u32,
        done: usize,
        len: usize,
    },
}

/// Where the next bytes of an answer belong.
#[derive(Clone, Copy)]
struct Target {
    key: u32,
    at: u32,
    left: u32,
    is_hole: bool,
}

/// A disk behind a server.
pub(crate) struct Far {
    pub(crate) device: usize,
    pub(crate) disk: usize,
    weather: Weather,
    pub(crate) offer: Offer,
    pub(crate) server: Server,
    pub(crate) pipes: [Pipe; 2],
    /// Which connection there is, or was last.
    pub(crate) connection: u32,
    /// There is one, as far as the client knows.
    pub(crate) is_linked: bool,
    /// The server has said an error, by key.
    pub(crate) erred: Vec<bool>,
    /// Connections that were lost before it was answered, and when the first was, by key.
    losses: Vec<(u32, u64)>,
    wish: Wish,
    agreed: Agreed,
    patience: Patience,
    talk: Conversation,
    greeting: Option<protocol::Handshake>,
    /// The splice of each key.
    places: Vec<Option<u32>>,
    batch: VecDeque<Out>,
    keys: Vec<u32>,
    target: Option<Target>,
    is_ticking: bool,
    is_dialling: bool,
    /// Since when there has been no good answer, if a connection was lost.
    away_since: Option<u64>,
    strikes: u32,
    /// Connections without an answer, in a row.
    in_vain: u32,
    gave_up: bool,
    /// By key, what bugs are about: the server does not do it, the data ends there.
    pub(crate) ghosts: Vec<bool>,
    ends: Vec<u32>,
}

/// How a server of this disk presents it.
fn offer(limits: &Limits, rng: &mut Rng) -> Offer {
    let mut flags = can::HAS_FLAGS;
    let mut set = |flag, on| flags |= if on { flag } else { 0 };
    set(can::FLUSH, limits.volatile_cache);
    // Where there is none, the client flushes behind such writes.
    set(can::FUA, limits.volatile_cache && limits.fua && rng.percent(60));
    set(can::TRIM, limits.discard > 0);
    set(can::WRITE_ZEROES, limits.write_zeroes);
    let (name, description) = ("disk".to_owned(), String::new());
    Offer { name, description, size: limits.size, flags, block: limits.block, preferred: 4096 }
}

impl Far {
    pub(crate) fn new(
        (device, disk): (usize, usize),
        limits: &Limits,
        is_live: bool,
        rng: &mut Rng,
    ) -> Far {
        let mut chance = |likely: &[u64]| if rng.percent(50) { rng.pick(likely) } else { 0 };
        let mut weather = Weather {
            cut: chance(&[2, 10, 50]),
            silent: chance(&[2, 10]),
            death: chance(&[2, 10, 30]),
            garbage: chance(&[2, 10]),
            error: chance(&[2, 10]),
            parting: chance(&[2, 10]),
            ..Weather::default()
        };
        weather.room = rng.pick(&[3000, 20_000, 1 << 20]);
        // A mirror cannot know that one of its legs has forgotten something.
        weather.forgets = !is_live && rng.percent(70);
        let patience = Patience {
            answer: if weather.silent > 0 { rng.between(1, 3) as u32 } else { 0 },
            outage: if rng.percent(70) { Some(rng.between(2, 5) as u32) } else { None },
        };
        let mode = rng.pick(&[Mode::Simple, Mode::Structured, Mode::Extended]);
        let wish = Wish { name: String::new(), mode, allocation: rng.percent(50), tls: false };
        let offer = offer(limits, rng);
        let mut agreed = first(&wish, &offer);
        agreed.most = agreed.most.min(rng.pick(&[1 << 16, 1 << 25]));
        // Who waits for ever does for such a write, too. All else is as it is without.
        let mut aside = rng.clone();
        let is_deadly = patience.outage.is_some() && aside.percent(25);
        weather.deadly = is_deadly.then(|| aside.between(3, 20));
        Far {
            device,
            disk,
            weather,
            offer,
            server: Server::default(),
            pipes: Default::default(),
            connection: 0,
            is_linked: false,
            erred: Vec::new(),
            losses: Vec::new(),
            wish,
            talk: Conversation::new(0, &agreed, patience),
            agreed,
            patience,
            greeting: None,
            places: Vec::new(),
            batch: VecDeque::new(),
            keys: Vec::new(),
            target: None,
            is_ticking: false,
            is_dialling: false,
            away_since: None,
            strikes: 0,
            in_vain: 0,
            gave_up: false,
            ghosts: Vec::new(),
            ends: Vec::new(),
        }
    }

    /// A new client, and a server that has started again.
    fn begin(&mut self, keys: usize) {
        self.talk = Conversation::new(keys as u32, &self.agreed, self.patience);
        (self.places, self.erred) = (vec![None; keys], vec![false; keys]);
        self.losses = vec![(0, 0); keys];
        (self.ghosts, self.ends) = (vec![false; keys], vec![u32::MAX; keys]);
        self.server = Server::default();
        (self.is_ticking, self.is_dialling, self.gave_up) = (false, false, false);
        (self.away_since, self.strikes) = (None, 0);
        self.unlink();
    }

    /// Nothing of the connection is left on the client's side.
    fn unlink(&mut self) {
        self.is_linked = false;
        self.pipes = Default::default();
        self.greeting = None;
        self.batch.clear();
        self.keys.clear();
        self.target = None;
    }

    /// What may go wrong now.
    pub(crate) fn weather(&self) -> Weather {
        let Weather { room, forgets, .. } = self.weather;
        match self.in_vain {
            ..ENOUGH => self.weather,
            _ => Weather { room, forgets, ..Weather::default() },
        }
    }

    /// Nothing goes wrong any more.
    pub(crate) fn calm(&mut self) {
        self.weather = Weather { room: self.weather.room, ..Weather::default() };
    }
}

/// The first handshake, without anything between the two.
fn first(wish: &Wish, offer: &Offer) -> Agreed {
    let mut client = protocol::Handshake::new(wish.clone());
    let mut server = server::Handshake::new(vec![offer.clone()]);
    // There are fewer messages than that in any handshake.
    for _ in 0..100 {
        let bytes = server.output().to_vec();
        server.sent(bytes.len());
        let _ = client.receive(&bytes);
        let bytes = client.output().to_vec();
        client.sent(bytes.len());
        let _ = server.receive(&bytes);
    }
    match client.outcome() {
        protocol::Outcome::Chosen(agreed) => agreed.clone(),
        other => panic!("client and server do not agree: {other:?}"),
    }
}
