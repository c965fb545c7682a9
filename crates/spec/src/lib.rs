//! Answers for the stack language: from one line or a TOML file to a checked plan of drivers.
//!
//! The language is on one page, docs/stack.md. Nothing is opened here: of files, only their
//! identity is looked at, so that one file does not end up below two writers.
#![forbid(unsafe_code)]

mod devices;
mod expr;
mod files;
mod plan;
mod show;
mod words;

use devsplice_core::{Arity, Driver, Key, Source};

pub use plan::{Place, Plan};

/// Most bytes of an expression.
pub const MAX_TEXT: usize = 64 << 10;
/// Most bytes of a TOML file.
pub const MAX_FILE: usize = 1 << 20;
/// Deepest nesting of an expression, and longest chain of names in a TOML file.
pub const MAX_NESTING: usize = 64;

/// The source that a bare path means.
const PATH_SOURCE: &str = "file";
/// The source that a bare URI means, and a command in brackets.
const URI_SOURCE: &str = "nbd";
/// What such a URI begins with, alone or before a `+`.
const URI_SCHEMES: &[&str] = &["nbd", "nbds"];

/// The drivers that an expression may name.
#[derive(Clone, Copy)]
pub struct Catalog {
    /// Those that say where data goes.
    pub layers: &'static [Driver],
    /// Those that keep it.
    pub sources: &'static [Source],
}

impl Catalog {
    /// The driver of that name; a layer wins over a source.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Kind> {
        let layer = self.layers.iter().find(|driver| driver.name == name).map(Kind::Layer);
        layer.or_else(|| self.sources.iter().find(|s| s.name == name).map(Kind::Source))
    }

    /// All names, layers first.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let sources = self.sources.iter().map(|source| source.name);
        self.layers.iter().map(|driver| driver.name).chain(sources)
    }
}

/// What stands at a place: a layer or a source.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Says where data goes.
    Layer(&'static Driver),
    /// Keeps it.
    Source(&'static Source),
}

impl Kind {
    /// As typed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Layer(driver) => driver.name,
            Kind::Source(source) => source.name,
        }
    }

    /// The keys it takes.
    #[must_use]
    pub fn keys(self) -> &'static [Key] {
        match self {
            Kind::Layer(driver) => driver.keys,
            Kind::Source(source) => source.keys,
        }
    }

    /// The key whose value may be given without naming it.
    #[must_use]
    pub fn main_key(self) -> Option<&'static str> {
        match self {
            Kind::Layer(_) => None,
            Kind::Source(source) => source.main_key,
        }
    }

    /// How many devices it lies over.
    #[must_use]
    pub fn below(self) -> Arity {
        match self {
            Kind::Layer(driver) => driver.below,
            Kind::Source(_) => Arity::None,
        }
    }
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Kind) -> bool {
        let same_half = matches!(self, Kind::Layer(_)) == matches!(other, Kind::Layer(_));
        same_half && self.name() == other.name()
    }
}
