//! Answers for the command line of what reads and writes stacks without a disk.

use clap::{Args, ValueEnum};

/// How many requests a command makes at a time.
#[derive(Args, Clone, Copy, Debug)]
pub struct Requests {
    /// I/O threads [default: one per CPU, at most 4].
    #[arg(long, short = 'T', value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: Option<u16>,
    /// Requests in flight per thread [default: 8; 2 where all data lies in files in memory].
    #[arg(long, short = 'R', value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub requests: Option<u16>,
    /// Bytes of a request: 4k to 32M.
    #[arg(long, value_name = "SIZE", default_value = "256k",
        value_parser = devsplice_core::size::parse_size)]
    pub request_size: u64,
}

/// How a command tells how far it is.
#[derive(Args, Clone, Copy, Debug)]
pub struct Progress {
    /// Show a progress bar; with =FD, write N/100 lines to this file descriptor instead.
    #[arg(long, short = 'p', value_name = "FD", num_args = 0..=1, require_equals = true)]
    #[allow(clippy::option_option)] // Not given, given, given with a number.
    pub progress: Option<Option<u32>>,
}

#[derive(Args, Clone, Debug)]
pub struct Copy {
    /// What is copied: a stack, a device, a file, or the name of a disk that is served. It is only
    /// read; nobody else may write it meanwhile.
    pub from: String,
    /// Where to: likewise, at least as large. A plain file that is not there is made.
    pub to: String,
    #[command(flatten)]
    pub load: Requests,
    #[command(flatten)]
    pub progress: Progress,
    /// Ranges of so many bytes that hold zeros become holes where the target can have them; 0 for
    /// only those that are holes in the source.
    #[arg(long, short = 'S', value_name = "SIZE", default_value = "4k",
        value_parser = devsplice_core::size::parse_size)]
    pub sparse: u64,
    /// Write zeros as data, so that the target has room for all of it.
    #[arg(long)]
    pub allocated: bool,
    /// The target is zeros already: do not write any.
    #[arg(long, visible_alias = "target-is-zero")]
    pub destination_is_zero: bool,
    /// Keep in this file how far the target is safe; where it is there, go on from there. It is
    /// removed at the end.
    #[arg(long, value_name = "FILE")]
    pub resume: Option<std::path::PathBuf>,
    /// Read both again afterwards and compare.
    #[arg(long)]
    pub verify: bool,
    /// Print what was done as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Compare {
    /// A stack, a device, a file, or the name of a disk that is served.
    pub one: String,
    /// Likewise.
    pub other: String,
    #[command(flatten)]
    pub load: Requests,
    #[command(flatten)]
    pub progress: Progress,
    /// Other sizes are a difference, even if what one has more is zeros.
    #[arg(long, short = 's')]
    pub strict: bool,
    /// Print the outcome as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Map {
    /// A stack, a device, a file, or the name of a disk that is served.
    pub stack: String,
    /// Only the sums.
    #[arg(long)]
    pub totals: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `--rw` of `bench`, as fio says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RwChoice {
    /// In order.
    Read,
    /// In order.
    Write,
    /// Anywhere.
    Randread,
    /// Anywhere.
    Randwrite,
}

#[derive(Args, Clone, Debug)]
pub struct Bench {
    /// A stack, a device, a file, or the name of a disk that is served.
    pub stack: String,
    /// What is done.
    #[arg(long, value_enum, default_value = "randread")]
    pub rw: RwChoice,
    /// Bytes of a request.
    #[arg(long, value_name = "SIZE", default_value = "4k",
        value_parser = devsplice_core::size::parse_size)]
    pub bs: u64,
    /// Requests in flight per thread.
    #[arg(long, value_name = "N", default_value_t = 32,
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub iodepth: u16,
    /// I/O threads.
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: u16,
    /// How long.
    #[arg(long, value_name = "SECONDS", default_value_t = 5,
        value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub runtime: u64,
    /// Writes overwrite what is there; say so.
    #[arg(long)]
    pub destroy: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}
