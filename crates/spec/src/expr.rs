//! Answers for the one-line form: `NAME(arg, ...)`, `NAME:TEXT` or a bare path.

use devsplice_core::{Args, Error, Key, Result};

use crate::plan::{Draft, bounded};
use crate::words::{did_you_mean, located};
use crate::{Kind, MAX_NESTING, MAX_TEXT, PATH_SOURCE, URI_SCHEMES, URI_SOURCE, show};

const WANT_DEVICE: &str =
    "expected a device: NAME(...), NAME:TEXT, a path that begins with /, ./ or ../, or nbd://...";

/// Adds what `text` describes to the draft; returns its top.
pub(crate) fn parse(text: &str, draft: &mut Draft<'_>) -> Result<usize> {
    bounded(text, MAX_TEXT)?;
    let mut parser = Parser { text, at: 0, draft };
    let top = parser.device(0)?;
    parser.skip_space();
    match parser.peek() {
        None => Ok(top),
        Some(_) => Err(parser.wrong("expected the end; quote a path that holds , ( or )")),
    }
}

struct Parser<'t, 'd, 'c> {
    text: &'t str,
    /// Byte that comes next.
    at: usize,
    draft: &'d mut Draft<'c>,
}

/// What one pair of parentheses holds.
#[derive(Default)]
struct Given {
    pairs: Vec<(String, String)>,
    below: Vec<usize>,
}

