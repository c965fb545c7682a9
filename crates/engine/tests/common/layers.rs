//! Answers for layers of each answer that there is, and for stacks built of them.

use devsplice_core::prelude::*;
use devsplice_core::{NodeId, Stack, StackBuilder};

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Never across a multiple of this.
    Split(u64),
    /// Writes to all, reads from one after the other.
    Mirror,
    Stripe(u64),
    /// Chunks of this size in reverse order: pieces that never continue one another.
    Reverse(u64),
    /// Answers an error in the range.
    Bad(u64, u64, Errno),
    /// Nothing below in the range.
    Zero(u64, u64),
    /// Passes everything on, later.
    Late(u64),
    /// Waits only in the range.
    LateIn(u64, u64, u64),
    /// Answers for more than was asked.
    TooLong,
    /// Sends behind the end of the device below.
    Behind,
    /// Refuses flushes.
    NoFlush(Errno),
}

struct Fake {
    kind: Kind,
    legs: u64,
    size: u64,
}

impl Layer for Fake {
    fn open(&mut self, below: &mut dyn Lower) -> Result<Limits> {
        self.legs = below.limits().len() as u64;
        let sizes = below.limits().iter().map(|limits| limits.size);
        self.size = match self.kind {
            Kind::Stripe(_) => sizes.sum(),
            _ => sizes.min().unwrap_or(0),
        };
        Limits::stack(below.limits(), self.size)
    }

    fn map(&self, io: Io) -> Result<Map, Errno> {
        let Extent { at, len } = io.extent;
        let to = |len, port: u64, at| Map::To { len, port: Port(port as u16), at };
        let split = |chunk| len.min(chunk - at % chunk);
        let until = |from: u64, to: u64| match at {
            at if at < from => (false, len.min(from - at)),
            at if at < to => (true, len.min(to - at)),
            _ => (false, len),
        };
        Ok(match self.kind {
            Kind::Split(chunk) => to(split(chunk), 0, at),
            Kind::Mirror if io.op == Op::Read => to(split(4096), at / 4096 % self.legs, at),
            Kind::Mirror => Map::All { len, at },
            Kind::Stripe(chunk) => {
                let row = at / chunk;
                to(split(chunk), row % self.legs, row / self.legs * chunk + at % chunk)
            }
            Kind::Reverse(chunk) => {
                let row = self.size / chunk - 1 - at / chunk;
                to(split(chunk), 0, row * chunk + at % chunk)
            }
            Kind::Bad(from, end, errno) => match until(from, end) {
                (true, _) => return Err(errno),
                (false, len) => to(len, 0, at),
            },
            Kind::Zero(from, end) => match until(from, end) {
                (true, len) => Map::Zero { len },
                (false, len) => to(len, 0, at),
            },
            Kind::Late(wait_ns) => Map::After { len, port: Port(0), at, wait_ns },
            Kind::LateIn(from, end, wait_ns) => match until(from, end) {
                (true, len) => Map::After { len, port: Port(0), at, wait_ns },
                (false, len) => to(len, 0, at),
            },
            Kind::TooLong => to(len + 512, 0, at),
            Kind::Behind => to(len, 0, self.size),
            Kind::NoFlush(_) => to(len, 0, at),
        })
    }

    fn flush(&self) -> Result<Map, Errno> {
        match self.kind {
            Kind::NoFlush(errno) => Err(errno),
            _ => Ok(Map::All { len: 0, at: 0 }),
        }
    }
}

/// A stack as a test writes it.
#[derive(Clone)]
pub enum Tree {
    Disk,
    Over(Kind, Vec<Tree>),
}

pub fn disk() -> Tree {
    Tree::Disk
}

pub fn over(kind: Kind, below: &[Tree]) -> Tree {
    Tree::Over(kind, below.to_vec())
}

pub fn build(tree: Tree, limits: Limits) -> Stack {
    let mut builder = StackBuilder::new();
    let top = add(&mut builder, tree, limits);
    builder.finish(top)
}

fn add(builder: &mut StackBuilder, tree: Tree, limits: Limits) -> NodeId {
    match tree {
        Tree::Disk => builder.backend("disk", limits).unwrap().0,
        Tree::Over(kind, below) => {
            let ports: Vec<_> = below.into_iter().map(|tree| add(builder, tree, limits)).collect();
            let layer = Box::new(Fake { kind, legs: 0, size: 0 });
            let name = format!("{kind:?}");
            builder.layer(&name, layer, &ports, &mut |_, _, _| Ok(())).unwrap()
        }
    }
}
