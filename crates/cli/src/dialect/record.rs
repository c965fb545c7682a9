//! Answers for what was said when a device was made under a tool's name that needs no target to
//! recover one: `rublk` and ublksrv's `ublk` know by themselves what to serve again.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use devsplice_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::state;

/// Most bytes of a record that are believed.
const MOST: u64 = 64 << 10;

fn path(id: u32) -> PathBuf {
    state::dir().join(format!("ublk-{id}.words"))
}

/// What tells a device from the next one with its number.
fn node(id: u32) -> Option<u64> {
    std::fs::metadata(format!("/dev/ublkc{id}")).ok().map(|node| node.ino())
}

/// Notes the words that made a device. Without the right to, it is recovered with its target named.
pub fn keep(id: u32, words: &[String]) {
    let here = std::env::current_dir().unwrap_or_default();
    let text = json!({ "node": node(id), "dir": here, "words": words }).to_string();
    let _ = state::make_dirs().map(|()| std::fs::write(path(id), text));
}

/// The words that made a device; the current directory becomes the one that they were said in.
///
/// # Errors
/// If nothing is known of it.
pub fn words(id: u32) -> Result<Vec<String>> {
    let thing = format!("ublk device {id}");
    let unknown = || {
        Error::new(ErrorKind::NotFound, &thing, "nothing is known of how it was made")
            .next("say so: recover -n ID with the target and its files, as for add")
    };
    let path = path(id);
    let is_fit = std::fs::metadata(&path).is_ok_and(|file| file.len() <= MOST);
    let text = is_fit.then(|| std::fs::read_to_string(&path).ok()).flatten().ok_or_else(unknown)?;
    let value: Value = serde_json::from_str(&text).map_err(|_| unknown())?;
    if node(id).is_none_or(|node| value["node"] != node) {
        return Err(unknown());
    }
    let words: Option<Vec<String>> = value["words"]
        .as_array()
        .map(|words| words.iter().filter_map(|word| word.as_str().map(str::to_owned)).collect());
    let dir = value["dir"].as_str().ok_or_else(unknown)?;
    std::env::set_current_dir(dir).map_err(|error| Error::os(dir, &error))?;
    words.ok_or_else(unknown)
}

/// The device is gone.
pub fn forget(id: u32) {
    let _ = std::fs::remove_file(path(id));
}
