//! Answers for the command lines of other tools as getopt reads them: options in any place, short
//! ones in clusters, long ones with their value behind `=` or as the next word.

use devsplice_core::{Error, Result};

/// An option of a tool.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Its letter, or `'\0'`.
    pub short: char,
    /// Its long name, or the letter's meaning where it has none.
    pub long: &'static str,
    /// Whether a value follows.
    pub takes_value: bool,
}

/// One that takes a value.
pub const fn value(short: char, long: &'static str) -> Known {
    Known { short, long, takes_value: true }
}

/// One that takes none.
pub const fn flag(short: char, long: &'static str) -> Known {
    Known { short, long, takes_value: false }
}

/// A command line's words, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// What was given of the tool's own options, by long name; later ones come later.
    pub given: Vec<(&'static str, String)>,
    /// Options that the tool does not know: they are the target's, and each has a value.
    pub others: Vec<(String, String)>,
    /// What is no option.
    pub plain: Vec<String>,
}

impl Words {
    /// Sorts the words behind a tool's verb.
    ///
    /// # Errors
    /// If an option lacks its value.
    pub fn sort(known: &[Known], words: &[String]) -> Result<Words> {
        let mut sorted = Words::default();
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            if word == "--" {
                sorted.plain.extend(rest.by_ref().cloned());
            } else if let Some(long) = word.strip_prefix("--") {
                sorted.long(known, long, &mut rest)?;
            } else if word.len() > 1 && word.starts_with('-') {
                sorted.cluster(known, &word[1..], &mut rest)?;
            } else {
                sorted.plain.push(word.clone());
            }
        }
        Ok(sorted)
    }

    fn long(
        &mut self,
        known: &[Known],
        word: &str,
        rest: &mut std::slice::Iter<'_, String>,
    ) -> Result<()> {
        let (name, inline) = match word.split_once('=') {
            Some((name, inline)) => (name, Some(inline.to_owned())),
            None => (word, None),
        };
        let lacks = || Error::invalid(format!("--{name}"), "needs a value");
        let mut next = || inline.clone().or_else(|| rest.next().cloned()).ok_or_else(lacks);
        match known.iter().find(|option| option.long == name) {
            Some(option) if option.takes_value => self.given.push((option.long, next()?)),
            Some(option) => self.given.push((option.long, String::new())),
            None => self.others.push((name.to_owned(), next()?)),
        }
        Ok(())
    }

    fn cluster(
        &mut self,
        known: &[Known],
        letters: &str,
        rest: &mut std::slice::Iter<'_, String>,
    ) -> Result<()> {
        for (at, letter) in letters.char_indices() {
            let name = format!("-{letter}");
            let option = known.iter().find(|option| option.short == letter);
            let option =
                option.ok_or_else(|| Error::invalid(&name, "is no option of this tool"))?;
            if !option.takes_value {
                self.given.push((option.long, String::new()));
                continue;
            }
            let tail = &letters[at + letter.len_utf8()..];
            let value = if tail.is_empty() { rest.next().cloned() } else { Some(tail.to_owned()) };
            let value = value.ok_or_else(|| Error::invalid(name, "needs a value"))?;
            self.given.push((option.long, value));
            break;
        }
        Ok(())
    }

    /// The last value given for an option.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut found = self.given.iter().rev().filter(|(known, _)| *known == name);
        found.next().map(|(_, value)| value.as_str())
    }

    /// Whether an option is there.
    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// An option that says 0 or 1: whether it says something else than 0.
    ///
    /// # Errors
    /// If it is no number.
    pub fn is_on(&self, name: &str) -> Result<bool> {
        Ok(self.number::<u64>(name)?.is_some_and(|number| number != 0))
    }

    /// The number that an option gives, decimal or hexadecimal.
    ///
    /// # Errors
    /// If it is none, or too large.
    pub fn number<N: TryFrom<u64>>(&self, name: &str) -> Result<Option<N>> {
        self.get(name).map(|text| number(name, text)).transpose()
    }
}

/// A number, decimal or hexadecimal.
///
/// # Errors
/// If it is none, or too large for its place.
pub fn number<N: TryFrom<u64>>(name: &str, text: &str) -> Result<N> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let wrong = || Error::invalid(name, format!("`{text}` is no number that it takes"));
    N::try_from(parsed.map_err(|_| wrong())?).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Known] =
        &[value('t', "type"), flag('z', "zero_copy"), flag('u', "user_copy"), value('\0', "depth")];

    fn sort(line: &str) -> Result<Words> {
        Words::sort(KNOWN, &line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_found_wherever_they_stand() {
        let words = sort("a -tloop -zu --depth=7 b --delay_us 5 -t stripe -- -z").unwrap();
        assert_eq!(words.plain, ["a", "b", "-z"]);
        assert_eq!(words.get("type"), Some("stripe"));
        assert!(words.has("zero_copy") && words.has("user_copy"));
        assert_eq!(words.number::<u16>("depth").unwrap(), Some(7));
        assert_eq!(words.others, [("delay_us".to_owned(), "5".to_owned())]);
        assert_eq!(sort("-zt x").unwrap().get("type"), Some("x"));
    }

    #[test]
    fn what_is_missing_or_no_number_is_said() {
        assert!(sort("-t").unwrap_err().to_string().contains("-t"));
        assert!(sort("--depth").unwrap_err().to_string().contains("--depth"));
        assert!(sort("--delay_us").is_err());
        assert!(sort("-x").unwrap_err().to_string().contains("-x"));
        assert!(sort("--depth 70000").unwrap().number::<u16>("depth").is_err());
        assert!(sort("--depth -1").unwrap().number::<u16>("depth").is_err());
        assert_eq!(sort("--depth 0x10").unwrap().number::<u16>("depth").unwrap(), Some(16));
        assert!(!sort("--depth 0").unwrap().is_on("depth").unwrap());
        assert!(sort("--depth 1").unwrap().is_on("depth").unwrap());
    }
}
