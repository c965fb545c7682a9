//! Answers for the command line of `ublk`, ublksrv's tool.

use devsplice_core::{Error, Result};

use super::wish::{CopyMode, More, Verb, Wish};
use super::words::{Known, Words, flag, value};
use super::{common, number_of};

const KNOWN: &[Known] = &[
    flag('a', "all"),
    value('t', "type"),
    value('n', "number"),
    value('q', "queues"),
    value('d', "depth"),
    value('f', "file"),
    // How completions reach its threads: an affair of kernels before 6.0.
    value('u', "uring_comp"),
    value('g', "need_get_data"),
    value('r', "user_recovery"),
    value('i', "user_recovery_reissue"),
    value('e', "user_recovery_fail_io"),
    value('\0', "debug_mask"),
    flag('\0', "unprivileged"),
    flag('\0', "usercopy"),
    flag('\0', "eventfd"),
    flag('z', "zerocopy"),
    flag('\0', "auto_zc"),
    flag('b', "batch"),
    // I/O threads of each queue; how its tags are dealt out to them is nobody's affair here.
    value('T', "io_threads"),
    flag('S', "seq_tags"),
    // Whenever a device is to be recovered.
    flag('\0', "quiesce"),
    // What a signal to the server does: stop and delete the device, or end it as any process.
    flag('\0', "clean-teardown"),
    flag('\0', "abandon-ring"),
    flag('\0', "shmem_zc"),
    value('\0', "htlb"),
    // How data of writes is sent to an NBD server is decided here.
    flag('\0', "send_zc"),
    flag('\0', "foreground"),
    flag('\0', "buffered_io"),
    flag('v', "verbose"),
    flag('\0', "read_only"),
];

/// How it is used.
pub const HELP: &str = "\
ublk add -t null|loop|stripe|fault_inject [-f FILE]... [-n ID] [-q QUEUES] [-d DEPTH] [-g 0|1]
     [-r 0|1] [-i 0|1] [-e 0|1] [-z] [-b] [-T THREADS] [--usercopy] [--buffered_io]
     [--shmem_zc [--htlb FILE]] [--clean-teardown] [--unprivileged] [--foreground]
ublk add -t nbd --host HOST | --unix PATH [--export_name NAME] ...as above
ublk recover -n ID;  quiesce -n ID
ublk del -n ID | -a;  list [-n ID];  features";

/// What a command line asks for.
///
/// # Errors
/// Which word makes no sense.
pub fn parse(verb: &str, words: &[String]) -> Result<Verb> {
    let words = Words::sort(KNOWN, words)?;
    match verb {
        "add" => add(&words).map(|wish| Verb::Add(Box::new(wish))),
        "recover" => Ok(Verb::Add(Box::new(Wish {
            id: Some(number_of(&words)?),
            more: More { is_recovery: true, ..More::default() },
            ..Wish::default()
        }))),
        "quiesce" => Ok(Verb::Quiesce { id: number_of(&words)? }),
        _ => common(verb, &words),
    }
}

fn add(words: &Words) -> Result<Wish> {
    let on = |name| words.is_on(name);
    let modes = [
        (on("need_get_data")?, CopyMode::GetData),
        (words.has("usercopy"), CopyMode::UserCopy),
        // That tool's library makes more of it where the kernel can, and one test looks for that.
        (words.has("zerocopy"), CopyMode::AutoRegister),
        (words.has("auto_zc"), CopyMode::AutoRegister),
    ];
    let mut given = modes.iter().filter(|(given, _)| *given).map(|(_, mode)| *mode);
    let copy = given.next().unwrap_or_default();
    if given.next().is_some() {
        return Err(Error::invalid("-g, -z, -b, --usercopy", "are ways of one thing: give one"));
    }
    let (reissues, fails) = (on("user_recovery_reissue")?, on("user_recovery_fail_io")?);
    let files = words.given.iter().filter(|(name, _)| *name == "file");
    let named = files.map(|(_, file)| file.clone()).chain(words.plain.iter().cloned());
    let id = words.get("number").filter(|text| *text != "-1");
    let queues: u16 = words.number("queues")?.unwrap_or(1);
    let each: u16 = words.number("io_threads")?.unwrap_or(1).clamp(1, 64);
    Ok(Wish {
        target: words.get("type").unwrap_or("unknown").to_owned(),
        files: named.collect(),
        target_options: words.others.clone(),
        id: id.map(|_| number_of(words)).transpose()?,
        queues,
        threads: (each > 1).then(|| queues.saturating_mul(each)),
        depth: words.number("depth")?.unwrap_or(128),
        copy,
        is_foreground: words.has("foreground"),
        is_buffered: words.has("buffered_io"),
        read_only: words.has("read_only"),
        shares_memory: words.has("shmem_zc"),
        shared_file: words.get("htlb").map(|file| (file.to_owned(), false)),
        more: More {
            outlives: on("user_recovery")? || reissues || fails,
            reissues,
            fails,
            batch: words.has("batch"),
            // Those of a queue in batches take whatever comes.
            per_queue: if words.has("batch") { 0 } else { each },
            ends_with_signal: words.has("clean-teardown"),
            unprivileged: words.has("unprivileged"),
            ..More::default()
        },
        ..Wish::default()
    })
}

