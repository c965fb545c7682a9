//! Answers for this binary under other tools' names: called `kublk`, `miniublk`, `rublk` or `ublk`,
//! it speaks their command lines and prints their lists, so that the tests written for them test
//! devsplice.
//!
//! Their devices are theirs in manners, too: a server ends when its device is stopped, a device
//! whose server was killed is left for `del`, and all that is known of a device is what the kernel
//! and its process tell. `devsplice list` does not know them.

mod kublk;
mod list;
mod miniublk;
mod outside;
mod record;
mod rublk;
mod serve;
mod ublksrv;
mod wish;
mod words;

use std::path::Path;
use std::process::ExitCode;

use devsplice_core::{Error, Result};

pub use list::all as devices;
use wish::{More, Verb, Which, Wish};
use words::Words;

/// A tool whose name this binary may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// Of the kernel's tests.
    Kublk,
    /// Of blktests.
    Miniublk,
    /// The one written in Rust.
    Rublk,
    /// Of ublksrv.
    Ublk,
}

const NAMES: &[(&str, Tool)] = &[
    ("kublk", Tool::Kublk),
    ("miniublk", Tool::Miniublk),
    ("rublk", Tool::Rublk),
    ("ublk", Tool::Ublk),
];

impl Tool {
    /// The tool that a program's path names.
    fn called(path: &str) -> Option<Tool> {
        let name = Path::new(path).file_name()?.to_str()?;
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, tool)| *tool)
    }

    fn name(self) -> &'static str {
        NAMES.iter().find(|(_, tool)| *tool == self).map_or("ublk", |(name, _)| name)
    }

    fn parse(self, verb: &str, words: &[String]) -> Result<Verb> {
        match self {
            Tool::Kublk => kublk::parse(verb, words),
            Tool::Miniublk => miniublk::parse(verb, words),
            Tool::Rublk => rublk::parse(verb, words),
            Tool::Ublk => ublksrv::parse(verb, words),
        }
    }

    fn help(self) -> &'static str {
        match self {
            Tool::Kublk => kublk::HELP,
            Tool::Miniublk => miniublk::HELP,
            Tool::Rublk => rublk::HELP,
            Tool::Ublk => ublksrv::HELP,
        }
    }
}

/// Does what another tool's command line says, if this process was started under such a name.
pub fn run() -> Option<ExitCode> {
    let mut words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let tool = Tool::called(&words.next()?)?;
    let words: Vec<String> = words.collect();
    Some(obey(tool, &words).unwrap_or_else(|error| {
        eprintln!("{}: {error}", tool.name());
        ExitCode::from(1)
    }))
}

fn obey(tool: Tool, words: &[String]) -> Result<ExitCode> {
    let Some((verb, words)) = words.split_first() else {
        eprintln!("{}", tool.help());
        return Ok(ExitCode::from(1));
    };
    let done = |()| ExitCode::SUCCESS;
    match tool.parse(verb, words)? {
        Verb::Add(wish) => serve::add(&remembered(*wish, tool, words)?, tool),
        Verb::Del(which) => outside::del(which).map(done),
        Verb::List(which) => list::run(which, tool).map(done),
        Verb::Stop { id, is_safe } => outside::stop(id, is_safe).map(done),
        Verb::Quiesce { id } => outside::quiesce(id).map(done),
        Verb::Resize { id, bytes } => outside::resize(id, bytes).map(done),
        Verb::Try(id, trial) => outside::try_out(id, &trial).map(done),
        Verb::Features => list::features().map(done),
        Verb::Help => {
            crate::say!("{}", tool.help());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// A wish with the words that it was said in; of a device that is to be recovered without a word of
/// what it is, the wish that made it.
fn remembered(wish: Wish, tool: Tool, words: &[String]) -> Result<Wish> {
    let (Some(id), true) = (wish.id, wish.more.is_recovery && wish.target.is_empty()) else {
        return Ok(Wish { words: words.to_vec(), ..wish });
    };
    let words = record::words(id)?;
    match tool.parse("add", &words)? {
        Verb::Add(made) => {
            let more = More { is_recovery: true, ..made.more };
            Ok(Wish { id: Some(id), is_foreground: wish.is_foreground, more, words, ..*made })
        }
        _ => Err(Error::invalid(format!("ublk device {id}"), "was made in another way")),
    }
}

/// The device's number that `words` must give.
fn number_of(words: &Words) -> Result<u32> {
    let number = words.number("number")?;
    number.ok_or_else(|| Error::invalid("-n", "needs the device's number").next("-n ID"))
}

/// The verbs that these tools have in common; help for any other.
fn common(verb: &str, words: &Words) -> Result<Verb> {
    match verb {
        "del" => which_of(words, true).map(Verb::Del),
        "list" => which_of(words, false).map(Verb::List),
        "features" => Ok(Verb::Features),
        _ => Ok(Verb::Help),
    }
}

/// Which devices `words` name: all have to be meant, if `must_say`.
fn which_of(words: &Words, must_say: bool) -> Result<Which> {
    if words.has("number") || (must_say && !words.has("all")) {
        return number_of(words).map(Which::One);
    }
    Ok(Which::All)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_their_names_make_it_another_tool() {
        assert_eq!(Tool::called("/a/b/kublk"), Some(Tool::Kublk));
        assert_eq!(Tool::called("miniublk"), Some(Tool::Miniublk));
        assert_eq!(Tool::called("./rublk"), Some(Tool::Rublk));
        assert_eq!(Tool::called("ublk"), Some(Tool::Ublk));
        for other in ["devsplice", "/ublk/devsplice", "ublk2", "", "/"] {
            assert_eq!(Tool::called(other), None, "{other}");
        }
        assert_eq!(Tool::Rublk.name(), "rublk");
    }
}
