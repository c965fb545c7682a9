//! Answers for what others than its server see of a ublk device, and do to it.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use rustix::fs::{Access, OFlags};
use zerocopy::IntoBytes;

use super::control::Control;
use super::map::SharedFile;
use super::uapi::{
    ATTR_READ_ONLY, BUF_READ_ONLY, BufReg, CtrlCmd, DevInfo, F_UNPRIVILEGED, PARAM_BASIC,
    PARAM_ZONED, Params, ctrl,
};

/// A device as the driver knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its number.
    pub id: u32,
    /// Its queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// `UBLK_S_DEV_*`: 0 dead, 1 live, 2 quiesced, 3 failing.
    pub state: u16,
    /// The process that serves it; 0 or -1 for none.
    pub server: i32,
    /// Most bytes of a request.
    pub max_io: u32,
    /// Bits of `UBLK_F_*`.
    pub flags: u64,
    /// Bytes from one descriptor to the next, where that was asked for.
    pub descriptor_bytes: u16,
    /// Bytes of its logical block.
    pub block: u32,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether changes are refused.
    pub is_read_only: bool,
    /// The CPUs whose requests come to each queue.
    pub cpus: Vec<Vec<usize>>,
}

/// Parameters to try out on the driver, in its units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// Queues and their depth.
    pub queues: (u16, u16),
    /// Bits of `UBLK_F_*`.
    pub flags: u64,
    /// Whether the basic parameters are given.
    pub has_basic: bool,
    /// Whether those of zones are.
    pub has_zoned: bool,
    /// Logical block, physical block, smallest and best request, each as a power of two.
    pub shifts: [u8; 4],
    /// Most sectors of a request.
    pub max_sectors: u32,
    /// Sectors of a zone.
    pub chunk_sectors: u32,
    /// Sectors of the device.
    pub dev_sectors: u64,
    /// Most open zones, most active ones, most sectors of an append.
    pub zoned: [u32; 3],
}

