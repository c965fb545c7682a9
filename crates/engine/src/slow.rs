//! Answers for slow work on an I/O thread: a small executor that the thread turns between its
//! requests, and the hand that layers reach the devices below with.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake as StdWake, Waker};
use std::thread::ThreadId;

use devsplice_core::live::MOST_BYTES;
use devsplice_core::{Errno, Extent, Io, Live, Meta, NodeId, Op, Port, Result, Slow};

use crate::desk::{Order, SharedDesk, lock};
use crate::served::{Served, Wake};

/// Slow tasks that are ready to go on.
pub(crate) struct Ready {
    list: Mutex<Vec<u32>>,
    wake: Wake,
    owner: ThreadId,
}

impl Ready {
    fn push(&self, task: u32) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        // Its own thread looks at the list before it waits.
        if std::thread::current().id() != self.owner {
            (self.wake)();
        }
    }
}

struct TaskWaker {
    task: u32,
    ready: Arc<Ready>,
}

impl StdWake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.push(self.task);
    }
}

/// What a task is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A request of this lane and tag waits for it.
    Request(u16, u16),
    /// Nobody waits; dropped when the device stops.
    Background,
    /// The end of a device waits for it.
    Stop,
}

struct Task {
    future: Slow,
    waker: Waker,
    purpose: Purpose,
}

/// The slow work of one thread.
pub(crate) struct Executor {
    tasks: Vec<Option<Task>>,
    ready: Arc<Ready>,
    /// Taken from `ready`, not looked at yet.
    batch: Vec<u32>,
}

impl Executor {
    pub(crate) fn new(wake: Wake) -> Executor {
        let ready = Ready { list: Mutex::default(), wake, owner: std::thread::current().id() };
        Executor { tasks: Vec::new(), ready: Arc::new(ready), batch: Vec::new() }
    }

    /// Takes on a task; it is looked at in this turn.
    pub(crate) fn spawn(&mut self, purpose: Purpose, future: Slow) {
        let free = self.tasks.iter().position(Option::is_none);
        let index = free.unwrap_or(self.tasks.len());
        let task = u32::try_from(index).unwrap_or(u32::MAX);
        let waker = Waker::from(Arc::new(TaskWaker { task, ready: self.ready.clone() }));
        let new = Some(Task { future, waker, purpose });
        if index == self.tasks.len() {
            self.tasks.push(new);
        } else {
            self.tasks[index] = new;
        }
        self.ready.push(task);
    }

    /// Lets the next ready task go on: what it was for and what came of it, if it has ended; `None`
    /// when none is ready. A task may be woken for nothing.
    pub(crate) fn poll(&mut self) -> Option<Option<(Purpose, Result<(), Errno>)>> {
        if self.batch.is_empty() {
            let mut list = self.ready.list.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut *list, &mut self.batch);
            // In the order in which they were woken.
            self.batch.reverse();
        }
        let task = self.batch.pop()?;
        let Some(place) = self.tasks.get_mut(task as usize) else { return Some(None) };
        let Some(Task { future, waker, purpose }) = place else { return Some(None) };
        match future.as_mut().poll(&mut Context::from_waker(waker)) {
            Poll::Pending => Some(None),
            Poll::Ready(result) => {
                let purpose = *purpose;
                *place = None;
                Some(Some((purpose, result)))
            }
        }
    }

    /// Drops the tasks for which nobody waits.
    pub(crate) fn drop_background(&mut self) {
        for place in &mut self.tasks {
            if matches!(place, Some(Task { purpose: Purpose::Background, .. })) {
                *place = None;
            }
        }
    }

    /// Whether a task for this purpose is there.
    pub(crate) fn has(&self, purpose: Purpose) -> bool {
        self.tasks.iter().flatten().any(|task| task.purpose == purpose)
    }
}

/// How a live layer reaches the devices below it.
pub(crate) struct Hand {
    pub(crate) served: Arc<Served>,
    pub(crate) desk: SharedDesk,
    pub(crate) node: NodeId,
}

impl Hand {
    fn below(&self, port: Port) -> Result<NodeId, Errno> {
        self.served.stack.below(self.node, port).ok_or(Errno::EINVAL)
    }

    fn placed(&self, order: Result<Order, Errno>) -> Placed {
        Placed { desk: self.desk.clone(), order: Some(order), id: None }
    }

    fn done(&self, order: Result<Order, Errno>) -> Slow {
        let placed = self.placed(order);
        Box::pin(async move { placed.await.map(|_| ()) })
    }

    /// The steps of a write; a durable one ends with a flush where it cannot force the media.
    fn write_steps(&self, port: Port, io: Io, durable: bool) -> Result<Vec<(NodeId, Io)>, Errno> {
        let node = self.below(port)?;
        let limits = self.served.stack.limits_of(node);
        let mut steps = vec![(node, Io { fua: durable && limits.fua, ..io })];
        if durable && limits.volatile_cache && !limits.fua {
            steps.push((node, Io::new(Op::Flush, 0, 0)));
        }
        Ok(steps)
    }
}

