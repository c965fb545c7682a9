//! Answers for `devsplice list`: every disk on one line.

use devsplice_core::Result;
use devsplice_core::size::show_size;
use serde_json::json;

use crate::args::List;
use crate::state::Found;
use crate::{guard, say, state};

/// Prints the table.
///
/// # Errors
/// If the state cannot be read.
pub fn run(list: &List) -> Result<()> {
    let all = state::all()?;
    if list.json {
        let disks: Vec<_> = all
            .iter()
            .map(|found| {
                let mut disk = found.disk.shown();
                disk["state"] = json!(word(found));
                disk
            })
            .collect();
        say!("{}", serde_json::to_string_pretty(&disks).unwrap_or_default());
        return Ok(());
    }
    let head = ["NAME", "DEVICE", "SIZE", "STATE", "PID", "EXPORT", "DATA-PATH", "STACK"];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(all.iter().map(|found| {
        let disk = &found.disk;
        [
            disk.name.clone(),
            disk.device.clone(),
            show_size(disk.size),
            word(found).to_owned(),
            disk.pid.to_string(),
            disk.export.clone(),
            disk.data_path.clone(),
            disk.stack.clone(),
        ]
    }));
    for line in table(&rows) {
        say!("{line}");
    }
    Ok(())
}

/// In what state a disk is, as far as that can be known without asking its server.
pub fn word(found: &Found) -> &'static str {
    match found {
        Found { alive: true, disk } if disk.quiesced => "quiesced",
        Found { alive: true, disk } if disk.ending => "ending",
        Found { alive: true, .. } => "live",
        Found { disk, .. } if guard::kept_by(disk).is_some() => "waiting",
        Found { .. } => "dead",
    }
}

/// Columns as wide as they need to be.
pub fn table<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<_> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<_> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}
