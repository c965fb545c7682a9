//! A Debian archive, read through this machine's own apt configuration and checked link by link:
//! signature of the release, its hash of the index, the index's hash of a package.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Fallible;
use crate::proc::{self, find_program, run_quiet};

const APT_HELPER: &str = "/usr/lib/apt/apt-helper";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const INDEX: &str = "main/binary-amd64/Packages.xz";

/// One package of an index: the fields that fetching it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// The package's name.
    pub name: String,
    /// The package's version.
    pub version: String,
    /// Its file, relative to the archive.
    pub file: String,
    /// The file's size in bytes.
    pub size: u64,
    /// The file's SHA-256, in hexadecimal.
    pub sha256: String,
    /// Names of the packages that it depends on; of alternatives the first.
    pub depends: Vec<String>,
}

/// One suite of the Debian archive that this machine's apt knows.
pub struct Suite {
    archive: String,
    name: String,
    work: PathBuf,
}

impl Suite {
    /// Finds the archive; `work` is a directory for downloads.
    pub fn new(name: &str, work: &Path) -> Fallible<Self> {
        let mut query = Command::new("apt-get");
        query.args(["indextargets", "--format", "$(REPO_URI)"]);
        let output = run_quiet(&mut query).map_err(|e| {
            format!("a Debian archive is needed for kernels ({e}); pass --kernel DIR instead")
        })?;
        let archive = String::from_utf8_lossy(&output)
            .lines()
            .map(|line| line.trim_end_matches('/'))
            .find(|line| line.ends_with("/debian"))
            .map(str::to_owned)
            .ok_or(
                "apt here knows no Debian archive (a URI ending in /debian); pass --kernel DIR",
            )?;
        Ok(Self { archive, name: name.into(), work: work.into() })
    }

    /// Every package of the suite whose name starts with `prefix`, newest listed last.
    pub fn packages(&self, prefix: &str) -> Fallible<Vec<Package>> {
        let release = self.work.join("InRelease");
        self.download(&format!("dists/{}/InRelease", self.name), &release, None)?;
        let release = self.verified(&release)?;
        let (sha256, _) = index_entry(&release, INDEX)
            .ok_or_else(|| format!("the release file of {} lists no {INDEX}", self.name))?;
        let index = self.work.join("Packages.xz");
        self.download(&format!("dists/{}/{INDEX}", self.name), &index, Some(&sha256))?;
        let text = run_quiet(Command::new("xz").arg("-dc").arg(&index))?;
        Ok(parse_index(&String::from_utf8_lossy(&text), prefix))
    }

    /// The signed text of a release file; without a verifier or keyring, its text as it came.
    fn verified(&self, file: &Path) -> Fallible<String> {
        let read = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|e| format!("cannot read {}: {e}", path.display()))
        };
        if find_program("gpgv").is_none() || !Path::new(KEYRING).exists() {
            eprintln!("xtask: no gpgv or no {KEYRING}: the archive's signature is not checked");
            return read(file);
        }
        let text = self.work.join("Release");
        let mut gpgv = Command::new("gpgv");
        gpgv.args(["--status-fd", "1", "--keyring", KEYRING, "--output"]).arg(&text).arg(file);
        let output = gpgv.output().map_err(|e| format!("cannot start gpgv: {e}"))?;
        // gpgv fails when it lacks one of several signers' keys: one good one is what counts.
        let status = String::from_utf8_lossy(&output.stdout);
        if !status.contains("[GNUPG:] VALIDSIG ") || status.contains("[GNUPG:] BADSIG ") {
            return Err(format!(
                "the release file of {} carries no valid signature of {KEYRING}:\n{}",
                self.name,
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        read(&text)
    }

    /// Fetches one package's file and checks its hash.
    pub fn fetch(&self, package: &Package) -> Fallible<PathBuf> {
        let target = self.work.join(format!("{}.deb", package.name));
        eprint!("xtask: fetching {} {}", package.name, package.version);
        eprint!(", {:.1} MiB ...", package.size as f64 / f64::from(1 << 20));
        let start = std::time::Instant::now();
        let done = self.download(&package.file, &target, Some(&package.sha256));
        eprintln!(" {:.1} s", start.elapsed().as_secs_f64());
        done.map(|()| target)
    }

    /// Fetches a file of the archive with apt's own downloader, hence its proxies and its trust.
    fn download(&self, file: &str, target: &Path, sha256: Option<&str>) -> Fallible<()> {
        let mut helper = Command::new(APT_HELPER);
        // The unprivileged user `_apt` cannot write to a private cache directory.
        helper.args(["-o", "APT::Sandbox::User=root", "download-file"]);
        helper.arg(format!("{}/{file}", self.archive)).arg(target);
        helper.args(sha256.map(|hash| format!("SHA256:{hash}")));
        proc::run_quiet(&mut helper)
            .map(drop)
            .map_err(|e| format!("cannot download {file} of Debian {}: {e}", self.name))
    }
}

/// The SHA-256 and size that a release file gives for `file`.
fn index_entry(release: &str, file: &str) -> Option<(String, u64)> {
    let section = release.lines().skip_while(|line| line.trim_end() != "SHA256:").skip(1);
    for line in section.take_while(|line| line.starts_with(' ')) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [sha256, size, name] = fields[..]
            && name == file
        {
            return Some((sha256.to_owned(), size.parse().ok()?));
        }
    }
    None
}

