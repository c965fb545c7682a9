//! A test VM: a stock kernel with the host's / as a copy-on-write root, and one command in it.

mod initramfs;
mod lock;
mod qemu;
mod virtiofs;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Args;

use crate::kernel::{self, Kernel, Scratch};
use crate::proc::{self, Guard};
use crate::{Fallible, deps};
use initramfs::{Archive, Modules, Presence, module_image};
use lock::Slot;
use qemu::{Accel, Machine, QEMU};
use virtiofs::{Daemon, Share};

/// Exit code when the command ran out of time.
pub const RC_TIMEOUT: u8 = 124;
/// Exit code when there was no VM, or it died before the command ended.
pub const RC_NO_VM: u8 = 125;

/// What booting takes from this machine.
const PROGRAMS: &[&str] = &[QEMU, "busybox", "modprobe"];
/// What mounting the root takes; on some kernels all of it is built in.
const ROOT_MODULES: &[&str] = &["virtio_pci", "virtio_console", "virtiofs", "overlay"];
/// What tests use, where the kernel has it.
const TEST_MODULES: &[&str] =
    &["virtio_blk", "loop", "null_blk", "ublk_drv", "fuse", "brd", "dm_mod", "ext4"];

const INIT: &str = include_str!("vm/init.sh");
const GUEST: &str = include_str!("vm/guest.sh");

