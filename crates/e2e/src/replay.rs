//! Answers for playing back a log of writes, by nothing but docs/formats/log-writes.md.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// One entry.
#[derive(Debug)]
pub struct Entry {
    /// First byte on the disk.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    flags: u64,
    /// Of a mark.
    pub name: String,
    /// Where in the log its data lies.
    data: u64,
}

impl Entry {
    /// Whether everything in front of it has been promised to last: a flush, or a forced write.
    #[must_use]
    pub fn is_point(&self) -> bool {
        self.flags & (FLUSH | FUA) != 0
    }

    /// Whether it is a mark.
    #[must_use]
    pub fn is_mark(&self) -> bool {
        self.flags & MARK != 0
    }
}

/// A log.
pub struct Log {
    file: File,
    /// What is on record, in its order.
    pub entries: Vec<Entry>,
}

impl Log {
    /// Reads it.
    ///
    /// # Panics
    /// If it is none, or one that breaks off.
    #[must_use]
    pub fn open(path: &str) -> Log {
        let file = File::open(path).expect("the log");
        let word = |at| {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, at).expect("a log as long as it says");
            u64::from_le_bytes(word)
        };
        assert_eq!((word(0), word(8)), (MAGIC, 1), "{path} is no log");
        let sector = word(24) & 0xffff_ffff;
        let mut place = sector;
        let mut entries = Vec::new();
        for _ in 0..word(16) {
            let (at, len, flags) =
                (word(place) * sector, word(place + 8) * sector, word(place + 16));
            let mut name = vec![0; usize::try_from(word(place + 24)).expect("a short name")];
            file.read_exact_at(&mut name, place + 32).expect("a name");
            let name = String::from_utf8(name).expect("a name in UTF-8");
            entries.push(Entry { at, len, flags, name, data: place + sector });
            place += sector + if flags & DISCARD == 0 { len } else { 0 };
        }
        Log { file, entries }
    }

    /// Does to `image` what an entry says.
    ///
    /// # Panics
    /// If that fails.
    pub fn play(&self, entry: &Entry, image: &File) {
        if entry.flags & DISCARD != 0 {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(image, how, entry.at, entry.len).expect("a hole in the image");
            return;
        }
        let mut bytes = vec![0; usize::try_from(entry.len).expect("64-bit sizes")];
        self.file.read_exact_at(&mut bytes, entry.data).expect("data in the log");
        image.write_all_at(&bytes, entry.at).expect("room in the image");
    }
}
