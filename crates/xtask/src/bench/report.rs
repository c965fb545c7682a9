//! Answers for how figures are shown: tables on the terminal and under docs/bench, bars, charts.

use std::fmt::Write;
use std::path::Path;

use super::cells::{Bar, GROUPS, Group as Devices, Whose};
use super::data::{Ratio, Results};
use super::native;
use super::nbd;
use super::svg::{self, Group};
use crate::Fallible;

/// The loads of a group that there are figures of.
fn cells(results: &Results, group: &Devices) -> Vec<&'static str> {
    let is_its = |device: &str| group.devices.iter().any(|one| one.name == device);
    let known = |name: &&str| {
        results.samples.iter().any(|sample| sample.cell == *name && is_its(&sample.device))
    };
    group.cells.iter().map(|cell| cell.name).filter(known).collect()
}

/// The devices of a group that there are figures of, or reasons why not.
fn devices(results: &Results, group: &Devices) -> Vec<&'static str> {
    let known = |name: &&str| {
        results.samples.iter().any(|sample| sample.device == *name)
            || results.absent.iter().any(|(device, _)| device == name)
    };
    group.devices.iter().map(|device| device.name).filter(known).collect()
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

/// The table of a group's figures.
fn figures(results: &Results, group: &Devices) -> String {
    let cells = cells(results, group);
    let mut rows = vec![heading("device", &cells)];
    for device in devices(results, group) {
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
        let devices = devices(results, group).into_iter();
        let spreads = devices.filter_map(|device| results.figure(device, cell));
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

/// The table of a group's bars: a ratio each, marked where it is above its bound.
fn bars(results: &Results, group: &Devices) -> String {
    let cells = cells(results, group);
    let mut rows = vec![heading("ratio, bound", &cells)];
    for bar in group.bars {
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

/// The tables of the groups that were measured, each below its `head`.
fn groups(results: &Results, head: impl Fn(&Devices) -> String, between: &str) -> String {
    let mut text = String::new();
    for group in GROUPS.iter().filter(|group| !cells(results, group).is_empty()) {
        text += &head(group);
        text += &figures(results, group);
        text += between;
        text += &bars(results, group);
    }
    text
}

/// Everything about the VM part, for the terminal.
pub fn vm_text(results: &Results) -> String {
    let mut text = groups(results, |group| format!("\n{}:\n\n", group.name), "\n");
    for (device, moved) in &results.moved {
        let _ = write!(text, "\n{device}: bytes {moved}");
    }
    for (device, reason) in &results.absent {
        let _ = write!(text, "\n{device}: not measured: {reason}");
    }
    text
}

/// Writes the page of the VM part.
pub fn write_vm(results: &Results, directory: &Path) -> Fallible<()> {
    let head = |group: &Devices| format!("\n## {}\n\n{}\n", group.name, group.about);
    let text = format!("{VM_HEAD}{}{}", groups(results, head, VM_BARS), appendix(results));
    save(directory, "vm.svg", &vm_chart(results))?;
    save(directory, "vm.md", &text)
}

/// The chart of the VM part: each device's cost as a multiple of the kernel's loop device.
fn vm_chart(results: &Results) -> String {
    let group = |cell: &&'static str| {
        let base = results.figure(CHART_BASE, cell)?.median;
        let bar = |name: &&str| {
            let device = GROUPS[0].devices.iter().find(|device| device.name == *name)?;
            let ratio = results.figure(name, cell)?.median / base;
            Some(((*name).to_owned(), ratio, device.whose == Whose::Ours))
        };
        let bars = CHARTED.iter().filter_map(bar).collect();
        Some(Group { name: (*cell).to_owned(), bars })
    };
    let groups: Vec<Group> = cells(results, &GROUPS[0]).iter().filter_map(group).collect();
    svg::chart("Instructions per I/O; kernel loop = 1; less is better", &groups, 1.0)
}

/// Ratios of the native part to the first of `NATIVE_BASES` that was measured.
fn native_ratios(results: &Results) -> (String, Vec<Group>) {
    let cells: Vec<&str> = native::CELLS.iter().map(|cell| cell.name).collect();
    let has = |base: &&&str| results.figure(base, cells[0]).is_some();
    let base = NATIVE_BASES.iter().find(has).copied().unwrap_or(NATIVE_BASES[0]);
    let names: Vec<&str> = native::DEVICES.iter().map(|(name, _)| *name).collect();
    (ratios(results, base, &names, &cells), bars_of(results, base, &names, &cells))
}

/// A table of ratios to one device.
fn ratios(results: &Results, base: &str, names: &[&str], cells: &[&str]) -> String {
    let mut rows = vec![heading(&format!("throughput, {base} = 1"), cells)];
    for name in names {
        let mut row = vec![(*name).to_owned()];
        row.extend(cells.iter().map(|cell| {
            results.ratio(name, base, cell).map_or("-".into(), |ratio| {
                let Ratio { median, low, high } = ratio;
                format!("{median:.2} ({low:.2} to {high:.2})")
            })
        }));
        rows.push(row);
    }
    aligned(&rows)
}

/// The same as bars, a group for each load.
fn bars_of(results: &Results, base: &str, names: &[&str], cells: &[&str]) -> Vec<Group> {
    let group = |cell: &&str| {
        let bar = |name: &&str| {
            let ratio = results.ratio(name, base, cell)?;
            Some(((*name).to_owned(), ratio.median, name.starts_with(native::OWN)))
        };
        Group { name: (*cell).to_owned(), bars: names.iter().filter_map(bar).collect() }
    };
    cells.iter().map(group).collect()
}

/// The tables of the NBD part: servers over files, servers of memory, copies.
pub fn nbd_text(results: &Results) -> String {
    let names: Vec<&str> = nbd::SERVERS.iter().map(|(name, _)| *name).collect();
    let (files, memory) = names.split_at(3);
    let copiers: Vec<&str> = nbd::COPIERS.iter().map(|(name, _)| *name).collect();
    let mut text = String::new();
    for cells in nbd_cells().chunks(7) {
        text += &ratios(results, "nbdkit-file", files, cells);
        text += "\n";
        text += &ratios(results, "nbdkit-memory", memory, cells);
        text += "\n";
    }
    text + &ratios(results, "nbdcopy", &copiers, nbd::FILES)
}

fn nbd_cells() -> Vec<&'static str> {
    nbd::CELLS.iter().map(|cell| cell.name).collect()
}

/// Writes the page of the NBD part.
pub fn write_nbd(results: &Results, directory: &Path) -> Fallible<()> {
    let names: Vec<&str> = nbd::SERVERS.iter().take(3).map(|(name, _)| *name).collect();
    let groups = bars_of(results, "nbdkit-file", &names, &nbd_cells());
    let title = "NBD servers of files in memory, nbdkit = 1; more is better";
    save(directory, "nbd.svg", &svg::chart(title, &groups, 1.0))?;
    let text = format!("{NBD_HEAD}{}{}", nbd_text(results), appendix(results));
    save(directory, "nbd.md", &text)
}

/// Everything about the native part, for the terminal.
pub fn native_text(results: &Results) -> String {
    native_ratios(results).0
}

/// Writes the page of the native part.
pub fn write_native(results: &Results, directory: &Path) -> Fallible<()> {
    let (table, groups) = native_ratios(results);
    let title = "Throughput over files in memory; more is better";
    save(directory, "native.svg", &svg::chart(title, &groups, 1.0))?;
    let text = format!("{NATIVE_HEAD}{table}{}", appendix(results));
    save(directory, "native.md", &text)
}

/// What was not measured, the conditions, the commands.
fn appendix(results: &Results) -> String {
    let mut text = String::new();
    let mut list = |title: &str, rows: &[(String, String)], mark: &str| {
        if !rows.is_empty() {
            let _ = write!(text, "\n## {title}\n\n");
        }
        for (key, value) in rows {
            let mark = if value.is_empty() { "" } else { mark };
            let _ = writeln!(text, "- {key}: {mark}{value}{mark}");
        }
    };
    list("Not measured", &results.absent, "");
    list("Bytes that went through devsplice", &results.moved, "");
    list("Conditions", &results.conditions, "");
    list("The devices", &results.commands, "`");
    text
}

fn save(directory: &Path, name: &str, text: &str) -> Fallible<()> {
    let path = directory.join(name);
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::write(&path, text))
        .map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// The device that the chart of the VM part compares with, and those that it shows.
const CHART_BASE: &str = "loop";
const CHARTED: &[&str] = &[
    "null_blk",
    "loop",
    "dm-stripe",
    "bare",
    "kublk",
    "kublk-batch",
    "rublk",
    "file",
    "stripe",
    "stack",
];
/// The devices that the native part compares with, the best known first.
const NATIVE_BASES: &[&str] = &["qsd", "loop"];

const VM_HEAD: &str = "# Guest instructions per I/O

Written by `cargo xtask bench --vm`. Thousand instructions of the whole machine (fio, kernel and
server) for each I/O; less is better.

The machine is QEMU's software emulation, one CPU, one instruction one nanosecond of guest time
(`-icount shift=0,sleep=off`). The CPU is never idle while fio runs, so fio's own run time divided
by its I/Os is instructions per I/O. Every device of ours has one queue and depth 64, each has a
backing of its own; all are made in the same boot; samples go round the devices of a group; the
median is shown. Such counts know no caches, no second CPU and no contention: they rank code paths,
not disks. All loads with `--ioengine=io_uring --direct=1 --norandommap`.

![chart](vm.svg)
";

const VM_BARS: &str = "
Ratio of two lines of this table; **bold** where it is above its bound.

";

const NATIVE_HEAD: &str = "# FUSE and loop

Written by `cargo xtask bench --native`. A loop device over a file that a server shows through
FUSE, over a file in memory (tmpfs, 256 MiB); `loop` is the kernel's loop device over such a file
itself. fio with `--ioengine=io_uring --direct=1 --bs=4k --iodepth=32`, 1 s a sample, devices in
turn. The machine is shared and its clock is no basis for figures: only ratios are given, each of
two samples of one round; the middle one counts, and at least half of all lie in the range behind
it. Where that is wide, something else was running and the ratio ranks little.

![chart](native.svg)

";

const NBD_HEAD: &str = "# NBD servers, and copies

Written by `cargo xtask bench --nbd`. Servers over a socket in the file system, of files in memory
(tmpfs, 256 MiB) and of memory of their own, under fio with `--ioengine=nbd` (libnbd), 0.5 s a
sample, servers in turn; `-4` has four clients with a connection each. fio's buffers lie 16 bytes
into a page, where `malloc` puts them; with `-page` on pages, as the kernel's client and QEMU have
them (`--iomem_align=4096`). `copy` is of a file of 4 GiB in memory to another, dense or with 64
KiB of data in each MiB. Ratios are each of two samples of one round; the middle one counts, and
at least half of all lie in the range behind it. At 4k-qd32 with one connection fio itself has a
CPU's time used up, under each of the servers: there the ratio says little about them.

![chart](nbd.svg)

";
