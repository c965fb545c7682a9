//! Answers for `devsplice info`: what a disk is and what its server has counted.

use std::time::Duration;

use devsplice_core::Result;
use devsplice_core::size::show_size;
use serde_json::{Value, json};

use crate::args::Info;
use crate::{client, list, say, state, tell};

/// Prints one disk.
///
/// # Errors
/// If there is none of that name, or its server does not answer.
pub fn run(info: &Info) -> Result<()> {
    let found = state::find(&info.name)?;
    let value = if found.alive {
        client::call(&found.disk.name, "info", &json!({}), Duration::from_secs(10))?
    } else {
        let mut value = found.disk.shown();
        value["state"] = json!(list::word(&found));
        value
    };
    if info.json {
        say!("{}", serde_json::to_string_pretty(&value).unwrap_or_default());
    } else {
        show(&value);
    }
    Ok(())
}

fn show(value: &Value) {
    let text = |key: &str| match &value[key] {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let size = value["size"].as_u64().unwrap_or(0);
    say!("name        {}", text("name"));
    say!("device      {}", text("device"));
    say!("state       {}, pid {}, {} I/O threads", text("state"), text("pid"), text("threads"));
    say!("size        {} ({size} bytes), {}-byte blocks", show_size(size), text("block"));
    say!("access      {}", if value["read_only"] == true { "read-only" } else { "read-write" });
    say!("export      {} ({})", text("export"), text("why"));
    let batches = if value["batch"] == true { ", in batches" } else { "" };
    let low = if value["low_depth"] == true { ", low depth" } else { "" };
    say!("data path   {}{batches}{low}", text("data_path"));
    let features = value["features"].as_array().into_iter().flatten();
    let features: Vec<&str> = features.filter_map(Value::as_str).collect();
    if !features.is_empty() {
        say!("features    {}", features.join(", "));
    }
    if let Some(file) = value["shared_memory"].as_str() {
        let path = text("data_path");
        say!("shared      {file}: the driver knows requests from there; data moves by {path}");
    }
    say!("recovery    {}", text("recovery"));
    say!("serial      {}", text("serial"));
    say!("stack       {}", text("stack"));
    for warning in value["warnings"].as_array().into_iter().flatten() {
        say!("note        {}", warning.as_str().unwrap_or_default());
    }
    for what in ["protection", "sandbox"] {
        for (name, word) in value[what].as_object().into_iter().flatten() {
            let word = word.as_str().unwrap_or_default();
            say!("{what:11} {}: {word}", name.replace('_', " "));
        }
    }
    for server in value["servers"].as_array().into_iter().flatten() {
        let text = |key: &str| server[key].as_str().unwrap_or("none");
        say!(
            "server      {}: {} connections, {} reconnects, last error: {}",
            text("uri"),
            server["connections"],
            server["reconnects"],
            text("last_error")
        );
    }
    tell::show(value);
    let Some(counts) = value["counts"].as_object() else { return };
    let of = |key: &str| counts.get(key).and_then(Value::as_u64).unwrap_or(0);
    say!("counters");
    for (name, count) in counts {
        say!("  {name:14} {count}");
    }
    let requests = of("requests").max(1);
    #[allow(clippy::cast_precision_loss)]
    let per = |key: &str| of(key) as f64 / requests as f64;
    say!("per request");
    say!("  pieces {:.2}, SQEs {:.2}, enters {:.2}", per("pieces"), per("sqes"), per("enters"));
}
