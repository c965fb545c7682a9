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

/// The loads of the VM part.
pub const CELLS: &[Cell] = &[
    cell("4k-qd1", "randread", "4k", 1, 20_000),
    cell("4k-qd2", "randread", "4k", 2, 20_000),
    cell("4k-qd32-read", "randread", "4k", 32, 20_000),
    cell("4k-qd32-write", "randwrite", "4k", 32, 20_000),
    cell("64k-qd8", "randread", "64k", 8, 8000),
    cell("1m-read", "read", "1M", 4, 600),
    cell("1m-write", "write", "1M", 4, 600),
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

/// The devices of the VM part; each is made over backing devices of its own.
#[rustfmt::skip]
pub const DEVICES: &[Device] = &[
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
pub const BARS: &[Bar] = &[
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
