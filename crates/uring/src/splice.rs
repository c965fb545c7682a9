//! Answers for `dev_splice`: pages kind x place x operation -> one submission entry. The only table
//! of copy modes.
//!
//! | pages           | read, write of one part         | of more parts                   |
//! |-----------------|---------------------------------|---------------------------------|
//! | registered slot | `READ_FIXED`, `WRITE_FIXED`     | `READV_FIXED`, `WRITEV_FIXED`   |
//! | memory of ours  | `READ`, `WRITE`                 | `READV`, `WRITEV`               |
//!
//! To and from a socket, one range at a time, behind and before headers (`ring/remote`):
//!
//! | pages           | since 7.2 (tried at start)       | before                               |
//! |-----------------|----------------------------------|--------------------------------------|
//! | registered slot | `SEND`, `RECV` with the slot     | `WRITE_FIXED`, `READ_FIXED`, short   |
//! | memory of ours  | `SEND`, `SENDMSG`, `RECV`        | the same                             |
//!
//! To and from a backend of bytes there is no entry: memory of ours is lent to a helper thread
//! (`bytes`), a slot has no way there.
//!
//! A slot is the device's own pages: no copy. Memory of ours costs one, between the device and that
//! memory, made before or after by the front end.
//!
//! Direction (Linux 7.3, io_uring/rsrc.c): a slot of a READ request can only be filled, one of a
//! WRITE only drained; anything else is EFAULT. Reads of nothing come from /dev/zero, so that a
//! slot can be zeroed without memory of ours.

use devsplice_core::Op;
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{Pages, Part, Splice, To};

use crate::arena::Arena;
use crate::files::{DiscardWay, Slot, ZeroWay};
use crate::uapi::{
    BLOCK_CMD_DISCARD, FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, FSYNC_DATASYNC,
    OP_FALLOCATE, OP_FSYNC, OP_FTRUNCATE, OP_READ, OP_READ_FIXED, OP_READV, OP_READV_FIXED,
    OP_SEND, OP_URING_CMD, OP_WRITE, OP_WRITE_FIXED, OP_WRITEV, OP_WRITEV_FIXED,
    RECVSEND_FIXED_BUF, RWF_DSYNC, SQE_FIXED_FILE, Sqe,
};

/// The registered file that reads as zeros.
pub(crate) const ZERO_FILE: u16 = 0;
/// Bytes of zeros that are written at most in one entry, where a place cannot zero by itself.
pub(crate) const ZEROES_LEN: usize = 64 << 10;

/// What a [`Pages`] handle stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PagesKind {
    /// The device's own pages, at an index of the ring's table of registered buffers.
    Slot(u16),
    /// Memory of ours: a lane's arena, of fewer than [`MOST_LANES`], and the slot in it.
    Memory { lane: u16, slot: u16 },
}

const IS_SLOT: u32 = 1 << 31;
/// Lanes that a ring may have, the inner ones among them: what a [`Pages`] has room for.
pub(crate) const MOST_LANES: usize = 1 << 15;

impl PagesKind {
    pub(crate) fn pack(self) -> Pages {
        match self {
            PagesKind::Slot(index) => Pages(IS_SLOT | u32::from(index)),
            PagesKind::Memory { lane, slot } => Pages(u32::from(lane) << 16 | u32::from(slot)),
        }
    }

    #[inline]
    pub(crate) fn unpack(pages: Pages) -> PagesKind {
        #[allow(clippy::cast_possible_truncation)]
        if pages.0 & IS_SLOT != 0 {
            PagesKind::Slot(pages.0 as u16)
        } else {
            PagesKind::Memory { lane: (pages.0 >> 16) as u16, slot: pages.0 as u16 }
        }
    }
}

/// One `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IoVec {
    pub(crate) base: u64,
    pub(crate) len: u64,
}

/// What is kept of a splice until its completion: its vector, and how to read the result.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flight {
    pub(crate) vector: [IoVec; MAX_PARTS],
    pub(crate) op: Op,
    pub(crate) file: u16,
    pub(crate) pages: Option<PagesKind>,
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) way: ZeroWay,
    /// How it was sent, if it is a discard.
    pub(crate) discard: DiscardWay,
}

