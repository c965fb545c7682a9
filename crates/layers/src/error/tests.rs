//! Answers for tests of the layer: what fails, when, and who is not counted.

use super::*;
use crate::testing::{answers, disk, disk_4k, open, refusal, to};

const EIO: Result<Map, Errno> = Err(Errno::EIO);

#[test]
fn what_touches_the_range_fails_and_what_lies_before_it_goes_down() {
    let (bad, _) = open(&DRIVER, "at=4k len=1k", &[disk(1 << 20)]).unwrap();
    let eio = Err(Errno::EIO);
    for (at, len, want) in [
        (0, 4096, vec![to(0, 0, 4096)]),
        (0, 4608, vec![to(0, 0, 4096), eio]),
        (4608, 8192, vec![eio]),
        (5120, 512, vec![to(0, 5120, 512)]),
        (0, 1 << 20, vec![to(0, 0, 4096), eio]),
    ] {
        assert_eq!(answers(&*bad, Io::new(Op::Read, at, len)), want, "{at} {len}");
        assert_eq!(answers(&*bad, Io::new(Op::Discard, at, len)), [to(0, at, len)]);
    }
    assert_eq!(bad.flush(), Ok(Map::All { len: 0, at: 0 }));
}

#[test]
fn each_operation_fails_with_its_own_number() {
    let keys = "flush=ENOSPC zeroes=EOPNOTSUPP";
    let (bad, _) = open(&DRIVER, keys, &[disk(1 << 20)]).unwrap();
    assert_eq!(bad.flush(), Err(Errno::ENOSPC));
    let zeroes = Op::WriteZeroes { unmap: false };
    assert_eq!(bad.map(Io::new(zeroes, 0, 512)), Err(Errno::EOPNOTSUPP));
    assert_eq!(bad.map(Io::new(Op::Read, 0, 512)), to(0, 0, 512));
}

#[test]
fn every_third_request_fails() {
    let (bad, _) = open(&DRIVER, "every=3 at=512", &[disk(1 << 20)]).unwrap();
    let fails =
        |_| *answers(&*bad, Io::new(Op::Write, 0, 4096)).last().unwrap() != to(0, 512, 3584);
    assert_eq!([0; 6].map(fails), [false, false, true, false, false, true]);
}

#[test]
fn who_asks_where_bytes_lie_is_not_counted() {
    let (bad, _) = open(&DRIVER, "every=2 at=512", &[disk(1 << 20)]).unwrap();
    let asks = |at| bad.locate(Extent { at, len: 4096 });
    assert_eq!([asks(0), asks(512), asks(4096)], [to(0, 0, 512), EIO, EIO]);
    let reads = [0; 4].map(|_| bad.map(Io::new(Op::Read, 512, 512)));
    assert_eq!(reads, [to(0, 512, 512), EIO, to(0, 512, 512), EIO]);
    let (writes, _) = open(&DRIVER, "write=EIO", &[disk(1 << 20)]).unwrap();
    assert_eq!(writes.locate(Extent { at: 0, len: 4096 }), to(0, 0, 4096));
}

#[test]
fn a_range_off_the_device_or_its_blocks_is_refused() {
    assert!(refusal(&DRIVER, "at=1M", &[disk(1 << 20)]).contains("leaves the"));
    assert!(refusal(&DRIVER, "at=512", &[disk_4k(1 << 20)]).contains("no multiple"));
    assert!(refusal(&DRIVER, "every=0", &[disk(512)]).contains("fail nothing"));
    assert!(refusal(&DRIVER, "read=EBAD", &[disk(512)]).contains("no error name"));
}
