//! Answers for how tests ended: kept as JSON, shown as a table.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::suites::Suite;
use crate::Fallible;

/// How a test ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// `pass`, `skip`, `fail` or `hang`.
    pub verdict: String,
    /// How long it took.
    pub seconds: f64,
    /// Why it was skipped or failed, if it said.
    pub reason: String,
}

/// Outcomes by test, with what was tested.
#[derive(Clone, Debug, Default)]
pub struct Results(BTreeMap<String, (Outcome, String)>);

impl Results {
    /// What a file holds; nothing if there is none.
    pub fn load(file: &Path) -> Results {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let row = |(name, row): (&String, &Value)| {
            let outcome = Outcome {
                verdict: text(&row["verdict"]),
                seconds: row["seconds"].as_f64().unwrap_or(0.0),
                reason: text(&row["reason"]),
            };
            (name.clone(), (outcome, text(&row["tested"])))
        };
        Results(value.as_object().into_iter().flatten().map(row).collect())
    }

    /// Writes them to a file, whole or not at all.
    pub fn save(&self, file: &Path) -> Fallible<()> {
        let row = |(name, (outcome, tested)): (&String, &(Outcome, String))| {
            let Outcome { verdict, seconds, reason } = outcome;
            let row = json!({
                "verdict": verdict, "seconds": seconds, "reason": reason, "tested": tested,
            });
            (name.clone(), row)
        };
        let value = Value::Object(self.0.iter().map(row).collect());
        let new = file.with_extension("new");
        std::fs::write(&new, format!("{value:#}\n"))
            .and_then(|()| std::fs::rename(&new, file))
            .map_err(|e| format!("cannot write {}: {e}", file.display()))
    }

    /// How a test ended, if it was run.
    pub fn get(&self, name: &str) -> Option<&Outcome> {
        self.0.get(name).map(|(outcome, _)| outcome)
    }

    /// Notes how a test ended.
    pub fn put(&mut self, name: &str, outcome: Outcome) {
        self.0.insert(name.to_owned(), (outcome, String::new()));
    }

    /// Takes over what is in `other`.
    pub fn merge(&mut self, other: &Results) {
        self.0.extend(other.0.clone());
    }

    /// Takes over what is in `other`, as of what was `tested`.
    pub fn merge_from(&mut self, other: &Results, tested: &str) {
        let row = |(name, (outcome, _)): (&String, &(Outcome, String))| {
            (name.clone(), (outcome.clone(), tested.to_owned()))
        };
        self.0.extend(other.0.iter().map(row));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many neither passed nor were skipped.
    pub fn failures(&self) -> usize {
        self.len() - self.count("pass") - self.count("skip")
    }

    fn count(&self, verdict: &str) -> usize {
        self.0.values().filter(|(outcome, _)| outcome.verdict == verdict).count()
    }

    fn summary(&self) -> String {
        let [pass, skip, fail, hang] = ["pass", "skip", "fail", "hang"].map(|v| self.count(v));
        format!("{pass} passed, {skip} skipped, {fail} failed, {hang} hung; {} tests", self.len())
    }

    /// All of them for a terminal.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for (name, (Outcome { verdict, seconds, reason }, _)) in &self.0 {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<14} {verdict:<5} {seconds:>6.0} s  {reason}");
        }
        text + &self.summary()
    }
}

const HEAD: &str = "\
# The kernel's own tests of ublk

Written by `cargo xtask conformance`. The scripts are those of Linux 7.3
(tools/testing/selftests/ublk, from Debian's linux-source-7.3), unmodified; devsplice stands where
their server `kublk` would, under that name. Linux 7.3, two emulated CPUs (QEMU without KVM), files
on ext4. `kublk` beside it is that server itself in the same machine. What is skipped is skipped by
the scripts: a program is missing there, or is too old.

";

const BLKTESTS: &str = "
## blktests

No package of Debian has them. `cargo xtask conformance --suite blktests --path DIR` runs the tests
of blktests' group ublk from a checkout of it, unmodified, with devsplice as their `src/miniublk`.

";

const UBLKSRV: &str = "
## ublksrv

`cargo xtask conformance --suite ublksrv --path DIR` runs the tests of ublksrv from a checkout of
it, unmodified, with devsplice as their `ublk`, each measurement of 3 seconds. Its `run_test.sh`
hides how a test ends, and many end well whatever happened: here each is started by itself, in the
environment that `run_test.sh` makes, with the targets null, loop and nbd, and has failed if it ends
badly, says a word of trouble, or has measured no request. Left out are qcow2, which devsplice does
not have, and loop/003, nbd/001 and nbd/002, which measure the kernel's own drivers.

";

/// What the page says of a suite that has to be brought along.
pub struct Section<'a> {
    /// Whose it is: which heading it has.
    pub suite: Suite,
    /// How its tests ended.
    pub results: &'a Results,
    /// A note on that.
    pub note: &'a str,
}

