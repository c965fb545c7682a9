//! Answers for a file of users and their keys, as `psktool` of GnuTLS writes it and nbdkit, libnbd
//! and QEMU read it: a line for each, `USER:KEY`, the key in hexadecimal digits.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use devsplice_core::{Error, ErrorKind, Result};
use zeroize::Zeroizing;

/// Most bytes of a file.
const MAX_FILE: usize = 1 << 20;
/// Most users in it: a client's name is compared with each, and the file is read for each client.
const MAX_USERS: usize = 1000;
/// Most bytes of a user's name.
const MAX_USER: usize = 128;
/// Bytes of a key: what both s2n-tls and GnuTLS take. `psktool` makes 32.
const KEY: std::ops::RangeInclusive<usize> = 16..=64;

/// A user and the key of it.
pub struct Key {
    /// Its name.
    pub user: Vec<u8>,
    /// What nobody else has.
    pub secret: Zeroizing<Vec<u8>>,
}

/// A file of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys(pub PathBuf);

impl Keys {
    fn name(&self) -> String {
        self.0.display().to_string()
    }

    /// Reads it.
    ///
    /// # Errors
    /// If it cannot be read, others can, or a line is none; says which and why, and nothing of what
    /// is in it.
    pub fn read(&self) -> Result<Vec<Key>> {
        parse(&self.text()?).map_err(|reason| {
            Error::invalid(self.name(), reason).next("psktool -u USER -p FILE makes lines")
        })
    }

    /// The key of one user.
    ///
    /// # Errors
    /// As [`Keys::read`]; and if there is no such user.
    pub fn of(&self, user: &str) -> Result<Key> {
        let all = self.read()?;
        all.into_iter().find(|key| key.user == user.as_bytes()).ok_or_else(|| {
            let reason = format!("has no key of the user {}", shown(user.as_bytes()));
            Error::new(ErrorKind::NotFound, self.name(), reason)
        })
    }

    fn text(&self) -> Result<Zeroizing<Vec<u8>>> {
        let os = |error: &std::io::Error| Error::os(self.name(), error);
        let file = open(&self.0).map_err(|error| os(&error))?;
        let about = file.metadata().map_err(|error| os(&error))?;
        if !about.is_file() {
            return Err(Error::invalid(self.name(), "is no file"));
        }
        // Who can read it is each of its users, and who can write it whoever it likes.
        if about.mode() & 0o027 != 0 {
            let reason = format!("has mode {:03o}: others can get at it", about.mode() & 0o777);
            return Err(Error::new(ErrorKind::Permission, self.name(), reason)
                .next(format!("chmod 600 {}", self.name())));
        }
        // All the room at once: what grows leaves copies behind.
        let mut text = Zeroizing::new(Vec::with_capacity(MAX_FILE + 1));
        file.take(MAX_FILE as u64 + 1).read_to_end(&mut text).map_err(|error| os(&error))?;
        if text.len() > MAX_FILE {
            let reason = format!("has more than {MAX_FILE} bytes");
            return Err(Error::invalid(self.name(), reason));
        }
        Ok(text)
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    // Of a pipe that nobody writes to, opening would wait.
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    File::options().read(true).custom_flags(flags.cast_signed()).open(path)
}

/// What a file says; a reason with the number of the line, if that is nothing.
///
/// # Errors
/// In words.
pub fn parse(text: &[u8]) -> std::result::Result<Vec<Key>, String> {
    let mut all: Vec<Key> = Vec::new();
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        let key = key(line).map_err(|reason| format!("line {number} {reason}"))?;
        if all.iter().any(|known| known.user == key.user) {
            return Err(format!("line {number} is of a user that a line before it is of, too"));
        }
        if all.len() == MAX_USERS {
            return Err(format!("has more than {MAX_USERS} users"));
        }
        all.push(key);
    }
    if all.is_empty() { Err("has no key".to_owned()) } else { Ok(all) }
}

fn key(line: &[u8]) -> std::result::Result<Key, String> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or("is not USER:KEY")?;
    let (name, digits) = (&line[..colon], &line[colon + 1..]);
    let user = match name.strip_prefix(b"#") {
        // A name with bytes that cannot stand in a line, as GnuTLS writes it.
        Some(digits) => bytes(digits).ok_or("has a name that begins with # and is not in hex")?,
        None => name.to_vec(),
    };
    if user.is_empty() || user.len() > MAX_USER {
        return Err(format!("has a name of {} bytes, not 1 to {MAX_USER}", user.len()));
    }
    if name == b"*" {
        return Err("is a key for everybody (*), which is not known here".to_owned());
    }
    if name.iter().any(u8::is_ascii_control) {
        return Err("has a name with control characters".to_owned());
    }
    if digits.len() > 2 * KEY.end() {
        return Err(format!("has a key of more than {} bytes", KEY.end()));
    }
    let secret = Zeroizing::new(bytes(digits).ok_or("has a key that is not in hex digits")?);
    if !KEY.contains(&secret.len()) {
        return Err(format!(
            "has a key of {} bytes, not {} to {}",
            secret.len(),
            KEY.start(),
            KEY.end()
        ));
    }
    if secret.iter().all(|byte| *byte == 0) {
        return Err("has a key that is all zeros".to_owned());
    }
    Ok(Key { user, secret })
}

