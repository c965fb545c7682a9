//! Answers for a ublk device's life: the commands of /dev/ublk-control, each with a bounded wait.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use devsplice_core::{Errno, Error, ErrorKind, Result};
use devsplice_uring::control::{ControlRing, DataAt};
use rustix::fs::OFlags;
use zerocopy::IntoBytes;

use super::uapi::{CtrlCmd, DevInfo, F_IOCTL_ENCODE, F_UNPRIVILEGED, Params, ctrl};

/// Where the kernel's ublk driver takes commands.
pub const CONTROL: &str = "/dev/ublk-control";
/// What a command may take before we say that it hangs. Stopping waits for I/O that we serve.
const LIMIT: Duration = Duration::from_secs(20);
/// What the driver may wait for at a time before it holds a disk's requests; who wants to wait
/// longer asks again. Well below what the command may take.
const IDLE_LIMIT: Duration = Duration::from_secs(5);
/// Who may use it.
const AS_WHOM: &str = "run as root, or --unprivileged as a member of the group ublk";
/// Bytes for the path of a character device, before what else a command carries.
const PATH: usize = 32;

/// A connection to the kernel's ublk driver.
pub struct Control {
    ring: ControlRing,
    file: OwnedFd,
    /// Bits of `UBLK_F_*`; 0 where the kernel cannot say (before 6.5).
    features: u64,
    /// Whether a device that was seen is one without privileges: whoever says something about such
    /// has to name its node and may use that, be it root.
    is_users: BTreeMap<u32, bool>,
    /// How long START_DEV is waited for, if not as long as all others.
    #[cfg(test)]
    pub(super) start_limit: Option<Duration>,
}

fn open_node() -> Result<OwnedFd> {
    devsplice_uring::open(CONTROL, OFlags::RDWR).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(ErrorKind::NotFound, CONTROL, "not found").next(
            "modprobe ublk_drv (Linux 6.0 or later with CONFIG_BLK_DEV_UBLK), or --export fuse",
        ),
        ErrorKind::Permission => error.next(AS_WHOM),
        _ => error,
    })
}

/// Whether there is a driver, and the right to use it.
///
/// # Errors
/// What is missing, and the next step.
pub fn available() -> Result<()> {
    open_node().map(drop)
}

impl Control {
    /// Connects and asks what the driver can do.
    ///
    /// # Errors
    /// Without the driver, the right to use it, or io_uring; names the next step.
    pub fn open() -> Result<Control> {
        let file = open_node()?;
        let mut control = Control {
            ring: ControlRing::new()?,
            file,
            features: 0,
            is_users: BTreeMap::new(),
            #[cfg(test)]
            start_limit: None,
        };
        let mut bits = [0_u8; 8];
        // Kernels before 6.5 fail it: then nothing beyond copying can be counted on.
        if control.send("GET_FEATURES", ctrl::GET_FEATURES, none(), Some(&mut bits)).is_ok() {
            control.features = u64::from_ne_bytes(bits);
        }
        Ok(control)
    }

    /// Bits of `UBLK_F_*` that the driver knows; 0 where it cannot say (before 6.5).
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the ioctl-encoded numbers of the commands are understood (since 6.4).
    pub(crate) fn is_encoded(&self) -> bool {
        self.features & F_IOCTL_ENCODE != 0
    }

    /// As if the driver knew the bare numbers of commands alone, as before 6.4.
    #[cfg(test)]
    pub(crate) fn forget_encoding(&mut self) {
        self.features &= !F_IOCTL_ENCODE;
    }

    pub(super) fn send(
        &mut self,
        name: &str,
        op: u32,
        command: CtrlCmd,
        data: Option<&mut [u8]>,
    ) -> Result<()> {
        if !self.needs_path(op, command.dev_id)? {
            return self.pass(name, op, command, data);
        }
        let dev_path_len = u16::try_from(PATH).unwrap_or(0);
        let path = format!("/dev/ublkc{}", command.dev_id);
        let mut all = vec![0; PATH];
        all[..path.len()].copy_from_slice(path.as_bytes());
        all.extend_from_slice(data.as_deref().unwrap_or_default());
        let done = self.pass(name, op, CtrlCmd { dev_path_len, ..command }, Some(&mut all));
        if let Some(data) = data {
            data.copy_from_slice(&all[PATH..]);
        }
        done
    }