impl Flight {
    pub(crate) const IDLE: Flight = Flight {
        vector: [IoVec { base: 0, len: 0 }; MAX_PARTS],
        op: Op::Flush,
        file: 0,
        pages: None,
        at: 0,
        len: 0,
        way: ZeroWay::Write,
        discard: DiscardWay::Punch,
    };
}

/// What the table needs to know of the ring.
pub(crate) struct Around<'a> {
    pub(crate) arenas: &'a [Option<Arena>],
    pub(crate) files: &'a [Slot],
    /// Memory of [`ZEROES_LEN`] zeros.
    pub(crate) zeroes: u64,
}

/// The slot and the part of a splice of which nothing need be kept: what one part of a slot's pages
/// needs is in the entry, and its result says all. Nearly every splice is one.
#[inline]
pub(crate) fn simple<'a>(splice: &Splice<'a>) -> Option<(u16, &'a Part)> {
    match (PagesKind::unpack(splice.pages), splice.parts) {
        (PagesKind::Slot(index), [part]) if splice.op.has_pages() => Some((index, part)),
        _ => None,
    }
}

/// The entry that carries it out, without its user data.
#[inline]
pub(crate) fn simple_entry(splice: &Splice<'_>, (buf_index, part): (u16, &Part)) -> Sqe {
    let opcode = if matches!(splice.op, Op::Read) { OP_READ_FIXED } else { OP_WRITE_FIXED };
    let (addr, len) = (u64::from(part.at), part.len);
    Sqe { opcode, buf_index, addr, len, ..transfer_to(splice) }
}

/// The entry that carries out any other, without its user data. `flight` is the splice's own and
/// does not move until its completion.
pub(crate) fn entry(flight: &mut Flight, splice: &Splice<'_>, around: &Around<'_>) -> Sqe {
    let file = file_of(splice);
    flight.op = splice.op;
    flight.file = file;
    flight.pages = None;
    flight.at = splice.at;
    flight.len = splice.len;
    match splice.op {
        Op::Read | Op::Write => transfer(flight, splice, around),
        Op::Flush => Sqe { opcode: OP_FSYNC, op_flags: FSYNC_DATASYNC, ..on(file) },
        Op::Discard => {
            flight.discard = around.files[usize::from(file)].discard;
            discard(flight)
        }
        Op::WriteZeroes { unmap } => {
            flight.way = around.files[usize::from(file)].zero_way(unmap);
            zero(flight, around)
        }
        Op::Reset => cut(file, flight.at),
        Op::Finish => cut(file, flight.at + flight.len),
    }
}

/// The entry that has a file end at a place.
fn cut(file: u16, end: u64) -> Sqe {
    Sqe { opcode: OP_FTRUNCATE, off: end, ..on(file) }
}

#[inline]
fn file_of(splice: &Splice<'_>) -> u16 {
    match splice.to {
        To::File(file) => file.0,
        To::Zero => ZERO_FILE,
    }
}

#[inline]
fn on(file: u16) -> Sqe {
    Sqe { fd: i32::from(file), flags: SQE_FIXED_FILE, ..Sqe::default() }
}

/// Where a read or write goes, without what it carries.
#[inline]
fn transfer_to(splice: &Splice<'_>) -> Sqe {
    // /dev/zero ignores the offset; a position beyond 2^63 would be refused.
    let off = if splice.to == To::Zero { 0 } else { splice.at };
    let op_flags = if splice.fua { RWF_DSYNC } else { 0 };
    Sqe { off, op_flags, ..on(file_of(splice)) }
}

