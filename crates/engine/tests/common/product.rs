//! Answers for a real layer over two disks in the engine's test world, and commands to it.

use std::sync::{Arc, Mutex};

use devsplice_core::{Args, BackendId, Bottoms, Errno, Limits, NodeId, Stack, StackBuilder};
use devsplice_engine::{Answer, Served};

use super::{Ask, Bench, Done, MIB, Setup, disk, ideal, setup};

/// Bytes of each disk in the world.
pub const DISK: u64 = 16 * MIB;

/// Disks as whoever builds the stack writes them.
pub struct Fresh(pub Vec<Vec<u8>>);

impl Bottoms for Fresh {
    fn read(&mut self, id: BackendId, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(at).unwrap();
        into.copy_from_slice(&self.0[usize::from(id.0)][at..at + into.len()]);
        Ok(())
    }

    fn write(&mut self, id: BackendId, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(at).unwrap();
        self.0[usize::from(id.0)][at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

pub fn make(name: &str, keys: &str) -> Box<dyn devsplice_core::Layer> {
    let driver = devsplice_layers::find(name).unwrap();
    let pairs = keys.split_whitespace().map(|word| word.split_once('=').unwrap());
    let given: Vec<_> = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    (driver.make)(&Args::new(name, driver.keys, &given).unwrap()).unwrap()
}

/// `layer(linear(disk, size=SIZE), linear(disk, size=SECOND))`, or over the first alone.
pub fn stack(layer: &str, keys: &str, sizes: &[u64]) -> Arc<Stack> {
    let mut builder = StackBuilder::new();
    let mut none = |_, _: u64, into: &mut [u8]| {
        into.fill(0);
        Ok::<(), Errno>(())
    };
    let mut ports = Vec::new();
    for size in sizes {
        let (node, _) = builder.backend("disk", ideal(DISK)).unwrap();
        let window = make("linear", &format!("size={size}"));
        ports.push(builder.layer("linear", window, &[node], &mut none).unwrap());
    }
    let top = builder.layer(layer, make(layer, keys), &ports, &mut none).unwrap();
    Arc::new(builder.finish(top))
}

/// A stack of real layers over disks of [`DISK`] bytes.
pub enum Real {
    Disk,
    Over(&'static str, &'static str, Vec<Real>),
}

/// Its disks are numbered from the left; they hold `bytes` while it is built, zeros behind that.
pub fn real(tree: &Real, bytes: &[Vec<u8>]) -> Arc<Stack> {
    let mut builder = StackBuilder::new();
    let top = grow(&mut builder, tree, bytes);
    Arc::new(builder.finish(top))
}

fn grow(builder: &mut StackBuilder, tree: &Real, bytes: &[Vec<u8>]) -> NodeId {
    match tree {
        Real::Disk => builder.backend("disk", ideal(DISK)).unwrap().0,
        Real::Over(name, keys, below) => {
            let ports: Vec<_> = below.iter().map(|tree| grow(builder, tree, bytes)).collect();
            let mut read = |id: BackendId, at: u64, into: &mut [u8]| {
                into.fill(0);
                if let Some(bytes) = bytes.get(usize::from(id.0)) {
                    let at = usize::try_from(at).unwrap();
                    into.copy_from_slice(&bytes[at..at + into.len()]);
                }
                Ok::<(), Errno>(())
            };
            builder.layer(name, make(name, keys), &ports, &mut read).unwrap()
        }
    }
}

/// What a test holds on to of a layer that is served.
pub struct Product {
    pub bench: Bench,
    pub served: Arc<Served>,
    pub events: Arc<Mutex<Vec<String>>>,
    node: NodeId,
}

/// Serves `plan` with that layer on top. The front end stays open when all was asked.
pub fn product(stack: Arc<Stack>, plan: Vec<Ask>, seed: u64) -> Product {
    product_with(stack, plan, |setup| Setup { seed, ..setup })
}

pub fn product_with(
    stack: Arc<Stack>,
    plan: Vec<Ask>,
    change: impl FnOnce(Setup) -> Setup,
) -> Product {
    let events = Arc::new(Mutex::new(Vec::new()));
    let told = events.clone();
    let on_event = Box::new(move |text: &str| told.lock().unwrap().push(text.to_owned()));
    let served = Served::new(stack.clone(), on_event);
    // The top one.
    let node = stack.lives().last().unwrap().0;
    let base = setup(disk(), Limits::ideal(DISK), plan);
    let base = Setup { stack, served: Some(served.clone()), open: true, ..base };
    let mut bench = change(base).bench();
    bench.world.lock().unwrap().may_sleep = true;
    bench.worker.arm().unwrap();
    Product { bench, served, events, node }
}

impl Product {
    /// Turns until nothing is under way and nothing is left to ask.
    pub fn rest(&mut self) {
        self.turn_until(|_| false);
    }

    /// Turns until `is_so`, or until nothing more happens.
    pub fn turn_until(&mut self, is_so: impl Fn(&Product) -> bool) {
        self.bench.world.lock().unwrap().asleep = false;
        while !is_so(self) && !self.bench.world.lock().unwrap().asleep {
            assert!(self.bench.worker.turn().unwrap());
        }
    }

    /// Sends a command and turns until it is answered.
    pub fn tell(&mut self, words: &str) -> Answer {
        let words = words.split(' ').map(str::to_owned).collect();
        let answer = self.served.command(self.node, words);
        self.bench.world.lock().unwrap().asleep = false;
        loop {
            assert!(self.bench.worker.turn().unwrap());
            if let Ok(answer) = answer.try_recv() {
                return answer;
            }
        }
    }

    /// The first bytes of a disk.
    pub fn bytes(&self, file: usize, len: u64) -> Vec<u8> {
        self.bench.world.lock().unwrap().disks[file].bytes[..usize::try_from(len).unwrap()].to_vec()
    }

    pub fn done(&self) -> Vec<Done> {
        self.bench.done.lock().unwrap().clone()
    }

    pub fn all_succeed(&self, count: usize) {
        assert_eq!(self.done().len(), count, "every request is finished");
        for done in self.done() {
            assert_eq!(done.result, Ok(()), "{:?}", done.io);
        }
    }

    pub fn number(&self, name: &str) -> u64 {
        let live = self.served.stack.live(self.node).unwrap();
        match live.status().into_iter().find(|(key, _)| *key == name) {
            Some((_, devsplice_core::Value::Number(number))) => number,
            other => panic!("{name}: {other:?}"),
        }
    }

    pub fn events(&self) -> Vec<String> {
        self.events.lock().unwrap().clone()
    }
}
