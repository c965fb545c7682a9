//! QEMU's command line for the test machine, with the reason for each choice.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;

use crate::proc::tied;

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";

/// How the guest's instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// Emulation, one thread per CPU.
    Tcg,
    /// Emulation where one instruction is one nanosecond of guest time: repeatable counts, one CPU.
    Icount,
    /// Hardware virtualization, where /dev/kvm can run a stock kernel.
    Kvm,
}

/// A machine to boot.
pub struct Machine<'a> {
    /// How to run it.
    pub accel: Accel,
    /// Number of CPUs.
    pub cpus: u32,
    /// MiB of memory.
    pub memory: u32,
    /// Kernel image.
    pub kernel: &'a Path,
    /// Initramfs.
    pub initramfs: &'a Path,
    /// Additions to the kernel's command line.
    pub append: &'a str,
    /// Where the console's text goes.
    pub console: &'a Path,
    /// Name of each serial port for the guest, and the file that its text goes to.
    pub ports: &'a [(&'static str, PathBuf)],
    /// Tag and socket of each shared directory.
    pub shares: &'a [(String, PathBuf)],
    /// Raw disk images, /dev/vda first.
    pub disks: &'a [PathBuf],
}

impl Machine<'_> {
    /// The command that boots it; `cpu_help` is what QEMU lists for `-cpu help`.
    pub fn command(&self, cpu_help: &str) -> Command {
        let mut command = tied(QEMU);
        let memory = self.memory;
        command.args(["-machine", "q35,hpet=off", "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-monitor", "none", "-no-reboot"]);
        command.args(["-m", &memory.to_string()]);
        // virtiofsd works in the guest's memory, which must be shareable for that.
        command.args(["-object", &format!("memory-backend-memfd,id=m,size={memory}M,share=on")]);
        command.args(["-numa", "node,memdev=m"]);
        self.add_cpus(&mut command, cpu_help);
        self.add_boot(&mut command);
        self.add_ports(&mut command);
        for (tag, socket) in self.shares {
            let socket = escaped(socket);
            command.args(["-chardev", &format!("socket,id={tag},path={socket}")]);
            command.args(["-device", &format!("vhost-user-fs-pci,chardev={tag},tag={tag}")]);
        }
        self.add_disks(&mut command);
        command
    }

    fn add_cpus(&self, command: &mut Command, cpu_help: &str) {
        let accel = match self.accel {
            Accel::Tcg => "tcg,thread=multi,tb-size=512",
            Accel::Icount => "tcg,thread=single,tb-size=512",
            Accel::Kvm => "kvm",
        };
        command.args(["-accel", accel]);
        if self.accel == Accel::Icount {
            command.args(["-icount", "shift=0,sleep=off"]);
        }
        let cpus = if self.accel == Accel::Icount { 1 } else { self.cpus };
        command.args(["-smp", &cpus.to_string()]);
        command.args(["-cpu", &self.cpu(cpu_help)]);
    }

    /// Emulation runs `rep movsb` byte by byte, and the kernel copies with it where the CPU says
    /// that it is fast: copies 3 times too dear at 1 MiB and 8 times at 4 KiB. So it must not say
    /// so. Without counting, neither does it have page tables of five levels nor the flags that
    /// split memory's rights further: they make emulation a sixth dearer, and nothing here is about
    /// them. A QEMU refuses flags that it has not heard of.
    fn cpu(&self, cpu_help: &str) -> String {
        if self.accel == Accel::Kvm {
            return "host".into();
        }
        let known = |flag: &&str| cpu_help.split_whitespace().any(|word| word == *flag);
        let strings = ["erms", "fsrm", "fzrm", "fsrs"].into_iter();
        let dear: &[&str] = match self.accel {
            Accel::Tcg => &["la57", "smap", "smep", "pku", "umip"],
            _ => &[],
        };
        let masked = strings.chain(dear.iter().copied()).filter(known);
        masked.fold("max".into(), |cpu: String, flag| format!("{cpu},-{flag}"))
    }

    fn add_boot(&self, command: &mut Command) {
        command.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initramfs);
        let line = format!(
            "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off nokaslr \
             tsc=reliable clocksource=tsc audit=0 nowatchdog rcupdate.rcu_expedited=1 \
             random.trust_cpu=on cryptomgr.notests {}",
            self.append
        );
        command.args(["-append", line.trim_end()]);
        command.args(["-serial", &format!("file:{}", self.console.display())]);
    }

    /// Plain files as ports: a port that listens to a terminal or a pipe for input would stop the
    /// guest once that is at its end.
    fn add_ports(&self, command: &mut Command) {
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        for (name, file) in self.ports {
            command.args(["-chardev", &format!("file,id={name},path={}", escaped(file))]);
            command.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
        }
    }

    fn add_disks(&self, command: &mut Command) {
        for (index, disk) in self.disks.iter().enumerate() {
            let disk = escaped(disk);
            let options = "if=none,format=raw,cache=unsafe,discard=unmap,aio=threads";
            command.args(["-object", &format!("iothread,id=io{index}")]);
            command.args(["-drive", &format!("file={disk},id=disk{index},{options}")]);
            let (queues, serial) = (self.cpus, format!("serial=disk{index}"));
            let device = format!("drive=disk{index},iothread=io{index},num-queues={queues}");
            command.args(["-device", &format!("virtio-blk-pci,{device},{serial}")]);
        }
    }
}

/// A path inside one of QEMU's option lists, where a comma is written twice.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(accel: Accel, cpu_help: &str) -> String {
        let machine = Machine {
            accel,
            cpus: 2,
            memory: 64,
            kernel: Path::new("/k"),
            initramfs: Path::new("/i"),
            append: "quux",
            console: Path::new("/c"),
            ports: &[("out", PathBuf::from("/o,1"))],
            shares: &[("hostroot".into(), PathBuf::from("/s"))],
            disks: &[PathBuf::from("/d")],
        };
        let command = machine.command(cpu_help);
        command.get_args().map(|arg| arg.to_string_lossy() + " ").collect()
    }

    #[test]
    fn only_the_flags_that_this_qemu_knows_are_masked() {
        assert!(line(Accel::Tcg, "erms fsrm").contains("-cpu max,-erms,-fsrm "));
        assert!(line(Accel::Tcg, "").contains("-cpu max "));
        assert!(line(Accel::Tcg, "la57 erms").contains("-cpu max,-erms,-la57 "));
        // What is counted stays comparable with what was.
        assert!(line(Accel::Icount, "la57 erms").contains("-cpu max,-erms "));
        assert!(line(Accel::Kvm, "erms").contains("-cpu host "));
    }

    #[test]
    fn counting_instructions_takes_one_cpu() {
        assert!(line(Accel::Icount, "").contains("-smp 1 "));
        assert!(line(Accel::Tcg, "").contains("-smp 2 "));
    }

    #[test]
    fn a_comma_in_a_path_is_doubled() {
        assert!(line(Accel::Tcg, "").contains("path=/o,,1 "));
    }
}
