//! Answers for the command line of `kublk`, the server of the kernel's own tests of ublk
//! (tools/testing/selftests/ublk, Linux 7.3).

use devsplice_core::{Error, Result};
use devsplice_exports::ublk::{Integrity, Trial};

use super::wish::{CopyMode, More, Verb, Which, Wish};
use super::words::{Known, Words, flag, value};

const KNOWN: &[Known] = &[
    flag('a', "all"),
    value('t', "type"),
    value('n', "number"),
    value('q', "queues"),
    value('d', "depth"),
    value('\0', "debug_mask"),
    flag('\0', "quiet"),
    flag('z', "zero_copy"),
    flag('\0', "foreground"),
    value('r', "recovery"),
    value('e', "recovery_fail_io"),
    value('i', "recovery_reissue"),
    flag('g', "get_data"),
    flag('\0', "auto_zc"),
    flag('\0', "auto_zc_fallback"),
    flag('u', "user_copy"),
    value('s', "size"),
    value('\0', "nthreads"),
    flag('\0', "per_io_tasks"),
    // Whether commands name the character device by a table or not is nobody's affair here.
    flag('\0', "no_ublk_fixed_fd"),
    flag('\0', "integrity_capable"),
    flag('\0', "integrity_reftag"),
    value('\0', "metadata_size"),
    value('\0', "pi_offset"),
    value('\0', "csum_type"),
    value('\0', "tag_size"),
    flag('\0', "safe"),
    flag('b', "batch"),
    flag('\0', "rotate_auto_buf"),
    flag('\0', "no_auto_part_scan"),
    flag('\0', "shmem_zc"),
    value('\0', "htlb"),
    flag('\0', "rdonly_shmem_buf"),
    value('\0', "io_desc_size"),
    flag('\0', "zoned"),
    value('\0', "param_types"),
    value('\0', "logical_bs_shift"),
    value('\0', "physical_bs_shift"),
    value('\0', "io_min_shift"),
    value('\0', "io_opt_shift"),
    value('\0', "max_sectors"),
    value('\0', "chunk_sectors"),
    value('\0', "dev_sectors"),
    value('\0', "max_zone_append_sectors"),
    value('\0', "max_open_zones"),
    value('\0', "max_active_zones"),
];

/// Most queues and requests per queue that the tool takes.
const MOST: (u16, u16) = (32, 1024);
/// `UBLK_F_USER_COPY` and `UBLK_F_ZONED`.
const F_USER_COPY: u64 = 1 << 7;
const F_ZONED: u64 = 1 << 8;

/// How it is used.
pub const HELP: &str = "\
kublk add -t null|loop|stripe|fault_inject [-n ID] [-q QUEUES] [-d DEPTH] [--foreground]
          [-z] [-u] [-g] [-b] [--auto_zc] [--auto_zc_fallback] [-r 0|1] [-i 0|1] [-e 0|1]
          [--nthreads N] [--per_io_tasks] [--no_auto_part_scan] [--io_desc_size BYTES]
          [--chunk_size BYTES] [--delay_us US] [FILE...]
kublk recover -n ID ...as for add
kublk del -n ID | -a;  stop -n ID [--safe];  list [-n ID];  features
kublk update_size -n ID -s BYTES;  quiesce -n ID;  set_params [-q N] [-d N] [-u] [--zoned] ...";

