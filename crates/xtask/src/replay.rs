//! Answers for `cargo xtask replay`: plays a log of writes (docs/formats/log-writes.md) back onto
//! an image, whole or up to some entry.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::Fallible;

const MAGIC: u64 = 0x006a_7366_7773_6872;
/// Bits of an entry's flags, with their names.
const FLAGS: [(u64, &str); 5] =
    [(1, "flush"), (2, "fua"), (4, "discard"), (8, "mark"), (16, "metadata")];
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// Bytes moved at a time.
const CHUNK: usize = 1 << 20;

/// Play a log that the layer `log`, or the kernel's dm-log-writes, has written back onto an image.
#[derive(Args)]
pub struct Options {
    /// The log: a file or device
    pub log: PathBuf,
    /// What to write to; left out, the entries are listed
    pub image: Option<PathBuf>,
    /// Stop behind this entry, counted from 0
    #[arg(long)]
    pub until: Option<u64>,
    /// Stop behind this mark
    #[arg(long, conflicts_with = "until")]
    pub mark: Option<String>,
}

struct Entry {
    at: u64,
    len: u64,
    flags: u64,
    name: String,
    /// Where its data lies, and how much.
    data: (u64, u64),
}

/// Plays back and says how far.
pub fn run(options: &Options) -> Fallible<()> {
    let cannot = |path: &Path, error| format!("{}: {error}", path.display());
    let log = File::open(&options.log).map_err(|error| cannot(&options.log, error))?;
    let image = match &options.image {
        Some(path) => {
            let file = File::options().write(true).open(path);
            Some(file.map_err(|error| cannot(path, error))?)
        }
        None => None,
    };
    let entries = entries(&log).map_err(|error| format!("{}: {error}", options.log.display()))?;
    let end = end(&entries, options)?;
    for (number, entry) in entries[..end].iter().enumerate() {
        match &image {
            Some(image) => play(&log, entry, image).map_err(|e| format!("entry {number}: {e}"))?,
            None => println!("{number} {}", show(entry)),
        }
    }
    if let Some(image) = image {
        image.sync_all().map_err(|error| format!("the image: {error}"))?;
        println!("{end} of {} entries played back", entries.len());
    }
    Ok(())
}

/// How many entries are meant.
fn end(entries: &[Entry], options: &Options) -> Fallible<usize> {
    if let Some(mark) = &options.mark {
        let is_it = |entry: &Entry| entry.flags & MARK != 0 && entry.name == *mark;
        let place = entries.iter().position(is_it);
        return place.map(|place| place + 1).ok_or_else(|| format!("no mark `{mark}` in the log"));
    }
    let Some(until) = options.until else { return Ok(entries.len()) };
    let last = usize::try_from(until).ok().filter(|until| *until < entries.len());
    last.map(|last| last + 1).ok_or_else(|| format!("the log has {} entries", entries.len()))
}