/// Run a command in a virtual machine with a stock Debian kernel.
///
/// The command runs as root in this directory and with this environment; the guest sees this
/// machine's files and keeps its changes to itself. Its output comes as it is written and its
/// exit code is returned: 124 when the time ran out, 125 when the machine did not boot or died.
/// A single argument is a line for the shell.
#[derive(Args)]
pub struct Options {
    /// Kernel: a Debian series (7.3, 6.18, 6.12, 6.1, ...), fetched once and kept in the cache,
    /// or a directory with vmlinuz, kernel/ and modules.dep in it
    #[arg(long, value_name = "SERIES|DIR", default_value = "7.3")]
    pub kernel: String,
    /// Number of CPUs
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub cpus: u32,
    /// Memory
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub mem: u32,
    /// How the guest's instructions are run
    #[arg(long, value_enum, default_value_t = Accel::Tcg)]
    pub accel: Accel,
    /// Seconds from power-on after which the machine is ended
    #[arg(long, value_name = "S", default_value_t = 600)]
    pub timeout: u64,
    /// Directory that the guest may write to; repeatable
    #[arg(long, value_name = "DIR")]
    pub rw: Vec<PathBuf>,
    /// Disk image, created sparse when missing: /dev/vda, then /dev/vdb, ...
    #[arg(long, value_name = "PATH:SIZE")]
    pub disk: Vec<String>,
    /// Throw-away ext4 file system of that size on /scratch, such as 4G
    #[arg(long, value_name = "SIZE")]
    pub scratch: Option<String>,
    /// More modules to load before the command
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub mods: Vec<String>,
    /// Additions to the kernel's command line
    #[arg(long, value_name = "ARGS", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// Keep the run's directory (console, logs, scratch disk) and say where it is
    #[arg(long)]
    pub keep: bool,
    /// Say what is being done and how long it took
    #[arg(long)]
    pub verbose: bool,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// How often a machine that died before the command began is booted again: emulation loses a race
/// against the kernel's patching of its own code about once in thirty boots (seen with QEMU 7.2:
/// an int3 trap in an idle CPU). Once the command runs nothing is repeated.
const BOOTS: u32 = 4;
/// How long a boot may take; on an idle machine it is 3 seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How a run ended.
#[derive(Clone, Copy)]
enum End {
    /// The command's exit code.
    Command(u8),
    /// Out of time.
    Timeout,
    /// The machine ended by itself while the command ran.
    Died,
    /// The machine ended, or stood still, before the command began.
    NoBoot,
    /// A signal asked for the end.
    Signal(u8),
}

/// Whether a machine can be booted here, or why not: what is missing can be installed by root only.
pub fn available() -> Fallible<()> {
    if proc::is_root() {
        return Ok(());
    }
    match deps::missing(PROGRAMS).as_slice() {
        [] if Daemon::probe().is_none() => Err("no virtiofsd that runs without root".into()),
        [] => Ok(()),
        missing => Err(format!("not installed: {}", missing.join(", "))),
    }
}

/// Boots the machine, runs the command and returns its exit code.
pub fn run(options: &Options) -> Fallible<u8> {
    deps::ensure(PROGRAMS)?;
    let daemon = Daemon::find()?;
    let kernel = kernel::find(&options.kernel)?;
    let slot = Slot::take(options.accel)?;
    let start = Instant::now();
    let run = Scratch::new(lock::run_directory())?;
    let disks = make_disks(options, &run.0)?;
    let scratch = options.scratch.is_some().then(|| disk_name(disks.len() - 1));
    let archive = build_initramfs(options, &kernel, scratch.as_deref())?;
    let image = run.0.join("initramfs");
    fs::write(&image, archive).map_err(|e| format!("cannot write {}: {e}", image.display()))?;
    let mut boots = 1;
    let end = loop {
        let end = boot(options, &daemon, &kernel, &run.0, &disks)?;
        if !matches!(end, End::NoBoot) || boots == BOOTS {
            break end;
        }
        boots += 1;
        eprintln!("xtask: the machine did not boot; trying again ({boots} of {BOOTS})");
    };
    drop(slot);
    let code = report(options, &run.0, end);
    if options.verbose {
        eprintln!("xtask: {:.1} s in all", start.elapsed().as_secs_f64());
    }
    if options.keep {
        let kept = run.0.with_file_name(format!("devsplice-vm.kept-{}", std::process::id()));
        fs::rename(&run.0, &kept).map_err(|e| format!("cannot keep {}: {e}", run.0.display()))?;
        eprintln!("xtask: kept {}", kept.display());
    }
    Ok(code)
}

/// Creates the disks that are missing; the scratch disk is the last one.
fn make_disks(options: &Options, run: &Path) -> Fallible<Vec<PathBuf>> {
    let mut disks = Vec::new();
    for disk in &options.disk {
        let (path, size) = disk.rsplit_once(':').ok_or(format!("--disk {disk}: not PATH:SIZE"))?;
        make_disk(Path::new(path), size)?;
        disks.push(PathBuf::from(path));
    }
    if let Some(size) = &options.scratch {
        let path = run.join("scratch");
        make_disk(&path, size)?;
        deps::ensure(&["mkfs.ext4"])?;
        let mkfs = proc::find_program("mkfs.ext4").ok_or("no mkfs.ext4")?;
        proc::run_quiet(Command::new(mkfs).args(["-q", "-F"]).arg(&path))?;
        disks.push(path);
    }
    Ok(disks)
}

fn make_disk(path: &Path, size: &str) -> Fallible<()> {
    if path.exists() {
        return Ok(());
    }
    let bytes = parse_size(size).ok_or_else(|| format!("{size}: not a size such as 4G"))?;
    let file = File::create(path).map_err(|e| format!("cannot create {}: {e}", path.display()))?;
    file.set_len(bytes).map_err(|e| format!("cannot size {} to {size}: {e}", path.display()))
}

/// `4G` is 4 * 2^30 bytes.
fn parse_size(size: &str) -> Option<u64> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match size[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The guest's name for its disk number `index`.
fn disk_name(index: usize) -> String {
    format!("/dev/vd{}", char::from(b'a' + (index % 26) as u8))
}

fn build_initramfs(options: &Options, kernel: &Kernel, scratch: Option<&str>) -> Fallible<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "modules"] {
        archive.directory(directory);
    }
    // The kernel wants a console before /init can make one.
    archive.device("dev/console", 5, 1);
    let busybox = proc::find_program("busybox").ok_or("no busybox")?;
    archive.file("bin/busybox", &module_image(&busybox)?);
    let modules = Modules::read(kernel)?;
    for (index, file) in modules.closure(ROOT_MODULES).iter().enumerate() {
        let name = file.rsplit('/').next().unwrap_or(file);
        let name = &name[..name.find(".ko").unwrap_or(name.len())];
        let image = module_image(&kernel.modules.join(file))?;
        archive.file(&format!("modules/{index:02}-{name}.ko"), &image);
    }
    archive.file("init", INIT.as_bytes());
    archive.file("guest.sh", GUEST.as_bytes());
    archive.file("config.sh", config(options, kernel, &modules, scratch)?.as_bytes());
    archive.file("env.sh", &environment());
    archive.file("cmd.sh", command_line(&options.command).as_bytes());
    Ok(archive.finish())
}