/// What a command line asks for.
///
/// # Errors
/// Which word makes no sense.
pub fn parse(verb: &str, words: &[String]) -> Result<Verb> {
    let words = Words::sort(KNOWN, words)?;
    let number = words.get("number").filter(|text| !text.starts_with('-'));
    let id: Option<u32> = number.map(|text| super::words::number("-n", text)).transpose()?;
    let need = || id.ok_or_else(|| Error::invalid(verb, "needs the device's number").next("-n ID"));
    let which = match (id, words.has("all")) {
        (Some(id), _) => Which::One(id),
        (None, _) => Which::All,
    };
    match verb {
        "add" => wish(&words, id, false).map(|wish| Verb::Add(Box::new(wish))),
        "recover" => {
            need()?;
            wish(&words, id, true).map(|wish| Verb::Add(Box::new(wish)))
        }
        "del" if which == Which::All && !words.has("all") => need().map(|_| Verb::Help),
        "del" => Ok(Verb::Del(which)),
        "list" => Ok(Verb::List(which)),
        "stop" => Ok(Verb::Stop { id: need()?, is_safe: words.has("safe") }),
        "quiesce" => Ok(Verb::Quiesce { id: need()? }),
        "update_size" => {
            let bytes = words.number("size")?;
            let bytes =
                bytes.ok_or_else(|| Error::invalid(verb, "needs a size").next("-s BYTES"))?;
            Ok(Verb::Resize { id: need()?, bytes })
        }
        "set_params" => trial(&words).map(|trial| Verb::Try(id, trial)),
        "features" => Ok(Verb::Features),
        _ => Ok(Verb::Help),
    }
}

fn wish(words: &Words, id: Option<u32>, is_recovery: bool) -> Result<Wish> {
    let queues: u16 = words.number("queues")?.unwrap_or(2);
    let depth: u16 = words.number("depth")?.unwrap_or(128);
    if queues == 0 || depth == 0 || queues > MOST.0 || depth > MOST.1 {
        let reason =
            format!("{queues} queues of {depth} are not 1 to {} of 1 to {}", MOST.0, MOST.1);
        return Err(Error::invalid("-q, -d", reason));
    }
    let threads: Option<u16> = words.number("nthreads")?.filter(|threads| *threads > 0);
    let more = more(words, is_recovery)?;
    if threads.is_some_and(|threads| threads != queues) && !more.per_io && !more.batch {
        let reason = "as many threads as queues, unless with --per_io_tasks or -b";
        return Err(Error::invalid("--nthreads", reason));
    }
    if more.per_io && more.batch {
        return Err(Error::invalid("--per_io_tasks", "does not go with -b"));
    }
    let copy = copy_mode(words)?;
    let integrity = integrity(words)?;
    if integrity.is_some() && copy != CopyMode::UserCopy {
        return Err(Error::invalid("--metadata_size", "needs -u"));
    }
    if more.rotates && !(more.batch && copy == CopyMode::AutoRegister) {
        return Err(Error::invalid("--rotate_auto_buf", "needs --auto_zc and -b"));
    }
    Ok(Wish {
        target: words.get("type").unwrap_or("unknown").to_owned(),
        files: words.plain.clone(),
        target_options: words.others.clone(),
        id,
        queues,
        depth,
        threads,
        copy,
        descriptor_bytes: words.number("io_desc_size")?,
        no_part_scan: words.has("no_auto_part_scan"),
        is_foreground: words.has("foreground"),
        integrity,
        shares_memory: words.has("shmem_zc"),
        shared_file: words.get("htlb").map(|file| (file.to_owned(), words.has("rdonly_shmem_buf"))),
        more,
        ..Wish::default()
    })
}

fn copy_mode(words: &Words) -> Result<CopyMode> {
    let has = |name| words.has(name);
    let (register, auto) = (has("zero_copy"), has("auto_zc"));
    let modes = match has("auto_zc_fallback") {
        true if register && auto => vec![CopyMode::Fallback],
        true => return Err(Error::invalid("--auto_zc_fallback", "needs -z and --auto_zc")),
        false => [(register, CopyMode::Register), (auto, CopyMode::AutoRegister)]
            .into_iter()
            .filter_map(|(given, mode)| given.then_some(mode))
            .collect(),
    };
    let others = [("user_copy", CopyMode::UserCopy), ("get_data", CopyMode::GetData)];
    let others = others.into_iter().filter_map(|(name, mode)| has(name).then_some(mode));
    match modes.into_iter().chain(others).collect::<Vec<_>>()[..] {
        [] => Ok(CopyMode::Copy),
        [mode] => Ok(mode),
        _ => Err(Error::invalid("-z, --auto_zc, -u, -g", "are ways of one thing: give one")),
    }
}

