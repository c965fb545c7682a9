//! Answers for NBD addresses as people write them: `nbd://host:port/export`,
//! `nbd+unix:///export?socket=PATH`, `nbd+vsock://machine:port/export`, the same with `nbds` for
//! TLS, and the short forms `unix:PATH` and `tcp:HOST:PORT`.

use std::fmt;
use std::path::{Path, PathBuf};

use devsplice_core::{Error, Result};

/// The port that IANA has for NBD.
pub const PORT: u16 = 10809;

/// The number that stands for whichever machine this is (`any`), to listen as.
pub const ANY_MACHINE: u32 = u32::MAX;

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A socket in the file system.
    Unix(PathBuf),
    /// Host (a name or an address, an IPv6 one without its brackets) and port.
    Tcp(String, u16),
    /// A port of a virtual machine or its host.
    Vsock(u32, u32),
}

/// TLS, of an address that begins with `nbds`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// Whose certificates are believed, and the client's own (`tls-certificates`).
    pub certificates: Option<PathBuf>,
    /// Who the server should be, if not the host (`tls-hostname`).
    pub name: Option<String>,
    /// Any server is believed (`tls-verify-peer=false`).
    pub anybody: bool,
    /// Who we are by a key that both have, instead of certificates.
    pub user: Option<User>,
}

/// A user, and the file that has the key of it (`nbds://USER@HOST/?tls-psk-file=FILE`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Where its key is.
    pub keys: PathBuf,
}

/// A server and one of its exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// Where the server is.
    pub place: Place,
    /// The export; empty for the default one.
    pub export: String,
    /// TLS, where all is to be said inside.
    pub tls: Option<Tls>,
}

impl Uri {
    /// Reads one.
    ///
    /// # Errors
    /// If it is none, or of a kind that is not spoken here; says which are.
    pub fn parse(text: &str) -> Result<Uri> {
        let wrong = |reason: &str| {
            Err(Error::invalid(text, reason)
                .next("nbd+unix:///EXPORT?socket=PATH, nbd://HOST:PORT/EXPORT, unix:PATH"))
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return unix(path, String::new()).map_or_else(|| wrong("has no path"), Ok);
        }
        if let Some(rest) = text.strip_prefix("tcp:") {
            let Some(place) = tcp(rest) else { return wrong("is no host and port") };
            return Ok(Uri { place, export: String::new(), tls: None });
        }
        let Some((scheme, rest)) = text.split_once("://") else { return wrong("is no NBD URI") };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let Some(export) = decoded(export) else { return wrong("has a bad % in its export") };
        let (name, host) = match host.rsplit_once('@') {
            Some((name, host)) => (Some(name), host),
            None => (None, host),
        };
        let Query { socket, tls } = match query_of(query, scheme, name) {
            Ok(query) => query,
            Err(reason) => return wrong(&reason),
        };
        let place = match (plain(scheme), socket) {
            ("nbd", None) => tcp(host).ok_or("is no host and port"),
            ("nbd+vsock", None) => vsock(host).ok_or("is no machine and port"),
            ("nbd+unix", Some(path)) if host.is_empty() => {
                path_of(&path).ok_or("has an empty socket")
            }
            ("nbd+unix", Some(_)) => Err("has a host; write nbd+unix:///, with three slashes"),
            ("nbd+unix", None) => Err("names no socket"),
            ("nbd" | "nbd+vsock", Some(_)) => Err("has a socket; write nbd+unix:///"),
            _ => return wrong(&format!("begins with {scheme}://, which is not spoken here")),
        };
        match place {
            Ok(place) => Ok(Uri { place, export, tls }),
            Err(reason) => wrong(reason),
        }
    }
}

/// The same scheme without TLS.
fn plain(scheme: &str) -> &str {
    match scheme {
        "nbds" => "nbd",
        "nbds+unix" => "nbd+unix",
        "nbds+vsock" => "nbd+vsock",
        other => other,
    }
}

struct Query {
    socket: Option<String>,
    tls: Option<Tls>,
}

