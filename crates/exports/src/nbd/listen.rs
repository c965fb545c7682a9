//! Answers for where clients come in, and for who may.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use devsplice_core::{Error, ErrorKind, Result};
use devsplice_nbd::uri::{Place, Uri};
use devsplice_uring::vsock;
use rustix::net::sockopt::socket_type;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Bytes of replies that a socket of this machine takes, half of what the kernel then counts to.
const ROOM: usize = 1 << 20;

/// Who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Processes of this user, over a socket in the file system.
    User(u32),
    /// Addresses that begin with so many bits of this one.
    Net(IpAddr, u8),
    /// The virtual machine of this number, or its host, over vsock.
    Machine(u32),
}

impl Rule {
    /// Reads `uid:1000`, `cid:3`, `192.0.2.7`, `192.0.2.0/24` or `2001:db8::/32`.
    ///
    /// # Errors
    /// If it is none of these.
    pub fn parse(text: &str) -> Result<Rule> {
        let wrong = || {
            Error::invalid(text, "says nobody who may connect")
                .next("write uid:1000, cid:3, 192.0.2.7 or 192.0.2.0/24")
        };
        if let Some(user) = text.strip_prefix("uid:") {
            return user.parse().map(Rule::User).map_err(|_| wrong());
        }
        if let Some(machine) = text.strip_prefix("cid:") {
            return machine.parse().map(Rule::Machine).map_err(|_| wrong());
        }
        let (address, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), str::parse).map_err(|_| wrong())?;
        if bits > most { Err(wrong()) } else { Ok(Rule::Net(address, bits)) }
    }

    fn has(self, peer: &Peer) -> bool {
        let leading = |a: u128, b: u128, width: u8, bits: u8| {
            let shift = u32::from(width - bits);
            a.checked_shr(shift).unwrap_or(0) == b.checked_shr(shift).unwrap_or(0)
        };
        match (self, peer) {
            (Rule::User(user), Peer::Process { user: theirs, .. }) => user == *theirs,
            (Rule::Machine(machine), Peer::Machine(theirs, _)) => machine == *theirs,
            (Rule::Net(net, bits), Peer::Address(address)) => {
                match (net, address.ip().to_canonical()) {
                    (IpAddr::V4(net), IpAddr::V4(ip)) => {
                        leading(u128::from(net.to_bits()), u128::from(ip.to_bits()), 32, bits)
                    }
                    (IpAddr::V6(net), IpAddr::V6(ip)) => {
                        leading(net.to_bits(), ip.to_bits(), 128, bits)
                    }
                    _ => false,
                }
            }
            _ => false,
        }
    }
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Process { user: u32, process: i32 },
    Address(SocketAddr),
    Machine(u32, u32),
}

impl Peer {
    pub(super) fn shown(&self) -> String {
        match self {
            Peer::Process { user, process } => format!("process {process} of user {user}"),
            Peer::Address(address) => address.to_string(),
            Peer::Machine(machine, port) => format!("port {port} of machine {machine}"),
        }
    }

    /// Whether nothing but the network stands between us.
    pub(super) fn is_remote(&self) -> bool {
        !matches!(self, Peer::Process { .. })
    }

    /// Whether it may connect. Without a rule of its kind: any address and machine that reaches us,
    /// and of processes those that could read our memory as well.
    pub(super) fn may_enter(&self, rules: &[Rule]) -> bool {
        let by_default = match self {
            Peer::Address(_) => !rules.iter().any(|rule| matches!(rule, Rule::Net(..))),
            Peer::Machine(..) => !rules.iter().any(|rule| matches!(rule, Rule::Machine(_))),
            Peer::Process { user, .. } => {
                *user == 0 || *user == rustix::process::geteuid().as_raw()
            }
        };
        by_default || rules.iter().any(|rule| rule.has(self))
    }
}

