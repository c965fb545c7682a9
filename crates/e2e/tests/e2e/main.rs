//! Answers for the end-to-end suite: which tests run where, and that the run leaves nothing.
//!
//! `DEVSPLICE_E2E` says where this is: `native` (the default), or `vm` for a machine that the tests
//! may turn upside down. What cannot run is skipped with its reason.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::unwrap_used)] // A failed expectation is a failed test.

mod adopt;
mod alike;
mod bad;
mod batch;
mod blind;
mod cli;
mod contract;
mod copy;
mod dialect;
mod doors;
mod kept;
mod ktls;
mod layers;
mod life;
mod low_depth;
mod luck;
mod manners;
mod many;
mod matrix;
mod mirror;
mod nbd;
mod ops;
mod parts;
mod protect;
mod psk;
mod reach;
mod recover;
mod remote;
mod replay;
mod rpc;
mod stored;
mod tls;
mod ublk;
mod verify;
mod zoned;

use std::process::ExitCode;

use devsplice_e2e::{
    FUSE_PATHS, Group, Kind, Mode, PATHS, Skip, had, is_root, leftovers, mode, need, program,
    trials,
};
use libtest_mimic::{Arguments, Completion, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if program().is_none() {
        let reason = "no devsplice: cargo build --release -p devsplice, or set DEVSPLICE_BIN";
        let body = move || Ok(Completion::ignored_with(reason));
        let trial = Trial::ignorable_test("everything", body);
        return libtest_mimic::run(&arguments, vec![trial]).exit_code();
    }
    let listing = arguments.list;
    let conclusion = libtest_mimic::run(&arguments, trials(groups()));
    if listing {
        return ExitCode::SUCCESS;
    }
    let rest = libtest_mimic::run(&Arguments::default(), vec![nothing_is_left()]);
    if conclusion.has_failed() { conclusion.exit_code() } else { rest.exit_code() }
}

fn nothing_is_left() -> Trial {
    Trial::test("end::nothing_is_left_behind", || {
        let left = leftovers();
        if left.is_empty() { Ok(()) } else { Err(format!("left: {}", left.join("\n")).into()) }
    })
}

/// The front end that tests use which do not care.
fn home() -> Kind {
    match mode() {
        Mode::Native => Kind::Fuse,
        Mode::Vm => [PATHS[0], PATHS[1], PATHS[2], PATHS[3]]
            .into_iter()
            .map(Kind::Ublk)
            .find(|kind| kind.gate().is_ok())
            .unwrap_or(Kind::Fuse),
    }
}

fn groups() -> Vec<Group> {
    let home = home();
    let mut cli = Group::new("cli", Ok(()));
    // First of all: what hundreds of disks leave in a machine is no part of what one takes.
    reach::add_first(&mut cli, home);
    cli::add(&mut cli, home);
    let mut bad = Group::new("bad", need(is_root(), "needs root"));
    bad::add(&mut bad, home);
    let mut copies = Group::new("copy", need(is_root(), "needs root"));
    if !had("copy") {
        copy::add(&mut copies, home);
    }
    parts::add(&mut copies);
    let mut nbd = Group::new("nbd", Ok(()));
    nbd::add(&mut nbd);
    doors::add(&mut nbd);
    remote::add_copies(&mut nbd);
    matrix::add(&mut nbd);
    let mut tls = Group::new("tls", Ok(()));
    if !had("tls") {
        tls::add(&mut tls);
        psk::add(&mut tls);
    }
    ktls::add(&mut tls, home);
    let mut groups = vec![cli, bad, copies, nbd, tls];
    let fuse = [Kind::Fuse].into_iter().chain(FUSE_PATHS.map(Kind::FuseUring));
    for kind in fuse.chain(PATHS.map(Kind::Ublk)) {
        if mode() == Mode::Native && kind.is_ublk() && kind.gate().is_err() {
            continue;
        }
        let mut group = Group::of(kind);
        verify::add(&mut group, kind);
        if kind == home || matches!(kind, Kind::Fuse | Kind::FuseUring(_)) {
            remote::add(&mut group, kind);
        }
        if kind == Kind::FuseUring(FUSE_PATHS[0]) {
            // No removal by force: Linux 7.3 then ends requests whose pages are still filled, and
            // the memory of whoever tests is overwritten (docs/decisions/014.md).
            groups.push(group);
            continue;
        }
        contract::add(&mut group, kind);
        if kind == Kind::Fuse && kind != home && had("fuse") {
            groups.push(group);
            continue;
        }
        if kind == home || kind == Kind::Fuse {
            life::add(&mut group, kind);
            layers::add(&mut group, kind);
            mirror::add(&mut group, kind);
            manners::add(&mut group, kind);
            luck::add(&mut group, kind);
            protect::add(&mut group, kind);
            ops::add(&mut group, kind);
            many::add_thousand(&mut group, kind);
            if kind == Kind::Fuse {
                stored::add(&mut group, kind);
                kept::add(&mut group, kind);
                blind::add(&mut group, kind);
            }
            if kind == home {
                dialect::add(&mut group, kind);
                if kind.is_ublk() {
                    ublk::add(&mut group);
                    low_depth::add(&mut group);
                }
                many::add(&mut group, kind);
                rpc::add(&mut group, kind);
                adopt::add(&mut group, kind);
                replay::add(&mut group, kind);
            }
        }
        reach::add(&mut group, kind);
        recover::add(&mut group, kind, kind == home);
        zoned::add(&mut group, kind, kind == home);
        groups.push(group);
    }
    let shared = PATHS[..3].iter().copied().map(Kind::Shared);
    for kind in PATHS.into_iter().map(Kind::Batch).chain(shared) {
        if mode() == Mode::Native && kind.gate().is_err() {
            continue;
        }
        // How data moves and how requests come are apart from each other: where time is short every
        // way of data and every way of requests is tried, not each with each.
        let again = [
            Kind::Batch(PATHS[1]),
            Kind::Batch(PATHS[3]),
            Kind::Shared(PATHS[1]),
            Kind::Shared(PATHS[2]),
        ];
        if had("fuse") && again.contains(&kind) {
            continue;
        }
        let mut group = Group::of(kind);
        verify::add(&mut group, kind);
        contract::add(&mut group, kind);
        batch::add(&mut group, kind);
        if kind == Kind::Shared(PATHS[0]) {
            luck::add(&mut group, kind);
        }
        groups.push(group);
    }
    if mode() == Mode::Vm || Kind::ManyAtATime.gate().is_ok() {
        let mut group = Group::of(Kind::ManyAtATime);
        verify::add(&mut group, Kind::ManyAtATime);
        contract::add(&mut group, Kind::ManyAtATime);
        luck::add(&mut group, Kind::ManyAtATime);
        recover::add(&mut group, Kind::ManyAtATime, false);
        groups.push(group);
    }
    if mode() == Mode::Native && Kind::Ublk(PATHS[3]).gate().is_err() {
        let reason = "no ublk here; the VM tests it".to_owned();
        let mut ublk = Group::new("ublk", Err(Skip(reason)));
        verify::add(&mut ublk, Kind::Ublk(PATHS[0]));
        groups.push(ublk);
    }
    groups
}