/// What pairs of digits stand for.
fn bytes(digits: &[u8]) -> Option<Vec<u8>> {
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let mut bytes = Vec::with_capacity(pairs.len());
    for [high, low] in pairs {
        let (Some(high), Some(low)) = (digit(*high), digit(*low)) else {
            zeroize::Zeroize::zeroize(&mut bytes);
            return None;
        };
        bytes.push(high << 4 | low);
    }
    Some(bytes)
}

/// A user's name for messages, whatever is in it.
pub(crate) fn shown(user: &[u8]) -> String {
    format!("`{}`", user.escape_ascii())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "0123456789abcdefABCDEF0123456789";

    fn reason(text: &[u8]) -> String {
        parse(text).err().unwrap()
    }

    #[test]
    fn lines_as_psktool_writes_them_are_read() {
        let text = format!("alice:{GOOD}\r\n\nbob:{}\n#00ff:{GOOD}", "7f".repeat(64));
        let all = parse(text.as_bytes()).unwrap();
        let users: Vec<&[u8]> = all.iter().map(|key| &key.user[..]).collect();
        assert_eq!(users, [&b"alice"[..], b"bob", &[0, 0xff]]);
        assert_eq!((all[0].secret[1], all[0].secret[8]), (0x23, 0xab));
        assert_eq!(*all[1].secret, [0x7f; 64]);
    }

    #[test]
    fn lines_that_are_none_are_refused_by_number_and_not_shown() {
        let long = "00".repeat(65);
        let name = "n".repeat(129);
        for (line, why) in [
            (format!("alice{GOOD}"), "is not USER:KEY"),
            (format!(":{GOOD}"), "a name of 0 bytes"),
            (format!("{name}:{GOOD}"), "a name of 129 bytes"),
            (format!("*:{GOOD}"), "for everybody"),
            (format!("#0g:{GOOD}"), "begins with #"),
            (format!("a\0b:{GOOD}"), "control characters"),
            ("a:".to_owned(), "a key of 0 bytes"),
            (format!("a:{}", &GOOD[2..]), "a key of 15 bytes"),
            (format!("a:{}", &GOOD[1..]), "not in hex"),
            (format!("a:{GOOD}:"), "not in hex"),
            (format!("a:{GOOD} "), "not in hex"),
            (format!("a: {GOOD}"), "not in hex"),
            (format!("a:\0{}", &GOOD[1..]), "not in hex"),
            (format!("a:{long}"), "more than 64 bytes"),
            (format!("a:{}", "0".repeat(32)), "all zeros"),
            (format!("first:{GOOD}"), "a line before it"),
        ] {
            let said = reason(format!("first:{GOOD}\n{line}\n").as_bytes());
            assert!(said.starts_with("line 2 ") && said.contains(why), "{line}: {said}");
            assert!(!said.contains("234567"), "{said}");
        }
        assert_eq!(reason(b"\n\r\n"), "has no key");
    }

    #[test]
    fn more_users_than_can_be_compared_are_refused() {
        let lines = |count| (0..count).map(|number| format!("u{number}:{GOOD}\n"));
        assert_eq!(parse(lines(1000).collect::<String>().as_bytes()).unwrap().len(), 1000);
        assert_eq!(
            reason(lines(100_000).collect::<String>().as_bytes()),
            "has more than 1000 users"
        );
    }

    #[test]
    fn what_others_can_get_at_and_what_is_no_file_is_refused() {
        let dir = std::env::temp_dir().join(format!("devsplice-keys-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let keys = Keys(dir.join("keys.psk"));
        let said = |keys: &Keys| keys.read().err().unwrap().to_string();
        assert!(said(&keys).contains("keys.psk"));
        std::fs::write(&keys.0, format!("alice:{GOOD}\n")).unwrap();
        for (mode, good) in [(0o600, true), (0o640, true), (0o644, false), (0o620, false)] {
            std::fs::set_permissions(&keys.0, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(keys.read().is_ok(), good, "{mode:o}");
        }
        assert!(said(&keys).contains("620") && said(&keys).contains("chmod 600"));
        std::fs::set_permissions(&keys.0, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(keys.of("alice").unwrap().secret.len(), 16);
        assert!(keys.of("mallory").err().unwrap().to_string().contains("`mallory`"));
        std::fs::write(&keys.0, vec![b'\n'; MAX_FILE + 1]).unwrap();
        assert!(said(&keys).contains("more than 1048576 bytes"));
        let pipe = Keys(dir.join("pipe"));
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe.0, 0o600.into()).unwrap();
        assert!(said(&pipe).contains("is no file"));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_file_or_none(text in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(all) = parse(&text) {
                prop_assert!(all.iter().all(|key| KEY.contains(&key.secret.len())));
            }
        }

        #[test]
        fn keys_are_what_was_written(
            user in "[^:#*\\x00-\\x1f\\x7f]{1,30}",
            secret in prop::collection::vec(1..=255_u8, 16..=64),
        ) {
            let digits: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
            let all = parse(format!("{user}:{digits}\n").as_bytes()).unwrap();
            prop_assert_eq!(&all[0].user[..], user.as_bytes());
            prop_assert_eq!(&all[0].secret[..], &secret[..]);
        }
    }
}
