//! Answers for `devsplice del`: stops a disk's server, or clears up after one that is gone.

use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::args::Del;
use crate::state::{Claim, Found};
use crate::{client, state};

/// Longer than the server's own patience with the device.
const LIMIT: Duration = Duration::from_secs(240);

/// Removes a disk, or all.
///
/// # Errors
/// If there is no such disk, or it is held and force was not given.
pub fn run(del: &Del) -> Result<()> {
    if !del.all {
        let word = del.name.as_deref().unwrap_or_default();
        return remove(&state::find(word)?, del.force);
    }
    let mut failed = Vec::new();
    for found in state::all()? {
        if let Err(error) = remove(&found, del.force) {
            eprintln!("devsplice: {error}");
            failed.push(found.disk.name);
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, failed.join(", "), "not removed"))
}

fn remove(found: &Found, force: bool) -> Result<()> {
    if !found.alive {
        // Taking the name cleans up after its last server.
        if let Some(claim) = Claim::try_take(&found.disk.name)? {
            claim.remove();
        }
        return Ok(());
    }
    client::call(&found.disk.name, "stop", &json!({ "force": force }), LIMIT).map(drop)
}