    /// Whether a command has to name the device's node.
    fn needs_path(&mut self, op: u32, id: u32) -> Result<bool> {
        if op == ctrl::GET_DEV_INFO2 {
            return Ok(true);
        }
        let is_of_none = id == u32::MAX || op == ctrl::ADD_DEV || op == ctrl::GET_DEV_INFO;
        // The driver has such devices since 6.3, and tells so since 6.5.
        if is_of_none || self.features & F_UNPRIVILEGED == 0 {
            return Ok(false);
        }
        if let Some(is_users) = self.is_users.get(&id) {
            return Ok(*is_users);
        }
        self.info(id).map(|info| info.flags & F_UNPRIVILEGED != 0)
    }

    fn pass(
        &mut self,
        name: &str,
        op: u32,
        command: CtrlCmd,
        data: Option<&mut [u8]>,
    ) -> Result<()> {
        let mut payload = [0; 80];
        payload[..size_of::<CtrlCmd>()].copy_from_slice(command.as_bytes());
        // GET_FEATURES came after the encoding, so it is never sent bare.
        let is_bare = !self.is_encoded() && op != ctrl::GET_FEATURES;
        let op = if is_bare { op & 0xff } else { op };
        let at = DataAt { len: 6, addr: 8 };
        let data = data.map(|data| (data, at));
        let limit = self.limit(op);
        let result = self.ring.command(self.file.as_fd(), (name, op), payload, data, limit)?;
        if result >= 0 {
            return Ok(());
        }
        let thing = match command.dev_id {
            u32::MAX => format!("ublk {name}"),
            id => format!("ublk device {id}: {name}"),
        };
        Err(explain(thing, Errno::from_result(result)))
    }

    #[cfg(not(test))]
    fn limit(&self, _: u32) -> Duration {
        LIMIT
    }

    #[cfg(test)]
    fn limit(&self, op: u32) -> Duration {
        self.start_limit.filter(|_| op & 0xff == ctrl::START_DEV & 0xff).unwrap_or(LIMIT)
    }

    /// Creates a device; returns what the driver made of `info`.
    ///
    /// # Errors
    /// If the id is taken, a flag combination is refused, or rights are missing.
    pub(crate) fn add(&mut self, mut info: DevInfo) -> Result<DevInfo> {
        let command = CtrlCmd { dev_id: info.dev_id, queue_id: u16::MAX, ..CtrlCmd::default() };
        self.send("ADD_DEV", ctrl::ADD_DEV, command, Some(info.as_mut_bytes()))?;
        self.is_users.insert(info.dev_id, info.flags & F_UNPRIVILEGED != 0);
        Ok(info)
    }

    pub(crate) fn set_params(&mut self, id: u32, mut params: Params) -> Result<()> {
        params.len = u32::try_from(size_of::<Params>()).unwrap_or(0);
        self.send("SET_PARAMS", ctrl::SET_PARAMS, device(id), Some(params.as_mut_bytes()))
    }

    /// What the driver was told about a disk.
    pub(crate) fn params(&mut self, id: u32) -> Result<Params> {
        let len = u32::try_from(size_of::<Params>()).unwrap_or(0);
        let mut params = Params { len, ..Params::default() };
        self.send("GET_PARAMS", ctrl::GET_PARAMS, device(id), Some(params.as_mut_bytes()))?;
        Ok(params)
    }

    /// Says that a new server takes a device over. Refused as busy until the last one has let go of
    /// everything: its descriptors, its rings and what they had in flight.
    pub(crate) fn start_recovery(&mut self, id: u32) -> Result<()> {
        self.send("START_USER_RECOVERY", ctrl::START_USER_RECOVERY, device(id), None)
    }

    /// The new server is there: held requests come to it. All queues must have been fetched from;
    /// waits for that.
    pub(crate) fn end_recovery(&mut self, id: u32) -> Result<()> {
        self.send("END_USER_RECOVERY", ctrl::END_USER_RECOVERY, as_server(id), None)
    }

    /// Has new requests wait in the kernel, and ends the fetches that wait for one. What is being
    /// served can still be finished; the commits of that wait again, until this is called again.
    /// The driver may wait for up to `limit`, and 5 seconds at most, until each queue has a fetch
    /// that waits, and refuses it as busy if one has not.
    pub(crate) fn quiesce(&mut self, id: u32, limit: Duration) -> Result<()> {
        let limit = limit.min(IDLE_LIMIT);
        let data = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let command = CtrlCmd { data, ..device(id) };
        self.send("QUIESCE_DEV", ctrl::QUIESCE_DEV, command, None)
    }

    /// Changes a disk's size, in sectors of 512 bytes; users are told by a uevent.
    pub(crate) fn update_size(&mut self, id: u32, sectors: u64) -> Result<()> {
        let command = CtrlCmd { data: sectors, ..device(id) };
        self.send("UPDATE_SIZE", ctrl::UPDATE_SIZE, command, None)
    }

