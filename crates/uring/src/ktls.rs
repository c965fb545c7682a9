//! Answers for TLS by the kernel (kTLS): handing it keys, and records that are no data.
//!
//! Constants and layouts: include/uapi/linux/tls.h. A receive that meets a record that is no data
//! fails with `EIO` and leaves it where it is (net/tls/tls_sw.c, `tls_record_content_type`, Linux
//! 6.14 to 7.3); [`receive`] takes it. After a `KeyUpdate` nothing is decrypted before new keys are
//! there.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::net::{AddressFamily, ipproto, sockopt};

use crate::uapi::{MSG_NOSIGNAL, MSG_WAITALL};

/// Types of records (RFC 8446, section 5.1).
pub const ALERT: u8 = 21;
/// As [`ALERT`].
pub const HANDSHAKE: u8 = 22;
/// As [`ALERT`].
pub const DATA: u8 = 23;

/// `TLS_1_3_VERSION`.
const VERSION: u16 = 0x0304;
/// Bytes of the largest `struct tls12_crypto_info_*`.
const MAX_INFO: usize = 56;
/// Bytes of a number only used once, and of a record's number.
const NONCE: usize = 12;
const NUMBER: usize = 8;

/// How a ring sends over a socket, all of it or as much as there is room for. Where the kernel does
/// its TLS, all cannot be asked for (net/tls/tls_sw.c, `tls_sw_sendmsg`, Linux 7.3: `EOPNOTSUPP`).
pub(crate) fn send_flags(is_sealed: bool) -> u32 {
    MSG_NOSIGNAL | if is_sealed { 0 } else { MSG_WAITALL }
}

/// Set for good when somebody wants it.
static WANTED: AtomicBool = AtomicBool::new(false);

/// Says that threads which begin from now on may have to do with it.
pub fn want() {
    WANTED.store(true, Ordering::Release);
}

/// Whether that was said.
#[must_use]
pub fn is_wanted() -> bool {
    WANTED.load(Ordering::Acquire)
}

/// What is left to do in this process where the kernel does TLS over a socket: records that are no
/// data, and the keys that they bring.
pub trait Records: Send + std::fmt::Debug {
    /// Takes the record that has made a receive fail with `EIO`; whether more can come. No receive
    /// is out.
    ///
    /// # Errors
    /// If the connection is of no use any more; why.
    fn hear(&mut self, socket: BorrowedFd<'_>) -> std::result::Result<bool, String>;

    /// So many bytes went with a send.
    fn sent(&mut self, bytes: u64);

    /// Whether the keys for what is sent are to be renewed.
    fn is_due(&self) -> bool;

    /// Renews them, or leaves that for later where there is no room for a record. No send is out.
    ///
    /// # Errors
    /// As [`Records::hear`].
    fn renew(&mut self, socket: BorrowedFd<'_>) -> std::result::Result<(), String>;

    /// Tells the peer that nothing more comes. Whether that is done, or can never be: if not, there
    /// was no room for it, and this is to be called again when there is. No send is out.
    fn close(&mut self, socket: BorrowedFd<'_>) -> bool;
}

/// How records are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// `TLS_CIPHER_AES_GCM_128`.
    Aes128Gcm,
    /// `TLS_CIPHER_AES_GCM_256`.
    Aes256Gcm,
    /// `TLS_CIPHER_CHACHA20_POLY1305`.
    Chacha20Poly1305,
}

impl Cipher {
    fn number(self) -> u16 {
        match self {
            Cipher::Aes128Gcm => libc::TLS_CIPHER_AES_GCM_128,
            Cipher::Aes256Gcm => libc::TLS_CIPHER_AES_GCM_256,
            Cipher::Chacha20Poly1305 => libc::TLS_CIPHER_CHACHA20_POLY1305,
        }
    }

    /// Bytes of its key.
    #[must_use]
    pub fn key_len(self) -> usize {
        if self == Cipher::Aes128Gcm { 16 } else { 32 }
    }

    /// Bytes of the nonce that the kernel calls the salt.
    fn salt_len(self) -> usize {
        if self == Cipher::Chacha20Poly1305 { 0 } else { 4 }
    }
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What is sent.
    Send,
    /// What is received.
    Receive,
}

/// Keys of one way of a connection.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// How records are encrypted.
    pub cipher: Cipher,
    /// As long as [`Cipher::key_len`] says.
    pub key: &'a [u8],
    /// 12 bytes.
    pub nonce: &'a [u8],
    /// The number of the next record.
    pub number: u64,
}

/// `struct tls12_crypto_info_*` of TLS 1.3: version, cipher, nonce without salt, key, salt, number.
fn info(keys: &Keys<'_>) -> Result<([u8; MAX_INFO], usize), Errno> {
    let Keys { cipher, key, nonce, number } = *keys;
    if key.len() != cipher.key_len() || nonce.len() != NONCE {
        return Err(Errno::INVAL);
    }
    let (salt, rest) = nonce.split_at(cipher.salt_len());
    let (version, which) = (VERSION.to_ne_bytes(), cipher.number().to_ne_bytes());
    let mut bytes = [0; MAX_INFO];
    let mut len = 0;
    for part in [&version[..], &which, rest, key, salt, &number.to_be_bytes()] {
        bytes[len..len + part.len()].copy_from_slice(part);
        len += part.len();
    }
    debug_assert_eq!(len, 4 + NONCE + key.len() + NUMBER);
    Ok((bytes, len))
}

fn set(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
    let len = libc::socklen_t::try_from(value.len()).map_err(|_| Errno::INVAL)?;
    let (fd, from) = (socket.as_raw_fd(), value.as_ptr().cast());
    // SAFETY: the kernel reads `len` bytes, which `value` has, before the call returns.
    let result = unsafe { libc::setsockopt(fd, level, name, from, len) };
    if result == 0 { Ok(()) } else { Err(last()) }
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Whether a socket is of the kind that has TLS in the kernel.
#[must_use]
pub fn is_tcp(socket: BorrowedFd<'_>) -> bool {
    let domain = sockopt::socket_domain(socket);
    matches!(domain, Ok(AddressFamily::INET | AddressFamily::INET6))
        && sockopt::socket_protocol(socket) == Ok(Some(ipproto::TCP))
}

/// Has a connected socket of TCP take keys from now on.
///
/// # Errors
/// As the kernel says: `ENOENT` where it has no TLS.
pub fn attach(socket: impl AsFd) -> Result<(), Errno> {
    set(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
}

/// Gives the kernel keys of one way: the first, or those after a `KeyUpdate`. No entry that sends,
/// or receives, is out.
///
/// # Errors
/// As the kernel says: `EBUSY` where it renews none (before Linux 6.14).
pub fn set_keys(socket: impl AsFd, way: Direction, keys: &Keys<'_>) -> Result<(), Errno> {
    let name = match way {
        Direction::Send => libc::TLS_TX,
        Direction::Receive => libc::TLS_RX,
    };
    let (bytes, len) = info(keys)?;
    set(socket.as_fd(), libc::SOL_TLS, name, &bytes[..len])
}

/// `struct cmsghdr` with a record's type behind it.
#[repr(C)]
struct Kind {
    head: libc::cmsghdr,
    kind: u8,
    padding: [u8; 7],
}

/// What `cmsg_len` says of it: without the padding.
const KIND_LEN: usize = size_of::<libc::cmsghdr>() + 1;

impl Kind {
    fn new(kind: u8) -> Kind {
        let head = libc::cmsghdr {
            cmsg_len: KIND_LEN,
            cmsg_level: libc::SOL_TLS,
            cmsg_type: libc::TLS_SET_RECORD_TYPE,
        };
        Kind { head, kind, padding: [0; 7] }
    }
}

fn message(part: &mut libc::iovec, control: &mut Kind) -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: part,
        msg_iovlen: 1,
        msg_control: std::ptr::from_mut(control).cast(),
        msg_controllen: size_of::<Kind>(),
        msg_flags: 0,
    }
}

/// Sends a record of another type, without waiting.
///
/// # Errors
/// As the kernel says: `EAGAIN` if there is no room, and nothing of it went.
pub fn send(socket: impl AsFd, kind: u8, bytes: &[u8]) -> Result<(), Errno> {
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Kind::new(kind);
    let message = message(&mut part, &mut control);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: all that `message` names lives here, has the size that is said, and is only read.
    let sent = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) };
    match usize::try_from(sent) {
        Ok(count) if count == bytes.len() => Ok(()),
        Ok(_) => Err(Errno::IO),
        Err(_) => Err(last()),
    }
}

