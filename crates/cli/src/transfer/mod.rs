//! Answers for commands that read and write stacks themselves, without making a disk of them.

pub mod bench;
pub mod compare;
pub mod copy;
mod identity;
pub mod map;
mod progress;
mod resume;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Limits, Op, Result, Stack};
use devsplice_exports::local::{Failure, Side, Size};
use devsplice_exports::threads::Bottom;
use devsplice_spec::{Kind, Plan};
use devsplice_uring::{Uring, is_in_memory};

use crate::args::Requests;
use crate::assemble::{CATALOG, assemble};
use crate::state;

/// A request's least and most bytes.
const REQUEST_SIZES: std::ops::RangeInclusive<u64> = 4096..=32 << 20;
/// Threads where nobody says how many.
const MOST_THREADS: usize = 4;
/// Requests in flight on each thread, where nobody says how many.
const REQUESTS: u16 = 8;
/// The same where the thread moves all data itself: more of them are only more memory, and what is
/// read is out of the CPU's cache before it is written.
const REQUESTS_IN_PLACE: u16 = 2;

/// A stack that is open.
pub struct Open {
    /// As the user named it.
    pub name: String,
    stack: Arc<Stack>,
    bottoms: Vec<Bottom>,
    warnings: Vec<String>,
}

impl Open {
    /// Opens what a user has named: a disk that is served, or a stack.
    ///
    /// # Errors
    /// If it is neither, or something below cannot be opened so.
    pub fn new(name: &str, access: Access) -> Result<Open> {
        Open::of(name, &plan(name)?, access)
    }

    /// As `new`, from its plan.
    ///
    /// # Errors
    /// If something below cannot be opened so.
    pub fn of(name: &str, plan: &Plan, access: Access) -> Result<Open> {
        let assembled = assemble(plan, access)?;
        let warnings = assembled.warnings();
        let (stack, bottoms) = assembled.into_parts();
        Ok(Open { name: name.to_owned(), stack, bottoms, warnings })
    }

    /// What it can do.
    pub fn limits(&self) -> &Limits {
        self.stack.limits()
    }

    /// Says what is not as one would wish.
    pub fn warn(&self) {
        self.warnings.iter().for_each(|warning| eprintln!("devsplice: {warning}"));
    }

    /// Threads that may ask it.
    pub fn most_threads(&self) -> u16 {
        self.bottoms.iter().map(Bottom::most_rings).min().unwrap_or(u16::MAX)
    }

    /// Whether all of it lies in files in memory.
    pub fn is_in_memory(&self) -> bool {
        self.bottoms.iter().all(|bottom| match bottom {
            Bottom::File { fd, .. } => is_in_memory(fd),
            Bottom::Bytes(_) | Bottom::Remote(_) => false,
        })
    }

    /// To be asked.
    pub fn into_side(self) -> Side {
        Side::new(self.stack, self.bottoms)
    }

    /// Refuses zones where something is to be written: what keeps them in order is asked by front
    /// ends that know of them, and writes from here would go past it, over what is written.
    ///
    /// # Errors
    /// If it has any.
    pub fn refuse_zones(&self, what: &str) -> Result<()> {
        if self.stack.zones().is_none() {
            return Ok(());
        }
        let reason = format!("has zones, which {what} does not write");
        Err(Error::new(ErrorKind::Unsupported, &self.name, reason)
            .next("devsplice add it over ublk, and write to the disk"))
    }
}

/// The plan of what a user has named: a disk that is served, a stack, or, as these are commands on
/// files, a file by its mere name.
pub fn plan(name: &str) -> Result<Plan> {
    if let Ok(found) = state::find(name)
        && found.alive
    {
        // Through its device, as any other program: its server has what is below.
        return Plan::load(&found.disk.device, &CATALOG);
    }
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte);
    let is_file = name.bytes().all(is_word)
        && !name.ends_with(".toml")
        && !CATALOG.layers.iter().any(|driver| driver.name == name)
        && !CATALOG.sources.iter().any(|source| source.name == name);
    if is_file { Plan::load(&format!("./{name}"), &CATALOG) } else { Plan::load(name, &CATALOG) }
}

/// The path of the plain file that a plan is of, if it is nothing else and is not there.
pub fn missing_file(plan: &Plan) -> Option<&str> {
    let [place] = plan.places.as_slice() else { return None };
    match place.kind {
        Kind::Source(source) if source.name == "file" => {}
        _ => return None,
    }
    place.args.text("path").filter(|path| !Path::new(path).exists())
}

