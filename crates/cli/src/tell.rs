//! Answers for `devsplice tell`: a command from a person to a layer of a disk that is served, and
//! what such layers show of themselves in `info`.

use devsplice_core::{Error, ErrorKind, Result, Stack, Value as Shown};
use devsplice_engine::Served;
use serde_json::{Map, Value, json};
use std::time::Duration;

use crate::args::Tell;
use crate::{client, say, state};

/// Sends a command and prints the answer.
///
/// # Errors
/// If there is no such disk or layer, or the layer cannot do it.
pub fn run(tell: &Tell) -> Result<()> {
    let found = state::find(&tell.name)?;
    let name = &found.disk.name;
    if !found.alive {
        let error = Error::new(ErrorKind::NotFound, name, "its server is gone");
        return Err(error.next(format!("devsplice del {name} cleans up")));
    }
    let params = json!({ "layer": tell.layer, "words": tell.words });
    let answer = client::call(name, "tell", &params, Duration::from_secs(tell.timeout))?;
    say!("{}", answer.as_str().unwrap_or_default());
    Ok(())
}

/// The server's side: has a layer carry out a command, and waits for its answer. Only for a thread
/// that may wait as long as that takes.
///
/// # Errors
/// If there is no such layer, or it cannot do it.
pub fn answer(served: &Served, wanted: &str, words: Vec<String>) -> Result<String> {
    let Some((node, ..)) = served.stack.lives().find(|(_, name, _)| *name == wanted) else {
        return Err(no_layer(&served.stack, wanted));
    };
    let busy = |reason: String| Error::new(ErrorKind::Busy, wanted, reason);
    match served.command(node, words).recv() {
        Ok(answer) => answer.map_err(busy),
        Err(_) => Err(busy("the server is stopping".to_owned())),
    }
}

fn no_layer(stack: &Stack, wanted: &str) -> Error {
    let names: Vec<_> = stack.lives().map(|(_, name, _)| name).collect();
    let wanted = format!("`{wanted}`");
    match names.is_empty() {
        true => Error::new(ErrorKind::NotFound, wanted, "no layer of this disk takes commands"),
        false => Error::new(ErrorKind::NotFound, wanted, "no such layer")
            .next(format!("these take commands: {}", names.join(", "))),
    }
}

/// What the live layers show, from the top down.
pub fn layers(stack: &Stack) -> Value {
    let lives = stack.lives();
    let mut all: Vec<Value> = lives
        .map(|(_, name, live)| json!({ "layer": name, "status": object(&live.status()) }))
        .collect();
    all.reverse();
    Value::Array(all)
}

fn object(status: &[(&'static str, Shown)]) -> Value {
    let value = |shown: &Shown| match shown {
        Shown::Number(number) => json!(number),
        Shown::Text(text) => json!(text),
        Shown::List(rows) => rows.iter().map(|row| object(row)).collect(),
    };
    let entries = status.iter().map(|(name, shown)| ((*name).to_owned(), value(shown)));
    Value::Object(entries.collect::<Map<_, _>>())
}

/// Prints what `info` has from [`layers`], and the events.
pub fn show(info: &Value) {
    for layer in info["layers"].as_array().into_iter().flatten() {
        say!("layer       {}", layer["layer"].as_str().unwrap_or_default());
        for (name, value) in layer["status"].as_object().into_iter().flatten() {
            match value {
                Value::Array(rows) => {
                    for row in rows {
                        say!("  {name:14} {}", line(row));
                    }
                }
                other => say!("  {name:14} {}", plain(other)),
            }
        }
    }
    for event in info["events"].as_array().into_iter().flatten() {
        say!("event       {}", event.as_str().unwrap_or_default());
    }
}

/// A row of a list: names and values, one after another.
fn line(row: &Value) -> String {
    let words = row.as_object().into_iter().flatten();
    words.map(|(name, value)| format!("{name} {}", plain(value))).collect::<Vec<_>>().join(", ")
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_keeps_its_names_numbers_and_rows() {
        let leg = |port| vec![("port", Shown::Number(port)), ("state", Shown::Text("in".into()))];
        let status = [("dirty", Shown::Number(3)), ("legs", Shown::List(vec![leg(0), leg(1)]))];
        let value = object(&status);
        assert_eq!(value["dirty"], 3);
        assert_eq!(value["legs"][1], json!({ "port": 1, "state": "in" }));
        assert_eq!(line(&value["legs"][0]), "port 0, state in");
    }
}