/// What stands behind a `?`; `name` is what stands before an `@`.
fn query_of(query: &str, scheme: &str, name: Option<&str>) -> Result<Query, String> {
    let mut socket = None;
    let mut security = (plain(scheme) != scheme).then(Security::default);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let bad = || format!("has a parameter that is not known, `{pair}`");
        let (key, value) = pair.split_once('=').ok_or_else(bad)?;
        let value = decoded(value).filter(|value| !value.is_empty());
        let value = value.ok_or_else(|| format!("has a parameter that says nothing, `{pair}`"))?;
        match (key, security.as_mut()) {
            ("socket", _) => socket = Some(value),
            (key, None) if key.starts_with("tls-") => {
                return Err(format!("has `{key}`, but no TLS; write nbds://"));
            }
            (key, Some(security)) => security.take(key, value).map_err(|()| bad())?,
            _ => return Err(bad()),
        }
    }
    let tls = match (security, name) {
        (Some(security), name) => Some(security.tls(name)?),
        (None, Some(_)) => return Err("has a user, but no TLS; write nbds://".to_owned()),
        (None, None) => None,
    };
    Ok(Query { socket, tls })
}

/// What is said of TLS.
#[derive(Default)]
struct Security {
    certificates: Option<PathBuf>,
    name: Option<String>,
    verify: Option<bool>,
    keys: Option<PathBuf>,
    kind: Option<String>,
}

impl Security {
    fn take(&mut self, key: &str, value: String) -> Result<(), ()> {
        match key {
            "tls-certificates" => self.certificates = Some(PathBuf::from(value)),
            "tls-hostname" => self.name = Some(value),
            "tls-psk-file" => self.keys = Some(PathBuf::from(value)),
            "tls-type" if ["x509", "psk"].contains(&value.as_str()) => self.kind = Some(value),
            "tls-verify-peer" => {
                self.verify = Some(match value.as_str() {
                    "true" | "1" | "yes" | "on" => true,
                    "false" | "0" | "no" | "off" => false,
                    _ => return Err(()),
                });
            }
            _ => return Err(()),
        }
        Ok(())
    }

    fn tls(self, name: Option<&str>) -> Result<Tls, String> {
        let Some(keys) = self.keys else {
            return match (name, self.kind.as_deref()) {
                (None, Some("psk")) => Err("names no file of keys; add tls-psk-file=FILE".into()),
                (Some(_), _) => Err("has a user, but no key of it; add tls-psk-file=FILE".into()),
                (None, _) => Ok(Tls {
                    certificates: self.certificates,
                    name: self.name,
                    anybody: self.verify == Some(false),
                    user: None,
                }),
            };
        };
        let of_certificates = [
            ("tls-certificates", self.certificates.is_some()),
            ("tls-hostname", self.name.is_some()),
            ("tls-verify-peer", self.verify.is_some()),
            ("tls-type=x509", self.kind.is_some_and(|kind| kind == "x509")),
        ];
        if let Some((what, _)) = of_certificates.into_iter().find(|(_, is_there)| *is_there) {
            return Err(format!("has `tls-psk-file` and `{what}`, which is for certificates"));
        }
        let name = name.and_then(decoded).filter(|name| !name.is_empty());
        let name = name.ok_or("says whose keys, but not who; write nbds://USER@HOST/")?;
        Ok(Tls { user: Some(User { name, keys }), ..Tls::default() })
    }
}

fn unix(path: &str, export: String) -> Option<Uri> {
    path_of(path).map(|place| Uri { place, export, tls: None })
}

fn path_of(path: &str) -> Option<Place> {
    (!path.is_empty() && !path.contains('\0')).then(|| Place::Unix(PathBuf::from(path)))
}

