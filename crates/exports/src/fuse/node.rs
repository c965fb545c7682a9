//! Answers for the one file: its name, size and attributes, and which requests become I/O.

use devsplice_core::{Errno, Io, Limits, Op};
use devsplice_uring::Uring;

use super::wire::{
    Ask, Attr, AttrOut, Body, ENOSYS, EntryOut, Head, InitOut, MAJOR, MINOR, MINOR_MIN, OpenOut,
    ROOT, StatFsOut, init, open,
};

/// Most bytes of one read or write: 256 pages, what kernels allow without being told otherwise
/// (sysctl fs.fuse.max_pages_limit; a lower one makes requests smaller, by the kernel's own doing).
pub const MAX_WRITE: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Asynchronous direct I/O, all that a loop device sends, counts as background: this is the real
/// queue depth. Twice what a loop device has out, as a request beyond `MAX_WRITE` is cut.
const MAX_BACKGROUND: u16 = 512;
const FILE: u64 = 2;
const S_IFDIR: u32 = 0o40_000;
const S_IFREG: u32 = 0o100_000;
/// Seconds for which names and attributes hold: for good, as nothing changes them.
const FOREVER: u64 = u32::MAX as u64;

/// The file as the kernel sees it.
#[derive(Clone, Debug)]
pub struct Node {
    name: String,
    size: u64,
    block: u32,
    /// What a loop device takes for its granularity of discard.
    grain: u32,
    read_only: bool,
    /// Whether there is anything to flush.
    cached: bool,
    /// Whether the stack takes discards.
    holes: bool,
    /// Whether a hole that reads as zeros is had without writing these.
    cheap: bool,
    wish: Wish,
}

/// How requests are to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// Read from /dev/fuse.
    #[default]
    Read,
    /// By io_uring, data in memory of ours.
    Entries,
    /// By io_uring, data where it is.
    Slots,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// Replied to as it is.
    Reply(Result<Body, Errno>),
    /// To be carried out, then replied to.
    Request(Io),
    /// No reply is expected.
    Nothing,
}

impl Node {
    /// A file of that name for a device with these limits.
    #[must_use]
    pub fn new(name: &str, limits: &Limits, read_only: bool) -> Node {
        Node {
            name: name.to_owned(),
            size: limits.size,
            block: limits.block,
            grain: limits.discard.max(4096),
            read_only: read_only || limits.read_only,
            cached: limits.volatile_cache,
            holes: limits.discard != 0,
            cheap: limits.fast_zeroes,
            wish: Wish::Read,
        }
    }

    /// The same, with requests coming in another way.
    #[must_use]
    pub fn wishing(mut self, wish: Wish) -> Node {
        self.wish = wish;
        self
    }

    /// All that the kernel was told of the file, or has learned of it and remembers. What holes
    /// cost is nothing of that: it asks again each time.
    #[must_use]
    pub fn told(&self) -> String {
        let Node { size, block, grain, read_only, cached, holes, .. } = self;
        format!(
            "size {size}, block {block}, grain {grain}, read-only {read_only}, cache {cached}, \
             holes {holes}"
        )
    }

    /// Decides what becomes of a request. Ranges are left to the stack to check, except where a
    /// file's rules are not a device's.
    #[must_use]
    pub fn answer(&self, head: Head, ask: &Ask<'_>) -> Answer {
        let reply = match *ask {
            Ask::Init { major, minor, max_readahead, flags } => {
                greet((major, minor), max_readahead, flags, self.wish)
            }
            Ask::Lookup { name } if head.node == ROOT && name == self.name.as_bytes() => {
                let entry_valid = FOREVER;
                let attr = self.attr(FILE);
                let (node, attr_valid) = (FILE, FOREVER);
                Ok(Body::of(&EntryOut {
                    node,
                    entry_valid,
                    attr_valid,
                    attr,
                    ..Default::default()
                }))
            }
            Ask::Lookup { .. } => Err(Errno::ENOENT),
            Ask::SetAttr { size: Some(size) } if size != self.size => Err(Errno::EINVAL),
            Ask::GetAttr | Ask::SetAttr { .. } => {
                let attr = self.attr(head.node);
                Ok(Body::of(&AttrOut { valid: FOREVER, attr, ..Default::default() }))
            }
            Ask::Open if head.node == FILE => {
                let flags = open::DIRECT_IO | open::PARALLEL_DIRECT_WRITES | open::NO_FLUSH;
                let flags =
                    flags | if self.wish == Wish::Slots { open::IO_URING_ZERO_COPY } else { 0 };
                Ok(Body::of(&OpenOut { flags, ..Default::default() }))
            }
            Ask::StatFs => Ok(Body::of(&self.figures())),
            Ask::Quiet => Ok(Body::EMPTY),
            Ask::Silent => return Answer::Nothing,
            _ if head.node != FILE => Err(Errno::EIO),
            _ => return self.io(ask),
        };
        Answer::Reply(reply)
    }

