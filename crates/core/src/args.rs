//! Answers for a driver's `key=value` arguments: what keys there are, what values they take.

use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::size::{parse_duration_ns, parse_size};

/// What a key's value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes, as [`parse_size`] reads them.
    Size,
    /// A plain number.
    Count,
    /// Nanoseconds, as [`parse_duration_ns`] reads them.
    Duration,
    /// An error name such as `EIO`.
    Errno,
    /// `on` or `off`.
    Switch,
    /// Anything.
    Text,
}

impl Kind {
    /// How help texts write such a value.
    #[must_use]
    pub const fn hint(self) -> &'static str {
        match self {
            Kind::Size => "SIZE",
            Kind::Count => "N",
            Kind::Duration => "TIME",
            Kind::Errno => "ERRNO",
            Kind::Switch => "on|off",
            Kind::Text => "TEXT",
        }
    }
}

/// One key that a driver takes.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// As typed.
    pub name: &'static str,
    /// What its value looks like.
    pub kind: Kind,
    /// Whether the driver cannot do without.
    pub required: bool,
    /// One line for help texts: meaning, unit, default.
    pub about: &'static str,
}

impl Key {
    /// A key that may be left out.
    #[must_use]
    pub const fn optional(name: &'static str, kind: Kind, about: &'static str) -> Key {
        Key { name, kind, required: false, about }
    }

    /// A key that must be given.
    #[must_use]
    pub const fn required(name: &'static str, kind: Kind, about: &'static str) -> Key {
        Key { name, kind, required: true, about }
    }
}

/// The arguments of one place in a stack, checked against the driver's keys.
#[derive(Clone, Debug, Default)]
pub struct Args {
    driver: String,
    values: Vec<(&'static str, String)>,
}

impl Args {
    /// Checks `given` against `keys`: unknown, repeated, missing or unreadable ones are errors.
    ///
    /// # Errors
    /// Names the driver, the key and what would be valid.
    pub fn new(driver: &str, keys: &[Key], given: &[(String, String)]) -> Result<Args> {
        let mut args = Args { driver: driver.to_owned(), values: Vec::new() };
        for (name, value) in given {
            let Some(key) = keys.iter().find(|key| key.name == name) else {
                return Err(unknown_key(driver, keys, name));
            };
            if args.text(key.name).is_some() {
                return Err(Error::invalid(driver, format!("key `{name}` is given twice")));
            }
            args.values.push((key.name, value.clone()));
            args.readable(key)?;
        }
        for key in keys.iter().filter(|key| key.required) {
            if args.text(key.name).is_none() {
                let reason = format!("key `{}` is missing", key.name);
                return Err(Error::invalid(driver, reason).next(format!(
                    "add {}={} ({})",
                    key.name,
                    key.kind.hint(),
                    key.about
                )));
            }
        }
        Ok(args)
    }

    fn readable(&self, key: &Key) -> Result<()> {
        match key.kind {
            Kind::Size => self.size(key.name).map(drop),
            Kind::Count => self.count(key.name).map(drop),
            Kind::Duration => self.duration_ns(key.name).map(drop),
            Kind::Errno => self.errno(key.name).map(drop),
            Kind::Switch => self.switch(key.name).map(drop),
            Kind::Text => Ok(()),
        }
    }

    fn read<T>(&self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>> {
        let value = self.text(name).map(read).transpose();
        value.map_err(|reason| Error::invalid(format!("{}: {name}", self.driver), reason))
    }

    /// The driver's name, for messages.
    #[must_use]
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// The value as typed.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str())
    }

    /// A size in bytes.
    ///
    /// # Errors
    /// If the value is no size.
    pub fn size(&self, name: &str) -> Result<Option<u64>> {
        self.read(name, parse_size)
    }

    /// A plain number.
    ///
    /// # Errors
    /// If the value is no number.
    pub fn count(&self, name: &str) -> Result<Option<u64>> {
        self.read(name, |text| text.parse().map_err(|_| format!("`{text}` is no number")))
    }

    /// A duration in nanoseconds.
    ///
    /// # Errors
    /// If the value is no duration.
    pub fn duration_ns(&self, name: &str) -> Result<Option<u64>> {
        self.read(name, parse_duration_ns)
    }

    /// An error number.
    ///
    /// # Errors
    /// If the value names none.
    pub fn errno(&self, name: &str) -> Result<Option<Errno>> {
        self.read(name, |text| {
            Errno::parse(text).ok_or_else(|| {
                format!("`{text}` is no error name; one of {}", Errno::NAMES.join(", "))
            })
        })
    }

    /// `on` or `off`.
    ///
    /// # Errors
    /// If the value is neither.
    pub fn switch(&self, name: &str) -> Result<Option<bool>> {
        self.read(name, |text| match text {
            "on" | "true" | "yes" | "1" => Ok(true),
            "off" | "false" | "no" | "0" => Ok(false),
            _ => Err(format!("`{text}` is neither on nor off")),
        })
    }
}

fn unknown_key(driver: &str, keys: &[Key], name: &str) -> Error {
    let error = Error::invalid(driver, format!("unknown key `{name}`"));
    if keys.is_empty() {
        return error.next(format!("{driver} takes no keys"));
    }
    let valid: Vec<_> = keys.iter().map(|key| key.name).collect();
    error.next(format!("valid keys: {}", valid.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &[Key] = &[
        Key::required("chunk", Kind::Size, "bytes in a row"),
        Key::optional("read", Kind::Duration, "wait before a read"),
        Key::optional("direct", Kind::Switch, "bypass the page cache"),
    ];

    fn args(given: &[(&str, &str)]) -> Result<Args> {
        let given: Vec<_> = given.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Args::new("stripe", KEYS, &given)
    }

    #[test]
    fn an_unknown_key_lists_the_valid_ones() {
        let text = args(&[("chunk", "4k"), ("size", "1")]).unwrap_err().to_string();
        assert_eq!(text, "stripe: unknown key `size`; valid keys: chunk, read, direct");
    }

    #[test]
    fn missing_repeated_and_unreadable_values_are_errors() {
        assert!(args(&[]).unwrap_err().to_string().contains("key `chunk` is missing"));
        let twice = args(&[("chunk", "4k"), ("chunk", "8k")]).unwrap_err().to_string();
        assert!(twice.contains("given twice"), "{twice}");
        assert!(args(&[("chunk", "big")]).unwrap_err().to_string().contains("`big` is no size"));
        assert!(args(&[("chunk", "4k"), ("read", "5")]).is_err());
    }

    #[test]
    fn values_come_out_typed() {
        let args = args(&[("chunk", "64k"), ("read", "1ms"), ("direct", "off")]).unwrap();
        assert_eq!(args.size("chunk").unwrap(), Some(65_536));
        assert_eq!(args.duration_ns("read").unwrap(), Some(1_000_000));
        assert_eq!(args.switch("direct").unwrap(), Some(false));
        assert_eq!(args.text("other"), None);
    }
}
