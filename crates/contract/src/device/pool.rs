//! Answers for many requests at a time from outside: threads that each carry out one, blocking.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devsplice_core::{Errno, Extent, Op};
use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::{ReadWriteFlags, preadv2, pwritev2};

use crate::content::POISON;
use crate::target::{Ask, Done};

/// How a device is asked.
#[derive(Clone, Copy)]
pub(super) struct How {
    pub(super) is_block: bool,
    /// What memory must be aligned to, at most a page.
    pub(super) align: usize,
    /// Whether it may go away while it is used: its size is 0 then, and a transfer ends early.
    pub(super) may_go: bool,
}

/// What a thread found: which request, and what came of it.
type News = (usize, Result<Done, String>);
type Work = (usize, Ask);

/// Threads over one device.
pub(super) struct Pool {
    /// Until the pool ends.
    work: Option<mpsc::Sender<Work>>,
    news: mpsc::Receiver<News>,
    patience: Duration,
    threads: Vec<JoinHandle<()>>,
    /// A request was not finished, so a thread may never end.
    is_stuck: bool,
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.work = None;
        if !self.is_stuck {
            for thread in self.threads.drain(..) {
                // One that panicked has said so.
                let _ = thread.join();
            }
        }
    }
}

impl Pool {
    /// So many threads for each descriptor. They end with the pool; one that is stuck in the kernel
    /// is left behind.
    pub(super) fn new(files: Vec<Arc<File>>, depth: usize, how: How, patience: Duration) -> Pool {
        let (work, queue) = mpsc::channel::<Work>();
        let (tell, news) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut threads = Vec::new();
        for file in files {
            for _ in 0..depth {
                let (file, queue, tell) = (Arc::clone(&file), Arc::clone(&queue), tell.clone());
                threads.push(std::thread::spawn(move || {
                    loop {
                        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok((place, ask)) = next else { return };
                        if tell.send((place, carry_out(&file, &ask, how))).is_err() {
                            return;
                        }
                    }
                }));
            }
        }
        Pool { work: Some(work), news, patience, threads, is_stuck: false }
    }

    pub(super) fn run(&mut self, asks: &[Ask]) -> Result<Vec<Done>, String> {
        for (place, ask) in asks.iter().enumerate() {
            let sent = self.work.as_ref().map(|work| work.send((place, *ask)));
            sent.and_then(Result::ok).ok_or("no thread is left")?;
        }
        let mut dones: Vec<Option<Done>> = vec![None; asks.len()];
        let end = Instant::now() + self.patience;
        for _ in 0..asks.len() {
            let left = end.saturating_duration_since(Instant::now());
            let Ok((place, done)) = self.news.recv_timeout(left) else {
                self.is_stuck = true;
                let missing = asks.iter().zip(&dones).find(|(_, done)| done.is_none());
                let ask = missing.map(|(ask, _)| ask.to_string()).unwrap_or_default();
                return Err(format!("asked: {ask}; not finished in {:?}", self.patience));
            };
            dones[place] = Some(done?);
        }
        Ok(dones.into_iter().flatten().collect())
    }
}

/// Carries out one request; an error is a result that no device may give.
fn carry_out(file: &File, ask: &Ask, how: How) -> Result<Done, String> {
    let none = |result| Ok(Done { result, bytes: Vec::new() });
    let errno = |errno: rustix::io::Errno| Errno::from_result(-errno.raw_os_error());
    let Extent { at, len } = ask.io.extent;
    match ask.io.op {
        Op::Read | Op::Write => transfer(file, ask, how),
        Op::Flush => none(fdatasync(file).map_err(errno)),
        Op::Discard if how.is_block => {
            let done = devsplice_uring::blockctl::discard(file.as_fd(), at, len);
            none(match done.map_err(Errno::from) {
                // Nothing was dropped, which it may always choose: a loop device learns only from
                // the first discard that there is none below.
                Err(Errno::EOPNOTSUPP) => Ok(()),
                other => other,
            })
        }
        Op::Discard => none(punch(file, at, len).map_err(errno)),
        Op::WriteZeroes { unmap } => {
            let punched = if unmap { punch(file, at, len) } else { Err(rustix::io::Errno::NOTSUP) };
            none(match punched {
                Err(rustix::io::Errno::NOTSUP) => {
                    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                    fallocate(file, flags, at, len).map_err(errno)
                }
                other => other.map_err(errno),
            })
        }
        Op::Reset | Op::Finish => none(Err(Errno::EOPNOTSUPP)),
    }
}

fn punch(file: &File, at: u64, len: u64) -> rustix::io::Result<()> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len)
}

/// One system call for the whole request: what it does is what the device did.
fn transfer(file: &File, ask: &Ask, how: How) -> Result<Done, String> {
    const PAGE: usize = 4096;
    let len = usize::try_from(ask.io.extent.len).map_err(|_| "too long")?;
    let mut room = vec![POISON; len + 2 * PAGE];
    // Any alignment that the device takes, now this one, now that.
    let steps = PAGE / how.align.max(512);
    let skew = usize::try_from(ask.stamp).unwrap_or(0) % steps * how.align.max(512);
    let start = room.as_ptr().align_offset(PAGE) + skew;
    let memory = &mut room[start..start + len];
    let at = ask.io.extent.at;
    let is_read = ask.io.op == Op::Read;
    if !is_read {
        memory.copy_from_slice(&ask.bytes());
    }
    let flags = if ask.io.fua { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
    let done = loop {
        let done = if is_read {
            preadv2(file, &mut [IoSliceMut::new(memory)], at, flags)
        } else {
            pwritev2(file, &[IoSlice::new(memory)], at, flags)
        };
        if done != Err(rustix::io::Errno::INTR) {
            break done;
        }
    };
    match done {
        Ok(count) if count == len => {
            let bytes = if is_read { memory.to_vec() } else { Vec::new() };
            Ok(Done { result: Ok(()), bytes })
        }
        Ok(_) if how.may_go => Ok(Done { result: Err(Errno::ENODEV), bytes: Vec::new() }),
        Ok(count) => Err(format!("asked: {ask}; came: {count} bytes")),
        Err(errno) => {
            let result = Err(Errno::from_result(-errno.raw_os_error()));
            Ok(Done { result, bytes: Vec::new() })
        }
    }
}