impl Section<'_> {
    fn write(&self, text: &mut String) {
        let (head, group) = match self.suite {
            Suite::Ublksrv => (UBLKSRV, ""),
            Suite::Kernel | Suite::Blktests => (BLKTESTS, "ublk/"),
        };
        *text += head;
        if !self.note.is_empty() {
            let _ = writeln!(text, "{}\n", self.note);
        }
        let _ = writeln!(text, "devsplice: {}.\n", self.results.summary());
        *text += "| test | devsplice | s | at commit | reason |\n|---|---|---|---|---|\n";
        for (name, (Outcome { verdict, seconds, reason }, tested)) in &self.results.0 {
            let reason = reason.replace('|', "\\|");
            let row = format!("{group}{name} | {verdict} | {seconds:.0} | {tested} | {reason}");
            let _ = writeln!(text, "| {row} |");
        }
    }
}

/// The page about the tests called `names`: how `ours` ended, beside `theirs`; and about other
/// suites.
pub fn page(
    names: &[String],
    (ours, theirs): (&Results, &Results),
    others: &[Section<'_>],
) -> String {
    let mut text = String::from(HEAD);
    let _ = writeln!(text, "devsplice: {}.\n", ours.summary());
    if !theirs.is_empty() {
        let _ = writeln!(text, "kublk: {}.\n", theirs.summary());
    }
    text += "| test | devsplice | s | at commit | kublk | s | reason |\n";
    text += "|---|---|---|---|---|---|---|\n";
    for name in names {
        let Some((Outcome { verdict, seconds, reason }, tested)) = ours.0.get(name) else {
            let _ = writeln!(text, "| {name} | not run yet | | | | | |");
            continue;
        };
        let (other, time) = match theirs.get(name) {
            Some(outcome) => (outcome.verdict.as_str(), format!("{:.0}", outcome.seconds)),
            None => ("", String::new()),
        };
        let reason = reason.replace('|', "\\|");
        let _ = writeln!(
            text,
            "| {name} | {verdict} | {seconds:.0} | {tested} | {other} | {time} | {reason} |"
        );
    }
    for section in others {
        section.write(&mut text);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(verdict: &str, reason: &str) -> Outcome {
        Outcome { verdict: verdict.into(), seconds: 2.5, reason: reason.into() }
    }

    #[test]
    fn what_is_kept_is_what_was_found() {
        let mut results = Results::default();
        results.put("loop_01", outcome("pass", ""));
        results.put("null_01", outcome("fail", "a | b"));
        let mut kept = Results::default();
        kept.merge_from(&results, "abc");
        let file = std::env::temp_dir().join(format!("devsplice-results-{}", std::process::id()));
        kept.save(&file).unwrap();
        let read = Results::load(&file);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(read.0, kept.0);
        assert_eq!((read.len(), read.failures()), (2, 1));
        assert!(Results::load(&file).is_empty());
    }

    #[test]
    fn tables_name_every_test_and_count_what_hangs_as_a_failure() {
        let mut results = Results::default();
        results.put("loop_01", outcome("pass", ""));
        results.put("loop_02", outcome("hang", "over 300 s"));
        results.put("loop_03", outcome("skip", "no fio"));
        results.put("loop_04", outcome("fail", "x|y"));
        assert_eq!(results.failures(), 2);
        let table = results.table();
        assert!(table.contains("1 passed, 1 skipped, 1 failed, 1 hung; 4 tests"), "{table}");
        let names = ["loop_04", "loop_05"].map(str::to_owned);
        let mut kept = Results::default();
        kept.merge_from(&results, "abc");
        let results = kept;
        let of = |suite| Section { suite, results: &results, note: "Of May." };
        let others = [of(Suite::Blktests), of(Suite::Ublksrv)];
        let page = page(&names, (&results, &Results::default()), &others);
        assert!(page.contains("| loop_05 | not run yet |"), "{page}");
        assert!(page.contains("| loop_04 | fail | 2 | abc |  |  | x\\|y |"), "{page}");
        assert!(page.contains("\nOf May.\n"), "{page}");
        assert!(page.contains("| ublk/loop_04 | fail | 2 | abc | x\\|y |"), "{page}");
        assert!(page.contains("## ublksrv\n"), "{page}");
        assert!(page.contains("\n| loop_04 | fail | 2 | abc | x\\|y |\n"), "{page}");
    }
}
