//! Answers for `devsplice doctor`: what on this machine is in the way, and what to do about it.

use std::process::ExitCode;

use devsplice_core::{Error, Result};
use devsplice_exports::{fuse, ublk};
use devsplice_uring::{probe, thread};
use serde_json::json;

use crate::args::Doctor;
use crate::{gc, say, state};

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grade {
    Good,
    /// Works, but not as well as it could.
    Note,
    /// Something does not work.
    Bad,
}

struct Finding {
    grade: Grade,
    what: &'static str,
    text: String,
}

impl Finding {
    fn of(what: &'static str, result: Result<String>, bad: Grade) -> Finding {
        match result {
            Ok(text) => Finding { grade: Grade::Good, what, text },
            Err(error) => Finding { grade: bad, what, text: error.to_string() },
        }
    }
}

/// Prints the findings. The exit code is 1 if no disk can be made here.
///
/// # Errors
/// If the state directory is there and cannot be read.
pub fn run(doctor: &Doctor) -> Result<ExitCode> {
    let ublk = ublk::Control::open().map(|_| "the kernel has it".to_owned());
    let fuse = fuse::available().map(|()| "both are there".to_owned());
    let can_serve = ublk.is_ok() || fuse.is_ok();
    let mut findings = vec![
        root(),
        Finding::of("io_uring", probe::features().map(|_| "works".to_owned()), Grade::Bad),
        Finding::of("ublk", ublk, if fuse.is_ok() { Grade::Note } else { Grade::Bad }),
        Finding::of("FUSE + loop", fuse, if can_serve { Grade::Note } else { Grade::Bad }),
        flusher(),
    ];
    findings.extend(disks());
    if doctor.json {
        let list: Vec<_> = findings
            .iter()
            .map(|one| json!({ "check": one.what, "grade": word(one.grade), "text": one.text }))
            .collect();
        say!("{}", serde_json::to_string_pretty(&list).unwrap_or_default());
    } else {
        for one in &findings {
            say!("{:4}  {:12}  {}", word(one.grade), one.what, one.text);
        }
    }
    Ok(if can_serve { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

const fn word(grade: Grade) -> &'static str {
    match grade {
        Grade::Good => "good",
        Grade::Note => "note",
        Grade::Bad => "BAD",
    }
}

fn root() -> Finding {
    let is_root = rustix::process::geteuid().is_root();
    let result = if is_root {
        Ok("yes".to_owned())
    } else {
        let reason = "explain, features, doctor and --help work; add needs root, or --unprivileged";
        Err(Error::invalid("not root", reason).next("run it with sudo"))
    };
    Finding::of("root", result, Grade::Bad)
}

/// Whether I/O threads can be kept out of memory reclaim. Asks a thread of its own, since the mark
/// stays.
fn flusher() -> Finding {
    let asked = std::thread::spawn(thread::set_io_flusher).join();
    let result = match asked {
        Ok(result) => result.map(|()| "I/O threads stay out of memory reclaim".to_owned()),
        Err(_) => Err(Error::invalid("I/O flusher", "could not be asked")),
    };
    Finding::of("I/O flusher", result, Grade::Note)
}

/// Disks whose server is gone, and how many are served.
fn disks() -> Vec<Finding> {
    let all = match state::all() {
        Ok(all) => all,
        Err(error) => return vec![Finding::of("disks", Err(error), Grade::Note)],
    };
    let served = all.iter().filter(|one| one.alive).count();
    let mut findings = vec![Finding::of("disks", Ok(format!("{served} served here")), Grade::Good)];
    for left in gc::look().unwrap_or_default() {
        findings.push(Finding { grade: Grade::Bad, what: "left over", text: left.describe() });
    }
    findings
}