    /// Makes the disk appear. All queues must have been fetched from; waits for that.
    pub(crate) fn start(&mut self, id: u32) -> Result<()> {
        self.send("START_DEV", ctrl::START_DEV, as_server(id), None)
    }

    /// Removes the disk; waits for I/O in flight, which must be served meanwhile.
    ///
    /// # Errors
    /// If there is no such device or the driver hangs.
    pub fn stop(&mut self, id: u32) -> Result<()> {
        self.send("STOP_DEV", ctrl::STOP_DEV, device(id), None)
    }

    /// Deletes a device that no process has open, or lets it go as soon as none has.
    ///
    /// # Errors
    /// If there is no such device or the driver hangs.
    pub fn delete(&mut self, id: u32) -> Result<()> {
        // Before 6.9 or so there is only the waiting form, and for devices without privileges;
        // our own descriptors are closed by now.
        let done = match self.send("DEL_DEV_ASYNC", ctrl::DEL_DEV_ASYNC, device(id), None) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.send("DEL_DEV", ctrl::DEL_DEV, device(id), None)
            }
            done => done,
        };
        // The next device of that number may be another kind.
        self.is_users.remove(&id);
        done
    }

    pub(crate) fn info(&mut self, id: u32) -> Result<DevInfo> {
        let mut info = DevInfo::default();
        let may_be_users = self.features & F_UNPRIVILEGED != 0;
        let mut done = match self.is_users.get(&id) {
            Some(true) => Err(Error::new(ErrorKind::Unsupported, "GET_DEV_INFO", "has no path")),
            _ => {
                let data = Some(info.as_mut_bytes());
                self.send("GET_DEV_INFO", ctrl::GET_DEV_INFO, device(id), data)
            }
        };
        // That is what is said of one whose node has to be named. The other command is not for all:
        // where there is no node, nothing is told.
        if may_be_users && matches!(&done, Err(error) if error.kind() == ErrorKind::Unsupported) {
            let data = Some(info.as_mut_bytes());
            done = self.send("GET_DEV_INFO2", ctrl::GET_DEV_INFO2, device(id), data);
        }
        done?;
        self.is_users.insert(id, info.flags & F_UNPRIVILEGED != 0);
        Ok(info)
    }

    /// The process that serves a device (0 or -1 for none), and the device's state word.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn server(&mut self, id: u32) -> Result<(i32, &'static str)> {
        let info = self.info(id)?;
        let state = match info.state {
            0 => "dead",
            1 => "live",
            2 => "quiesced",
            3 => "fail-io",
            _ => "unknown",
        };
        Ok((info.ublksrv_pid, state))
    }

    /// The CPUs whose requests come to a queue, as a bit mask.
    pub(crate) fn affinity(&mut self, id: u32, queue: u16) -> Result<Vec<u8>> {
        let mut mask = vec![0_u8; 1024];
        let command = CtrlCmd { data: u64::from(queue), ..device(id) };
        self.send("GET_QUEUE_AFFINITY", ctrl::GET_QUEUE_AFFINITY, command, Some(&mut mask))?;
        Ok(mask)
    }
}

fn none() -> CtrlCmd {
    device(u32::MAX)
}

fn device(dev_id: u32) -> CtrlCmd {
    CtrlCmd { dev_id, queue_id: u16::MAX, ..CtrlCmd::default() }
}

/// A command about a device from the process that serves it.
fn as_server(id: u32) -> CtrlCmd {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    CtrlCmd { data: u64::try_from(pid).unwrap_or(0), ..device(id) }
}

fn explain(thing: String, errno: Errno) -> Error {
    let os = std::io::Error::from_raw_os_error(errno.raw());
    let error = Error::os(thing.clone(), &os);
    match errno {
        Errno::EPERM | Errno::EACCES => error.next(AS_WHOM),
        Errno::ENODEV => Error::new(ErrorKind::NotFound, thing, "no such device"),
        Errno::EOPNOTSUPP | Errno::EINVAL => {
            Error::new(ErrorKind::Unsupported, thing, os.to_string())
        }
        _ if errno.raw() == 17 => Error::new(ErrorKind::Busy, thing, "the number is taken"),
        Errno::EBUSY => error.next("another process holds the device"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    #[test]
    fn a_device_description_survives_the_wire() {
        let info = DevInfo { dev_id: 7, flags: 0x668c3, queue_depth: 64, ..DevInfo::default() };
        let read = DevInfo::read_from_bytes(info.as_bytes()).unwrap();
        assert_eq!((read.dev_id, read.flags, read.queue_depth), (7, 0x668c3, 64));
    }
}
