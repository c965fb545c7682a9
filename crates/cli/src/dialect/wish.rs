//! Answers for what the command lines of other ublk tools ask for, in words of ours, and for what
//! of it there is not.

use devsplice_core::{Error, Result};
use devsplice_exports::ublk::{DataPath, Extra, Integrity, Options, Recovery, Segments, Trial};
use devsplice_nbd::uri::{PORT, Place, Uri};

use super::words::number;

/// What a tool is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Verb {
    /// Make a device, or serve one on whose server has gone.
    Add(Box<Wish>),
    /// Remove one or all.
    Del(Which),
    /// Show one or all.
    List(Which),
    /// Stop one, if it is idle or in any case, and leave it to be deleted.
    Stop { id: u32, is_safe: bool },
    /// Have one's server let it go, for another to take over.
    Quiesce { id: u32 },
    /// Give one another size in bytes.
    Resize { id: u32, bytes: u64 },
    /// Make one, try parameters on it, delete it.
    Try(Option<u32>, Trial),
    /// Show what the driver can do.
    Features,
    /// Say how the tool is used.
    Help,
}

/// Which devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// That one.
    One(u32),
    /// All that there are.
    All,
}

/// What a device is to be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wish {
    /// `null`, `loop`, `stripe`, `fault_inject` or `nbd`.
    pub target: String,
    /// What it lies on.
    pub files: Vec<String>,
    /// Options of the target, with their values.
    pub target_options: Vec<(String, String)>,
    /// Its number; `None` for the first free one.
    pub id: Option<u32>,
    /// Queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Threads; `None` for one per queue.
    pub threads: Option<u16>,
    /// How data moves.
    pub copy: CopyMode,
    /// Bytes from one descriptor to the next.
    pub descriptor_bytes: Option<u16>,
    /// Whether no partitions are looked for.
    pub no_part_scan: bool,
    /// Whether it is served from this process.
    pub is_foreground: bool,
    /// Whether the page cache is used for what it lies on.
    pub is_buffered: bool,
    /// Whether it may not be written.
    pub read_only: bool,
    /// Integrity data of its requests; a loop's is in its second file.
    pub integrity: Option<Integrity>,
    /// Whether memory can be shared with clients.
    pub shares_memory: bool,
    /// A file of such memory, and whether it is only read by the server.
    pub shared_file: Option<(String, bool)>,
    /// What is asked for beside that.
    pub more: More,
    /// The words that said so.
    pub words: Vec<String>,
}

/// How data moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// The kernel copies.
    #[default]
    Copy,
    /// The kernel copies; the data of a write comes when it is asked for.
    GetData,
    /// The server copies.
    UserCopy,
    /// Nobody copies; each request's pages are registered by a command.
    Register,
    /// Nobody copies; pages are registered by the kernel.
    AutoRegister,
    /// As before, but that always fails, so that each request has to fall back.
    Fallback,
}

/// What a device may be asked for besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct More {
    /// Serve a device on whose server has gone.
    pub is_recovery: bool,
    /// The device outlives its server.
    pub outlives: bool,
    /// What was in flight is sent again.
    pub reissues: bool,
    /// What comes while there is no server fails.
    pub fails: bool,
    /// Requests are fetched and committed many at a time.
    pub batch: bool,
    /// With that, slots change all the time.
    pub rotates: bool,
    /// Every thread serves some tags of every queue.
    pub per_io: bool,
    /// Threads of each queue, each of which serves some of its tags; 0 and 1 for one.
    pub per_queue: u16,
    /// A signal to its server stops and deletes it.
    pub ends_with_signal: bool,
    /// It may be served without root.
    pub unprivileged: bool,
}

impl More {
    /// What becomes of the device when its server dies.
    fn recovery(&self) -> Recovery {
        match self {
            More { outlives: false, .. } => Recovery::Off,
            More { fails: true, .. } => Recovery::FailFast,
            More { reissues: true, .. } => Recovery::Reissue,
            More { .. } => Recovery::Fail,
        }
    }
}

/// Bytes of a device that has nothing below.
const NULL_SIZE: u64 = 250 << 30;