#[cfg(test)]
mod tests {
    use super::super::wish::Which;
    use super::*;

    fn read(line: &str) -> Result<Verb> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words[0], &words[1..])
    }

    #[test]
    fn devices_are_asked_for_as_ublksrvs_tests_do() {
        let line = "add -t loop -q 2 -d 64 -u 1 -g 0 -r 1 -i 1 -e 0 --buffered_io -f /a";
        let Ok(Verb::Add(wish)) = read(line) else { panic!() };
        assert_eq!((wish.target.as_str(), wish.queues, wish.depth), ("loop", 2, 64));
        assert_eq!((wish.files, wish.is_buffered), (vec!["/a".to_owned()], true));
        assert_eq!(wish.copy, CopyMode::Copy);
        let more = More { outlives: true, reissues: true, per_queue: 1, ..More::default() };
        assert_eq!(wish.more, more);
        for (flags, mode) in [
            ("-g 1", CopyMode::GetData),
            ("--usercopy", CopyMode::UserCopy),
            ("-z", CopyMode::AutoRegister),
            ("-b", CopyMode::Copy),
        ] {
            let Ok(Verb::Add(wish)) = read(&format!("add -t null {flags}")) else { panic!() };
            assert_eq!(wish.copy, mode);
        }
        let Ok(Verb::Add(wish)) = read("add -t null -q 2 -d 65 -T 4 -S") else { panic!() };
        assert_eq!((wish.threads, wish.more.per_queue, wish.more.batch), (Some(8), 4, false));
        let Ok(Verb::Add(wish)) = read("add -t null -q 2 -T 4 -b") else { panic!() };
        assert_eq!((wish.threads, wish.more.per_queue, wish.more.batch), (Some(8), 0, true));
        let line = "add -t nbd -q 1 -d 127 -z --send_zc --host 127.0.0.1";
        let Ok(Verb::Add(wish)) = read(line) else { panic!() };
        assert_eq!(wish.target_options, [("host".to_owned(), "127.0.0.1".to_owned())]);
        let line = "add -t loop -f /a --shmem_zc --htlb /h --clean-teardown";
        let Ok(Verb::Add(wish)) = read(line) else { panic!() };
        assert_eq!(wish.shared_file, Some(("/h".to_owned(), false)));
        assert!(wish.shares_memory && wish.more.ends_with_signal);
        let Ok(Verb::Add(wish)) = read("add -t null --abandon-ring") else { panic!() };
        assert!(!wish.more.ends_with_signal);
        let Ok(Verb::Add(wish)) = read("add -t null -b --quiesce -r 1") else { panic!() };
        assert!(wish.more.batch && wish.more.outlives);
        assert_eq!(read("quiesce -n 2").unwrap(), Verb::Quiesce { id: 2 });
        assert!(read("add -t null -z --usercopy").is_err());
        assert!(read("recover").is_err() && read("del").is_err());
        assert_eq!(read("del -n 2").unwrap(), Verb::Del(Which::One(2)));
        assert_eq!(read("list").unwrap(), Verb::List(Which::All));
    }
}