/// A socket that clients connect to.
pub(super) enum Listener {
    /// With its file, and whether that is removed when it goes.
    Unix(UnixListener, PathBuf, bool),
    Tcp(TcpListener),
    /// With the machine that it listens as.
    Vsock(OwnedFd, u32),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(listener, ..) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Vsock(listener, _) => listener.as_fd(),
        }
    }
}

impl Listener {
    /// Listens at each address that a place has. `rules` decide who can open a socket's file.
    pub(super) fn open(place: &Place, rules: &[Rule]) -> Result<Vec<Listener>> {
        match place {
            Place::Unix(path) => unix(path, rules).map(|listener| vec![listener]),
            Place::Vsock(machine, port) => {
                let listener = vsock::listen(*machine, *port).map_err(|errno| {
                    Error::os(format!("nbd+vsock://{machine}:{port}"), &errno.into()).next(
                        "nbd+vsock://any:PORT; another port if this one is taken; below 1024 is \
                         root's",
                    )
                })?;
                Ok(vec![Listener::Vsock(listener, *machine)])
            }
            Place::Tcp(host, port) => {
                let name = format!("{host}:{port}");
                let os = |error: &io::Error| Error::os(name.clone(), error);
                let all = (host.as_str(), *port).to_socket_addrs().map_err(|error| os(&error))?;
                let mut listeners = Vec::new();
                for address in all {
                    let listener = TcpListener::bind(address).map_err(|error| os(&error))?;
                    listener.set_nonblocking(true).map_err(|error| os(&error))?;
                    listeners.push(Listener::Tcp(listener));
                }
                Ok(listeners)
            }
        }
    }

    /// Takes a socket that somebody else listens at and has passed on. Its file is theirs.
    pub(super) fn adopt(socket: OwnedFd) -> Result<Listener> {
        const NEXT: &str = "ListenStream= with a path, a port or vsock:CID:PORT";
        let os = |error: &io::Error| Error::os("a socket that was passed", error).next(NEXT);
        let wrong = |why: &str| Err(Error::invalid("a socket that was passed", why).next(NEXT));
        // Others would lose the rest of what a receive has no room for.
        if socket_type(&socket).map_err(|errno| os(&errno.into()))? != SocketType::STREAM {
            return wrong("is none of a stream");
        }
        rustix::io::ioctl_fionbio(&socket, true).map_err(|errno| os(&errno.into()))?;
        match rustix::net::sockopt::socket_domain(&socket) {
            Ok(AddressFamily::UNIX) => {
                let listener = UnixListener::from(socket);
                let address = listener.local_addr().map_err(|error| os(&error))?;
                let Some(path) = address.as_pathname().map(Path::to_owned) else {
                    return wrong("has no file, so no address of NBD says where it is");
                };
                Ok(Listener::Unix(listener, path, false))
            }
            Ok(AddressFamily::INET | AddressFamily::INET6) => {
                Ok(Listener::Tcp(TcpListener::from(socket)))
            }
            Ok(AddressFamily::VSOCK) => {
                let (machine, _) = vsock::own(&socket).map_err(|errno| os(&errno.into()))?;
                Ok(Listener::Vsock(socket, machine))
            }
            _ => wrong("is of no kind that NBD has"),
        }
    }

