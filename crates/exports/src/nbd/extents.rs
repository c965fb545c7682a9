//! Answers for what clients are told of a disk's content: runs of data and of what reads as zeros.

use devsplice_nbd::wire::{STATE_HOLE, STATE_ZERO};

use super::post::Extent;
use crate::extents::{Content, Extents, Told};

const HOLE: u32 = STATE_HOLE | STATE_ZERO;
const DATA: u32 = 0;

/// The extents from `at` on, at most `most`, of at most `len` bytes together and of at least one.
/// No more than servers can tell in a moment.
pub(super) fn list(known: &Extents, (at, len): (u64, u64), most: usize) -> Vec<Extent> {
    let mut found = Found { extents: Vec::new(), most };
    let mut done = 0;
    // It is as old as the question, not older.
    let mut told = Told::default();
    while done < len && !told.is_enough() {
        let (run, content) = known.look(at + done, len - done, &mut told);
        let state = match content {
            Content::Data => DATA,
            Content::Hole | Content::Zero => HOLE,
        };
        if found.add(run, state) {
            break;
        }
        done += run;
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use devsplice_core::{Limits, Stack, StackBuilder};
    use devsplice_uring::FileKind;

    use super::*;
    use crate::threads::Bottom;

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

    /// In KiB.
    fn ask(known: &Extents, (at, len): (u64, u64), most: usize) -> Vec<(u64, u32)> {
        let found = list(known, (at << 10, len << 10), most);
        found.iter().map(|extent| (extent.len >> 10, extent.state)).collect()
    }

    #[test]
    fn holes_of_a_file_are_holes_and_everything_else_is_data() {
        let known = Extents::in_use(&Arc::new(flat("a")), &[sparse("extents")]).unwrap();
        assert_eq!(ask(&known, (0, 1024), 9), [(256, HOLE), (64, DATA), (704, HOLE)]);
        assert_eq!(ask(&known, (0, 1024), 1), [(256, HOLE)]);
        assert_eq!(ask(&known, (260, 8), 9), [(8, DATA)]);
        assert_eq!(ask(&known, (300, 40), 9), [(20, DATA), (20, HOLE)]);
        assert_eq!(ask(&known, (0, 1024), 2), [(256, HOLE), (64, DATA)]);
    }

    #[test]
    fn what_was_cut_off_a_file_is_no_hole() {
        let bottoms = [sparse("extents-cut")];
        let known = Extents::in_use(&Arc::new(flat("a")), &bottoms).unwrap();
        let [Bottom::File { fd, .. }] = &bottoms else { panic!("no file") };
        rustix::fs::ftruncate(fd, 512 << 10).unwrap();
        let all = [(256, HOLE), (64, DATA), (192, HOLE), (512, DATA)];
        assert_eq!(ask(&known, (0, 1024), 9), all);
        assert_eq!(ask(&known, (600, 100), 9), [(100, DATA)]);
    }

    #[test]
    fn what_nobody_knows_is_data() {
        let Bottom::File { fd, .. } = sparse("extents-other") else { panic!("no file") };
        let block = [Bottom::File { fd, kind: FileKind::Block }];
        let known = Extents::in_use(&Arc::new(flat("a")), &block).unwrap();
        assert_eq!(ask(&known, (0, 1024), 9), [(1024, DATA)]);
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
        let bottoms = [sparse("extents-a"), sparse("extents-b")];
        let known = Extents::in_use(&Arc::new(builder.finish(top)), &bottoms).unwrap();
        let all = ask(&known, (0, 2048), 9);
        assert_eq!(all, [(256, HOLE), (64, DATA), (960, HOLE), (64, DATA), (704, HOLE)]);
    }

    #[test]
    fn below_a_layer_with_a_live_side_all_is_data_while_others_use_it() {
        let mut builder = StackBuilder::new();
        let (bottom, _) = builder.backend("a", Limits::ideal(1 << 20)).unwrap();
        let driver = devsplice_layers::find("stats").unwrap();
        let args = devsplice_core::Args::new("stats", driver.keys, &[]).unwrap();
        let layer = (driver.make)(&args).unwrap();
        let top = builder.layer("stats", layer, &[bottom], &mut |_, _, _| Ok(())).unwrap();
        let (stack, bottoms) = (Arc::new(builder.finish(top)), [sparse("extents-alive")]);
        let known = Extents::in_use(&stack, &bottoms).unwrap();
        assert_eq!(ask(&known, (0, 1024), 9), [(1024, DATA)]);
        let known = Extents::at_rest(&stack, &bottoms).unwrap();
        assert_eq!(ask(&known, (0, 1024), 9), [(256, HOLE), (64, DATA), (704, HOLE)]);
    }
}
