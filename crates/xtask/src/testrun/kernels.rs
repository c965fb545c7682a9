//! Answers for docs/kernels.md: what each kernel of a full test run offers, and what is taken.

use std::path::Path;

use serde_json::Value;

use crate::Fallible;

/// Where the table is.
const PAGE: &str = "docs/kernels.md";
/// What a line of the machine's output begins with that is for the table.
const FEATURES: &str = "@features ";
const PICKS: &str = "@picks ";

const HEAD: &str = "# Kernels

Written by `cargo xtask test --full`, which runs the end-to-end tests in a virtual machine with \
each of these Debian kernels. Every data path that a kernel has is
forced in turn and tested, and so is FUSE + loop; `--export auto` takes the best. What a kernel \
lacks makes tests skip, with the reason in the output.

| Linux | release | `--export auto` takes | data paths of its ublk |
|---|---|---|---|
";

/// What a machine said of itself.
#[derive(Debug, Default)]
pub struct Kernel {
    features: Value,
    picks: Value,
}

impl Kernel {
    /// Commands for the machine's shell that print what [`Kernel::line`] understands.
    pub fn questions(command: &str) -> String {
        let ask = |mark: &str, words: &str| {
            format!("echo \"{mark}$({command} {words} --json | tr -d '\\n')\"; ")
        };
        ask(FEATURES, "features") + &ask(PICKS, "explain mem:1M")
    }

    /// Takes a line of the machine's output into account.
    pub fn line(&mut self, line: &str) {
        for (mark, value) in [(FEATURES, &mut self.features), (PICKS, &mut self.picks)] {
            if let Some(text) = line.strip_prefix(mark) {
                *value = serde_json::from_str(text).unwrap_or_default();
            }
        }
    }

    /// Its row of the table.
    fn row(&self, series: &str) -> String {
        let paths = self.features["ublk"]["data_paths"].as_array();
        let paths: Vec<_> = paths.into_iter().flatten().filter_map(Value::as_str).collect();
        let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        format!(
            "| {series} | {} | {}, `{}` | {} |\n",
            word(&self.features["kernel"]),
            word(&self.picks["export"]),
            word(&self.picks["data_path"]),
            if paths.is_empty() { "no ublk".to_owned() } else { paths.join(", ") }
        )
    }
}

/// Writes the table, newest kernel first. Only for runs in which nothing failed.
///
/// # Errors
/// If a machine has not answered, or the page cannot be written.
pub fn write(all: &[(&str, Kernel)]) -> Fallible<()> {
    if let Some((series, _)) = all.iter().find(|(_, kernel)| kernel.picks.is_null()) {
        return Err(format!("{PAGE} is left as it was: Linux {series} has not said what it has"));
    }
    std::fs::write(Path::new(PAGE), page(all)).map_err(|e| format!("cannot write {PAGE}: {e}"))
}

fn page(all: &[(&str, Kernel)]) -> String {
    let mut page = HEAD.to_owned();
    for (series, kernel) in all {
        page += &kernel.row(series);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_the_machine_said() {
        let mut kernel = Kernel::default();
        kernel.line("test a ... ok");
        kernel.line("@features {\"kernel\":\"6.12.9\",\"ublk\":{\"data_paths\":[\"a\",\"b\"]}}");
        kernel.line("@picks {\"export\":\"ublk\",\"data_path\":\"a\"}");
        assert_eq!(kernel.row("6.12"), "| 6.12 | 6.12.9 | ublk, `a` | a, b |\n");
        assert!(
            page(&[("6.12", kernel)]).ends_with("|---|\n| 6.12 | 6.12.9 | ublk, `a` | a, b |\n")
        );
        assert!(write(&[("6.1", Kernel::default())]).is_err(), "a machine that said nothing");
        assert!(Kernel::questions("/d").contains("$(/d features --json"));
    }
}
