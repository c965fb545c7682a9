//! Answers for what reaches a disk's server: signals, its control socket, the end of its threads.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devsplice_core::{Error, Result};
use devsplice_engine::Served;
use devsplice_exports::threads::Crew;
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::{state, tell};

/// Most bytes of one request on the control socket.
const MAX_REQUEST: u64 = 128 << 10;
/// How long a client may take to send its request or to take the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);

/// What reaches the main thread.
pub enum News {
    /// A signal.
    Signal(i32),
    /// A request of a control client, and where its answer goes.
    Request(Call, Answer),
    /// The I/O threads of this number have ended.
    Ended(u32),
}

/// Where the answer to a control client goes.
pub struct Answer {
    to: Sender<Value>,
    /// Disconnected when the answer has been written to the client.
    written: Receiver<()>,
}

impl Answer {
    /// Answers.
    pub fn send(self, value: Value) {
        let _ = self.to.send(value);
    }

    /// Answers, and waits until the client has it: for who ends the process then.
    pub fn deliver(self, value: Value) {
        let _ = self.to.send(value);
        let _ = self.written.recv_timeout(2 * CLIENT_PATIENCE);
    }
}

/// What a control client can ask for.
pub enum Call {
    /// What the disk is and has done.
    Info,
    /// Its removal.
    Stop {
        /// Whatever holds it.
        force: bool,
    },
    /// To have the kernel hold its requests.
    Quiesce,
    /// To go on.
    Resume,
    /// To go on with another stack.
    Swap {
        /// That stack.
        stack: String,
        /// What its places are called.
        labels: Vec<String>,
        /// Whether it may be smaller.
        shrink: bool,
    },
    /// To tell its users of the size that its stack has by now.
    Resize {
        /// Whether it may be smaller.
        shrink: bool,
    },
    /// To leave it to another program.
    HandOver,
}

/// The stack that is being served, for who has to know it; none while the disk is quiesced.
type Current = Arc<Mutex<Option<Arc<Served>>>>;

/// The threads that listen.
pub struct Lines {
    news: Sender<News>,
    waiting: Option<(UnixListener, Signals)>,
    current: Current,
    crews: u32,
}

impl Lines {
    /// Opens the control socket and takes the signals. Nothing is served yet.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn open(name: &str, news: Sender<News>) -> Result<Lines> {
        let path = state::path(name, "sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .map_err(|error| Error::os(path.display().to_string(), &error))?;
        let signals = Signals::new([SIGTERM, SIGINT, SIGQUIT, SIGHUP])
            .map_err(|error| Error::os("signal handlers", &error))?;
        Ok(Lines {
            news,
            waiting: Some((listener, signals)),
            current: Current::default(),
            crews: 0,
        })
    }

    /// These threads serve the disk from now on.
    pub fn serve(&mut self, crew: &Crew) {
        self.crews += 1;
        self.set(Some(Arc::clone(&crew.served)));
        if let Some(end) = crew.take_end() {
            let (out, number) = (self.news.clone(), self.crews);
            spawn(
                "end",
                Box::new(move || {
                    let _ = end.recv();
                    let _ = out.send(News::Ended(number));
                }),
            );
        }
        let Some((listener, mut signals)) = self.waiting.take() else { return };
        let out = self.news.clone();
        spawn(
            "signals",
            Box::new(move || {
                for signal in signals.forever() {
                    let _ = out.send(News::Signal(signal));
                }
            }),
        );
        let (out, current) = (self.news.clone(), Arc::clone(&self.current));
        spawn(
            "control",
            Box::new(move || {
                for client in listener.incoming().flatten() {
                    let _ = talk(client, &out, &current);
                }
            }),
        );
    }

    /// Nobody serves the disk for now; that its threads end is no news.
    pub fn pause(&mut self) {
        self.crews += 1;
        self.set(None);
    }

    /// Whether the threads of this number are to serve the disk.
    pub fn is_current(&self, crew: u32) -> bool {
        crew == self.crews
    }

    fn set(&self, served: Option<Arc<Served>>) {
        if let Ok(mut current) = self.current.lock() {
            *current = served;
        }
    }
}

fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) {
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(128 << 10);
    if let Err(error) = thread.spawn(body) {
        eprintln!("devsplice: thread {name}: {error}");
    }
}

/// Serves one request of a control client: a line of JSON-RPC 2.0 each way.
fn talk(client: UnixStream, news: &Sender<News>, current: &Current) -> std::io::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = String::new();
    BufReader::new((&client).take(MAX_REQUEST)).read_line(&mut line)?;
    let request: Value = serde_json::from_str(&line).unwrap_or_default();
    if request["method"] == "tell" {
        let Some(served) = current.lock().ok().and_then(|current| current.clone()) else {
            return reply(&client, &request, json!({ "error": "the disk is quiesced" }));
        };
        // A layer may take its time; others are served meanwhile.
        let body = move || {
            let _ = reply(&client, &request, tell::answer(&served, &request["params"]));
        };
        let thread = std::thread::Builder::new().name("tell".to_owned()).stack_size(128 << 10);
        return thread.spawn(body).map(drop);
    }
    let (answer, writing) = match parse(&request) {
        Ok(call) => ask(call, news),
        Err(error) => (json!({ "error": error.to_string() }), None),
    };
    let written = reply(&client, &request, answer);
    drop(writing);
    written
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
    let params = &request["params"];
    let flag = |name: &str| params[name].as_bool().unwrap_or(false);
    let Some(method) = request["method"].as_str() else {
        return Err(Error::invalid("request", "is no JSON-RPC 2.0 with a method, on one line"));
    };
    Ok(match method {
        "info" => Call::Info,
        "stop" => Call::Stop { force: flag("force") },
        "quiesce" => Call::Quiesce,
        "resume" => Call::Resume,
        "swap" => Call::Swap {
            stack: params["stack"].as_str().unwrap_or_default().to_owned(),
            labels: serde_json::from_value(params["labels"].clone()).unwrap_or_default(),
            shrink: flag("shrink"),
        },
        "resize" => Call::Resize { shrink: flag("shrink") },
        "hand-over" => Call::HandOver,
        other => {
            return Err(Error::invalid(format!("method `{other}`"), "unknown")
                .next("info, stop, tell, quiesce, resume, swap, resize, hand-over"));
        }
    })
}

/// The main thread's answer, and what is to be dropped when it has been written.
fn ask(call: Call, news: &Sender<News>) -> (Value, Option<Sender<()>>) {
    let (to, reply) = channel();
    let (writing, written) = channel();
    let gone = || json!({ "error": "the server is stopping" });
    let answer = match news.send(News::Request(call, Answer { to, written })) {
        Ok(()) => reply.recv().unwrap_or_else(|_| gone()),
        Err(_) => gone(),
    };
    (answer, Some(writing))
}
