//! Answers for whether this kernel's TLS does all that is needed, which is tried once for each
//! cipher between two sockets of our own: data, a record that is none, and new keys (Linux 6.14).

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use devsplice_uring::ktls::{self, Cipher, Direction, Keys};
use rustix::io::Errno;

/// What is known of each; until when, where that is no answer for good.
static KNOWN: Mutex<Vec<(Cipher, bool, Option<Instant>)>> = Mutex::new(Vec::new());
/// How long a byte may take from one end of a pair to the other.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it is not tried again where something was short: who waits for it greets clients.
const PAUSE: Duration = Duration::from_secs(60);

/// Whether it does it with this cipher.
pub(crate) fn can(cipher: Cipher) -> bool {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.retain(|(.., until)| until.is_none_or(|until| Instant::now() < until));
    if let Some((_, can, _)) = known.iter().find(|(one, ..)| *one == cipher) {
        return *can;
    }
    let tried = rehearse(cipher);
    let until = verdict(&tried).is_none().then(|| Instant::now() + PAUSE);
    known.push((cipher, tried.is_ok(), until));
    tried.is_ok()
}

/// What an attempt says of all others, if it does: not where something was short.
fn verdict(tried: &Result<(), Errno>) -> Option<bool> {
    match tried {
        Ok(()) => Some(true),
        // No TLS, or not with this cipher; no new keys.
        Err(
            Errno::NOENT
            | Errno::OPNOTSUPP
            | Errno::NOPROTOOPT
            | Errno::INVAL
            | Errno::BUSY
            | Errno::PROTO,
        ) => Some(false),
        Err(_) => None,
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn pair() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // A firewall may keep even these apart.
    let ours = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
    listener.set_nonblocking(true)?;
    let (theirs, from) = listener.accept()?;
    if from != ours.local_addr()? {
        // Somebody else was quicker; it is tried again with the next connection.
        return Err(std::io::ErrorKind::ConnectionAborted.into());
    }
    for socket in [&ours, &theirs] {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
    }
    Ok((ours, theirs))
}

/// Plays a connection through, one way.
fn rehearse(cipher: Cipher) -> Result<(), Errno> {
    let (mut from, mut to) = pair().map_err(|error| errno(&error))?;
    let key = [1; 32];
    let keys = |first| Keys {
        cipher,
        key: &key[..cipher.key_len()],
        nonce: if first { &[2; 12] } else { &[3; 12] },
        number: 0,
    };
    for (socket, way) in [(&from, Direction::Send), (&to, Direction::Receive)] {
        ktls::attach(socket)?;
        ktls::set_keys(socket, way, &keys(true))?;
    }
    let mut bytes = [0; 8];
    from.write_all(b"one").map_err(|error| errno(&error))?;
    to.read_exact(&mut bytes[..3]).map_err(|error| errno(&error))?;
    // One that asks for new keys: a receive fails, and leaves it.
    let update = [24, 0, 0, 1, 0];
    ktls::send(&from, ktls::HANDSHAKE, &update)?;
    ktls::set_keys(&from, Direction::Send, &keys(false))?;
    from.write_all(b"two").map_err(|error| errno(&error))?;
    match to.read(&mut bytes) {
        Err(error) if errno(&error) == Errno::IO => {}
        Err(error) => return Err(errno(&error)),
        Ok(_) => return Err(Errno::PROTO),
    }
    if ktls::receive(&to, &mut bytes)? != (Some(ktls::HANDSHAKE), 5) || bytes[..5] != update {
        return Err(Errno::PROTO);
    }
    ktls::set_keys(&to, Direction::Receive, &keys(false))?;
    to.read_exact(&mut bytes[..3]).map_err(|error| errno(&error))?;
    if &bytes[..3] == b"two" { Ok(()) } else { Err(Errno::PROTO) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_short_once_is_no_answer() {
        assert_eq!(verdict(&Ok(())), Some(true));
        for errno in [Errno::NOENT, Errno::BUSY, Errno::PROTO] {
            assert_eq!(verdict(&Err(errno)), Some(false), "{errno}");
        }
        for errno in [Errno::MFILE, Errno::NOMEM, Errno::NOBUFS, Errno::AGAIN, Errno::CONNABORTED] {
            assert_eq!(verdict(&Err(errno)), None, "{errno}");
        }
    }
}
