//! Answers for which tests take longest: what a run that has one of them at a time waits for.

use std::time::{Duration, Instant};

use super::parse::outcome;

/// How many are named.
const NAMED: usize = 20;

/// The time of each test, taken from when its line comes.
pub struct Pace {
    last: Instant,
    times: Vec<(String, Duration)>,
}

impl Pace {
    /// From now on.
    pub fn new() -> Self {
        Self { last: Instant::now(), times: Vec::new() }
    }

    /// Takes a line of output into account that has just come.
    pub fn line(&mut self, line: &str) {
        self.line_at(line, Instant::now());
    }

    fn line_at(&mut self, line: &str, now: Instant) {
        let Some((name, _)) = outcome(line) else { return };
        self.times.push((name.into(), now.duration_since(self.last)));
        self.last = now;
    }

    /// Prints them.
    pub fn show(&self, series: &str) {
        println!("\nslowest tests in the VM with Linux {series}:");
        for (name, time) in self.slowest() {
            println!("{:>6.1} s {name}", time.as_secs_f64());
        }
    }

    /// The longest, first of all the one that took longest.
    fn slowest(&self) -> Vec<(&str, Duration)> {
        let mut times: Vec<_> = self.times.iter().map(|(name, time)| (&name[..], *time)).collect();
        times.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
        times.truncate(NAMED);
        times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_took_what_lies_between_its_line_and_the_one_before() {
        let mut pace = Pace::new();
        let start = pace.last;
        let lines = [
            (1, "test a::quick ... ok"),
            (8, "something that a test says"),
            (9, "test b::slow  ... FAILED"),
            (10, "test c ... ignored (no such thing)"),
            (99, "test result: ok. 3 passed; 0 failed"),
        ];
        for (seconds, line) in lines {
            pace.line_at(line, start + Duration::from_secs(seconds));
        }
        let seconds: Vec<_> =
            pace.slowest().iter().map(|(name, time)| (*name, time.as_secs())).collect();
        assert_eq!(seconds, [("b::slow", 8), ("a::quick", 1), ("c", 1)]);
    }
}
