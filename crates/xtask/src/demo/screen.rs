//! Answers for what the demo prints: a line per step with its time, blocks of text, failures.

use std::io::{IsTerminal, Write};
use std::time::Instant;

use crate::Fallible;
use crate::proc;

/// Columns of the output.
const WIDTH: usize = 100;
/// Columns before a step's text: time, then name.
const INDENT: usize = 21;

/// Standard output, told step by step.
pub struct Screen {
    is_terminal: bool,
}

impl Screen {
    /// Looks at what standard output is.
    pub fn new() -> Self {
        Self { is_terminal: std::io::stdout().is_terminal() }
    }

    /// Runs one step. `what`, if anything, is shown on a terminal while it runs; what the step
    /// returns is shown when it is done. A failure is told by the caller's `fail`.
    pub fn step(
        &self,
        name: &'static str,
        what: &str,
        body: impl FnOnce() -> Fallible<String>,
    ) -> Result<(), Failure> {
        let failed = |message| Failure { step: name, message };
        proc::check_interrupt().map_err(failed)?;
        if self.is_terminal && !what.is_empty() {
            let mut line = format!("{:>8}  {name:<10} {what}", "...");
            line.truncate(WIDTH - 20);
            put(&line);
        }
        let start = Instant::now();
        let done = body();
        let seconds = start.elapsed().as_secs_f64();
        if self.is_terminal {
            // Ours, or what a program that was cut short left on the line.
            put("\r\x1b[K");
        }
        let text = done.map_err(failed)?;
        let mut lines = wrap(&text, WIDTH - INDENT).into_iter();
        let first = lines.next().unwrap_or_default();
        put(&format!("{seconds:>6.1} s  {name:<10} {first}\n"));
        for line in lines {
            put(&format!("{:INDENT$}{line}\n", ""));
        }
        Ok(())
    }

    /// A line in the place of a step, for what prints by itself.
    pub fn announce(&self, name: &str, text: &str) {
        put(&format!("{:>8}  {name:<10} {text}\n", ""));
    }

    /// Text that belongs to the step before it.
    pub fn block(&self, text: &str) {
        for line in text.lines() {
            let deeper = line.len() - line.trim_start().len();
            let lines = wrap(line.trim_start(), WIDTH - 10 - deeper);
            for (index, part) in lines.iter().enumerate() {
                let indent = 10 + deeper + if index == 0 { 0 } else { 2 };
                put(&format!("{:indent$}{part}\n", ""));
            }
        }
    }

    /// A headed paragraph of its own, at the left margin.
    pub fn paragraph(&self, head: &str, lines: &[String]) {
        for (index, line) in lines.iter().enumerate() {
            let head = if index == 0 { head } else { "" };
            for (part, text) in wrap(line, WIDTH - 8).into_iter().enumerate() {
                let head = if part == 0 { head } else { "" };
                put(&format!("{head:<7} {text}\n"));
            }
        }
    }

    /// What went wrong, and what to do next.
    pub fn fail(&self, failure: &Failure, next: &str) {
        put(&format!("  FAILED  {:<10} ", failure.step));
        for (index, line) in failure.message.lines().enumerate() {
            for (part, text) in wrap(line, WIDTH - INDENT).into_iter().enumerate() {
                let indent = if index + part == 0 { 0 } else { INDENT };
                put(&format!("{:indent$}{text}\n", ""));
            }
        }
        self.paragraph("Next:", &[next.to_owned()]);
    }
}

/// A step that failed.
#[derive(Debug)]
pub struct Failure {
    /// The step's name.
    pub step: &'static str,
    /// The command, how it ended, its last words.
    pub message: String,
}

/// Writes at once. A reader that has gone is no reason to stop: cleaning up comes first.
fn put(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Breaks text at spaces; a word that is too long stays whole.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.chars().count() <= width {
            lines.push(line.to_owned());
            continue;
        }
        let mut current = String::new();
        for word in line.split(' ') {
            if !current.is_empty() && current.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut current));
            }
            if !current.is_empty() {
                current.push(' ');
            }
            current.push_str(word);
        }
        lines.push(current);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_at_spaces() {
        assert_eq!(wrap("one two three", 8), ["one two", "three"]);
        assert_eq!(wrap("a  column", 20), ["a  column"]);
        assert_eq!(wrap("averylongword b", 4), ["averylongword", "b"]);
        assert_eq!(wrap("a\nb", 4), ["a", "b"]);
    }
}
