//! Answers for disks over NBD as the tools see them that people use: nbdinfo, nbdcopy, qemu, fio.

use devsplice_e2e::{
    Call, Group, Kind, MIB, Outcome, Ran, Room, call, is_root, kernel_is, need, need_tool,
    wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

pub fn add(group: &mut Group) {
    group.add("nbdinfo_sees_what_is_served", nbdinfo);
    group.add("fio_verifies_every_kind_of_stack_32_deep", fio);
    group.add("nbdcopy_brings_and_fetches_and_keeps_holes", nbdcopy);
    group.add("qemu_writes_reads_zeroes_and_compares", qemu);
    group.add("del_waits_for_clients_unless_forced", del);
    group.add("a_disk_whose_requests_hang_below_is_ending_until_it_is_resumed", ending);
    group.add("a_killed_server_leaves_a_place_that_the_next_one_takes", killed);
    group.add("what_makes_no_sense_is_refused_by_name", refused);
}

/// A disk that goes with the test.
pub struct Served<'a> {
    room: &'a Room,
    /// What it is called.
    pub name: String,
    /// Where it listens.
    pub socket: String,
    /// The same as an address.
    pub uri: String,
}

impl<'a> Served<'a> {
    pub fn new(room: &'a Room, stack: &str, more: &[&str]) -> Served<'a> {
        Served::at(room, "nbd.sock", stack, more)
    }

    /// At a socket of this name.
    pub fn at(room: &'a Room, socket: &str, stack: &str, more: &[&str]) -> Served<'a> {
        let (name, socket) = (room.name(), room.path(socket));
        let listen = format!("unix:{socket}");
        let mut arguments = vec!["add", stack, "-n", &name, "--listen", &listen];
        arguments.extend(more);
        let uri = room.devsplice(arguments).ok().trim().to_owned();
        let is_tls = more.iter().any(|one| ["--tls-certificates", "--tls-psk"].contains(one));
        let scheme = if is_tls { "nbds" } else { "nbd" };
        assert_eq!(uri, format!("{scheme}+unix:///{name}?socket={socket}"));
        Served { room, name, socket, uri }
    }

    pub fn info(&self) -> Value {
        let text = self.room.devsplice(["info", "--json", &self.name]).ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("info: {error}: {text}"))
    }

    fn del(&self, more: &[&str]) -> Ran {
        self.room.devsplice(["del", &self.name].iter().chain(more)).run()
    }

    /// It ends in good order, and nothing has gone wrong in it.
    pub fn remove(self) {
        let info = self.info();
        assert_eq!((&info["counts"]["errors"], &info["counts"]["stuck"]), (&0.into(), &0.into()));
        wait_until(10, "clients have gone", || self.info()["clients"] == 0);
        let _ = self.del(&[]).ok();
        assert!(!std::path::Path::new(&self.socket).exists());
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        let _ = self.del(&["--force"]);
    }
}

fn tool(room: &Room, name: &str, arguments: &[&str]) -> Call {
    call(name, arguments).dir(&room.dir).limit(60)
}

fn nbdinfo() -> Outcome {
    need_tool("nbdinfo")?;
    let room = Room::new();
    let served = Served::new(&room, "linear(mem:8M, offset=1M)", &[]);
    let text = tool(&room, "nbdinfo", &["--json", &served.uri]).ok();
    let told: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let export = &told["exports"][0];
    assert_eq!(export["export-name"], served.name.as_str());
    assert_eq!(export["export-size"], 7 * MIB);
    assert_eq!(export["contexts"][0], "base:allocation");
    for (key, value) in [
        ("is_read_only", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_multi_conn", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_fast_zero", true),
        ("can_df", true),
    ] {
        assert_eq!(export[key], value, "{key} in {text}");
    }
    assert_eq!(export["block_size_minimum"], 512);
    let listed = tool(&room, "nbdinfo", &["--list", &served.uri]).ok();
    assert!(listed.contains(&format!("export=\"{}\"", served.name)), "{listed}");
    let none = served.uri.replace(&served.name, "nothing");
    let _ = tool(&room, "nbdinfo", &[&none]).run().ended_with(1);
    served.remove();
    Ok(())
}

/// fio writes and reads the first `size` bytes of an export, 32 deep, and verifies them.
pub fn verify_32_deep(room: &Room, uri: &str, size: u64) -> Outcome {
    need_tool("fio")?;
    let known = call("fio", ["--enghelp"]).ok();
    need(known.split_whitespace().any(|one| one == "nbd"), "fio has no nbd")?;
    let (uri, size) = (format!("--uri={uri}"), format!("--size={size}"));
    let arguments = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bsrange=512-128k",
        "--blockalign=512",
        &size,
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--randrepeat=0",
    ];
    let said = tool(room, "fio", &arguments).ok();
    assert!(said.contains("err= 0"), "{said}");
    Ok(())
}

