//! Answers for control errors (parse, open, attach): kind, the thing, the reason, the next step.

use std::fmt;

/// What went wrong, for a caller that decides by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was typed or written makes no sense: usage, syntax, unknown key, bad value.
    Invalid,
    /// A file, device, module or name is not there.
    NotFound,
    /// The thing is in use.
    Busy,
    /// Root, a capability or an access right is missing.
    Permission,
    /// This kernel or machine cannot do it.
    Unsupported,
    /// No answer within the time given.
    Timeout,
    /// The operating system said no.
    Os,
}

/// An error on the control path. As small as a pointer, since a front end says after each event
/// that there was none.
#[derive(Debug)]
pub struct Error(Box<What>);

#[derive(Debug)]
struct What {
    kind: ErrorKind,
    thing: String,
    reason: String,
    next: Option<String>,
}

/// What control functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `thing` is what the user would recognise (a path, a layer, a key); `reason` what is wrong.
    pub fn new(kind: ErrorKind, thing: impl Into<String>, reason: impl Into<String>) -> Error {
        let (thing, reason) = (thing.into(), reason.into());
        Error(Box::new(What { kind, thing, reason, next: None }))
    }

    /// An [`ErrorKind::Invalid`] error.
    pub fn invalid(thing: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::new(ErrorKind::Invalid, thing, reason)
    }

    /// From an operating-system error; the kind follows from its number.
    pub fn os(thing: impl Into<String>, error: &std::io::Error) -> Error {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::NotFound => ErrorKind::NotFound,
            Io::PermissionDenied => ErrorKind::Permission,
            Io::ResourceBusy => ErrorKind::Busy,
            Io::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Os,
        };
        Error::new(kind, thing, error.to_string())
    }

    /// Adds what the user can do about it.
    #[must_use]
    pub fn next(mut self, step: impl Into<String>) -> Error {
        self.0.next = Some(step.into());
        self
    }

    /// Names the outer thing in which `self` happened.
    #[must_use]
    pub fn within(mut self, outer: &str) -> Error {
        self.0.thing = format!("{outer}: {}", self.0.thing);
        self
    }

    /// The thing and the reason, without the next step.
    #[must_use]
    pub fn cause(&self) -> String {
        format!("{}: {}", self.0.thing, self.0.reason)
    }

    /// What went wrong, for a caller that decides by it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.thing, self.0.reason)?;
        match &self.0.next {
            Some(step) => write!(f, "; {step}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_the_thing_the_reason_and_the_next_step() {
        let error = Error::new(ErrorKind::NotFound, "/dev/ublk-control", "not found")
            .next("modprobe ublk_drv")
            .within("add");
        assert_eq!(error.to_string(), "add: /dev/ublk-control: not found; modprobe ublk_drv");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
