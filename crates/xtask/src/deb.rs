//! Answers for the Debian package: what is in it, how it is built, and that what was built is what
//! was meant.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;

use crate::{Fallible, proc, tidy};

/// Build the Debian package, and check what is in it: target/deb/devsplice_VERSION_amd64.deb.
#[derive(Args)]
pub struct Options {
    /// A built devsplice, rather than building it.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Files of the repository: from where, to where.
const FILES: &[(&str, &str)] = &[
    ("packaging/systemd/devsplice@.service", "usr/lib/systemd/system/devsplice@.service"),
    ("packaging/udev/60-devsplice.rules", "usr/lib/udev/rules.d/60-devsplice.rules"),
    ("packaging/udev/60-devsplice-ublk.rules", "usr/lib/udev/rules.d/60-devsplice-ublk.rules"),
    ("packaging/deb/copyright", "usr/share/doc/devsplice/copyright"),
    ("packaging/deb/lintian-overrides", "usr/share/lintian/overrides/devsplice"),
    ("docs/stack.md", "usr/share/doc/devsplice/stack.md"),
    ("docs/recovery.md", "usr/share/doc/devsplice/recovery.md"),
    ("docs/operations.md", "usr/share/doc/devsplice/operations.md"),
    ("docs/ublk.md", "usr/share/doc/devsplice/ublk.md"),
    ("docs/test-layers.md", "usr/share/doc/devsplice/test-layers.md"),
    ("docs/kernels.md", "usr/share/doc/devsplice/kernels.md"),
    ("README.md", "usr/share/doc/devsplice/README.md"),
];
/// Scripts of the package.
const SCRIPTS: [&str; 2] = ["postinst", "postrm"];
/// Completion scripts: the shell, and where it looks for them.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/devsplice"),
    ("zsh", "usr/share/zsh/vendor-completions/_devsplice"),
    ("fish", "usr/share/fish/vendor_completions.d/devsplice.fish"),
];
/// What must be in every package, besides those.
const MUST: [&str; 6] = [
    "usr/bin/devsplice",
    "usr/share/man/man1/devsplice.1.gz",
    "usr/share/man/man1/devsplice-add.1.gz",
    "usr/share/man/man1/devsplice-top.1.gz",
    "usr/share/doc/devsplice/changelog.gz",
    "etc/devsplice",
];

/// Builds and checks it; says where it is.
pub fn run(options: &Options) -> Fallible<u8> {
    let root = tidy::workspace()?;
    let binary = match &options.binary {
        Some(binary) => binary.clone(),
        None => build_binary(&root)?,
    };
    let deb = build(&root, &binary, &root.join("target/deb"))?;
    check(&deb)?;
    println!("{}", deb.display());
    match proc::find_program("lintian") {
        Some(lintian) => {
            let mut command = proc::tied(lintian);
            command.args(["--fail-on", "error,warning", "--allow-root"]).arg(&deb);
            let status = proc::Guard::spawn(&mut command)?.wait()?;
            Ok(u8::from(!status.success()))
        }
        None => {
            println!("lintian is not installed: it was not asked");
            Ok(0)
        }
    }
}