fn order(steps: Vec<(NodeId, Io)>, bytes: Vec<u8>, wants_bytes: bool) -> Order {
    Order { bytes, steps: steps.into(), wants_bytes }
}

fn checked(len: usize) -> Result<u64, Errno> {
    if len == 0 || len > MOST_BYTES { Err(Errno::EINVAL) } else { Ok(len as u64) }
}

impl Meta for Hand {
    fn read(&self, port: Port, at: u64, len: usize) -> Slow<Vec<u8>> {
        let steps =
            checked(len).and_then(|len| Ok(vec![(self.below(port)?, Io::new(Op::Read, at, len))]));
        Box::pin(self.placed(steps.map(|steps| order(steps, Vec::new(), true))))
    }

    fn write(&self, port: Port, at: u64, bytes: Vec<u8>, durable: bool) -> Slow {
        let steps = checked(bytes.len())
            .and_then(|len| self.write_steps(port, Io::new(Op::Write, at, len), durable));
        self.done(steps.map(|steps| order(steps, bytes, false)))
    }

    fn flush(&self, port: Port) -> Slow {
        let steps = self.below(port).map(|node| vec![(node, Io::new(Op::Flush, 0, 0))]);
        self.done(steps.map(|steps| order(steps, Vec::new(), false)))
    }

    fn copy(&self, from: Port, to: Vec<Port>, at: u64, len: usize) -> Slow {
        let steps = checked(len).and_then(|len| {
            let extent = Extent { at, len };
            let mut steps = vec![(self.below(from)?, Io { op: Op::Read, extent, fua: false })];
            for port in to {
                steps.push((self.below(port)?, Io { op: Op::Write, extent, fua: false }));
            }
            Ok(steps)
        });
        self.done(steps.map(|steps| order(steps, Vec::new(), false)))
    }

    fn sleep(&self, ns: u64) -> Slow {
        Box::pin(Sleep { desk: self.desk.clone(), ns, key: None })
    }

    fn now_ns(&self) -> u64 {
        lock(&self.desk).now_ns
    }

    fn grace(&self) -> Slow {
        let (served, node) = (self.served.clone(), self.node);
        Box::pin(async move {
            served.grace(node).await;
            Ok(())
        })
    }

    fn is_ending(&self) -> bool {
        self.served.is_ending()
    }

    fn is_unsettled(&self) -> bool {
        self.served.is_unsettled()
    }

    fn event(&self, text: String) {
        self.served.event(format!("{}: {text}", self.served.stack.name_of(self.node)));
    }
}

/// An order, from the first look at it to its result.
struct Placed {
    desk: SharedDesk,
    order: Option<Result<Order, Errno>>,
    id: Option<u64>,
}

impl Future for Placed {
    type Output = Result<Vec<u8>, Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.order.take() {
            Some(Err(errno)) => return Poll::Ready(Err(errno)),
            Some(Ok(order)) => {
                let id = lock(&self.desk).place(order, context.waker());
                self.id = Some(id);
                return Poll::Pending;
            }
            None => {}
        }
        let Some(id) = self.id else { return Poll::Ready(Err(Errno::EINVAL)) };
        let done = lock(&self.desk).collect(id, context.waker());
        match done {
            None => Poll::Pending,
            Some(result) => {
                self.id = None;
                Poll::Ready(result)
            }
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            lock(&self.desk).forget(id);
        }
    }
}

struct Sleep {
    desk: SharedDesk,
    ns: u64,
    key: Option<(u64, u64)>,
}

impl Future for Sleep {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let desk = self.desk.clone();
        let mut desk = lock(&desk);
        match self.key {
            None => {
                let at = desk.now_ns.saturating_add(self.ns);
                self.key = Some(desk.sleep(at, context.waker()));
                Poll::Pending
            }
            Some(key) if desk.is_awake(key, context.waker()) => Poll::Ready(Ok(())),
            Some(_) => Poll::Pending,
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            lock(&self.desk).rise(key);
        }
    }
}

/// A layer that may see to a failure: what it was asked, the way that failed, its hand.
pub(crate) type Concerned = (Arc<dyn Live>, (Io, Port), Rc<dyn Meta>);

/// A failure on its way up: each layer that can see to failures is asked, from the bottom up.
async fn see_to(layers: Vec<Concerned>, mut errno: Errno) -> Result<(), Errno> {
    for (live, (io, port), meta) in layers {
        match live.failed(io, port, errno, meta).await {
            Ok(()) => return Ok(()),
            Err(other) => errno = other,
        }
    }
    Err(errno)
}

/// Failures of one request, each on its way up, also those behind one that nobody sees to: every
/// layer hears what became of its part. With `give_up` the request fails in any case.
pub(crate) fn see_to_all(failures: Vec<(Vec<Concerned>, Errno)>, give_up: bool) -> Slow {
    Box::pin(async move {
        let mut all = if give_up { Err(Errno::EIO) } else { Ok(()) };
        for (layers, errno) in failures {
            all = all.and(see_to(layers, errno).await);
        }
        all
    })
}
