//! Answers for ublk's binary interface (include/uapi/linux/ublk_cmd.h, Linux 7.3).

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Control commands, ioctl-encoded. Before 6.4 only their low byte is understood.
pub(crate) mod ctrl {
    pub(crate) const GET_QUEUE_AFFINITY: u32 = 0x8020_7501;
    pub(crate) const GET_DEV_INFO: u32 = 0x8020_7502;
    pub(crate) const ADD_DEV: u32 = 0xC020_7504;
    pub(crate) const DEL_DEV: u32 = 0xC020_7505;
    pub(crate) const START_DEV: u32 = 0xC020_7506;
    pub(crate) const STOP_DEV: u32 = 0xC020_7507;
    pub(crate) const SET_PARAMS: u32 = 0xC020_7508;
    pub(crate) const GET_PARAMS: u32 = 0x8020_7509;
    pub(crate) const START_USER_RECOVERY: u32 = 0xC020_7510;
    pub(crate) const END_USER_RECOVERY: u32 = 0xC020_7511;
    pub(crate) const GET_DEV_INFO2: u32 = 0x8020_7512;
    pub(crate) const GET_FEATURES: u32 = 0x8020_7513;
    pub(crate) const DEL_DEV_ASYNC: u32 = 0x8020_7514;
    pub(crate) const UPDATE_SIZE: u32 = 0xC020_7515;
    pub(crate) const QUIESCE_DEV: u32 = 0xC020_7516;
    pub(crate) const TRY_STOP_DEV: u32 = 0xC020_7517;
    pub(crate) const REG_BUF: u32 = 0xC020_7518;
}

/// Commands of the character device.
pub(crate) mod io {
    pub(crate) const FETCH_REQ: u32 = 0xC010_7520;
    pub(crate) const COMMIT_AND_FETCH_REQ: u32 = 0xC010_7521;
    pub(crate) const NEED_GET_DATA: u32 = 0xC010_7522;
    pub(crate) const REGISTER_IO_BUF: u32 = 0xC010_7523;
    pub(crate) const UNREGISTER_IO_BUF: u32 = 0xC010_7524;
    pub(crate) const PREP_IO_CMDS: u32 = 0xC010_7525;
    pub(crate) const COMMIT_IO_CMDS: u32 = 0xC010_7526;
    pub(crate) const FETCH_IO_CMDS: u32 = 0xC010_7527;
}

/// `UBLK_F_*`: number of the bit and the word users see.
pub(crate) const FEATURES: &[(u32, &str)] = &[
    (0, "zero-copy"),
    (1, "completion-in-task"),
    (2, "need-get-data"),
    (3, "user-recovery"),
    (4, "user-recovery-reissue"),
    (5, "unprivileged"),
    (6, "ioctl-encoding"),
    (7, "user-copy"),
    (8, "zoned"),
    (9, "user-recovery-fail-io"),
    (10, "update-size"),
    (11, "auto-register"),
    (12, "quiesce"),
    (13, "per-io-daemon"),
    (14, "register-off-daemon"),
    (15, "batch-io"),
    (16, "integrity"),
    (17, "safe-stop"),
    (18, "no-auto-part-scan"),
    (19, "shared-memory"),
    (20, "descriptor-size"),
];

