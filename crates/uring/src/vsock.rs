//! Answers for sockets to virtual machines and their hosts (`AF_VSOCK`), which no library of ours
//! has addresses for.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, connect, listen as listen_at, socket_with,
};

struct Address(libc::sockaddr_vm);

// SAFETY: the function is given the address and the exact size of a live `struct sockaddr_vm`.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        let len = u32::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or(0);
        f(std::ptr::from_ref(&self.0).cast(), len)
    }
}

impl Address {
    fn of(machine: u32, port: u32) -> Address {
        Address(libc::sockaddr_vm {
            svm_family: AddressFamily::VSOCK.as_raw(),
            svm_reserved1: 0,
            svm_port: port,
            svm_cid: machine,
            svm_zero: [0; 4],
        })
    }
}

/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// Connects to a port of a machine.
///
/// # Errors
/// As the kernel says.
pub fn dial(machine: u32, port: u32) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    connect(&socket, &Address::of(machine, port))?;
    Ok(socket)
}

/// Listens at a port as a machine; nobody waits who accepts.
///
/// # Errors
/// As the kernel says.
pub fn listen(machine: u32, port: u32) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    bind(&socket, &Address::of(machine, port))?;
    listen_at(&socket, BACKLOG)?;
    Ok(socket)
}

type Ask = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

/// Machine and port of a socket's own end.
///
/// # Errors
/// As the kernel says; `EAFNOSUPPORT` of another kind of socket.
pub fn own(socket: impl AsFd) -> Result<(u32, u32), Errno> {
    ask(socket, libc::getsockname)
}

/// Machine and port of its other end.
///
/// # Errors
/// As [`own`].
pub fn peer(socket: impl AsFd) -> Result<(u32, u32), Errno> {
    ask(socket, libc::getpeername)
}

fn ask(socket: impl AsFd, call: Ask) -> Result<(u32, u32), Errno> {
    let Address(mut found) = Address::of(0, 0);
    let size = libc::socklen_t::try_from(size_of_val(&found)).unwrap_or(0);
    let mut len = size;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `len` bytes to `found`, which has as many, and `len`,
    // before the call returns.
    let result = unsafe { call(fd, (&raw mut found).cast(), &raw mut len) };
    if result != 0 {
        let raw = std::io::Error::last_os_error().raw_os_error();
        return Err(raw.map_or(Errno::IO, Errno::from_raw_os_error));
    }
    if len < size || found.svm_family != AddressFamily::VSOCK.as_raw() {
        return Err(Errno::AFNOSUPPORT);
    }
    Ok((found.svm_cid, found.svm_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_other_kinds_have_no_machine() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(own(&one).is_err() && peer(&one).is_err());
    }
}