fn build_binary(root: &Path) -> Fallible<PathBuf> {
    let mut cargo = proc::tied(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root).args(["build", "--release", "-p", "devsplice", "--bin", "devsplice"]);
    // It takes longer to build, which those who get the package do not wait for.
    cargo.args(["--features", "psk"]);
    let status = proc::Guard::spawn(&mut cargo)?.wait()?;
    if !status.success() {
        return Err("devsplice does not build".to_owned());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    Ok(target.join("x86_64-unknown-linux-gnu/release/devsplice"))
}

/// Puts the tree together below `place` and packs it.
fn build(root: &Path, binary: &Path, place: &Path) -> Fallible<PathBuf> {
    let stage = place.join("stage");
    let _ = fs::remove_dir_all(&stage);
    put(&read(binary)?, &stage.join("usr/bin/devsplice"), 0o755)?;
    run_quiet("strip", &[stage.join("usr/bin/devsplice").as_os_str().to_owned()])?;
    for (from, to) in FILES {
        put(&read(&root.join(from))?, &stage.join(to), 0o644)?;
    }
    make_dir(&stage.join("etc/devsplice"))?;
    let command = std::path::absolute(binary).map_err(|e| format!("{}: {e}", binary.display()))?;
    let pages = stage.join("usr/share/man/man1");
    make_dir(&pages)?;
    run_quiet(&command, &["man".into(), pages.clone().into_os_string()])?;
    put(changelog().as_bytes(), &stage.join("usr/share/doc/devsplice/changelog"), 0o644)?;
    pack_pages(&pages, &stage.join("usr/share/doc/devsplice/changelog"))?;
    for (shell, to) in COMPLETIONS {
        put(&run_quiet(&command, &["completions".into(), shell.into()])?, &stage.join(to), 0o644)?;
    }
    control(root, &stage)?;
    let deb = place.join(format!("devsplice_{VERSION}_amd64.deb"));
    let arguments = ["--root-owner-group", "-Zxz", "--build"].map(Into::into);
    let paths = [stage.into_os_string(), deb.clone().into_os_string()];
    run_quiet("dpkg-deb", &[&arguments[..], &paths].concat())?;
    Ok(deb)
}

fn changelog() -> String {
    format!(
        "devsplice ({VERSION}) unstable; urgency=medium\n\n  * The state of the repository that it \
         was built from.\n\n -- {MAINTAINER}  Thu, 01 Jan 2026 00:00:00 +0000\n"
    )
}

/// The long description.
const ABOUT: &str = " devsplice makes disks of files, block devices and memory: stripes, mirrors,
 windows, partitions and more, above one another. Where the kernel has ublk
 the pages of a request go to the files below without being copied.
 .
 Disks can be started by systemd, and are found in /dev/devsplice.
";

const MAINTAINER: &str = "The devsplice developers <devsplice@example.org>";

/// Manual pages and the change log are compressed, without a time in them.
fn pack_pages(pages: &Path, changelog: &Path) -> Fallible<()> {
    let mut all = vec!["-9n".into(), changelog.as_os_str().to_owned()];
    let entries = fs::read_dir(pages).map_err(|e| format!("{}: {e}", pages.display()))?;
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.path().into_os_string()).collect();
    names.sort();
    all.extend(names);
    run_quiet("gzip", &all).map(drop)
}

/// What dpkg is told: DEBIAN/control, sums, scripts.
fn control(root: &Path, stage: &Path) -> Fallible<()> {
    let files = files_of(stage)?;
    let mut sums = String::new();
    let mut bytes = 0;
    for file in &files {
        let path = stage.join(file);
        bytes += path.metadata().map_or(0, |meta| meta.len());
        let line = run_quiet("md5sum", &[path.into_os_string()])?;
        let sum = String::from_utf8_lossy(&line).split(' ').next().unwrap_or("").to_owned();
        sums += &format!("{sum}  {file}\n");
    }
    let text = format!(
        "Package: devsplice\nVersion: {VERSION}\nArchitecture: amd64\nMaintainer: {MAINTAINER}\n\
         Installed-Size: {}\nDepends: passwd\nRecommends: kmod, udev\nSection: admin\n\
         Priority: optional\n\
         Description: block devices from a stack of layers, served from user space\n{ABOUT}",
        bytes.div_ceil(1024)
    );
    put(text.as_bytes(), &stage.join("DEBIAN/control"), 0o644)?;
    put(sums.as_bytes(), &stage.join("DEBIAN/md5sums"), 0o644)?;
    for script in SCRIPTS {
        let from = root.join("packaging/deb").join(script);
        put(&read(&from)?, &stage.join("DEBIAN").join(script), 0o755)?;
    }
    Ok(())
}

/// Unpacks a package elsewhere and looks at it as who installs it would.
fn check(deb: &Path) -> Fallible<()> {
    let out = deb.with_extension("unpacked");
    let _ = fs::remove_dir_all(&out);
    run_quiet("dpkg-deb", &["-x".into(), deb.into(), out.clone().into_os_string()])?;
    let wanted = FILES.iter().chain(&COMPLETIONS).map(|(_, to)| *to).chain(MUST);
    for path in wanted {
        if !out.join(path).exists() {
            return Err(format!("{}: has no /{path}", deb.display()));
        }
    }
    let list = run_quiet("dpkg-deb", &["-c".into(), deb.into()])?;
    for line in String::from_utf8_lossy(&list).lines() {
        let mut words = line.split_whitespace();
        let (mode, owner) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let is_open =
            mode.as_bytes().get(5) == Some(&b'w') || mode.as_bytes().get(8) == Some(&b'w');
        if owner != "root/root" || (is_open && !mode.starts_with('l')) {
            return Err(format!("{}: not root's alone: {line}", deb.display()));
        }
    }
    let said = run_quiet(out.join("usr/bin/devsplice"), &["--version".into()])?;
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    if said != format!("devsplice {VERSION}") {
        return Err(format!("{}: the program in it says: {said}", deb.display()));
    }
    fs::remove_dir_all(&out).map_err(|e| format!("{}: {e}", out.display()))
}

