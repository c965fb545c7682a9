//! Answers for what a client has said first, as far as messages tell why it is refused: nothing is
//! decided by it.

/// Bytes of a user's name that are shown.
pub const MAX_SHOWN: usize = 64;

/// `supported_versions` and `pre_shared_key` (RFC 8446, section 4.2).
const VERSIONS: u16 = 43;
const KEYS: u16 = 41;
const TLS13: u16 = 0x0304;

/// What a client has said first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Whether it speaks TLS 1.3.
    pub has_tls13: bool,
    /// The first user that it says it is, and at most so much of it as is shown.
    pub user: Option<Vec<u8>>,
}

impl Hello {
    /// Reads a ClientHello without the head of its message; as much of it as can be.
    #[must_use]
    pub fn read(message: &[u8]) -> Hello {
        let mut hello = Hello::default();
        let _ = hello.fill(&mut Reader(message));
        hello
    }

    fn fill(&mut self, message: &mut Reader<'_>) -> Option<()> {
        // Version, random bytes, session, ciphers, compression (section 4.1.2).
        message.take(2 + 32)?;
        message.short()?;
        message.long()?;
        message.short()?;
        let mut extensions = Reader(message.long()?);
        while !extensions.0.is_empty() {
            let (kind, mut body) = (extensions.number()?, Reader(extensions.long()?));
            match kind {
                VERSIONS => {
                    let (versions, _) = body.short()?.as_chunks::<2>();
                    self.has_tls13 = versions.contains(&TLS13.to_be_bytes());
                }
                KEYS => {
                    let user = Reader(body.long()?).long()?;
                    self.user = Some(user[..user.len().min(MAX_SHOWN)].to_vec());
                }
                _ => {}
            }
        }
        Some(())
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    /// Bytes behind their count in one byte.
    fn short(&mut self) -> Option<&'a [u8]> {
        let count = *self.take(1)?.first()?;
        self.take(usize::from(count))
    }

    /// Bytes behind their count in two.
    fn long(&mut self) -> Option<&'a [u8]> {
        let count = self.number()?;
        self.take(usize::from(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ClientHello with these extensions.
    fn message(extensions: &[u8]) -> Vec<u8> {
        let mut message = vec![3; 34];
        message.extend([1, 9, 0, 2, 0x13, 0x01, 1, 0]);
        message.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
        message.extend(extensions);
        message
    }

    #[test]
    fn versions_and_users_are_found_and_nothing_else_is_believed() {
        let versions = [0, 43, 0, 5, 4, 3, 4, 3, 3];
        let keys = [0, 41, 0, 11, 0, 9, 0, 3, b'b', b'o', b'b', 0, 0, 0, 0];
        let all = message(&[&[0, 0, 0, 0][..], &versions, &keys].concat());
        let whole = Hello { has_tls13: true, user: Some(b"bob".to_vec()) };
        assert_eq!(Hello::read(&all), whole);
        assert_eq!(Hello::read(&message(&versions)), Hello { user: None, ..whole.clone() });
        assert_eq!(Hello::read(&message(&[0, 43, 0, 3, 2, 3, 3])), Hello::default());
        for end in 0..all.len() {
            assert_ne!(Hello::read(&all[..end]), whole, "cut at {end}");
        }
    }

    #[test]
    fn a_long_name_is_cut() {
        let name = vec![b'x'; 5000];
        let mut body = u16::try_from(name.len() + 6).unwrap().to_be_bytes().to_vec();
        body.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
        body.extend(&name);
        body.extend([0; 4]);
        let mut keys = vec![0, 41];
        keys.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        keys.extend(body);
        assert_eq!(Hello::read(&message(&keys)).user.map(|user| user.len()), Some(MAX_SHOWN));
    }
}
