//! Answers for what a server's process may still ask of the kernel once it is set up. An I/O
//! thread, which handles what clients and disks hold, may do little but wait in its ring; other
//! threads may do nothing that no server does.
//!
//! What is forbidden fails with EPERM and is logged by the kernel: a server that was killed for it
//! would take its disk along, or come back to the same request for ever.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use clap::ValueEnum;
use devsplice_core::{Error, Result};
use devsplice_exports::threads::{self, Place};
use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    RulesetStatus,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

mod calls;

use calls::{FAMILIES, IO_THREAD, NEVER, POOL_THREAD, TLS};

/// `--sandbox`, as typed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// As far as this kernel can.
    #[default]
    On,
    /// Not at all.
    Off,
}

/// Why nothing was done where that was wanted.
const OFF: &str = "--sandbox off";

/// What was done for the process, and whether that was wanted.
static PROCESS: OnceLock<std::result::Result<(), String>> = OnceLock::new();
/// What was done for the I/O thread that was started last.
static IO: Mutex<Option<std::result::Result<String, String>>> = Mutex::new(None);

/// Shuts the process in: this thread, and those that it starts. To be called when what a disk needs
/// is open, before it has I/O threads; for a server of many, before it has any thread. Once,
/// whatever disks come later.
pub fn process(choice: Choice) {
    PROCESS.get_or_init(|| {
        if choice == Choice::Off {
            return Err(OFF.to_owned());
        }
        threads::on_settled(io_thread);
        for program in process_filters().map_err(|error| error.to_string())? {
            install(&program).map_err(|error| error.to_string())?;
        }
        Ok(())
    });
}

/// Whether the process is shut in.
pub fn is_on() -> bool {
    matches!(PROCESS.get(), Some(Ok(())))
}

/// Whether the process was not to be shut in.
pub fn is_off() -> bool {
    matches!(PROCESS.get(), Some(Err(reason)) if reason == OFF)
}

/// Shuts the calling I/O thread in, which has all that it needs.
fn io_thread(place: Place) {
    let done = files().and_then(|files| {
        let program = io_filter(place).map_err(|error| error.to_string())?;
        install(&program).map_err(|error| error.to_string())?;
        Ok(format!("on, {files}"))
    });
    *IO.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
}

/// What was done, for `info`.
pub fn shown() -> Value {
    let word = |done: Option<std::result::Result<String, String>>| match done {
        Some(Ok(how)) => json!(how),
        Some(Err(reason)) => json!(format!("off: {reason}")),
        None => json!("off"),
    };
    let io = IO.lock().unwrap_or_else(PoisonError::into_inner).clone();
    json!({
        "process": word(PROCESS.get().map(|done| done.clone().map(|()| "on".to_owned()))),
        "io_threads": word(io),
    })
}

/// Why the process is not shut in although that was wanted.
pub fn warnings() -> Vec<String> {
    let io = IO.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let failed = [PROCESS.get().and_then(|done| done.clone().err()), io.and_then(|io| io.err())];
    let is_meant = |reason: &String| reason != OFF;
    failed.into_iter().flatten().filter(is_meant).map(|why| format!("no sandbox: {why}")).collect()
}

fn install(program: &BpfProgram) -> Result<()> {
    let plain: Vec<_> = program.iter().map(|line| (line.code, line.jt, line.jf, line.k)).collect();
    devsplice_uring::thread::restrict_calls(&plain)
}

/// No files for this thread and its ring, where the kernel has Landlock; how much of it.
fn files() -> std::result::Result<String, String> {
    let rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let status = rules
        .handle_access(AccessFs::from_all(ABI::V9))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(|error| format!("landlock: {error}"))?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => "system calls only: no Landlock here".to_owned(),
        (_, LandlockStatus::Available { effective_abi, kernel_abi }) => {
            let version = kernel_abi.unwrap_or(effective_abi as i32);
            format!("system calls and files (Landlock {version})")
        }
        _ => "system calls and files".to_owned(),
    })
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, Error> {
    let broken = |error: BackendError| Error::invalid("sandbox", error.to_string());
    let filter = SeccompFilter::new(rules, otherwise, listed, TargetArch::x86_64);
    filter.and_then(TryInto::try_into).map_err(broken)
}

/// A rule about one argument or several, all of which must hold.
fn rule(conditions: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, Error> {
    let broken = |error: BackendError| Error::invalid("sandbox", error.to_string());
    let mut all = Vec::new();
    for (argument, compare, value) in conditions {
        let word = SeccompCmpArgLen::Dword;
        all.push(SeccompCondition::new(*argument, word, compare.clone(), *value).map_err(broken)?);
    }
    SeccompRule::new(all).map_err(broken)
}

fn forbidden() -> SeccompAction {
    SeccompAction::Errno(libc_errno(rustix::io::Errno::PERM))
}

fn libc_errno(errno: rustix::io::Errno) -> u32 {
    errno.raw_os_error().unsigned_abs()
}

/// What an I/O thread may do is listed.
fn io_filter(place: Place) -> Result<BpfProgram> {
    let more = if place == Place::InPool { POOL_THREAD } else { &[] };
    // One of a pool serves disks that nobody knows of yet.
    let has_tls = place == Place::InPool || devsplice_uring::ktls::is_wanted();
    let tls = if has_tls { TLS } else { &[] };
    let listed = IO_THREAD.iter().chain(more).chain(tls);
    let mut rules: Rules = listed.map(|call| (*call, Vec::new())).collect();
    if has_tls {
        let level = rule(&[(1, SeccompCmpOp::Eq, calls::SOL_TLS)])?;
        rules.insert(calls::SETSOCKOPT, vec![level]);
    }
    let own = u64::from(std::process::id());
    // To end the process: a panic aborts it.
    rules.insert(calls::TGKILL, vec![rule(&[(0, SeccompCmpOp::Eq, own)])?]);
    compile(rules, forbidden(), SeccompAction::Allow)
}

/// What no server does is listed; what is not is allowed. Two programs: what is not offered by this
/// process (clone3, whose flags no filter can read) makes libraries do the other thing.
fn process_filters() -> Result<[BpfProgram; 2]> {
    let mut rules: Rules = NEVER.iter().map(|call| (*call, Vec::new())).collect();
    // Threads yes, processes no.
    let thread = calls::CLONE_THREAD;
    rules.insert(calls::CLONE, vec![rule(&[(0, SeccompCmpOp::MaskedEq(thread), 0)])?]);
    let others: Vec<_> = FAMILIES.iter().map(|one| (0, SeccompCmpOp::Ne, *one)).collect();
    rules.insert(calls::SOCKET, vec![rule(&others)?]);
    let main = compile(rules, SeccompAction::Allow, forbidden())?;
    let missing = SeccompAction::Errno(libc_errno(rustix::io::Errno::NOSYS));
    let clone3 = [(calls::CLONE3, Vec::new())].into();
    Ok([main, compile(clone3, SeccompAction::Allow, missing)?])
}

#[cfg(test)]
mod tests;
