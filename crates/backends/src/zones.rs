//! Answers for the files of a zoned device as bottoms, one for each zone, laid out as the kernel's
//! zloop does it: `zones:/var/local/zloop/0` (docs/formats/zoned.md).
//!
//! `cnv-000000` is a conventional zone and as long as a zone is; `seq-000001` is written from its
//! start on and as long as it is written. A directory without any gets them if it is said how many.

use std::collections::BTreeMap;
use std::path::Path;

use devsplice_core::layer::anchored_path;
use devsplice_core::stack::MAX_PORTS;
use devsplice_core::{Args, Error, ErrorKind, Key, Kind, Result, Source};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{Access, Opened, file};

/// `zones(path)`.
pub const SOURCE: Source = Source {
    name: "zones",
    about: "the files of a zoned device in a directory, as the kernel's zloop makes them",
    keys: &[
        Key::required("path", Kind::Text, "the directory"),
        Key::optional("size", Kind::Size, "bytes of a zone (those of a conventional one, or 256M)"),
        Key::optional("count", Kind::Count, "how many zones to make where there are none"),
        Key::optional("conventional", Kind::Count, "how many of them are conventional (0)"),
        Key::optional("direct", Kind::Switch, "bypass the page cache (on where it can be)"),
    ],
    main_key: Some("path"),
    anchored: Some(anchored_path),
};

/// What zloop takes unless told otherwise.
const SIZE: u64 = 256 << 20;

/// The files of a directory, by the numbers of their zones, and whether each is conventional.
fn found(directory: &str) -> Result<BTreeMap<usize, bool>> {
    let list = std::fs::read_dir(directory).map_err(|error| {
        let error = Error::os(directory, &error);
        match error.kind() {
            ErrorKind::NotFound => error.next(format!("mkdir {directory}, and say count=N")),
            _ => error,
        }
    })?;
    let mut zones = BTreeMap::new();
    for entry in list {
        let name = entry.map_err(|error| Error::os(directory, &error))?.file_name();
        let Some((kind, number)) = name.to_str().and_then(|name| name.split_once('-')) else {
            continue;
        };
        let is_number = number.len() == 6 && number.bytes().all(|byte| byte.is_ascii_digit());
        let is_conventional = match kind {
            "cnv" => true,
            "seq" => false,
            _ => continue,
        };
        let Some(number) = is_number.then(|| number.parse().ok()).flatten() else { continue };
        if zones.insert(number, is_conventional).is_some() {
            let reason = format!("has both a cnv- and a seq- file of zone {number}");
            return Err(Error::invalid(directory, reason));
        }
    }
    if let Some(missing) = (0..zones.len()).find(|number| !zones.contains_key(number)) {
        return Err(Error::invalid(directory, format!("has no file of zone {missing}")));
    }
    Ok(zones)
}

fn name(directory: &str, number: usize, is_conventional: bool) -> String {
    let kind = if is_conventional { "cnv" } else { "seq" };
    Path::new(directory).join(format!("{kind}-{number:06}")).to_string_lossy().into_owned()
}

/// Makes the files of a new device: empty, or a whole zone of zeros.
fn make(directory: &str, count: usize, conventional: usize, size: u64) -> Result<()> {
    for number in 0..count {
        let path = name(directory, number, number < conventional);
        let made = std::fs::File::create_new(&path)
            .and_then(|file| if number < conventional { file.set_len(size) } else { Ok(()) });
        made.map_err(|error| Error::os(&path, &error))?;
    }
    // That they are there is to last as long as what is written to them.
    let synced = std::fs::File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Error::os(directory, &error))
}

/// Each I/O thread has all of them open.
fn room_for_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // What is refused shows when a file cannot be opened.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

