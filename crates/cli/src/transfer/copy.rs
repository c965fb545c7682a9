//! Answers for `devsplice copy`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use devsplice_backends::Access;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_engine::Counts;
use devsplice_exports::extents::Extents;
use devsplice_exports::local::{self, Course, Flushes, How, Plan, Size, Work};
use devsplice_spec::Plan as StackPlan;
use serde_json::json;

use super::progress::Progress;
use super::resume::{self, Kept, Resume};
use super::{Open, attend, compare, explain, interrupted, missing_file, plan, sizes};
use crate::args::Copy;
use crate::say;

/// How often the target is flushed so that a copy can go on from there.
const FLUSH_EVERY: Duration = Duration::from_secs(2);
/// What is zeroed at a time: long enough to be cheap, short enough to be seen and stopped.
const ZEROES: u64 = 1 << 30;
/// Memory is copied and holes are made by pages.
const PAGE: u64 = 4096;

/// Copies.
///
/// # Errors
/// If one of them cannot be opened, they do not fit, or a request failed.
pub fn run(copy: &Copy) -> Result<ExitCode> {
    let begin = Instant::now();
    let [source_plan, target_plan] = [plan(&copy.from)?, plan(&copy.to)?];
    let from = Open::of(&copy.from, &source_plan, Access::Read)?;
    let size = from.limits().size;
    let stamp = from.stamp(&source_plan)?;
    let this = Resume::new([&copy.from, &copy.to], size, stamp);
    let found = match &copy.resume {
        Some(path) => resume::find(path, &this)?,
        None => None,
    };
    let is_new = make_target(&target_plan, size, (copy, found.as_ref()))?;
    let to = Open::of(&copy.to, &target_plan, Access::Serve)?;
    to.refuse_zones("copy")?;
    from.apart_from(&to)?;
    let align = check(&from, &to)?;
    from.warn();
    to.warn();
    let this = Resume { target: to.identity(&target_plan)?, fresh: is_new, ..this };
    let kept = copy.resume.as_ref().map(|path| Kept::open(path, this, found)).transpose()?;
    let start = kept.as_ref().map_or(0, |kept| kept.says().done);
    let is_fresh = is_new || kept.as_ref().is_some_and(|kept| kept.says().fresh);
    let how = How {
        sparse: if copy.allocated { 0 } else { copy.sparse },
        target_is_zero: !copy.allocated && (copy.destination_is_zero || is_fresh),
        can_zero: !copy.allocated && to.limits().write_zeroes,
        flush_every: kept.is_some().then_some(FLUSH_EVERY),
    };
    if !copy.sparse.is_multiple_of(u64::from(to.limits().block)) {
        let reason = format!("is no multiple of the block of {}, {}", to.name, to.limits().block);
        return Err(Error::invalid("--sparse", reason));
    }
    let (threads, each) = sizes(&copy.load, align, [&from, &to])?;
    let threads = threads.min(from.most_threads()).min(to.most_threads());
    let data = u64::from(each.bytes);
    // What cannot be zeroed at once is written from a slot's memory.
    let zeroes = if how.can_zero || how.target_is_zero { ZEROES } else { data };
    let way = Plan { from: start, to: size, align, data, zeroes };
    let counts = transfer(copy, ([from, to], way), (threads, each, how), kept)?;
    let took = begin.elapsed();
    if copy.verify {
        verify(copy, (threads, each), size)?;
    }
    report(copy, size - start, took, &counts);
    Ok(ExitCode::SUCCESS)
}

/// Reads both anew, from where they are.
fn verify(copy: &Copy, load: (u16, Size), size: u64) -> Result<()> {
    let [from, to] = [&copy.from, &copy.to].map(|name| Open::new(name, Access::Read));
    match compare::common([from?, to?], load, (0, size), copy.progress) {
        Ok(None) => Ok(()),
        Ok(Some(at)) => {
            let reason = format!("differs from {} at byte {at}, after the copy", copy.from);
            Err(Error::new(ErrorKind::Os, &copy.to, reason))
        }
        Err(_) if interrupted()?.load(SeqCst) => {
            let reason = "interrupted: it is copied, but not verified";
            let step = format!("devsplice compare {} {}", copy.from, copy.to);
            Err(Error::new(ErrorKind::Os, &copy.to, reason).next(step))
        }
        Err(error) => Err(error),
    }
}

