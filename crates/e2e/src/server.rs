//! Answers for a server of many disks under test, and for talking to one as any client could.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::command::wait_until;
use crate::disk::Process;
use crate::room::Room;

/// A server of many disks. It is ended with this.
pub struct Server<'r> {
    room: &'r Room,
    /// What it is called.
    pub name: String,
}

impl<'r> Server<'r> {
    /// Starts one.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(room: &'r Room, more: &[&str]) -> Server<'r> {
        Server::named(room, room.name(), more)
    }

    /// The same with this name.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn named(room: &'r Room, name: String, more: &[&str]) -> Server<'r> {
        let server = Server { room, name };
        let mut arguments = vec!["serve", &server.name, "--json"];
        arguments.extend(more);
        let text = room.devsplice(arguments).limit(120).ok();
        let first = text.lines().next().unwrap_or_default();
        let told: Value = serde_json::from_str(first).expect("JSON");
        assert_eq!(told["server"], *server.name);
        server
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.room.run.join(format!("@{}.sock", self.name))
    }

    /// Its process.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn process(&self) -> Process {
        let path = self.room.run.join(format!("@{}.server", self.name));
        let mut pid = None;
        // It may just be written.
        wait_until(5, "a server's file", || {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let about: Value = serde_json::from_str(&text).unwrap_or_default();
            pid = about["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            pid.is_some()
        });
        Process(pid.expect("a number"))
    }

    /// A conversation with it.
    ///
    /// # Panics
    /// If it does not listen.
    #[must_use]
    pub fn talk(&self) -> Talk {
        Talk::with(&self.socket())
    }

    /// Ends it with all of its disks, and sees that nothing is left.
    ///
    /// # Panics
    /// If it does not end.
    pub fn end(self) {
        let process = self.process();
        let _ = self.room.devsplice(["del", "--server", &self.name]).limit(300).ok();
        process.ends_within(20);
        wait_until(5, "no state", || self.room.state().is_empty());
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        if self.room.state().is_empty() {
            return;
        }
        let quietly = std::panic::AssertUnwindSafe(|| {
            let end = ["del", "--force", "--server", &self.name];
            self.room.devsplice(end).limit(300).run()
        });
        let _ = std::panic::catch_unwind(quietly);
    }
}

/// A conversation over a control socket.
pub struct Talk {
    socket: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Talk {
    /// Begins one.
    ///
    /// # Panics
    /// If nobody listens.
    #[must_use]
    pub fn with(path: &Path) -> Talk {
        let socket = UnixStream::connect(path).expect("a server that listens");
        socket.set_read_timeout(Some(Duration::from_secs(120))).expect("a time limit");
        let reader = BufReader::new(socket.try_clone().expect("a copy"));
        Talk { socket, reader }
    }

    /// Says something; whether the other side was still there.
    pub fn say(&mut self, text: &[u8]) -> bool {
        self.socket.write_all(text).is_ok()
    }

    /// The next line, or null if the other side has gone.
    ///
    /// # Panics
    /// If it is no JSON, or nothing comes.
    pub fn hear(&mut self) -> Value {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Value::Null,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Value::Null,
            Err(error) => panic!("no line: {error}"),
            Ok(_) => serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}")),
        }
    }

    /// Whether nothing but the end comes.
    ///
    /// # Panics
    /// If the other side says something.
    pub fn ends(&mut self) {
        let mut rest = Vec::new();
        let _ = self.reader.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
    }

    /// Asks for something; the whole answer.
    pub fn ask(&mut self, method: &str, params: &Value) -> Value {
        let request = json!({ "jsonrpc": "2.0", "id": 7, "method": method, "params": params });
        self.say(format!("{request}\n").as_bytes());
        self.hear()
    }

    /// The same; its result.
    ///
    /// # Panics
    /// If there is none.
    pub fn result(&mut self, method: &str, params: &Value) -> Value {
        let answer = self.ask(method, params);
        assert!(answer.get("result").is_some(), "{method} {params}: {answer}");
        answer["result"].clone()
    }

    /// The same; the code of the error.
    ///
    /// # Panics
    /// If there is none.
    pub fn code(&mut self, method: &str, params: &Value) -> i64 {
        let answer = self.ask(method, params);
        let code = answer["error"]["code"].as_i64();
        code.unwrap_or_else(|| panic!("{method} {params}: {answer}"))
    }
}
