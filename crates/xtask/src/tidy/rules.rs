//! The rules for one source file: its size, its alphabet, its words.

use super::Finding;
use super::scan::{Source, find_word};

/// Lines of a file, without its tests.
const FILE_LINES: usize = 600;
/// Lines of a function.
const FUNCTION_LINES: usize = 70;
/// Columns of a line.
const COLUMNS: usize = 100;
/// Lines of a mapping layer's file, with its tests, and of the two that set the example.
const LAYER_LINES: usize = 150;
const LAYER_BARS: &[(&str, usize)] = &[("null.rs", 30), ("linear.rs", 60)];

/// Calls that have no place outside tests, and what to do instead.
const BANNED: &[(&str, &str)] = &[
    (".unwrap()", "handle the error, or `expect` with the invariant in words"),
    ("todo!(", "finish it"),
    ("unimplemented!(", "finish it"),
    ("dbg!(", "remove it"),
];

/// The reason that `#[ignore]` may give: it is no test but a process that a test starts.
pub const HELPER: &str = "is run by other tests";

/// Where data paths may be named, and why there: everywhere else no driver knows a copy mode.
const COPY_MODES: &[(&str, &str)] = &[
    ("crates/uring/src/splice", "the one module that turns pieces into operations"),
    ("crates/uring/src/uapi", "the kernel's own names"),
    ("crates/uring/src/probe", "asks the kernel which of them it has"),
    ("crates/exports/", "negotiates with the kernel which one a device gets"),
    ("crates/cli/", "shows and selects it"),
    ("crates/e2e/", "proves it"),
    ("crates/xtask/", "names them here"),
];

/// What a mapping layer has no business with.
const NOT_IN_LAYERS: &[&str] = &["io_uring", "ublk", "buffer", "async"];
/// What the live side of a layer is made of. It has files of its own in the layer's directory, so
/// that what maps (a single file, or `mod.rs`) stays free of it.
const LIVE_ONLY: &str = "async";

/// Crates that hold no unsafe code, by the file that says so.
const FORBID_UNSAFE: &[&str] = &[
    "core", "engine", "layers", "spec", "backends", "sim", "contract", "cli", "xtask", "nbd", "tls",
];

/// Applies every rule to the file at `path`.
pub fn check(path: &str, text: &str) -> Vec<Finding> {
    let mut source = Source::new(text);
    let whole = is_test_file(path);
    if whole {
        source.in_tests.fill(true);
    }
    let mut check = Check { path, source: &source, findings: Vec::new() };
    check.header();
    check.alphabet();
    check.sizes(whole);
    check.banned();
    check.unsafe_code(text);
    check.copy_modes(whole);
    check.layers();
    check.findings
}

/// Whether the whole file is a test: an integration test, or a module of tests.
fn is_test_file(path: &str) -> bool {
    let module = ["/tests.rs", "/testing.rs"].iter().any(|name| path.ends_with(name));
    let directory = ["/tests/", "/benches/"].iter().any(|name| path.contains(name));
    module || directory || path.starts_with("crates/e2e/")
}

struct Check<'a> {
    path: &'a str,
    source: &'a Source,
    findings: Vec<Finding>,
}

