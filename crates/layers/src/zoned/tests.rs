//! Answers for the tests of `zoned`: tables, rules one by one, and random requests against a model.

use devsplice_core::Zones;
use devsplice_core::prelude::*;
use devsplice_core::zones::{Ask, Begun, Condition};
use std::sync::Arc;

use super::DRIVER;

const ZONE: u64 = 64 << 10;
const BLOCK: u64 = 4096;

/// Lower devices: how far each has grown; none of one of a size.
struct Files<'a>(&'a [Option<u64>], Vec<Limits>);

impl Lower for Files<'_> {
    fn limits(&self) -> &[Limits] {
        &self.1
    }

    fn filled(&self, port: Port) -> Option<u64> {
        self.0[usize::from(port.0)]
    }

    fn read(&mut self, _: Port, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EIO)
    }
}

fn file() -> Limits {
    Limits { block: 4096, physical: 4096, volatile_cache: true, ..Limits::ideal(ZONE) }
}

type Opened = (Box<dyn Layer>, Arc<dyn Zones>, Limits);

fn try_open(keys: &str, files: &[Option<u64>]) -> Result<Opened> {
    let pairs = keys.split_whitespace().filter_map(|word| word.split_once('='));
    let given: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mut layer = (DRIVER.make)(&Args::new(DRIVER.name, DRIVER.keys, &given)?)?;
    let limits = layer.open(&mut Files(files, vec![file(); files.len()]))?.checked()?;
    let zones = layer.zones().unwrap();
    Ok((layer, zones, limits))
}

fn open(keys: &str, files: &[Option<u64>]) -> Opened {
    try_open(keys, files).unwrap()
}

fn extent(zone: u64, at: u64, len: u64) -> Extent {
    Extent { at: zone * ZONE + at, len }
}

fn begin(zones: &Arc<dyn Zones>, ask: Ask, extent: Extent) -> Result<Begun, Errno> {
    zones.begin(ask, extent).map(|begun| begun.expect("there is something to do"))
}

fn write(zones: &Arc<dyn Zones>, zone: u64, at: u64, len: u64) -> Result<(), Errno> {
    let begun = begin(zones, Ask::Write(false), extent(zone, at, len))?;
    zones.end(&begun, Ok(()));
    Ok(())
}

fn reset(zones: &Arc<dyn Zones>, zone: u64) {
    let begun = begin(zones, Ask::Reset, extent(zone, 0, 0)).unwrap();
    zones.end(&begun, Ok(()));
}

fn shown(zones: &Arc<dyn Zones>, zone: u32) -> (Condition, u64) {
    let zone = zones.zone(zone).unwrap();
    (zone.condition, zone.written)
}

#[test]
fn a_zone_is_a_lower_device_and_what_was_not_written_reads_as_zeros() {
    let (layer, zones, limits) = open("", &[None, Some(8192), Some(0), Some(ZONE)]);
    assert_eq!((limits.size, limits.chunk, limits.discard), (4 * ZONE, 65_536, 0));
    assert!(!limits.write_zeroes && limits.volatile_cache);
    let read =
        |zone, at, len| layer.map(Io { op: Op::Read, extent: extent(zone, at, len), fua: false });
    let to = |port, at, len| Ok(Map::To { len, port: Port(port), at });
    assert_eq!(read(0, 4096, ZONE), to(0, 4096, ZONE - 4096));
    assert_eq!(read(1, 4096, 16_384), to(1, 4096, 4096));
    assert_eq!(read(1, 8192, 16_384), Ok(Map::Zero { len: 16_384 }));
    assert_eq!(read(1, 8192, 4 * ZONE), Ok(Map::Zero { len: ZONE - 8192 }));
    assert_eq!(read(3, 0, ZONE), to(3, 0, ZONE));
    let conditions: Vec<_> = (0..4).map(|zone| shown(&zones, zone).0).collect();
    use Condition::{Closed, Conventional, Empty, Full};
    assert_eq!(conditions, [Conventional, Closed, Empty, Full]);
    assert!(zones.zone(4).is_none() && zones.shape().count == 4);
}

