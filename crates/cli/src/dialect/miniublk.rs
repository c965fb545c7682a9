//! Answers for the command line of `miniublk`, the server of blktests.

use devsplice_core::Result;

use super::wish::{CopyMode, More, Verb, Wish};
use super::words::{Known, Words, flag, value};
use super::{common, number_of};

const KNOWN: &[Known] = &[
    flag('a', "all"),
    value('t', "type"),
    value('f', "file"),
    value('n', "number"),
    value('q', "queues"),
    value('d', "depth"),
    value('\0', "debug_mask"),
    flag('\0', "quiet"),
    flag('z', "zero_copy"),
    flag('\0', "foreground"),
    flag('r', "recovery"),
];

/// How it is used.
pub const HELP: &str = "\
miniublk add -t null|loop [-f FILE] [-n ID] [-q QUEUES] [-d DEPTH] [-z] [-r]
miniublk recover -n ID ...as for add
miniublk del -n ID | -a;  list [-n ID];  features";

/// What a command line asks for.
///
/// # Errors
/// Which word makes no sense.
pub fn parse(verb: &str, words: &[String]) -> Result<Verb> {
    let words = Words::sort(KNOWN, words)?;
    match verb {
        "add" | "recover" => {
            let is_recovery = verb == "recover";
            let id = if is_recovery { Some(number_of(&words)?) } else { words.number("number")? };
            let register = words.has("zero_copy");
            Ok(Verb::Add(Box::new(Wish {
                target: words.get("type").unwrap_or("unknown").to_owned(),
                files: words.get("file").map(str::to_owned).into_iter().collect(),
                target_options: words.others.clone(),
                id,
                queues: words.number("queues")?.unwrap_or(2),
                depth: words.number("depth")?.unwrap_or(128),
                copy: if register { CopyMode::Register } else { CopyMode::Copy },
                is_foreground: words.has("foreground"),
                more: More { is_recovery, outlives: words.has("recovery"), ..More::default() },
                ..Wish::default()
            })))
        }
        _ => common(verb, &words),
    }
}

#[cfg(test)]
mod tests {
    use super::super::wish::Which;
    use super::*;

    fn read(line: &str) -> Result<Verb> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words[0], &words[1..])
    }

    #[test]
    fn devices_are_asked_for_as_blktests_does() {
        let Ok(Verb::Add(wish)) = read("add -t loop -f /a -n 3 -q 2 -d 64 -r") else { panic!() };
        assert_eq!((wish.target.as_str(), wish.id), ("loop", Some(3)));
        assert_eq!((wish.files, wish.queues, wish.depth), (vec!["/a".to_owned()], 2, 64));
        assert_eq!(wish.more, More { outlives: true, ..More::default() });
        let Ok(Verb::Add(wish)) = read("recover -t null -n 0") else { panic!() };
        assert_eq!((wish.id, wish.more.is_recovery), (Some(0), true));
        assert!(read("recover -t null").is_err() && read("del").is_err());
        assert_eq!(read("del -n 3").unwrap(), Verb::Del(Which::One(3)));
        assert_eq!(read("list -n 3").unwrap(), Verb::List(Which::One(3)));
        assert_eq!(read("features").unwrap(), Verb::Features);
        assert_eq!(read("help").unwrap(), Verb::Help);
    }
}
