//! Answers for the command line: every command, option and help text, defined once.

use clap::{Args, Parser, Subcommand, ValueEnum};
use devsplice_exports::fuse;
use devsplice_exports::ublk::{DataPath, Recovery};
use serde::{Deserialize, Serialize};

mod add;
mod many;
mod tls;
mod transfer;
mod ublk;
mod watch;

pub use many::{Events, Load, Save, Serve};
pub use tls::TlsOptions;
pub use transfer::{Bench, Compare, Copy, Map, Progress, Requests, RwChoice};
pub use ublk::Ublk;
pub use watch::{Explain, Metrics, OpChoice, SortChoice, Top, UdevInfo};

use crate::sandbox::Choice;

const AFTER_HELP: &str = "\
Exit codes: 0 done; 1 it failed, the message says what and what to do (doctor: no disk can be made
here); 2 the command line makes no sense.
Stacks: docs/stack.md. State: /run/devsplice.";

const COPY_HELP: &str = "\
What is written is flushed before the command ends. Exit codes: 0 copied (and the same, with
--verify); 1 it failed, or differs; 2 the command line makes no sense.";

const COMPARE_HELP: &str = "\
Exit codes: 0 the same; 1 they differ; 2 they could not be compared, or the command line makes no
sense.";

/// Block devices from a stack of layers, served from user space without copying.
#[derive(Debug, Parser)]
#[command(name = "devsplice", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = AFTER_HELP)]
pub struct Options {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a disk of a stack and serve it in the background.
    Add(Add),
    /// Start a process that serves many disks, with a fixed number of threads.
    Serve(Serve),
    /// Serve a disk again whose server is gone, as it was before.
    Recover(Recover),
    /// Serve a ublk device that another tool has made and that has lost its server.
    Adopt(Adopt),
    /// Have this very program take over from the one that serves a disk, while it is used.
    Upgrade(Upgrade),
    /// Finish what a disk has in flight, have the kernel hold what comes, let go of what is below.
    /// Clients of a disk over NBD are disconnected.
    #[command(alias = "suspend")]
    Quiesce(Quiesce),
    /// Go on with a disk that was quiesced.
    Resume(Resume),
    /// Have a disk go on with another stack, unnoticed; clients over NBD are disconnected.
    Swap(Swap),
    /// Tell a disk's users of the size that it has by now; clients over NBD are disconnected.
    Resize(Resize),
    /// Stop serving a disk and remove it. Refused while it is mounted, held or (Linux 7.0) open,
    /// unless forced.
    #[command(alias = "stop")]
    Del(Del),
    /// Show the disks that are served here.
    List(List),
    /// Show one disk: what it is, how data moves, what was counted.
    #[command(alias = "status")]
    Info(Info),
    /// Print what all disks are and have counted, as Prometheus reads it.
    Metrics(Metrics),
    /// Show what all disks are doing, again and again.
    Top(Top),
    /// Have a layer of a disk do something, as docs/stack.md says for it.
    Tell(Tell),
    /// Follow what happens to disks: made, removed, restarted, resized, a leg dropped, I/O stuck.
    Events(Events),
    /// Write all disks down as a configuration that load takes.
    Save(Save),
    /// Make the disks of a configuration.
    Load(Load),
    /// Write fresh metadata for the layer at the top of a stack, a mirror for example.
    Format(Format),
    /// Copy one stack, device or file to another.
    #[command(after_help = COPY_HELP)]
    Copy(Copy),
    /// Compare two stacks, devices or files byte by byte.
    #[command(after_help = COMPARE_HELP)]
    Compare(Compare),
    /// Show which ranges of a stack hold data, and which read as zeros.
    Map(Map),
    /// Measure a stack: requests per second and how long they take.
    Bench(Bench),
    /// Show where each byte of a request goes, and how often it is copied. Makes nothing.
    Explain(Explain),
    /// Show what this kernel offers.
    Features(Features),
    /// Check this machine and what is served on it; say what to do about what is wrong.
    Doctor(Doctor),
    /// Remove what dead servers left: state, links, ublk and loop devices that nobody can use.
    Gc(Gc),
    /// Print what udev's rules ask about a node.
    #[command(hide = true)]
    UdevInfo(UdevInfo),
    /// Write manual pages, one per command.
    Man(Man),
    /// Print the completion script of a shell.
    Completions(Completions),
}