impl Parser<'_, '_, '_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn eat(&mut self, want: char) -> bool {
        self.skip_space();
        let found = self.peek() == Some(want);
        self.at += if found { want.len_utf8() } else { 0 };
        found
    }

    fn skip_space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn wrong(&self, reason: &str) -> Error {
        let found = match self.peek() {
            None => "the text ends".to_owned(),
            Some(c) => format!("`{}`", c.escape_debug()),
        };
        located(self.text, self.at, &Error::invalid(found, reason))
    }

    /// One device. Calls itself at most [`MAX_NESTING`] deep.
    fn device(&mut self, nesting: usize) -> Result<usize> {
        self.skip_space();
        let start = self.at;
        if nesting > MAX_NESTING {
            let reason = format!("more than {MAX_NESTING} devices inside one another");
            return Err(located(self.text, start, &Error::invalid("nesting", reason)));
        }
        let rest = self.rest();
        if rest.starts_with('"') || means_source(rest).is_some() {
            let value = self.word()?;
            let Some(source) = means_source(&value) else {
                self.at = start;
                return Err(self.wrong(WANT_DEVICE));
            };
            let kind = self.kind(source, start)?;
            return self.source(kind, value, start);
        }
        let name = ident(rest).to_owned();
        if name.is_empty() {
            return Err(self.wrong(WANT_DEVICE));
        }
        let kind = self.kind(&name, start)?;
        self.at += name.len();
        if self.eat(':') {
            let value = self.word()?;
            return self.source(kind, value, start);
        }
        if !self.eat('(') {
            return Err(self.wrong(&format!("expected ( after {name}: {}", show::usage(kind))));
        }
        let Given { pairs, below } = self.arguments(kind, nesting)?;
        self.draft.place("", kind, pairs, below).map_err(|e| located(self.text, start, &e))
    }

    /// A source of which only the main value is given.
    fn source(&mut self, kind: Kind, value: String, start: usize) -> Result<usize> {
        let add = |draft: &mut Draft<'_>| {
            let key = main_key(kind)?;
            draft.place("", kind, vec![(key.to_owned(), value)], Vec::new())
        };
        add(self.draft).map_err(|error| located(self.text, start, &error))
    }

    fn kind(&self, name: &str, start: usize) -> Result<Kind> {
        if let Some(kind) = self.draft.catalog.find(name) {
            return Ok(kind);
        }
        let names: Vec<_> = self.draft.catalog.names().collect();
        let mut next = did_you_mean(name, &names);
        let behind = self.text[start..].strip_prefix(name).unwrap_or_default().trim_start();
        if !behind.starts_with(['(', ':']) {
            next.push_str("; a path begins with /, ./ or ../");
        }
        let error = Error::invalid(name, "no such driver").next(next);
        Err(located(self.text, start, &error))
    }

    /// What stands between the parentheses, and the closing one.
    fn arguments(&mut self, kind: Kind, nesting: usize) -> Result<Given> {
        let mut given = Given::default();
        if self.eat(')') {
            return Ok(given);
        }
        loop {
            self.skip_space();
            let start = self.at;
            match (self.key(), kind) {
                (Some(key), _) => {
                    let value = self.word()?;
                    self.pair(kind, key, value, start, &mut given)?;
                }
                (None, Kind::Source(_)) => {
                    let value = self.word()?;
                    let key = main_key(kind).map_err(|e| located(self.text, start, &e))?;
                    self.pair(kind, key.to_owned(), value, start, &mut given)?;
                }
                (None, Kind::Layer(_)) => given.below.push(self.device(nesting + 1)?),
            }
            if self.eat(')') {
                return Ok(given);
            }
            if !self.eat(',') {
                return Err(self.wrong("expected , or )"));
            }
        }
    }

    /// Takes `key=`, if that is what comes next.
    fn key(&mut self) -> Option<String> {
        let key = ident(self.rest()).to_owned();
        let behind = self.rest()[key.len()..].trim_start();
        if key.is_empty() || !behind.starts_with('=') {
            return None;
        }
        self.at = self.text.len() - behind.len() + 1;
        Some(key)
    }

    /// Keeps a pair, after the checks whose message should point at it.
    fn pair(
        &self,
        kind: Kind,
        key: String,
        value: String,
        start: usize,
        given: &mut Given,
    ) -> Result<()> {
        let twice = given.pairs.iter().any(|(other, _)| *other == key);
        given.pairs.push((key, value));
        let new = given.pairs.len() - 1;
        let checked = match kind.keys().iter().find(|one| one.name == given.pairs[new].0) {
            Some(one) if !twice => {
                let alone = [Key { required: false, ..*one }];
                Args::new(kind.name(), &alone, &given.pairs[new..])
            }
            // Unknown or repeated: both are among the checks of the whole.
            _ => Args::new(kind.name(), kind.keys(), &given.pairs),
        };
        checked.map(drop).map_err(|error| located(self.text, start, &error))
    }

    /// A value: quoted, or all up to the next `,` or `)` outside parentheses of its own.
    fn word(&mut self) -> Result<String> {
        self.skip_space();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        if self.peek() == Some('[') {
            return self.bracketed();
        }
        let mut open = 0_usize;
        let mut end = self.text.len();
        for (place, c) in self.rest().char_indices() {
            match c {
                '"' => {
                    self.at += place;
                    return Err(self.wrong("a quote inside a word; quote the whole value"));
                }
                ',' | ')' if open == 0 => {
                    end = self.at + place;
                    break;
                }
                '(' => open += 1,
                ')' => open -= 1,
                _ => {}
            }
        }
        if open > 0 {
            return Err(self.wrong("this value opens more parentheses than it closes; quote it"));
        }
        let word = self.text[self.at..end].trim_end().to_owned();
        if word.is_empty() {
            return Err(self.wrong("expected a value"));
        }
        self.at = end;
        Ok(word)
    }

    /// What stands in brackets, with them.
    fn bracketed(&mut self) -> Result<String> {
        let mut open = 0_usize;
        for (place, c) in self.rest().char_indices() {
            match c {
                '[' => open += 1,
                ']' => open -= 1,
                _ => {}
            }
            if open == 0 {
                let word = self.rest()[..=place].to_owned();
                self.at += word.len();
                return Ok(word);
            }
        }
        Err(self.wrong("this bracket is never closed"))
    }

    fn quoted(&mut self) -> Result<String> {
        let start = self.at;
        let mut value = String::new();
        let mut chars = self.text[start..].char_indices().skip(1);
        while let Some((place, c)) = chars.next() {
            match c {
                '"' => {
                    self.at = start + place + 1;
                    return Ok(value);
                }
                '\\' => match chars.next() {
                    Some((_, c @ ('"' | '\\'))) => value.push(c),
                    _ => {
                        self.at = start + place;
                        return Err(self.wrong("inside quotes only \\\" and \\\\ are escapes"));
                    }
                },
                c => value.push(c),
            }
        }
        Err(self.wrong("this quote is never closed"))
    }
}

fn main_key(kind: Kind) -> Result<&'static str> {
    kind.main_key().ok_or_else(|| {
        Error::invalid(kind.name(), "takes no value without a key").next(show::usage(kind))
    })
}

/// The source that a text means by itself: a path, a URI, or a command in brackets.
fn means_source(text: &str) -> Option<&'static str> {
    if ["/", "./", "../"].iter().any(|start| text.starts_with(start)) {
        return Some(PATH_SOURCE);
    }
    let is_part = |c: char| c.is_ascii_alphanumeric() || "+.-".contains(c);
    let scheme = &text[..text.find(|c| !is_part(c)).unwrap_or(text.len())];
    let is_uri = text[scheme.len()..].starts_with("://")
        && URI_SCHEMES.iter().any(|one| scheme == *one || scheme.starts_with(&format!("{one}+")));
    (is_uri || text.starts_with('[')).then_some(URI_SOURCE)
}

/// The name or key that `text` begins with.
pub(crate) fn ident(text: &str) -> &str {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    &text[..text.find(|c| !is_part(c)).unwrap_or(text.len())]
}
