//! Answers for `devsplice add`: checks what can be checked at once, starts the server, tells how
//! that went.

use std::io::Write;
use std::process::ExitCode;

use devsplice_core::size::show_size;
use devsplice_core::{Error, Result};
use devsplice_spec::Plan;

use crate::args::{Add, Export};
use crate::assemble::CATALOG;
use crate::launch::launch;
use crate::server::Server;
use crate::state::Disk;
use crate::{front, guard, protect, say, state};

/// Makes a disk.
///
/// # Errors
/// Whatever stands in the way; nothing is left behind then.
pub fn run(add: &Add) -> Result<ExitCode> {
    if let Some(name) = &add.name {
        state::check_name(name)?;
    }
    let here = std::env::current_dir().map_err(|error| Error::os("current directory", &error))?;
    let plan = Plan::load(&add.stack, &CATALOG)?.anchored(&here)?;
    if add.foreground {
        protect::server();
        let server = start(add, &plan)?;
        show(add, server.disk());
        return server.run().map(|()| ExitCode::SUCCESS);
    }
    let started = launch(|| Ok((start(add, &plan)?, None)))?;
    show(add, &started.disk);
    Ok(ExitCode::SUCCESS)
}

fn start(add: &Add, plan: &Plan) -> Result<Server> {
    // An address to listen at says what kind of disk is wanted.
    let is_nbd = add.export == Export::Nbd || !add.listen.is_empty();
    let choice = match is_nbd {
        true => front::nbd(add)?,
        false => front::choose(add.export, add.data_path)?,
    };
    let guard = guard::start()?;
    Server::start(add, plan, choice, guard)
}

/// The node on standard output, for scripts; the rest on standard error.
fn show(add: &Add, disk: &Disk) {
    for warning in &disk.warnings {
        eprintln!("devsplice: note: {warning}");
    }
    if add.json {
        say!("{}", serde_json::to_string_pretty(&disk.shown()).unwrap_or_default());
        return;
    }
    say!("{}", disk.device);
    let about = format!(
        "{}: {} over {} ({}), data path {}; devsplice info {} says more\n",
        disk.name,
        show_size(disk.size),
        disk.export,
        disk.why,
        disk.data_path,
        disk.name
    );
    let _ = std::io::stderr().write_all(about.as_bytes());
}