#[test]
fn a_write_that_was_not_let_in_goes_nowhere() {
    let (layer, zones, _) = open("", &[None, Some(8192)]);
    let io = |at| Io { op: Op::Write, extent: extent(1, at, 4096), fua: false };
    assert_eq!(layer.map(io(8192)), Err(Errno::EIO));
    begin(&zones, Ask::Write(false), extent(1, 8192, 4096)).unwrap();
    assert_eq!(layer.map(io(8192)), Ok(Map::To { len: 4096, port: Port(1), at: 8192 }));
    assert_eq!(layer.map(io(12_288)), Err(Errno::EIO));
    assert_eq!(layer.map(Io::new(Op::Discard, 0, 4096)), Err(Errno::EIO));
    // A reset that was not begun cuts nothing.
    let reset = Io { op: Op::Reset, extent: extent(1, 0, ZONE), fua: false };
    assert_eq!(layer.map(reset), Ok(Map::Zero { len: ZONE }));
}

#[test]
fn zones_are_written_from_their_start_on_and_no_further_than_their_capacity() {
    let (_, zones, _) = open("capacity=32K", &[None, Some(0)]);
    assert_eq!(write(&zones, 1, 4096, 4096), Err(Errno::EIO));
    write(&zones, 1, 0, 8192).unwrap();
    assert_eq!(write(&zones, 1, 0, 4096), Err(Errno::EIO));
    assert_eq!(write(&zones, 1, 4096, 8192), Err(Errno::EIO));
    assert_eq!(write(&zones, 1, 8192, ZONE - 8192), Err(Errno::EIO));
    assert_eq!(shown(&zones, 1), (Condition::ImplicitlyOpen, 8192));
    write(&zones, 1, 8192, 24_576).unwrap();
    assert_eq!(shown(&zones, 1), (Condition::Full, 32_768));
    assert_eq!(write(&zones, 1, 32_768, 4096), Err(Errno::EIO));
    assert_eq!(zones.begin(Ask::Append(false), extent(1, 0, 4096)), Err(Errno::EIO));
    write(&zones, 0, 4096, 4096).unwrap();
    write(&zones, 0, 0, 4096).unwrap();
    assert_eq!(zones.begin(Ask::Append(false), extent(0, 0, 4096)), Err(Errno::EIO));
    assert_eq!(write(&zones, 2, 0, 4096), Err(Errno::EIO));
}

#[test]
fn appends_go_one_behind_the_other_and_keep_their_places_in_any_order_of_their_ends() {
    let (layer, zones, _) = open("append=16K", &[Some(0)]);
    let append = |len| begin(&zones, Ask::Append(true), extent(0, 0, len));
    let (first, second) = (append(4096).unwrap(), append(8192).unwrap());
    assert_eq!(first.io, Io { op: Op::Write, extent: extent(0, 0, 4096), fua: true });
    assert_eq!(second.io.extent, extent(0, 4096, 8192));
    let read = || layer.map(Io::new(Op::Read, 0, 16_384));
    assert_eq!(read(), Ok(Map::Zero { len: 16_384 }));
    zones.end(&second, Ok(()));
    assert_eq!(read(), Ok(Map::To { len: 12_288, port: Port(0), at: 0 }));
    zones.end(&first, Ok(()));
    assert_eq!(append(20_480), Err(Errno::EIO));
}

#[test]
fn only_so_many_zones_are_open_or_active() {
    let files = [Some(0), Some(0), Some(0), Some(4096)];
    let (_, zones, _) = open("open=2 active=3", &files);
    let ask = |ask, zone| zones.begin(ask, extent(zone, 0, 0));
    write(&zones, 0, 0, 4096).unwrap();
    assert_eq!(ask(Ask::Open, 1), Ok(None));
    // The third zone that is active is zone 3, which was written before.
    assert_eq!(ask(Ask::Open, 2), Err(Errno::EOVERFLOW));
    // Nobody asked for zone 0 to be open: it makes room.
    assert_eq!(ask(Ask::Open, 3), Ok(None));
    assert_eq!(shown(&zones, 0).0, Condition::Closed);
    assert_eq!(write(&zones, 0, 4096, 4096), Err(Errno::ETOOMANYREFS));
    assert_eq!(ask(Ask::Close, 1), Ok(None));
    assert_eq!(shown(&zones, 1).0, Condition::Empty);
    write(&zones, 0, 4096, 4096).unwrap();
    assert_eq!((ask(Ask::Close, 0), ask(Ask::Close, 0)), (Ok(None), Ok(None)));
    assert_eq!(ask(Ask::Close, 1), Err(Errno::EIO));
    let finish = begin(&zones, Ask::Finish, extent(3, 0, 0)).unwrap();
    assert_eq!(finish.io, Io { op: Op::Finish, extent: extent(3, 0, ZONE), fua: false });
    zones.end(&finish, Ok(()));
    assert_eq!(shown(&zones, 3), (Condition::Full, ZONE));
    assert_eq!(ask(Ask::Open, 3), Err(Errno::EIO));
    assert_eq!(ask(Ask::Finish, 3), Ok(None));
    write(&zones, 2, 0, 4096).unwrap();
}

