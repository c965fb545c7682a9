//! Answers for how other ublk tools print devices and features: what their test suites read.

use std::fmt::Write;

use devsplice_core::{ErrorKind, Result};
use devsplice_exports::ublk::{Control, Seen};

use super::Tool;
use super::wish::Which;
use crate::say;

/// `UBLK_F_IO_DESC_SIZE`.
const F_IO_DESC_SIZE: u64 = 1 << 20;

/// `UBLK_F_*` without that, by bit, and what ublksrv calls them where its list does.
const FEATURES: &[(&str, &str)] = &[
    ("SUPPORT_ZERO_COPY", "ZERO_COPY"),
    ("URING_CMD_COMP_IN_TASK", "COMP_IN_TASK"),
    ("NEED_GET_DATA", "GET_DATA"),
    ("USER_RECOVERY", "RECOVERY"),
    ("USER_RECOVERY_REISSUE", "REISSUE"),
    ("UNPRIVILEGED_DEV", "UNPRIVILEGED"),
    ("CMD_IOCTL_ENCODE", "CMD_IOCTL_ENCODE"),
    ("USER_COPY", "USER_COPY"),
    ("ZONED", "ZONED"),
    ("USER_RECOVERY_FAIL_IO", "RECOVERY_FAIL_IO"),
    ("UPDATE_SIZE", "UPDATE_SIZE"),
    ("AUTO_BUF_REG", "AUTO_ZC"),
    ("QUIESCE", "QUIESCE"),
    ("PER_IO_DAEMON", "PER_IO_DAEMON"),
    ("BUF_REG_OFF_DAEMON", "BUF_REG_OFF_DAEMON"),
    ("BATCH_IO", "BATCH_IO"),
    ("INTEGRITY", "INTEGRITY"),
    ("SAFE_STOP_DEV", "SAFE_STOP_DEV"),
    ("NO_AUTO_PART_SCAN", "NO_AUTO_PART_SCAN"),
    ("SHMEM_ZC", "SHMEM_ZC"),
    ("IO_DESC_SIZE", "IO_DESC_SIZE"),
];

/// Prints devices.
///
/// # Errors
/// Without the driver, or without the one device asked for.
pub fn run(which: Which, tool: Tool) -> Result<()> {
    let mut control = Control::open()?;
    match which {
        Which::One(id) => print(&control.look(id)?, tool),
        Which::All => {
            for id in all() {
                match control.look(id) {
                    // One that went in the meantime.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    seen => print(&seen?, tool),
                }
            }
        }
    }
    Ok(())
}

/// Prints one device.
pub fn print(seen: &Seen, tool: Tool) {
    let threads = threads_of(seen.server);
    say!("{}", text(seen, tool, &threads).trim_end_matches('\n'));
}

/// The numbers of all devices that there are, in order.
pub fn all() -> Vec<u32> {
    let entries = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let number = |name: std::ffi::OsString| name.to_str()?.strip_prefix("ublkc")?.parse().ok();
    let mut all: Vec<u32> = entries.filter_map(|entry| number(entry.file_name())).collect();
    all.sort_unstable();
    all
}

/// The I/O threads of a server of ours, in their order.
fn threads_of(server: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{server}/task")).into_iter().flatten().flatten();
    let mut found: Vec<(usize, i32)> = tasks
        .filter_map(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            let place = name.trim().strip_prefix("io/")?.parse().ok()?;
            Some((place, task.file_name().to_str()?.parse().ok()?))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, thread)| thread).collect()
}

fn state(seen: &Seen) -> &'static str {
    match seen.state {
        0 => "DEAD",
        1 => "LIVE",
        2 => "QUIESCED",
        3 => "FAIL_IO",
        _ => "UNKNOWN",
    }
}

/// A device as `tool` prints it. Of the lines, the suites read the words by their places.
fn text(seen: &Seen, tool: Tool, threads: &[i32]) -> String {
    let Seen { id, queues, depth, block, sectors, max_io, server, flags, .. } = seen;
    let state = state(seen);
    let mut text = format!(
        "dev id {id}: nr_hw_queues {queues} queue_depth {depth} block size {block} dev_capacity \
         {sectors}\n"
    );
    // Writing to a string cannot fail.
    let _ = match tool {
        Tool::Ublk => writeln!(
            text,
            "\tmax rq size {max_io} daemon pid {server} state {state}\n\tflags {flags:#x} [ {}]",
            names(*flags)
        ),
        _ => writeln!(
            text,
            "\tmax rq size {max_io} daemon pid {server} flags {flags:#x} state {state}"
        ),
    };
    if tool == Tool::Kublk && flags & F_IO_DESC_SIZE != 0 {
        let _ = writeln!(text, "\tio_desc_size {}", seen.descriptor_bytes);
    }
    for (queue, cpus) in seen.cpus.iter().enumerate() {
        let cpus: String = cpus.iter().map(|cpu| format!("{cpu} ")).collect();
        // As `exports/threads` gives queues to threads, and threads to queues.
        let first = queue % threads.len().max(1);
        let its = threads.iter().skip(first).step_by(seen.cpus.len());
        let its: Vec<String> = its.map(i32::to_string).collect();
        let thread = its.first().map_or("-1", String::as_str);
        let _ = match tool {
            Tool::Ublk if its.len() > 1 => {
                writeln!(text, "\tqueue {queue}: tid {} affinity({cpus})", its.join(" "))
            }
            Tool::Ublk => writeln!(text, "\tqueue {queue}: tid {thread} affinity({cpus})"),
            Tool::Rublk => {
                writeln!(text, "\tqueue {queue} tid: {thread} affinity({})", cpus.trim_end())
            }
            _ => writeln!(text, "\tqueue {queue}: affinity({cpus})"),
        };
    }
    if tool == Tool::Ublk {
        let size = sectors * 512;
        let _ = writeln!(text, "\ttarget {{\"dev_size\":{size},\"name\":\"devsplice\"}}");
    }
    text
}

