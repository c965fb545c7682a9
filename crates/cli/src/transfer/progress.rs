//! Answers for telling how far a command is: a bar, or lines for another program.

use std::fs::File;
use std::io::Write;

use devsplice_core::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args;

/// Where progress goes.
pub enum Progress {
    /// Nowhere.
    None,
    /// To a person.
    Bar(ProgressBar),
    /// To a program: `N/100` on a line, when it changes.
    Lines {
        /// Where to.
        file: File,
        /// The last N.
        last: Option<u64>,
        /// Bytes in all.
        total: u64,
    },
}

impl Progress {
    /// As the command line says, for so many bytes.
    ///
    /// # Errors
    /// If the descriptor is not open for writing.
    pub fn new(wish: args::Progress, total: u64) -> Result<Progress> {
        match wish.progress {
            None => Ok(Progress::None),
            Some(None) => {
                let style = "{bar:40} {percent}% {bytes}/{total_bytes} {bytes_per_sec} {eta}";
                let style = ProgressStyle::with_template(style)
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                Ok(Progress::Bar(ProgressBar::new(total).with_style(style)))
            }
            Some(Some(fd)) => {
                let path = format!("/proc/self/fd/{fd}");
                let file = File::options().append(true).open(&path).map_err(|error| {
                    Error::os(format!("--progress={fd}"), &error)
                        .next("it has to be a pipe or a file that is open for writing")
                })?;
                Ok(Progress::Lines { file, last: None, total })
            }
        }
    }

    /// So many bytes are done.
    pub fn at(&mut self, done: u64) {
        match self {
            Progress::None => {}
            Progress::Bar(bar) => bar.set_position(done),
            Progress::Lines { file, last, total } => {
                let part = u128::from(done) * 100 / u128::from((*total).max(1));
                let part = u64::try_from(part).unwrap_or(100);
                if last.replace(part) != Some(part) {
                    // A reader that has gone is no error.
                    let _ = writeln!(file, "{part}/100");
                }
            }
        }
    }

    /// It is over.
    pub fn end(&mut self) {
        if let Progress::Bar(bar) = self {
            bar.finish();
        }
    }
}
