//! Answers for the contract's command: it builds the program and hands the arguments on.

use std::ffi::OsString;

use clap::Args;

use crate::{Fallible, proc};

/// Test whether a disk keeps the promises that every disk makes. What it holds is lost.
///
/// Arguments are the program's own: `cargo xtask contract /dev/ublkb0 --destroy`;
/// `cargo xtask contract -- --help` lists them.
#[derive(Args)]
pub struct Options {
    /// For the program
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    pub arguments: Vec<OsString>,
}

/// Runs it and returns its exit code.
pub fn run(options: &Options) -> Fallible<u8> {
    let mut cargo = proc::tied("cargo");
    cargo.current_dir(crate::tidy::workspace()?);
    cargo.args(["run", "--quiet", "-p", "devsplice-contract", "--bin", "contract", "--"]);
    let status = proc::Guard::spawn(cargo.args(&options.arguments))?.wait()?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}
