//! Answers for queues in batches against a kernel that is played: what the driver (Linux 7.3) may
//! do, it does by chance, and what it demands is checked at each step.

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::{Arc, Mutex, MutexGuard};

    use devsplice_core::{Errno, Limits, Result, StackBuilder};
    use devsplice_engine::{
        Completion, Event, FileId, Lane, Pages, Ring, RingCounts, Served, Shared, Splice, Wake,
        Worker,
    };
    use devsplice_uring::uapi::{CQE_BUFFER, CQE_MORE};
    use devsplice_uring::{Buffers, Command, MOST_TAGS};
    use rustix::fs::MemfdFlags;
    use zerocopy::{FromBytes, IntoBytes};

    use super::super::DataPath;
    use super::super::batch::{BatchQueue, Part};
    use super::super::batch_wire::Wire;
    use super::super::map::Descriptors;
    use super::super::queue::QueueConfig;
    use super::super::uapi::{
        BATCH_AUTO_BUF_REG_FALLBACK, BATCH_HAS_BUF_ADDR, BatchIo, Element, IO_F_NEED_REG_BUF,
        IoCmd, IoDesc, io, op,
    };

    const DEPTH: u16 = 6;
    const QUEUE: u16 = 3;
    const REQUESTS: u32 = 400;
    const BUFFERS: u16 = 2;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum At {
        New,
        Idle,
        Waiting,
        Server(usize),
    }

    /// What a fault is to be, once.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        None,
        Prepare,
        Commit,
        StrangeTag,
        SameTag,
        Fetch,
    }

    /// A request at the server.
    #[derive(Clone, Copy, Default)]
    struct Asked {
        flags: u32,
        len: u32,
        in_slot: bool,
        had_slot: bool,
        pulled: u32,
        spliced: u32,
        pushed: u32,
        failed: bool,
        out: u32,
    }

    /// The queue in the kernel, shared by the rings of all threads.
    struct Kernel {
        path: DataPath,
        descriptors: OwnedFd,
        tags: Vec<At>,
        asked: Vec<Asked>,
        fifo: VecDeque<u16>,
        lent: Vec<u16>,
        /// Rings whose command stands, oldest first: that one gets all, until it ends.
        row: VecDeque<usize>,
        /// Requests that each ring has finished.
        by_ring: [u32; 3],
        left: u32,
        done: u32,
        partial: u32,
        starved: u32,
        seed: u64,
        fault: Fault,
        stopped: bool,
        /// The slot that each tag's pages are put into.
        slots: Vec<u16>,
        rotates: bool,
    }

    impl Kernel {
        fn chance(&mut self, of: u64) -> u64 {
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.seed >> 33) % of
        }

        /// A client asks for something, if a tag is free.
        fn ask(&mut self) {
            let idle = self.tags.iter().position(|at| *at == At::Idle);
            let (Some(tag), true) = (idle, self.left > 0) else {
                let is_ready = self.tags.iter().all(|at| *at == At::Idle);
                self.stopped = self.stopped || (is_ready && self.left == 0);
                return;
            };
            self.left -= 1;
            let ops = [op::READ, op::WRITE, op::FLUSH, op::WRITE_ZEROES, op::DISCARD, 77];
            let mut flags = ops[self.chance(6).min(self.chance(6)) as usize];
            if flags <= op::WRITE && self.path == DataPath::AutoRegister && self.chance(4) == 0 {
                flags |= IO_F_NEED_REG_BUF;
            }
            let sectors = if flags & 0xff == op::FLUSH { 0 } else { 8 };
            let start_sector = self.chance(1000) * 8;
            let desc = IoDesc { op_flags: flags, nr_sectors: sectors, start_sector, addr: 0 };
            let at = (tag * size_of::<IoDesc>()) as u64;
            rustix::io::pwrite(&self.descriptors, desc.as_bytes(), at).unwrap();
            let in_slot = self.path == DataPath::AutoRegister && flags & IO_F_NEED_REG_BUF == 0;
            self.asked[tag] =
                Asked { flags, len: sectors * 512, in_slot, had_slot: in_slot, ..Asked::default() };
            self.tags[tag] = At::Waiting;
            self.fifo.push_back(u16::try_from(tag).unwrap());
        }

        /// Notes where the tag's next pages go: with slots that take turns, never where its last
        /// were.
        fn next_slot(&mut self, element: &Element) {
            if self.path != DataPath::AutoRegister {
                return;
            }
            let slot = &mut self.slots[usize::from(element.tag)];
            let last = std::mem::replace(slot, element.buf_index);
            let both = [100 + element.tag, 100 + element.tag + DEPTH];
            assert!(both[..1 + usize::from(self.rotates)].contains(&element.buf_index));
            assert_eq!(last == element.buf_index, !self.rotates && last != 0);
        }

        fn commit(&mut self, ring: usize, element: &Element) {
            let tag = usize::from(element.tag);
            assert_eq!(self.tags[tag], At::Server(ring), "tag {tag} committed from elsewhere");
            let asked = &self.asked[tag];
            let op = asked.flags & 0xff;
            let moves = op <= op::WRITE;
            assert_eq!(asked.out, 0, "tag {tag} committed while its pages are in use");
            if op == 77 {
                assert_eq!(element.result, -Errno::EOPNOTSUPP.raw());
            } else if asked.failed {
                assert_eq!(element.result, -Errno::EIO.raw());
            } else if moves {
                assert_eq!(element.result, asked.len.cast_signed());
                assert_eq!(asked.spliced, asked.len, "tag {tag} is not done");
                if op == op::READ && !asked.had_slot && self.path != DataPath::Copy {
                    assert_eq!(asked.pushed, asked.len, "tag {tag}'s data was not delivered");
                }
            } else {
                assert_eq!(element.result, 0);
            }
            assert!(self.path != DataPath::Register || !asked.in_slot, "its slot is not free");
            self.tags[tag] = At::Idle;
            self.next_slot(element);
            self.by_ring[ring] += 1;
            self.done += 1;
        }
    }

    /// A thread's ring.
    struct Fake {
        number: usize,
        kernel: Arc<Mutex<Kernel>>,
        armed: Option<u64>,
        free: VecDeque<u16>,
        buffers: Vec<Vec<u16>>,
        lists: [Vec<u8>; 2],
        current: usize,
        sent: Option<usize>,
        is_lent: bool,
        queued: Vec<(u64, Command, usize)>,
        fetches: VecDeque<Event>,
        others: Vec<Event>,
        now: u64,
    }

    fn export(index: u64, result: i32, flags: u32) -> Event {
        let completion = Completion { index: index as u32, result, flags };
        Event::Export { lane: (index >> 32) as u16, completion }
    }

    impl Fake {
        fn kernel(&self) -> MutexGuard<'_, Kernel> {
            self.kernel.lock().unwrap()
        }

        /// Carries out a command for a list.
        fn carry_out(&mut self, index: u64, command: &Command, from: usize) {
            let batch = BatchIo::read_from_bytes(&command.payload).unwrap();
            let list = self.lists[self.sent.unwrap()][from..].to_vec();
            let shared = self.kernel.clone();
            let mut kernel = shared.lock().unwrap();
            let (bytes, flags) = match kernel.path {
                DataPath::Copy => (16, BATCH_HAS_BUF_ADDR),
                DataPath::AutoRegister => (8, BATCH_AUTO_BUF_REG_FALLBACK),
                _ => (8, 0),
            };
            assert_eq!((batch.q_id, batch.flags), (QUEUE, flags));
            assert_eq!(usize::from(batch.elem_bytes), bytes);
            assert_eq!(list.len(), usize::from(batch.nr_elem) * bytes);
            assert!(batch.nr_elem > 0);
            let element = |at: usize| {
                let mut all = [0; 16];
                all[..bytes].copy_from_slice(&list[at * bytes..][..bytes]);
                Element::read_from_bytes(&all).unwrap()
            };
            let count = usize::from(batch.nr_elem);
            if command.op == io::PREP_IO_CMDS {
                let fails = kernel.fault == Fault::Prepare;
                for tag in 0..count {
                    let element = element(tag);
                    assert_eq!(usize::from(element.tag), tag);
                    assert_eq!((kernel.tags[tag], element.result), (At::New, 0));
                    kernel.tags[tag] = At::Idle;
                    kernel.next_slot(&element);
                }
                assert_eq!(count, usize::from(DEPTH));
                return self.others.push(export(index, if fails { -22 } else { 0 }, 0));
            }
            assert_eq!(command.op, io::COMMIT_IO_CMDS);
            if kernel.fault == Fault::Commit && kernel.done > 20 {
                return self.others.push(export(index, -Errno::EBUSY.raw(), 0));
            }
            let stop = match kernel.chance(4) {
                0 if count > 1 => 1 + kernel.chance(count as u64 - 1) as usize,
                _ => count,
            };
            kernel.partial += u32::from(stop < count);
            for at in 0..stop {
                let element = element(at);
                if kernel.path == DataPath::Copy {
                    assert_eq!(element.addr, 4096 + u64::from(element.tag));
                }
                kernel.commit(self.number, &element);
            }
            self.others.push(export(index, (stop * bytes) as i32, 0));
        }

        /// Hands tags over, as long as there are buffers.
        fn dispatch(&mut self) {
            let shared = self.kernel.clone();
            let mut kernel = shared.lock().unwrap();
            let Some(index) = self.armed else { return };
            let mut end = kernel.stopped.then_some(-Errno::ENODEV.raw());
            if kernel.fault == Fault::Fetch && kernel.done > 20 {
                end = Some(-22);
            }
            let is_first = kernel.row.front() == Some(&self.number);
            while is_first && end.is_none() && !kernel.fifo.is_empty() && kernel.chance(8) != 0 {
                let Some(buffer) = self.free.pop_front() else {
                    kernel.starved += 1;
                    end = Some(-105);
                    break;
                };
                let most = 1 + kernel.chance(3) as usize;
                let count = most.min(kernel.fifo.len());
                let mut tags: Vec<u16> = kernel.fifo.drain(..count).collect();
                for tag in &tags {
                    kernel.tags[usize::from(*tag)] = At::Server(self.number);
                    let lent = u16::from(kernel.path == DataPath::Copy);
                    assert_eq!(kernel.lent[usize::from(*tag)], lent);
                }
                match kernel.fault {
                    Fault::StrangeTag if kernel.done > 20 => tags.push(DEPTH),
                    Fault::SameTag if kernel.done > 20 => tags.push(tags[0]),
                    _ => {}
                }
                let bytes = 2 * tags.len() as i32;
                self.buffers[usize::from(buffer)] = tags;
                // With others in the row, running out of buffers is all that makes room.
                let is_last = kernel.chance(16) == 0 && kernel.row.len() == 1;
                let more = if is_last { 0 } else { CQE_MORE };
                let flags = CQE_BUFFER | u32::from(buffer) << 16 | more;
                self.fetches.push_back(export(index, bytes, flags));
                if is_last {
                    kernel.row.pop_front();
                    self.armed = None;
                    return;
                }
            }
            if let Some(result) = end {
                kernel.row.retain(|number| *number != self.number);
                self.armed = None;
                self.fetches.push_back(export(index, result, 0));
            }
        }

        fn some(&mut self, index: u64, most: usize) -> i32 {
            let count = self.kernel().chance(4).min(1) as usize;
            let count = if count == 0 { most.min(512) } else { most };
            self.others.push(export(index, count as i32, 0));
            count as i32
        }
    }

    fn at((lane, index): (u16, u32)) -> u64 {
        u64::from(lane) << 32 | u64::from(index)
    }

    fn tag_of(index: u32) -> usize {
        (index & 0xffff) as usize
    }

    impl Wire for Fake {
        fn make_batch(
            &mut self,
            _: u16,
            (depth, element): (u16, usize),
            buffers: Buffers,
        ) -> Result<()> {
            assert_eq!((depth, buffers.count >= BUFFERS), (DEPTH, true));
            assert_eq!(element, if self.kernel().path == DataPath::Copy { 16 } else { 8 });
            self.free = (0..BUFFERS).collect();
            self.buffers = vec![Vec::new(); usize::from(BUFFERS)];
            Ok(())
        }
        fn fetch_tags(&mut self, index: (u16, u32), _: FileId, command: &Command) {
            let batch = BatchIo::read_from_bytes(&command.payload).unwrap();
            assert_eq!((batch.q_id, batch.flags, batch.elem_bytes), (QUEUE, 0, 2));
            assert_eq!(command.op, io::FETCH_IO_CMDS);
            assert!(self.armed.is_none(), "armed twice");
            self.armed = Some(at(index));
            self.kernel().row.push_back(self.number);
        }
        fn tags(&mut self, _: u16, buffer: u16, count: usize) -> [u16; MOST_TAGS] {
            assert!(!self.free.contains(&buffer), "read after it was given back");
            let mut tags = [0; MOST_TAGS];
            tags[..count].copy_from_slice(&self.buffers[usize::from(buffer)][..count]);
            tags
        }
        fn give_buffer(&mut self, _: u16, buffer: u16) {
            assert!(!self.free.contains(&buffer) && buffer < BUFFERS);
            self.free.push_back(buffer);
        }
        fn list(&mut self, _: u16, words: [u64; 2]) {
            let bytes = if self.kernel().path == DataPath::Copy { 16 } else { 8 };
            self.lists[self.current].extend_from_slice(&words.as_bytes()[..bytes]);
            assert!(self.lists[self.current].len() <= usize::from(DEPTH) * bytes);
        }
        fn send_list(&mut self, index: (u16, u32), _: FileId, command: &Command) {
            assert!(self.sent.is_none() && !self.is_lent, "a list is out");
            self.sent = Some(self.current);
            self.current ^= 1;
            self.lists[self.current].clear();
            self.is_lent = true;
            self.queued.push((at(index), *command, 0));
        }
        fn resend_list(&mut self, index: (u16, u32), _: FileId, command: &Command, done: usize) {
            let sent = self.sent.unwrap();
            self.lists[sent].drain(..done);
            self.is_lent = true;
            self.queued.push((at(index), *command, 0));
        }
        fn list_done(&mut self, _: u16) {
            assert!(!self.is_lent);
            self.sent = None;
        }
        fn command(&mut self, index: (u16, u32), _: FileId, command: &Command) {
            let io = IoCmd::read_from_bytes(&command.payload).unwrap();
            assert_eq!((io.q_id, io.addr), (QUEUE, 100 + u64::from(io.tag)));
            let mut kernel = self.kernel();
            let is_register = command.op == io::REGISTER_IO_BUF;
            let fails = is_register && kernel.chance(4) == 0;
            assert_eq!(kernel.tags[usize::from(io.tag)], At::Server(self.number));
            let asked = &mut kernel.asked[usize::from(io.tag)];
            assert_eq!(asked.in_slot, !is_register);
            asked.in_slot = is_register && !fails;
            asked.had_slot |= asked.in_slot;
            drop(kernel);
            self.others.push(export(at(index), if fails { -16 } else { 0 }, 0));
        }
        fn read(&mut self, index: (u16, u32), _: FileId, _: u64, (_, len): (usize, usize)) {
            let count = self.some(at(index), len);
            let asked = &mut self.kernel().asked[tag_of(index.1)];
            assert_eq!(asked.flags & 0xff, op::WRITE);
            asked.pulled += count.cast_unsigned();
        }
        fn write(&mut self, index: (u16, u32), _: FileId, _: u64, (_, len): (usize, usize)) {
            let count = self.some(at(index), len);
            let asked = &mut self.kernel().asked[tag_of(index.1)];
            assert_eq!((asked.flags & 0xff, asked.spliced), (op::READ, asked.len));
            asked.pushed += count.cast_unsigned();
        }
        fn slot_index(&self, _: u16, tag: u16) -> u16 {
            100 + tag
        }
        fn pages(&self, _: u16, at: u16, in_slot: bool) -> Pages {
            let kernel = self.kernel();
            let tag = if in_slot { at % DEPTH } else { at };
            if in_slot && kernel.path == DataPath::AutoRegister {
                assert_eq!(kernel.slots[usize::from(tag)], 100 + at, "not where its pages are");
            }
            Pages(u32::from(tag) | u32::from(in_slot) << 16)
        }
        fn lend_memory(&mut self, _: u16, tag: u16) -> u64 {
            self.kernel().lent[usize::from(tag)] += 1;
            4096 + u64::from(tag)
        }
        fn memory_back(&mut self, _: u16, tag: u16) {
            self.kernel().lent[usize::from(tag)] -= 1;
        }
    }

    impl Ring for Fake {
        fn splice(&mut self, key: u32, splice: &Splice<'_>) {
            let mut kernel = self.kernel();
            let fails = kernel.chance(50) == 0;
            let path = kernel.path;
            if splice.op.has_pages() {
                let asked = &mut kernel.asked[(splice.pages.0 & 0xffff) as usize];
                assert_eq!(asked.in_slot, splice.pages.0 >> 16 == 1);
                let is_pulled = asked.in_slot || path == DataPath::Copy;
                let is_write = asked.flags & 0xff == op::WRITE;
                assert!(!is_write || is_pulled || asked.pulled == asked.len, "no data yet");
                asked.failed |= fails;
                asked.spliced += u32::try_from(splice.len).unwrap();
            }
            drop(kernel);
            let fails = fails && splice.op.has_pages();
            let result = if fails { Err(Errno::EIO) } else { Ok(splice.len) };
            self.others.push(Event::Splice { key, result });
        }
        fn after(&mut self, _: u32, _: u64) {}
        fn enter(&mut self, _: bool) -> Result<()> {
            for (index, command, from) in std::mem::take(&mut self.queued) {
                self.carry_out(index, &command, from);
            }
            for _ in 0..2 {
                let mut kernel = self.kernel();
                if kernel.tags[0] != At::New {
                    kernel.ask();
                }
                drop(kernel);
                self.dispatch();
            }
            self.now += 1;
            Ok(())
        }
        fn next(&mut self) -> Option<Event> {
            let chance = self.kernel().chance(8) as usize;
            if chance == 0 {
                return None;
            }
            if self.others.is_empty() || (chance < 4 && !self.fetches.is_empty()) {
                return self.fetches.pop_front();
            }
            let event = self.others.swap_remove(chance % self.others.len());
            if let Event::Export { completion: Completion { index, .. }, .. } = event
                && matches!(index >> 16, 1 | 2)
            {
                self.is_lent = false;
            }
            Some(event)
        }
        fn now_ns(&self) -> u64 {
            self.now
        }
        fn wake(&mut self) -> Wake {
            Arc::new(|| {})
        }
        fn inner_pages(&self, _: u16, _: u16) -> Pages {
            Pages(0)
        }
        fn put(&mut self, _: u16, _: u16, _: &[u8]) {}
        fn get(&mut self, _: u16, _: u16, _: &mut [u8]) {}
        fn counts(&self) -> RingCounts {
            RingCounts::default()
        }
    }

    fn kernel(path: DataPath, seed: u64, fault: Fault) -> Kernel {
        let descriptors = rustix::fs::memfd_create("descriptors", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&descriptors, 1 << 20).unwrap();
        let depth = usize::from(DEPTH);
        let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Kernel {
            path,
            descriptors,
            tags: vec![At::New; depth],
            asked: vec![Asked::default(); depth],
            fifo: VecDeque::new(),
            lent: vec![0; depth],
            row: VecDeque::new(),
            by_ring: [0; 3],
            left: REQUESTS,
            done: 0,
            partial: 0,
            starved: 0,
            seed,
            fault,
            stopped: false,
            slots: vec![0; depth],
            rotates: false,
        }
    }

    /// The worker of a thread.
    fn worker(
        shared: &Arc<Mutex<Kernel>>,
        number: usize,
        (threads, served): (usize, &Arc<Served>),
    ) -> Worker<Fake> {
        let kernel = shared.lock().unwrap();
        let part = super::super::extra::Part::WHOLE;
        let config =
            QueueConfig { queue: QUEUE, depth: DEPTH, path: kernel.path, encoded: true, part };
        // The played queue is the first; each asks for its own number.
        let descriptors =
            Descriptors::map(kernel.descriptors.as_fd(), 0, (DEPTH, 24), part).unwrap();
        let rotates = kernel.rotates;
        drop(kernel);
        let part = Part { is_first: number == 0, is_shared: threads > 1, rotates };
        let export = BatchQueue::new(config, part, FileId(9), descriptors);
        let lane = Lane::new(Box::new(export), served.clone(), vec![FileId(1)].into());
        let fake = Fake {
            number,
            kernel: shared.clone(),
            armed: None,
            free: VecDeque::new(),
            buffers: Vec::new(),
            lists: [Vec::new(), Vec::new()],
            current: 0,
            sent: None,
            is_lent: false,
            queued: Vec::new(),
            fetches: VecDeque::new(),
            others: Vec::new(),
            now: 0,
        };
        let never = Box::new(|_: &devsplice_engine::Stuck| {});
        Worker::new(fake, vec![lane], 64, Arc::new(Shared::default()), (0, never))
    }

    /// Serves to the end; what the kernel has seen, or why a thread gave up.
    fn serve(path: DataPath, threads: usize, seed: u64, fault: Fault) -> Result<[u32; 3]> {
        serve_from(kernel(path, seed, fault), threads)
    }

    fn serve_from(kernel: Kernel, threads: usize) -> Result<[u32; 3]> {
        let (path, seed) = (kernel.path, kernel.seed);
        let shared = Arc::new(Mutex::new(kernel));
        let mut builder = StackBuilder::new();
        let (top, _) = builder.backend("disk", Limits::ideal(1 << 30)).unwrap();
        let served = Served::quietly(Arc::new(builder.finish(top)));
        let mut workers: Vec<_> =
            (0..threads).map(|number| worker(&shared, number, (threads, &served))).collect();
        for worker in &mut workers {
            worker.arm()?;
        }
        let mut turns = 0;
        while !workers.is_empty() {
            let mut left = Vec::new();
            for mut worker in workers {
                if worker.turn()? {
                    left.push(worker);
                }
            }
            workers = left;
            turns += 1;
            let kernel = shared.lock().unwrap();
            assert!(turns < 200_000, "seed {seed} does not end: {:?}", kernel.tags);
        }
        let kernel = shared.lock().unwrap();
        assert_eq!((kernel.done, kernel.left), (REQUESTS, 0), "{path} {seed}");
        assert!(kernel.tags.iter().all(|at| *at == At::Idle));
        assert!(kernel.lent.iter().all(|count| *count == 0));
        Ok([kernel.partial, kernel.starved, *kernel.by_ring[..threads].iter().min().unwrap()])
    }

    fn every_request_is_committed_once(path: DataPath, threads: usize) {
        let (mut partial, mut starved, mut least) = (0, 0, 0);
        for seed in 0..60 {
            let seen = serve(path, threads, seed, Fault::None).unwrap();
            (partial, starved, least) = (partial + seen[0], starved + seen[1], least + seen[2]);
        }
        assert!(partial > 100, "commits were cut short {partial} times");
        assert!(least > 60 * REQUESTS / 10, "a thread of {threads} has served {least} only");
        assert!(starved > 100 || threads > 1, "buffers ran out {starved} times");
    }

    #[test]
    fn every_request_is_committed_once_by_the_ring_that_got_it() {
        for path in DataPath::ALL {
            every_request_is_committed_once(path, 1);
        }
        for path in [DataPath::AutoRegister, DataPath::Register, DataPath::UserCopy] {
            every_request_is_committed_once(path, 2);
            every_request_is_committed_once(path, 3);
        }
    }

    #[test]
    fn slots_that_take_turns_are_where_a_requests_pages_are() {
        for seed in 0..30 {
            let rotating =
                Kernel { rotates: true, ..kernel(DataPath::AutoRegister, seed, Fault::None) };
            serve_from(rotating, 1).unwrap();
        }
    }

    #[test]
    fn what_the_kernel_refuses_ends_the_thread() {
        let faults = [
            (Fault::Prepare, "preparing its tags failed"),
            (Fault::Commit, "a commit of"),
            (Fault::StrangeTag, "handed out tag 6"),
            (Fault::SameTag, "handed out tag"),
            (Fault::Fetch, "fetching failed"),
        ];
        for (fault, words) in faults {
            let error = serve(DataPath::AutoRegister, 1, 7, fault).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("queue 3"), "{fault:?}: {error}");
        }
    }
}
