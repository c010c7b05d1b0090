//! The pipeline: moves the content of a source into a sink.
//!
//! Every worker runs the same loop: take the next task (under a lock, in source order), read and
//! prepare it (in parallel), hand it in for placing (in source order), write what was placed (one
//! worker at a time for each output). There are no dedicated reader or writer threads: who hands in a
//! piece while nobody writes becomes the writer, and with one thread the loop is the plain sequential
//! copy.
//!
//! Memory is bounded: a worker takes a new task only while few pieces per worker are under way
//! (`window_per_thread`).

mod flush;
mod order;
mod plan;
mod regroup;
mod share;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::buffer::BufferPool;
use crate::device::DeviceId;
use crate::error::{Error, Result, ResultExt};
use crate::progress::{CancelToken, Progress};
use crate::sink::ImageSink;
use crate::source::{Access, ImageSource, Piece, RandomAccess, SequentialAccess};
use flush::Flusher;
use order::Orderer;
use plan::{Plan, ReadTask};
use regroup::Regroup;
use share::Sharing;

/// Pieces under way per worker, waiting for their turn included. Ours: two let a worker go on while
/// one slow piece holds up the order; more only hold memory, but where they are small, a worker that
/// waits for the writer is woken less often (measured: 2 % of a copy in memory, between 3 and 8).
fn window_per_thread(largest_piece: u64) -> u64 {
    (WINDOW_BYTES / largest_piece.max(1)).clamp(3, 8)
}

/// Bytes under way per worker up to which there are more pieces than the fewest.
const WINDOW_BYTES: u64 = 2 << 20;

/// Memory for the buffers of pieces under way; fewer workers run when pieces are so large that this
/// would be exceeded. Half of what a conversion may use in all.
const BUFFER_BUDGET: u64 = 128 << 20;

/// Most workers. Ours: beyond this the order, not the work, is the limit.
pub const MAX_THREADS: usize = 64;

/// Which device goes where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The source's device.
    pub from: DeviceId,
    /// The sink's device.
    pub to: DeviceId,
}

/// What to copy and how.
pub struct Job<'a> {
    /// The devices to copy, in order; others are left out.
    pub routes: Vec<Route>,
    /// Worker threads; 0 is taken as 1.
    pub threads: usize,
    /// Is told how far it has come, in terms of the sink's devices.
    pub progress: &'a dyn Progress,
    /// Stops it.
    pub cancel: CancelToken,
}

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Guest bytes.
    pub guest_bytes: u64,
    /// Guest bytes of these that were zero and took no data.
    pub zero_bytes: u64,
}

impl std::ops::Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            guest_bytes: self.guest_bytes + other.guest_bytes,
            zero_bytes: self.zero_bytes + other.zero_bytes,
        }
    }
}

/// Copies the content of `source` into `sink`. Calls [`ImageSink::begin`] neither nor
/// [`ImageSink::finish`]: several sources may go into one sink.
///
/// # Errors
/// The first error of source, sink or storage; or [`crate::ErrorKind::Cancelled`].
pub fn copy(source: &mut dyn ImageSource, sink: &dyn ImageSink, job: &Job<'_>) -> Result<Totals> {
    let info = source.info();
    let devices = info.devices.clone();
    for route in &job.routes {
        if info.device(route.from).is_none() {
            return Err(Error::usage(format!("the source has no device {}", route.from)));
        }
    }
    let routes = job.routes.clone();
    match source.access() {
        Access::Random(random) => {
            let (shared, routes) = share::share_blocks(random, sink, &devices, routes, job)?;
            let plan = Plan::new(random, sink, &devices, routes);
            let largest = plan.largest_piece();
            let sharing = Sharing::new(random, sink, &devices, &job.routes);
            let (copied, _) = run(Producer::Random(plan), Some(random), sink, job, largest, sharing)?;
            Ok(shared + copied)
        }
        Access::Sequential(stream) => {
            let regroup = Regroup::new(sink, &devices, routes.clone());
            let largest = regroup.largest_piece();
            let producer = Producer::Sequential { stream, regroup, ended: false };
            let (totals, producer) = run(producer, None, sink, job, largest, Sharing::default())?;
            if let Producer::Sequential { stream, .. } = producer {
                for route in &routes {
                    if let Some(size) = stream.final_size(route.from) {
                        sink.resize(route.to, size)?;
                    }
                }
            }
            Ok(totals)
        }
    }
}

/// Hands out tasks in source order.
enum Producer<'a> {
    Random(Plan<'a>),
    Sequential { stream: &'a mut dyn SequentialAccess, regroup: Regroup, ended: bool },
}

/// What a worker does next.
enum Task {
    Read(ReadTask),
    Piece(Piece),
}

impl Producer<'_> {
    fn next(&mut self, pool: &BufferPool) -> Result<Option<Task>> {
        match self {
            Producer::Random(plan) => Ok(plan.next()?.map(Task::Read)),
            Producer::Sequential { stream, regroup, ended } => loop {
                if let Some(piece) = regroup.pop() {
                    return Ok(Some(Task::Piece(piece)));
                }
                if *ended {
                    return Ok(None);
                }
                // After an error nobody asks a stream again: what it says then is not what was wrong.
                *ended = true;
                if let Some(piece) = stream.next_piece(pool)? {
                    regroup.push(piece, pool)?;
                    *ended = false;
                } else {
                    regroup.flush(pool)?;
                }
            },
        }
    }
}

