//! Answers for whether two places of a plan are the same file or block device.

use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use devsplice_core::{Error, Result};

use crate::{Kind, Place};

/// What two names of one thing have in common.
#[derive(PartialEq, Eq, Hash)]
enum Identity {
    /// Device and inode of a regular file.
    File(u64, u64),
    /// Number of a block device; two nodes in different directories may have the same.
    Block(u64),
}

/// Refuses a file that is used twice, unless each use is read-only. A file that cannot be looked
/// at is left to whoever opens it.
pub(crate) fn used_once(places: &[Place]) -> Result<()> {
    let mut seen: HashMap<Identity, &Place> = HashMap::new();
    for place in places {
        let Some(identity) = path(place).and_then(identity) else { continue };
        // If the first use is read-only, so are all that came after it without an error.
        let Some(first) = seen.get(&identity) else {
            seen.insert(identity, place);
            continue;
        };
        if !(is_read_only(first) && is_read_only(place)) {
            let reason = format!("the same file as {}, and not both are read-only", name(first));
            let error = Error::invalid(name(place), reason);
            return Err(error.next("use another file, or add readonly=on to both"));
        }
    }
    Ok(())
}

fn path(place: &Place) -> Option<&str> {
    match place.kind {
        Kind::Source(source) if source.main_key == Some("path") => place.args.text("path"),
        _ => None,
    }
}

fn name(place: &Place) -> String {
    format!("{} ({})", place.label, path(place).unwrap_or_default())
}

fn identity(path: &str) -> Option<Identity> {
    let metadata = std::fs::metadata(path).ok()?;
    if metadata.file_type().is_block_device() {
        return Some(Identity::Block(metadata.rdev()));
    }
    metadata.is_file().then(|| Identity::File(metadata.dev(), metadata.ino()))
}

fn is_read_only(place: &Place) -> bool {
    matches!(place.args.switch("readonly"), Ok(Some(true)))
}
