//! Answers for what the tests of the language share: a catalog, and plans as comparable text.
#![allow(dead_code, missing_docs, clippy::expect_used)] // Each test program uses its part.

use devsplice_core::{Key, Kind, Result, Source};
use devsplice_spec::{Catalog, Plan};

pub const SOURCES: &[Source] = &[
    Source {
        name: "file",
        about: "a file or block device",
        keys: &[
            Key::required("path", Kind::Text, "where it is"),
            Key::optional("direct", Kind::Switch, "past the page cache"),
            Key::optional("readonly", Kind::Switch, "refuse changes"),
            Key::optional("block", Kind::Size, "logical block"),
        ],
        main_key: Some("path"),
        anchored: Some(devsplice_core::layer::anchored_path),
    },
    Source {
        name: "mem",
        about: "memory",
        keys: &[Key::required("size", Kind::Size, "bytes")],
        main_key: Some("size"),
        anchored: None,
    },
    Source {
        name: "nbd",
        about: "an export of a server",
        keys: &[
            Key::required("uri", Kind::Text, "where it is"),
            Key::optional("connections", Kind::Count, "most connections"),
        ],
        main_key: Some("uri"),
        anchored: None,
    },
    Source { name: "keyless", about: "takes nothing", keys: &[], main_key: None, anchored: None },
];

pub const CATALOG: Catalog = Catalog { layers: devsplice_layers::DRIVERS, sources: SOURCES };

pub fn parse(text: &str) -> Result<Plan> {
    Plan::parse(text, &CATALOG)
}

pub fn toml(text: &str) -> Result<Plan> {
    Plan::parse_toml(text, &CATALOG)
}

/// The canonical form of an expression.
pub fn canonical(text: &str) -> String {
    parse(text).unwrap_or_else(|error| panic!("{text}\n{error}")).to_expression()
}

/// The message, and for an expression the character above the caret.
pub fn refusal(parsed: Result<Plan>) -> String {
    parsed.expect_err("it should be refused").to_string()
}
