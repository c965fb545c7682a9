//! Answers for the counters that the demo shows: those of its two servers, side by side.

use serde_json::Value;

/// The counters, by the names that `devsplice info` gives them.
const NAMES: [&str; 6] = ["requests", "pieces", "sqes", "enters", "bytes_spliced", "bytes_copied"];

/// What one server counted, or several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters([u64; 6]);

impl Counters {
    /// Reads them from what `devsplice info --json` prints.
    pub fn of(info: &Value) -> Self {
        Self(NAMES.map(|name| info["counts"][name].as_u64().unwrap_or(0)))
    }

    /// The sum.
    pub fn plus(self, other: Self) -> Self {
        Self(std::array::from_fn(|index| self.0[index] + other.0[index]))
    }

    /// Bytes that went past the server's process.
    pub fn spliced(&self) -> u64 {
        self.0[4]
    }

    /// Bytes that went through the server's memory.
    pub fn copied(&self) -> u64 {
        self.0[5]
    }
}

/// A table with a line for each.
pub fn table(rows: &[(&str, Counters)]) -> String {
    let mut text = format!("{:<8}", "");
    for name in NAMES {
        text += &format!(" {name:>width$}", width = width(name));
    }
    for (label, counters) in rows {
        text += &format!("\n{label:<8}");
        for (name, count) in NAMES.iter().zip(counters.0) {
            text += &format!(" {count:>width$}", width = width(name));
        }
    }
    text
}

fn width(name: &str) -> usize {
    name.len().max(9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_name_and_added() {
        let info = serde_json::json!({ "counts": { "requests": 2, "bytes_copied": 5 } });
        let counters = Counters::of(&info);
        assert_eq!((counters.0[0], counters.copied(), counters.spliced()), (2, 5, 0));
        assert_eq!(counters.plus(counters).copied(), 10);
        assert_eq!(table(&[("all", counters)]).lines().count(), 2);
    }
}