fn more(words: &Words, is_recovery: bool) -> Result<More> {
    let (reissues, fails) = (words.is_on("recovery_reissue")?, words.is_on("recovery_fail_io")?);
    Ok(More {
        is_recovery,
        outlives: words.is_on("recovery")? || reissues || fails,
        reissues,
        fails,
        batch: words.has("batch"),
        rotates: words.has("rotate_auto_buf"),
        per_io: words.has("per_io_tasks"),
        ..More::default()
    })
}

/// The integrity data that is asked for.
fn integrity(words: &Words) -> Result<Option<Integrity>> {
    let Some(bytes) = words.number::<u8>("metadata_size")?.filter(|bytes| *bytes > 0) else {
        let parts = ["integrity_capable", "integrity_reftag", "pi_offset", "csum_type", "tag_size"];
        return match parts.iter().any(|part| words.has(part)) {
            true => Err(Error::invalid("integrity parameters", "need --metadata_size")),
            false => Ok(None),
        };
    };
    let capable = u32::from(words.has("integrity_capable"));
    let checksum = match words.get("csum_type") {
        None => 0,
        Some("ip") => 1,
        Some("t10dif") => 2,
        Some("nvme") => 4,
        Some(other) => return Err(Error::invalid("--csum_type", format!("`{other}` is none"))),
    };
    Ok(Some(Integrity {
        bytes,
        flags: capable | u32::from(words.has("integrity_reftag")) << 1,
        offset: words.number("pi_offset")?.unwrap_or(0),
        checksum,
        tag_bytes: words.number("tag_size")?.unwrap_or(0),
        file: None,
    }))
}

