//! Answers for suites as tests of a harness that can skip and say why.
#![allow(dead_code)]

use std::process::ExitCode;

use devsplice_contract::{Outcome, Suite, Verdict};
use libtest_mimic::{Arguments, Completion, Trial};

/// Tests by their names.
#[derive(Default)]
pub struct Trials(Vec<Trial>);

impl Trials {
    /// Adds a test.
    pub fn test(&mut self, name: &str, body: impl FnOnce() -> Outcome + Send + 'static) {
        self.0.push(Trial::ignorable_test(name, move || match body() {
            Ok(Verdict::Kept | Verdict::NotMade(_)) => Ok(Completion::Completed),
            Ok(Verdict::Skipped(reason)) => Ok(Completion::ignored_with(reason)),
            Err(how) => Err(how.into()),
        }));
    }

    /// Adds each case of a suite.
    pub fn suite(&mut self, group: &str, suite: Suite) {
        for case in suite.cases {
            self.test(&format!("{group}::{}", case.name), move || case.run());
        }
    }

    pub fn run(self) -> ExitCode {
        libtest_mimic::run(&Arguments::from_args(), self.0).exit_code()
    }
}

/// Kept, if the suite finds the bug by the case `by`.
pub fn caught(suite: Suite, by: &str) -> Outcome {
    let report = suite.run();
    if report.broken().contains(&by) {
        return Ok(Verdict::Kept);
    }
    Err(format!("{by} did not find it:\n{report}"))
}
