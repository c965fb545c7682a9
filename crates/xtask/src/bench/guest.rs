//! Answers for the VM part as it runs in the machine: backing devices, devices, samples.
//!
//! Nothing is taken down here: the machine is thrown away as soon as the last sample is written.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cells::{Cell, Device, GROUPS, Whose};
use super::data::{Results, Sample};
use super::run::{bounded, fio, fio_arguments, run_detached};
use crate::Fallible;
use crate::proc::{self, run_quiet};

/// MiB of a backing device; dm's tables in `cells` have it in sectors.
const SIZE: u32 = 64;
/// MiB of each device that are used: a mirror has metadata behind them.
const USED: u32 = SIZE - 1;
/// How long a new device's node may take to appear, in guest time.
const APPEARS: Duration = Duration::from_secs(10);

/// What the machine is told: in a file, since a plan has paths in it.
pub struct Plan {
    /// Where the plan is and the results go.
    directory: PathBuf,
    plan: Value,
}

impl Plan {
    /// Reads the plan that the host has left.
    pub fn read(directory: &Path) -> Fallible<Self> {
        let path = directory.join("plan.json");
        let text = fs::read_to_string(&path)
            .map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let plan = serde_json::from_str(&text).map_err(|e| format!("the plan: {e}"))?;
        Ok(Self { directory: directory.into(), plan })
    }

    fn names(&self, key: &str, name: &str) -> bool {
        self.plan[key].as_array().into_iter().flatten().any(|value| value == name)
    }

    /// Whether it is one of the threads part.
    pub fn is_of_threads(&self) -> bool {
        self.plan["part"] == "threads"
    }

    /// How often each figure is taken.
    pub fn samples(&self) -> u64 {
        self.plan["samples"].as_u64().unwrap_or(1)
    }

    /// A file for the host.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Where a program is: as the host said, or wherever it is found.
    pub fn program(&self, name: &str) -> Fallible<PathBuf> {
        if let Some(reason) = self.plan["reasons"][name].as_str() {
            return Err(reason.to_owned());
        }
        match self.plan["programs"][name].as_str() {
            Some(path) => Ok(path.into()),
            None => proc::find_program(name).ok_or_else(|| format!("{name} is not installed")),
        }
    }
}

/// A device that is there.
struct Live {
    id: usize,
    device: &'static Device,
    node: String,
}

/// Makes the devices and runs the loads on them in turn.
pub fn run(plan: &Plan) -> Fallible<u8> {
    let file = plan.file("vm.json");
    let mut results = Results::default();
    let release = run_quiet(Command::new("uname").arg("-r"))?;
    let release = String::from_utf8_lossy(&release).trim().to_owned();
    results.conditions.push(("kernel in the machine".into(), release));
    load_null_blk()?;
    let mut live: Vec<Vec<Live>> = Vec::new();
    let mut ids = 0..;
    for group in GROUPS {
        let wanted = group.devices.iter().filter(|device| plan.names("devices", device.name));
        let made = wanted.zip(&mut ids).filter_map(|(device, id)| {
            let (node, command) = make(plan, id, device)
                .inspect_err(|reason| {
                    println!("{:16} not measured: {reason}", device.name);
                    results.absent.push((device.name.into(), reason.clone()));
                })
                .ok()?;
            if !command.is_empty() {
                results.commands.push((device.name.into(), command));
            }
            Some(Live { id, device, node })
        });
        live.push(made.collect());
    }
    for number in 1..=plan.samples() {
        for (group, live) in GROUPS.iter().zip(&live) {
            for cell in group.cells.iter().filter(|cell| plan.names("cells", cell.name)) {
                sample(number, cell, live, &mut results)?;
                results.save(&file)?;
            }
        }
    }
    results.moved = live.iter().flatten().filter_map(|live| moved(plan, live)).collect();
    results.save(&file).map(|()| 0)
}

/// Runs a load on each device, in turn.
fn sample(number: u64, cell: &Cell, live: &[Live], results: &mut Results) -> Fallible<()> {
    for device in live {
        proc::check_interrupt()?;
        let name = device.device.name;
        match measure(device, cell) {
            Ok(sample) => {
                let (value, idle) = (sample.value, sample.idle);
                println!("{number} {:14} {name:16} {value:8.2} k{}", cell.name, note(idle));
                results.samples.push(sample);
            }
            Err(e) => println!("{number} {:14} {name}: {e}", cell.name),
        }
    }
    Ok(())
}

/// What a device of ours has counted of the data that it moved.
fn moved(plan: &Plan, live: &Live) -> Option<(String, String)> {
    if live.device.whose == Whose::Peer {
        return None;
    }
    let program = plan.program(live.device.make[0]).ok()?;
    let mut info = bounded(20, program);
    info.args(["info", "--json", &format!("b{}", live.id)]);
    let info: Value = serde_json::from_slice(&run_quiet(&mut info).ok()?).ok()?;
    let of = |key: &str| info["counts"][key].as_u64();
    let text = format!("{} spliced, {} copied", of("bytes_spliced")?, of("bytes_copied")?);
    Some((live.device.name.into(), text))
}

fn note(idle: f64) -> String {
    if idle < 1.0 { String::new() } else { format!("  (idle {idle:.1} %)") }
}