fn fio() -> Outcome {
    let room = Room::new();
    let (a, b) = (room.file("a.img", 32 * MIB), room.file("b.img", 32 * MIB));
    for stack in [
        a.clone(),
        "mem:32M".to_owned(),
        format!("stripe(chunk=16k, {a}, {b})"),
        format!("linear(concat({a}, {b}), offset=1M)"),
        format!("mirror({a}, {b})"),
    ] {
        if stack.starts_with("mirror") {
            let _ = room.devsplice(["format", &stack]).ok();
        }
        let served = Served::new(&room, &stack, &[]);
        verify_32_deep(&room, &served.uri, 24 * MIB)?;
        let counts = &served.info()["counts"];
        let at_least = |name: &str, count: u64| {
            assert!(counts[name].as_u64().is_some_and(|found| found >= count), "{name}: {counts}");
        };
        at_least("writes", 50);
        at_least("reads", 50);
        served.remove();
    }
    Ok(())
}

fn nbdcopy() -> Outcome {
    need_tool("nbdcopy")?;
    let room = Room::new();
    let image = room.full_file("image", 24 * MIB, 0x5a);
    let (a, b) = (room.file("a.img", 32 * MIB), room.file("b.img", 32 * MIB));
    let served = Served::new(&room, &format!("stripe(chunk=64k, {a}, {b})"), &[]);
    let _ = tool(&room, "nbdcopy", &[&image, &served.uri]).ok();
    let back = room.path("back");
    let _ = tool(&room, "nbdcopy", &[&served.uri, &back]).ok();
    let found = std::fs::read(&back).unwrap();
    assert_eq!(found.len() as u64, 64 * MIB);
    let (data, rest) = found.split_at(24 << 20);
    assert!(data.iter().all(|byte| *byte == 0x5a) && rest.iter().all(|byte| *byte == 0));
    let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&back).unwrap());
    assert!(allocated * 512 < 40 * MIB, "{allocated} sectors: the hole was filled");
    served.remove();
    Ok(())
}

fn qemu() -> Outcome {
    need_tool("qemu-io")?;
    need_tool("qemu-img")?;
    let room = Room::new();
    let a = room.file("a.img", 32 * MIB);
    let served = Served::new(&room, &a, &[]);
    let said = tool(
        &room,
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 7 1M 3M",
            "-c",
            "write -f -P 9 8M 512",
            "-c",
            "write -z 2M 1M",
            "-c",
            "write -zu 3M 64k",
            "-c",
            "discard 10M 1M",
            "-c",
            "flush",
            "-c",
            "read -P 7 1M 1M",
            "-c",
            "read -P 0 2M 1M",
            "-c",
            "read -P 0 3M 64k",
            "-c",
            "read -P 7 3136k 960k",
            "-c",
            "read -P 9 8M 512",
            &served.uri,
        ],
    )
    .ok();
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    // Zeroes only if that is fast: it is where room may be given back.
    for (zeroes, may) in [("write -zun 12M 1M", true), ("write -zn 12M 1M", false)] {
        let ran = tool(&room, "qemu-io", &["-f", "raw", "-c", zeroes, &served.uri]).run();
        let said = ran.out + &ran.err;
        assert_eq!(!said.contains("not supported"), may, "{zeroes}: {said}");
    }
    let same = ["compare", "-f", "raw", "-F", "raw", &a, &served.uri];
    let _ = tool(&room, "qemu-img", &same).ok();
    let map = ["map", "-f", "raw", "--output=json", &served.uri];
    let map = tool(&room, "qemu-img", &map).ok();
    let map: Value = serde_json::from_str(&map).unwrap_or_else(|e| panic!("{e}: {map}"));
    assert_eq!((&map[0]["start"], &map[0]["data"]), (&0.into(), &false.into()), "{map}");
    assert_eq!((&map[1]["start"], &map[1]["data"]), (&MIB.into(), &true.into()), "{map}");
    served.remove();
    Ok(())
}

