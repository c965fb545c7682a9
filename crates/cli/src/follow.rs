//! Answers for `devsplice events`: what servers report, line by line as it happens.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devsplice_core::{Error, Result};
use serde_json::{Value, json};

use crate::args::Events;
use crate::{say, state};

/// How often servers are looked for that were not there before.
const LOOK: Duration = Duration::from_millis(500);

/// Prints events until the disk is gone, or for ever.
///
/// # Errors
/// If there is no such disk.
pub fn run(events: &Events) -> Result<()> {
    if let Some(word) = &events.name {
        let name = state::find(word)?.disk.name;
        let path = state::path(&name, "sock");
        return follow(&path, None, &|event| {
            if event["disk"] == json!(name) {
                show(event, events.json);
            }
            event["disk"] != json!(name) || event["kind"] != "removed"
        });
    }
    let mut known = BTreeSet::new();
    let mut since = None;
    loop {
        let now: BTreeSet<PathBuf> = sockets().into_iter().collect();
        known.retain(|path| now.contains(path));
        for path in now {
            if known.insert(path.clone()) {
                let json = events.json;
                std::thread::spawn(move || {
                    let _ = follow(&path, since, &|event| {
                        show(event, json);
                        true
                    });
                });
            }
        }
        // Of those that come later everything is news.
        since = Some(0);
        std::thread::sleep(LOOK);
    }
}

/// The sockets of all servers; links to them are left out.
fn sockets() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(state::dir()).into_iter().flatten().flatten();
    let is_socket = |path: &PathBuf| {
        path.extension().is_some_and(|ending| ending == "sock") && !path.is_symlink()
    };
    entries.map(|entry| entry.path()).filter(is_socket).collect()
}

/// Hands events to `show` until it says that this was the last, or the server goes.
fn follow(path: &Path, since: Option<u64>, show: &dyn Fn(&Value) -> bool) -> Result<()> {
    let os = |error| Error::os(path.display().to_string(), &error);
    let mut socket = UnixStream::connect(path).map_err(os)?;
    let params = since.map_or_else(|| json!({}), |since| json!({ "since": since }));
    let request = json!({ "jsonrpc": "2.0", "id": 1, "method": "events", "params": params });
    socket.write_all(format!("{request}\n").as_bytes()).map_err(os)?;
    for line in BufReader::new(socket).lines() {
        let said: Value = serde_json::from_str(&line.map_err(os)?).unwrap_or_default();
        if let Some(text) = said["error"]["message"].as_str() {
            return Err(Error::invalid(path.display().to_string(), text));
        }
        if said["method"] == "lost" {
            eprintln!("devsplice: {}", said["params"]["text"].as_str().unwrap_or_default());
        }
        if said["method"] == "event" && !show(&said["params"]) {
            return Ok(());
        }
    }
    Ok(())
}

fn show(event: &Value, json: bool) {
    if json {
        return say!("{event}");
    }
    let text = |name: &str| event[name].as_str().unwrap_or_default();
    let seconds = event["time_ms"].as_u64().unwrap_or(0) / 1000;
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    say!(
        "{hour:02}:{minute:02}:{:02} {} {}: {}",
        seconds % 60,
        text("disk"),
        text("kind"),
        text("text")
    );
}