/// The variables that the guest's scripts work by.
fn config(
    options: &Options,
    kernel: &Kernel,
    modules: &Modules,
    scratch: Option<&str>,
) -> Fallible<String> {
    let wanted = TEST_MODULES.iter().copied().chain(options.mods.iter().map(String::as_str));
    let (mut load, mut absent) = (Vec::new(), Vec::new());
    for name in wanted {
        match modules.presence(name) {
            Presence::Loadable => load.push(name),
            Presence::Builtin => {}
            Presence::Absent => absent.push(name),
        }
    }
    if options.verbose {
        eprintln!("xtask: kernel {}, loading {}", kernel.release, load.join(" "));
        eprintln!("xtask: not in this kernel: {}", absent.join(" "));
    }
    let here = std::env::current_dir().map_err(|e| format!("no current directory: {e}"))?;
    let mut shares = String::new();
    for (index, directory) in options.rw.iter().enumerate() {
        let directory = quoted(&canonical(directory)?.to_string_lossy());
        shares += &format!("mkdir -p {directory}; mount -t virtiofs rw{index} {directory}; ");
    }
    Ok(format!(
        "modules_directory={}\nmodules={}\nscratch={}\ndirectory={}\ninode_limit={}\n\
         mount_shares() {{ {shares}:; }}\n",
        quoted(&kernel.modules.to_string_lossy()),
        quoted(&load.join(" ")),
        quoted(scratch.unwrap_or_default()),
        quoted(&here.to_string_lossy()),
        virtiofs::inode_limit().map_or(String::new(), |limit| limit.to_string()),
    ))
}

fn canonical(directory: &Path) -> Fallible<PathBuf> {
    directory.canonicalize().map_err(|e| format!("--rw {}: {e}", directory.display()))
}

/// This process's environment as a script.
fn environment() -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    const OWN: &[&[u8]] = &[b"_", b"PWD", b"OLDPWD", b"SHLVL"];
    let mut script = Vec::new();
    for (name, value) in std::env::vars_os() {
        let (name, value) = (name.as_bytes(), value.as_bytes());
        let is_letter = |byte: &u8| !byte.is_ascii_digit();
        let proper = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
        if OWN.contains(&name) || !name.iter().all(proper) || !name.first().is_some_and(is_letter) {
            continue;
        }
        script.extend_from_slice(b"export ");
        script.extend_from_slice(name);
        script.extend_from_slice(b"='");
        for &byte in value {
            match byte {
                b'\'' => script.extend_from_slice(b"'\\''"),
                _ => script.push(byte),
            }
        }
        script.extend_from_slice(b"'\n");
    }
    script
}

/// The command as a script: one argument is a line for the shell, several are words.
fn command_line(words: &[String]) -> String {
    match words {
        [line] => format!("{line}\n"),
        words => words.iter().map(|word| quoted(word) + " ").collect::<String>() + "\n",
    }
}

/// A word that the shell leaves alone.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A pipe into which QEMU writes one of the guest's ports.
fn port(name: &'static str) -> Fallible<(PipeReader, PipeWriter, (&'static str, PathBuf))> {
    let (reader, writer) = std::io::pipe().map_err(|e| format!("cannot make a pipe: {e}"))?;
    // QEMU opens our end by its name: no descriptor has to be inherited.
    let path = format!("/proc/{}/fd/{}", std::process::id(), writer.as_raw_fd());
    Ok((reader, writer, (name, PathBuf::from(path))))
}

/// Starts the daemons and the machine, and waits for the command's end.
fn boot(
    options: &Options,
    daemon: &Daemon,
    kernel: &Kernel,
    run: &Path,
    disks: &[PathBuf],
) -> Fallible<End> {
    let mut daemons = Vec::new();
    let mut shares = Vec::new();
    let mut share = |tag: String, directory: &Path, writable: bool| {
        let socket = run.join(format!("{tag}.socket"));
        let what = Share { directory, writable };
        daemons.push(daemon.share(&what, &socket, &run.join(format!("{tag}.log")))?);
        shares.push((tag, socket));
        Fallible::Ok(())
    };
    share("hostroot".into(), Path::new("/"), false)?;
    for (index, directory) in options.rw.iter().enumerate() {
        share(format!("rw{index}"), &canonical(directory)?, true)?;
    }
    let (out_reader, out_writer, out) = port("stdout")?;
    let (err_reader, err_writer, err) = port("stderr")?;
    let (control_reader, control_writer, control) = port("control")?;
    let machine = Machine {
        accel: options.accel,
        cpus: options.cpus,
        memory: options.mem,
        kernel: &kernel.image,
        initramfs: &run.join("initramfs"),
        append: &options.append,
        console: &run.join("console"),
        ports: &[out, err, control],
        shares: &shares,
        disks,
    };
    let cpu_help = proc::run_quiet(Command::new(QEMU).args(["-cpu", "help"]))?;
    let mut command = machine.command(&String::from_utf8_lossy(&cpu_help));
    let log = run.join("qemu.log");
    let log = File::create(&log).map_err(|e| format!("cannot create {}: {e}", log.display()))?;
    let mut qemu = Guard::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log))?;
    let pumps = [pump(out_reader, std::io::stdout()), pump(err_reader, std::io::stderr())];
    let end = wait(options, &mut qemu, &listen(control_reader));
    qemu.kill();
    drop((out_writer, err_writer, control_writer));
    for pump in pumps {
        // A pump only ends early when our own output is closed; then nobody is listening.
        let _ = pump.join();
    }
    end
}

