//! Answers for which files the demo copies: this repository's own, then files of the system.

use std::fs;
use std::path::Path;

/// Bytes of all files together, about.
const TOTAL: u64 = 64 << 20;
/// Room that is not worth a search.
const CRUMB: u64 = 64 << 10;
/// Largest file that is taken.
const LARGEST: u64 = 12 << 20;
/// Directories, with the most files and bytes to take from each.
const PLACES: &[(&str, usize, u64)] =
    &[("/usr/share/doc", 600, 8 << 20), ("/usr/bin", 600, TOTAL), ("/usr/lib", 600, TOTAL)];

/// What was chosen: paths without the leading slash, so that they mean something below a mount.
#[derive(Debug, Default)]
pub struct Chosen {
    /// The paths.
    pub paths: Vec<String>,
    /// Bytes of all together.
    pub bytes: u64,
}

impl Chosen {
    /// Takes files until there is enough, those of `sources` first.
    pub fn choose(sources: &Path) -> Self {
        let mut chosen = Self::default();
        for part in ["crates", "docs"] {
            chosen.walk(&sources.join(part), 2000, TOTAL / 4);
        }
        for &(place, files, bytes) in PLACES {
            let (files, left) = (chosen.paths.len() + files, TOTAL.saturating_sub(chosen.bytes));
            chosen.walk(Path::new(place), files, chosen.bytes + bytes.min(left));
        }
        chosen
    }

    /// Takes regular files below `directory`, in order, up to so many files and bytes in all.
    fn walk(&mut self, directory: &Path, files: usize, bytes: u64) {
        // What cannot be read is left out.
        let Ok(entries) = fs::read_dir(directory) else { return };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            // Looking at files costs time where they are far away, as in a VM.
            if self.paths.len() >= files || self.bytes + CRUMB > bytes {
                return;
            }
            let Ok(meta) = path.symlink_metadata() else { continue };
            if meta.is_dir() {
                self.walk(&path, files, bytes);
                continue;
            }
            let fits = meta.len() <= LARGEST && self.bytes + meta.len() <= bytes;
            if !meta.is_file() || meta.len() == 0 || !fits {
                continue;
            }
            // sha256sum writes other names in a way of its own.
            let plain = |name: &&str| !name.contains(['\n', '\r', '\\']);
            let Some(name) = path.to_str().filter(plain) else { continue };
            self.bytes += meta.len();
            self.paths.push(name.trim_start_matches('/').to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_something_to_copy_and_not_too_much() {
        let chosen = Chosen::choose(Path::new(env!("CARGO_MANIFEST_DIR")));
        assert!(chosen.paths.len() > 10 && chosen.bytes <= TOTAL);
        assert!(chosen.paths.iter().all(|path| !path.starts_with('/')));
    }
}