impl Check<'_> {
    /// Notes a finding in line `index`, counted from 0.
    fn find(&mut self, index: usize, rule: &'static str, what: String) {
        self.findings.push(Finding { file: self.path.into(), line: index + 1, rule, what });
    }

    fn header(&mut self) {
        let first = self.source.lines.first().map_or("", String::as_str);
        if !first.starts_with("//! ") {
            self.find(
                0,
                "header",
                "the first line says what the file answers for, in `//!`".into(),
            );
        }
    }

    fn alphabet(&mut self) {
        for (index, line) in self.source.lines.iter().enumerate() {
            if let Some(c) = line.chars().find(|c| !c.is_ascii()) {
                self.find(
                    index,
                    "ascii",
                    format!("{:?} is not ASCII", c.escape_unicode().to_string()),
                );
            }
            let columns = line.chars().count();
            if columns > COLUMNS {
                self.find(index, "columns", format!("{columns} columns, at most {COLUMNS}"));
            }
        }
    }

    fn sizes(&mut self, whole_is_test: bool) {
        let lines = self.source.in_tests.iter().filter(|test| !**test).count();
        if lines > FILE_LINES && !whole_is_test {
            self.find(0, "file", format!("{lines} lines without tests, at most {FILE_LINES}"));
        }
        for function in self.source.functions() {
            let lines = function.lines.len();
            if lines > FUNCTION_LINES && !self.source.in_tests[function.lines.start] {
                let what =
                    format!("`{}` has {lines} lines, at most {FUNCTION_LINES}", function.name);
                self.find(function.lines.start, "function", what);
            }
        }
    }

    fn banned(&mut self) {
        for index in 0..self.source.code.len() {
            let (code, words) = (&self.source.code[index], &self.source.words[index]);
            let mut found = Vec::new();
            let line = &self.source.lines[index];
            if code.trim_start().starts_with("#[ignore") && !line.contains(HELPER) {
                found.push("#[ignore]: a test that cannot run skips itself and says why".into());
            }
            if !self.source.in_tests[index] {
                for (call, instead) in BANNED.iter().filter(|(call, _)| code.contains(call)) {
                    found.push(format!("{call}: {instead}"));
                }
                let marks = ["FIXME", "TODO", "XXX"].into_iter();
                for mark in marks.filter(|mark| find_word(words, mark).is_some()) {
                    found.push(format!("{mark}: do it, or describe it as a limit"));
                }
            }
            for what in found {
                self.find(index, "banned", what);
            }
        }
    }

    fn unsafe_code(&mut self, text: &str) {
        let is_map = self.path.starts_with("crates/exports/") && self.path.ends_with("/map.rs");
        // Callbacks of a library in C (docs/decisions/036.md).
        let is_wire = self.path == "crates/psk/src/wire.rs";
        if !self.path.starts_with("crates/uring/") && !is_map && !is_wire {
            for index in 0..self.source.code.len() {
                if find_word(&self.source.code[index], "unsafe").is_some() {
                    let homes = "only crates/uring, exports' map.rs and psk/src/wire.rs may";
                    self.find(index, "unsafe", homes.into());
                }
            }
        }
        let is_root = |name: &&&str| {
            ["lib", "main"].iter().any(|file| self.path == format!("crates/{name}/src/{file}.rs"))
        };
        if FORBID_UNSAFE.iter().find(is_root).is_some() && !text.contains("#![forbid(unsafe_code)]")
        {
            self.find(0, "unsafe", "`#![forbid(unsafe_code)]` is missing".into());
        }
    }

    fn copy_modes(&mut self, whole_is_test: bool) {
        let allowed = COPY_MODES.iter().any(|(place, _)| self.path.starts_with(place));
        if allowed || whole_is_test {
            return;
        }
        for index in 0..self.source.lines.len() {
            if let Some(name) = copy_mode(&self.source.lines[index], &self.source.code[index]) {
                let what =
                    format!("`{name}` names a data path, which is known only in uring/splice");
                self.find(index, "copy mode", what);
            }
        }
    }

    fn layers(&mut self) {
        let Some(file) = self.path.strip_prefix("crates/layers/src/") else { return };
        let lines = self.source.lines.len();
        let own = LAYER_BARS.iter().find(|(name, _)| *name == file).map(|(_, bar)| *bar);
        let bar = own.unwrap_or(LAYER_LINES);
        if !file.contains('/') && !file.starts_with("partition") && lines > bar {
            self.find(0, "layer size", format!("{lines} lines with tests, at most {bar}"));
        }
        let is_live_side = file.contains('/') && !file.ends_with("/mod.rs");
        for index in 0..lines {
            let line = self.source.lines[index].to_ascii_lowercase();
            for word in NOT_IN_LAYERS.iter().filter(|word| find_word(&line, word).is_some()) {
                if is_live_side && *word == LIVE_ONLY {
                    continue;
                }
                self.find(index, "layer words", format!("a layer knows no `{word}`"));
            }
        }
    }
}

