//! Answers for splices that a ring's helpers carry out, and for the bell that tells of them.

use std::sync::Arc;

use devsplice_core::{Error, Result};
use devsplice_engine::ring::MAX_PARTS;
use devsplice_engine::{Event, FileId, Splice, To};

use super::{KIND_BELL, Uring};
use crate::bytes::{Bytes, Helpers};
use crate::files::{FileKind, RingFile};
use crate::splice::{DATA_AT, PagesKind};
use crate::uapi::{OP_POLL_ADD, Sqe};

impl Uring {
    /// Adds a backend of bytes. It takes one place of what `Config::files` asked for.
    ///
    /// # Errors
    /// As [`Uring::add_file`], or if its helper threads cannot be started.
    pub fn add_bytes(&mut self, bytes: Arc<dyn Bytes>) -> Result<FileId> {
        if self.helpers.is_none() {
            self.helpers = Some(Helpers::new(self.flights.len())?);
            self.listen();
        }
        // Its place in the kernel's table is held by what refuses every read and write: a splice
        // that went there by mistake fails.
        let fd = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| Error::os("a place for bytes", &errno.into()))?;
        let id = self.add_file(RingFile { fd, kind: FileKind::Other })?;
        self.files[usize::from(id.0)].bytes = Some(bytes);
        Ok(id)
    }

    /// Asks to be told, once, when helpers have results. All of them ring with the same bell. It is
    /// not among the registered files: the wait never ends, and up to Linux 6.12 letting the table
    /// of files go waits for every entry that uses one.
    pub(super) fn listen(&mut self) {
        let Some(helpers) = &self.helpers else { return };
        let sqe = Sqe {
            opcode: OP_POLL_ADD,
            fd: helpers.bell(),
            op_flags: u32::try_from(libc::POLLIN).unwrap_or(1),
            user_data: KIND_BELL,
            ..Sqe::default()
        };
        self.queues.push(sqe);
    }

    /// Hands a splice to the helpers if its place is one of bytes; whether it was.
    pub(super) fn helped(&mut self, key: u32, splice: &Splice<'_>) -> bool {
        let To::File(file) = splice.to else { return false };
        let Some(bytes) = &self.files[usize::from(file.0)].bytes else { return false };
        let Some(helpers) = &self.helpers else { return false };
        let flight = &mut self.flights[key as usize];
        (flight.op, flight.file, flight.len) = (splice.op, file.0, splice.len);
        flight.pages = None;
        let mut addresses = [0; MAX_PARTS];
        if splice.op.has_pages() {
            let kind = PagesKind::unpack(splice.pages);
            let PagesKind::Memory { lane, slot } = kind else {
                panic!("a request for a backend of bytes has no memory of ours: {splice:?}")
            };
            let Some(arena) = &mut self.arenas[usize::from(lane)] else {
                panic!("lane {lane} has no memory of its own")
            };
            for (address, part) in addresses.iter_mut().zip(splice.parts) {
                let at = DATA_AT + part.at as usize;
                *address = arena.address(usize::from(slot), at, part.len as usize);
            }
            arena.lend(usize::from(slot));
            flight.pages = Some(kind);
        }
        helpers.hand_over(key, splice, bytes, &addresses);
        true
    }

    /// What helpers have done.
    #[cold]
    pub(super) fn landed(&mut self) -> Option<Event> {
        let (key, result) = self.helpers.as_ref()?.next()?;
        let flight = &self.flights[key as usize];
        if let Some(PagesKind::Memory { lane, slot }) = flight.pages {
            if let Some(arena) = &mut self.arenas[usize::from(lane)] {
                arena.give_back(usize::from(slot));
            }
            self.bytes_copied += result.unwrap_or(0);
        }
        Some(Event::Splice { key, result })
    }
}
