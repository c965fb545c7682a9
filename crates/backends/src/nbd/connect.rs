//! Answers for the way from an address to a socket behind which a server has given us its export.
//! The one place where such sockets are made, for the first connection and for every later one.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_nbd::Mode;
use devsplice_nbd::client::{Handshake, Outcome, Wish};
use devsplice_nbd::limits::HANDSHAKE_SECONDS;
use devsplice_nbd::uri::{Place, Uri};
use devsplice_tls::{Certificates, Client};
use devsplice_uring::{Link, vsock};
use rustix::net::sockopt;

use super::captive::Captive;

/// Where a server is.
pub(super) enum Target {
    /// Somewhere.
    At(Uri),
    /// It is a program of ours.
    Captive(Captive),
}

impl Target {
    /// What messages call it.
    pub(super) fn name(&self) -> String {
        match self {
            Target::At(uri) => uri.to_string(),
            Target::Captive(captive) => captive.name(),
        }
    }
}

/// How long a server may take to accept us.
const CONNECT: Duration = Duration::from_secs(HANDSHAKE_SECONDS);

/// Connects, and has the server give its export.
///
/// # Errors
/// If it cannot be reached, or does not give it.
pub(super) fn connect(target: &Target) -> Result<Link> {
    let (socket, export, tls) = match target {
        Target::At(uri) => (reach(&uri.place), uri.export.as_str(), client(uri)),
        Target::Captive(captive) => (captive.reach(), "", None),
    };
    let name = target.name();
    let socket = socket.map_err(|error| Error::os(&name, &error).next("is the server there?"))?;
    greet(socket, export, tls.as_ref()).map_err(|error| error.within(&name))
}

/// Our side of TLS, where an address asks for it.
fn client(uri: &Uri) -> Option<Client> {
    let tls = uri.tls.as_ref()?;
    let host = match &uri.place {
        Place::Tcp(host, _) => host.as_str(),
        // Without a name of their own they are this machine's, or near enough.
        Place::Unix(_) | Place::Vsock(..) => "localhost",
    };
    Some(Client {
        certificates: tls.certificates.clone().map(Certificates),
        verify: !tls.anybody,
        name: tls.name.clone().unwrap_or_else(|| host.to_owned()),
    })
}

/// A socket that is connected to a place.
fn reach(place: &Place) -> io::Result<OwnedFd> {
    match place {
        Place::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
        Place::Vsock(machine, port) => Ok(vsock::dial(*machine, *port)?),
        Place::Tcp(host, port) => {
            let mut last = io::Error::from(io::ErrorKind::NotFound);
            for address in (host.as_str(), *port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, CONNECT) {
                    Ok(stream) => return tuned(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

/// Requests are sent whole, and a machine that is gone is to be noticed.
fn tuned(stream: TcpStream) -> io::Result<OwnedFd> {
    stream.set_nodelay(true)?;
    let socket = OwnedFd::from(stream);
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(&socket, 3)?;
    Ok(socket)
}

/// Leads the handshake; inside TLS, if that is asked for.
fn greet(socket: OwnedFd, export: &str, tls: Option<&Client>) -> Result<Link> {
    let end = Instant::now() + CONNECT;
    let (name, mode, is_tls) = (export.to_owned(), Mode::Extended, tls.is_some());
    let mut handshake = Handshake::new(Wish { name, mode, allocation: true, tls: is_tls });
    let failed = |error: io::Error| Error::os("handshake", &error);
    let mut socket = socket;
    loop {
        talk(socket.as_fd(), &mut handshake, end)?;
        match (handshake.outcome(), tls) {
            (Outcome::Chosen(agreed), _) => {
                limit(socket.as_fd(), None).map_err(failed)?;
                if tls.is_none() {
                    // What is not sent when it is closed must not come after what the next
                    // connection says. With TLS the thread that has the socket sees to that.
                    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))
                        .map_err(|errno| failed(errno.into()))?;
                }
                return Ok(Link { agreed: agreed.clone(), socket });
            }
            (Outcome::Refused(reason), _) => return Err(Error::invalid("export", reason.clone())),
            (Outcome::Secure, Some(client)) => {
                socket = secure(socket, client, end)?;
                handshake.secured();
            }
            (Outcome::Open | Outcome::Secure, _) => {
                let reason = "nothing was agreed on";
                return Err(Error::new(ErrorKind::Os, "handshake", reason));
            }
        }
    }
}

/// A socket whose bytes go through TLS from here on.
fn secure(socket: OwnedFd, client: &Client, end: Instant) -> Result<OwnedFd> {
    let mut handshake = client.connect(socket)?;
    handshake.wait(end)?;
    // What becomes of it later is seen at the socket: it ends.
    let secured = handshake.finish(|reason| eprintln!("devsplice: nbd: TLS: {reason}"), || ())?;
    Ok(secured.socket)
}

/// Talks until the handshake has come to something.
fn talk(socket: BorrowedFd<'_>, handshake: &mut Handshake, end: Instant) -> Result<()> {
    let failed = |error: io::Error| Error::os("handshake", &error);
    let mut stream = Plain(socket);
    // The server says nothing of its own once something has come of it, so nothing is lost by
    // reading as much as there is.
    let mut bytes = [0; 4096];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let reason = format!("the server has not finished it in {HANDSHAKE_SECONDS} s");
            return Err(Error::new(ErrorKind::Timeout, "handshake", reason));
        }
        limit(socket, Some(left)).map_err(failed)?;
        while !handshake.output().is_empty() {
            let count = stream.write(handshake.output()).map_err(failed)?;
            handshake.sent(count);
        }
        if *handshake.outcome() != Outcome::Open {
            return Ok(());
        }
        let count = stream.read(&mut bytes).map_err(failed)?;
        let broken = |what: &str| Error::new(ErrorKind::Os, "handshake", what.to_owned());
        if count == 0 {
            return Err(broken("the server has closed the connection"));
        }
        let taken = handshake.receive(&bytes[..count]).map_err(|wrong| broken(wrong.0))?;
        if taken < count {
            // Behind the answer to STARTTLS, somebody else may have said it.
            return Err(broken("the server answers before it was asked"));
        }
    }
}

/// How long each call on a socket may take.
pub(super) fn limit(socket: BorrowedFd<'_>, limit: Option<Duration>) -> io::Result<()> {
    for which in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(socket, which, limit)?;
    }
    Ok(())
}

/// A socket as a stream that is read and written by turns.
pub(super) struct Plain<'a>(pub(super) BorrowedFd<'a>);

impl Read for Plain<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(self.0, &mut *into) {
                Err(rustix::io::Errno::INTR) => {}
                // What a socket with a limit says when it is over.
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                done => return Ok(done?),
            }
        }
    }
}

impl Write for Plain<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(self.0, from) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                done => return Ok(done?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
