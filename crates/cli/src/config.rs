//! Answers for the configuration of all disks as a TOML file: `devsplice save` and `load`.
//!
//! An array of tables `disk`; in each, `stack` and `device` as docs/stack.md has them for a file,
//! and the options of `devsplice add` that are not as if nothing was said.

use std::path::Path;

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_spec::{Kind, Plan};
use serde_json::json;
use toml::{Table, Value};

use crate::args::{Add, Load, Save};
use crate::assemble::CATALOG;
use crate::state::{self, Disk};
use crate::{add, say};

/// Most bytes of a configuration.
const MAX_TEXT: u64 = 8 << 20;

/// A disk that is to be.
#[derive(Debug)]
pub struct Wanted {
    /// Its options.
    pub add: Add,
    /// Its stack.
    pub plan: Plan,
    /// The server of many that it is one of.
    pub server: Option<String>,
}

/// Disks as a configuration.
///
/// # Errors
/// If a stack of them is not understood any more.
pub fn save(disks: &[Disk]) -> Result<String> {
    let mut all: Vec<&Disk> = disks.iter().collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    let tables = all.into_iter().map(table).collect::<Result<Vec<_>>>()?;
    let mut whole = Table::new();
    whole.insert("disk".to_owned(), Value::Array(tables));
    toml::to_string(&whole).map_err(|error| Error::invalid("configuration", error.to_string()))
}

fn table(disk: &Disk) -> Result<Value> {
    let plan = disk.plan()?;
    let mut table = Table::new();
    let text = |text: &str| Value::String(text.to_owned());
    table.insert("name".to_owned(), text(&disk.name));
    if let Some(server) = &disk.server {
        table.insert("server".to_owned(), text(server));
    }
    let options = disk.made_with.as_ref().map(Add::changed).unwrap_or_default();
    for (name, value) in options.as_object().into_iter().flatten() {
        let is_given = !matches!(name.as_str(), "name" | "stack") && !value.is_null();
        if is_given && let Ok(value) = Value::try_from(value) {
            table.insert(name.replace('_', "-"), value);
        }
    }
    // Names that anybody would have given need not be kept.
    if Plan::parse(&disk.stack, &CATALOG)?.labels() == plan.labels() {
        table.insert("stack".to_owned(), text(&disk.stack));
        return Ok(Value::Table(table));
    }
    let mut devices = Table::new();
    for place in &plan.places {
        let mut device = Table::new();
        device.insert("driver".to_owned(), text(place.kind.name()));
        for (key, value) in &place.given {
            device.insert(key.clone(), text(value));
        }
        if matches!(place.kind, Kind::Layer(_)) {
            let below = place.below.iter().map(|index| text(&plan.places[*index].label));
            device.insert("below".to_owned(), Value::Array(below.collect()));
        }
        devices.insert(place.label.clone(), Value::Table(device));
    }
    table.insert("stack".to_owned(), text(&plan.places[plan.root].label));
    table.insert("device".to_owned(), Value::Table(devices));
    Ok(Value::Table(table))
}

/// The disks of a configuration.
///
/// # Errors
/// What in it makes no sense; nothing is done then.
pub fn parse(config: &str) -> Result<Vec<Wanted>> {
    let bad = |reason: String| Error::invalid("configuration", reason);
    let mut whole: Table = toml::from_str(config).map_err(|error| bad(error.to_string()))?;
    let Some(Value::Array(tables)) = whole.remove("disk") else {
        return Err(bad("has no [[disk]]".to_owned()));
    };
    if let Some(other) = whole.keys().next() {
        return Err(bad(format!("`{other}` is none of it: it has [[disk]] tables")));
    }
    let mut all: Vec<Wanted> = Vec::new();
    for (index, table) in tables.into_iter().enumerate() {
        let Value::Table(table) = table else { return Err(bad("disk is no table".to_owned())) };
        let name = table.get("name").and_then(Value::as_str).map(str::to_owned);
        let place = name.clone().unwrap_or_else(|| format!("disk {}", index + 1));
        let wanted = disk(table).map_err(|error| error.within(&place))?;
        let is_taken = all.iter().any(|other| name.is_some() && other.add.name == name);
        if is_taken {
            return Err(bad(format!("two disks are called {place}")));
        }
        all.push(wanted);
    }
    Ok(all)
}

