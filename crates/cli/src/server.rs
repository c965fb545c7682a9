//! Answers for the process that serves a disk: start-up, then signals and requests from the control
//! socket until it is told to stop.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::{Served, Stuck};
use devsplice_exports::host;
use devsplice_exports::threads::Service;
use devsplice_spec::Plan;
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{Add, Export};
use crate::assemble::assemble;
use crate::front::Front;
use crate::guard::Guard;
use crate::state::{self, Claim, Disk};
use crate::tell;

/// Most bytes of one request on the control socket.
const MAX_REQUEST: u64 = 64 << 10;
/// How long a client may take to send its request or to take the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);
/// How long what is in memory for the disk may take to be written out before it is removed.
const SYNC_PATIENCE: Duration = Duration::from_secs(120);
/// The same when it is removed in any case.
const FORCED_SYNC_PATIENCE: Duration = Duration::from_secs(15);

/// What reaches the main thread.
enum News {
    Signal(i32),
    /// A request of a control client, and where its answer goes.
    Request(Call, Sender<Value>),
    /// The disk was removed by somebody else.
    Ended,
}

/// What a control client can ask for.
enum Call {
    Info,
    Stop { force: bool },
}

/// A disk with its server's surroundings.
pub struct Server {
    front: Front,
    disk: Disk,
    claim: Claim,
    guard: Guard,
    news: Receiver<News>,
}

impl Server {
    /// Makes the disk. On an error everything is cleaned up, the guard dismissed.
    ///
    /// # Errors
    /// Whatever stands in the way.
    pub fn start(
        add: &Add,
        plan: &Plan,
        choice: (Export, String),
        mut guard: Guard,
    ) -> Result<Server> {
        let mut claim = match Claim::take(add.name.as_deref()) {
            Ok(claim) => claim,
            Err(error) => {
                guard.dismiss();
                return Err(error);
            }
        };
        guard.name(&claim.name);
        match Server::prepare(add, plan, choice, &mut claim) {
            Ok((front, disk, news)) => {
                let mut server = Server { front, disk, claim, guard, news };
                match server.claim.write(&server.disk) {
                    Ok(()) => Ok(server),
                    Err(error) => {
                        let _ = server.close();
                        Err(error)
                    }
                }
            }
            Err(error) => {
                claim.remove();
                guard.dismiss();
                Err(error)
            }
        }
    }

    fn prepare(
        add: &Add,
        plan: &Plan,
        (export, why): (Export, String),
        claim: &mut Claim,
    ) -> Result<(Front, Disk, Receiver<News>)> {
        let assembled = assemble(plan, Access::Serve)?;
        let mut warnings = assembled.warnings();
        let limits = *assembled.stack.limits();
        let (stack, bottoms) = assembled.into_parts();
        let (news_in, news) = channel();
        let name = claim.name.clone();
        let listener = listen(&name)?;
        let signals = Signals::new([SIGTERM, SIGINT, SIGQUIT, SIGHUP])
            .map_err(|error| Error::os("signal handlers", &error))?;
        let mut disk = Disk {
            name: name.clone(),
            export: if export == Export::Fuse { "fuse" } else { "ublk" }.to_owned(),
            why,
            pid: std::process::id(),
            size: limits.size,
            block: limits.block,
            read_only: add.read_only || limits.read_only,
            serial: add.serial.clone(),
            stack: plan.to_expression(),
            ..Disk::default()
        };
        let service =
            Service { stack, bottoms, on_stuck: report_stuck, on_event: report, on_death: die };
        // From now on somebody would have to clear up if this process died: so that is written
        // before the disk is there, which may take as long as a look for partitions does.
        let mut on_made = |number| {
            match export {
                Export::Fuse => disk.fuse_connection = Some(number),
                _ => disk.ublk_id = Some(number),
            }
            let _ = claim.write(&disk);
        };
        let front = Front::attach(add, &name, export, service, &mut on_made)?;
        warnings.extend(front.crew().warnings.iter().cloned());
        disk.device = front.path().to_owned();
        disk.data_path = front.data_path().to_owned();
        disk.batch = front.is_batched();
        disk.warnings = warnings;
        make_link(&disk);
        start_listeners(&front, listener, signals, &news_in);
        Ok((front, disk, news))
    }

