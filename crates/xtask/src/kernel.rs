//! Stock Debian kernels for the test VM: found in a cache, or fetched, unpacked and indexed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Fallible;
use crate::apt::{Package, Suite};
use crate::deps;
use crate::proc::run_quiet;

/// Kernel series, and the Debian suite that has it.
const SUITES: &[(&str, &str)] = &[
    ("7.3", "trixie-backports"),
    ("6.18", "trixie-backports"),
    ("6.12", "trixie"),
    ("6.1", "bookworm"),
];
/// Where a series that is not in the table is looked for.
const OTHER_SUITE: &str = "trixie-backports";
/// The flavour without drivers for physical hardware.
const FLAVOUR: &str = "-cloud-amd64";

/// A kernel that can be booted: its image, and its modules.
#[derive(Debug)]
pub struct Kernel {
    /// What `uname -r` will say.
    pub release: String,
    /// The compressed kernel image.
    pub image: PathBuf,
    /// The directory that holds `kernel/` and `modules.dep`.
    pub modules: PathBuf,
}

/// Finds the kernel that `which` names: a series like `6.12`, or a directory.
pub fn find(which: &str) -> Fallible<Kernel> {
    if which.contains('/') {
        return open_directory(Path::new(which));
    }
    let cache = cache_directory()?;
    if let Some(release) = newest_cached(&cache, which) {
        return open(&cache.join(&release), &release);
    }
    let release = fetch(&cache, which)?;
    open(&cache.join(&release), &release)
}

/// Where kernels are kept.
fn cache_directory() -> Fallible<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").ok_or("neither HOME nor XDG_CACHE_HOME")?)
            .join(".cache"),
    };
    Ok(base.join("devsplice").join("kernels"))
}

/// Whether the release `name` belongs to the series: `6.1` takes 6.1.3 and 6.1-rc1, not 6.12.
fn in_series(name: &str, series: &str) -> bool {
    name.strip_prefix(series).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// A release's numbers in order of weight: 7.3.4+deb13-cloud-amd64 is [7, 3, 4].
fn version_key(name: &str) -> Vec<u64> {
    let end = name.find(['+', '~']).unwrap_or(name.len());
    name[..end].split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

fn newest_cached(cache: &Path, series: &str) -> Option<String> {
    fs::read_dir(cache)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| in_series(name, series))
        .max_by_key(|name| version_key(name))
}

/// Fetches the newest kernel of the series into the cache and returns its release.
fn fetch(cache: &Path, series: &str) -> Fallible<String> {
    deps::ensure(&["xz", "depmod"])?;
    let suite_name =
        SUITES.iter().find(|(name, _)| *name == series).map_or(OTHER_SUITE, |(_, suite)| suite);
    eprintln!("xtask: no kernel {series} in {}; asking Debian {suite_name}", cache.display());
    fs::create_dir_all(cache).map_err(|e| format!("cannot create {}: {e}", cache.display()))?;
    let work = Scratch::new(cache.join(format!(".fetch-{}", std::process::id())))?;
    let suite = Suite::new(suite_name, &work.0)?;
    let packages = suite.packages("linux-")?;
    let release = newest_release(&packages, series)
        .ok_or_else(|| format!("Debian {suite_name} has no linux-image-{series}*{FLAVOUR}"))?;
    let tree = work.0.join("tree");
    for package in parts_of(&packages, &release) {
        let file = suite.fetch(package)?;
        run_quiet(Command::new("dpkg").arg("-x").arg(&file).arg(&tree))?;
    }
    prepare(&tree, &release)?;
    let home = cache.join(&release);
    fs::rename(&tree, &home).map_err(|e| format!("cannot create {}: {e}", home.display()))?;
    Ok(release)
}

/// The newest release of the series among the image packages.
fn newest_release(packages: &[Package], series: &str) -> Option<String> {
    packages
        .iter()
        .filter_map(|package| package.name.strip_prefix("linux-image-"))
        .filter(|name| name.ends_with(FLAVOUR) && in_series(name, series))
        .max_by_key(|name| version_key(name))
        .map(str::to_owned)
}

/// The packages that hold a release's image and modules: Debian split them up in 2025.
fn parts_of<'a>(packages: &'a [Package], release: &str) -> Vec<&'a Package> {
    let find = |kind: &str| {
        let name = format!("linux-{kind}-{release}");
        packages.iter().rfind(|package| package.name == name)
    };
    let parts: Vec<&Package> = ["binary", "modules", "base"].into_iter().filter_map(find).collect();
    if parts.is_empty() { find("image").into_iter().collect() } else { parts }
}

