//! Answers for talking to a disk's server over its control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::state;

/// Sends one request and returns its result.
///
/// # Errors
/// What the server answered, or that it does not answer within `limit`.
pub fn call(name: &str, method: &str, params: &Value, limit: Duration) -> Result<Value> {
    let mut params = params.clone();
    params["disk"] = json!(name);
    talk((name, &state::path(name, "sock")), method, &params, limit)
}

/// The same of a server of many disks.
///
/// # Errors
/// As [`call`].
pub fn call_server(server: &str, method: &str, params: &Value, limit: Duration) -> Result<Value> {
    talk((server, &state::server_file(server, "sock")), method, params, limit)
}

fn talk(
    (name, path): (&str, &Path),
    method: &str,
    params: &Value,
    limit: Duration,
) -> Result<Value> {
    let os = |error: std::io::Error| {
        if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) {
            let reason = format!("its server has not answered in {} s", limit.as_secs());
            let log = path.with_extension("log");
            return Error::new(ErrorKind::Timeout, name, reason)
                .next(format!("see {}; as a last resort, kill its process", log.display()));
        }
        Error::os(path.display().to_string(), &error)
    };
    let mut socket = UnixStream::connect(path).map_err(os)?;
    socket.set_read_timeout(Some(limit)).map_err(os)?;
    let request = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
    socket.write_all(format!("{request}\n").as_bytes()).map_err(os)?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line).map_err(os)?;
    let mut reply: Value = serde_json::from_str(&line)
        .map_err(|_| Error::new(ErrorKind::Os, name, "its server went away without an answer"))?;
    match reply["error"]["message"].as_str() {
        Some(message) => {
            let (thing, reason) = message.split_once(": ").unwrap_or((name, message));
            Err(Error::new(ErrorKind::Busy, thing, reason))
        }
        None => Ok(reply["result"].take()),
    }
}
