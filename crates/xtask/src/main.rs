//! `cargo xtask`: everything a developer runs around the code, in Rust and from this repository.
#![forbid(unsafe_code)]

mod apt;
mod bench;
mod conformance;
mod contract;
mod deb;
mod demo;
mod deps;
mod kernel;
mod proc;
mod replay;
mod sim;
mod testrun;
mod tidy;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What a step of this tool answers: a value, or a sentence that names the thing, the reason and
/// the next step.
type Fallible<T> = Result<T, String>;

/// The developer's tools of devsplice.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(bench::Options),
    Conformance(conformance::Options),
    Contract(contract::Options),
    Deb(deb::Options),
    Demo(demo::Options),
    Replay(replay::Options),
    Sim(sim::Options),
    Vm(vm::Options),
    Test(testrun::Options),
    /// Check the style rules that no compiler checks.
    Tidy,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let failure = if matches!(cli.command, Command::Vm(_)) { vm::RC_NO_VM } else { 1 };
    let done = proc::watch_signals().and_then(|()| match cli.command {
        Command::Bench(options) => bench::run(&options),
        Command::Conformance(options) => conformance::run(&options),
        Command::Contract(options) => contract::run(&options),
        Command::Deb(options) => deb::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Replay(options) => replay::run(&options).map(|()| 0),
        Command::Sim(options) => sim::run(&options),
        Command::Vm(options) => vm::run(&options),
        Command::Test(options) => testrun::run(&options),
        Command::Tidy => tidy::run().map(|findings| u8::from(findings > 0)),
    });
    match done {
        Ok(code) => ExitCode::from(code),
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::from(proc::interrupted().map_or(failure, |signal| 128 + signal))
        }
    }
}