/// How many threads, and what each of them does between these.
///
/// # Errors
/// If a request would be too small, too large or off the blocks.
pub fn sizes(load: &Requests, align: u64, between: [&Open; 2]) -> Result<(u16, Size)> {
    let bytes = load.request_size;
    if !REQUEST_SIZES.contains(&bytes) || !bytes.is_multiple_of(align) {
        let reason = format!("{bytes} is not 4k to 32M in blocks of {align}");
        return Err(Error::invalid("--request-size", reason));
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = load.threads.unwrap_or(u16::try_from(cpus.min(MOST_THREADS)).unwrap_or(1));
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    let is_in_place =
        load.request_size <= Uring::MOST_IN_PLACE && between.into_iter().all(Open::is_in_memory);
    let usual = if is_in_place { REQUESTS_IN_PLACE } else { REQUESTS };
    Ok((threads, Size { depth: load.requests.unwrap_or(usual), bytes }))
}

/// What a failed request means to the user.
pub fn explain(failure: &Failure, names: [&str; 2]) -> Error {
    let Failure { side, io, errno } = failure;
    let name = names.get(usize::from(*side)).copied().unwrap_or("?");
    let reason = match io.op {
        Op::Flush => format!("flush failed: {errno}"),
        op => {
            format!("{} of {} bytes at {} failed: {errno}", op.name(), io.extent.len, io.extent.at)
        }
    };
    Error::new(ErrorKind::Os, name, reason)
}

/// A flag that SIGINT, SIGTERM or SIGHUP sets: one for the whole command, so that none is lost
/// between two steps of it. The second such signal ends the process.
///
/// # Errors
/// If the handlers cannot be set.
pub fn interrupted() -> Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    static FLAG: Mutex<Option<Arc<AtomicBool>>> = Mutex::new(None);
    let mut kept = FLAG.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(flag) = &*kept {
        return Ok(Arc::clone(flag));
    }
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&flag))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
            .map_err(|error| Error::os("signals", &error))?;
    }
    *kept = Some(Arc::clone(&flag));
    Ok(flag)
}

/// Does `work` on another thread, and `meanwhile` from time to time, before it and after it, with
/// whether to stop.
///
/// # Errors
/// As `work`; or if there is no thread to be had.
pub fn attend<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
    meanwhile: impl FnMut(bool),
) -> Result<T> {
    attend_to(&*interrupted()?, work, meanwhile)
}

fn attend_to<T: Send + 'static>(
    stop: &AtomicBool,
    work: impl FnOnce() -> Result<T> + Send + 'static,
    mut meanwhile: impl FnMut(bool),
) -> Result<T> {
    const LOOK: std::time::Duration = std::time::Duration::from_millis(100);
    // What came between two steps of a command.
    meanwhile(stop.load(SeqCst));
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("work".to_owned())
        .spawn(move || tell.send(work()))
        .map_err(|error| Error::os("a thread", &error))?;
    loop {
        match told.recv_timeout(LOOK) {
            Ok(done) => {
                meanwhile(stop.load(SeqCst));
                return done;
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => meanwhile(stop.load(SeqCst)),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::new(ErrorKind::Os, "a thread", "ended early"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_requests_are_in_flight_where_the_thread_moves_all_itself() {
        let path = std::env::temp_dir().join(format!("devsplice-sizes.{}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let open = |name: &str| Open::new(name, Access::Read).unwrap();
        let (memory, disk) = (open("mem(1M)"), open(path.to_str().unwrap()));
        std::fs::remove_file(&path).unwrap();
        let depth = |requests, request_size, between| {
            let load = Requests { threads: None, requests, request_size };
            sizes(&load, 4096, between).unwrap().1.depth
        };
        assert!(memory.is_in_memory());
        assert_eq!(depth(None, 256 << 10, [&memory, &memory]), REQUESTS_IN_PLACE);
        assert_eq!(depth(Some(5), 256 << 10, [&memory, &memory]), 5);
        assert_eq!(depth(None, 1 << 20, [&memory, &memory]), REQUESTS);
        let usual = if disk.is_in_memory() { REQUESTS_IN_PLACE } else { REQUESTS };
        assert_eq!(depth(None, 256 << 10, [&memory, &disk]), usual);
    }

    #[test]
    fn what_interrupts_before_or_at_the_very_end_is_heard() {
        let stop = Arc::new(AtomicBool::new(false));
        let (set, mut heard) = (Arc::clone(&stop), Vec::new());
        let work = move || {
            set.store(true, SeqCst);
            Ok(7)
        };
        assert_eq!(attend_to(&stop, work, |stop| heard.push(stop)).unwrap(), 7);
        assert_eq!(heard, [false, true]);
        // It is for what follows, too.
        heard.clear();
        attend_to(&stop, || Ok(()), |stop| heard.push(stop)).unwrap();
        assert_eq!(heard, [true; 2]);
    }
}
