//! Answers for a stream between two machines: what is under way, what is there, cut at any byte.
//!
//! Data of requests travels as sectors, all else as bytes, so that a megabyte is not rendered.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::cells::Cell;

/// What a piece is a part of.
#[derive(Clone)]
pub(crate) enum Data {
    Bytes(Arc<[u8]>),
    Cells(Arc<[Cell]>),
}

/// A run of bytes of a stream.
#[derive(Clone)]
pub(crate) struct Piece {
    pub(crate) data: Data,
    /// Which bytes of the data.
    pub(crate) from: usize,
    to: usize,
}

impl Piece {
    pub(crate) fn bytes(bytes: &[u8]) -> Piece {
        Piece { data: Data::Bytes(bytes.into()), from: 0, to: bytes.len() }
    }

    pub(crate) fn cells(cells: Arc<[Cell]>, from: usize, to: usize) -> Piece {
        Piece { data: Data::Cells(cells), from, to }
    }

    pub(crate) fn len(&self) -> usize {
        self.to - self.from
    }
}

/// Bytes in their order.
#[derive(Default)]
pub(crate) struct Stream {
    pieces: VecDeque<Piece>,
    len: usize,
}

impl Stream {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn push(&mut self, piece: Piece) {
        self.len += piece.len();
        if piece.len() > 0 {
            self.pieces.push_back(piece);
        }
    }

    /// The first bytes, at most `most`, as far as they lie together.
    pub(crate) fn take(&mut self, most: usize) -> Option<Piece> {
        let mut first = self.pieces.pop_front()?;
        let count = first.len().min(most);
        let rest = Piece { from: first.from + count, ..first.clone() };
        first.to = first.from + count;
        if rest.len() > 0 {
            self.pieces.push_front(rest);
        }
        self.len -= count;
        Some(first)
    }

    /// Moves the first `count` bytes behind another stream's.
    pub(crate) fn pour(&mut self, to: &mut Stream, count: usize) {
        let mut left = count;
        while left > 0
            && let Some(piece) = self.take(left)
        {
            left -= piece.len();
            to.push(piece);
        }
    }

    /// A copy of the first bytes, at most `most`; `None` if data of requests is among them.
    pub(crate) fn head(&self, most: usize) -> Option<Vec<u8>> {
        let mut head = Vec::new();
        for piece in &self.pieces {
            if head.len() == most {
                break;
            }
            let Data::Bytes(bytes) = &piece.data else { return None };
            let count = piece.len().min(most - head.len());
            head.extend_from_slice(&bytes[piece.from..piece.from + count]);
        }
        Some(head)
    }

    /// Drops the first `count` bytes.
    pub(crate) fn skip(&mut self, count: usize) {
        let mut left = count;
        while left > 0
            && let Some(piece) = self.take(left)
        {
            left -= piece.len();
        }
    }
}

/// One direction of a connection.
#[derive(Default)]
pub(crate) struct Pipe {
    pub(crate) under_way: Stream,
    pub(crate) there: Stream,
    /// Something of it is due to arrive.
    pub(crate) is_flowing: bool,
    /// Nothing arrives any more, and nobody is told.
    pub(crate) is_silent: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_their_order_however_they_are_cut() {
        for cut in 1..9 {
            let (mut from, mut to) = (Stream::default(), Stream::default());
            for start in [0_u8, 5, 10] {
                from.push(Piece::bytes(&[start, start + 1, start + 2, start + 3, start + 4]));
            }
            while from.len() > 0 {
                from.pour(&mut to, cut);
            }
            assert_eq!(to.head(99).unwrap(), (0..15).collect::<Vec<_>>());
            to.skip(7);
            assert_eq!((to.len(), to.head(2).unwrap()), (8, vec![7, 8]));
            to.push(Piece::cells(vec![1, 2].into(), 100, 600));
            assert!(to.head(8).is_some() && to.head(9).is_none());
            to.skip(8);
            let piece = to.take(412).unwrap();
            assert_eq!((piece.from, piece.len(), to.len()), (100, 412, 88));
        }
    }
}
