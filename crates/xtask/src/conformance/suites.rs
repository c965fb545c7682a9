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
    /// Those of ublksrv, from a checkout (--path)
    Ublksrv,
}

/// Exit code of a test of the kernel's that was skipped.
const SKIPPED: i32 = 4;
/// Groups of ublksrv's tests whose targets there are.
const GROUPS: &[&str] = &["generic", "loop", "nbd", "null"];
/// Tests of ublksrv that make no ublk device: what the kernel's own drivers do, for comparison.
const WITHOUT_UBLK: &[&str] = &["loop/003", "nbd/001", "nbd/002"];
/// What ublksrv's tests say when something is wrong; most of them end well all the same.
const COMPLAINTS: &[&str] = &[
    "failed",
    "FAIL",
    "isn't",
    "incorrect",
    "unexpectedly",
    "did not succeed",
    "didn't reach",
    "can't",
    "expected",
    "I/O error while",
    "I/O error after",
    "not in IO_FLUSHER",
    "wedged",
    "outlived",
    "still ",
    "blocked while",
    "refcount",
    "no daemon",
    "not a thread",
    "ublkb-unknown",
    "not found",
    "please install",
];
/// What they expect aloud, before it comes.
const EXPECTATIONS: &[&str] =
    &["expect no error", "expect I/O error", "expect I/O queued", "forgiving expected"];

impl Suite {
    /// Its name, as typed.
    pub const fn name(self) -> &'static str {
        match self {
            Suite::Kernel => "kernel",
            Suite::Blktests => "blktests",
            Suite::Ublksrv => "ublksrv",
        }
    }

    /// The suite of that name.
    pub fn named(name: &str) -> Suite {
        let others = [Suite::Blktests, Suite::Ublksrv];
        others.into_iter().find(|suite| suite.name() == name).unwrap_or_default()
    }

    /// The program that the tests start, from their directory.
    pub const fn server(self) -> &'static str {
        match self {
            Suite::Kernel => "kublk",
            Suite::Blktests => "src/miniublk",
            Suite::Ublksrv => "ublk",
        }
    }

    /// What results are kept as, beside those of other suites.
    pub const fn home(self) -> &'static str {
        match self {
            Suite::Kernel => "devsplice",
            Suite::Blktests => "blktests",
            Suite::Ublksrv => "ublksrv",
        }
    }

    /// The script of a test.
    pub fn script(self, suite: &Path, name: &str) -> PathBuf {
        match self {
            Suite::Kernel => suite.join(format!("test_{name}.sh")),
            Suite::Blktests => suite.join("tests/ublk").join(name),
            Suite::Ublksrv => suite.join("tests").join(name),
        }
    }

    /// Where they are run.
    pub fn place(self, suite: &Path) -> PathBuf {
        match self {
            Suite::Kernel | Suite::Blktests => suite.to_owned(),
            Suite::Ublksrv => suite.join("tests"),
        }
    }

    /// What they find in their environment, with `files` as the place for theirs: for ublksrv's,
    /// what its run_test.sh puts there, which does not tell how a test ended.
    pub fn environment(self, suite: &Path, files: &Path) -> Vec<(&'static str, OsString)> {
        match self {
            Suite::Kernel => return Vec::new(),
            // A file system with direct I/O.
            Suite::Blktests => return vec![("OUTPUT", files.join("results").into())],
            Suite::Ublksrv => {}
        }
        vec![
            ("UBLK", suite.join(self.server()).into()),
            ("TEST_DIR", self.place(suite).into()),
            ("UBLK_TMP", files.join("ublk_tmp").into()),
            ("UBLK_TMP_DIR", files.into()),
            ("ALL_TGTS", "null loop nbd".into()),
            ("TRUNTIME", "3".into()),
            ("T_TYPE_PARAMS", "".into()),
        ]
    }

    /// The words after `bash` that run one.
    pub fn words(self, suite: &Path, name: &str) -> Vec<OsString> {
        match self {
            Suite::Kernel | Suite::Ublksrv => vec![self.script(suite, name).into()],
            Suite::Blktests => vec![suite.join("check").into(), format!("ublk/{name}").into()],
        }
    }

    /// Whether one that has said this and ended with that code was not run.
    pub fn was_skipped(self, code: i32, said: &str) -> bool {
        match self {
            Suite::Kernel => code == SKIPPED,
            Suite::Blktests => code == 0 && said.contains("[not run]"),
            Suite::Ublksrv => {
                code == 0 && ["SKIP", ", skipping\n"].iter().any(|w| said.contains(w))
            }
        }
    }

    /// Whether one that ended well and was not skipped has said that it passed, where it does so:
    /// a `check` that finds no test ends well, too. And what it has complained of.
    pub fn verdict(self, said: &str) -> Result<(), String> {
        match self {
            Suite::Blktests if !said.contains("[passed]") => Err(String::new()),
            Suite::Kernel | Suite::Blktests => Ok(()),
            Suite::Ublksrv => complaint(said).map_or(Ok(()), |line| Err(line.trim().to_owned())),
        }
    }

    /// All tests, in order.
    pub fn names(self, suite: &Path) -> Fallible<Vec<String>> {
        let mut names = match self {
            Suite::Kernel => self.list(suite)?,
            Suite::Blktests => self.list(&suite.join("tests/ublk"))?,
            Suite::Ublksrv => {
                let directories =
                    GROUPS.iter().map(|group| (group, suite.join("tests").join(group)));
                let mut all = Vec::new();
                for (group, directory) in directories.filter(|(_, directory)| directory.exists()) {
                    let names = self.list(&directory)?;
                    all.extend(names.into_iter().map(|name| format!("{group}/{name}")));
                }
                all.retain(|name| !WITHOUT_UBLK.contains(&name.as_str()));
                all
            }
        };
        names.sort();
        Ok(names)
    }

    /// The tests in a directory.
    fn list(self, directory: &Path) -> Fallible<Vec<String>> {
        let list = fs::read_dir(directory)
            .map_err(|e| format!("cannot list {}: {e}", directory.display()))?;
        Ok(list.flatten().filter_map(|entry| self.test(entry.file_name().to_str()?)).collect())
    }

    /// The test that a file is, if it is one.
    fn test(self, file: &str) -> Option<String> {
        let name = match self {
            Suite::Kernel => file.strip_prefix("test_")?.strip_suffix(".sh")?,
            Suite::Blktests | Suite::Ublksrv => file,
        };
        let is_one = match self {
            Suite::Kernel => name != "common",
            Suite::Blktests | Suite::Ublksrv => {
                name.len() == 3 && name.bytes().all(|byte| byte.is_ascii_digit())
            }
        };
        is_one.then(|| name.to_owned())
    }
}

