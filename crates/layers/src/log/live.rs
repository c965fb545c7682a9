//! Answers for the record of a log: who stands where in it, and writing that out.
//!
//! A place is given under a short lock. What is written out is the entries up to some moment, after
//! a grace that begins later: then the data behind each of them has landed.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devsplice_core::prelude::*;
use devsplice_core::wait::Turn;

use super::format::{self, Entry};
use crate::passes::Passes;

/// Entries that are kept in memory; then writes wait until they are written out.
const MOST_KEPT: usize = 4096;
/// Sectors that only flushes and marks may use.
const RESERVE: u64 = 64;

/// What a request gets.
#[derive(Debug)]
pub(super) enum Taken {
    /// Room for its data.
    Place(u64),
    /// Nothing, and it goes down without: logging has ended.
    Off,
    /// Nothing yet.
    Wait,
    /// Nothing: it fails.
    Never(Errno),
}

#[derive(Default)]
pub(super) struct Log {
    /// Whether a full or broken log is only the end of the log.
    goes_on: bool,
    passes: Passes,
    /// Nothing is given a place any more.
    is_off: AtomicBool,
    /// Nor is anything written out: what is in memory may not be true.
    is_broken: AtomicBool,
    /// What broke it, as the kernel gives it.
    broken_by: AtomicI32,
    record: Mutex<Record>,
    /// Who writes it out.
    writer: Turn,
}

#[derive(Default)]
struct Record {
    sector: u64,
    size: u64,
    /// The empty log is on the device.
    has_begun: bool,
    /// The first byte that is free.
    next: u64,
    /// Not written out yet.
    kept: VecDeque<Entry>,
    given: u64,
    written: u64,
    /// Something found no room; whether that was told.
    is_full: bool,
    is_told: bool,
}

impl Record {
    fn push(&mut self, entry: Entry, data: u64) -> u64 {
        let place = self.next;
        self.next += self.sector + data;
        self.kept.push_back(Entry { place, ..entry });
        self.given += 1;
        place + self.sector
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.next.checked_add(bytes).is_some_and(|end| end <= self.size)
    }
}

impl Log {
    pub(super) fn new(goes_on: bool) -> Log {
        Log { goes_on, ..Log::default() }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, sector: u64, size: u64) {
        let kept = VecDeque::with_capacity(MOST_KEPT + 64);
        *self.record() = Record { sector, size, next: sector, kept, ..Record::default() };
    }

    /// Gives a request its place.
    pub(super) fn take(&self, io: &Io) -> Taken {
        if self.is_off.load(SeqCst) {
            return if self.goes_on { Taken::Off } else { Taken::Never(Errno::EIO) };
        }
        let mut record = self.record();
        if !record.has_begun || record.kept.len() >= MOST_KEPT {
            return Taken::Wait;
        }
        let Extent { at, len } = io.extent;
        let (flags, data) = match io.op {
            Op::Write if io.fua => (format::FUA, len),
            Op::Write => (0, len),
            _ => (format::DISCARD, 0),
        };
        if !record.has_room(data + (1 + RESERVE) * record.sector) {
            record.is_full = true;
            if self.goes_on {
                self.is_off.store(true, SeqCst);
                return Taken::Off;
            }
            return Taken::Never(Errno::ENOSPC);
        }
        Taken::Place(record.push(Entry { at, len, flags, ..Entry::default() }, data))
    }

    /// Where a flush goes: to the disk, once all that it covers is in the log.
    pub(super) fn flush(&self) -> Result<Map, Errno> {
        let has_passed = self.passes.take(&Io::new(Op::Flush, 0, 0));
        match self.is_broken.load(SeqCst) {
            true if !self.goes_on => Err(self.broken_by()),
            is_broken if is_broken || has_passed => Ok(Map::To { len: 0, port: Port(0), at: 0 }),
            _ => Ok(Map::Miss),
        }
    }

    /// Adds an entry that is no request: its number; none where logging has ended or not even that
    /// has room.
    fn note(&self, flags: u64, name: &str) -> Option<u64> {
        let mut record = self.record();
        if self.is_off.load(SeqCst) || !record.has_room(record.sector) {
            return None;
        }
        record.push(Entry { flags, name: name.to_owned(), ..Entry::default() }, 0);
        Some(record.given - 1)
    }