#[test]
fn a_zone_that_is_full_is_finished_though_writes_are_on_their_way() {
    let (_, zones, _) = open("", &[None, Some(0)]);
    let half = |at| begin(&zones, Ask::Append(false), extent(1, at, ZONE / 2)).unwrap();
    let (first, second) = (half(0), half(0));
    zones.end(&second, Ok(()));
    assert_eq!(zones.begin(Ask::Finish, extent(1, 0, 0)), Ok(None));
    assert_eq!(zones.begin(Ask::Reset, extent(1, 0, 0)), Err(Errno::EBUSY));
    zones.end(&first, Ok(()));
    assert_eq!(shown(&zones, 1), (Condition::Full, ZONE));
}

#[test]
fn a_zone_is_not_reset_under_its_writes_nor_written_while_it_is_reset() {
    let (layer, zones, _) = open("", &[None, Some(4096), Some(0)]);
    let out = begin(&zones, Ask::Write(false), extent(1, 4096, 4096)).unwrap();
    for ask in [Ask::Reset, Ask::Finish, Ask::ResetAll] {
        assert_eq!(zones.begin(ask, extent(1, 0, 0)), Err(Errno::EBUSY), "{ask:?}");
    }
    zones.end(&out, Ok(()));
    let all = begin(&zones, Ask::ResetAll, Extent { at: 0, len: 0 }).unwrap();
    assert_eq!(all.io, Io::new(Op::Reset, 0, 3 * ZONE));
    assert_eq!(write(&zones, 1, 8192, 4096), Err(Errno::EBUSY));
    assert_eq!(zones.begin(Ask::Open, extent(1, 0, 0)), Err(Errno::EBUSY));
    let map = |zone| layer.map(Io { op: Op::Reset, extent: extent(zone, 0, ZONE), fua: false });
    assert_eq!(map(0), Ok(Map::Zero { len: ZONE }));
    assert_eq!(map(1), Ok(Map::To { len: ZONE, port: Port(1), at: 0 }));
    assert_eq!(map(2), Ok(Map::Zero { len: ZONE }));
    assert_eq!(layer.map(Io::new(Op::Read, ZONE, 4096)), Ok(Map::Zero { len: 4096 }));
    zones.end(&all, Err(Errno::EIO));
    // It may or may not have been cut: it is as it was, and can be reset again.
    assert_eq!(shown(&zones, 1), (Condition::ImplicitlyOpen, 8192));
    reset(&zones, 1);
    assert_eq!(shown(&zones, 1), (Condition::Empty, 0));
    assert_eq!(zones.begin(Ask::Reset, extent(1, 0, 0)), Ok(None));
    for ask in [Ask::Reset, Ask::Finish, Ask::Open, Ask::Close] {
        assert_eq!(zones.begin(ask, extent(0, 0, 0)), Err(Errno::EIO), "{ask:?}");
    }
}