    /// What was made.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Serves until told to stop.
    ///
    /// # Errors
    /// If the disk could not be removed in the end.
    pub fn run(self) -> Result<()> {
        loop {
            match self.news.recv() {
                Ok(News::Request(Call::Info, answer)) => {
                    let _ = answer.send(self.info());
                }
                Ok(News::Request(Call::Stop { force }, answer)) => {
                    if !force && let Some(refusal) = self.refusal() {
                        let _ = answer.send(refusal);
                        continue;
                    }
                    // Without force the refusal has just been ruled out by writing all out.
                    let done = if force { self.close() } else { self.remove() };
                    let reply = match &done {
                        Ok(()) => json!({ "result": "stopped" }),
                        Err(error) => json!({ "error": error.to_string() }),
                    };
                    let _ = answer.send(reply);
                    // The answer is written by another thread; the process must not end before it.
                    drop(answer);
                    std::thread::sleep(Duration::from_millis(20));
                    return done;
                }
                Ok(News::Signal(SIGHUP)) => {}
                Ok(News::Signal(_) | News::Ended) | Err(_) => return self.close(),
            }
        }
    }

    /// Why the disk must not be removed now, if so. Otherwise everything written to it is below.
    fn refusal(&self) -> Option<Value> {
        let Disk { name, device, .. } = &self.disk;
        if !host::is_held(device) {
            if host::sync(device, SYNC_PATIENCE) {
                return None;
            }
            let log = state::path(name, "log");
            return Some(json!({ "error": format!(
                "{name} ({device}): data in memory could not be written to it; see {}, or --force \
                 to lose it",
                log.display()
            )}));
        }
        let mounts = host::mounts_of(device);
        let holder = match mounts.is_empty() {
            true => "held by another user (swap, LVM, another server)".to_owned(),
            false => format!("mounted on {}", mounts.join(", ")),
        };
        Some(json!({ "error": format!(
            "{name} ({device}): is {holder}; unmount it first, or --force to remove it all the same"
        )}))
    }

    fn info(&self) -> Value {
        let crew = self.front.crew();
        let counts: serde_json::Map<String, Value> =
            crew.counts().list().into_iter().map(|(k, v)| (k.to_owned(), v.into())).collect();
        let mut info = serde_json::to_value(&self.disk).unwrap_or_default();
        info["state"] = json!("live");
        info["threads"] = json!(crew.thread_count());
        info["held"] = json!(host::is_held(&self.disk.device));
        info["counts"] = Value::Object(counts);
        info["layers"] = tell::layers(&crew.served.stack);
        info["events"] = json!(crew.served.events());
        json!({ "result": info })
    }

    /// Writes out what is in memory, then removes the disk in any case.
    fn close(self) -> Result<()> {
        let device = &self.disk.device;
        if !host::sync(device, FORCED_SYNC_PATIENCE) {
            eprintln!("devsplice: {device}: data in memory could not be written to it");
        }
        self.remove()
    }

    /// Removes the disk and all traces of it.
    fn remove(self) -> Result<()> {
        let Server { front, claim, guard, .. } = self;
        match front.detach() {
            Ok(_) => {
                claim.remove();
                guard.dismiss();
                Ok(())
            }
            // The guard tries again when this process has let go of everything.
            Err(error) => Err(error),
        }
    }
}

fn report_stuck(stuck: &Stuck) {
    let Stuck { lane, tag, io, flying, seconds } = stuck;
    eprintln!(
        "devsplice: a request has been below for {seconds} s: {} of {} bytes at {} (queue {lane}, \
         tag {tag}, {flying} splices out)",
        io.op.name(),
        io.extent.len,
        io.extent.at
    );
}

/// What a layer reports, in the log.
fn report(text: &str) {
    eprintln!("devsplice: {text}");
}

/// An I/O thread cannot go on: the device is lost. The guard cleans up.
#[allow(clippy::needless_pass_by_value)]
fn die(error: Error) {
    eprintln!("devsplice: {error}; the device is gone");
    std::process::exit(1);
}

fn make_link(disk: &Disk) {
    let link = state::link(&disk.name);
    if let Some(dir) = link.parent() {
        let _ = std::fs::create_dir_all(dir);
    }
    let _ = std::fs::remove_file(&link);
    // A convenience: where /dev cannot be written to, the node itself is still there.
    let _ = std::os::unix::fs::symlink(&disk.device, &link);
}

