//! Answers for what the I/O threads of one device share about its stack: who serves it, which
//! requests are under way (grace), commands and events of its live layers.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use devsplice_core::wait::Bell;
use devsplice_core::{NodeId, Stack};

use crate::watch::Stuck;

/// Events kept for whoever asks later.
const EVENTS_KEPT: usize = 256;

/// Called to make a thread look at its slow work; may be called from any thread.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Told about what live layers report. Called on an I/O thread, so it must not block on the device.
pub type OnEvent = Box<dyn Fn(&str) + Send + Sync>;

/// Something that whoever looks after a device may want to know at once.
#[derive(Debug)]
pub enum Noted<'a> {
    /// What a live layer reports.
    Layer(&'a str),
    /// A request has been below for long.
    Stuck(&'a Stuck),
}

/// Told about such things. Called on an I/O thread, so it must not block.
pub type OnNoted = Box<dyn Fn(&Noted<'_>) + Send + Sync>;

/// What came of a command: an answer, or why there is none.
pub type Answer = Result<String, String>;

/// A command on its way to a layer.
pub(crate) struct Letter {
    pub(crate) node: NodeId,
    pub(crate) words: Vec<String>,
    pub(crate) reply: mpsc::Sender<Answer>,
}

/// Which requests of a lane are under way, by tag: 0 for none, else the epoch in which it was
/// routed first and where it waits.
#[derive(Debug)]
pub(crate) struct Shard {
    under_way: Box<[AtomicU64]>,
}

/// Bits of the place at which a request waits.
const PLACE_BITS: u32 = 16;
/// It waits nowhere. No place has this number: a stack has at most 4096.
const NOWHERE: u64 = (1 << PLACE_BITS) - 1;

impl Shard {
    pub(crate) fn new(depth: usize) -> Arc<Shard> {
        Arc::new(Shard { under_way: (0..depth).map(|_| AtomicU64::new(0)).collect() })
    }

    /// A tag's request is routed, or splices of it are out.
    #[inline]
    pub(crate) fn goes(&self, tag: u16, epoch: u64) {
        self.under_way[usize::from(tag)].store(epoch << PLACE_BITS | NOWHERE, Ordering::SeqCst);
    }
}

/// A stack that is served, by one thread or several.
pub struct Served {
    /// Decides where data goes.
    pub stack: Arc<Stack>,
    /// Goes up with each grace.
    epoch: AtomicU64,
    shards: Mutex<Vec<Arc<Shard>>>,
    /// Graces that are waited for, and the last epoch that one of them waits for the end of.
    graces: AtomicU32,
    awaited: AtomicU64,
    quiet: Bell,
    /// Requests that change data, have failed below and have not ended.
    unsettled: AtomicU32,
    /// Nobody asks for anything any more.
    ending: AtomicBool,
    /// Threads that serve the stack and have not come to their end.
    workers: AtomicU32,
    /// Wakes the thread that does what is done once for a device: the first that came.
    home: Mutex<Option<Wake>>,
    mail: Mutex<VecDeque<Letter>>,
    events: Mutex<VecDeque<String>>,
    on_event: OnEvent,
    on_noted: Mutex<Option<OnNoted>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Served {
    /// Nothing serves it yet.
    #[must_use]
    pub fn new(stack: Arc<Stack>, on_event: OnEvent) -> Arc<Served> {
        Arc::new(Served {
            stack,
            epoch: AtomicU64::new(1),
            shards: Mutex::default(),
            graces: AtomicU32::new(0),
            awaited: AtomicU64::new(0),
            quiet: Bell::default(),
            unsettled: AtomicU32::new(0),
            ending: AtomicBool::new(false),
            workers: AtomicU32::new(0),
            home: Mutex::default(),
            mail: Mutex::default(),
            events: Mutex::default(),
            on_event,
            on_noted: Mutex::default(),
        })
    }

    /// A stack of which nobody wants to hear events.
    #[must_use]
    pub fn quietly(stack: Arc<Stack>) -> Arc<Served> {
        Served::new(stack, Box::new(|_| {}))
    }

    /// A thread begins to serve; whether it is the device's home.
    pub(crate) fn join(&self, wake: &Wake) -> bool {
        self.workers.fetch_add(1, Ordering::SeqCst);
        let mut home = lock(&self.home);
        let is_home = home.is_none();
        home.get_or_insert_with(|| wake.clone());
        is_home
    }

    /// A lane begins to serve.
    pub(crate) fn add(&self, shard: &Arc<Shard>) {
        lock(&self.shards).push(shard.clone());
    }

    /// A thread other than the home will serve no more.
    pub(crate) fn leave(&self) {
        self.workers.fetch_sub(1, Ordering::SeqCst);
        self.wake_home();
    }

    /// Whether the home is the only thread that still serves.
    pub(crate) fn is_alone(&self) -> bool {
        self.workers.load(Ordering::SeqCst) <= 1
    }

    fn wake_home(&self) {
        if let Some(wake) = &*lock(&self.home) {
            wake();
        }
    }

    /// Sends a command to a layer. The answer comes when the layer is done with it; never, if the
    /// device stops before.
    pub fn command(&self, node: NodeId, words: Vec<String>) -> mpsc::Receiver<Answer> {
        let (reply, answer) = mpsc::channel();
        lock(&self.mail).push_back(Letter { node, words, reply });
        self.wake_home();
        answer
    }

    pub(crate) fn next_letter(&self) -> Option<Letter> {
        lock(&self.mail).pop_front()
    }

    /// The device stops: nobody will read what was sent.
    pub(crate) fn drop_mail(&self) {
        lock(&self.mail).clear();
    }

    /// Keeps an event and tells who wanted to hear.
    pub fn event(&self, text: String) {
        (self.on_event)(&text);
        let on_noted = lock(&self.on_noted);
        if let Some(note) = &*on_noted {
            note(&Noted::Layer(&text));
        }
        let mut events = lock(&self.events);
        if events.len() == EVENTS_KEPT {
            events.pop_front();
        }
        events.push_back(text);
    }

    /// A request is stuck below.
    pub fn stuck(&self, stuck: &Stuck) {
        if let Some(note) = &*lock(&self.on_noted) {
            note(&Noted::Stuck(stuck));
        }
    }

    /// Has `note` told what happens from now on, after the events so far.
    pub fn note(&self, note: OnNoted) {
        // Whoever has an event keeps it behind this lock, so that none is told twice or not at all.
        let mut on_noted = lock(&self.on_noted);
        for text in &*lock(&self.events) {
            note(&Noted::Layer(text));
        }
        *on_noted = Some(note);
    }

    /// The last events, oldest first.
    #[must_use]
    pub fn events(&self) -> Vec<String> {
        lock(&self.events).iter().cloned().collect()
    }

    /// The epoch of a request that is about to be routed. It is put into the shard before any layer
    /// is asked.
    #[inline]
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Nothing of a request is out, and it waits at a layer: all that is held of answers for it is
    /// of layers above that one.
    pub(crate) fn waits(&self, shard: &Shard, (tag, epoch): (u16, u64), at: NodeId) {
        let place = u64::from(at.number());
        shard.under_way[usize::from(tag)].store(epoch << PLACE_BITS | place, Ordering::SeqCst);
        self.tell_graces(epoch);
    }

    /// Nothing that a layer has answered for a request is held any more.
    #[inline]
    pub(crate) fn end(&self, shard: &Shard, (tag, epoch): (u16, u64)) {
        shard.under_way[usize::from(tag)].store(0, Ordering::SeqCst);
        self.tell_graces(epoch);
    }

    #[inline]
    fn tell_graces(&self, epoch: u64) {
        let is_awaited = || epoch <= self.awaited.load(Ordering::SeqCst);
        if self.graces.load(Ordering::SeqCst) != 0 && is_awaited() {
            self.quiet.ring();
        }
    }

    /// A request that changes data has failed below. Counted before its pass ends, so that a grace
    /// that saw it off sees this.
    pub(crate) fn unsettle(&self) {
        self.unsettled.fetch_add(1, Ordering::SeqCst);
    }

    /// Such a request has ended.
    pub(crate) fn settled(&self) {
        self.unsettled.fetch_sub(1, Ordering::SeqCst);
    }

    /// What goes on in the background is to come to where it can be left.
    pub(crate) fn end_soon(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    pub(crate) fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::SeqCst) != 0
    }

    /// Waits until no request is under way for which the layer at `node` answered before this call.
    ///
    /// A request that waits at a layer below `node` is: it goes on from there with what `node` has
    /// answered. One that waits at `node` itself or elsewhere holds no answer of it. So what a
    /// layer does for those that wait at it may wait for a grace, and graces never wait for one
    /// another in a circle: only layers above for layers below.
    ///
    /// A request puts its epoch into the shard and then asks layers; whoever waits has changed what
    /// its layer answers, moves the epoch on and then looks into the shards. So one that is not
    /// seen there gets the new answers.
    pub(crate) async fn grace(&self, node: NodeId) {
        let _waiting = Waiting::new(&self.graces);
        let last = self.epoch.fetch_add(1, Ordering::SeqCst);
        self.awaited.fetch_max(last, Ordering::SeqCst);
        loop {
            let quiet = self.quiet.wait();
            if !self.is_under_way(node, last) {
                return;
            }
            quiet.await;
        }
    }

    /// Whether a request of this epoch or one before it may hold an answer of the layer.
    fn is_under_way(&self, node: NodeId, last: u64) -> bool {
        let holds = |slot: &AtomicU64| {
            let slot = slot.load(Ordering::SeqCst);
            let (epoch, place) = (slot >> PLACE_BITS, slot & NOWHERE);
            // What is left of the slot fits.
            let is_below = || self.stack.is_over(node, u16::try_from(place).unwrap_or(u16::MAX));
            epoch != 0 && epoch <= last && (place == NOWHERE || is_below())
        };
        lock(&self.shards).iter().any(|shard| shard.under_way.iter().any(holds))
    }
}

/// Counted as long as it lives: the future that waits may be dropped.
struct Waiting<'a>(&'a AtomicU32);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicU32) -> Waiting<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
