//! Answers for servers of many disks as they are known between commands: who they are, which disks
//! are theirs, and that there is one of a name.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use devsplice_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::sandbox::Choice;
use crate::state::{self, Found};

/// How often a server's file is looked at that makes no sense.
const LOOKS: u32 = 20;

/// What is known of a server.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct About {
    /// What it is called.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// I/O threads.
    pub threads: usize,
    /// Whether it is shut in.
    #[serde(default)]
    pub sandbox: Choice,
    /// How often in a row it died soon after its start.
    #[serde(default)]
    pub restarts: u32,
    /// When it started, in milliseconds since 1970.
    #[serde(default)]
    pub started_ms: u64,
}

/// The right to be the server of a name.
pub struct Seat {
    file: File,
    /// Who is there.
    pub about: About,
}

impl Seat {
    /// Takes the place of server `name`, unless there is one; it knows what its last holder wrote.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn take(name: &str) -> Result<Option<Seat>> {
        state::make_dirs()?;
        let path = state::server_file(name, "server");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        for _ in 0..100 {
            let mut file = options
                .open(&path)
                .map_err(|error| Error::os(path.display().to_string(), &error))?;
            if !state::lock(&file) {
                return Ok(None);
            }
            if !state::is_ghost(&file, &path) {
                let mut text = String::new();
                let _ = file.read_to_string(&mut text);
                let mut about: About = serde_json::from_str(&text).unwrap_or_default();
                name.clone_into(&mut about.name);
                return Ok(Some(Seat { file, about }));
            }
        }
        Ok(None)
    }

    /// Writes who is there: in one piece, over what stood there, with blanks behind it. Whoever is
    /// killed meanwhile must not seem never to have been there.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.about).unwrap_or_default();
        let done = self.file.metadata().and_then(|before| {
            let len = usize::try_from(before.len()).unwrap_or(0).max(text.len());
            self.file.write_all_at(format!("{text:len$}").as_bytes(), 0)
        });
        let path = state::server_file(&self.about.name, "server");
        done.map_err(|error| Error::os(path.display().to_string(), &error))
    }

    /// Whether no server has ever been there, as far as is known: the file was made by looking.
    pub fn is_new(&self) -> bool {
        self.about.pid == 0
    }

    /// Removes all traces of the server.
    pub fn remove(self) {
        for ending in ["sock", "log", "server"] {
            let _ = std::fs::remove_file(state::server_file(&self.about.name, ending));
        }
    }
}

/// The server that a user means, if one of that name runs.
///
/// # Errors
/// If none does.
pub fn find(name: &str) -> Result<About> {
    state::check_name(name)?;
    let path = state::server_file(name, "server");
    for _ in 0..LOOKS {
        let is_free = File::open(&path).map_or(true, |file| state::lock(&file));
        if is_free {
            break;
        }
        // It may just be writing.
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if let Ok(about) = serde_json::from_str(&text) {
            return Ok(about);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(Error::new(ErrorKind::NotFound, format!("server `{name}`"), "does not run")
        .next(format!("devsplice serve {name} starts it")))
}

/// Servers of which only a file is left, and stays so for as long as `settle`: one whose process
/// has died is there again in a moment.
///
/// # Errors
/// If the directory is there and cannot be read.
pub fn dead(settle: Duration) -> Result<Vec<String>> {
    let is_free = |name: &String| {
        let file = File::open(state::server_file(name, "server"));
        file.is_ok_and(|file| state::lock_shared(&file))
    };
    let mut dead = state::servers()?;
    dead.retain(is_free);
    if !dead.is_empty() {
        std::thread::sleep(settle);
        dead.retain(is_free);
    }
    Ok(dead)
}

/// The disks of a server, whether it lives or not.
///
/// # Errors
/// If the state cannot be read.
pub fn disks(name: &str) -> Result<Vec<Found>> {
    let mut all = state::all()?;
    all.retain(|found| found.disk.server.as_deref() == Some(name));
    Ok(all)
}