fn transfer(flight: &mut Flight, splice: &Splice<'_>, around: &Around<'_>) -> Sqe {
    let kind = PagesKind::unpack(splice.pages);
    flight.pages = Some(kind);
    let mut sqe = transfer_to(splice);
    let is_read = splice.op == Op::Read;
    if let ([part], PagesKind::Memory { lane, slot }) = (splice.parts, kind) {
        sqe.opcode = if is_read { OP_READ } else { OP_WRITE };
        sqe.addr = address(around, lane, slot, part.at, part.len);
        sqe.len = part.len;
        return sqe;
    }
    for (vector, part) in flight.vector.iter_mut().zip(splice.parts) {
        let base = match kind {
            PagesKind::Slot(_) => u64::from(part.at),
            PagesKind::Memory { lane, slot } => address(around, lane, slot, part.at, part.len),
        };
        *vector = IoVec { base, len: u64::from(part.len) };
    }
    sqe.addr = flight.vector.as_ptr() as u64;
    sqe.len = u32::try_from(splice.parts.len()).unwrap_or(0);
    sqe.opcode = match kind {
        PagesKind::Slot(index) => {
            sqe.buf_index = index;
            if is_read { OP_READV_FIXED } else { OP_WRITEV_FIXED }
        }
        PagesKind::Memory { .. } if is_read => OP_READV,
        PagesKind::Memory { .. } => OP_WRITEV,
    };
    sqe
}

#[inline]
fn address(around: &Around<'_>, lane: u16, slot: u16, at: u32, len: u32) -> u64 {
    let Some(arena) = &around.arenas[usize::from(lane)] else {
        panic!("lane {lane} has no memory of its own")
    };
    arena.address(usize::from(slot), DATA_AT + at as usize, len as usize)
}

/// Has an entry for a socket, made to send or receive memory, do so with bytes of a slot's pages,
/// `at` being the first; whether it does all of it at once where it can. `takes_slots` says whether
/// this kernel's plain sends and receives do.
pub(crate) fn with_slot(sqe: Sqe, slot: u16, at: u64, takes_slots: bool) -> (Sqe, bool) {
    let sqe = Sqe { buf_index: slot, addr: at, ..sqe };
    if takes_slots {
        return (Sqe { ioprio: RECVSEND_FIXED_BUF, ..sqe }, true);
    }
    let opcode = if sqe.opcode == OP_SEND { OP_WRITE_FIXED } else { OP_READ_FIXED };
    (Sqe { opcode, op_flags: 0, ..sqe }, false)
}

/// The entry that fills bytes of a slot's pages with zeros.
pub(crate) fn zero_slot(slot: u16, at: u64, len: u32) -> Sqe {
    Sqe { opcode: OP_READ_FIXED, buf_index: slot, addr: at, len, ..on(ZERO_FILE) }
}

/// Where a request's data starts in a slot of memory: behind room for a front end's headers, on a
/// page boundary so that any direct I/O takes it.
pub const DATA_AT: usize = 4096;

/// The entry of a discard in the way that `flight` says.
fn discard(flight: &Flight) -> Sqe {
    match flight.discard {
        DiscardWay::Command => Sqe {
            opcode: OP_URING_CMD,
            off: BLOCK_CMD_DISCARD,
            addr: flight.at,
            addr3: flight.len,
            ..on(flight.file)
        },
        DiscardWay::Punch => fallocate(flight, FALLOC_PUNCH_HOLE),
    }
}

/// The entry that zeroes in the way that `flight` says.
fn zero(flight: &mut Flight, around: &Around<'_>) -> Sqe {
    match flight.way {
        ZeroWay::Punch => fallocate(flight, FALLOC_PUNCH_HOLE),
        ZeroWay::Range => fallocate(flight, FALLOC_ZERO_RANGE),
        ZeroWay::Write => {
            let mut left = flight.len;
            let mut count = 0;
            for vector in &mut flight.vector {
                let len = left.min(ZEROES_LEN as u64);
                if len == 0 {
                    break;
                }
                *vector = IoVec { base: around.zeroes, len };
                left -= len;
                count += 1;
            }
            // The result is short when more is left; the engine comes back for the rest.
            let addr = flight.vector.as_ptr() as u64;
            Sqe { opcode: OP_WRITEV, off: flight.at, addr, len: count, ..on(flight.file) }
        }
    }
}

fn fallocate(flight: &Flight, mode: u32) -> Sqe {
    Sqe {
        opcode: OP_FALLOCATE,
        off: flight.at,
        addr: flight.len,
        len: mode | FALLOC_KEEP_SIZE,
        ..on(flight.file)
    }
}
