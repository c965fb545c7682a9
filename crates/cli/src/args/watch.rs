//! Answers for the command line of what looks at disks and changes nothing.

use clap::{Args, ValueEnum};

use super::{Export, PathChoice};

#[derive(Args, Clone, Debug)]
pub struct Metrics {
    /// Serve them over HTTP at this address, such as 127.0.0.1:9765, until the process is ended.
    #[arg(long, value_name = "ADDR", conflicts_with = "textfile")]
    pub listen: Option<String>,
    /// Write them to a file, for node_exporter's textfile collector.
    #[arg(long, value_name = "PATH")]
    pub textfile: Option<std::path::PathBuf>,
}

/// `--sort` of `top`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SortChoice {
    /// From A on.
    Name,
    /// Most reads and writes a second first.
    Iops,
    /// Most bytes a second first.
    Throughput,
    /// Most requests in flight first.
    Queue,
    /// Longest time of a request first.
    Wait,
    /// Most errors first.
    Errors,
}

#[derive(Args, Clone, Debug)]
pub struct Top {
    /// Seconds between two looks.
    #[arg(long, short = 'd', value_name = "SECONDS", default_value_t = 1.0)]
    pub delay: f64,
    /// How many times to look.
    #[arg(long, short = 'n', value_name = "N")]
    pub count: Option<u64>,
    /// What comes first.
    #[arg(long, short = 's', value_enum, default_value = "iops")]
    pub sort: SortChoice,
    /// Look once, over one interval, and print that.
    #[arg(long)]
    pub once: bool,
    /// Print a table each time rather than draw on the terminal.
    #[arg(long, short = 'b')]
    pub batch: bool,
    /// Print a line of JSON each time.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct UdevInfo {
    /// A node of a whole disk, such as /dev/ublkb0.
    pub device: String,
    /// Only whose it is, of a node of ublk that a user without privileges has made.
    #[arg(long)]
    pub owner: bool,
}

/// `--op` of `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OpChoice {
    /// Pages are filled.
    Read,
    /// Pages are drained.
    Write,
    /// Room is given back.
    Discard,
    /// A range is zeroed.
    WriteZeroes,
    /// Everything is made durable.
    Flush,
}

#[derive(Args, Clone, Debug)]
pub struct Explain {
    /// A stack, or the name of a disk that is served.
    pub stack: String,
    /// As for add.
    #[arg(long, value_enum, default_value = "auto")]
    pub export: Export,
    /// As for add.
    #[arg(long, value_enum, default_value = "auto")]
    pub data_path: PathChoice,
    /// What the request asks for.
    #[arg(long, value_enum, default_value = "write")]
    pub op: OpChoice,
    /// Its first byte.
    #[arg(long, value_name = "SIZE", default_value = "0",
        value_parser = devsplice_core::size::parse_size)]
    pub at: u64,
    /// Its length [default: 256k, or what the disk has].
    #[arg(long, value_name = "SIZE", value_parser = devsplice_core::size::parse_size)]
    pub len: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}
