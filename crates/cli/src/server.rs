//! Answers for a process that serves disks, one of its own or many: start-up, then what happens
//! until nothing is left to serve.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::fuse;
use devsplice_exports::threads::Pool;
use devsplice_spec::Plan;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGCHLD, SIGHUP};

use crate::args::{Add, Export, PathChoice};
use crate::front;
use crate::guard::Guard;
use crate::hall::{Hall, UNGUARDED};
use crate::hosted::{Hosted, Wish};
use crate::listen::{Ears, News};
use crate::notify;
use crate::rpc::After;
use crate::sandbox;
use crate::servers::Seat;
use crate::state::{self, Claim, Disk};

/// Files that a server of many disks would like to be able to have open: each disk takes about ten.
const FILES: u64 = 1 << 20;

/// A server with its surroundings.
pub struct Server {
    hall: Arc<Hall>,
    guard: Guard,
    news: Receiver<News>,
    /// If it is for many.
    seat: Option<Seat>,
    log: PathBuf,
}

impl Server {
    /// A server of one disk, which it makes. On an error everything is cleaned up, the guard
    /// dismissed.
    ///
    /// # Errors
    /// Whatever stands in the way.
    pub fn start(add: &Add, plan: &Plan, choice: (Export, String), guard: Guard) -> Result<Server> {
        let claim = match Claim::take(add.name.as_deref()) {
            Ok(claim) => claim,
            Err(error) => {
                guard.dismiss();
                return Err(error);
            }
        };
        let wish = Wish { add, plan, choice };
        Server::alone(claim, guard, "added", |claim, hall, ready| match ready {
            Ok(()) => Hosted::begin(wish, claim, hall.line()),
            Err(error) => {
                claim.remove();
                Err(error)
            }
        })
    }

    /// Serves a disk again whose server is gone. `left` is what that one wrote of it, `claim` the
    /// right to it, `kept` what keeps it over FUSE; `why` is the event.
    ///
    /// # Errors
    /// If it cannot be taken over; the disk is then as it was, and so is what is known of it.
    pub fn take_over(
        claim: Claim,
        left: &Disk,
        guard: Guard,
        kept: Option<fuse::Kept>,
        why: &str,
    ) -> Result<Server> {
        Server::alone(claim, guard, why, |claim, hall, ready| {
            ready.and_then(|()| Hosted::take_over(claim, left, kept, hall.line()))
        })
    }

    /// Has a disk that a person has quiesced stay so, in place of a server that is gone.
    ///
    /// # Errors
    /// As [`Server::take_over`].
    pub fn stay_held(
        claim: Claim,
        left: &Disk,
        guard: Guard,
        kept: Option<fuse::Kept>,
    ) -> Result<Server> {
        Server::alone(claim, guard, "quiesced", |claim, hall, ready| {
            ready.and_then(|()| Hosted::stay_held(claim, left, kept, hall.line()))
        })
    }

    /// Serves a disk that another tool has made, as if a server of ours had: `disk` is what that
    /// one would have written.
    ///
    /// # Errors
    /// If it cannot be taken over; it is as it was then.
    pub fn adopt(claim: Claim, disk: &Disk, guard: Guard) -> Result<Server> {
        Server::alone(claim, guard, "adopted", |claim, hall, ready| match ready {
            Ok(()) => Hosted::adopt(claim, disk, hall.line()),
            Err(error) => {
                claim.remove();
                Err(error)
            }
        })
    }

    /// A server of the one disk that `make` makes.
    fn alone(
        claim: Claim,
        mut guard: Guard,
        why: &str,
        make: impl FnOnce(Claim, &Hall, Result<()>) -> Result<Hosted>,
    ) -> Result<Server> {
        guard.name(&claim.name);
        let (socket, log) = (state::path(&claim.name, "sock"), state::path(&claim.name, "log"));
        if log.is_symlink() {
            // It was one of many before.
            let _ = std::fs::remove_file(&log);
        }
        let (out, news) = channel();
        let hall = Arc::new(Hall::new(None, Some(guard.voice()), out.clone()));
        let (ears, ready) = match Ears::open(&socket) {
            Ok(ears) => (Some(ears), Ok(())),
            Err(error) => (None, Err(error)),
        };
        match make(claim, &hall, ready) {
            Ok(hosted) => {
                hosted.line.tell(why, &format!("{} is {}", hosted.thing(), hosted.disk.stack));
                notify::ready(&hosted.disk.device, guard.pid());
                hall.insert(hosted);
                if let Some(ears) = ears {
                    ears.listen(&hall, &out);
                }
                Ok(Server { hall, guard, news, seat: None, log })
            }
            Err(error) => {
                guard.give_up();
                Err(error)
            }
        }
    }

