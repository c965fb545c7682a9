//! Answers for the contract from outside: what every disk promises, asked of ours by threads with
//! direct I/O; and what becomes of their requests when the disk is taken away.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use devsplice_contract::device::{Subject, suite};
use devsplice_e2e::{Group, Kind, MIB, Outcome, PATHS, Room, need};

/// Bytes of each disk that are used: the VM's processors are slow.
const SPAN: u64 = MIB;

pub fn add(group: &mut Group, kind: Kind) {
    group.add("a_disk_over_a_stripe_keeps_the_contract", move || {
        let room = Room::new();
        let [a, b] = ["a", "b"].map(|name| room.file(name, 2 * MIB));
        keeps(&room, kind, &format!("stripe(chunk=16k, {a}, linear({b}, offset=64k))"))
    });
    group.add("a_disk_in_memory_keeps_the_contract", move || {
        keeps(&Room::new(), kind, "concat(mem:1M, mem:3M)")
    });
    // What `auto` finds is up to the examples: once, where the best of it is.
    if kind == PATHS.map(Kind::Ublk)[0] {
        for (name, arguments) in EXAMPLES {
            let test = format!("the_example_{name}_{}_keeps_the_contract", arguments[0]);
            group.add(&test, move || example(name, arguments));
        }
    }
    group.add("removal_by_force_ends_each_request_as_the_contract_says", move || removal(kind));
}

/// Programs of the page for driver authors, and what they are started with; `FILE` is a new one.
const EXAMPLES: [(&str, &[&str]); 3] =
    [("ramdisk", &["4M"]), ("miniublk", &["swap", "FILE"]), ("miniublk", &["file", "FILE"])];

/// An example serves a disk until its standard input ends.
fn example(name: &str, arguments: &[&str]) -> Outcome {
    let this = std::env::current_exe().expect("this program");
    let program = this.ancestors().nth(2).expect("a directory").join("examples").join(name);
    need(program.exists(), "no example here: cargo build --examples")?;
    let room = Room::new();
    let file = room.file("a", 4 * MIB);
    let words = arguments.iter().map(|word| if *word == "FILE" { &*file } else { *word });
    let mut command = std::process::Command::new(program);
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("the example starts");
    let stdin = child.stdin.take();
    let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let node = lines.next().expect("its node").expect("a line");
    let subject = Subject::new(&node).span(SPAN).patience(Duration::from_secs(120));
    let report = suite(&subject).run();
    drop(stdin);
    assert!(child.wait().expect("its end").success());
    assert!(report.is_kept(), "{name} {arguments:?}:\n{report}");
    assert!(!std::path::Path::new(&node).exists(), "{node} is still there");
    Ok(())
}

fn keeps(room: &Room, kind: Kind, stack: &str) -> Outcome {
    let disk = room.add(kind, stack, &[]);
    let subject = Subject::new(&disk.node).span(SPAN).patience(Duration::from_secs(120));
    let report = suite(&subject).run();
    assert!(report.is_kept(), "{stack}:\n{report}");
    assert_eq!(disk.count("errors"), 0, "requests failed inside: {:#}", disk.info());
    disk.remove();
    Ok(())
}

/// Only the case of removal: the others have nothing to do with it.
fn removal(kind: Kind) -> Outcome {
    let room = Room::new();
    let stack = format!("delay({}, read=2ms, write=2ms)", room.file("a", 4 * MIB));
    let disk = room.add(kind, &stack, &[]);
    let name = disk.name.clone();
    std::thread::scope(|scope| {
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let subject =
            Subject::new(&disk.node).patience(Duration::from_secs(60)).removed_by(move || {
                ask.send(()).map_err(|error| error.to_string())?;
                told.recv().map_err(|error| error.to_string())?
            });
        let cases = suite(&subject).cases;
        let case = cases.into_iter().find(|case| case.name.starts_with("removal_"));
        let case = scope.spawn(move || case.expect("the case of removal").run());
        if asked.recv_timeout(Duration::from_secs(60)).is_ok() {
            let ran = disk.del(&["--force"]);
            let done =
                if ran.code == Some(0) { Ok(()) } else { Err(format!("{name}: {}", ran.err)) };
            let _ = tell.send(done);
        }
        let outcome = case.join().expect("a case does not panic");
        assert!(outcome.is_ok(), "{outcome:?}");
    });
    disk.is_gone_within(10);
    Ok(())
}
