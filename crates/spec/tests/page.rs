//! Answers for docs/stack.md: it names every driver and key, and its examples are what it says.
#![allow(clippy::unwrap_used)]

mod common;

use common::{parse, refusal, toml};

fn page() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/stack.md");
    std::fs::read_to_string(path).unwrap()
}

/// The text of the first code block that begins with `start`.
fn example(page: &str, start: &str) -> String {
    let block = page.split("```").find(|block| block.starts_with(start)).unwrap();
    block[start.len()..].to_owned()
}

#[test]
fn every_driver_and_key_is_on_the_page() {
    let page = page();
    for driver in devsplice_layers::DRIVERS {
        let rows: Vec<&str> = page.split('\n').collect();
        let names = format!("`{}`", driver.name);
        let is_row = |row: &&&str| row.starts_with('|') && row.contains(&names);
        assert!(rows.iter().filter(is_row).count() >= 1, "{names} has no row");
        // A driver's keys stand in the rows from its own to the next driver's.
        let starts = rows.iter().enumerate().filter(|(_, row)| is_row(row)).map(|(at, _)| at);
        let keys: String = starts
            .flat_map(|at| {
                let more = rows[at + 1..].iter().take_while(|row| row.starts_with("| |"));
                std::iter::once(&rows[at]).chain(more).copied()
            })
            .collect();
        // Inside a table a bar is written so.
        let keys = keys.replace("\\|", "|");
        for key in driver.keys {
            let words = format!("`{}={}`", key.name, key.kind.hint());
            assert!(keys.contains(&words), "{}: {words} is missing", driver.name);
        }
    }
}

#[test]
fn the_examples_of_the_page_work() {
    let page = page();
    // The expression and what it means are two or more blanks apart.
    let lines = example(&page, "\n");
    let texts: Vec<_> = lines.lines().filter_map(|line| line.split("  ").next()).collect();
    assert_eq!(texts.len(), 6);
    for text in texts {
        parse(text).unwrap_or_else(|error| panic!("{error}"));
    }
    toml(&example(&page, "toml\n")).unwrap_or_else(|error| panic!("{error}"));
    let message = refusal(parse("linear(linaer(/x.img), offset=1M)"));
    let caret: Vec<_> = message.lines().skip(1).map(|line| format!("    {line}")).collect();
    assert!(page.contains(&caret.join("\n")), "{message}");
    assert!(page.contains(&message[..message.find("stripe").unwrap()]), "{message}");
    assert!(page.lines().count() <= 120);
}