/// The names in lists of dependencies, without versions and alternatives.
fn names(lists: &[Option<String>]) -> Vec<String> {
    let name = |one: &str| {
        let name = one.trim().split([' ', ':', '(', '|']).next().unwrap_or_default();
        (!name.is_empty()).then(|| name.to_owned())
    };
    lists.iter().flatten().flat_map(|list| list.split(',')).filter_map(name).collect()
}

/// Of `all`, the package called `name` and all that it depends on.
pub fn closure<'a>(all: &'a [Package], name: &str) -> Vec<&'a Package> {
    let (mut found, mut left) = (Vec::<&Package>::new(), vec![name.to_owned()]);
    while let Some(name) = left.pop() {
        if found.iter().any(|package| package.name == name) {
            continue;
        }
        if let Some(package) = all.iter().rfind(|package| package.name == name) {
            left.extend(package.depends.iter().cloned());
            found.push(package);
        }
    }
    found
}

/// The packages of an index whose name starts with `prefix`.
fn parse_index(index: &str, prefix: &str) -> Vec<Package> {
    let mut found = Vec::new();
    for paragraph in index.split("\n\n") {
        let fields: HashMap<&str, &str> =
            paragraph.lines().filter_map(|line| line.split_once(": ")).collect();
        let get = |key: &str| fields.get(key).map(|value| value.trim().to_owned());
        let package = || {
            Some(Package {
                name: get("Package")?,
                version: get("Version")?,
                file: get("Filename")?,
                size: get("Size")?.parse().ok()?,
                sha256: get("SHA256")?,
                depends: names(&[get("Depends"), get("Pre-Depends")]),
            })
        };
        found.extend(package().filter(|package| package.name.starts_with(prefix)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_names_the_hash_of_its_index() {
        let release =
            "MD5Sum:\n 11 5 main/x\nSHA256:\n aa 7 main/x\n bb 9 main/y\nOther:\n cc 1 z\n";
        assert_eq!(index_entry(release, "main/x"), Some(("aa".into(), 7)));
        assert_eq!(index_entry(release, "z"), None);
        assert_eq!(index_entry("", "main/x"), None);
    }

    #[test]
    fn an_index_is_read_paragraph_by_paragraph() {
        let index = "Package: linux-a\nVersion: 1\nFilename: p/a.deb\nSize: 10\nSHA256: ab\n\n\
                     Package: other\nVersion: 1\nFilename: p/o.deb\nSize: 10\nSHA256: ab\n\n\
                     Package: linux-broken\nVersion: 1\n";
        let found = parse_index(index, "linux-");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].size), ("linux-a", 10));
    }

    #[test]
    fn what_a_package_depends_on_comes_with_it_once() {
        let rest = "Version: 1\nFilename: p/a.deb\nSize: 10\nSHA256: ab\n";
        let index = format!(
            "Package: a\n{rest}Depends: b (>= 2), c:any | d, virtual\nPre-Depends: e\n\n\
             Package: b\n{rest}Depends: a\n\nPackage: c\n{rest}\nPackage: d\n{rest}\n\
             Package: e\n{rest}"
        );
        let all = parse_index(&index, "");
        assert_eq!(all.len(), 5);
        let mut names: Vec<&str> =
            closure(&all, "a").iter().map(|package| package.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["a", "b", "c", "e"]);
    }
}