/// The data path that a line names. `fixed` is an English word too: it counts in code only, where
/// it is a word of its own or in capitals, as in `OP_READ_FIXED`.
fn copy_mode(line: &str, code: &str) -> Option<&'static str> {
    let line = line.to_ascii_lowercase();
    let spellings = [
        ("zero_copy", &["zero_copy", "zerocopy"][..]),
        ("auto_buf_reg", &["auto_buf_reg", "autobufreg"]),
        ("user_copy", &["user_copy", "usercopy"]),
    ];
    for (name, forms) in spellings {
        // `zerocopy` is also a crate, of plain views on bytes: `use zerocopy::...` is no data path.
        let is_crate = name == "zero_copy" && !line.contains("zero_copy");
        let hit = forms.iter().any(|form| line.contains(form));
        if hit && !(is_crate && (line.contains("zerocopy::") || line.contains("`zerocopy`"))) {
            return Some(name);
        }
    }
    // Registered descriptors are no data path.
    let code = &code.replace("FIXED_FILE", "");
    if code.contains("FIXED") || find_word(&code.to_ascii_lowercase(), "fixed").is_some() {
        return Some("fixed");
    }
    let ends_in_zc = |word: &str| word.to_ascii_lowercase().split('_').skip(1).any(|p| p == "zc");
    code.split(|c: char| !c.is_alphanumeric() && c != '_').any(ends_in_zc).then_some("_zc")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules that a file with a proper header and this text breaks.
    fn rules(path: &str, text: &str) -> Vec<&'static str> {
        let text = format!("//! Says something.\n{text}");
        check(path, &text).into_iter().map(|finding| finding.rule).collect()
    }

    const ENGINE: &str = "crates/engine/src/queue.rs";

    #[test]
    fn a_clean_file_has_no_findings() {
        assert_eq!(rules(ENGINE, "fn f() { g(\"todo!()\"); }\n"), [""; 0]);
    }

    #[test]
    fn a_file_without_a_header_is_found() {
        assert_eq!(check(ENGINE, "fn f() {}\n")[0].rule, "header");
    }

    #[test]
    fn long_lines_long_functions_long_files_and_foreign_letters_are_found() {
        assert_eq!(rules(ENGINE, &format!("// {}", "x".repeat(98))), ["columns"]);
        assert_eq!(rules(ENGINE, "// caf\u{e9}"), ["ascii"]);
        let long = format!("fn f() {{\n{}}}\n", "    g();\n".repeat(69));
        assert_eq!(rules(ENGINE, &long), ["function"]);
        assert_eq!(rules("crates/engine/tests/a.rs", &long), [""; 0]);
        assert_eq!(rules(ENGINE, &"\n".repeat(600)), ["file"]);
        assert_eq!(rules("crates/e2e/src/lib.rs", &"\n".repeat(600)), [""; 0]);
    }

    #[test]
    fn unfinished_and_unhandled_things_are_found_outside_tests_only() {
        let bad = ["f().unwrap();", "todo!()", "unimplemented!()", "dbg!(x)", "// TODO: x"];
        for line in bad {
            assert_eq!(rules(ENGINE, line), ["banned"], "{line}");
            let test = format!("#[cfg(test)]\nmod tests {{\n{line}\n}}\n");
            assert_eq!(rules(ENGINE, &test), [""; 0], "{line}");
        }
        assert_eq!(rules("crates/core/tests/a.rs", "#[ignore]"), ["banned"]);
        let helper = format!("#[ignore = \"{HELPER}\"]");
        assert_eq!(rules("crates/core/tests/a.rs", &helper), [""; 0]);
    }

    #[test]
    fn unsafe_is_found_outside_its_homes() {
        assert_eq!(rules(ENGINE, "unsafe { f() }"), ["unsafe"]);
        assert_eq!(rules("crates/uring/src/ring.rs", "unsafe { f() }"), [""; 0]);
        assert_eq!(rules("crates/exports/src/ublk/map.rs", "unsafe { f() }"), [""; 0]);
        assert_eq!(rules("crates/psk/src/wire.rs", "unsafe { f() }"), [""; 0]);
        assert_eq!(rules("crates/psk/src/connection.rs", "unsafe { f() }"), ["unsafe"]);
        assert_eq!(rules("crates/core/src/lib.rs", ""), ["unsafe"]);
        assert_eq!(rules("crates/core/src/lib.rs", "#![forbid(unsafe_code)]"), [""; 0]);
    }

    #[test]
    fn data_paths_are_named_in_their_module_only() {
        for line in [
            "// zero_copy",
            "let x = ZeroCopy;",
            "OP_READ_FIXED",
            "let fixed = 1;",
            "// AUTO_BUF_REG",
            "SEND_ZC",
            "user_copy()",
        ] {
            assert_eq!(rules(ENGINE, line), ["copy mode"], "{line}");
            assert_eq!(rules("crates/uring/src/splice.rs", line), [""; 0], "{line}");
        }
        for line in [
            "// a table of fixed size",
            "use zerocopy::FromBytes;",
            "let prefixed = 1;",
            "SQE_FIXED_FILE",
        ] {
            assert_eq!(rules(ENGINE, line), [""; 0], "{line}");
        }
    }

    #[test]
    fn a_layer_is_small_and_knows_no_kernel() {
        let layer = "crates/layers/src/stripe.rs";
        assert_eq!(rules(layer, "// the Buffer of ublk"), ["layer words"; 2]);
        assert_eq!(rules(layer, "// buffered"), [""; 0]);
        assert_eq!(rules(layer, &"\n".repeat(150)), ["layer size"]);
        assert_eq!(rules("crates/layers/src/null.rs", &"\n".repeat(30)), ["layer size"]);
        assert_eq!(rules("crates/layers/src/partition/gpt.rs", &"\n".repeat(200)), [""; 0]);
    }

    #[test]
    fn only_the_live_side_of_a_layer_waits() {
        for file in ["stripe.rs", "mirror/mod.rs"] {
            let path = format!("crates/layers/src/{file}");
            assert_eq!(rules(&path, "let x = async {};"), ["layer words"], "{file}");
        }
        let live = "crates/layers/src/mirror/live.rs";
        assert_eq!(rules(live, "let x = async {};"), [""; 0]);
        assert_eq!(rules(live, "// a buffer"), ["layer words"]);
    }
}