/// Every file below `stage`, as paths from there, sorted.
fn files_of(stage: &Path) -> Fallible<Vec<String>> {
    let mut found = Vec::new();
    let mut left = vec![stage.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?.flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => left.push(path),
                false => found.extend(path.strip_prefix(stage).ok().map(Path::to_owned)),
            }
        }
    }
    let mut names: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
    names.sort();
    Ok(names)
}

fn read(path: &Path) -> Fallible<Vec<u8>> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn make_dir(path: &Path) -> Fallible<()> {
    let failed = |e| format!("{}: {e}", path.display());
    fs::create_dir_all(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(failed)
}

/// Writes a file with this mode, whatever the umask is; so are the directories above it.
fn put(bytes: &[u8], to: &Path, mode: u32) -> Fallible<()> {
    let failed = |e| format!("{}: {e}", to.display());
    if let Some(dir) = to.parent() {
        make_dir(dir)?;
    }
    fs::write(to, bytes).map_err(failed)?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).map_err(failed)
}

fn run_quiet(
    program: impl AsRef<std::ffi::OsStr>,
    arguments: &[std::ffi::OsString],
) -> Fallible<Vec<u8>> {
    let mut command = Command::new(program);
    proc::run_quiet(command.args(arguments).stdin(Stdio::null()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What packing asks of devsplice, in C: a script cannot be stripped.
    const IMITATION: &str = r#"
        #include <stdio.h>
        #include <string.h>
        int main(int count, char **words) {
            const char *pages[] = { "", "-add", "-top" };
            char path[999];
            if (!strcmp(words[1], "--version")) printf("devsplice %s\n", VERSION);
            if (!strcmp(words[1], "completions")) printf("completions of %s\n", words[2]);
            for (int i = 0; i < 3 && !strcmp(words[1], "man"); i++) {
                snprintf(path, 999, "%s/devsplice%s.1", words[2], pages[i]);
                if (!fopen(path, "w")) return 1;
            }
            return 0;
        }
    "#;

    fn imitation(dir: &Path, version: &str) -> PathBuf {
        let (path, source) = (dir.join("devsplice"), dir.join("it.c"));
        fs::write(&source, IMITATION).unwrap();
        let version = format!("-DVERSION=\"{version}\"");
        let words = [version.into(), "-o".into(), path.clone().into(), source.into_os_string()];
        run_quiet("cc", &words).unwrap();
        path
    }

    #[test]
    fn a_package_has_all_that_it_must_and_a_wrong_one_is_found() {
        if proc::find_program("dpkg-deb").is_none() || proc::find_program("cc").is_none() {
            println!("skipped: no dpkg-deb or no cc here");
            return;
        }
        let dir = std::env::temp_dir().join(format!("devsplice-deb-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let root = tidy::workspace().unwrap();
        let deb = build(&root, &imitation(&dir, VERSION), &dir).unwrap();
        check(&deb).unwrap();
        let sums = fs::read_to_string(dir.join("stage/DEBIAN/md5sums")).unwrap();
        assert!(sums.lines().any(|line| line.ends_with("  usr/bin/devsplice")), "{sums}");
        assert!(!sums.contains("DEBIAN"));

        let other = build(&root, &imitation(&dir, "0.0.0"), &dir.join("other")).unwrap();
        assert!(check(&other).unwrap_err().contains("says: devsplice 0.0.0"));
        fs::remove_file(dir.join("stage/usr/lib/udev/rules.d/60-devsplice.rules")).unwrap();
        let stage = dir.join("stage").into_os_string();
        let arguments = ["--root-owner-group".into(), "--build".into(), stage, deb.clone().into()];
        run_quiet("dpkg-deb", &arguments).unwrap();
        assert!(check(&deb).unwrap_err().contains("60-devsplice.rules"));
        fs::remove_dir_all(dir).unwrap();
    }
}
