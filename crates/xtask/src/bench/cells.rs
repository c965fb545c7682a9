//! Answers for what is measured: the loads, the devices under them, the bars they are held to.

/// One load.
#[derive(Debug, PartialEq, Eq)]
pub struct Cell {
    /// Its name on the command line and in tables.
    pub name: &'static str,
    /// fio's `--rw`.
    pub rw: &'static str,
    /// fio's `--bs`.
    pub block: &'static str,
    /// fio's `--iodepth`.
    pub depth: u32,
    /// I/Os of one sample: a third of a guest second or more, for fio tells milliseconds.
    pub ios: u32,
}

/// Devices that are measured in one boot, with one table.
#[derive(Debug)]
pub struct Group {
    /// Its name on the page.
    pub name: &'static str,
    /// What the page says of its loads and devices.
    pub about: &'static str,
    /// The loads.
    pub cells: &'static [Cell],
    /// The devices under them.
    pub devices: &'static [Device],
    /// What they are held to.
    pub bars: &'static [Bar],
}

/// The groups of the VM part.
pub const GROUPS: &[Group] = &[
    Group { name: "Over memory", about: ABOUT, cells: CELLS, devices: DEVICES, bars: BARS },
    Group {
        name: "Over NBD",
        about: NBD_ABOUT,
        cells: NBD_CELLS,
        devices: NBD_DEVICES,
        bars: NBD_BARS,
    },
];

const ABOUT: &str = "\
The backing device is memory (`null_blk`, 64 MiB, 4 KiB blocks, filled) that completes an I/O where
it is submitted.

| load | fio |
|---|---|
| 4k-qd1, 4k-qd2 | `--rw=randread --bs=4k --iodepth=1` or `2`, 20000 I/Os |
| 4k-qd32-read, 4k-qd32-write | `--rw=randread` or `randwrite`, `--bs=4k --iodepth=32`, 20000 I/Os |
| 64k-qd8 | `--rw=randread --bs=64k --iodepth=8`, 8000 I/Os |
| 1m-read, 1m-write | `--rw=read` or `write`, `--bs=1M --iodepth=4`, 600 I/Os |

`bare` is the floor: a ublk server in C that is nothing but its loop
(crates/xtask/src/bench/bare.c). `kublk` is the kernel's own test server (zero copy by automatic
registration), `rublk` the one of libublk-rs (zero copy). `file` is a devsplice device over one
backing device, `stripe` over two, `stack` a `linear` over such a stripe, `mirror` one over two that
are in sync (`dm-mirror` is the kernel's, without a log on disk); the suffix names a forced data
path, `many-at-a-time` is `file` with `--low-depth off`. A read of devsplice's `null` fills the
pages with zeros; the other null servers leave them as they are.
";

const NBD_ABOUT: &str = "\
Devices of an export of nbdkit's memory plugin (64 MiB, filled) over a Unix socket, a server each.
What nbdkit does is in the figures. `nbd.ko` is the kernel's own client with one connection, as
`nbd-client` sets it up; `nbd` is devsplice over ublk, with one connection as well, `nbd-simple` the
same with `replies=simple`, as `nbd.ko` has them.

| load | fio |
|---|---|
| 4k-qd1-read, 4k-qd1-write | `--rw=randread` or `randwrite`, `--bs=4k --iodepth=1`, 8000 I/Os |
| 4k-qd32-read, 4k-qd32-write | the same, `--iodepth=32`, 16000 I/Os |
| 64k-read, 64k-write | the same, `--bs=64k --iodepth=8`, 3000 I/Os |
| 1m-read, 1m-write | `--rw=read` or `write`, `--bs=1M --iodepth=4`, 300 I/Os |
";

/// The devices of all groups.
pub fn devices() -> impl Iterator<Item = &'static Device> {
    GROUPS.iter().flat_map(|group| group.devices)
}

/// The loads over memory.
const CELLS: &[Cell] = &[
    cell("4k-qd1", "randread", "4k", 1, 20_000),
    cell("4k-qd2", "randread", "4k", 2, 20_000),
    cell("4k-qd32-read", "randread", "4k", 32, 20_000),
    cell("4k-qd32-write", "randwrite", "4k", 32, 20_000),
    cell("64k-qd8", "randread", "64k", 8, 8000),
    cell("1m-read", "read", "1M", 4, 600),
    cell("1m-write", "write", "1M", 4, 600),
];

