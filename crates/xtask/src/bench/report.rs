//! Answers for how figures are shown: tables on the terminal and under docs/bench, bars, charts.

use std::fmt::Write;
use std::path::Path;

use super::cells::{BARS, Bar, CELLS, DEVICES};
use super::data::Results;
use crate::Fallible;

/// The loads that there are figures of.
fn cells(results: &Results) -> Vec<&'static str> {
    let known = |name: &&str| results.samples.iter().any(|sample| sample.cell == *name);
    CELLS.iter().map(|cell| cell.name).filter(known).collect()
}

/// The devices that there are figures of, or reasons why not.
fn devices(results: &Results) -> Vec<&'static str> {
    let known = |name: &&str| {
        results.samples.iter().any(|sample| sample.device == *name)
            || results.absent.iter().any(|(device, _)| device == name)
    };
    DEVICES.iter().map(|device| device.name).filter(known).collect()
}

/// A table of texts, its columns aligned; the first to the left.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let lengths = rows.iter().filter_map(|row| row.get(column)).map(String::len);
        lengths.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        text.push('|');
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            let _ = match column {
                0 => write!(text, " {cell:width$} |"),
                _ => write!(text, " {cell:>width$} |"),
            };
        }
        text.push('\n');
        if index == 0 {
            text.push('|');
            for (column, width) in widths.iter().enumerate() {
                let dashes = "-".repeat(width + 1);
                text += &if column == 0 { format!("{dashes}-|") } else { format!("{dashes}:|") };
            }
            text.push('\n');
        }
    }
    text
}

/// Thousand instructions with three digits that mean something.
fn short(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// The table of figures.
fn figures(results: &Results) -> String {
    let cells = cells(results);
    let mut rows = vec![heading("device", &cells)];
    for device in devices(results) {
        let mut row = vec![device.to_owned()];
        match results.absent.iter().find(|(name, _)| name == device) {
            Some(_) => row.extend(cells.iter().map(|_| "-".to_owned())),
            None => row.extend(cells.iter().map(|cell| {
                results.figure(device, cell).map_or("-".into(), |figure| short(figure.median))
            })),
        }
        rows.push(row);
    }
    let mut row = vec!["largest spread".to_owned()];
    row.extend(cells.iter().map(|cell| {
        let spreads = devices(results).into_iter().filter_map(|d| results.figure(d, cell));
        format!("{:.1} %", spreads.map(|figure| figure.spread).fold(0.0, f64::max))
    }));
    rows.push(row);
    aligned(&rows)
}

fn heading(first: &str, cells: &[&str]) -> Vec<String> {
    std::iter::once(first).chain(cells.iter().copied()).map(str::to_owned).collect()
}

/// What a bar says about a cell: the ratio, and whether it is kept.
fn judge(results: &Results, bar: &Bar, cell: &str) -> Option<(f64, bool)> {
    if !cell.starts_with(bar.cells) {
        return None;
    }
    let ratio = results.figure(bar.what, cell)?.median / results.figure(bar.against, cell)?.median;
    Some((ratio, ratio <= bar.factor))
}

/// The table of bars: a ratio each, marked where it is above its bound.
fn bars(results: &Results) -> String {
    let cells = cells(results);
    let mut rows = vec![heading("ratio, bound", &cells)];
    for bar in BARS {
        let mut row = vec![format!("{} / {} <= {}", bar.what, bar.against, bar.factor)];
        row.extend(cells.iter().map(|cell| match judge(results, bar, cell) {
            Some((ratio, true)) => format!("{ratio:.3}"),
            Some((ratio, false)) => format!("**{ratio:.3}**"),
            None => String::new(),
        }));
        if row[1..].iter().any(|cell| !cell.is_empty()) {
            rows.push(row);
        }
    }
    aligned(&rows)
}

/// Everything about the VM part, for the terminal.
pub fn vm_text(results: &Results) -> String {
    let mut text = figures(results);
    text += "\n";
    text += &bars(results);
    for (device, reason) in &results.absent {
        let _ = write!(text, "\n{device}: not measured: {reason}");
    }
    text
}

/// Writes the page of the VM part.
pub fn write_vm(results: &Results, directory: &Path) -> Fallible<()> {
    let mut text = String::from(VM_HEAD);
    text += &figures(results);
    text += VM_BARS;
    text += &bars(results);
    if !results.absent.is_empty() {
        text += "\nNot measured:\n\n";
        for (device, reason) in &results.absent {
            let _ = writeln!(text, "- {device}: {reason}");
        }
    }
    text += "\n## Conditions\n\n";
    for (key, value) in &results.conditions {
        let _ = writeln!(text, "- {key}: {value}");
    }
    text += "\n## The devices\n\n";
    for (device, command) in &results.commands {
        let _ = writeln!(text, "- {device}: `{command}`");
    }
    save(directory, "vm.md", &text)
}

fn save(directory: &Path, name: &str, text: &str) -> Fallible<()> {
    let path = directory.join(name);
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::write(&path, text))
        .map_err(|e| format!("cannot write {}: {e}", path.display()))
}

const VM_HEAD: &str = "# Guest instructions per I/O

Written by `cargo xtask bench --vm`. Thousand instructions of the whole machine (fio, kernel and
server) for each I/O; less is better.

";

const VM_BARS: &str = "
## Bounds

Ratio of two lines of the table above; **bold** where it is above its bound.

";
