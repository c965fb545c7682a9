//! Answers for the story that the demo tells: what is done with a disk, step by step.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::counters::{self, Counters};
use super::files::Chosen;
use super::screen::{Failure, Screen};
use super::site::Site;
use super::tool::{QUICK, SLOW, Tool};
use super::{MIB, fio};

/// Bytes of each image.
const IMAGE: u64 = 256 << 20;
/// Bytes that must be free where the images are.
const ROOM: u64 = 600 << 20;

type Told = Result<(), Failure>;

/// What the demo did so far.
pub struct Story<'a> {
    screen: &'a Screen,
    site: &'a Site,
    export: &'a str,
    disk: Value,
    chosen: Chosen,
    first: Counters,
    second: Counters,
    verified: u64,
}

impl<'a> Story<'a> {
    /// A story that has not begun.
    pub fn new(screen: &'a Screen, site: &'a Site, export: &'a str) -> Self {
        let (first, second) = (Counters::default(), Counters::default());
        let (disk, chosen) = (Value::Null, Chosen::default());
        Self { screen, site, export, disk, chosen, first, second, verified: 0 }
    }

    /// Tells it; the site is to be cleaned whatever comes out.
    pub fn tell(&mut self, sources: &Path) -> Told {
        self.images()?;
        self.serve("serve")?;
        self.make_file_system()?;
        self.mount()?;
        self.copy(sources)?;
        self.unmount()?;
        self.first = self.stop()?;
        self.serve("start")?;
        self.mount()?;
        self.check_files()?;
        self.unmount()?;
        self.check_file_system()?;
        self.fio()?;
        self.explain()?;
        self.count()?;
        self.stop().map(drop)
    }

    /// What was shown, in sentences.
    pub fn summary(&self) -> Vec<String> {
        let (files, size) = (self.chosen.paths.len(), self.chosen.bytes / MIB);
        let all = self.first.plus(self.second);
        let moved = (all.copied() + all.spliced()) as f64;
        let each = all.copied() as f64 / moved.max(1.0);
        vec![
            format!(
                "{files} files, {size} MiB: every SHA-256 right after unmount, stop, start, mount."
            ),
            format!(
                "fio: {} MiB written at depth {} by two jobs, all of it read back and verified.",
                self.verified / MIB,
                fio::DEPTH
            ),
            format!(
                "Copies of each byte in the devsplice process: {}  (bytes_copied {} of {moved}).",
                format!("{each:.2}").trim_end_matches('0').trim_end_matches('.'),
                all.copied()
            ),
        ]
    }

    /// Whether no byte went through the server's memory.
    pub fn is_without_copy(&self) -> bool {
        self.second.spliced() > 0 && self.first.plus(self.second).copied() == 0
    }

    fn word(&self, key: &str) -> &str {
        self.disk[key].as_str().unwrap_or_default()
    }

    fn image(&self, which: char) -> PathBuf {
        self.site.work.join(format!("{which}.img"))
    }

    fn stack(&self) -> String {
        let (a, b) = (self.image('a'), self.image('b'));
        format!("stripe(chunk=64k, {}, {})", a.display(), b.display())
    }

    fn images(&self) -> Told {
        let work = self.site.work.display();
        self.screen.step("images", "making two files", || {
            let room = rustix::fs::statvfs(&self.site.work)
                .map_err(|e| format!("cannot ask how much room there is in {work}: {e}"))?;
            let free = room.f_bavail.saturating_mul(room.f_frsize);
            if free < ROOM {
                let (free, wanted) = (free / MIB, ROOM / MIB);
                return Err(format!("{work} has {free} MiB free of the {wanted} MiB needed"));
            }
            for which in ['a', 'b'] {
                let path = self.image(which);
                File::create_new(&path)
                    .and_then(|file| file.set_len(IMAGE))
                    .map_err(|e| format!("cannot make {}: {e}", path.display()))?;
            }
            Ok(format!("a.img and b.img, {} MiB each, in {work}", IMAGE / MIB))
        })
    }

    fn serve(&mut self, name: &'static str) -> Told {
        let (stack, export) = (self.stack(), self.export);
        let mut disk = Value::Null;
        self.screen.step(name, "devsplice add 'stripe(...)'", || {
            disk = self.site.add(&stack, export)?;
            let word = |key: &str| disk[key].as_str().unwrap_or_default();
            let device = word("device");
            if name != "serve" {
                return Ok(format!("the same stack again: {device}"));
            }
            Ok(format!(
                "devsplice add 'stripe(chunk=64k, a.img, b.img)' -> {device}\n{}, because {}; \
                 data path {}",
                match word("export") {
                    "ublk" => "through ublk",
                    _ => "through FUSE and a loop device",
                },
                word("why"),
                word("data_path")
            ))
        })?;
        self.disk = disk;
        if name == "serve" {
            for note in self.disk["warnings"].as_array().into_iter().flatten() {
                self.screen.block(&format!("           note: {}", note.as_str().unwrap_or("")));
            }
        }
        Ok(())
    }

