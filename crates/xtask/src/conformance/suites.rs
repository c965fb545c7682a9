//! Answers for what differs between suites of tests: where their tests and their server are, how
//! one is run, how it says that it did not run.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::Fallible;

/// Whose tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// The kernel's own, from Debian's package of its source
    #[default]
    Kernel,
    /// The group ublk of blktests, from a checkout (--path)
    Blktests,
}

/// Exit code of a test of the kernel's that was skipped.
const SKIPPED: i32 = 4;

impl Suite {
    /// Its name, as typed.
    pub const fn name(self) -> &'static str {
        match self {
            Suite::Kernel => "kernel",
            Suite::Blktests => "blktests",
        }
    }

    /// The suite of that name.
    pub fn named(name: &str) -> Suite {
        if name == Suite::Blktests.name() { Suite::Blktests } else { Suite::Kernel }
    }

    /// The program that the tests start, from their directory.
    pub const fn server(self) -> &'static str {
        match self {
            Suite::Kernel => "kublk",
            Suite::Blktests => "src/miniublk",
        }
    }

    /// What results are kept as, beside those of other suites.
    pub const fn home(self) -> &'static str {
        match self {
            Suite::Kernel => "devsplice",
            Suite::Blktests => "blktests",
        }
    }

    /// The script of a test.
    pub fn script(self, suite: &Path, name: &str) -> PathBuf {
        match self {
            Suite::Kernel => suite.join(format!("test_{name}.sh")),
            Suite::Blktests => suite.join("tests/ublk").join(name),
        }
    }

    /// The words after `bash` that run one.
    pub fn words(self, suite: &Path, name: &str) -> Vec<OsString> {
        match self {
            Suite::Kernel => vec![self.script(suite, name).into()],
            Suite::Blktests => vec![suite.join("check").into(), format!("ublk/{name}").into()],
        }
    }

    /// Whether one that has said this and ended with that code was not run.
    pub fn was_skipped(self, code: i32, said: &str) -> bool {
        match self {
            Suite::Kernel => code == SKIPPED,
            Suite::Blktests => code == 0 && said.contains("[not run]"),
        }
    }

    /// Whether one that ended well and was not skipped has said that it passed, where it does so:
    /// a `check` that finds no test ends well, too.
    pub fn has_passed(self, said: &str) -> bool {
        match self {
            Suite::Kernel => true,
            Suite::Blktests => said.contains("[passed]"),
        }
    }

    /// All tests, in order.
    pub fn names(self, suite: &Path) -> Fallible<Vec<String>> {
        let directory = match self {
            Suite::Kernel => suite.to_owned(),
            Suite::Blktests => suite.join("tests/ublk"),
        };
        let list = fs::read_dir(&directory)
            .map_err(|e| format!("cannot list {}: {e}", directory.display()))?;
        let mut names: Vec<String> =
            list.flatten().filter_map(|entry| self.test(entry.file_name().to_str()?)).collect();
        names.sort();
        Ok(names)
    }

    /// The test that a file is, if it is one.
    fn test(self, file: &str) -> Option<String> {
        let name = match self {
            Suite::Kernel => file.strip_prefix("test_")?.strip_suffix(".sh")?,
            Suite::Blktests => file,
        };
        let is_one = match self {
            Suite::Kernel => name != "common",
            Suite::Blktests => name.len() == 3 && name.bytes().all(|byte| byte.is_ascii_digit()),
        };
        is_one.then(|| name.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_told_from_what_lies_beside_them() {
        let kernel =
            ["test_loop_01.sh", "test_common.sh", "kublk.c"].map(|f| Suite::Kernel.test(f));
        assert_eq!(kernel, [Some("loop_01".to_owned()), None, None]);
        let others = ["001", "001.out", "rc", "01a"].map(|file| Suite::Blktests.test(file));
        assert_eq!(others, [Some("001".to_owned()), None, None, None]);
    }

    #[test]
    fn each_says_in_its_own_way_that_it_did_not_run() {
        let line = "ublk/001 (test ublk delete)    [not run]";
        assert!(Suite::Kernel.was_skipped(4, "") && !Suite::Kernel.was_skipped(0, line));
        assert!(Suite::Blktests.was_skipped(0, line) && !Suite::Blktests.was_skipped(1, line));
        assert!(Suite::Kernel.has_passed("") && !Suite::Blktests.has_passed(line));
        assert!(Suite::Blktests.has_passed("ublk/001 (test ublk delete)    [passed]"));
        for suite in [Suite::Kernel, Suite::Blktests] {
            assert_eq!(Suite::named(suite.name()), suite);
        }
    }
}
