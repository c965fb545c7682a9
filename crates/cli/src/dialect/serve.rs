//! Answers for the server of a device that was made under another tool's name: a process of its
//! own, which ends when the device is stopped and leaves it to be deleted.

use std::io::{BufRead, BufReader, PipeWriter, Write};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::threads::Service;
use devsplice_exports::ublk::{Control, Device, Fit, Shared, Suspended};
use devsplice_spec::Plan;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::wish::Wish;
use super::{Tool, list, record};
use crate::args::{Export, PathChoice};
use crate::assemble::{CATALOG, assemble};
use crate::{front, protect, sandbox, server};

/// Makes a device as `wish` says, and prints it as `tool` does.
///
/// # Errors
/// Whatever stands in the way; nothing is left behind then.
pub fn add(wish: &Wish, tool: Tool) -> Result<ExitCode> {
    let plan = Plan::parse(&wish.stack()?, &CATALOG)?;
    if wish.is_foreground {
        let made = make(wish, &plan)?;
        show(made.device.id(), tool)?;
        return Ok(serve(made));
    }
    let os = |error| Error::os("server process", &error);
    let (reader, writer) = std::io::pipe().map_err(os)?;
    match fork::fork().map_err(os)? {
        fork::Fork::Parent(_) => {
            drop(writer);
            show(told(BufReader::new(reader))?, tool).map(|()| ExitCode::SUCCESS)
        }
        fork::Fork::Child => {
            drop(reader);
            let _ = rustix::process::setsid();
            background(wish, &plan, writer)
        }
    }
}

/// A device that is served.
struct Made {
    device: Device,
    /// The memory that it shares with clients.
    _shared: Option<Shared>,
    /// The signals that stop and delete it.
    signals: Option<Signals>,
}

fn make(wish: &Wish, plan: &Plan) -> Result<Made> {
    protect::server();
    front::choose(Export::Ublk, PathChoice::Auto)?;
    // Their tests make several devices of one file.
    let (stack, bottoms) = assemble(plan, Access::Share)?.into_parts();
    let (options, extra) = (wish.options(), wish.extra());
    // One that is to kill itself must be able to.
    sandbox::process(match extra.dies_fetching {
        true => sandbox::Choice::Off,
        false => sandbox::Choice::On,
    });
    let service = Service {
        stack,
        bottoms,
        pool: None,
        on_stuck: Arc::new(|_| {}),
        on_event: Arc::new(|text| eprintln!("ublk: {text}")),
        on_death: |error| {
            eprintln!("ublk: {error}; the device is dead");
            std::process::exit(1);
        },
    };
    let signals = wish.more.ends_with_signal.then(|| Signals::new([SIGINT, SIGTERM]));
    let signals = signals.transpose().map_err(|error| Error::os("signal handlers", &error))?;
    let device = if let Some(id) = wish.id.filter(|_| wish.more.is_recovery) {
        let suspended = Suspended::find_with(id, &options, extra)?;
        suspended.resume(service, Fit::Same).map_err(|(_, error)| error)?
    } else {
        wish.clear_integrity()?;
        Device::attach_with(&options, extra, service, &mut |_| ())?
    };
    let shared = wish.shared_file.as_ref();
    let shared = shared.map(|(path, only_read)| {
        Control::open().and_then(|mut control| control.share(device.id(), path, *only_read))
    });
    match shared.transpose() {
        Ok(shared) => {
            record::keep(device.id(), &wish.words);
            Ok(Made { device, _shared: shared, signals })
        }
        Err(error) => {
            let _ = device.detach();
            Err(error)
        }
    }
}

/// The server's process: reports how its start went, then serves.
fn background(wish: &Wish, plan: &Plan, mut status: PipeWriter) -> Result<ExitCode> {
    let made = make(wish, plan).and_then(|made| {
        // The current directory of a daemon must keep no file system busy. Files are open by now.
        let _ = std::env::set_current_dir("/");
        // Who started it may wait for the end of what it printed to.
        server::silence(None).map(|()| made)
    });
    let report = match &made {
        Ok(made) => format!("{}\n", made.device.id()),
        Err(error) => format!("{error}\n"),
    };
    let _ = status.write_all(report.as_bytes());
    drop(status);
    Ok(made.map_or(ExitCode::from(1), serve))
}

/// Serves until the device is stopped, or a signal stops it. The process's end is what lets it be
/// deleted by others.
fn serve(made: Made) -> ExitCode {
    let Made { device, _shared, signals } = made;
    let (news, ends) = mpsc::channel();
    let over = news.clone();
    device.crew().at_end(Box::new(move || {
        let _ = over.send(End::Stopped);
    }));
    if let Some(mut signals) = signals {
        std::thread::spawn(move || {
            for _ in signals.forever() {
                let _ = news.send(End::Signal);
            }
        });
    }
    match ends.recv() {
        Ok(End::Signal) => {
            let id = device.id();
            if let Err(error) = device.detach() {
                eprintln!("ublk: {error}");
                return ExitCode::from(1);
            }
            record::forget(id);
            ExitCode::SUCCESS
        }
        Ok(End::Stopped) | Err(_) => ExitCode::SUCCESS,
    }
}

/// Why a server ends.
enum End {
    /// Its device was stopped.
    Stopped,
    /// It was told to stop it.
    Signal,
}

/// The device's number as its server reports it, or why there is none.
fn told(mut status: impl BufRead) -> Result<u32> {
    let mut line = String::new();
    let read = status.read_line(&mut line);
    line.trim_end().parse().map_err(|_| {
        let reason = match (read, line.trim_end()) {
            (Err(error), _) => error.to_string(),
            (Ok(_), "") => "ended without a word".to_owned(),
            (Ok(_), said) => said.to_owned(),
        };
        Error::new(ErrorKind::Os, "no device", reason)
    })
}

fn show(id: u32, tool: Tool) -> Result<()> {
    list::print(&Control::open()?.look(id)?, tool);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_report_is_a_number_or_a_reason() {
        assert_eq!(told(&b"7\n"[..]).unwrap(), 7);
        let error = told(&b"/a: is in use\n"[..]).unwrap_err();
        assert!(error.to_string().contains("/a: is in use"), "{error}");
        assert!(told(&b""[..]).unwrap_err().to_string().contains("without a word"));
    }
}