/// Makes an unpacked tree quick to use: modules decompressed here once, since emulated CPUs are
/// slow at it, and their dependencies listed.
fn prepare(tree: &Path, release: &str) -> Fallible<()> {
    let modules = modules_in(tree, release)?;
    for chunk in files_under(&modules, ".ko.xz")?.chunks(200) {
        run_quiet(Command::new("xz").arg("-dq").args(chunk))?;
    }
    let base = match modules.starts_with(tree.join("usr")) {
        true => tree.join("usr"),
        false => tree.to_path_buf(),
    };
    run_quiet(Command::new("depmod").arg("-b").arg(base).arg(release)).map(drop)
}

/// The module directory of a release inside an unpacked tree.
fn modules_in(tree: &Path, release: &str) -> Fallible<PathBuf> {
    ["lib/modules", "usr/lib/modules"]
        .map(|dir| tree.join(dir).join(release))
        .into_iter()
        .find(|dir| dir.join("kernel").is_dir())
        .ok_or_else(|| format!("no modules of {release} in {}", tree.display()))
}

/// The kernel of an unpacked Debian package tree.
fn open(tree: &Path, release: &str) -> Fallible<Kernel> {
    let modules = modules_in(tree, release)?;
    let image = [modules.join("vmlinuz"), tree.join("boot").join(format!("vmlinuz-{release}"))]
        .into_iter()
        .find(|file| file.is_file())
        .ok_or_else(|| format!("no vmlinuz in {}; remove it to fetch it anew", tree.display()))?;
    Ok(Kernel { release: release.into(), image, modules })
}

/// A kernel directory that the user names: `vmlinuz` and `kernel/` in it, called by its release.
fn open_directory(dir: &Path) -> Fallible<Kernel> {
    let wrong = |what: &str| format!("--kernel {}: {what}", dir.display());
    let modules = dir.canonicalize().map_err(|e| wrong(&e.to_string()))?;
    let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let image = modules.join("vmlinuz");
    if !image.is_file() || !modules.join("modules.dep").is_file() {
        return Err(wrong("needs vmlinuz, kernel/ and depmod's modules.dep, named by its release"));
    }
    Ok(Kernel { release, image, modules })
}

/// Every file below `dir` whose name ends in `suffix`.
fn files_under(dir: &Path, suffix: &str) -> Fallible<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(dir) = left.pop() {
        let list = fs::read_dir(&dir).map_err(|e| format!("cannot list {}: {e}", dir.display()))?;
        for entry in list.flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => left.push(path),
                Ok(kind) if kind.is_file() && path.to_string_lossy().ends_with(suffix) => {
                    found.push(path);
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

/// A directory that goes away with its owner.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// Creates the directory, readable by its owner only.
    pub fn new(path: PathBuf) -> Fallible<Self> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| format!("cannot create {}: {e}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A leftover is cleaned up by the next run; there is nobody to tell here.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str) -> Package {
        let (version, file, sha256) = (String::new(), String::new(), String::new());
        Package { name: name.into(), version, file, size: 0, sha256, depends: Vec::new() }
    }

    #[test]
    fn a_series_is_not_a_prefix_of_digits() {
        assert!(in_series("6.1.0-40-cloud-amd64", "6.1"));
        assert!(!in_series("6.12.5+deb13-cloud-amd64", "6.1"));
        assert!(in_series("7.3+deb13-cloud-amd64", "7.3"));
    }

    #[test]
    fn the_newest_release_is_by_number_not_by_letter() {
        let names = ["7.3.9+deb13", "7.3.10+deb13", "7.2.20+deb13", "7.3.11+deb13-rt"];
        let packages: Vec<Package> = names
            .iter()
            .map(|name| package(&format!("linux-image-{name}-cloud-amd64")))
            .chain([package("linux-image-7.3.12+deb13-amd64")])
            .collect();
        let newest = newest_release(&packages[..3], "7.3");
        assert_eq!(newest.as_deref(), Some("7.3.10+deb13-cloud-amd64"));
        assert_eq!(newest_release(&packages[4..], "7.3"), None);
    }

    #[test]
    fn an_old_release_is_one_package_and_a_new_one_three() {
        let old = [package("linux-image-6.1.0-40-cloud-amd64")];
        assert_eq!(parts_of(&old, "6.1.0-40-cloud-amd64").len(), 1);
        let new = ["image", "binary", "modules", "base"]
            .map(|kind| package(&format!("linux-{kind}-7.3.4-cloud-amd64")));
        assert_eq!(parts_of(&new, "7.3.4-cloud-amd64").len(), 3);
    }
}
