//! Answers for `devsplice compare`.

use std::process::ExitCode;
use std::sync::Arc;

use devsplice_backends::Access;
use devsplice_core::{Error, Result};
use devsplice_exports::extents::Extents;
use devsplice_exports::local::{self, Course, Differ, Plan, Sides, Size, Work};
use serde_json::json;

use super::progress::Progress;
use super::{Open, attend, explain, sizes};
use crate::args;
use crate::args::Compare;
use crate::say;

/// They differ.
const DIFFER: u8 = 1;
/// There is no saying.
const FAILED: u8 = 2;
/// What is skipped at a time where both read as zeros.
const ZEROES: u64 = 1 << 30;
const PAGE: u64 = 4096;

/// What came of it.
enum Outcome {
    Same,
    /// The size of one is not that of the other.
    Sizes,
    /// From this byte on.
    At(u64),
}

/// Compares, says what came of it, and answers with an exit code.
pub fn run(compare: &Compare) -> ExitCode {
    match outcome(compare) {
        Ok((outcome, sizes)) => show(compare, &outcome, sizes),
        Err(error) => {
            eprintln!("devsplice: {error}");
            ExitCode::from(FAILED)
        }
    }
}

fn show(compare: &Compare, outcome: &Outcome, sizes: [u64; 2]) -> ExitCode {
    let text = match outcome {
        Outcome::Same if sizes[0] == sizes[1] => "the same".to_owned(),
        Outcome::Same => {
            format!("the same but for zeros at the end: {} and {} bytes", sizes[0], sizes[1])
        }
        Outcome::Sizes => format!("they differ in size: {} and {} bytes", sizes[0], sizes[1]),
        Outcome::At(at) => format!("they differ at byte {at}"),
    };
    let is_same = matches!(outcome, Outcome::Same);
    if compare.json {
        let at = if let Outcome::At(at) = outcome { Some(*at) } else { None };
        say!("{}", json!({ "same": is_same, "sizes": sizes, "differ_at": at }));
    } else {
        say!("{text}");
    }
    if is_same { ExitCode::SUCCESS } else { ExitCode::from(DIFFER) }
}

fn outcome(compare: &Compare) -> Result<(Outcome, [u64; 2])> {
    let open = || {
        let [one, other] = [&compare.one, &compare.other].map(|name| Open::new(name, Access::Read));
        Ok::<_, Error>([one?, other?])
    };
    let opened = open()?;
    opened.iter().for_each(Open::warn);
    let lengths = [opened[0].limits().size, opened[1].limits().size];
    let both = lengths[0].min(lengths[1]);
    let block = opened.iter().map(|one| u64::from(one.limits().block)).max().unwrap_or(PAGE);
    if compare.strict && lengths[0] != lengths[1] {
        return Ok((Outcome::Sizes, lengths));
    }
    if !both.is_multiple_of(block) {
        let reason = format!("ends amid a block of {block} bytes of the other");
        let shorter = if lengths[0] < lengths[1] { &compare.one } else { &compare.other };
        return Err(Error::invalid(shorter, reason));
    }
    let (threads, each) = sizes(&compare.load, block.max(PAGE), [&opened[0], &opened[1]])?;
    let most = opened.iter().map(Open::most_threads).min().unwrap_or(threads);
    let load = (threads.min(most), each);
    if let Some(at) = common(opened, load, (0, both), compare.progress)? {
        return Ok((Outcome::At(at), lengths));
    }
    if lengths[0] == lengths[1] {
        return Ok((Outcome::Same, lengths));
    }
    let longer = usize::from(lengths[1] > lengths[0]);
    let name = if longer == 0 { &compare.one } else { &compare.other };
    let at = rest(Open::new(name, Access::Read)?, load, (both, lengths[longer]), compare.progress)?;
    Ok((at.map_or(Outcome::Same, Outcome::At), lengths))
}

/// The first byte of a range where two stacks differ.
///
/// # Errors
/// If one of them cannot be read.
pub fn common(
    opened: [Open; 2],
    load: (u16, Size),
    range: (u64, u64),
    progress: args::Progress,
) -> Result<Option<u64>> {
    look(opened.into(), load, range, (Sides::Both, progress))
}

/// The first byte of a range where a stack is not zero.
fn rest(
    opened: Open,
    load: (u16, Size),
    range: (u64, u64),
    progress: args::Progress,
) -> Result<Option<u64>> {
    look(vec![opened], load, range, (Sides::Zeroes(0), progress))
}

fn look(
    opened: Vec<Open>,
    (threads, each): (u16, Size),
    (from, to): (u64, u64),
    (which, progress): (Sides, args::Progress),
) -> Result<Option<u64>> {
    let names: Vec<_> = opened.iter().map(|one| one.name.clone()).collect();
    let block = opened.iter().map(|one| u64::from(one.limits().block)).max().unwrap_or(PAGE);
    let sides: Vec<_> = opened.into_iter().map(Open::into_side).collect();
    let extents = sides.iter().map(|side| Extents::at_rest(&side.served.stack, &side.bottoms));
    let extents = extents.collect::<Result<Vec<_>>>()?;
    let data = u64::from(each.bytes);
    let way = Plan { from, to, align: block, data, zeroes: ZEROES };
    let slots = u32::from(threads) * u32::from(each.depth);
    let (course, differ) =
        (Arc::new(Course::new(way, extents, slots)), Arc::new(Differ::default()));
    let work = |_| {
        let (course, differ) = (Arc::clone(&course), Arc::clone(&differ));
        Box::new(local::Compare::new(course, differ, which, each.depth)) as Box<dyn Work>
    };
    let works: Vec<_> = (0..threads).map(work).collect();
    let mut progress = Progress::new(progress, to)?;
    let mut was_stopped = false;
    let memory = vec![true; sides.len()];
    attend(
        move || local::run(&sides, (each, &memory), works),
        |stop| {
            progress.at(course.done());
            if stop {
                was_stopped = true;
                course.stop();
            }
        },
    )?;
    progress.at(course.done());
    progress.end();
    if let Some(failure) = course.failure() {
        let name = |place: usize| names.get(place).map_or("?", String::as_str);
        return Err(explain(&failure, [name(0), name(1)]));
    }
    let found = differ.at();
    if was_stopped && found.is_none() && course.done() < to {
        return Err(Error::new(devsplice_core::ErrorKind::Os, "compare", "interrupted"));
    }
    Ok(found)
}
