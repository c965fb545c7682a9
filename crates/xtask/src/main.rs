//! `cargo xtask`: everything a developer runs around the code, in Rust and from this repository.

mod apt;
mod deps;
mod kernel;
mod proc;
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
    Vm(vm::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = proc::watch_signals().and_then(|()| match cli.command {
        Command::Vm(options) => vm::run(&options),
    });
    match done {
        Ok(code) => ExitCode::from(code),
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::from(proc::interrupted().map_or(vm::RC_NO_VM, |signal| 128 + signal))
        }
    }
}
