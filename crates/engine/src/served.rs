//! Answers for what the I/O threads of one device share about its stack: who serves it, which
//! requests are under way (grace), commands and events of its live layers.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use devsplice_core::wait::{Bell, Turn};
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

/// How many requests of one thread are under way, by the phase in which they were routed.
#[derive(Debug, Default)]
pub(crate) struct Shard {
    under_way: [AtomicU32; 2],
}

/// A stack that is served, by one thread or several.
pub struct Served {
    /// Decides where data goes.
    pub stack: Arc<Stack>,
    phase: AtomicUsize,
    shards: Mutex<Vec<Arc<Shard>>>,
    /// Graces that are waited for.
    graces: AtomicU32,
    quiet: Bell,
    grace: Turn,
    /// Requests that change data, have failed below and have not ended.
    unsettled: AtomicU32,
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
            phase: AtomicUsize::new(0),
            shards: Mutex::default(),
            graces: AtomicU32::new(0),
            quiet: Bell::default(),
            grace: Turn::default(),
            unsettled: AtomicU32::new(0),
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
    pub(crate) fn join(&self, shard: &Arc<Shard>, wake: &Wake) -> bool {
        self.workers.fetch_add(1, Ordering::SeqCst);
        lock(&self.shards).push(shard.clone());
        let mut home = lock(&self.home);
        let is_home = home.is_none();
        home.get_or_insert_with(|| wake.clone());
        is_home
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

    /// A request is about to be routed; what this returns goes to [`Served::end`].
    #[inline]
    pub(crate) fn begin(&self, shard: &Shard) -> usize {
        let phase = self.phase.load(Ordering::SeqCst) & 1;
        shard.under_way[phase].fetch_add(1, Ordering::SeqCst);
        phase
    }

    /// All that a pass of routing sent has landed.
    #[inline]
    pub(crate) fn end(&self, shard: &Shard, phase: usize) {
        let before = shard.under_way[phase].fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.graces.load(Ordering::SeqCst) != 0 {
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

    pub(crate) fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::SeqCst) != 0
    }

    /// Waits until nothing is under way that was routed before this call.
    ///
    /// As in the kernel's SRCU, both phases are waited for in turn: a thread may have read the
    /// phase before a flip and count itself in after it.
    pub(crate) async fn grace(&self) {
        let _turn = self.grace.take().await;
        let _waiting = Waiting::new(&self.graces);
        for _ in 0..2 {
            let old = self.phase.fetch_xor(1, Ordering::SeqCst) & 1;
            loop {
                let quiet = self.quiet.wait();
                let busy = |shard: &Arc<Shard>| shard.under_way[old].load(Ordering::SeqCst) != 0;
                if !lock(&self.shards).iter().any(busy) {
                    break;
                }
                quiet.await;
            }
        }
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