fn show(entry: &Entry) -> String {
    let flags: Vec<_> =
        FLAGS.iter().filter(|(bit, _)| entry.flags & bit != 0).map(|(_, name)| *name).collect();
    let what = if flags.is_empty() { "write".to_owned() } else { flags.join(",") };
    match entry.flags & MARK {
        0 => format!("{what} {} bytes at {}", entry.len, entry.at),
        _ => format!("{what} {}", entry.name),
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Reads all entries; each must lie in the log with its data.
fn entries(log: &File) -> Fallible<Vec<Entry>> {
    let text = |error: std::io::Error| error.to_string();
    let mut file = log;
    // A device has a size for whoever seeks only.
    let size = file.seek(SeekFrom::End(0)).map_err(text)?;
    file.rewind().map_err(text)?;
    let mut first = [0; 28];
    file.read_exact(&mut first).map_err(text)?;
    let sector = u64::from(sector_of(&first)?);
    let mut place = sector;
    let mut entries = Vec::new();
    for number in 0..word(&first, 16) {
        let mut head = [0; 32];
        log.read_exact_at(&mut head, place).map_err(|e| format!("entry {number}: {e}"))?;
        let broken = || format!("entry {number} makes no sense");
        let bytes = |sectors: u64| sectors.checked_mul(sector).ok_or_else(broken);
        let (at, len, flags) = (bytes(word(&head, 0))?, bytes(word(&head, 8))?, word(&head, 16));
        let held = if flags & DISCARD == 0 { len } else { 0 };
        let data = (place + sector, held);
        let end = data.0.checked_add(held).filter(|end| *end <= size).ok_or_else(broken)?;
        let name_len = usize::try_from(word(&head, 24)).map_err(|_| broken())?;
        if name_len as u64 > sector - 32 {
            return Err(broken());
        }
        let mut name = vec![0; name_len];
        log.read_exact_at(&mut name, place + 32).map_err(text)?;
        let name = String::from_utf8_lossy(&name).into_owned();
        entries.push(Entry { at, len, flags, name, data });
        place = end;
    }
    Ok(entries)
}

/// Checks the super block: the bytes of a sector.
fn sector_of(first: &[u8; 28]) -> Fallible<u32> {
    if word(first, 0) != MAGIC || word(first, 8) != 1 {
        return Err("is no log of writes, or of another version than 1".into());
    }
    let sector = u32::from_le_bytes([first[24], first[25], first[26], first[27]]);
    if !sector.is_power_of_two() || !(512..=65_536).contains(&sector) {
        return Err(format!("sectors of {sector} bytes"));
    }
    Ok(sector)
}

/// Does to the image what an entry says: zeros for a discard.
fn play(log: &File, entry: &Entry, image: &File) -> std::io::Result<()> {
    let mut bytes = vec![0; CHUNK.min(usize::try_from(entry.len).unwrap_or(CHUNK))];
    let mut done = 0;
    while done < entry.len {
        let count = (entry.len - done).min(CHUNK as u64);
        let chunk = &mut bytes[..usize::try_from(count).unwrap_or(0)];
        if entry.flags & DISCARD == 0 {
            log.read_exact_at(chunk, entry.data.0 + done)?;
        }
        image.write_all_at(chunk, entry.at + done)?;
        done += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two writes, a discard inside the first, a mark and a flush between them.
    fn log() -> Vec<u8> {
        let mut log = vec![0; 512];
        for (at, number) in [(0, MAGIC), (8, 1), (16, 5), (24, 512)] {
            log[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let mut add = |at: u64, len: u64, flags: u64, name: &str, fill: Option<u8>| {
            let mut head = vec![0; 512];
            let fields = [at, len, flags, name.len() as u64];
            for (place, field) in head.chunks_mut(8).zip(fields) {
                place.copy_from_slice(&field.to_le_bytes());
            }
            head[32..32 + name.len()].copy_from_slice(name.as_bytes());
            log.extend(head);
            let len = usize::try_from(len * 512).unwrap();
            log.extend(fill.iter().flat_map(|fill| vec![*fill; len]));
        };
        add(1, 4, 0, "", Some(7));
        add(2, 1, DISCARD, "", None);
        add(0, 0, MARK, "half", None);
        add(0, 0, 1, "", None);
        add(7, 1, 2, "", Some(9));
        log
    }

    fn file(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("xtask-replay-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn played(until: Option<u64>, mark: Option<&str>) -> Fallible<Vec<u8>> {
        let tag = format!("{until:?}{mark:?}").replace(['"', '(', ')'], "");
        let (log, image) = (file(&format!("log{tag}"), &log()), file(&tag, &[1; 4096]));
        let mark = mark.map(str::to_owned);
        let done = run(&Options { log: log.clone(), image: Some(image.clone()), until, mark });
        let bytes = std::fs::read(&image).unwrap();
        std::fs::remove_file(log).unwrap();
        std::fs::remove_file(image).unwrap();
        done.map(|()| bytes)
    }

    #[test]
    fn a_log_is_played_back_whole_or_up_to_an_entry() {
        let mut want = vec![1; 4096];
        want[512..2560].fill(7);
        assert_eq!(played(Some(0), None), Ok(want.clone()));
        want[1024..1536].fill(0);
        assert_eq!(played(Some(3), None), Ok(want.clone()));
        assert_eq!(played(None, Some("half")), Ok(want.clone()));
        want[3584..].fill(9);
        assert_eq!(played(None, None), Ok(want.clone()));
        assert!(played(Some(5), None).is_err() && played(None, Some("whole")).is_err());
    }

    #[test]
    fn a_log_that_is_cut_off_or_damaged_is_an_error_and_never_a_panic() {
        let whole = log();
        let path = file("damaged", &whole);
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            entries(&File::open(&path).unwrap())
        };
        assert_eq!(read(&whole).unwrap().len(), 5);
        for len in (0..whole.len()).step_by(101) {
            assert!(read(&whole[..len]).is_err(), "{len}");
        }
        for at in (0..28).chain(512..544) {
            let mut bad = whole.clone();
            bad[at] ^= 0x81;
            // Some flips only say something else.
            let _ = read(&bad);
        }
        std::fs::remove_file(path).unwrap();
    }
}