/// Loads null_blk without devices of its own.
fn load_null_blk() -> Fallible<()> {
    // It may be loaded with devices, or not at all.
    let _ = run_quiet(bounded(10, "modprobe").args(["-r", "null_blk"]));
    run_quiet(bounded(10, "modprobe").args(["null_blk", "nr_devices=0"])).map(drop)
}

/// Makes a backing device: memory that completes an I/O where it is submitted, or some time later.
fn make_backing(name: &str, ns: &str) -> Fallible<String> {
    let home = Path::new("/sys/kernel/config/nullb").join(name);
    fs::create_dir(&home).map_err(|e| format!("cannot make {}: {e}", home.display()))?;
    let size = SIZE.to_string();
    let settings = [
        ("size", size.as_str()),
        ("blocksize", "4096"),
        ("memory_backed", "1"),
        ("irqmode", if ns == "0" { "0" } else { "2" }),
        ("completion_nsec", ns),
        ("queue_mode", "2"),
        ("submit_queues", "1"),
        ("hw_queue_depth", "64"),
        ("power", "1"),
    ];
    for (key, value) in settings {
        let file = home.join(key);
        fs::write(&file, value).map_err(|e| format!("cannot set {}: {e}", file.display()))?;
    }
    let node = format!("/dev/{name}");
    appeared(&node)?;
    // Pages that are not there cost a read nothing.
    let fill = ["if=/dev/zero", "bs=1M", "oflag=direct", &format!("count={SIZE}")];
    run_quiet(bounded(60, "dd").args(fill).arg(format!("of={node}")))?;
    Ok(node)
}

/// Waits for a block device.
pub fn appeared(node: &str) -> Fallible<()> {
    let start = Instant::now();
    while !fs::metadata(node).is_ok_and(|meta| meta.file_type().is_block_device()) {
        if start.elapsed() > APPEARS {
            return Err(format!("{node} did not appear"));
        }
        proc::nap();
    }
    Ok(())
}

/// Makes a device; its node, and the command as it can be shown.
fn make(plan: &Plan, id: usize, device: &Device) -> Fallible<(String, String)> {
    let program = device.make.first().map(|name| plan.program(name)).transpose()?;
    let mut legs = Vec::new();
    for leg in 0..device.legs {
        let ns = plan.plan["disk_ns"].as_u64().unwrap_or(0).to_string();
        legs.push(make_backing(&format!("nullb{id}_{leg}"), &ns)?);
    }
    let words: Vec<String> = device.make.iter().map(|word| filled(word, id, &legs)).collect();
    let node = filled(device.node, id, &legs);
    let [before, after] = device.around;
    step(plan, (id, &legs), before, &node)?;
    if let Some(program) = program {
        let mut real = words.clone();
        real[0] = program.to_string_lossy().into_owned();
        run_detached(&real, Path::new(&format!("/run/bench-{id}.log")))?;
        if node.starts_with("/dev/mapper/") {
            run_quiet(bounded(10, "dmsetup").arg("mknodes"))?;
        }
    }
    appeared(&node)?;
    step(plan, (id, &legs), after, &node)?;
    Ok((node, words.join(" ")))
}

/// Runs a command that a device needs around its own.
fn step(plan: &Plan, (id, legs): (usize, &[String]), words: &[&str], node: &str) -> Fallible<()> {
    let Some((name, rest)) = words.split_first() else { return Ok(()) };
    let mut command = bounded(120, plan.program(name)?);
    command.args(rest.iter().map(|word| filled(word, id, legs).replace("{node}", node)));
    run_quiet(&mut command).map(drop)
}

/// A word of a command with its placeholders filled.
fn filled(word: &str, id: usize, legs: &[String]) -> String {
    let leg = |index: usize| legs.get(index).map_or("", String::as_str);
    word.replace("{id}", &id.to_string()).replace("{0}", leg(0)).replace("{1}", leg(1))
}

/// Runs a load once. One instruction is one nanosecond here, the machine has one CPU, and that is
/// busy until the last I/O is done: time is instructions, fio's, the kernel's and the server's.
fn measure(live: &Live, cell: &Cell) -> Fallible<Sample> {
    let arguments = fio_arguments(&live.node, cell, &format!("{USED}M"));
    let count = [format!("--number_ios={}", cell.ios), "--io_size=1T".to_owned()];
    let before = idle_ticks();
    let load = fio(arguments, &[&count[0], &count[1]])?;
    let idle = (idle_ticks() - before) * 10.0;
    Ok(Sample {
        device: live.device.name.into(),
        cell: cell.name.into(),
        value: load.milliseconds * 1000.0 / load.ios,
        idle: idle / load.milliseconds * 100.0,
    })
}

/// Hundredths of a second for which the CPU has been idle.
fn idle_ticks() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks = stat.lines().next().and_then(|line| line.split_whitespace().nth(4)?.parse().ok());
    ticks.unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::super::cells::devices;
    use super::*;

    #[test]
    fn placeholders_are_filled() {
        let legs = ["/dev/a".to_owned(), "/dev/b".to_owned()];
        assert_eq!(filled("x{id} {0},{1}", 7, &legs), "x7 /dev/a,/dev/b");
        assert_eq!(filled("{1}", 7, &legs[..1]), "");
    }

    #[test]
    fn every_device_takes_the_legs_that_its_command_names() {
        for device in devices() {
            let words = device.make.join(" ") + device.node;
            let named = (0..4).take_while(|leg| words.contains(&format!("{{{leg}}}"))).count();
            assert_eq!(named, device.legs, "{}", device.name);
        }
    }
}
