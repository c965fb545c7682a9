//! Answers for errors on the data path: one positive Linux error number, four bytes, `Copy`.

use std::fmt;

/// A Linux error number (asm-generic/errno-base.h, errno.h), always positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident = $value:literal),* $(,)?) => {
        impl Errno {
            $(#[doc = concat!("`", stringify!($name), "`, ", stringify!($value), ".")]
            pub const $name: Errno = Errno($value);)*

            /// The names that [`Errno::parse`] takes, for messages.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            /// The symbol, or `EIO` for a number without one here.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self.0 { $($value => stringify!($name),)* _ => "EIO" }
            }

            /// The number behind a symbol such as `ENOSPC`.
            #[must_use]
            pub fn parse(name: &str) -> Option<Errno> {
                match name { $(stringify!($name) => Some(Errno::$name),)* _ => None }
            }
        }
    };
}

errnos! {
    EPERM = 1, ENOENT = 2, EINTR = 4, EIO = 5, ENXIO = 6, EAGAIN = 11, ENOMEM = 12, EACCES = 13,
    EFAULT = 14, EBUSY = 16, ENODEV = 19, EINVAL = 22, EFBIG = 27, ENOSPC = 28, EROFS = 30,
    ENODATA = 61, ETIME = 62, ENOLINK = 67, EOVERFLOW = 75, EILSEQ = 84, EOPNOTSUPP = 95,
    ETOOMANYREFS = 109, ETIMEDOUT = 110,
    EREMOTEIO = 121, ECANCELED = 125, EDQUOT = 122,
}

impl Errno {
    /// From a kernel result: `-res` for a negative one. Numbers outside 1..=4095 become `EIO`.
    #[must_use]
    pub const fn from_result(res: i32) -> Errno {
        if res <= -1 && res >= -4095 { Errno(-res) } else { Errno::EIO }
    }

    /// The positive number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// Whether the same operation may succeed when it is simply tried again.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Errno::EAGAIN | Errno::EINTR)
    }

    /// What a client may be told. The transient ones and those that speak of our own housekeeping
    /// (`ECANCELED`, `EFAULT`) become `EIO`: a block device's user can do nothing with them.
    #[must_use]
    pub const fn for_client(self) -> Errno {
        match self {
            Errno::EAGAIN | Errno::EINTR | Errno::ECANCELED | Errno::EFAULT => Errno::EIO,
            Errno::EDQUOT | Errno::EFBIG => Errno::ENOSPC,
            other => other,
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::error::Error for Errno {}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Errno {
        error.raw_os_error().map_or(Errno::EIO, |number| Errno::from_result(-number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree_both_ways() {
        for name in Errno::NAMES {
            assert_eq!(Errno::parse(name).map(Errno::name), Some(*name));
        }
        assert_eq!(Errno::parse("ENOSPC"), Some(Errno::from_result(-28)));
        assert_eq!(Errno::parse("enospc"), None);
    }

    #[test]
    fn a_result_that_is_no_errno_is_eio() {
        assert_eq!(Errno::from_result(5), Errno::EIO);
        assert_eq!(Errno::from_result(i32::MIN), Errno::EIO);
        assert_eq!(Errno::from_result(0), Errno::EIO);
    }

    #[test]
    fn a_client_never_sees_a_transient_error() {
        for errno in [Errno::EAGAIN, Errno::EINTR, Errno::ECANCELED] {
            assert_eq!(errno.for_client(), Errno::EIO);
        }
        assert_eq!(Errno::ENOSPC.for_client(), Errno::ENOSPC);
    }
}