/// Opens them, in the order of their zones.
///
/// # Errors
/// If there are none, some are missing, a conventional one has another size, or one is in use.
pub fn open(args: &Args, access: Access) -> Result<Vec<(Opened, Option<u64>)>> {
    let directory = args.text("path").unwrap_or_default();
    let (asked, direct) = (args.size("size")?, args.switch("direct")?);
    let number = |key: &str| -> Result<Option<usize>> {
        Ok(args.count(key)?.map(|count| usize::try_from(count).unwrap_or(usize::MAX)))
    };
    let (count, conventional) = (number("count")?, number("conventional")?);
    let mut zones = found(directory)?;
    if let Some(count) = count
        && zones.is_empty()
        && access != Access::Look
    {
        let conventional = conventional.unwrap_or(0);
        if count == 0 || count > MAX_PORTS || conventional >= count {
            let reason = format!("{conventional} of {count} zones; 1 to {MAX_PORTS} can be made");
            return Err(Error::invalid(directory, reason));
        }
        make(directory, count, conventional, asked.unwrap_or(SIZE))?;
        zones = found(directory)?;
    }
    if zones.is_empty() {
        let error = Error::invalid(directory, "has no files of zones");
        return Err(error.next("say count=N to have them made"));
    }
    let there = (zones.len(), zones.values().filter(|is_conventional| **is_conventional).count());
    if count.is_some_and(|count| count != there.0)
        || conventional.is_some_and(|count| count != there.1)
    {
        let reason = format!("has {} zones, {} of them conventional", there.0, there.1);
        return Err(Error::invalid(directory, reason).next("leave count and conventional out"));
    }
    room_for_files();
    let mut size = asked;
    let mut all = Vec::new();
    for (number, is_conventional) in zones {
        let path = name(directory, number, is_conventional);
        if is_conventional && size.is_none() {
            let meta = std::fs::metadata(&path).map_err(|error| Error::os(&path, &error))?;
            size = Some(meta.len());
        }
        let size = size.unwrap_or(SIZE);
        let (opened, filled) = file::open_growing(&path, access, direct, size)?;
        if filled > size || (is_conventional && filled != size) {
            let reason = format!("has {filled} bytes, a zone {size}");
            return Err(Error::invalid(path, reason).next("say size=SIZE, as it was made with"));
        }
        all.push((opened, (!is_conventional).then_some(filled)));
    }
    all.iter_mut().skip(1).for_each(|(opened, _)| opened.warnings.clear());
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(given: &[(&str, &str)]) -> Args {
        let given: Vec<_> = given.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Args::new("zones", SOURCE.keys, &given).unwrap()
    }

    fn directory(name: &str) -> String {
        let path = std::env::temp_dir().join(format!("zones-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn refusal(given: &[(&str, &str)]) -> String {
        open(&args(given), Access::Serve).unwrap_err().to_string()
    }

    #[test]
    fn files_are_made_as_zloop_names_them_and_found_again() {
        let path = directory("made");
        let wish = [("path", &*path), ("size", "1M"), ("count", "3"), ("conventional", "1")];
        let look = open(&args(&wish), Access::Look).unwrap_err().to_string();
        assert!(look.contains("no files of zones"), "{look}");
        let made = open(&args(&wish), Access::Serve).unwrap();
        let filled: Vec<_> = made.iter().map(|(_, filled)| *filled).collect();
        assert_eq!(filled, [None, Some(0), Some(0)]);
        assert!(made.iter().all(|(opened, _)| opened.limits.size == 1 << 20));
        drop(made);
        let block = 4096;
        std::fs::write(format!("{path}/seq-000002"), vec![1; block]).unwrap();
        let again = open(&args(&[("path", &path)]), Access::Serve).unwrap();
        assert_eq!(again[2].1, Some(block as u64));
        assert_eq!(std::fs::metadata(format!("{path}/cnv-000000")).unwrap().len(), 1 << 20);
        drop(again);
        let wrong = [("path", &*path), ("count", "4")];
        assert!(refusal(&wrong).contains("has 3 zones, 1 of them conventional"));
        let small = [("path", &*path), ("size", "512K")];
        assert!(refusal(&small).contains("has 1048576 bytes, a zone 524288"));
        std::fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn a_directory_in_disorder_is_refused() {
        let path = directory("disorder");
        let wish = [("path", &*path)];
        assert!(refusal(&wish).contains("has no files of zones; say count=N"));
        assert!(refusal(&[("path", &path), ("count", "0")]).contains("can be made"));
        std::fs::write(format!("{path}/seq-000001"), "").unwrap();
        assert!(refusal(&wish).contains("has no file of zone 0"));
        std::fs::write(format!("{path}/seq-000000"), "").unwrap();
        std::fs::write(format!("{path}/seq-1"), "").unwrap();
        assert_eq!(open(&args(&wish), Access::Look).unwrap().len(), 2);
        std::fs::write(format!("{path}/cnv-000000"), "").unwrap();
        assert!(refusal(&wish).contains("has both"));
        assert!(refusal(&[("path", "/no/such")]).contains("mkdir"));
        std::fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn zones_that_are_served_are_served_once() {
        let path = directory("twice");
        let wish = args(&[("path", &path), ("size", "1M"), ("count", "2")]);
        let held = open(&wish, Access::Serve).unwrap();
        let error = open(&wish, Access::Serve).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(open(&wish, Access::Look).unwrap().len(), held.len());
        std::fs::remove_dir_all(path).unwrap();
    }
}