/// Copies a port to our own output as it comes; keeps reading when that is closed.
fn pump(mut from: PipeReader, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        let mut open = true;
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            open = open && to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_ok();
        }
    })
}

/// Reads the guest's reports: lines of a word and a number.
fn listen(control: PipeReader) -> Receiver<(String, String)> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(control).lines() {
            let Ok(line) = line else { return };
            let (word, value) = line.split_once(' ').unwrap_or((&line, ""));
            if sender.send((word.to_owned(), value.to_owned())).is_err() {
                return;
            }
        }
    });
    receiver
}

fn wait(
    options: &Options,
    qemu: &mut Guard,
    reports: &Receiver<(String, String)>,
) -> Fallible<End> {
    let start = Instant::now();
    let timeout = Duration::from_secs(options.timeout);
    let mut booted = false;
    loop {
        match reports.recv_timeout(proc::POLL) {
            Ok((word, value)) if word == "rc" => {
                return Ok(End::Command(value.parse().unwrap_or(RC_NO_VM)));
            }
            Ok((_, value)) => {
                booted = true;
                if options.verbose {
                    let wall = start.elapsed().as_secs_f64();
                    eprintln!("xtask: booted in {value} s of guest time, {wall:.1} s of wall time");
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => proc::nap(),
        }
        if let Some(signal) = proc::interrupted() {
            return Ok(End::Signal(signal));
        }
        if qemu.try_wait()?.is_some() {
            return Ok(if booted { End::Died } else { End::NoBoot });
        }
        match start.elapsed() {
            elapsed if elapsed > timeout => return Ok(End::Timeout),
            elapsed if elapsed > BOOT_LIMIT && !booted => return Ok(End::NoBoot),
            _ => {}
        }
    }
}

/// Tells what went wrong, and turns the end into an exit code.
fn report(options: &Options, run: &Path, end: End) -> u8 {
    let console = fs::read(run.join("console")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    let code = match end {
        End::Command(code) => code,
        End::Signal(signal) => 128 + signal,
        End::Timeout => {
            eprintln!("xtask: the command took longer than --timeout {} s", options.timeout);
            RC_TIMEOUT
        }
        End::Died | End::NoBoot => {
            eprintln!("xtask: the machine ended before the command did");
            let log = fs::read_to_string(run.join("qemu.log")).unwrap_or_default();
            eprint!("{log}");
            RC_NO_VM
        }
    };
    let unhappy = ["devsplice-vm:", "Oops", "WARNING:", "BUG:", "Kernel panic", "Call Trace"];
    if code == RC_NO_VM || unhappy.iter().any(|word| console.contains(word)) {
        eprintln!("xtask: the guest's console said:\n{}", tail(&console, 60));
    }
    code
}

/// The last lines of a text.
fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_argument_is_a_line_and_several_are_words() {
        assert_eq!(command_line(&["ls | wc".into()]), "ls | wc\n");
        assert_eq!(command_line(&["echo".into(), "it's".into()]), "'echo' 'it'\\''s' \n");
    }

    #[test]
    fn a_size_has_a_binary_unit() {
        assert_eq!(parse_size("4G"), Some(4 << 30));
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("4X"), None);
        assert_eq!(parse_size("99999999T"), None);
    }

    #[test]
    fn disks_are_named_in_order() {
        assert_eq!((disk_name(0), disk_name(1)), ("/dev/vda".into(), "/dev/vdb".into()));
    }
}
