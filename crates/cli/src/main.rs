//! Answers for the command `devsplice`: parses, dispatches, turns errors into exit codes.
#![forbid(unsafe_code)]

/// Prints to standard error, for all modules below, in place of the one that panics if it cannot:
/// a log on a full file system must not end a server, nor a guard.
macro_rules! eprintln {
    ($($arg:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}

mod add;
mod adopt;
mod args;
mod assemble;
mod client;
mod config;
mod del;
mod dialect;
mod doctor;
mod events;
mod explain;
mod features;
mod follow;
mod format;
mod front;
mod gc;
mod guard;
mod hall;
mod hold;
mod hosted;
mod info;
mod keeper;
mod launch;
mod list;
mod listen;
mod methods;
mod metrics;
mod notify;
mod papers;
mod passed;
mod protect;
mod recover;
mod rpc;
mod sandbox;
mod serve;
mod server;
mod servers;
mod state;
mod tell;
mod top;
mod transfer;
mod udev;

use std::process::ExitCode;

use clap::Parser;
use devsplice_core::Result;

use args::{Command, Options};

fn main() -> ExitCode {
    abort_on_panic();
    // Before anything is opened.
    devsplice_backends::nbd::note_what_is_given();
    passed::take();
    if let Some(code) = dialect::run() {
        return code;
    }
    let options = Options::parse();
    match run(&options.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("devsplice: {error}");
            ExitCode::from(1)
        }
    }
}

fn run(command: &Command) -> Result<ExitCode> {
    let done = |()| ExitCode::SUCCESS;
    match command {
        Command::Add(add) => add::run(add),
        Command::Serve(serve) => serve::run(serve).map(done),
        Command::Events(events) => follow::run(events).map(done),
        Command::Save(save) => config::run_save(save).map(done),
        Command::Load(load) => config::run_load(load).map(done),
        Command::Recover(recover) => recover::recover(recover).map(done),
        Command::Adopt(adopt) => adopt::run(adopt).map(done),
        Command::Upgrade(upgrade) => recover::upgrade(upgrade).map(done),
        Command::Quiesce(quiesce) => hold::plain(&quiesce.name, "quiesce").map(done),
        Command::Resume(resume) => hold::plain(&resume.name, "resume").map(done),
        Command::Swap(swap) => hold::swap(swap).map(done),
        Command::Resize(resize) => hold::resize(resize).map(done),
        Command::Del(del) => del::run(del).map(done),
        Command::List(list) => list::run(list).map(done),
        Command::Info(info) => info::run(info).map(done),
        Command::Tell(tell) => tell::run(tell).map(done),
        Command::Format(format) => format::run(format).map(done),
        Command::Explain(explain) => explain::run(explain).map(done),
        Command::Copy(copy) => transfer::copy::run(copy),
        Command::Compare(compare) => Ok(transfer::compare::run(compare)),
        Command::Map(map) => transfer::map::run(map).map(done),
        Command::Bench(bench) => transfer::bench::run(bench).map(done),
        Command::Features(features) => features::run(features).map(done),
        Command::Doctor(doctor) => doctor::run(doctor),
        Command::Gc(gc) => gc::run(gc).map(done),
        Command::Metrics(metrics) => metrics::run(metrics).map(done),
        Command::Top(top) => top::run(top).map(done),
        Command::UdevInfo(info) => udev::run(info).map(done),
        Command::Man(man) => papers::man(man).map(done),
        Command::Completions(completions) => papers::completions(completions).map(done),
    }
}

/// A thread that panics and lives on would leave its queue unserved: in every build a panic ends
/// the process, and the guard cleans up.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// Prints to standard output; a reader that has gone is no error.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}