/// The loads over NBD.
const NBD_CELLS: &[Cell] = &[
    cell("4k-qd1-read", "randread", "4k", 1, 8000),
    cell("4k-qd1-write", "randwrite", "4k", 1, 8000),
    cell("4k-qd32-read", "randread", "4k", 32, 16_000),
    cell("4k-qd32-write", "randwrite", "4k", 32, 16_000),
    cell("64k-read", "randread", "64k", 8, 3000),
    cell("64k-write", "randwrite", "64k", 8, 3000),
    cell("1m-read", "read", "1M", 4, 300),
    cell("1m-write", "write", "1M", 4, 300),
];

const fn cell(
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    ios: u32,
) -> Cell {
    Cell { name, rw, block, depth, ios }
}

/// Who made a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// devsplice.
    Ours,
    /// The same stack over a second build of devsplice, named with `--against`.
    Against,
    /// Somebody else's, the kernel's own included.
    Peer,
}

/// A device: the command that makes it, and where it then is.
///
/// In the command `{0}` and `{1}` stand for backing devices, `{id}` for a number of its own, and
/// the first word for the program of that name that the bench has found or built.
#[derive(Debug)]
pub struct Device {
    /// Its name on the command line and in tables.
    pub name: &'static str,
    /// Whose it is.
    pub whose: Whose,
    /// Backing devices that it takes.
    pub legs: usize,
    /// The command, word by word; none for the backing device itself.
    pub make: &'static [&'static str],
    /// Its node.
    pub node: &'static str,
    /// Commands before that one and after it, if it needs any.
    pub around: [&'static [&'static str]; 2],
}

macro_rules! add {
    ($program:literal, $path:literal, $stack:literal $(, $more:literal)*) => {
        &[
            $program,
            "add",
            "--export",
            "ublk",
            "--data-path",
            $path,
            "--queues",
            "1",
            "--depth",
            "64",
            "--id",
            "{id}",
            "--name",
            "b{id}",
            $($more,)*
            $stack,
        ]
    };
}

const fn device(
    name: &'static str,
    whose: Whose,
    legs: usize,
    make: &'static [&'static str],
    node: &'static str,
) -> Device {
    Device { name, whose, legs, make, node, around: [&[], &[]] }
}

/// A mirror: it is formatted before, and in sync and known to be equal when it is measured.
const MIRROR: Device = Device {
    around: [
        &["devsplice", "format", "mirror({0}, {1})"],
        &["devsplice", "tell", "b{id}", "mirror", "check"],
    ],
    ..device("mirror", Whose::Ours, 2, add!("devsplice", "auto-register", "mirror({0}, {1})"), UBLK)
};

const UBLK: &str = "/dev/ublkb{id}";
const DM: &str = "/dev/mapper/bench{id}";

/// The devices over memory; each is made over backing devices of its own.
#[rustfmt::skip]
const DEVICES: &[Device] = &[
    device("null_blk", Whose::Peer, 1, &[], "{0}"),
    device("loop", Whose::Peer, 1,
        &["losetup", "--direct-io=on", "/dev/loop0", "{0}"], "/dev/loop0"),
    device("dm-linear", Whose::Peer, 1,
        &["dmsetup", "create", "--noudevsync", "--noudevrules", "bench{id}", "--table",
          "0 131072 linear {0} 0"], DM),
    device("dm-stripe", Whose::Peer, 2,
        &["dmsetup", "create", "--noudevsync", "--noudevrules", "bench{id}", "--table",
          "0 262144 striped 2 128 {0} 0 {1} 0"], DM),
    device("dm-mirror", Whose::Peer, 2,
        &["dmsetup", "create", "--noudevsync", "--noudevrules", "bench{id}", "--table",
          "0 131072 mirror core 2 1024 nosync 2 {0} 0 {1} 0"], DM),
    device("bare", Whose::Peer, 1, &["bare", "{id}", "{0}"], UBLK),
    device("kublk", Whose::Peer, 1,
        &["kublk", "add", "-t", "loop", "--auto_zc", "-q", "1", "-d", "64", "-n", "{id}", "{0}"],
        UBLK),
    device("kublk-batch", Whose::Peer, 1,
        &["kublk", "add", "-t", "loop", "--auto_zc", "-b", "-q", "1", "-d", "64", "-n", "{id}",
          "{0}"], UBLK),
    device("kublk-null", Whose::Peer, 0,
        &["kublk", "add", "-t", "null", "--auto_zc", "-q", "1", "-d", "64", "-n", "{id}"], UBLK),
    device("rublk", Whose::Peer, 1,
        &["rublk", "add", "loop", "-z", "-q", "1", "-d", "64", "-n", "{id}", "-f", "{0}"], UBLK),
    device("rublk-null", Whose::Peer, 0,
        &["rublk", "add", "null", "-z", "-q", "1", "-d", "64", "-n", "{id}"], UBLK),
    device("file", Whose::Ours, 1, add!("devsplice", "auto-register", "{0}"), UBLK),
    device("batch", Whose::Ours, 1,
        add!("devsplice", "auto-register", "{0}", "--batch", "on"), UBLK),
    device("many-at-a-time", Whose::Ours, 1,
        add!("devsplice", "auto-register", "{0}", "--low-depth", "off"), UBLK),
    device("null", Whose::Ours, 0, add!("devsplice", "auto-register", "null(size=64M)"), UBLK),
    device("stripe", Whose::Ours, 2,
        add!("devsplice", "auto-register", "stripe(chunk=64k, {0}, {1})"), UBLK),
    device("stack", Whose::Ours, 2,
        add!("devsplice", "auto-register", "linear(stripe(chunk=64k, {0}, {1}))"), UBLK),
    MIRROR,
    device("file-register", Whose::Ours, 1, add!("devsplice", "register", "{0}"), UBLK),
    device("file-user-copy", Whose::Ours, 1, add!("devsplice", "user-copy", "{0}"), UBLK),
    device("file-copy", Whose::Ours, 1, add!("devsplice", "copy", "{0}"), UBLK),
    device("other-file", Whose::Against, 1, add!("other", "auto-register", "{0}"), UBLK),
    device("other-null", Whose::Against, 0, add!("other", "auto-register", "null(size=64M)"), UBLK),
    device("other-stack", Whose::Against, 2,
        add!("other", "auto-register", "linear(stripe(chunk=64k, {0}, {1}))"), UBLK),
];

