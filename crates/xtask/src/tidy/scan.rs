//! Rust source seen without its strings and comments: enough of a lexer to count and to search.

use std::ops::Range;

/// One source file, taken apart.
pub struct Source {
    /// Every line as it is written.
    pub lines: Vec<String>,
    /// The lines with strings, characters and comments blanked out.
    pub code: Vec<String>,
    /// The lines with only strings and characters blanked out.
    pub words: Vec<String>,
    /// Whether each line belongs to tests.
    pub in_tests: Vec<bool>,
}

/// A function: its name and its lines, counted from 0.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// What it is called.
    pub name: String,
    /// From the line with `fn` to the line with its last brace.
    pub lines: Range<usize>,
}

/// What a character belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Code,
    Comment,
    Literal,
}

impl Source {
    /// Takes a file's text apart.
    pub fn new(text: &str) -> Self {
        let chars: Vec<char> = text.chars().collect();
        let parts = classify(&chars);
        let mask = |keep: &dyn Fn(Part) -> bool| -> Vec<String> {
            let shown = chars.iter().zip(&parts);
            let masked: String =
                shown.map(|(&c, &part)| if c == '\n' || keep(part) { c } else { ' ' }).collect();
            masked.lines().map(str::to_owned).collect()
        };
        let code = mask(&|part| part == Part::Code);
        let in_tests = test_lines(&code);
        let words = mask(&|part| part != Part::Literal);
        Self { lines: text.lines().map(str::to_owned).collect(), code, words, in_tests }
    }

    /// Every function with a body.
    pub fn functions(&self) -> Vec<Function> {
        let mut found = Vec::new();
        for (index, line) in self.code.iter().enumerate() {
            let Some(at) = find_word(line, "fn") else { continue };
            let rest = line[at + 2..].trim_start();
            let name: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if name.is_empty() {
                continue;
            }
            if let Some(end) = item_end(&self.code, index, at) {
                found.push(Function { name, lines: index..end + 1 });
            }
        }
        found
    }
}

/// Says of each character what it belongs to.
fn classify(chars: &[char]) -> Vec<Part> {
    let mut parts = vec![Part::Code; chars.len()];
    let mut at = 0;
    while at < chars.len() {
        let (end, part) = match (chars[at], chars.get(at + 1)) {
            ('/', Some('/')) => (line_end(chars, at), Part::Comment),
            ('/', Some('*')) => (block_comment_end(chars, at), Part::Comment),
            ('"', _) => (string_end(chars, at), Part::Literal),
            ('\'', _) => match char_end(chars, at) {
                Some(end) => (end, Part::Literal),
                None => (at + 1, Part::Code),
            },
            ('r', Some('"' | '#')) if !continues_word(chars, at) => match raw_end(chars, at + 1) {
                Some(end) => (end, Part::Literal),
                None => (at + 1, Part::Code),
            },
            _ => (at + 1, Part::Code),
        };
        parts[at..end].fill(part);
        at = end;
    }
    parts
}

/// Whether the character before `at` makes it part of a longer word; `br"` is a raw string too.
fn continues_word(chars: &[char], at: usize) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    match at.checked_sub(1).map(|before| chars[before]) {
        Some('b' | 'c') => at >= 2 && is_word(chars[at - 2]),
        Some(c) => is_word(c),
        None => false,
    }
}

fn line_end(chars: &[char], at: usize) -> usize {
    (at..chars.len()).find(|&i| chars[i] == '\n').unwrap_or(chars.len())
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut at, mut depth) = (start + 2, 1);
    while at < chars.len() && depth > 0 {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (at, depth) = (at + 2, depth + 1),
            ('*', Some('/')) => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
    }
    at.min(chars.len())
}

