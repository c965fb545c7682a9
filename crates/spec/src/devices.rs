//! Answers for the TOML form: named devices, each with its driver, its keys and what lies below.

use std::collections::BTreeMap;

use devsplice_core::{Error, Result};
use toml::{Table, Value};

use crate::plan::{Draft, bounded};
use crate::words::did_you_mean;
use crate::{Kind, MAX_FILE, MAX_NESTING, expr};

/// Adds what the document describes to the draft; returns its top.
pub(crate) fn parse(text: &str, draft: &mut Draft<'_>) -> Result<usize> {
    bounded(text, MAX_FILE)?;
    let table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| Error::invalid("TOML", error.to_string().trim_end()))?;
    let mut stack = None;
    let mut devices = BTreeMap::new();
    for (key, value) in table {
        match (key.as_str(), value) {
            ("stack", value) => stack = Some(string("stack", value)?),
            ("device", Value::Table(tables)) => {
                for (name, value) in tables {
                    let device = Device::new(value, draft);
                    let device = device.map_err(|error| error.within(&title(&name)))?;
                    devices.insert(name, device);
                }
            }
            ("device", _) => {
                let error = Error::invalid("device", "not a table");
                return Err(error.next("write [device.NAME]"));
            }
            _ => {
                let error = Error::invalid("stack file", format!("unknown key `{key}`"));
                return Err(error.next("valid keys: stack, device"));
            }
        }
    }
    let top = stack.ok_or_else(|| {
        Error::invalid("stack file", "key `stack` is missing")
            .next("add stack = \"NAME\", the device at the top")
    })?;
    let mut tree = Tree { devices, used: BTreeMap::new(), path: Vec::new(), draft };
    let root = tree.resolve(&top, "stack")?;
    tree.all_used()?;
    Ok(root)
}

fn title(name: &str) -> String {
    format!("device.{name}")
}

/// One `[device.NAME]`.
struct Device {
    kind: Kind,
    given: Vec<(String, String)>,
    below: Vec<String>,
}

impl Device {
    fn new(value: Value, draft: &Draft<'_>) -> Result<Device> {
        let Value::Table(table) = value else {
            let error = Error::invalid(value.type_str(), "expected a table");
            return Err(error.next("write [device.NAME]"));
        };
        let mut driver = None;
        let mut below = Vec::new();
        let mut given = Vec::new();
        for (key, value) in table {
            match key.as_str() {
                "driver" => driver = Some(string("driver", value)?),
                "below" => below = strings(value)?,
                _ => given.push((scalar(&key, value)?, key)),
            }
        }
        let given = given.into_iter().map(|(value, key)| (key, value)).collect();
        let names: Vec<_> = draft.catalog.names().collect();
        let driver = driver.ok_or_else(|| {
            Error::invalid("driver", "key is missing").next(did_you_mean("", &names))
        })?;
        let kind = draft.catalog.find(&driver).ok_or_else(|| {
            Error::invalid(&driver, "no such driver").next(did_you_mean(&driver, &names))
        })?;
        Ok(Device { kind, given, below })
    }
}

fn string(key: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(Error::invalid(key, format!("{}, not a string", other.type_str()))),
    }
}

fn strings(value: Value) -> Result<Vec<String>> {
    match value {
        Value::Array(all) => all.into_iter().map(|one| string("below", one)).collect(),
        one => Ok(vec![string("below", one)?]),
    }
}

/// A key's value as it would be typed in an expression.
fn scalar(key: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Boolean(on) => Ok(if on { "on" } else { "off" }.to_owned()),
        other => {
            let reason = format!("{}, not a string, integer or boolean", other.type_str());
            Err(Error::invalid(key, reason))
        }
    }
}

/// The devices while their names are followed from the top.
struct Tree<'d, 'c> {
    devices: BTreeMap<String, Device>,
    /// Of each device that was reached: what it lies below.
    used: BTreeMap<String, String>,
    /// The names from the top to here.
    path: Vec<String>,
    draft: &'d mut Draft<'c>,
}

impl Tree<'_, '_> {
    /// Adds what `entry` of `user` means: a device if there is one of that name, else an
    /// expression. Calls itself at most [`MAX_NESTING`] deep.
    fn resolve(&mut self, entry: &str, user: &str) -> Result<usize> {
        let Some(device) = self.devices.get(entry) else {
            return self.inline(entry, user);
        };
        if let Some(start) = self.path.iter().position(|name| name == entry) {
            let mut around = self.path[start..].to_vec();
            around.push(entry.to_owned());
            return Err(Error::invalid(title(entry), "lies below itself")
                .next(format!("break the circle {}", around.join(" -> "))));
        }
        if let Some(other) = self.used.insert(entry.to_owned(), user.to_owned()) {
            return Err(Error::invalid(title(entry), format!("used twice: by {other} and {user}"))
                .next("a device lies below one other at most"));
        }
        if self.path.len() == MAX_NESTING {
            let reason = format!("more than {MAX_NESTING} devices above one another");
            return Err(Error::invalid(title(entry), reason));
        }
        let (kind, given, names) = (device.kind, device.given.clone(), device.below.clone());
        self.path.push(entry.to_owned());
        let mut below = Vec::new();
        for name in names {
            below.push(self.resolve(&name, &title(entry))?);
        }
        self.path.pop();
        let placed = self.draft.place(entry, kind, given, below);
        placed.map_err(|error| error.within(&title(entry)))
    }

    fn inline(&mut self, entry: &str, user: &str) -> Result<usize> {
        let is_name = !entry.is_empty() && expr::ident(entry).len() == entry.len();
        if is_name {
            let known: Vec<_> = self.devices.keys().map(String::as_str).collect();
            let error = Error::invalid(user, format!("there is no device `{entry}`"));
            return Err(error.next(did_you_mean(entry, &known)));
        }
        expr::parse(entry, self.draft).map_err(|error| error.within(user))
    }

    fn all_used(&self) -> Result<()> {
        let idle = self.devices.keys().filter(|name| !self.used.contains_key(*name));
        let idle: Vec<_> = idle.map(String::as_str).collect();
        if idle.is_empty() {
            return Ok(());
        }
        let error = Error::invalid("stack file", format!("not used: {}", idle.join(", ")));
        Err(error.next("name them under `below` of another device, or remove them"))
    }
}