#[test]
fn a_write_that_failed_gives_its_place_back_when_none_is_on_its_way() {
    let (_, zones, _) = open("", &[Some(4096), Some(0)]);
    let append = || begin(&zones, Ask::Append(false), extent(0, 0, 4096));
    let (first, second) = (append().unwrap(), append().unwrap());
    zones.end(&first, Err(Errno::EIO));
    assert_eq!(append(), Err(Errno::EIO));
    zones.end(&second, Ok(()));
    // Behind what was done; the place of the one that failed stays as it is.
    assert_eq!(shown(&zones, 0), (Condition::ImplicitlyOpen, 12_288));
    let failed = begin(&zones, Ask::Write(false), extent(1, 0, ZONE)).unwrap();
    assert_eq!(shown(&zones, 1).0, Condition::Full);
    zones.end(&failed, Err(Errno::ENOSPC));
    assert_eq!(shown(&zones, 1), (Condition::Empty, 0));
    // Something of it may be below all the same.
    reset(&zones, 1);
    write(&zones, 1, 0, 4096).unwrap();
}

#[test]
fn what_a_dead_server_had_in_flight_may_come_again_once() {
    let (_, zones, _) = open("", &[Some(8192), Some(ZONE), Some(8192)]);
    assert_eq!(write(&zones, 0, 4096, 8192), Err(Errno::EIO));
    zones.taken_over();
    assert_eq!(write(&zones, 0, 0, 4096), Err(Errno::EIO), "it does not reach to the end");
    assert_eq!(write(&zones, 0, 12_288, 4096), Err(Errno::EIO), "it leaves a gap");
    write(&zones, 0, 4096, 8192).unwrap();
    assert_eq!(shown(&zones, 0).1, 12_288);
    assert_eq!(write(&zones, 0, 4096, 8192), Err(Errno::EIO), "only once");
    write(&zones, 1, ZONE - 4096, 4096).unwrap();
    assert_eq!(shown(&zones, 1), (Condition::Full, ZONE));
    write(&zones, 2, 8192, 4096).unwrap();
    assert_eq!(write(&zones, 2, 8192, 4096), Err(Errno::EIO), "it has gone on");
}

#[test]
fn a_flush_goes_to_the_zones_that_were_changed_before_it_and_leaves_none_out() {
    let (layer, zones, _) = open("", &[None, Some(0), Some(0)]);
    let dirty = || (0..3).map(|port| layer.needs_flush(Port(port))).collect::<Vec<_>>();
    let flush = || begin(&zones, Ask::Flush, Extent { at: 0, len: 0 }).unwrap();
    // A front end that does not say what it does has all made durable.
    assert_eq!(dirty(), [true; 3]);
    zones.end(&flush(), Ok(()));
    assert_eq!(dirty(), [false; 3]);
    write(&zones, 1, 0, 4096).unwrap();
    let first = flush();
    // Done while the flush is under way: it may have passed by.
    write(&zones, 2, 0, 4096).unwrap();
    let second = flush();
    zones.end(&first, Ok(()));
    assert_eq!(dirty(), [false, false, true]);
    zones.end(&second, Err(Errno::EIO));
    assert_eq!(dirty(), [false, false, true]);
    zones.end(&flush(), Ok(()));
    assert_eq!(dirty(), [false; 3]);
    reset(&zones, 1);
    write(&zones, 0, 0, 4096).unwrap();
    assert_eq!(dirty(), [true, true, false]);
}

#[test]
fn what_makes_no_device_of_zones_is_refused() {
    let refusal = |keys: &str, files: &[Option<u64>]| {
        try_open(keys, files).err().expect("it should be refused").to_string()
    };
    assert!(refusal("capacity=128K", &[Some(0)]).contains("capacity: 131072 bytes"));
    assert!(refusal("capacity=1K", &[Some(0)]).contains("4096-byte blocks"));
    assert!(refusal("append=0", &[Some(0)]).contains("append: 0 bytes"));
    assert!(refusal("open=2", &[Some(0)]).contains("open: 2 of 1 zones"));
    assert!(refusal("", &[Some(100)]).contains("zone 0: holds 100 bytes"));
    assert!(refusal("capacity=32K", &[None, Some(36_864)]).contains("zone 1: holds 36864 bytes"));
}

/// A model of a device: what each zone holds and, as files, what was made of it below.
struct Model {
    told: Vec<Vec<u8>>,
    files: Vec<Vec<u8>>,
}