pub(crate) const F_ZERO_COPY: u64 = 1;
pub(crate) const F_NEED_GET_DATA: u64 = 1 << 2;
pub(crate) const F_USER_RECOVERY: u64 = 1 << 3;
pub(crate) const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
pub(crate) const F_UNPRIVILEGED: u64 = 1 << 5;
pub(crate) const F_IOCTL_ENCODE: u64 = 1 << 6;
pub(crate) const F_USER_COPY: u64 = 1 << 7;
pub(crate) const F_ZONED: u64 = 1 << 8;
pub(crate) const F_USER_RECOVERY_FAIL_IO: u64 = 1 << 9;
pub(crate) const F_UPDATE_SIZE: u64 = 1 << 10;
pub(crate) const F_AUTO_BUF_REG: u64 = 1 << 11;
pub(crate) const F_QUIESCE: u64 = 1 << 12;
pub(crate) const F_PER_IO_DAEMON: u64 = 1 << 13;
pub(crate) const F_BATCH_IO: u64 = 1 << 15;
pub(crate) const F_INTEGRITY: u64 = 1 << 16;
pub(crate) const F_SAFE_STOP: u64 = 1 << 17;
pub(crate) const F_NO_AUTO_PART_SCAN: u64 = 1 << 18;
pub(crate) const F_SHMEM_ZC: u64 = 1 << 19;
pub(crate) const F_IO_DESC_SIZE: u64 = 1 << 20;

/// Result of a fetch: a write has come without its data (`UBLK_IO_RES_NEED_GET_DATA`).
pub(crate) const RES_NEED_GET_DATA: i32 = 1;

/// In `sqe->addr` of a fetch: hand the request over without a slot when the slot cannot be filled.
pub(crate) const AUTO_BUF_REG_FALLBACK: u64 = 1 << 16;

/// `struct ublksrv_ctrl_cmd`, at the start of a control command's payload.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable)]
pub(crate) struct CtrlCmd {
    pub(crate) dev_id: u32,
    pub(crate) queue_id: u16,
    pub(crate) len: u16,
    pub(crate) addr: u64,
    pub(crate) data: u64,
    pub(crate) dev_path_len: u16,
    pub(crate) pad: u16,
    pub(crate) reserved: u32,
}

/// `struct ublksrv_ctrl_dev_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable)]
pub(crate) struct DevInfo {
    pub(crate) nr_hw_queues: u16,
    pub(crate) queue_depth: u16,
    pub(crate) state: u16,
    /// Since 7.2; 0 before.
    pub(crate) io_desc_size: u16,
    pub(crate) max_io_buf_bytes: u32,
    pub(crate) dev_id: u32,
    pub(crate) ublksrv_pid: i32,
    pub(crate) pad1: u32,
    pub(crate) flags: u64,
    pub(crate) ublksrv_flags: u64,
    pub(crate) owner_uid: u32,
    pub(crate) owner_gid: u32,
    pub(crate) reserved1: u64,
    pub(crate) reserved2: u64,
}

/// `struct ublksrv_io_desc`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable)]
pub(crate) struct IoDesc {
    /// Operation in bits 0-7, flags above.
    pub(crate) op_flags: u32,
    pub(crate) nr_sectors: u32,
    pub(crate) start_sector: u64,
    pub(crate) addr: u64,
}

/// Operations (`UBLK_IO_OP_*`).
pub(crate) mod op {
    pub(crate) const READ: u32 = 0;
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const FLUSH: u32 = 2;
    pub(crate) const DISCARD: u32 = 3;
    pub(crate) const WRITE_ZEROES: u32 = 5;
    pub(crate) const ZONE_OPEN: u32 = 10;
    pub(crate) const ZONE_CLOSE: u32 = 11;
    pub(crate) const ZONE_FINISH: u32 = 12;
    pub(crate) const ZONE_APPEND: u32 = 13;
    pub(crate) const ZONE_RESET_ALL: u32 = 14;
    pub(crate) const ZONE_RESET: u32 = 15;
    pub(crate) const REPORT_ZONES: u32 = 18;
}

/// Flags in `op_flags` (`UBLK_IO_F_*`), as they stand there.
pub(crate) const IO_F_FUA: u32 = 1 << 13;
pub(crate) const IO_F_NOUNMAP: u32 = 1 << 15;
pub(crate) const IO_F_NEED_REG_BUF: u32 = 1 << 17;
pub(crate) const IO_F_INTEGRITY: u32 = 1 << 18;
pub(crate) const IO_F_SHMEM_ZC: u32 = 1 << 19;