/// The first line in which a test of ublksrv says that something is wrong, or measures nothing.
fn complaint(said: &str) -> Option<&str> {
    let lines: Vec<&str> = said.lines().collect();
    let is_forgiven = |at: usize| lines.get(at + 1).is_some_and(|next| next.contains("forgiving"));
    let is_wrong = |line: &str| {
        let is_expectation = EXPECTATIONS.iter().any(|words| line.contains(words));
        let is_complaint = !is_expectation && COMPLAINTS.iter().any(|word| line.contains(word));
        is_complaint || measures_nothing(line)
    };
    lines.iter().enumerate().find(|(at, line)| is_wrong(line) && !is_forgiven(*at)).map(|(_, l)| *l)
}

/// Whether it is a line of figures of which one is missing, or is 0.
fn measures_nothing(line: &str) -> bool {
    let Some((_, figures)) = line.split_once(", iops ") else { return false };
    let figures = figures.split_once(", cpu_util").map_or(figures, |(figures, _)| figures);
    let words = figures.split(' ').filter(|word| !["read", "write"].contains(word));
    let mut values = words.map(str::parse::<u64>);
    values.any(|value| !matches!(value, Ok(1..)))
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
        assert_eq!(Suite::Ublksrv.test("001~"), None);
    }

    #[test]
    fn each_says_in_its_own_way_that_it_did_not_run() {
        let line = "ublk/001 (test ublk delete)    [not run]";
        assert!(Suite::Kernel.was_skipped(4, "") && !Suite::Kernel.was_skipped(0, line));
        assert!(Suite::Blktests.was_skipped(0, line) && !Suite::Blktests.was_skipped(1, line));
        assert!(Suite::Kernel.verdict("").is_ok() && Suite::Blktests.verdict(line).is_err());
        assert!(Suite::Blktests.verdict("ublk/001 (test ublk delete)    [passed]").is_ok());
        let line = "\tkernel has no BATCH_IO, skipping\n";
        assert!(Suite::Ublksrv.was_skipped(0, line) && !Suite::Ublksrv.was_skipped(1, line));
        for suite in [Suite::Kernel, Suite::Blktests, Suite::Ublksrv] {
            assert_eq!(Suite::named(suite.name()), suite);
        }
    }

    #[test]
    fn ublksrvs_tests_end_well_and_say_what_is_wrong() {
        for good in [
            "\trun fio on /dev/ublkb0(ublk add -t null -q 1) with deleting dev 1\n",
            "\t\tcheck behavior during nosrv - expect I/O error\n",
            "\t\tfailed to recover device!\n\t\tforgiving expected recovery failure\n",
            "\trandwrite(4k): jobs 1, iops 4312, cpu_util(3% 20%)\n",
            "\trw(64k): jobs 1, iops read 12 write 13, cpu_util(3% 20%)\n",
        ] {
            assert_eq!(Suite::Ublksrv.verdict(good), Ok(()), "{good}");
        }
        for bad in [
            "\tdelete /dev/ublkb0 failed(1)",
            "device isn't recovered(QUIESCED)",
            "\t\tfailed to recover device!\n",
            "\tqueue 0 reports 8 io thread(s), expected 4",
            "\tublk add -t null -z, fio: (/dev/ublkb-unknown libaio dio io jobs(1))...",
            "\trandwrite(4k): jobs 1, iops , cpu_util(% %)",
            "\trandwrite(4k): jobs 1, iops 0, cpu_util(0% 0%)",
            "\trw(64k): jobs 1, iops read 12 write 0, cpu_util(3% 20%)",
            "/dev/ublkb0: line 3: mkfs.overlay: command not found",
        ] {
            assert!(Suite::Ublksrv.verdict(bad).is_err(), "{bad}");
        }
    }
}
