//! Answers for what fits neither a layer nor a backend: `rawring FILE` is a front end of its own,
//! over raw operations on the ring. It takes requests from its standard input, a socket or a pipe:
//! an operation (`r`, `w` or `f`) and seven bytes of nothing, then position and length as two
//! little-endian 64-bit numbers, then the data of a write. It answers on its standard output: a
//! byte, 0 or the error's number, then the data of a read.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use devsplice_core::StackBuilder;
use devsplice_core::prelude::*;
use devsplice_engine::{
    Completion, Export, FileId, Inbox, Lane, Request, Rest, Served, Shared, Worker,
};
use devsplice_uring::{Config, FileKind, LaneMemory, RingFile, Uring};

/// Bytes of a request's front.
const FRONT: usize = 24;
/// Most bytes of data.
const MOST: u64 = 1 << 20;
/// What the two steps of the one tag are called; the low half must be the tag, 0.
const READING: u32 = 0;
const ANSWERING: u32 = 1 << 16;

/// One tag: a request is read, served, answered, and only then the next one is read.
struct Pipe {
    from: FileId,
    to: FileId,
    lane: u16,
    /// Bytes of the request, or of its answer, that have gone through.
    done: usize,
    /// Bytes of the answer.
    due: usize,
    closed: bool,
}

impl Pipe {
    /// Asks for the rest of what is `want` bytes long. The data begins on a page of its own, so
    /// that direct I/O takes it; the front lies right before it.
    fn read(&mut self, ring: &mut Uring, want: usize) {
        let at = Uring::DATA_AT - FRONT + self.done;
        ring.read((self.lane, READING), self.from, u64::MAX, (at, want - self.done));
    }

    fn answer(&mut self, ring: &mut Uring) {
        let at = Uring::DATA_AT - 1 + self.done;
        ring.write((self.lane, ANSWERING), self.to, u64::MAX, (at, self.due - self.done));
    }

    /// What the front says, and how long the whole request is.
    fn parse(front: &[u8]) -> Option<(Io, usize)> {
        let number = |at: usize| Some(u64::from_le_bytes(front.get(at..at + 8)?.try_into().ok()?));
        let (at, len) = (number(8)?, number(16)?);
        let op = match front.first()? {
            b'r' => Op::Read,
            b'w' => Op::Write,
            b'f' => return Some((Io::new(Op::Flush, 0, 0), FRONT)),
            _ => return None,
        };
        let data = if op == Op::Write { usize::try_from(len).ok()? } else { 0 };
        (len <= MOST).then_some((Io::new(op, at, len), FRONT + data))
    }
}

impl Export<Uring> for Pipe {
    fn depth(&self) -> u16 {
        1
    }

    fn arm(&mut self, ring: &mut Uring, lane: u16) -> Result<()> {
        self.lane = lane;
        self.read(ring, FRONT);
        Ok(())
    }

    fn event(&mut self, ring: &mut Uring, got: Completion, inbox: &mut Inbox) -> Result<()> {
        let Ok(count @ 1..) = usize::try_from(got.result) else {
            // The end, or an error that nobody can be told of.
            self.closed = true;
            return Ok(());
        };
        self.done += count;
        if got.index == ANSWERING {
            if self.done < self.due {
                self.answer(ring);
            } else {
                self.done = 0;
                self.read(ring, FRONT);
            }
            return Ok(());
        }
        if self.done < FRONT {
            self.read(ring, FRONT);
            return Ok(());
        }
        let lane = self.lane;
        let front = &ring.memory(lane, 0)[Uring::DATA_AT - FRONT..Uring::DATA_AT];
        match Pipe::parse(front) {
            None => self.closed = true,
            Some((_, whole)) if self.done < whole => self.read(ring, whole),
            Some((io, _)) => {
                let pages = ring.memory_pages(lane, 0);
                inbox.push(lane, Request { tag: 0, io, pages });
            }
        }
        Ok(())
    }

    fn finish(&mut self, ring: &mut Uring, _: u16, io: &Io, result: Result<(), Errno>) {
        let data = if io.op == Op::Read && result.is_ok() { io.extent.len } else { 0 };
        let status = result.err().map_or(0, |errno| errno.raw().to_le_bytes()[0]);
        ring.memory(self.lane, 0)[Uring::DATA_AT - 1] = status;
        self.done = 0;
        self.due = 1 + usize::try_from(data).unwrap_or(0);
        self.answer(ring);
    }

    fn is_closed(&self) -> bool {
        self.closed
    }

    fn flush(&mut self, _: &mut Uring) {}

    fn rest(&mut self, _: &mut Uring) -> Rest {
        Rest::Now
    }
}

fn main() -> Result<()> {
    let os = |error: std::io::Error| Error::os("rawring", &error);
    let path = std::env::args().nth(1).ok_or_else(|| Error::invalid("usage", "rawring FILE"))?;
    let file = std::fs::File::options().read(true).write(true).open(path).map_err(os)?;
    let size = file.metadata().map_err(os)?.len();
    let mut builder = StackBuilder::new();
    let (root, _) =
        builder.backend("file", Limits { volatile_cache: true, ..Limits::ideal(size) })?;
    let memory = LaneMemory { depth: 1, bytes: 1 << 20, slots: false, locked: false };
    let mut ring = Uring::new(&Config { flights: 4, files: 3, lanes: vec![memory], inner: 0 })?;
    let mut add = |fd: OwnedFd, kind| ring.add_file(RingFile { fd, kind });
    let file = add(file.into(), FileKind::Regular)?;
    let from = add(std::io::stdin().as_fd().try_clone_to_owned().map_err(os)?, FileKind::Other)?;
    let to = add(std::io::stdout().as_fd().try_clone_to_owned().map_err(os)?, FileKind::Other)?;
    let pipe = Pipe { from, to, lane: 0, done: 0, due: 0, closed: false };
    let served = Served::quietly(Arc::new(builder.finish(root)));
    let lane = Lane::new(Box::new(pipe), served, vec![file].into());
    let stuck = (30, Box::new(|stuck: &_| eprintln!("rawring: {stuck:?}")) as _);
    let mut worker = Worker::new(ring, vec![lane], 4, Arc::new(Shared::default()), stuck);
    worker.arm()?;
    worker.run()
}