    fn make_file_system(&self) -> Told {
        self.screen.step("mkfs", "mkfs.ext4", || {
            Tool::new("mkfs.ext4", SLOW).args(["-q", self.word("device")]).run()?;
            Ok(format!("mkfs.ext4 {}", self.word("device")))
        })
    }

    fn mount(&self) -> Told {
        self.screen.step("mount", "mounting", || {
            self.site.mount(self.word("device"))?;
            let at = self.site.mount_point();
            Ok(format!("mount {} {}", self.word("device"), at.display()))
        })
    }

    fn unmount(&self) -> Told {
        self.screen.step("unmount", "writing out and unmounting", || {
            self.site.unmount()?;
            Ok("everything is written out".to_owned())
        })
    }

    fn copy(&mut self, sources: &Path) -> Told {
        let mut chosen = Chosen::default();
        self.screen.step("checksums", "of the files to copy", || {
            chosen = Chosen::choose(sources);
            // One digest a line, by the paths that the files will have below the mount.
            let sums = within(Path::new("/"), "sha256sum").arg("--").args(&chosen.paths).run()?;
            let file = self.site.work.join("sums");
            fs::write(&file, sums).map_err(|e| format!("cannot write {}: {e}", file.display()))?;
            let (files, size) = (chosen.paths.len(), chosen.bytes / MIB);
            Ok(format!("SHA-256 of {files} files, {size} MiB: this repository's, the system's"))
        })?;
        self.chosen = chosen;
        self.screen.step("copy", "copying the files in", || {
            let cp = within(Path::new("/"), "cp").args(["--parents", "-t"]);
            cp.arg(self.site.mount_point()).arg("--").args(&self.chosen.paths).run()?;
            Ok("cp of all of them onto the disk".to_owned())
        })
    }

    fn stop(&self) -> Result<Counters, Failure> {
        let mut counters = Counters::default();
        self.screen.step("stop", "devsplice del", || {
            counters = Counters::of(&self.site.info()?);
            self.site.del(&[self.image('a'), self.image('b')])?;
            Ok("devsplice del: the disk is gone, its server has ended".to_owned())
        })?;
        Ok(counters)
    }

    fn check_files(&self) -> Told {
        self.screen.step("verify", "sha256sum --check", || {
            let check = within(&self.site.mount_point(), "sha256sum");
            check
                .args(["--quiet", "--strict", "--check"])
                .arg(self.site.work.join("sums"))
                .run()?;
            Ok(format!("sha256sum --check: all {} files are as they were", self.chosen.paths.len()))
        })
    }

    fn check_file_system(&self) -> Told {
        self.screen.step("fsck", "e2fsck -fn", || {
            Tool::new("e2fsck", SLOW).args(["-fn", self.word("device")]).run()?;
            Ok("e2fsck -fn: clean".to_owned())
        })
    }

    fn fio(&mut self) -> Told {
        let mut verified = 0;
        self.screen.step("fio", "writing at random, reading back, comparing", || {
            verified = fio::verify(self.word("device"))?;
            Ok(format!(
                "two jobs, depth {}, blocks of 4k to 256k: {} MiB written, read back, verified",
                fio::DEPTH,
                verified / MIB
            ))
        })?;
        self.verified = verified;
        Ok(())
    }

    fn explain(&self) -> Told {
        let mut text = String::new();
        self.screen.step("explain", "devsplice explain", || {
            text = self.site.devsplice(QUICK).args(["explain", &self.site.name]).run()?;
            Ok("devsplice explain: where each byte of a request goes".to_owned())
        })?;
        self.screen.block(&text.replace(&format!("{}/", self.site.work.display()), ""));
        Ok(())
    }

    fn count(&mut self) -> Told {
        let mut second = Counters::default();
        self.screen.step("counters", "devsplice info", || {
            second = Counters::of(&self.site.info()?);
            Ok("devsplice info: what the two servers counted".to_owned())
        })?;
        self.second = second;
        let all = self.first.plus(second);
        let rows = [("first", self.first), ("second", second), ("both", all)];
        self.screen.block(&counters::table(&rows));
        // Two data paths promise that no byte enters the process: the promise is checked.
        if matches!(self.word("data_path"), "auto-register" | "register") {
            self.screen.step("zero copy", "checking", || match self.is_without_copy() {
                true => Ok("bytes_copied 0: no byte of any request was in the process".to_owned()),
                false => Err(format!(
                    "data path {} promises no copy, but bytes_copied is {}",
                    self.word("data_path"),
                    all.copied()
                )),
            })?;
        }
        Ok(())
    }
}

/// A program that works in `directory`. It goes there by itself: were the demo's own process to do
/// that for it, a disk that does not answer would hold the demo.
fn within(directory: &Path, program: &str) -> Tool {
    Tool::new("env", SLOW).arg("-C").arg(directory).arg(program)
}
