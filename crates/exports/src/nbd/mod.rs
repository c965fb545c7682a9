//! Answers for disks that are reached by NBD: over a socket in the file system or TCP, by any
//! number of clients at once.
//!
//! A thread of its own greets clients (`greet`); one that has chosen gets a place on an I/O thread
//! (`connection`), which is a queue of the engine like any other front end's. Nothing is kept by
//! the kernel when the server ends: a disk over NBD goes with its server.

mod connection;
mod extents;
mod greet;
mod guest;
mod leave;
mod listen;
mod outbox;
mod post;
mod sealed;
mod stale;
mod state;
mod suspend;

pub use devsplice_nbd::server::Tls;
pub use devsplice_nbd::uri::Uri;
pub use devsplice_tls::{Certificates, Keys, Server};
pub use listen::Rule;
pub use suspend::Suspended;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Limits, Result};
use devsplice_engine::Counts;
use devsplice_nbd::limits::MAX_PAYLOAD;
use devsplice_nbd::server::Offer;
use devsplice_nbd::wire::can;
use devsplice_uring::{FileKind, LaneMemory, RingFile, Uring};

use crate::extents::Extents;
use crate::threads::{Crew, Service, Shape, Work};
use connection::Connection;
use greet::Host;
use listen::Listener;
use post::{Desk, Post};

/// How long connections may take to end: what is in flight below has to come back.
const END_LIMIT: Duration = Duration::from_secs(10);
/// What clients are told to prefer, where the stack has no wish: a page.
const PREFERRED: u32 = 4096;

/// TLS, where it is spoken.
#[derive(Clone, Debug)]
pub struct Secure {
    /// To whom; not `Off`.
    pub policy: Tls,
    /// What is shown, and who is let in.
    pub server: Server,
    /// Whether the kernel does it where it can, once there is agreement.
    pub by_kernel: bool,
}

impl Secure {
    fn features(&self) -> Vec<&'static str> {
        let policy = match self.policy {
            Tls::Required => "tls-require",
            Tls::Off | Tls::Offered => "tls-on",
        };
        let kernel = self.by_kernel.then_some("tls-kernel");
        std::iter::once(policy).chain(self.server.verifies()).chain(kernel).collect()
    }
}

/// What to serve, where, to whom.
#[derive(Clone, Debug)]
pub struct Options {
    /// The export's name; clients that give none get it, too.
    pub name: String,
    /// Where to listen.
    pub listen: Vec<Uri>,
    /// Sockets that somebody listens at already, and has passed on.
    pub passed: Vec<Arc<OwnedFd>>,
    /// Who may connect.
    pub allow: Vec<Rule>,
    /// Whether clients that come over a network may change data.
    pub writable: bool,
    /// Whether nobody may.
    pub read_only: bool,
    /// Most connections at a time.
    pub connections: u16,
    /// Threads that serve them.
    pub threads: u16,
    /// Requests in flight on each.
    pub depth: u16,
    /// Seconds after which a request is reported as stuck; 0 for never.
    pub stuck_seconds: u32,
    /// TLS, where it is spoken.
    pub secure: Option<Secure>,
}

/// A disk that clients can connect to.
pub struct Device {
    uris: Vec<String>,
    crew: Crew,
    post: Arc<Post>,
    greeter: Option<JoinHandle<()>>,
    /// Who asks servers below, where there are some that tell.
    teller: Option<JoinHandle<()>>,
    options: Options,
    listeners: Arc<[Listener]>,
    features: Vec<&'static str>,
}

/// What has no zones, as the protocol has no words for them.
const NO_ZONES: &str = "a disk that is reached by NBD";

impl Device {
    /// Listens and serves; clients are taken on return.
    ///
    /// # Errors
    /// If an address cannot be had; or as the stack, io_uring or memory refuse.
    pub fn attach(options: &Options, service: Service) -> Result<Device> {
        service.refuse_zones(NO_ZONES)?;
        let mut listeners = Vec::new();
        for uri in &options.listen {
            if uri.tls.is_some() {
                let reason = "an address to listen at does not say whether TLS is spoken";
                return Err(Error::invalid(uri.to_string(), reason)
                    .next("write nbd://, and --tls require --tls-certificates DIR"));
            }
            listeners.extend(Listener::open(&uri.place, &options.allow)?);
        }
        for socket in &options.passed {
            let socket =
                socket.try_clone().map_err(|error| Error::os("a passed socket", &error))?;
            listeners.push(Listener::adopt(socket)?);
        }
        if listeners.is_empty() {
            return Err(Error::invalid("--listen", "no address to serve NBD at")
                .next("--listen unix:/run/disk.sock, or --listen nbd://127.0.0.1"));
        }
        Device::serve(options, &listeners.into(), service)
    }

