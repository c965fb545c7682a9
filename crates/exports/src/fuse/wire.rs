//! Answers for the FUSE protocol as far as one file needs it: bytes in, [`Ask`] out; no I/O.
//!
//! Layouts and numbers: include/uapi/linux/fuse.h, protocol 7.46. Host byte order; every length is
//! checked against what arrived. Reserved fields are named `_` and a letter.

use devsplice_core::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol that we speak.
pub const MAJOR: u32 = 7;
/// What is known here; the kernel's is used when it is lower.
pub const MINOR: u32 = 46;
/// The oldest that works: `FUSE_MAX_PAGES`, and the full `fuse_init_out`.
pub const MINOR_MIN: u32 = 28;
/// The root directory.
pub const ROOT: u64 = 1;
/// Bytes of header before a write's data.
pub const WRITE_HEADER: usize = size_of::<InHeader>() + size_of::<ReadWriteIn>();
/// Bytes of header before a reply's data.
pub const OUT_HEADER: usize = size_of::<OutHeader>();
/// The longest reply without its header, data of reads not counted.
pub const BODY_MAX: usize = size_of::<EntryOut>();

/// `FUSE_NOTIFY_RESEND`: in place of an error, with 0 for the request's number.
pub const NOTIFY_RESEND: i32 = 7;

/// `ENOSYS`: the kernel does not ask for the operation again.
pub const ENOSYS: Errno = Errno::from_result(-38);