fn tcp(text: &str) -> Option<Place> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':').or(rest.is_empty().then_some(""))?)
        }
        None => match text.rsplit_once(':') {
            Some((host, _)) if host.contains(':') => return None,
            Some((host, port)) => (host, port),
            None => (text, ""),
        },
    };
    let port = if port.is_empty() { PORT } else { port.parse().ok()? };
    // What else may stand in a URI's host has no business in a name or address.
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
    (!host.is_empty() && host.bytes().all(is_plain)).then(|| Place::Tcp(host.to_owned(), port))
}

fn vsock(text: &str) -> Option<Place> {
    let (machine, port) = text.split_once(':').unwrap_or((text, ""));
    let port = if port.is_empty() { u32::from(PORT) } else { port.parse().ok()? };
    let machine = if machine == "any" { ANY_MACHINE } else { machine.parse().ok()? };
    Some(Place::Vsock(machine, port))
}

/// `%41` as `A`.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        let value = digit()? * 16 + digit()?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// Everything but what may stand in a URI as it is.
fn encoded(text: &str) -> String {
    let mut all = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            all.push(char::from(byte));
        } else {
            all.push_str(&format!("%{byte:02X}"));
        }
    }
    all
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (export, s) = (encoded(&self.export), if self.tls.is_some() { "s" } else { "" });
        let user = self.tls.as_ref().and_then(|tls| tls.user.as_ref());
        let at = user.map_or(String::new(), |user| encoded(&user.name).replace('/', "%2F") + "@");
        let mut sign = '?';
        match &self.place {
            Place::Unix(path) => {
                sign = '&';
                let path = encoded(&path.to_string_lossy());
                write!(f, "nbd{s}+unix://{at}/{export}?socket={path}")?;
            }
            Place::Tcp(host, port) if host.contains(':') => {
                write!(f, "nbd{s}://{at}[{host}]:{port}/{export}")?;
            }
            Place::Tcp(host, port) => write!(f, "nbd{s}://{at}{host}:{port}/{export}")?,
            Place::Vsock(ANY_MACHINE, port) => write!(f, "nbd{s}+vsock://{at}any:{port}/{export}")?,
            Place::Vsock(machine, port) => {
                write!(f, "nbd{s}+vsock://{at}{machine}:{port}/{export}")?
            }
        }
        let Some(tls) = &self.tls else { return Ok(()) };
        let files = tls.certificates.as_ref().map(|path| path.to_string_lossy().into_owned());
        let anybody = tls.anybody.then(|| "false".to_owned());
        let keys = user.map(|user| user.keys.to_string_lossy().into_owned());
        for (key, value) in [
            ("tls-psk-file", keys),
            ("tls-certificates", files),
            ("tls-hostname", tls.name.clone()),
            ("tls-verify-peer", anybody),
        ] {
            if let Some(value) = value {
                write!(f, "{sign}{key}={}", encoded(&value))?;
                sign = '&';
            }
        }
        Ok(())
    }
}