impl Wish {
    /// The device in words of the front end.
    pub fn options(&self) -> Options {
        Options {
            id: self.id,
            queues: self.queues,
            // One that is taken over has the queues that it has.
            threads: self.threads.unwrap_or(match self.more.is_recovery {
                true => 0,
                false => self.queues,
            }),
            depth: self.depth,
            read_only: self.read_only,
            data_path: Some(match self.copy {
                // Memory that is shared is not copied to either.
                CopyMode::Copy if self.shares_memory => DataPath::AutoRegister,
                CopyMode::Copy | CopyMode::GetData => DataPath::Copy,
                CopyMode::UserCopy => DataPath::UserCopy,
                CopyMode::Register => DataPath::Register,
                CopyMode::AutoRegister | CopyMode::Fallback => DataPath::AutoRegister,
            }),
            batch: Some(self.more.batch),
            part_scan: !self.no_part_scan,
            affinity: true,
            stuck_seconds: 0,
            recovery: Some(self.more.recovery()),
        }
    }

    /// What else is asked of the driver.
    pub fn extra(&self) -> Extra {
        // What those tools' own null device takes; one of the suites looks.
        let segments =
            Segments { dma_mask: 4095, boundary_mask: 4095, max_bytes: 32 << 10, max_count: 32 };
        Extra {
            segments: (self.target == "null").then_some(segments),
            // Those tools leave it to the driver to ignore that of root.
            unprivileged: self.more.unprivileged && !rustix::process::geteuid().is_root(),
            need_get_data: self.copy == CopyMode::GetData,
            descriptor_bytes: self.descriptor_bytes,
            integrity: self.integrity.clone().map(|integrity| Integrity {
                file: self.files.get(1).map(Into::into),
                ..integrity
            }),
            shared_memory: self.shares_memory,
            dies_fetching: self
                .option("die_during_fetch")
                .is_ok_and(|die| die.unwrap_or(0_u64) > 0),
            per_io: self.more.per_io,
            per_queue: self.more.per_queue,
            rotates: self.more.rotates,
            no_slots: self.copy == CopyMode::Fallback,
            ..Extra::default()
        }
    }

    /// The stack as an expression of ours.
    ///
    /// # Errors
    /// If there is no such target, or it does not go with its files or options.
    pub fn stack(&self) -> Result<String> {
        let need = |fits: bool, what: &str| {
            let reason = format!("needs {what}, not {} files", self.files.len());
            if fits { Ok(()) } else { Err(Error::invalid(&self.target, reason)) }
        };
        let direct = if self.is_buffered { ", direct=off" } else { "" };
        let file = |path: &String| format!("file({}{direct})", quoted(path));
        let null = format!("null(size={NULL_SIZE})");
        match self.target.as_str() {
            "null" => need(self.files.is_empty(), "no file")
                .and_then(|()| self.only_options(&[]))
                .map(|()| null),
            "loop" => {
                let count = 1 + usize::from(self.integrity.is_some());
                need(
                    self.files.len() == count,
                    "a file, and one for integrity data if it has any",
                )?;
                self.only_options(&[])?;
                match self.checked_bytes()? {
                    None => Ok(file(&self.files[0])),
                    Some(bytes) => Ok(format!("linear({}, size={bytes})", file(&self.files[0]))),
                }
            }
            "nbd" => need(self.files.is_empty(), "no file")
                .and_then(|()| self.remote())
                .map(|uri| format!("nbd({})", quoted(&uri.to_string()))),
            "stripe" => {
                need(
                    !self.files.is_empty() && self.integrity.is_none(),
                    "files, no integrity data",
                )?;
                self.only_options(&["chunk_size"])?;
                let chunk: u64 = self.option("chunk_size")?.unwrap_or(64 << 10);
                let files: Vec<String> = self.files.iter().map(file).collect();
                Ok(format!("stripe(chunk={chunk}, {})", files.join(", ")))
            }
            "fault_inject" => {
                need(self.files.is_empty(), "no file")?;
                self.only_options(&["delay_us", "die_during_fetch"])?;
                let wait: u64 = self.option("delay_us")?.unwrap_or(0);
                let waits =
                    ["read", "write", "flush", "discard"].map(|op| format!("{op}={wait}us"));
                Ok(format!("delay({null}, {})", waits.join(", ")))
            }
            other => Err(Error::invalid(format!("-t {other}"), "no such target")
                .next("null, loop, stripe, fault_inject")),
        }
    }

