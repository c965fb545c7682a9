//! Answers for the shape of a suite: named cases, what became of each, and a report that says it.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// What became of a promise that could be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was kept.
    Kept,
    /// It is not made here, and why: there is nothing to look at.
    NotMade(String),
    /// It could not be looked at here, and why.
    Skipped(String),
}

/// What became of a promise; an error says what was asked, what came, and where.
pub type Outcome = Result<Verdict, String>;

type Body = Box<dyn FnOnce() -> Outcome + Send>;

/// One promise, and the test of it.
pub struct Case {
    /// A sentence: subject, then promise.
    pub name: String,
    body: Body,
}

impl Case {
    /// A case from a name and what tests it. A panic is a broken promise too.
    pub fn new(name: impl Into<String>, body: impl FnOnce() -> Outcome + Send + 'static) -> Case {
        Case { name: name.into(), body: Box::new(body) }
    }

    /// Tests the promise.
    ///
    /// # Errors
    /// If it is broken: how.
    pub fn run(self) -> Outcome {
        let Case { body, .. } = self;
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(text.unwrap_or_else(|| "a panic without a message".into()))
        })
    }
}

/// Cases that belong together.
#[derive(Default)]
pub struct Suite {
    /// In the order in which they are run.
    pub cases: Vec<Case>,
}

/// What became of a suite.
#[derive(Debug, Default)]
pub struct Report {
    /// Each case's name and outcome.
    pub lines: Vec<(String, Outcome)>,
}

impl Suite {
    /// The cases of both.
    #[must_use]
    pub fn and(mut self, other: Suite) -> Suite {
        self.cases.extend(other.cases);
        self
    }

    /// Runs every case, one after another, whatever becomes of those before.
    #[must_use]
    pub fn run(self) -> Report {
        let line = |case: Case| (case.name.clone(), case.run());
        Report { lines: self.cases.into_iter().map(line).collect() }
    }

    /// Runs every case; for use as the body of a `#[test]`.
    ///
    /// # Panics
    /// If a promise was broken; the message is the report.
    pub fn assert(self) {
        let report = self.run();
        assert!(report.is_kept(), "{report}");
        println!("{report}");
    }
}

impl Report {
    /// Whether no promise was broken.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.lines.iter().all(|(_, outcome)| outcome.is_ok())
    }

    /// The names of the broken promises.
    #[must_use]
    pub fn broken(&self) -> Vec<&str> {
        let broken = self.lines.iter().filter(|(_, outcome)| outcome.is_err());
        broken.map(|(name, _)| name.as_str()).collect()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut counts = [0; 4];
        for (name, outcome) in &self.lines {
            match outcome {
                Ok(Verdict::Kept) => writeln!(f, "kept    {name}")?,
                Ok(Verdict::NotMade(reason)) => writeln!(f, "none    {name}: {reason}")?,
                Ok(Verdict::Skipped(reason)) => writeln!(f, "skipped {name}: {reason}")?,
                Err(how) => writeln!(f, "BROKEN  {name}\n        {how}")?,
            }
            counts[match outcome {
                Ok(Verdict::Kept) => 0,
                Ok(Verdict::NotMade(_)) => 1,
                Ok(Verdict::Skipped(_)) => 2,
                Err(_) => 3,
            }] += 1;
        }
        let [kept, none, skipped, broken] = counts;
        write!(f, "{kept} kept, {none} not made, {skipped} skipped, {broken} broken")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_each_case_and_a_panic_is_a_broken_promise() {
        let kept = Case::new("a", || Ok(Verdict::Kept));
        let skipped = Case::new("b", || Ok(Verdict::Skipped("no root".into())));
        let broken = Case::new("c", || panic!("asked {}, came {}", 1, 2));
        let report = Suite { cases: vec![kept, skipped, broken] }.run();
        let text = report.to_string();
        assert_eq!(report.broken(), ["c"]);
        assert!(!report.is_kept());
        assert!(text.contains("kept    a\nskipped b: no root\nBROKEN  c\n        asked 1, came 2"));
        assert!(text.ends_with("1 kept, 0 not made, 1 skipped, 1 broken"));
    }

    #[test]
    fn a_broken_promise_fails_the_test_that_asserts() {
        let suite = Suite { cases: vec![Case::new("a", || Err("how".into()))] };
        assert!(catch_unwind(AssertUnwindSafe(|| suite.assert())).is_err());
    }
}
