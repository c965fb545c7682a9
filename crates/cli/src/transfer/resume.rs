//! Answers for the file from which a copy that was broken off goes on.

use std::io::Write;
use std::path::{Path, PathBuf};

use devsplice_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// What is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The source, as it was named.
    pub from: String,
    /// The target.
    pub to: String,
    /// Bytes to copy.
    pub size: u64,
    /// What tells whether the source has been changed.
    pub stamp: String,
    /// Bytes from the start that are in the target, durably.
    pub done: u64,
    /// Whether the target was made by the copy, so that what is beyond reads as zeros.
    pub fresh: bool,
}

/// The file, and what was last written to it.
pub struct Kept {
    path: PathBuf,
    last: Resume,
}

impl Kept {
    /// Where the copy `this` begins: at 0, or where the file says.
    ///
    /// # Errors
    /// If the file is of another copy, or cannot be read or written.
    pub fn open(path: &Path, this: Resume) -> Result<Kept> {
        let name = path.display().to_string();
        let mut kept = Kept { path: path.to_owned(), last: this };
        match std::fs::read(path) {
            Ok(bytes) => {
                let found: Resume = serde_json::from_slice(&bytes).map_err(|error| {
                    Error::invalid(&name, format!("says nothing of a copy: {error}"))
                })?;
                let Resume { from, to, size, .. } = &kept.last;
                if (&found.from, &found.to, &found.size) != (from, to, size) || found.done > *size {
                    let reason = format!(
                        "is of a copy of {} to {}, {} bytes",
                        found.from, found.to, found.size
                    );
                    return Err(Error::invalid(&name, reason).next("remove it to begin anew"));
                }
                if found.stamp != kept.last.stamp {
                    let reason = format!("{from} has been changed since");
                    return Err(Error::invalid(&name, reason).next("remove it to begin anew"));
                }
                kept.last = found;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => kept.write()?,
            Err(error) => return Err(Error::os(name, &error)),
        }
        Ok(kept)
    }

    /// What it says.
    pub fn says(&self) -> &Resume {
        &self.last
    }

    /// Everything up to `done` is durable.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn set(&mut self, done: u64) -> Result<()> {
        if done <= self.last.done {
            return Ok(());
        }
        self.last.done = done;
        self.write()
    }

    /// Whole, or as it was.
    fn write(&self) -> Result<()> {
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        let text = serde_json::to_vec(&self.last).unwrap_or_default();
        std::fs::File::create(&beside)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .and_then(|()| std::fs::rename(&beside, &self.path))
            .map_err(|error| Error::os(self.path.display().to_string(), &error))
    }

    /// The copy is done.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path)
            .map_err(|error| Error::os(self.path.display().to_string(), &error))
    }
}