    /// Where it listens, and whether all have to speak TLS there: the port is the one that it has
    /// got if none was asked for.
    pub(super) fn uri(&self, export: &str, is_secure: bool) -> Uri {
        let export = export.to_owned();
        let place = match self {
            Listener::Unix(_, path, _) => Place::Unix(path.clone()),
            Listener::Vsock(listener, machine) => {
                let port = vsock::own(listener).map_or(0, |(_, port)| port);
                Place::Vsock(*machine, port)
            }
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => Place::Tcp(address.ip().to_string(), address.port()),
                Err(_) => Place::Tcp("localhost".to_owned(), devsplice_nbd::uri::PORT),
            },
        };
        let tls = is_secure.then(devsplice_nbd::uri::Tls::default);
        Uri { place, export, tls }
    }

    /// The next client, if one waits. `ConnectionAborted` if it has left already.
    pub(super) fn accept(&self) -> io::Result<(OwnedFd, Peer)> {
        match self {
            Listener::Unix(listener, ..) => {
                let fd = OwnedFd::from(listener.accept()?.0);
                let who = rustix::net::sockopt::socket_peercred(&fd)?;
                make_room(&fd);
                let process = who.pid.as_raw_nonzero().get();
                Ok((fd, Peer::Process { user: who.uid.as_raw(), process }))
            }
            Listener::Tcp(listener) => {
                let (stream, address) = listener.accept()?;
                // Replies are sent whole; waiting for more to send would only delay them.
                stream.set_nodelay(true).map_err(|_| left())?;
                let fd = OwnedFd::from(stream);
                rustix::net::sockopt::set_socket_keepalive(&fd, true).map_err(|_| left())?;
                Ok((fd, Peer::Address(address)))
            }
            Listener::Vsock(listener, _) => {
                let fd = rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?;
                let (machine, port) = vsock::peer(&fd).map_err(|_| left())?;
                Ok((fd, Peer::Machine(machine, port)))
            }
        }
    }
}

fn left() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

/// Has a socket of this machine take what a client may have in flight: with what it takes by
/// default a reply of 128 KiB waits for the client to have taken most of the one before.
fn make_room(socket: &OwnedFd) {
    use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
    if set_socket_send_buffer_size_force(socket, ROOM).is_err() {
        // As much as anybody may (net.core.wmem_max). It works with less.
        let _ = set_socket_send_buffer_size(socket, ROOM);
    }
}

