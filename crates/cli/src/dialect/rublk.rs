//! Answers for the command line of `rublk`, as far as blktests uses it through its wrapper, which
//! puts the target's name first.

use devsplice_core::{Error, Result};

use super::wish::{CopyMode, More, Verb, Wish};
use super::words::{Known, Words, flag, value};
use super::{common, number_of};

const KNOWN: &[Known] = &[
    flag('a', "all"),
    value('n', "number"),
    value('q', "queue"),
    value('d', "depth"),
    value('f', "file"),
    flag('r', "user-recovery"),
    flag('z', "zero-copy"),
    flag('u', "unprivileged"),
    flag('\0', "foreground"),
    flag('\0', "buffered-io"),
    flag('\0', "read-only"),
];

/// How it is used.
pub const HELP: &str = "\
rublk add null|loop [-n ID] [-f FILE] [-q QUEUES] [-d DEPTH] [-z] [-r] [-u] [--buffered-io]
      [--read-only] [--foreground]
rublk recover -n ID
rublk del -n ID | -a;  list [-n ID];  features";

/// What a command line asks for.
///
/// # Errors
/// Which word makes no sense.
pub fn parse(verb: &str, words: &[String]) -> Result<Verb> {
    let words = Words::sort(KNOWN, words)?;
    match verb {
        "add" => add(&words).map(|wish| Verb::Add(Box::new(wish))),
        // That tool knows from its own records what to serve.
        "recover" => Ok(Verb::Add(Box::new(Wish {
            id: Some(number_of(&words)?),
            more: More { is_recovery: true, ..More::default() },
            ..Wish::default()
        }))),
        _ => common(verb, &words),
    }
}

fn add(words: &Words) -> Result<Wish> {
    let Some(target) = words.plain.first() else {
        return Err(Error::invalid("add", "needs a target").next("rublk add null"));
    };
    let register = words.has("zero-copy");
    Ok(Wish {
        target: target.clone(),
        files: words.get("file").map(str::to_owned).into_iter().collect(),
        target_options: words.others.clone(),
        id: words
            .get("number")
            .filter(|text| *text != "-1")
            .map(|_| number_of(words))
            .transpose()?,
        queues: words.number("queue")?.unwrap_or(1),
        depth: words.number("depth")?.unwrap_or(128),
        copy: if register { CopyMode::AutoRegister } else { CopyMode::Copy },
        is_foreground: words.has("foreground"),
        is_buffered: words.has("buffered-io"),
        read_only: words.has("read-only"),
        more: More {
            outlives: words.has("user-recovery"),
            unprivileged: words.has("unprivileged"),
            ..More::default()
        },
        ..Wish::default()
    })
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
    fn devices_are_asked_for_as_blktests_wrapper_does() {
        let Ok(Verb::Add(wish)) = read("add loop -f /a -n 3 -r") else { panic!() };
        assert_eq!((wish.target.as_str(), wish.id), ("loop", Some(3)));
        assert_eq!((wish.files, wish.queues), (vec!["/a".to_owned()], 1));
        assert!(wish.more.outlives);
        let Ok(Verb::Add(wish)) = read("add null -n -1 -z -q 2") else { panic!() };
        assert_eq!((wish.id, wish.queues, wish.copy), (None, 2, CopyMode::AutoRegister));
        let Ok(Verb::Add(wish)) = read("recover -n 3") else { panic!() };
        assert!(wish.more.is_recovery);
        assert!(read("add").is_err() && read("recover").is_err() && read("del").is_err());
        assert_eq!(read("del -a").unwrap(), Verb::Del(Which::All));
        assert_eq!(read("list").unwrap(), Verb::List(Which::All));
    }
}