fn listen(name: &str) -> Result<UnixListener> {
    let path = state::path(name, "sock");
    let _ = std::fs::remove_file(&path);
    UnixListener::bind(&path).map_err(|error| Error::os(path.display().to_string(), &error))
}

fn start_listeners(
    front: &Front,
    listener: UnixListener,
    mut signals: Signals,
    news: &Sender<News>,
) {
    let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(128 << 10);
        if let Err(error) = thread.spawn(body) {
            eprintln!("devsplice: thread {name}: {error}");
        }
    };
    let out = news.clone();
    spawn(
        "signals",
        Box::new(move || {
            for signal in signals.forever() {
                let _ = out.send(News::Signal(signal));
            }
        }),
    );
    let (out, served) = (news.clone(), front.crew().served.clone());
    spawn(
        "control",
        Box::new(move || {
            for client in listener.incoming().flatten() {
                let _ = talk(client, &out, &served);
            }
        }),
    );
    let out = news.clone();
    if let Some(end) = front.crew().take_end() {
        spawn(
            "end",
            Box::new(move || {
                let _ = end.recv();
                let _ = out.send(News::Ended);
            }),
        );
    }
}

/// Serves one request of a control client: a line of JSON-RPC 2.0 each way.
fn talk(client: UnixStream, news: &Sender<News>, served: &Arc<Served>) -> std::io::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = String::new();
    BufReader::new((&client).take(MAX_REQUEST)).read_line(&mut line)?;
    let request: Value = serde_json::from_str(&line).unwrap_or_default();
    if request["method"] == "tell" {
        // A layer may take its time; others are served meanwhile.
        let served = Arc::clone(served);
        let body = move || {
            let _ = reply(&client, &request, tell::answer(&served, &request["params"]));
        };
        let thread = std::thread::Builder::new().name("tell".to_owned()).stack_size(128 << 10);
        return thread.spawn(body).map(drop);
    }
    let answer = match parse(&request) {
        Ok(call) => ask(call, news),
        Err(error) => json!({ "error": error.to_string() }),
    };
    reply(&client, &request, answer)
}

fn reply(mut client: &UnixStream, request: &Value, mut answer: Value) -> std::io::Result<()> {
    answer["jsonrpc"] = json!("2.0");
    answer["id"] = request["id"].clone();
    if let Some(text) = answer["error"].as_str() {
        answer["error"] = json!({ "code": -32000, "message": text });
    }
    client.write_all(format!("{answer}\n").as_bytes())
}

fn parse(request: &Value) -> Result<Call> {
    match request["method"].as_str() {
        Some("info") => Ok(Call::Info),
        Some("stop") => {
            Ok(Call::Stop { force: request["params"]["force"].as_bool().unwrap_or(false) })
        }
        Some(other) => {
            Err(Error::invalid(format!("method `{other}`"), "unknown").next("info, stop, tell"))
        }
        None => Err(Error::invalid("request", "is no JSON-RPC 2.0 with a method, on one line")),
    }
}

fn ask(call: Call, news: &Sender<News>) -> Value {
    let (answer, reply) = channel();
    let gone = || json!({ "error": "the server is stopping" });
    match news.send(News::Request(call, answer)) {
        Ok(()) => reply.recv().unwrap_or_else(|_| gone()),
        Err(_) => gone(),
    }
}

/// Lets go of the terminal: standard input and output become /dev/null, standard error goes to the
/// log of `name`, or nowhere.
///
/// # Errors
/// If /dev/null or the log cannot be opened.
pub fn silence(name: Option<&str>) -> Result<()> {
    let open = |path: &std::path::Path, flags| {
        rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Error::os(path.display().to_string(), &errno.into()))
    };
    let null = open(std::path::Path::new("/dev/null"), OFlags::RDWR)?;
    let log = match name {
        Some(name) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND;
            Some(open(&state::path(name, "log"), flags)?)
        }
        None => None,
    };
    let failed =
        |errno: rustix::io::Errno| Error::new(ErrorKind::Os, "standard streams", errno.to_string());
    rustix::stdio::dup2_stdin(&null).map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(failed)?;
    rustix::stdio::dup2_stderr(log.as_ref().unwrap_or(&null)).map_err(failed)
}
