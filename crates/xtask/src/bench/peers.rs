//! Answers for the programs that devsplice is compared with: fetched and built once, in the cache.
//!
//! They are other people's programs under their own licences; they are only built and run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::run::bounded;
use crate::apt::{Suite, closure};
use crate::kernel::Scratch;
use crate::proc::{find_program, run_quiet};
use crate::{Fallible, deps};

/// The floor: a server that is nothing but its loop.
const BARE: &str = include_str!("bare.c");
/// Where the kernel's sources and headers are; they must be of the kernel that is booted.
const SOURCE_SUITE: &str = "trixie-backports";
const SOURCE: &str = "linux-source-7.3";
const HEADERS: &str = "linux-libc-dev";
/// kublk wants a liburing that Debian 12 does not have.
const LIBRARY_SUITE: &str = "trixie";
const LIBRARY: &str = "liburing-dev";
/// Seconds for a build.
const BUILD_LIMIT: u32 = 900;
/// The release of rublk that is compared with.
const RUBLK: &str = "0.2.15";

/// The peer of that name: where it is, after building it if it is not there.
pub fn find(name: &str) -> Fallible<PathBuf> {
    match name {
        "bare" => cached(&format!("bare-{:016x}", fingerprint(BARE)), build_bare),
        "kublk" => cached("kublk-7.3", build_kublk),
        "rublk" => cached(&format!("rublk-{RUBLK}"), build_rublk),
        _ => find_program(name).ok_or_else(|| format!("{name} is not installed")),
    }
}

/// What is cached as `name`, a program or a directory; `build` makes it in a directory of its own.
fn cached(name: &str, build: fn(&Path) -> Fallible<PathBuf>) -> Fallible<PathBuf> {
    let home = cache_directory()?;
    let program = home.join(name);
    if program.exists() {
        return Ok(program);
    }
    eprintln!("xtask: building {name} into {}", home.display());
    fs::create_dir_all(&home).map_err(|e| format!("cannot create {}: {e}", home.display()))?;
    let work = Scratch::new(home.join(format!(".build-{name}-{}", std::process::id())))?;
    let built = build(&work.0)?;
    fs::rename(&built, &program).map_err(|e| format!("cannot keep {}: {e}", built.display()))?;
    Ok(program)
}

fn cache_directory() -> Fallible<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").ok_or("neither HOME nor XDG_CACHE_HOME")?)
            .join(".cache"),
    };
    Ok(base.join("devsplice").join("peers"))
}

/// Unpacks the newest package called `name` of a suite.
fn unpack(suite: &Suite, name: &str, tree: &Path) -> Fallible<()> {
    let packages = suite.packages(name)?;
    let package = packages.iter().rfind(|package| package.name == name);
    let package = package.ok_or_else(|| format!("the archive has no {name}"))?;
    let file = suite.fetch(package)?;
    run_quiet(bounded(300, "dpkg").arg("-x").arg(file).arg(tree)).map(drop)
}