/// Parameters to try, with the tool's defaults: 16 zones of 64 KiB.
fn trial(words: &Words) -> Result<Trial> {
    let (mut has_basic, mut has_zoned) = (true, false);
    if let Some(types) = words.get("param_types") {
        (has_basic, has_zoned) = (false, false);
        for kind in types.split(',') {
            match kind {
                "basic" => has_basic = true,
                "zoned" => has_zoned = true,
                "none" | "" => {}
                _ => return Err(Error::invalid("--param_types", format!("`{kind}` is no kind"))),
            }
        }
    }
    let shift = |name, default| Ok::<u8, Error>(words.number(name)?.unwrap_or(default));
    let count = |name, default| Ok::<u32, Error>(words.number(name)?.unwrap_or(default));
    let user_copy = if words.has("user_copy") { F_USER_COPY } else { 0 };
    Ok(Trial {
        queues: (words.number("queues")?.unwrap_or(2), words.number("depth")?.unwrap_or(128)),
        flags: user_copy | if words.has("zoned") { F_ZONED } else { 0 },
        has_basic,
        has_zoned,
        shifts: [
            shift("logical_bs_shift", 9)?,
            shift("physical_bs_shift", 12)?,
            shift("io_min_shift", 9)?,
            shift("io_opt_shift", 12)?,
        ],
        max_sectors: count("max_sectors", 2048)?,
        chunk_sectors: count("chunk_sectors", 128)?,
        dev_sectors: words.number("dev_sectors")?.unwrap_or(128 * 16),
        zoned: [
            count("max_open_zones", 0)?,
            count("max_active_zones", 0)?,
            count("max_zone_append_sectors", 8)?,
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Verb> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words[0], &words[1..])
    }

    fn add(line: &str) -> Wish {
        match read(line).unwrap() {
            Verb::Add(wish) => *wish,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn devices_are_asked_for_as_the_kernels_tests_do() {
        let wish = add("add -t loop -q 2 -g /tmp/a");
        assert_eq!((wish.target.as_str(), wish.queues, wish.depth), ("loop", 2, 128));
        assert_eq!((wish.files, wish.copy), (vec!["/tmp/a".to_owned()], CopyMode::GetData));
        assert_eq!(add("add -t null").queues, 2);
        let modes = [
            ("", CopyMode::Copy),
            ("-z", CopyMode::Register),
            ("-u", CopyMode::UserCopy),
            ("--auto_zc", CopyMode::AutoRegister),
            ("-z --auto_zc --auto_zc_fallback", CopyMode::Fallback),
        ];
        for (flags, mode) in modes {
            assert_eq!(add(&format!("add -t null {flags}")).copy, mode, "{flags}");
        }
        let slow = add("add -t fault_inject -q 2 -d 1 --delay_us 2000000");
        assert_eq!(slow.target_options, [("delay_us".to_owned(), "2000000".to_owned())]);
        assert_eq!((slow.depth, slow.more), (1, More::default()));
        let wish = add("add -t loop --no_auto_part_scan --io_desc_size 64 /a");
        assert_eq!((wish.no_part_scan, wish.descriptor_bytes), (true, Some(64)));
        let wish = add("add -t null -q 4 --auto_zc --nthreads 8 --per_io_tasks");
        assert_eq!((wish.threads, wish.more.per_io), (Some(8), true));
    }

    #[test]
    fn lives_beyond_a_server_are_asked_for_by_numbers() {
        let more = |line| add(line).more;
        assert_eq!(more("add -t null -r 0 -i 0 -e 0"), More::default());
        assert_eq!(more("add -t null -r 1"), More { outlives: true, ..More::default() });
        let reissues = More { outlives: true, reissues: true, ..More::default() };
        assert_eq!(more("add -t null -r 1 -i 1"), reissues);
        assert!(more("add -t null -e 1").fails && more("add -t null -b").batch);
        assert!(more("recover -n 3 -t null -r 1").is_recovery);
        assert!(read("recover -t null").is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "add -t null -z -u",
            "add -t null -z --auto_zc",
            "add -t null --auto_zc_fallback",
            "add -t null --nthreads 3",
            "add -t null -q 33",
            "add -t null -d 0",
            "add -t null -d 1025",
            "add -t null -b --per_io_tasks",
            "add -t null --rotate_auto_buf",
            "add -t null --pi_offset 8",
            "add -t null --metadata_size 8",
            "add -t null -u --metadata_size 8 --csum_type md5",
            "add -t null -u --metadata_size 256",
            "add -t null -q many",
            "del",
            "stop",
            "quiesce",
            "update_size -n 1",
            "set_params --param_types tape",
        ] {
            assert!(read(line).is_err(), "{line}");
        }
    }

    #[test]
    fn integrity_data_and_shared_memory_are_asked_for() {
        let line = "add -t null -u --integrity_capable --integrity_reftag --metadata_size 64 \
                    --pi_offset 56 --csum_type ip --tag_size 8";
        let integrity = add(line).integrity.unwrap();
        let Integrity { bytes, flags, offset, checksum, tag_bytes, .. } = integrity;
        assert_eq!((bytes, flags, offset, checksum, tag_bytes), (64, 3, 56, 1, 8));
        let wish = add("add -t null --shmem_zc --htlb /h --rdonly_shmem_buf");
        assert_eq!((wish.shares_memory, wish.shared_file), (true, Some(("/h".to_owned(), true))));
    }

    #[test]
    fn the_other_verbs() {
        assert_eq!(read("del -n 4").unwrap(), Verb::Del(Which::One(4)));
        assert_eq!(read("del -a").unwrap(), Verb::Del(Which::All));
        assert_eq!(read("list").unwrap(), Verb::List(Which::All));
        assert_eq!(read("list -n 0").unwrap(), Verb::List(Which::One(0)));
        assert_eq!(read("stop -n 1 --safe").unwrap(), Verb::Stop { id: 1, is_safe: true });
        assert_eq!(read("quiesce -n 1").unwrap(), Verb::Quiesce { id: 1 });
        assert_eq!(read("update_size -n 1 -s 4096").unwrap(), Verb::Resize { id: 1, bytes: 4096 });
        assert_eq!(read("features").unwrap(), Verb::Features);
        assert_eq!(read("dance").unwrap(), Verb::Help);
        let Ok(Verb::Try(None, trial)) =
            read("set_params -q 1 -d 2 -u --zoned --param_types basic,zoned --max_open_zones 5")
        else {
            panic!();
        };
        assert_eq!((trial.queues, trial.flags), ((1, 2), F_USER_COPY | F_ZONED));
        assert_eq!((trial.has_basic, trial.has_zoned), (true, true));
        assert_eq!((trial.zoned, trial.dev_sectors), ([5, 0, 8], 2048));
    }
}