fn del() -> Outcome {
    need_tool("nbdinfo")?;
    need_tool("fio")?;
    let room = Room::new();
    let served = Served::new(&room, "mem:8M", &[]);
    let uri = format!("--uri={}", served.uri);
    let busy = [
        "--name=busy",
        "--ioengine=nbd",
        &uri,
        "--rw=randread",
        "--bs=4k",
        "--size=8m",
        "--iodepth=8",
        "--time_based",
        "--runtime=30",
    ];
    let running = tool(&room, "fio", &busy).start();
    wait_until(20, "a client is there", || served.info()["clients"] == 1);
    let refused = served.del(&[]).ended_with(1);
    assert!(refused.err.contains("held by 1 NBD connection"), "{}", refused.err);
    let _ = served.del(&["--force"]).ok();
    assert_ne!(running.finish().code, Some(0), "it was cut off");
    Ok(())
}

/// What it lies on is quiesced, so that requests for it stay where they are.
fn ending() -> Outcome {
    need(is_root(), "needs root")?;
    need(kernel_is(6, 9), "FUSE holds no requests before Linux 6.9")?;
    need_tool("nbdcopy")?;
    let room = Room::new();
    let below = room.add(Kind::Fuse, &room.file("a", 4 * MIB), &["--no-part-scan"]);
    let served = Served::new(&room, &below.node.display().to_string(), &[]);
    let listed = || {
        let list = room.devsplice(["list", "--json"]).ok();
        let list: Value = serde_json::from_str(&list).unwrap();
        let ours = list.as_array().into_iter().flatten().find(|one| one["name"] == *served.name);
        ours.map_or(Value::Null, |one| one["state"].clone())
    };
    room.devsplice(["quiesce", &below.name]).ok();
    let client = tool(&room, "nbdcopy", &[&served.uri, "null:"]).limit(90).start();
    wait_until(20, "a client is there", || served.info()["clients"] != 0);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(listed(), "live");
    let refused = room.devsplice(["quiesce", &served.name]).limit(60).run().ended_with(1);
    assert_eq!(listed(), "ending", "{}", refused.err);
    assert_eq!(served.info()["state"], "ending");
    assert_ne!(client.finish().code, Some(0), "nobody serves it");
    let metrics = room.devsplice(["metrics"]).ok();
    let is_so = format!("disk=\"{}\",state=\"ending\"}} 1", served.name);
    assert!(metrics.contains(&is_so), "{metrics}");
    room.devsplice(["resume", &below.name]).ok();
    room.devsplice(["resume", &served.name]).ok();
    assert_eq!(listed(), "live");
    tool(&room, "nbdcopy", &[&served.uri, "null:"]).ok();
    served.remove();
    below.remove();
    Ok(())
}

fn killed() -> Outcome {
    need_tool("nbdcopy")?;
    let room = Room::new();
    let image = room.full_file("image", 4 * MIB, 0x33);
    let a = room.file("a.img", 4 * MIB);
    let served = Served::new(&room, &a, &[]);
    let _ = tool(&room, "nbdcopy", &[&image, &served.uri]).ok();
    let pid = served.info()["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap();
    devsplice_e2e::Process(pid).signal(Signal::KILL);
    wait_until(20, "its state is gone", || {
        !room.state().iter().any(|file| file.starts_with(&format!("{}.json", served.name)))
    });
    assert!(std::path::Path::new(&room.path("nbd.sock")).exists(), "as a killed server leaves it");
    let next = Served::new(&room, &a, &[]);
    let back = room.path("back");
    let _ = tool(&room, "nbdcopy", &[&next.uri, &back]).ok();
    assert!(std::fs::read(back).unwrap() == std::fs::read(image).unwrap());
    next.remove();
    Ok(())
}

fn refused() -> Outcome {
    let room = Room::new();
    let name = room.name();
    for (options, words) in [
        (&["--listen", "nbds://localhost"][..], &["nbds", "--tls-certificates"][..]),
        (&["--listen", "unix:"], &["unix:", "no path"]),
        (&["--listen", "unix:/nonexistent/dir/s"], &["/nonexistent/dir/s"]),
        (&["--export", "nbd"], &["--listen"]),
        (&["--listen", "unix:s", "--allow", "everybody"], &["everybody", "uid:1000"]),
        (&["--listen", "unix:s", "--export", "fuse"], &["--export"]),
        (&["--listen", "unix:s", "--recovery", "reissue"], &["--recovery"]),
        (&["--listen", "unix:s", "--id", "3"], &["--id"]),
    ] {
        let mut arguments = vec!["add", "mem:1M", "-n", &name];
        arguments.extend(options);
        let said = room.refusal(arguments);
        for word in words {
            assert!(said.contains(word), "{options:?}: {said}");
        }
    }
    Ok(())
}