/// Whether a socket's other end is on this machine, and nothing but bytes pass it.
pub(super) fn is_local(socket: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path, true) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn unix(path: &Path, rules: &[Rule]) -> Result<Listener> {
    let name = path.display().to_string();
    let os = |error: &io::Error| Error::os(name.clone(), error);
    if let Err(error) = UnixStream::connect(path) {
        // The socket of a server that is gone. Anything else there is somebody's.
        if error.kind() == io::ErrorKind::ConnectionRefused && is_socket(path) {
            let _ = std::fs::remove_file(path);
        }
    } else {
        return Err(Error::new(ErrorKind::Busy, name, "another server listens there")
            .next("stop it, or choose another path"));
    }
    let listener = UnixListener::bind(path).map_err(|error| os(&error))?;
    // From here on the file is removed again in any case.
    let listener = Listener::Unix(listener, path.to_owned(), true);
    let Listener::Unix(socket, ..) = &listener else { return Ok(listener) };
    socket.set_nonblocking(true).map_err(|error| os(&error))?;
    // Who else may come in is asked of each; see `Peer::may_enter`.
    let others = rules.iter().any(|rule| matches!(rule, Rule::User(_)));
    let mode = if others { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(|error| os(&error))?;
    Ok(listener)
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Peer {
        Peer::Address(SocketAddr::new(text.parse().unwrap(), 1))
    }

    #[test]
    fn a_rule_lets_in_those_that_it_names_and_then_no_others() {
        let rules: Vec<_> = ["192.0.2.0/24", "2001:db8::/32", "198.51.100.7"]
            .map(|t| Rule::parse(t).unwrap())
            .into();
        for (peer, may) in [
            ("192.0.2.255", true),
            ("192.0.3.0", false),
            ("::ffff:192.0.2.1", true),
            ("2001:db8:1::1", true),
            ("2001:db9::1", false),
            ("198.51.100.7", true),
            ("198.51.100.8", false),
        ] {
            assert_eq!(address(peer).may_enter(&rules), may, "{peer}");
        }
        assert!(address("203.0.113.1").may_enter(&[]));
        assert!(address("203.0.113.1").may_enter(&[Rule::parse("0.0.0.0/0").unwrap()]));
        assert!(!address("203.0.113.1").may_enter(&[Rule::parse("::/0").unwrap()]));
    }

    #[test]
    fn a_process_of_another_user_needs_a_rule() {
        let peer = Peer::Process { user: 4_000_000, process: 1 };
        assert!(!peer.may_enter(&[]));
        assert!(!peer.may_enter(&[Rule::parse("0.0.0.0/0").unwrap()]));
        assert!(peer.may_enter(&[Rule::parse("uid:4000000").unwrap()]));
        assert!(Peer::Process { user: 0, process: 1 }.may_enter(&[Rule::User(7)]));
    }

    #[test]
    fn a_machine_is_known_by_its_number() {
        let peer = Peer::Machine(7, 1);
        assert!(peer.is_remote() && peer.may_enter(&[]));
        assert!(peer.may_enter(&[Rule::parse("cid:7").unwrap()]));
        assert!(!peer.may_enter(&[Rule::parse("cid:8").unwrap()]));
        // Rules of other kinds say nothing about machines.
        assert!(peer.may_enter(&[Rule::parse("192.0.2.7").unwrap(), Rule::User(7)]));
        assert!(!Peer::Process { user: 4_000_000, process: 1 }.may_enter(&[Rule::Machine(7)]));
    }

    #[test]
    fn a_passed_socket_is_listened_at_and_its_file_stays() {
        let dir = std::env::temp_dir().join(format!("devsplice-passed-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("socket");
        let socket = OwnedFd::from(UnixListener::bind(&path).unwrap());
        let listener = Listener::adopt(socket).unwrap();
        assert_eq!(listener.uri("x", false).place, Place::Unix(path.clone()));
        assert!(listener.accept().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock));
        let _client = UnixStream::connect(&path).unwrap();
        assert!(matches!(listener.accept(), Ok((_, Peer::Process { .. }))));
        drop(listener);
        assert!(is_socket(&path), "it is somebody else's");
        std::fs::remove_dir_all(&dir).unwrap();

        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let listener = Listener::adopt(tcp.into()).unwrap();
        assert_eq!(listener.uri("x", false).to_string(), format!("nbd://127.0.0.1:{port}/x"));
        let other = std::io::pipe().unwrap().0;
        assert!(Listener::adopt(other.into()).is_err());
    }

    #[test]
    fn a_passed_socket_that_is_no_stream_or_has_no_file_is_refused() {
        use rustix::net::{SocketAddrUnix, bind, listen, socket};
        use std::os::linux::net::SocketAddrExt;
        let packets = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        let path = std::env::temp_dir().join(format!("devsplice-packets-{}", std::process::id()));
        bind(&packets, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&packets, 1).unwrap();
        std::fs::remove_file(&path).unwrap();
        let name = format!("devsplice-abstract-{}", std::process::id());
        let name = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
        let nameless = UnixListener::bind_addr(&name).unwrap();
        for (socket, why) in [(packets, "stream"), (nameless.into(), "no file")] {
            let said = Listener::adopt(socket).err().unwrap().to_string();
            assert!(said.contains(why) && said.contains("ListenStream="), "{said}");
        }
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in [
            "cid:",
            "cid:x",
            "cid:-1",
            "",
            "any",
            "uid:",
            "uid:x",
            "1.2.3.4/33",
            "::/129",
            "1.2.3",
            "1.2.3.4/-1",
        ] {
            assert!(Rule::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_socket_of_a_dead_server_is_replaced_and_nothing_else_is() {
        let dir = std::env::temp_dir().join(format!("devsplice-nbd-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("socket");
        let first = unix(&path, &[]).unwrap();
        assert!(unix(&path, &[]).is_err(), "it is listened at");
        let Listener::Unix(socket, ..) = &first else { panic!("no socket") };
        let copy = socket.try_clone().unwrap();
        drop(first);
        drop(copy);
        drop(UnixListener::bind(&path).unwrap());
        assert!(is_socket(&path), "as a killed server leaves it");
        drop(unix(&path, &[]).unwrap());
        std::fs::write(&path, b"mine").unwrap();
        assert!(unix(&path, &[]).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