    /// Writes out every entry that was given a place before this call.
    async fn write_out(&self, meta: &dyn Meta) -> Result<(), Errno> {
        let until = self.record().given;
        let _turn = self.writer.take().await;
        if self.is_broken.load(SeqCst) {
            return Err(self.broken_by());
        }
        let (has_begun, sector, is_done) = {
            let record = self.record();
            (record.has_begun, record.sector, record.written >= until)
        };
        if !has_begun {
            meta.write(Port(1), 0, format::super_block(0, sector), true).await?;
            self.record().has_begun = true;
        }
        if is_done {
            return Ok(());
        }
        meta.grace().await?;
        loop {
            let entry = {
                let record = self.record();
                if record.written >= until { None } else { record.kept.front().cloned() }
            };
            let Some(entry) = entry else { break };
            meta.write(Port(1), entry.place, entry.to_bytes(sector), false).await?;
            let mut record = self.record();
            record.kept.pop_front();
            record.written += 1;
        }
        // The super block must not count what is not there yet.
        meta.flush(Port(1)).await?;
        let written = self.record().written;
        meta.write(Port(1), 0, format::super_block(written, sector), true).await
    }

    /// As [`Log::write_out`]; a log that cannot be written has ended.
    async fn save(&self, meta: &dyn Meta) -> Result<(), Errno> {
        let is_news = {
            let mut record = self.record();
            let is_news = record.is_full && !record.is_told;
            record.is_told |= record.is_full;
            is_news
        };
        if is_news {
            let end = if self.goes_on { "logging ends" } else { "writes fail" };
            meta.event(format!("the log is full; {end}"));
        }
        let result = self.write_out(meta).await;
        match result {
            Err(errno) => {
                self.breaks(errno, &format!("the log cannot be written ({errno})"), meta);
                if self.goes_on { Ok(()) } else { Err(errno) }
            }
            Ok(()) => Ok(()),
        }
    }

    fn broken_by(&self) -> Errno {
        Errno::from_result(-self.broken_by.load(SeqCst))
    }

    /// Ends the log where it is: what would follow could not be trusted.
    fn breaks(&self, errno: Errno, why: &str, meta: &dyn Meta) {
        let _ = self.broken_by.compare_exchange(0, errno.raw(), SeqCst, SeqCst);
        self.is_off.store(true, SeqCst);
        if !self.is_broken.swap(true, SeqCst) {
            let written = self.record().written;
            meta.event(format!("{why}; the log ends after {written} entries"));
        }
    }

    async fn mark(&self, name: &str, meta: &dyn Meta) -> Result<Result<String, String>, Errno> {
        let longest = format::longest_name(self.record().sector);
        if name.is_empty() || name.len() > longest || name.contains('\0') {
            return Ok(Err(format!("a mark has a name of 1 to {longest} bytes")));
        }
        let Some(number) = self.note(format::MARK, name) else {
            return Ok(Err("logging has ended".to_owned()));
        };
        self.save(meta).await?;
        Ok(match self.is_broken.load(SeqCst) {
            true => Err("logging has ended".to_owned()),
            false => Ok(format!("mark {name} is entry {number}")),
        })
    }
}

impl Live for Log {
    fn resolve(self: Arc<Self>, io: Io, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            if io.op != Op::Flush {
                return self.save(&*meta).await;
            }
            // Before the grace, so that no write that it must cover can stand behind it.
            let _ = self.note(format::FLUSH, "");
            self.save(&*meta).await?;
            self.passes.give(io);
            Ok(())
        })
    }

    fn failed(self: Arc<Self>, io: Io, port: Port, errno: Errno, meta: Rc<dyn Meta>) -> Slow {
        if io.op.changes() && !self.is_off.load(SeqCst) {
            self.breaks(errno, &format!("a {} failed below ({errno})", io.op.name()), &*meta);
        }
        let sees_to_it = port == Port(1) && self.goes_on;
        Box::pin(std::future::ready(if sees_to_it { Ok(()) } else { Err(errno) }))
    }

    fn sees_to_failures(&self) -> bool {
        true
    }

    fn stop(self: Arc<Self>, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            match self.is_broken.load(SeqCst) {
                true => Ok(()),
                false => self.save(&*meta).await,
            }
        })
    }

    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        meta: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        Box::pin(async move {
            match &words[..] {
                [mark, name] if mark == "mark" => self.mark(name, &*meta).await,
                _ => Ok(Err("commands: mark NAME".to_owned())),
            }
        })
    }

    fn status(&self) -> Vec<(&'static str, Value)> {
        let state = match (self.is_broken.load(SeqCst), self.is_off.load(SeqCst)) {
            (true, _) => "broken",
            (false, true) => "full",
            (false, false) => "on",
        };
        let record = self.record();
        vec![
            ("logging", Value::Text(state.to_owned())),
            ("entries", Value::Number(record.given)),
            ("written_out", Value::Number(record.written)),
            ("bytes_used", Value::Number(record.next)),
            ("bytes", Value::Number(record.size)),
        ]
    }
}
