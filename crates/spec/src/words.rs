//! Answers for how a message points at a place in a text and at the word that was meant.

use devsplice_core::Error;

/// Characters shown on each side of the place.
const AROUND: usize = 32;

/// The same error with the place in `text`, as numbers and as a caret below an excerpt.
pub(crate) fn located(text: &str, at: usize, error: &Error) -> Error {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |place| place + 1);
    let column = before[line_start..].chars().count();
    let line: Vec<char> = text[line_start..]
        .chars()
        .take_while(|c| *c != '\n')
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(column + AROUND)
        .collect();
    let cut = column.saturating_sub(AROUND);
    let excerpt: String = line[cut.min(line.len())..].iter().collect();
    let gap = " ".repeat(column - cut);
    let place = match before.matches('\n').count() {
        0 => format!("column {}", column + 1),
        lines => format!("line {}, column {}", lines + 1, column + 1),
    };
    let reason = format!("{error}\n    {}\n    {gap}^", excerpt.trim_end());
    Error::new(error.kind(), place, reason)
}

/// The next step after an unknown word: the one that is near it, and all there are.
pub(crate) fn did_you_mean(word: &str, known: &[&str]) -> String {
    let near = known.iter().map(|one| (distance(word, one), one)).min_by_key(|(far, _)| *far);
    let all = format!("one of {}", known.join(", "));
    match near {
        Some((far, one)) if far <= 2 && far < one.len() => format!("did you mean {one}? {all}"),
        _ => all,
    }
}

/// Letters to insert, remove, replace or swap with the next to get from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(32).collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            if i == 0 || j == 0 {
                rows[i][j] = i + j;
                continue;
            }
            let other = usize::from(a[i - 1] != b[j - 1]);
            let mut best = rows[i - 1][j - 1] + other;
            best = best.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_word_is_suggested_and_a_far_one_is_not() {
        let known = ["linear", "stripe", "null"];
        let all = "one of linear, stripe, null";
        assert_eq!(did_you_mean("linaer", &known), format!("did you mean linear? {all}"));
        assert_eq!(did_you_mean("nul", &known), format!("did you mean null? {all}"));
        assert_eq!(did_you_mean("qcow2", &known), all);
        assert_eq!(did_you_mean("x", &[]), "one of ");
    }

    #[test]
    fn the_caret_stands_below_the_place_in_a_short_excerpt() {
        let text = format!("{}\u{e9}!{}", "a".repeat(100), "b".repeat(100));
        let at = text.find('!').unwrap();
        let shown = located(&text, at, &Error::invalid("x", "bad")).to_string();
        let lines: Vec<_> = shown.lines().collect();
        assert_eq!(lines[0], "column 102: x: bad");
        assert_eq!(lines[1].chars().nth(lines[2].len() - 1), Some('!'));
        assert!(lines[1].len() < 80);
        let shown = located("a(\n\tb c", 5, &Error::invalid("x", "bad")).to_string();
        assert_eq!(shown, "line 2, column 3: x: bad\n     b c\n      ^");
    }
}