/// `struct ublksrv_io_cmd`, the payload of an I/O command.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable)]
pub(crate) struct IoCmd {
    pub(crate) q_id: u16,
    pub(crate) tag: u16,
    pub(crate) result: i32,
    pub(crate) addr: u64,
}

/// `struct ublk_batch_io`, the payload of a command for many tags (since 7.0).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable)]
pub(crate) struct BatchIo {
    pub(crate) q_id: u16,
    pub(crate) flags: u16,
    pub(crate) nr_elem: u16,
    pub(crate) elem_bytes: u8,
    pub(crate) reserved: u8,
    pub(crate) reserved2: u64,
}

/// Flags of a command for many tags (`UBLK_BATCH_F_*`).
pub(crate) const BATCH_HAS_BUF_ADDR: u16 = 2;
pub(crate) const BATCH_AUTO_BUF_REG_FALLBACK: u16 = 4;

/// `struct ublk_elem_header` with the address that may follow it: one tag's part of such a command.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable)]
pub(crate) struct Element {
    pub(crate) tag: u16,
    pub(crate) buf_index: u16,
    pub(crate) result: i32,
    /// Only with [`BATCH_HAS_BUF_ADDR`].
    pub(crate) addr: u64,
}

/// Bytes of an element without an address.
pub(crate) const ELEMENT_BYTES: u8 = 8;

/// `struct ublk_params`: header, basic, discard, devt, zoned, dma alignment, segments, integrity.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable)]
pub(crate) struct Params {
    pub(crate) len: u32,
    pub(crate) types: u32,
    // basic, at 8
    pub(crate) attrs: u32,
    pub(crate) logical_bs_shift: u8,
    pub(crate) physical_bs_shift: u8,
    pub(crate) io_opt_shift: u8,
    pub(crate) io_min_shift: u8,
    pub(crate) max_sectors: u32,
    pub(crate) chunk_sectors: u32,
    pub(crate) dev_sectors: u64,
    pub(crate) virt_boundary_mask: u64,
    // discard, at 40
    pub(crate) discard_alignment: u32,
    pub(crate) discard_granularity: u32,
    pub(crate) max_discard_sectors: u32,
    pub(crate) max_write_zeroes_sectors: u32,
    pub(crate) max_discard_segments: u16,
    pub(crate) reserved0: u16,
    // devt, at 60
    pub(crate) devt: [u32; 4],
    // zoned, at 76
    pub(crate) zoned: [u32; 8],
    // dma, at 108
    pub(crate) dma_alignment: u32,
    pub(crate) dma_pad: [u8; 8],
    // segment, at 120
    pub(crate) seg_boundary_mask: u64,
    pub(crate) max_segment_size: u32,
    pub(crate) max_segments: u16,
    pub(crate) seg_pad: [u8; 2],
    // integrity, at 136
    pub(crate) integrity_flags: u32,
    pub(crate) max_integrity_segments: u16,
    pub(crate) interval_exp: u8,
    pub(crate) metadata_size: u8,
    pub(crate) pi_offset: u8,
    pub(crate) csum_type: u8,
    pub(crate) tag_size: u8,
    pub(crate) integrity_pad: [u8; 5],
}

/// `struct ublk_shmem_buf_reg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable)]
pub(crate) struct BufReg {
    pub(crate) addr: u64,
    pub(crate) len: u64,
    pub(crate) flags: u32,
    pub(crate) reserved: u32,
}

/// Its flag: the memory is pinned for reading alone.
pub(crate) const BUF_READ_ONLY: u32 = 1;

pub(crate) const PARAM_BASIC: u32 = 1;
pub(crate) const PARAM_DISCARD: u32 = 2;
pub(crate) const PARAM_DEVT: u32 = 4;
pub(crate) const PARAM_ZONED: u32 = 8;
pub(crate) const PARAM_DMA_ALIGN: u32 = 16;
pub(crate) const PARAM_SEGMENT: u32 = 32;
pub(crate) const PARAM_INTEGRITY: u32 = 64;

