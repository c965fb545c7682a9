//! Answers for the options of a disk as they are written down: in files, requests and state.

use std::sync::LazyLock;

use clap::{CommandFactory, Parser};

use super::Add;

/// A command line that is `add` alone.
#[derive(Parser)]
struct Line {
    #[command(flatten)]
    add: Add,
}

impl Add {
    /// The options, as they are written down, of a disk of which nothing but its stack is said.
    pub fn plain() -> &'static serde_json::Value {
        // Made once: a server makes thousands of disks.
        static PLAIN: LazyLock<serde_json::Value> = LazyLock::new(|| {
            let add = Line::parse_from(["add", "--", ""]).add;
            serde_json::to_value(add).unwrap_or_default()
        });
        &PLAIN
    }

    /// Whether a number written down is one that the command line takes: what says so is there.
    fn takes(name: &str, number: &serde_json::Value) -> Result<(), serde_json::Error> {
        static COMMAND: LazyLock<clap::Command> = LazyLock::new(Line::command);
        let mut options = COMMAND.get_arguments().filter_map(clap::Arg::get_long);
        let Some(long) = options.find(|long| long.replace('-', "_") == name.replace('-', "_"))
        else {
            return Ok(());
        };
        let option = format!("--{long}={number}");
        let Err(error) = Line::try_parse_from(["add", &option, "--", ""]) else { return Ok(()) };
        if error.kind() != clap::error::ErrorKind::ValueValidation {
            return Ok(());
        }
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        Err(serde::de::Error::custom(line.trim_start_matches("error: ")))
    }

    /// The options with these fields, as they are written down; the others are as if not said.
    ///
    /// # Errors
    /// Which field is no option, or has no such value.
    pub fn with(fields: serde_json::Value) -> Result<Add, serde_json::Error> {
        use serde::de::Error;
        let mut all = Add::plain().clone();
        let serde_json::Value::Object(fields) = fields else {
            return Err(serde_json::Error::custom("options are a table"));
        };
        for (name, value) in fields {
            match all.get_mut(&name) {
                Some(place) => {
                    if value.is_number() {
                        Add::takes(&name, &value)?;
                    }
                    *place = value;
                }
                None => return Err(serde_json::Error::custom(format!("no option `{name}`"))),
            }
        }
        serde_json::from_value(all)
    }

    /// The fields that are not as if nothing was said.
    pub fn changed(&self) -> serde_json::Value {
        let all = serde_json::to_value(self).unwrap_or_default();
        let fields = all.as_object().into_iter().flatten();
        let other = fields.filter(|(name, value)| Add::plain().get(name) != Some(value));
        other.map(|(name, value)| (name.clone(), value.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_in_files_and_requests_are_those_of_the_command_line() {
        for (name, good, bad) in [
            ("connections", 256, 257),
            ("depth", 4096, 4097),
            ("queues", 1, 0),
            ("threads", 256, 1000),
        ] {
            assert!(Add::with(json!({ "stack": "mem:1M", name: good })).is_ok(), "{name}");
            let refused = Add::with(json!({ "stack": "mem:1M", name: bad })).err().unwrap();
            let text = refused.to_string();
            assert!(text.contains(name) && text.contains(&bad.to_string()), "{text}");
        }
    }
}
