//! Answers for the ways of a ublk device that a good kernel seldom takes: slots that cannot be had,
//! and commands with bare numbers. Needs root and ublk; the VM has both.

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use devsplice_core::{Limits, StackBuilder};
    use rustix::fs::Mode;

    use super::super::*;
    use crate::threads::Bottom;

    const SIZE: u64 = 8 << 20;
    const LEN: usize = 64 << 10;
    const CLIENTS: usize = 8;

    fn service() -> Service {
        let fd = rustix::fs::memfd_create("bottom", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, SIZE).unwrap();
        let mut builder = StackBuilder::new();
        let (bottom, _) = builder.backend("bottom", Limits::ideal(SIZE)).unwrap();
        Service {
            stack: Arc::new(builder.finish(bottom)),
            bottoms: vec![Bottom::File { fd, kind: FileKind::Regular }],
            pool: None,
            on_stuck: Arc::new(|_| {}),
            on_event: Arc::new(|_| {}),
            on_death: |error| panic!("{error}"),
        }
    }

    fn options(data_path: DataPath, batch: bool) -> Options {
        Options {
            id: None,
            queues: 2,
            threads: 1,
            depth: 16,
            read_only: false,
            data_path: Some(data_path),
            batch: Some(batch),
            part_scan: false,
            affinity: false,
            stuck_seconds: 30,
            recovery: Some(Recovery::Off),
        }
    }

    /// Clients at once write, each its own bytes to its own places, and read them back.
    fn is_true(path: &str) {
        let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        let client = |index: usize| {
            let disk: OwnedFd = rustix::fs::open(path, flags, Mode::empty()).unwrap();
            let mut room = vec![0_u8; LEN + 4096];
            let start = room.as_ptr().align_offset(4096);
            let bytes = &mut room[start..start + LEN];
            for round in 0..8 {
                let at = (index * 8 + round) as u64 * LEN as u64;
                let byte = |place: usize| (place / 512 + index * 31 + round * 7) as u8;
                for (place, into) in bytes.iter_mut().enumerate() {
                    *into = byte(place);
                }
                assert_eq!(rustix::io::pwrite(&disk, bytes, at), Ok(LEN));
                bytes.fill(0);
                assert_eq!(rustix::io::pread(&disk, &mut *bytes, at), Ok(LEN));
                assert!(
                    bytes.iter().enumerate().all(|(place, got)| *got == byte(place)),
                    "at {at}"
                );
            }
        };
        std::thread::scope(|scope| {
            for index in 0..CLIENTS {
                scope.spawn(move || client(index));
            }
        });
    }

    /// The driver, if there is one that has this path.
    fn control(path: DataPath) -> Option<Control> {
        let control = Control::open().map_err(|error| error.to_string()).and_then(|control| {
            let has = DataPath::offered(control.features()).contains(&path);
            if has { Ok(control) } else { Err(format!("no {path} path here")) }
        });
        control.map_err(|reason| println!("skipped: {reason}")).ok()
    }

    /// Two lanes of 16 tags: every other one finds its slot taken, the rest do not.
    fn take_every_other_slot(ring: &mut Uring) -> Result<()> {
        (0..32).step_by(2).try_for_each(|slot| ring.occupy_slot(slot))
    }

    fn with_slots_taken(path: DataPath, batch: bool) {
        let Some(control) = control(path) else { return };
        if batch && control.features() & F_BATCH_IO == 0 {
            return println!("skipped: no batches here");
        }
        let options = options(path, batch);
        let extra = Extra { prepare: Some(take_every_other_slot), ..Extra::default() };
        let made = &mut |_| ();
        let device = Device::make(control, (&options, extra), service(), made).unwrap();
        is_true(device.path());
        let counts = device.detach().unwrap();
        let moved = 2 * (CLIENTS * 8 * LEN) as u64;
        assert_eq!(counts.errors, 0);
        // Kernels that look for partitions whatever they are told read some more.
        assert!(counts.bytes_spliced + counts.bytes_copied >= moved, "{counts:?}");
        assert!(counts.bytes_copied > 0 && counts.bytes_spliced > 0, "{counts:?}");
    }

    #[test]
    fn requests_whose_slot_the_kernel_could_not_fill_are_copied_and_true() {
        with_slots_taken(DataPath::AutoRegister, false);
        with_slots_taken(DataPath::AutoRegister, true);
    }

    #[test]
    fn requests_whose_slot_we_could_not_fill_are_copied_and_true() {
        with_slots_taken(DataPath::Register, false);
        with_slots_taken(DataPath::Register, true);
    }

    /// What was counted of a device that has more than others and is true; none where none can be.
    fn with_extra(path: DataPath, extra: Extra, threads: u16) -> Option<Counts> {
        let control = control(path)?;
        if extra.flags() & !control.features() != 0 {
            println!("skipped: the kernel has not all of {extra:?}");
            return None;
        }
        let options = Options { threads, ..options(path, false) };
        let made = &mut |_| ();
        let device = Device::make(control, (&options, extra), service(), made).unwrap();
        assert_eq!(device.crew().thread_count(), usize::from(threads));
        is_true(device.path());
        let counts = device.detach().unwrap();
        assert_eq!(counts.errors, 0);
        Some(counts)
    }

    #[test]
    fn without_a_slot_everything_is_copied_and_true() {
        let extra = Extra { no_slots: true, ..Extra::default() };
        let Some(counts) = with_extra(DataPath::AutoRegister, extra, 2) else { return };
        assert!(counts.bytes_spliced == 0 && counts.bytes_copied > 0, "{counts:?}");
    }

    #[test]
    fn threads_share_all_queues_and_each_does_its_part() {
        for path in DataPath::ALL {
            // More than queues, and a number that does not divide the tags.
            let extra = Extra { per_io: true, ..Extra::default() };
            let Some(counts) = with_extra(path, extra, 5) else { return };
            let spliced =
                if path.copies() == 0 { counts.bytes_copied } else { counts.bytes_spliced };
            assert_eq!(spliced, 0, "{path}: {counts:?}");
        }
    }

    #[test]
    fn descriptors_may_lie_apart_and_a_writes_data_come_when_it_is_asked_for() {
        for path in DataPath::ALL {
            let extra = Extra { descriptor_bytes: Some(104), ..Extra::default() };
            let _ = with_extra(path, extra, 2);
        }
        let extra = Extra { need_get_data: true, ..Extra::default() };
        let _ = with_extra(DataPath::Copy, extra, 1);
    }

    #[test]
    fn a_driver_that_knows_bare_commands_alone_is_served() {
        for path in [DataPath::UserCopy, DataPath::Copy] {
            let Some(mut control) = control(path) else { return };
            control.forget_encoding();
            let made = &mut |_| ();
            let how = (&options(path, false), Extra::default());
            let device = match Device::make(control, how, service(), made) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    // CONFIG_BLKDEV_UBLK_LEGACY_OPCODES is off.
                    println!("skipped: {error}");
                    return;
                }
                made => made.unwrap(),
            };
            is_true(device.path());
            assert_eq!(device.detach().unwrap().errors, 0);
        }
    }

    #[test]
    fn a_disk_that_appears_when_nobody_waits_any_more_is_removed() {
        let Some(mut control) = control(DataPath::Copy) else { return };
        control.start_limit = Some(Duration::from_micros(1));
        let (mut number, options) = (None, options(DataPath::Copy, false));
        let made = &mut |id| number = Some(id);
        let made = Device::make(control, (&options, Extra::default()), service(), made);
        let Err(late) = made else { panic!("it came in a microsecond") };
        assert!(late.to_string().contains("no answer from the kernel"), "{late}");
        let (id, mut control) = (number.unwrap(), Control::open().unwrap());
        let end = Instant::now() + Duration::from_secs(60);
        while control.info(id).is_ok() || std::path::Path::new(&node(id)).exists() {
            assert!(Instant::now() < end, "it is there: {:?}", control.server(id));
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
