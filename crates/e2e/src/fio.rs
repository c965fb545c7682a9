//! Answers for fio: verifying disks with it, loading them, reading its report.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use crate::MIB;
use crate::command::{Call, Running, call};
use crate::host::{need, need_tool};
use crate::room::Room;
use crate::suite::Outcome;

/// What the clients asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes.
    pub read: u64,
    /// Bytes.
    pub written: u64,
}

/// Goes on if fio is here, with the engines that the tests use. It is asked once: a start of fio
/// takes a second in emulation.
///
/// # Errors
/// The skip.
pub fn engines() -> Outcome {
    static ENGINES: OnceLock<Outcome> = OnceLock::new();
    let ask = || {
        need_tool("fio")?;
        let known = call("fio", ["--enghelp"]).ok();
        for engine in ["io_uring", "libaio"] {
            let has = known.split_whitespace().any(|one| one == engine);
            need(has, &format!("fio has no {engine}"))?;
        }
        Ok(())
    };
    ENGINES.get_or_init(ask).clone()
}

fn fio(room: &Room, arguments: &[String]) -> Call {
    call("fio", arguments).dir(&room.dir).limit(60)
}

/// Two jobs write and read at random in two halves of the first `size` bytes of a disk, one through
/// io_uring, one through libaio, 16 deep, then check all that they wrote.
///
/// # Panics
/// If a byte is wrong, or fio has any other complaint.
pub fn verify(room: &Room, node: &Path, size: u64, block_range: &str) -> Moved {
    let half = (size / 2) & !(MIB - 1);
    let mut arguments: Vec<String> = [
        "--output-format=json",
        "--rw=randrw",
        "--rwmixread=30",
        "--iodepth=16",
        "--direct=1",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--randrepeat=0",
        "--group_reporting=0",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend([
        format!("--filename={}", node.display()),
        format!("--bsrange={block_range}"),
        format!("--size={half}"),
    ]);
    for (engine, at) in [("io_uring", 0), ("libaio", half)] {
        arguments.extend([
            format!("--name={engine}"),
            format!("--ioengine={engine}"),
            format!("--offset={at}"),
        ]);
    }
    report(&fio(room, &arguments).ok(), 2)
}

/// Adds up fio's report.
fn report(text: &str, job_count: usize) -> Moved {
    let json = text.find('{').map_or("", |start| &text[start..]);
    let value: Value =
        serde_json::from_str(json).unwrap_or_else(|error| panic!("fio: {error} in {text}"));
    let jobs = value["jobs"].as_array().map_or(&[][..], Vec::as_slice);
    assert_eq!(jobs.len(), job_count, "{text}");
    let mut moved = Moved::default();
    for job in jobs {
        assert_eq!(job["error"], 0, "{text}");
        assert_eq!(job["total_err"].as_u64().unwrap_or(0), 0, "{text}");
        moved.read += job["read"]["io_bytes"].as_u64().unwrap_or(0);
        moved.written += job["write"]["io_bytes"].as_u64().unwrap_or(0);
    }
    assert!(moved.read > 0 && moved.written > 0, "{text}");
    moved
}

/// Writes and reads in pieces of 1 MiB, 128 at a time, and checks what was written.
///
/// # Panics
/// If a byte is wrong, or fio has any other complaint.
pub fn deep(room: &Room, node: &Path, size: u64) {
    let arguments = [
        "--name=deep",
        "--output-format=json",
        "--rw=randrw",
        "--bs=1M",
        "--iodepth=128",
        "--direct=1",
        "--ioengine=io_uring",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--randrepeat=0",
    ]
    .map(str::to_owned);
    let place = [format!("--filename={}", node.display()), format!("--size={size}")];
    report(&fio(room, &[&arguments[..], &place].concat()).ok(), 1);
}

/// Keeps a disk busy for `seconds`, or until it fails: two jobs, 16 deep, each in its half. No two
/// writes to a place are out at once: what is there afterwards would be for the disk to say, and
/// the legs of a mirror say different things.
#[must_use]
pub fn load(room: &Room, node: &Path, seconds: u64) -> Running {
    let mut arguments: Vec<String> = [
        "--name=load",
        "--rw=randrw",
        "--bsrange=4k-128k",
        "--iodepth=16",
        "--numjobs=2",
        "--size=50%",
        "--offset_increment=50%",
        "--serialize_overlap=1",
        "--direct=1",
        "--ioengine=io_uring",
        "--time_based",
        "--group_reporting",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend([format!("--filename={}", node.display()), format!("--runtime={seconds}")]);
    fio(room, &arguments).start()
}