fn disk(mut table: Table) -> Result<Wanted> {
    let server = match table.remove("server") {
        None => None,
        Some(Value::String(server)) => Some(server),
        Some(_) => return Err(Error::invalid("server", "is to be a string")),
    };
    let mut devices = Table::new();
    for name in ["stack", "device"] {
        if let Some(value) = table.remove(name) {
            devices.insert(name.to_owned(), value);
        }
    }
    let stack = devices.get("stack").and_then(Value::as_str).unwrap_or_default().to_owned();
    let plan = if devices.contains_key("device") {
        let text = toml::to_string(&devices)
            .map_err(|error| Error::invalid("device", error.to_string()))?;
        Plan::parse_toml(&text, &CATALOG)?
    } else {
        Plan::parse(&stack, &CATALOG)?
    };
    let mut fields = json!({ "stack": plan.to_expression() });
    for (name, value) in table {
        let value = serde_json::to_value(&value)
            .map_err(|error| Error::invalid(&name, error.to_string()))?;
        fields[name.replace('-', "_")] = value;
    }
    let add = Add::with(fields).map_err(|error| Error::invalid("options", error.to_string()))?;
    if let Some(name) = &add.name {
        state::check_name(name)?;
    }
    Ok(Wanted { add, plan, server })
}

/// Reads a configuration; paths in it are relative to the current directory.
///
/// # Errors
/// If it cannot be read, or what in it makes no sense.
pub fn read(path: &Path) -> Result<Vec<Wanted>> {
    use std::io::Read;
    let thing = path.display().to_string();
    let os = |error: std::io::Error| Error::os(&thing, &error);
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().take(MAX_TEXT).read_to_string(&mut text).map_err(os)?;
    } else {
        let file = std::fs::File::open(path).map_err(os)?;
        file.take(MAX_TEXT).read_to_string(&mut text).map_err(os)?;
    }
    let here = std::env::current_dir().map_err(|error| Error::os("current directory", &error))?;
    let all = parse(&text).map_err(|error| error.within(&thing))?;
    let anchored = |one: Wanted| Ok(Wanted { plan: one.plan.anchored(&here)?, ..one });
    all.into_iter().map(anchored).collect()
}

/// Makes disks, each whole or not at all, and reports on each. `server` is where, whatever they
/// say.
///
/// # Errors
/// If one could not be made; all are tried.
pub fn make(wanted: Vec<Wanted>, server: Option<&str>, json: bool) -> Result<()> {
    let mut failed = Vec::new();
    for one in wanted {
        let made = match server.or(one.server.as_deref()) {
            Some(server) => add::join(&one.add, &one.plan, server),
            None => add::alone(&one.add, &one.plan),
        };
        let name = one.add.name.unwrap_or_else(|| one.add.stack.clone());
        match made {
            Ok(disk) if json => say!("{}", json!({ "name": disk.name, "device": disk.device })),
            Ok(disk) => say!("{}: {}", disk.name, disk.device),
            Err(error) => {
                if json {
                    say!("{}", json!({ "name": name, "error": error.to_string() }));
                }
                eprintln!("devsplice: {name}: {error}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, failed.join(", "), "not made"))
}

/// `devsplice save`.
///
/// # Errors
/// If the state cannot be read, or the file not be written.
pub fn run_save(wish: &Save) -> Result<()> {
    let mut disks: Vec<Disk> = state::all()?.into_iter().map(|found| found.disk).collect();
    if wish.server.is_some() {
        disks.retain(|disk| disk.server == wish.server);
    }
    let text = save(&disks)?;
    match &wish.file {
        Some(path) => std::fs::write(path, text)
            .map_err(|error| Error::os(path.display().to_string(), &error)),
        None => {
            say!("{}", text.trim_end());
            Ok(())
        }
    }
}

/// `devsplice load`.
///
/// # Errors
/// If the configuration makes no sense (nothing is done then), or a disk could not be made.
pub fn run_load(load: &Load) -> Result<()> {
    make(read(&load.file)?, load.server.as_deref(), load.json)
}
