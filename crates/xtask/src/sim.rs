//! Answers for the simulator's command: it builds the program and hands the arguments on.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;

use clap::Args;

use crate::{Fallible, proc};

/// Run the engine in simulated worlds: disks that lie and die, faults, crashes, all from seeds.
///
/// Arguments are the simulator's own, such as `--seeds N`, `--start SEED` and, to run one again,
/// `--seed SEED --trace`; `cargo xtask sim -- --help` lists them.
#[derive(Args)]
pub struct Options {
    /// For the simulator
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    pub arguments: Vec<OsString>,
}

/// Runs the simulator and returns its exit code; a run that a panic aborted has failed.
pub fn run(options: &Options) -> Fallible<u8> {
    let mut cargo = proc::tied("cargo");
    cargo.current_dir(crate::tidy::workspace()?);
    cargo.args(["run", "--quiet", "--release", "-p", "devsplice-sim", "--bin", "sim", "--"]);
    let status = proc::Guard::spawn(cargo.args(&options.arguments))?.wait()?;
    let ended = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ended.unwrap_or_else(|| u8::from(status.signal().is_some())))
}
