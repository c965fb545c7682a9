//! Answers for `devsplice map`.

use devsplice_backends::Access;
use devsplice_core::Result;
use devsplice_core::size::show_size;
use devsplice_exports::extents::{Content, Extents};
use serde_json::json;

use super::Open;
use crate::args::Map;
use crate::say;

/// A range with one kind of content.
struct Range {
    at: u64,
    len: u64,
    content: Content,
}

/// Prints the ranges, or their sums.
///
/// # Errors
/// If the stack cannot be opened.
pub fn run(map: &Map) -> Result<()> {
    let open = Open::new(&map.stack, Access::Look)?;
    let size = open.limits().size;
    let side = open.into_side();
    let extents = Extents::at_rest(&side.served.stack, &side.bottoms)?;
    if map.totals {
        totals(map, &extents, size);
        return Ok(());
    }
    if !map.json {
        say!("{:>16} {:>16}  content", "start", "length");
    }
    let mut rows = Vec::new();
    each(&extents, size, |range| {
        let Range { at, len, content } = range;
        if map.json {
            rows.push(json!({ "start": at, "length": len, "content": content.name(),
                "data": content == Content::Data, "zero": content.reads_zero() }));
        } else {
            say!("{at:>16} {len:>16}  {}", content.name());
        }
    });
    if map.json {
        say!("{}", serde_json::to_string_pretty(&rows).unwrap_or_default());
    }
    Ok(())
}

/// Neighbours that are alike are one.
fn each(extents: &Extents, size: u64, mut take: impl FnMut(Range)) {
    let mut last: Option<Range> = None;
    let mut at = 0;
    while at < size {
        let (len, content) = extents.at(at, size - at);
        match &mut last {
            Some(range) if range.content == content => range.len += len,
            _ => {
                if let Some(range) = last.replace(Range { at, len, content }) {
                    take(range);
                }
            }
        }
        at += len;
    }
    if let Some(range) = last {
        take(range);
    }
}

fn totals(map: &Map, extents: &Extents, size: u64) {
    let kinds = [Content::Data, Content::Hole, Content::Zero];
    let mut sums = [0; 3];
    each(extents, size, |range| {
        let place = kinds.iter().position(|kind| *kind == range.content).unwrap_or(0);
        sums[place] += range.len;
    });
    if map.json {
        say!("{}", json!({ "size": size, "data": sums[0], "hole": sums[1], "zero": sums[2] }));
        return;
    }
    for (kind, sum) in kinds.iter().zip(sums) {
        let part = u128::from(sum) * 1000 / u128::from(size.max(1));
        let (whole, tenth) = (part / 10, part % 10);
        say!("{:>16} {:>8} {whole:>4}.{tenth}%  {}", sum, show_size(sum), kind.name());
    }
}