impl Uri {
    /// The same with paths of files made absolute.
    #[must_use]
    pub fn anchored(mut self, here: &Path) -> Uri {
        if let Place::Unix(path) = &mut self.place {
            *path = here.join(&*path);
        }
        if let Some(tls) = &mut self.tls {
            let keys = tls.user.as_mut().map(|user| &mut user.keys);
            for path in tls.certificates.iter_mut().chain(keys) {
                *path = here.join(&*path);
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_the_same() {
        for (text, shown) in [
            ("nbd://localhost", "nbd://localhost:10809/"),
            ("nbd://localhost:1/a%20b", "nbd://localhost:1/a%20b"),
            ("nbd://[::1]:7/x", "nbd://[::1]:7/x"),
            ("nbd+unix:///?socket=/tmp/s", "nbd+unix:///?socket=/tmp/s"),
            ("nbd+unix:///d0?socket=/tmp/a%3Fb", "nbd+unix:///d0?socket=/tmp/a%3Fb"),
            ("unix:/tmp/s", "nbd+unix:///?socket=/tmp/s"),
            ("tcp:127.0.0.1:2", "nbd://127.0.0.1:2/"),
            ("nbd+vsock://2", "nbd+vsock://2:10809/"),
            ("nbd+vsock://3:5/x", "nbd+vsock://3:5/x"),
            ("nbd+vsock://any", "nbd+vsock://any:10809/"),
            ("nbds://h/x", "nbds://h:10809/x"),
            ("nbds://h/?tls-verify-peer=no", "nbds://h:10809/?tls-verify-peer=false"),
            (
                "nbds+unix:///x?tls-certificates=/a&socket=/s&tls-type=x509&tls-hostname=h",
                "nbds+unix:///x?socket=/s&tls-certificates=/a&tls-hostname=h",
            ),
            ("nbds://al@h/x?tls-psk-file=/k", "nbds://al@h:10809/x?tls-psk-file=/k"),
            (
                "nbds+unix://a%2Fb@/x?tls-psk-file=/k&tls-type=psk&socket=/s",
                "nbds+unix://a%2Fb@/x?socket=/s&tls-psk-file=/k",
            ),
            ("nbds://a%40b@[::1]/?tls-psk-file=k", "nbds://a%40b@[::1]:10809/?tls-psk-file=k"),
            ("nbds+vsock://al@2/?tls-psk-file=k", "nbds+vsock://al@2:10809/?tls-psk-file=k"),
        ] {
            let uri = Uri::parse(text).unwrap();
            assert_eq!(uri.to_string(), shown);
            assert_eq!(Uri::parse(shown).unwrap(), uri);
        }
    }

    #[test]
    fn paths_are_made_absolute() {
        let uri = Uri::parse("nbds+unix://al@/?socket=s&tls-psk-file=k").unwrap();
        let shown = uri.anchored(Path::new("/a")).to_string();
        assert_eq!(shown, "nbds+unix://al@/?socket=/a/s&tls-psk-file=/a/k");
        let uri = Uri::parse("nbds://h/?tls-certificates=c").unwrap();
        assert!(uri.anchored(Path::new("/a")).to_string().ends_with("tls-certificates=/a/c"));
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        for text in [
            "",
            "nbd",
            "nbd://",
            "nbd://:1/",
            "nbd://h:70000",
            "nbd://a:b:c/",
            "nbds://h/?tls-psk-file=/keys",
            "nbds://@h/?tls-psk-file=/keys",
            "nbds://%zz@h/?tls-psk-file=/keys",
            "nbds://al@h/",
            "nbds://al@h/?tls-certificates=/a",
            "nbds://al@h/?tls-psk-file=",
            "nbds://al@h/?tls-psk-file=/keys&tls-certificates=/a",
            "nbds://al@h/?tls-psk-file=/keys&tls-hostname=h",
            "nbds://al@h/?tls-psk-file=/keys&tls-verify-peer=true",
            "nbds://al@h/?tls-psk-file=/keys&tls-type=x509",
            "nbds://al@h/?tls-type=psk",
            "nbds+unix://al@h/?socket=/s&tls-psk-file=/keys",
            "nbd://al@h/?tls-psk-file=/keys",
            "nbds://h/?tls-verify-peer=perhaps",
            "nbds://h/?tls-certificates=",
            "nbds://h/?tls-type=psk",
            "nbd://h/?tls-hostname=h",
            "nbd://h/?tls-certificates=/a",
            "nbdx://h/",
            "nbd+vsock://",
            "nbd+vsock://host:1",
            "nbd+vsock://2/?socket=/s",
            "nbd+unix:///",
            "nbd+unix://h/?socket=/s",
            "nbd+unix:///?socket=",
            "unix:",
            "nbd://h/%4",
            "nbd://h/%zz",
            "nbd://h/%00",
            "nbd://h/?tls-psk-file=/etc/shadow",
            "nbd://[::1",
            "tcp:",
            "tcp:host/export",
            "nbd://user@host/",
            "nbd://h/\0",
            "http://h/",
        ] {
            let error = Uri::parse(text).map_err(|error| error.to_string());
            assert!(error.is_err_and(|error| error.starts_with(text)), "{text}");
        }
    }
}