fn string_end(chars: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

/// The end of a character literal; `None` when the quote begins a lifetime.
fn char_end(chars: &[char], start: usize) -> Option<usize> {
    match (chars.get(start + 1)?, chars.get(start + 2)) {
        ('\\', _) => {
            let rest = chars.get(start + 3..)?;
            Some(start + 4 + rest.iter().position(|&c| c == '\'')?)
        }
        (_, Some('\'')) => Some(start + 3),
        _ => None,
    }
}

/// The end of a raw string whose `#`s or quote begin at `start`.
fn raw_end(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start..].iter().take_while(|&&c| c == '#').count();
    let open = start + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes = |at: usize| {
        chars[at] == '"'
            && chars[at + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes
    };
    let close = (open + 1..chars.len()).find(|&at| closes(at));
    Some(close.map_or(chars.len(), |at| at + 1 + hashes))
}

/// The byte where `word` stands in `line` as a word of its own.
pub fn find_word(line: &str, word: &str) -> Option<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .map(|(at, _)| at)
        .find(|&at| !line[..at].ends_with(is_word) && !line[at + word.len()..].starts_with(is_word))
}

/// The line where the item that begins at `line`, byte `from`, ends: with the brace that closes
/// its first one, or with a semicolon before any. `None` for a semicolon: it has no body.
fn item_end(code: &[String], line: usize, from: usize) -> Option<usize> {
    match find_end(code, line, from)? {
        (end, true) => Some(end),
        (_, false) => None,
    }
}

/// As `item_end`, and whether the item has a body.
fn find_end(code: &[String], line: usize, from: usize) -> Option<(usize, bool)> {
    let (mut braces, mut others) = (0_usize, 0_usize);
    for (index, text) in code.iter().enumerate().skip(line) {
        let skip = if index == line { from } else { 0 };
        for c in text[skip..].chars() {
            match c {
                '{' => braces += 1,
                '}' if braces <= 1 => return Some((index, true)),
                '}' => braces -= 1,
                '(' | '[' => others += 1,
                ')' | ']' => others = others.saturating_sub(1),
                ';' if braces == 0 && others == 0 => return Some((index, false)),
                _ => {}
            }
        }
    }
    None
}

/// Marks the lines of items that `#[cfg(test)]` or `#[test]` stands before.
fn test_lines(code: &[String]) -> Vec<bool> {
    let mut marks = vec![false; code.len()];
    for (index, line) in code.iter().enumerate() {
        let attribute = line.trim_start();
        let is_test = ["#[cfg(test)]", "#[cfg(all(test", "#[cfg(any(test", "#[test]"]
            .iter()
            .any(|start| attribute.starts_with(start));
        if !is_test || marks[index] {
            continue;
        }
        // Past the attribute itself; other attributes have brackets but no braces.
        let from = line.len() - attribute.len() + attribute.find(']').map_or(0, |at| at + 1);
        let end = find_end(code, index, from).map_or(code.len() - 1, |(end, _)| end);
        marks[index..=end].fill(true);
    }
    marks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_comments_are_no_code() {
        let source =
            Source::new("let a = \"unsafe { \\\" }\"; // unsafe\nlet b = r#\"un\"#; /* x */");
        let left: Vec<&str> = source.code[0].split_whitespace().collect();
        assert_eq!(left, ["let", "a", "=", ";"]);
        assert!(source.words[0].contains("// unsafe") && !source.words[0].contains('{'));
        assert!(!source.code[1].contains("un") && !source.code[1].contains('x'));
    }

    #[test]
    fn a_lifetime_is_not_a_character() {
        let source = Source::new("fn f<'a>(x: &'a str) -> char { '{' }\nfn g() { '\\'' }");
        assert_eq!(source.functions().len(), 2);
        assert!(source.code[0].contains("&'a str"));
    }

    #[test]
    fn a_function_ends_where_its_braces_do() {
        let source = Source::new("fn a(\n) {\n  if x { \"}\" }\n}\ntrait T { fn b(); }\n");
        let a = Function { name: "a".into(), lines: 0..4 };
        assert_eq!(source.functions(), [a]);
    }

    #[test]
    fn a_test_module_is_in_tests_to_its_end() {
        let source =
            Source::new("fn a() {}\n#[cfg(test)]\nmod tests {\n  fn b() {}\n}\nfn c() {}\n");
        assert_eq!(source.in_tests, [false, true, true, true, true, false]);
    }
}
