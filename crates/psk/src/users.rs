//! Answers for which of a server's keys the library gets: those of the users that a client names.
//! It compares each name that is offered with each key that it has, so it must not have all.

use std::pin::Pin;
use std::sync::{Mutex, PoisonError};

use s2n_tls::callbacks::{ClientHelloCallback, ConnectionFuture};
use s2n_tls::connection::Connection;
use s2n_tls::error::Error;
use zeroize::Zeroizing;

use crate::connection::key;
use crate::hello::Hello;

/// A user's name and the key of it.
pub(crate) type User = (Vec<u8>, Zeroizing<Vec<u8>>);

/// The users that a server knows, until the client has said who it is.
pub(crate) struct Users(Mutex<Vec<User>>);

impl Users {
    pub(crate) fn new(all: Vec<User>) -> Users {
        Users(Mutex::new(all))
    }
}

/// Those of `all` that a client names; the first one if there is none: the library then
/// goes the same way for a user that is not known as for one with another key, and finds nothing
/// (or who was offered behind the names that are looked at, and has to have that key).
fn named<'a>(all: &'a [User], hello: &Hello) -> Vec<&'a User> {
    let mut named: Vec<&User> = all.iter().filter(|(name, _)| hello.users.contains(name)).collect();
    if named.is_empty() {
        named.extend(all.first());
    }
    named
}

impl ClientHelloCallback for Users {
    fn on_client_hello(
        &self,
        connection: &mut Connection,
    ) -> Result<Option<Pin<Box<dyn ConnectionFuture>>>, Error> {
        // Taken, and so wiped at the end of this: it is called once for a connection.
        let all = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let hello = Hello::read(&connection.client_hello()?.raw_message()?);
        for (name, secret) in named(&all, &hello) {
            connection.append_psk(&key(name, secret)?)?;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_named_is_found_whole_and_else_the_first_stands_in() {
        let all: Vec<User> = [&b"ann"[..], b"bob", b"bobby", b"cid"]
            .map(|name| (name.to_vec(), Zeroizing::new(vec![7; 16])))
            .into();
        for (users, found) in [
            (&[&b"bob"[..]][..], &[&b"bob"[..]][..]),
            (&[b"cid", b"nobody", b"bobby", b"cid"], &[b"bobby", b"cid"]),
            (&[b"bo", b"bobb"], &[b"ann"]),
            (&[], &[b"ann"]),
        ] {
            let users = users.iter().map(|name| name.to_vec()).collect();
            let hello = Hello { has_tls13: true, users };
            let names: Vec<&[u8]> =
                named(&all, &hello).into_iter().map(|(name, _)| &name[..]).collect();
            assert_eq!(names, found);
        }
        assert!(named(&[], &Hello::default()).is_empty());
    }
}