pub(crate) const ATTR_READ_ONLY: u32 = 1;
pub(crate) const ATTR_ROTATIONAL: u32 = 2;
pub(crate) const ATTR_VOLATILE_CACHE: u32 = 4;
pub(crate) const ATTR_FUA: u32 = 8;

/// Where a request's data is found by pread and pwrite on the character device.
pub(crate) const fn user_copy_at(queue: u16, tag: u16) -> u64 {
    0x8000_0000 + ((queue as u64) << 41 | (tag as u64) << 25)
}

/// Where its integrity data is found so.
pub(crate) const fn integrity_at(queue: u16, tag: u16) -> u64 {
    1 << 62 | user_copy_at(queue, tag)
}

const _: () = {
    assert!(size_of::<CtrlCmd>() == 32 && size_of::<DevInfo>() == 64);
    assert!(size_of::<IoDesc>() == 24 && size_of::<IoCmd>() == 16);
    assert!(size_of::<BatchIo>() == 16 && size_of::<Element>() == 16);
    assert!(std::mem::offset_of!(Element, addr) == ELEMENT_BYTES as usize);
    assert!(std::mem::offset_of!(Params, attrs) == 8);
    assert!(std::mem::offset_of!(Params, discard_alignment) == 40);
    assert!(std::mem::offset_of!(Params, devt) == 60);
    assert!(std::mem::offset_of!(Params, zoned) == 76);
    assert!(std::mem::offset_of!(Params, dma_alignment) == 108);
    assert!(std::mem::offset_of!(Params, seg_boundary_mask) == 120);
    assert!(std::mem::offset_of!(Params, integrity_flags) == 136);
    assert!(size_of::<Params>() == 152 && size_of::<BufReg>() == 24);
};

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of what the driver offers and how to have it.
    const PAGE: &str = include_str!("../../../../docs/ublk.md");

    #[test]
    fn every_feature_has_its_row_and_no_other_has_one() {
        let rows: Vec<Vec<&str>> = PAGE
            .lines()
            .filter(|line| line.starts_with("| ") && line.matches('|').count() == 6)
            .map(|line| line.split('|').map(str::trim).collect())
            .filter(|cells: &Vec<&str>| cells[1].parse::<u32>().is_ok())
            .collect();
        assert_eq!(rows.len(), FEATURES.len());
        for ((bit, name), cells) in FEATURES.iter().zip(rows) {
            assert_eq!(cells[1..3], [bit.to_string(), format!("`{name}`")]);
            assert!(cells[3..6].iter().all(|cell| !cell.is_empty()), "{cells:?}");
        }
    }

    #[test]
    fn every_flag_that_is_used_is_a_feature_with_a_name() {
        let used = [
            (F_ZERO_COPY, "zero-copy"),
            (F_NEED_GET_DATA, "need-get-data"),
            (F_USER_RECOVERY, "user-recovery"),
            (F_USER_RECOVERY_REISSUE, "user-recovery-reissue"),
            (F_UNPRIVILEGED, "unprivileged"),
            (F_IOCTL_ENCODE, "ioctl-encoding"),
            (F_USER_COPY, "user-copy"),
            (F_ZONED, "zoned"),
            (F_USER_RECOVERY_FAIL_IO, "user-recovery-fail-io"),
            (F_UPDATE_SIZE, "update-size"),
            (F_AUTO_BUF_REG, "auto-register"),
            (F_QUIESCE, "quiesce"),
            (F_PER_IO_DAEMON, "per-io-daemon"),
            (F_BATCH_IO, "batch-io"),
            (F_INTEGRITY, "integrity"),
            (F_SAFE_STOP, "safe-stop"),
            (F_NO_AUTO_PART_SCAN, "no-auto-part-scan"),
            (F_SHMEM_ZC, "shared-memory"),
            (F_IO_DESC_SIZE, "descriptor-size"),
        ];
        for (flag, word) in used {
            assert!(FEATURES.contains(&(flag.ilog2(), word)), "{word}");
        }
    }
}
