//! Answers for whether `partition` finds what sfdisk and sgdisk wrote. Skips
//! where they are missing or do not come back.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use devsplice_core::{Args, Errno, Io, Limits, Op, Result, Stack, StackBuilder};

/// An image file that goes away with the test.
struct Image(PathBuf);

impl Image {
    fn new(name: &str, size: u64) -> Image {
        let path = std::env::temp_dir().join(format!("devsplice-{}-{name}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        Image(path)
    }

    /// Runs a tool on the image; `None`, with a printed reason, where the tool is missing.
    fn run(&self, tool: &str, args: &[&str], input: &str) -> Option<String> {
        let mut command = Command::new(tool);
        command.args(args).arg(&self.0).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let Ok(mut child) = command.spawn() else {
            eprintln!("skipped: {tool} is not installed (packages fdisk, gdisk)");
            return None;
        };
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        // These tools call sync(2), which waits for every file system of the machine.
        let end = Instant::now() + Duration::from_secs(30);
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > end {
                let _ = child.kill();
                panic!("{tool} hangs; perhaps its sync waits for another file system");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{tool} {args:?}: {text} {output:?}");
        Some(text)
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.0).unwrap()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn open(bytes: &[u8], block: u32, key: &str, value: &str) -> Result<Stack> {
    let driver = devsplice_layers::find("partition").unwrap();
    let given = [(key.to_owned(), value.to_owned())];
    let layer = (driver.make)(&Args::new(driver.name, driver.keys, &given)?)?;
    let mut builder = StackBuilder::new();
    let limits = Limits { block, physical: block, ..Limits::ideal(bytes.len() as u64) };
    let (disk, _) = builder.backend("disk", limits)?;
    let top = builder.layer("partition", layer, &[disk], &mut |_, at, into| {
        let at = usize::try_from(at).map_err(|_| Errno::EINVAL)?;
        into.copy_from_slice(bytes.get(at..at + into.len()).ok_or(Errno::EINVAL)?);
        Ok(())
    })?;
    Ok(builder.finish(top))
}

/// First byte and length of a partition.
fn place(bytes: &[u8], block: u32, key: &str, value: &str) -> Option<(u64, u64)> {
    let stack = open(bytes, block, key, value).ok()?;
    let piece = stack.route(Io::new(Op::Read, 0, u64::from(block))).next(&stack).unwrap().unwrap();
    Some((piece.at, stack.limits().size))
}

/// The value of `key=` in a line of `sfdisk --dump`.
fn field<'l>(line: &'l str, key: &str) -> Option<&'l str> {
    let value = line.split([',', ':']).find_map(|word| word.trim().strip_prefix(key))?;
    Some(value.trim_start_matches('=').trim().trim_matches('"'))
}

/// Checks each partition of `sfdisk --dump`, by each way to name it.
fn agrees_with(dump: &str, image: &Image, block: u32) -> usize {
    let bytes = image.bytes();
    let prefix = image.0.to_str().unwrap();
    let mut count = 0;
    for line in dump.lines().filter(|line| line.starts_with(prefix)) {
        let number = line[prefix.len()..].split(' ').next().unwrap();
        let blocks = |key| field(line, key).unwrap().parse::<u64>().unwrap() * u64::from(block);
        let want = Some((blocks("start"), blocks("size")));
        if !matches!(field(line, "type"), Some("5" | "f" | "85")) {
            assert_eq!(place(&bytes, block, "number", number), want, "{line}");
            count += 1;
        }
        for (key, name) in [("name", "label"), ("uuid", "uuid")] {
            if let Some(value) = field(line, key) {
                // The one letter beyond ASCII in these tests, as sfdisk prints it.
                let value = value.replace("\\xc3\\xa9", "\u{e9}");
                assert_eq!(place(&bytes, block, name, &value), want, "{line}");
            }
        }
    }
    count
}

const GPT: &str = "label: gpt\nsize=1MiB, name=boot\nsize=3MiB, name=\"r\u{e9}sum\u{e9}\"\n\
                   size=2MiB\nname=rest\n";

/// Whether this sfdisk can write tables for larger blocks into a file (util-linux 2.39).
fn sfdisk_takes_block_sizes() -> bool {
    let help = Command::new("sfdisk").arg("--help").env("PATH", "/usr/sbin:/sbin").output();
    help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("--sector-size"))
}

#[test]
fn a_gpt_by_sfdisk_is_read() {
    let image = Image::new("gpt", 32 << 20);
    if image.run("sfdisk", &["-q"], GPT).is_none() {
        return;
    }
    let Some(dump) = image.run("sfdisk", &["--dump"], "") else { return };
    assert_eq!(agrees_with(&dump, &image, 512), 4, "{dump}");
}

#[test]
fn a_gpt_by_sfdisk_is_read_in_blocks_of_4096() {
    if !sfdisk_takes_block_sizes() {
        eprintln!("skipped: this sfdisk has no --sector-size (it came with util-linux 2.39)");
        return;
    }
    let image = Image::new("gpt-4k", 32 << 20);
    let Some(_) = image.run("sfdisk", &["-q", "--sector-size=4096"], GPT) else { return };
    let Some(dump) = image.run("sfdisk", &["--sector-size=4096", "--dump"], "") else { return };
    assert_eq!(agrees_with(&dump, &image, 4096), 4, "{dump}");
}

#[test]
fn an_mbr_with_logical_partitions_by_sfdisk_is_read() {
    let image = Image::new("mbr", 64 << 20);
    let script = "label: dos\nsize=4MiB\nsize=4MiB, type=82\nsize=40MiB, type=5\nsize=4MiB\n\
                  size=8MiB\nsize=2MiB, type=82\nsize=9MiB\n";
    if image.run("sfdisk", &["-q"], script).is_none() {
        return;
    }
    let Some(dump) = image.run("sfdisk", &["--dump"], "") else { return };
    assert_eq!(agrees_with(&dump, &image, 512), 6, "{dump}");
    let error = open(&image.bytes(), 512, "number", "9").err().unwrap().to_string();
    assert!(error.contains("there are: 1 (4M, "), "{error}");
}

#[test]
fn a_gpt_by_sgdisk_is_read_from_its_backup_when_the_first_copy_is_damaged() {
    let image = Image::new("sgdisk", 16 << 20);
    let args = ["-o", "-n", "1:2048:4095", "-c", "1:first", "-n", "7:4096:0", "-c", "7:last one"];
    if image.run("sgdisk", &args, "").is_none() {
        return;
    }
    let mut bytes = image.bytes();
    let want = |bytes: &[u8]| {
        assert_eq!(place(bytes, 512, "label", "first"), Some((1 << 20, 1 << 20)));
        assert_eq!(place(bytes, 512, "number", "7").unwrap().0, 2 << 20);
        assert_eq!(place(bytes, 512, "label", "last one"), place(bytes, 512, "number", "7"));
    };
    want(&bytes);
    bytes[512..2048].fill(0);
    want(&bytes);
    let end = bytes.len();
    bytes[end - 512..].fill(0);
    assert!(open(&bytes, 512, "number", "1").is_err());
}
