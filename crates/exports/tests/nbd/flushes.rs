//! Answers for flushes that fail: the kernel says so once, and every client hears of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devsplice_nbd::Mode;
use devsplice_nbd::wire::{ask, command, error};
use devsplice_uring::Bytes;

use crate::peer::{Host, Peer, SIZE, pattern};

/// A medium that has lost data, and says so to whoever asks next, and to nobody afterwards.
#[derive(Default)]
struct Forgetful {
    has_lost: AtomicBool,
    is_slow: AtomicBool,
}

impl Bytes for Forgetful {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        if self.is_slow.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        let has_lost = self.has_lost.swap(false, Ordering::SeqCst);
        if has_lost { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
    }
}

fn flush(peer: &mut Peer) -> u32 {
    peer.plain(command::FLUSH, 0, (0, 0))
}

#[test]
fn a_flush_that_failed_is_told_to_every_client_once() {
    for threads in [1, 2] {
        let medium = Arc::new(Forgetful::default());
        let bytes: Arc<dyn Bytes> = medium.clone();
        let host = Host::new("flushes", |wishes| {
            (wishes.bytes, wishes.threads) = (Some(bytes), threads);
        });
        let mut peers: Vec<_> = (0..3).map(|_| host.peer(Mode::Structured)).collect();
        for peer in &mut peers {
            assert_eq!(peer.write(0, &pattern(4096, 1), 0), 0);
            assert_eq!(flush(peer), 0);
        }
        medium.has_lost.store(true, Ordering::SeqCst);
        assert_eq!(flush(&mut peers[0]), error::EIO);
        assert_eq!(flush(&mut peers[0]), 0, "it knows");
        let mut late = host.peer(Mode::Structured);
        assert_eq!(flush(&mut late), 0, "it has written nothing that could be lost");
        assert_eq!(flush(&mut peers[1]), error::EIO);
        assert_eq!(peers[2].write(4096, &pattern(4096, 2), ask::FUA), error::EIO);
        for peer in &mut peers {
            assert_eq!(flush(peer), 0);
        }
        // And by a write that is a flush as well.
        medium.has_lost.store(true, Ordering::SeqCst);
        assert_eq!(peers[1].write(0, &pattern(4096, 3), ask::FUA), error::EIO);
        assert_eq!(flush(&mut peers[0]), error::EIO);
        assert_eq!(flush(&mut peers[1]), 0);
    }
}

#[test]
fn a_flush_that_failed_when_its_client_had_gone_is_told_when_it_asks_again() {
    let medium = Arc::new(Forgetful::default());
    let bytes: Arc<dyn Bytes> = medium.clone();
    let host = Host::new("untold", |wishes| wishes.bytes = Some(bytes));
    let mut other = host.peer(Mode::Structured);
    let mut peer = host.peer(Mode::Structured);
    assert_eq!(peer.write(0, &pattern(4096, 1), 0), 0);
    medium.has_lost.store(true, Ordering::SeqCst);
    medium.is_slow.store(true, Ordering::SeqCst);
    let request = peer.request(command::FLUSH, 0, (0, 0));
    peer.send(&request);
    std::thread::sleep(std::time::Duration::from_millis(100));
    peer.cut();
    let mut peer = host.peer(Mode::Structured);
    host.wait_until(2);
    medium.is_slow.store(false, Ordering::SeqCst);
    assert_eq!(flush(&mut peer), error::EIO);
    assert_eq!(flush(&mut other), error::EIO);
    assert_eq!((flush(&mut peer), flush(&mut other)), (0, 0));
}