/// Memory that the driver was told of; mapped for as long as this is there.
pub struct Shared(#[expect(dead_code, reason = "it is there to stay mapped")] SharedFile);

impl Trial {
    fn params(&self) -> Params {
        let [logical, physical, least, best] = self.shifts;
        let mut zoned = [0; 8];
        zoned[..3].copy_from_slice(&self.zoned);
        let basic = if self.has_basic { PARAM_BASIC } else { 0 };
        Params {
            types: basic | if self.has_zoned { PARAM_ZONED } else { 0 },
            logical_bs_shift: logical,
            physical_bs_shift: physical,
            io_min_shift: least,
            io_opt_shift: best,
            max_sectors: self.max_sectors,
            chunk_sectors: self.chunk_sectors,
            dev_sectors: self.dev_sectors,
            zoned,
            ..Params::default()
        }
    }
}

impl Control {
    /// What the driver knows of a device.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn look(&mut self, id: u32) -> Result<Seen> {
        let info = self.info(id)?;
        let params = self.params(id)?;
        let mut cpus = Vec::new();
        for queue in 0..info.nr_hw_queues {
            let mask = self.affinity(id, queue)?;
            let set = |cpu: &usize| mask[cpu / 8] >> (cpu % 8) & 1 == 1;
            cpus.push((0..mask.len() * 8).filter(set).collect());
        }
        Ok(Seen {
            id: info.dev_id,
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            state: info.state,
            server: info.ublksrv_pid,
            max_io: info.max_io_buf_bytes,
            flags: info.flags,
            descriptor_bytes: info.io_desc_size,
            block: 1 << params.logical_bs_shift.min(31),
            sectors: params.dev_sectors,
            is_read_only: params.attrs & ATTR_READ_ONLY != 0,
            cpus,
        })
    }

    /// The user and group whose device it is, if one without privileges has made it.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn owner(&mut self, id: u32) -> Result<Option<(u32, u32)>> {
        let info = self.info(id)?;
        let is_users = info.flags & F_UNPRIVILEGED != 0;
        Ok(is_users.then_some((info.owner_uid, info.owner_gid)))
    }

    /// Removes the disk unless somebody has it open.
    ///
    /// # Errors
    /// If somebody has, if there is no such disk, or on kernels before 7.0.
    pub fn stop_if_idle(&mut self, id: u32) -> Result<()> {
        self.send("TRY_STOP_DEV", ctrl::TRY_STOP_DEV, device(id), None)
    }

    /// Has a device's server end, as far as that has nothing in flight; it is called again for what
    /// comes back later. The kernel keeps the disk.
    ///
    /// # Errors
    /// If the device was not made for that, there is none, or on kernels before 6.16.
    pub fn let_go(&mut self, id: u32, limit: Duration) -> Result<()> {
        self.quiesce(id, limit)
    }

    /// Tells the driver of memory that clients' requests may come from: a file that they have
    /// mapped. It knows it for as long as the device is there.
    ///
    /// # Errors
    /// If it cannot be opened, mapped or pinned, or on kernels before 7.1.
    pub fn share(&mut self, id: u32, path: &str, read_only: bool) -> Result<Shared> {
        let flags = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let file = devsplice_uring::open(path, flags)?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| Error::os(path, &errno.into()))?;
        let bytes = usize::try_from(stat.st_size).unwrap_or(0);
        let memory = SharedFile::map(file.as_fd(), bytes, !read_only)?;
        let (addr, len) = memory.place();
        let flags = if read_only { BUF_READ_ONLY } else { 0 };
        let mut told = BufReg { addr, len, flags, reserved: 0 };
        self.send("REG_BUF", ctrl::REG_BUF, device(id), Some(told.as_mut_bytes()))?;
        Ok(Shared(memory))
    }

    /// Gives the disk another size, in bytes.
    ///
    /// # Errors
    /// If that is no whole number of blocks, if there is no such disk, or on kernels before 6.16.
    pub fn resize(&mut self, id: u32, bytes: u64) -> Result<()> {
        let block = 1_u64 << self.params(id)?.logical_bs_shift.min(31);
        if bytes == 0 || !bytes.is_multiple_of(block) {
            let reason = format!("{bytes} bytes are no multiple of its block, {block}");
            return Err(Error::invalid(format!("ublk device {id}"), reason));
        }
        self.update_size(id, bytes / 512)
    }

    /// Whether the driver takes these parameters for a device, which is made for that and deleted.
    ///
    /// # Errors
    /// If no device can be made to try them on, or it cannot be deleted.
    pub fn takes(&mut self, id: Option<u32>, trial: &Trial) -> Result<Result<()>> {
        let info = self.add(DevInfo {
            nr_hw_queues: trial.queues.0,
            queue_depth: trial.queues.1,
            max_io_buf_bytes: super::MAX_IO,
            dev_id: id.unwrap_or(u32::MAX),
            flags: trial.flags,
            ..DevInfo::default()
        })?;
        let verdict = match trial.flags & !info.flags {
            0 => self.set_params(info.dev_id, trial.params()),
            lost => {
                let reason = format!("the kernel has no flags {lost:#x}");
                Err(Error::new(ErrorKind::Unsupported, "ublk", reason))
            }
        };
        self.delete(info.dev_id).map(|()| verdict)
    }
}

/// Waits until this user may use a device that was just made: udev's rules give it to whom it
/// belongs.
///
/// # Errors
/// If they do not. Nobody but root can remove the device then.
pub(super) fn wait_for_node(id: u32) -> Result<()> {
    let path = format!("/dev/ublkc{id}");
    let end = Instant::now() + super::PATIENCE;
    while rustix::fs::access(&path, Access::READ_OK | Access::WRITE_OK).is_err() {
        if Instant::now() > end {
            let reason = "was not given to this user by udev; the device is left, for root to \
                          remove (devsplice gc --foreign)";
            return Err(Error::new(ErrorKind::Permission, path, reason)
                .next("install the rules of the package, 60-devsplice-ublk.rules (docs/ublk.md)"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn device(dev_id: u32) -> CtrlCmd {
    CtrlCmd { dev_id, queue_id: u16::MAX, ..CtrlCmd::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_to_try_are_told_as_they_are() {
        let trial = Trial {
            queues: (1, 2),
            flags: 0,
            has_basic: false,
            has_zoned: true,
            shifts: [9, 12, 10, 11],
            max_sectors: 1,
            chunk_sectors: 2,
            dev_sectors: 3,
            zoned: [4, 5, 6],
        };
        let params = trial.params();
        assert_eq!(params.types, PARAM_ZONED);
        assert_eq!((params.logical_bs_shift, params.physical_bs_shift), (9, 12));
        assert_eq!((params.io_min_shift, params.io_opt_shift), (10, 11));
        assert_eq!((params.max_sectors, params.chunk_sectors, params.dev_sectors), (1, 2, 3));
        assert_eq!(params.zoned, [4, 5, 6, 0, 0, 0, 0, 0]);
        assert_eq!(Trial { has_basic: true, ..trial }.params().types, PARAM_ZONED | PARAM_BASIC);
    }
}
