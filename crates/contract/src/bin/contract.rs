//! Answers for the contract from the command line: is this disk one that keeps its promises?

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use devsplice_contract::device::{Subject, suite};
use devsplice_core::size::parse_size;

/// Test whether a block device or a file keeps the promises that every disk makes: what was written
/// is there, whatever else goes on. What it held is LOST.
#[derive(Parser)]
#[command(name = "contract")]
struct Arguments {
    /// The block device or file
    path: PathBuf,
    /// Overwrite what it holds; without this nothing is done
    #[arg(long)]
    destroy: bool,
    /// Programs that use it at the same time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Requests in flight of each
    #[arg(long, default_value_t = 16)]
    depth: usize,
    /// Bytes from its start that are used
    #[arg(long, default_value = "16M", value_parser = parse_size)]
    size: u64,
    /// Random requests follow from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds after which requests count as never finished
    #[arg(long, default_value_t = 60)]
    patience: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let path = arguments.path.display();
    if !arguments.destroy {
        eprintln!("contract: {path}: its first {} bytes would be lost", arguments.size);
        eprintln!("contract: add --destroy if that is what you want");
        return ExitCode::from(2);
    }
    let subject = Subject::new(&arguments.path)
        .load(arguments.jobs, arguments.depth)
        .span(arguments.size)
        .seed(arguments.seed)
        .patience(Duration::from_secs(arguments.patience));
    let report = suite(&subject).run();
    println!("{report}");
    ExitCode::from(u8::from(!report.is_kept()))
}