    /// Serves clients that come in at `listeners`.
    fn serve(options: &Options, listeners: &Arc<[Listener]>, service: Service) -> Result<Device> {
        let is_secure = options.secure.as_ref().is_some_and(|one| one.policy == Tls::Required);
        let uris =
            listeners.iter().map(|one| one.uri(&options.name, is_secure).to_string()).collect();
        let limits = *service.stack.limits();
        let threads = options.threads.clamp(1, options.connections.max(1));
        let connections = options.connections.max(1);
        if options.secure.as_ref().is_some_and(|secure| secure.by_kernel) {
            // I/O threads are confined when they begin.
            devsplice_uring::ktls::want();
        }
        let post = Post::new(connections, threads, service.on_event.clone())?;
        let may_lend = service.stack.lives().next().is_none();
        // The greeting thread looks at the same bottoms.
        let known = Extents::in_use(&service.stack, &service.bottoms)?;
        let (known, patient) =
            if known.may_wait() { (None, Some(known)) } else { (Some(known), None) };
        let work = Work {
            service,
            make: make(&post, limits, options.depth, may_lend),
            cpus: Box::new(|_| None),
        };
        let crew = Crew::start(shape(options, connections, threads), work)?;
        let host = Host {
            post: Arc::clone(&post),
            known,
            offer: offer(options, &limits),
            rules: options.allow.clone(),
            writable: options.writable,
            secure: options.secure.clone(),
        };
        let begin = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let builder = std::thread::Builder::new().name(name.to_owned());
            let thread = builder.stack_size(256 << 10).spawn(work);
            thread.map_err(|error| Error::os("a thread for clients", &error))
        };
        let tell = |known| {
            let post = Arc::clone(&post);
            begin("nbd/tell", Box::new(move || greet::answer_all(&post, &known)))
        };
        let doors = Arc::clone(listeners);
        let begun = patient.map(tell).transpose().and_then(|teller| {
            let greeter = begin("nbd/greet", Box::new(move || host.run(&doors)))?;
            Ok((teller, greeter))
        });
        let (teller, greeter) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                // No client has come in: what is below is let go of before anything else is done.
                post.stop();
                crew.join();
                return Err(error);
            }
        };
        let features = options.secure.as_ref().map_or(Vec::new(), Secure::features);
        let (options, listeners) = (options.clone(), Arc::clone(listeners));
        let greeter = Some(greeter);
        Ok(Device { uris, crew, post, greeter, teller, options, listeners, features })
    }

    /// Where it is reached: the first of its addresses.
    #[must_use]
    pub fn uri(&self) -> &str {
        // There is one: `attach` refuses to serve nowhere.
        self.uris.first().map_or("", String::as_str)
    }

    /// All of its addresses.
    #[must_use]
    pub fn uris(&self) -> &[String] {
        &self.uris
    }

    /// What it has beyond what all have, in words.
    #[must_use]
    pub fn features(&self) -> Vec<&'static str> {
        self.features.clone()
    }

    /// Connections whose bytes a thread of this process encrypts, with two copies more.
    #[must_use]
    pub fn relays(&self) -> usize {
        self.post.relays()
    }

    /// Connections whose bytes the kernel encrypts.
    #[must_use]
    pub fn sealed(&self) -> usize {
        self.post.sealed()
    }

    /// The threads that serve it.
    #[must_use]
    pub fn crew(&self) -> &Crew {
        &self.crew
    }

    /// Connections that there are.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.post.taken()
    }

    /// Disconnects all clients and ends. What they had in flight is done or not, as with a server
    /// that loses power; what was answered was done.
    ///
    /// # Errors
    /// If what is in flight below does not come back.
    pub fn detach(mut self) -> Result<Counts> {
        self.post.stop();
        self.end(END_LIMIT).map(|()| self.crew.counts())
    }
}

/// What is in flight below does not come back.
fn unfinished() -> Error {
    let reason = format!("I/O below has not come back in {} s", END_LIMIT.as_secs());
    Error::new(ErrorKind::Busy, "NBD connections", reason)
        .next("see dmesg for the device below; clients are not served until it is tried again")
}

fn shape(options: &Options, connections: u16, threads: u16) -> Shape {
    // One memory more than tags: requests are received into it.
    let depth = options.depth.max(1) + 1;
    let memory = LaneMemory { depth, bytes: MAX_PAYLOAD, slots: false, locked: false };
    let stuck_seconds = options.stuck_seconds;
    Shape {
        queues: connections,
        threads,
        is_shared: false,
        is_wide: false,
        low_depth: false,
        memory,
        stuck_seconds,
    }
}

fn make(
    post: &Arc<Post>,
    limits: Limits,
    depth: u16,
    may_lend: bool,
) -> Box<crate::threads::MakeQueue> {
    let post = Arc::clone(post);
    Box::new(move |queue, ring: &mut Uring| {
        let lost = || Error::new(ErrorKind::Os, "NBD", format!("no place {queue}"));
        let desk = usize::from(queue);
        let Desk { bell, .. } = post.desks.get(desk).ok_or_else(lost)?;
        ring.work_in_place();
        ring.linger(Arc::clone(&post.roomy));
        let mut add = || {
            let fd = bell.ear().try_clone().map_err(|error| Error::os("a bell's copy", &error))?;
            ring.add_file(RingFile { fd, kind: FileKind::Other })
        };
        // The first stands in for a socket while there is none.
        let files = (add()?, add()?);
        let place = (Arc::clone(&post), desk);
        Ok(Box::new(Connection::new(place, limits, files, depth.max(1), may_lend)))
    })
}

/// What clients are told.
fn offer(options: &Options, limits: &Limits) -> Offer {
    // All connections share the bottoms, so a flush of one covers the writes of all.
    let mut flags = can::HAS_FLAGS | can::FLUSH | can::FUA | can::MULTI_CONN;
    let mut set = |flag, wanted| flags |= if wanted { flag } else { 0 };
    set(can::ROTATIONAL, limits.rotational);
    set(can::TRIM, limits.discard != 0);
    set(can::WRITE_ZEROES, limits.write_zeroes);
    set(can::FAST_ZERO, limits.write_zeroes);
    if options.read_only || limits.read_only {
        flags = greet::read_only(flags);
    }
    let preferred = limits.io_min.max(limits.physical).max(PREFERRED).max(limits.block);
    Offer {
        name: options.name.clone(),
        description: "devsplice".to_owned(),
        size: limits.size,
        flags,
        block: limits.block,
        preferred: preferred.next_power_of_two().min(MAX_PAYLOAD),
    }
}
