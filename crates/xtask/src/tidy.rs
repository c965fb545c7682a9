//! The style as a test: rules over the tree that a compiler does not check.

mod crates;
mod rules;
mod scan;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Fallible;
use crate::proc::run_quiet;

pub use rules::HELPER;

/// Lines of ARCHITECTURE.md: it is read in one sitting.
const ARCHITECTURE_LINES: usize = 200;

/// A place where the tree breaks a rule.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The file, below the workspace.
    pub file: String,
    /// The line, counted from 1.
    pub line: usize,
    /// The rule's name.
    pub rule: &'static str,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, rule, what } = self;
        write!(f, "{file}:{line}: {what} ({rule})")
    }
}

/// Checks the tree, prints each finding, and returns how many there are.
pub fn run() -> Fallible<usize> {
    let root = workspace()?;
    let files = source_files(&root)?;
    let mut findings = Vec::new();
    for file in &files {
        let path = root.join(file);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            // Listed by git and removed since.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(format!("cannot read {}: {e}", path.display())),
        };
        findings.extend(rules::check(file, &text));
    }
    findings.extend(check_crates(&root)?);
    findings.extend(check_documents(&root));
    findings.sort();
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} files, {} findings", files.len(), findings.len());
    Ok(findings.len())
}

/// The workspace's root, wherever this was called from.
pub fn workspace() -> Fallible<PathBuf> {
    let mut git = Command::new("git");
    let output = run_quiet(git.args(["rev-parse", "--show-toplevel"]))?;
    Ok(PathBuf::from(String::from_utf8_lossy(&output).trim_end()))
}

/// Rust files that git knows or would add.
fn source_files(root: &Path) -> Fallible<Vec<String>> {
    let mut git = Command::new("git");
    git.arg("-C").arg(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = run_quiet(git.args(["--", "*.rs"]))?;
    let list = String::from_utf8_lossy(&output);
    let mut files: Vec<String> =
        list.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

fn check_crates(root: &Path) -> Fallible<Vec<Finding>> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(root).args(["metadata", "--no-deps", "--format-version", "1"]);
    let metadata = run_quiet(&mut cargo)?;
    let metadata = serde_json::from_slice(&metadata)
        .map_err(|e| format!("cannot read cargo metadata: {e}"))?;
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let dependencies = crates::dependencies(&metadata, read)
        .ok_or("cargo metadata has not the form that is known here")?;
    let document = std::fs::read_to_string(root.join("docs/dependencies.md")).unwrap_or_default();
    Ok(crates::check(&dependencies, &document))
}

/// The documents that a newcomer starts with exist, and the map of the code is short.
fn check_documents(root: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |file: &str, what: String| {
        findings.push(Finding { file: file.into(), line: 1, rule: "documents", what });
    };
    for file in ["README.md", "ARCHITECTURE.md"] {
        match std::fs::read_to_string(root.join(file)) {
            Err(e) => find(file, format!("cannot be read: {e}")),
            Ok(text) if file == "ARCHITECTURE.md" && text.lines().count() > ARCHITECTURE_LINES => {
                find(file, format!("more than {ARCHITECTURE_LINES} lines"));
            }
            Ok(_) => {}
        }
    }
    findings
}