    /// A server of many disks, which has none yet, as its seat says that it is to be.
    ///
    /// # Errors
    /// If its threads or its socket cannot be had; the guard is dismissed then.
    pub fn of_many(mut seat: Seat, mut guard: Guard) -> Result<Server> {
        let name = seat.about.name.clone();
        guard.name(&format!("@{name}"));
        let more_files = Rlimit { current: Some(FILES), maximum: Some(FILES) };
        if setrlimit(Resource::Nofile, more_files).is_err() {
            let most = getrlimit(Resource::Nofile).maximum;
            let _ = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
        }
        // Whether there is ublk is asked again for each disk, but no module can be loaded any more
        // by who is shut in.
        let _ = front::choose(Export::Auto, PathChoice::Auto);
        sandbox::process(seat.about.sandbox);
        let made = (|| {
            let pool = Pool::start(seat.about.threads)?;
            let ears = Ears::open(&state::server_file(&name, "sock"))?;
            seat.about.pid = std::process::id();
            seat.about.threads = pool.thread_count();
            seat.about.started_ms = state::now_ms();
            seat.write()?;
            Ok((pool, ears))
        })();
        let (pool, ears) = match made {
            Ok(made) => made,
            Err(error) => {
                guard.dismiss();
                return Err(error);
            }
        };
        let (out, news) = channel();
        let log = state::server_file(&name, "log");
        let hall = Arc::new(Hall::new(Some((name, pool)), None, out.clone()));
        ears.listen(&hall, &out);
        notify::ready(
            &state::server_file(&seat.about.name, "sock").display().to_string(),
            guard.pid(),
        );
        Ok(Server { hall, guard, news, seat: Some(seat), log })
    }

    /// Its disks.
    pub fn hall(&self) -> &Arc<Hall> {
        &self.hall
    }

    /// I/O threads that its disks share; 0 if each has its own.
    pub fn threads(&self) -> usize {
        self.hall.common.pool.as_ref().map_or(0, |pool| pool.thread_count())
    }

    /// Where it writes what it has to say.
    pub fn log(&self) -> &std::path::Path {
        &self.log
    }

    /// The disk of a server of one.
    ///
    /// # Errors
    /// If it is gone already.
    pub fn disk(&self) -> Result<Disk> {
        self.hall.with(None, |hosted| Ok(hosted.disk().clone()))
    }

    /// Serves until there is nothing to serve, or it is told to stop.
    ///
    /// # Errors
    /// If a disk could not be removed in the end. The guard tries again when this process has let
    /// go of everything.
    pub fn run(self) -> Result<()> {
        // It may have died before its end was a signal here.
        self.mind_guard();
        loop {
            match notify::recv(&self.news) {
                Ok(News::Signal(SIGHUP)) => continue,
                Ok(News::Signal(SIGCHLD)) => {
                    self.mind_guard();
                    continue;
                }
                Ok(News::Signal(_) | News::Asked(After::End)) | Err(_) => break,
                Ok(News::Asked(After::HandedOver)) => {
                    self.guard.hand_over();
                    return Ok(());
                }
                Ok(News::Ended(name, crew)) => {
                    match self.hall.ended(&name, crew) {
                        // Somebody has asked for that, whose answer is not out yet.
                        Ok(false) => continue,
                        Ok(true) => {}
                        Err(error) => eprintln!("devsplice: {error}"),
                    }
                }
                Ok(News::Asked(_)) => {}
            }
            if self.seat.is_some() {
                continue;
            }
            if self.hall.is_empty() {
                break;
            }
            if let Some(thing) = self.hall.broken() {
                return Err(Error::new(ErrorKind::Busy, thing, "could not be removed"));
            }
        }
        self.close()
    }

    /// Where the guard has ended, which has no other child beside it, nobody waits for this
    /// process's end but whoever has started it: systemd is to watch this one.
    fn mind_guard(&self) {
        if self.hall.common.is_unguarded() || !self.guard.has_died() {
            return;
        }
        eprintln!("devsplice: its guard (process {}) has died; {UNGUARDED}", self.guard.pid());
        self.hall.common.lose_guard(&self.hall.names());
        notify::unguarded();
    }

    /// Removes all disks, and the traces of the server.
    fn close(self) -> Result<()> {
        notify::stopping();
        self.hall.close()?;
        if let Some(seat) = self.seat {
            seat.remove();
        }
        self.guard.dismiss();
        Ok(())
    }
}

/// Lets go of the terminal: standard input and output become /dev/null, standard error goes to
/// `log`, or nowhere.
///
/// # Errors
/// If /dev/null or the log cannot be opened.
pub fn silence(log: Option<&std::path::Path>) -> Result<()> {
    let open = |path: &std::path::Path, flags| {
        rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Error::os(path.display().to_string(), &errno.into()))
    };
    let null = open(std::path::Path::new("/dev/null"), OFlags::RDWR)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND;
    let log = log.map(|log| open(log, flags)).transpose()?;
    let failed =
        |errno: rustix::io::Errno| Error::new(ErrorKind::Os, "standard streams", errno.to_string());
    rustix::stdio::dup2_stdin(&null).map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(failed)?;
    rustix::stdio::dup2_stderr(log.as_ref().unwrap_or(&null)).map_err(failed)
}
