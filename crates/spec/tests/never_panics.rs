//! Answers for texts that nobody would write: an error at worst; and for the way back to a text.

mod common;

use common::{parse, toml};
use devsplice_spec::Plan;
use proptest::prelude::*;

/// Texts made of the pieces that the grammar is made of, in any order.
fn near_misses() -> impl Strategy<Value = String> {
    const PIECES: &[&str] = &[
        "linear", "stripe", "file", "mem", "null", "(", ")", ",", ":", "=", "\"", "\\", " ", "\n",
        "/a", "./b", "1M", "offset", "size", "chunk", "\u{e9}", "\0", "#",
    ];
    let piece = proptest::sample::select(PIECES);
    proptest::collection::vec(piece, 0..24).prop_map(|all| all.concat())
}

fn near_tomls() -> impl Strategy<Value = String> {
    const LINES: &[&str] = &[
        "stack = 'a'",
        "stack = 'linear(mem:1M)'",
        "[device.a]",
        "[device.b]",
        "[device]",
        "driver = 'linear'",
        "driver = 'concat'",
        "driver = 'mem'",
        "below = ['a', 'b']",
        "below = 'b'",
        "below = []",
        "size = 1048576",
        "offset = 1979-05-27",
        "x = { y = [1, 2] }",
        "device.c.driver = 'mem'",
    ];
    let line = proptest::sample::select(LINES);
    proptest::collection::vec(line, 0..12).prop_map(|all| all.join("\n"))
}

fn value() -> impl Strategy<Value = String> {
    prop_oneof![".{0,12}", r#"[a-z/.(),=\\" \[\]]{0,12}"#]
}

fn quoted(value: &str) -> String {
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Valid expressions of any shape.
fn stacks() -> impl Strategy<Value = String> {
    let file = (value(), any::<bool>()).prop_map(|(path, direct)| {
        format!("file(direct={}, {})", if direct { "on" } else { "off" }, quoted(&path))
    });
    // A directory that is not there keeps the identity check out of the way.
    let bare = "[a-z=]{1,8}".prop_map(|name| format!("/nowhere-at-all/{name}"));
    let leaf = prop_oneof![file, bare, Just("mem:1M".to_owned()), Just("null(size=1M)".to_owned())];
    leaf.prop_recursive(4, 24, 3, |inner| {
        let many = proptest::collection::vec(inner.clone(), 1..4);
        prop_oneof![
            (inner, 0..100_u32).prop_map(|(below, at)| format!("linear(offset={at}k,{below})")),
            many.prop_map(|below| format!("stripe({}, chunk=\"4k\")", below.join(" , "))),
        ]
    })
}

fn same(a: &Plan, b: &Plan) -> bool {
    let equal = a.places.iter().zip(&b.places).all(|(a, b)| {
        (&a.label, a.kind, &a.given, &a.below) == (&b.label, b.kind, &b.given, &b.below)
    });
    equal && a.places.len() == b.places.len() && a.root == b.root
}

/// Enough cases to find what we know how to break; no files of failures beside the sources.
fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4096) }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_text_is_a_plan_or_an_error(text in ".{0,200}") {
        let _ = (parse(&text), toml(&text));
    }

    #[test]
    fn any_near_miss_is_a_plan_or_an_error(text in near_misses(), document in near_tomls()) {
        let _ = (parse(&text), toml(&document), toml(&text));
        let _ = toml(&format!("stack = '''{text}'''"));
    }

    #[test]
    fn a_plan_written_as_a_line_reads_back_as_the_same_plan(text in stacks()) {
        let plan = parse(&text).map_err(|error| TestCaseError::fail(format!("{text}\n{error}")))?;
        let line = plan.to_expression();
        let again = parse(&line).map_err(|error| TestCaseError::fail(format!("{line}\n{error}")))?;
        prop_assert!(same(&plan, &again), "{text}\n{line}");
        prop_assert_eq!(again.to_expression(), line);
    }
}