/// Which front end makes the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Export {
    /// ublk where the kernel has it, else FUSE + loop.
    Auto,
    /// /dev/ublkbN; Linux 6.0 or later.
    Ublk,
    /// /dev/loopN over a file that this process serves; any Linux from 5.19.
    Fuse,
    /// No device, but a server that NBD clients connect to, at --listen.
    Nbd,
}

impl Export {
    /// The word that users see and type.
    pub fn name(self) -> &'static str {
        match self {
            Export::Auto => "auto",
            Export::Ublk => "ublk",
            Export::Fuse => "fuse",
            Export::Nbd => "nbd",
        }
    }
}

/// `--data-path`, as typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathChoice {
    /// The best that the kernel offers.
    Auto,
    /// The kernel puts request pages into slots by itself: no copy (Linux 6.16).
    AutoRegister,
    /// A command per request does that: no copy (Linux 6.15).
    Register,
    /// Data is read and written through the character device: one copy (Linux 6.5).
    UserCopy,
    /// The kernel copies to and from our memory: one copy (Linux 6.0).
    Copy,
    /// As copy, but a write comes without its data, which is asked for: another round trip.
    GetData,
    /// FUSE over io_uring with request pages in slots: no copy (Linux 7.3, if it is switched on).
    FuseZeroCopy,
    /// FUSE over io_uring: one copy (Linux 6.14, if it is switched on).
    FuseUring,
    /// FUSE by /dev/fuse: one copy.
    FuseCopy,
}

impl PathChoice {
    /// The path of FUSE that is forced, if one is.
    pub fn fuse(self) -> Option<fuse::DataPath> {
        match self {
            PathChoice::FuseZeroCopy => Some(fuse::DataPath::ZeroCopy),
            PathChoice::FuseUring => Some(fuse::DataPath::Entries),
            PathChoice::FuseCopy => Some(fuse::DataPath::Copy),
            _ => None,
        }
    }

    /// The path of ublk that is forced, if one is.
    pub fn forced(self) -> Option<DataPath> {
        match self {
            PathChoice::Auto
            | PathChoice::FuseZeroCopy
            | PathChoice::FuseUring
            | PathChoice::FuseCopy => None,
            PathChoice::AutoRegister => Some(DataPath::AutoRegister),
            PathChoice::Register => Some(DataPath::Register),
            PathChoice::UserCopy => Some(DataPath::UserCopy),
            PathChoice::Copy | PathChoice::GetData => Some(DataPath::Copy),
        }
    }
}

/// `--recovery`, as typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecoveryChoice {
    /// reissue where the kernel and the stack allow it, else off.
    Auto,
    /// The disk stays; what was in flight is done again, new requests wait (Linux 6.1).
    Reissue,
    /// The disk stays; what was in flight fails, new requests wait (Linux 6.1).
    Fail,
    /// The disk stays; all requests fail until it is served again (Linux 6.13).
    FailFast,
    /// The disk goes with its server.
    Off,
}

impl RecoveryChoice {
    /// The policy that is asked for, if one is.
    pub fn forced(self) -> Option<Recovery> {
        match self {
            RecoveryChoice::Auto => None,
            RecoveryChoice::Reissue => Some(Recovery::Reissue),
            RecoveryChoice::Fail => Some(Recovery::Fail),
            RecoveryChoice::FailFast => Some(Recovery::FailFast),
            RecoveryChoice::Off => Some(Recovery::Off),
        }
    }
}

/// `--batch`, as typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchChoice {
    /// If there are more I/O threads than queues.
    Auto,
    /// One command for all that is finished at a time: less work where much is in flight, a little
    /// more where there is not.
    On,
    /// A command per request.
    Off,
}

impl BatchChoice {
    /// What is forced, if anything is.
    pub fn forced(self) -> Option<bool> {
        match self {
            BatchChoice::Auto => None,
            BatchChoice::On => Some(true),
            BatchChoice::Off => Some(false),
        }
    }
}

