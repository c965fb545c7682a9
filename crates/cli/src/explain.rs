//! Answers for `devsplice explain`: the way of a request down a stack, and every copy on it.

use devsplice_backends::{Access, Body, Opened};
use devsplice_core::size::show_size;
use devsplice_core::{Error, Io, Op, Place, Result, Stack, Stop};
use devsplice_exports::fuse;
use devsplice_exports::ublk::{self, DataPath};
use devsplice_spec::{Kind, Plan};
use serde_json::{Value, json};

use crate::args::{Explain, Export, OpChoice};
use crate::assemble::{Assembled, CATALOG, assemble};
use crate::{front, say, state};

/// Most pieces that are listed; the rest is counted.
const SHOWN: usize = 32;
/// Most pieces that are counted.
const COUNTED: usize = 1 << 20;

/// How data gets between the client and the ring.
struct Way {
    export: &'static str,
    path: &'static str,
    why: String,
    copies: u32,
}

/// Explains.
///
/// # Errors
/// If the stack cannot be built.
pub fn run(explain: &Explain) -> Result<()> {
    let running = state::find(&explain.stack).ok().filter(|found| found.alive);
    let text = running.as_ref().map_or(&explain.stack, |found| &found.disk.stack);
    let plan = Plan::load(text, &CATALOG)?;
    let assembled = assemble(&plan, Access::Look)?;
    let way = match &running {
        Some(found) => way_of(&found.disk),
        None => choose(explain)?,
    };
    let io = request(explain, &assembled.stack)?;
    let value = describe(&plan, &assembled, &way, io);
    if explain.json {
        say!("{}", serde_json::to_string_pretty(&value).unwrap_or_default());
    } else {
        show(&plan, &value);
    }
    Ok(())
}

fn way_of(disk: &state::Disk) -> Way {
    let path = DataPath::ALL.into_iter().find(|path| path.name() == disk.data_path);
    match path {
        Some(path) => {
            Way { export: "ublk", path: path.name(), why: disk.why.clone(), copies: path.copies() }
        }
        None => {
            let mut all = fuse::DataPath::ALL.into_iter();
            let path = all.find(|path| path.name() == disk.data_path);
            over_fuse(path.unwrap_or(fuse::DataPath::Copy), disk.why.clone())
        }
    }
}

fn over_fuse(path: fuse::DataPath, why: String) -> Way {
    Way { export: "fuse", path: path.name(), why, copies: path.copies() }
}

/// What `add` would choose. Without the rights to ask the kernel, what the newest would do.
fn choose(explain: &Explain) -> Result<Way> {
    let best = explain.data_path.forced();
    let (export, why) = match front::choose(explain.export, explain.data_path) {
        Ok(choice) => choice,
        Err(error) if error.kind() == devsplice_core::ErrorKind::Invalid => return Err(error),
        Err(error) => {
            let export = if explain.export == Export::Fuse { Export::Fuse } else { Export::Ublk };
            (export, format!("assumed; it cannot be made here: {}", error.cause()))
        }
    };
    if export == Export::Fuse {
        return Ok(over_fuse(explain.data_path.fuse().unwrap_or(fuse::BEST), why));
    }
    let offered = ublk::Control::open().map(|control| DataPath::offered(control.features()));
    let path = match (best, offered) {
        (Some(path), _) => path,
        (None, Ok(offered)) => offered.first().copied().unwrap_or(DataPath::Copy),
        (None, Err(_)) => DataPath::AutoRegister,
    };
    Ok(Way { export: "ublk", path: path.name(), why, copies: path.copies() })
}

fn request(explain: &Explain, stack: &Stack) -> Result<Io> {
    let size = stack.limits().size;
    let op = match explain.op {
        OpChoice::Read => Op::Read,
        OpChoice::Write => Op::Write,
        OpChoice::Discard => Op::Discard,
        OpChoice::WriteZeroes => Op::WriteZeroes { unmap: true },
        OpChoice::Flush => return Ok(Io::new(Op::Flush, 0, 0)),
    };
    let left = size.saturating_sub(explain.at);
    let io = Io::new(op, explain.at, explain.len.unwrap_or(left.min(256 << 10)));
    stack.admit(&io).map_err(|errno| {
        let thing = format!("{} of {} bytes at {}", op.name(), io.extent.len, io.extent.at);
        let block = stack.limits().block;
        Error::invalid(thing, format!("would fail with {errno}"))
            .next(format!("the device has {size} bytes in {block}-byte blocks"))
    })?;
    Ok(io)
}

