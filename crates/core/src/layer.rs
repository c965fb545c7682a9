//! Answers for what a driver is: a layer that says where data goes, and how it is made.

use std::path::Path;
use std::sync::Arc;

use crate::args::{Args, Key};
use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::io::{Extent, Io, Op};
use crate::limits::Limits;
use crate::live::Live;
use crate::map::{Map, Port};
use crate::probe::Probe;
use crate::zones::Zones;

/// Decides where data goes. Never sees it, so a stack of these copies nothing by construction.
pub trait Layer: Send + Sync {
    /// Called once, before the first request: checks what lies below, reads metadata if the layer
    /// keeps any there, and says what the layer offers above.
    ///
    /// # Errors
    /// If the layer cannot work over these devices.
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits>;

    /// Where the first bytes of `io` go. Pure and immediate: no I/O, no allocation, no waiting.
    /// `io` lies within the offered size and is aligned to the offered block; it is never a flush.
    ///
    /// # Errors
    /// The request fails with the number.
    fn map(&self, io: Io) -> Result<Map, Errno>;

    /// Where the first bytes of `extent` lie, for somebody who asks without reading them. As `map`
    /// of a read, but it costs the layer nothing: one that counts, spends or delays by what `map`
    /// was asked has to answer otherwise. `extent` is as for `map`.
    ///
    /// # Errors
    /// Where only reading tells.
    fn locate(&self, extent: Extent) -> Result<Map, Errno> {
        self.map(Io { op: Op::Read, extent, fua: false })
    }

    /// Where a flush goes: by default to every lower device. Positions and lengths are 0.
    ///
    /// # Errors
    /// The flush fails with the number.
    fn flush(&self) -> Result<Map, Errno> {
        Ok(Map::All { len: 0, at: 0 })
    }

    /// Whether a flush that goes to every lower device has to go to this one: something was done to
    /// it since the last.
    fn needs_flush(&self, port: Port) -> bool {
        let _ = port;
        true
    }

    /// The zones of the device that this layer offers, if it has any. Asked once, after `open`. No
    /// layer lies over one that has, since none knows what to do with them.
    fn zones(&self) -> Option<Arc<dyn Zones>> {
        None
    }

    /// What counts the latencies below this layer. Asked once, after `open`; only a layer that has
    /// one may answer [`Map::Watched`].
    fn probe(&self) -> Option<Arc<Probe>> {
        None
    }

    /// The side of this layer that changes what `map` answers: metadata, failures, work in the
    /// background. Asked once, after `open`. Most layers have none.
    fn live(&self) -> Option<Arc<dyn Live>> {
        None
    }
}

/// What lies below a layer while it opens.
pub trait Lower {
    /// What each lower device is and can do, in the order of the ports.
    fn limits(&self) -> &[Limits];

    /// How many bytes a device has by now that grows as it is written, up to the size in its
    /// limits; `None` for one of a size.
    fn filled(&self, port: Port) -> Option<u64> {
        let _ = port;
        None
    }

    /// What the one device below is, for a layer that lies over exactly one.
    ///
    /// # Errors
    /// If there are none or several: whoever built the stack did not look at [`Driver::below`].
    fn only(&self) -> Result<Limits> {
        match self.limits() {
            [one] => Ok(*one),
            other => {
                let reason = format!("{} given, the layer lies over exactly one", other.len());
                Err(Error::invalid("lower devices", reason))
            }
        }
    }

    /// Reads metadata, blocking. Position and length must be multiples of that device's block.
    ///
    /// # Errors
    /// As the device reports them; `EINVAL` for a bad range.
    fn read(&mut self, port: Port, at: u64, into: &mut [u8]) -> Result<(), Errno>;

    /// Writes metadata durably, blocking. Only possible while a [`Format`] runs.
    ///
    /// # Errors
    /// As the device reports them; `EINVAL` for a bad range, `EROFS` where writing is not possible.
    fn write(&mut self, port: Port, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let _ = (port, at, bytes);
        Err(Errno::EROFS)
    }
}

/// How many devices a layer lies over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// None: the layer is a bottom.
    None,
    /// Exactly one.
    One,
    /// One or more.
    Many,
}

/// A driver as users name it: what it is called, what it takes, how to make one.
#[derive(Clone, Copy)]
pub struct Driver {
    /// As typed.
    pub name: &'static str,
    /// One line for help texts.
    pub about: &'static str,
    /// How many devices it lies over.
    pub below: Arity,
    /// The keys it takes.
    pub keys: &'static [Key],
    /// Makes one from checked arguments.
    pub make: fn(&Args) -> Result<Box<dyn Layer>>,
}

/// Writes fresh metadata, for a driver that keeps any below: the arguments of the layer, the
/// devices below, and whether what looks like somebody's data there may be overwritten. Says what
/// was made.
pub type Format = fn(&Args, &mut dyn Lower, bool) -> Result<String>;

/// A kind of bottom as users name it: a file, memory. How it is opened is its crate's affair.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// As typed.
    pub name: &'static str,
    /// One line for help texts.
    pub about: &'static str,
    /// The keys it takes.
    pub keys: &'static [Key],
    /// The key that `name:TEXT` and `name(TEXT)` give without naming it.
    pub main_key: Option<&'static str>,
    /// Makes a value of the main key that was typed in a directory mean the same in any other.
    pub anchored: Option<fn(&str, &Path) -> String>,
}

/// [`Source::anchored`] of a path.
#[must_use]
pub fn anchored_path(path: &str, here: &Path) -> String {
    here.join(path).to_string_lossy().into_owned()
}