/// A server of memory for a device of its own.
const SERVER: &[&str] = &["nbdkit", "--unix", "/run/bench-{id}.socket", "memory", "64M"];
/// What lies in its memory has to be data.
const FILL: &[&str] = &["fio", "--name=fill", "--rw=write", "--bs=1M", "--filename={node}"];

/// A device over NBD.
const fn over_nbd(
    name: &'static str,
    whose: Whose,
    make: &'static [&'static str],
    node: &'static str,
) -> Device {
    Device { around: [SERVER, FILL], ..device(name, whose, 0, make, node) }
}

/// The devices over NBD; each is made over a server of its own.
#[rustfmt::skip]
const NBD_DEVICES: &[Device] = &[
    over_nbd("nbd.ko", Whose::Peer,
        &["nbd-client", "-unix", "/run/bench-{id}.socket", "/dev/nbd0"], "/dev/nbd0"),
    over_nbd("nbd", Whose::Ours,
        add!("devsplice", "auto-register", "nbd+unix:///?socket=/run/bench-{id}.socket"), UBLK),
    over_nbd("nbd-simple", Whose::Ours,
        add!("devsplice", "auto-register",
            "nbd(\"nbd+unix:///?socket=/run/bench-{id}.socket\", replies=simple)"), UBLK),
    over_nbd("other-nbd", Whose::Against,
        add!("other", "auto-register", "nbd+unix:///?socket=/run/bench-{id}.socket"), UBLK),
];

/// An upper bound: `what` costs at most `factor` times what `against` costs, in these cells.
#[derive(Debug)]
pub struct Bar {
    /// The device that is held to it.
    pub what: &'static str,
    /// The device that it is compared with.
    pub against: &'static str,
    /// The cells, by the start of their names.
    pub cells: &'static str,
    /// The bound.
    pub factor: f64,
}

const fn bar(what: &'static str, against: &'static str, cells: &'static str, factor: f64) -> Bar {
    Bar { what, against, cells, factor }
}

/// What devsplice has to reach.
const BARS: &[Bar] = &[
    bar("file", "loop", "4k-qd1", 1.15),
    bar("file", "loop", "4k-qd32", 1.07),
    bar("file", "loop", "64k", 1.07),
    bar("file", "loop", "1m", 0.95),
    bar("file", "kublk", "", 1.0),
    bar("file", "rublk", "", 1.0),
    bar("file", "bare", "", 1.03),
    bar("null", "kublk-null", "", 1.0),
    bar("null", "rublk-null", "", 1.0),
    bar("stack", "file", "", 1.03),
    bar("batch", "file", "4k-qd32-read", 0.97),
    bar("batch", "loop", "4k-qd32", 1.03),
    bar("file", "many-at-a-time", "4k-qd1", 0.97),
    bar("mirror", "file", "4k-qd32-write", 1.6),
];

/// The same over NBD.
const NBD_BARS: &[Bar] = &[
    bar("nbd", "nbd.ko", "4k", 1.0),
    bar("nbd", "nbd.ko", "64k", 0.7),
    bar("nbd", "nbd.ko", "1m", 0.7),
];