/// Takes the record that a receive has met, without waiting: its type, and its length. No type is
/// the end.
///
/// # Errors
/// As the kernel says: `EBADMSG` if it cannot be decrypted.
pub fn receive(socket: impl AsFd, into: &mut [u8]) -> Result<(Option<u8>, usize), Errno> {
    let mut part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let mut control = Kind::new(0);
    (control.head.cmsg_len, control.head.cmsg_level) = (0, 0);
    let mut message = message(&mut part, &mut control);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: all that `message` names lives here, is ours alone and has the size that is said.
    let got = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) };
    let Ok(count) = usize::try_from(got) else { return Err(last()) };
    let Kind { head, kind, padding: _ } = control;
    let has_kind = message.msg_controllen >= KIND_LEN
        && (head.cmsg_level, head.cmsg_type) == (libc::SOL_TLS, libc::TLS_GET_RECORD_TYPE);
    Ok((has_kind.then_some(kind), count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_laid_out_as_the_kernel_has_them() {
        let nonce: Vec<u8> = (1..=12).collect();
        let (key, number) = ([7; 32], 0x0102);
        let keys =
            |cipher: Cipher| Keys { cipher, key: &key[..cipher.key_len()], nonce: &nonce, number };
        let (bytes, len) = info(&keys(Cipher::Aes128Gcm)).unwrap();
        assert_eq!(len, size_of::<libc::tls12_crypto_info_aes_gcm_128>());
        assert_eq!(&bytes[4..12], &nonce[4..], "the explicit part");
        assert_eq!(&bytes[28..32], &nonce[..4], "the salt");
        assert_eq!(&bytes[32..40], &[0, 0, 0, 0, 0, 0, 1, 2]);
        let (_, len) = info(&keys(Cipher::Aes256Gcm)).unwrap();
        assert_eq!(len, size_of::<libc::tls12_crypto_info_aes_gcm_256>());
        let (bytes, len) = info(&keys(Cipher::Chacha20Poly1305)).unwrap();
        assert_eq!(len, size_of::<libc::tls12_crypto_info_chacha20_poly1305>());
        assert_eq!(&bytes[4..16], &nonce[..]);
        let short = Keys { key: &key[..5], ..keys(Cipher::Aes128Gcm) };
        assert_eq!(info(&short).err(), Some(Errno::INVAL));
    }

    #[test]
    fn only_tcp_has_it() {
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(!is_tcp(unix.as_fd()));
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is_tcp(tcp.as_fd()));
    }
}