    /// The export of an NBD server.
    fn remote(&self) -> Result<Uri> {
        self.only_options(&["host", "unix", "export_name"])?;
        let text = |name: &str| {
            let found = self.target_options.iter().rev().find(|(known, _)| known == name);
            found.map(|(_, text)| text.clone())
        };
        let place = match (text("host"), text("unix")) {
            (Some(host), None) => Place::Tcp(host, PORT),
            (None, Some(path)) => Place::Unix(path.into()),
            _ => return Err(Error::invalid("nbd", "needs a server").next("--host or --unix")),
        };
        Ok(Uri { place, export: text("export_name").unwrap_or_default(), tls: None })
    }

    /// How large a loop with integrity data is: as many whole blocks as both files have room for.
    fn checked_bytes(&self) -> Result<Option<u64>> {
        let (Some(integrity), [data, kept]) = (&self.integrity, &self.files[..]) else {
            return Ok(None);
        };
        let size = |path: &String| {
            std::fs::metadata(path).map(|file| file.len()).map_err(|error| Error::os(path, &error))
        };
        let blocks = (size(data)? / 512).min(size(kept)? / u64::from(integrity.bytes.max(1)));
        Ok(Some(blocks * 512))
    }

    /// Has the checks of blocks that were never written pass: all bits set in their integrity data
    /// say that there is nothing to check.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn clear_integrity(&self) -> Result<()> {
        let (Some(bytes), Some(integrity)) = (self.checked_bytes()?, &self.integrity) else {
            return Ok(());
        };
        let path = &self.files[1];
        let os = |error| Error::os(path, &error);
        let mut file = std::fs::OpenOptions::new().write(true).open(path).map_err(os)?;
        let mut left = bytes / 512 * u64::from(integrity.bytes);
        let ones = vec![0xff; 1 << 20];
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(ones.len()).min(ones.len());
            std::io::Write::write_all(&mut file, &ones[..part]).map_err(os)?;
            left -= part as u64;
        }
        file.sync_all().map_err(os)
    }

    fn option<N: TryFrom<u64>>(&self, name: &str) -> Result<Option<N>> {
        let found = self.target_options.iter().rev().find(|(known, _)| known == name);
        found.map(|(_, text)| number(name, text)).transpose()
    }

    fn only_options(&self, known: &[&str]) -> Result<()> {
        let other = |(name, _): &&(String, String)| !known.contains(&name.as_str());
        match self.target_options.iter().find(other) {
            None => Ok(()),
            Some((name, _)) => {
                Err(Error::invalid(format!("--{name}"), format!("{} has none", self.target)))
            }
        }
    }
}

