//! Answers for what is there: which ranges of a disk hold data, as far as layers and files know.
//!
//! Only where no layer has a live side: what such a layer answers is true for as long as its engine
//! knows of the request, which this is none of. Everything that is not known to be a hole is data.

use std::os::fd::AsFd;

use devsplice_core::{Io, Op, Place, Stack};
use devsplice_nbd::wire::{STATE_HOLE, STATE_ZERO};
use rustix::fs::SeekFrom;

use super::post::Extent;
use crate::threads::Bottom;
use devsplice_uring::FileKind;

const HOLE: u32 = STATE_HOLE | STATE_ZERO;
const DATA: u32 = 0;

/// The extents from `at` on, at most `most`, of at most `len` bytes together and of at least one.
pub(super) fn extents(
    (stack, bottoms): (&Stack, &[Bottom]),
    (at, len): (u64, u64),
    most: usize,
) -> Vec<Extent> {
    let mut found = Found { extents: Vec::new(), most };
    if stack.lives().next().is_some() {
        found.add(len, DATA);
        return found.extents;
    }
    let mut route = stack.route(Io::new(Op::Read, at, len));
    let mut done = 0;
    while let Some(answer) = route.next(stack) {
        // A fan-out or a wait is of writes; pieces of a read come in their order and tile it.
        let Ok(piece) = answer else { break };
        if piece.part != done {
            break;
        }
        done += piece.len;
        let is_full = match piece.place {
            Place::Zero => found.add(piece.len, HOLE),
            Place::Backend(id) => match bottoms.get(usize::from(id.0)) {
                Some(Bottom::File { fd, kind: FileKind::Regular }) => {
                    file(&mut found, fd, (piece.at, piece.len))
                }
                _ => found.add(piece.len, DATA),
            },
        };
        if is_full {
            return found.extents;
        }
    }
    if done < len {
        found.add(len - done, DATA);
    }
    found.extents
}

/// A list on its way.
struct Found {
    extents: Vec<Extent>,
    most: usize,
}

impl Found {
    /// Puts a run behind the others; whether there is room for no more.
    fn add(&mut self, len: u64, state: u32) -> bool {
        let is_full = self.extents.len() == self.most;
        match self.extents.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.state == state => last.len += len,
            _ if is_full => return true,
            _ => self.extents.push(Extent { len, state }),
        }
        false
    }
}

/// The extents of a range of a file; whether the list is full.
fn file(found: &mut Found, fd: impl AsFd, (mut at, mut len): (u64, u64)) -> bool {
    while len > 0 {
        let data = match rustix::fs::seek(&fd, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole up to the end. The file is not shorter than the disk.
            Err(rustix::io::Errno::NXIO) => return found.add(len, HOLE),
            Err(_) => return found.add(len, DATA),
        };
        let hole = data.saturating_sub(at).min(len);
        if found.add(hole, HOLE) {
            return true;
        }
        (at, len) = (at + hole, len - hole);
        if len == 0 {
            return false;
        }
        let end = match rustix::fs::seek(&fd, SeekFrom::Hole(at)) {
            Ok(end) if end > at => end,
            _ => return found.add(len, DATA),
        };
        let data = (end - at).min(len);
        if found.add(data, DATA) {
            return true;
        }
        (at, len) = (at + data, len - data);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use devsplice_core::{Limits, StackBuilder};
    use std::os::unix::fs::FileExt;

    /// 1 MiB with 64 KiB of data at 256 KiB.
    fn sparse(name: &str) -> Bottom {
        let path = std::env::temp_dir().join(format!("devsplice-{name}-{}", std::process::id()));
        let file = std::fs::File::options();
        let file = file.clone().create(true).truncate(true).read(true).write(true).open(&path);
        let file = file.unwrap();
        std::fs::remove_file(path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 64 << 10], 256 << 10).unwrap();
        Bottom::File { fd: file.into(), kind: FileKind::Regular }
    }

    fn flat(bottom: &str) -> Stack {
        let mut builder = StackBuilder::new();
        let (root, _) = builder.backend(bottom, Limits::ideal(1 << 20)).unwrap();
        builder.finish(root)
    }

    fn list(found: &[Extent]) -> Vec<(u64, u32)> {
        found.iter().map(|extent| (extent.len >> 10, extent.state)).collect()
    }

    #[test]
    fn holes_of_a_file_are_holes_and_everything_else_is_data() {
        let (stack, bottoms) = (flat("a"), [sparse("extents")]);
        let ask = |at, len, most| list(&extents((&stack, &bottoms), (at, len), most));
        assert_eq!(ask(0, 1 << 20, 9), [(256, HOLE), (64, DATA), (704, HOLE)]);
        assert_eq!(ask(0, 1 << 20, 1), [(256, HOLE)]);
        assert_eq!(ask(260 << 10, 8 << 10, 9), [(8, DATA)]);
        assert_eq!(ask(300 << 10, 40 << 10, 9), [(20, DATA), (20, HOLE)]);
        assert_eq!(ask(0, 1 << 20, 2), [(256, HOLE), (64, DATA)]);
    }

    #[test]
    fn what_nobody_knows_is_data() {
        let Bottom::File { fd, .. } = sparse("extents-other") else { panic!("no file") };
        let (stack, bottoms) = (flat("a"), [Bottom::File { fd, kind: FileKind::Block }]);
        let all = extents((&stack, &bottoms), (0, 1 << 20), 9);
        assert_eq!(list(&all), [(1024, DATA)]);
    }

    #[test]
    fn layers_say_where_a_files_holes_are() {
        let mut builder = StackBuilder::new();
        let below: Vec<_> =
            ["a", "b"].map(|name| builder.backend(name, Limits::ideal(1 << 20)).unwrap().0).into();
        let driver = devsplice_layers::find("concat").unwrap();
        let args = devsplice_core::Args::new("concat", driver.keys, &[]).unwrap();
        let layer = (driver.make)(&args).unwrap();
        let top = builder.layer("concat", layer, &below, &mut |_, _, _| Ok(())).unwrap();
        let stack = builder.finish(top);
        let bottoms = [sparse("extents-a"), sparse("extents-b")];
        let all = list(&extents((&stack, &bottoms), (0, 2 << 20), 9));
        assert_eq!(all, [(256, HOLE), (64, DATA), (960, HOLE), (64, DATA), (704, HOLE)]);
    }
}
