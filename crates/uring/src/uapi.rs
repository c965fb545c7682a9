//! Answers for io_uring's binary interface as far as it is used here
//! (include/uapi/linux/io_uring.h, Linux 7.3; every value is stable).

/// `struct io_uring_sqe`, 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Sqe {
    /// `IORING_OP_*`.
    pub opcode: u8,
    /// `IOSQE_*`.
    pub flags: u8,
    /// Priority, or operation flags.
    pub ioprio: u16,
    /// File descriptor, or its index in the table of registered files.
    pub fd: i32,
    /// Offset; `cmd_op` in its low half for a command.
    pub off: u64,
    /// Address, or offset into a registered buffer.
    pub addr: u64,
    /// Length, or number of vectors.
    pub len: u32,
    /// Operation flags (`rw_flags`, `fsync_flags`, ...).
    pub op_flags: u32,
    /// Comes back with the completion.
    pub user_data: u64,
    /// Index in the table of registered buffers.
    pub buf_index: u16,
    /// Credentials to use.
    pub personality: u16,
    /// Second file descriptor.
    pub file_index: u32,
    /// Third address; the first half of a command's payload.
    pub addr3: u64,
    /// The second half of a command's payload.
    pub pad: u64,
}

const _: () = assert!(size_of::<Sqe>() == 64 && std::mem::offset_of!(Sqe, addr3) == 48);

pub(crate) const OP_NOP: u8 = 0;
pub(crate) const OP_READV: u8 = 1;
pub(crate) const OP_WRITEV: u8 = 2;
pub(crate) const OP_FSYNC: u8 = 3;
pub(crate) const OP_READ_FIXED: u8 = 4;
pub(crate) const OP_WRITE_FIXED: u8 = 5;
pub(crate) const OP_POLL_ADD: u8 = 6;
pub(crate) const OP_SENDMSG: u8 = 9;
pub(crate) const OP_TIMEOUT: u8 = 11;
pub(crate) const OP_ASYNC_CANCEL: u8 = 14;
pub(crate) const OP_FALLOCATE: u8 = 17;
pub(crate) const OP_READ: u8 = 22;
pub(crate) const OP_WRITE: u8 = 23;
pub(crate) const OP_SEND: u8 = 26;
pub(crate) const OP_RECV: u8 = 27;
pub(crate) const OP_URING_CMD: u8 = 46;
/// Since 6.9.
pub(crate) const OP_FTRUNCATE: u8 = 55;
pub(crate) const OP_READV_FIXED: u8 = 60;
pub(crate) const OP_WRITEV_FIXED: u8 = 61;

pub(crate) const SQE_FIXED_FILE: u8 = 1;
/// `IOSQE_IO_LINK`: the next entry is carried out when this one is done whole.
pub(crate) const SQE_IO_LINK: u8 = 1 << 2;
/// `IOSQE_BUFFER_SELECT`.
pub(crate) const SQE_BUFFER_SELECT: u8 = 1 << 5;
/// `IORING_RECVSEND_POLL_FIRST`, in an entry's priority.
pub(crate) const RECVSEND_POLL_FIRST: u16 = 1;
/// `IORING_RECVSEND_FIXED_BUF`: the memory is a registered buffer (plain sends and receives: 7.2).
pub(crate) const RECVSEND_FIXED_BUF: u16 = 1 << 2;
/// `MSG_MORE`: what follows goes into the same packet.
pub(crate) const MSG_MORE: u32 = 0x8000;
/// `MSG_WAITALL` (include/linux/socket.h).
pub(crate) const MSG_WAITALL: u32 = 0x100;
/// `MSG_NOSIGNAL`.
pub(crate) const MSG_NOSIGNAL: u32 = 0x4000;
/// `IORING_URING_CMD_MULTISHOT`.
pub(crate) const URING_CMD_MULTISHOT: u32 = 2;
/// In a completion's flags (`IORING_CQE_F_BUFFER`): the upper half names a buffer.
pub const CQE_BUFFER: u32 = 1;
/// In a completion's flags (`IORING_CQE_F_MORE`): its entry will complete again.
pub const CQE_MORE: u32 = 2;
pub(crate) const FSYNC_DATASYNC: u32 = 1;
/// `RWF_DSYNC` (include/uapi/linux/fs.h).
pub(crate) const RWF_DSYNC: u32 = 2;
/// `BLOCK_URING_CMD_DISCARD`, `_IO(0x12, 0)` (include/uapi/linux/blkdev.h, since 6.12).
pub(crate) const BLOCK_CMD_DISCARD: u64 = 0x1200;
/// `FALLOC_FL_KEEP_SIZE` (include/uapi/linux/falloc.h).
pub(crate) const FALLOC_KEEP_SIZE: u32 = 1;
/// `FALLOC_FL_PUNCH_HOLE`.
pub(crate) const FALLOC_PUNCH_HOLE: u32 = 2;
/// `FALLOC_FL_ZERO_RANGE`.
pub(crate) const FALLOC_ZERO_RANGE: u32 = 16;

pub(crate) const ENTER_GETEVENTS: u32 = 1;
/// `IORING_ENTER_EXT_ARG` (since 5.11).
pub(crate) const ENTER_EXT_ARG: u32 = 1 << 3;
pub(crate) const ENTER_REGISTERED_RING: u32 = 1 << 4;
/// `IORING_ENTER_NO_IOWAIT` (since 6.15).
pub(crate) const ENTER_NO_IOWAIT: u32 = 1 << 7;