impl Model {
    /// Has a request routed and carried out on the files.
    fn carry_out(&mut self, layer: &dyn Layer, io: Io, data: &mut [u8]) {
        let mut part = 0;
        while part < io.extent.len {
            let extent = Extent { at: io.extent.at + part, len: io.extent.len - part };
            let answer = layer.map(Io { extent, ..io }).unwrap();
            let len = answer.len() as usize;
            let bytes = part as usize..part as usize + len;
            match (answer, io.op) {
                (Map::Zero { .. }, Op::Read) => data[bytes].fill(0),
                (Map::Zero { .. }, _) => {}
                (Map::To { port, at, .. }, op) => {
                    let (file, at) = (&mut self.files[usize::from(port.0)], at as usize);
                    match op {
                        // As a file does: nothing is read behind its end.
                        Op::Read => data[bytes].copy_from_slice(&file[at..at + len]),
                        Op::Write => {
                            file.resize(file.len().max(at + len), 0);
                            file[at..at + len].copy_from_slice(&data[bytes]);
                        }
                        Op::Reset => file.truncate(at),
                        _ => file.resize(at + len, 0),
                    }
                }
                other => panic!("{other:?}"),
            }
            part += answer.len();
        }
    }
}

#[test]
fn random_requests_leave_what_a_model_says_and_files_whose_length_is_the_write_pointer() {
    let mut seed = 7_u64;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let count = 4;
    let capacity = 48 << 10;
    let mut model = Model { told: vec![Vec::new(); count], files: vec![Vec::new(); count] };
    let (mut layer, mut zones, _) = open("capacity=48K", &[Some(0); 4]);
    for round in 0..20_000_u32 {
        let zone = random(count as u64);
        let place = zone as usize;
        let written = model.told[place].len() as u64;
        let len = (1 + random(4)) * BLOCK;
        match random(20) {
            0..=7 => {
                let mut data = vec![round as u8; len as usize];
                let is_append = random(2) == 0;
                // Now and then off the place where the zone goes on.
                let at = if random(8) == 0 { random(16) * BLOCK } else { written };
                let ask = if is_append { Ask::Append(false) } else { Ask::Write(false) };
                let extent = extent(zone, if is_append { 0 } else { at }, len);
                let fits = written + len <= capacity && (is_append || at == written);
                let begun = zones.begin(ask, extent);
                assert_eq!(begun.is_ok(), fits, "{ask:?} {extent:?} at {written}");
                let Ok(Some(begun)) = begun else { continue };
                model.carry_out(&*layer, begun.io, &mut data);
                zones.end(&begun, Ok(()));
                model.told[place].extend_from_slice(&data);
            }
            8..=14 => {
                let at = random(ZONE / BLOCK) * BLOCK;
                let len = len.min(ZONE - at);
                let mut data = vec![0xAA; len as usize];
                let io = Io { op: Op::Read, extent: extent(zone, at, len), fua: false };
                model.carry_out(&*layer, io, &mut data);
                let told = &model.told[place];
                let is_right = |(index, byte): (usize, &u8)| {
                    told.get(at as usize + index).copied().unwrap_or(0) == *byte
                };
                assert!(data.iter().enumerate().all(is_right), "round {round}");
            }
            15..=17 => {
                let (ask, end) =
                    if random(2) == 0 { (Ask::Reset, 0) } else { (Ask::Finish, capacity) };
                if let Some(begun) = zones.begin(ask, extent(zone, 0, 0)).unwrap() {
                    model.carry_out(&*layer, begun.io, &mut []);
                    zones.end(&begun, Ok(()));
                }
                model.told[place].resize(end as usize, 0);
            }
            18 if random(8) == 0 => {
                if let Some(begun) = zones.begin(Ask::ResetAll, Extent { at: 0, len: 0 }).unwrap() {
                    model.carry_out(&*layer, begun.io, &mut []);
                    zones.end(&begun, Ok(()));
                }
                model.told.iter_mut().for_each(Vec::clear);
            }
            _ => {
                // Another server, which knows the files alone.
                let lengths: Vec<_> =
                    model.files.iter().map(|file| Some(file.len() as u64)).collect();
                (layer, zones, _) = open("capacity=48K", &lengths);
            }
        }
        for (number, told) in model.told.iter().enumerate() {
            assert_eq!(model.files[number].len(), told.len(), "round {round}");
            assert_eq!(shown(&zones, number as u32).1, told.len() as u64);
        }
    }
}
