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
use devsplice_tls::{Certificates, Client, Keys};
use devsplice_uring::{Link, vsock};
use rustix::net::{AddressFamily, sockopt};

use super::captive::Captive;
use super::given::Given;

/// Where a server is.
pub(super) enum Target {
    /// Somewhere.
    At(Uri),
    /// It is a program of ours.
    Captive(Captive),
    /// Behind a socket that we were started with.
    Given(Given),
}

impl Target {
    /// Whether it can be connected to again, and beside other connections.
    pub(super) fn is_there_again(&self) -> bool {
        !matches!(self, Target::Given(_))
    }

    /// What messages call it.
    pub(super) fn name(&self) -> String {
        match self {
            Target::At(uri) => uri.to_string(),
            Target::Captive(captive) => captive.name(),
            Target::Given(given) => given.name(),
        }
    }
}

/// How long a server may take to accept us.
const CONNECT: Duration = Duration::from_secs(HANDSHAKE_SECONDS);

/// Connects, and has the server give its export, to be asked in `mode` at best.
///
/// # Errors
/// If it cannot be reached, or does not give it.
pub(super) fn connect(target: &Target, mode: Mode) -> Result<Link> {
    connect_within(target, mode, CONNECT)
}

/// The same, of a server that takes no longer than that for each of the two.
pub(super) fn connect_within(target: &Target, mode: Mode, limit: Duration) -> Result<Link> {
    let (socket, export, tls) = match target {
        Target::At(uri) => (reach(&uri.place, limit), uri.export.as_str(), client(uri)),
        Target::Captive(captive) => (captive.reach(), "", None),
        Target::Given(given) => (Ok(given.reach()?), given.export.as_str(), None),
    };
    let name = target.name();
    let socket = socket.map_err(|error| Error::os(&name, &error).next("is the server there?"))?;
    greet(socket, (export, mode), (tls.as_ref(), limit)).map_err(|error| error.within(&name))
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
        user: tls.user.clone().map(|user| (user.name, Keys(user.keys))),
    })
}

/// A socket that is connected to a place.
fn reach(place: &Place, limit: Duration) -> io::Result<OwnedFd> {
    match place {
        Place::Unix(path) => roomy(UnixStream::connect(path)?.into()),
        Place::Vsock(machine, port) => Ok(vsock::dial(*machine, *port)?),
        Place::Tcp(host, port) => {
            let mut last = io::Error::from(io::ErrorKind::NotFound);
            for address in (host.as_str(), *port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, limit) {
                    Ok(stream) => return tuned(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

/// Bytes that a socket on this machine is to hold: some writes of 64 KiB. The kernel gives as much
/// as `net.core.wmem_max` allows, twice.
const ROOM: usize = 1 << 20;

/// A socket that takes writes while the server is busy with others.
pub(super) fn roomy(socket: OwnedFd) -> io::Result<OwnedFd> {
    sockopt::set_socket_send_buffer_size(&socket, ROOM)?;
    Ok(socket)
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
fn greet(
    socket: OwnedFd,
    (export, mode): (&str, Mode),
    (tls, limit_each): (Option<&Client>, Duration),
) -> Result<Link> {
    let end = Instant::now() + limit_each;
    let (name, is_tls) = (export.to_owned(), tls.is_some());
    let mut handshake = Handshake::new(Wish { name, mode, allocation: true, tls: is_tls });
    let failed = |error: io::Error| Error::os("handshake", &error);
    let (mut socket, mut beyond) = (socket, None);
    loop {
        talk(socket.as_fd(), &mut handshake, end)?;
        match (handshake.outcome(), tls) {
            (Outcome::Chosen(agreed), _) => {
                limit(socket.as_fd(), None).map_err(failed)?;
                if tls.is_none() {
                    // What is not sent when it is closed must not come after what the next
                    // connection says. With TLS the thread that has the socket sees to that. Over
                    // a socket of this machine nothing can: there the ring waits.
                    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))
                        .map_err(|errno| failed(errno.into()))?;
                }
                return Ok(Link { agreed: agreed.clone(), socket, beyond });
            }
            (Outcome::Refused(reason), _) => return Err(Error::invalid("export", reason.clone())),
            (Outcome::Secure, Some(client)) => {
                if sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX) {
                    beyond = Some(socket.try_clone().map_err(failed)?);
                }
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
            let reason = "the server has not finished it in time";
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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use devsplice_nbd::server::{self, Offer};
    use devsplice_nbd::wire::can;

    use super::*;

    /// Gives a client an export, and nothing after that.
    fn serve(stream: &mut TcpStream) {
        let (name, flags) = ("a".to_owned(), can::HAS_FLAGS);
        let (block, preferred, size) = (512, 4096, 1 << 20);
        let offer = Offer { description: name.clone(), name, size, flags, block, preferred };
        let mut handshake = server::Handshake::new(vec![offer]);
        let mut bytes = [0; 4096];
        loop {
            while !handshake.output().is_empty() {
                let count = stream.write(handshake.output()).unwrap();
                handshake.sent(count);
            }
            if matches!(handshake.outcome(), server::Outcome::Chosen(_)) {
                return;
            }
            let mut rest = stream.read(&mut bytes).map(|count| &bytes[..count]).unwrap();
            while !rest.is_empty() {
                let taken = handshake.receive(rest).unwrap();
                rest = &rest[taken..];
            }
        }
    }

    #[test]
    fn what_a_connection_has_not_sent_goes_with_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = Place::Tcp("127.0.0.1".to_owned(), listener.local_addr().unwrap().port());
        let (sent, mut theirs) = std::thread::scope(|scope| {
            let serving = scope.spawn(|| {
                let mut stream = listener.accept().unwrap().0;
                serve(&mut stream);
                stream
            });
            let socket = reach(&place, CONNECT).unwrap();
            let link = greet(socket, ("a", Mode::Extended), (None, CONNECT)).unwrap();
            let theirs = serving.join().unwrap();
            let flags = rustix::net::SendFlags::DONTWAIT;
            let mut sent = 0;
            while let Ok(count) = rustix::net::send(&link.socket, &[7; 1 << 16], flags) {
                sent += count;
            }
            rustix::net::shutdown(&link.socket, rustix::net::Shutdown::Both).unwrap();
            (sent, theirs)
        });
        let mut rest = Vec::new();
        theirs.set_read_timeout(Some(CONNECT)).unwrap();
        let error = theirs.read_to_end(&mut rest).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(rest.len() < sent, "{} of {sent} bytes have come", rest.len());
    }
}