    /// The requests that touch data.
    fn io(&self, ask: &Ask<'_>) -> Answer {
        let refuse = |errno| Answer::Reply(Err(errno));
        match *ask {
            // A file ends where it ends: a read across it is short, one behind it is empty.
            Ask::Read { at, .. } if at >= self.size => Answer::Reply(Ok(Body::EMPTY)),
            Ask::Read { at, len } if len <= MAX_WRITE => {
                let len = u64::from(len).min(self.size - at);
                Answer::Request(Io::new(Op::Read, at, len))
            }
            Ask::Write { .. } | Ask::Zero { .. } if self.read_only => refuse(Errno::EROFS),
            Ask::Write { at, len } if len <= MAX_WRITE => {
                Answer::Request(Io::new(Op::Write, at, u64::from(len)))
            }
            // Without a cache below, every write that was completed is durable. The kernel
            // remembers this answer and does not ask again.
            Ask::Sync if !self.cached => refuse(ENOSYS),
            Ask::Sync => Answer::Request(Io::new(Op::Flush, 0, 0)),
            // A loop device punches for discards, and for zeroing that may give room back
            // (drivers/block/loop.c, `do_req_filebacked`): it is not said which, so zeros must be
            // what is read then. Where these are written, a trim of free space would fill it. Who
            // is refused and wants zeros writes them (block/blk-lib.c, `blkdev_issue_zeroout`).
            Ask::Zero { unmap: true, .. } if !(self.holes && self.cheap) => {
                refuse(Errno::EOPNOTSUPP)
            }
            Ask::Zero { at, len, unmap } => {
                Answer::Request(Io::new(Op::WriteZeroes { unmap }, at, len))
            }
            _ => refuse(Errno::EIO),
        }
    }

    fn attr(&self, node: u64) -> Attr {
        if node == ROOT {
            return Attr { ino: ROOT, mode: S_IFDIR | 0o700, nlink: 2, ..Default::default() };
        }
        Attr {
            ino: FILE,
            size: self.size,
            blocks: self.size / 512,
            mode: S_IFREG | if self.read_only { 0o400 } else { 0o600 },
            nlink: 1,
            block: self.block,
            ..Default::default()
        }
    }

    fn figures(&self) -> StatFsOut {
        StatFsOut {
            blocks: self.size / u64::from(self.grain),
            files: 1,
            block: self.grain,
            fragment: self.grain,
            name_len: 255,
            ..Default::default()
        }
    }
}

fn greet(version: (u32, u32), max_readahead: u32, offered: u64, wish: Wish) -> Result<Body, Errno> {
    let (major, minor) = version;
    if major > MAJOR {
        // The kernel asks again in our version.
        return Ok(Body::of(&InitOut { major: MAJOR, minor: MINOR, ..Default::default() }));
    }
    let wanted = init::ASYNC_READ
        | init::BIG_WRITES
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::MAX_PAGES;
    if major < MAJOR || minor < MINOR_MIN || offered & u64::from(wanted) != u64::from(wanted) {
        return Err(Errno::EOPNOTSUPP);
    }
    // What was not offered is not asked for: it is found out and dealt with before requests come.
    let by_uring = wish != Wish::Read && offered & init::OVER_IO_URING != 0;
    let (ext, flags2) = if by_uring { (init::EXT, init::OVER_IO_URING >> 32) } else { (0, 0) };
    Ok(Body::of(&InitOut {
        major: MAJOR,
        minor: MINOR.min(minor),
        max_readahead,
        flags: wanted | ext,
        flags2: u32::try_from(flags2).unwrap_or(0),
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND / 4 * 3,
        // The size of a buffer in the pool, too.
        max_write: if wish == Wish::Slots { Uring::fuse_stride(MAX_WRITE) } else { MAX_WRITE },
        time_gran: 1,
        max_pages: MAX_PAGES,
        ..Default::default()
    }))
}
