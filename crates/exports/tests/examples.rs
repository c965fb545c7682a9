//! Answers for the examples: they are programs, and they do what the pages about them say.
//!
//! `miniublk` needs the ublk driver; the end-to-end tests run it in the VM.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use devsplice_contract::device::{Subject, suite};
use devsplice_exports::{fuse, ublk};

/// The program of an example; `cargo test` builds them, `cargo test --test examples` does not.
fn example(name: &str) -> Option<PathBuf> {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    let path = path.join("examples").join(name);
    if !path.exists() {
        println!("skipped: {} is not built: cargo build --examples", path.display());
        return None;
    }
    Some(path)
}

struct Running(Child);

impl Running {
    fn new(program: PathBuf, argument: &str) -> Running {
        let mut command = Command::new(program);
        command.arg(argument).stdin(Stdio::piped()).stdout(Stdio::piped());
        Running(command.spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After a failed test; otherwise it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn front(op: u8, at: u64, len: u64) -> Vec<u8> {
    let mut front = vec![op, 0, 0, 0, 0, 0, 0, 0];
    front.extend(at.to_le_bytes());
    front.extend(len.to_le_bytes());
    front
}

#[test]
fn a_front_end_of_ones_own_serves_requests_from_a_pipe() {
    let Some(program) = example("rawring") else { return };
    let path = std::env::temp_dir().join(format!("devsplice-rawring-{}", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let mut child = Running::new(program, path.to_str().unwrap());
    let mut to = child.0.stdin.take().unwrap();
    let mut from = child.0.stdout.take().unwrap();
    let mut ask = |front: Vec<u8>, data: &[u8], want: usize| {
        to.write_all(&front).unwrap();
        to.write_all(data).unwrap();
        let mut answer = vec![0; 1 + want];
        from.read_exact(&mut answer).unwrap();
        answer
    };
    // More than a pipe holds, so that it comes in parts.
    let data: Vec<u8> = (0..300 * 1024_u32).map(|n| ((n * 7) >> 3) as u8).collect();
    let len = data.len() as u64;
    assert_eq!(ask(front(b'w', 4096, len), &data, 0), [0]);
    assert_eq!(ask(front(b'f', 0, 0), &[], 0), [0]);
    let answer = ask(front(b'r', 4096, len), &[], data.len());
    assert!(answer[0] == 0 && answer[1..] == data);
    assert_eq!(ask(front(b'r', 1 << 20, 512), &[], 0), [22], "behind the end is EINVAL");
    assert_eq!(ask(front(b'w', 100, 512), &[0; 512], 0), [22], "off the blocks, too");
    assert_eq!(&std::fs::read(&path).unwrap()[4096..4096 + data.len()], &data[..]);
    drop(to);
    assert!(child.0.wait().unwrap().success());
    std::fs::remove_file(path).unwrap();
}

#[test]
fn ten_lines_of_bytes_are_a_disk_that_keeps_the_contract() {
    let Some(program) = example("ramdisk") else { return };
    if let (Err(error), Err(_)) = (fuse::available(), ublk::available()) {
        println!("skipped: {error}");
        return;
    }
    let mut child = Running::new(program, "4M");
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let node = lines.next().unwrap().unwrap();
    let subject = Subject::new(&node).span(2 << 20).patience(Duration::from_secs(30));
    let report = suite(&subject).run();
    drop(child.0.stdin.take());
    assert!(report.is_kept(), "{report}");
    assert!(child.0.wait().unwrap().success());
    let last = lines.next().unwrap().unwrap();
    let requests: u64 = last.split_whitespace().next().unwrap().parse().unwrap();
    assert!(requests > 1000, "{last}");
    let size = std::fs::read_to_string(format!("/sys/block/{}/size", node.replace("/dev/", "")));
    assert!(size.map_or(true, |size| size.trim() == "0"), "{node} is still there");
}

#[test]
fn the_page_shows_the_programs_as_they_are() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("../../docs/drivers.md")).unwrap();
    let program = std::fs::read_to_string(root.join("examples/ramdisk.rs")).unwrap();
    let start = page.find("impl Bytes for Ram {").expect("the page has the driver");
    let end = start + page[start..].find("\n}\n").unwrap();
    assert!(program.contains(&page[start..end]), "{}", &page[start..end]);
    for example in ["ramdisk", "miniublk", "rawring"] {
        assert!(page.contains(&format!("examples/{example}.rs")), "{example}");
        let text = std::fs::read_to_string(root.join(format!("examples/{example}.rs"))).unwrap();
        let lines = text.lines().count();
        assert!(lines <= 150, "{example} has {lines} lines");
    }
}