macro_rules! wire_structs {
    ($($(#[$doc:meta])* $name:ident, $size:literal { $($field:ident: $type:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default)]
        #[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $name { $(pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    )* };
}

wire_structs! {
    /// `struct fuse_in_header`.
    InHeader, 40 {
        len: u32, opcode: u32, unique: u64, node: u64, uid: u32, gid: u32, pid: u32,
        extension_len: u16, _a: u16,
    }
    /// `struct fuse_out_header`.
    OutHeader, 16 { len: u32, error: i32, unique: u64 }
    /// The front of `struct fuse_init_in` that every minor since 7.6 has.
    InitIn, 16 { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    /// What may stand behind it, with [`init::EXT`].
    InitMore, 4 { flags2: u32 }
    /// `struct fuse_init_out`.
    InitOut, 64 {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, max_stack_depth: u32, request_timeout: u16, _a: [u16; 11],
    }
    /// `struct fuse_attr`.
    Attr, 88 {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atime_ns: u32,
        mtime_ns: u32, ctime_ns: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32,
        block: u32, flags: u32,
    }
    /// `struct fuse_entry_out`.
    EntryOut, 128 {
        node: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_ns: u32,
        attr_valid_ns: u32, attr: Attr,
    }
    /// `struct fuse_attr_out`.
    AttrOut, 104 { valid: u64, valid_ns: u32, _a: u32, attr: Attr }
    /// The front of `struct fuse_setattr_in`.
    SetAttrIn, 24 { valid: u32, _a: u32, handle: u64, size: u64 }
    /// `struct fuse_open_out`.
    OpenOut, 16 { handle: u64, flags: u32, backing: i32 }
    /// `struct fuse_read_in` and `struct fuse_write_in`, which have one layout.
    ReadWriteIn, 40 {
        handle: u64, at: u64, len: u32, how: u32, lock_owner: u64, flags: u32, _a: u32,
    }
    /// `struct fuse_write_out`.
    WriteOut, 8 { len: u32, _a: u32 }
    /// `struct fuse_fallocate_in`.
    FallocateIn, 32 { handle: u64, at: u64, len: u64, mode: u32, _a: u32 }
    /// `struct fuse_statfs_out`.
    StatFsOut, 80 {
        blocks: u64, free: u64, available: u64, files: u64, files_free: u64, block: u32,
        name_len: u32, fragment: u32, _a: [u32; 7],
    }
}

/// `FUSE_*` flags of the handshake.
pub mod init {
    #![allow(missing_docs)]
    pub const ASYNC_READ: u32 = 1;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const EXT: u32 = 1 << 30;
    /// `FUSE_HAS_RESEND` and `FUSE_OVER_IO_URING`, of the flags' second word.
    pub const HAS_RESEND: u64 = 1 << 39;
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// `FOPEN_*` flags of an open file.
pub mod open {
    #![allow(missing_docs)]
    pub const DIRECT_IO: u32 = 1;
    pub const NO_FLUSH: u32 = 1 << 5;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    pub const IO_URING_ZERO_COPY: u32 = 1 << 8;
}

/// `FALLOC_FL_KEEP_SIZE` (include/uapi/linux/falloc.h).
const KEEP_SIZE: u32 = 1;
const PUNCH_HOLE: u32 = 2;
const ZERO_RANGE: u32 = 16;
const FATTR_SIZE: u32 = 1 << 3;

/// What the kernel asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Ask<'a> {
    /// The handshake; the flags' second word above the first.
    Init { major: u32, minor: u32, max_readahead: u32, flags: u64 },
    /// Which file has this name?
    Lookup { name: &'a [u8] },
    /// A file's attributes.
    GetAttr,
    /// Changes attributes, perhaps the size.
    SetAttr { size: Option<u64> },
    /// Opens a file.
    Open,
    /// Reads.
    Read { at: u64, len: u32 },
    /// Writes what follows the headers.
    Write { at: u64, len: u32 },
    /// Makes completed writes durable.
    Sync,
    /// Makes a range read as zeros; with `unmap`, room may be given back.
    Zero { at: u64, len: u64, unmap: bool },
    /// The file system's figures.
    StatFs,
    /// Something that needs no more than "done".
    Quiet,
    /// Something that takes no answer at all.
    Silent,
}

/// Who asks, and about what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The request's number, which the reply repeats.
    pub unique: u64,
    /// The file.
    pub node: u64,
}

/// What the kernel sent is no request at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// Takes one request apart. `bytes` are exactly those that arrived. What can be answered, but not
/// with anything else, is the inner error.
///
/// # Errors
/// [`Broken`] without a whole header that tells the true length.
pub fn parse(bytes: &[u8]) -> Result<(Head, Result<Ask<'_>, Errno>), Broken> {
    let (header, body) = InHeader::read_from_prefix(bytes).map_err(|_| Broken)?;
    let head = Head { unique: header.unique, node: header.node };
    if usize::try_from(header.len) != Ok(bytes.len()) {
        return Err(Broken);
    }
    // Extensions lie at the end; none was negotiated, and none is looked at.
    let extensions = usize::from(header.extension_len) * 8;
    let Some(len) = body.len().checked_sub(extensions) else {
        return Ok((head, Err(Errno::EIO)));
    };
    Ok((head, ask(header.opcode, &body[..len])))
}

/// Takes a request apart that came with its parts apart: its header, that of its operation, and how
/// many bytes of payload. `payload` are those bytes, but may be empty where nobody looks at
/// them ([`is_named`]).
///
/// # Errors
/// As [`parse`].
pub fn parse_apart<'a>(
    header: &[u8],
    operation: &'a [u8],
    (payload, len): (&'a [u8], u32),
) -> Result<(Head, Result<Ask<'a>, Errno>), Broken> {
    let (header, _) = InHeader::read_from_prefix(header).map_err(|_| Broken)?;
    let head = Head { unique: header.unique, node: header.node };
    let asked = match header.opcode {
        LOOKUP => ask(LOOKUP, payload),
        WRITE => take(operation).and_then(|ReadWriteIn { at, len: all, .. }| {
            if all == len { Ok(Ask::Write { at, len }) } else { Err(Errno::EIO) }
        }),
        opcode => ask(opcode, operation),
    };
    Ok((head, asked))
}

/// Whether the request of this header has a payload that has to be looked at.
#[must_use]
pub fn is_named(header: &[u8]) -> bool {
    InHeader::read_from_prefix(header).is_ok_and(|(header, _)| header.opcode == LOOKUP)
}

const LOOKUP: u32 = 1;
const WRITE: u32 = 16;

fn take<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<T, Errno> {
    T::read_from_prefix(body).map(|(front, _)| front).map_err(|_| Errno::EIO)
}

fn ask(opcode: u32, body: &[u8]) -> Result<Ask<'_>, Errno> {
    Ok(match opcode {
        LOOKUP => {
            let end = body.iter().position(|byte| *byte == 0).ok_or(Errno::EIO)?;
            Ask::Lookup { name: &body[..end] }
        }
        // FORGET, INTERRUPT, BATCH_FORGET.
        2 | 36 | 42 => Ask::Silent,
        3 => Ask::GetAttr,
        4 => {
            let SetAttrIn { valid, size, .. } = take(body)?;
            Ask::SetAttr { size: (valid & FATTR_SIZE != 0).then_some(size) }
        }
        14 => Ask::Open,
        15 => {
            let ReadWriteIn { at, len, .. } = take(body)?;
            Ask::Read { at, len }
        }
        WRITE => {
            let ReadWriteIn { at, len, .. } = take(body)?;
            let data = body.len() - size_of::<ReadWriteIn>();
            if usize::try_from(len) != Ok(data) {
                return Err(Errno::EIO);
            }
            Ask::Write { at, len }
        }
        17 => Ask::StatFs,
        // RELEASE, FLUSH, DESTROY.
        18 | 25 | 38 => Ask::Quiet,
        20 => Ask::Sync,
        26 => {
            let InitIn { major, minor, max_readahead, flags } = take(body)?;
            let has_more = flags & init::EXT != 0;
            let more = body.get(size_of::<InitIn>()..).filter(|_| has_more);
            let more = more.and_then(|more| take::<InitMore>(more).ok()).unwrap_or_default();
            let flags = u64::from(flags) | u64::from(more.flags2) << 32;
            Ask::Init { major, minor, max_readahead, flags }
        }
        43 => {
            let FallocateIn { at, len, mode, .. } = take(body)?;
            match mode {
                _ if mode == PUNCH_HOLE | KEEP_SIZE => Ask::Zero { at, len, unmap: true },
                _ if mode == ZERO_RANGE | KEEP_SIZE => Ask::Zero { at, len, unmap: false },
                _ => return Err(Errno::EOPNOTSUPP),
            }
        }
        _ => return Err(ENOSYS),
    })
}

/// The header of a reply with `body` bytes behind it.
#[must_use]
pub fn out_header(unique: u64, result: Result<usize, Errno>) -> OutHeader {
    let (body, error) = match result {
        Ok(body) => (body, 0),
        // The kernel refuses a reply with any other number, and the request would never end.
        Err(errno) if errno.raw() <= 511 => (0, -errno.raw()),
        Err(_) => (0, -Errno::EIO.raw()),
    };
    OutHeader { len: u32::try_from(OUT_HEADER + body).unwrap_or(u32::MAX), error, unique }
}

/// A short reply's bytes.
#[derive(Clone, Copy, Debug)]
pub struct Body {
    bytes: [u8; BODY_MAX],
    len: usize,
}

impl Body {
    /// Nothing but "done".
    pub const EMPTY: Body = Body { bytes: [0; BODY_MAX], len: 0 };

    /// From one of the structs above.
    pub fn of<T: IntoBytes + Immutable>(reply: &T) -> Body {
        let mut body = Body::EMPTY;
        body.len = size_of::<T>().min(BODY_MAX);
        body.bytes[..body.len].copy_from_slice(&reply.as_bytes()[..body.len]);
        body
    }

    /// What goes behind the header.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