fn describe(plan: &Plan, assembled: &Assembled, way: &Way, io: Io) -> Value {
    let limits = assembled.stack.limits();
    let mut pieces = Vec::new();
    let mut count = 0;
    let mut failure = None;
    // A layer that would first read or write metadata of its own, before it can say the rest.
    let mut waits_for = None;
    let mut route = assembled.stack.route(io);
    while let Some(piece) = route.next(&assembled.stack) {
        match piece {
            Ok(piece) => {
                count += 1;
                if pieces.len() < SHOWN {
                    pieces.push(describe_piece(&piece, &assembled.bottoms, way, io.op));
                }
            }
            Err(Stop::Error(errno)) => {
                failure = Some(errno.name());
                break;
            }
            Err(Stop::Miss(node, _)) => {
                waits_for = Some(assembled.stack.name_of(node));
                break;
            }
        }
        if count == COUNTED {
            break;
        }
    }
    json!({
        "stack": plan.to_expression(),
        "size": limits.size,
        "block": limits.block,
        "read_only": limits.read_only,
        "volatile_cache": limits.volatile_cache,
        "discard": limits.discard,
        "export": way.export,
        "data_path": way.path,
        "why": way.why,
        "request": { "op": io.op.name(), "at": io.extent.at, "len": io.extent.len },
        "piece_count": count,
        "pieces": pieces,
        "fails_with": failure,
        "waits_for": waits_for,
        "copies_in_process": if io.op.has_pages() { way.copies } else { 0 },
        "notes": assembled.warnings(),
    })
}

fn describe_piece(
    piece: &devsplice_core::Piece,
    bottoms: &[(String, Opened)],
    way: &Way,
    op: Op,
) -> Value {
    let (to, how, cached) = match piece.place {
        Place::Zero if op == Op::Read => ("nothing", "zeros from the kernel", false),
        Place::Zero => ("nothing", "done without effect", false),
        Place::Backend(id) => match bottoms.get(usize::from(id.0)) {
            Some((label, _)) if !op.has_pages() => (label.as_str(), "no data moves", false),
            Some((label, opened)) => {
                let (how, cached) = match (&opened.body, way.copies) {
                    (Body::File { direct: true, .. }, 0) => {
                        ("the client's own pages, direct", false)
                    }
                    (Body::File { direct: true, .. }, _) => ("our memory, direct", false),
                    (Body::File { .. }, _) => ("through the kernel's page cache", true),
                    (Body::Server(_), 0) => ("a socket, the client's own pages", false),
                    (Body::Server(_), _) => ("a socket, our memory", false),
                };
                (label.as_str(), how, cached)
            }
            None => ("?", "?", false),
        },
    };
    json!({
        "part": piece.part,
        "len": piece.len,
        "to": to,
        "at": piece.at,
        "wait_ns": piece.wait.ns(),
        "how": how,
        "page_cache_copies": u32::from(cached),
    })
}

fn show(plan: &Plan, value: &Value) {
    let number = |key: &str| value[key].as_u64().unwrap_or(0);
    say!("{}", value["stack"].as_str().unwrap_or_default());
    let cache =
        if value["volatile_cache"] == true { "volatile cache" } else { "no volatile cache" };
    let access = if value["read_only"] == true { "read-only" } else { "read-write" };
    say!("{}, {}-byte blocks, {access}, {cache}", show_size(number("size")), number("block"));
    tree(plan, plan.root, 1);
    let request = &value["request"];
    say!(
        "{} of {} at {}, over {} ({}), data path {}:",
        request["op"].as_str().unwrap_or_default(),
        show_size(request["len"].as_u64().unwrap_or(0)),
        show_size(request["at"].as_u64().unwrap_or(0)),
        value["export"].as_str().unwrap_or_default(),
        value["why"].as_str().unwrap_or_default(),
        value["data_path"].as_str().unwrap_or_default()
    );
    let pieces = value["pieces"].as_array().map_or(&[][..], Vec::as_slice);
    for piece in pieces {
        let size = |key: &str| show_size(piece[key].as_u64().unwrap_or(0));
        let wait = match piece["wait_ns"].as_u64() {
            None | Some(0) => String::new(),
            Some(ns) => format!(", after {} us", ns / 1000),
        };
        say!(
            "  {:>8} from {:>8}  ->  {} at {}: {}{wait}",
            size("len"),
            size("part"),
            piece["to"].as_str().unwrap_or_default(),
            size("at"),
            piece["how"].as_str().unwrap_or_default()
        );
    }
    let hidden = number("piece_count").saturating_sub(pieces.len() as u64);
    if hidden > 0 {
        say!("  ... and {hidden} more pieces");
    }
    if let Some(layer) = value["waits_for"].as_str() {
        say!("the rest waits until {layer} has read or written metadata of its own");
    }
    if let Some(errno) = value["fails_with"].as_str() {
        say!("  then it fails with {errno}");
    }
    let cached = pieces.iter().filter_map(|piece| piece["page_cache_copies"].as_u64()).max();
    say!(
        "copies of each byte: {} in this process, {} into or out of the page cache",
        number("copies_in_process"),
        cached.unwrap_or(0)
    );
    for note in value["notes"].as_array().into_iter().flatten() {
        say!("note: {}", note.as_str().unwrap_or_default());
    }
}

fn tree(plan: &Plan, index: usize, depth: usize) {
    let place = &plan.places[index];
    let given: Vec<_> = place.given.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let about = match place.kind {
        Kind::Layer(driver) => driver.about,
        Kind::Source(source) => source.about,
    };
    say!("{}{} {}  ({about})", "  ".repeat(depth), place.label, given.join(" "));
    for below in &place.below {
        tree(plan, *below, depth + 1);
    }
}
