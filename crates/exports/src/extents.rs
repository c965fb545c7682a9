//! Answers for what is known of a stack's content without reading it: holes of files below it, and
//! what layers answer with zeros.
//! Everything that is not known to read as zeros is data.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devsplice_core::{Error, Extent, Place, Result, Stack};
use devsplice_nbd::client::Extent as Said;
use devsplice_uring::{FileKind, Remote};
use rustix::fs::{SeekFrom, fstat, seek};
use rustix::io::Errno;

use crate::threads::Bottom;

/// What a range of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Somebody has written it, or nobody knows.
    Data,
    /// Nothing is stored there; it reads as zeros.
    Hole,
    /// It reads as zeros; there is nothing below that could hold it.
    Zero,
}

impl Content {
    /// Whether it reads as zeros for sure.
    #[must_use]
    pub const fn reads_zero(self) -> bool {
        !matches!(self, Content::Data)
    }

    /// The word that users see.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Content::Data => "data",
            Content::Hole => "hole",
            Content::Zero => "zero",
        }
    }
}

/// The extents of a stack. Asking reads no data.
pub struct Extents {
    stack: Arc<Stack>,
    /// The bottoms that can tell.
    tellers: Vec<Option<Teller>>,
    /// What layers answer may have changed by the time that it is used.
    is_moving: bool,
}

/// A bottom that can tell what is there.
enum Teller {
    File(OwnedFd),
    /// Nobody changes what it has.
    Remote(Arc<dyn Remote>),
    /// Others do, so it is asked each time.
    Now(Arc<dyn Remote>),
}

/// Bytes of a server that it is asked about at a time; it tells of as many as it likes.
const LOOK: u64 = 1 << 30;
/// Questions to servers for one answer.
const QUESTIONS: u32 = 64;

/// How long they may take together; then everything is data.
const PATIENCE: Duration = Duration::from_secs(5);

/// What one has told.
struct List {
    bottom: u16,
    /// Where it begins.
    at: u64,
    /// Each with its end.
    extents: Vec<(u64, Said)>,
}

/// What servers have told while one question is answered.
pub struct Told {
    lists: Vec<List>,
    questions: u32,
    until: Instant,
}

impl Default for Told {
    fn default() -> Told {
        Told { lists: Vec::new(), questions: 0, until: Instant::now() + PATIENCE }
    }
}

impl Told {
    /// Whether no more should be asked.
    #[must_use]
    pub fn is_enough(&self) -> bool {
        self.questions >= QUESTIONS || Instant::now() >= self.until
    }

    fn find(&self, bottom: u16, at: u64) -> Option<Said> {
        let list = self.lists.iter().find(|list| list.bottom == bottom)?;
        // There may be as many extents as pieces are asked about.
        let index = list.extents.partition_point(|(end, _)| *end <= at);
        let (end, extent) = list.extents.get(index).filter(|_| at >= list.at)?;
        Some(Said { len: end - at, ..*extent })
    }

    /// What a server's bytes are now.
    fn ask(&mut self, bottom: u16, remote: &dyn Remote, at: u64) -> Option<Said> {
        if let Some(known) = self.find(bottom, at) {
            return Some(known);
        }
        self.questions += 1;
        let list = remote.look_now(at, LOOK, self.until)?;
        self.lists.retain(|list| list.bottom != bottom);
        let ends = list.into_iter().scan(at, |end, extent| {
            *end = end.saturating_add(extent.len);
            Some((*end, extent))
        });
        self.lists.push(List { bottom, at, extents: ends.collect() });
        self.find(bottom, at)
    }
}

impl Extents {
    /// Of a disk that others use meanwhile. Servers that can be asked beside that are waited for,
    /// if [`Extents::may_wait`]. Everything below a layer with a live side is data: its answers are
    /// true for as long as its engine knows of the request, which this is none of.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn in_use(stack: &Arc<Stack>, bottoms: &[Bottom]) -> Result<Extents> {
        let is_moving = stack.lives().next().is_some();
        let tellers = bottoms.iter().map(|bottom| match bottom {
            Bottom::File { fd, kind: FileKind::Regular } => {
                let fd = fd.try_clone().map_err(|error| Error::os("a file's copy", &error))?;
                Ok(Some(Teller::File(fd)))
            }
            Bottom::Remote(remote) if remote.tells_now() && !is_moving => {
                Ok(Some(Teller::Now(Arc::clone(remote))))
            }
            Bottom::Remote(_) | Bottom::File { .. } | Bottom::Bytes(_) => Ok(None),
        });
        let tellers = tellers.collect::<Result<_>>()?;
        Ok(Extents { stack: Arc::clone(stack), tellers, is_moving })
    }

    /// Of a stack that nobody changes meanwhile, for a thread that may wait for servers.
    ///
    /// # Errors
    /// As [`Extents::in_use`].
    pub fn at_rest(stack: &Arc<Stack>, bottoms: &[Bottom]) -> Result<Extents> {
        let mut extents = Extents { is_moving: false, ..Extents::in_use(stack, bottoms)? };
        for (teller, bottom) in extents.tellers.iter_mut().zip(bottoms) {
            if let Bottom::Remote(remote) = bottom {
                remote.look_ahead();
                *teller = Some(Teller::Remote(Arc::clone(remote)));
            }
        }
        Ok(extents)
    }

    /// Whether answers may have to wait for a server.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        self.tellers.iter().any(|teller| matches!(teller, Some(Teller::Now(_))))
    }

    /// What the bytes from `at` on are, and how many of them for sure: at least 1, at most `most`.
    #[must_use]
    pub fn at(&self, at: u64, most: u64) -> (u64, Content) {
        self.look(at, most, &mut Told::default())
    }

    /// The same. What servers tell of more than that is put into `told`, for the next time. A
    /// question that comes later must begin without it: it may not be so any more.
    #[must_use]
    pub fn look(&self, at: u64, most: u64, told: &mut Told) -> (u64, Content) {
        if self.is_moving {
            return (most, Content::Data);
        }
        let found = self.find(at, most, told);
        whole((at, most), found, u64::from(self.stack.limits().block))
    }

    /// The same, to the byte: what is below need not know of blocks.
    fn find(&self, at: u64, most: u64, told: &mut Told) -> (u64, Content) {
        match self.stack.locate(Extent { at, len: most }) {
            Some(piece) => match piece.place {
                Place::Zero => (piece.len, Content::Zero),
                Place::Backend(id) => {
                    match self.tellers.get(usize::from(id.0)).and_then(Option::as_ref) {
                        Some(Teller::File(file)) => look(file, piece.at, piece.len),
                        Some(Teller::Remote(remote)) => {
                            content(remote.look(piece.at, piece.len), piece.len)
                        }
                        Some(Teller::Now(remote)) => {
                            content(told.ask(id.0, &**remote, piece.at), piece.len)
                        }
                        None => (piece.len, Content::Data),
                    }
                }
            },
            // A layer would have to read something first, or refuses: reading will tell.
            None => (most, Content::Data),
        }
    }
}

