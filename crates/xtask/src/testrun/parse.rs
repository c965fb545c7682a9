//! What the output of test programs says: results, and the tests that were left out.

use crate::tidy::HELPER;

/// How a test under the standard harness says that it cannot run here.
const SAYS_SKIP: &str = "skipped: ";

/// Counts of a step, and the tests it left out with their reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tests that held.
    pub passed: usize,
    /// Tests that did not.
    pub failed: usize,
    /// The names of those that have one.
    pub broken: Vec<String>,
    /// Name and reason of each test that was not run.
    pub skipped: Vec<(String, String)>,
    /// The test whose output is being shown.
    showing: String,
    /// Tests of this program that its harness takes for passed, though they said that they skip.
    said_so: usize,
}

impl Counts {
    /// One check that held, or did not.
    pub fn check(held: bool) -> Self {
        Self { passed: usize::from(held), failed: usize::from(!held), ..Self::default() }
    }

    /// One check that was not run.
    pub fn skip(name: &str, reason: &str) -> Self {
        Self { skipped: vec![(name.into(), reason.into())], ..Self::default() }
    }

    /// Takes a line of output into account.
    pub fn line(&mut self, line: &str) {
        if let Some((_, result)) = line.split_once("test result: ") {
            let number = |what: &str| {
                let words: Vec<&str> = result.split([' ', ';']).collect();
                let at = words.iter().position(|word| *word == what)?;
                words.get(at.checked_sub(1)?)?.parse::<usize>().ok()
            };
            let said_so = std::mem::take(&mut self.said_so);
            self.passed += number("passed").unwrap_or(0).saturating_sub(said_so);
            self.failed += number("failed").unwrap_or(0);
        } else if let Some(name) = line.strip_prefix("---- ") {
            self.showing = name.trim_end_matches(" stdout ----").to_owned();
        } else if let Some(reason) = line.strip_prefix(SAYS_SKIP) {
            // The standard harness cannot skip at run time: such a test says so, first thing, and
            // returns. One that says it twice is still one test.
            if self.skipped.last().is_none_or(|(name, _)| *name != self.showing) {
                self.said_so += 1;
                self.skipped.push((self.showing.clone(), reason.into()));
            }
        } else if let Some((name, outcome)) = outcome(line) {
            match ignored(outcome) {
                Some(reason) if reason != HELPER => self.skipped.push((name.into(), reason.into())),
                None if outcome == "FAILED" => self.broken.push(name.into()),
                _ => {}
            }
        }
    }
}

/// What a line `test NAME ... OUTCOME` says.
pub fn outcome(line: &str) -> Option<(&str, &str)> {
    let (name, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    Some((name.trim(), outcome.trim()))
}

/// The reason in `ignored, REASON`, or `ignored (REASON)` where a test decided so itself.
fn ignored(outcome: &str) -> Option<&str> {
    let rest = outcome.strip_prefix("ignored")?;
    let reason = rest.strip_prefix(',').unwrap_or(rest).trim();
    let reason = reason.strip_prefix('(').and_then(|r| r.strip_suffix(')')).unwrap_or(reason);
    Some(if reason.is_empty() { "no reason given" } else { reason })
}

/// The number of instructions in callgrind's summary.
pub fn collected(stderr: &str) -> Option<u64> {
    let line = stderr.lines().find(|line| line.contains("Collected :"))?;
    line.rsplit(':').next()?.trim().parse().ok()
}

/// The executable that cargo's messages name, of the target called `name`.
pub fn executable(messages: &str, name: &str) -> Option<String> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_add_up_over_programs() {
        let mut counts = Counts::default();
        counts.line("test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out");
        counts.line("test result: FAILED. 1 passed; 2 failed; 0 ignored; finished in 0.1s");
        counts.line("test a::b ... ok");
        counts.line("test a::c   ... FAILED");
        assert_eq!((counts.passed, counts.failed), (13, 2));
        assert_eq!(counts.broken, ["a::c"]);
    }

    #[test]
    fn a_test_left_out_is_remembered_with_its_reason() {
        let mut counts = Counts::default();
        counts.line("test ublk_read ... ignored, no /dev/ublk-control; see: a, b");
        counts.line("test old ... ignored");
        counts.line("test fuse   ... ignored (no /dev/fuse (really))");
        counts.line("test helper ... ignored, is run by other tests");
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let reason = "no /dev/ublk-control; see: a, b";
        let old = pair("old", "no reason given");
        let fuse = pair("fuse", "no /dev/fuse (really)");
        assert_eq!(counts.skipped, [pair("ublk_read", reason), old, fuse]);
    }

    #[test]
    fn a_test_that_says_that_it_skips_is_not_counted_as_passed() {
        let mut counts = Counts::default();
        counts.line("---- judged_by_sfdisk stdout ----");
        counts.line("skipped: sfdisk is not installed");
        counts.line("skipped: sgdisk is not installed");
        counts.line("test result: ok. 3 passed; 0 failed; 0 ignored");
        assert_eq!((counts.passed, counts.skipped.len()), (2, 1));
        assert_eq!(counts.skipped[0].0, "judged_by_sfdisk");
    }

    #[test]
    fn callgrind_and_cargo_are_understood() {
        assert_eq!(collected("==1== Events    : Ir\n==1== Collected : 12345\n"), Some(12345));
        assert_eq!(collected("Segmentation fault"), None);
        let messages = "not json\n{\"target\":{\"name\":\"e2e\"},\"executable\":null}\n\
                        {\"target\":{\"name\":\"e2e\"},\"executable\":\"/t/e2e-1\"}\n";
        assert_eq!(executable(messages, "e2e").as_deref(), Some("/t/e2e-1"));
        assert_eq!(executable(messages, "other"), None);
    }
}
