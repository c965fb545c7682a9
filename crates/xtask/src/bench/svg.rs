//! Answers for charts: groups of horizontal bars as SVG, readable on light and dark pages.

use std::fmt::Write;

/// Bars that belong together: what they are about, then name and length of each.
pub struct Group {
    /// The heading.
    pub name: String,
    /// Name, length, and whether it is ours.
    pub bars: Vec<(String, f64, bool)>,
}

const WIDTH: f64 = 720.0;
const NAMES: f64 = 150.0;
const FIGURES: f64 = 60.0;
const ROW: f64 = 16.0;
const GAP: f64 = 26.0;
const TOP: f64 = 44.0;

/// Draws the groups under a title; `mark` is a length with a line through all groups.
pub fn chart(title: &str, groups: &[Group], mark: f64) -> String {
    let bars = || groups.iter().flat_map(|group| &group.bars);
    let longest = bars().map(|bar| bar.1).fold(mark, f64::max);
    let scale = (WIDTH - NAMES - FIGURES) / longest;
    let height = TOP + bars().count() as f64 * ROW + groups.len() as f64 * GAP;
    let mut body = String::new();
    let mut y = TOP;
    for group in groups {
        let _ = writeln!(body, "<text x=\"8\" y=\"{:.0}\" class=\"h\">{}</text>", y, group.name);
        y += 6.0;
        for (name, value, is_ours) in &group.bars {
            let class = if *is_ours { "o" } else { "p" };
            let (base, length) = (y + 12.0, value * scale);
            let _ = writeln!(
                body,
                "<text x=\"{:.0}\" y=\"{base:.0}\" text-anchor=\"end\">{name}</text>\
                 <rect x=\"{NAMES:.0}\" y=\"{:.0}\" width=\"{length:.1}\" height=\"12\" \
                 class=\"{class}\"/><text x=\"{:.1}\" y=\"{base:.0}\">{value:.2}</text>",
                NAMES - 6.0,
                y + 2.0,
                NAMES + length + 4.0,
            );
            y += ROW;
        }
        y += GAP - 6.0;
    }
    let line = NAMES + mark * scale;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH:.0} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<style>text{{fill:#777}}\
         .t{{font-size:14px;font-weight:bold}}.h{{font-weight:bold}}.o{{fill:#d9622b}}\
         .p{{fill:#8aa4bd}}</style>\n<text x=\"8\" y=\"20\" class=\"t\">{title}</text>\n{body}\
         <line x1=\"{line:.1}\" x2=\"{line:.1}\" y1=\"30\" y2=\"{:.0}\" stroke=\"#777\" \
         stroke-dasharray=\"2 3\"/>\n</svg>\n",
        height - GAP + 4.0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_drawn_to_one_scale() {
        let bars = vec![("a".to_owned(), 1.0, true), ("b".to_owned(), 2.0, false)];
        let drawn = chart("title", &[Group { name: "g".into(), bars }], 1.0);
        assert!(drawn.contains("width=\"510.0\"") && drawn.contains("width=\"255.0\""));
        assert_eq!(drawn.matches("<rect").count(), 2);
    }
}