/// `--low-depth`, as typed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LowDepthChoice {
    /// On the data path auto-register without batches, if the stack ends in files and no layer
    /// works beside requests.
    #[default]
    Auto,
    /// Less work for a request that comes alone, a little more if it is not one piece of a file.
    On,
    /// Like requests that come many at a time.
    Off,
}

impl LowDepthChoice {
    /// What is forced, if anything is.
    pub fn forced(self) -> Option<bool> {
        match self {
            LowDepthChoice::Auto => None,
            LowDepthChoice::On => Some(true),
            LowDepthChoice::Off => Some(false),
        }
    }
}

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub struct Add {
    /// What the disk is made of: an expression such as 'stripe(/a.img, /b.img)', or a .toml file.
    pub stack: String,
    /// What to call it (letters, digits, . _ -); the first free of d0, d1, ... if not given.
    #[arg(long, short = 'n')]
    pub name: Option<String>,
    /// Which front end makes the disk.
    #[arg(long, value_enum, default_value = "auto")]
    pub export: Export,
    #[command(flatten)]
    #[serde(flatten)]
    pub ublk: Ublk,
    /// Where NBD clients connect: unix:PATH, nbd://HOST:PORT, nbd+unix:///?socket=PATH,
    /// nbd+vsock://any:PORT, systemd:NAME for what it has passed. More than once for more places.
    /// Says `--export nbd`.
    #[arg(long, value_name = "URI")]
    #[serde(default)]
    pub listen: Vec<String>,
    /// Who may connect by NBD: uid:1000, 192.0.2.7, 192.0.2.0/24, cid:3. More than once for more.
    #[arg(long, value_name = "WHO")]
    #[serde(default)]
    pub allow: Vec<String>,
    /// Let NBD clients that come over a network change data, too.
    #[arg(long)]
    #[serde(default)]
    pub writable: bool,
    /// Most NBD connections at a time.
    #[arg(long, value_name = "N", default_value_t = CONNECTIONS,
        value_parser = clap::value_parser!(u16).range(1..=256))]
    #[serde(default = "connections")]
    pub connections: u16,
    /// TLS for NBD clients.
    #[command(flatten)]
    #[serde(flatten)]
    pub tls: TlsOptions,
    /// How data moves between a ublk request and its place.
    #[arg(long, value_enum, default_value = "auto")]
    pub data_path: PathChoice,
    /// Whether ublk's requests come and go in batches (Linux 7.0).
    #[arg(long, value_enum, default_value = "auto")]
    pub batch: BatchChoice,
    /// Whether ublk is served for requests that come one at a time.
    #[arg(long, value_enum, default_value = "auto")]
    #[serde(default)]
    pub low_depth: LowDepthChoice,
    /// Number of the ublk device: 3 for /dev/ublkb3. The first free one if not given.
    #[arg(long, value_name = "N")]
    pub id: Option<u32>,
    /// Queues [default: ublk one per CPU, at most 4; FUSE one].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: Option<u16>,
    /// I/O threads that serve the queues; more than queues on ublk alone [default: one each].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
    /// Requests in flight per queue.
    #[arg(long, value_name = "N", default_value_t = 128,
        value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub depth: u16,
    /// Let each I/O thread run on any CPU, not only those whose requests it serves.
    #[arg(long)]
    pub no_affinity: bool,
    /// Refuse everything that changes data, whatever the stack allows.
    #[arg(long, short = 'r')]
    pub read_only: bool,
    /// Do not look for partitions on the disk.
    #[arg(long)]
    pub no_part_scan: bool,
    /// A serial number to show for it.
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,
    /// Report requests that have been below for this many seconds; 0 for never.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub stuck_after: u32,
    /// What becomes of the disk when its server dies. It is served again at once, by itself.
    #[arg(long, value_enum, default_value = "auto")]
    pub recovery: RecoveryChoice,
    /// Measure latencies below each layer; info, metrics and top show them.
    #[arg(long)]
    #[serde(default)]
    pub latency: bool,
    /// Whether the server may do only what servers do, once it is set up.
    #[arg(long, value_enum, default_value = "on")]
    #[serde(default)]
    pub sandbox: Choice,
    /// Have this server of many disks serve it (devsplice serve), rather than a process of its own.
    #[arg(long, value_name = "NAME", conflicts_with = "foreground")]
    #[serde(skip)]
    pub server: Option<String>,
    /// Where a disk of this name waits for a server, recover it; where it has one, upgrade it.
    #[arg(long, requires = "name", conflicts_with_all = ["server", "foreground"])]
    #[serde(skip)]
    pub or_recover: bool,
    /// Serve from this process, until a signal; messages go to standard error.
    #[arg(long, short = 'f')]
    #[serde(skip)]
    pub foreground: bool,
    /// Print what was made as JSON.
    #[arg(long)]
    #[serde(skip)]
    pub json: bool,
}

