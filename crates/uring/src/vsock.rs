//! Answers for sockets to virtual machines and their hosts (`AF_VSOCK`), which no library of ours
//! has addresses for.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

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

/// Connects to a port of a machine.
///
/// # Errors
/// As the kernel says.
pub fn dial(machine: u32, port: u32) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let address = Address(libc::sockaddr_vm {
        svm_family: AddressFamily::VSOCK.as_raw(),
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: machine,
        svm_zero: [0; 4],
    });
    connect(&socket, &address)?;
    Ok(socket)
}
