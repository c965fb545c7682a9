//! Answers for the bytes between a connection of s2n-tls and us: its callbacks, the only place here
//! where memory is given by pointers.

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use errno::{Errno, set_errno};
use s2n_tls::connection::Connection;
use s2n_tls::error::Error;

/// `EAGAIN` as Linux numbers it on every machine but some that are not built for.
const AGAIN: Errno = Errno(11);

/// What has come and what is to go.
#[derive(Default)]
pub(crate) struct Bytes {
    /// From the peer; what s2n-tls has taken are the first `taken` bytes.
    pub incoming: Vec<u8>,
    pub taken: usize,
    /// To the peer.
    pub outgoing: Vec<u8>,
}

/// A connection whose I/O is bytes.
pub(crate) struct Wire {
    // Dropped first: it has a pointer to what is behind it.
    pub connection: Connection,
    bytes: Arc<Mutex<Bytes>>,
}

impl Wire {
    pub(crate) fn new(mut connection: Connection) -> Result<Wire, Error> {
        let bytes = Arc::new(Mutex::new(Bytes::default()));
        let context = Arc::as_ptr(&bytes).cast_mut().cast::<c_void>();
        connection.set_receive_callback(Some(receive))?;
        connection.set_send_callback(Some(send))?;
        // SAFETY: the context is what `receive` takes it for, and lives as long as the connection:
        // `Wire` has both, gives neither away, and drops the connection first. Nothing is made of
        // the pointer but shared references.
        unsafe { connection.set_receive_context(context) }?;
        // SAFETY: as above, for `send`.
        unsafe { connection.set_send_context(context) }?;
        Ok(Wire { connection, bytes })
    }

    /// The bytes; not to be kept over a call to the connection, which takes them itself.
    pub(crate) fn bytes(&self) -> MutexGuard<'_, Bytes> {
        lock(&self.bytes)
    }
}

fn lock(bytes: &Mutex<Bytes>) -> MutexGuard<'_, Bytes> {
    // It is bytes: whoever has panicked has not left half of one.
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives s2n-tls what has come.
///
/// # Safety
/// `context` is a `Mutex<Bytes>`, and `to` has room for `room` bytes.
unsafe extern "C" fn receive(context: *mut c_void, to: *mut u8, room: u32) -> c_int {
    // SAFETY: `Wire::new` has made it of such a one, which is there as long as the connection.
    let bytes = unsafe { &*context.cast::<Mutex<Bytes>>() };
    let mut bytes = lock(bytes);
    let Bytes { incoming, taken, .. } = &mut *bytes;
    let rest = &incoming[*taken..];
    let count = rest.len().min(room as usize);
    let Some(result) = c_int::try_from(count).ok().filter(|count| *count > 0) else {
        // None at all would be the end; it goes on when more has come.
        set_errno(AGAIN);
        return -1;
    };
    // SAFETY: `rest` has `count` bytes, `to` has room for them, and nobody else has that room.
    unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), to, count) };
    *taken += count;
    result
}

/// Takes what s2n-tls wants to have sent; all of it.
///
/// # Safety
/// `context` is a `Mutex<Bytes>`, and `from` has `count` bytes.
unsafe extern "C" fn send(context: *mut c_void, from: *const u8, count: u32) -> c_int {
    let Some(result) = c_int::try_from(count).ok().filter(|count| *count > 0) else {
        set_errno(AGAIN);
        return -1;
    };
    // SAFETY: `Wire::new` has made it of such a one, which is there as long as the connection.
    let bytes = unsafe { &*context.cast::<Mutex<Bytes>>() };
    // SAFETY: s2n-tls gives bytes of its own that stay as they are until this returns; there is one
    // at least, so the pointer is one.
    let from = unsafe { std::slice::from_raw_parts(from, count as usize) };
    lock(bytes).outgoing.extend_from_slice(from);
    result
}
