//! Answers for the command line of servers of many disks, and of what concerns all disks.

use clap::Args;

use crate::sandbox::Choice;

#[derive(Args, Clone, Debug)]
pub struct Serve {
    /// What to call it (letters, digits, . _ -).
    #[arg(default_value = "main")]
    pub name: String,
    /// I/O threads, for all disks together [default: one per CPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Make the disks of this configuration (devsplice save).
    #[arg(long, value_name = "FILE")]
    pub config: Option<std::path::PathBuf>,
    /// Whether the server is kept from doing what no server has to do, its I/O threads from nearly
    /// everything [default: on].
    #[arg(long, value_name = "CHOICE")]
    pub sandbox: Option<Choice>,
    /// Serve from this process, until a signal; messages go to standard error.
    #[arg(long, short = 'f')]
    pub foreground: bool,
    /// Print what was started as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Events {
    /// Only of this disk; until it is gone.
    pub name: Option<String>,
    /// Print a line of JSON for each.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Save {
    /// The file to write; standard output if not given.
    pub file: Option<std::path::PathBuf>,
    /// Only the disks of this server of many.
    #[arg(long, value_name = "NAME")]
    pub server: Option<String>,
}

#[derive(Args, Clone, Debug)]
pub struct Load {
    /// The configuration, as save writes it; - for standard input.
    pub file: std::path::PathBuf,
    /// Have this server of many disks serve them, whatever the configuration says.
    #[arg(long, value_name = "NAME")]
    pub server: Option<String>,
    /// Print what was done as JSON.
    #[arg(long)]
    pub json: bool,
}