/// A number that changes with a text: FNV-1a.
fn fingerprint(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// The floor, from the source beside this file.
fn build_bare(work: &Path) -> Fallible<PathBuf> {
    deps::ensure(&["gcc"])?;
    let (source, program) = (work.join("bare.c"), work.join("bare"));
    fs::write(&source, BARE).map_err(|e| format!("cannot write {}: {e}", source.display()))?;
    let mut gcc = bounded(BUILD_LIMIT, "gcc");
    gcc.args(["-O3", "-Wall", "-Werror", "-D_GNU_SOURCE", "-o"]).arg(&program).arg(&source);
    run_quiet(gcc.arg("-lpthread"))?;
    Ok(program)
}

/// The kernel's own tests of ublk as a directory of scripts, with the helper that some of them
/// start.
pub fn ublk_tests() -> Fallible<PathBuf> {
    cached("ublk-tests-7.3", |work| {
        let (sources, tree) = sources(work)?;
        let mut gcc = bounded(BUILD_LIMIT, "gcc");
        gcc.args(["-O2", "-w", "-D_GNU_SOURCE", "-I"]).arg(tree.join("usr/include"));
        gcc.arg("-o").arg(sources.join("metadata_size"));
        run_quiet(gcc.arg(sources.join("metadata_size.c")))?;
        Ok(sources)
    })
}

/// The directory of a bpftrace that the kernel's tests can use, from a newer Debian, with the
/// libraries of that.
pub fn tracer() -> Fallible<PathBuf> {
    let home = cached("bpftrace", |work| {
        let suite = Suite::new(LIBRARY_SUITE, work)?;
        let (all, tree) = (suite.packages("")?, work.join("tree"));
        for package in closure(&all, "bpftrace") {
            let file = suite.fetch(package)?;
            run_quiet(bounded(300, "dpkg").arg("-x").arg(file).arg(&tree))?;
        }
        let script = tree.join("bpftrace");
        fs::write(&script, TRACER).map_err(|e| format!("cannot write a script: {e}"))?;
        run_quiet(bounded(20, "chmod").arg("755").arg(script))?;
        Ok(tree)
    })?;
    run_quiet(bounded(60, home.join("bpftrace")).arg("--version"))?;
    Ok(home)
}

/// Starts a program of another Debian with its own loader and libraries.
const TRACER: &str = "#!/bin/sh\nhome=$(dirname \"$0\")\nlib=$home/usr/lib/x86_64-linux-gnu\n\
                      exec \"$lib/ld-linux-x86-64.so.2\" --library-path \"$lib\" \
                      \"$home/usr/bin/bpftrace\" \"$@\"\n";

/// The sources of the kernel's tests of ublk, and a tree with the headers of that kernel.
fn sources(work: &Path) -> Fallible<(PathBuf, PathBuf)> {
    deps::ensure(&["gcc", "xz"])?;
    let tree = work.join("tree");
    let kernel = Suite::new(SOURCE_SUITE, work)?;
    unpack(&kernel, HEADERS, &tree)?;
    unpack(&kernel, SOURCE, &tree)?;
    let mut tar = bounded(300, "tar");
    tar.arg("-xJf").arg(tree.join(format!("usr/src/{SOURCE}.tar.xz"))).arg("-C").arg(work);
    tar.args(["--strip-components=1", "--wildcards", "*/tools/testing/selftests/ublk"]);
    run_quiet(&mut tar)?;
    Ok((work.join("tools/testing/selftests/ublk"), tree))
}

/// The kernel's own test server, from the kernel's sources.
fn build_kublk(work: &Path) -> Fallible<PathBuf> {
    let (sources, tree) = sources(work)?;
    unpack(&Suite::new(LIBRARY_SUITE, work)?, LIBRARY, &tree)?;
    let program = work.join("kublk");
    let mut gcc = bounded(BUILD_LIMIT, "gcc");
    gcc.args(["-O3", "-w", "-D_GNU_SOURCE", "-I"]).arg(tree.join("usr/include"));
    gcc.arg("-o").arg(&program).args(c_files(&sources)?);
    gcc.arg(tree.join("usr/lib/x86_64-linux-gnu/liburing.a")).args(["-lpthread", "-lm"]);
    run_quiet(&mut gcc)?;
    Ok(program)
}

/// The C files of kublk: all in its directory but a helper of the tests.
fn c_files(sources: &Path) -> Fallible<Vec<PathBuf>> {
    let list =
        fs::read_dir(sources).map_err(|e| format!("cannot list {}: {e}", sources.display()))?;
    let mut files: Vec<PathBuf> = list.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "c"));
    files.retain(|file| file.file_name().is_some_and(|name| name != "metadata_size.c"));
    Ok(files)
}

/// rublk, from the crate registry; its bindings are made with libclang.
fn build_rublk(work: &Path) -> Fallible<PathBuf> {
    if find_program("clang-14").is_none() && find_program("clang").is_none() {
        deps::install(&["libclang-dev", "clang"])?;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command: Command = bounded(BUILD_LIMIT, cargo);
    command.args(["install", "rublk", "--version", RUBLK, "--locked", "--root"]).arg(work);
    command.env("CARGO_TARGET_DIR", work.join("target"));
    run_quiet(&mut command)?;
    Ok(work.join("bin/rublk"))
}
