//! Answers for the file from which a copy that was broken off goes on.

use std::io::Write;
use std::path::{Path, PathBuf};

use devsplice_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// The next step where what it says is of no use.
const ANEW: &str = "remove it to begin anew";

/// What is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The source, as it was named.
    pub from: String,
    /// The target.
    pub to: String,
    /// Bytes to copy.
    pub size: u64,
    /// What tells whether the source is another one, or has been changed.
    pub stamp: String,
    /// What tells whether the target is another one; not known before it is open.
    pub target: String,
    /// Bytes from the start that are in the target, durably.
    pub done: u64,
    /// Whether the target was made by the copy, so that what is beyond reads as zeros.
    pub fresh: bool,
}

impl Resume {
    /// Of a copy that has done nothing yet.
    pub fn new([from, to]: [&str; 2], size: u64, stamp: String) -> Resume {
        let (from, to, target) = (from.to_owned(), to.to_owned(), String::new());
        Resume { from, to, size, stamp, target, done: 0, fresh: false }
    }
}

/// The file, and what was last written to it.
pub struct Kept {
    path: PathBuf,
    last: Resume,
}

/// What the file says, if there is one, of the copy `this` that is about to begin.
///
/// # Errors
/// If it is of another copy, or of another source, or cannot be read.
pub fn find(path: &Path, this: &Resume) -> Result<Option<Resume>> {
    let name = path.display().to_string();
    let refuse = |reason: String| Err(Error::invalid(&name, reason).next(ANEW));
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::os(name, &error)),
    };
    let found: Resume = match serde_json::from_slice(&bytes) {
        Ok(found) => found,
        Err(error) => return refuse(format!("says nothing of a copy: {error}")),
    };
    let Resume { from, to, size, .. } = this;
    if (&found.from, &found.to, &found.size) != (from, to, size) || found.done > *size {
        let Resume { from, to, size, .. } = found;
        return refuse(format!("is of a copy of {from} to {to}, {size} bytes"));
    }
    if found.stamp != this.stamp {
        return refuse(format!("{from} is another one, or has been changed since"));
    }
    Ok(Some(found))
}

/// Nothing may be written to a target that is not there: it would lack what was copied before.
///
/// # Errors
/// If there should be something in it.
pub fn refuse_gone(path: &Path, found: Option<&Resume>) -> Result<()> {
    let Some(found) = found.filter(|found| found.done > 0) else { return Ok(()) };
    let reason = format!(
        "is gone, and with it the {} bytes that were copied to it by {}",
        found.done,
        path.display()
    );
    Err(Error::new(ErrorKind::NotFound, &found.to, reason)
        .next(format!("bring it back, or remove {} to begin anew", path.display())))
}

impl Kept {
    /// Where the copy `this` begins: at 0, or where the file said that was `found`.
    ///
    /// # Errors
    /// If there is something in the target by that, and it is another one now; or the file cannot
    /// be written.
    pub fn open(path: &Path, this: Resume, found: Option<Resume>) -> Result<Kept> {
        match found {
            Some(found) if found.target == this.target => {
                let fresh = found.fresh || this.fresh;
                Ok(Kept { path: path.to_owned(), last: Resume { fresh, ..found } })
            }
            Some(found) if found.done > 0 => {
                let path = path.display();
                let reason = format!(
                    "is another one than {} bytes were copied to by {path}: it was {}, it is {}",
                    found.done, found.target, this.target
                );
                Err(Error::invalid(&this.to, reason)
                    .next(format!("bring that one back, or remove {path} to begin anew")))
            }
            // Nothing that counts was copied: what was known of that one means nothing here.
            _ => {
                let kept = Kept { path: path.to_owned(), last: this };
                kept.write()?;
                Ok(kept)
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_a_target_counts_for_that_target_alone() {
        let path = std::env::temp_dir().join(format!("devsplice-kept.{}", std::process::id()));
        let one = Resume::new(["a", "b"], 100, "then".to_owned());
        let one = Resume { target: "one".to_owned(), ..one };
        assert_eq!(find(&path, &one).unwrap(), None);
        let other = Resume { target: "other".to_owned(), ..one.clone() };
        // With nothing in it, another one begins by what is known of itself.
        for is_fresh in [true, false] {
            let begun = Some(Resume { fresh: true, ..one.clone() });
            let this = Resume { fresh: is_fresh, ..other.clone() };
            assert_eq!(*Kept::open(&path, this.clone(), begun).unwrap().says(), this);
            assert_eq!(find(&path, &one).unwrap(), Some(this));
        }
        let begun = Resume { fresh: true, done: 50, ..one.clone() };
        refuse_gone(&path, Some(&one)).unwrap();
        refuse_gone(&path, Some(&begun)).unwrap_err();
        assert_eq!(*Kept::open(&path, one, Some(begun.clone())).unwrap().says(), begun);
        let text = Kept::open(&path, other, Some(begun)).map(|_| ()).unwrap_err().to_string();
        assert!(text.starts_with("b: is another one than 50 bytes"), "{text}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_of_an_older_command_is_refused_with_what_to_do() {
        let path = std::env::temp_dir().join(format!("devsplice-older.{}", std::process::id()));
        let text = r#"{"from":"a","to":"b","size":100,"stamp":"then","done":50,"fresh":true}"#;
        std::fs::write(&path, text).unwrap();
        let this = Resume::new(["a", "b"], 100, "then".to_owned());
        let refused = find(&path, &this).unwrap_err().to_string();
        assert!(refused.contains("target") && refused.contains(ANEW), "{refused}");
        std::fs::remove_file(&path).unwrap();
    }
}