fn names(flags: u64) -> String {
    let set = FEATURES.iter().enumerate().filter(|(bit, _)| flags >> bit & 1 == 1);
    set.map(|(_, (_, name))| format!("{name} ")).collect()
}

/// Prints what the driver can do.
///
/// # Errors
/// Without the driver.
pub fn features() -> Result<()> {
    say!("{}", feature_text(Control::open()?.features()));
    Ok(())
}

fn feature_text(features: u64) -> String {
    let mut text = format!("ublk_drv features: {features:#x}");
    for bit in (0..64).filter(|bit| features >> bit & 1 == 1) {
        let name = match FEATURES.get(bit) {
            Some((name, _)) => format!("UBLK_F_{name}"),
            None => "unknown".to_owned(),
        };
        let _ = write!(text, "\n{:<#18x}: {name}", 1_u64 << bit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen() -> Seen {
        Seen {
            id: 5,
            queues: 2,
            depth: 128,
            state: 2,
            server: 4321,
            max_io: 1 << 20,
            flags: 1 << 11 | F_IO_DESC_SIZE,
            descriptor_bytes: 64,
            block: 512,
            sectors: 2048,
            is_read_only: false,
            cpus: vec![vec![0, 2], vec![1]],
        }
    }

    /// What `awk` calls the fields of the line with `word` in it.
    fn fields(text: &str, word: &str) -> Vec<String> {
        let line = text.lines().find(|line| line.contains(word)).unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn numbers_and_states_are_where_the_suites_look() {
        for (tool, at) in
            [(Tool::Kublk, 10), (Tool::Miniublk, 10), (Tool::Rublk, 10), (Tool::Ublk, 8)]
        {
            let text = text(&seen(), tool, &[70, 71]);
            let first: Vec<&str> = text.lines().next().unwrap().split([' ', ':']).collect();
            assert_eq!(first[..3], ["dev", "id", "5"], "{tool:?}");
            assert_eq!(fields(&text, "state")[at], "QUIESCED", "{tool:?}");
            assert_eq!(fields(&text, "pid")[6], "4321", "{tool:?}");
        }
    }

    #[test]
    fn what_only_one_suite_reads_is_in_its_list() {
        let list = |tool| text(&seen(), tool, &[70, 71]);
        assert!(list(Tool::Kublk).contains("\tio_desc_size 64\n"));
        assert!(list(Tool::Kublk).contains("\tqueue 0: affinity(0 2 )\n"));
        let ublk = list(Tool::Ublk);
        assert!(ublk.contains("flags 0x100800 [ AUTO_ZC IO_DESC_SIZE ]"), "{ublk}");
        assert_eq!(fields(&ublk, "queue 1")[3], "71");
        assert!(ublk.contains("\ttarget {\"dev_size\":1048576"));
        assert!(list(Tool::Rublk).contains("\tqueue 1 tid: 71 affinity(1)\n"));
        let shared = text(&seen(), Tool::Ublk, &[70, 71, 72, 73]);
        assert!(shared.contains("\tqueue 1: tid 71 73 affinity(1 )\n"), "{shared}");
        // With fewer threads than queues, and with none to be found.
        assert_eq!(fields(&text(&seen(), Tool::Ublk, &[70]), "queue 1")[3], "70");
        assert_eq!(fields(&text(&seen(), Tool::Ublk, &[]), "queue 1")[3], "-1");
    }

    #[test]
    fn features_have_names_up_to_the_last_one_known() {
        let all = feature_text((1 << 21) - 1);
        assert_eq!(all.lines().next(), Some("ublk_drv features: 0x1fffff"));
        assert_eq!(all.lines().count(), 22);
        assert!(all.contains("0x800             : UBLK_F_AUTO_BUF_REG"), "{all}");
        assert!(!all.contains("unknown"));
        assert!(feature_text(1 << 40).contains("unknown"));
    }
}