/// A run in whole blocks, as the next question is asked of layers, which know nothing less: a block
/// of which any byte is data is data.
fn whole((at, most): (u64, u64), (run, content): (u64, Content), block: u64) -> (u64, Content) {
    let end = at.saturating_add(run);
    if run >= most || end.is_multiple_of(block) {
        return (run, content);
    }
    let (below, above) = (end - end % block, end.saturating_add(block - end % block));
    match content {
        Content::Hole | Content::Zero if below > at => (below - at, content),
        _ => ((above - at).min(most), Content::Data),
    }
}

/// What a server's `len` bytes are, by what it says. Where it does not say, they are data.
fn content(said: Option<Said>, len: u64) -> (u64, Content) {
    let content = match said {
        Some(Said { is_zero: true, is_hole: true, .. }) => Content::Hole,
        Some(Said { is_zero: true, is_hole: false, .. }) => Content::Zero,
        _ => Content::Data,
    };
    (said.map_or(len, |extent| extent.len.min(len)), content)
}

/// What a file's bytes are. Where it does not know, they are data.
fn look(file: &OwnedFd, at: u64, len: u64) -> (u64, Content) {
    match seek(file, SeekFrom::Data(at)) {
        // Nothing but a hole up to the end. What is said to lie beyond it was cut off since the
        // file was opened: a read of it fails, and that is what must come of it.
        Err(Errno::NXIO) => match left(file, at) {
            0 => (len, Content::Data),
            left => (len.min(left), Content::Hole),
        },
        Ok(data) if data > at => (len.min(data - at), Content::Hole),
        Ok(_) => match seek(file, SeekFrom::Hole(at)) {
            Ok(hole) if hole > at => (len.min(hole - at), Content::Data),
            _ => (len, Content::Data),
        },
        Err(_) => (len, Content::Data),
    }
}

/// Bytes that a file has from `at` on.
fn left(file: &OwnedFd, at: u64) -> u64 {
    let size = fstat(file).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
    size.saturating_sub(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_blocks_do_and_a_block_with_data_is_data() {
        let most = 1 << 20;
        for (found, want) in [
            ((8192, Content::Hole), (8192, Content::Hole)),
            ((8193, Content::Hole), (8192, Content::Hole)),
            ((4095, Content::Zero), (4096, Content::Data)),
            ((1, Content::Data), (4096, Content::Data)),
            ((most - 1, Content::Data), (most, Content::Data)),
            ((most, Content::Hole), (most, Content::Hole)),
        ] {
            assert_eq!(whole((4096, most), found, 4096), want, "{found:?}");
        }
        // The last block of what was asked for may be asked for in part.
        assert_eq!(whole((4096, 5000), (4500, Content::Data), 4096), (5000, Content::Data));
    }

    #[test]
    fn what_was_told_is_found_from_any_byte_of_it_however_much_it_is() {
        const COUNT: u64 = 1 << 17;
        let extents = (0..COUNT).map(|index| {
            let is_hole = index % 2 == 1;
            (1000 + (index + 1) * 10, Said { len: 10, is_hole, is_zero: is_hole })
        });
        let list = List { bottom: 3, at: 1000, extents: extents.collect() };
        let told = Told { lists: vec![list], ..Told::default() };
        let found = |at| told.find(3, at).map(|extent| (extent.len, extent.is_hole));
        assert_eq!([found(999), found(1000 + COUNT * 10)], [None, None]);
        assert_eq!(found(1000), Some((10, false)));
        assert_eq!(found(1019), Some((1, true)));
        assert_eq!(told.find(2, 1000), None, "another bottom");
        // One by one, from the first each time, this takes minutes.
        let start = Instant::now();
        assert!((0..COUNT).all(|index| found(1000 + index * 10).is_some()));
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }

    #[test]
    fn nothing_is_asked_when_the_time_for_a_list_is_over() {
        let told = Told::default();
        assert!(!told.is_enough());
        assert!(Told { until: Instant::now(), ..Told::default() }.is_enough());
        assert!(told.until <= Instant::now() + PATIENCE);
    }
}