/// What the workers share.
struct Shared<'a, 'p> {
    producer: Mutex<(u64, Producer<'p>)>,
    random: Option<&'a dyn RandomAccess>,
    orderer: Orderer<'a>,
    sink: &'a dyn ImageSink,
    pool: BufferPool,
    job: &'a Job<'a>,
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
    guest_bytes: AtomicU64,
    zero_bytes: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run<'a, 'p>(
    producer: Producer<'p>,
    random: Option<&'a dyn RandomAccess>,
    sink: &'a dyn ImageSink,
    job: &'a Job<'a>,
    largest_piece: u64,
    sharing: Sharing<'a>,
) -> Result<(Totals, Producer<'p>)> {
    let window = window_per_thread(largest_piece);
    // A piece may be held twice: as it was read and as it was encoded.
    let affordable = BUFFER_BUDGET / (largest_piece.max(1) * 2 * window);
    let threads = job.threads.clamp(1, MAX_THREADS).min(usize::try_from(affordable).unwrap_or(1).max(1));
    let shared = Shared {
        producer: Mutex::new((0, producer)),
        random,
        orderer: Orderer::new(sink, job, threads * window as usize, sharing),
        sink,
        pool: BufferPool::new(),
        job,
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
        guest_bytes: AtomicU64::new(0),
        zero_bytes: AtomicU64::new(0),
    };
    let flusher = Flusher::new(job.routes.iter().map(|route| sink.output(route.to)));
    std::thread::scope(|scope| {
        let _stopping = flusher.stop_when_dropped();
        // Where the system gives no more threads (a limit on memory or processes), fewer do the work.
        if flusher.has_work() {
            let _ = std::thread::Builder::new().spawn_scoped(scope, || flusher.work());
        }
        let workers: Vec<_> = (1..threads)
            .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, || shared.work()).ok())
            .collect();
        shared.work();
        for worker in workers {
            if let Err(panic) = worker.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    if let Some(error) = lock(&shared.error).take() {
        return Err(error);
    }
    let totals = Totals {
        guest_bytes: shared.guest_bytes.load(Ordering::Relaxed),
        zero_bytes: shared.zero_bytes.load(Ordering::Relaxed),
    };
    let (_, producer) = shared.producer.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((totals, producer))
}

/// A worker that panics (a driver's mistake) must not leave the others waiting for its piece.
struct GiveUp<'s, 'a, 'p>(&'s Shared<'a, 'p>);

impl Drop for GiveUp<'_, '_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop.store(true, Ordering::Relaxed);
            self.0.orderer.abort();
        }
    }
}

impl Shared<'_, '_> {
    /// The loop of one worker.
    fn work(&self) {
        let _panicking = GiveUp(self);
        while !self.stop.load(Ordering::Relaxed) {
            match self.step() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    lock(&self.error).get_or_insert(error);
                    self.stop.store(true, Ordering::Relaxed);
                    self.orderer.abort();
                }
            }
        }
    }

    /// One task from source to file; false when there is none left.
    fn step(&self) -> Result<bool> {
        self.job.cancel.check()?;
        if !self.orderer.admit() {
            return Ok(false);
        }
        let (ticket, task) = {
            let mut producer = lock(&self.producer);
            let Some(task) = producer.1.next(&self.pool)? else {
                self.orderer.withdraw();
                return Ok(false);
            };
            producer.0 += 1;
            (producer.0 - 1, task)
        };
        let piece = match task {
            Task::Piece(piece) => piece,
            Task::Read(task) => self.read(task)?,
        };
        let (device, start, len) = (piece.device, piece.start, piece.len);
        let prepared = self.sink.prepare(piece, &self.pool).map_err(|e| e.guest(start..start + len))?;
        let zero = len - prepared.stored().min(len);
        self.orderer.submit(ticket, prepared)?;
        self.guest_bytes.fetch_add(len, Ordering::Relaxed);
        self.zero_bytes.fetch_add(zero, Ordering::Relaxed);
        self.job.progress.advance(device, len, zero);
        Ok(true)
    }

    fn read(&self, task: ReadTask) -> Result<Piece> {
        let Some(random) = self.random.filter(|_| !task.runs.is_empty()) else {
            return Ok(Piece::zero(task.to, task.start, task.len));
        };
        let len = usize::try_from(task.len).map_err(|_| Error::limit("a piece does not fit into memory"))?;
        let mut buffer = self.pool.take(len);
        let mut filled = 0;
        for run in &task.runs {
            buffer[filled..run.start].fill(0);
            let guest_offset = task.start + run.start as u64;
            random
                .read_at(task.from, &mut buffer[run.clone()], guest_offset)
                .map_err(|e| e.guest(guest_offset..task.start + run.end as u64))
                .on_device(&task.name)?;
            filled = run.end;
        }
        buffer[filled..].fill(0);
        Ok(Piece { device: task.to, start: task.start, len: task.len, data: Some(buffer), runs: task.runs })
    }
}
