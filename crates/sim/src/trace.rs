//! Answers for what a run leaves behind: a digest always, lines when somebody wants to read them.

use std::fmt;

use crate::rng::mix;

/// The course of a run.
#[derive(Default)]
pub(crate) struct Trace {
    /// The same for the same course.
    pub(crate) digest: u64,
    pub(crate) lines: Option<Vec<String>>,
}

impl Trace {
    /// Takes numbers into the digest, and a line if lines are kept.
    pub(crate) fn note(&mut self, numbers: [u64; 4], line: fmt::Arguments<'_>) {
        for number in numbers {
            self.digest = mix(self.digest.rotate_left(5) ^ number);
        }
        if let Some(lines) = &mut self.lines {
            lines.push(line.to_string());
        }
    }
}