/// NBD connections at a time, unless told otherwise.
pub const CONNECTIONS: u16 = 16;

fn connections() -> u16 {
    CONNECTIONS
}

#[derive(Args, Clone, Debug)]
pub struct Recover {
    /// Its name.
    #[arg(required_unless_present = "all")]
    pub name: Option<String>,
    /// Every disk whose server is gone and that the kernel still has.
    #[arg(long, short = 'a', conflicts_with = "name")]
    pub all: bool,
    /// Print what is served again as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Adopt {
    /// Its number, or its device node.
    pub device: String,
    /// The stack that it was made of, as for add.
    pub stack: String,
    /// What to call it; the first free of d0, d1, ... if not given.
    #[arg(long, short = 'n')]
    pub name: Option<String>,
    /// Report requests that have been below for this many seconds; 0 for never.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub stuck_after: u32,
    /// Print what is served as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Upgrade {
    /// Its name, or its device node.
    #[arg(required_unless_present = "all")]
    pub name: Option<String>,
    /// Every disk that is served here.
    #[arg(long, short = 'a', conflicts_with = "name")]
    pub all: bool,
    /// The program that is to take over, rather than this one.
    #[arg(long, value_name = "PATH")]
    pub binary: Option<std::path::PathBuf>,
    /// Print what was done as JSON, a line for each disk.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Quiesce {
    /// Its name, or its device node.
    pub name: String,
}

#[derive(Args, Clone, Debug)]
pub struct Resume {
    /// Its name, or its device node.
    pub name: String,
}

#[derive(Args, Clone, Debug)]
pub struct Swap {
    /// Its name, or its device node.
    pub name: String,
    /// What it is to be made of from now on, as for add.
    pub stack: String,
    /// Even if that is smaller: what lies beyond is cut off from its users.
    #[arg(long)]
    pub shrink: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Resize {
    /// Its name, or its device node.
    pub name: String,
    /// Even if that is smaller: what lies beyond is cut off from its users.
    #[arg(long)]
    pub shrink: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Del {
    /// Its name, or its device node.
    #[arg(required_unless_present_any = ["all", "server"])]
    pub name: Option<String>,
    /// Remove it even while it is mounted, held or open; whoever uses it gets errors.
    #[arg(long)]
    pub force: bool,
    /// Remove every disk that is served here.
    #[arg(long, short = 'a', conflicts_with = "name")]
    pub all: bool,
    /// Remove every disk of this server of many, and end it.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["name", "all"])]
    pub server: Option<String>,
}

#[derive(Args, Clone, Debug)]
pub struct List {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Info {
    /// Its name, or its device node.
    pub name: String,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Format {
    /// What is to be formatted: an expression such as 'mirror(/dev/a, /dev/b)', or a .toml file.
    pub stack: String,
    /// Overwrite such metadata where there is some.
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Tell {
    /// The disk's name, or its device node.
    pub name: String,
    /// The layer: its driver, or driver#2 for the second; its own name in a TOML file.
    pub layer: String,
    /// What it is to do.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<String>,
    /// How long to wait for the answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
}

#[derive(Args, Clone, Debug)]
pub struct Features {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Doctor {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Gc {
    /// Only say what would be removed.
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Also disks that wait for a server: the requests that the kernel holds for them fail.
    #[arg(long)]
    pub waiting: bool,
    /// Also ublk devices without a server that other tools have made.
    #[arg(long)]
    pub foreign: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Clone, Debug)]
pub struct Man {
    /// The directory to write them to; it must be there.
    pub dir: std::path::PathBuf,
}

#[derive(Args, Clone, Debug)]
pub struct Completions {
    /// Which shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}
