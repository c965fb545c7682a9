//! The rules between crates: arrows point downward, and each outside dependency is accounted for.

use serde_json::Value;

use super::Finding;

/// What each crate may depend on among the workspace's crates.
const ARROWS: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("engine", &["core"]),
    ("layers", &["core"]),
    ("spec", &["core", "layers"]),
    ("uring", &["core", "engine", "nbd"]),
    ("nbd", &["core"]),
    ("backends", &["core", "engine", "uring", "nbd", "tls"]),
    ("tls", &["core", "uring", "psk"]),
    ("psk", &[]),
    ("exports", &["core", "engine", "uring", "nbd", "tls"]),
    ("sim", &["core", "engine", "layers", "nbd"]),
    ("contract", &["core", "engine", "uring"]),
];
/// Crates above all arrows.
const TOP: &[&str] = &["cli", "e2e", "xtask"];
/// Outside crates that a layer may use besides its tests: checksums of on-disk formats.
const LAYER_OUTSIDE: &[&str] = &["crc", "crc32fast", "crc32c"];
const PREFIX: &str = "devsplice-";

/// One dependency, as a manifest states it.
#[derive(Clone, Debug)]
pub struct Dependency {
    /// The crate that has it: the name of its directory.
    pub from: String,
    /// The crate depended on.
    pub to: String,
    /// Whether it is for tests only.
    pub dev: bool,
    /// Whether it is in this workspace.
    pub own: bool,
    /// The manifest, below the workspace.
    pub file: String,
    /// The line of the manifest.
    pub line: usize,
}

/// Applies the rules; `document` is docs/dependencies.md.
pub fn check(dependencies: &[Dependency], document: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for dependency in dependencies {
        let Dependency { from, to, dev, own, file, line } = dependency;
        let mut find = |rule, what| {
            findings.push(Finding { file: file.clone(), line: *line, rule, what });
        };
        if *own && !*dev && !arrow_allowed(from, to) {
            find("arrows", format!("`{from}` may not depend on `{to}`"));
        }
        if !*own && !*dev && from == "layers" && !LAYER_OUTSIDE.contains(&to.as_str()) {
            find("arrows", format!("`layers` depends on core and a checksum only, not on `{to}`"));
        }
        if !*own && !document.contains(&format!("`{to}`")) {
            find("dependencies", format!("`{to}` has no sentence in docs/dependencies.md"));
        }
    }
    findings
}

fn arrow_allowed(from: &str, to: &str) -> bool {
    let to = to.strip_prefix(PREFIX).unwrap_or(to);
    TOP.contains(&from) || ARROWS.iter().any(|(name, below)| *name == from && below.contains(&to))
}

/// Reads the workspace's dependencies from `cargo metadata --no-deps`; `manifest` gives a
/// manifest's text.
pub fn dependencies(
    metadata: &Value,
    manifest: impl Fn(&str) -> String,
) -> Option<Vec<Dependency>> {
    let root = metadata["workspace_root"].as_str()?;
    let mut found = Vec::new();
    for package in metadata["packages"].as_array()? {
        let path = package["manifest_path"].as_str()?;
        let file = path.strip_prefix(root)?.trim_start_matches('/');
        let from = file.strip_suffix("/Cargo.toml")?.rsplit('/').next()?;
        let text = manifest(path);
        for dependency in package["dependencies"].as_array()? {
            let to = dependency["name"].as_str()?;
            found.push(Dependency {
                from: from.into(),
                to: to.into(),
                dev: dependency["kind"].as_str() == Some("dev"),
                own: dependency["path"].is_string(),
                file: file.into(),
                line: text.lines().position(|line| line.starts_with(to)).map_or(1, |at| at + 1),
            });
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(from: &str, to: &str, dev: bool, document: &str) -> Vec<&'static str> {
        let own = to.starts_with(PREFIX);
        let file = String::new();
        let dependency = Dependency { from: from.into(), to: to.into(), dev, own, file, line: 1 };
        check(&[dependency], document).into_iter().map(|finding| finding.rule).collect()
    }

    #[test]
    fn an_arrow_that_points_upward_is_found() {
        assert_eq!(rules("core", "devsplice-engine", false, ""), ["arrows"]);
        assert_eq!(rules("engine", "devsplice-uring", false, ""), ["arrows"]);
        assert_eq!(rules("newcomer", "devsplice-core", false, ""), ["arrows"]);
        assert_eq!(rules("uring", "devsplice-engine", false, ""), [""; 0]);
        assert_eq!(rules("cli", "devsplice-exports", false, ""), [""; 0]);
        assert_eq!(rules("spec", "devsplice-exports", true, ""), [""; 0]);
    }

    #[test]
    fn a_dependency_that_nobody_explains_is_found() {
        assert_eq!(rules("cli", "clap", false, "- `serde`: why"), ["dependencies"]);
        assert_eq!(rules("cli", "clap", false, "- `clap`: why"), [""; 0]);
        assert_eq!(rules("layers", "libc", false, "`libc`"), ["arrows"]);
        assert_eq!(rules("layers", "proptest", true, "`proptest`"), [""; 0]);
    }

    #[test]
    fn metadata_names_the_manifest_and_its_line() {
        let metadata = serde_json::json!({
            "workspace_root": "/w",
            "packages": [{
                "manifest_path": "/w/crates/core/Cargo.toml",
                "dependencies": [{"name": "libc", "kind": "dev", "path": null}],
            }],
        });
        let found = dependencies(&metadata, |_| "[dev-dependencies]\nlibc = \"0\"\n".into());
        let found = found.expect("well-formed metadata");
        assert_eq!((found[0].file.as_str(), found[0].line), ("crates/core/Cargo.toml", 2));
        assert!(found[0].dev && !found[0].own && found[0].from == "core");
    }
}