/// A path as the stack language takes any.
fn quoted(path: &str) -> String {
    format!("\"{}\"", path.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use devsplice_spec::Plan;

    use super::*;
    use crate::assemble::CATALOG;

    fn wish(target: &str, files: &[&str], options: &[(&str, &str)]) -> Wish {
        Wish {
            target: target.to_owned(),
            files: files.iter().map(|file| (*file).to_owned()).collect(),
            target_options: options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            ..Wish::default()
        }
    }

    fn stack(wish: &Wish) -> String {
        Plan::parse(&wish.stack().unwrap(), &CATALOG).unwrap().to_expression()
    }

    #[test]
    fn targets_are_stacks() {
        assert_eq!(stack(&wish("null", &[], &[])), "null(size=268435456000)");
        assert_eq!(stack(&wish("loop", &["/a,b \"c"], &[])), r#"file("/a,b \"c")"#);
        assert_eq!(
            stack(&wish("stripe", &["/a", "/b"], &[("chunk_size", "4096")])),
            "stripe(file(/a), file(/b), chunk=4096)"
        );
        let slow = stack(&wish("fault_inject", &[], &[("delay_us", "2000000")]));
        assert!(
            slow.starts_with("delay(null(size=268435456000)") && slow.contains("read=2"),
            "{slow}"
        );
        let remote = |options| stack(&wish("nbd", &[], options));
        assert_eq!(remote(&[("host", "::1")]), "nbd(nbd://[::1]:10809/)");
        assert_eq!(
            remote(&[("unix", "/a b"), ("export_name", "x&y")]),
            r#"nbd("nbd+unix:///x%26y?socket=/a%20b")"#
        );
        let buffered = Wish { is_buffered: true, ..wish("loop", &["/a"], &[]) };
        assert!(stack(&buffered).contains("direct=off"));
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for (target, files, options) in [
            ("null", &["/a"][..], &[][..]),
            ("loop", &[], &[]),
            ("loop", &["/a", "/b"], &[]),
            ("loop", &["/a"], &[("chunk_size", "4096")]),
            ("stripe", &[], &[]),
            ("fault_inject", &[], &[("delay_us", "soon")]),
            ("nbd", &[], &[]),
            ("nbd", &[], &[("host", "a"), ("unix", "/b")]),
            ("nbd", &["/a"], &[("host", "a")]),
            ("tape", &[], &[]),
        ] {
            assert!(wish(target, files, options).stack().is_err(), "{target} {files:?}");
        }
    }

    #[test]
    fn what_becomes_of_a_device_is_what_its_switches_say_together() {
        let of = |outlives, reissues, fails| {
            More { outlives, reissues, fails, ..More::default() }.recovery()
        };
        assert_eq!(of(false, true, false), Recovery::Off);
        assert_eq!(of(true, false, false), Recovery::Fail);
        assert_eq!(of(true, true, false), Recovery::Reissue);
        assert_eq!(of(true, false, true), Recovery::FailFast);
    }

    #[test]
    fn integrity_data_has_a_file_of_its_own_and_bounds_the_size() {
        let path = |name: &str, bytes| {
            let file =
                std::env::temp_dir().join(format!("devsplice-{name}-{}", std::process::id()));
            std::fs::File::create(&file).unwrap().set_len(bytes).unwrap();
            file.to_str().unwrap().to_owned()
        };
        let (data, kept) = (path("data", 1 << 20), path("kept", 8000));
        let mut wish = wish("loop", &[&data, &kept], &[]);
        assert!(wish.stack().is_err(), "two files without integrity data");
        wish.integrity = Some(Integrity { bytes: 8, ..Integrity::default() });
        assert!(wish.stack().unwrap().contains("size=512000"), "{:?}", wish.stack());
        assert_eq!(wish.extra().integrity.unwrap().file, Some(kept.clone().into()));
        wish.clear_integrity().unwrap();
        assert!(std::fs::read(&kept).unwrap().iter().all(|byte| *byte == 0xff));
        for file in [&data, &kept] {
            std::fs::remove_file(file).unwrap();
        }
        wish.target = "stripe".to_owned();
        assert!(wish.stack().is_err());
    }

    #[test]
    fn memory_that_is_shared_is_not_copied_to() {
        let wish = Wish { shares_memory: true, ..wish("null", &[], &[]) };
        assert_eq!(wish.options().data_path, Some(DataPath::AutoRegister));
        assert!(wish.extra().shared_memory);
    }

    #[test]
    fn a_server_dies_only_if_it_is_told_to() {
        let dies = |options| wish("fault_inject", &[], options).extra().dies_fetching;
        assert!(dies(&[("die_during_fetch", "1")]));
        assert!(!dies(&[("die_during_fetch", "0")]) && !dies(&[]));
    }

    #[test]
    fn ways_of_data_are_the_front_ends() {
        let of = |copy| {
            let wish = Wish { copy, ..wish("null", &[], &[]) };
            let extra = wish.extra();
            (wish.options().data_path.unwrap(), extra.need_get_data, extra.no_slots)
        };
        assert_eq!(of(CopyMode::Copy), (DataPath::Copy, false, false));
        assert_eq!(of(CopyMode::GetData), (DataPath::Copy, true, false));
        assert_eq!(of(CopyMode::UserCopy), (DataPath::UserCopy, false, false));
        assert_eq!(of(CopyMode::Register), (DataPath::Register, false, false));
        assert_eq!(of(CopyMode::AutoRegister), (DataPath::AutoRegister, false, false));
        assert_eq!(of(CopyMode::Fallback), (DataPath::AutoRegister, false, true));
    }
}