/// Makes a target that is a plain file and is not there; whether it did.
fn make_target(
    plan: &StackPlan,
    size: u64,
    (copy, found): (&Copy, Option<&Resume>),
) -> Result<bool> {
    let Some(path) = missing_file(plan) else { return Ok(false) };
    if let Some(resume) = &copy.resume {
        resume::refuse_gone(resume, found)?;
    }
    std::fs::File::create_new(path)
        .and_then(|file| file.set_len(size))
        .map_err(|error| Error::os(path, &error))?;
    Ok(true)
}

/// Whether one fits into the other, and what chunks have to be multiples of.
fn check(from: &Open, to: &Open) -> Result<u64> {
    let (size, room) = (from.limits().size, to.limits().size);
    if to.limits().read_only {
        return Err(Error::new(ErrorKind::Permission, &to.name, "is read-only"));
    }
    if size > room {
        let reason = format!("has {room} bytes, {} has {size}", from.name);
        return Err(
            Error::invalid(&to.name, reason).next(format!("truncate -s {size}, for a file"))
        );
    }
    let block = u64::from(to.limits().block.max(from.limits().block));
    if !size.is_multiple_of(block) {
        let reason = format!("has blocks of {block} bytes, {} ends amid one", from.name);
        return Err(Error::invalid(&to.name, reason));
    }
    Ok(block.max(PAGE))
}

fn transfer(
    copy: &Copy,
    (opened, way): ([Open; 2], Plan),
    (threads, each, how): (u16, Size, How),
    mut kept: Option<Kept>,
) -> Result<Counts> {
    let sides = opened.map(Open::into_side);
    let extents = Extents::at_rest(&sides[0].served.stack, &sides[0].bottoms)?;
    let slots = u32::from(threads) * u32::from(each.depth);
    let course = Arc::new(Course::new(way, vec![extents], slots));
    let flushes = Arc::new(Flushes::default());
    let work = |_| {
        let (course, flushes) = (Arc::clone(&course), Arc::clone(&flushes));
        Box::new(local::Copy::new(course, how, each.depth, flushes)) as Box<dyn Work>
    };
    let works: Vec<_> = (0..threads).map(work).collect();
    let mut progress = Progress::new(copy.progress, way.to)?;
    let mut trouble = None;
    let mut was_stopped = false;
    let counts = attend(
        move || local::run(&sides, (each, &[true, false]), works),
        |stop| {
            progress.at(course.done());
            was_stopped |= stop;
            if let Some(Err(error)) = kept.as_mut().map(|kept| kept.set(course.durable())) {
                trouble.get_or_insert(error);
            }
            if stop || trouble.is_some() {
                course.stop();
            }
        },
    )?;
    progress.at(course.done());
    progress.end();
    if let Some(kept) = &mut kept {
        kept.set(course.durable())?;
    }
    if let Some(failure) = course.failure() {
        return Err(explain(&failure, [&copy.from, &copy.to]));
    }
    if let Some(error) = trouble {
        return Err(error);
    }
    // All of it may have been done by then.
    if was_stopped && course.durable() < way.to {
        let step = if kept.is_some() { "the same command goes on" } else { "--resume FILE" };
        return Err(Error::new(ErrorKind::Os, &copy.to, "interrupted: it is not whole").next(step));
    }
    kept.map_or(Ok(()), Kept::remove)?;
    Ok(counts)
}

fn report(copy: &Copy, bytes: u64, took: Duration, counts: &Counts) {
    if copy.json {
        let value = json!({
            "from": copy.from, "to": copy.to, "bytes": bytes, "seconds": took.as_secs_f64(),
            "verified": copy.verify, "read_requests": counts.reads, "write_requests": counts.writes,
        });
        say!("{value}");
    }
}
