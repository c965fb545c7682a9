//! Answers for `devsplice features`: what this kernel offers, found by asking it.

use std::path::Path;

use devsplice_core::Result;
use devsplice_exports::fuse;
use devsplice_exports::ublk::{self, DataPath};
use devsplice_uring::probe;
use serde_json::{Value, json};

use crate::args::Features;
use crate::say;

/// Prints the lists.
///
/// # Errors
/// Never for what is missing: that is what is shown.
pub fn run(features: &Features) -> Result<()> {
    let value = collect();
    if features.json {
        say!("{}", serde_json::to_string_pretty(&value).unwrap_or_default());
        return Ok(());
    }
    say!("kernel      {}", value["kernel"].as_str().unwrap_or_default());
    for part in ["io_uring", "ublk", "fuse"] {
        let part_value = &value[part];
        match part_value["error"].as_str() {
            Some(error) => say!("{part:10}  no: {error}"),
            None => say!("{part:10}  yes"),
        }
        for (name, there) in part_value["features"].as_object().into_iter().flatten() {
            say!("  {} {name}", if there == true { "+" } else { "-" });
        }
    }
    let paths = ["ublk", "fuse"].map(|part| value[part]["data_paths"].as_array());
    let paths = paths.into_iter().flatten().flatten();
    let paths: Vec<_> = paths.filter_map(Value::as_str).collect();
    say!("data paths  {}", if paths.is_empty() { "-".to_owned() } else { paths.join(", ") });
    Ok(())
}

/// All of it as JSON.
pub fn collect() -> Value {
    json!({
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "io_uring": io_uring(),
        "ublk": ublk_features(),
        "fuse": fuse_features(),
    })
}

fn named(list: impl IntoIterator<Item = (&'static str, bool)>) -> Value {
    Value::Object(list.into_iter().map(|(name, there)| (name.to_owned(), there.into())).collect())
}

fn io_uring() -> Value {
    match probe::features() {
        Ok(found) => {
            let mut all = named(found.operations);
            all["deferred task work"] = found.defer_taskrun.into();
            json!({ "features": all })
        }
        Err(error) => json!({ "error": error.to_string() }),
    }
}

fn ublk_features() -> Value {
    match ublk::Control::open() {
        Ok(control) => {
            let bits = control.features();
            let paths: Vec<_> = DataPath::offered(bits).iter().map(|path| path.name()).collect();
            json!({ "features": named(ublk::feature_names(bits)), "data_paths": paths })
        }
        Err(error) => json!({ "error": error.to_string() }),
    }
}

fn fuse_features() -> Value {
    let there = |path: &str| Path::new(path).exists();
    let mut list = vec![("/dev/fuse", there("/dev/fuse")), ("loop", there("/dev/loop-control"))];
    match fuse::available() {
        Ok(()) => {
            let offered = fuse::offered();
            list.push(("over io_uring", offered.contains(&fuse::DataPath::Entries)));
            list.push(("zero copy", offered.contains(&fuse::DataPath::ZeroCopy)));
            let paths: Vec<_> = offered.into_iter().map(fuse::DataPath::name).collect();
            json!({ "features": named(list), "data_paths": paths })
        }
        Err(error) => json!({ "error": error.to_string(), "features": named(list) }),
    }
}
